//! Who the agent is to the API server, and what it does when it may not.

use std::{collections::BTreeMap, fs, time::Duration};

use anyhow::ensure;
use serde_json::{Value, json};
use sheave_tests::{
    agent::{Source, sheave},
    client::Client,
    kubernetes::{
        account::{deploy, forbid, kubeconfig_with_token_file, token, write_account},
        api::Api,
        cluster::Cluster,
    },
    lab::Shape,
    manifests::Object,
    protocol::Transport,
    scene::{ENOUGH, TARGET, answers, at, eventually, eventually_within, names, reach},
};

use crate::{V4, client, dial, serves, silent, web};

/// A token that a file has is read again after a minute at most; then the agent has to try again.
const ROTATED_WITHIN: Duration = Duration::from_secs(180);

/// A cluster with `web` and its first pod, and two pods that tokens are bound to; no agent yet.
fn cluster() -> (Cluster, Client, [Object; 2]) {
    let mut cluster = Cluster::without_agents(Shape { nodes: 1, pods: 5 }).unwrap();
    cluster.serve().unwrap();
    cluster.api().apply(&web()).unwrap();
    cluster.run_pods("web", &[(0, 0)]).unwrap();
    // In the account's namespace, where tokens are bound.
    let bound = [2, 3].map(|pod| {
        let object = cluster.pod("sheave", 0, pod).unwrap().namespace("kube-system");
        let object = object.set("spec.serviceAccountName", "sheave");
        cluster.run(&object).unwrap();
        object
    });
    let client = client(&cluster, 0, 4);
    (cluster, client, bound)
}

fn bound_token(api: &Api, pod: &Object) -> String {
    token(api, pod.json()["metadata"]["name"].as_str()).unwrap()
}

/// Whether the API server takes a token.
fn is_good(api: &Api, token: &str) -> bool {
    let review =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
    let answer = api.post("/apis/authentication.k8s.io/v1/tokenreviews", &review).unwrap();
    answer["status"]["authenticated"] == json!(true)
}

/// The old token is worth nothing any more and every connection is cut; with the new one changes come through.
fn rotated(cluster: &mut Cluster, client: &Client, old: &str, old_pod: &Object) {
    let api = cluster.api();
    api.delete(old_pod).unwrap();
    cluster.control_mut().stop_api_server().unwrap();
    cluster.control_mut().restart_api_server().unwrap();
    assert!(!is_good(&api, old));
    cluster.run_pods("web", &[(0, 1)]).unwrap();
    eventually_within(ROTATED_WITHIN, "the agent uses the new token", || {
        let found = answers(client, Transport::Tcp, dial(V4, 80), ENOUGH)?;
        ensure!(found == names(&["pod-1-1", "pod-1-2"]), "{found:?}");
        Ok(())
    })
    .unwrap();
    serves(client, &["pod-1-1", "pod-1-2"]);
}

/// A kubeconfig that names a file with the token: the file is rewritten.
#[test]
fn the_token_of_a_kubeconfig_rotates() {
    let (mut cluster, client, pods) = cluster();
    let api = cluster.api();
    let tokens = [0, 1].map(|pod: usize| bound_token(&api, &pods[pod]));
    let (config, file) = kubeconfig_with_token_file(cluster.control(), "rotating", &tokens[0]).unwrap();
    cluster.spawn_agent_with(0, &Source::Kubeconfig(&config), &[]).unwrap();
    cluster.wait_synced(0).unwrap();
    serves(&client, &["pod-1-1"]);
    fs::write(&file, &tokens[1]).unwrap();
    rotated(&mut cluster, &client, &tokens[0], &pods[0]);
}

/// The account of a pod: its files change as a kubelet changes them. No VIP is needed to find the API server: the
/// environment has its own address, and where it has not, `--master` has.
#[test]
fn the_account_of_a_pod_rotates() {
    let (mut cluster, client, pods) = cluster();
    let api = cluster.api();
    let tokens = [0, 1].map(|pod: usize| bound_token(&api, &pods[pod]));
    let directory = cluster.node(0).unwrap().directory().join("account");
    write_account(cluster.control(), &directory, 0, &tokens[0]).unwrap();
    let server = cluster.control().address();
    let vip = Source::Account { directory: &directory, server: at("10.96.0.1", 443).unwrap() };
    cluster.spawn_agent_with(0, &vip, &["--master", &format!("https://{server}")]).unwrap();
    cluster.wait_synced(0).unwrap();
    serves(&client, &["pod-1-1"]);
    cluster.take_agent(0).unwrap().stop().unwrap();
    cluster.spawn_agent_with(0, &Source::Account { directory: &directory, server }, &[]).unwrap();
    cluster.wait_synced(0).unwrap();
    serves(&client, &["pod-1-1"]);
    write_account(cluster.control(), &directory, 1, &tokens[1]).unwrap();
    fs::remove_dir_all(directory.join("..0")).unwrap();
    rotated(&mut cluster, &client, &tokens[0], &pods[0]);
}

