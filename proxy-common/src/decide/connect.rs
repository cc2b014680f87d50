use super::select::{self, NOBODY, is_somebody};
use super::{Peer, Tables, affinity};
use crate::abi::{BackendId, ClientKey, Frontend, FrontendKey, Glance, Origin, Protocol, WhenEmpty};
use crate::opaque;

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
        /// Its address and port.
        to: Peer,
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
/// good as certain; the bound is for the verifier. Connections have had one more, at a glance.
const TRIES: u32 = 3;

/// Decides a new connection, as the hook does, which takes the two steps itself.
pub fn connect(tables: &impl Tables, client: &impl Fn() -> Client, to: Peer, protocol: Protocol) -> Connect {
    connect_at_once(tables, to, protocol).unwrap_or_else(|| connect_closely(tables, client, to, protocol))
}

/// Decides most new connections: those for no Service, and those for a plain one whose key lies at home. On its own, so
/// that its few values stay in registers. `None`: it takes [`connect_closely`].
#[inline(always)]
pub fn connect_at_once(tables: &impl Tables, to: Peer, protocol: Protocol) -> Option<Connect> {
    match tables.glance(&FrontendKey::new(to.0, to.1, protocol.number())) {
        Glance::Nothing => Some(Connect::Untouched),
        Glance::Plain(set) => {
            let chosen = select::pick(tables, set);
            is_somebody(&chosen).then_some(Connect::Forward { id: chosen.0, to: chosen.1 })
        }
        Glance::More => None,
    }
}

/// Decides any connection, with a look-up of its own.
#[inline(always)]
pub fn connect_closely(
    tables: &impl Tables,
    client: &impl Fn() -> Client,
    to: Peer,
    protocol: Protocol,
) -> Connect {
    let key = FrontendKey::new(to.0, to.1, protocol.number());
    let frontend = tables.frontend(&key);
    if frontend.is_none() {
        Connect::Untouched
    } else if frontend.value.has_source_ranges() {
        Connect::SourceRanges
    } else {
        serve(tables, client, &key, frontend)
    }
}

/// Decides for a client that the frontend's source ranges, if there are any, let in.
///
/// It has one way out, with an id that the compiler knows nothing of: what it knows to be nobody, it gives no address, and
/// the verifier refuses programs that could read that.
#[inline(always)]
pub fn serve(
    tables: &impl Tables,
    client: &impl Fn() -> Client,
    key: &FrontendKey,
    mut frontend: Frontend,
) -> Connect {
    let (mut chosen, mut otherwise) = (NOBODY, Connect::Contended);
    for _ in 0..TRIES {
        // Asking who the client is costs a helper call, and nearly always does not matter.
        let all_alike = frontend.value.serves_all_alike();
        let which = frontend.value.set_for(if all_alike { Origin::Node } else { client().origin });
        let set = frontend.set(which);
        if set.count() == 0 {
            otherwise = match set.when_empty() {
                Some(WhenEmpty::Reject) => Connect::Reject,
                Some(WhenEmpty::Drop) => Connect::Drop,
                // No frontend, or one whose record is not written yet or just went: no rule to apply.
                None => Connect::Untouched,
            };
            break;
        }
        chosen = if frontend.affinity.timeout_s() == 0 {
            select::pick(tables, set)
        } else {
            affinity::choose(tables, &frontend, which, client().key)
        };
        if is_somebody(&chosen) {
            break;
        }
        frontend = tables.frontend(key);
    }
    let (id, to) = chosen;
    // Of which the compiler knows nothing.
    let id = BackendId::from_bits(opaque(id.bits()));
    if id == BackendId::NONE { otherwise } else { Connect::Forward { id, to } }
}
