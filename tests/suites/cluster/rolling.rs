//! Pods are replaced while clients connect: no connection fails.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use anyhow::ensure;
use sheave_tests::{
    client::Client,
    kubernetes::cluster::Cluster,
    manifests::Object,
    protocol::{LoopReport, LoopSpec, Transport},
    scene::eventually,
};

use crate::{V4, V6, client, cluster, dial, refused, serves, tcp, web};

/// What a kubelet would give a pod to end.
const GRACE_S: u32 = 30;

/// A busy machine may keep a client waiting; that is no failed connection.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often all pods are replaced.
const ROUNDS: usize = 3;

/// Between two attempts of each of four loops: some 2,400 connections a second in all.
const PAUSE: Duration = Duration::from_millis(1);

/// A pod that shall end: it is terminating, still serves, then nobody is sent to it any more, and it goes when the last
/// that was sent to it has its answer.
fn end(cluster: &mut Cluster, clients: &[Client], loops: &[(&Client, u64)], pod: &Object, left: &[&str]) {
    cluster.api().delete_in(pod, GRACE_S).unwrap();
    for client in clients {
        tcp(client, V4, 80, left);
        tcp(client, V6, 80, left);
    }
    for (client, id) in loops {
        let attempts = || client.read_loop(*id).unwrap().attempts;
        // The next to end may have begun before.
        let enough = attempts() + 2;
        eventually("a loop goes on", || {
            ensure!(attempts() >= enough);
            Ok(())
        })
        .unwrap();
    }
    cluster.stop_serving(pod.json()["metadata"]["name"].as_str().unwrap());
    cluster.api().delete(pod).unwrap();
}

/// P3, P5: every pod on two nodes is replaced, one after the other and three times over, while both nodes' clients
/// connect two thousand times a second.
#[test]
fn rolling_replacement_under_load() {
    let mut cluster = cluster(2, 5);
    let clients: Vec<_> = [0, 1].map(|node| client(&cluster, node, 4)).into();
    let load: Vec<_> = [0, 1].map(|node| client(&cluster, node, 4)).into();
    let mut waiting = VecDeque::from([(0, 2), (1, 2), (0, 3), (1, 3)]);
    let mut running = VecDeque::from([(0, 0), (1, 0), (0, 1), (1, 1)]);
    cluster.api().apply(&web()).unwrap();
    cluster.run_pods("web", running.make_contiguous()).unwrap();
    clients.iter().for_each(|client| serves(client, &as_str(&named(&running))));

    let loops: Vec<_> = load
        .iter()
        .flat_map(|client| [V4, V6].map(|vip| (client, vip)))
        .map(|(client, vip)| {
            let spec = LoopSpec::new(Transport::Tcp, dial(vip, 80).timeout(PATIENCE));
            (client, client.start_loop(spec.pause(PAUSE)).unwrap())
        })
        .collect();
    let started = Instant::now();
    for _ in 0..ROUNDS * running.len() {
        let new = waiting.pop_front().unwrap();
        cluster.run_pods("web", &[new]).unwrap();
        running.push_back(new);
        for client in &clients {
            tcp(client, V4, 80, &as_str(&named(&running)));
            tcp(client, V6, 80, &as_str(&named(&running)));
        }
        let old = running.pop_front().unwrap();
        let pod = cluster.pod("web", old.0, old.1).unwrap();
        end(&mut cluster, &clients, &loops, &pod, &as_str(&named(&running)));
        // The process of the next pod that has this address.
        cluster.serve_again(old.0, old.1).unwrap();
        waiting.push_back(old);
    }
    let lasted = started.elapsed();
    let reports: Vec<LoopReport> =
        loops.into_iter().map(|(client, id)| client.stop_loop(id).unwrap()).collect();
    let attempts: u64 = reports.iter().map(|report| report.attempts).sum();
    let failed: u64 = reports.iter().map(LoopReport::failed).sum();
    println!("{attempts} connections in {lasted:?}: {:.0}/s", attempts as f64 / lasted.as_secs_f64());
    assert_eq!(failed, 0, "{:?}", reports.iter().map(|report| &report.first_failures).collect::<Vec<_>>());
    for report in &reports {
        assert_eq!(report.answers.len(), 8, "every pod had its share: {:?}", report.answers);
    }
    clients.iter().for_each(|client| serves(client, &as_str(&named(&running))));
}

/// The names of pods, given as (node, pod).
fn named(pods: &VecDeque<(usize, usize)>) -> Vec<String> {
    pods.iter().map(|(node, pod)| format!("pod-{}-{}", node + 1, pod + 1)).collect()
}

fn as_str(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

/// P3: when all pods end at once, those that still serve get what comes; the first ready one takes over.
#[test]
fn all_pods_end_at_once() {
    let mut cluster = cluster(1, 4);
    let client = client(&cluster, 0, 3);
    let api = cluster.api();
    api.apply(&web()).unwrap();
    cluster.run_pods("web", &[(0, 0), (0, 1)]).unwrap();
    serves(&client, &["pod-1-1", "pod-1-2"]);
    let pods = [0, 1].map(|pod| cluster.pod("web", 0, pod).unwrap());
    let attempts = client.start_loop(LoopSpec::new(Transport::Tcp, dial(V4, 80).timeout(PATIENCE))).unwrap();
    for pod in &pods {
        api.delete_in(pod, GRACE_S).unwrap();
    }
    eventually("both are terminating", || {
        let endpoints = cluster.endpoints("default", "web")?;
        let all = endpoints.iter().all(|e| e["endpoint"]["conditions"]["terminating"] == true);
        ensure!(all, "{endpoints:?}");
        Ok(())
    })
    .unwrap();
    cluster.settle().unwrap();
    serves(&client, &["pod-1-1", "pod-1-2"]);
    cluster.run_pods("web", &[(0, 2)]).unwrap();
    serves(&client, &["pod-1-3"]);
    for pod in &pods {
        api.delete(pod).unwrap();
        cluster.stop_serving(pod.json()["metadata"]["name"].as_str().unwrap());
    }
    let report = client.stop_loop(attempts).unwrap();
    assert_eq!(report.failed(), 0, "{:?}", report.first_failures);
    // Terminating and not serving any more is never used (P5).
    api.delete_in(&cluster.pod("web", 0, 2).unwrap(), GRACE_S).unwrap();
    api.set_status(&cluster.pod("web", 0, 2).unwrap().ready(false)).unwrap();
    refused(&client, V4, 80);
    refused(&client, V6, 80);
}
