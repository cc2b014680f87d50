//! A Service at work on one machine: pods come and go, the VIP stays.
//!
//! Everything runs in namespaces and a cgroup of its own and is gone afterwards; nothing of the machine changes.

use std::{
    cell::Cell,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use sheave_tests::{
    agent::Agent,
    client::Client,
    engine::monotonic_ns,
    lab::{Lab, Node, Place},
    manifests::{Object, lab_node, lab_pod, service},
    protocol::{Dial, LoopReport, LoopSpec, Transport},
    server::Server,
};

use crate::shell::seconds;

/// How many pods there can be; one more is the client.
const PODS: u8 = 5;

/// What the pods listen on.
const HTTP_TARGET: u16 = 9876;
const DNS_TARGET: u16 = 9953;

/// The Service's addresses. No device has them: only Sheave makes them work.
const VIPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];

/// Connections of one line of a table: enough that each of five pods gets some (it fails once in 10^9 runs).
const CONNECTIONS: u64 = 100;

/// A change is live within milliseconds; a busy machine gets more.
const LIVE_WITHIN: Duration = Duration::from_secs(10);

/// Tells the story from start to end; an expectation that does not hold is an error.
pub(crate) fn run() -> Result<()> {
    let started = Instant::now();
    println!(
        "\nA Service is one stable address (a VIP) for pods that come and go. This machine now plays a node:"
    );
    println!("{PODS} pods that answer with their own name, and one pod more that connects to them.");
    let lab = Lab::new(PODS + 1)?;
    let demo = Demo::new(&lab)?;

    demo.step(1, "Three pods and the Service `simpleservice`, as YAML files; then the agent starts.");
    lab.manifests().write("node", &[lab_node(demo.node)])?;
    lab.manifests().write("simpleservice", &[simpleservice()])?;
    demo.scale(3)?;
    let agent = Agent::start(&lab, demo.node)?;
    println!(
        "   kubectl would show: simpleservice  80/TCP -> {HTTP_TARGET}, 53/UDP -> {DNS_TARGET}, both families"
    );
    demo.await_pods(3)?;
    demo.table(3)?;
    demo.show_peer()?;

    demo.step(2, "Two pods more: their files are written, nobody is told.");
    demo.change(5)?;
    demo.table(5)?;

    demo.step(
        3,
        "Down to one: four files are removed (the processes still run, but nobody gets there any more).",
    );
    demo.change(1)?;
    demo.table(1)?;

    demo.step(4, "No pod left: a client is refused at once, it need not wait for a time-out.");
    demo.scale(0)?;
    demo.await_refusal()?;

    demo.step(5, "Three pods again.");
    demo.scale(3)?;
    demo.await_pods(3)?;
    demo.table(3)?;

    demo.step(6, "The agent is killed (SIGKILL) and started again while clients connect all the time.");
    demo.restart(agent)?.stop()?;

    drop(demo);
    let (cgroup, directory) = (lab.cgroup().to_owned(), lab.directory().to_owned());
    drop(lab);
    ensure!(
        !cgroup.exists() && !directory.exists(),
        "the lab left {} or {}",
        cgroup.display(),
        directory.display()
    );
    println!("\nAll expectations held. Everything has been removed again. ({})", seconds(started.elapsed()));
    Ok(())
}

fn simpleservice() -> Object {
    service("simpleservice", &VIPS)
        .port("http", "TCP", 80, "http")
        .port("dns-echo", "UDP", 53, DNS_TARGET)
        .selector("app", "simple")
}

fn pod_name(index: usize) -> String {
    format!("simple-{}", index + 1)
}

/// A VIP with a port.
fn vip(address: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(address.parse().with_context(|| format!("the VIP {address}"))?, port))
}

struct Demo<'a> {
    lab: &'a Lab,
    node: &'a Node,
    client: Client,
    /// How many pods have a file.
    running: Cell<usize>,
    // They answer until dropped.
    _servers: Vec<Server>,
}

