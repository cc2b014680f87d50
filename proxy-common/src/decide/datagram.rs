use super::connect::serve;
use super::{Client, Connect, Peer, Tables, select};
use crate::abi::{Backend, DatagramFlow, DatagramKey, DatagramOrigin, FrontendKey, Outcome, Protocol};

/// What becomes of a datagram of an unconnected socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sent {
    /// Where it goes: to a backend, or where it was sent. Not an enum's payload, see [`super::serve`].
    pub to: Peer,
    /// Why.
    pub outcome: Outcome,
}

/// Rule B12: one backend per (socket, VIP:port) while it serves and the flow is not idle. The frontend comes first: most
/// datagrams are for no Service and pay for one look-up, and a VIP that has moved to another Service takes its flows
/// along (C2). One that no Service has any more is left alone at once (unlike C7: our flows are sockets of this node, which
/// would go on sending to it for ever).
#[inline(always)]
pub fn send(tables: &impl Tables, client: &impl Fn() -> Client, cookie: u64, to: Peer) -> Sent {
    let frontend_key = FrontendKey::new(to.0, to.1, Protocol::Udp.number());
    let frontend = tables.frontend(&frontend_key);
    if frontend.is_none() {
        return Sent { to, outcome: Outcome::SendUntouched };
    }
    let service = frontend.value.service();
    let key = DatagramKey::new(cookie, to);
    if let Some(mut flow) = tables.datagram_flow(&key) {
        let now_ns = tables.now_ns();
        if flow.is_of(service)
            && !flow.is_idle(now_ns)
            && let Some(backend) = serving(tables, &flow)
        {
            flow.last_ns = now_ns;
            tables.remember_datagram_flow(&key, &flow);
            // The two tables forget on their own: an active flow must not lose its way back.
            let back = DatagramKey::new(cookie, (backend.address, backend.port));
            if tables.datagram_origin(&back) != Some(DatagramOrigin::new(to)) {
                tables.remember_datagram_origin(&back, &DatagramOrigin::new(to));
            }
            return Sent { to: (backend.address, backend.port), outcome: Outcome::SendFollowed };
        }
    }
    if frontend.value.has_source_ranges() {
        return Sent { to, outcome: Outcome::SendSourceRangesLeft };
    }
    let outcome = match serve(tables, client, &frontend_key, frontend) {
        Connect::Forward { id, to: peer } => {
            let flow = DatagramFlow::new(service, id, peer, tables.now_ns());
            tables.remember_datagram_flow(&key, &flow);
            tables.remember_datagram_origin(&DatagramKey::new(cookie, peer), &DatagramOrigin::new(to));
            return Sent { to: peer, outcome: Outcome::SendForwarded };
        }
        Connect::Untouched => Outcome::SendUntouched,
        // sendto() of an unconnected socket succeeds whatever becomes of the datagram (B13).
        Connect::Reject | Connect::Drop => Outcome::SendLeft,
        Connect::SourceRanges => Outcome::SendSourceRangesLeft,
        Connect::Contended => Outcome::Contended,
    };
    Sent { to, outcome }
}

/// The VIP to show as the source of a datagram that came from `from`, if it belongs to a flow of this socket.
#[inline(always)]
pub fn receive(tables: &impl Tables, cookie: u64, from: Peer) -> Option<Peer> {
    let origin = tables.datagram_origin(&DatagramKey::new(cookie, from))?;
    let vip = (origin.vip, origin.vip_port);
    let key = DatagramKey::new(cookie, vip);
    let mut flow = tables.datagram_flow(&key)?;
    // A late answer of an earlier backend is no answer of this flow.
    if flow.backend != from.0 || flow.backend_port != from.1 {
        return None;
    }
    flow.answer(tables.now_ns());
    tables.remember_datagram_flow(&key, &flow);
    Some(vip)
}

/// The flow's backend, while it serves.
#[inline(always)]
fn serving(tables: &impl Tables, flow: &DatagramFlow) -> Option<Backend> {
    let backend = select::get(tables, flow.backend_id)?;
    if backend.is_serving() { Some(backend) } else { None }
}
