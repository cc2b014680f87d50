//! What the agent writes for the packet path besides its hooks, and how it keeps the tables of connections. The
//! connections here are written by the tests.

#![expect(clippy::unwrap_used, reason = "the helpers of tests fail as tests do")]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use aya::maps::{Array, Map, MapData, lpm_trie::LpmTrie};
use proxy_agent::{
    dataplane::{Dataplane, bpf::Kernel},
    kernel::{Pins, mapping::Mapping, programs::open_pinned, table::Table},
    packet::flows::now_ns,
};
use proxy_common::abi::{
    Address, Flow, FlowKey, FrontendKey, PacketSettings, Port, SnatKey, SourceRange,
    packet::{FLOW_PLACES, FRESH, SNAT_PLACES, VIP_BYTES, VIP_PLACES, flow_place, snat_place, vip_place},
};
use serde_json::{Value, json};
use sheave_tests::{
    agent::sheave,
    lab::Shape,
    manifests::{Object, service},
    scene::{Scene, TARGET, eventually, slices},
};

const BARRIER: &str = "10.96.255.254";
/// So that a walk's results need not be waited for.
const OFTEN: [&str; 2] = ["--flow-sweep-ms", "50"];
const SECOND_NS: u64 = 1_000_000_000;
const TCP: u8 = 6;
const UDP: u8 = 17;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pins(scene: &Scene) -> Pins {
    Pins::new(scene.node().unwrap().bpffs())
}

fn settings(scene: &Scene) -> PacketSettings {
    let map = Map::from_map_data(open_pinned(&pins(scene).state(), "PACKET_SETTINGS").unwrap()).unwrap();
    let settings: Array<MapData, PacketSettings> = map.try_into().unwrap();
    settings.get(&0, 0).unwrap()
}

fn cluster_ips(scene: &Scene) -> BTreeSet<String> {
    let table: Table<Address, u32> = Table::open(&pins(scene).state(), "CLUSTER_IPS").unwrap();
    table.entries().unwrap().iter().map(|(address, _)| address.ip().to_string()).collect()
}

fn vips(scene: &Scene) -> BTreeSet<usize> {
    let map = open_pinned(&pins(scene).state(), "VIPS").unwrap();
    let bits: Mapping<[u8; VIP_BYTES]> = Mapping::new(map.fd(), 1, false).unwrap();
    (0..VIP_PLACES).filter(|place| bits.has_vip(*place)).collect()
}

fn places(vips: &[&str]) -> BTreeSet<usize> {
    vips.iter().map(|vip| vip_place(&ip(vip).into())).collect()
}

fn texts(of: &[&str]) -> BTreeSet<String> {
    of.iter().map(|&text| text.to_owned()).collect()
}

/// A TCP and a UDP port, and endpoints in these pods of the first node.
fn web(scene: &Scene, name: &str, vips: &[&str], pods: &[usize]) -> Vec<Object> {
    let node = scene.node().unwrap();
    let places: Vec<_> = pods.iter().map(|pod| (node, node.pod(*pod).unwrap())).collect();
    let ports = service(name, vips).port("http", "TCP", 80, TARGET).port("dns", "UDP", 53, TARGET);
    let mut objects = vec![ports];
    objects.extend(slices(name, "http", "TCP", &places));
    objects.extend(slices(name, "dns", "UDP", &places));
    objects
}

fn has_vips(scene: &Scene, expected: &[&str]) {
    let expected = places(expected);
    eventually("the filter has the VIPs that there are", || {
        ensure!(vips(scene) == expected, "{:?}, not {expected:?}", vips(scene));
        Ok(())
    })
    .unwrap();
}

