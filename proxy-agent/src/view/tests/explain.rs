use serde_json::{Value, json};

use super::*;
use crate::object::{PerFamily, Protocol, ServicePort};
use crate::resolve::{DetectLocal, ExcludedFrontend};
use crate::view::explain::{DestinationError, ExplainError, explain};
use crate::view::{Destination, Explanation};

const NODE: &str = "192.0.2.1";
const POD: &str = "10.244.1.9";
const OUTSIDE: &str = "198.51.100.7";
const CLUSTER_IP: &str = "10.96.0.7:80/TCP";
const LOAD_BALANCER: &str = "203.0.113.2:80/TCP";
const EXTERNAL: [&str; 3] = ["192.0.2.1:30080/TCP", "203.0.113.1:80/TCP", LOAD_BALANCER];

fn ask(model: &Model, from: &str, to: &str) -> Explanation {
    explain(model, ip(from), to.parse().unwrap()).unwrap()
}

/// Verdict, path.
fn short(model: &Model, from: &str, to: &str) -> String {
    let value = serde_json::to_value(ask(model, from, to)).unwrap();
    let text = |field: &str| value[field].as_str().unwrap().to_owned();
    format!("{}, {}", text("verdict"), text("path"))
}

/// Every kind of frontend.
fn full() -> Service {
    Service {
        ports: vec![node_port("http", 80, 30080)],
        external_ips: ips(&["203.0.113.1"]),
        load_balancer_ips: ips(&["203.0.113.2"]),
        ..service("svc")
    }
}

/// One endpoint here, one elsewhere.
fn spread() -> Slice {
    let endpoints = vec![on("n1", endpoint("10.244.1.5")), on("n2", endpoint("10.244.2.5"))];
    Slice { ports: [slice_port("http", 9376)].into(), ..slice("s", "svc", endpoints) }
}

fn elsewhere() -> Slice {
    Slice {
        ports: [slice_port("http", 9376)].into(),
        ..slice("s", "svc", vec![on("n2", endpoint("10.244.2.5"))])
    }
}

#[test]
fn the_document_of_cli_json() {
    let model = model_of(full(), vec![spread()]);
    let document = serde_json::to_value(ask(&model, POD, CLUSTER_IP)).unwrap();
    let expected = json!({
        "verdict": "forward", "service": "ns/svc:http/TCP",
        "frontend": {"address": "10.96.0.7", "port": 80, "protocol": "TCP", "kind": "ClusterIP"},
        "set": "cluster", "endpoints": ["10.244.1.5:9376", "10.244.2.5:9376"],
        "snat": false, "snat_endpoints": [], "origin": "pod", "path": "socket",
        "reason": "ClusterIP of ns/svc:http/TCP: a pod of this node is served from the cluster set, as \
                   internalTrafficPolicy is Cluster (P10); a packet keeps its source (M2); \
                   translated once, when the socket connects or sends"
    });
    assert_eq!(document, expected);
    let untouched = serde_json::to_value(ask(&model, POD, "8.8.8.8:53/UDP")).unwrap();
    let expected = json!({
        "verdict": "untouched", "service": null, "frontend": null, "set": null, "endpoints": [],
        "snat": false, "snat_endpoints": [], "origin": "pod", "path": "socket",
        "reason": "8.8.8.8:53/UDP is no Service's address and port; the socket hooks let it pass"
    });
    assert_eq!(untouched, expected);
}

#[test]
fn p10_p11_who_is_served_from_which_set() {
    for (internal_local, external_local) in [(false, false), (false, true), (true, false), (true, true)] {
        let model = model_of(Service { internal_local, external_local, ..full() }, vec![spread()]);
        for from in [POD, NODE, OUTSIDE] {
            let set = |to: &str| ask(&model, from, to).set.unwrap();
            assert_eq!(set(CLUSTER_IP), if internal_local { "local" } else { "cluster" });
            for to in EXTERNAL {
                let local = external_local && from == OUTSIDE;
                assert_eq!(set(to), if local { "local" } else { "cluster" }, "{from} {to}");
            }
        }
    }
}

#[test]
fn p11_without_detection_pods_are_outside_clients() {
    let mut node = node();
    node.pod_cidrs.clear();
    let mut model = model_of(Service { external_local: true, ..full() }, vec![spread()]);
    model.apply(crate::object::Change::Node(crate::object::Delta::Apply(Ok(node.into()))));
    let answer = ask(&model, POD, LOAD_BALANCER);
    assert_eq!((answer.origin, answer.set), ("external", Some("local")));
    assert_eq!(ask(&model, NODE, LOAD_BALANCER).set, Some("cluster"));
    // M2: no detection, no SNAT.
    assert!(!ask(&model, OUTSIDE, CLUSTER_IP).snat);
}

