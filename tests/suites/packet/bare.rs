//! Clients that come in by a tunnel without link headers, and those of the node that leave by one. Backends behind one are
//! in the matrix.

use std::net::SocketAddr;

use sheave_tests::{
    lab::Place,
    nodes::{EXTERNAL_CIDR, Layout, SERVICE_CIDR, World},
    scene::TARGET,
};

use crate::{
    stage::{Stage, bridge_pod, cluster_ips, everything, external_ips, p2p_pod, served},
    talk::{BOTH, Talk, is_answered, is_refused},
};

/// More than a packet, and than what devices join.
const MUCH: usize = 300_000;

/// Sends the VIPs of all Services through the tunnel.
fn route_vips(world: &World, from: usize, to: usize) {
    let cidrs = [SERVICE_CIDR, EXTERNAL_CIDR].into_iter().flat_map(|both| both.split(','));
    let routes = cidrs.map(|cidr| {
        let via = if cidr.contains(':') {
            format!("fd00:10:244:{}:2::254", to + 1)
        } else {
            format!("10.244.{}.254", to + 1)
        };
        format!("route replace {cidr} via {via} dev tun0 onlink\n")
    });
    world.node(from).unwrap().host().netns().ip(&routes.collect::<String>()).unwrap();
}

/// Services with a backend here (1) or behind the tunnel (2) are served, one without is refused.
fn is_served(world: &World, from: &Place, numbers: &[u16]) {
    for number in numbers.iter().copied() {
        for address in [cluster_ips(number), external_ips(number)].concat() {
            let vip = SocketAddr::new(address, 80);
            for transport in BOTH {
                is_answered(world, from, transport, vip);
            }
            Talk::open(from, 0, vip).echo(MUCH).unwrap_or_else(|error| panic!("{vip}: {error}"));
        }
    }
    for address in cluster_ips(3) {
        for transport in BOTH {
            is_refused(world, from, transport, SocketAddr::new(address, 80));
        }
    }
}

fn stage(arguments: &[&str]) -> Stage {
    let stage = Stage::with(Layout { rp_filter: 2, ..Layout::bare_overlay() }, arguments);
    let world = &stage.world;
    let mut objects = served(world, "here", 1, &[(0, bridge_pod(world, 0, 0))]);
    objects.extend(served(world, "there", 2, &[(1, p2p_pod(world, 1, 0))]));
    objects.push(everything("nowhere", 3));
    stage.apply("services", &objects);
    stage
}

#[test]
fn clients_from_a_tunnel_without_link_headers() {
    // A backend beside such a client would answer it past this node, if the client's source were not replaced.
    for (arguments, numbers) in [(&[][..], &[1][..]), (&["--masquerade-all"], &[1, 2])] {
        let stage = stage(arguments);
        let world = &stage.world;
        route_vips(world, 1, 0);
        for from in [bridge_pod(world, 1, 1), p2p_pod(world, 1, 1)] {
            is_served(world, from, numbers);
            // Who dials no Service.
            for to in bridge_pod(world, 0, 1).sockets(TARGET) {
                Talk::open(from, 0, to).echo(MUCH).unwrap_or_else(|error| panic!("{to}: {error}"));
            }
        }
    }
}

/// Processes that no hook of a socket saw: their packets leave for the VIP by the tunnel, or would.
#[test]
fn the_nodes_own_clients_by_a_tunnel_without_link_headers() {
    let stage = stage(&[]);
    let world = &stage.world;
    route_vips(world, 0, 1);
    is_served(world, world.node(0).unwrap().host(), &[1, 2]);
}
