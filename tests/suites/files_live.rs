//! One Linux machine without a cluster: pods come and go by their files, the VIP stays. And what happens when the files
//! are wrong.

#![expect(clippy::unwrap_used, reason = "the helpers of tests fail as tests do")]

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use sheave_tests::{
    client::Client,
    engine::monotonic_ns,
    lab::Shape,
    manifests::{Object, lab_node, lab_pod, service},
    protocol::{Dial, LoopSpec, Transport},
    scene::{ENOUGH, Scene, TARGET, answers, at, eventually, fail, names, reach, socket_kinds},
};

const V4: &str = "10.96.0.10";
const V6: &str = "fd00:10:96::10";

/// A huge list may take its time on a busy machine in a debug build; a small change may not.
const HUGE_WITHIN: Duration = Duration::from_secs(60);
const SMALL_WITHIN: Duration = Duration::from_secs(2);

/// The Service of the tutorial: a selector, a named target port and a number.
fn web() -> Object {
    service("web", &[V4, V6])
        .port("http", "TCP", 80, "http")
        .port("dns", "UDP", 80, TARGET)
        .selector("app", "web")
}

/// A Pod of it.
fn pod(scene: &Scene, index: usize) -> Object {
    let node = scene.node().unwrap();
    lab_pod(&format!("web-{index}"), "web", node, node.pod(index).unwrap())
        .container_port("http", "TCP", TARGET)
        .container_port("dns", "UDP", TARGET)
}

fn dial() -> Dial {
    Dial::new(at(V4, 80).unwrap())
}

fn who(client: &Client) -> BTreeSet<String> {
    answers(client, Transport::Tcp, dial(), ENOUGH).unwrap()
}

fn pod_names(pods: &[usize]) -> BTreeSet<String> {
    pods.iter().map(|pod| format!("pod-1-{}", pod + 1)).collect()
}

/// Five pods, the last one for the client.
fn scene() -> Scene {
    let mut scene = Scene::new(5).unwrap();
    scene.serve().unwrap();
    scene
}

/// The objects that `sheave status` has problems with, with field and message.
fn problems(scene: &Scene) -> Vec<(String, String, String)> {
    let status = scene.agent().unwrap().status().unwrap();
    let text = |problem: &Value, name: &str| problem[name].as_str().unwrap_or_default().to_owned();
    let all = status["problems"].as_array().unwrap();
    all.iter().map(|p| (text(p, "object"), text(p, "field"), text(p, "message"))).collect()
}

/// The tutorial: scale up and down, to nothing and back, by files of Pods.
#[test]
fn pods_come_and_go_the_vip_stays() {
    let scene = scene();
    let client = scene.pod(4).unwrap().client().unwrap();
    scene.apply("web", &[web()]).unwrap();
    assert!(fail(&client, Transport::Tcp, dial()).unwrap().is_refused());
    let mut running: Vec<usize> = Vec::new();
    for (index, comes) in [
        (0, true),
        (1, true),
        (2, true),
        (3, true),
        (1, false),
        (0, false),
        (1, true),
        (3, false),
        (2, false),
        (1, false),
        (0, true),
    ] {
        let name = format!("web-{index}");
        if comes {
            running.push(index);
            scene.apply(&name, &[pod(&scene, index)]).unwrap();
        } else {
            running.retain(|pod| *pod != index);
            scene.delete(&name).unwrap();
        }
        if running.is_empty() {
            assert!(fail(&client, Transport::Tcp, dial()).unwrap().is_refused());
            continue;
        }
        for (transport, dial, _) in socket_kinds(V4, V6, 80).unwrap() {
            assert_eq!(
                answers(&client, transport, dial, ENOUGH).unwrap(),
                pod_names(&running),
                "{transport:?}"
            );
        }
    }
}

