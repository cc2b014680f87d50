//! Every kind of frontend as a local client sees it: which addresses answer, which are left alone, and which set of
//! endpoints rules for whom.

#![expect(clippy::unwrap_used, reason = "the helpers of tests fail as tests do")]

use std::{collections::BTreeSet, time::Duration};

use serde_json::{Value, json};
use sheave_tests::{
    client::Client,
    lab::{Node, Place, Shape},
    manifests::{Object, lab_node, service},
    protocol::{Dial, Transport},
    scene::{ENOUGH, Scene, TARGET, answers, at, eventually, fail, names, reach, slices, socket_kinds},
};

const V4: &str = "10.96.0.10";
const V6: &str = "fd00:10:96::10";
const EXTERNAL: &str = "203.0.113.9";
const BALANCER: &str = "203.0.113.80";
const NODE_PORT: u16 = 30080;

/// The first node of every lab.
const NODE_V4: &str = "172.18.0.2";
const NODE_V6: &str = "fd00:172:18::2";
/// Addresses that the tests give it besides.
const MORE_V4: &str = "172.18.0.77";
const MORE_V6: &str = "fd00:172:18::77";

const SOON: Duration = Duration::from_millis(700);

/// The Service `web` with a NodePort, TCP only.
fn web() -> Object {
    service("web", &[V4, V6]).port("http", "TCP", 80, TARGET).node_ports(&[NODE_PORT])
}

/// A Service with these endpoints for its port `http`.
fn with_endpoints(service: Object, name: &str, places: &[(&Node, &Place)]) -> Vec<Object> {
    let mut objects = vec![service];
    objects.extend(slices(name, "http", "TCP", places));
    objects
}

fn pods_of(node: &Node) -> Vec<(&Node, &Place)> {
    node.pods().iter().map(|pod| (node, pod)).collect()
}

fn to(address: &str, port: u16) -> Dial {
    Dial::new(at(address, port).unwrap()).timeout(SOON)
}

fn who(client: &Client, address: &str, port: u16) -> BTreeSet<String> {
    // With the patience for a SYN that is sent again: a busy machine may lose one.
    answers(client, Transport::Tcp, Dial::new(at(address, port).unwrap()), ENOUGH).unwrap()
}

/// Nobody translates it and nobody listens there: the node's own kernel refuses.
fn is_left_alone(client: &Client, address: &str, port: u16) {
    let failure = fail(client, Transport::Tcp, to(address, port)).unwrap();
    assert!(failure.is_refused(), "{address}:{port}: {failure}");
}

fn add_addresses(scene: &Scene) {
    let batch = format!("address add {MORE_V4}/24 dev eth0\naddress add {MORE_V6}/64 dev eth0 nodad\n");
    scene.node().unwrap().host().netns().ip(&batch).unwrap();
}

/// N1-N3, B1: every kind of socket, from pods and from the node itself; the peer is the node's address.
#[test]
fn n1_node_ports_answer_pods_and_the_node() {
    let mut scene = Scene::new(3).unwrap();
    scene.serve().unwrap();
    let node = scene.node().unwrap();
    let web = web().port("dns", "UDP", 81, TARGET).node_ports(&[NODE_PORT, NODE_PORT]);
    let mut objects = with_endpoints(web, "web", &pods_of(node)[..2]);
    objects.extend(slices("web", "dns", "UDP", &pods_of(node)[..2]));
    scene.apply("web", &objects).unwrap();
    for place in [node.host(), scene.pod(2).unwrap()] {
        let client = place.client().unwrap();
        for (transport, dial, vip) in socket_kinds(NODE_V4, NODE_V6, NODE_PORT).unwrap() {
            let who = answers(&client, transport, dial, ENOUGH).unwrap();
            assert_eq!(who, names(&["pod-1-1", "pod-1-2"]));
            let exchange = reach(&client, transport, dial).unwrap();
            assert_eq!(exchange.peer.or(exchange.source), Some(vip));
        }
    }
}

