//! The socket path as applications see it: every kind of socket, what it reaches and what it is told.

#![expect(clippy::unwrap_used, clippy::panic, reason = "the helpers of tests fail as tests do")]

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use aya::maps::{Array, Map, MapData};
use proxy_agent::kernel::{Pins, programs::open_pinned};
use proxy_common::abi::{Address, BackendId, Port, SocketOrigin, SocketPlace, socket::SOCKET_PLACES};
use sheave_tests::{
    client::Client,
    daemon::{Daemon, dns_question},
    lab::{Place, Shape},
    manifests::{Object, service},
    protocol::{Dial, LoopSpec, Transport},
    scene::{
        ENOUGH, Scene, TARGET, TRANSPORTS, answers, at, eventually, fail, names, reach, slices, socket_kinds,
    },
};

const V4: &str = "10.96.0.10";
const V6: &str = "fd00:10:96::10";
const VIPS: [&str; 2] = [V4, V6];

/// A drop is told from a refusal by patience.
const SOON: Duration = Duration::from_millis(700);
const SECOND: Duration = Duration::from_secs(1);

/// The Service `web`: port 80 in both protocols and families.
fn web() -> Object {
    service("web", &VIPS).port("http", "TCP", 80, TARGET).port("dns", "UDP", 80, TARGET)
}

/// `web` with endpoints for both protocols in these pods of the first node.
fn web_in(scene: &Scene, pods: &[usize]) -> Vec<Object> {
    let node = scene.node().unwrap();
    let places: Vec<_> = pods.iter().map(|pod| (node, node.pod(*pod).unwrap())).collect();
    let mut objects = vec![web()];
    objects.extend(slices("web", "http", "TCP", &places));
    objects.extend(slices("web", "dns", "UDP", &places));
    objects
}

/// B1, P12, and what getpeername and recvfrom say: the VIP as the application dialled it.
#[test]
fn b1_every_socket_kind_reaches_every_backend_and_sees_the_vip() {
    let mut scene = Scene::new(4).unwrap();
    scene.serve().unwrap();
    scene.apply("web", &web_in(&scene, &[0, 1, 2])).unwrap();
    // The node's own processes, and a pod.
    for place in [scene.node().unwrap().host(), scene.pod(3).unwrap()] {
        let client = place.client().unwrap();
        for (transport, dial, vip) in socket_kinds(V4, V6, 80).unwrap() {
            let who = answers(&client, transport, dial, ENOUGH).unwrap();
            assert_eq!(who, names(&["pod-1-1", "pod-1-2", "pod-1-3"]), "{transport:?} {dial:?}");
            let exchange = reach(&client, transport, dial).unwrap();
            match transport {
                Transport::Tcp | Transport::UdpConnected => {
                    assert_eq!((exchange.peer, exchange.source), (Some(vip), None), "{transport:?}");
                }
                Transport::UdpUnconnected => {
                    assert_eq!((exchange.peer, exchange.source), (None, Some(vip)), "{dial:?}");
                }
            }
        }
    }
}

/// M9: the server sees the pod's own address, nobody is in between.
#[test]
fn m9_the_client_keeps_its_own_address() {
    let mut scene = Scene::new(2).unwrap();
    scene.serve().unwrap();
    scene.apply("web", &web_in(&scene, &[0])).unwrap();
    let from = scene.pod(1).unwrap();
    let client = from.client().unwrap();
    for (vip, own) in VIPS.into_iter().zip(from.sockets(0)) {
        let exchange = reach(&client, Transport::Tcp, Dial::new(at(vip, 80).unwrap())).unwrap();
        assert_eq!(exchange.local.ip(), own.ip());
    }
}

