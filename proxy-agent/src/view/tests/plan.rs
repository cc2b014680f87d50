use serde_json::{Value, json};

use super::*;
use crate::object::{PerFamily, Problem, SliceEndpoint};
use crate::view::plan;

fn json_of(model: &Model) -> Value {
    serde_json::to_value(plan(model)).unwrap()
}

fn simple_slice() -> Slice {
    let endpoint = SliceEndpoint { zone: Some("a".into()), ..on("n1", endpoint("10.244.1.5")) };
    Slice { ports: [slice_port("", 9876)].into(), ..slice("s", "svc", vec![endpoint]) }
}

#[test]
fn the_document_of_cli_json() {
    let problem = Problem {
        object: "Service ns/svc".into(),
        field: "spec.externalIPs[0]".into(),
        message: "not an address".into(),
    };
    let service = Service { problems: vec![problem], ..service("svc") };
    let expected = json!({
        "services": [{
            "namespace": "ns", "name": "svc", "port_name": "", "protocol": "TCP", "family": "IPv4",
            "frontends": [{"address": "10.96.0.7", "port": 80, "kind": "ClusterIP"}],
            "cluster_set": ["10.244.1.5:9876"], "local_set": null,
            "has_any_endpoints": true,
            "session_affinity_seconds": null, "source_ranges": [],
            "health_check_node_port": null, "local_ready_endpoints": 1,
            "endpoints": [{"address": "10.244.1.5", "port": 9876, "node": "n1", "zone": "a",
                "local": true, "ready": true, "serving": true, "terminating": false,
                "in_cluster_set": true, "in_local_set": false, "reason": "in the cluster set: ready"}]
        }],
        "problems": [
            {"object": "Service ns/svc", "field": "spec.externalIPs[0]", "message": "not an address"}
        ]
    });
    assert_eq!(json_of(&model_of(service, vec![simple_slice()])), expected);
}

#[test]
fn every_field_filled() {
    let service = Service {
        cluster_ip: PerFamily { v4: Some(ip("10.96.0.7")), v6: Some(ip("fd00:96::7")) },
        ports: vec![node_port("http", 80, 30080)],
        internal_local: true,
        external_local: true,
        affinity_timeout_s: Some(10_800),
        health_check_node_port: Some(32_000),
        load_balancer_ips: ips(&["203.0.113.1", "2001:db8:113::1"]),
        source_ranges: vec![net("198.51.100.0/24"), net("2001:db8:5::/48")],
        ..service("svc")
    };
    let document = json_of(&model_of(service, Vec::new()));
    assert_eq!(document["problems"], json!([]));
    assert_eq!(document["services"].as_array().unwrap().len(), 2);
    let v6 = &document["services"][1];
    assert_eq!(
        *v6,
        json!({
            "namespace": "ns", "name": "svc", "port_name": "http", "protocol": "TCP", "family": "IPv6",
            "frontends": [
                {"address": "2001:db8:113::1", "port": 80, "kind": "LoadBalancer"},
                {"address": "2001:db8::1", "port": 30080, "kind": "NodePort"},
                {"address": "fd00:96::7", "port": 80, "kind": "ClusterIP"},
            ],
            "cluster_set": [], "local_set": [], "has_any_endpoints": false,
            "session_affinity_seconds": 10800, "source_ranges": ["2001:db8:5::/48"],
            "health_check_node_port": 32000, "local_ready_endpoints": 0, "endpoints": [],
        })
    );
}

#[test]
fn s1_a_service_that_is_not_proxied_has_no_entry() {
    let service = Service { proxied: false, ..service("svc") };
    assert_eq!(json_of(&model_of(service, vec![simple_slice()])), json!({"services": [], "problems": []}));
}

#[test]
fn s12_a_loser_is_listed_without_the_frontend() {
    let mut loser = Service { external_ips: ips(&["203.0.113.1"]), ..service("b") };
    loser.cluster_ip.v4 = Some(ip("10.96.0.8"));
    let winner = Service { external_ips: ips(&["203.0.113.1"]), ..service("a") };
    let model = model_with(Policy::default(), vec![loser, winner], Vec::new());
    let document = json_of(&model);
    let frontends = |i: usize| document["services"][i]["frontends"].as_array().unwrap().len();
    assert_eq!((frontends(0), frontends(1)), (2, 1));
    assert_eq!(document["problems"][0]["object"], "Service ns/b");
    assert_eq!(document["problems"].as_array().unwrap().len(), 1);
}

#[test]
fn text_for_people() {
    let mut loser = Service { external_ips: ips(&["10.96.0.7"]), ..service("web") };
    loser.cluster_ip.v4 = Some(ip("10.96.0.8"));
    let affine = Service { affinity_timeout_s: Some(60), internal_local: true, ..service("svc") };
    let mut simple = simple_slice();
    let second = on("node-two", terminating(true, endpoint("10.244.2.50")));
    simple.endpoints = simple.endpoints.iter().cloned().chain([second]).collect();
    let model = model_with(Policy::default(), vec![loser, affine], vec![simple]);
    let expected = "\
ns/svc:/TCP IPv4
  ClusterIP     10.96.0.7:80
  cluster set   not used
  local set     1 endpoint
  affinity      by client, 60 s
  ENDPOINT          NODE      ZONE  WHY
  10.244.1.5:9876   n1        a     in the local set: ready on this node
  10.244.2.50:9876  node-two  -     no cluster set, as internalTrafficPolicy is Local and nothing external is there (P2); not in the local set: on node node-two (E8)

ns/web:/TCP IPv4
  ClusterIP     10.96.0.8:80
  cluster set   empty: such clients are refused
  local set     not used
  no endpoints

Problems:
  OBJECT          FIELD             MESSAGE
  Service ns/web  spec.externalIPs  ExternalIP 10.96.0.7:80/TCP of port \"\" belongs to Service port ns/svc:/TCP (S12)
";
    assert_eq!(plan(&model).to_string(), expected);
}
