//! Every combination of conditions, place, hints and policies for up to three endpoints, against the rules written
//! down a second time, naively and in the words of P1–P6 and P13.

use super::build::*;
use crate::object::{Service, SliceEndpoint};
use crate::resolve::{NodeFacts, resolve};

const NO: &[&str] = &[];
/// Node hints and zone hints.
const HINTS: [(&[&str], &[&str]); 6] =
    [(NO, NO), (&["n1"], NO), (&["n2"], NO), (NO, &["a"]), (NO, &["b", "c"]), (&["n2"], &["a", "b"])];

fn shapes(places: &[&str], hints: &[(&[&str], &[&str])], conditions: &[[bool; 3]]) -> Vec<SliceEndpoint> {
    let mut shapes = Vec::new();
    for &[ready, serving, terminating] in conditions {
        for place in places {
            for (nodes, zones) in hints {
                let base = SliceEndpoint { ready, serving, terminating, ..endpoint("10.244.0.0") };
                shapes.push(on(place, hinted_nodes(nodes, hinted_zones(zones, base))));
            }
        }
    }
    shapes
}

fn all_conditions() -> Vec<[bool; 3]> {
    (0..8).map(|bits| [bits & 1 != 0, bits & 2 != 0, bits & 4 != 0]).collect()
}

/// What the oracle says, as positions in the list of endpoints.
#[derive(Debug, PartialEq)]
struct Answer {
    cluster: Option<Vec<usize>>,
    local: Option<Vec<usize>>,
    draining: Vec<usize>,
    has_any: bool,
}

struct Policies {
    internal_local: bool,
    external_local: bool,
    external: bool,
    zone: Option<&'static str>,
}

fn oracle(endpoints: &[SliceEndpoint], policies: &Policies) -> Answer {
    let positions = |wanted: &dyn Fn(&SliceEndpoint) -> bool| -> Vec<usize> {
        (0..endpoints.len()).filter(|&i| wanted(&endpoints[i])).collect()
    };
    let serving_terminating = |e: &SliceEndpoint| e.serving && e.terminating;
    let local = |e: &SliceEndpoint| e.node.as_deref() == Some("n1");
    // P2.
    let cluster_needed = !policies.internal_local || policies.external;
    let local_needed = policies.internal_local || (policies.external_local && policies.external);
    // P6, from ready endpoints only.
    let ready: Vec<&SliceEndpoint> = endpoints.iter().filter(|e| e.ready).collect();
    let names_node = |e: &SliceEndpoint| e.node_hints().contains(&"n1".into());
    let names_zone =
        |e: &SliceEndpoint| policies.zone.is_some_and(|zone| e.zone_hints().contains(&zone.into()));
    let all_have_node_hints = ready.iter().all(|e| !e.node_hints().is_empty());
    let all_have_zone_hints = ready.iter().all(|e| !e.zone_hints().is_empty());
    let same_node = all_have_node_hints && ready.iter().any(|e| names_node(e));
    let same_zone = !same_node && all_have_zone_hints && ready.iter().any(|e| names_zone(e));
    // P3.
    let mut cluster =
        positions(&|e| e.ready && (!same_node || names_node(e)) && (!same_zone || names_zone(e)));
    if cluster.is_empty() {
        cluster = positions(&serving_terminating);
    }
    // P4.
    let mut local_set = positions(&|e| local(e) && e.ready);
    if local_set.is_empty() {
        local_set = positions(&|e| local(e) && serving_terminating(e));
    }
    // P13.
    let reachable = endpoints.iter().any(|e| e.ready || serving_terminating(e));
    let has_any = (cluster_needed && !cluster.is_empty()) || (local_needed && reachable);
    let cluster = cluster_needed.then_some(cluster);
    let local = local_needed.then_some(local_set);
    let used =
        |i: &usize| [&cluster, &local].into_iter().any(|set| set.as_ref().is_some_and(|s| s.contains(i)));
    let draining = positions(&|e| e.serving).into_iter().filter(|i| !used(i)).collect();
    Answer { cluster, local, draining, has_any }
}

fn check(shapes: &[SliceEndpoint], picks: &[usize]) {
    let endpoints: Vec<SliceEndpoint> = picks
        .iter()
        .enumerate()
        .map(|(i, &pick)| SliceEndpoint { address: ip(&format!("10.244.0.{i}")), ..shapes[pick].clone() })
        .collect();
    let slices = [slice("s", "svc", endpoints.clone())];
    for bits in 0..16 {
        let zone = (bits & 8 != 0).then_some("a");
        let policies = Policies {
            internal_local: bits & 1 != 0,
            external_local: bits & 2 != 0,
            external: bits & 4 != 0,
            zone,
        };
        let service = Service {
            internal_local: policies.internal_local,
            external_local: policies.external_local,
            external_ips: if policies.external { ips(&["203.0.113.1"]) } else { Vec::new() },
            ..service("svc")
        };
        let mut context = context();
        context.node.as_mut().unwrap().zone = zone.map(str::to_owned);
        let (resolved, problems) = resolve(&service, &slices, &context, &NodeFacts::default());
        assert_eq!(problems, []);
        let resolved = &resolved[0];
        let place = |address: &std::net::SocketAddr| {
            endpoints.iter().position(|e| e.address == address.ip()).unwrap()
        };
        let places = |set: &[std::net::SocketAddr]| set.iter().map(place).collect::<Vec<_>>();
        let got = Answer {
            cluster: resolved.cluster_set.as_deref().map(places),
            local: resolved.local_set.as_deref().map(places),
            draining: places(&resolved.draining),
            has_any: resolved.has_any_endpoints,
        };
        let context = format!(
            "iTP Local {}, eTP Local {}, external {}, zone {zone:?}: {endpoints:#?}",
            policies.internal_local, policies.external_local, policies.external
        );
        assert_eq!(got, oracle(&endpoints, &policies), "{context}");
        // Views tell the same story as the sets, and every one says why.
        for (i, view) in resolved.endpoints.iter().enumerate() {
            let inside = |set: &Option<Vec<usize>>| set.as_ref().is_some_and(|set| set.contains(&i));
            assert_eq!(
                (view.in_cluster_set, view.in_local_set),
                (inside(&got.cluster), inside(&got.local)),
                "{context}"
            );
            assert_eq!(
                view.in_cluster_set,
                view.reason.contains("in the cluster set: ")
                    && !view.reason.starts_with("not in the cluster"),
                "{context}"
            );
            assert_eq!(
                view.in_local_set,
                view.reason.replace("not in the local set", "").contains("in the local set: "),
                "{context}"
            );
        }
    }
}

#[test]
fn none_and_one() {
    let shapes = shapes(&["n1", "n2"], &HINTS, &all_conditions());
    check(&shapes, &[]);
    for i in 0..shapes.len() {
        check(&shapes, &[i]);
    }
}

#[test]
fn every_pair() {
    let shapes = shapes(&["n1", "n2"], &HINTS, &all_conditions());
    for i in 0..shapes.len() {
        for j in i..shapes.len() {
            check(&shapes, &[i, j]);
        }
    }
}

#[test]
fn every_triple_of_conditions_and_places() {
    triples(&shapes(&["n1", "n2"], &HINTS[..1], &all_conditions()));
}

#[test]
fn every_triple_of_hints_over_ready_and_last_resort() {
    triples(&shapes(&["n2"], &HINTS, &[[true, true, false], [false, true, true]]));
}

fn triples(shapes: &[SliceEndpoint]) {
    for i in 0..shapes.len() {
        for j in i..shapes.len() {
            for k in j..shapes.len() {
                check(shapes, &[i, j, k]);
            }
        }
    }
}