/// Runs a program in a pod and gives what it printed; a failure of it is one of the test.
fn output(place: &Place, program: &str, arguments: &[&str]) -> String {
    let output = place.command(program).unwrap().args(arguments).output().unwrap_or_else(|error| {
        panic!("cannot run `{program}`: {error}; `cargo xtask setup` installs what the tests run")
    });
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

#[test]
fn b1_curl_by_vip() {
    let scene = Scene::new(2).unwrap();
    let server = scene.pod(0).unwrap();
    let _http = Daemon::http(server.netns(), &server.sockets(TARGET), "hello\n").unwrap();
    scene.apply("web", &web_in(&scene, &[0])).unwrap();
    for host in [V4, V6, "::ffff:10.96.0.10"] {
        let url = if host.contains(':') { format!("http://[{host}]/") } else { format!("http://{host}/") };
        let arguments =
            ["-sS", "--max-time", "5", "--globoff", "--write-out", "%{remote_ip}:%{remote_port}", &url];
        assert_eq!(output(scene.pod(1).unwrap(), "curl", &arguments), format!("hello\n{host}:80"));
    }
}

/// `dig` takes no reply from any address but the one it asked. Over UDP it connects its socket; over TCP, N7: the same
/// port in the other protocol. An unconnected resolver is the lab client.
#[test]
fn b1_n7_dns_behind_a_vip() {
    let scene = Scene::new(2).unwrap();
    let (server, pod) = (scene.pod(0).unwrap(), scene.pod(1).unwrap());
    let answer = Ipv4Addr::new(192, 0, 2, 53);
    let _dns = Daemon::dns(server.netns(), &server.sockets(TARGET), answer).unwrap();
    scene.apply("web", &web_in(&scene, &[0])).unwrap();
    for host in VIPS {
        for over in ["+notcp", "+tcp"] {
            let arguments =
                ["@".to_owned() + host, "-p80".into(), "+tries=1".into(), "+time=3".into(), over.into()];
            let arguments: Vec<&str> =
                arguments.iter().map(String::as_str).chain(["name.example", "A"]).collect();
            let text = output(pod, "dig", &arguments);
            assert!(text.contains(&answer.to_string()), "{text}");
            assert!(text.contains(&format!("SERVER: {host}#80")), "{text}");
        }
    }
    let client = pod.client().unwrap();
    for (transport, dial, vip) in socket_kinds(V4, V6, 80).unwrap() {
        if transport != Transport::UdpUnconnected {
            continue;
        }
        let id = client.open(transport, dial.connect_only()).unwrap().unwrap().id.unwrap();
        client.send_datagram(id, dial.to, &dns_question(7, "name.example")).unwrap().unwrap();
        let reply = client.receive_datagram(id, SECOND).unwrap().unwrap();
        assert_eq!((reply.source, &reply.bytes[..2]), (vip, &[0, 7][..]));
        assert!(reply.bytes.ends_with(&answer.octets()), "{reply:?}");
    }
}

/// What the kernel has is the backend (`ss`); what the application is told is the VIP.
#[test]
fn ss_shows_the_backend_while_getpeername_shows_the_vip() {
    let mut scene = Scene::new(2).unwrap();
    scene.serve().unwrap();
    scene.apply("web", &web_in(&scene, &[0])).unwrap();
    let (backend, pod) = (scene.pod(0).unwrap(), scene.pod(1).unwrap());
    let client = pod.client().unwrap();
    for (vip, to) in VIPS.into_iter().zip(backend.sockets(TARGET)) {
        let vip = at(vip, 80).unwrap();
        let kept = client.open(Transport::Tcp, Dial::new(vip)).unwrap().unwrap();
        assert_eq!(kept.peer, Some(vip));
        let listed = output(pod, "ss", &["-tnH", "state", "established"]);
        let peers: Vec<_> = listed.lines().filter_map(|line| line.split_whitespace().nth(3)).collect();
        assert_eq!(peers, [to.to_string()], "{listed}");
        client.close(kept.id.unwrap()).unwrap();
    }
}

/// Z1, Z4, B2: TCP is refused at once, by its right name. B13: for UDP, connect succeeds, and so does sending from an
/// unconnected socket.
#[test]
fn z1_no_endpoint_refuses_tcp_and_leaves_udp_alone() {
    let scene = Scene::new(1).unwrap();
    scene.apply("web", &[web()]).unwrap();
    for place in [scene.node().unwrap().host(), scene.pod(0).unwrap()] {
        let client = place.client().unwrap();
        for (transport, dial, vip) in socket_kinds(V4, V6, 80).unwrap() {
            match transport {
                Transport::Tcp => {
                    let failure = fail(&client, transport, dial).unwrap();
                    assert!(failure.is_refused(), "{dial:?}: {failure}");
                    assert!(failure.elapsed_ns < 500_000_000, "not at once: {failure}");
                }
                Transport::UdpConnected => {
                    let exchange = reach(&client, transport, dial.connect_only()).unwrap();
                    assert_eq!(exchange.peer, Some(vip));
                }
                Transport::UdpUnconnected => {
                    let id = client.open(transport, dial.connect_only()).unwrap().unwrap().id.unwrap();
                    client.send_datagram(id, dial.to, b"anyone?").unwrap().unwrap();
                }
            }
        }
    }
    assert_eq!(scene.agent().unwrap().counter("connect_rejected").unwrap(), 6);
}

/// Z7: the last endpoint goes, then it refuses; the first comes, then it works; the Service goes, then nobody knows it.
#[test]
fn z7_z1_comes_and_goes_with_the_endpoints() {
    let mut scene = Scene::new(2).unwrap();
    scene.serve().unwrap();
    let client = scene.pod(1).unwrap().client().unwrap();
    let dial = Dial::new(at(V4, 80).unwrap());
    for _ in 0..5 {
        scene.apply("web", &web_in(&scene, &[0])).unwrap();
        assert_eq!(reach(&client, Transport::Tcp, dial).unwrap().answer.unwrap(), "pod-1-1");
        scene.apply("web", &[web()]).unwrap();
        assert!(fail(&client, Transport::Tcp, dial).unwrap().is_refused());
    }
    scene.delete("web").unwrap();
    assert!(fail(&client, Transport::Tcp, dial.timeout(SOON)).unwrap().is_timeout());
}

/// Z2, Z3, Z5: a local policy without a local endpoint, while others are ready elsewhere, is silent.
#[test]
fn z2_z3_no_local_endpoint_times_out() {
    let mut scene = Scene::with(Shape { nodes: 2, pods: 1 }, &[]).unwrap();
    scene.serve().unwrap();
    let other = scene.lab().node(1).unwrap();
    let mut objects = vec![
        web()
            .set("spec.internalTrafficPolicy", "Local")
            .set("spec.externalTrafficPolicy", "Local")
            .push("spec.externalIPs", "203.0.113.9"),
    ];
    objects.extend(slices("web", "http", "TCP", &[(other, other.pod(0).unwrap())]));
    objects.extend(slices("web", "dns", "UDP", &[(other, other.pod(0).unwrap())]));
    // Without the Node's pod range nobody can tell a local pod: Z3 holds for pods (P11).
    let node = sheave_tests::manifests::lab_node(scene.node().unwrap())
        .set("spec.podCIDR", serde_json::Value::Null)
        .set("spec.podCIDRs", serde_json::Value::Null);
    scene.lab().manifests().write("node", &[node]).unwrap();
    scene.apply("web", &objects).unwrap();
    let client = scene.pod(0).unwrap().client().unwrap();
    let external = Dial::new(at("203.0.113.9", 80).unwrap());
    for dial in [Dial::new(at(V4, 80).unwrap()), Dial::new(at(V6, 80).unwrap()), external] {
        let started = Instant::now();
        let failure = fail(&client, Transport::Tcp, dial.timeout(SOON)).unwrap();
        assert!(failure.is_timeout() && started.elapsed() >= SOON, "{}: {failure}", dial.to);
    }
    assert_eq!(scene.agent().unwrap().counter("connect_drop_left").unwrap(), 3);
    // P11: the node itself gets the cluster set by the external address, and nothing by the cluster IP.
    let host = scene.node().unwrap().host().client().unwrap();
    assert_eq!(reach(&host, Transport::Tcp, external).unwrap().answer.unwrap(), "pod-2-1");
    let internal = Dial::new(at(V4, 80).unwrap()).timeout(SOON);
    assert!(fail(&host, Transport::Tcp, internal).unwrap().is_timeout());
}

/// N7, S7: one port number, two protocols, each with endpoints of its own.
#[test]
fn s7_two_protocols_on_one_port() {
    let mut scene = Scene::new(3).unwrap();
    scene.serve().unwrap();
    let node = scene.node().unwrap();
    let mut objects = vec![web()];
    objects.extend(slices("web", "http", "TCP", &[(node, node.pod(0).unwrap())]));
    objects.extend(slices("web", "dns", "UDP", &[(node, node.pod(1).unwrap())]));
    scene.apply("web", &objects).unwrap();
    let client = scene.pod(2).unwrap().client().unwrap();
    for (transport, dial, _) in socket_kinds(V4, V6, 80).unwrap() {
        let expected = if transport == Transport::Tcp { "pod-1-1" } else { "pod-1-2" };
        assert_eq!(answers(&client, transport, dial, 20).unwrap(), names(&[expected]));
    }
}

/// B9: the only backend dials its own VIP.
#[test]
fn b9_hairpin() {
    let mut scene = Scene::new(1).unwrap();
    scene.serve().unwrap();
    scene.apply("web", &web_in(&scene, &[0])).unwrap();
    let client = scene.pod(0).unwrap().client().unwrap();
    for (transport, dial, vip) in socket_kinds(V4, V6, 80).unwrap() {
        let exchange = reach(&client, transport, dial).unwrap();
        assert_eq!(exchange.answer.as_deref(), Some("pod-1-1"));
        assert_eq!(exchange.peer.or(exchange.source), Some(vip));
    }
}

/// Where sockets of the node remember what they dialled.
fn places(scene: &Scene) -> Array<MapData, SocketPlace> {
    let pins = Pins::new(scene.node().unwrap().bpffs());
    let map = Map::from_map_data(open_pinned(&pins.state(), "SOCKET_PLACES").unwrap()).unwrap();
    map.try_into().unwrap()
}

/// A socket is told about the destination it has now, not about one that it had; whether it has a place or found it taken.
#[test]
fn a_socket_that_connects_again() {
    let mut scene = Scene::new(2).unwrap();
    scene.serve().unwrap();
    scene.apply("web", &web_in(&scene, &[0])).unwrap();
    scene.apply("none", &[service("none", &["10.96.0.11"]).port("http", "TCP", 80, TARGET)]).unwrap();
    let (backend, pod) = (scene.pod(0).unwrap(), scene.pod(1).unwrap());
    let client = pod.client().unwrap();
    let direct = SocketAddr::new(backend.v4().into(), TARGET);
    let own = SocketAddr::new(pod.v4().into(), TARGET);
    let vip = at(V4, 80).unwrap();
    let mut places = places(&scene);
    let overflowed = |places: &Array<MapData, SocketPlace>| {
        places.iter().map(Result::unwrap).filter(|place| place.overflowed != 0).count()
    };
    for taken in [false, true] {
        if taken {
            let nowhere = (Address::default(), Port::new(0));
            let origin = SocketOrigin::new(nowhere, BackendId::NONE, nowhere);
            let place = SocketPlace::new(u64::MAX, origin, 0);
            for index in 0..SOCKET_PLACES {
                places.set(index, place, 0).unwrap();
            }
        }
        // The backend's own address, right after the VIP led to it, is the hard case.
        let dials = [vip, direct, own, vip].map(Dial::new);
        let outcomes = client.chain(Transport::UdpConnected, &dials).unwrap();
        let peers: Vec<_> = outcomes.into_iter().map(|outcome| outcome.unwrap().peer.unwrap()).collect();
        assert_eq!(peers, [vip, direct, own, vip], "taken: {taken}");

        // Refused, then the same socket goes elsewhere.
        let refused = at("10.96.0.11", 80).unwrap();
        for to in [direct, vip] {
            let outcomes = client.chain(Transport::Tcp, &[refused, refused, to].map(Dial::new)).unwrap();
            let [first, second, third] = <[_; 3]>::try_from(outcomes).unwrap();
            assert!(first.unwrap_err().is_refused() && second.unwrap_err().is_refused());
            let third = third.unwrap();
            assert_eq!((third.peer, third.answer.as_deref()), (Some(to), Some("pod-1-1")), "taken: {taken}");
        }
        // One socket of UDP and one of TCP had something to remember.
        assert_eq!(overflowed(&places), if taken { 2 } else { 0 });
    }
}

/// A socket has its place for as long as it is open.
#[test]
fn closed_sockets_leave_their_places() {
    let mut scene = Scene::new(2).unwrap();
    scene.serve().unwrap();
    scene.apply("web", &web_in(&scene, &[0])).unwrap();
    let client = scene.pod(1).unwrap().client().unwrap();
    let places = places(&scene);
    let taken = || places.iter().map(Result::unwrap).filter(|place| place.cookie != 0).count();
    let before = taken();
    let open = [Transport::Tcp, Transport::UdpConnected].map(|transport| {
        client.open(transport, Dial::new(at(V4, 80).unwrap())).unwrap().unwrap().id.unwrap()
    });
    assert_eq!(taken(), before + 2);
    for transport in [Transport::Tcp, Transport::UdpConnected] {
        let report =
            client.run_loop(LoopSpec::new(transport, Dial::new(at(V6, 80).unwrap())).count(100)).unwrap();
        assert_eq!(report.failed(), 0, "{report:?}");
    }
    assert_eq!(taken(), before + 2);
    for id in open {
        client.close(id).unwrap();
    }
    assert_eq!(taken(), before);
}

/// Opens an unconnected socket that has not sent yet.
fn unconnected(client: &Client, to: SocketAddr) -> u64 {
    client.open(Transport::UdpUnconnected, Dial::new(to).connect_only()).unwrap().unwrap().id.unwrap()
}

/// Who answers on a kept socket, and as whom.
fn ask(client: &Client, id: u64, to: SocketAddr) -> (String, SocketAddr) {
    let exchange = client.send_to(id, to, SECOND).unwrap().unwrap();
    (exchange.answer.unwrap(), exchange.source.unwrap())
}

/// B12: one endpoint per socket and VIP while it serves; then another one.
#[test]
fn b12_an_unconnected_socket_keeps_its_endpoint_while_it_serves() {
    let mut scene = Scene::new(4).unwrap();
    scene.serve().unwrap();
    let client = scene.pod(3).unwrap().client().unwrap();
    for vip in VIPS.map(|vip| at(vip, 80).unwrap()) {
        scene.apply("web", &web_in(&scene, &[0, 1, 2])).unwrap();
        let id = unconnected(&client, vip);
        let (mut kept, source) = ask(&client, id, vip);
        assert_eq!(source, vip);
        let mut pods = vec![0, 1, 2];
        while pods.len() > 1 {
            for _ in 0..20 {
                assert_eq!(ask(&client, id, vip), (kept.clone(), vip));
            }
            // Its endpoint goes; the others stay.
            pods.retain(|pod| scene.pod(*pod).unwrap().name() != kept);
            scene.apply("web", &web_in(&scene, &pods)).unwrap();
            let (next, source) = ask(&client, id, vip);
            assert_ne!(next, kept);
            assert_eq!(source, vip);
            kept = next;
        }
    }
    let agent = scene.agent().unwrap();
    assert!(agent.counter("send_followed").unwrap() >= 80);
}

/// B12: what the old endpoint still says, after the flow has another one, is not shown as the VIP's.
#[test]
fn b12_a_late_reply_is_not_shown_as_the_vip() {
    let scene = Scene::new(3).unwrap();
    let slow = scene.pod(0).unwrap();
    let _server = scene.pod(1).unwrap().serve(TARGET).unwrap();
    let client = scene.pod(2).unwrap().client().unwrap();
    for (vip, address) in VIPS.into_iter().zip(slow.sockets(TARGET)) {
        let vip = at(vip, 80).unwrap();
        let late = slow.netns().run(|| UdpSocket::bind(address)).unwrap().unwrap();
        late.set_read_timeout(Some(SECOND)).unwrap();
        scene.apply("web", &web_in(&scene, &[0])).unwrap();
        let id = unconnected(&client, vip);
        client.send_datagram(id, vip, b"first").unwrap().unwrap();
        let mut buffer = [0; 64];
        let (_, from) = late.recv_from(&mut buffer).unwrap();

        scene.apply("web", &web_in(&scene, &[1])).unwrap();
        assert_eq!(ask(&client, id, vip), ("pod-1-2".to_owned(), vip));
        late.send_to(b"late", from).unwrap();
        let reply = client.receive_datagram(id, SECOND).unwrap().unwrap();
        assert_eq!((reply.bytes.as_slice(), reply.source), (b"late".as_slice(), address));
    }
}

/// B12: two VIPs on one socket, with the same endpoint behind both.
#[test]
fn b12_two_vips_on_one_socket() {
    let mut scene = Scene::new(3).unwrap();
    scene.serve().unwrap();
    let node = scene.node().unwrap();
    let mut objects = web_in(&scene, &[0]);
    for (name, vip, pod) in [("same", "10.96.0.12", 0), ("other", "10.96.0.13", 1)] {
        objects.push(service(name, &[vip]).port("dns", "UDP", 80, TARGET));
        objects.extend(slices(name, "dns", "UDP", &[(node, node.pod(pod).unwrap())]));
    }
    scene.apply("web", &objects).unwrap();
    let client = scene.pod(2).unwrap().client().unwrap();
    let vips = [V4, "10.96.0.12", "10.96.0.13"].map(|vip| at(vip, 80).unwrap());
    let id = unconnected(&client, vips[0]);
    for _ in 0..10 {
        for (vip, expected) in vips.into_iter().zip(["pod-1-1", "pod-1-1", "pod-1-2"]) {
            assert_eq!(ask(&client, id, vip), (expected.to_owned(), vip));
        }
    }
    // The endpoint asked by its own name is nobody's VIP, as long as no flow of this socket leads to it.
    let direct = SocketAddr::new(scene.pod(1).unwrap().v4().into(), TARGET);
    let fresh = unconnected(&client, direct);
    assert_eq!(ask(&client, fresh, direct), ("pod-1-2".to_owned(), direct));
}

/// C2: an endpoint that terminates but still serves keeps the flows it has; new sockets go to the ready ones (P3). When
/// it stops serving, its flows move.
#[test]
fn c2_terminating_but_serving_keeps_its_flows() {
    let mut scene = Scene::new(3).unwrap();
    scene.serve().unwrap();
    let client = scene.pod(2).unwrap().client().unwrap();
    let vip = at(V4, 80).unwrap();
    scene.apply("web", &web_in(&scene, &[0])).unwrap();
    let id = unconnected(&client, vip);
    assert_eq!(ask(&client, id, vip), ("pod-1-1".to_owned(), vip));

    let with_old = |serving: bool| -> Vec<Object> {
        let node = scene.node().unwrap().name();
        let mark = |object: Object| {
            if object.json()["addressType"] != "IPv4" {
                return object;
            }
            let old = scene.pod(0).unwrap().v4().to_string();
            object.endpoint_with(&old, node, false, serving, true)
        };
        web_in(&scene, &[1]).into_iter().map(mark).collect()
    };
    scene.apply("web", &with_old(true)).unwrap();
    for _ in 0..20 {
        assert_eq!(ask(&client, id, vip), ("pod-1-1".to_owned(), vip));
    }
    for transport in TRANSPORTS {
        let who = answers(&client, transport, Dial::new(vip), 40).unwrap();
        assert_eq!(who, names(&["pod-1-2"]), "{transport:?}");
    }
    scene.apply("web", &with_old(false)).unwrap();
    assert_eq!(ask(&client, id, vip), ("pod-1-2".to_owned(), vip));
}

/// B5: connected sockets of an endpoint that serves no more are closed, in every network namespace of the node; not those
/// of an endpoint that serves, nor whoever dialled the endpoint itself, nor TCP. C3: not while nobody else serves.
#[test]
fn b5_connected_sockets_leave_an_endpoint_that_serves_no_more() {
    let mut scene = Scene::new(3).unwrap();
    scene.serve().unwrap();
    scene.apply("web", &web_in(&scene, &[0, 1])).unwrap();
    let [gone, stays] = [0, 1].map(|pod| scene.pod(pod).unwrap().name().to_owned());
    let direct = Dial::new(SocketAddr::new(scene.pod(0).unwrap().v4().into(), TARGET));
    let places = [scene.node().unwrap().host(), scene.pod(2).unwrap()];
    let clients = places.map(|place| place.client().unwrap());
    let (mut sockets, mut held) = (Vec::new(), Vec::new());
    for client in &clients {
        for (transport, dial, _) in socket_kinds(V4, V6, 80).unwrap() {
            match transport {
                Transport::UdpConnected => {
                    for pod in [&gone, &stays] {
                        sockets.push((client, dial, pod, opened_to(client, dial, pod)));
                    }
                }
                Transport::Tcp => held.push((client, client.hold(dial, 8).unwrap().id)),
                Transport::UdpUnconnected => {}
            }
        }
        sockets.push((client, direct, &gone, opened_to(client, direct, &gone)));
    }
    let still_answer = |which: &dyn Fn(Dial, &str) -> bool| {
        for (client, dial, pod, id) in sockets.iter().filter(|(_, dial, pod, _)| which(*dial, pod)) {
            let answer = client.send(*id, SECOND).unwrap().map(|exchange| exchange.answer);
            assert_eq!(answer, Ok(Some((*pod).clone())), "{dial:?}");
        }
    };
    scene.apply("web", &web_in(&scene, &[])).unwrap();
    thread::sleep(SOON);
    still_answer(&|_, _| true);

    scene.apply("web", &web_in(&scene, &[1])).unwrap();
    for (client, dial, _, id) in sockets.iter().filter(|(_, dial, pod, _)| *pod == &gone && *dial != direct) {
        eventually(&format!("closed: {dial:?}"), || {
            let failure = client.send(*id, SOON)?.err().context("it is still answered")?;
            ensure!(!failure.is_timeout(), "{failure}");
            Ok(())
        })
        .unwrap();
        assert_eq!(reach(client, Transport::UdpConnected, *dial).unwrap().answer.as_ref(), Some(&stays));
    }
    still_answer(&|dial, pod| pod == stays || dial == direct);
    for (client, id) in held {
        let report = client.check_held(id).unwrap();
        assert_eq!((report.alive, report.failures.len()), (8, 0), "{report:?}");
    }
}

/// A connected socket that this pod answers.
fn opened_to(client: &Client, dial: Dial, pod: &str) -> u64 {
    for _ in 0..ENOUGH {
        let exchange = client.open(Transport::UdpConnected, dial).unwrap().unwrap();
        if exchange.answer.as_deref() == Some(pod) {
            return exchange.id.unwrap();
        }
        client.close(exchange.id.unwrap()).unwrap();
    }
    panic!("{pod} never answered {dial:?}");
}

/// Whoever is in no cgroup of the node is not translated: the lab proves that it is the hooks that do it.
#[test]
fn nobody_else_is_translated() {
    let mut scene = Scene::new(1).unwrap();
    scene.serve().unwrap();
    scene.apply("web", &web_in(&scene, &[0])).unwrap();
    let client = scene.lab().outside().client().unwrap();
    let dial = Dial::new(at(V4, 80).unwrap()).timeout(SOON);
    assert!(fail(&client, Transport::Tcp, dial).unwrap().is_timeout());
}