#[test]
fn m1_interface_modes_say_that_an_address_cannot_tell_a_pod() {
    let policy =
        Policy { detect_local: DetectLocal::InterfaceNamePrefix("veth".into()), ..Policy::default() };
    let model = model_with(policy, vec![full()], vec![spread()]);
    let answer = ask(&model, POD, CLUSTER_IP);
    assert_eq!(answer.origin, "external");
    assert!(answer.reason.contains("told by its interface"), "{}", answer.reason);
}

#[test]
fn x3_a_pod_that_dials_an_lb_or_external_ip_is_served_here() {
    let model = model_of(full(), vec![spread()]);
    for to in EXTERNAL {
        assert_eq!(short(&model, POD, to), "forward, socket");
    }
}

#[test]
fn z1_nothing_anywhere_is_refused() {
    for (internal_local, external_local) in [(false, false), (true, true)] {
        let model = model_of(Service { internal_local, external_local, ..full() }, Vec::new());
        for to in EXTERNAL.into_iter().chain([CLUSTER_IP]) {
            assert_eq!(short(&model, POD, to), "reject, socket");
            assert_eq!(short(&model, NODE, to), "reject, socket");
            assert_eq!(short(&model, OUTSIDE, to), "reject, packet");
            let answer = ask(&model, POD, to);
            assert!(answer.reason.contains("(Z1)"), "{}", answer.reason);
            assert!(answer.service.is_some() && answer.frontend.is_some() && answer.set.is_some());
        }
    }
}

#[test]
fn z2_z3_policy_without_local_endpoints_drops() {
    let model = model_of(Service { internal_local: true, ..full() }, vec![elsewhere()]);
    for from in [POD, NODE, OUTSIDE] {
        assert_eq!(short(&model, from, CLUSTER_IP), "drop, packet");
        assert!(ask(&model, from, CLUSTER_IP).reason.contains("(Z2)"));
        for to in EXTERNAL {
            assert!(short(&model, from, to).starts_with("forward"));
        }
    }
    let model = model_of(Service { external_local: true, ..full() }, vec![elsewhere()]);
    for to in EXTERNAL {
        assert_eq!(short(&model, OUTSIDE, to), "drop, packet");
        assert!(ask(&model, OUTSIDE, to).reason.contains("(Z3)"));
        assert_eq!(short(&model, POD, to), "forward, socket");
        assert_eq!(short(&model, NODE, to), "forward, socket");
    }
    assert!(short(&model, OUTSIDE, CLUSTER_IP).starts_with("forward"));
}

#[test]
fn z_reasons_name_the_first_endpoints() {
    let endpoints = (1..=5).map(|i| unready(i % 2 == 0, endpoint(&format!("10.244.2.{i}")))).collect();
    let model = model_of(service("svc"), vec![slice("s", "svc", endpoints)]);
    assert_eq!(
        ask(&model, POD, CLUSTER_IP).reason,
        "no endpoint of ns/svc:/TCP can serve anywhere (Z1); 10.244.2.1:9376 not used: not ready (P5); \
         10.244.2.2:9376 not used: serving but not ready (P5); 10.244.2.3:9376 not used: not ready (P5); \
         and 2 more; connect() fails with ECONNREFUSED (Z4)"
    );
}

#[test]
fn z6_cluster_ips_and_the_service_range() {
    let policy = Policy { service_cidrs: vec![net("10.96.0.0/16")], ..Policy::default() };
    let model = model_with(policy.clone(), vec![full()], vec![spread()]);
    for from in [POD, NODE, OUTSIDE] {
        for to in ["10.96.0.7:81/TCP", "10.96.0.7:80/UDP", "10.96.0.7:80/SCTP"] {
            let answer = ask(&model, from, to);
            assert_eq!(short(&model, from, to), "reject, packet");
            assert_eq!((answer.service, answer.frontend, answer.set), (None, None, None));
        }
        assert_eq!(short(&model, from, "10.96.9.9:80/TCP"), "drop, packet");
    }
    // X4: only cluster IPs, not other addresses of a Service.
    assert_eq!(short(&model, POD, "203.0.113.1:81/TCP"), "untouched, socket");
    // Without a known range there is nothing to drop.
    let model = model_of(full(), vec![spread()]);
    assert_eq!(short(&model, POD, "10.96.9.9:80/TCP"), "untouched, socket");
    // Bound on this node: what comes in is delivered, what the node itself sends is not.
    let mut model = model_with(policy, vec![full()], vec![spread()]);
    model.apply(crate::object::Change::OwnAddresses(ips(&[NODE, "10.96.0.7", "10.96.9.9"])));
    assert_eq!(short(&model, POD, "10.96.0.7:81/TCP"), "untouched, socket");
    assert_eq!(short(&model, OUTSIDE, "10.96.9.9:81/TCP"), "untouched, packet");
    assert_eq!(short(&model, NODE, "10.96.0.7:81/TCP"), "reject, packet");
}

