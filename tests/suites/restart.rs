//! The agent comes and goes; the kernel goes on. What stays, what is adopted, what is pruned, and what `cleanup` leaves.

#![expect(clippy::unwrap_used, reason = "the helpers of tests fail as tests do")]

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use aya::EbpfLoader;
use proxy_agent::kernel::{Pins, programs::OBJECT};
use serde_json::{Value, json};
use sheave_tests::{
    agent::{Agent, Source, sheave, sheave_as_nobody},
    bpf, cgroup,
    client::Client,
    lab::{Place, Shape},
    manifests::{Object, service},
    protocol::{Dial, LoopSpec, Transport},
    scene::{ENOUGH, Scene, TARGET, answers, at, eventually, fail, names, reach, slices, socket_kinds},
};

const V4: &str = "10.96.0.10";
const V6: &str = "fd00:10:96::10";
const SOON: Duration = Duration::from_millis(700);
const SECOND: Duration = Duration::from_secs(1);
const STARTED_WITHIN: Duration = Duration::from_secs(60);

/// A Service of any name on these VIPs, with both protocols on port 80 and endpoints in these pods of the first node.
fn serving(scene: &Scene, name: &str, vips: &[&str], pods: &[usize]) -> Vec<Object> {
    let node = scene.node().unwrap();
    let places: Vec<_> = pods.iter().map(|pod| (node, node.pod(*pod).unwrap())).collect();
    let mut objects =
        vec![service(name, vips).port("http", "TCP", 80, TARGET).port("dns", "UDP", 80, TARGET)];
    objects.extend(slices(name, "http", "TCP", &places));
    objects.extend(slices(name, "dns", "UDP", &places));
    objects
}

/// Three pods of which two serve `web`, and an agent.
fn scene() -> Scene {
    let mut scene = Scene::new(3).unwrap();
    scene.serve().unwrap();
    scene.apply("web", &serving(&scene, "web", &[V4, V6], &[0, 1])).unwrap();
    scene
}

fn everything_works(client: &Client, expected: &[&str]) {
    for (transport, dial, vip) in socket_kinds(V4, V6, 80).unwrap() {
        assert_eq!(
            answers(client, transport, dial, ENOUGH).unwrap(),
            names(expected),
            "{transport:?} {dial:?}"
        );
        let exchange = reach(client, transport, dial).unwrap();
        assert_eq!(exchange.peer.or(exchange.source), Some(vip));
    }
}

fn vip() -> Dial {
    Dial::new(at(V4, 80).unwrap())
}

/// What `sheave get services` says of the kernel, by frontend.
fn frontends(scene: &Scene) -> Vec<String> {
    let output = sheave(scene.node().unwrap(), &["get", "services", "-o", "json"]).unwrap();
    let records: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let all = records.iter().flat_map(|record| record["frontends"].as_array().unwrap());
    all.map(|frontend| frontend.as_str().unwrap().to_owned()).collect()
}

/// Q8: SIGTERM is a good end and leaves everything at work; so does SIGKILL.
#[test]
fn q8_the_end_of_the_agent_changes_nothing() {
    let mut scene = scene();
    let client = scene.pod(2).unwrap().client().unwrap();
    let held = client.hold(vip(), 10).unwrap();
    let kept = client.open(Transport::UdpUnconnected, vip()).unwrap().unwrap();
    let (id, who) = (kept.id.unwrap(), kept.answer.unwrap());
    for clean in [true, false] {
        let agent = scene.take_agent().unwrap();
        if clean {
            assert!(agent.stop().unwrap().success());
        } else {
            agent.kill().unwrap();
        }
        everything_works(&client, &["pod-1-1", "pod-1-2"]);
        scene.start_agent().unwrap();
        everything_works(&client, &["pod-1-1", "pod-1-2"]);
    }
    assert_eq!(client.check_held(held.id).unwrap().alive, 10);
    // What a socket is told of its peer, and where an unconnected one goes (B12), outlives two agents.
    let exchange = client.send(id, SECOND).unwrap().unwrap();
    assert_eq!((exchange.answer, exchange.source), (Some(who), Some(vip().to)));
}