#[test]
fn settings_say_what_node_and_policy_say() {
    let arguments = [
        "--service-cidr",
        "10.96.0.0/12,fd00:10:96::/112",
        "--masquerade-all",
        "--snat-port-range",
        "11000-11999",
    ];
    let scene = Scene::with(Shape { nodes: 1, pods: 0 }, &arguments).unwrap();
    let written = settings(&scene);
    let all = PacketSettings::DETECTS_V4 | PacketSettings::DETECTS_V6 | PacketSettings::MASQUERADE_ALL;
    let flags = written.flags & !PacketSettings::NO_BRIDGE_PORTS;
    assert_eq!((flags, written.snat_first, written.snat_count), (all, 11_000, 1000));
    assert_eq!((written.local_pods_count, written.service_ranges_count), (2, 2));
    let is_in = |prefixes: &[proxy_common::abi::Prefix], text: &str| {
        prefixes.iter().any(|prefix| prefix.contains(&ip(text).into()))
    };
    let node = scene.node().unwrap();
    assert!(
        is_in(&written.local_pods[..2], "10.244.1.99") && is_in(&written.local_pods[..2], "fd00:10:244:1::9")
    );
    assert!(!is_in(&written.local_pods[..2], "10.244.2.99"));
    assert!(is_in(&written.service_ranges[..2], "10.111.255.255"));
    assert!(!is_in(&written.service_ranges[..2], "10.112.0.0"));

    // The Node loses its IPv6 range.
    let addresses = [node.host().v4().to_string()];
    let smaller = sheave_tests::manifests::node(node.name(), &addresses, &[node.pod_cidr_v4()]);
    scene.apply("node", &[smaller]).unwrap();
    assert_eq!(settings(&scene).local_pods_count, 1);
    let flags = settings(&scene).flags & !PacketSettings::NO_BRIDGE_PORTS;
    assert_eq!(flags, PacketSettings::DETECTS_V4 | PacketSettings::MASQUERADE_ALL);
}

/// Where a bridge has ports, packets are asked for them; elsewhere they are spared that.
#[test]
fn settings_say_whether_there_are_bridge_ports() {
    let scene = Scene::with(Shape { nodes: 1, pods: 1 }, &[]).unwrap();
    let host = scene.node().unwrap().host().netns();
    let are = |expected: bool| {
        eventually("the settings say whether there are ports", || {
            let flags = settings(&scene).flags;
            ensure!((flags & PacketSettings::NO_BRIDGE_PORTS == 0) == expected, "{flags:#x}");
            Ok(())
        })
        .unwrap();
    };
    are(false);
    host.ip("link add br7 type bridge\nlink add port0 type veth peer name port1\n").unwrap();
    host.ip("link set port0 master br7\n").unwrap();
    are(true);
    host.ip("link set port0 nomaster\n").unwrap();
    are(false);
}

/// Z6: cluster IPs of proxied Services, but for those bound on this node. The filter has them and all other frontends.
#[test]
fn z6_cluster_ips_and_the_filter_follow_the_services() {
    let scene = Scene::with(Shape { nodes: 1, pods: 1 }, &OFTEN).unwrap();
    let node = scene.node().unwrap();
    scene.apply("a", &web(&scene, "a", &["10.96.0.10", "fd00:10:96::10"], &[0])).unwrap();
    // No ports at all: no frontend, and a cluster IP none the less.
    scene.apply("b", &[service("b", &["10.96.0.11"])]).unwrap();
    let external = service("c", &["10.96.0.12"])
        .port("http", "TCP", 80, TARGET)
        .node_ports(&[30080])
        .set("spec.externalIPs", json!(["203.0.113.5"]));
    scene.apply("c", &[external]).unwrap();
    let all = texts(&["10.96.0.10", "fd00:10:96::10", "10.96.0.11", "10.96.0.12", BARRIER]);
    assert_eq!(cluster_ips(&scene), all);
    let (v4, v6) = (node.host().v4().to_string(), node.host().v6().to_string());
    let of_a = ["10.96.0.10", "fd00:10:96::10"];
    let others = ["10.96.0.11", "10.96.0.12", "203.0.113.5", &v4, BARRIER];
    has_vips(&scene, &[&of_a[..], &others[..]].concat());

    // Bound on the node: its own processes answer.
    node.host().netns().ip("address add 10.96.0.11/32 dev lo\n").unwrap();
    let without = texts(&["10.96.0.10", "fd00:10:96::10", "10.96.0.12", BARRIER]);
    let has = |expected: &BTreeSet<String>| -> Result<()> {
        ensure!(cluster_ips(&scene) == *expected, "{:?}", cluster_ips(&scene));
        Ok(())
    };
    eventually("an address that is bound is left alone", || has(&without)).unwrap();
    node.host().netns().ip("address del 10.96.0.11/32 dev lo\n").unwrap();
    eventually("it is no longer bound", || has(&all)).unwrap();

    // Two Services on one external IP: the place stays until both are gone.
    let shared = service("d", &["fd00:10:96::12", "10.96.0.13"])
        .port("other", "TCP", 81, TARGET)
        .set("spec.externalIPs", json!(["203.0.113.5"]));
    scene.apply("d", &[shared]).unwrap();
    scene.delete("c").unwrap();
    scene.delete("a").unwrap();
    assert_eq!(cluster_ips(&scene), texts(&["10.96.0.11", "10.96.0.13", "fd00:10:96::12", BARRIER]));
    has_vips(&scene, &["10.96.0.11", "10.96.0.13", "fd00:10:96::12", "203.0.113.5", BARRIER]);
    assert!(!places(&[&v4, &v6]).is_subset(&vips(&scene)), "no NodePort is left");
}

