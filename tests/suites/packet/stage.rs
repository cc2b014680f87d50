//! Two nodes, servers everywhere, and what translates VIPs on the first node.

use std::net::{IpAddr, SocketAddr};

use sheave_tests::{
    lab::Place,
    manifests::{Object, service, slice},
    nodes::{Attachment, Layout, World},
    scene::TARGET,
};

/// A pod of a node; both are counted from 0.
pub(crate) fn bridge_pod(world: &World, node: usize, index: usize) -> &Place {
    world.pod(node, Attachment::Bridge, index).unwrap()
}

/// A point-to-point pod of a node.
pub(crate) fn p2p_pod(world: &World, node: usize, index: usize) -> &Place {
    world.pod(node, Attachment::PointToPoint, index).unwrap()
}

pub(crate) struct Stage {
    pub(crate) world: World,
}

impl Stage {
    pub(crate) fn new(layout: Layout) -> Self {
        Self::with(layout, &[])
    }

    pub(crate) fn with(layout: Layout, arguments: &[&str]) -> Self {
        let mut world = World::new(layout).unwrap();
        world.serve().unwrap();
        world.start_agent(0, arguments).unwrap();
        Self { world }
    }

    /// On nodes that are there already.
    pub(crate) fn on(mut world: World) -> Self {
        world.start_agent(0, &[]).unwrap();
        Self { world }
    }

    pub(crate) fn apply(&self, name: &str, objects: &[Object]) {
        self.world.apply(name, objects).unwrap();
    }

    pub(crate) fn delete(&self, name: &str) {
        self.world.delete(name).unwrap();
    }

    /// Kills what translates, where it stands, and starts it again.
    pub(crate) fn kill_and_restart(&mut self) {
        self.world.take_agent(0).unwrap().kill().unwrap();
        self.world.start_agent(0, &[]).unwrap();
    }
}

/// The VIPs of the Service with this number.
pub(crate) fn cluster_ips(number: u16) -> [IpAddr; 2] {
    [format!("10.96.2.{number}").parse().unwrap(), format!("fd00:10:96::2{number:02}").parse().unwrap()]
}

pub(crate) fn external_ips(number: u16) -> [IpAddr; 2] {
    [
        format!("203.0.113.{}", 200 + number).parse().unwrap(),
        format!("fd00:203:0:113::2{number:02}").parse().unwrap(),
    ]
}

pub(crate) fn balancer_ips(number: u16) -> [IpAddr; 2] {
    [
        format!("203.0.113.{}", 150 + number).parse().unwrap(),
        format!("fd00:203:0:113::3{number:02}").parse().unwrap(),
    ]
}

pub(crate) fn node_port(number: u16) -> u16 {
    30_500 + number
}

/// The four frontends of a Service in one family (0 or 1).
pub(crate) fn frontends(world: &World, number: u16, family: usize) -> [SocketAddr; 4] {
    let node = world.node(0).unwrap().host().sockets(node_port(number))[family];
    let at = |addresses: [IpAddr; 2]| SocketAddr::new(addresses[family], 80);
    [at(cluster_ips(number)), node, at(external_ips(number)), at(balancer_ips(number))]
}

/// A Service with every kind of frontend, TCP and UDP, without endpoints.
pub(crate) fn everything(name: &str, number: u16) -> Object {
    everything_at(name, number, TARGET)
}

fn everything_at(name: &str, number: u16, target: u16) -> Object {
    let text = |addresses: [IpAddr; 2]| addresses.map(|address| address.to_string());
    let balancer = text(balancer_ips(number)).map(|ip| serde_json::json!({"ip": ip, "ipMode": "VIP"}));
    service(name, &text(cluster_ips(number)).each_ref().map(String::as_str))
        .port("tcp", "TCP", 80, target)
        .port("udp", "UDP", 80, target)
        .node_ports(&[node_port(number); 2])
        .set("spec.type", "LoadBalancer")
        .set("spec.externalIPs", text(external_ips(number)).to_vec())
        .set("status.loadBalancer.ingress", balancer.to_vec())
}

/// What an endpoint can be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    Ready,
    /// Terminating, but it serves.
    Leaving,
}

/// The slices of a Service with these places, each with the number of its node.
pub(crate) fn endpoints(world: &World, name: &str, places: &[(usize, &Place, Condition)]) -> Vec<Object> {
    endpoints_at(world, name, TARGET, places)
}

fn endpoints_at(
    world: &World,
    name: &str,
    target: u16,
    places: &[(usize, &Place, Condition)],
) -> Vec<Object> {
    let of = |(index, family): (usize, &str)| {
        let empty = slice(&format!("{name}-{index}"), name, family)
            .slice_port("tcp", "TCP", target)
            .slice_port("udp", "UDP", target);
        places.iter().fold(empty, |slice, (node, place, condition)| {
            let leaving = *condition == Condition::Leaving;
            let node = world.node(*node).unwrap().name();
            slice.endpoint_with(&place.sockets(0)[index].ip().to_string(), node, !leaving, true, leaving)
        })
    };
    [(0, "IPv4"), (1, "IPv6")].map(of).to_vec()
}

/// A Service of every kind of frontend with these places as ready endpoints.
pub(crate) fn served(world: &World, name: &str, number: u16, places: &[(usize, &Place)]) -> Vec<Object> {
    served_at(world, name, number, TARGET, places)
}

/// [`served`] by servers on another port.
pub(crate) fn served_at(
    world: &World,
    name: &str,
    number: u16,
    target: u16,
    places: &[(usize, &Place)],
) -> Vec<Object> {
    let places: Vec<_> = places.iter().map(|(node, place)| (*node, *place, Condition::Ready)).collect();
    let mut objects = vec![everything_at(name, number, target)];
    objects.extend(endpoints_at(world, name, target, &places));
    objects
}
