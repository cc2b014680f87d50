//! Where endpoints come from: hand-made slices, mirrored Endpoints, many slices of one Service; which pods count; and
//! VIPs of a range that was added later.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, ensure};
use serde_json::json;
use sheave_tests::{
    lab::Place,
    manifests::{Object, object, pod, service, slice},
    protocol::Transport,
    scene::{TARGET, answers, eventually},
    server::Server,
};

use crate::{V4, V6, client, cluster, dial, refused, serves, tcp, web};

/// A Service that no controller makes slices for.
fn bare() -> Object {
    service("web", &[V4, V6]).port("http", "TCP", 80, TARGET).port("dns", "UDP", 80, TARGET)
}

fn by_hand(name: &str, family: &str, places: &[&Place]) -> Object {
    let empty = slice(name, "web", family).slice_port("http", "TCP", TARGET).slice_port("dns", "UDP", TARGET);
    places.iter().fold(empty, |slice, place| {
        let address = if family == "IPv4" { place.v4().to_string() } else { place.v6().to_string() };
        slice.endpoint(&address, "node-1")
    })
}

/// E2, E3, E4, E11: slices before their Service, several of them, one that moves to another Service, and one by one
/// away.
#[test]
fn slices_made_by_hand() {
    let cluster = cluster(1, 4);
    let (api, client) = (cluster.api(), client(&cluster, 0, 3));
    let place = |pod| cluster.place(0, pod).unwrap();
    let (four, six) = (by_hand("a", "IPv4", &[place(0)]), by_hand("b", "IPv6", &[place(0)]));
    api.apply_all(&[four.clone(), six.clone()]).unwrap();
    cluster.settle().unwrap();
    api.apply(&bare()).unwrap();
    serves(&client, &["pod-1-1"]);
    api.apply_all(&[
        by_hand("c", "IPv4", &[place(1), place(2)]),
        by_hand("d", "IPv6", &[place(1), place(2)]),
    ])
    .unwrap();
    serves(&client, &["pod-1-1", "pod-1-2", "pod-1-3"]);

    // Another Service takes one over.
    api.apply(&service("other", &["10.96.0.20"]).port("http", "TCP", 80, TARGET)).unwrap();
    api.apply(&four.clone().label("kubernetes.io/service-name", "other")).unwrap();
    tcp(&client, "10.96.0.20", 80, &["pod-1-1"]);
    tcp(&client, V4, 80, &["pod-1-2", "pod-1-3"]);
    tcp(&client, V6, 80, &["pod-1-1", "pod-1-2", "pod-1-3"]);

    for name in ["c", "d"] {
        api.delete(&by_hand(name, "IPv4", &[])).unwrap();
    }
    refused(&client, V4, 80);
    tcp(&client, V6, 80, &["pod-1-1"]);
    api.delete(&six).unwrap();
    refused(&client, V6, 80);
    tcp(&client, "10.96.0.20", 80, &["pod-1-1"]);
}

/// E2: an old-style Endpoints object, mirrored into slices by the controller.
#[test]
fn mirrored_endpoints() {
    let cluster = cluster(1, 3);
    let (api, client) = (cluster.api(), client(&cluster, 0, 2));
    let endpoints = |pods: &[usize]| {
        let places: Vec<_> = pods.iter().map(|pod| cluster.place(0, *pod).unwrap()).collect();
        let addresses: Vec<_> = places
            .iter()
            .flat_map(|place| [place.v4().to_string(), place.v6().to_string()])
            .map(|ip| json!({"ip": ip}))
            .collect();
        let ports = json!([
            {"name": "http", "port": TARGET, "protocol": "TCP"},
            {"name": "dns", "port": TARGET, "protocol": "UDP"},
        ]);
        let object = object("v1", "Endpoints", "web").namespace("default");
        object.set("subsets", json!([{"addresses": addresses, "ports": ports}]))
    };
    api.apply(&bare()).unwrap();
    api.apply(&endpoints(&[0])).unwrap();
    serves(&client, &["pod-1-1"]);
    api.apply(&endpoints(&[0, 1])).unwrap();
    serves(&client, &["pod-1-1", "pod-1-2"]);
    api.delete(&endpoints(&[])).unwrap();
    refused(&client, V4, 80);
    refused(&client, V6, 80);
}

