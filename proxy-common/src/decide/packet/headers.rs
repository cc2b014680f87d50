use super::{Packet, PacketTables};
use crate::abi::{Address, FlowKey, FragmentKey, FragmentPorts, Port, Protocol, SnatKey};
use crate::decide::Peer;

/// Bytes of the Ethernet header. A VLAN tag is not in the frame but beside it.
pub const L2_BYTES: u32 = 14;

/// Bytes of an IP header without options or extensions.
#[inline(always)]
pub(super) const fn ip_bytes(v6: bool) -> u32 {
    if v6 { 40 } else { 20 }
}

/// IP protocol numbers that are no [`Protocol`] of Services.
pub(super) const ICMP: u8 = 1;
pub(super) const ICMPV6: u8 = 58;

/// Bits of a TCP header's flags.
pub(super) const FIN: u8 = 1;
pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
pub(super) const ACK: u8 = 16;

/// What a frame says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Headers {
    /// Where the transport header starts.
    pub l4: u32,
    /// IPv6, else IPv4.
    pub v6: bool,
    /// IP protocol number.
    pub protocol: u8,
    /// 0 for other protocols.
    pub tcp_flags: u8,
    /// It has no transport header: the packet's first fragment had.
    pub later_fragment: bool,
    /// First of several fragments.
    pub first_fragment: bool,
    /// Identification, if it is a fragment.
    pub id: u32,
    /// Where it comes from.
    pub source: Peer,
    /// Where it goes.
    pub destination: Peer,
}

