//! P8: what a packet costs that a node leads to a backend, by way and by whether its flow is known.

use std::{net::Ipv4Addr, thread, time::Duration, time::Instant};

use anyhow::{Context, Result, ensure};
use sheave_tests::{
    kubernetes::kube_proxy::Mode,
    measure::packets::{Arrivals, BareHooks, Counter, Flows, Generator, KNOWN, Redirect, Target, mac_of},
    nodes::nft,
};

use super::{
    Effort,
    data::{EMPTY, IPTABLES, NFTABLES, SHEAVE},
    go_on,
    peers::{Hub, Peer},
    report::{Fact, Report},
    rounds,
    row::{AGAIN, Goal, Row},
    scale::{Family, NODE_PORT, NODE_PORTS_MAX, Scale, TARGET_PORT},
    stats::{quantile, sorted},
    world::{CLIENT_CPU, World},
};

/// Which metric this is.
pub(crate) const ID: &str = "p8";

/// Two equal arms may differ by so much.
const NOISE_MAX: f64 = 0.01;

/// Frames of one run: new flows cost their caches.
const FRAMES: u32 = 8192;

/// Of the runs of a slice the value is this part: set-up and interruptions only make some dearer.
const PART: f64 = 0.2;

/// For the answers to what opens the known flows.
const ANSWERED_WITHIN: Duration = Duration::from_millis(200);

/// One of so many frames may be lost: a proxy that replaces sources runs out of ports in a flood.
const LOST_MAX_OF: u64 = 50;

/// Devices: where the node receives, and where the backend is.
const UPLINK: &str = "eth0";
const BACKEND_LINK: &str = "veth2";

/// Where all endpoints of the first group are.
const ARRIVALS: Arrivals =
    Arrivals { prefix: Ipv4Addr::new(10, 208, 0, 0), prefix_len: 12, port: TARGET_PORT };

/// A firewall that makes the kernel follow connections.
const GUARD: &str = "add table ip guard; add chain ip guard forward { type filter hook forward priority 0; }; \
                     add rule ip guard forward ct state invalid drop";

/// What a flow is led by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum To {
    /// The backend's own address.
    Backend,
    /// A NodePort.
    Service,
}

/// A node, and what makes frames at it.
struct Node {
    generator: Generator,
    _redirect: Option<Redirect>,
    _empty: Option<BareHooks>,
    proxy: Proxy,
}

/// Who is on a node.
enum Proxy {
    Nobody(World),
    Sheave(World),
    Kube(Peer),
}

impl Node {
    fn new(proxy: Proxy, guarded: bool) -> Result<Self> {
        let (Proxy::Nobody(world) | Proxy::Sheave(world) | Proxy::Kube(Peer { world, .. })) = &proxy;
        let host = world.node()?.host().netns();
        let pod = world.lab().pod(1)?;
        // The counter takes what arrives, questions for its hardware address too.
        let mac = mac_of(pod.netns(), UPLINK)?.map(|byte| format!("{byte:02x}")).join(":");
        host.ip(&format!("neighbour replace {} lladdr {mac} dev {BACKEND_LINK} nud permanent\n", pod.v4()))?;
        if guarded {
            nft(host, GUARD)?;
        }
        Ok(Self { generator: Generator::new(host, UPLINK)?, _redirect: None, _empty: None, proxy })
    }

    fn with_redirect(self) -> Result<Self> {
        let redirect = Redirect::new(self.world().node()?.host().netns(), UPLINK, BACKEND_LINK)?;
        Ok(Self { _redirect: Some(redirect), ..self })
    }

    fn with_empty_programs(self) -> Result<Self> {
        let empty = self.world().empty_hooks()?;
        Ok(Self { _empty: Some(empty), ..self })
    }

    fn world(&self) -> &World {
        let (Proxy::Nobody(world) | Proxy::Sheave(world) | Proxy::Kube(Peer { world, .. })) = &self.proxy;
        world
    }
}

const FORWARD: &str = "forward";
const FORWARD_TRACKED: &str = "forward, tracked";
const SHEAVE_TRACKED: &str = "sheave, tracked";
/// The arm of `--fast-path`.
pub(crate) const FAST: &str = "fast path";
const FAST_TRACKED: &str = "fast path, tracked";

