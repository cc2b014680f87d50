//! Who may reach which endpoint: hints that the controller makes, traffic policies, affinity, families, and the own Node.

use std::thread;
use std::time::Duration;

use anyhow::ensure;
use serde_json::{Value, json};
use sheave_tests::{
    client::Client,
    kubernetes::cluster::Cluster,
    manifests::{Object, lab_node, service, slice},
    protocol::Transport,
    scene::{ENOUGH, TARGET, answers, eventually},
};

use crate::{V4, V6, client, cluster, dial, serves, silent, tcp, web};

const ZONE: &str = "topology.kubernetes.io/zone";

/// `web` with something else in its spec.
fn with(key: &str, value: impl Into<Value>) -> Object {
    web().set(&format!("spec.{key}"), value)
}

fn move_to_zone(cluster: &Cluster, node: usize, zone: Option<&str>) {
    let object = lab_node(cluster.node(node).unwrap());
    cluster.api().patch(&object, &json!({"metadata": {"labels": {ZONE: zone}}})).unwrap();
}

/// P6, P7: the controller's hints for `trafficDistribution`: same zone, same node, and none; a zone without endpoints
/// takes all.
#[test]
fn hints_of_the_controller() {
    let cluster = cluster(3, 2);
    let (api, clients) = (cluster.api(), [0, 1, 2].map(|node| client(&cluster, node, 1)));
    move_to_zone(&cluster, 2, Some("zone-1"));
    api.apply(&web()).unwrap();
    cluster.run_pods("web", &[(0, 0), (1, 0), (2, 0)]).unwrap();
    let all = ["pod-1-1", "pod-2-1", "pod-3-1"];
    clients.iter().for_each(|client| serves(client, &all));

    api.apply(&with("trafficDistribution", "PreferSameZone")).unwrap();
    let first_zone = ["pod-1-1", "pod-3-1"];
    serves(&clients[0], &first_zone);
    serves(&clients[1], &["pod-2-1"]);
    serves(&clients[2], &first_zone);
    let hinted = cluster.endpoints("default", "web").unwrap();
    assert!(hinted.iter().all(|e| e["endpoint"]["hints"]["forZones"].is_array()), "{hinted:?}");

    api.apply(&with("trafficDistribution", "PreferSameNode")).unwrap();
    serves(&clients[0], &["pod-1-1"]);
    serves(&clients[1], &["pod-2-1"]);
    serves(&clients[2], &["pod-3-1"]);

    // The own node has none any more, but the zone has; then the zone has none either.
    api.delete(&cluster.pod("web", 2, 0).unwrap()).unwrap();
    serves(&clients[2], &["pod-1-1"]);
    api.delete(&cluster.pod("web", 0, 0).unwrap()).unwrap();
    serves(&clients[2], &["pod-2-1"]);
    serves(&clients[0], &["pod-2-1"]);

    cluster.run_pods("web", &[(0, 0), (2, 0)]).unwrap();
    api.apply(&web()).unwrap();
    clients.iter().for_each(|client| serves(client, &all));
}

/// P1, P2, P10, Z2: `internalTrafficPolicy: Local` and back. P11: eTP Local does not bind the node's own clients.
#[test]
fn traffic_policies() {
    let cluster = cluster(2, 2);
    let (api, clients) = (cluster.api(), [0, 1].map(|node| client(&cluster, node, 1)));
    api.apply(&web()).unwrap();
    cluster.run_pods("web", &[(0, 0), (1, 0)]).unwrap();
    clients.iter().for_each(|client| serves(client, &["pod-1-1", "pod-2-1"]));
    api.apply(&with("internalTrafficPolicy", "Local")).unwrap();
    serves(&clients[0], &["pod-1-1"]);
    serves(&clients[1], &["pod-2-1"]);
    // Dropped where the pod is missing, at work where it is not.
    api.delete(&cluster.pod("web", 1, 0).unwrap()).unwrap();
    silent(&clients[1], V4, 80);
    silent(&clients[1], V6, 80);
    serves(&clients[0], &["pod-1-1"]);
    api.apply(&web()).unwrap();
    clients.iter().for_each(|client| serves(client, &["pod-1-1"]));

    let node_port =
        with("type", "NodePort").set("spec.externalTrafficPolicy", "Local").node_ports(&[30080, 30080]);
    api.apply(&node_port).unwrap();
    let (own, host) = (cluster.node(1).unwrap().host().v4().to_string(), cluster.node(1).unwrap().host());
    let host = host.client().unwrap();
    for from in [&host, &clients[1]] {
        tcp(from, &own, 30080, &["pod-1-1"]);
    }
}

