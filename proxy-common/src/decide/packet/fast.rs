//! The fast path (`--fast-path`): packets that skip the node's stack.
//!
//! Nothing here decides what may pass: the stack does, with all its routes and rules, and is watched at it.
//!
//! ```text
//!  comes in ── lane open? ──yes──▶ translated, hop limit less one, link addresses of its lane ──▶ out by its device
//!                  │no                                                                             (its qdisc, its hooks)
//!            ask: "it came in so" ─▶ ingress ─▶ routing, netfilter ─▶ accept: "and leaves so" ─▶ egress
//! ```
//! A lane is what one packet of an answered flow looked like at ingress, with what one like it looked like when it left:
//! addresses, device, link addresses. It opens once there is one for the other direction too. Nothing is looked up in
//! routing or neighbour tables for it, which would cost as much as the stack does.
//!
//! What the stack has said holds for a second ([`Lane::LEASE_NS`]) and for an epoch, which the agent ends when routes,
//! devices or nftables' rules change. Packets that change a connection's state (SYN, FIN, RST), that are unusual (options,
//! fragments, an expiring hop limit) or longer than what was seen to pass go through the stack always: it knows path MTU
//! and errors.

use super::checksum::{add, adjusted, replaced};
use super::flow::find;
use super::headers::{FIN, RST, SYN, ip_bytes};
use super::ingress::find_dialled;
use super::nat::{Side, checksum_at, store_address};
use super::{Covers, FlowEntry, Headers, L2_BYTES, LaneEntry, Packet, PacketTables};
use crate::abi::{Flow, Lane, LaneKey, Outcome, Port, Protocol};
use crate::decide::Peer;

/// By which interface a packet leaves at once, changed for that; `None`: it is left as it is.
#[inline(always)]
pub fn fast(packet: &mut impl Packet, tables: &impl PacketTables, v6: bool) -> Option<u32> {
    let headers = usual(packet, v6)?;
    if changes_state(&headers) {
        return None;
    }
    let key = key_of(&headers);
    let seal = key.seal();
    let entry = tables.lane(&key)?;
    let lane = entry.read();
    if lane.flags & Lane::OPEN == 0
        || lane.from != tables.device_index()
        || !lane.holds(tables.epoch(), tables.now_ns())
        || length(packet, &headers)? > lane.length
        || addressed(packet)? != lane.addressed
        // What was read is this key's.
        || lane.seal != seal
        || entry.seal() != seal
    {
        return None;
    }
    hop(packet, v6)?;
    tables.count(Outcome::PacketFast);
    // Changed by half (there is no memory) it must not go on: by no interface at all.
    Some(if change(packet, &headers, &lane).is_some() { lane.device } else { 0 })
}

#[inline(always)]
fn change(packet: &mut impl Packet, headers: &Headers, lane: &Lane) -> Option<()> {
    translate(packet, headers, lane)?;
    packet.store32(0, lane.link[0])?;
    packet.store32(4, lane.link[1])?;
    packet.store32(8, lane.link[2])
}

/// Headers of a packet of the usual shape, which can be changed to the end.
#[inline(always)]
fn usual(packet: &impl Packet, v6: bool) -> Option<Headers> {
    if packet.is_tagged() {
        return None;
    }
    let (source, destination, protocol) = super::bystander::ends(packet, L2_BYTES, v6)?;
    let l4 = L2_BYTES + ip_bytes(v6);
    let mut tcp_flags = 0;
    if protocol == Protocol::Tcp.number() {
        tcp_flags = packet.load8(l4 + 13)?;
        packet.load16(l4 + 16)?;
    } else if protocol == Protocol::Udp.number() {
        packet.load16(l4 + 6)?;
    } else {
        return None;
    }
    Some(Headers {
        l4,
        v6,
        protocol,
        tcp_flags,
        later_fragment: false,
        first_fragment: false,
        id: 0,
        source,
        destination,
    })
}

/// Whether such a packet begins or ends a connection.
#[inline(always)]
const fn changes_state(headers: &Headers) -> bool {
    headers.tcp_flags & (SYN | FIN | RST) != 0
}

#[inline(always)]
const fn key_of(headers: &Headers) -> LaneKey {
    LaneKey::new(headers.source, headers.destination, headers.protocol)
}

