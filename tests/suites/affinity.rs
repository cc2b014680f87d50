//! Session affinity with real sockets. A Service has many ports, and each is a choice of its own: one choice may repeat by
//! chance, forty do not.

#![expect(clippy::unwrap_used, reason = "the helpers of tests fail as tests do")]

use std::{collections::BTreeSet, thread, time::Duration};

use serde_json::{Value, json};
use sheave_tests::{
    client::Client,
    lab::Shape,
    manifests::{Object, lab_node, service},
    protocol::{Dial, Transport},
    scene::{Scene, TARGET, answers, at, reach, slices},
};

const V4: &str = "10.96.0.10";
const V6: &str = "fd00:10:96::10";
const EXTERNAL: &str = "203.0.113.9";
const BALANCER: &str = "203.0.113.80";
const NODE_V4: &str = "172.18.0.2";

/// So many ports: with two endpoints, all choices agree by chance once in 10^12 runs.
const PORTS: u16 = 40;
const FIRST_PORT: u16 = 8000;
const FIRST_NODE_PORT: u16 = 30000;

fn port_name(index: u16) -> String {
    format!("p{index}")
}

/// The Service with affinity, every port TCP.
fn sticky(name: &str, timeout_seconds: Option<u32>) -> Object {
    let node_ports: Vec<_> = (0..PORTS).map(|index| FIRST_NODE_PORT + index).collect();
    let service = (0..PORTS)
        .fold(service(name, &[V4, V6]), |service, index| {
            service.port(&port_name(index), "TCP", FIRST_PORT + index, TARGET)
        })
        .node_ports(&node_ports)
        .push("spec.externalIPs", EXTERNAL)
        .set("status.loadBalancer.ingress", json!([{"ip": BALANCER}]))
        .set("spec.sessionAffinity", "ClientIP");
    match timeout_seconds {
        Some(seconds) => service.set("spec.sessionAffinityConfig.clientIP.timeoutSeconds", seconds),
        None => service,
    }
}

/// Endpoints in pods of any node, as (node, pod), for all ports of the Service.
fn endpoints(scene: &Scene, name: &str, pods: &[(usize, usize)]) -> Vec<Object> {
    let lab = scene.lab();
    let place = |&(node, pod): &(usize, usize)| {
        let node = lab.node(node).unwrap();
        (node, node.pod(pod).unwrap())
    };
    let places: Vec<_> = pods.iter().map(place).collect();
    let ports: Vec<_> = (0..PORTS)
        .map(|index| json!({"name": port_name(index), "protocol": "TCP", "port": TARGET}))
        .collect();
    slices(name, "", "TCP", &places).into_iter().map(|slice| slice.set("ports", ports.clone())).collect()
}

/// The Service and its endpoints, in files of their own.
fn apply(scene: &Scene, service: Object, pods: &[(usize, usize)]) {
    scene.lab().manifests().write("service", &[service]).unwrap();
    scene.apply("endpoints", &endpoints(scene, "web", pods)).unwrap();
}

/// Who answers on each port.
fn choices(client: &Client, address: &str, first_port: u16) -> Vec<String> {
    let choice = |index| {
        let dial = Dial::new(at(address, first_port + index).unwrap());
        reach(client, Transport::Tcp, dial).unwrap().answer.unwrap()
    };
    (0..PORTS).map(choice).collect()
}

/// The usual stage: three pods of the first node serve, and there are others to dial from.
fn scene() -> Scene {
    let mut scene = Scene::new(6).unwrap();
    scene.serve().unwrap();
    scene
}

const THREE: [(usize, usize); 3] = [(0, 0), (0, 1), (0, 2)];

