//! Finding and making flows.

use super::{FlowEntry, PacketTables};
use crate::abi::{Flow, FlowKey, Outcome, Port, Protocol, SnatKey};

/// Ports that are tried before a connection is given up. Where four of five are taken by who goes on, one connection in a
/// thousand finds none.
const TRIES: u32 = 32;

/// The first of them is taken at random if it is certain that nobody has it. In these, ports are given in turn: after a flood
/// of one backend's clients most are taken by who does not exist, and the one that was given away longest ago is the first
/// that is free again. The others are random.
const IN_TURN: core::ops::Range<u32> = 1..3;

/// A second's worth of nanoseconds: how exact a flow's last use is kept.
const SECOND_NS: u64 = 1_000_000_000;

/// The first flow of this client port that fits.
#[inline(always)]
pub(super) fn find<T: PacketTables>(
    tables: &T,
    key: &FlowKey,
    fits: impl Fn(&Flow) -> bool,
) -> Option<(FlowKey, T::Entry)> {
    let entry = tables.flow(key);
    if let Some(entry) = entry
        && fits(entry.flow())
    {
        return Some((*key, entry));
    }
    // A hole in slot 0 says nothing about the others once anybody has used them: young flows are thrown out one by one.
    if !tables.several_vips() {
        return None;
    }
    for slot in 1..FlowKey::SLOTS {
        let key = key.in_slot(slot);
        let entry = tables.flow(&key);
        if let Some(entry) = entry
            && fits(entry.flow())
        {
            return Some((key, entry));
        }
    }
    None
}

/// The flow of a client whose port is another one inside the node (M11).
#[inline(always)]
pub(super) fn find_inside<T: PacketTables>(tables: &T, key: &SnatKey) -> Option<(FlowKey, T::Entry)> {
    let client = tables.snat(key)?;
    let entry = tables.flow(&client)?;
    // It may be another connection of this client by now.
    let flow = entry.flow();
    if flow.inner_port == key.snat_port
        && flow.backend == key.backend
        && flow.backend_port == key.backend_port
    {
        Some((client, entry))
    } else {
        None
    }
}

/// Stores a new flow: in the place of the one to the same VIP, else where this client port has none that goes on; the
/// last slot gives way.
///
/// Inside the node it must not look like another one that goes on (M11): then the client has another port there, as
/// netfilter would have it, which is returned, else 0. A port that cannot be changed (T2) takes the place of the other instead.
#[inline(always)]
pub(super) fn store<T: PacketTables>(tables: &T, client: &FlowKey, flow: &Flow) -> Option<Port> {
    let several = tables.several_vips();
    let fixed = client.protocol == Protocol::Sctp.number();
    let own_node = flow.flags & Flow::OWN_NODE != 0;
    let (mut slot, mut is_its, mut looks_alike) = (FlowKey::SLOTS, false, false);
    for n in 0..FlowKey::SLOTS {
        let entry = if n != 0 && !several { None } else { tables.flow(&client.in_slot(n)) };
        let Some(entry) = entry else {
            if slot == FlowKey::SLOTS {
                slot = n;
            }
            continue;
        };
        let other = entry.flow();
        // Of a foreign flow the backend is not known here.
        let knows = !own_node && !flow.is_foreign() && !other.is_foreign();
        let alike = knows && other.backend == flow.backend && other.backend_port == flow.backend_port;
        if other.vip == flow.vip && other.vip_port == flow.vip_port || alike && fixed {
            if !is_its {
                (slot, is_its) = (n, true);
            }
        } else if other.is_over() {
            if slot == FlowKey::SLOTS {
                slot = n;
            }
            if alike {
                // What this one's backend answers is not of the old one.
                entry.replace(&Flow::NOBODYS);
            }
        } else if alike && other.inner_port == Port::new(0) {
            looks_alike = true;
        }
    }
    if slot == FlowKey::SLOTS {
        slot -= 1;
    }
    let key = client.in_slot(slot);
    let inside =
        SnatKey::inside((client.client, client.port), (flow.backend, flow.backend_port), client.protocol);
    // Another flow's port inside may be this client's own.
    looks_alike |= several && !fixed && !own_node && !flow.is_foreign() && tables.snat(&inside).is_some();
    let mut flow = *flow;
    if looks_alike {
        let Some(port) = tables.claim_port(&inside, &key) else {
            tables.count(Outcome::PacketNoSourcePort);
            return None;
        };
        flow.inner_port = port;
    }
    if let Some(entry) = tables.flow(&key) {
        entry.replace(&flow);
    } else if tables.remember_flow(&key, &flow) {
        tables.count(Outcome::PacketFlowBegun);
    } else {
        tables.count(Outcome::PacketNoRoom);
        return None;
    }
    tables.count(if flow.is_foreign() { Outcome::PacketUntouched } else { Outcome::PacketForwarded });
    Some(flow.inner_port)
}

