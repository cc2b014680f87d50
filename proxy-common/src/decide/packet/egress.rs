use super::flow::{find, touch};
use super::headers::{FIN, RST, with_ports};
use super::nat::{Side, rewrite};
use super::own_node::own_node_reply;
use super::{FlowEntry, Headers, Packet, PacketTables, Verdict};
use crate::abi::{Address, Device, Flow, FlowKey, Outcome, Port, Protocol, SnatKey};
use crate::decide::Peer;

/// Ports that are tried before a connection is given up.
const TRIES: u32 = 16;

/// A TCP, UDP or SCTP packet that leaves by a device. `None`: cut short; it is left alone.
#[inline(always)]
pub fn egress(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &mut Headers,
) -> Option<Verdict> {
    let Some(()) = with_ports(tables, headers, true) else { return Some(Verdict::Next) };
    let headers = &*headers;
    if headers.transport().is_none() {
        return Some(Verdict::Next);
    }
    let (source, destination) = (headers.source, headers.destination);
    // A reply that one process of this node sends to another one.
    if tables.is_own()
        && tables.may_be_snat(destination.1)
        && let Some(client) = tables.snat(&headers.way_back())
        && let Some(entry) = tables.flow(&client)
        && entry.flow().flags & Flow::OWN_NODE != 0
    {
        return own_node_reply(packet, tables, headers, &client, &entry);
    }
    if tables.may_be_flow(&destination.0, destination.1) {
        let known = find(tables, &headers.of_destination(), |flow| {
            flow.backend == source.0 && flow.backend_port == source.1
        });
        if let Some((key, entry)) = known {
            // Read before the flow moves: its old place may be somebody else's at once.
            let vip = (entry.flow().vip, entry.flow().vip_port);
            answered(tables, headers, &key, &entry);
            rewrite(packet, headers, Side::Source, vip)?;
            tables.count(Outcome::PacketReplied);
            return Some(Verdict::Next);
        }
    }
    if tables.may_be_flow(&source.0, source.1)
        && let Some((_, entry)) = find_to_replace(tables, headers)
    {
        let to = (entry.flow().snat, entry.flow().snat_port);
        if to.1 == Port::new(0) {
            return Some(Verdict::ReplaceSource);
        }
        rewrite(packet, headers, Side::Source, to)?;
        tables.count(Outcome::PacketSourceReplaced);
        return Some(Verdict::Next);
    }
    if tables.is_own() && tables.may_be_vip(&destination.0) {
        return Some(Verdict::OwnNode);
    }
    Some(Verdict::Next)
}

/// The first packet of a flow that leaves with another source.
#[inline(always)]
pub fn replace_source(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &Headers,
) -> Option<Verdict> {
    let Some((key, entry)) = find_to_replace(tables, headers) else { return Some(Verdict::Drop) };
    let snat = source_by(tables.device(), headers.v6);
    let Some(to) = claim(tables, snat, headers, &key, headers.destination) else {
        tables.count(Outcome::PacketNoSourcePort);
        return Some(Verdict::Drop);
    };
    entry.set_snat(to.0, to.1);
    rewrite(packet, headers, Side::Source, to)?;
    tables.count(Outcome::PacketSourceReplaced);
    Some(Verdict::Next)
}

/// The flow of a packet that goes to a backend with a source that is not to be seen there.
#[inline(always)]
fn find_to_replace<T: PacketTables>(tables: &T, headers: &Headers) -> Option<(FlowKey, T::Entry)> {
    let backend = headers.destination;
    find(tables, &headers.of_source(), |flow| {
        flow.needs_snat() && flow.backend == backend.0 && flow.backend_port == backend.1
    })
}

/// The backend has answered: the flow grows up with its first reply.
#[inline(always)]
pub(super) fn answered<T: PacketTables>(tables: &T, headers: &Headers, key: &FlowKey, entry: &T::Entry) {
    let flow = entry.flow();
    let tcp_flags = headers.tcp_flags;
    let mut flags = Flow::ANSWERED;
    if tcp_flags & FIN != 0 {
        flags |= Flow::BACKEND_FIN;
    }
    if tcp_flags & RST != 0 {
        flags |= Flow::RESET;
    }
    if flow.flags & Flow::ANSWERED == 0 {
        let grown = Flow { flags: flow.flags | flags, used_ns: tables.now_ns(), ..*flow };
        if tables.grow_up(key, &grown) {
            return;
        }
        tables.count(Outcome::PacketFlowsFull);
        // It tries again with the next answer, but what ends it is said once only.
        flags &= !Flow::ANSWERED;
    }
    if flags & !flow.flags != 0 {
        entry.set_flags(flags);
    }
    touch(entry, tables.now_ns());
}

/// The source that packets get which leave by a device (M7); unset: none.
#[inline(always)]
pub(super) fn source_by(device: Option<Device>, v6: bool) -> Address {
    let Some(device) = device else { return Address::default() };
    if v6 { device.v6 } else { device.v4 }
}

/// A source for a connection that nobody else with this backend has (M7).
#[inline(always)]
pub(super) fn claim(
    tables: &impl PacketTables,
    snat: Address,
    headers: &Headers,
    client: &FlowKey,
    backend: Peer,
) -> Option<Peer> {
    let settings = tables.settings()?;
    if snat == Address::default() {
        return None;
    }
    let mut key = SnatKey::new((snat, headers.source.1), backend, headers.protocol);
    // T2: an SCTP port cannot be changed.
    if headers.protocol == Protocol::Sctp.number() {
        return if tables.claim_snat(&key, client) { Some((snat, key.snat_port)) } else { None };
    }
    for _ in 0..TRIES {
        let offset = (tables.random() as u64 * settings.snat_count as u64) >> 32;
        key.snat_port = Port::new(settings.snat_first.wrapping_add(low(offset)));
        if tables.claim_snat(&key, client) {
            return Some((snat, key.snat_port));
        }
        // Whoever had it may be done with it.
        let owner = tables.snat(&key);
        let done = match owner {
            // Of an earlier connection from this very port.
            Some(owner) if owner == *client => true,
            // Netfilter gave it away.
            Some(owner) if owner.is_nobody() => false,
            Some(owner) => match tables.flow(&owner) {
                Some(entry) => {
                    let flow = entry.flow();
                    // An earlier connection of its client may have had it; one without a source yet may be about to.
                    let has_other = flow.snat != key.snat || flow.snat_port != key.snat_port;
                    flow.is_over() || flow.snat_port != Port::new(0) && has_other
                }
                None => true,
            },
            None => false,
        };
        if done && tables.take_snat(&key, client) {
            return Some((snat, key.snat_port));
        }
    }
    None
}

/// The low sixteen bits.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
const fn low(number: u64) -> u16 {
    number as u16
}
