use super::connect::through;
use super::{Client, Connect, Peer, Tables, select};
use crate::abi::{Address, Backend, DatagramFlow, DatagramKey, DatagramOrigin, FrontendKey, Port, Protocol};

/// What becomes of a datagram of an unconnected socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sent {
    /// Follows the flow of an earlier datagram.
    Followed(Address, Port),
    /// Was decided like a new connection.
    New(Connect),
}

/// Rule B12: one backend per (socket, VIP:port) while it serves and the flow is not idle. The frontend comes first: most
/// datagrams are for no Service and pay for one look-up, and a VIP that has moved to another Service takes its flows
/// along (C2). One that no Service has any more is left alone at once (unlike C7: our flows are sockets of this node, which
/// would go on sending to it for ever).
#[inline(always)]
pub fn send(tables: &impl Tables, client: &impl Fn() -> Client, cookie: u64, to: Peer) -> Sent {
    let frontend = FrontendKey::new(to.0, to.1, Protocol::Udp.number());
    let Some(frontend) = tables.frontend(&frontend) else { return Sent::New(Connect::Untouched) };
    let service = frontend.service();
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
            return Sent::Followed(backend.address, backend.port);
        }
    }
    let decision = through(tables, client, frontend);
    if let Connect::Forward { id, backend } = decision {
        let peer = (backend.address, backend.port);
        tables.remember_datagram_flow(&key, &DatagramFlow::new(service, id, peer, tables.now_ns()));
        tables.remember_datagram_origin(&DatagramKey::new(cookie, peer), &DatagramOrigin::new(to));
    }
    Sent::New(decision)
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
