//! Rules E and P, one by one.

use super::build::*;
use crate::object::{Family, PerFamily, Protocol, Service, ServicePort, Slice, SliceEndpoint, SlicePort};
use crate::resolve::{Context, Resolved};

fn all_of(service: &Service, slices: &[Slice]) -> Vec<Resolved> {
    let (resolved, problems) = resolve_in(&context(), service, slices);
    assert_eq!(problems, []);
    resolved
}

fn cluster(resolved: &Resolved) -> Vec<String> {
    resolved.cluster_set.as_ref().unwrap().iter().map(ToString::to_string).collect()
}

fn local(resolved: &Resolved) -> Vec<String> {
    resolved.local_set.as_ref().unwrap().iter().map(ToString::to_string).collect()
}

fn reasons(resolved: &Resolved) -> Vec<&str> {
    resolved.endpoints.iter().map(|view| view.reason.as_str()).collect()
}

#[test]
fn e1_other_address_types_are_ignored() {
    let v6 = Slice { family: Some(Family::V6), ..slice("six", "svc", vec![endpoint("fd00:244:2::1")]) };
    let fqdn = Slice { family: None, ..slice("fqdn", "svc", vec![endpoint("10.244.2.9")]) };
    let v4 = slice("four", "svc", vec![endpoint("10.244.2.1")]);
    assert_eq!(cluster(&resolve_one(&service("svc"), &[v6.clone(), fqdn, v4.clone()])), ["10.244.2.1:9376"]);
    let dual = Service {
        cluster_ip: PerFamily { v4: Some(ip("10.96.0.7")), v6: Some(ip("fd00:96::7")) },
        ..service("svc")
    };
    let resolved = all_of(&dual, &[v6, v4]);
    assert_eq!(resolved.iter().map(|r| r.key.family).collect::<Vec<_>>(), [Family::V4, Family::V6]);
    assert_eq!(cluster(&resolved[1]), ["[fd00:244:2::1]:9376"]);
}

#[test]
fn e2_a_slice_belongs_to_its_label_in_its_namespace() {
    let other_namespace = {
        let mut slice = slice("s", "svc", vec![endpoint("10.244.2.1")]);
        slice.key.namespace = "other".into();
        slice
    };
    let other_service = slice("t", "other", vec![endpoint("10.244.2.2")]);
    let unlabelled = Slice { service: None, ..slice("u", "svc", vec![endpoint("10.244.2.3")]) };
    let resolved = resolve_one(&service("svc"), &[other_namespace, other_service, unlabelled]);
    assert_eq!(resolved.endpoints, []);
}

#[test]
fn e4_name_and_protocol_must_match() {
    let service = Service {
        ports: [port("", 80), port("dns", 53), ServicePort { protocol: Protocol::Udp, ..port("dns", 53) }]
            .into(),
        ..service("svc")
    };
    let with = |name: &str, protocol, number, address: &str| Slice {
        ports: [SlicePort { protocol, ..slice_port(name, number) }].into(),
        ..slice(address, "svc", vec![endpoint(address)])
    };
    let slices = [
        with("", Protocol::Tcp, 1, "10.244.2.1"),
        with("dns", Protocol::Tcp, 2, "10.244.2.2"),
        with("dns", Protocol::Udp, 3, "10.244.2.3"),
        with("dns", Protocol::Udp, 3, "10.244.2.4"),
        with("DNS", Protocol::Udp, 4, "10.244.2.5"),
        Slice { ports: [].into(), ..slice("none", "svc", vec![endpoint("10.244.2.6")]) },
    ];
    let resolved = all_of(&service, &slices);
    assert_eq!(cluster(&resolved[0]), ["10.244.2.1:1"]);
    assert_eq!(cluster(&resolved[1]), ["10.244.2.2:2"]);
    assert_eq!(cluster(&resolved[2]), ["10.244.2.3:3", "10.244.2.4:3"]);
}