/// A1, A3, A4, A6: affinity on, off, and with a timeout that passes.
#[test]
fn affinity() {
    let cluster = cluster(1, 4);
    let (api, client) = (cluster.api(), client(&cluster, 0, 3));
    let all = ["pod-1-1", "pod-1-2", "pod-1-3"];
    api.apply(&web()).unwrap();
    cluster.run_pods("web", &[(0, 0), (0, 1), (0, 2)]).unwrap();
    serves(&client, &all);
    let sticky = |seconds: u32| {
        with("sessionAffinity", "ClientIP").set("spec.sessionAffinityConfig.clientIP.timeoutSeconds", seconds)
    };
    api.apply(&sticky(3600)).unwrap();
    let one = |client: &Client| {
        let mut found = answers(client, Transport::Tcp, dial(V4, 80), ENOUGH)?;
        ensure!(found.len() == 1, "{found:?}");
        anyhow::Ok(found.pop_first().unwrap())
    };
    let first = eventually("the client stays", || one(&client)).unwrap();
    assert_eq!(one(&client).unwrap(), first);
    // Other endpoints come and go.
    let other = all.iter().position(|name| *name != first).unwrap();
    api.delete(&cluster.pod("web", 0, other).unwrap()).unwrap();
    eventually("the slices know", || {
        let count = cluster.endpoints("default", "web")?.len();
        ensure!(count == 4, "{count}");
        Ok(())
    })
    .unwrap();
    cluster.settle().unwrap();
    assert_eq!(one(&client).unwrap(), first);

    // A shorter timeout rules old entries, too. Each try finds another pod half of the time.
    api.apply(&sticky(2)).unwrap();
    cluster.settle().unwrap();
    let moved = (0..30).any(|_| {
        thread::sleep(Duration::from_millis(2500));
        one(&client).is_ok_and(|found| found != first)
    });
    assert!(moved, "an entry outlives its timeout");

    cluster.run_pods("web", &[(0, other)]).unwrap();
    api.apply(&web()).unwrap();
    serves(&client, &all);
}

/// S4: one family that gets a second, in both orders; and back to one.
#[test]
fn families_in_both_orders() {
    let cluster = cluster(1, 2);
    let (api, client) = (cluster.api(), client(&cluster, 0, 1));
    cluster.run_pods("web", &[(0, 0)]).unwrap();
    for (name, first, second) in
        [("four", "10.96.0.20", "fd00:10:96::20"), ("six", "fd00:10:96::30", "10.96.0.30")]
    {
        let make = |vips: &[&str]| service(name, vips).port("http", "TCP", 80, TARGET).selector("app", "web");
        api.apply(&make(&[first])).unwrap();
        tcp(&client, first, 80, &["pod-1-1"]);
        silent(&client, second, 80);
        api.apply(&make(&[first, second])).unwrap();
        tcp(&client, second, 80, &["pod-1-1"]);
        tcp(&client, first, 80, &["pod-1-1"]);
        let made = api.get(&make(&[first])).unwrap();
        assert_eq!(made["spec"]["clusterIPs"], json!([first, second]));
        api.apply(&make(&[first])).unwrap();
        silent(&client, second, 80);
        tcp(&client, first, 80, &["pod-1-1"]);
    }
}

/// P7, P9, O4: the own Node's zone changes, its label goes, the Node itself goes and comes back.
#[test]
fn the_own_node_changes_and_goes() {
    let mut cluster = cluster(1, 3);
    let (api, client) = (cluster.api(), client(&cluster, 0, 2));
    let node = lab_node(cluster.node(0).unwrap());
    api.apply(&service("web", &[V4]).port("http", "TCP", 80, TARGET)).unwrap();
    // By hand: the controller forgets the endpoints of a node that is gone.
    let hinted = [0, 1].into_iter().fold(slice("web-hand", "web", "IPv4"), |slice, pod| {
        let address = cluster.place(0, pod).unwrap().v4().to_string();
        slice.push(
            "endpoints",
            json!({"addresses": [address], "nodeName": "somewhere",
                "hints": {"forZones": [{"name": format!("zone-{}", pod + 1)}]}}),
        )
    });
    api.apply(&hinted.slice_port("http", "TCP", TARGET)).unwrap();
    tcp(&client, V4, 80, &["pod-1-1"]);
    move_to_zone(&cluster, 0, Some("zone-2"));
    tcp(&client, V4, 80, &["pod-1-2"]);
    move_to_zone(&cluster, 0, None);
    tcp(&client, V4, 80, &["pod-1-1", "pod-1-2"]);
    move_to_zone(&cluster, 0, Some("zone-2"));
    tcp(&client, V4, 80, &["pod-1-2"]);
    api.delete(&node).unwrap();
    cluster.settle().unwrap();
    // The last zone stays, as long as the agent.
    tcp(&client, V4, 80, &["pod-1-2"]);
    cluster.take_agent(0).unwrap().kill().unwrap();
    cluster.spawn_agent(0).unwrap();
    cluster.wait_synced(0).unwrap();
    assert_eq!(cluster.agent(0).unwrap().status().unwrap()["node_found"], json!(false));
    tcp(&client, V4, 80, &["pod-1-1", "pod-1-2"]);
    api.create(&node.clone().label(ZONE, "zone-1")).unwrap();
    tcp(&client, V4, 80, &["pod-1-1"]);
}
