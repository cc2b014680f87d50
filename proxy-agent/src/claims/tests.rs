use std::collections::BTreeSet;

use super::*;
use crate::object::{Protocol, Service, ServicePort};
use crate::resolve::tests::build::*;

/// One Service, resolved; it has a ready endpoint if `endpoints`.
fn resolved(service: &Service, endpoints: bool) -> Vec<Resolved> {
    let slices: Vec<_> =
        endpoints.then(|| slice("s", &service.key.name, vec![endpoint("10.244.2.1")])).into_iter().collect();
    resolve_in(&context(), service, &slices).0
}

fn with_external_ip(name: &str, cluster_ip: &str, created_s: Option<i64>) -> Service {
    let mut service = Service { created_s, external_ips: ips(&["203.0.113.1"]), ..service(name) };
    service.cluster_ip.v4 = Some(ip(cluster_ip));
    service
}

fn contested() -> FrontendId {
    FrontendId { address: ip("203.0.113.1"), port: 80, protocol: Protocol::Tcp }
}

fn winner(claims: &Claims) -> Option<String> {
    claims.winner(&contested()).map(|key| key.service.name.to_string())
}

fn named(names: &[&str]) -> BTreeSet<ObjectKey> {
    names.iter().map(|&name| ObjectKey::new("ns", name)).collect()
}

#[test]
fn s12_endpoints_then_age_then_name() {
    // Best first.
    let order = [
        (with_external_ip("d-old-with", "10.96.0.1", Some(5)), true),
        (with_external_ip("c-young-with", "10.96.0.2", Some(9)), true),
        (with_external_ip("e-ageless-with", "10.96.0.3", None), true),
        (with_external_ip("a-oldest-without", "10.96.0.4", Some(1)), false),
        (with_external_ip("b-oldest-without", "10.96.0.5", Some(1)), false),
    ];
    // In every rotation and both directions the same one wins, and when it goes, the next.
    for rotation in 0..order.len() {
        for backwards in [false, true] {
            let mut arriving = order.clone();
            arriving.rotate_left(rotation);
            if backwards {
                arriving.reverse();
            }
            let mut claims = Claims::default();
            for (service, endpoints) in &arriving {
                claims.update(&service.key, &resolved(service, *endpoints));
            }
            for (i, (service, _)) in order.iter().enumerate() {
                assert_eq!(winner(&claims), Some(service.key.name.to_string()));
                let next = order.get(i + 1).map(|(next, _)| next.key.clone());
                assert_eq!(claims.update(&service.key, &[]), next.into_iter().collect());
            }
            assert_eq!(winner(&claims), None);
            assert!(claims.by_frontend.is_empty() && claims.by_service.is_empty());
        }
    }
}

#[test]
fn s12_an_endpoint_more_or_less_moves_the_frontend() {
    let (a, b) = (with_external_ip("a", "10.96.0.1", Some(1)), with_external_ip("b", "10.96.0.2", Some(2)));
    let mut claims = Claims::default();
    assert_eq!(claims.update(&a.key, &resolved(&a, true)), named(&[]));
    assert_eq!(claims.update(&b.key, &resolved(&b, true)), named(&[]));
    assert_eq!(winner(&claims).unwrap(), "a");
    assert_eq!(claims.update(&a.key, &resolved(&a, false)), named(&["b"]));
    assert_eq!(winner(&claims).unwrap(), "b");
    assert_eq!(claims.update(&a.key, &resolved(&a, true)), named(&["b"]));
    assert_eq!(winner(&claims).unwrap(), "a");
    // No change, no one affected.
    assert_eq!(claims.update(&a.key, &resolved(&a, true)), named(&[]));
    assert_eq!(claims.update(&b.key, &resolved(&b, false)), named(&[]));
}

#[test]
fn s12_losers_keep_their_other_frontends_and_hear_of_it() {
    let (a, b) = (with_external_ip("a", "10.96.0.1", Some(1)), with_external_ip("b", "10.96.0.2", Some(2)));
    let (of_a, of_b) = (resolved(&a, true), resolved(&b, true));
    let mut claims = Claims::default();
    claims.update(&b.key, &of_b);
    claims.update(&a.key, &of_a);
    let won: Vec<&str> = claims.won(&of_b[0]).map(|frontend| frontend.kind.name()).collect();
    assert_eq!(won, ["ClusterIP"]);
    assert_eq!(claims.losses(&of_a[0]), []);
    let losses = claims.losses(&of_b[0]);
    assert_eq!(losses.len(), 1);
    assert_eq!((losses[0].object.as_str(), losses[0].field.as_str()), ("Service ns/b", "spec.externalIPs"));
    assert!(losses[0].message.contains("203.0.113.1:80/TCP"), "{losses:?}");
    assert!(losses[0].message.contains("ns/a:/TCP (S12)"), "{losses:?}");
}

#[test]
fn x4_a_nodeport_loses_to_an_external_ip_on_a_node_address() {
    let nodeport = Service { ports: vec![node_port("", 80, 30080)], created_s: Some(1), ..service("a") };
    let mut external =
        Service { ports: vec![port("", 30080)], external_ips: ips(&["192.0.2.1"]), ..service("b") };
    external.cluster_ip.v4 = Some(ip("10.96.0.8"));
    external.created_s = None;
    let mut claims = Claims::default();
    claims.update(&nodeport.key, &resolved(&nodeport, true));
    let id = FrontendId { address: ip("192.0.2.1"), port: 30080, protocol: Protocol::Tcp };
    assert_eq!(claims.winner(&id).unwrap().service.name, "a");
    // Even younger and without endpoints.
    assert_eq!(claims.update(&external.key, &resolved(&external, false)), named(&["a"]));
    assert_eq!(claims.winner(&id).unwrap().service.name, "b");
}

#[test]
fn s12_nobody_takes_a_cluster_ip_by_naming_it() {
    let victim = Service { created_s: None, ..service("victim") };
    let mut thief = Service { external_ips: ips(&["10.96.0.7"]), created_s: Some(1), ..service("thief") };
    thief.cluster_ip.v4 = Some(ip("10.96.0.8"));
    let mut claims = Claims::default();
    claims.update(&thief.key, &resolved(&thief, true));
    claims.update(&victim.key, &resolved(&victim, false));
    let id = FrontendId { address: ip("10.96.0.7"), port: 80, protocol: Protocol::Tcp };
    assert_eq!(claims.winner(&id).unwrap().service.name, "victim");
}

#[test]
fn s13_a_renamed_port_never_loses_its_frontends() {
    let before = Service { ports: vec![port("old", 80)], ..service("svc") };
    let after = Service { ports: vec![port("new", 80)], ..service("svc") };
    let mut claims = Claims::default();
    claims.update(&before.key, &resolved(&before, true));
    let of_after = resolved(&after, false);
    assert_eq!(claims.update(&after.key, &of_after), named(&[]));
    assert_eq!(claims.won(&of_after[0]).count(), 1);
}

#[test]
fn n7_protocols_do_not_compete() {
    let tcp = with_external_ip("tcp", "10.96.0.1", Some(1));
    let udp = Service {
        ports: vec![ServicePort { protocol: Protocol::Udp, ..port("", 80) }],
        ..with_external_ip("udp", "10.96.0.2", Some(1))
    };
    let mut claims = Claims::default();
    let (of_tcp, of_udp) = (resolved(&tcp, false), resolved(&udp, false));
    claims.update(&tcp.key, &of_tcp);
    claims.update(&udp.key, &of_udp);
    assert_eq!(claims.won(&of_tcp[0]).count() + claims.won(&of_udp[0]).count(), 4);
}