/// N1, N2, N4: which own addresses answer; all others, and loopback always, are left alone.
#[test]
fn n2_node_port_addresses() {
    const OWN: [&str; 4] = [NODE_V4, NODE_V6, MORE_V4, MORE_V6];
    let cases: [(&str, &[&str]); 4] = [
        ("primary", &[NODE_V4, NODE_V6]),
        // A family without a range is not restricted.
        ("172.18.0.64/26", &[MORE_V4, NODE_V6, MORE_V6]),
        ("172.18.0.64/26,fd00:172:18::77/128", &[MORE_V4, MORE_V6]),
        ("all", &OWN),
    ];
    for (option, served) in cases {
        let shape = Shape { nodes: 1, pods: 2 };
        let mut scene = Scene::without_agent(shape, &["--nodeport-addresses", option]).unwrap();
        add_addresses(&scene);
        scene.serve().unwrap();
        scene.start_agent().unwrap();
        let node = scene.node().unwrap();
        scene.apply("web", &with_endpoints(web(), "web", &pods_of(node)[..1])).unwrap();
        for place in [node.host(), scene.pod(1).unwrap()] {
            let client = place.client().unwrap();
            for address in OWN {
                if served.contains(&address) {
                    assert_eq!(who(&client, address, NODE_PORT), names(&["pod-1-1"]), "{option} {address}");
                } else {
                    is_left_alone(&client, address, NODE_PORT);
                }
            }
            is_left_alone(&client, "127.0.0.1", NODE_PORT);
            is_left_alone(&client, "::1", NODE_PORT);
        }
    }
}

/// N4: an address that the node gets later starts to work, one that it loses ends.
#[test]
fn n4_addresses_come_and_go() {
    let mut scene = Scene::with(Shape { nodes: 1, pods: 2 }, &["--nodeport-addresses", "all"]).unwrap();
    scene.serve().unwrap();
    let node = scene.node().unwrap();
    scene.apply("web", &with_endpoints(web(), "web", &pods_of(node)[..1])).unwrap();
    let client = scene.pod(1).unwrap().client().unwrap();
    is_not_served(&client, MORE_V4);
    add_addresses(&scene);
    for address in [MORE_V4, MORE_V6] {
        let dial = to(address, NODE_PORT);
        let exchange = eventually("a new address", || reach(&client, Transport::Tcp, dial)).unwrap();
        assert_eq!(exchange.answer.as_deref(), Some("pod-1-1"));
    }
    node.host().netns().ip(&format!("address del {MORE_V4}/24 dev eth0\n")).unwrap();
    eventually("a lost address", || fail(&client, Transport::Tcp, to(MORE_V4, NODE_PORT))).unwrap();
}

fn is_not_served(client: &Client, address: &str) {
    fail(client, Transport::Tcp, to(address, NODE_PORT)).unwrap();
}

/// N8, X1: an external IP that is bound on the node answers its own port, not the NodePort.
#[test]
fn n8_no_node_port_on_other_vips() {
    let mut scene = Scene::new(2).unwrap();
    scene.serve().unwrap();
    let node = scene.node().unwrap();
    node.host()
        .netns()
        .ip(&format!("address add {EXTERNAL}/32 dev lo\naddress add {BALANCER}/32 dev lo\n"))
        .unwrap();
    let web = web()
        .push("spec.externalIPs", EXTERNAL)
        .set("status.loadBalancer.ingress", json!([{"ip": BALANCER}]));
    scene.apply("web", &with_endpoints(web, "web", &pods_of(node)[..1])).unwrap();
    for place in [node.host(), scene.pod(1).unwrap()] {
        let client = place.client().unwrap();
        for vip in [EXTERNAL, BALANCER] {
            assert_eq!(who(&client, vip, 80), names(&["pod-1-1"]));
            is_left_alone(&client, vip, NODE_PORT);
        }
    }
}

/// N9: a local process may bind the NodePort; the proxy wins for its addresses and leaves the others to the process.
#[test]
fn n9_the_proxy_wins_for_its_addresses() {
    let mut scene = Scene::without_agent(Shape { nodes: 1, pods: 2 }, &[]).unwrap();
    add_addresses(&scene);
    scene.serve().unwrap();
    scene.start_agent().unwrap();
    let node = scene.node().unwrap();
    scene.apply("web", &with_endpoints(web(), "web", &pods_of(node)[..1])).unwrap();
    let listen = [NODE_V4, MORE_V4].map(|address| at(address, NODE_PORT).unwrap());
    let process = node.host().client().unwrap();
    process.serve("process", &listen).unwrap();
    for place in [node.host(), scene.pod(1).unwrap()] {
        let client = place.client().unwrap();
        assert_eq!(who(&client, NODE_V4, NODE_PORT), names(&["pod-1-1"]));
        assert_eq!(who(&client, MORE_V4, NODE_PORT), names(&["process"]));
    }
}

