//! Who serves datagrams, for those that look after flows which outlive their endpoint (C2): netfilter's, and connected
//! sockets (B5).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use proxy_common::abi::Protocol;

use crate::reconcile::WantedService;

/// Datagram VIPs, and the endpoints behind each that serve. A VIP without any is not among them: its flows stay (C3).
pub type Served = BTreeMap<SocketAddr, Arc<BTreeSet<SocketAddr>>>;

/// Of these Services.
pub fn served(services: &[WantedService]) -> Served {
    let mut served = Served::new();
    for port in services.iter().flat_map(|service| &service.ports) {
        let udp = |protocol| protocol == Protocol::Udp.number();
        let mut vips = port.frontends.iter().map(|(key, _)| key).filter(|key| udp(key.protocol())).peekable();
        if vips.peek().is_none() {
            continue;
        }
        let serving = port.endpoints.iter().filter(|(_, state)| state.serving).map(|(at, _)| *at);
        let serving: Arc<BTreeSet<SocketAddr>> = Arc::new(serving.collect());
        if !serving.is_empty() {
            let at = vips.map(|key| SocketAddr::new(key.address().ip(), key.port().number()));
            served.extend(at.map(|vip| (vip, Arc::clone(&serving))));
        }
    }
    served
}