/// Q2: a restart adopts what it finds: with nothing changed, nothing is written.
#[test]
fn q2_a_restart_with_nothing_changed_writes_nothing() {
    let mut scene = scene();
    let before = frontends(&scene);
    let ids = bpf::programs_of(scene.node().unwrap().cgroup()).unwrap();
    assert_eq!(ids.len(), 9);
    for _ in 0..3 {
        scene.take_agent().unwrap().kill().unwrap();
        scene.start_agent().unwrap();
        let status = scene.agent().unwrap().status().unwrap();
        assert_eq!((&status["writes"], &status["syncs"]), (&json!(0), &json!(1)), "{status}");
        assert_eq!(status["adopted_frontends"], json!(before.len()), "{status}");
        assert_eq!(frontends(&scene), before);
    }
    assert_eq!(bpf::programs_of(scene.node().unwrap().cgroup()).unwrap().len(), 9);
    // And the count can count.
    scene.apply("web", &serving(&scene, "web", &[V4, V6], &[0])).unwrap();
    assert_ne!(scene.agent().unwrap().status().unwrap()["writes"], json!(0));
}

/// Q2: what changed while no agent ran is made good by the first sync of the next.
#[test]
fn q2_changes_while_the_agent_was_down() {
    let mut scene = scene();
    scene.apply("gone", &serving(&scene, "gone", &["10.96.0.11"], &[0])).unwrap();
    let client = scene.pod(2).unwrap().client().unwrap();
    let held = client.hold(Dial::new(at("10.96.0.11", 80).unwrap()), 3).unwrap();
    scene.take_agent().unwrap().kill().unwrap();

    scene.lab().manifests().remove("gone").unwrap();
    scene.lab().manifests().write("web", &serving(&scene, "web", &[V4, V6], &[2])).unwrap();
    scene.lab().manifests().write("new", &serving(&scene, "new", &["10.96.0.12"], &[1])).unwrap();
    // Nobody has told the kernel yet.
    everything_works(&client, &["pod-1-1", "pod-1-2"]);
    reach(&client, Transport::Tcp, Dial::new(at("10.96.0.11", 80).unwrap())).unwrap();

    scene.start_agent().unwrap();
    everything_works(&client, &["pod-1-3"]);
    let new = Dial::new(at("10.96.0.12", 80).unwrap());
    assert_eq!(answers(&client, Transport::Tcp, new, 20).unwrap(), names(&["pod-1-2"]));
    let gone = Dial::new(at("10.96.0.11", 80).unwrap()).timeout(SOON);
    assert!(fail(&client, Transport::Tcp, gone).unwrap().is_timeout());
    assert!(!frontends(&scene).iter().any(|frontend| frontend.contains("10.96.0.11")));
    // Z8: what was established goes on.
    assert_eq!(client.check_held(held.id).unwrap().alive, 3);
}

/// A kubeconfig whose API server nobody is.
fn dead_kubeconfig(scene: &Scene) -> std::path::PathBuf {
    let path = scene.lab().directory().join("kubeconfig");
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    });
    fs::write(&path, text.to_string()).unwrap();
    path
}

/// Q1, Q7: an agent that cannot get its lists writes nothing, deletes nothing and attaches nothing.
#[test]
fn q1_without_complete_lists_nothing_is_touched() {
    let mut scene = Scene::without_agent(Shape { nodes: 1, pods: 3 }, &[]).unwrap();
    scene.serve().unwrap();
    let kubeconfig = dead_kubeconfig(&scene);
    let lost = |scene: &Scene| {
        let node = scene.node().unwrap();
        let source = Source::Kubeconfig(&kubeconfig);
        let agent = Agent::spawn_with(node, &source, node.cgroup(), &[] as &[&str]).unwrap();
        let status = eventually("the agent answers", || {
            let status = agent.status()?;
            anyhow::ensure!(status["agent"] == json!("running"), "{status}");
            Ok(status)
        });
        // Time enough to do harm.
        thread::sleep(SECOND);
        let later = agent.status().unwrap();
        for status in [status.unwrap(), later] {
            assert_eq!((&status["synced"], &status["writes"]), (&json!(false), &json!(0)), "{status}");
        }
        agent
    };
    // On a fresh node.
    let agent = lost(&scene);
    assert!(bpf::programs_of(scene.node().unwrap().cgroup()).unwrap().is_empty());
    agent.kill().unwrap();
    // On one where an agent was before.
    scene.start_agent().unwrap();
    scene.apply("web", &serving(&scene, "web", &[V4, V6], &[0, 1])).unwrap();
    let (before, programs) = (frontends(&scene), bpf::programs_of(scene.node().unwrap().cgroup()).unwrap());
    scene.take_agent().unwrap().kill().unwrap();
    let client = scene.pod(2).unwrap().client().unwrap();
    let agent = lost(&scene);
    assert_eq!(frontends(&scene), before);
    assert_eq!(bpf::programs_of(scene.node().unwrap().cgroup()).unwrap(), programs);
    everything_works(&client, &["pod-1-1", "pod-1-2"]);
    drop(agent);
}