#[test]
fn e5_every_endpoint_keeps_its_port_number() {
    let one = slice("a", "svc", vec![endpoint("10.244.2.1")]);
    let two =
        Slice { ports: [slice_port("", 8080)].into(), ..slice("b", "svc", vec![endpoint("10.244.2.2")]) };
    let resolved = resolve_one(&service("svc"), &[two, one]);
    assert_eq!(cluster(&resolved), ["10.244.2.1:9376", "10.244.2.2:8080"]);
}

#[test]
fn e6_an_address_of_the_other_family_is_ignored_and_named() {
    let wrong = slice("s", "svc", vec![endpoint("10.244.2.1"), endpoint("fd00:244:2::1")]);
    let (resolved, problems) = resolve_in(&context(), &service("svc"), &[wrong]);
    assert_eq!(cluster(&resolved[0]), ["10.244.2.1:9376"]);
    assert_eq!(problems.len(), 1);
    assert_eq!(
        (problems[0].object.as_str(), problems[0].field.as_str()),
        ("EndpointSlice ns/s", "endpoints[1].addresses[0]")
    );
}

#[test]
fn e8_local_is_the_node_name_byte_for_byte() {
    let endpoints = vec![
        on("n1", endpoint("10.244.2.1")),
        on("N1", endpoint("10.244.2.2")),
        on("n2", endpoint("10.244.1.3")),
        endpoint("192.0.2.1"),
    ];
    let service = Service { internal_local: true, ..service("svc") };
    let slices = [slice("s", "svc", endpoints)];
    assert_eq!(local(&resolve_one(&service, &slices)), ["10.244.2.1:9376"]);
    // Without a node name nothing is local.
    let nameless = Context { node_name: String::new(), ..context() };
    let with_empty_name = [slice("s", "svc", vec![on("", endpoint("10.244.2.1"))])];
    let (resolved, _) = resolve_in(&nameless, &service, &with_empty_name);
    assert_eq!(local(&resolved[0]), [""; 0]);
}

#[test]
fn e9_duplicates() {
    type Change = fn(SliceEndpoint) -> SliceEndpoint;
    let ready: Change = |e| e;
    let unready_: Change = |e| unready(false, e);
    let serving: Change = |e| unready(true, e);
    let leaving: Change = |e| terminating(true, e);
    let gone: Change = |e| terminating(false, e);
    let published: Change = |e| SliceEndpoint { terminating: true, ..e };
    // (one, other, the one that stays), in whatever slice and order.
    let table: [(Change, Change, &str); 7] = [
        (ready, leaving, "one"),
        // Even when only the terminating one serves.
        (unready_, leaving, "one"),
        // `ready` does not help a terminating one.
        (unready_, published, "one"),
        (ready, serving, "one"),
        (serving, unready_, "one"),
        (leaving, gone, "one"),
        // Two alike: lowest slice name.
        (ready, ready, "a"),
    ];
    for (row, (one, other, stays)) in table.into_iter().enumerate() {
        let one = on("one", one(endpoint("10.244.2.1")));
        let other = on("other", other(endpoint("10.244.2.1")));
        for swapped in [false, true] {
            let (a, b) = if swapped { (&other, &one) } else { (&one, &other) };
            let expected = match stays {
                "a" => a.node.clone(),
                name => Some(name.into()),
            };
            let apart = [slice("a", "svc", vec![a.clone()]), slice("b", "svc", vec![b.clone()])];
            let views = resolve_one(&service("svc"), &apart).endpoints;
            assert_eq!(views.len(), 1, "row {row}");
            assert_eq!(views[0].node, expected, "row {row}, swapped {swapped}");
            if stays != "a" {
                let together = [slice("a", "svc", vec![a.clone(), b.clone()])];
                assert_eq!(resolve_one(&service("svc"), &together).endpoints, views, "row {row}");
            }
        }
    }
}

