//! What a hook asks first: is this packet certainly none of ours?
//!
//! Most packets of a node are not, and pay for being asked. So this reads what every packet has where nearly every packet
//! has it, asks the filters, and looks up nothing. Whatever is unusual is said to be ours: the whole way finds out.

use super::headers::ICMP;
use super::ingress::is_unassigned;
use super::{L2_BYTES, Packet, PacketTables};
use crate::abi::{Address, Port, Protocol};
use crate::decide::Peer;

/// An IPv4 header without options starts so.
const PLAIN_V4: u8 = 0x45;
/// "More fragments", and the fragment's offset.
const FRAGMENT: u16 = 0x3fff;

/// Whether a packet that comes in, with its IP header at `l3`, is certainly left alone.
#[inline(always)]
pub fn passes_in(packet: &impl Packet, tables: &impl PacketTables, l3: u32, v6: bool) -> bool {
    let Some((from, to, _)) = ends(packet, l3, v6) else { return false };
    // Who has flows may talk to a backend of one directly (M11).
    if tables.may_be_snat(to.1) || tables.may_be_vip(&to.0) || tables.may_be_flow(&from.0, from.1) {
        return false;
    }
    // What answers a client may skip the stack. Frames without link header never do.
    if tables.fast_path() && l3 == L2_BYTES && tables.may_be_flow(&to.0, to.1) {
        return false;
    }
    !is_unassigned(tables, &to.0)
}

/// Whether a packet that leaves, with its IP header at `l3`, is certainly left alone.
#[inline(always)]
pub fn passes_out(packet: &impl Packet, tables: &impl PacketTables, l3: u32, v6: bool) -> bool {
    let Some((from, to, _)) = ends(packet, l3, v6) else { return false };
    if tables.may_be_flow(&to.0, to.1) || tables.may_be_flow(&from.0, from.1) {
        return false;
    }
    !tables.is_own() || !tables.may_be_snat(to.1) && !tables.may_be_vip(&to.0)
}

/// Source, destination and protocol of a packet of the usual shape. Without ports it has port 0.
#[inline(always)]
pub(super) fn ends(packet: &impl Packet, l3: u32, v6: bool) -> Option<(Peer, Peer, u8)> {
    if v6 { ends_v6(packet, l3) } else { ends_v4(packet, l3) }
}

#[inline(always)]
fn ends_v4(packet: &impl Packet, l3: u32) -> Option<(Peer, Peer, u8)> {
    if packet.load8(l3)? != PLAIN_V4 || u16::from_be(packet.load16(l3 + 6)?) & FRAGMENT != 0 {
        return None;
    }
    let protocol = packet.load8(l3 + 9)?;
    if protocol == ICMP {
        return None;
    }
    let (source, destination) = (packet.load32(l3 + 12)?, packet.load32(l3 + 16)?);
    let ports = if Protocol::from_number(protocol).is_some() { packet.load32(l3 + 20)? } else { 0 };
    let (from, to) = peers(Address::from_v4_word(source), Address::from_v4_word(destination), ports);
    Some((from, to, protocol))
}

/// Only with ports: most other protocols are extension headers.
#[inline(always)]
fn ends_v6(packet: &impl Packet, l3: u32) -> Option<(Peer, Peer, u8)> {
    if packet.load8(l3)? >> 4 != 6 {
        return None;
    }
    let protocol = packet.load8(l3 + 6)?;
    Protocol::from_number(protocol)?;
    let source = super::headers::v6_address(packet, l3 + 8)?;
    let destination = super::headers::v6_address(packet, l3 + 24)?;
    let (from, to) = peers(source, destination, packet.load32(l3 + 40)?);
    Some((from, to, protocol))
}

/// `ports`: both, as they lie in memory.
#[inline(always)]
const fn peers(source: Address, destination: Address, ports: u32) -> (Peer, Peer) {
    let [a, b, c, d] = ports.to_ne_bytes();
    let (from, to) = (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]));
    ((source, Port::from_raw(from)), (destination, Port::from_raw(to)))
}
