//! Agents that follow a real API server with its real controllers, with the role of `deploy/`; after each step real
//! connections from the nodes' pods.

#![expect(clippy::unwrap_used, reason = "the helpers of tests fail as tests do")]

mod lifecycle;
mod outages;
mod peer;
mod policy;
mod rights;
mod rolling;
mod slices;

use std::time::Duration;

use anyhow::ensure;
use sheave_tests::{
    client::Client,
    kubernetes::cluster::Cluster,
    lab::Shape,
    manifests::{Object, service},
    protocol::{Dial, Transport},
    scene::{ENOUGH, TARGET, answers, at, eventually, fail, names, reach, socket_kinds},
};

/// The VIPs of `web`.
const V4: &str = "10.96.0.10";
const V6: &str = "fd00:10:96::10";

/// What nobody answers is given up after this; what works takes a millisecond.
const SOON: Duration = Duration::from_millis(700);

/// The Service of most tests: both families, both protocols on one port, the pods with the label `app=web`.
fn web() -> Object {
    service("web", &[V4, V6])
        .port("http", "TCP", 80, TARGET)
        .port("dns", "UDP", 80, TARGET)
        .selector("app", "web")
}

/// Nodes with pods, a server in each, and an agent on each node.
fn cluster(nodes: u8, pods: u8) -> Cluster {
    let mut cluster = Cluster::new(Shape { nodes, pods }).unwrap();
    cluster.serve().unwrap();
    cluster
}

/// A client in a pod of a node.
fn client(cluster: &Cluster, node: usize, pod: usize) -> Client {
    cluster.place(node, pod).unwrap().client().unwrap()
}

fn dial(address: &str, port: u16) -> Dial {
    Dial::new(at(address, port).unwrap()).timeout(SOON)
}

/// `web` on every kind of socket: soon exactly these answer.
fn serves(client: &Client, expected: &[&str]) {
    for (transport, dial, vip) in socket_kinds(V4, V6, 80).unwrap() {
        answered(client, transport, dial.timeout(SOON), expected);
        let exchange = reach(client, transport, dial).unwrap();
        assert_eq!(exchange.peer.or(exchange.source), Some(vip));
    }
}

/// A VIP: soon exactly these answer.
fn answered(client: &Client, transport: Transport, dial: Dial, expected: &[&str]) {
    let what = format!("{expected:?} answer, {transport:?} to {}", dial.to);
    eventually(&what, || {
        // Many attempts that fail take long.
        reach(client, transport, dial)?;
        let found = answers(client, transport, dial, ENOUGH)?;
        ensure!(found == names(expected), "{found:?}");
        Ok(())
    })
    .unwrap();
}

/// The same for TCP.
fn tcp(client: &Client, address: &str, port: u16, expected: &[&str]) {
    answered(client, Transport::Tcp, dial(address, port), expected);
}

/// Soon a VIP refuses at once: it is known and has no endpoint (Z1), or not this port (Z6).
fn refused(client: &Client, address: &str, port: u16) {
    eventually(&format!("{address}:{port} refuses"), || {
        let failure = fail(client, Transport::Tcp, dial(address, port))?;
        ensure!(failure.is_refused(), "{failure}");
        Ok(())
    })
    .unwrap();
}

/// Soon nobody translates an address: the lab's network swallows it. A drop (Z2) looks the same.
fn silent(client: &Client, address: &str, port: u16) {
    eventually(&format!("{address}:{port} is silent"), || {
        let failure = fail(client, Transport::Tcp, dial(address, port))?;
        ensure!(failure.is_timeout(), "{failure}");
        Ok(())
    })
    .unwrap();
}