/// E7, P5: a pod that is not ready gets nothing, unless its Service publishes it.
#[test]
fn pods_that_are_not_ready() {
    let cluster = cluster(1, 3);
    let (api, client) = (cluster.api(), client(&cluster, 0, 2));
    api.apply(&web()).unwrap();
    cluster.run_pods("web", &[(0, 0)]).unwrap();
    let second = cluster.pod("web", 0, 1).unwrap();
    cluster.run(&second.clone().ready(false)).unwrap();
    eventually("the slices have both pods in both families", || {
        let count = cluster.endpoints("default", "web")?.len();
        ensure!(count == 4, "{count} endpoints");
        Ok(())
    })
    .unwrap();
    cluster.settle().unwrap();
    serves(&client, &["pod-1-1"]);
    api.set_status(&second).unwrap();
    serves(&client, &["pod-1-1", "pod-1-2"]);
    for pod in [0, 1] {
        api.set_status(&cluster.pod("web", 0, pod).unwrap().ready(false)).unwrap();
    }
    refused(&client, V4, 80);
    refused(&client, V6, 80);
    api.apply(&web().set("spec.publishNotReadyAddresses", true)).unwrap();
    serves(&client, &["pod-1-1", "pod-1-2"]);
    api.apply(&web()).unwrap();
    refused(&client, V4, 80);
}

/// E4, E11: more endpoints than a slice holds. Every one of them gets its connections; then most of them go.
#[test]
fn endpoints_over_several_slices() {
    const PODS: u8 = 150;
    const FIRST: u8 = 64;
    let cluster = cluster(1, 2);
    let (api, client) = (cluster.api(), client(&cluster, 0, 1));
    let (node, place) = (cluster.node(0).unwrap(), cluster.place(0, 0).unwrap());
    // One namespace with the addresses of all these pods.
    let address = |pod: u8| Ipv4Addr::new(10, 244, 1, FIRST + pod);
    let own = place.v4();
    node.host()
        .netns()
        .ip(&format!("route add 10.244.1.64/26 via {own}\nroute add 10.244.1.128/25 via {own}\n"))
        .unwrap();
    let lines: String = (0..PODS).map(|pod| format!("address add {}/32 dev eth0\n", address(pod))).collect();
    place.netns().ip(&lines).unwrap();
    let names: Vec<String> = (0..PODS).map(|pod| format!("many-{pod}")).collect();
    let _servers: Vec<Server> = (0..PODS)
        .map(|pod| {
            let socket = SocketAddr::new(IpAddr::from(address(pod)), TARGET);
            Server::start(place.netns(), &names[usize::from(pod)], &[socket]).unwrap()
        })
        .collect();
    let object = |pod: u8| pod_at(&names[usize::from(pod)], node.name(), address(pod));
    api.apply(&web()).unwrap();
    for pod in 0..PODS {
        cluster.run(&object(pod)).unwrap();
    }
    let all_answer = |from: u8| {
        let expected: std::collections::BTreeSet<String> =
            names.iter().skip(usize::from(from)).cloned().collect();
        eventually("all answer", || {
            // Each of 150 is missed once in 10^9 times.
            let found = answers(&client, Transport::Tcp, dial(V4, 80), 4000)?;
            ensure!(found == expected, "{} answer, not {}", found.len(), expected.len());
            Ok(())
        })
        .unwrap();
    };
    all_answer(0);
    let endpoints = cluster.endpoints("default", "web").unwrap();
    let slices: std::collections::BTreeSet<_> =
        endpoints.iter().map(|endpoint| endpoint["slice"].as_str().unwrap()).collect();
    assert!(slices.len() > 1, "all in {slices:?}");
    for pod in 0..140 {
        api.delete(&object(pod)).unwrap();
    }
    all_answer(140);
}

fn pod_at(name: &str, node: &str, address: Ipv4Addr) -> Object {
    pod(name, node, &[address.to_string()]).label("app", "web").set("spec.containers.0.image", "none")
}

/// A range of cluster IPs that is added while everything runs (no agent needs to know of it).
#[test]
fn an_added_range_of_cluster_ips() {
    let cluster = cluster(1, 2);
    let (api, client) = (cluster.api(), client(&cluster, 0, 1));
    cluster.run_pods("web", &[(0, 0)]).unwrap();
    let range =
        object("networking.k8s.io/v1", "ServiceCIDR", "more").set("spec.cidrs", json!(["10.97.0.0/24"]));
    let late = service("late", &["10.97.0.10"]).port("http", "TCP", 80, TARGET).selector("app", "web");
    assert!(api.apply(&late).is_err(), "the API server took a VIP of no range");
    api.apply(&range).unwrap();
    eventually("the range is taken", || api.apply(&late).context("apply")).unwrap();
    tcp(&client, "10.97.0.10", 80, &["pod-1-1"]);
    // Nor when it goes.
    api.delete(&late).unwrap();
    api.delete(&range).unwrap();
    crate::silent(&client, "10.97.0.10", 80);
}
