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