/// A1, A2: one client has one endpoint on each service port; ports, clients and families are independent.
#[test]
fn a1_a2_one_endpoint_per_client_and_port() {
    let scene = scene();
    apply(&scene, sticky("web", None), &THREE);
    let clients = [3, 4].map(|pod| scene.pod(pod).unwrap().client().unwrap());
    let host = scene.node().unwrap().host().client().unwrap();
    let mut seen = BTreeSet::new();
    for client in clients.iter().chain([&host]) {
        for address in [V4, V6] {
            let first = choices(client, address, FIRST_PORT);
            for _ in 0..3 {
                assert_eq!(choices(client, address, FIRST_PORT), first);
            }
            let different: BTreeSet<_> = first.iter().collect();
            assert!(different.len() > 1, "all {PORTS} ports chose {different:?}");
            assert!(seen.insert(first), "two clients or families chose alike on all ports");
        }
    }
    // Two processes of one pod are one client.
    let again = scene.pod(3).unwrap().client().unwrap();
    assert_eq!(choices(&again, V4, FIRST_PORT), choices(&clients[0], V4, FIRST_PORT));
    let dial = Dial::new(at(V4, FIRST_PORT).unwrap()).mapped();
    assert_eq!(answers(&again, Transport::Tcp, dial, 20).unwrap().len(), 1);
}

/// A2, A8: every frontend of a service port gives the same endpoint, to pods and to the node.
#[test]
fn a2_the_same_endpoint_over_every_frontend() {
    let scene = scene();
    apply(&scene, sticky("web", None), &THREE);
    for place in [scene.pod(3).unwrap(), scene.node().unwrap().host()] {
        let client = place.client().unwrap();
        let first = choices(&client, NODE_V4, FIRST_NODE_PORT);
        for address in [V4, EXTERNAL, BALANCER] {
            assert_eq!(choices(&client, address, FIRST_PORT), first, "{address}");
        }
    }
}

/// A1 for UDP: a connected and an unconnected socket are the same client.
#[test]
fn a1_udp() {
    let scene = scene();
    let node = scene.node().unwrap();
    let places = [0, 1, 2].map(|pod| (node, node.pod(pod).unwrap()));
    let service = (0..PORTS)
        .fold(service("web", &[V4]), |service, index| {
            service.port(&port_name(index), "UDP", FIRST_PORT + index, TARGET)
        })
        .set("spec.sessionAffinity", "ClientIP");
    let ports: Vec<_> = (0..PORTS)
        .map(|index| json!({"name": port_name(index), "protocol": "UDP", "port": TARGET}))
        .collect();
    let mut objects = vec![service];
    objects.extend(slices("web", "", "UDP", &places).into_iter().map(|s| s.set("ports", ports.clone())));
    scene.apply("web", &objects).unwrap();
    let client = scene.pod(3).unwrap().client().unwrap();
    for index in 0..PORTS {
        let dial = Dial::new(at(V4, FIRST_PORT + index).unwrap());
        let connected = answers(&client, Transport::UdpConnected, dial, 4).unwrap();
        let unconnected = answers(&client, Transport::UdpUnconnected, dial, 4).unwrap();
        assert_eq!(connected.len(), 1);
        assert_eq!(connected, unconnected);
    }
}

/// A3: the time runs from the last new connection, so use keeps it alive; left alone it ends.
#[test]
fn a3_time_out_and_renewal() {
    let scene = scene();
    apply(&scene, sticky("web", Some(3)), &THREE);
    let client = scene.pod(3).unwrap().client().unwrap();
    let first = choices(&client, V4, FIRST_PORT);
    for _ in 0..4 {
        thread::sleep(Duration::from_millis(1200));
        assert_eq!(choices(&client, V4, FIRST_PORT), first);
    }
    thread::sleep(Duration::from_millis(3200));
    assert_ne!(choices(&client, V4, FIRST_PORT), first);
}