/// Ways of a packet: the node, and what leads it. The first is what the others are compared with.
const ARMS: [(&str, usize, To); 12] = [
    (FORWARD, 0, To::Backend),
    (FORWARD_TRACKED, 1, To::Backend),
    ("bare redirect", 2, To::Backend),
    (SHEAVE, 3, To::Service),
    (SHEAVE_TRACKED, 4, To::Service),
    (FAST, 7, To::Service),
    (FAST_TRACKED, 8, To::Service),
    ("bystander", 6, To::Backend),
    (EMPTY, 9, To::Backend),
    (NFTABLES, 10, To::Service),
    (IPTABLES, 11, To::Service),
    (AGAIN, 5, To::Backend),
];

/// Measures all of it at a size.
pub(crate) fn measure(services: u32, alone: bool, effort: &Effort, report: &mut Report) -> Result<()> {
    // One of each policy.
    let services = services.max(2);
    let scale = Scale {
        services,
        endpoints: effort.endpoints,
        dual_stack: false,
        protocols: &["UDP"],
        node_ports: true,
    };
    let hub = if alone { None } else { Some(Hub::new(&scale)?) };
    let nodes = nodes(scale, hub.as_ref())?;
    for (flows, name, at_most) in [
        (Flows::Known, "known flow", [1.0 / 0.9, 1.0 / 1.5, 1.0 / 1.25, 1.0, 1.0 / 1.7]),
        (Flows::New, "new flow", [f64::NAN, 1.0 / 3.0, 1.0 / 1.5, f64::NAN, f64::NAN]),
    ] {
        for (replaced, how) in [(false, ""), (true, ", source replaced")] {
            let name = format!("packet of a {name}{how}");
            let row =
                still(&nodes, hub.as_ref(), || one(&nodes, scale, flows, replaced, &name, effort, report))?;
            let mut row = row.with_context(|| name.clone())?;
            let [forward, peer, tracked, fast, fast_peer] =
                at_most.map(|ratio| Some(ratio).filter(|ratio| !ratio.is_nan()));
            let goal = |arm, to, at_most| Goal { arm, to, at_most };
            row.compare(&[
                goal(SHEAVE, FORWARD, forward),
                goal(SHEAVE_TRACKED, FORWARD_TRACKED, forward),
                goal(FAST, FORWARD, fast),
                goal(FAST_TRACKED, FORWARD, fast),
                goal(EMPTY, FORWARD, None),
                goal("bystander", FORWARD, None),
                goal(FAST, NFTABLES, fast_peer),
                goal(FAST, IPTABLES, fast_peer),
                goal(SHEAVE, NFTABLES, peer),
                goal(SHEAVE, IPTABLES, peer),
                goal(SHEAVE_TRACKED, NFTABLES, tracked),
                goal(SHEAVE_TRACKED, IPTABLES, tracked),
            ]);
            report.add(row);
        }
    }
    Ok(())
}

fn nodes(scale: Scale, hub: Option<&Hub>) -> Result<Vec<Node>> {
    let plain = |guarded| Node::new(Proxy::Nobody(World::new(scale)?), guarded);
    let with = |guarded, arguments: &[&str]| {
        go_on()?;
        let mut world = World::new(scale)?;
        world.write_manifests()?;
        world.start_agent_with(arguments)?;
        Node::new(Proxy::Sheave(world), guarded)
    };
    let ours = |guarded| with(guarded, &[]);
    let mut nodes = vec![
        plain(false)?,
        plain(true)?,
        plain(false)?.with_redirect()?,
        ours(false)?,
        ours(true)?,
        plain(false)?,
        // For whoever uses no Service. Where the same senders do as well, their ports are known and looked up.
        ours(false)?,
        with(false, &["--fast-path"])?,
        with(true, &["--fast-path"])?,
        plain(false)?.with_empty_programs()?,
    ];
    for (hub, number, mode) in
        hub.into_iter().flat_map(|hub| [(hub, 1, Mode::Nftables), (hub, 2, Mode::Iptables)])
    {
        go_on()?;
        let started = Instant::now();
        let mut peer = Peer::start(hub, World::new(scale)?, number, mode)?;
        peer.await_synced(started)?;
        nodes.push(Node::new(Proxy::Kube(peer), false)?);
    }
    Ok(nodes)
}