/// What the EndpointSlice controller would make of a Pod: readiness, termination, other labels, another phase, a port
/// that it does not have, and `publishNotReadyAddresses`.
#[test]
fn pods_count_as_in_kubernetes() {
    let scene = scene();
    let client = scene.pod(4).unwrap().client().unwrap();
    let write = |name: &str, object: Object| scene.lab().manifests().write(name, &[object]).unwrap();
    write("web", web());
    write("web-0", pod(&scene, 0));
    let gone = "2026-01-01T00:00:00Z";
    // Each with the pods that answer while it is so, besides the first.
    let cases: [(&str, Object, &[usize]); 6] = [
        ("ready", pod(&scene, 1), &[0, 1]),
        ("not ready", pod(&scene, 1).ready(false), &[0]),
        ("terminating, still ready", pod(&scene, 1).set("metadata.deletionTimestamp", gone), &[0]),
        ("another label", pod(&scene, 1).label("app", "other"), &[0]),
        ("finished", pod(&scene, 1).set("status.phase", "Succeeded"), &[0]),
        ("without the named port", pod(&scene, 1).set("spec.containers.0.ports", json!([])), &[0]),
    ];
    for (case, object, expected) in cases {
        write("web-1", object);
        scene.settle().unwrap();
        assert_eq!(who(&client), pod_names(expected), "{case}");
    }
    // P3: only terminating ones are left, and they still serve.
    write("web-0", pod(&scene, 0).ready(false));
    write("web-1", pod(&scene, 1).set("metadata.deletionTimestamp", gone));
    scene.settle().unwrap();
    assert_eq!(who(&client), pod_names(&[1]));
    // All count as ready when the Service says so.
    scene.apply("web", &[web().set("spec.publishNotReadyAddresses", true)]).unwrap();
    assert_eq!(who(&client), pod_names(&[0, 1]));
    // hostNetwork: the pod's address is the node's.
    let node = scene.node().unwrap();
    let _server = node.host().serve_as("host pod", TARGET).unwrap();
    let addresses: Vec<_> =
        [node.host().v4().to_string(), node.host().v6().to_string()].map(|ip| json!({"ip": ip})).to_vec();
    let host_pod = pod(&scene, 1)
        .set("spec.hostNetwork", true)
        .set("status.podIP", node.host().v4().to_string())
        .set("status.podIPs", addresses);
    write("web-0", pod(&scene, 0).label("app", "other"));
    write("web-1", host_pod);
    scene.settle().unwrap();
    assert_eq!(who(&client), names(&["host pod"]));
}

/// A broken text is named with file, line and field, in status and in the log; what its objects were stays in force.
#[test]
fn a_broken_file_is_named_and_its_objects_keep_working() {
    let scene = scene();
    let client = scene.pod(4).unwrap().client().unwrap();
    scene.lab().manifests().write("web-0", &[pod(&scene, 0)]).unwrap();
    scene.apply("web", &[web()]).unwrap();
    assert_eq!(problems(&scene), []);

    // A wrong value in the second document of the file.
    let other = service("other", &["10.96.0.20"]).port("http", "TCP", 80, TARGET).selector("app", "web");
    let first = other.yaml();
    let wrong = format!("{first}---\n{}", web().yaml().replace("port: 80\n", "port: eighty\n"));
    scene.lab().manifests().write_text("web", &wrong).unwrap();
    scene.settle().unwrap();
    let line = 1 + wrong.lines().position(|line| line.contains("port: eighty")).unwrap();
    let found = problems(&scene);
    assert_eq!(found.len(), 1, "{found:?}");
    let (object, field, message) = &found[0];
    assert_eq!((object.as_str(), field.as_str()), ("Service default/web", "spec.ports[0].port"));
    assert!(message.contains(&format!("web.yaml:{line}")), "{message}");
    let log = fs::read_to_string(scene.agent().unwrap().log()).unwrap();
    let told = |line: &&str| line.contains("web.yaml") && line.contains("spec.ports[0].port");
    assert_eq!(log.lines().filter(|line| line.contains("WARN")).filter(told).count(), 1, "told once:\n{log}");
    // The good document beside it counts, the bad one as it was.
    assert_eq!(who(&client), pod_names(&[0]));
    let to_other = Dial::new(at("10.96.0.20", 80).unwrap());
    assert_eq!(answers(&client, Transport::Tcp, to_other, 10).unwrap(), pod_names(&[0]));
    // New pods come to the old state.
    scene.apply("web-1", &[pod(&scene, 1)]).unwrap();
    assert_eq!(who(&client), pod_names(&[0, 1]));

    // No YAML at all, then nothing that is text.
    for junk in [&b"{ this: is [ not yaml\n"[..], &b"\x00\xff\xfe\x01garbage\xc3\x28"[..]] {
        fs::write(scene.lab().manifests().path().join("web.yaml"), junk).unwrap();
        scene.settle().unwrap();
        assert!(
            problems(&scene)
                .iter()
                .any(|(object, _, message)| { object.contains("web.yaml") || message.contains("web.yaml") }),
            "{:?}",
            problems(&scene)
        );
        assert_eq!(who(&client), pod_names(&[0, 1]));
    }

    // Mended: nothing is left to be said, and what the file does not hold any more is gone.
    scene.apply("web", &[web()]).unwrap();
    assert_eq!(problems(&scene), []);
    assert_eq!(who(&client), pod_names(&[0, 1]));
    let gone = to_other.timeout(Duration::from_millis(700));
    assert!(fail(&client, Transport::Tcp, gone).unwrap().is_timeout());
}