/// A4: an endpoint that left is not used; who had another one keeps it; the one that comes back draws nobody back.
#[test]
fn a4_an_endpoint_that_leaves() {
    let scene = scene();
    apply(&scene, sticky("web", None), &THREE);
    let (busy, idle) = (scene.pod(3).unwrap().client().unwrap(), scene.pod(4).unwrap().client().unwrap());
    let first = choices(&busy, V4, FIRST_PORT);
    let idle_first = choices(&idle, V4, FIRST_PORT);

    apply(&scene, sticky("web", None), &THREE[1..]);
    let second = choices(&busy, V4, FIRST_PORT);
    for (before, after) in first.iter().zip(&second) {
        assert_ne!(after, "pod-1-1");
        assert!(before == "pod-1-1" || before == after, "{before} was there and changed to {after}");
    }
    assert_eq!(choices(&busy, V4, FIRST_PORT), second, "the new choice is kept too");

    apply(&scene, sticky("web", None), &THREE);
    assert_eq!(choices(&busy, V4, FIRST_PORT), second);
    // This client did not notice; its entries for the endpoint are gone all the same.
    let idle_second = choices(&idle, V4, FIRST_PORT);
    let drawn = |choices: &[String]| choices.iter().filter(|name| *name == "pod-1-1").count();
    let had: Vec<_> = idle_first.iter().zip(idle_second).filter(|(name, _)| *name == "pod-1-1").collect();
    let back: Vec<_> = had.iter().map(|(_, after)| after.clone()).collect();
    assert!(drawn(&back) < back.len(), "all {} choices of a former endpoint came back", back.len());
}

/// A4: a client that uses both sets keeps its place in each, and takes the other set's endpoint where it may.
#[test]
fn a4_both_sets_have_a_place_of_their_own() {
    let mut scene = Scene::with(Shape { nodes: 2, pods: 3 }, &[]).unwrap();
    scene.serve().unwrap();
    // Without the Node's pod range a pod gets the local set from outside (P11).
    let node =
        lab_node(scene.node().unwrap()).set("spec.podCIDR", Value::Null).set("spec.podCIDRs", Value::Null);
    scene.lab().manifests().write("node", &[node]).unwrap();
    let service = sticky("web", None).set("spec.externalTrafficPolicy", "Local");
    apply(&scene, service, &[(0, 0), (0, 1), (1, 0), (1, 1)]);
    let local = ["pod-1-1", "pod-1-2"];

    let client = scene.pod(2).unwrap().client().unwrap();
    let cluster = choices(&client, V4, FIRST_PORT);
    let external = choices(&client, NODE_V4, FIRST_NODE_PORT);
    for (cluster, external) in cluster.iter().zip(&external) {
        assert!(local.contains(&external.as_str()), "{external}");
        assert!(cluster == external || !local.contains(&cluster.as_str()), "{cluster} could be taken over");
    }
    assert!(cluster.iter().any(|name| !local.contains(&name.as_str())), "{cluster:?}");
    for _ in 0..3 {
        assert_eq!(choices(&client, V4, FIRST_PORT), cluster);
        assert_eq!(choices(&client, NODE_V4, FIRST_NODE_PORT), external);
    }
}

/// A5: the fallback set of terminating endpoints keeps clients as any set does.
#[test]
fn a5_terminating_endpoints() {
    let scene = scene();
    let going = |object: Object| {
        (0..3).fold(object, |object, index| {
            let conditions = json!({"ready": false, "serving": true, "terminating": true});
            object.set(&format!("endpoints.{index}.conditions"), conditions)
        })
    };
    let client = scene.pod(3).unwrap().client().unwrap();
    scene.lab().manifests().write("service", &[sticky("web", None)]).unwrap();
    let slices = endpoints(&scene, "web", &THREE);
    scene.apply("endpoints", &slices).unwrap();
    let ready = choices(&client, V4, FIRST_PORT);
    let slices: Vec<_> = slices.into_iter().map(going).collect();
    scene.apply("endpoints", &slices).unwrap();
    // The endpoints never left the set; only the reason for which they are in it changed.
    for _ in 0..3 {
        assert_eq!(choices(&client, V4, FIRST_PORT), ready);
    }
    let fresh = scene.pod(4).unwrap().client().unwrap();
    let first = choices(&fresh, V4, FIRST_PORT);
    assert_eq!(choices(&fresh, V4, FIRST_PORT), first);
}

