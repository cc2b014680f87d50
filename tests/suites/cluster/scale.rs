//! What a large cluster costs an agent. Numbers are printed, not judged: the machine decides over them.

#![expect(clippy::print_stdout, reason = "what is measured is for whoever asked")]

use std::{
    collections::BTreeMap,
    fs,
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use sheave_tests::{
    kubernetes::{api::Api, cluster::Cluster},
    lab::Shape,
    manifests::{Object, service, slice},
    measure::cpu_ns,
    scene::TARGET,
};

use crate::{client, tcp};

/// Services, and the endpoints of each: 100,000 in all.
const SERVICES: u32 = 10_000;
const ENDPOINTS: u32 = 10;

/// Slices that lose an endpoint.
const CHANGES: u32 = 1_000;

/// The first VIP and the first endpoint.
const VIPS: Ipv4Addr = Ipv4Addr::new(10, 96, 16, 0);
const PODS: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 0);

/// Requests that are made at a time.
const MAKERS: u32 = 8;

/// Between two looks at an agent that syncs; a look is a process.
const LOOK: Duration = Duration::from_millis(100);

/// A debug build on a busy machine.
const SYNCED_WITHIN: Duration = Duration::from_secs(600);

/// How long is looked at what goes on when nothing changes.
const IDLE: Duration = Duration::from_secs(60);

fn numbered(first: Ipv4Addr, number: u32) -> String {
    Ipv4Addr::from_bits(first.to_bits() + number).to_string()
}

fn named(number: u32) -> String {
    format!("service-{number}")
}

fn of_service(number: u32) -> Object {
    service(&named(number), &[&numbered(VIPS, number)]).port("http", "TCP", 80, TARGET)
}

/// Endpoints with all that the controller says of them.
fn endpoints(number: u32, count: u32) -> Vec<Value> {
    let endpoint = |index: u32| {
        let pod = number * ENDPOINTS + index;
        json!({
            "addresses": [numbered(PODS, pod)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("node-{}", pod % 1000),
            "zone": format!("zone-{}", pod % 3),
            "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("service-{number}-6d5f7c9b8-{pod}"),
                "uid": format!("00000000-0000-4000-8000-{pod:012}")},
        })
    };
    (0..count).map(endpoint).collect()
}

fn of_slice(number: u32) -> Object {
    let slice = slice(&named(number), &named(number), "IPv4").slice_port("http", "TCP", TARGET);
    slice.set("endpoints", endpoints(number, ENDPOINTS))
}

/// Does something for each number, a few at a time.
fn for_each(api: &Api, numbers: u32, work: impl Fn(&Api, u32) + Sync) {
    thread::scope(|scope| {
        for first in 0..MAKERS {
            let work = &work;
            scope.spawn(move || {
                (first..numbers).step_by(MAKERS as usize).for_each(|number| work(api, number))
            });
        }
    });
}

/// What an agent has taken so far.
struct Taken {
    at: Instant,
    received_bytes: u64,
    sent_bytes: u64,
    requests: usize,
    cpu_ns: u64,
}

impl Taken {
    fn now(cluster: &Cluster) -> Self {
        let (received_bytes, sent_bytes) = traffic(cluster);
        let cpu_ns = cluster.agent(0).map_or(0, |agent| cpu_ns(agent.pid()).unwrap());
        let requests = cluster.control().audit().unwrap().len();
        Self { at: Instant::now(), received_bytes, sent_bytes, requests, cpu_ns }
    }

    /// Says what has been taken since.
    fn print(&self, cluster: &Cluster, what: &str) {
        let now = Self::now(cluster);
        let requests = cluster.control().audit().unwrap().split_off(self.requests);
        let mut kinds = BTreeMap::<String, u32>::new();
        for request in &requests {
            let text = |pointer| request.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
            *kinds.entry(format!("{} {}", text("/verb"), text("/objectRef/resource"))).or_default() += 1;
        }
        let memory = fs::read_to_string(format!("/proc/{}/status", cluster.agent(0).unwrap().pid())).unwrap();
        let memory: Vec<_> = memory
            .lines()
            .filter(|line| ["VmHWM", "VmRSS", "RssAnon"].iter().any(|name| line.starts_with(name)))
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        println!(
            "{what}: {:.2} s, CPU {:.2} s, received {} kB, sent {} kB, requests {kinds:?}, {memory:?}",
            (now.at - self.at).as_secs_f64(),
            (now.cpu_ns - self.cpu_ns) as f64 / 1e9,
            (now.received_bytes - self.received_bytes) / 1000,
            (now.sent_bytes - self.sent_bytes) / 1000,
        );
    }
}

