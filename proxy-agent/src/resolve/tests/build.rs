//! Objects for tests. Address plan:
//!
//! | what | IPv4 | IPv6 |
//! |---|---|---|
//! | own node `n1`, zone `a` | 192.0.2.1, second address 192.0.2.2 | 2001:db8::1 |
//! | pods of `n1` | 10.244.1.0/24 | fd00:244:1::/64 |
//! | pods elsewhere | 10.244.2.0/24 | fd00:244:2::/64 |
//! | cluster IPs | 10.96.0.0/16 | fd00:96::/112 |
//! | external and load balancer IPs | 203.0.113.0/24 | 2001:db8:113::/64 |

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::model::{Model, OwnAddresses};
use crate::object::{
    Change, Delta, Family, Hints, Node, ObjectKey, PerFamily, Problem, Protocol, Service, ServicePort, Slice,
    SliceEndpoint, SlicePort,
};
use crate::resolve::{Context, NodeFacts, Policy, Resolved, resolve};

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| ip(text)).collect()
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub(crate) fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// `ns/name` with cluster IP 10.96.0.7 and one port 80/TCP without a name.
pub(crate) fn service(name: &str) -> Service {
    Service {
        key: ObjectKey::new("ns", name),
        created_s: Some(1_000),
        proxied: true,
        cluster_ip: PerFamily { v4: Some(ip("10.96.0.7")), v6: None },
        ports: vec![port("", 80)],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        internal_local: false,
        external_local: false,
        affinity_timeout_s: None,
        health_check_node_port: None,
        problems: Vec::new(),
    }
}

pub(crate) fn port(name: &str, port: u16) -> ServicePort {
    ServicePort { name: name.into(), protocol: Protocol::Tcp, port, node_port: None }
}

pub(crate) fn node_port(name: &str, number: u16, node_port: u16) -> ServicePort {
    ServicePort { node_port: Some(node_port), ..port(name, number) }
}

/// An IPv4 slice of `ns/service` with one port 9376/TCP without a name.
pub(crate) fn slice(name: &str, service: &str, endpoints: Vec<SliceEndpoint>) -> Slice {
    Slice {
        key: ObjectKey::new("ns", name),
        service: Some(service.into()),
        family: Some(Family::V4),
        ports: [slice_port("", 9376)].into(),
        endpoints: endpoints.into(),
        problems: Vec::new(),
    }
}

pub(crate) fn slice_port(name: &str, port: u16) -> SlicePort {
    SlicePort { name: name.into(), protocol: Protocol::Tcp, port }
}

/// Ready, on no known node.
pub(crate) fn endpoint(address: &str) -> SliceEndpoint {
    SliceEndpoint {
        address: ip(address),
        node: None,
        zone: None,
        ready: true,
        serving: true,
        terminating: false,
        hints: None,
    }
}

pub(crate) fn on(node: &str, endpoint: SliceEndpoint) -> SliceEndpoint {
    SliceEndpoint { node: Some(node.into()), ..endpoint }
}

pub(crate) fn hinted_zones(zones: &[&str], endpoint: SliceEndpoint) -> SliceEndpoint {
    let hints = Hints { zones: zones.iter().map(|&zone| zone.into()).collect(), ..old_hints(&endpoint) };
    SliceEndpoint { hints: Some(Box::new(hints)), ..endpoint }
}

pub(crate) fn hinted_nodes(nodes: &[&str], endpoint: SliceEndpoint) -> SliceEndpoint {
    let hints = Hints { nodes: nodes.iter().map(|&node| node.into()).collect(), ..old_hints(&endpoint) };
    SliceEndpoint { hints: Some(Box::new(hints)), ..endpoint }
}

fn old_hints(endpoint: &SliceEndpoint) -> Hints {
    endpoint.hints.as_deref().cloned().unwrap_or_default()
}

/// Terminating, `serving` as given.
pub(crate) fn terminating(serving: bool, endpoint: SliceEndpoint) -> SliceEndpoint {
    SliceEndpoint { ready: false, serving, terminating: true, ..endpoint }
}

pub(crate) fn unready(serving: bool, endpoint: SliceEndpoint) -> SliceEndpoint {
    SliceEndpoint { ready: false, serving, ..endpoint }
}

pub(crate) fn node() -> Node {
    Node {
        name: "n1".to_owned(),
        zone: Some("a".to_owned()),
        addresses: ips(&["192.0.2.1", "2001:db8::1"]),
        pod_cidrs: vec![net("10.244.1.0/24"), net("fd00:244:1::/64")],
        problems: Vec::new(),
    }
}

pub(crate) fn context() -> Context {
    Context {
        node_name: "n1".to_owned(),
        node: Some(node()),
        own_addresses: ips(&["192.0.2.1", "192.0.2.2", "2001:db8::1"]).into_iter().collect(),
        policy: Policy::default(),
    }
}

pub(crate) fn resolve_in(
    context: &Context,
    service: &Service,
    slices: &[Slice],
) -> (Vec<Resolved>, Vec<Problem>) {
    resolve(service, slices, context, &NodeFacts::new(context))
}

/// For Services with one port and one family.
pub(crate) fn resolve_one(service: &Service, slices: &[Slice]) -> Resolved {
    let (mut resolved, problems) = resolve_in(&context(), service, slices);
    assert_eq!(problems, []);
    assert_eq!(resolved.len(), 1);
    resolved.remove(0)
}

/// A complete model with [`node`] and both of its IPv4 addresses.
pub(crate) fn model_with(policy: Policy, services: Vec<Service>, slices: Vec<Slice>) -> Model {
    let mut model = Model::new("n1", policy, OwnAddresses::Reported);
    model.apply(Change::OwnAddresses(context().own_addresses.into_iter().collect()));
    model.apply(Change::Node(Delta::List(vec![Ok(node().into())])));
    model.apply(Change::Slice(Delta::List(slices.into_iter().map(Arc::new).map(Ok).collect())));
    model.apply(Change::Service(Delta::List(services.into_iter().map(Arc::new).map(Ok).collect())));
    model
}
