//! The two nodes themselves: what the suites of the packet path take for granted. No agent runs here.

#![expect(clippy::unwrap_used, reason = "the helpers of tests fail as tests do")]

use std::{net::SocketAddr, thread};

use sheave_tests::{
    lab::Place,
    nodes::{Guard, Layout, World},
    protocol::{Dial, Transport},
    scene::TARGET,
};

/// A client reaches a place; what went wrong, else.
fn attempt(world: &World, from: &Place, to: &[&Place]) -> Vec<String> {
    let client = world.unhooked(from).unwrap();
    let mut wrong = Vec::new();
    for (place, transport) in
        to.iter().flat_map(|place| [(place, Transport::Tcp), (place, Transport::UdpConnected)])
    {
        for destination in place.sockets(TARGET) {
            let seen = match client.connect(transport, Dial::new(destination)).unwrap() {
                Err(failure) => failure.to_string(),
                Ok(exchange) => {
                    let expected = format!("{} {}", place.name(), exchange.local);
                    let answer = exchange.answer.unwrap();
                    if answer == expected || may_be_masqueraded(world, from, place, &answer) {
                        continue;
                    }
                    answer
                }
            };
            wrong.push(format!("{} -> {} {transport:?} {destination}: {seen}", from.name(), place.name()));
        }
    }
    wrong
}

/// Only pods' packets out of the cluster, and by the node's address.
fn may_be_masqueraded(world: &World, from: &Place, to: &Place, answer: &str) -> bool {
    let nodes = world.nodes();
    let is_pod =
        |place: &Place| nodes.iter().any(|node| node.pods().iter().any(|pod| pod.name() == place.name()));
    let Some(node) = nodes.iter().find(|node| node.pods().iter().any(|pod| pod.name() == from.name())) else {
        return false;
    };
    let seen = answer.strip_prefix(to.name()).and_then(|rest| rest.trim().parse::<SocketAddr>().ok());
    let own = [node.host().v4().into(), node.host().v6().into()];
    world.layout().masquerade && !is_pod(to) && seen.is_some_and(|seen| own.contains(&seen.ip()))
}

fn everyone_reaches_everyone(layout: Layout) {
    let mut world = World::new(layout).unwrap();
    world.serve().unwrap();
    let world = &world;
    let servers: Vec<_> =
        world.nodes().iter().flat_map(|node| std::iter::once(node.host()).chain(node.pods())).collect();
    let wrong: Vec<_> = thread::scope(|scope| {
        let clients: Vec<_> =
            world.places().into_iter().map(|from| scope.spawn(|| attempt(world, from, &servers))).collect();
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    assert!(wrong.is_empty(), "{layout}: {} of them, by name\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn everyone_reaches_everyone_over_routes() {
    for rp_filter in [1, 2] {
        for bridge_netfilter in [false, true] {
            everyone_reaches_everyone(Layout { rp_filter, bridge_netfilter, ..Layout::default() });
        }
    }
}

#[test]
fn everyone_reaches_everyone_over_vxlan() {
    for rp_filter in [1, 2] {
        everyone_reaches_everyone(Layout { rp_filter, ..Layout::overlay() });
    }
}

#[test]
fn everyone_reaches_everyone_past_firewalls() {
    for guard in [Guard::DropInvalid, Guard::OnlyReal] {
        for bridge_netfilter in [false, true] {
            everyone_reaches_everyone(Layout { guard, bridge_netfilter, ..Layout::default() });
        }
        everyone_reaches_everyone(Layout { guard, ..Layout::overlay() });
    }
}

#[test]
fn everyone_reaches_everyone_without_offloads() {
    everyone_reaches_everyone(Layout { offload: false, guard: Guard::DropInvalid, ..Layout::default() });
    everyone_reaches_everyone(Layout { offload: false, ..Layout::overlay() });
}
