use super::Tables;
use super::select::{self, Choice, NOBODY, is_somebody};
use crate::abi::{
    AffinityEntry, AffinityKey, AffinitySlot, AffinityWord, BackendId, ClientKey, Frontend, WhichSet,
};

/// Rules A3 and A4: the entry's backend while it is alive and in the ruling set, else a new choice; either way the
/// entry is renewed. [`NOBODY`] as from [`select::pick`].
#[inline(always)]
pub(super) fn choose(
    tables: &impl Tables,
    frontend: &Frontend,
    which: WhichSet,
    client: ClientKey,
) -> Choice {
    let (service, affinity) = (frontend.value.service(), frontend.affinity);
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
    if !is_somebody(&chosen) {
        chosen = usable(tables, which, affinity, other, now_ns);
    }
    if !is_somebody(&chosen) {
        chosen = select::pick(tables, frontend.set(which));
    }
    if !is_somebody(&chosen) {
        return NOBODY;
    }
    let id = chosen.0;
    let renewed = AffinitySlot { backend: id, renewed_ns: now_ns };
    entry.set_slots(which, renewed, if other.backend == id { renewed } else { other });
    tables.remember_affinity(&key, &entry.sealed(service));
    chosen
}

#[inline(always)]
fn usable(
    tables: &impl Tables,
    which: WhichSet,
    affinity: AffinityWord,
    slot: AffinitySlot,
    now_ns: u64,
) -> Choice {
    if slot.backend == BackendId::NONE {
        return NOBODY;
    }
    let age_ns = now_ns.saturating_sub(slot.renewed_ns);
    if age_ns >= affinity.timeout_s() as u64 * 1_000_000_000 {
        return NOBODY;
    }
    match select::get(tables, slot.backend) {
        Some(backend) if backend.is_in(which) => (slot.backend, (backend.address, backend.port)),
        Some(_) | None => NOBODY,
    }
}
