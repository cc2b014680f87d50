//! The data path: what a connection costs, by arm.

use std::net::SocketAddr;

use anyhow::Result;
use sheave_tests::measure::{Slice, Spinners, What, cpu_ns};

use super::{
    Effort, Options, go_on,
    report::{Report, Row},
    scale::{Family, Group},
    stats::{Estimate, quantile, sorted},
    world::{CLIENT_CPU, SERVER_CPU, Side, World},
};

/// The arms, in the order of an even round.
const ARMS: [(&str, Side); 4] = [
    ("direct", Side::Outside),
    ("vip", Side::Inside),
    ("bystander", Side::Inside),
    ("direct again", Side::OutsideAgain),
];

/// A metric of the data path.
struct Metric {
    id: &'static str,
    name: &'static str,
    what: What,
    /// Whether client and server share a CPU.
    same_cpu: bool,
    /// The largest ratio to the direct arm that the targets allow.
    target: Option<f64>,
}

const METRICS: [Metric; 7] = [
    Metric { id: "p1", name: "UDP connect", what: What::UdpConnect, same_cpu: false, target: Some(1.06) },
    Metric {
        id: "p1",
        name: "UDP socket+connect+close",
        what: What::UdpSocket,
        same_cpu: false,
        target: None,
    },
    Metric { id: "p1", name: "TCP connect", what: What::TcpConnect, same_cpu: false, target: Some(1.01) },
    Metric { id: "p2", name: "TCP CRR", what: What::TcpCrr, same_cpu: false, target: Some(1.01) },
    Metric { id: "p3", name: "TCP RR", what: What::TcpRr, same_cpu: true, target: Some(1.005) },
    Metric {
        id: "p4",
        name: "stream, CPU per byte",
        what: What::Stream,
        same_cpu: true,
        target: Some(1.005),
    },
    Metric {
        id: "p5",
        name: "UDP sendto+recvfrom",
        what: What::UdpExchange,
        same_cpu: true,
        target: Some(1.04),
    },
];

/// Measures all that is wanted in a world whose agent has synced.
pub(crate) fn measure(world: &World, options: &Options, effort: &Effort, report: &mut Report) -> Result<()> {
    for family in [Family::V4, Family::V6] {
        let vips = world.client().targets(world.scale.vips(family))?;
        let backends = world.scale.backends(family);
        let direct = world.client().targets(backends.clone())?;
        let inside = |address: &SocketAddr| SocketAddr::new(address.ip(), world.inside_port());
        let bystander = world.client().targets(backends.iter().map(inside).collect())?;
        for metric in METRICS.iter().filter(|metric| options.wants(metric.id)) {
            let row = world
                .with_agent_still(|| one(world, metric, family, effort, [direct, vips, bystander, direct]))?;
            report.add(row);
        }
    }
    Ok(())
}

fn one(world: &World, metric: &Metric, family: Family, effort: &Effort, targets: [u64; 4]) -> Result<Row> {
    // Whatever shares a CPU keeps it awake by itself.
    let spinners = if metric.same_cpu { None } else { Some(Spinners::start(CLIENT_CPU + 1)?) };
    let mut values = vec![Vec::new(); ARMS.len()];
    let mut p99 = vec![Vec::new(); ARMS.len()];
    for round in 0..=effort.rounds {
        let mut order: Vec<usize> = (0..ARMS.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for arm in order {
            go_on()?;
            let Some((side, targets)) = ARMS.get(arm).map(|arm| arm.1).zip(targets.get(arm)) else {
                continue;
            };
            world.move_client(side)?;
            let (value, tail) = slice(world, metric, family, effort, *targets, u64::from(round))?;
            // The first round fills caches and neighbour tables.
            if round > 0 {
                values[arm].push(value);
                p99[arm].push(tail);
            }
        }
    }
    drop(spinners);
    let direct = values[0].clone();
    let ratios = |arm: usize| -> Vec<f64> {
        values[arm].iter().zip(&direct).map(|(value, direct)| value / direct).collect()
    };
    let arms = ARMS.iter().enumerate().map(|(index, (name, _))| {
        let ratio = (index > 0).then(|| Estimate::of(&ratios(index)));
        super::report::Arm {
            name: (*name).to_owned(),
            value: Estimate::of(&values[index]),
            ratio,
            p99: Estimate::of(&p99[index]).median,
            rounds: values[index].clone(),
        }
    });
    Ok(Row {
        id: metric.id.to_owned(),
        name: format!("{} {}", metric.name, family.name()),
        unit: if metric.what == What::Stream { "CPU-ns/kB" } else { "ns" }.to_owned(),
        services: world.scale.services,
        target: metric.target,
        arms: arms.collect(),
    })
}

/// A slice's value, and its 99th percentile where it has samples.
fn slice(
    world: &World,
    metric: &Metric,
    family: Family,
    effort: &Effort,
    targets: u64,
    seed: u64,
) -> Result<(f64, f64)> {
    let cpu = Some(if metric.same_cpu { SERVER_CPU } else { CLIENT_CPU });
    let source = Some(World::source(family, Group::A));
    let used = || world.ends().into_iter().map(cpu_ns).sum::<Result<u64>>();
    let before = used()?;
    let slice = Slice { what: metric.what, targets, duration: effort.slice, cpu, seed: seed + 1, source };
    let samples = world.client().slice(slice)?;
    if metric.what == What::Stream {
        let value = (used()? - before) as f64 / samples.bytes as f64 * 1000.0;
        return Ok((value, value));
    }
    let ns = sorted(&samples.ns);
    // Batches without packets have no tail but interruptions: the cheapest tenth is the cost.
    let part = if matches!(metric.what, What::UdpConnect | What::UdpSocket) { 0.1 } else { 0.5 };
    Ok((quantile(&ns, part), quantile(&ns, 0.99)))
}
