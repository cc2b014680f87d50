//! What is refused, what is dropped, and for whom.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use sheave_tests::{
    lab::Place,
    nodes::{Guard, Layout, World, nft, tap::Tap},
    protocol::Transport,
};

use crate::{
    stage::{Stage, bridge_pod, cluster_ips, everything, frontends, p2p_pod, served},
    talk::{BOTH, PATIENCE, answered, datagrams, is_answered, is_dropped, is_refused, try_once},
};

/// Clients outside, far, in pods of both kinds, and on the node itself.
fn clients(world: &World) -> [&Place; 5] {
    let node = world.node(0).unwrap().host();
    [world.outside(), world.far(), bridge_pod(world, 0, 1), p2p_pod(world, 0, 1), node]
}

/// Z6: a port that no Service has at a known cluster IP, with endpoints or without.
#[test]
fn z6_an_unknown_port_of_a_cluster_ip_is_refused() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    let mut objects = served(world, "web", 1, &[(0, bridge_pod(world, 0, 0))]);
    objects.push(everything("empty", 2));
    stage.apply("web", &objects);
    for from in clients(world) {
        for address in [cluster_ips(1), cluster_ips(2)].concat() {
            for transport in BOTH {
                is_refused(world, from, transport, SocketAddr::new(address, 81));
            }
        }
    }
}

/// Z6: an address of the range of cluster IPs that no Service has.
#[test]
fn z6_an_unassigned_cluster_ip_is_dropped() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    stage.apply("web", &served(world, "web", 1, &[(0, bridge_pod(world, 0, 0))]));
    for from in clients(world) {
        for address in cluster_ips(77) {
            for transport in BOTH {
                is_dropped(world, from, transport, SocketAddr::new(address, 80));
            }
        }
    }
}

/// Z7, Z1: endpoints come and go, then the Service goes.
#[test]
fn z7_a_service_is_refused_without_endpoints_and_dropped_when_it_is_gone() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    let to = cluster_ips(1).map(|address| SocketAddr::new(address, 80));
    let everyone = |check: &dyn Fn(&World, &Place, Transport, SocketAddr)| {
        for from in clients(world) {
            for transport in BOTH {
                to.iter().for_each(|to| check(world, from, transport, *to));
            }
        }
    };
    stage.apply("web", &served(world, "web", 1, &[]));
    everyone(&is_refused);
    stage.apply("web", &served(world, "web", 1, &[(0, bridge_pod(world, 0, 0))]));
    everyone(&is_answered);
    stage.apply("web", &served(world, "web", 1, &[]));
    everyone(&is_refused);
    stage.delete("web");
    everyone(&is_dropped);
}

/// F1-F3: only the load balancer's address is guarded, for clients in the cluster too, and before all else.
#[test]
fn f1_source_ranges_guard_the_load_balancers_address_only() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    let ranges = ["172.18.0.254/32", "fd00:172:18::254/128"];
    let mut objects = served(world, "web", 1, &[(0, bridge_pod(world, 0, 0))]);
    objects[0] = objects[0].clone().set("spec.loadBalancerSourceRanges", ranges.to_vec());
    objects.push(everything("empty", 2).set("spec.loadBalancerSourceRanges", ranges.to_vec()));
    stage.apply("web", &objects);
    for transport in BOTH {
        for family in [0, 1] {
            let [cluster_ip, node_port, external, balancer] = frontends(world, 1, family);
            for from in clients(world) {
                for to in [cluster_ip, node_port, external] {
                    is_answered(world, from, transport, to);
                }
                // F3
                if from.name() == world.outside().name() {
                    is_answered(world, from, transport, balancer);
                } else {
                    is_dropped(world, from, transport, balancer);
                }
            }
            // F2: also before the refusal.
            let [.., empty] = frontends(world, 2, family);
            is_refused(world, world.outside(), transport, empty);
            is_dropped(world, world.far(), transport, empty);
        }
    }
}

/// F5, F6: a family without a range is open, as is one with the range of everything.
#[test]
fn f5_f6_open_source_ranges() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    let with = |ranges: &[&str]| {
        let mut objects = served(world, "web", 1, &[(0, bridge_pod(world, 0, 0))]);
        objects[0] = objects[0].clone().set("spec.loadBalancerSourceRanges", ranges.to_vec());
        stage.apply("web", &objects);
    };
    let [v4, v6] = [0, 1].map(|family| frontends(world, 1, family)[3]);
    with(&["172.18.0.254/32"]);
    for transport in BOTH {
        is_dropped(world, world.far(), transport, v4);
        is_answered(world, world.far(), transport, v6);
    }
    with(&["fd00:172:18::254/128", "0.0.0.0/0"]);
    for transport in BOTH {
        is_answered(world, world.far(), transport, v4);
        is_dropped(world, world.far(), transport, v6);
    }
    with(&[]);
    for transport in BOTH {
        is_answered(world, world.far(), transport, v4);
        is_answered(world, world.far(), transport, v6);
    }
}