/// N10: the NodePort of another node is not ours.
#[test]
fn n10_remote_node_ports_are_left_alone() {
    let mut scene = Scene::with(Shape { nodes: 2, pods: 1 }, &[]).unwrap();
    scene.serve().unwrap();
    let (node, other) = (scene.node().unwrap(), scene.lab().node(1).unwrap());
    scene.lab().manifests().write("other", &[lab_node(other)]).unwrap();
    scene.apply("web", &with_endpoints(web(), "web", &pods_of(node))).unwrap();
    let _server = other.host().serve_as("other node", NODE_PORT).unwrap();
    let client = scene.pod(0).unwrap().client().unwrap();
    for address in other.host().sockets(NODE_PORT) {
        let exchange = reach(&client, Transport::Tcp, Dial::new(address)).unwrap();
        assert_eq!(exchange.answer.as_deref(), Some("other node"));
    }
}

/// N7: one NodePort number, TCP of one Service and UDP of another.
#[test]
fn n7_a_node_port_is_of_one_protocol() {
    let mut scene = Scene::new(3).unwrap();
    scene.serve().unwrap();
    let node = scene.node().unwrap();
    let pods = pods_of(node);
    let mut objects = with_endpoints(web(), "web", &pods[..1]);
    objects.push(service("names", &["10.96.0.11"]).port("dns", "UDP", 53, TARGET).node_ports(&[NODE_PORT]));
    objects.extend(slices("names", "dns", "UDP", &pods[1..2]));
    scene.apply("web", &objects).unwrap();
    let client = scene.pod(2).unwrap().client().unwrap();
    assert_eq!(who(&client, NODE_V4, NODE_PORT), names(&["pod-1-1"]));
    for transport in [Transport::UdpConnected, Transport::UdpUnconnected] {
        let who = answers(&client, transport, to(NODE_V4, NODE_PORT), 20).unwrap();
        assert_eq!(who, names(&["pod-1-2"]), "{transport:?}");
    }
}

/// X1: the gate switches external IPs off, and nothing else.
#[test]
fn x1_external_ips_and_their_gate() {
    for (value, works) in [("true", true), ("false", false)] {
        let gate = format!("AllowServiceExternalIPs={value}");
        let mut scene = Scene::with(Shape { nodes: 1, pods: 2 }, &["--feature-gates", &gate]).unwrap();
        scene.serve().unwrap();
        let web = web().set("spec.externalIPs", json!([EXTERNAL, "2001:db8::9"]));
        let node = scene.node().unwrap();
        scene.apply("web", &with_endpoints(web, "web", &pods_of(node)[..1])).unwrap();
        for place in [node.host(), scene.pod(1).unwrap()] {
            let client = place.client().unwrap();
            for vip in [EXTERNAL, "2001:db8::9"] {
                if works {
                    assert_eq!(who(&client, vip, 80), names(&["pod-1-1"]));
                } else {
                    assert!(fail(&client, Transport::Tcp, to(vip, 80)).unwrap().is_timeout());
                }
            }
            assert_eq!(who(&client, V4, 80), names(&["pod-1-1"]));
        }
    }
}

/// X2: `ipMode` VIP or none is served, Proxy and names are not.
#[test]
fn x2_load_balancer_ips() {
    let mut scene = Scene::new(2).unwrap();
    scene.serve().unwrap();
    let ingress = json!([
        {"ip": BALANCER},
        {"ip": "203.0.113.81", "ipMode": "VIP"},
        {"ip": "203.0.113.82", "ipMode": "Proxy"},
        {"hostname": "lb.example"},
        {"ip": "2001:db8::80"},
    ]);
    let web = web().set("spec.type", "LoadBalancer").set("status.loadBalancer.ingress", ingress);
    let node = scene.node().unwrap();
    scene.apply("web", &with_endpoints(web, "web", &pods_of(node)[..1])).unwrap();
    for place in [node.host(), scene.pod(1).unwrap()] {
        let client = place.client().unwrap();
        for vip in [BALANCER, "203.0.113.81", "2001:db8::80"] {
            assert_eq!(who(&client, vip, 80), names(&["pod-1-1"]));
        }
        assert!(fail(&client, Transport::Tcp, to("203.0.113.82", 80)).unwrap().is_timeout());
    }
}