/// Stops whoever serves while `work` measures.
fn still<T>(nodes: &[Node], hub: Option<&Hub>, work: impl FnOnce() -> T) -> Result<T> {
    let freeze = |frozen| -> Result<()> {
        hub.into_iter().try_for_each(|hub| hub.freeze(frozen))?;
        nodes.iter().try_for_each(|node| match &node.proxy {
            Proxy::Nobody(_) => Ok(()),
            Proxy::Sheave(world) => world.freeze_agent(frozen),
            Proxy::Kube(peer) => peer.freeze(frozen),
        })
    };
    super::still(freeze, work)
}

fn one(
    nodes: &[Node],
    scale: Scale,
    flows: Flows,
    replaced: bool,
    name: &str,
    effort: &Effort,
    report: &mut Report,
) -> Result<Row> {
    let service = Target {
        address: nodes.first().context("a node")?.world().node()?.host().v4(),
        port: NODE_PORT + u16::from(replaced),
        ports: u16::try_from(scale.services.min(NODE_PORTS_MAX))? / 2,
    };
    let backend = scale.backends(Family::V4).first().context("a backend")?.ip();
    let std::net::IpAddr::V4(address) = backend else { anyhow::bail!("{backend} is not IPv4") };
    let backend = Target { address, port: TARGET_PORT, ports: 1 };
    let arms: Vec<_> = ARMS
        .iter()
        .filter_map(|(name, node, to)| nodes.get(*node).map(|node| (*name, node, *to)))
        .map(|(name, node, to)| {
            let target = if to == To::Service { service } else { backend };
            Ok((name, node, to, node.generator.frames(flows, target)?))
        })
        .collect::<Result<_>>()?;
    if flows == Flows::Known {
        // The backends themselves answer, while nobody counts: a flow is known when it has had an answer.
        for (_, node, _, frames) in &arms {
            for _ in 0..3 {
                node.generator.run(frames, KNOWN, CLIENT_CPU)?;
                thread::sleep(ANSWERED_WITHIN);
            }
        }
    }
    let counters = nodes
        .iter()
        .map(|node| Counter::new(node.world().lab().pod(1)?.netns(), UPLINK, ARRIVALS))
        .collect::<Result<Vec<_>>>()?;
    let mut lost = vec![0; arms.len()];
    let names: Vec<_> = arms.iter().map(|(name, ..)| *name).collect();
    let values = rounds::measure(
        effort,
        &names,
        NOISE_MAX,
        |value| *value,
        |arm, _| {
            let ((name, node, to, frames), lost) = arms.iter().zip(&mut lost).nth(arm).context("an arm")?;
            let netns = node.world().node()?.host().netns();
            if flows == Flows::New {
                netns.forget_connections()?;
            }
            let counter = nodes.iter().zip(&counters).find(|(other, _)| std::ptr::eq(*other, *node));
            let counter = counter.context("a counter")?.1;
            let (before, begun, mut ns) = (counter.read()?, Instant::now(), Vec::new());
            while ns.is_empty() || begun.elapsed() < effort.slice {
                ns.push(u64::from(node.generator.run(frames, FRAMES, CLIENT_CPU)?));
            }
            let made = u64::from(FRAMES) * ns.len() as u64;
            let after = counter.read()?;
            let (unchanged, other) = (after.unchanged - before.unchanged, after.replaced - before.replaced);
            let wanted = if replaced && *to == To::Service { other } else { unchanged };
            ensure!(
                wanted == unchanged + other && made - wanted <= made / LOST_MAX_OF,
                "{name}: of {made} frames {unchanged} arrived with their own source and {other} with another one"
            );
            *lost += made - wanted;
            if flows == Flows::New {
                netns.forget_connections()?;
            }
            Ok(quantile(&sorted(&ns), PART))
        },
    )?;
    for ((arm, ..), lost) in arms.iter().zip(lost).filter(|(_, lost)| *lost > 0) {
        let name = format!("{name}: frames lost, {arm}");
        report.fact(Fact::count(ID, &name, scale.services, lost));
    }
    let mut row = Row::new(ID, name.to_owned(), "ns", scale.services, Some(NOISE_MAX));
    for ((name, ..), values) in arms.iter().zip(values) {
        row.add(name, values, None);
    }
    Ok(row)
}
