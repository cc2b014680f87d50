//! The control planes side by side, with one API server: how soon all Services serve, how soon a change, what many take.
//!
//! The same prober looks at all: a new UDP socket asks who answers. One at a time is measured while the others are
//! stopped, so that none takes another's CPU.

use std::{fs, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use sheave_tests::{
    agent::{Agent, Source},
    cgroup,
    engine::monotonic_ns,
    kubernetes::kube_proxy::{KubeProxy, Mode},
};

use super::{
    Effort, Options,
    data::{IPTABLES, NFTABLES, SHEAVE},
    go_on,
    peers::{Hub, await_all_answer},
    report::Report,
    row::{Goal, Row},
    scale::{CLUSTER_CIDR, Family, Group, Scale},
    world::{Side, World},
};

/// kube-proxy told to write at once instead of once a second.
const AT_ONCE: &str = "kube-proxy nftables, no pause";

/// Who is compared; the first one is what the others are compared with.
const ARMS: [(&str, Option<(Mode, u32)>); 4] = [
    (SHEAVE, None),
    (NFTABLES, Some((Mode::Nftables, 1000))),
    (AT_ONCE, Some((Mode::Nftables, 1))),
    (IPTABLES, Some((Mode::Iptables, 1000))),
];

/// A start that takes longer has failed, and a change.
const STARTED_WITHIN: Duration = Duration::from_secs(1800);
const LIVE_WITHIN: Duration = Duration::from_secs(120);

/// Between changes: longer than kube-proxy waits between two writes.
const REST: Duration = Duration::from_millis(1200);

/// Who was stopped has noticed what it missed, and written it if it writes once a second.
const MISSED_WITHIN: Duration = Duration::from_secs(3);

/// Changes of a second, how many at a time, and for how long.
const CHANGES: u32 = 1000;
const CHANGES_AT_ONCE: u32 = 100;
const CHURN: Duration = Duration::from_secs(10);

/// What the kernel counts CPU time of ended children in.
const TICK_MS: f64 = 10.0;

/// Somebody who serves.
enum Proxy {
    Sheave(Agent),
    Kube(KubeProxy),
}

struct Rival {
    name: &'static str,
    proxy: Proxy,
    world: World,
}

impl Rival {
    fn pid(&self) -> u32 {
        match &self.proxy {
            Proxy::Sheave(agent) => agent.pid(),
            Proxy::Kube(proxy) => proxy.pid(),
        }
    }

    fn freeze(&self, frozen: bool) -> Result<()> {
        use nix::sys::signal::Signal;
        match &self.proxy {
            Proxy::Sheave(agent) => agent.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT }),
            Proxy::Kube(proxy) => cgroup::freeze(proxy.cgroup(), frozen),
        }
    }

    /// The CPU time of the process and of the commands that it ran to their end.
    fn cpu_ms(&self) -> Result<f64> {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        // Behind the name, which may have anything in it; the state is the third field.
        let fields: Vec<_> = text.rsplit_once(") ").context("a name")?.1.split(' ').collect();
        let ticks = fields.get(11..15).context("CPU times")?.iter().map(|field| Ok(field.parse::<u32>()?));
        Ok(f64::from(ticks.sum::<Result<u32>>()?) * TICK_MS)
    }

    /// Ports come again: an old entry of connection tracking would lead a new socket where an old one was led.
    fn forget(&self) -> Result<()> {
        self.world.node()?.host().netns().forget_connections()
    }

    /// Moves the first Service; returns when its answers came from there.
    fn moved(&self, hub: &Hub, group: Group) -> Result<u64> {
        self.forget()?;
        let (path, slice) = self.world.scale.moved(0, group);
        hub.plane().api().put(&path, &slice)?;
        self.await_group(0, group)
    }

    /// Waits until what happened while it was stopped is over.
    fn catch_up(&self, hub: &Hub) -> Result<()> {
        thread::sleep(MISSED_WITHIN);
        for group in [Group::B, Group::A, Group::B, Group::A] {
            self.moved(hub, group)?;
        }
        Ok(())
    }

    /// When a Service's answers began to come from a group.
    fn await_group(&self, service: u32, group: Group) -> Result<u64> {
        let vip = self.world.scale.vip(Family::V4, service);
        let found = self.world.client().await_server(vip, group.tag(), LIVE_WITHIN);
        found.with_context(|| self.name.to_owned())
    }
}

/// Measures all that is wanted at a size.
pub(crate) fn measure(services: u32, options: &Options, effort: &Effort, report: &mut Report) -> Result<()> {
    let endpoints = effort.endpoints;
    let scale = Scale { services, endpoints, dual_stack: false, protocols: &["UDP"], node_ports: false };
    let hub = Hub::new(&scale)?;
    let rivals = starts(&hub, scale, effort, report)?;
    if options.wants("a2") {
        changes(&hub, &rivals, effort, report)?;
    }
    // One transaction of the store holds a slice but once.
    if options.wants("a3") && services >= CHANGES_AT_ONCE {
        churn(&hub, &rivals, report)?;
    }
    Ok(())
}

