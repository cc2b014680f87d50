//! The matrix of the packet path against what is behind `sheave explain`: two readings of the rules, by two hands, must
//! agree.

#![expect(clippy::unwrap_used, reason = "the helpers of tests fail as tests do")]

use proxy_agent::{
    model::{Model, OwnAddresses},
    resolve::{DetectLocal, Policy},
    source::files,
    view::explain::explain_of,
    wanted::Wanted,
};
use serde_json::json;
use sheave_tests::{
    nodes::{
        CLUSTER_CIDR, Layout, SERVICE_CIDR, World,
        matrix::{Case, Detection, Rule, Settings, Version, WAYS, apparent, cases, judge, objects, rule},
    },
    protocol::Transport,
    scene::TARGET,
};

/// What the agent of each node knows.
fn models(world: &World, settings: Settings) -> Vec<(Model, Wanted)> {
    let detect_local = match settings.detection {
        Detection::ClusterCidr => DetectLocal::ClusterCidr,
        Detection::NodeCidr => DetectLocal::NodeCidr,
        // An address says nothing about the interface that it comes by.
        Detection::BridgeInterface | Detection::InterfaceNamePrefix | Detection::None => unreachable!(),
    };
    let policy = Policy {
        detect_local,
        cluster_cidrs: CLUSTER_CIDR.split(',').map(|range| range.parse().unwrap()).collect(),
        service_cidrs: SERVICE_CIDR.split(',').map(|range| range.parse().unwrap()).collect(),
        masquerade_all: settings.masquerade_all,
        ..Policy::default()
    };
    let of = |name: &str| {
        let mut model = Model::new(name, policy.clone(), OwnAddresses::FromNode);
        files::load(world.manifests().path()).unwrap().into_iter().for_each(|change| model.apply(change));
        let wanted = Wanted::of(&model);
        (model, wanted)
    };
    world.nodes().iter().map(|node| of(node.name())).collect()
}

/// Where matrix and `explain` differ about a case.
fn differences(world: &World, models: &[(Model, Wanted)], case: Case, settings: Settings) -> Vec<String> {
    let (model, wanted) = &models[judge(world, case)];
    let from = apparent(world, case).place(world).unwrap();
    let mut wrong = Vec::new();
    for (transport, version) in WAYS {
        let index = usize::from(version == Version::V6);
        let protocol = if transport == Transport::Tcp { "TCP" } else { "UDP" };
        let to = format!("{}/{protocol}", case.destination(world, version).unwrap());
        let from = from.sockets(0)[index].ip();
        let said = explain_of(model, wanted, from, to.parse().unwrap()).unwrap();
        let expected = match rule(world, case, settings) {
            Rule::Forward { snat } => {
                let backend = case.backend.place(world).unwrap().unwrap();
                json!(["forward", [backend.sockets(TARGET)[index]], snat])
            }
            Rule::Reject => json!(["reject", [], false]),
            Rule::Drop => json!(["drop", [], false]),
        };
        let got = json!([said.verdict, said.endpoints, said.snat]);
        if got != expected {
            wrong.push(format!("{case:?} {from} {to}: {expected}, explain says {got}: {}", said.reason));
        }
    }
    wrong
}

#[test]
fn explain_and_matrix_agree() {
    let mut compared = 0;
    for layout in [Layout::default(), Layout::overlay()] {
        let mut world = World::new(layout).unwrap();
        world.manifests().write("matrix", &objects(&world).unwrap()).unwrap();
        // First only node-1 translates, then both.
        for node in [0, 1] {
            world.set_proxied(node);
            for detection in [Detection::ClusterCidr, Detection::NodeCidr] {
                for masquerade_all in [false, true] {
                    let settings = Settings { detection, masquerade_all };
                    let models = models(&world, settings);
                    let of = |case| differences(&world, &models, case, settings);
                    let wrong: Vec<_> = cases().into_iter().flat_map(of).collect();
                    assert!(wrong.is_empty(), "{settings:?}: {} differ\n{}", wrong.len(), wrong.join("\n"));
                    compared += cases().len() * WAYS.len();
                }
            }
        }
    }
    assert_eq!(compared, 2 * 2 * 2 * 2 * 504 * 4);
}