/// Q2: what went while no agent ran; and a restart with nothing changed writes nothing.
#[test]
fn q2_tables_are_adopted_and_cleared() {
    let mut scene = Scene::with(Shape { nodes: 1, pods: 1 }, &OFTEN).unwrap();
    let guarded = || {
        service("lb", &["10.96.0.20"])
            .port("http", "TCP", 80, TARGET)
            .set("spec.type", "LoadBalancer")
            .set("status.loadBalancer.ingress", json!([{"ip": "203.0.113.20"}]))
            .set("spec.loadBalancerSourceRanges", json!(["192.0.2.0/24"]))
    };
    scene.apply("lb", &[guarded()]).unwrap();
    scene.apply("a", &web(&scene, "a", &["10.96.0.10"], &[0])).unwrap();
    let before = (cluster_ips(&scene), vips(&scene), ranges(&scene));
    assert_eq!(before.2.len(), 1);
    scene.take_agent().unwrap().kill().unwrap();
    scene.start_agent().unwrap();
    thread::sleep(Duration::from_millis(300));
    assert_eq!(scene.agent().unwrap().status().unwrap()["writes"], 0);
    assert_eq!((cluster_ips(&scene), vips(&scene), ranges(&scene)), before);

    scene.take_agent().unwrap().kill().unwrap();
    scene.lab().manifests().remove("lb").unwrap();
    scene.lab().manifests().remove("a").unwrap();
    scene.start_agent().unwrap();
    assert_eq!(cluster_ips(&scene), texts(&[BARRIER]));
    has_vips(&scene, &[BARRIER]);
    eventually("the record and what it let in go", || {
        ensure!(ranges(&scene).is_empty(), "{:?}", ranges(&scene));
        Ok(())
    })
    .unwrap();
}

/// P14: the cluster IP that NodeLocal DNSCache has is left alone.
#[test]
fn p14_excluded_cluster_ips_are_left_alone() {
    let scene = Scene::with(Shape { nodes: 1, pods: 1 }, &["--exclude-frontends", "10.96.0.10"]).unwrap();
    scene.apply("a", &web(&scene, "a", &["10.96.0.10", "fd00:10:96::10"], &[0])).unwrap();
    assert_eq!(cluster_ips(&scene), texts(&["fd00:10:96::10", BARRIER]));
}

/// Record, range and bits of the 128-bit form.
fn ranges(scene: &Scene) -> BTreeSet<(u32, String, u32)> {
    let map = Map::from_map_data(open_pinned(&pins(scene).state(), "SOURCE_RANGES").unwrap()).unwrap();
    let trie: LpmTrie<MapData, SourceRange, u32> = map.try_into().unwrap();
    let read = |key: aya::maps::lpm_trie::Key<SourceRange>| {
        let range = key.data();
        (range.service, range.client.ip().to_string(), key.prefix_len() - SourceRange::SERVICE_BITS)
    };
    trie.keys().map(|key| read(key.unwrap())).collect()
}

