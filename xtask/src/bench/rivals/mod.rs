//! The control planes side by side, with one API server: how soon all Services serve, how soon a change, what many take,
//! what they leave in memory, and what a restart or an outage of the API server costs whom they serve.
//!
//! The same prober looks at all: a new UDP socket asks who answers. One at a time is measured while the others are
//! stopped, so that none takes another's CPU.

mod changes;
mod churn;
mod memory;
mod outage;
mod restart;
mod starts;
mod traffic;

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use sheave_tests::{
    agent::{Agent, Source},
    cgroup,
    kubernetes::kube_proxy::{KubeProxy, Mode},
    measure::Change,
};

use super::{
    Effort, Options,
    data::{IPTABLES, NFTABLES, SHEAVE},
    go_on,
    peers::Hub,
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

/// What is measured here.
pub(crate) const IDS: [&str; 8] = ["a1", "a2", "a3", "a4", "a5", "a6", "a7", "a9"];

/// A start that takes longer has failed, and a change.
const STARTED_WITHIN: Duration = Duration::from_secs(1800);
const LIVE_WITHIN: Duration = Duration::from_secs(120);

/// How long is waited before somebody looks whether to go on.
const LOOK: Duration = Duration::from_secs(2);

/// Between changes: longer than kube-proxy waits between two writes.
const REST: Duration = Duration::from_millis(1200);

/// Who was stopped has noticed what it missed, and written it if it writes once a second.
const MISSED_WITHIN: Duration = Duration::from_secs(3);

/// What the kernel counts CPU time in, where it counts that of ended threads and children too.
const TICK_MS: f64 = 10.0;

/// Somebody who serves.
enum Proxy {
    Sheave(Agent),
    Kube(KubeProxy),
}

struct Rival {
    name: &'static str,
    mode: Option<(Mode, u32)>,
    kubeconfig: PathBuf,
    // Before the world: it is gone when its world goes. None while it is down.
    proxy: Option<Proxy>,
    world: World,
}

impl Rival {
    /// A world that has an API server in its reach, and nobody who serves. `number` differs by arm.
    fn new(
        hub: &Hub,
        number: u8,
        (name, mode): (&'static str, Option<(Mode, u32)>),
        scale: Scale,
    ) -> Result<Self> {
        let world = World::new(scale)?;
        let kubeconfig = hub.admit(world.node()?, number)?;
        world.admit(world.client(), Side::Inside)?;
        Ok(Self { name, mode, kubeconfig, proxy: None, world })
    }

    /// Starts who serves, for the first time or again.
    fn exec(&mut self) -> Result<()> {
        let node = self.world.node()?;
        self.proxy = Some(match self.mode {
            None => {
                let arguments = ["--cluster-cidr", CLUSTER_CIDR];
                let source = Source::Kubeconfig(&self.kubeconfig);
                Proxy::Sheave(Agent::spawn_with(node, &source, node.cgroup(), &arguments)?)
            }
            Some((mode, pause_ms)) => {
                Proxy::Kube(KubeProxy::start(node, &self.kubeconfig, mode, CLUSTER_CIDR, pause_ms)?)
            }
        });
        Ok(())
    }

    /// Kills it (SIGKILL). What it has programmed stays.
    fn kill(&mut self) -> Result<()> {
        match self.proxy.take().with_context(|| format!("{} does not run", self.name))? {
            Proxy::Sheave(agent) => agent.kill(),
            // Dropped, it is killed.
            Proxy::Kube(mut proxy) => proxy.check(),
        }
    }

    fn proxy(&self) -> Result<&Proxy> {
        self.proxy.as_ref().with_context(|| format!("{} does not run", self.name))
    }

    fn pid(&self) -> Result<u32> {
        Ok(match self.proxy()? {
            Proxy::Sheave(agent) => agent.pid(),
            Proxy::Kube(proxy) => proxy.pid(),
        })
    }

    fn freeze(&self, frozen: bool) -> Result<()> {
        use nix::sys::signal::Signal;
        match self.proxy()? {
            Proxy::Sheave(agent) => agent.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT }),
            Proxy::Kube(proxy) => cgroup::freeze(proxy.cgroup(), frozen),
        }
    }

    /// Our own agent, if this is the arm.
    fn agent(&self) -> Option<&Agent> {
        match &self.proxy {
            Some(Proxy::Sheave(agent)) => Some(agent),
            Some(Proxy::Kube(_)) | None => None,
        }
    }

    /// How often our own agent has written to the kernel since it started.
    fn writes(&self) -> Result<Option<u64>> {
        let Some(agent) = self.agent() else { return Ok(None) };
        let status = agent.status()?;
        status.get("writes").and_then(serde_json::Value::as_u64).context("writes in the status").map(Some)
    }

    /// What our own agent says is wrong.
    fn problems(&self) -> Result<Option<serde_json::Value>> {
        let Some(agent) = self.agent() else { return Ok(None) };
        Ok(agent.status()?.get("problems").cloned())
    }

    /// The CPU time of the process, and of the commands that it ran to their end.
    fn cpu_ms(&self) -> Result<f64> {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.pid()?))?;
        // Behind the name, which may have anything in it; the state is the third field.
        let fields: Vec<_> = text.rsplit_once(") ").context("a name")?.1.split(' ').collect();
        let ticks = fields.get(11..15).context("CPU times")?.iter().map(|field| Ok(field.parse::<u32>()?));
        Ok(f64::from(ticks.sum::<Result<u32>>()?) * TICK_MS)
    }

    /// Ports come again: an old entry of connection tracking would lead a new socket where an old one was led.
    fn forget(&self) -> Result<()> {
        self.world.node()?.host().netns().forget_connections()
    }

    /// Asks for the first Service to be moved.
    fn move_first(&self, hub: &Hub, group: Group) -> Result<()> {
        let (path, slice) = self.world.scale.moved(0, group);
        hub.plane().api().put(&path, &slice).map(drop)
    }

    /// Moves the first Service; returns when its answers came from there.
    fn moved(&mut self, hub: &Hub, group: Group) -> Result<u64> {
        self.forget()?;
        self.move_first(hub, group)?;
        self.await_first(group, LIVE_WITHIN)
    }

    /// When the first Service's answers began to come from a group, for what may take long.
    fn await_first(&mut self, group: Group, within: Duration) -> Result<u64> {
        let begun = Instant::now();
        let vip = self.world.scale.vip(Family::V4, 0);
        loop {
            match self.world.client().await_server(vip, group.tag(), 0, LOOK) {
                Ok(change) => return Ok(change.first_new_ns),
                Err(error) if begun.elapsed() > within => {
                    return Err(error).with_context(|| format!("{}, {within:?}", self.name));
                }
                Err(_) => go_on()?,
            }
            if let Some(Proxy::Kube(proxy)) = &mut self.proxy {
                proxy.check()?;
            }
        }
    }

    /// Waits until what happened while it was stopped is over.
    fn catch_up(&mut self, hub: &Hub) -> Result<()> {
        thread::sleep(MISSED_WITHIN);
        for group in [Group::B, Group::A, Group::B, Group::A] {
            self.moved(hub, group)?;
        }
        Ok(())
    }

    /// When a Service's answers began to come from a group, and what so many looks saw then.
    fn await_group(&self, service: u32, group: Group, looks: u32) -> Result<Change> {
        let vip = self.world.scale.vip(Family::V4, service);
        let found = self.world.client().await_server(vip, group.tag(), looks, LIVE_WITHIN);
        found.with_context(|| self.name.to_owned())
    }
}

