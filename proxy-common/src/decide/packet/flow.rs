//! Finding and making flows.

use super::{FlowEntry, PacketTables};
use crate::abi::{Flow, FlowKey, Protocol};

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

/// Stores a new flow where this client port has no other that goes on; the last slot gives way.
///
/// A datagram flow takes the place of one to another VIP with the same backend: inside the node both look alike, and a
/// client's port is used again long before the old flow is gone.
#[inline(always)]
pub(super) fn store<T: PacketTables>(tables: &T, key: &FlowKey, flow: &Flow) -> Option<(FlowKey, T::Entry)> {
    for slot in 0..FlowKey::SLOTS {
        let key = key.in_slot(slot);
        let Some(entry) = tables.flow(&key) else {
            if !tables.remember_flow(&key, flow) {
                return None;
            }
            let entry = tables.flow(&key)?;
            return Some((key, entry));
        };
        // Of a foreign flow the backend is not known here.
        let alike = key.protocol != Protocol::Tcp.number()
            && !flow.is_foreign()
            && entry.flow().backend == flow.backend
            && entry.flow().backend_port == flow.backend_port;
        if slot + 1 == FlowKey::SLOTS || entry.flow().is_over() || alike {
            entry.replace(flow);
            return Some((key, entry));
        }
    }
    None
}

/// Keeps the time of last use, without dirtying the entry for every packet.
#[inline(always)]
pub(super) fn touch(entry: &impl FlowEntry, now_ns: u64) {
    if now_ns.wrapping_sub(entry.flow().used_ns) > SECOND_NS {
        entry.touch(now_ns);
    }
}
