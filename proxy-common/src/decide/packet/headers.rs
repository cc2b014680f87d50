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

/// The fixed part of an IPv4 header, in words as they lie in memory: one question whether all of it is there.
pub(super) struct V4(pub(super) [u32; 5]);

impl V4 {
    #[inline(always)]
    pub(super) const fn version(&self) -> u8 {
        self.0[0].to_ne_bytes()[0] >> 4
    }

    /// Options included.
    #[inline(always)]
    pub(super) const fn header_bytes(&self) -> u32 {
        (self.0[0].to_ne_bytes()[0] as u32 & 15) * 4
    }

    #[inline(always)]
    const fn id(&self) -> u16 {
        let [a, b, ..] = self.0[1].to_ne_bytes();
        u16::from_ne_bytes([a, b])
    }

    /// Flags and offset.
    #[inline(always)]
    pub(super) const fn fragment(&self) -> u16 {
        let [.., a, b] = self.0[1].to_ne_bytes();
        u16::from_be_bytes([a, b])
    }

    #[inline(always)]
    pub(super) const fn protocol(&self) -> u8 {
        self.0[2].to_ne_bytes()[1]
    }

    #[inline(always)]
    pub(super) const fn source(&self) -> Address {
        Address::from_v4_word(self.0[3])
    }

    #[inline(always)]
    pub(super) const fn destination(&self) -> Address {
        Address::from_v4_word(self.0[4])
    }
}

/// As [`V4`].
pub(super) struct V6(pub(super) [u32; 10]);

impl V6 {
    #[inline(always)]
    pub(super) const fn version(&self) -> u8 {
        self.0[0].to_ne_bytes()[0] >> 4
    }

    /// Of what comes next: a transport protocol, or an extension.
    #[inline(always)]
    pub(super) const fn protocol(&self) -> u8 {
        self.0[1].to_ne_bytes()[2]
    }

    #[inline(always)]
    pub(super) const fn source(&self) -> Address {
        let [_, _, a, b, c, d, ..] = self.0;
        Address::from_words([a, b, c, d])
    }

    #[inline(always)]
    pub(super) const fn destination(&self) -> Address {
        let [.., a, b, c, d] = self.0;
        Address::from_words([a, b, c, d])
    }
}

/// Source and destination port: the first word of every [`Protocol`]'s header.
#[inline(always)]
pub(super) const fn ports(word: u32) -> (Port, Port) {
    let [a, b, c, d] = word.to_ne_bytes();
    (Port::from_raw(u16::from_ne_bytes([a, b])), Port::from_raw(u16::from_ne_bytes([c, d])))
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
    (headers.source.1, headers.destination.1) = ports(packet.load32(headers.l4)?);
    if headers.protocol == Protocol::Tcp.number() {
        // A quoted packet may be cut off before them.
        headers.tcp_flags = packet.load8(headers.l4 + 13).unwrap_or(0);
    }
    Some(headers)
}

#[inline(always)]
fn parse_v4(packet: &impl Packet, l3: u32) -> Option<Headers> {
    let fixed = V4(packet.load_words(l3)?);
    let bytes = fixed.header_bytes();
    if fixed.version() != 4 || bytes < 20 {
        return None;
    }
    let (offset, more) = (fixed.fragment() & 0x1fff, fixed.fragment() & 0x2000 != 0);
    Some(Headers {
        l4: l3 + bytes,
        v6: false,
        protocol: fixed.protocol(),
        tcp_flags: 0,
        later_fragment: offset != 0,
        first_fragment: offset == 0 && more,
        id: fixed.id() as u32,
        source: (fixed.source(), Port::new(0)),
        destination: (fixed.destination(), Port::new(0)),
    })
}

#[inline(always)]
fn parse_v6(packet: &impl Packet, l3: u32) -> Option<Headers> {
    let fixed = V6(packet.load_words(l3)?);
    if fixed.version() != 6 {
        return None;
    }
    let mut headers = Headers {
        l4: l3 + 40,
        v6: true,
        protocol: fixed.protocol(),
        tcp_flags: 0,
        later_fragment: false,
        first_fragment: false,
        id: 0,
        source: (fixed.source(), Port::new(0)),
        destination: (fixed.destination(), Port::new(0)),
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
