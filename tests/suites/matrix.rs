//! Every frontend kind × origin × place of the backend × policy, over TCP and UDP in both families, by real packets of
//! clients that no socket hook saw: the table is printed.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "the helpers of tests fail as tests do; the table is printed"
)]

use sheave_tests::nodes::{
    Guard, Layout,
    matrix::{self, Detection, Settings},
};

fn flags(settings: Settings) -> Vec<&'static str> {
    let mut flags = Vec::new();
    match settings.detection {
        Detection::ClusterCidr | Detection::None => {}
        Detection::NodeCidr => flags.extend(["--detect-local-mode", "NodeCIDR"]),
        Detection::BridgeInterface => {
            flags.extend(["--detect-local-mode", "BridgeInterface", "--pod-bridge-interface", "cbr0"]);
        }
        Detection::InterfaceNamePrefix => {
            flags.extend([
                "--detect-local-mode",
                "InterfaceNamePrefix",
                "--pod-interface-name-prefix",
                "p2p",
            ]);
        }
    }
    if settings.masquerade_all {
        flags.push("--masquerade-all");
    }
    flags
}

/// `nodes`: on which of them an agent runs.
fn holds(layout: Layout, settings: Settings, nodes: &[usize]) {
    holds_with(&[], layout, settings, nodes);
}

/// With more arguments for the agents.
fn holds_with(more: &[&'static str], layout: Layout, settings: Settings, nodes: &[usize]) {
    let table = matrix::hold(layout, settings, &[&flags(settings)[..], more].concat(), nodes).unwrap();
    println!("{layout} {settings:?}, agents on {nodes:?} {more:?}\n{table}");
    assert_eq!(table.wrong(), 0, "of {}:\n{}", table.total(), table.failures());
}

#[test]
fn over_routes() {
    holds(Layout::default(), Settings::default(), &[0]);
}

#[test]
fn over_vxlan_with_agents_on_both_nodes() {
    holds(Layout { rp_filter: 2, ..Layout::overlay() }, Settings::default(), &[0, 1]);
}

/// As WireGuard's and ipip's, where those may be missing.
#[test]
fn over_a_tunnel_without_link_headers() {
    holds(Layout { rp_filter: 2, ..Layout::bare_overlay() }, Settings::default(), &[0, 1]);
    let layout = Layout { guard: Guard::OnlyReal, ..Layout::bare_overlay() };
    holds_with(&["--device-hooks", "clsact"], layout, Settings::default(), &[0, 1]);
}

#[test]
fn past_firewalls_without_br_netfilter() {
    let layout = Layout { guard: Guard::DropInvalid, bridge_netfilter: false, ..Layout::default() };
    holds(layout, Settings { masquerade_all: true, ..Settings::default() }, &[0]);
    // Where no agent runs, such a firewall drops what is for a VIP.
    holds(Layout { guard: Guard::OnlyReal, ..layout }, Settings::default(), &[0, 1]);
}

#[test]
fn past_a_policy_of_real_addresses_with_strict_and_loose_filters() {
    let layout = Layout { guard: Guard::OnlyReal, ..Layout::default() };
    holds(layout, Settings::default(), &[0, 1]);
    holds(Layout { rp_filter: 2, ..layout }, Settings::default(), &[0, 1]);
    holds(Layout { guard: Guard::OnlyReal, ..Layout::overlay() }, Settings::default(), &[0, 1]);
}

#[test]
fn without_offloads() {
    let layout = Layout { offload: false, guard: Guard::DropInvalid, ..Layout::default() };
    holds(layout, Settings::default(), &[0]);
    holds(Layout { offload: false, ..Layout::overlay() }, Settings::default(), &[0]);
}

/// As on kernels before 6.6.
#[test]
fn by_classic_filters() {
    let layout = Layout { guard: Guard::OnlyReal, ..Layout::overlay() };
    holds_with(&["--device-hooks", "clsact"], layout, Settings::default(), &[0, 1]);
}

/// M1: the other ways to tell a local pod.
#[test]
fn m1_local_pods_by_interface_or_range() {
    for detection in [Detection::BridgeInterface, Detection::InterfaceNamePrefix, Detection::NodeCidr] {
        holds(Layout::default(), Settings { detection, ..Settings::default() }, &[0]);
    }
}
