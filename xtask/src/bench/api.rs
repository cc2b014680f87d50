//! What a cluster of this size costs an agent that follows a real API server: time, traffic, requests, memory.
//!
//! Ten minutes at 10,000 Services, most of them for making the objects; so only who names it gets it.

use std::{
    collections::BTreeMap,
    fs,
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sheave_tests::{
    client::Client,
    kubernetes::{api::Api, cluster::Cluster},
    lab::Shape,
    manifests::{Object, service, slice},
    measure::cpu_ns,
    protocol::{Dial, Transport},
    scene::{TARGET, at, eventually, reach},
};

use super::{
    Effort, control, go_on,
    report::{Fact, Report},
};

/// Which metric this is.
pub(crate) const ID: &str = "api";

/// Endpoints of each Service.
const ENDPOINTS: u32 = 10;

/// Of so many Services one loses an endpoint.
const CHANGES_OF: u32 = 10;

/// The first VIP and the first endpoint.
const VIPS: Ipv4Addr = Ipv4Addr::new(10, 96, 16, 0);
const PODS: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 0);

/// The Service that comes last, with a pod that is there.
const ALIVE_VIP: &str = "10.96.0.10";
const ALIVE_PORT: u16 = 80;

/// Requests that are made at a time.
const MAKERS: u32 = 8;

/// Between two looks at an agent that syncs; a look is a process.
const LOOK: Duration = Duration::from_millis(100);

/// An agent that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(600);

/// How long is looked at what goes on when nothing changes.
const IDLE: Duration = Duration::from_secs(60);

/// Measures at each size.
pub(crate) fn measure(effort: &Effort, report: &mut Report) -> Result<()> {
    for services in &effort.sizes {
        println!("── {services} Services in an API server");
        at_size(*services, report)?;
        report.write()?;
    }
    Ok(())
}

fn at_size(services: u32, report: &mut Report) -> Result<()> {
    let mut cluster = Cluster::without_agents(Shape { nodes: 1, pods: 2 })?;
    cluster.serve()?;
    let api = cluster.api();
    for_each(&api, services, |api, number| {
        api.create(&of_service(number))?;
        api.create(&of_slice(number)).map(drop)
    })?;

    start_agent(&mut cluster, "first start", services, report)?;
    let programmed = cluster.agent(0)?.programmed()?;
    ensure!(programmed.len() >= usize::try_from(services)?, "{} service ports", programmed.len());

    let taken = Taken::now(&cluster)?;
    thread::sleep(IDLE);
    taken.tell(&cluster, "a minute of rest", services, report)?;

    let taken = Taken::now(&cluster)?;
    for_each(&api, services.div_ceil(CHANGES_OF), |api, number| {
        api.patch(&of_slice(number), &json!({"endpoints": endpoints(number, ENDPOINTS - 1)})).map(drop)
    })?;
    cluster.settle()?;
    taken.tell(&cluster, "every tenth slice changes", services, report)?;

    // One more among all these, with a pod that is there.
    let client = cluster.place(0, 1)?.client()?;
    let place = cluster.place(0, 0)?.v4().to_string();
    let begun = Instant::now();
    api.create(&service("alive", &[ALIVE_VIP]).port("http", "TCP", ALIVE_PORT, TARGET))?;
    api.create(
        &slice("alive", "alive", "IPv4").slice_port("http", "TCP", TARGET).endpoint(&place, "node-1"),
    )?;
    answers(&client)?;
    report.fact(Fact::times(
        ID,
        "one more Service: made to answering",
        services,
        vec![u64::try_from(begun.elapsed().as_nanos())?],
    ));

    cluster.take_agent(0)?.kill()?;
    start_agent(&mut cluster, "next start", services, report)?;
    answers(&client)
}

fn answers(client: &Client) -> Result<()> {
    let dial = Dial::new(at(ALIVE_VIP, ALIVE_PORT)?).timeout(Duration::from_millis(700));
    let exchange = eventually("the last Service answers", || reach(client, Transport::Tcp, dial))?;
    ensure!(exchange.answer.as_deref() == Some("pod-1-1"), "{exchange:?}");
    Ok(())
}