/// The longest IP packet that the frame becomes on its way: many may travel as one.
#[inline(always)]
fn length(packet: &impl Packet, headers: &Headers) -> Option<u32> {
    let segment = packet.segment_bytes();
    if segment == 0 {
        return Some(packet.bytes().saturating_sub(L2_BYTES));
    }
    let header = if headers.protocol == Protocol::Tcp.number() {
        (packet.load8(headers.l4 + 12)? >> 4) as u32 * 4
    } else {
        8
    };
    Some(headers.l4 - L2_BYTES + header + segment)
}

/// Counts a hop, as routing does. `None`: it was the last; the stack says so to the sender.
#[inline(always)]
fn hop(packet: &mut impl Packet, v6: bool) -> Option<()> {
    // The hop limit is half of a word, in IPv4 the first one.
    let at = L2_BYTES + if v6 { 6 } else { 8 };
    let old = packet.load16(at)?;
    let [first, second] = old.to_ne_bytes();
    let limit = if v6 { second } else { first };
    if limit <= 1 {
        return None;
    }
    let new = u16::from_ne_bytes(if v6 { [first, limit - 1] } else { [limit - 1, second] });
    packet.store16(at, new)?;
    let difference = replaced(0, old as u32, new as u32);
    if v6 {
        packet.change_sum(difference);
    } else {
        let checksum = packet.load16(L2_BYTES + 10)?;
        packet.store16(L2_BYTES + 10, adjusted(checksum, difference))?;
    }
    Some(())
}

/// Both sides at once: each call for a checksum costs as much as a look-up.
#[inline(always)]
fn translate(packet: &mut impl Packet, headers: &Headers, lane: &Lane) -> Option<()> {
    let (v6, l4) = (headers.v6, headers.l4);
    let (mut moved, mut ports) = (0, 0);
    if lane.source != headers.source.0 {
        moved = store_address(packet, L2_BYTES, v6, Side::Source, headers.source.0, lane.source)?;
    }
    if lane.destination != headers.destination.0 {
        let to = lane.destination;
        moved =
            add(moved, store_address(packet, L2_BYTES, v6, Side::Destination, headers.destination.0, to)?);
    }
    let sides =
        [(l4, headers.source.1, lane.source_port), (l4 + 2, headers.destination.1, lane.destination_port)];
    for (at, old, new) in sides {
        if old != new {
            packet.store16(at, new.raw())?;
            ports = replaced(ports, old.raw() as u32, new.raw() as u32);
        }
    }
    let protocol = headers.transport()?;
    let at = checksum_at(protocol, l4);
    let zero_is_none = matches!(protocol, Protocol::Udp);
    packet.fix_checksum(at, moved, Covers::PseudoHeader, zero_is_none)?;
    if ports != 0 {
        packet.fix_checksum(at, ports, Covers::Content, zero_is_none)?;
    }
    Some(())
}

/// Whether a flow is one to learn of: answered, not about to change, and with nothing that is settled packet by packet.
#[inline(always)]
fn is_steady(flow: &Flow) -> bool {
    const UNUSUAL: u32 = Flow::OWN_NODE | Flow::FOREIGN | Flow::HELD;
    flow.flags & (UNUSUAL | Flow::ANSWERED) == Flow::ANSWERED
        && flow.inner_port == Port::new(0)
        && !flow.is_over()
}

/// At ingress, of a packet that is about to take the ordinary way. Whether [`accept`] is to see it leave.
///
/// Where a connection begins or ends, what was learned of packets like it is forgotten: the next one may have another
/// backend. A datagram flow finds another one only where its lane holds no more, or for a packet that was too long for it:
/// that is accepted in its place.
#[inline(always)]
pub fn ask(packet: &impl Packet, tables: &impl PacketTables, v6: bool) -> bool {
    let Some(headers) = usual(packet, v6) else { return false };
    let headers = &headers;
    let (key, from) = (key_of(headers), tables.device_index());
    if changes_state(headers) {
        tables.close_lane(&key);
        return false;
    }
    if !is_of_steady(tables, headers) {
        return false;
    }
    let Some(addressed) = addressed(packet) else { return false };
    if let Some(entry) = tables.lane(&key)
        && entry.seal() == key.seal()
    {
        let lane = entry.read();
        if lane.from == from && lane.addressed == addressed {
            return true;
        }
        // Somebody else may only pretend to be who sent it, or a switch floods what is for another node.
        if lane.holds(tables.epoch(), tables.now_ns()) {
            return false;
        }
    }
    tables.put_lane(&key, &Lane { seal: key.seal(), from, addressed, ..Lane::default() });
    true
}