/// Bytes that came to the node and left it; only its agent talks to anybody.
fn traffic(cluster: &Cluster) -> (u64, u64) {
    let netns = cluster.node(0).unwrap().host().netns();
    let text = netns.run(|| fs::read_to_string("/proc/thread-self/net/dev")).unwrap().unwrap();
    let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:")).unwrap();
    let numbers: Vec<u64> = line.split_whitespace().map(|number| number.parse().unwrap()).collect();
    (numbers[0], numbers[8])
}

fn start_agent(cluster: &mut Cluster, what: &str) {
    let taken = Taken { cpu_ns: 0, ..Taken::now(cluster) };
    cluster.spawn_agent(0).unwrap();
    let deadline = taken.at + SYNCED_WITHIN;
    while !cluster.agent(0).unwrap().status().is_ok_and(|status| status["synced"] == json!(true)) {
        assert!(Instant::now() < deadline, "not within {SYNCED_WITHIN:?}: {what}");
        thread::sleep(LOOK);
    }
    taken.print(cluster, what);
    let status = cluster.agent(0).unwrap().status().unwrap();
    let said = ["frontends", "adopted_frontends", "writes", "syncs", "last_sync_microseconds"]
        .map(|name| format!("{name} {}", status[name]));
    println!("{what}: {}", said.join(", "));
}

/// 10,000 Services and 100,000 endpoints in the API server.
#[test]
#[ignore = "a measurement of minutes; run it by name with --ignored --nocapture"]
fn ten_thousand_services() {
    let mut cluster = Cluster::without_agents(Shape { nodes: 1, pods: 2 }).unwrap();
    cluster.serve().unwrap();
    let (api, client) = (cluster.api(), client(&cluster, 0, 1));
    let started = Instant::now();
    for_each(&api, SERVICES, |api, number| {
        api.create(&of_service(number)).unwrap();
        api.create(&of_slice(number)).unwrap();
    });
    println!("made: {:.1} s", started.elapsed().as_secs_f64());

    start_agent(&mut cluster, "first start");
    let programmed = cluster.agent(0).unwrap().programmed().unwrap();
    assert!(programmed.len() >= SERVICES as usize, "{} service ports", programmed.len());

    let taken = Taken::now(&cluster);
    thread::sleep(IDLE);
    taken.print(&cluster, "nothing changes");

    let taken = Taken::now(&cluster);
    for_each(&api, CHANGES, |api, number| {
        let left = endpoints(number, ENDPOINTS - 1);
        api.patch(&of_slice(number), &json!({"endpoints": left})).unwrap();
    });
    println!("changed: {:.1} s", taken.at.elapsed().as_secs_f64());
    cluster.settle().unwrap();
    taken.print(&cluster, "slices changed");

    // One more among all these, with a pod that is there.
    let place = cluster.place(0, 0).unwrap().v4().to_string();
    let alive = slice("alive", "alive", "IPv4").slice_port("http", "TCP", TARGET).endpoint(&place, "node-1");
    let started = Instant::now();
    api.create(&service("alive", &["10.96.0.10"]).port("http", "TCP", 80, TARGET)).unwrap();
    api.create(&alive).unwrap();
    tcp(&client, "10.96.0.10", 80, &["pod-1-1"]);
    println!("one more, and it answers: {:.3} s", started.elapsed().as_secs_f64());

    cluster.take_agent(0).unwrap().kill().unwrap();
    start_agent(&mut cluster, "next start");
    tcp(&client, "10.96.0.10", 80, &["pod-1-1"]);
}