#[test]
fn e9_same_address_other_port_is_no_duplicate() {
    let slices = [
        slice("a", "svc", vec![endpoint("10.244.2.1")]),
        Slice { ports: [slice_port("", 1)].into(), ..slice("b", "svc", vec![endpoint("10.244.2.1")]) },
    ];
    assert_eq!(cluster(&resolve_one(&service("svc"), &slices)), ["10.244.2.1:1", "10.244.2.1:9376"]);
}

#[test]
fn e10_order_does_not_matter() {
    let mut endpoints: Vec<SliceEndpoint> = (1..=20)
        .map(|i| {
            let base = on(if i % 3 == 0 { "n1" } else { "n2" }, endpoint(&format!("10.244.2.{}", i % 13)));
            let base = hinted_zones(if i % 2 == 0 { &["a"] } else { &["b"] }, base);
            if i % 5 == 0 { terminating(true, base) } else { base }
        })
        .collect();
    let of = |endpoints: &[SliceEndpoint]| {
        let slices = [slice("a", "svc", endpoints[..7].to_vec()), slice("b", "svc", endpoints[7..].to_vec())];
        let mut reversed = slices.clone();
        reversed.reverse();
        let one = resolve_one(&service("svc"), &slices);
        assert_eq!(resolve_one(&service("svc"), &reversed), one);
        one
    };
    let first = of(&endpoints);
    assert!(first.endpoints.is_sorted_by_key(|view| (view.address, view.port)));
    assert!(first.cluster_set.as_ref().unwrap().is_sorted());
    endpoints[..7].reverse();
    endpoints[7..].rotate_left(4);
    assert_eq!(of(&endpoints), first);
}

#[test]
fn e12_e13_any_endpoint_address_is_taken_as_it_is() {
    // Outside every range, a node's address, another Service's cluster IP.
    let endpoints = vec![endpoint("8.8.8.8"), endpoint("192.0.2.1"), endpoint("10.96.0.9")];
    let resolved = resolve_one(&service("svc"), &[slice("s", "svc", endpoints)]);
    assert_eq!(cluster(&resolved), ["8.8.8.8:9376", "10.96.0.9:9376", "192.0.2.1:9376"]);
}

#[test]
fn p2_which_sets_are_used() {
    // (iTP Local, eTP Local, external) → (cluster, local). External: a node port, an LB IP or an external IP.
    let table = [
        ((false, false, false), (true, false)),
        ((false, false, true), (true, false)),
        ((false, true, false), (true, false)),
        ((false, true, true), (true, true)),
        ((true, false, false), (false, true)),
        ((true, false, true), (true, true)),
        ((true, true, false), (false, true)),
        ((true, true, true), (true, true)),
    ];
    for ((internal_local, external_local, external), expected) in table {
        let plain = Service { internal_local, external_local, ..service("svc") };
        let variants = if external {
            vec![
                Service { ports: [node_port("", 80, 30080)].into(), ..plain.clone() },
                Service { load_balancer_ips: ips(&["203.0.113.1"]), ..plain.clone() },
                Service { external_ips: ips(&["203.0.113.1"]), ..plain },
            ]
        } else {
            // An external IP of the other family is none of this one.
            vec![plain.clone(), Service { external_ips: ips(&["2001:db8:113::1"]), ..plain }]
        };
        for service in variants {
            let resolved = resolve_one(&service, &[]);
            let used = (resolved.cluster_set.is_some(), resolved.local_set.is_some());
            assert_eq!(used, expected, "{internal_local} {external_local} {external}");
        }
    }
}