impl Headers {
    /// New connections start so.
    #[inline(always)]
    pub const fn is_syn(&self) -> bool {
        self.tcp_flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// ICMP of either version.
    #[inline(always)]
    pub const fn is_icmp(&self) -> bool {
        matches!(self.protocol, ICMP | ICMPV6)
    }

    /// The flows of who sent it.
    #[inline(always)]
    pub(super) const fn of_source(&self) -> FlowKey {
        FlowKey::new(self.source.0, self.source.1, self.protocol)
    }

    /// The flows of whom it is sent to.
    #[inline(always)]
    pub(super) const fn of_destination(&self) -> FlowKey {
        FlowKey::new(self.destination.0, self.destination.1, self.protocol)
    }

    /// Who it is for, if it answers a replaced source.
    #[inline(always)]
    pub(super) const fn way_back(&self) -> SnatKey {
        SnatKey::new(self.destination, self.source, self.protocol)
    }

    /// Whom it answers, if that has another port inside the node.
    #[inline(always)]
    pub(super) const fn of_inner_destination(&self) -> SnatKey {
        SnatKey::inside(self.destination, self.source, self.protocol)
    }

    /// Who sent it, if that has another port inside the node.
    #[inline(always)]
    pub(super) const fn of_inner_source(&self) -> SnatKey {
        SnatKey::inside(self.source, self.destination, self.protocol)
    }

    /// The protocol, if Services have it.
    #[inline(always)]
    pub const fn transport(&self) -> Option<Protocol> {
        Protocol::from_number(self.protocol)
    }
}

/// IPv6 extension headers that may stand before the transport header.
const MAX_EXTENSIONS: u32 = 6;
/// No header starts later than this: a bound for the verifier, and for who sends nonsense.
const MAX_OFFSET: u32 = 512;

/// Reads an IP header at `l3` and the ports after it. `None`: no IP packet, or one cut short.
#[inline(always)]
pub fn parse(packet: &impl Packet, l3: u32, v6: bool) -> Option<Headers> {
    let mut headers = if v6 { parse_v6(packet, l3)? } else { parse_v4(packet, l3)? };
    if headers.later_fragment || headers.transport().is_none() {
        return Some(headers);
    }
    headers.source.1 = Port::from_raw(packet.load16(headers.l4)?);
    headers.destination.1 = Port::from_raw(packet.load16(headers.l4 + 2)?);
    if headers.protocol == Protocol::Tcp.number() {
        // A quoted packet may be cut off before them.
        headers.tcp_flags = packet.load8(headers.l4 + 13).unwrap_or(0);
    }
    Some(headers)
}

#[inline(always)]
fn parse_v4(packet: &impl Packet, l3: u32) -> Option<Headers> {
    let first = packet.load8(l3)?;
    let bytes = (first as u32 & 15) * 4;
    if first >> 4 != 4 || bytes < 20 {
        return None;
    }
    let fragment = u16::from_be(packet.load16(l3 + 6)?);
    let (offset, more) = (fragment & 0x1fff, fragment & 0x2000 != 0);
    Some(Headers {
        l4: l3 + bytes,
        v6: false,
        protocol: packet.load8(l3 + 9)?,
        tcp_flags: 0,
        later_fragment: offset != 0,
        first_fragment: offset == 0 && more,
        id: packet.load16(l3 + 4)? as u32,
        source: (Address::from_v4_word(packet.load32(l3 + 12)?), Port::new(0)),
        destination: (Address::from_v4_word(packet.load32(l3 + 16)?), Port::new(0)),
    })
}

#[inline(always)]
fn parse_v6(packet: &impl Packet, l3: u32) -> Option<Headers> {
    if packet.load8(l3)? >> 4 != 6 {
        return None;
    }
    let mut headers = Headers {
        l4: l3 + 40,
        v6: true,
        protocol: packet.load8(l3 + 6)?,
        tcp_flags: 0,
        later_fragment: false,
        first_fragment: false,
        id: 0,
        source: (v6_address(packet, l3 + 8)?, Port::new(0)),
        destination: (v6_address(packet, l3 + 24)?, Port::new(0)),
    };
    // Once more, to see what comes after the last.
    for _ in 0..=MAX_EXTENSIONS {
        match headers.protocol {
            // Hop-by-hop options, routing, destination options.
            0 | 43 | 60 => {
                let bytes = (packet.load8(headers.l4 + 1)? as u32 + 1) * 8;
                headers.protocol = packet.load8(headers.l4)?;
                headers.l4 += bytes;
            }
            44 => {
                let fragment = u16::from_be(packet.load16(headers.l4 + 2)?);
                headers.later_fragment = fragment & 0xfff8 != 0;
                headers.first_fragment = fragment & 0xfff8 == 0 && fragment & 1 != 0;
                headers.id = packet.load32(headers.l4 + 4)?;
                headers.protocol = packet.load8(headers.l4)?;
                headers.l4 += 8;
                if headers.later_fragment {
                    return Some(headers);
                }
            }
            _ => return Some(headers),
        }
        if headers.l4 > MAX_OFFSET {
            return None;
        }
    }
    None
}

#[inline(always)]
pub(super) fn v6_address(packet: &impl Packet, at: u32) -> Option<Address> {
    Some(Address::from_words([
        packet.load32(at)?,
        packet.load32(at + 4)?,
        packet.load32(at + 8)?,
        packet.load32(at + 12)?,
    ]))
}

/// Gives a fragment the ports of its packet, and remembers those of a first one. `None`: the first one was not seen.
#[inline(always)]
pub(super) fn with_ports(tables: &impl PacketTables, headers: &mut Headers, at_egress: bool) -> Option<()> {
    if !headers.first_fragment && !headers.later_fragment {
        return Some(());
    }
    let key = FragmentKey {
        source: headers.source.0,
        destination: headers.destination.0,
        id: headers.id,
        protocol: headers.protocol,
        at_egress: at_egress as u8,
        zero: 0,
    };
    if headers.first_fragment {
        let ports = FragmentPorts { source: headers.source.1, destination: headers.destination.1 };
        tables.remember_fragment(&key, &ports);
        return Some(());
    }
    let ports = tables.fragment(&key)?;
    headers.source.1 = ports.source;
    headers.destination.1 = ports.destination;
    Some(())
}