/// Gives the client of a flow that goes on another port inside the node: its own is somebody's who talks to the backend
/// directly (M11).
#[inline(always)]
pub(super) fn make_way<T: PacketTables>(tables: &T, key: &FlowKey, entry: &T::Entry) {
    let flow = entry.flow();
    let inside = SnatKey::inside((key.client, key.port), (flow.backend, flow.backend_port), key.protocol);
    let Some(port) = tables.claim_port(&inside, key) else {
        tables.count(Outcome::PacketNoSourcePort);
        return;
    };
    // An answered one stays where nothing is thrown out, with all that leads to it.
    if flow.flags & Flow::ANSWERED == 0 || !tables.grow_up(key, entry, |flow| flow.inner_port = port) {
        entry.replace(&Flow { inner_port: port, ..*flow });
    }
}

/// A port that nobody else with this backend has, and now this client: of a replaced source, or inside the node. `key` has
/// any port, and then that one: on a kernel before 6.9 there is no room for a copy on the stack.
#[inline(always)]
pub fn claim_port(tables: &impl PacketTables, key: &mut SnatKey, client: &FlowKey) -> Option<Port> {
    for n in 0..TRIES {
        // Asked anew: there is no room on the stack either.
        let settings = tables.settings()?;
        let count = settings.snat_count as u32;
        let offset = if IN_TURN.contains(&n) {
            tables.turn().checked_rem(count).unwrap_or(0) as u64
        } else {
            (tables.random() as u64 * count as u64) >> 32
        };
        key.snat_port = Port::new(settings.snat_first.wrapping_add(low(offset)));
        let may_be_taken = may_be_taken(tables, key);
        // A client may have the port inside the node as its own. And to find out whether a port is taken takes longer than to
        // take the next one.
        let skips = may_be_taken && (key.is_inside() || n < IN_TURN.start);
        if !skips && claim(tables, key, client, may_be_taken) {
            return Some(key.snat_port);
        }
    }
    None
}

/// The same for a replaced source that cannot be another one.
#[inline(always)]
pub(super) fn claim_this(tables: &impl PacketTables, key: &SnatKey, client: &FlowKey) -> bool {
    claim(tables, key, client, may_be_taken(tables, key))
}

#[inline(always)]
fn claim(tables: &impl PacketTables, key: &SnatKey, client: &FlowKey, may_be_taken: bool) -> bool {
    // A full LRU table throws somebody out even for a key that it has already: it is asked first.
    match if may_be_taken { tables.snat(key) } else { None } {
        None => tables.claim_snat(key, client),
        Some(owner) => is_left(tables, key, client, &owner) && tables.take_snat(key, client),
    }
}

/// Whether anybody may have it; `false` is certain.
#[inline(always)]
fn may_be_taken(tables: &impl PacketTables, key: &SnatKey) -> bool {
    if key.is_inside() {
        tables.may_be_flow(&key.snat, key.snat_port)
    } else {
        tables.may_be_snat(key.stored_port())
    }
}

/// Whether its owner is done with it.
#[inline(always)]
fn is_left(tables: &impl PacketTables, key: &SnatKey, client: &FlowKey, owner: &FlowKey) -> bool {
    // Of an earlier connection from this very port.
    if *owner == *client {
        return true;
    }
    // Netfilter gave it away.
    if owner.is_nobody() {
        return false;
    }
    let Some(entry) = tables.flow(owner) else { return true };
    let flow = entry.flow();
    // An earlier connection of its client may have had it; one without a source yet may be about to.
    let has_other =
        flow.snat_port != Port::new(0) && (flow.snat != key.snat || flow.snat_port != key.snat_port);
    flow.is_over() || has_other
}

/// The low sixteen bits.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
const fn low(number: u64) -> u16 {
    number as u16
}

/// Moves a flow that has turned out to be a connection to where nothing is thrown out.
#[inline(always)]
pub(super) fn grow_up<T: PacketTables>(tables: &T, key: &FlowKey, entry: &T::Entry, flags: u32) -> bool {
    let now_ns = tables.now_ns();
    let grown = tables.grow_up(key, entry, |flow| {
        flow.flags |= flags | Flow::ANSWERED;
        flow.used_ns = now_ns;
    });
    if !grown {
        tables.count(Outcome::PacketFlowsFull);
    }
    grown
}

/// Whether its last use is more than a second ago.
#[inline(always)]
pub(super) const fn is_a_while_ago(flow: &Flow, now_ns: u64) -> bool {
    now_ns.saturating_sub(flow.used_ns) > SECOND_NS
}

/// Keeps the time of last use, without dirtying the entry for every packet.
#[inline(always)]
pub(super) fn touch(entry: &impl FlowEntry, now_ns: u64) {
    if is_a_while_ago(entry.flow(), now_ns) {
        entry.touch(now_ns);
    }
}