fn record(scene: &Scene, vip: &str, port: u16, protocol: u8) -> u32 {
    let kernel = Kernel::open(&pins(scene)).unwrap().unwrap();
    let key = FrontendKey::new(ip(vip).into(), Port::new(port), protocol);
    let frontends: BTreeMap<_, _> = kernel.frontends().unwrap().into_iter().collect();
    frontends[&key].service()
}

/// F2, F4, F5: what a LoadBalancer lets in, by record.
#[test]
fn f2_f4_source_ranges_are_written_by_record() {
    let scene = Scene::new(1).unwrap();
    let node = scene.node().unwrap();
    let balancer = |ranges: Value| {
        service("lb", &["10.96.0.20", "fd00:10:96::20"])
            .port("http", "TCP", 80, TARGET)
            .port("tls", "TCP", 443, TARGET)
            .set("spec.type", "LoadBalancer")
            .set("status.loadBalancer.ingress", json!([{"ip": "203.0.113.20"}, {"ip": "2001:db8::20"}]))
            .set("spec.loadBalancerSourceRanges", ranges)
    };
    let expected = |of: &[(u32, &str, u32)]| -> BTreeSet<(u32, String, u32)> {
        of.iter().map(|(id, text, bits)| (*id, (*text).to_owned(), *bits)).collect()
    };
    scene.apply("lb", &[balancer(json!(["192.0.2.0/24", "198.51.100.7/32", "2001:db8:1::/48"]))]).unwrap();
    let (http, tls) = (record(&scene, "203.0.113.20", 80, TCP), record(&scene, "203.0.113.20", 443, TCP));
    let (http6, tls6) = (record(&scene, "2001:db8::20", 80, TCP), record(&scene, "2001:db8::20", 443, TCP));
    let mut all = Vec::new();
    for id in [http, tls] {
        all.extend([(id, "192.0.2.0", 120), (id, "198.51.100.7", 128)]);
    }
    for id in [http6, tls6] {
        all.push((id, "2001:db8:1::", 48));
    }
    assert_eq!(ranges(&scene), expected(&all));

    // F4: a range has the node's own address: the VIP itself is let in too. F5: IPv6 is open now.
    let own = format!("{}/32", node.host().v4());
    scene.apply("lb", &[balancer(json!([own]))]).unwrap();
    let v4 = node.host().v4().to_string();
    let all: Vec<_> =
        [http, tls].into_iter().flat_map(|id| [(id, v4.as_str(), 128), (id, "203.0.113.20", 128)]).collect();
    assert_eq!(ranges(&scene), expected(&all));

    // F6: open.
    scene.apply("lb", &[balancer(json!(["0.0.0.0/0"]))]).unwrap();
    assert_eq!(ranges(&scene), expected(&[]));
    scene.apply("lb", &[balancer(json!(["192.0.2.0/24"]))]).unwrap();
    assert_eq!(ranges(&scene).len(), 2);
    scene.delete("lb").unwrap();
    eventually("a record that is gone lets nobody in", || {
        ensure!(ranges(&scene).is_empty(), "{:?}", ranges(&scene));
        Ok(())
    })
    .unwrap();
}

struct Connections {
    flows: Table<FlowKey, Flow>,
    young: Table<FlowKey, Flow>,
    snat: Table<SnatKey, FlowKey>,
    young_snat: Table<SnatKey, FlowKey>,
}

impl Connections {
    fn open(scene: &Scene) -> Self {
        let pins = pins(scene);
        Self {
            flows: Table::open(&pins.state(), "FLOWS").unwrap(),
            young: Table::open(&pins.state(), "YOUNG_FLOWS").unwrap(),
            snat: Table::open(&pins.state(), "SNAT").unwrap(),
            young_snat: Table::open(&pins.state(), "YOUNG_SNAT").unwrap(),
        }
    }

    fn clients(&self) -> BTreeSet<u16> {
        let flows = [self.flows.entries().unwrap(), self.young.entries().unwrap()].concat();
        flows.iter().map(|(key, _)| key.port.number()).collect()
    }
}

