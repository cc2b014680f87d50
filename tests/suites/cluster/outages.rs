//! The agent, the API server or its history is gone for a while: what was known goes on, and what changed meanwhile is
//! made good.

use std::{thread, time::Duration};

use anyhow::ensure;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sheave_tests::{
    kubernetes::cluster::Cluster,
    manifests::service,
    protocol::{LoopSpec, Transport},
    scene::{ENOUGH, TARGET, answers, eventually_within, names},
};

use crate::{V4, V6, client, cluster, dial, refused, serves, silent, tcp, web};

/// How long the API server is away.
const AWAY: Duration = Duration::from_secs(30);

/// After that long without an answer everybody asks twice a minute at least.
const BACK_WITHIN: Duration = Duration::from_secs(180);

/// Between two attempts of a loop in the background.
const PAUSE: Duration = Duration::from_millis(5);

/// Q1, Q2, Q8: what changes while no agent runs is made good by the next, and nothing breaks before.
#[test]
fn changes_while_the_agent_is_down() {
    let mut cluster = cluster(1, 4);
    let (api, client) = (cluster.api(), client(&cluster, 0, 3));
    let gone = service("gone", &["10.96.0.20"]).port("http", "TCP", 80, TARGET).selector("app", "web");
    api.apply_all(&[web(), gone.clone()]).unwrap();
    cluster.run_pods("web", &[(0, 0), (0, 1)]).unwrap();
    serves(&client, &["pod-1-1", "pod-1-2"]);
    tcp(&client, "10.96.0.20", 80, &["pod-1-1", "pod-1-2"]);
    let attempts = client.start_loop(LoopSpec::new(Transport::Tcp, dial(V4, 80)).pause(PAUSE)).unwrap();

    cluster.take_agent(0).unwrap().kill().unwrap();
    api.delete(&gone).unwrap();
    api.delete(&cluster.pod("web", 0, 0).unwrap()).unwrap();
    cluster.run_pods("web", &[(0, 2)]).unwrap();
    api.apply(&service("new", &["10.96.0.30"]).port("http", "TCP", 80, TARGET).selector("app", "web"))
        .unwrap();
    serves(&client, &["pod-1-1", "pod-1-2"]);
    silent(&client, "10.96.0.30", 80);

    cluster.spawn_agent(0).unwrap();
    cluster.wait_synced(0).unwrap();
    serves(&client, &["pod-1-2", "pod-1-3"]);
    tcp(&client, "10.96.0.30", 80, &["pod-1-2", "pod-1-3"]);
    silent(&client, "10.96.0.20", 80);
    let report = client.stop_loop(attempts).unwrap();
    assert_eq!(report.failed(), 0, "{:?}", report.first_failures);
}

/// Q1, Q7: the API server is away for half a minute. Connections go on on both nodes; also where the agent is restarted
/// meanwhile, which then has nobody to ask. When the server is back, changes come through.
#[test]
fn the_api_server_is_away() {
    let mut cluster = cluster(2, 3);
    let (api, clients) = (cluster.api(), [0, 1].map(|node| client(&cluster, node, 2)));
    api.apply(&web()).unwrap();
    cluster.run_pods("web", &[(0, 0)]).unwrap();
    clients.iter().for_each(|client| serves(client, &["pod-1-1"]));
    let attempts = LoopSpec::new(Transport::Tcp, dial(V4, 80)).pause(PAUSE);
    let loops = clients.each_ref().map(|client| client.start_loop(attempts).unwrap());
    cluster.control_mut().stop_api_server().unwrap();
    thread::sleep(AWAY / 2);
    cluster.take_agent(0).unwrap().kill().unwrap();
    cluster.spawn_agent(0).unwrap();
    thread::sleep(AWAY / 2);
    clients.iter().for_each(|client| serves(client, &["pod-1-1"]));
    let status = cluster.agent(0).unwrap().status().unwrap();
    assert_eq!((&status["synced"], &status["writes"]), (&json!(false), &json!(0)), "{status}");

    cluster.control_mut().restart_api_server().unwrap();
    cluster.wait_synced(0).unwrap();
    clients.iter().for_each(|client| serves(client, &["pod-1-1"]));
    cluster.run_pods("web", &[(0, 1)]).unwrap();
    // The controllers and the other agent may have just begun the longest of their waits.
    eventually_within(BACK_WITHIN, "everybody is back", || {
        for client in &clients {
            let found = answers(client, Transport::Tcp, dial(V4, 80), ENOUGH)?;
            ensure!(found == names(&["pod-1-1", "pod-1-2"]), "{found:?}");
        }
        Ok(())
    })
    .unwrap();
    for (client, attempts) in clients.iter().zip(loops) {
        serves(client, &["pod-1-1", "pod-1-2"]);
        let report = client.stop_loop(attempts).unwrap();
        assert_eq!(report.failed(), 0, "{:?}", report.first_failures);
        assert!(report.attempts > 1000, "{}", report.attempts);
    }
}

/// How often the agents have listed Services and slices.
fn lists(cluster: &Cluster) -> (usize, usize) {
    let audit = cluster.control().audit().unwrap();
    let count = |kind: &str| {
        let list = |entry: &&Value| entry["verb"] == "list" && entry["objectRef"]["resource"] == kind;
        audit.iter().filter(list).count()
    };
    (count("services"), count("endpointslices"))
}

/// Q7: the agent sleeps, the API server is restarted and etcd forgets what was. The watches end with 410, the agent lists
/// again, and a Service that was deleted meanwhile is gone.
#[test]
fn the_history_is_compacted() {
    let mut cluster = cluster(1, 3);
    let (api, client) = (cluster.api(), client(&cluster, 0, 2));
    let gone = service("gone", &["10.96.0.20"]).port("http", "TCP", 80, TARGET).selector("app", "web");
    api.apply_all(&[web(), gone.clone()]).unwrap();
    cluster.run_pods("web", &[(0, 0)]).unwrap();
    serves(&client, &["pod-1-1"]);
    tcp(&client, "10.96.0.20", 80, &["pod-1-1"]);

    let before = lists(&cluster);
    cluster.agent(0).unwrap().signal(Signal::SIGSTOP).unwrap();
    cluster.control_mut().stop_api_server().unwrap();
    cluster.control_mut().restart_api_server().unwrap();
    api.delete(&gone).unwrap();
    cluster.run_pods("web", &[(0, 1)]).unwrap();
    // Once more: what a server remembers begins with its start.
    cluster.control().compact().unwrap();
    cluster.control_mut().stop_api_server().unwrap();
    cluster.control_mut().restart_api_server().unwrap();
    cluster.agent(0).unwrap().signal(Signal::SIGCONT).unwrap();
    serves(&client, &["pod-1-1", "pod-1-2"]);
    silent(&client, "10.96.0.20", 80);
    cluster.wait_logged(0, &["watch services", "too old resource version"]).unwrap();
    let lists = lists(&cluster);
    assert!(lists.0 > before.0 && lists.1 > before.1, "listed again: {before:?}, then {lists:?}");
    // And it follows again.
    cluster.api().delete(&cluster.pod("web", 0, 0).unwrap()).unwrap();
    serves(&client, &["pod-1-2"]);
    cluster.api().delete(&cluster.pod("web", 0, 1).unwrap()).unwrap();
    refused(&client, V6, 80);
}