/// F1, F3: a load balancer IP with source ranges needs the client's address, which only a packet has; its other
/// frontends are open.
#[test]
fn f3_source_ranges_are_left_to_the_packet_path() {
    let mut scene = Scene::new(2).unwrap();
    scene.serve().unwrap();
    let web = web()
        .set("spec.type", "LoadBalancer")
        .set("status.loadBalancer.ingress", json!([{"ip": BALANCER}]))
        .push("spec.externalIPs", EXTERNAL)
        .set("spec.loadBalancerSourceRanges", json!(["192.0.2.0/24"]));
    let node = scene.node().unwrap();
    scene.apply("web", &with_endpoints(web, "web", &pods_of(node)[..1])).unwrap();
    let client = scene.pod(1).unwrap().client().unwrap();
    assert!(fail(&client, Transport::Tcp, to(BALANCER, 80)).unwrap().is_timeout());
    assert_eq!(scene.agent().unwrap().counter("connect_source_ranges_left").unwrap(), 1);
    for (vip, port) in [(V4, 80), (EXTERNAL, 80), (NODE_V4, NODE_PORT)] {
        assert_eq!(who(&client, vip, port), names(&["pod-1-1"]));
    }
    assert_eq!(scene.agent().unwrap().counter("connect_source_ranges_left").unwrap(), 1);
}

/// P10, P11, B3: every policy, from a pod and from the node, with and without a way to tell local pods.
#[test]
fn p10_p11_traffic_policies() {
    let mut scene = Scene::with(Shape { nodes: 2, pods: 2 }, &[]).unwrap();
    scene.serve().unwrap();
    let (node, other) = (scene.node().unwrap(), scene.lab().node(1).unwrap());
    let endpoints = [(node, node.pod(0).unwrap()), (other, other.pod(0).unwrap())];
    let both = names(&["pod-1-1", "pod-2-1"]);
    let local = names(&["pod-1-1"]);
    let pod = scene.pod(1).unwrap().client().unwrap();
    let host = node.host().client().unwrap();
    for detects in [true, false] {
        let object = lab_node(node);
        let object = if detects {
            object
        } else {
            object.set("spec.podCIDR", Value::Null).set("spec.podCIDRs", Value::Null)
        };
        scene.apply("node", &[object]).unwrap();
        for internal in ["Cluster", "Local"] {
            for external in ["Cluster", "Local"] {
                let web = web()
                    .set("spec.type", "LoadBalancer")
                    .set("spec.internalTrafficPolicy", internal)
                    .set("spec.externalTrafficPolicy", external)
                    .push("spec.externalIPs", EXTERNAL)
                    .set("status.loadBalancer.ingress", json!([{"ip": BALANCER}]));
                scene.apply("web", &with_endpoints(web, "web", &endpoints)).unwrap();
                let case = format!("detects {detects}, iTP {internal}, eTP {external}");
                for (client, is_pod) in [(&pod, true), (&host, false)] {
                    let expected = if internal == "Local" { &local } else { &both };
                    for vip in [V4, V6] {
                        assert_eq!(&who(client, vip, 80), expected, "{case}, pod {is_pod}, {vip}");
                    }
                    let short_cut = detects || !is_pod;
                    let expected = if external == "Local" && !short_cut { &local } else { &both };
                    for (vip, port) in
                        [(NODE_V4, NODE_PORT), (NODE_V6, NODE_PORT), (EXTERNAL, 80), (BALANCER, 80)]
                    {
                        assert_eq!(&who(client, vip, port), expected, "{case}, pod {is_pod}, {vip}");
                    }
                }
            }
        }
    }
}

/// P14: frontends that are to be left alone are, in one protocol or as a whole address.
#[test]
fn p14_excluded_frontends() {
    let excluded = format!("{V4}:80/TCP,{V6}");
    let mut scene = Scene::with(Shape { nodes: 1, pods: 2 }, &["--exclude-frontends", &excluded]).unwrap();
    scene.serve().unwrap();
    let node = scene.node().unwrap();
    let mut objects = with_endpoints(web().port("dns", "UDP", 80, TARGET), "web", &pods_of(node)[..1]);
    objects.extend(slices("web", "dns", "UDP", &pods_of(node)[..1]));
    scene.apply("web", &objects).unwrap();
    let client = scene.pod(1).unwrap().client().unwrap();
    assert!(fail(&client, Transport::Tcp, to(V4, 80)).unwrap().is_timeout());
    assert!(fail(&client, Transport::Tcp, to(V6, 80)).unwrap().is_timeout());
    assert!(fail(&client, Transport::UdpConnected, to(V6, 80)).unwrap().is_timeout());
    assert_eq!(answers(&client, Transport::UdpConnected, to(V4, 80), 20).unwrap(), names(&["pod-1-1"]));
    assert_eq!(who(&client, NODE_V4, NODE_PORT), names(&["pod-1-1"]));
}

