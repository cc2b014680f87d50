//! What lives on, what is taken up anew, and whose answers are whose.

use std::{
    collections::BTreeSet,
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr},
};

use etherparse::{PacketBuilder, PacketBuilderStep, TcpHeader};
use sheave_tests::{
    lab::Place,
    nodes::{
        Layout, World,
        tap::{Tap, hardware_address},
    },
    protocol::Transport,
    scene::{TARGET, eventually},
};

use crate::{
    stage::{
        Condition, Stage, bridge_pod, cluster_ips, endpoints, everything, frontends, p2p_pod, served,
        served_at,
    },
    talk::{PATIENCE, SILENCE, Talk, ask, datagrams, hear_on, try_once, unconnected},
};

fn vips(number: u16) -> [SocketAddr; 2] {
    cluster_ips(number).map(|address| SocketAddr::new(address, 80))
}

/// Both families of all frontends.
fn all_frontends(world: &World, number: u16) -> Vec<SocketAddr> {
    [0, 1].map(|family| frontends(world, number, family)).concat()
}

/// Clients that no hook sees, of every kind but the node itself.
fn clients(world: &World) -> [&Place; 4] {
    [world.outside(), world.far(), bridge_pod(world, 0, 1), p2p_pod(world, 0, 1)]
}

fn backends(world: &World) -> [(usize, &Place); 3] {
    [(0, bridge_pod(world, 0, 0)), (0, p2p_pod(world, 0, 0)), (1, bridge_pod(world, 1, 0))]
}

/// Runs for each backend of Services 1 and 2, each client and each family, with what may be dialled: two VIPs and the
/// backend itself. Each time with a port of its own.
fn with_one_backend(test: impl Fn(&Place, u16, [SocketAddr; 3], &str)) {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    let mut port = 45_000;
    for backend in backends(world) {
        stage.apply("one", &served(world, "one", 1, &[backend]));
        stage.apply("two", &served(world, "two", 2, &[backend]));
        for from in clients(world) {
            for family in [0, 1] {
                let direct = backend.1.sockets(TARGET)[family];
                if backend.1.name() == from.name() {
                    continue;
                }
                test(from, port, [vips(1)[family], vips(2)[family], direct], backend.1.name());
                port += 10;
            }
        }
    }
}

/// M11: connections from one port to two VIPs and to the backend behind both, at the same time. Whichever comes first.
#[test]
fn m11_tcp_connections_of_one_port_with_one_backend() {
    with_one_backend(|from, port, [one, two, direct], backend| {
        for (round, order) in (0..).zip([[one, two, direct], [one, direct, two], [direct, one, two]]) {
            let mut talks = Vec::new();
            for to in order {
                let talk = Talk::open(from, port + round, to);
                assert_eq!(talk.server, backend, "{}: {to} of {order:?}", from.name());
                talks.push((to, talk));
                for (to, talk) in &mut talks {
                    talk.echo(3000)
                        .unwrap_or_else(|error| panic!("{}: {to} of {order:?}: {error}", from.name()));
                }
            }
            // Who ends one does not end the others.
            while talks.len() > 1 {
                drop(talks.remove(0));
                for (to, talk) in &mut talks {
                    talk.echo(3000).unwrap_or_else(|error| {
                        panic!("{}: {to} is left of {order:?}: {error}", from.name())
                    });
                }
            }
        }
    });
}

/// M11: a connection that has ended is nobody's, whoever its port talks to next at the same backend.
#[test]
fn m11_a_tcp_connection_after_another_of_its_port() {
    with_one_backend(|from, port, [one, two, direct], backend| {
        let open = |to| {
            let talk = Talk::open(from, port, to);
            assert_eq!(talk.server, backend, "{}: {to}", from.name());
            talk
        };
        let whole = |to| {
            let mut talk = open(to);
            talk.echo(3000).unwrap_or_else(|error| panic!("{}: {to}: {error}", from.name()));
            talk.ends().unwrap_or_else(|error| panic!("{}: the end of {to}: {error}", from.name()));
        };
        whole(one);
        whole(direct);
        whole(two);
        // Two at a time, so that each has a place of its own; then the later one's again.
        let both = [open(one), open(two)];
        both.into_iter().for_each(|talk| talk.ends().unwrap());
        whole(two);
        whole(direct);
    });
}