/// Q1: a directory of manifests that is not there is an error, not an empty list.
#[test]
fn q1_a_missing_manifest_directory_is_no_empty_list() {
    let mut scene = scene();
    scene.take_agent().unwrap().kill().unwrap();
    let client = scene.pod(2).unwrap().client().unwrap();
    let node = scene.node().unwrap();
    let missing = scene.lab().directory().join("nowhere");
    let agent = Agent::spawn_with(node, &Source::Manifests(&missing), node.cgroup(), &[] as &[&str]).unwrap();
    let log = agent.log().to_owned();
    assert!(!agent.wait_ended(STARTED_WITHIN).unwrap().success());
    assert!(fs::read_to_string(log).unwrap().contains("nowhere"), "the error names the directory");
    everything_works(&client, &["pod-1-1", "pod-1-2"]);
}

/// A link that a former run left on another cgroup, or on one that is gone, is replaced.
#[test]
fn a_link_of_another_cgroup_is_replaced() {
    let mut scene = scene();
    let node = scene.node().unwrap();
    scene.apply("web", &serving(&scene, "web", &[V4, V6], &[0, 1])).unwrap();
    let pods = [1, 2].map(|pod| node.pod(pod).unwrap());
    let clients = pods.map(|pod| pod.client().unwrap());
    let works = |client: &Client| client.tcp(vip().timeout(SOON)).unwrap().is_ok();
    assert!(clients.each_ref().iter().all(|client| works(client)));
    let gone = node.cgroup().join("gone");
    cgroup::create(&gone).unwrap();
    let node_cgroup = node.cgroup().to_owned();
    let pod_cgroup = pods[0].cgroup().to_owned();
    let rounds: [(&Path, [bool; 2]); 4] = [
        (&pod_cgroup, [true, false]),
        (&node_cgroup, [true, true]),
        (&gone, [false, false]),
        (&node_cgroup, [true, true]),
    ];
    scene.take_agent().unwrap().kill().unwrap();
    let node = scene.node().unwrap();
    for (cgroup_root, expected) in rounds {
        let source = Source::Manifests(scene.lab().manifests().path());
        // By packets everybody is served.
        let mut agent = Agent::spawn_with(node, &source, cgroup_root, &["--packet-path", "off"]).unwrap();
        agent.wait_synced(STARTED_WITHIN).unwrap();
        let working = clients.each_ref().map(works);
        assert_eq!(working, expected, "{}", cgroup_root.display());
        assert_eq!(bpf::programs_of(cgroup_root).unwrap().len(), 9);
        agent.kill().unwrap();
        if cgroup_root == gone {
            cgroup::remove(&gone).unwrap();
            let expected = "0 of 9 attached; 9 links are of a cgroup that is gone";
            eventually("links of a cgroup that is gone do not count", || {
                let text = String::from_utf8(sheave(node, &["status"])?.stdout)?;
                anyhow::ensure!(text.contains(expected), "{text}");
                Ok(())
            })
            .unwrap();
        }
    }
}

/// A second agent on the same socket ends with an error that names it, and has touched nothing.
#[test]
fn a_second_agent_refuses_to_start() {
    let scene = scene();
    let client = scene.pod(2).unwrap().client().unwrap();
    let node = scene.node().unwrap();
    let programs = bpf::programs_of(node.cgroup()).unwrap();
    let before = scene.agent().unwrap().status().unwrap();
    let socket = scene.agent().unwrap().control_socket().to_owned();
    // Also when nobody answers on its control socket.
    fs::rename(&socket, socket.with_extension("away")).unwrap();
    let second = Agent::spawn(scene.lab(), node, &[] as &[&str]).unwrap();
    assert!(!second.wait_ended(STARTED_WITHIN).unwrap().success());
    assert!(!socket.exists());
    fs::rename(socket.with_extension("away"), &socket).unwrap();
    let log = fs::read_to_string(scene.agent().unwrap().log()).unwrap();
    assert!(log.contains("another agent runs: it holds the pin directory"), "{log}");
    assert_eq!(bpf::programs_of(node.cgroup()).unwrap(), programs);
    let after = scene.agent().unwrap().status().unwrap();
    assert_eq!((&after["writes"], &after["agent"]), (&before["writes"], &json!("running")));
    scene.apply("web", &serving(&scene, "web", &[V4, V6], &[2])).unwrap();
    everything_works(&client, &["pod-1-3"]);
}

