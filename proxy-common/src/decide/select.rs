use super::{Peer, Tables};
use crate::abi::{Address, Backend, BackendId, Port, SetWord};

/// The backend that an id names, if that tenant is still there.
#[inline(always)]
pub fn get(tables: &impl Tables, id: BackendId) -> Option<Backend> {
    let backend = tables.backend(id.index())?;
    if backend.is(id) { Some(backend) } else { None }
}

/// A backend and where it is. Not an `Option`: what a `None` does not have, the compiler keeps in registers that nobody
/// wrote, and the verifier refuses such programs.
pub(super) type Choice = (BackendId, Peer);

/// No choice.
pub(super) const NOBODY: Choice = (BackendId::NONE, (Address::from_words([0; 4]), Port::new(0)));

/// Whether there was a choice.
#[inline(always)]
pub(super) fn is_somebody(choice: &Choice) -> bool {
    choice.0 != BackendId::NONE
}

/// One backend of a non-empty set, uniformly at random (P12). [`NOBODY`] if the set was replaced under us and its slots
/// are going to another: read the set's word again.
#[inline(always)]
pub(super) fn pick(tables: &impl Tables, set: SetWord) -> Choice {
    // Multiply and shift: without the modulo's bias for small sets, and without a division.
    let offset = (tables.random() as u64 * set.count() as u64) >> 32;
    let Some(slot) = tables.slot(set.first().wrapping_add(offset as u32)) else { return NOBODY };
    match slot.peer() {
        Some(peer) => (slot.id, peer),
        None => NOBODY,
    }
}