/// M11 over UDP: each answer comes from who was asked, whether the next question is asked before or after it.
#[test]
fn m11_udp_flows_of_one_port_with_one_backend() {
    with_one_backend(|from, port, [one, two, direct], backend| {
        for (round, order) in (0..).zip([[one, two, direct], [one, direct, two], [direct, one, two]]) {
            let socket = unconnected(from, port + round, one);
            for question in 0..3 {
                // Before any VIP is asked, who talks to the backend is nobody's business.
                for all_at_once in [false, true] {
                    let mut heard = BTreeSet::new();
                    let mut hear = || {
                        let (said, by) = hear_on(&socket).unwrap_or_else(|error| {
                            panic!("{}: {order:?} after {heard:?}: {error}", from.name())
                        });
                        assert_eq!(said, format!("{backend} {by} {question}"), "{}", from.name());
                        assert!(heard.insert(by), "{by} answers twice");
                    };
                    for to in order {
                        socket.send_to(format!("{to} {question}").as_bytes(), to).unwrap();
                        if !all_at_once {
                            hear();
                        }
                    }
                    if all_at_once {
                        (0..3).for_each(|_| hear());
                    }
                }
            }
        }
    });
}

/// Z8: an established connection outlives its endpoint's place in the set, and its Service.
#[test]
fn z8_a_tcp_connection_outlives_endpoint_and_service() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    let (old, new) = (bridge_pod(world, 0, 0), p2p_pod(world, 0, 0));
    stage.apply("web", &served(world, "web", 1, &[(0, old)]));
    let open = |from| all_frontends(world, 1).into_iter().map(move |to| Talk::open(from, 0, to));
    let mut talks: Vec<Talk> = clients(world).into_iter().flat_map(open).collect();
    let mut all_alive = |when: &str| {
        for talk in &mut talks {
            talk.echo(100).unwrap_or_else(|error| panic!("{when}: {} {error}", talk.local()));
        }
    };
    all_alive("at first");
    let leaving = endpoints(world, "web", &[(0, old, Condition::Leaving), (0, new, Condition::Ready)]);
    stage.apply("web", &[vec![everything("web", 1)], leaving].concat());
    all_alive("the endpoint is terminating");
    assert_eq!(Talk::open(world.outside(), 0, vips(1)[0]).server, new.name());
    stage.apply("web", &served(world, "web", 1, &[(0, new)]));
    all_alive("the endpoint is gone");
    stage.apply("web", &served(world, "web", 1, &[]));
    all_alive("all endpoints are gone");
    stage.delete("web");
    all_alive("the Service is gone");
}

/// A killed agent leaves everything at work, and the next one takes it over.
#[test]
fn flows_outlive_the_agent() {
    let mut stage = Stage::new(Layout::default());
    let world = &stage.world;
    stage.apply("web", &served(world, "web", 1, &backends(world)));
    let vips: Vec<_> = vips(1).into_iter().cycle().take(8).collect();
    let mut talks: Vec<_> = vips.iter().map(|to| Talk::open(world.outside(), 0, *to)).collect();
    // From the same ports to another VIP, whose backend is another one too.
    stage.apply("other", &served(world, "other", 2, &[(0, p2p_pod(world, 0, 1))]));
    let second = |talk: &Talk| {
        let family = usize::from(talk.local().is_ipv6());
        Talk::open(world.outside(), talk.local().port(), self::vips(2)[family])
    };
    let seconds: Vec<_> = talks.iter().map(second).collect();
    talks.extend(seconds);
    let sockets: Vec<_> = vips.iter().map(|to| datagrams(world.far(), *to)).collect();
    let before: Vec<_> = sockets.iter().map(|socket| ask(socket, b"before").unwrap()).collect();
    stage.kill_and_restart();
    for talk in &mut talks {
        talk.echo(100).unwrap();
    }
    let after: Vec<_> = sockets.iter().map(|socket| ask(socket, b"after").unwrap()).collect();
    assert_eq!(before, after);
    Talk::open(stage.world.outside(), 0, vips[0]).echo(100).unwrap();
}

