use super::{Tables, select};
use crate::abi::{
    AffinityEntry, AffinityKey, AffinitySlot, AffinityWord, Backend, BackendId, ClientKey, ServiceId,
    SetWord, WhichSet,
};

/// Rules A3 and A4: the entry's backend while it is alive and in the ruling set, else a new choice; either way the
/// entry is renewed. `None` as for [`select::pick`].
#[inline(always)]
pub(super) fn choose(
    tables: &impl Tables,
    service: ServiceId,
    which: WhichSet,
    set: SetWord,
    affinity: AffinityWord,
    client: ClientKey,
) -> Option<(BackendId, Backend)> {
    let now_ns = tables.now_ns();
    let key = AffinityKey::new(service, client);
    let mut entry = AffinityEntry::new(affinity.epoch());
    if let Some(found) = tables.affinity_entry(&key)
        && found.is_of(service)
        && found.epoch == affinity.epoch()
    {
        entry = found;
    }
    let (this, other) = entry.slots(which);
    let mut chosen = usable(tables, which, affinity, this, now_ns);
    if chosen.is_none() {
        chosen = usable(tables, which, affinity, other, now_ns);
    }
    if chosen.is_none() {
        chosen = select::pick(tables, set);
    }
    let (id, backend) = chosen?;
    let renewed = AffinitySlot { backend: id, renewed_ns: now_ns };
    entry.set_slots(which, renewed, if other.backend == id { renewed } else { other });
    tables.remember_affinity(&key, &entry.sealed(service));
    Some((id, backend))
}

#[inline(always)]
fn usable(
    tables: &impl Tables,
    which: WhichSet,
    affinity: AffinityWord,
    slot: AffinitySlot,
    now_ns: u64,
) -> Option<(BackendId, Backend)> {
    if slot.backend == BackendId::NONE {
        return None;
    }
    let age_ns = now_ns.saturating_sub(slot.renewed_ns);
    if age_ns >= affinity.timeout_s() as u64 * 1_000_000_000 {
        return None;
    }
    let backend = select::get(tables, slot.backend)?;
    if backend.is_in(which) { Some((slot.backend, backend)) } else { None }
}
