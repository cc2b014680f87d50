//! The packet path, every case of the matrix by real packets. The whole table: `cargo test -p sheave-tests --test
//! packet_matrix -- --nocapture`.

#![expect(clippy::unwrap_used, reason = "the helpers of tests fail as tests do")]
#![expect(clippy::print_stdout, reason = "the table is for people")]

use sheave_tests::{
    manifests::lab_node,
    nodes::{
        Guard, Layout, World,
        matrix::{Case, Detection, Frontend, Settings, cases, objects, run},
    },
};

/// Which nodes have agents.
const FIRST: &[usize] = &[0];
const BOTH: &[usize] = &[0, 1];

fn arguments(settings: Settings) -> Vec<&'static str> {
    let mut arguments = match settings.detection {
        Detection::ClusterCidr | Detection::None => vec![],
        Detection::NodeCidr => vec!["--detect-local-mode", "NodeCIDR"],
        Detection::BridgeInterface => {
            vec!["--detect-local-mode", "BridgeInterface", "--pod-bridge-interface", "cbr0"]
        }
        Detection::InterfaceNamePrefix => {
            vec!["--detect-local-mode", "InterfaceNamePrefix", "--pod-interface-name-prefix", "p2p-"]
        }
    };
    if settings.masquerade_all {
        arguments.push("--masquerade-all");
    }
    arguments
}

fn matrix(layout: Layout, settings: Settings, agents: &[usize], cases: &[Case]) {
    let mut world = World::new(layout).unwrap();
    world.serve().unwrap();
    let nodes: Vec<_> = world.nodes().iter().map(lab_node).collect();
    world.manifests().write("nodes", &nodes).unwrap();
    world.manifests().write("matrix", &objects(&world).unwrap()).unwrap();
    for node in agents {
        world.start_agent(*node, &arguments(settings)).unwrap();
    }
    world.settle().unwrap();
    let table = run(&world, cases, settings).unwrap();
    println!("{layout}; {settings:?}; agents on {agents:?}\n{table}");
    assert_eq!(table.wrong(), 0, "{layout}; {settings:?}; agents on {agents:?}\n{}", table.failures());
}

/// What SNAT depends on: no need to dial what is refused or dropped anyway.
fn cluster_ips() -> Vec<Case> {
    cases().into_iter().filter(|case| case.frontend == Frontend::ClusterIp).collect()
}

#[test]
fn matrix_over_routes() {
    matrix(Layout::default(), Settings::default(), FIRST, &cases());
}

#[test]
fn matrix_over_routes_with_two_agents() {
    let layout = Layout { rp_filter: 2, bridge_netfilter: false, ..Layout::default() };
    matrix(layout, Settings::default(), BOTH, &cases());
}

#[test]
fn matrix_over_vxlan_and_past_connection_tracking() {
    matrix(Layout { guard: Guard::DropInvalid, ..Layout::overlay() }, Settings::default(), FIRST, &cases());
}

#[test]
fn matrix_past_a_policy() {
    matrix(Layout { guard: Guard::OnlyReal, ..Layout::default() }, Settings::default(), FIRST, &cases());
}

#[test]
fn matrix_past_a_policy_that_bridges_do_not_see() {
    let layout =
        Layout { guard: Guard::OnlyReal, bridge_netfilter: false, rp_filter: 2, ..Layout::default() };
    matrix(layout, Settings::default(), FIRST, &cases());
}

#[test]
fn matrix_past_a_policy_over_vxlan_with_two_agents() {
    matrix(Layout { guard: Guard::OnlyReal, ..Layout::overlay() }, Settings::default(), BOTH, &cases());
}

#[test]
fn matrix_without_offloads() {
    let layout = Layout { offload: false, guard: Guard::DropInvalid, ..Layout::default() };
    matrix(layout, Settings::default(), FIRST, &cases());
}

/// M1: the other ways to tell a local pod; M2.
#[test]
fn m1_local_pods_by_interface() {
    for detection in [Detection::BridgeInterface, Detection::InterfaceNamePrefix, Detection::NodeCidr] {
        matrix(Layout::default(), Settings { detection, ..Settings::default() }, FIRST, &cases());
    }
}

/// M2
#[test]
fn m2_masquerade_all() {
    let settings = Settings { masquerade_all: true, ..Settings::default() };
    matrix(Layout::default(), settings, FIRST, &cluster_ips());
}