/// C2: a UDP flow stays with an endpoint that serves, though it is terminating, and leaves one that does not.
#[test]
fn c2_udp_flows_leave_endpoints_that_do_not_serve() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    let (old, new) = (bridge_pod(world, 0, 0), p2p_pod(world, 0, 0));
    stage.apply("web", &served(world, "web", 1, &[(0, old)]));
    let open = |from| all_frontends(world, 1).into_iter().map(move |to| datagrams(from, to));
    let sockets: Vec<_> = clients(world).into_iter().flat_map(open).collect();
    let all_with = |server: &Place, question: &[u8]| {
        for socket in &sockets {
            let to = socket.peer_addr().unwrap();
            let said = ask(socket, question).unwrap_or_else(|error| panic!("{to}: {error}"));
            assert_eq!(said, server.name(), "{to}: {}", String::from_utf8_lossy(question));
        }
    };
    all_with(old, b"at first");
    let leaving = endpoints(world, "web", &[(0, old, Condition::Leaving), (0, new, Condition::Ready)]);
    stage.apply("web", &[vec![everything("web", 1)], leaving].concat());
    all_with(old, b"terminating, but it serves");
    stage.apply("web", &served(world, "web", 1, &[(0, new)]));
    // Nobody says when the flows are gone.
    for socket in &sockets {
        let left = eventually("the flow leaves the endpoint", || {
            let said = ask(socket, b"gone")?;
            anyhow::ensure!(said == new.name(), "still {said}");
            Ok(())
        });
        left.unwrap();
    }
    all_with(new, b"the endpoint is gone");
}

/// C4: another target port at the same address is another endpoint.
#[test]
fn c4_udp_flows_leave_a_port_that_is_no_endpoint_any_more() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    let pod = bridge_pod(world, 0, 0);
    let _other = pod.serve_as("other", TARGET + 1).unwrap();
    stage.apply("web", &served(world, "web", 1, &[(0, pod)]));
    let open = |from| all_frontends(world, 1).into_iter().map(move |to| datagrams(from, to));
    let sockets: Vec<_> = clients(world).into_iter().flat_map(open).collect();
    for socket in &sockets {
        assert_eq!(ask(socket, b"at first").unwrap(), pod.name());
    }
    stage.apply("web", &served_at(world, "web", 1, TARGET + 1, &[(0, pod)]));
    for socket in &sockets {
        let left = eventually("the flow leaves the port", || {
            let said = ask(socket, b"moved")?;
            anyhow::ensure!(said == "other", "still {said}");
            Ok(())
        });
        left.unwrap();
    }
}