#[test]
fn n1_n10_other_addresses_nodeports_are_left_alone() {
    let model = model_of(full(), vec![spread()]);
    let answer = ask(&model, POD, "192.0.2.2:30080/TCP");
    assert_eq!(short(&model, POD, "192.0.2.2:30080/TCP"), "untouched, socket");
    assert!(answer.reason.contains("(N1)"), "{}", answer.reason);
    // Another node's.
    assert_eq!(short(&model, POD, "192.0.2.200:30080/TCP"), "untouched, socket");
    assert_eq!(short(&model, NODE, "127.0.0.1:30080/TCP"), "untouched, socket");
}

#[test]
fn p14_the_list_of_frontends_to_leave_alone() {
    let policy = Policy {
        excluded_frontends: vec![ExcludedFrontend { address: ip("10.96.0.7"), port: None }],
        ..Policy::default()
    };
    let model = model_with(policy, vec![full()], vec![spread()]);
    for to in [CLUSTER_IP, "10.96.0.7:81/TCP"] {
        let answer = ask(&model, POD, to);
        assert_eq!(short(&model, POD, to), "untouched, socket");
        assert!(answer.reason.contains("(P14)"), "{}", answer.reason);
    }
}

#[test]
fn f1_f2_f3_source_ranges_guard_the_lb_ip_before_all_else() {
    let guarded = Service { source_ranges: vec![net("198.51.100.0/24")], ..full() };
    for slices in [vec![spread()], Vec::new()] {
        let served = if slices.is_empty() { "reject" } else { "forward" };
        let model = model_of(guarded.clone(), slices);
        assert_eq!(short(&model, OUTSIDE, LOAD_BALANCER), format!("{served}, packet"));
        for from in [POD, NODE, "203.0.113.99"] {
            assert_eq!(short(&model, from, LOAD_BALANCER), "drop, packet");
            assert!(ask(&model, from, LOAD_BALANCER).reason.contains("(F2)"));
        }
        for to in [CLUSTER_IP, EXTERNAL[0], EXTERNAL[1]] {
            assert_eq!(short(&model, POD, to), format!("{served}, socket"));
        }
    }
    let model = model_of(Service { source_ranges: vec![net("10.244.1.0/24")], ..full() }, vec![spread()]);
    assert_eq!(short(&model, POD, LOAD_BALANCER), "forward, packet");
    assert!(
        ask(&model, POD, LOAD_BALANCER)
            .reason
            .ends_with("left to the packet path, because source ranges need the client's address (F3)")
    );
}

#[test]
fn f4_the_vip_itself_as_source() {
    for (range, verdict) in [("192.0.2.1/32", "forward, packet"), ("198.51.100.0/24", "drop, packet")] {
        let model = model_of(Service { source_ranges: vec![net(range)], ..full() }, vec![spread()]);
        assert_eq!(short(&model, "203.0.113.2", LOAD_BALANCER), verdict);
    }
}

/// Which endpoints would see a replaced source: `all`, `none`, or the list.
fn snat(model: &Model, from: &str, to: &str) -> String {
    let answer = ask(model, from, to);
    assert_eq!(answer.snat, !answer.snat_endpoints.is_empty());
    match &answer.snat_endpoints[..] {
        [] => "none".to_owned(),
        list if *list == answer.endpoints[..] => "all".to_owned(),
        list => list.join(" "),
    }
}

