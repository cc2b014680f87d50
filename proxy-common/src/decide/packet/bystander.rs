//! What a hook asks first: is this packet certainly none of ours?
//!
//! Most packets of a node are not, and pay for being asked. So this reads what every packet has where nearly every packet
//! has it, asks the filters, and looks up nothing. Whatever is unusual is said to be ours: the whole way finds out.

use super::headers::{ICMP, V4, V6, ports};
use super::ingress::is_unassigned;
use super::{L2_BYTES, Packet, PacketTables};
use crate::abi::{Port, Protocol};
use crate::decide::Peer;

/// Of a protocol that has none.
const NO_PORTS: (Port, Port) = (Port::new(0), Port::new(0));
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
    let [a, b, c, d, e, transport] = packet.load_words(l3)?;
    let fixed = V4([a, b, c, d, e]);
    if fixed.version() != 4 || fixed.header_bytes() != 20 || fixed.fragment() & FRAGMENT != 0 {
        return None;
    }
    let protocol = fixed.protocol();
    if protocol == ICMP {
        return None;
    }
    let (from, to) = if Protocol::from_number(protocol).is_some() { ports(transport) } else { NO_PORTS };
    Some(((fixed.source(), from), (fixed.destination(), to), protocol))
}

/// Only with ports: most other protocols are extension headers.
#[inline(always)]
fn ends_v6(packet: &impl Packet, l3: u32) -> Option<(Peer, Peer, u8)> {
    let [a, b, c, d, e, f, g, h, i, j, transport] = packet.load_words(l3)?;
    let fixed = V6([a, b, c, d, e, f, g, h, i, j]);
    if fixed.version() != 6 {
        return None;
    }
    let protocol = fixed.protocol();
    Protocol::from_number(protocol)?;
    let (from, to) = ports(transport);
    Some(((fixed.source(), from), (fixed.destination(), to), protocol))
}