/// A1: from exec to the last Service. The last ones of each stay, stopped.
fn starts(hub: &Hub, scale: Scale, effort: &Effort, report: &mut Report) -> Result<Vec<Rival>> {
    // What takes minutes is done once.
    let starts = if scale.services < 10_000 { effort.starts } else { 1 };
    let mut rivals = Vec::new();
    let mut row = Row::new(
        "a1",
        "cold start from an API server: exec to every Service answering".to_owned(),
        "ms",
        scale.services,
        None,
    );
    for (number, (name, peer)) in (1_u8..).zip(ARMS) {
        let mut rounds = Vec::new();
        for start in 0..starts {
            go_on()?;
            let world = World::new(scale)?;
            let node = world.node()?;
            let kubeconfig = hub.admit(node, number)?;
            world.admit(world.client(), Side::Inside)?;
            let vips = world.client().targets(scale.vips(Family::V4))?;
            let begun_ns = monotonic_ns();
            let proxy = match peer {
                None => {
                    let arguments = ["--cluster-cidr", CLUSTER_CIDR];
                    let source = Source::Kubeconfig(&kubeconfig);
                    Proxy::Sheave(Agent::spawn_with(node, &source, node.cgroup(), &arguments)?)
                }
                Some((mode, pause_ms)) => {
                    Proxy::Kube(KubeProxy::start(node, &kubeconfig, mode, CLUSTER_CIDR, pause_ms)?)
                }
            };
            let all = await_all_answer(world.client(), vips, STARTED_WITHIN, || Ok(()))
                .with_context(|| name.to_owned())?;
            rounds.push((all.all_ns - begun_ns) as f64 / 1e6);
            let rival = Rival { name, proxy, world };
            if start + 1 == starts {
                rival.freeze(true)?;
                rivals.push(rival);
            } else {
                drop(rival);
            }
        }
        row.add(name, rounds, None);
    }
    compare(&mut row);
    report.add(row);
    Ok(rivals)
}

/// A2: one endpoint moves.
fn changes(hub: &Hub, rivals: &[Rival], effort: &Effort, report: &mut Report) -> Result<()> {
    let api = hub.plane().api();
    let services = rivals.first().context("somebody who serves")?.world.scale.services;
    let mut row = Row::new(
        "a2",
        "one endpoint change: sent to the API server to answered by the new one".to_owned(),
        "ms",
        services,
        None,
    );
    let mut stored_ms = Vec::new();
    for rival in rivals {
        rival.freeze(false)?;
        let scale = rival.world.scale;
        let movable = scale.movable();
        let mut live_ms = Vec::new();
        rival.catch_up(hub)?;
        for flip in 0..effort.api_flips * 2 {
            go_on()?;
            let index = usize::try_from(flip / 2)? % movable.len();
            let service = *movable.get(index).context("a movable Service")?;
            let group = if flip.is_multiple_of(2) { Group::B } else { Group::A };
            let (path, slice) = scale.moved(service, group);
            rival.forget()?;
            let (begun_ns, stored_ns, live_ns) = thread::scope(|scope| {
                let prober = scope.spawn(|| rival.await_group(service, group));
                thread::sleep(REST + Duration::from_micros(u64::from(flip * 37 % 1000)));
                let begun_ns = monotonic_ns();
                api.put(&path, &slice)?;
                let stored_ns = monotonic_ns();
                let live_ns = prober.join().map_err(|_| anyhow::anyhow!("the prober panicked"))??;
                anyhow::Ok((begun_ns, stored_ns, live_ns))
            })?;
            ensure!(live_ns > begun_ns, "{}: the change was there before it was made", rival.name);
            live_ms.push((live_ns - begun_ns) as f64 / 1e6);
            if rival.name == SHEAVE {
                stored_ms.push((stored_ns - begun_ns) as f64 / 1e6);
            }
        }
        rival.freeze(true)?;
        let p99 = super::stats::quantile(&super::stats::ordered(&live_ms), 0.99);
        row.add(rival.name, live_ms, Some(p99));
    }
    row.add("API server alone: sent to stored", stored_ms, None);
    compare(&mut row);
    report.add(row);
    Ok(())
}

/// A3: a thousand changes a second.
fn churn(hub: &Hub, rivals: &[Rival], report: &mut Report) -> Result<()> {
    let scale = rivals.first().context("somebody who serves")?.world.scale;
    let name = |what: &str| format!("{CHANGES} endpoint changes a second, {} s: {what}", CHURN.as_secs());
    let mut cpu = Row::new("a3", name("CPU time, with commands"), "CPU-ms", scale.services, None);
    let mut late = Row::new("a3", name("then one change until live"), "ms", scale.services, None);
    for (number, rival) in (0_u32..).zip(rivals) {
        rival.freeze(false)?;
        rival.catch_up(hub)?;
        let before = rival.cpu_ms()?;
        let begun = std::time::Instant::now();
        let mut made = 0;
        while begun.elapsed() < CHURN {
            go_on()?;
            // Each slice has one endpoint and all of them in turn, whatever it had before this run.
            let some = (made..made + CHANGES_AT_ONCE).map(|change| {
                let service = change % scale.services;
                let lap = change / scale.services + number;
                scale.churned(service, lap)
            });
            hub.plane().store(some)?;
            made += CHANGES_AT_ONCE;
            let due = Duration::from_millis(u64::from(made) * 1000 / u64::from(CHANGES));
            thread::sleep(due.saturating_sub(begun.elapsed()));
        }
        let wanted = CHANGES * u32::try_from(CHURN.as_secs())?;
        ensure!(made * 10 >= wanted * 9, "the API server's store took {made} changes, not {wanted}");
        let begun_ns = monotonic_ns();
        let live_ns = rival.moved(hub, Group::B)?;
        late.add(rival.name, vec![(live_ns - begun_ns) as f64 / 1e6], None);
        cpu.add(rival.name, vec![rival.cpu_ms()? - before], None);
        rival.moved(hub, Group::A)?;
        rival.freeze(true)?;
    }
    for mut row in [cpu, late] {
        compare(&mut row);
        report.add(row);
    }
    Ok(())
}

fn compare(row: &mut Row) {
    let goal = |to| Goal { arm: SHEAVE, to, at_most: None };
    row.compare(&[goal(NFTABLES), goal(AT_ONCE), goal(IPTABLES)]);
}
