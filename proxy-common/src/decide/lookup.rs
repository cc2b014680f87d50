use super::Tables;
use crate::abi::{FrontendKey, FrontendValue, Origin, SetWord, WhichSet};

/// What the frontend says of a client, before a backend is chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ruling {
    /// No frontend is dialled.
    Untouched,
    /// The client is served from this set, which may be empty.
    Set {
        /// The frontend that was dialled.
        frontend: FrontendValue,
        /// Which set rules (P10, P11).
        which: WhichSet,
        /// The set as it was at that moment.
        set: SetWord,
    },
}

/// Finds the frontend and the set that rules a client of `origin`.
#[inline(always)]
pub fn lookup(tables: &impl Tables, key: &FrontendKey, origin: Origin) -> Ruling {
    let Some(frontend) = tables.frontend(key) else { return Ruling::Untouched };
    let which = frontend.set_for(origin);
    Ruling::Set { frontend, which, set: tables.set(frontend.service(), which) }
}
