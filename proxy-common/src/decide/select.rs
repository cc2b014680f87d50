use super::Tables;
use crate::abi::{Backend, BackendId, SetWord};

/// The backend that an id names, if that tenant is still there.
#[inline(always)]
pub fn get(tables: &impl Tables, id: BackendId) -> Option<Backend> {
    let backend = tables.backend(id.index())?;
    if backend.is(id) { Some(backend) } else { None }
}

/// One backend of a non-empty set, uniformly at random (P12). `None` if the set was replaced under us and its slots or
/// its backend went to somebody else: read the set's word again.
#[inline(always)]
pub(super) fn pick(tables: &impl Tables, set: SetWord) -> Option<(BackendId, Backend)> {
    // Multiply and shift: without the modulo's bias for small sets, and without a division.
    let offset = (tables.random() as u64 * set.count() as u64) >> 32;
    let id = tables.slot(set.first().wrapping_add(offset as u32))?;
    let backend = get(tables, id)?;
    Some((id, backend))
}

/// log2 of the largest set, rounded up: the verifier wants the search to have a bound.
const MAX_STEPS: u32 = 24;

/// Whether `id` is in the set: a binary search, as slots of a set are sorted by id (A4).
#[inline(always)]
pub fn contains(tables: &impl Tables, set: SetWord, id: BackendId) -> bool {
    let (mut low, mut high) = (0u32, set.count());
    for _ in 0..=MAX_STEPS {
        if low >= high {
            return false;
        }
        let middle = low + (high - low) / 2;
        let Some(found) = tables.slot(set.first().wrapping_add(middle)) else { return false };
        if found == id {
            return true;
        }
        if found < id {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    false
}
