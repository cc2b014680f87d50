//! Handing our connections to netfilter's NAT, so that they go on without our programs.
//!
//! Inside the node a connection of ours has real addresses, so netfilter knows it by those, or by the VIP without a
//! translation if the node itself dialled it. When the programs go, its packets come to netfilter with the VIP. For each
//! of them netfilter gets the entry that it would have had from kube-proxy, in place of the one that it has.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;

use aya::maps::{Array, Map, MapData};
use proxy_common::abi::{Address, Flow, FlowKey, PacketSettings, Port, Protocol};

use super::conntrack::{Conntrack, Translated, Tuple};
use super::rules::Rules;
use crate::kernel::programs::open_pinned;
use crate::kernel::{self, Pins};
use crate::packet::flows::Flows;

/// Connections that begin while others are handed over are few, and fewer the next time.
const ROUNDS: usize = 3;

/// What became of the connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Handed {
    /// They go on.
    pub over: usize,
    /// They end.
    pub lost: usize,
}

/// Hands all connections over, if there may be a kube-proxy that new ones are left to. No agent may run. The programs serve
/// nobody new after that.
///
/// # Errors
/// If what is pinned cannot be read.
pub fn hand_back(pins: &Pins) -> Result<Handed, kernel::Error> {
    let mut handed = Handed::default();
    if !pins.state().join("FLOWS").exists() {
        return Ok(handed);
    }
    if !Rules::may_exist() {
        let live = |(_, flow): &(FlowKey, Flow)| !flow.is_over();
        handed.lost = entries(&Flows::open(pins)?, pins)?.into_iter().filter(live).count();
        return Ok(handed);
    }
    leave_new(pins)?;
    let conntrack =
        Conntrack::open().map_err(kernel::Error::path("open", "connection tracking (ctnetlink)"))?;
    let mut flows = Flows::open(pins)?;
    for _ in 0..ROUNDS {
        handed.lost = 0;
        let mut some = false;
        for (key, flow) in entries(&flows, pins)? {
            match hand_over(&mut flows, &conntrack, &key) {
                Ok(true) => {
                    some = true;
                    handed.over += 1;
                }
                Ok(false) => {
                    let is_sctp = key.protocol == Protocol::Sctp.number();
                    handed.lost += usize::from(is_sctp && !flow.is_foreign());
                }
                Err(error) => {
                    tracing::warn!(client = ?key, error = &error as &dyn std::error::Error, "not handed over");
                    handed.lost += 1;
                }
            }
        }
        if !some {
            break;
        }
    }
    Ok(handed)
}

fn entries(flows: &Flows, pins: &Pins) -> Result<BTreeMap<FlowKey, Flow>, kernel::Error> {
    flows.entries().map_err(kernel::Error::path("read", pins.state().join("FLOWS")))
}

/// What begins from now on is kube-proxy's.
fn leave_new(pins: &Pins) -> Result<(), kernel::Error> {
    let error = |source| kernel::Error::Map { map: "PACKET_SETTINGS", source };
    let data = open_pinned(&pins.state(), "PACKET_SETTINGS")?;
    let mut settings: Array<MapData, PacketSettings> =
        Map::from_map_data(data).and_then(TryInto::try_into).map_err(error)?;
    let mut value = settings.get(&0, 0).map_err(error)?;
    value.flags |= PacketSettings::LEAVE_NEW;
    settings.set(0, value, 0).map_err(error)
}

/// Whether a connection can be handed over: not an unanswered one of TCP, whose client begins it again, nor what has not
/// left yet. SCTP associations cannot.
pub fn is_due(key: &FlowKey, flow: &Flow) -> bool {
    let (own, answered) = (flow.flags & Flow::OWN_NODE != 0, flow.is_answered());
    // M10: to a backend that is the node itself it never leaves, but is answered.
    let unsent = flow.needs_snat() && !own && !answered && flow.snat_port == Port::default();
    let begun = match Protocol::from_number(key.protocol) {
        Some(Protocol::Tcp) => answered,
        Some(Protocol::Udp) => true,
        Some(Protocol::Sctp) | None => false,
    };
    begun && !unsent && !flow.is_foreign() && !flow.is_over()
}

