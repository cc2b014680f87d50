//! The matrix of the packet path against `sheave explain`: two readings of the rules, made by two hands, must agree.

#![expect(clippy::unwrap_used, reason = "the helpers of tests fail as tests do")]

use std::thread;

use serde_json::{Value, json};
use sheave_tests::{
    agent::sheave,
    nodes::{
        CLUSTER_CIDR, Layout, SERVICE_CIDR, World,
        matrix::{Case, Rule, Settings, Version, WAYS, apparent, cases, judge, objects, rule},
    },
    protocol::Transport,
    scene::TARGET,
};

/// What differs between the matrix and `explain` for a case, which is asked for over one protocol in one family: over all
/// in turn, as each question is a process.
fn difference(world: &World, case: Case, settings: Settings, way: usize) -> Vec<String> {
    let node = world.node(judge(world, case)).unwrap();
    let from = apparent(world, case).place(world).unwrap();
    let mut wrong = Vec::new();
    for (transport, version) in WAYS.into_iter().skip(way % WAYS.len()).take(1) {
        let index = usize::from(version == Version::V6);
        let protocol = if transport == Transport::Tcp { "TCP" } else { "UDP" };
        let to = format!("{}/{protocol}", case.destination(world, version).unwrap());
        let from = from.sockets(0)[index].ip().to_string();
        let manifests = world.manifests().path().to_string_lossy().into_owned();
        let mut arguments = vec!["explain", "--manifests", &manifests, "--node-name", node.name()];
        arguments.extend(["--cluster-cidr", CLUSTER_CIDR, "--service-cidr", SERVICE_CIDR]);
        arguments.extend(["--from", &from, "--to", &to]);
        if settings.masquerade_all {
            arguments.push("--masquerade-all");
        }
        let output = sheave(node, &arguments).unwrap();
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();
        let (verdict, endpoints, snat) = match rule(world, case, settings) {
            Rule::Forward { snat } => {
                let backend = case.backend.place(world).unwrap().unwrap();
                ("forward", json!([backend.sockets(TARGET)[index].to_string()]), snat)
            }
            Rule::Reject => ("reject", json!([]), false),
            Rule::Drop => ("drop", json!([]), false),
        };
        let expected = [json!(verdict), endpoints, json!(snat)];
        let got = ["verdict", "endpoints", "snat"].map(|key| said[key].clone());
        if got != expected {
            wrong.push(format!(
                "{case:?} {from} {to}: expected {expected:?}, explain says {got:?}: {}",
                said["reason"]
            ));
        }
    }
    wrong
}

fn agrees(layout: Layout, settings: Settings, both: bool) {
    let mut world = World::new(layout).unwrap();
    if both {
        world.set_proxied(1);
    }
    world.set_proxied(0);
    world.manifests().write("matrix", &objects(&world).unwrap()).unwrap();
    let (world, cases) = (&world, cases());
    let wrong: Vec<_> = thread::scope(|scope| {
        let part = |part: &'static usize| {
            let cases = &cases;
            scope.spawn(move || -> Vec<String> {
                // Seven places of a backend: each gets another way in the next group.
                let mine = cases.iter().enumerate().skip(*part).step_by(2);
                mine.flat_map(|(index, case)| difference(world, *case, settings, index + index / 7)).collect()
            })
        };
        let parts: Vec<_> = [0, 1].iter().map(part).collect();
        parts.into_iter().flat_map(|part| part.join().unwrap()).collect()
    });
    assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong.join("\n"));
}

/// Where only the first node has an agent, and where both have one.
#[test]
fn explain_and_matrix_agree_over_routes() {
    agrees(Layout::default(), Settings::default(), false);
    agrees(Layout::default(), Settings::default(), true);
}

#[test]
fn explain_and_matrix_agree_over_vxlan_with_masquerade_all() {
    agrees(Layout::overlay(), Settings { masquerade_all: true, ..Settings::default() }, false);
}
