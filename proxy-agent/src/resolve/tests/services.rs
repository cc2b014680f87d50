//! Rules S, A, X, F and the frontends of N, one by one.

use proxy_common::abi::{FrontendKind, Origin, WhichSet};

use super::build::*;
use crate::object::{Family, PerFamily, Protocol, Service, ServicePort};
use crate::resolve::{
    Context, ExcludedFrontend, NodeFacts, NodePortAddresses, Policy, Resolved, frontend_value,
};

fn frontends(resolved: &Resolved) -> Vec<String> {
    resolved.frontends.iter().map(|f| format!("{} {}:{}", f.kind.name(), f.address, f.port)).collect()
}

fn one_in(policy: Policy, service: &Service) -> Resolved {
    let (mut resolved, _) = resolve_in(&Context { policy, ..context() }, service, &[]);
    resolved.remove(0)
}

fn one(service: &Service) -> Resolved {
    one_in(Policy::default(), service)
}

#[test]
fn s1_s2_an_unproxied_service_gets_nothing() {
    let service = Service {
        proxied: false,
        ports: vec![node_port("", 80, 30080)],
        load_balancer_ips: ips(&["203.0.113.1"]),
        ..service("svc")
    };
    assert_eq!(
        resolve_in(&context(), &service, &[slice("s", "svc", vec![endpoint("10.244.2.1")])]),
        (vec![], vec![])
    );
}

#[test]
fn s4_s5_each_family_on_its_own() {
    let service = Service {
        cluster_ip: PerFamily { v4: None, v6: Some(ip("fd00:96::7")) },
        ports: vec![node_port("", 80, 30080)],
        external_ips: ips(&["203.0.113.1", "2001:db8:113::1"]),
        load_balancer_ips: ips(&["203.0.113.2", "2001:db8:113::2"]),
        ..service("svc")
    };
    let resolved = resolve_one(&service, &[]);
    assert_eq!(resolved.key.family, Family::V6);
    assert_eq!(
        frontends(&resolved),
        [
            "NodePort 2001:db8::1:30080",
            "ExternalIP 2001:db8:113::1:80",
            "LoadBalancer 2001:db8:113::2:80",
            "ClusterIP fd00:96::7:80"
        ]
    );
}

#[test]
fn s7_s8_one_unit_per_port() {
    let service = Service {
        ports: vec![
            port("b", 81),
            ServicePort { protocol: Protocol::Udp, ..port("a", 53) },
            node_port("a", 53, 30053),
        ],
        ..service("svc")
    };
    let (resolved, problems) = resolve_in(&context(), &service, &[]);
    assert_eq!(problems, []);
    let keys: Vec<String> = resolved.iter().map(|r| r.key.to_string()).collect();
    assert_eq!(keys, ["ns/svc:a/TCP", "ns/svc:a/UDP", "ns/svc:b/TCP"]);
    assert_eq!(frontends(&resolved[0]), ["ClusterIP 10.96.0.7:53", "NodePort 192.0.2.1:30053"]);
    assert_eq!(frontends(&resolved[1]), ["ClusterIP 10.96.0.7:53"]);
}

#[test]
fn s10_every_kind_whatever_the_type() {
    let service = Service {
        ports: vec![node_port("", 80, 30080)],
        external_ips: ips(&["203.0.113.1"]),
        load_balancer_ips: ips(&["203.0.113.2"]),
        ..service("svc")
    };
    assert_eq!(
        frontends(&one(&service)),
        [
            "ClusterIP 10.96.0.7:80",
            "NodePort 192.0.2.1:30080",
            "ExternalIP 203.0.113.1:80",
            "LoadBalancer 203.0.113.2:80"
        ]
    );
}

#[test]
fn s12_duplicate_ports_inside_one_service() {
    let service = Service { ports: vec![port("a", 80), port("b", 80), port("c", 82)], ..service("svc") };
    let (resolved, problems) = resolve_in(&context(), &service, &[]);
    let keys: Vec<String> = resolved.iter().map(|r| r.key.to_string()).collect();
    assert_eq!(keys, ["ns/svc:a/TCP", "ns/svc:c/TCP"]);
    assert_eq!(frontends(&resolved[0]), ["ClusterIP 10.96.0.7:80"]);
    let fields: Vec<&str> = problems.iter().map(|problem| problem.field.as_str()).collect();
    assert_eq!(fields, ["spec.ports[1]"]);
}