#[test]
fn m2_m3_m4_m9_whose_source_is_replaced() {
    let by_origin = |model: &Model, to: &str| [NODE, POD, OUTSIDE].map(|from| snat(model, from, to));
    let model = model_of(full(), vec![spread()]);
    // M9: a pod is seen with its own address, across nodes too.
    assert_eq!(by_origin(&model, CLUSTER_IP), ["all", "none", "all"]);
    for to in EXTERNAL {
        assert_eq!(by_origin(&model, to), ["all", "all", "all"]);
    }
    let model = model_of(Service { external_local: true, ..full() }, vec![spread()]);
    for to in EXTERNAL {
        assert_eq!(by_origin(&model, to), ["all", "none", "none"]);
    }
    let policy = Policy { masquerade_all: true, ..Policy::default() };
    let model = model_with(policy, vec![Service { external_local: true, ..full() }], vec![spread()]);
    assert_eq!(by_origin(&model, CLUSTER_IP), ["all", "all", "all"]);
    // And nothing else.
    assert_eq!(by_origin(&model, LOAD_BALANCER), ["all", "none", "none"]);
}

#[test]
fn m5_m10_depend_on_the_endpoint() {
    let endpoints = vec![endpoint("10.244.1.9"), endpoint("10.244.2.5"), endpoint("192.0.2.1")];
    let slices = vec![Slice { ports: [slice_port("http", 1)].into(), ..slice("s", "svc", endpoints) }];
    let model = model_of(full(), slices);
    // M5: the pod may be sent to itself.
    assert_eq!(snat(&model, POD, CLUSTER_IP), "10.244.1.9:1");
    assert!(ask(&model, POD, CLUSTER_IP).reason.contains("replaced for 1 of 3 endpoints (M2, M5, M10)"));
    // M10: the endpoint on the node's own address sees the client, even with eTP Cluster.
    assert_eq!(snat(&model, OUTSIDE, LOAD_BALANCER), "10.244.1.9:1 10.244.2.5:1");
    assert_eq!(snat(&model, NODE, LOAD_BALANCER), "all");
}

#[test]
fn m6_internal_policy_and_hints_do_not_change_snat() {
    let plain = model_of(full(), vec![spread()]);
    let local = model_of(Service { internal_local: true, ..full() }, vec![spread()]);
    let mut hinted = spread();
    let endpoints = hinted.endpoints.iter().cloned().zip(["a", "b"]);
    hinted.endpoints = endpoints.map(|(endpoint, zone)| hinted_zones(&[zone], endpoint)).collect();
    let hinted = model_of(full(), vec![hinted]);
    assert_eq!(ask(&hinted, POD, CLUSTER_IP).endpoints.len(), 1);
    for from in [NODE, POD, OUTSIDE] {
        for to in EXTERNAL.into_iter().chain([CLUSTER_IP]) {
            assert_eq!(snat(&plain, from, to), snat(&local, from, to));
            assert_eq!(snat(&plain, from, to), snat(&hinted, from, to));
        }
    }
}

#[test]
fn origin_by_address() {
    let model = model_of(full(), vec![spread()]);
    let origin = |from: &str| ask(&model, from, CLUSTER_IP).origin;
    // A second own address and loopback are the node too; another node's pod is not ours by podCIDR.
    let expected = [("192.0.2.2", "node"), ("127.0.0.1", "node"), (POD, "pod"), ("10.244.2.9", "external")];
    for (from, name) in expected {
        assert_eq!(origin(from), name, "{from}");
    }
    // B1: a mapped address is the IPv4 one.
    assert_eq!(origin("::ffff:10.244.1.9"), "pod");
}

#[test]
fn paths_that_the_socket_hooks_leave_alone() {
    let mut service = full();
    service.ports = vec![
        ServicePort { protocol: Protocol::Udp, ..port("dns", 53) },
        ServicePort { protocol: Protocol::Sctp, ..port("sctp", 99) },
    ];
    let empty = model_of(service.clone(), Vec::new());
    // B13.
    assert_eq!(short(&empty, POD, "10.96.0.7:53/UDP"), "reject, packet");
    let dns = Slice {
        ports: [
            crate::object::SlicePort { protocol: Protocol::Udp, ..slice_port("dns", 53) },
            crate::object::SlicePort { protocol: Protocol::Sctp, ..slice_port("sctp", 99) },
        ]
        .into(),
        ..elsewhere()
    };
    let model = model_of(service, vec![dns]);
    assert_eq!(short(&model, POD, "10.96.0.7:53/UDP"), "forward, socket");
    // T2.
    assert_eq!(short(&model, POD, "10.96.0.7:99/SCTP"), "forward, packet");
    assert_eq!(short(&model, OUTSIDE, "10.96.0.7:53/UDP"), "forward, packet");
}