#[test]
fn p3_falls_back_to_serving_terminating_on_any_node_without_topology() {
    let endpoints = vec![
        on("n2", hinted_zones(&["b"], terminating(true, endpoint("10.244.2.1")))),
        on("n1", hinted_zones(&["a"], terminating(true, endpoint("10.244.1.2")))),
        on("n1", terminating(false, endpoint("10.244.1.3"))),
        on("n1", unready(true, endpoint("10.244.1.4"))),
    ];
    let resolved = resolve_one(&service("svc"), &[slice("s", "svc", endpoints.clone())]);
    assert_eq!(cluster(&resolved), ["10.244.1.2:9376", "10.244.2.1:9376"]);
    assert_eq!(
        reasons(&resolved),
        [
            "in the cluster set: serving while terminating, as no endpoint is ready (P3)",
            "not used: terminating and not serving (P5)",
            "not used: serving but not ready (P5)",
            "in the cluster set: serving while terminating, as no endpoint is ready (P3)",
        ]
    );
    // One ready endpoint anywhere ends the fallback.
    let mut with_ready = endpoints;
    with_ready.push(on("n2", endpoint("10.244.2.9")));
    let resolved = resolve_one(&service("svc"), &[slice("s", "svc", with_ready)]);
    assert_eq!(cluster(&resolved), ["10.244.2.9:9376"]);
    assert_eq!(reasons(&resolved)[0], "not in the cluster set: terminating while others are ready (P3)");
}

#[test]
fn p4_local_fallback_is_independent_of_remote_endpoints_and_of_topology() {
    let service = Service { internal_local: true, external_ips: ips(&["203.0.113.1"]), ..service("svc") };
    let endpoints = vec![
        on("n1", hinted_zones(&["b"], terminating(true, endpoint("10.244.1.1")))),
        on("n2", hinted_zones(&["a"], endpoint("10.244.2.1"))),
    ];
    let resolved = resolve_one(&service, &[slice("s", "svc", endpoints)]);
    assert_eq!(
        (cluster(&resolved), local(&resolved)),
        (vec!["10.244.2.1:9376".into()], vec!["10.244.1.1:9376".into()])
    );
    assert_eq!(
        reasons(&resolved),
        [
            "not in the cluster set: terminating while others are ready (P3); \
             in the local set: serving while terminating, as no endpoint of this node is ready (P4)",
            "in the cluster set: ready and hinted for this node's zone a (P6); \
             not in the local set: on node n2 (E8)",
        ]
    );
}

#[test]
fn p5_ready_wins_over_everything() {
    let published = SliceEndpoint { serving: false, terminating: true, ..endpoint("10.244.2.1") };
    let resolved = resolve_one(&service("svc"), &[slice("s", "svc", vec![published])]);
    assert_eq!(cluster(&resolved), ["10.244.2.1:9376"]);
    let unused = vec![
        terminating(false, endpoint("10.244.2.1")),
        unready(true, endpoint("10.244.2.2")),
        unready(false, endpoint("10.244.2.3")),
    ];
    let resolved = resolve_one(&service("svc"), &[slice("s", "svc", unused)]);
    assert_eq!(cluster(&resolved), [""; 0]);
    assert!(!resolved.has_any_endpoints);
    assert_eq!(
        reasons(&resolved),
        [
            "not used: terminating and not serving (P5)",
            "not used: serving but not ready (P5)",
            "not used: not ready (P5)"
        ]
    );
}