#[inline(always)]
fn is_of_steady(tables: &impl PacketTables, headers: &Headers) -> bool {
    let (source, destination) = (headers.source, headers.destination);
    if tables.may_be_snat(destination.1)
        && let Some(client) = tables.snat(&headers.way_back())
    {
        let Some(entry) = tables.flow(&client) else { return false };
        let flow = entry.flow();
        return flow.way_back(headers.protocol) == headers.way_back() && flow.needs_snat() && is_steady(flow);
    }
    if tables.may_be_vip(&destination.0)
        && let Some((_, entry)) = find_dialled(tables, headers)
    {
        return is_steady(entry.flow());
    }
    if tables.may_be_flow(&destination.0, destination.1)
        && let Some((_, entry)) = find(tables, &headers.of_destination(), |flow| flow.goes_to(source))
    {
        let flow = entry.flow();
        return !flow.needs_snat() && is_steady(flow);
    }
    false
}

/// At egress, of a packet that [`ask`] has asked for, at the first hook that it leaves by and before anything is changed there.
/// `None`: nothing is learned of it.
#[inline(always)]
pub fn accept(packet: &impl Packet, tables: &impl PacketTables, v6: bool) -> Option<()> {
    let headers = &usual(packet, v6)?;
    let epoch = tables.epoch();
    if epoch == 0 || changes_state(headers) {
        return None;
    }
    let (source, destination) = (headers.source, headers.destination);
    let mut replies = true;
    let mut found = None;
    if tables.may_be_flow(&destination.0, destination.1) {
        found = find(tables, &headers.of_destination(), |flow| flow.goes_to(source));
    }
    if found.is_none() && tables.may_be_flow(&source.0, source.1) {
        replies = false;
        found = find(tables, &headers.of_source(), |flow| flow.goes_to(destination));
    }
    let (client, entry) = found?;
    let flow = entry.flow();
    if !is_steady(flow) {
        return None;
    }
    let dialler: Peer = (client.client, client.port);
    let seen = if flow.needs_snat() { (flow.snat, flow.snat_port) } else { dialler };
    let (vip, backend) = ((flow.vip, flow.vip_port), (flow.backend, flow.backend_port));
    let forward = LaneKey::new(dialler, vip, headers.protocol);
    let back = LaneKey::new(backend, seen, headers.protocol);
    let (key, other, to) =
        if replies { (back, forward, (vip, dialler)) } else { (forward, back, (seen, backend)) };
    let entry = tables.lane(&key)?;
    let old = entry.read();
    if old.seal != key.seal() || !is_from(tables, old.from) {
        return None;
    }
    let length = length(packet, headers)?;
    let link = link(packet)?;
    let (device, now_ns) = (tables.device_index(), tables.now_ns());
    let is_known = old.holds(epoch, now_ns) && old.device == device;
    let mut lane = Lane {
        seal: old.seal,
        device,
        accepted_ns: now_ns,
        source: to.0.0,
        destination: to.1.0,
        source_port: to.0.1,
        destination_port: to.1.1,
        from: old.from,
        epoch,
        length: if is_known && old.length > length { old.length } else { length },
        flags: 0,
        link,
        addressed: old.addressed,
        zero: 0,
    };
    if let Some(entry) = tables.lane(&other) {
        let other_lane = entry.read();
        if other_lane.seal == other.seal() && other_lane.device != 0 && other_lane.epoch == epoch {
            lane.flags = Lane::OPEN;
            entry.open();
        }
    }
    entry.write(&lane);
    Some(())
}

/// The link address that a frame is for.
#[inline(always)]
fn addressed(packet: &impl Packet) -> Option<[u16; 3]> {
    Some([packet.load16(0)?, packet.load16(2)?, packet.load16(4)?])
}

/// The link addresses that a frame leaves with.
#[inline(always)]
fn link(packet: &impl Packet) -> Option<[u32; 3]> {
    Some([packet.load32(0)?, packet.load32(4)?, packet.load32(8)?])
}

/// Whether the packet that leaves came in by this device, or by the bridge that it is a port of.
#[inline(always)]
fn is_from(tables: &impl PacketTables, device: u32) -> bool {
    let arrived = tables.arrived_by();
    if arrived == 0 {
        return false;
    }
    if device == arrived {
        return true;
    }
    match tables.other_device(device) {
        Some(device) => device.bridge == arrived,
        None => false,
    }
}