/// Bad values of single fields take away what they are, and nothing else.
#[test]
fn bad_fields_are_named_and_the_rest_goes_on() {
    let scene = scene();
    let client = scene.pod(4).unwrap().client().unwrap();
    scene.lab().manifests().write("web-0", &[pod(&scene, 0)]).unwrap();
    let odd = web()
        .set("spec.externalIPs", json!(["not an address", "203.0.113.9", "0.0.0.0"]))
        .set("spec.unknownField", json!({"of": ["any", "kind"]}))
        .set("spec.internalTrafficPolicy", "Sometimes")
        .push("spec.ports", json!({"name": "bad", "port": 70000, "protocol": "TCP"}))
        .push("spec.ports", json!({"name": "odd", "port": 81, "protocol": "QUIC"}));
    scene.apply("web", &[odd]).unwrap();
    let found = problems(&scene);
    for field in
        ["spec.externalIPs[0]", "spec.externalIPs[2]", "spec.ports[2].port", "spec.ports[3].protocol"]
    {
        let named =
            |(object, at, _): &(String, String, String)| object == "Service default/web" && at == field;
        assert!(found.iter().any(named), "{field}: {found:?}");
    }
    assert_eq!(who(&client), pod_names(&[0]));
    let external = Dial::new(at("203.0.113.9", 80).unwrap());
    assert_eq!(answers(&client, Transport::Tcp, external, 10).unwrap(), pod_names(&[0]));
}

/// Binary junk, empty files, directories, dangling links and files of other kinds beside good ones; at start and later.
#[test]
fn junk_in_the_directory() {
    let mut scene = Scene::without_agent(Shape { nodes: 1, pods: 5 }, &[]).unwrap();
    scene.serve().unwrap();
    let directory = scene.lab().manifests().path().to_owned();
    let throw_in = |prefix: &str| {
        let path = |name: &str| directory.join(format!("{prefix}{name}"));
        let junk: Vec<u8> = (0..4096_u32).map(|i| u8::try_from(i * 7919 % 251).unwrap()).collect();
        fs::write(path("junk.yaml"), junk).unwrap();
        fs::write(path("empty.yaml"), "").unwrap();
        fs::write(path("blank.yaml"), "\n---\n---\n# nothing\n---\n").unwrap();
        fs::write(path("scalar.yaml"), "just words\n").unwrap();
        fs::write(path("list.yaml"), "- 1\n- two\n").unwrap();
        fs::write(path("other.yaml"), "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n")
            .unwrap();
        fs::write(path("empty-list.yaml"), "apiVersion: v1\nkind: List\nitems: []\n").unwrap();
        fs::write(path("notes.txt"), "not for us").unwrap();
        fs::create_dir(path("directory.yaml")).unwrap();
        std::os::unix::fs::symlink("nowhere", path("dangling.yaml")).unwrap();
    };
    throw_in("a-");
    scene.start_agent().unwrap();
    let client = scene.pod(4).unwrap().client().unwrap();
    scene.lab().manifests().write("web", &[web()]).unwrap();
    scene.apply("web-0", &[pod(&scene, 0)]).unwrap();
    assert_eq!(who(&client), pod_names(&[0]));
    throw_in("b-");
    scene.apply("web-1", &[pod(&scene, 1)]).unwrap();
    assert_eq!(who(&client), pod_names(&[0, 1]));
    for file in ["a-junk.yaml", "b-junk.yaml"] {
        let named = problems(&scene).iter().any(|(object, _, _)| object.contains(file));
        assert!(named, "{file}: {:?}", problems(&scene));
    }
    for file in ["a-junk.yaml", "b-junk.yaml", "a-scalar.yaml", "b-scalar.yaml", "a-list.yaml", "b-list.yaml"]
    {
        fs::remove_file(directory.join(file)).unwrap();
    }
    scene.settle().unwrap();
    assert_eq!(problems(&scene), []);
}