/// A kubeconfig that names the VIP of `kubernetes.default`, which nobody serves before an agent does: `--master` says
/// where the API server is, and then the VIP works.
#[test]
fn the_api_server_is_where_a_flag_says() {
    const VIP: &str = "10.96.0.1";
    let (mut cluster, client, _) = cluster();
    let token = token(&cluster.api(), None).unwrap();
    let (config, _) = kubeconfig_with_token_file(cluster.control(), "vip", &token).unwrap();
    let server = cluster.control().address().to_string();
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains(&server), "{text}");
    fs::write(&config, text.replace(&server, &format!("{VIP}:443"))).unwrap();
    let host = cluster.node(0).unwrap().host().client().unwrap();
    silent(&host, VIP, 443);
    let master = format!("https://{server}");
    cluster.spawn_agent_with(0, &Source::Kubeconfig(&config), &["--master", &master]).unwrap();
    cluster.wait_synced(0).unwrap();
    serves(&client, &["pod-1-1"]);
    // The API server listens there, and waits for what TLS begins with.
    for from in [&host, &client] {
        let connected = reach(from, Transport::Tcp, dial(VIP, 443).connect_only()).unwrap();
        assert_eq!(connected.peer, Some(at(VIP, 443).unwrap()));
    }
}

/// O6: with one verb missing the agent says which and what that costs, goes on trying, and works as soon as it may.
#[test]
fn a_verb_is_forbidden() {
    let (mut cluster, client, _) = cluster();
    let api = cluster.api();
    let mut pods = vec!["pod-1-1"];
    let costs = BTreeMap::from([
        ("services", "without Services nothing is programmed"),
        ("endpointslices", "without EndpointSlices nothing is programmed"),
        ("nodes", "without the own Node nothing is programmed"),
    ]);
    for (resource, verb, other) in [
        ("services", "list", "pod-1-2"),
        ("services", "watch", ""),
        ("endpointslices", "list", ""),
        ("endpointslices", "watch", ""),
        ("nodes", "list", ""),
        ("nodes", "watch", ""),
    ] {
        forbid(&api, resource, verb).unwrap();
        cluster.spawn_agent(0).unwrap();
        let line = cluster.wait_logged(0, &[&format!("{verb} {resource}: "), "forbidden"]).unwrap();
        assert!(line.contains(costs[resource]), "{line}");
        let status = cluster.agent(0).unwrap().status().unwrap();
        if verb == "list" {
            // Nothing is written before all is known; what the agent before left in the kernel goes on (Q1).
            assert_eq!((&status["synced"], &status["writes"]), (&json!(false), &json!(0)), "{status}");
        }
        deploy(cluster.control()).unwrap();
        cluster.wait_synced(0).unwrap();
        if !other.is_empty() {
            cluster.run_pods("web", &[(0, 1)]).unwrap();
            pods.push(other);
        }
        serves(&client, &pods);
        cluster.take_agent(0).unwrap().stop().unwrap();
    }
}

/// `plan` and `explain` say from the API server alone what an agent programs.
#[test]
fn plan_and_explain_ask_the_api_server() {
    let (mut cluster, client, _) = cluster();
    let (from, web_4) = (cluster.place(0, 4).unwrap().v4().to_string(), format!("{V4}:80/TCP"));
    let token = token(&cluster.api(), None).unwrap();
    let (config, _) = kubeconfig_with_token_file(cluster.control(), "reader", &token).unwrap();
    let config = config.to_str().unwrap();
    let live = ["--kubeconfig", config, "--node-name", "node-1", "-o", "json"];
    let explain = ["explain", "--from", &from, "--to", &web_4];
    let read = |cluster: &Cluster, verb: &[&str]| -> Value {
        let output = sheave(cluster.node(0).unwrap(), &[verb, &live].concat()).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let endpoint = |pod: usize| format!("{}:{TARGET}", cluster.place(0, pod).unwrap().v4());
    let endpoints = [0, 1].map(endpoint);
    // Before any agent runs; what the controllers make comes when it comes.
    eventually("one endpoint is explained", || {
        let explained = read(&cluster, &explain);
        ensure!(explained["endpoints"] == json!(endpoints[..1]), "{explained}");
        ensure!(explained["verdict"] == "forward" && explained["service"] == "default/web:http/TCP");
        Ok(())
    })
    .unwrap();
    cluster.spawn_agent(0).unwrap();
    cluster.wait_synced(0).unwrap();
    cluster.run_pods("web", &[(0, 1)]).unwrap();
    serves(&client, &["pod-1-1", "pod-1-2"]);
    assert_eq!(read(&cluster, &explain)["endpoints"], json!(endpoints));
    let agents = cluster.agent(0).unwrap().ask(&["plan", "-o", "json"]).unwrap();
    let agents: Value = serde_json::from_slice(&agents.stdout).unwrap();
    assert_eq!(read(&cluster, &["plan"]), agents);
    assert!(agents["services"].as_array().is_some_and(|services| services.len() >= 4), "{agents}");
}

/// The role of `deploy/` is enough, and no larger than what the agent does: it only lists and watches.
#[test]
fn the_role_is_what_the_agent_needs() {
    let (mut cluster, client, _) = cluster();
    cluster.spawn_agent(0).unwrap();
    cluster.wait_synced(0).unwrap();
    serves(&client, &["pod-1-1"]);
    let audit = cluster.control().audit().unwrap();
    let agent = |entry: &&Value| entry["user"]["username"] == "system:serviceaccount:kube-system:sheave";
    let seen: std::collections::BTreeSet<_> = audit
        .iter()
        .filter(agent)
        .map(|entry| {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            (
                text(&entry["verb"]),
                text(&entry["objectRef"]["resource"]),
                entry["responseStatus"]["code"].as_u64(),
            )
        })
        .collect();
    let expected = ["list", "watch"]
        .into_iter()
        .flat_map(|verb| {
            ["services", "endpointslices", "nodes"].map(|kind| (verb.to_owned(), kind.to_owned(), Some(200)))
        })
        .collect();
    assert_eq!(seen, expected);
}