fn replaced_by(table: &Table<SnatKey, FlowKey>) -> BTreeSet<u16> {
    table.entries().unwrap().iter().map(|(key, _)| key.snat_port.number()).collect()
}

fn client(port: u16, protocol: u8) -> FlowKey {
    FlowKey::new(ip("192.0.2.9").into(), Port::new(port), protocol)
}

/// A connection whose last packet was so many seconds ago.
fn flow(vip: &str, vip_port: u16, idle_s: u64, flags: u32) -> Flow {
    Flow {
        vip: ip(vip).into(),
        vip_port: Port::new(vip_port),
        backend: ip("10.244.1.11").into(),
        backend_port: Port::new(TARGET),
        used_ns: now_ns().checked_sub(idle_s * SECOND_NS).unwrap(),
        service: 9999,
        flags: flags | Flow::ANSWERED,
        ..Flow::default()
    }
}

fn with_snat(mut flow: Flow, port: u16, key: FlowKey) -> (Flow, (SnatKey, FlowKey)) {
    flow.snat = ip("172.18.0.2").into();
    flow.snat_port = Port::new(port);
    let back = flow.way_back(key.protocol);
    (flow, (back, key))
}

/// What is over or idle goes with its way back; what nobody has any more goes too; the rest stays.
#[test]
fn old_connections_go() {
    let scene = Scene::with(Shape { nodes: 1, pods: 1 }, &OFTEN).unwrap();
    let mut tables = Connections::open(&scene);
    let vip = "10.96.0.10";
    let over = Flow::CLIENT_FIN | Flow::BACKEND_FIN;
    // Younger than their limits by ten minutes or so, as the test may take its time; or older.
    let kept = [
        (client(1, TCP), flow(vip, 80, 700, 0)),
        (client(2, TCP), flow(vip, 80, 700, Flow::CLIENT_FIN)),
        (client(3, UDP), flow(vip, 53, 0, 0)),
        (client(4, TCP), flow(vip, 80, 0, over)),
        (client(5, 132), flow(vip, 80, 700, 0)),
    ];
    let gone = [
        (client(11, TCP), flow(vip, 80, 31, over)),
        (client(12, TCP), flow(vip, 80, 31, Flow::RESET)),
        (client(13, UDP), flow(vip, 53, 121, 0)),
    ];
    let mut backs = Vec::new();
    for (key, flow) in kept.iter().chain(&gone) {
        let port = 20_000 + key.port.number();
        let (flow, back) = with_snat(*flow, port, *key);
        assert!(tables.flows.put_all(&[(*key, flow)]).is_empty());
        backs.push(back);
    }
    // Of a client whose connection has another source now, and of one that has none.
    backs.push(with_snat(flow(vip, 80, 0, 0), 20_099, client(1, TCP)).1);
    backs.push(with_snat(flow(vip, 80, 0, 0), 20_098, client(98, TCP)).1);
    assert!(tables.snat.put_all(&backs).is_empty());
    let young = |idle_s, flags| Flow { flags, ..flow(vip, 80, idle_s, 0) };
    let young = [
        (client(21, UDP), flow(vip, 53, 0, 0)),
        // An open one for which there was no room.
        (client(22, TCP), young(700, Flow::HEARD | Flow::CROWDED_OUT)),
        (client(31, UDP), young(31, 0)),
        (client(32, TCP), young(121, 0)),
        (client(33, TCP), young(61, Flow::HEARD)),
        (client(34, 132), young(121, 0)),
        // What was left when it grew up.
        (client(1, TCP), young(700, Flow::HEARD)),
    ];
    let mut ways = Vec::new();
    for (key, flow) in &young {
        let (flow, way) = with_snat(*flow, 20_000 + key.port.number(), *key);
        assert!(tables.young.put_all(&[(*key, flow)]).is_empty());
        ways.push(way);
    }
    assert!(tables.young_snat.put_all(&ways).is_empty());
    eventually("old connections are gone", || {
        ensure!(tables.clients() == BTreeSet::from([1, 2, 3, 4, 5, 21, 22]), "{:?}", tables.clients());
        let replaced = BTreeSet::from([20_001, 20_002, 20_003, 20_004, 20_005]);
        ensure!(replaced_by(&tables.snat) == replaced, "{:?}", replaced_by(&tables.snat));
        let young = BTreeSet::from([20_001, 20_021, 20_022]);
        ensure!(replaced_by(&tables.young_snat) == young, "{:?}", replaced_by(&tables.young_snat));
        Ok(())
    })
    .unwrap();

    let node = scene.node().unwrap();
    let output = sheave(node, &["get", "flows", "-o", "json"]).unwrap();
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let row = |port: u16| {
        let client = format!("192.0.2.9:{port}");
        rows.iter().find(|row| row["client"] == json!(client)).unwrap()
    };
    assert_eq!(rows.len(), 7);
    let first = row(1);
    assert_eq!(
        (&first["protocol"], &first["vip"], &first["state"]),
        (&json!("TCP"), &json!("10.96.0.10:80"), &json!("answered"))
    );
    assert_eq!(
        (&first["backend"], &first["snat"]),
        (&json!(format!("10.244.1.11:{TARGET}")), &json!("172.18.0.2:20001"))
    );
    assert!(first["idle_seconds"].as_u64().unwrap() >= 700);
    assert_eq!((&row(4)["state"], &row(22)["state"]), (&json!("closing"), &json!("answered")));
    let text = String::from_utf8(sheave(node, &["get", "flows"]).unwrap().stdout).unwrap();
    assert!(text.starts_with("CLIENT") && text.contains("192.0.2.9:5"), "{text}");
    let status = scene.agent().unwrap().status().unwrap();
    assert_eq!((&status["flows"]["flows"], &status["flows"]["young_flows"]), (&json!(5), &json!(3)));
}