/// Where programs for packets cannot be had, those for sockets do not stay: nobody would tell them of changes.
#[test]
fn a_start_that_fails_half_way_leaves_no_program() {
    let mut scene = Scene::without_agent(Shape { nodes: 1, pods: 3 }, &[] as &[&str]).unwrap();
    scene.lab().manifests().write("web", &serving(&scene, "web", &[V4, V6], &[0, 1])).unwrap();
    let pins = Pins::new(scene.node().unwrap().bpffs());
    pins.prepare().unwrap();
    // It has no place for the second of them.
    let too_small = pins.state().join("PACKET_PROGRAMS");
    let mut loader = EbpfLoader::new();
    loader.map_max_entries("PACKET_PROGRAMS", 1).map_pin_path("PACKET_PROGRAMS", &too_small);
    drop(loader.load(OBJECT).unwrap());
    let agent = Agent::spawn(scene.lab(), scene.node().unwrap(), &[] as &[&str]).unwrap();
    let log = agent.log().to_owned();
    assert!(!agent.wait_ended(STARTED_WITHIN).unwrap().success());
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("synced") && log.contains("PACKET_PROGRAMS"), "{log}");
    assert!(bpf::programs_of(scene.node().unwrap().cgroup()).unwrap().is_empty());
    fs::remove_file(too_small).unwrap();
    scene.start_agent().unwrap();
    scene.serve().unwrap();
    everything_works(&scene.pod(2).unwrap().client().unwrap(), &["pod-1-1", "pod-1-2"]);
}

/// Q8, Z8: under load of every kind, ten kills and restarts lose nothing.
#[test]
fn q8_ten_restarts_under_load() {
    let mut scene = scene();
    let clients: Vec<Client> = [scene.pod(2).unwrap(), scene.node().unwrap().host()]
        .into_iter()
        .map(|place: &Place| place.client().unwrap())
        .collect();
    let mut loops = Vec::new();
    let mut held = Vec::new();
    for client in &clients {
        for (transport, dial, _) in socket_kinds(V4, V6, 80).unwrap() {
            // Patient: a machine that other tests keep busy may not run a server for seconds.
            let dial = dial.timeout(Duration::from_secs(30));
            let spec = LoopSpec::new(transport, dial).pause(Duration::from_millis(3));
            loops.push((client, client.start_loop(spec).unwrap()));
            if transport == Transport::Tcp {
                held.push((client, client.hold(dial, 10).unwrap()));
            }
        }
    }
    let started = Instant::now();
    for _ in 0..10 {
        scene.take_agent().unwrap().kill().unwrap();
        thread::sleep(Duration::from_millis(100));
        scene.start_agent().unwrap();
        assert_eq!(scene.agent().unwrap().status().unwrap()["writes"], json!(0));
    }
    let took = started.elapsed();
    let mut attempts = 0;
    for (client, id) in loops {
        let report = client.stop_loop(id).unwrap();
        assert_eq!(report.failed(), 0, "{:?}", report.first_failures);
        assert_eq!(report.answers.keys().cloned().collect::<Vec<_>>(), ["pod-1-1", "pod-1-2"]);
        attempts += report.attempts;
    }
    for (client, group) in held {
        assert_eq!((group.alive, client.check_held(group.id).unwrap().alive), (10, 10));
    }
    println!("{attempts} connections during 10 restarts in {took:?}: none failed, none misrouted");
}

