//! A Service's life: it comes, grows, shrinks, changes and goes.

use serde_json::json;
use sheave_tests::{
    manifests::{Object, service},
    protocol::Transport,
    scene::TARGET,
};

use crate::{V4, V6, answered, client, cluster, dial, refused, serves, silent, tcp, web};

/// Z1, Z7: from no pod to one, two, none and three; gone and back under the same name, then with other VIPs.
#[test]
fn a_service_comes_scales_goes_and_comes_again() {
    let cluster = cluster(1, 4);
    let (api, client) = (cluster.api(), client(&cluster, 0, 3));
    silent(&client, V4, 80);
    api.apply(&web()).unwrap();
    refused(&client, V4, 80);
    refused(&client, V6, 80);
    let pods: Vec<Object> = (0..3).map(|pod| cluster.pod("web", 0, pod).unwrap()).collect();
    cluster.run(&pods[0]).unwrap();
    serves(&client, &["pod-1-1"]);
    cluster.run(&pods[1]).unwrap();
    serves(&client, &["pod-1-1", "pod-1-2"]);
    api.delete(&pods[0]).unwrap();
    api.delete(&pods[1]).unwrap();
    refused(&client, V4, 80);
    refused(&client, V6, 80);
    pods.iter().for_each(|pod| cluster.run(pod).unwrap());
    serves(&client, &["pod-1-1", "pod-1-2", "pod-1-3"]);

    api.delete(&web()).unwrap();
    silent(&client, V4, 80);
    silent(&client, V6, 80);
    api.apply(&web()).unwrap();
    serves(&client, &["pod-1-1", "pod-1-2", "pod-1-3"]);

    api.delete(&web()).unwrap();
    let elsewhere = service("web", &["10.96.0.11"]).port("http", "TCP", 80, TARGET).selector("app", "web");
    api.apply(&elsewhere).unwrap();
    tcp(&client, "10.96.0.11", 80, &["pod-1-1", "pod-1-2", "pod-1-3"]);
    silent(&client, V4, 80);
}

/// S7, S8: another number, another name; E5: a named target port that is another number in each pod; two protocols on
/// one port that go to two processes.
#[test]
fn ports_change() {
    let cluster = cluster(1, 3);
    let (api, client) = (cluster.api(), client(&cluster, 0, 2));
    api.apply(&web()).unwrap();
    cluster.run_pods("web", &[(0, 0)]).unwrap();
    serves(&client, &["pod-1-1"]);

    let base = service("web", &[V4, V6]).selector("app", "web");
    api.apply(&base.clone().port("http", "TCP", 8080, TARGET)).unwrap();
    tcp(&client, V4, 8080, &["pod-1-1"]);
    tcp(&client, V6, 8080, &["pod-1-1"]);
    refused(&client, V4, 80);

    api.apply(&base.clone().port("renamed", "TCP", 8080, TARGET)).unwrap();
    cluster.settle().unwrap();
    tcp(&client, V4, 8080, &["pod-1-1"]);

    // One number, two protocols, two target ports.
    let _dns = cluster.place(0, 0).unwrap().serve_as("dns", 5353).unwrap();
    api.apply(&base.clone().port("tcp", "TCP", 53, TARGET).port("udp", "UDP", 53, 5353)).unwrap();
    tcp(&client, V4, 53, &["pod-1-1"]);
    tcp(&client, V6, 53, &["pod-1-1"]);
    for vip in [V4, V6] {
        answered(&client, Transport::UdpConnected, dial(vip, 53), &["dns"]);
        answered(&client, Transport::UdpUnconnected, dial(vip, 53), &["dns"]);
    }
    refused(&client, V4, 8080);

    // The pods of a new release listen elsewhere, under the same name.
    let _new = cluster.place(0, 1).unwrap().serve_as("new release", 7777).unwrap();
    let named = |pod: usize, app: &str, port: u16| {
        cluster.pod(app, 0, pod).unwrap().container_port("http", "TCP", port)
    };
    api.delete(&cluster.pod("web", 0, 0).unwrap()).unwrap();
    cluster.run(&named(0, "web", TARGET)).unwrap();
    cluster.run(&named(1, "web", 7777)).unwrap();
    api.apply(&base.port("http", "TCP", 80, "http")).unwrap();
    tcp(&client, V4, 80, &["pod-1-1", "new release"]);
    tcp(&client, V6, 80, &["pod-1-1", "new release"]);
    let slices = cluster.endpoints("default", "web").unwrap();
    assert_eq!(slices.iter().filter(|endpoint| endpoint["ports"][0]["port"] == json!(7777)).count(), 2);
}