#[test]
fn a2_ports_and_families_are_units_of_their_own_to_affinity() {
    let service = Service {
        cluster_ip: PerFamily { v4: Some(ip("10.96.0.7")), v6: Some(ip("fd00:96::7")) },
        ports: vec![node_port("a", 80, 30080), port("b", 81)],
        affinity_timeout_s: Some(60),
        external_ips: ips(&["203.0.113.1"]),
        ..service("svc")
    };
    let (resolved, _) = resolve_in(&context(), &service, &[]);
    let units: Vec<(String, Family, usize)> =
        resolved.iter().map(|r| (r.key.to_string(), r.key.family, r.frontends.len())).collect();
    // All VIPs of a port lead to the one unit, so the VIP is not in the affinity key.
    let expected = [
        ("ns/svc:a/TCP", Family::V4, 3),
        ("ns/svc:a/TCP", Family::V6, 2),
        ("ns/svc:b/TCP", Family::V4, 2),
        ("ns/svc:b/TCP", Family::V6, 1),
    ];
    assert_eq!(units, expected.map(|(name, family, frontends)| (name.to_owned(), family, frontends)));
}

#[test]
fn x5_the_health_check_port_is_no_frontend() {
    let service = Service { health_check_node_port: Some(32_000), external_local: true, ..every_kind() };
    assert!(one(&service).frontends.iter().all(|frontend| frontend.port != 32_000));
}

#[test]
fn a1_h1_pass_through() {
    let service =
        Service { affinity_timeout_s: Some(10_800), health_check_node_port: Some(32_000), ..service("svc") };
    let resolved = one(&service);
    assert_eq!((resolved.affinity_timeout_s, resolved.health_check_node_port), (Some(10_800), Some(32_000)));
}

#[test]
fn n1_n8_nodeports_on_listed_addresses_only() {
    let service = Service { ports: vec![node_port("", 80, 30080)], ..service("svc") };
    // 192.0.2.2 is an own address, but not the primary one.
    assert_eq!(frontends(&one(&service)), ["ClusterIP 10.96.0.7:80", "NodePort 192.0.2.1:30080"]);
    let all = Policy { nodeport_addresses: NodePortAddresses::Cidrs(Vec::new()), ..Policy::default() };
    assert_eq!(
        frontends(&one_in(all, &service)),
        ["ClusterIP 10.96.0.7:80", "NodePort 192.0.2.1:30080", "NodePort 192.0.2.2:30080"]
    );
}

#[test]
fn n7_the_same_number_in_two_protocols() {
    let udp = ServicePort { protocol: Protocol::Udp, ..node_port("u", 53, 30053) };
    let service = Service { ports: vec![node_port("t", 53, 30053), udp], ..service("svc") };
    let (resolved, problems) = resolve_in(&context(), &service, &[]);
    assert_eq!(problems, []);
    assert!(resolved.iter().all(|r| frontends(r).contains(&"NodePort 192.0.2.1:30053".to_owned())));
}

#[test]
fn x1_the_gate_takes_external_ips_away_but_policy_still_counts_them() {
    let service = Service { internal_local: true, external_ips: ips(&["203.0.113.1"]), ..service("svc") };
    let resolved = one_in(Policy { no_external_ips: true, ..Policy::default() }, &service);
    assert_eq!(frontends(&resolved), ["ClusterIP 10.96.0.7:80"]);
    assert!(resolved.cluster_set.is_some());
}

#[test]
fn x4_a_more_exact_frontend_beats_the_nodeport() {
    let service = Service {
        ports: vec![node_port("", 30080, 30080)],
        external_ips: ips(&["192.0.2.1"]),
        ..service("svc")
    };
    assert_eq!(frontends(&one(&service)), ["ClusterIP 10.96.0.7:30080", "ExternalIP 192.0.2.1:30080"]);
}

#[test]
fn x6_f1_the_same_address_twice_is_one_frontend() {
    let service = Service {
        external_ips: ips(&["203.0.113.1", "203.0.113.1"]),
        load_balancer_ips: ips(&["203.0.113.1", "203.0.113.1"]),
        source_ranges: vec![net("198.51.100.0/24")],
        ..service("svc")
    };
    let resolved = one(&service);
    // As load balancer IP: an external IP equal to it is filtered too.
    assert_eq!(frontends(&resolved), ["ClusterIP 10.96.0.7:80", "LoadBalancer 203.0.113.1:80"]);
}

fn value_of(service: &Service, kind: FrontendKind, facts: &NodeFacts) -> proxy_common::abi::FrontendValue {
    let resolved = one(service);
    let frontend = *resolved.frontends.iter().find(|frontend| frontend.kind == kind).unwrap();
    frontend_value(&resolved, &frontend, facts, 7)
}

fn every_kind() -> Service {
    Service {
        ports: vec![node_port("", 80, 30080)],
        external_ips: ips(&["203.0.113.1"]),
        load_balancer_ips: ips(&["203.0.113.2"]),
        ..service("svc")
    }
}

const EXTERNAL: [FrontendKind; 3] =
    [FrontendKind::LoadBalancer, FrontendKind::ExternalIp, FrontendKind::NodePort];