fn start_agent(cluster: &mut Cluster, what: &str, services: u32, report: &mut Report) -> Result<()> {
    let taken = Taken { cpu_ns: 0, ..Taken::now(cluster)? };
    cluster.spawn_agent(0)?;
    let is_synced = |cluster: &Cluster| -> Result<bool> {
        // Before it listens there is nobody to ask.
        Ok(cluster.agent(0)?.status().is_ok_and(|status| status.get("synced") == Some(&json!(true))))
    };
    while !is_synced(cluster)? {
        go_on()?;
        if taken.at.elapsed() > PATIENCE {
            bail!("{what}: not synced within {PATIENCE:?}");
        }
        thread::sleep(LOOK);
    }
    taken.tell(cluster, what, services, report)?;
    let status = cluster.agent(0)?.status()?;
    let writes = status.get("writes").and_then(Value::as_u64).context("writes in the status")?;
    report.fact(Fact::count(ID, &format!("{what}: writes to the kernel"), services, writes));
    control::process_memory(ID, what, cluster.agent(0)?.pid(), services, report)
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
    fn now(cluster: &Cluster) -> Result<Self> {
        let (received_bytes, sent_bytes) = traffic(cluster)?;
        let cpu_ns = cluster.agent(0).map_or(Ok(0), |agent| cpu_ns(agent.pid()))?;
        let requests = cluster.control().audit()?.len();
        Ok(Self { at: Instant::now(), received_bytes, sent_bytes, requests, cpu_ns })
    }

    /// Says what has been taken since.
    fn tell(&self, cluster: &Cluster, what: &str, services: u32, report: &mut Report) -> Result<()> {
        let now = Self::now(cluster)?;
        let mut kinds = BTreeMap::<String, u64>::new();
        for request in cluster.control().audit()?.iter().skip(self.requests) {
            let text = |pointer| request.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
            *kinds.entry(format!("{} {}", text("/verb"), text("/objectRef/resource"))).or_default() += 1;
        }
        let wall_ns = u64::try_from((now.at - self.at).as_nanos())?;
        let name = |part: &str| format!("{what}: {part}");
        report.fact(Fact::times(ID, &name("wall"), services, vec![wall_ns]));
        report.fact(Fact::times(ID, &name("CPU"), services, vec![now.cpu_ns - self.cpu_ns]));
        report.fact(Fact::bytes(ID, &name("received"), services, now.received_bytes - self.received_bytes));
        report.fact(Fact::bytes(ID, &name("sent"), services, now.sent_bytes - self.sent_bytes));
        for (kind, count) in kinds {
            report.fact(Fact::count(ID, &name(&format!("requests, {kind}")), services, count));
        }
        Ok(())
    }
}

/// Bytes that came to the node and left it; only its agent talks to anybody.
fn traffic(cluster: &Cluster) -> Result<(u64, u64)> {
    let netns = cluster.node(0)?.host().netns();
    let text = netns.run(|| fs::read_to_string("/proc/thread-self/net/dev"))??;
    let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:")).context("no eth0")?;
    let mut numbers = line.split_whitespace();
    let mut number = |skip| -> Result<u64> {
        Ok(numbers.nth(skip).with_context(|| format!("too few numbers in {line}"))?.parse()?)
    };
    Ok((number(0)?, number(7)?))
}

/// Does something for each number, a few at a time.
fn for_each(api: &Api, numbers: u32, work: impl Fn(&Api, u32) -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let maker = |first: u32| {
            let work = &work;
            scope.spawn(move || {
                (first..numbers).step_by(MAKERS as usize).try_for_each(|number| {
                    go_on()?;
                    work(api, number)
                })
            })
        };
        let makers: Vec<_> = (0..MAKERS).map(maker).collect();
        makers
            .into_iter()
            .try_for_each(|maker| maker.join().map_err(|_| anyhow::anyhow!("a maker of objects panicked"))?)
    })
}

fn numbered(first: Ipv4Addr, number: u32) -> String {
    Ipv4Addr::from_bits(first.to_bits() + number).to_string()
}

fn named(number: u32) -> String {
    format!("service-{number}")
}

fn of_service(number: u32) -> Object {
    service(&named(number), &[&numbered(VIPS, number)]).port("http", "TCP", 80, TARGET)
}

fn of_slice(number: u32) -> Object {
    let slice = slice(&named(number), &named(number), "IPv4").slice_port("http", "TCP", TARGET);
    slice.set("endpoints", endpoints(number, ENDPOINTS))
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
            "targetRef": {
                "kind": "Pod",
                "namespace": "default",
                "name": format!("service-{number}-6d5f7c9b8-{pod}"),
                "uid": format!("00000000-0000-4000-8000-{pod:012}"),
            },
        })
    };
    (0..count).map(endpoint).collect()
}