#[test]
fn p6_node_hints_before_zone_hints() {
    let both =
        |node: &str, zone: &str, address| hinted_nodes(&[node], hinted_zones(&[zone], endpoint(address)));
    let resolve =
        |endpoints: Vec<SliceEndpoint>| resolve_one(&service("svc"), &[slice("s", "svc", endpoints)]);
    // Step 2 wins over step 3.
    let resolved = resolve(vec![both("n1", "b", "10.244.2.1"), both("n2", "a", "10.244.2.2")]);
    assert_eq!(cluster(&resolved), ["10.244.2.1:9376"]);
    assert_eq!(
        reasons(&resolved),
        [
            "in the cluster set: ready and hinted for this node (P6)",
            "not in the cluster set: hinted for node n2, this node is n1 (P6)"
        ]
    );
    // No node hint for this node: step 3.
    let resolved = resolve(vec![both("n3", "b", "10.244.2.1"), both("n2", "a", "10.244.2.2")]);
    assert_eq!(cluster(&resolved), ["10.244.2.2:9376"]);
    assert_eq!(
        reasons(&resolved)[0],
        "not in the cluster set: hinted for zone b, this node is in zone a (P6)"
    );
    // One endpoint without a node hint switches step 2 off, not step 3.
    let resolved = resolve(vec![both("n1", "b", "10.244.2.1"), hinted_zones(&["a"], endpoint("10.244.2.2"))]);
    assert_eq!(cluster(&resolved), ["10.244.2.2:9376"]);
    // One without any switches both off.
    let resolved = resolve(vec![both("n1", "a", "10.244.2.1"), endpoint("10.244.2.2")]);
    assert_eq!(cluster(&resolved), ["10.244.2.1:9376", "10.244.2.2:9376"]);
    assert_eq!(
        reasons(&resolved)[0],
        "in the cluster set: ready; hints do not count, as not every ready endpoint has one (P6)"
    );
    // None for this zone: all.
    let resolved = resolve(vec![hinted_zones(&["b", "c"], endpoint("10.244.2.1"))]);
    assert_eq!(cluster(&resolved), ["10.244.2.1:9376"]);
}

#[test]
fn p6_terminating_and_unready_endpoints_do_not_switch_a_step() {
    let endpoints = vec![
        hinted_zones(&["a"], endpoint("10.244.2.1")),
        hinted_zones(&["b"], endpoint("10.244.2.2")),
        // No hints here: would switch it off.
        terminating(true, endpoint("10.244.2.3")),
        unready(true, endpoint("10.244.2.4")),
    ];
    let resolved = resolve_one(&service("svc"), &[slice("s", "svc", endpoints)]);
    assert_eq!(cluster(&resolved), ["10.244.2.1:9376"]);
    // A hint for this zone on an unready one only: would switch it on.
    let endpoints = vec![
        hinted_zones(&["b"], endpoint("10.244.2.1")),
        unready(true, hinted_zones(&["a"], endpoint("10.244.2.2"))),
    ];
    let resolved = resolve_one(&service("svc"), &[slice("s", "svc", endpoints)]);
    assert_eq!(cluster(&resolved), ["10.244.2.1:9376"]);
}

#[test]
fn p7_only_hints_and_the_own_zone_label_count() {
    // The endpoint's own zone and node say nothing.
    let endpoints = vec![
        on("n1", SliceEndpoint { zone: Some("a".into()), ..endpoint("10.244.1.1") }),
        on("n2", SliceEndpoint { zone: Some("b".into()), ..endpoint("10.244.2.1") }),
    ];
    assert_eq!(cluster(&resolve_one(&service("svc"), &[slice("s", "svc", endpoints)])).len(), 2);
    let endpoints =
        vec![hinted_zones(&["a"], endpoint("10.244.2.1")), hinted_zones(&[""], endpoint("10.244.2.2"))];
    let slices = [slice("s", "svc", endpoints)];
    for zone in [None, Some(String::new())] {
        let mut context = context();
        context.node.as_mut().unwrap().zone = zone;
        let (resolved, _) = resolve_in(&context, &service("svc"), &slices);
        assert_eq!(cluster(&resolved[0]).len(), 2);
        assert!(reasons(&resolved[0])[0].contains("no zone label (P7)"));
    }
    // Node hints need no label.
    let mut context = context();
    context.node = None;
    let slices = [slice(
        "s",
        "svc",
        vec![hinted_nodes(&["n1"], endpoint("10.244.2.1")), hinted_nodes(&["n2"], endpoint("10.244.2.2"))],
    )];
    let (resolved, _) = resolve_in(&context, &service("svc"), &slices);
    assert_eq!(cluster(&resolved[0]), ["10.244.2.1:9376"]);
}