#[test]
fn f1_only_the_load_balancer_ip_is_filtered() {
    let guarded = Service { source_ranges: vec![net("198.51.100.0/24")], ..every_kind() };
    let facts = NodeFacts::new(&context());
    for kind in EXTERNAL.into_iter().chain([FrontendKind::ClusterIp]) {
        let value = value_of(&guarded, kind, &facts);
        assert_eq!(value.has_source_ranges(), kind == FrontendKind::LoadBalancer, "{kind:?}");
        assert!(!value_of(&every_kind(), kind, &facts).has_source_ranges());
        assert_eq!((value.service(), value.kind()), (7, Some(kind)));
    }
}

#[test]
fn p10_p11_the_matrix() {
    use WhichSet::{Cluster, Local};
    let by_origin = |service: &Service, kind, facts: &NodeFacts| {
        let value = value_of(service, kind, facts);
        [Origin::Pod, Origin::Node, Origin::Elsewhere].map(|origin| value.set_for(origin))
    };
    let detecting = NodeFacts::new(&context());
    let mut blind = detecting.clone();
    blind.detects_local_pods = PerFamily { v4: false, v6: true };
    for internal_local in [false, true] {
        for external_local in [false, true] {
            let service = Service { internal_local, external_local, ..every_kind() };
            for facts in [&detecting, &blind] {
                let internal = if internal_local { [Local; 3] } else { [Cluster; 3] };
                assert_eq!(by_origin(&service, FrontendKind::ClusterIp, facts), internal);
            }
            for kind in EXTERNAL {
                let external = if external_local { [Cluster, Cluster, Local] } else { [Cluster; 3] };
                assert_eq!(by_origin(&service, kind, &detecting), external);
                // Without detection pods are served like anybody else, the node is not.
                let external = if external_local { [Local, Cluster, Local] } else { [Cluster; 3] };
                assert_eq!(by_origin(&service, kind, &blind), external);
            }
        }
    }
}

#[test]
fn p14_excluded_frontends_are_left_alone() {
    let excluded = |port| Policy {
        excluded_frontends: vec![ExcludedFrontend { address: ip("10.96.0.7"), port }],
        ..Policy::default()
    };
    let all = one(&every_kind()).frontends.len();
    assert_eq!(one_in(excluded(None), &every_kind()).frontends.len(), all - 1);
    assert_eq!(one_in(excluded(Some((80, None))), &every_kind()).frontends.len(), all - 1);
    assert_eq!(one_in(excluded(Some((80, Some(Protocol::Tcp)))), &every_kind()).frontends.len(), all - 1);
    assert_eq!(one_in(excluded(Some((80, Some(Protocol::Udp)))), &every_kind()).frontends.len(), all);
    assert_eq!(one_in(excluded(Some((81, None))), &every_kind()).frontends.len(), all);
}

#[test]
fn f4_the_services_own_vips_are_let_in_with_the_node() {
    let with = |range| Service {
        source_ranges: vec![net(range)],
        load_balancer_ips: ips(&["203.0.113.2", "203.0.113.1", "2001:db8:113::1"]),
        ..service("svc")
    };
    assert_eq!(one(&with("192.0.2.0/24")).source_exceptions, ips(&["203.0.113.1", "203.0.113.2"]));
    // The second address of the node is not its primary one.
    assert_eq!(one(&with("192.0.2.2/32")).source_exceptions, ips(&[]));
}

#[test]
fn f5_ranges_are_split_by_family() {
    let service = Service {
        cluster_ip: PerFamily { v4: Some(ip("10.96.0.7")), v6: Some(ip("fd00:96::7")) },
        load_balancer_ips: ips(&["203.0.113.1", "2001:db8:113::1"]),
        source_ranges: vec![net("198.51.100.9/24"), net("10.0.0.0/8"), net("198.51.100.0/24")],
        ..service("svc")
    };
    let (resolved, problems) = resolve_in(&context(), &service, &[]);
    assert_eq!(resolved[0].source_ranges, [net("10.0.0.0/8"), net("198.51.100.0/24")]);
    // Open, although ranges of the other family exist: a known sharp edge, which reading the object has told already.
    assert_eq!((&resolved[1].source_ranges[..], problems), (&[][..], vec![]));
}

#[test]
fn f6_empty_and_zero_ranges_are_open() {
    for ranges in [vec![], vec![net("10.0.0.0/8"), net("0.0.0.0/0")]] {
        let service = Service { source_ranges: ranges, ..every_kind() };
        assert_eq!(one(&service).source_ranges, []);
        let facts = NodeFacts::new(&context());
        assert!(!value_of(&service, FrontendKind::LoadBalancer, &facts).has_source_ranges());
    }
}

#[test]
fn z7_a_service_without_endpoints_keeps_its_frontends() {
    let resolved = one(&every_kind());
    assert!(!resolved.has_any_endpoints);
    assert_eq!(resolved.frontends.len(), 4);
}
