//! P11: what the programs of the packet path cost by themselves, by the way that a frame takes through them.
//!
//! A Service whose endpoint is its own VIP: its packets are translated to what they were, so that one can be given to the
//! program again and again.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;
use serde_json::json;
use sheave_tests::{
    manifests,
    measure::packets::{DROP, Hook, NEXT, Path, Says, segment},
};

use super::{
    Effort,
    data::EMPTY,
    report::Report,
    rounds,
    row::{AGAIN, Goal, Row},
    scale::{Family, PORT, Scale},
    stats::{Estimate, ordered, quantile},
    still,
    world::{CLIENT_CPU, World},
};

/// Which metric this is.
pub(crate) const ID: &str = "p11";

/// Two equal arms may differ by so much.
const NOISE_MAX: f64 = 0.01;

/// Runs of one sample, and samples of a round; a round's value is the lowest fifth.
const REPEAT: u32 = 20_000;
const SAMPLES: u32 = 10;
const PART: f64 = 0.2;

/// What a frame of no Service may cost more than a program that does nothing.
const BYSTANDER_NS: f64 = 40.0;

/// The Service, by family, and an address of its that is not for everyone.
const VIPS: [&str; 2] = ["10.97.0.3", "fd00:97::3"];
const CLOSED: &str = "203.0.113.3";

/// A client inside the cluster, so that its source stays, by family; and one that is not let in.
const CLIENTS: [&str; 2] = ["10.202.0.1", "fd00:202::1"];
const STRANGER: &str = "198.51.100.9";

/// Who has no Service, by family.
const OTHERS: [&str; 2] = ["10.208.1.0", "fd00:208::1"];

/// Where frames of these runs are: the client's device, from which they come and to which answers go, and another one.
const LINK: &str = "veth1";
const OTHER_LINK: &str = "veth2";

/// Names of ways.
const LOOK_UP: &str = "one hash look-up";
const BYSTANDER_IN: &str = "bystander comes in";
const BYSTANDER_OUT: &str = "bystander leaves";

/// Measures at a size.
pub(crate) fn measure(services: u32, effort: &Effort, report: &mut Report) -> Result<()> {
    let scale = Scale {
        services,
        endpoints: effort.endpoints,
        dual_stack: true,
        protocols: &["TCP"],
        node_ports: false,
    };
    let mut world = World::new(scale)?;
    world.write_manifests()?;
    let service = manifests::service("p11", &VIPS)
        .port("tcp", "TCP", PORT, PORT)
        .set("spec.type", "LoadBalancer")
        .push("status.loadBalancer.ingress", json!({"ip": CLOSED}))
        .push("spec.loadBalancerSourceRanges", "192.0.2.0/24");
    let slices = [("IPv4", VIPS[0]), ("IPv6", VIPS[1])].map(|(family, vip)| {
        let slice = manifests::slice(&format!("p11-{family}").to_lowercase(), "p11", family);
        slice.slice_port("tcp", "TCP", PORT).endpoint(vip, "node-1")
    });
    let [v4, v6] = slices;
    world.lab().manifests().write("p11", &[service, v4, v6])?;
    world.start_agent()?;
    still(
        |frozen| world.freeze_agent(frozen),
        || {
            [Family::V4, Family::V6].into_iter().try_for_each(|family| {
                report.add(one(&world, family, effort)?);
                Ok(())
            })
        },
    )?
}

/// The ways of a family; the first one is what the others are compared with.
fn ways(world: &World, family: Family) -> Result<Vec<(&'static str, Path)>> {
    let node = world.node()?;
    let netns = node.host().netns();
    let hook = Hook { netns, device: LINK, arrived_by: None };
    let leaving = Hook { arrived_by: Some(OTHER_LINK), ..hook };
    let index = netns.run(|| if_nametoindex(LINK))?.context(LINK)?;
    let pin = |program: &str| node.bpffs().join("sheave/links").join(format!("{program}-{index}"));
    let at = |both: [&str; 2], port| -> Result<SocketAddr> {
        let text = match family {
            Family::V4 => both[0],
            Family::V6 => both[1],
        };
        Ok(SocketAddr::new(text.parse::<IpAddr>().context("an address")?, port))
    };
    let (client, vip, other) = (at(CLIENTS, 40_000)?, at(VIPS, PORT)?, at(OTHERS, 8080)?);
    // Another port than the flow's: those filters are asked by both.
    let bystander = at(CLIENTS, 41_000)?;
    let comes = |frame, verdict| Path::pinned(&pin("tc_ingress"), hook, frame, verdict);
    let leaves = |frame| Path::pinned(&pin("tc_egress"), leaving, frame, NEXT);
    // The connection, so that it is known and has its place among those that stay.
    comes(segment(client, vip, Says::Open)?, NEXT)?.ns(1, CLIENT_CPU)?;
    leaves(segment(vip, client, Says::Accept)?)?.ns(1, CLIENT_CPU)?;
    let mut ways = vec![
        (EMPTY, Path::empty(hook, segment(client, vip, Says::Go)?)?),
        (LOOK_UP, Path::look_up(hook, segment(client, vip, Says::Go)?)?),
        (BYSTANDER_IN, comes(segment(bystander, other, Says::Go)?, NEXT)?),
        (BYSTANDER_OUT, leaves(segment(other, bystander, Says::Go)?)?),
        ("client of a flow elsewhere", comes(segment(client, other, Says::Go)?, NEXT)?),
        ("known flow comes in", comes(segment(client, vip, Says::Go)?, NEXT)?),
        ("its answer leaves", leaves(segment(vip, client, Says::Go)?)?),
        (AGAIN, Path::empty(hook, segment(client, vip, Says::Go)?)?),
    ];
    if family == Family::V4 {
        let (stranger, closed) = (at([STRANGER; 2], 40_000)?, at([CLOSED; 2], PORT)?);
        ways.push(("outside the source ranges", comes(segment(stranger, closed, Says::Open)?, DROP)?));
    }
    Ok(ways)
}

fn one(world: &World, family: Family, effort: &Effort) -> Result<Row> {
    let ways = ways(world, family)?;
    let names: Vec<_> = ways.iter().map(|(name, _)| *name).collect();
    let values = rounds::measure(
        effort,
        &names,
        NOISE_MAX,
        |value| *value,
        |way, _| {
            let (name, way) = ways.get(way).context("a way")?;
            let ns = (0..SAMPLES).map(|_| way.ns(REPEAT, CLIENT_CPU)).collect::<Result<Vec<_>>>();
            let ns = ns.with_context(|| format!("{name} {}", family.name()))?;
            Ok(quantile(&ordered(&ns), PART))
        },
    )?;
    let name = format!("program by itself {}", family.name());
    let mut row = Row::new(ID, name, "ns", world.scale.services, Some(NOISE_MAX));
    for ((name, _), values) in ways.iter().zip(values) {
        row.add(name, values, None);
    }
    let empty_ns = row.arm(EMPTY).map_or(f64::NAN, |arm| Estimate::of(&arm.rounds).median);
    let goal = |arm| Goal { arm, to: EMPTY, at_most: Some((empty_ns + BYSTANDER_NS) / empty_ns) };
    row.compare(&[goal(BYSTANDER_IN), goal(BYSTANDER_OUT)]);
    Ok(row)
}
