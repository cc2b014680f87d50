//! P10: a client that is no part of the cluster, on the node's own network: by a port of the node, beside the backend's
//! own address by plain routing.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use sheave_tests::measure::{Check, What};

use super::{
    Effort,
    data::{Arm, DIRECT, EMPTY, Metric, SHEAVE, Worlds, metric, name_of, one},
    go_on,
    packets::FAST,
    report::Report,
    row::AGAIN,
    scale::{Family, Group, NODE_PORT, NODE_PORTS_MAX, Scale},
    still,
    world::{Side, World},
    worlds,
};

/// Which metric this is.
pub(crate) const ID: &str = "p10";

/// By what policy of the Services, and whether that keeps the client's address. With the backend on another node only the
/// second one serves.
const POLICIES: [(&str, u32, bool); 2] = [("", 0, true), (", source replaced", 1, false)];

/// Where the backend is, how such a world is made, and which of the policies serve.
type Place = (&'static str, fn(Scale) -> Result<World>, &'static [(&'static str, u32, bool)]);
const PLACES: [Place; 2] =
    [("", World::new, &POLICIES), (" to another node", World::of_two_nodes, POLICIES.split_at(1).1)];

const METRICS: [Metric; 2] = [
    metric(ID, "TCP CRR from outside", What::TcpCrr, None),
    metric(ID, "TCP RR from outside", What::TcpRr, None),
];

/// Measures all of it at a size.
pub(crate) fn measure(services: u32, alone: bool, effort: &Effort, report: &mut Report) -> Result<()> {
    // One of each policy; one family, as kube-proxy has it.
    let scale = Scale { dual_stack: false, node_ports: true, ..Scale::of_clients(services.max(2), effort) };
    for (place, new_world, policies) in PLACES {
        let worlds = worlds(scale, alone, new_world)?;
        // Who uses no Service has another world than who does: there the client's ports are known, and looked up.
        let (bystander, fast) =
            (served(new_world(scale)?, &[])?, served(new_world(scale)?, &["--fast-path"])?);
        let Worlds { direct, again, hooked, sheave, peers, .. } = &worlds;
        let peers_worlds = peers.iter().map(|peer| &peer.world);
        for world in [direct, again, hooked, sheave, &bystander, &fast].into_iter().chain(peers_worlds) {
            world.open()?;
        }
        let freeze =
            |frozen| [&bystander, &fast].iter().try_for_each(|world: &&World| world.freeze_agent(frozen));
        let client = sheave.client();
        let backends = client.targets(scale.backends(Family::V4))?;
        let node = IpAddr::from(sheave.node()?.host().v4());
        let source = IpAddr::from(sheave.lab().outside().v4());
        for (how, first, is_kept) in policies {
            let ports = (*first..scale.services.min(NODE_PORTS_MAX)).step_by(2);
            let ports = ports.map(|port| Ok(SocketAddr::new(node, NODE_PORT + u16::try_from(port)?)));
            let ports = client.targets(ports.collect::<Result<_>>()?)?;
            let arm = |name, world, targets, is_kept| {
                let check = Check::Server { tag: Group::A.tag(), source, is_kept };
                Arm { name, world, side: Side::Elsewhere, targets, check }
            };
            let mut arms = vec![
                arm(DIRECT, direct, backends, true),
                arm(SHEAVE, sheave, ports, *is_kept),
                arm(FAST, &fast, ports, *is_kept),
                arm("bystander", &bystander, backends, true),
            ];
            arms.extend(peers.iter().map(|peer| arm(name_of(peer.mode), &peer.world, ports, *is_kept)));
            arms.push(arm(EMPTY, hooked, backends, true));
            arms.push(arm(AGAIN, again, backends, true));
            for metric in &METRICS {
                let name = format!("{}{place}{how}", metric.name);
                let row = still(freeze, || worlds.still(|| one(client, metric, name, effort, &arms)))??;
                report.add(row);
            }
        }
    }
    Ok(())
}

/// A world with our agent, which has synced.
fn served(mut world: World, arguments: &[&str]) -> Result<World> {
    go_on()?;
    world.write_manifests()?;
    world.start_agent_with(arguments)?;
    Ok(world)
}