impl<'a> Demo<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let node = lab.node(0)?;
        let mut servers = Vec::new();
        for index in 0..usize::from(PODS) {
            for port in [HTTP_TARGET, DNS_TARGET] {
                servers.push(node.pod(index)?.serve_as(&pod_name(index), port)?);
            }
        }
        let client = node.pod(usize::from(PODS))?.client()?;
        Ok(Self { lab, node, client, running: Cell::new(0), _servers: servers })
    }

    fn step(&self, number: u8, title: &str) {
        println!("\n{number}. {title}");
    }

    /// Writes the files of pods that come and removes those of pods that go, so that the first `pods` run.
    fn scale(&self, pods: usize) -> Result<()> {
        let running = self.running.replace(pods);
        for index in running..pods {
            let name = pod_name(index);
            self.lab.manifests().write(&name, &[self.pod(&name, self.node.pod(index)?)])?;
        }
        for index in pods..running {
            self.lab.manifests().remove(&pod_name(index))?;
        }
        Ok(())
    }

    /// Scales while a client connects all the time, and says when the change reached it: the first answer of a pod
    /// that came, or the last attempt that still led to one that went.
    fn change(&self, to: usize) -> Result<()> {
        let from = self.running.get();
        let spec = LoopSpec::new(Transport::Tcp, Dial::new(vip(VIPS[0], 80)?)).record();
        let watch = self.client.start_loop(spec)?;
        let changed_ns = monotonic_ns();
        self.scale(to)?;
        self.await_pods(to)?;
        let report = self.client.stop_loop(watch)?;
        ensure!(report.failed() == 0, "connections failed while pods changed: {:?}", report.first_failures);
        let changing: Vec<_> = (from.min(to)..from.max(to)).map(pod_name).collect();
        let mut seen = report
            .records
            .iter()
            .filter(|record| record.result.as_ref().is_ok_and(|name| changing.contains(name)));
        let live_ns = if to > from {
            seen.next().context("no pod that came has answered")?.end_ns
        } else {
            seen.next_back().context("no pod that went had answered before")?.start_ns
        };
        let after = Duration::from_nanos(live_ns.saturating_sub(changed_ns));
        println!("   live {:.1} ms after the first file changed", after.as_secs_f64() * 1000.0);
        Ok(())
    }

    fn pod(&self, name: &str, place: &Place) -> Object {
        lab_pod(name, "simple", self.node, place)
            .container_port("http", "TCP", HTTP_TARGET)
            .container_port("dns-echo", "UDP", DNS_TARGET)
    }

    /// The lines of the tables: what is dialled, how, and from which kind of socket.
    fn routes(&self) -> Result<Vec<(String, Transport, Dial)>> {
        let [v4, v6] = VIPS;
        let patient =
            |address, port| anyhow::Ok(Dial::new(vip(address, port)?).timeout(Duration::from_secs(2)));
        Ok(vec![
            (format!("TCP {v4}:80"), Transport::Tcp, patient(v4, 80)?),
            (format!("TCP [{v6}]:80"), Transport::Tcp, patient(v6, 80)?),
            (format!("TCP {v4}:80, IPv6 socket"), Transport::Tcp, patient(v4, 80)?.mapped()),
            (format!("UDP {v4}:53"), Transport::UdpUnconnected, patient(v4, 53)?),
            (format!("UDP [{v6}]:53, connected"), Transport::UdpConnected, patient(v6, 53)?),
        ])
    }

    /// Waits until each route leads to all of the first `pods` pods and to no other.
    fn await_pods(&self, pods: usize) -> Result<()> {
        let started = Instant::now();
        loop {
            let mut wrong = None;
            for (name, transport, dial) in self.routes()? {
                let report = self.client.run_loop(LoopSpec::new(transport, dial).count(CONNECTIONS))?;
                if !leads_to(&report, pods) {
                    wrong = Some((name, report));
                    break;
                }
            }
            let Some((name, report)) = wrong else { break };
            ensure!(
                started.elapsed() < LIVE_WITHIN,
                "{name} does not lead to the {pods} pods: answers {:?}, failures {:?}",
                report.answers,
                report.failures
            );
        }
        Ok(())
    }

    /// Who answers, through each address and protocol.
    fn table(&self, pods: usize) -> Result<()> {
        let names: Vec<_> = (0..usize::from(PODS)).map(pod_name).collect();
        let heading: String = names.iter().map(|name| format!("{name:>10}")).collect();
        println!("   {:<36}{heading}{:>9}", format!("who answered {CONNECTIONS} times"), "failed");
        for (route, transport, dial) in self.routes()? {
            let report = self.client.run_loop(LoopSpec::new(transport, dial).count(CONNECTIONS))?;
            let cells: String = names
                .iter()
                .map(|name| {
                    report.answers.get(name).map_or_else(|| format!("{:>10}", "-"), |n| format!("{n:>10}"))
                })
                .collect();
            println!("   {route:<36}{cells}{:>9}", report.failed());
            ensure!(
                leads_to(&report, pods),
                "{route} should lead to the first {pods} pods only: answers {:?}, failures {:?}",
                report.answers,
                report.failures
            );
        }
        Ok(())
    }

    /// What the application sees of all this.
    fn show_peer(&self) -> Result<()> {
        for address in VIPS {
            let to = vip(address, 80)?;
            let exchange = self.client.tcp(Dial::new(to))?.with_context(|| format!("connecting to {to}"))?;
            let peer = exchange.peer.context("a connected socket has a peer")?;
            println!("   an application that asks whom it is connected to (getpeername) hears {peer}");
            ensure!(peer == to, "getpeername says {peer}, the application dialled {to}");
        }
        Ok(())
    }

    fn await_refusal(&self) -> Result<()> {
        for address in VIPS {
            let to = vip(address, 80)?;
            let started = Instant::now();
            loop {
                let outcome = self.client.tcp(Dial::new(to).timeout(Duration::from_secs(1)))?;
                match outcome {
                    Err(failure) if failure.is_refused() => {
                        println!(
                            "   TCP {to}: refused after {} µs (ECONNREFUSED)",
                            failure.elapsed_ns / 1000
                        );
                        break;
                    }
                    other => ensure!(
                        started.elapsed() < LIVE_WITHIN,
                        "{to} has no pod and should refuse, but: {other:?}"
                    ),
                }
            }
        }
        Ok(())
    }

    /// Kills the agent and starts another under load.
    fn restart(&self, agent: Agent) -> Result<Agent> {
        let mut loops = Vec::new();
        for (route, transport, dial) in self.routes()? {
            let spec = LoopSpec::new(transport, dial).threads(2).pause(Duration::from_millis(1));
            loops.push((route, self.client.start_loop(spec)?));
        }
        let held = self.client.hold(Dial::new(vip(VIPS[0], 80)?), 20)?;
        thread::sleep(Duration::from_millis(500));
        agent.kill()?;
        let down = Instant::now();
        // Long enough that a node without an agent is seen at work.
        thread::sleep(Duration::from_secs(1));
        let agent = Agent::start(self.lab, self.node)?;
        println!("   no agent for {}", seconds(down.elapsed()));
        thread::sleep(Duration::from_millis(500));

        println!("   {:<36}{:>12}{:>9}", "meanwhile", "connections", "failed");
        let mut reports = Vec::new();
        for (route, id) in loops {
            let report = self.client.stop_loop(id)?;
            println!("   {route:<36}{:>12}{:>9}", report.attempts, report.failed());
            reports.push((route, report));
        }
        let alive = self.client.check_held(held.id)?;
        println!("   {:<36}{:>12}{:>9}", "open since before", held.alive, held.alive - alive.alive);
        for (route, report) in reports {
            ensure!(
                leads_to(&report, 3),
                "{route}, during the restart: answers {:?}, failures {:?}, the first: {:?}",
                report.answers,
                report.failures,
                report.first_failures
            );
        }
        ensure!(held.alive == 20 && alive.alive == 20, "connections broke during the restart: {alive:?}");
        Ok(agent)
    }
}

/// Whether each of the first `pods` pods answered, nobody else did, and nothing failed.
fn leads_to(report: &LoopReport, pods: usize) -> bool {
    let expected = (0..pods).map(pod_name);
    report.failed() == 0 && report.answers.keys().cloned().eq(expected)
}
