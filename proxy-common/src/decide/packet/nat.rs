//! Rewriting one side of a packet, with every checksum that covers it.

use super::checksum::{adjusted, replaced};
use super::{Covers, Headers, L2_BYTES, Packet};
use crate::abi::{Address, Port, Protocol};
use crate::decide::Peer;

/// Which side of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    Source,
    Destination,
}

/// Puts `to` in the place of the source or the destination.
#[inline(always)]
pub(super) fn rewrite(packet: &mut impl Packet, headers: &Headers, side: Side, to: Peer) -> Option<()> {
    let old = match side {
        Side::Source => headers.source,
        Side::Destination => headers.destination,
    };
    if headers.later_fragment {
        return store_address(packet, L2_BYTES, headers.v6, side, old.0, to.0).map(|_| ());
    }
    let protocol = headers.transport()?;
    let checksum = checksum_at(protocol, headers.l4);
    if checksum != NO_CHECKSUM {
        // All of it or nothing: a packet that is cut off before its checksum stays as it is.
        packet.load16(checksum)?;
    }
    let moved = store_address(packet, L2_BYTES, headers.v6, side, old.0, to.0)?;
    if checksum != NO_CHECKSUM {
        packet.fix_checksum(checksum, moved, Covers::PseudoHeader, matches!(protocol, Protocol::Udp))?;
    }
    rewrite_port(packet, headers, side, to.1)
}

/// Puts a port in the place of the source's or the destination's.
#[inline(always)]
pub(super) fn rewrite_port(packet: &mut impl Packet, headers: &Headers, side: Side, to: Port) -> Option<()> {
    let (old, at) = match side {
        Side::Source => (headers.source.1, headers.l4),
        Side::Destination => (headers.destination.1, headers.l4 + 2),
    };
    if headers.later_fragment || old == to {
        return Some(());
    }
    let protocol = headers.transport()?;
    packet.store16(at, to.raw())?;
    let checksum = checksum_at(protocol, headers.l4);
    if checksum == NO_CHECKSUM {
        return Some(());
    }
    let difference = replaced(0, old.raw() as u32, to.raw() as u32);
    packet.fix_checksum(checksum, difference, Covers::Content, matches!(protocol, Protocol::Udp))
}

/// Sends the frame to a link address. A device takes in only what is addressed to it.
#[inline(always)]
pub fn address_to(packet: &mut impl Packet, mac: [u8; 6]) -> Option<()> {
    packet.store16(0, u16::from_ne_bytes([mac[0], mac[1]]))?;
    packet.store32(2, u32::from_ne_bytes([mac[2], mac[3], mac[4], mac[5]]))
}

/// Nowhere: the link header lies there.
pub(super) const NO_CHECKSUM: u32 = 0;

/// Where the checksum lies that covers addresses and ports, or [`NO_CHECKSUM`]: SCTP's covers no address, and its ports
/// stay (T2). Not an `Option`: kernels before 6.3 refuse a program that keeps an empty one, half of which nobody wrote.
#[inline(always)]
pub(super) const fn checksum_at(protocol: Protocol, l4: u32) -> u32 {
    match protocol {
        Protocol::Tcp => l4 + 16,
        Protocol::Udp => l4 + 6,
        Protocol::Sctp => NO_CHECKSUM,
    }
}

/// Stores an address into the IP header at `l3`, with that header's own checksum; returns the difference that the
/// address makes.
#[inline(always)]
pub(super) fn store_address(
    packet: &mut impl Packet,
    l3: u32,
    v6: bool,
    side: Side,
    old: Address,
    new: Address,
) -> Option<u32> {
    let (o, n) = (old.words(), new.words());
    let mut difference = 0;
    if v6 {
        let at = match side {
            Side::Source => l3 + 8,
            Side::Destination => l3 + 24,
        };
        packet.store32(at, n[0])?;
        packet.store32(at + 4, n[1])?;
        packet.store32(at + 8, n[2])?;
        packet.store32(at + 12, n[3])?;
        difference = replaced(difference, o[0], n[0]);
        difference = replaced(difference, o[1], n[1]);
        difference = replaced(difference, o[2], n[2]);
        difference = replaced(difference, o[3], n[3]);
    } else {
        let at = match side {
            Side::Source => l3 + 12,
            Side::Destination => l3 + 16,
        };
        difference = replaced(difference, o[3], n[3]);
        let checksum = packet.load16(l3 + 10)?;
        packet.store32(at, n[3])?;
        packet.store16(l3 + 10, adjusted(checksum, difference))?;
    }
    Some(difference)
}