/// C2, C3, C4, C7: datagram flows leave a VIP's former owner when the new one serves, and nothing else does.
#[test]
fn c2_c3_datagram_flows_of_a_former_owner_go_when_the_new_one_serves() {
    let scene = Scene::with(Shape { nodes: 1, pods: 1 }, &OFTEN).unwrap();
    let mut tables = Connections::open(&scene);
    let vip = "10.96.0.30";
    let flows = [
        (client(1, UDP), flow(vip, 53, 0, 0)),
        (client(2, TCP), flow(vip, 53, 0, 0)),
        (client(3, UDP), flow(vip, 54, 0, 0)),
        (client(4, UDP), flow("10.96.0.31", 53, 0, 0)),
    ];
    let (replaced, back) = with_snat(flows[0].1, 20_001, flows[0].0);
    assert!(tables.flows.put_all(&flows).is_empty());
    assert!(tables.flows.put_all(&[(flows[0].0, replaced)]).is_empty());
    assert!(tables.snat.put_all(&[back]).is_empty());
    assert!(tables.young.put_all(&[(client(5, UDP), flow(vip, 53, 0, 0))]).is_empty());
    let all = BTreeSet::from([1, 2, 3, 4, 5]);

    // C3: the new owner cannot serve yet.
    scene.apply("dns", &web(&scene, "dns", &[vip], &[])).unwrap();
    thread::sleep(Duration::from_millis(300));
    assert_eq!(tables.clients(), all);
    scene.apply("dns", &web(&scene, "dns", &[vip], &[0])).unwrap();
    eventually("flows of nobody's go", || {
        ensure!(tables.clients() == BTreeSet::from([2, 3, 4]), "{:?}", tables.clients());
        ensure!(replaced_by(&tables.snat).is_empty());
        Ok(())
    })
    .unwrap();

    // Its own stay, also when it changes or goes (C7).
    let own = Flow { service: record(&scene, vip, 53, UDP), ..flow(vip, 53, 0, 0) };
    assert!(tables.flows.put_all(&[(client(6, UDP), own)]).is_empty());
    scene.apply("dns", &web(&scene, "dns", &[vip, "fd00:10:96::30"], &[0])).unwrap();
    scene.delete("dns").unwrap();
    thread::sleep(Duration::from_millis(300));
    assert_eq!(tables.clients(), BTreeSet::from([2, 3, 4, 6]));
}

