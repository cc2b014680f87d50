//! The data path: what a connection costs, by arm.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use sheave_tests::{
    client::Client,
    kubernetes::kube_proxy::Mode,
    measure::{Check, Slice, Spinners, What, cpu_ns, packets::BareHooks},
};

use super::{
    Effort, NOISE_MAX, Options,
    peers::{Hub, Peer},
    report::Report,
    rounds,
    row::{AGAIN, Goal, Row},
    scale::{Family, Group},
    stats::{Estimate, quantile, sorted},
    still,
    world::{CLIENT_CPU, SERVER_CPU, Side, World},
};

/// Names of arms.
pub(crate) const DIRECT: &str = "direct";
pub(crate) const SHEAVE: &str = "sheave";
/// Programs that do nothing at the hooks, or in our place.
pub(crate) const EMPTY: &str = "empty programs";
/// Programs that read a line of two tables each.
const TWO_READS: &str = "two reads";
pub(crate) const NFTABLES: &str = "kube-proxy nftables";
pub(crate) const IPTABLES: &str = "kube-proxy iptables";

/// The arm of a kube-proxy.
pub(crate) fn name_of(mode: Mode) -> &'static str {
    match mode {
        Mode::Nftables => NFTABLES,
        Mode::Iptables => IPTABLES,
    }
}

/// The worlds in which the data path is measured. They are built alike.
pub(crate) struct Worlds {
    /// Without any proxy.
    pub(crate) direct: World,
    /// Another such.
    pub(crate) again: World,
    /// Without any proxy, but with programs that do nothing where ours are.
    pub(crate) hooked: World,
    pub(crate) _hooks: BareHooks,
    /// With our agent, which has synced.
    pub(crate) sheave: World,
    /// With kube-proxy, which has synced.
    pub(crate) peers: Vec<Peer>,
    /// Who feeds kube-proxy.
    pub(crate) hub: Option<Hub>,
}

impl Worlds {
    /// Runs `work` while whoever serves is stopped.
    pub(crate) fn still<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let freeze = |frozen| -> Result<()> {
            self.hub.iter().try_for_each(|hub| hub.freeze(frozen))?;
            self.peers.iter().try_for_each(|peer| peer.freeze(frozen))?;
            self.sheave.freeze_agent(frozen)
        };
        still(freeze, work)?
    }
}

/// One way to a backend.
pub(crate) struct Arm<'a> {
    /// Which.
    pub(crate) name: &'static str,
    /// Where.
    pub(crate) world: &'a World,
    /// Where the client is.
    pub(crate) side: Side,
    /// What it dials.
    pub(crate) targets: u64,
    /// How it is told that this leads to a backend: kube-proxy leads packets, not sockets.
    pub(crate) check: Check,
}

/// A metric of the data path.
pub(crate) struct Metric {
    /// As `performance.md` numbers it.
    pub(crate) id: &'static str,
    /// For people.
    pub(crate) name: &'static str,
    /// What is done.
    pub(crate) what: What,
    /// Whether client and server share a CPU.
    same_cpu: bool,
    /// The largest ratio to the direct arm that the targets allow.
    target: Option<f64>,
    /// The same for who is under our programs and uses no Service.
    bystander: Option<f64>,
    /// The largest ratio to kube-proxy's older way.
    peer: Option<f64>,
}

/// A metric without a target but to the direct arm.
pub(crate) const fn metric(id: &'static str, name: &'static str, what: What, target: Option<f64>) -> Metric {
    let same_cpu = matches!(what, What::TcpRr | What::Stream | What::UdpExchange);
    Metric { id, name, what, same_cpu, target, bystander: None, peer: None }
}

const METRICS: [Metric; 8] = [
    metric("p1", "UDP connect", What::UdpConnect, Some(1.06)),
    metric("p1", "UDP socket+connect+close", What::UdpSocket, None),
    metric("p1", "TCP connect", What::TcpConnect, Some(1.01)),
    Metric { peer: Some(1.0 / 1.07), ..metric("p2", "TCP CRR", What::TcpCrr, Some(1.01)) },
    Metric { bystander: Some(1.005), ..metric("p3", "TCP RR", What::TcpRr, Some(1.005)) },
    metric("p4", "stream, CPU per byte", What::Stream, Some(1.005)),
    metric("p5", "UDP sendto+recvfrom", What::UdpExchange, Some(1.04)),
    metric("p6", "TCP first packet, SYN to SYN-ACK", What::FirstPacket, None),
];

impl Metric {
    fn connects(&self) -> bool {
        matches!(self.what, What::UdpConnect | What::UdpSocket | What::TcpConnect | What::TcpCrr)
    }

    fn has_packets(&self) -> bool {
        !matches!(self.what, What::UdpConnect | What::UdpSocket)
    }
}