#[test]
fn p8_hints_are_judged_per_service_port() {
    let service = Service { ports: [port("one", 1), port("two", 2)].into(), ..service("svc") };
    let slices = [
        Slice {
            ports: [slice_port("one", 1)].into(),
            ..slice("a", "svc", vec![hinted_zones(&["a"], endpoint("10.244.2.1"))])
        },
        Slice {
            ports: [slice_port("one", 1), slice_port("two", 2)].into(),
            ..slice("b", "svc", vec![hinted_zones(&["b"], endpoint("10.244.2.2"))])
        },
    ];
    let resolved = all_of(&service, &slices);
    assert_eq!(cluster(&resolved[0]), ["10.244.2.1:1"]);
    // The endpoint in this zone does not offer port two: the filter must not leave it empty.
    assert_eq!(cluster(&resolved[1]), ["10.244.2.2:2"]);
}

#[test]
fn p13_has_any_endpoints() {
    // (iTP Local, endpoint, expected)
    let table = [
        (false, Some(endpoint("10.244.2.1")), true),
        (false, Some(terminating(true, endpoint("10.244.2.1"))), true),
        (false, Some(terminating(false, endpoint("10.244.2.1"))), false),
        (false, Some(unready(true, endpoint("10.244.2.1"))), false),
        (false, None, false),
        // Elsewhere counts, although the local set is empty.
        (true, Some(on("n2", endpoint("10.244.2.1"))), true),
        (true, Some(on("n2", terminating(true, endpoint("10.244.2.1")))), true),
        (true, Some(on("n2", unready(true, endpoint("10.244.2.1")))), false),
    ];
    for (internal_local, endpoint, expected) in table {
        let service = Service { internal_local, ..service("svc") };
        let slices = [slice("s", "svc", endpoint.into_iter().collect())];
        let resolved = resolve_one(&service, &slices);
        assert_eq!(resolved.has_any_endpoints, expected, "{internal_local}, {slices:?}");
    }
}

#[test]
fn c2_draining_is_what_serves_in_neither_set() {
    let endpoints = vec![
        endpoint("10.244.2.1"),
        terminating(true, endpoint("10.244.2.2")),
        terminating(false, endpoint("10.244.2.3")),
        unready(true, endpoint("10.244.2.4")),
    ];
    let resolved = resolve_one(&service("svc"), &[slice("s", "svc", endpoints)]);
    assert_eq!(resolved.draining, [at("10.244.2.2:9376"), at("10.244.2.4:9376")]);
}

#[test]
fn h3_distinct_ready_local_addresses_over_all_ports() {
    let service = Service { ports: [port("one", 1), port("two", 2)].into(), ..service("svc") };
    let slices = [
        Slice {
            ports: [slice_port("one", 1), slice_port("two", 2)].into(),
            ..slice("a", "svc", vec![on("n1", endpoint("10.244.1.1")), on("n2", endpoint("10.244.2.1"))])
        },
        Slice {
            ports: [slice_port("two", 22)].into(),
            ..slice(
                "b",
                "svc",
                vec![on("n1", endpoint("10.244.1.2")), on("n1", terminating(true, endpoint("10.244.1.3")))],
            )
        },
    ];
    for resolved in all_of(&service, &slices) {
        assert_eq!(resolved.local_ready_endpoints, 2);
    }
}

/// A large Service, by a deadline that only a quadratic loop misses (it takes milliseconds).
#[test]
fn ten_thousand_endpoints_resolve() {
    let slices: Vec<Slice> = (0..100u8)
        .map(|s| {
            let endpoints = (0..100u8).map(|e| {
                let base = on(&format!("n{e}"), endpoint(&format!("10.{s}.2.{e}")));
                hinted_zones(if e % 2 == 0 { &["a"] } else { &["b"] }, base)
            });
            slice(&format!("s{s}"), "svc", endpoints.collect())
        })
        .collect();
    let start = std::time::Instant::now();
    let resolved = resolve_one(&service("svc"), &slices);
    assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(resolved.endpoints.len(), 10_000);
    // P6: half of them are hinted for this zone.
    assert_eq!(resolved.cluster_set.map(|set| set.len()), Some(5_000));
}