/// `sheave cleanup` leaves nothing: no program, no map, no pin; and again is no error.
#[test]
fn cleanup_leaves_nothing() {
    let mut scene = scene();
    let node = scene.node().unwrap();
    let pins = node.directory().join("bpffs/sheave");
    let programs = bpf::programs_of(node.cgroup()).unwrap();
    let mut maps = Vec::new();
    for directory in fs::read_dir(&pins).unwrap().map(|entry| entry.unwrap().path()) {
        if directory.ends_with("links") {
            continue;
        }
        maps.extend(
            fs::read_dir(directory).unwrap().map(|e| bpf::pinned_map_id(&e.unwrap().path()).unwrap()),
        );
    }
    assert_eq!((programs.len(), maps.len()), (9, 25));
    assert!(maps.iter().all(|id| bpf::map_exists(*id).unwrap()));
    let client = scene.pod(2).unwrap().client().unwrap();
    let held = client.hold(vip(), 3).unwrap();
    let socket = scene.agent().unwrap().control_socket().to_owned();
    let output = sheave(node, &["cleanup"]).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("end the agent first"), "{output:?}");
    everything_works(&client, &["pod-1-1", "pod-1-2"]);
    assert_eq!(bpf::programs_of(node.cgroup()).unwrap(), programs);
    scene.take_agent().unwrap().kill().unwrap();
    assert!(socket.exists());

    let node = scene.node().unwrap();
    let output = sheave(node, &["cleanup"]).unwrap();
    assert!(output.status.success() && output.stdout.starts_with(b"removed"), "{output:?}");
    assert!(!pins.exists() && !socket.exists());
    assert!(fail(&client, Transport::Tcp, vip().timeout(SOON)).unwrap().is_timeout());
    let after = client.check_held(held.id).unwrap();
    assert_eq!(after.alive, 3, "established connections go on: {after:?}");
    // The kernel frees them a moment later.
    eventually("no program and no map is left", || {
        anyhow::ensure!(bpf::programs_of(node.cgroup())?.is_empty(), "programs are attached");
        for id in &programs {
            anyhow::ensure!(!bpf::program_exists(*id)?, "program {id} exists");
        }
        for id in &maps {
            anyhow::ensure!(!bpf::map_exists(*id)?, "map {id} exists");
        }
        Ok(())
    })
    .unwrap();
    let output = sheave(node, &["cleanup"]).unwrap();
    assert!(output.status.success() && output.stdout.starts_with(b"nothing"), "{output:?}");

    scene.start_agent().unwrap();
    everything_works(&client, &["pod-1-1", "pod-1-2"]);
}

/// `sheave status`: 0 when an agent runs, 1 when none does; what is in the kernel is shown either way.
#[test]
fn status_says_whether_an_agent_runs() {
    let mut scene = scene();
    let ask = |scene: &Scene| {
        let node = scene.node().unwrap();
        let output = sheave(node, &["status", "-o", "json"]).unwrap();
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        let text = sheave(node, &["status"]).unwrap();
        assert_eq!(text.status.code(), output.status.code());
        (output.status.code(), document, String::from_utf8(text.stdout).unwrap())
    };
    let attached = |document: &Value| document["programs_attached"].as_object().unwrap().len();
    let (code, document, text) = ask(&scene);
    assert_eq!((code, &document["agent"], attached(&document)), (Some(0), &json!("running"), 9), "{text}");
    scene.take_agent().unwrap().kill().unwrap();
    let (code, document, text) = ask(&scene);
    assert_eq!((code, &document["agent"], attached(&document)), (Some(1), &json!("not running"), 9));
    assert!(text.contains("not running") && text.contains("9 of 9 attached"), "{text}");
    // Who may not look is not told that there is nothing.
    for verb in [&["status"][..], &["plan"], &["get", "services"]] {
        let output = sheave_as_nobody(scene.node().unwrap(), verb).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains("needs root"), "{verb:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{verb:?}: {output:?}");
    }
    assert!(sheave(scene.node().unwrap(), &["cleanup"]).unwrap().status.success());
    let (code, document, _) = ask(&scene);
    assert_eq!((code, attached(&document)), (Some(1), 0));
    // Without any agent there is no answer to these.
    for arguments in
        [&["plan"][..], &["get", "services"], &["explain", "--from=10.0.0.1", "--to=10.0.0.2:80/TCP"]]
    {
        let output = sheave(scene.node().unwrap(), arguments).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(output.stderr.starts_with(b"error: "), "{arguments:?}: {output:?}");
    }
}