/// Measures all that is wanted.
pub(crate) fn measure(
    worlds: &Worlds,
    options: &Options,
    effort: &Effort,
    report: &mut Report,
) -> Result<()> {
    let Worlds { direct, again, hooked, sheave, .. } = worlds;
    let wanted = || METRICS.iter().filter(|metric| options.wants(metric.id));
    // Without any proxy, but with programs that read as little as one can.
    let reading = wanted().any(Metric::connects).then(|| World::new(sheave.scale)).transpose()?;
    let _reads = reading.as_ref().map(World::reading_hooks).transpose()?;
    // One process measures every arm, so that the places of its memory are no difference between arms.
    let client = sheave.client();
    for family in [Family::V4, Family::V6] {
        let vips = client.targets(sheave.scale.vips(family))?;
        let backends = sheave.scale.backends(family);
        let inside = |address: &SocketAddr| SocketAddr::new(address.ip(), sheave.inside_port());
        let bystander = client.targets(backends.iter().map(inside).collect())?;
        let backends = client.targets(backends)?;
        let arm = |name, world, side, targets, check| Arm { name, world, side, targets, check };
        let led = Check::Socket(World::source(family, Group::A));
        for metric in wanted() {
            let mut arms = vec![
                arm(DIRECT, direct, Side::Outside, backends, led),
                arm(SHEAVE, sheave, Side::Inside, vips, led),
                arm("bystander", sheave, Side::Inside, bystander, led),
            ];
            if metric.has_packets() && family == Family::V4 {
                for Peer { mode, world, .. } in &worlds.peers {
                    // The way to a VIP is the client's default route.
                    let source = world.lab().pod(0)?.v4().into();
                    let asked = Check::Server { tag: Group::A.tag(), source, is_kept: true };
                    arms.push(arm(name_of(*mode), world, Side::Outside, vips, asked));
                }
            }
            // What hooks cost by themselves: no proxy that has them can be cheaper.
            arms.push(arm(EMPTY, hooked, Side::Inside, backends, led));
            if let Some(reading) = reading.as_ref().filter(|_| metric.connects()) {
                arms.push(arm(TWO_READS, reading, Side::Inside, backends, led));
            }
            arms.push(arm(AGAIN, again, Side::Outside, backends, led));
            let name = format!("{} {}", metric.name, family.name());
            report.add(worlds.still(|| one(client, metric, name, effort, &arms))?);
        }
    }
    Ok(())
}

/// Measures a metric in all its arms, the first of which is what the others are compared with.
pub(crate) fn one(
    client: &Client,
    metric: &Metric,
    name: String,
    effort: &Effort,
    arms: &[Arm<'_>],
) -> Result<Row> {
    // Whatever shares a CPU keeps it awake by itself.
    let spinners = if metric.same_cpu { None } else { Some(Spinners::start(CLIENT_CPU + 1)?) };
    let names: Vec<_> = arms.iter().map(|arm| arm.name).collect();
    let turns = rounds::measure(
        effort,
        &names,
        NOISE_MAX,
        |(value, _)| *value,
        |arm, round| {
            let arm = arms.get(arm).context("an arm")?;
            sampled(client, metric, effort, arm, u64::from(round))
                .with_context(|| format!("{name}, {}", arm.name))
        },
    )?;
    drop(spinners);
    let services = arms.first().map_or(0, |arm| arm.world.scale.services);
    let unit = if metric.what == What::Stream { "CPU-ns/kB" } else { "ns" };
    let mut row = Row::new(metric.id, name, unit, services, Some(NOISE_MAX));
    for (arm, turns) in arms.iter().zip(turns) {
        let (values, p99): (Vec<_>, Vec<_>) = turns.into_iter().unzip();
        let p99 = (metric.what != What::Stream).then(|| Estimate::of(&p99).median);
        row.add(arm.name, values, p99);
    }
    let goal = |arm, to, at_most| Goal { arm, to, at_most };
    row.compare(&[
        goal(SHEAVE, DIRECT, metric.target),
        goal("bystander", DIRECT, metric.bystander),
        goal(EMPTY, DIRECT, None),
        goal(TWO_READS, DIRECT, None),
        goal(SHEAVE, NFTABLES, None),
        goal(SHEAVE, IPTABLES, metric.peer),
    ]);
    Ok(row)
}

/// What a slice says. One in which nothing came to its end (the machine was away, or a packet was lost and sent again) is
/// told and repeated: no number says it.
fn sampled(
    client: &Client,
    metric: &Metric,
    effort: &Effort,
    arm: &Arm<'_>,
    seed: u64,
) -> Result<(f64, f64)> {
    const TRIES: u32 = 3;
    for _ in 0..TRIES {
        let (value, tail) = slice(client, metric, effort, arm, seed)?;
        if value.is_finite() {
            return Ok((value, tail));
        }
        println!("── {}: nothing came to its end within {:?}; once more", arm.name, effort.slice);
    }
    bail!("nothing came to its end within {:?}, {TRIES} times", effort.slice)
}

/// A slice's value, and its 99th percentile where it has samples; not a number if nothing came to its end.
fn slice(client: &Client, metric: &Metric, effort: &Effort, arm: &Arm<'_>, seed: u64) -> Result<(f64, f64)> {
    let Arm { name: _, world, side, targets, check } = *arm;
    world.admit(client, side)?;
    // Old entries would make new connections look cheap.
    world.node()?.host().netns().forget_connections()?;
    let slice = Slice {
        what: metric.what,
        targets,
        duration: effort.slice,
        cpu: Some(if metric.same_cpu { SERVER_CPU } else { CLIENT_CPU }),
        seed: seed + 1,
        check,
        netns: Some(world.client_netns(side)?),
    };
    let used = || world.servers().chain([client.pid()]).map(cpu_ns).sum::<Result<u64>>();
    let before = used()?;
    let samples = client.slice(slice)?;
    if metric.what == What::Stream {
        let value = (used()? - before) as f64 / samples.bytes as f64 * 1000.0;
        return Ok((value, value));
    }
    let ns = sorted(&samples.ns);
    // Batches without packets have no tail but interruptions: the cheapest tenth is the cost.
    let part = if metric.has_packets() { 0.5 } else { 0.1 };
    Ok((quantile(&ns, part), quantile(&ns, 0.99)))
}