/// C3: a client that started before the first endpoint works when that comes, on the same socket.
#[test]
fn c3_udp_clients_may_start_too_early() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    stage.apply("web", &served(world, "web", 1, &[]));
    let open = |from| vips(1).map(|to| datagrams(from, to));
    let sockets: Vec<_> = clients(world).into_iter().flat_map(open).collect();
    for socket in &sockets {
        assert_eq!(ask(socket, b"early").unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
    let pod = bridge_pod(world, 0, 0);
    stage.apply("web", &served(world, "web", 1, &[(0, pod)]));
    for socket in &sockets {
        assert_eq!(eventually("the flow works", || Ok(ask(socket, b"now")?)).unwrap(), pod.name());
    }
}

/// Without a SYN and a flow there is nothing to balance: a packet of a connection that was there before us.
#[test]
fn tcp_without_syn_and_flow_is_left_alone() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    let (pod, outside) = (bridge_pod(world, 0, 0), world.outside());
    stage.apply("web", &served(world, "web", 1, &[(0, pod)]));
    let node = world.node(0).unwrap().host();
    let macs = [outside, node].map(|place| hardware_address(place.netns(), "eth0").unwrap());
    let (sender, receiver) =
        (Tap::open(outside.netns(), "eth0").unwrap(), Tap::open(pod.netns(), "eth0").unwrap());
    // The node gets to know its neighbours.
    Talk::open(outside, 0, vips(1)[0]).echo(10).unwrap();
    receiver.receive_all(SILENCE, |_| true).unwrap();
    let vip: Ipv4Addr = "10.96.2.1".parse().unwrap();
    type Step = PacketBuilderStep<TcpHeader>;
    let frame = |flags: &dyn Fn(Step) -> Step| {
        let ip = PacketBuilder::ethernet2(macs[0], macs[1]).ipv4(outside.v4().octets(), vip.octets(), 64);
        let mut frame = Vec::new();
        flags(ip.tcp(45_678, 80, 1000, 1000)).write(&mut frame, b"").unwrap();
        frame
    };
    // The destination port lies behind 14 bytes of Ethernet, 20 of IPv4 and 2 of the source port.
    let to_backend = |frame: &[u8]| frame.get(36..38) == Some(&TARGET.to_be_bytes()[..]);
    sender.send(&frame(&|tcp| tcp.ack(1))).unwrap();
    assert_eq!(receiver.receive(SILENCE, to_backend).unwrap(), None, "an ACK of no flow went to the backend");
    sender.send(&frame(&|tcp| tcp.syn())).unwrap();
    assert!(receiver.receive(PATIENCE, to_backend).unwrap().is_some(), "a SYN does go there");
}

/// What `sheave get flows -o json` says of a connection.
#[test]
fn get_flows_shows_a_connection() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    let pod = bridge_pod(world, 0, 0);
    stage.apply("web", &served(world, "web", 1, &[(0, pod)]));
    let talk = Talk::open(world.outside(), 0, vips(1)[0]);
    let output = world.agent(0).unwrap().ask(&["get", "flows", "-o", "json"]).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let _: serde_json::Value = serde_json::from_str(&text).unwrap();
    for address in [talk.local(), vips(1)[0], pod.sockets(TARGET)[0]] {
        assert!(text.contains(&address.to_string()), "{address} is not in {text}");
    }
}

/// M7: where a backend has more clients than there are ports, who comes late is not served; that has a name in the counters
/// and in the log. Ports of connections that are over are there again.
#[test]
fn m7_ports_that_run_out_are_named() {
    let stage =
        Stage::with(Layout::default(), &["--flow-sweep-ms", "200", "--snat-port-range", "10000-10001"]);
    let world = &stage.world;
    stage.apply("web", &served(world, "web", 1, &[(0, bridge_pod(world, 0, 0))]));
    let to = frontends(world, 1, 0)[1];
    let mut talks = [0, 1].map(|_| Talk::open(world.far(), 0, to));
    talks.iter_mut().for_each(|talk| talk.echo(100).unwrap());
    let agent = world.agent(0).unwrap();
    let said = || std::fs::read_to_string(agent.log()).unwrap().contains("packet_no_source_port");
    assert_eq!((agent.counter("packet_no_source_port").unwrap(), said()), (0, false));
    let late = try_once(world, world.far(), Transport::Tcp, to, SILENCE);
    assert!(late.as_ref().is_err_and(|failure| failure.is_timeout()), "{late:?}");
    assert!(agent.counter("packet_no_source_port").unwrap() > 0);
    eventually("the agent says so", || {
        anyhow::ensure!(said());
        Ok(())
    })
    .unwrap();
    talks.iter_mut().for_each(|talk| talk.echo(100).unwrap());
    drop(talks);
    eventually("a port is there again", || {
        let outcome = try_once(world, world.far(), Transport::Tcp, to, PATIENCE);
        outcome.map_err(|failure| anyhow::anyhow!("{failure:?}"))
    })
    .unwrap();
}