/// Z8: connections to a Service that is gone still find the VIP in the filter; the last one takes it along.
#[test]
fn z8_the_filter_keeps_a_vip_while_connections_have_it() {
    let scene = Scene::with(Shape { nodes: 1, pods: 1 }, &OFTEN).unwrap();
    let mut tables = Connections::open(&scene);
    scene.apply("a", &web(&scene, "a", &["10.96.0.10"], &[0])).unwrap();
    scene.apply("b", &web(&scene, "b", &["10.96.0.11"], &[0])).unwrap();
    assert!(tables.flows.put_all(&[(client(1, TCP), flow("10.96.0.10", 80, 0, 0))]).is_empty());
    scene.delete("a").unwrap();
    scene.delete("b").unwrap();
    has_vips(&scene, &["10.96.0.10", BARRIER]);
    // Many walks later still.
    thread::sleep(Duration::from_millis(500));
    has_vips(&scene, &["10.96.0.10", BARRIER]);
    tables.flows.remove(&client(1, TCP)).unwrap();
    has_vips(&scene, &[BARRIER]);
    // And it comes back with a Service.
    scene.apply("a", &web(&scene, "a", &["10.96.0.10"], &[0])).unwrap();
    assert_eq!(vips(&scene), places(&["10.96.0.10", BARRIER]));
}

/// A table of bytes, as a program writes it.
fn filter<const N: usize>(scene: &Scene, name: &'static str) -> Mapping<[u8; N]> {
    Mapping::new(open_pinned(&pins(scene).state(), name).unwrap().fd(), 1, true).unwrap()
}

/// What bystanders pay for does not grow with the connections that there ever were; those that there are stay known.
#[test]
fn filters_forget_connections_that_are_gone() {
    let scene = Scene::with(Shape { nodes: 1, pods: 1 }, &OFTEN).unwrap();
    let mut tables = Connections::open(&scene);
    let mut flow_filter: Mapping<[u8; FLOW_PLACES]> = filter(&scene, "FLOW_FILTER");
    let mut snat_ports: Mapping<[u8; SNAT_PLACES]> = filter(&scene, "SNAT_PORTS");
    let (grown, young) = (client(1, TCP), client(2, TCP));
    let (flow, back) = with_snat(flow("10.96.0.10", 80, 0, 0), 20_001, grown);
    assert!(tables.flows.put_all(&[(grown, flow)]).is_empty());
    assert!(tables.snat.put_all(&[back]).is_empty());
    assert!(tables.young.put_all(&[(young, Flow { snat_port: Port::default(), ..flow })]).is_empty());
    // As if there had been very many.
    for place in 0..FLOW_PLACES {
        flow_filter.store(place, FRESH).unwrap();
    }
    for place in 0..SNAT_PLACES {
        snat_ports.store(place, FRESH).unwrap();
    }
    let places = |keys: &[FlowKey]| -> BTreeSet<usize> {
        keys.iter().map(|key| flow_place(&key.client, key.port)).collect()
    };
    let port = BTreeSet::from([snat_place(Port::new(20_001))]);
    let eventually_set = |keys: &[FlowKey], ports: &BTreeSet<usize>| {
        eventually("the filters have what there is", || {
            let flows: BTreeSet<usize> = (0..FLOW_PLACES).filter(|n| flow_filter.load(*n) != 0).collect();
            let snat: BTreeSet<usize> = (0..SNAT_PLACES).filter(|n| snat_ports.load(*n) != 0).collect();
            ensure!(flows == places(keys), "{} places of flows", flows.len());
            ensure!(snat == *ports, "{} ports", snat.len());
            Ok(())
        })
        .unwrap();
    };
    eventually_set(&[grown, young], &port);
    // Many walks later still.
    thread::sleep(Duration::from_millis(500));
    eventually_set(&[grown, young], &port);
    tables.young.remove(&young).unwrap();
    eventually_set(&[grown], &port);
    tables.flows.remove(&grown).unwrap();
    eventually_set(&[], &BTreeSet::new());
}