/// Measures all that is wanted at a size.
pub(crate) fn measure(services: u32, options: &Options, effort: &Effort, report: &mut Report) -> Result<()> {
    let endpoints = effort.endpoints;
    let scale = Scale { services, endpoints, dual_stack: false, protocols: &["UDP"], node_ports: false };
    let mut hub = Hub::new(&scale)?;
    hub.plane().store(traffic::objects())?;
    let mut rivals = starts::measure(&hub, scale, options, effort, report)?;
    if options.wants("a2") || options.wants("a7") {
        changes::measure(&hub, &mut rivals, effort, report)?;
    }
    // One transaction of the store holds a slice but once.
    if options.wants("a3") && services >= churn::CHANGES_AT_ONCE {
        churn::measure(&hub, &mut rivals, options, report)?;
    }
    if options.wants("a6") {
        restart::measure(&hub, &mut rivals, effort, report)?;
    }
    if options.wants("a9") {
        outage::measure(&mut hub, &mut rivals, effort, report)?;
    }
    Ok(())
}

/// Sheave beside each of the others, and into the report.
fn tell(mut row: Row, report: &mut Report) {
    let goal = |to| Goal { arm: SHEAVE, to, at_most: None };
    row.compare(&[goal(NFTABLES), goal(AT_ONCE), goal(IPTABLES)]);
    report.add(row);
}