/// A6: a change of other endpoints and a restart of the agent leave it alone.
#[test]
fn a6_survives_changes_and_restarts() {
    let mut scene = scene();
    apply(&scene, sticky("web", None), &THREE[..2]);
    let clients = [3, 4].map(|pod| scene.pod(pod).unwrap().client().unwrap());
    let first = clients.each_ref().map(|client| choices(client, V4, FIRST_PORT));
    let same = |what: &str| {
        assert_eq!(clients.each_ref().map(|client| choices(client, V4, FIRST_PORT)), first, "{what}");
    };
    apply(&scene, sticky("web", None), &THREE);
    same("another endpoint came");
    apply(&scene, sticky("web", None), &THREE[..2]);
    same("it went");
    scene.take_agent().unwrap().kill().unwrap();
    same("no agent runs");
    scene.start_agent().unwrap();
    same("the agent came back");
    apply(&scene, sticky("web", None), &THREE);
    same("and another endpoint after it");
}

/// A6: off is off, and on again is a new start. A7: so is another Service on the same VIP with the same endpoints.
#[test]
fn a6_a7_off_and_on_and_another_service() {
    let scene = scene();
    let client = scene.pod(3).unwrap().client().unwrap();
    let off = sticky("web", None).set("spec.sessionAffinity", "None");
    apply(&scene, sticky("web", None), &THREE);
    let first = choices(&client, V4, FIRST_PORT);
    apply(&scene, off.clone(), &THREE);
    let dial = Dial::new(at(V4, FIRST_PORT).unwrap());
    assert_eq!(answers(&client, Transport::Tcp, dial, 100).unwrap().len(), 3);
    apply(&scene, sticky("web", None), &THREE);
    let second = choices(&client, V4, FIRST_PORT);
    assert_ne!(second, first);
    assert_eq!(choices(&client, V4, FIRST_PORT), second);
    // Nobody connects while it is off.
    apply(&scene, off, &THREE);
    apply(&scene, sticky("web", None), &THREE);
    let third = choices(&client, V4, FIRST_PORT);
    assert_ne!(third, second);

    scene.lab().manifests().write("service", &[sticky("other", None)]).unwrap();
    scene.apply("endpoints", &endpoints(&scene, "other", &THREE)).unwrap();
    assert_ne!(choices(&client, V4, FIRST_PORT), third);
}

/// A6: a changed time-out rules the entries that are there already.
#[test]
fn a6_a_changed_time_out() {
    let scene = scene();
    let client = scene.pod(3).unwrap().client().unwrap();
    apply(&scene, sticky("web", Some(86_400)), &THREE);
    let first = choices(&client, V4, FIRST_PORT);
    apply(&scene, sticky("web", Some(10_000)), &THREE);
    assert_eq!(choices(&client, V4, FIRST_PORT), first);
    apply(&scene, sticky("web", Some(1)), &THREE);
    thread::sleep(Duration::from_millis(1300));
    assert_ne!(choices(&client, V4, FIRST_PORT), first);
}