/// A Service of 10,000 endpoints in slices, one of which answers, and a list of 1,000 Services more: all are programmed,
/// and while they are there small changes are as quick as ever.
#[test]
fn huge_lists() {
    let scene = scene();
    let client = scene.pod(4).unwrap().client().unwrap();
    let started = Instant::now();
    let mut text = String::new();
    for slice in 0..10 {
        let _ = write!(
            text,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
             metadata: {{name: huge-{slice}, namespace: default, labels: {{kubernetes.io/service-name: huge}}}}\n\
             ports: [{{name: http, protocol: TCP, port: {TARGET}}}]\nendpoints:\n"
        );
        for endpoint in 0..1000 {
            let number = slice * 1000 + endpoint;
            let _ = writeln!(
                text,
                "- addresses: [10.{}.{}.{}]",
                100 + number / 62500,
                number / 250 % 250,
                1 + number % 250
            );
        }
    }
    scene.lab().manifests().write_text("endpoints", &text).unwrap();
    let mut list = String::from("apiVersion: v1\nkind: List\nitems:\n");
    for index in 0..1000 {
        let _ = writeln!(
            list,
            "- {{apiVersion: v1, kind: Service, metadata: {{name: s{index}, namespace: many}}, spec: {{clusterIP: 10.97.{}.{}, ports: [{{port: 80}}]}}}}",
            index / 250,
            1 + index % 250
        );
    }
    scene.lab().manifests().write_text("many", &list).unwrap();
    let huge = service("huge", &["10.96.0.30"]).port("http", "TCP", 80, TARGET);
    scene.apply("huge", &[huge]).unwrap();
    let took = started.elapsed();
    println!("10,000 endpoints and 1,000 Services more: {took:?} from the first file to the kernel");
    assert!(took < HUGE_WITHIN, "{took:?}");
    let backends = scene.agent().unwrap().ask(&["get", "backends", "-o", "json"]).unwrap();
    let backends: Vec<Value> = serde_json::from_slice(&backends.stdout).unwrap();
    assert_eq!(backends.len(), 10_000);
    assert!(fail(&client, Transport::Tcp, Dial::new(at("10.97.3.250", 80).unwrap())).unwrap().is_refused());

    scene.lab().manifests().write("web-0", &[pod(&scene, 0)]).unwrap();
    scene.apply("web", &[web()]).unwrap();
    let started = Instant::now();
    scene.apply("web-1", &[pod(&scene, 1)]).unwrap();
    assert_eq!(who(&client), pod_names(&[0, 1]));
    assert!(started.elapsed() < SMALL_WITHIN, "{:?}", started.elapsed());
    // And all of it goes again.
    for name in ["many", "endpoints", "huge"] {
        scene.lab().manifests().remove(name).unwrap();
    }
    scene.settle().unwrap();
    assert_eq!(who(&client), pod_names(&[0, 1]));
    eventually("all records are free again", || {
        let services = scene.agent()?.status()?["services"].as_u64();
        anyhow::ensure!(services == Some(2), "{services:?}");
        Ok(())
    })
    .unwrap();
}

/// A file that gets another name holds the same objects: nobody notices. One that is moved away takes them along.
#[test]
fn files_are_renamed_moved_and_deleted() {
    let scene = scene();
    let client = scene.pod(4).unwrap().client().unwrap();
    scene.lab().manifests().write("web", &[web()]).unwrap();
    scene.apply("pods", &[pod(&scene, 0), pod(&scene, 1)]).unwrap();
    let path = |name: &str| scene.lab().manifests().path().join(name);
    let spec = LoopSpec::new(Transport::Tcp, dial()).pause(Duration::from_micros(200));
    let watch = client.start_loop(spec).unwrap();
    for _ in 0..20 {
        // A file that is renamed again before it could be read is somewhere all the time, too.
        fs::rename(path("web.yaml"), path("a.yaml")).unwrap();
        fs::rename(path("a.yaml"), path("web.yml")).unwrap();
        scene.settle().unwrap();
        fs::rename(path("web.yml"), path("web.yaml")).unwrap();
        scene.settle().unwrap();
        fs::rename(path("pods.yaml"), path("sdop.yaml")).unwrap();
        scene.settle().unwrap();
        fs::rename(path("sdop.yaml"), path("pods.yaml")).unwrap();
        scene.settle().unwrap();
    }
    let report = client.stop_loop(watch).unwrap();
    assert_eq!(report.failed(), 0, "{:?}", report.first_failures);

    let away = scene.lab().directory().join("away.yaml");
    fs::rename(path("pods.yaml"), &away).unwrap();
    scene.settle().unwrap();
    assert!(fail(&client, Transport::Tcp, dial()).unwrap().is_refused());
    fs::rename(&away, path("pods.yaml")).unwrap();
    scene.settle().unwrap();
    assert_eq!(who(&client), pod_names(&[0, 1]));
    // Written in place, as an editor or `>` does.
    fs::write(path("pods.yaml"), pod(&scene, 2).yaml()).unwrap();
    scene.settle().unwrap();
    assert_eq!(who(&client), pod_names(&[2]));
    scene.delete("web").unwrap();
    let gone = dial().timeout(Duration::from_millis(700));
    assert!(fail(&client, Transport::Tcp, gone).unwrap().is_timeout());
}