/// The slices with hints for each endpoint in turn.
fn hinted(slices: Vec<Object>, hints: &[Value]) -> Vec<Object> {
    let hint = |slice: Object| {
        hints
            .iter()
            .enumerate()
            .fold(slice, |slice, (index, hint)| slice.set(&format!("endpoints.{index}.hints"), hint.clone()))
    };
    slices.into_iter().map(hint).collect()
}

/// P6-P9: hints for zones and nodes, per service port, and a zone label that changes.
#[test]
fn p6_p8_p9_hints() {
    let mut scene = Scene::new(4).unwrap();
    scene.serve().unwrap();
    let node = scene.node().unwrap();
    let in_zone = |zone: &str| lab_node(node).label("topology.kubernetes.io/zone", zone);
    let pods = &pods_of(node)[..3];
    let zones = |names: &[&str]| {
        let zones: Vec<_> = names.iter().map(|name| json!({"name": name})).collect();
        json!({"forZones": zones})
    };
    let mut objects = vec![web().port("plain", "TCP", 81, TARGET)];
    objects.extend(hinted(
        slices("web", "http", "TCP", pods),
        &[zones(&["a"]), zones(&["b"]), zones(&["a", "b"])],
    ));
    // P8: this port's endpoints have no hints; the other port's do not count for it.
    objects.extend(slices("web", "plain", "TCP", pods).into_iter().map(|slice| {
        let name = format!("plain-{}", slice.json()["metadata"]["name"].as_str().unwrap());
        slice.set("metadata.name", name)
    }));
    scene.apply("node", &[in_zone("a")]).unwrap();
    scene.apply("web", &objects).unwrap();
    let client = scene.pod(3).unwrap().client().unwrap();
    let all = names(&["pod-1-1", "pod-1-2", "pod-1-3"]);
    assert_eq!(who(&client, V4, 80), names(&["pod-1-1", "pod-1-3"]));
    assert_eq!(who(&client, V4, 81), all);
    // P9: the node moves; a zone that no hint names is none; then it has no zone at all.
    scene.apply("node", &[in_zone("b")]).unwrap();
    assert_eq!(who(&client, V6, 80), names(&["pod-1-2", "pod-1-3"]));
    scene.apply("node", &[in_zone("c")]).unwrap();
    assert_eq!(who(&client, V4, 80), all);
    scene.apply("node", &[lab_node(node)]).unwrap();
    assert_eq!(who(&client, V4, 80), all);
    // P6 step 2: by the node's name, before zones.
    let for_node = |name: &str| json!({"forNodes": [{"name": name}], "forZones": [{"name": "a"}]});
    let hints = [for_node("node-1"), for_node("node-2"), for_node("node-2")];
    let mut objects = vec![web()];
    objects.extend(hinted(slices("web", "http", "TCP", pods), &hints));
    scene.apply("web", &objects).unwrap();
    assert_eq!(who(&client, V4, 80), names(&["pod-1-1"]));
}

/// S12: two Services claim one external IP. The older one has it; when it goes, the other has it at once.
#[test]
fn s12_a_claimed_frontend_has_one_owner() {
    let mut scene = Scene::new(3).unwrap();
    scene.serve().unwrap();
    let node = scene.node().unwrap();
    let pods = pods_of(node);
    let claim = |name: &str, vip: &str, year: u32, pods: &[(&Node, &Place)]| {
        let service = service(name, &[vip])
            .port("http", "TCP", 80, TARGET)
            .push("spec.externalIPs", EXTERNAL)
            .set("metadata.creationTimestamp", format!("{year}-01-01T00:00:00Z"));
        with_endpoints(service, name, pods)
    };
    scene.apply("young", &claim("young", "10.96.0.21", 2025, &pods[..1])).unwrap();
    let client = scene.pod(2).unwrap().client().unwrap();
    assert_eq!(who(&client, EXTERNAL, 80), names(&["pod-1-1"]));
    scene.apply("old", &claim("old", "10.96.0.22", 2020, &pods[1..2])).unwrap();
    assert_eq!(who(&client, EXTERNAL, 80), names(&["pod-1-2"]));
    // One with endpoints beats one without.
    scene.apply("old", &claim("old", "10.96.0.22", 2020, &[])).unwrap();
    assert_eq!(who(&client, EXTERNAL, 80), names(&["pod-1-1"]));
    scene.delete("young").unwrap();
    assert!(fail(&client, Transport::Tcp, to(EXTERNAL, 80)).unwrap().is_refused());
    scene.apply("old", &claim("old", "10.96.0.22", 2020, &pods[1..2])).unwrap();
    assert_eq!(who(&client, EXTERNAL, 80), names(&["pod-1-2"]));
}