/// Whether one that is due does not wait for the end: netfilter sees those of the node's own processes with the VIP, so a
/// kube-proxy that comes back would take them for its own and send them elsewhere (C2); and what a cleanup that ended
/// halfway holds would never be let go.
pub fn goes_at_once(key: &FlowKey, flow: &Flow) -> bool {
    flow.flags & (Flow::OWN_NODE | Flow::HELD) != 0 && is_due(key, flow)
}

/// Hands over one connection. `false`: it is not due (any more).
///
/// # Errors
/// If the kernel refuses; then it goes on as it did.
pub(super) fn hand_over(flows: &mut Flows, conntrack: &Conntrack, key: &FlowKey) -> io::Result<bool> {
    let Some(flow) = flows.flow(key)?.filter(|flow| is_due(key, flow)) else { return Ok(false) };
    let at = |address: Address, port: Port| SocketAddr::new(address.ip(), port.number());
    let tuple = |source, destination| Tuple { protocol: key.protocol, source, destination };
    let (client, vip) = (at(key.client, key.port), at(flow.vip, flow.vip_port));
    let backend = at(flow.backend, flow.backend_port);
    let source = if flow.snat_port == Port::default() { client } else { at(flow.snat, flow.snat_port) };
    let connection = Translated { original: tuple(client, vip), reply: tuple(backend, source) };
    // Translated by us and held by netfilter as the same, packets would get another source. TCP sends them again.
    let held = Flow { flags: flow.flags | Flow::HELD, ..flow };
    flows.replace(key, &held)?;
    let instead = [tuple(client, backend), tuple(client, vip), tuple(source, backend)];
    let answered = flow.is_answered();
    let result = conntrack.adopt(&connection, answered, &instead);
    if let Err(error) = result {
        flows.replace(key, &Flow { flags: flow.flags & !Flow::HELD, ..flow })?;
        return Err(error);
    }
    // From here on answers to the replaced source are netfilter's.
    flows.remove_ways(key, &flow)?;
    flows.remove(key, &flow)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_due() {
        let due = |protocol: Protocol, flags, snat_port| {
            let key = FlowKey::new(Address::default(), Port::new(1), protocol.number());
            is_due(&key, &Flow { flags, snat_port: Port::new(snat_port), ..Flow::default() })
        };
        assert!(due(Protocol::Udp, 0, 0) && due(Protocol::Udp, Flow::HELD, 0));
        assert!(due(Protocol::Tcp, Flow::ANSWERED, 0) && !due(Protocol::Tcp, 0, 0));
        assert!(due(Protocol::Tcp, Flow::HEARD, 0));
        assert!(due(Protocol::Tcp, Flow::ANSWERED | Flow::CLIENT_FIN, 0));
        assert!(!due(Protocol::Tcp, Flow::ANSWERED | Flow::RESET, 0));
        assert!(!due(Protocol::Sctp, Flow::ANSWERED, 0) && !due(Protocol::Udp, Flow::FOREIGN, 0));
        // Its source is to be replaced, but has not been yet; on the loopback device, and to the node itself, it never is.
        assert!(!due(Protocol::Udp, Flow::NEEDS_SNAT, 0) && due(Protocol::Udp, Flow::NEEDS_SNAT, 9));
        assert!(due(Protocol::Udp, Flow::NEEDS_SNAT | Flow::OWN_NODE, 0));
        assert!(due(Protocol::Tcp, Flow::NEEDS_SNAT | Flow::ANSWERED, 0));
        let at_once = |flags| {
            let key = FlowKey::new(Address::default(), Port::new(1), Protocol::Udp.number());
            goes_at_once(&key, &Flow { flags, ..Flow::default() })
        };
        assert!(at_once(Flow::OWN_NODE) && at_once(Flow::HELD) && !at_once(Flow::ANSWERED));
        assert!(!at_once(Flow::OWN_NODE | Flow::FOREIGN));
    }
}