/// The manifest directory as a whole goes: that is no empty list. A new one takes its place.
#[test]
fn q7_the_directory_goes_and_comes_back() {
    let scene = scene();
    let client = scene.pod(4).unwrap().client().unwrap();
    scene.lab().manifests().write("web", &[web()]).unwrap();
    scene.apply("web-0", &[pod(&scene, 0)]).unwrap();
    let directory = scene.lab().manifests().path().to_owned();
    let away = scene.lab().directory().join("away");
    fs::rename(&directory, &away).unwrap();
    let log = || fs::read_to_string(scene.agent().unwrap().log()).unwrap();
    eventually("it is told", || {
        anyhow::ensure!(log().contains("the manifest directory is gone"));
        Ok(())
    })
    .unwrap();
    assert_eq!(who(&client), pod_names(&[0]));
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("all.yaml"), format!("{}---\n{}", web().yaml(), pod(&scene, 1).yaml())).unwrap();
    fs::write(directory.join("node.yaml"), lab_node(scene.node().unwrap()).yaml()).unwrap();
    eventually("the new one is read", || {
        let answer = reach(&client, Transport::Tcp, dial())?.answer;
        anyhow::ensure!(answer.as_deref() == Some("pod-1-2"), "{answer:?}");
        Ok(())
    })
    .unwrap();
    assert_eq!(who(&client), pod_names(&[1]));
}

/// How long after rename() a client's connection goes to the new endpoint. Measured and told; only absurd values fail.
#[test]
fn how_soon_a_change_is_visible() {
    const CHANGES: usize = 60;
    let scene = scene();
    let client = scene.pod(4).unwrap().client().unwrap();
    scene.lab().manifests().write("web", &[web()]).unwrap();
    scene.apply("pods", &[pod(&scene, 0)]).unwrap();
    let mut took = Vec::new();
    for change in 0..CHANGES {
        let next = (change + 1) % 2;
        let expected = pod_names(&[next]);
        let watch = client.start_loop(LoopSpec::new(Transport::Tcp, dial()).record()).unwrap();
        while client.read_loop(watch).unwrap().attempts == 0 {}
        // Writing the text is no part of it.
        let objects = [pod(&scene, next)];
        let from_ns = monotonic_ns();
        scene.lab().manifests().write("pods", &objects).unwrap();
        scene.settle().unwrap();
        let report = client.stop_loop(watch).unwrap();
        assert_eq!(report.failed(), 0, "{:?}", report.first_failures);
        // When the first attempt that got there began: what it took itself is not the change's.
        let seen = report.records.iter().find(|record| {
            record.start_ns >= from_ns && record.result.as_ref().is_ok_and(|name| expected.contains(name))
        });
        let seen_ns = seen.map_or_else(monotonic_ns, |record| record.start_ns);
        took.push(Duration::from_nanos(seen_ns - from_ns));
    }
    took.sort();
    let (p50, p99, most) = (took[CHANGES / 2], took[CHANGES * 99 / 100], took[CHANGES - 1]);
    println!("from rename() to a connection that goes there: p50 {p50:?}, p99 {p99:?}, at most {most:?}");
    assert!(p50 < SMALL_WITHIN, "{took:?}");
}

/// N2, O4: what is odd about the whole node is in the log, once for each change, and in `sheave status`.
#[test]
fn n2_o4_what_is_odd_about_the_node_is_said() {
    let mut scene = Scene::without_agent(Shape { nodes: 1, pods: 1 }, &[]).unwrap();
    scene.lab().manifests().remove("node").unwrap();
    scene.start_agent().unwrap();
    let said = |what: &str| scene.agent().unwrap().log_tail().matches(what).count();
    let (open, missing) = ("NodePorts are open on all IPv4 addresses", "not found: its zone");
    let found = problems(&scene);
    assert!(
        [open, missing].iter().all(|what| found.iter().any(|(_, _, text)| text.contains(what))),
        "{found:?}"
    );
    for number in 0..3 {
        scene.apply(&format!("web-{number}"), &[]).unwrap();
    }
    assert_eq!((said(open), said(missing)), (1, 1), "{}", scene.agent().unwrap().log_tail());
    let text = scene.agent().unwrap().ask(&["status"]).unwrap();
    assert!(!String::from_utf8(text.stdout).unwrap().contains("every endpoint is remote"));

    scene.apply("node", &[lab_node(scene.node().unwrap())]).unwrap();
    assert_eq!(problems(&scene), []);
    assert_eq!(said("its problems are gone"), 1);
}
