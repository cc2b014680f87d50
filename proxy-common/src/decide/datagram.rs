use super::{Client, Connect, Peer, Tables, connect, select};
use crate::abi::{Address, DatagramFlow, DatagramKey, DatagramOrigin, Port, Protocol};

/// What becomes of a datagram of an unconnected socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sent {
    /// Follows the flow of an earlier datagram.
    Followed(Address, Port),
    /// Was decided like a new connection.
    New(Connect),
}

/// Rule B12: one backend per (socket, VIP:port) while it serves and the flow is not idle.
#[inline(always)]
pub fn send(tables: &impl Tables, client: &impl Fn() -> Client, cookie: u64, to: Peer) -> Sent {
    let key = DatagramKey::new(cookie, to);
    if let Some(mut flow) = tables.datagram_flow(&key) {
        let now_ns = tables.now_ns();
        if !flow.is_idle(now_ns) && serves(tables, &flow) {
            flow.last_ns = now_ns;
            tables.remember_datagram_flow(&key, &flow);
            // The two tables forget on their own: an active flow must not lose its way back.
            let back = DatagramKey::new(cookie, (flow.backend, flow.backend_port));
            if tables.datagram_origin(&back) != Some(DatagramOrigin::new(to)) {
                tables.remember_datagram_origin(&back, &DatagramOrigin::new(to));
            }
            return Sent::Followed(flow.backend, flow.backend_port);
        }
    }
    let decision = connect(tables, client, to, Protocol::Udp);
    if let Connect::Forward { id, backend } = decision {
        let peer = (backend.address, backend.port);
        tables.remember_datagram_flow(&key, &DatagramFlow::new(id, peer, tables.now_ns()));
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

#[inline(always)]
fn serves(tables: &impl Tables, flow: &DatagramFlow) -> bool {
    match select::get(tables, flow.backend_id) {
        Some(backend) => backend.is_serving(),
        None => false,
    }
}