/// The verdict is the rules' all the same.
#[test]
fn without_the_packet_path_nothing_serves_what_is_left_to_it() {
    let policy = Policy { no_packet_path: true, ..Policy::default() };
    let model = model_with(policy, vec![full()], vec![spread()]);
    assert_eq!(short(&model, OUTSIDE, CLUSTER_IP), "forward, none yet");
    assert_eq!(short(&model, POD, CLUSTER_IP), "forward, socket");
    assert!(ask(&model, OUTSIDE, CLUSTER_IP).reason.contains("which is switched off, because no socket"));
}

#[test]
fn s12_the_winner_is_explained() {
    let mut thief = Service { external_ips: ips(&["10.96.0.7"]), created_s: Some(1), ..service("a-thief") };
    thief.cluster_ip.v4 = Some(ip("10.96.0.8"));
    let model = model_with(Policy::default(), vec![thief, full()], vec![spread()]);
    assert_eq!(ask(&model, POD, CLUSTER_IP).service.unwrap(), "ns/svc:http/TCP");
}

#[test]
fn s4_the_other_family_and_mixed_questions() {
    let service = Service { cluster_ip: PerFamily { v4: None, v6: Some(ip("fd00:96::7")) }, ..full() };
    let model = model_of(service, Vec::new());
    let answer = ask(&model, "fd00:244:1::9", "[fd00:96::7]:80/tcp");
    assert_eq!(
        (answer.origin, short(&model, "fd00:244:1::9", "[fd00:96::7]:80/tcp")),
        ("pod", "reject, socket".into())
    );
    assert_eq!(answer.frontend.unwrap().address, "fd00:96::7");
    let mixed = explain(&model, ip(POD), "[fd00:96::7]:80/TCP".parse().unwrap());
    assert!(matches!(mixed, Err(ExplainError::Families { .. })));
}

#[test]
fn destinations() {
    let parse = |text: &str| text.parse::<Destination>();
    assert_eq!(
        parse("[::ffff:10.96.0.7]:80/udp"),
        Ok(Destination { at: at("10.96.0.7:80"), protocol: Protocol::Udp })
    );
    for text in ["", "10.96.0.7", "10.96.0.7:80", "10.96.0.7:0/TCP", "10.96.0.7:65536/TCP", "fd00::7/TCP"] {
        assert!(matches!(parse(text), Err(DestinationError::Form(_))), "{text}");
    }
    assert_eq!(parse("10.96.0.7:80/ICMP"), Err(DestinationError::Protocol("ICMP".into())));
}

#[test]
fn text_for_people() {
    let model = model_of(Service { external_local: true, ..full() }, vec![spread()]);
    let expected = "\
verdict   forward
service   ns/svc:http/TCP
kind      LoadBalancer
origin    external
set       local
path      packet
why       LoadBalancer of ns/svc:http/TCP: a client elsewhere is served from the local set, as externalTrafficPolicy is Local (P10)
          a packet keeps its source (M4)
          left to the packet path, because no socket of this node makes the packets (B6)

ENDPOINT         SOURCE OF PACKETS
10.244.1.5:9376  kept
";
    assert_eq!(ask(&model, OUTSIDE, LOAD_BALANCER).to_string(), expected);
}

/// Every answer keeps the shape of the interface.
#[test]
fn every_answer_has_every_field() {
    let policy = Policy { service_cidrs: vec![net("10.96.0.0/16")], ..Policy::default() };
    let guarded = Service { source_ranges: vec![net("10.0.0.0/8")], external_local: true, ..full() };
    let model = model_with(policy, vec![guarded], vec![elsewhere()]);
    for from in [NODE, POD, OUTSIDE] {
        for to in
            EXTERNAL.into_iter().chain([CLUSTER_IP, "10.96.0.7:81/TCP", "10.96.9.9:1/UDP", "8.8.8.8:1/SCTP"])
        {
            let Value::Object(answer) = serde_json::to_value(ask(&model, from, to)).unwrap() else {
                unreachable!()
            };
            let mut fields: Vec<&str> = answer.keys().map(String::as_str).collect();
            fields.sort_unstable();
            assert_eq!(
                fields,
                [
                    "endpoints",
                    "frontend",
                    "origin",
                    "path",
                    "reason",
                    "service",
                    "set",
                    "snat",
                    "snat_endpoints",
                    "verdict"
                ]
            );
            assert!(!answer["reason"].as_str().unwrap().is_empty());
        }
    }
}