/// A firewall that drops one client's packets to pods, by real addresses as CNIs do, stops that client and nobody else.
#[test]
fn a_policy_against_one_client_stops_only_that_client() {
    let stage = Stage::new(Layout { guard: Guard::DropInvalid, ..Layout::default() });
    let world = &stage.world;
    stage.apply("web", &served(world, "web", 1, &[(0, bridge_pod(world, 0, 0))]));
    let (v4, v6) = (world.far().v4(), world.far().v6());
    let rules = format!(
        "table inet one_client {{ chain forward {{ type filter hook forward priority 1; \
         ip saddr {v4} ip daddr 10.244.0.0/16 drop; ip6 saddr {v6} ip6 daddr fd00:10:244::/48 drop; }}; }}"
    );
    nft(world.node(0).unwrap().host().netns(), &rules).unwrap();
    for transport in BOTH {
        for to in [0, 1].map(|family| frontends(world, 1, family)).concat() {
            is_dropped(world, world.far(), transport, to);
            is_answered(world, world.outside(), transport, to);
            is_answered(world, p2p_pod(world, 0, 1), transport, to);
        }
    }
}

/// X4: other ports of an external or a load balancer's address are nobody's: packets go on as they are.
#[test]
fn x4_other_ports_of_external_addresses_are_left_alone() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    stage.apply("web", &served(world, "web", 1, &[(0, bridge_pod(world, 0, 0))]));
    for family in [0, 1] {
        let [.., external, balancer] = frontends(world, 1, family);
        for mut to in [external, balancer] {
            to.set_port(81);
            // What node-1 puts on the wire comes in at the router's end of it.
            let wire = Tap::open(world.router(), world.node(0).unwrap().name()).unwrap();
            let socket = datagrams(world.outside(), to);
            let question = format!("to {to}");
            socket.send(question.as_bytes()).unwrap();
            let same = |frame: &[u8]| frame.ends_with(question.as_bytes());
            let frame =
                wire.receive(PATIENCE, same).unwrap().unwrap_or_else(|| panic!("{to}: it does not go on"));
            let (at, length) = if to.is_ipv4() { (26, 4) } else { (22, 16) };
            let addresses = [world.outside().sockets(0)[family].ip(), to.ip()].map(|address| match address {
                IpAddr::V4(address) => address.octets().to_vec(),
                IpAddr::V6(address) => address.octets().to_vec(),
            });
            assert_eq!(frame[at..at + 2 * length], addresses.concat(), "{to}: another address");
            let ports = [socket.local_addr().unwrap().port(), 81].map(u16::to_be_bytes).concat();
            assert_eq!(frame[at + 2 * length..at + 2 * length + 4], ports, "{to}: another port");
        }
    }
}

/// A2: one endpoint over every frontend of the service port, whatever the client's port; P12 without it: all of them.
#[test]
fn a2_affinity_by_source_address_across_frontends() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    let objects = |affinity: &str| {
        let pods = [(0, bridge_pod(world, 0, 0)), (0, p2p_pod(world, 0, 0)), (1, bridge_pod(world, 1, 0))];
        let mut objects = served(world, "web", 1, &pods);
        objects[0] = objects[0].clone().set("spec.sessionAffinity", affinity);
        objects
    };
    let servers = |from: &Place, transport, family, rounds| -> BTreeSet<String> {
        let dial = |to| answered(&try_once(world, from, transport, to, PATIENCE)).to_owned();
        (0..rounds).flat_map(|_| frontends(world, 1, family)).map(dial).collect()
    };
    stage.apply("web", &objects("ClientIP"));
    for from in [world.outside(), world.far(), bridge_pod(world, 0, 1), p2p_pod(world, 0, 1)] {
        for transport in BOTH {
            for family in [0, 1] {
                let servers = servers(from, transport, family, 3);
                assert_eq!(servers.len(), 1, "{} {transport:?}: {servers:?}", from.name());
            }
        }
    }
    stage.apply("web", &objects("None"));
    // Of 3 servers, one is never chosen in 60 attempts once in 10^10 runs.
    for transport in BOTH {
        assert_eq!(servers(world.outside(), transport, 0, 15).len(), 3, "{transport:?}");
    }
}
