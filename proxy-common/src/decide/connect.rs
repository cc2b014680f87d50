use super::{Peer, Tables, affinity, select};
use crate::abi::{Backend, BackendId, ClientKey, FrontendKey, FrontendValue, Origin, Protocol, WhenEmpty};

/// Who connects.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// Pod, own node, or elsewhere.
    pub origin: Origin,
    /// Who it is to session affinity.
    pub key: ClientKey,
}

/// What becomes of a new connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Connect {
    /// For no Service.
    Untouched,
    /// Goes to this backend.
    Forward {
        /// Which backend.
        id: BackendId,
        /// Its address, port and state.
        backend: Backend,
    },
    /// Refused (Z1).
    Reject,
    /// Not answered (Z2, Z3).
    Drop,
    /// The client's address must be checked before anything else (F2), and only a packet has it.
    SourceRanges,
    /// The set changed under us again and again.
    Contended,
}

/// A set is replaced in nanoseconds and its slots rest long before they are used again, so the second reading is as
/// good as certain; the bound is for the verifier.
const TRIES: u32 = 3;

/// Decides a new connection. Most are for no Service and pay for one look-up, no more.
#[inline(always)]
pub fn connect(tables: &impl Tables, client: &impl Fn() -> Client, to: Peer, protocol: Protocol) -> Connect {
    let key = FrontendKey::new(to.0, to.1, protocol.number());
    let Some(frontend) = tables.frontend(&key) else { return Connect::Untouched };
    through(tables, client, frontend)
}

/// Decides a new connection to a frontend.
#[inline(always)]
pub(super) fn through(
    tables: &impl Tables,
    client: &impl Fn() -> Client,
    frontend: FrontendValue,
) -> Connect {
    if frontend.has_source_ranges() {
        return Connect::SourceRanges;
    }
    serve(tables, client, &frontend)
}

/// Decides for a client that its source ranges, if there are any, let in.
#[inline(always)]
pub fn serve(tables: &impl Tables, client: &impl Fn() -> Client, frontend: &FrontendValue) -> Connect {
    // Asking who the client is costs a helper call, and nearly always does not matter.
    let which = frontend.set_for(if frontend.serves_all_alike() { Origin::Node } else { client().origin });
    for _ in 0..TRIES {
        let set = tables.set(frontend.service(), which);
        if set.count() == 0 {
            return match set.when_empty() {
                Some(WhenEmpty::Reject) => Connect::Reject,
                Some(WhenEmpty::Drop) => Connect::Drop,
                // The record is not written yet or just went: no rule to apply.
                None => Connect::Untouched,
            };
        }
        let word = tables.affinity(frontend.service());
        let chosen = if word.timeout_s() == 0 {
            select::pick(tables, set)
        } else {
            affinity::choose(tables, frontend.service(), which, set, word, client().key)
        };
        if let Some((id, backend)) = chosen {
            return Connect::Forward { id, backend };
        }
    }
    Connect::Contended
}