/// S1, S2: a Service that turns into ExternalName or headless is gone, and comes back. N1, S10: NodePort and back.
#[test]
fn types_change() {
    let cluster = cluster(1, 2);
    let (api, client) = (cluster.api(), client(&cluster, 0, 1));
    api.apply(&web()).unwrap();
    cluster.run_pods("web", &[(0, 0)]).unwrap();
    serves(&client, &["pod-1-1"]);
    let external = json!({"spec": {"type": "ExternalName", "externalName": "web.example.org", "clusterIP": null,
        "clusterIPs": null, "ipFamilies": null, "ipFamilyPolicy": null}});
    let back = json!({"spec": {"type": "ClusterIP", "externalName": null, "clusterIP": V4, "clusterIPs": [V4, V6],
        "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack"}});
    let headless = json!({"spec": {"type": "ClusterIP", "externalName": null, "clusterIP": "None",
        "clusterIPs": ["None"]}});

    api.patch(&web(), &external).unwrap();
    silent(&client, V4, 80);
    silent(&client, V6, 80);
    api.patch(&web(), &back).unwrap();
    serves(&client, &["pod-1-1"]);

    // The API lets a Service become headless only through ExternalName.
    api.patch(&web(), &external).unwrap();
    api.patch(&web(), &headless).unwrap();
    silent(&client, V4, 80);
    api.patch(&web(), &external).unwrap();
    api.patch(&web(), &back).unwrap();
    serves(&client, &["pod-1-1"]);

    let node = cluster.node(0).unwrap();
    let (own, host) = (node.host().v4().to_string(), node.host().client().unwrap());
    let node_port = json!([
        {"name": "http", "port": 80, "protocol": "TCP", "targetPort": TARGET, "nodePort": 30080},
        {"name": "dns", "port": 80, "protocol": "UDP", "targetPort": TARGET},
    ]);
    refused(&host, &own, 30080);
    api.patch(&web(), &json!({"spec": {"type": "NodePort", "ports": node_port}})).unwrap();
    for from in [&host, &client] {
        tcp(from, &own, 30080, &["pod-1-1"]);
        tcp(from, V4, 80, &["pod-1-1"]);
    }
    api.apply(&web()).unwrap();
    api.patch(&web(), &json!({"spec": {"type": "ClusterIP"}})).unwrap();
    // The node's own answer: nothing listens there.
    refused(&host, &own, 30080);
    serves(&client, &["pod-1-1"]);
}

/// S3: a Service with `service-proxy-name` of any value is another proxy's. The label `headless` on a Service means
/// nothing; on a slice it takes the slice away.
#[test]
fn labels_come_and_go() {
    const OTHER: &str = "service.kubernetes.io/service-proxy-name";
    const HEADLESS: &str = "service.kubernetes.io/headless";
    let cluster = cluster(1, 3);
    let (api, client) = (cluster.api(), client(&cluster, 0, 2));
    api.apply(&web()).unwrap();
    cluster.run_pods("web", &[(0, 0)]).unwrap();
    serves(&client, &["pod-1-1"]);
    for value in ["other", ""] {
        api.patch(&web(), &json!({"metadata": {"labels": {OTHER: value}}})).unwrap();
        silent(&client, V4, 80);
        silent(&client, V6, 80);
        api.patch(&web(), &json!({"metadata": {"labels": {OTHER: null}}})).unwrap();
        serves(&client, &["pod-1-1"]);
    }
    api.patch(&web(), &json!({"metadata": {"labels": {HEADLESS: ""}}})).unwrap();
    cluster.settle().unwrap();
    serves(&client, &["pod-1-1"]);

    // Hand-made, so that the controller does not take the label off.
    let slice = sheave_tests::manifests::slice("web-hand", "web", "IPv4")
        .slice_port("http", "TCP", TARGET)
        .endpoint(&cluster.place(0, 1).unwrap().v4().to_string(), "node-1");
    api.apply(&slice).unwrap();
    tcp(&client, V4, 80, &["pod-1-1", "pod-1-2"]);
    api.patch(&slice, &json!({"metadata": {"labels": {HEADLESS: ""}}})).unwrap();
    tcp(&client, V4, 80, &["pod-1-1"]);
    api.patch(&slice, &json!({"metadata": {"labels": {HEADLESS: null}}})).unwrap();
    tcp(&client, V4, 80, &["pod-1-1", "pod-1-2"]);
}