/// `sheave explain` of a running agent names the endpoint that a client has, and for how long.
#[test]
fn explain_shows_the_affinity_of_a_client() {
    let scene = scene();
    apply(&scene, sticky("web", Some(100)), &THREE);
    let pod = scene.pod(3).unwrap();
    let client = pod.client().unwrap();
    let explain = |address: &str| -> Value {
        let (from, to) = (pod.v4().to_string(), format!("{address}/TCP"));
        let arguments = ["explain", "--from", &from, "--to", &to, "-o", "json"];
        serde_json::from_slice(&scene.agent().unwrap().ask(&arguments).unwrap().stdout).unwrap()
    };
    let vip = at(V4, FIRST_PORT).unwrap();
    assert_eq!(explain(&vip.to_string())["affinity"], Value::Null);
    let name = reach(&client, Transport::Tcp, Dial::new(vip)).unwrap().answer.unwrap();
    let backend = scene.node().unwrap().pods().iter().find(|pod| pod.name() == name).unwrap();
    let expected = format!("{}:{TARGET}", backend.v4());
    // By any frontend of the service port.
    for address in [vip.to_string(), format!("{NODE_V4}:{FIRST_NODE_PORT}")] {
        let explanation = explain(&address);
        assert_eq!(explanation["affinity"]["endpoint"], json!(expected), "{explanation}");
        let left = explanation["affinity"]["expires_in_seconds"].as_u64().unwrap();
        assert!((60..=100).contains(&left), "{explanation}");
        assert_eq!(explanation["verdict"], json!("forward"));
    }
    assert_eq!(explain(&at(V4, FIRST_PORT + 1).unwrap().to_string())["affinity"], Value::Null);
}

/// A4: what `sheave explain` shows is what rules this client: not the other set's choice because that is younger, nothing
/// that is in no set any more, and not what another client of this machine has.
#[test]
fn a4_explain_shows_what_rules() {
    let mut scene = Scene::with(Shape { nodes: 2, pods: 2 }, &[]).unwrap();
    scene.serve().unwrap();
    for node in scene.lab().nodes() {
        scene.lab().manifests().write(node.name(), &[lab_node(node)]).unwrap();
    }
    let both = [(0, 0), (1, 0)];
    let service = || sticky("web", Some(1000)).set("spec.internalTrafficPolicy", "Local");
    apply(&scene, service(), &both);
    let pod = scene.pod(1).unwrap();
    let client = pod.client().unwrap();
    let affinity = |from: &str, to: std::net::SocketAddr| -> Value {
        let to = format!("{to}/TCP");
        let arguments = ["explain", "--from", from, "--to", &to, "-o", "json"];
        let output = scene.agent().unwrap().ask(&arguments).unwrap();
        let explanation: Value = serde_json::from_slice(&output.stdout).unwrap();
        explanation["affinity"]["endpoint"].clone()
    };
    let [here, there] = both.map(|(node, pod)| {
        let pod = scene.lab().node(node).unwrap().pod(pod).unwrap();
        (pod.name().to_owned(), json!(format!("{}:{TARGET}", pod.v4())))
    });
    let ask = |port| reach(&client, Transport::Tcp, Dial::new(at(NODE_V4, port).unwrap())).unwrap().answer;
    // The cluster set rules NodePorts, and some port chooses the other node's endpoint.
    let index = (0..PORTS).find(|index| ask(FIRST_NODE_PORT + index) == Some(there.0.clone())).unwrap();
    let cluster_ip = at(V4, FIRST_PORT + index).unwrap();
    let node_port = at(NODE_V4, FIRST_NODE_PORT + index).unwrap();
    let from = pod.v4().to_string();
    assert_eq!(affinity(&from, node_port), there.1);
    assert_eq!(affinity(&from, cluster_ip), Value::Null, "an endpoint that is not in the local set");
    assert_eq!(reach(&client, Transport::Tcp, Dial::new(cluster_ip)).unwrap().answer, Some(here.0));
    ask(FIRST_NODE_PORT + index);
    assert_eq!([cluster_ip, node_port].map(|to| affinity(&from, to)), [here.1.clone(), there.1]);
    // Every namespace has a loopback address.
    assert_eq!(affinity("127.0.0.1", cluster_ip), Value::Null);
    // What is in no set any more does not count; the other set's choice does, where it is in this one.
    apply(&scene, service(), &both[..1]);
    assert_eq!([cluster_ip, node_port].map(|to| affinity(&from, to)), [here.1.clone(), here.1]);
}
