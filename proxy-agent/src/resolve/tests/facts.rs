//! Rules N1–N5 and M1.

use super::build::*;
use crate::object::{Family, PerFamily};
use crate::resolve::{Context, DetectLocal, NodeFacts, NodePortAddresses, Policy};

fn with(policy: Policy) -> Context {
    Context { policy, ..context() }
}

fn nodeports(facts: &NodeFacts) -> Vec<String> {
    let both = [Family::V4, Family::V6].map(|family| facts.nodeport_addresses.get(family));
    both.into_iter().flatten().map(ToString::to_string).collect()
}

fn listed(cidrs: &[&str]) -> Context {
    with(Policy {
        nodeport_addresses: NodePortAddresses::Cidrs(cidrs.iter().map(|cidr| net(cidr)).collect()),
        ..Policy::default()
    })
}

#[test]
fn n2_n3_primary_by_default() {
    let facts = NodeFacts::new(&context());
    assert_eq!(nodeports(&facts), ["192.0.2.1", "2001:db8::1"]);
    assert_eq!(facts.primary, PerFamily { v4: Some(ip("192.0.2.1")), v6: Some(ip("2001:db8::1")) });
    assert_eq!(facts.problems, []);
}

#[test]
fn n2_bind_address_is_the_primary_of_its_family_only() {
    let facts = NodeFacts::new(&with(Policy { bind_address: Some(ip("192.0.2.2")), ..Policy::default() }));
    assert_eq!(nodeports(&facts), ["192.0.2.2", "2001:db8::1"]);
    let facts = NodeFacts::new(&with(Policy { bind_address: Some(ip("0.0.0.0")), ..Policy::default() }));
    assert_eq!(nodeports(&facts), ["192.0.2.1", "2001:db8::1"]);
}

#[test]
fn n2_a_primary_on_no_interface_serves_nothing() {
    let facts = NodeFacts::new(&with(Policy { bind_address: Some(ip("192.0.2.99")), ..Policy::default() }));
    assert_eq!(nodeports(&facts), ["2001:db8::1"]);
    assert_eq!(facts.problems.len(), 1);
    assert!(facts.problems[0].message.contains("192.0.2.99 is on no interface"), "{:?}", facts.problems);
}

#[test]
fn n2_without_a_primary_the_family_is_open_with_a_warning() {
    let mut v4_only = context();
    v4_only.node.as_mut().unwrap().addresses = ips(&["192.0.2.1"]);
    let facts = NodeFacts::new(&v4_only);
    assert_eq!(nodeports(&facts), ["192.0.2.1", "2001:db8::1"]);
    assert!(facts.problems[0].message.contains("open on all IPv6 addresses"), "{:?}", facts.problems);
    // Nothing to open, nothing to warn of.
    v4_only.own_addresses = ips(&["192.0.2.1"]).into_iter().collect();
    assert_eq!(NodeFacts::new(&v4_only).problems, []);
    // No Node at all: both families.
    let facts = NodeFacts::new(&Context { node: None, ..context() });
    assert_eq!(nodeports(&facts), ["192.0.2.1", "192.0.2.2", "2001:db8::1"]);
    assert_eq!(facts.problems.len(), 2);
    // A loopback address is nobody's address.
    let facts = NodeFacts::new(&with(Policy { bind_address: Some(ip("127.0.0.1")), ..Policy::default() }));
    assert_eq!(nodeports(&facts), ["192.0.2.1", "192.0.2.2", "2001:db8::1"]);
    assert_eq!(facts.primary.v4, None);
}

#[test]
fn n1_n2_n4_ranges() {
    // (list, who serves)
    let all = ["192.0.2.1", "192.0.2.2", "2001:db8::1"];
    let table: [(&[&str], &[&str]); 6] = [
        (&[], &all),
        (&["192.0.2.2/32"], &["192.0.2.2", "2001:db8::1"]),
        (&["2001:db8::/32"], &all),
        (&["198.51.100.0/24", "fd00::/8"], &[]),
        // A zero range makes all others of its family moot.
        (&["0.0.0.0/0", "192.0.2.2/32", "fd00::/8"], &["192.0.2.1", "192.0.2.2"]),
        (&["0.0.0.0/0", "::/0"], &all),
    ];
    for (cidrs, expected) in table {
        assert_eq!(nodeports(&NodeFacts::new(&listed(cidrs))), expected, "{cidrs:?}");
    }
}

#[test]
fn n4_n5_loopback_never() {
    let mut context = listed(&["127.0.0.0/8", "::1/128"]);
    context.own_addresses.extend(ips(&["127.0.0.1", "::1"]));
    let facts = NodeFacts::new(&context);
    assert_eq!(nodeports(&facts), [""; 0]);
    assert_eq!(facts.problems.len(), 2);
    context.policy.nodeport_addresses = NodePortAddresses::Cidrs(vec![net("0.0.0.0/0"), net("::/0")]);
    assert_eq!(nodeports(&NodeFacts::new(&context)), ["192.0.2.1", "192.0.2.2", "2001:db8::1"]);
}

#[test]
fn n4_an_address_that_is_bound_later_serves() {
    let mut context = listed(&[]);
    context.own_addresses.insert(ip("fe80::1"));
    assert_eq!(nodeports(&NodeFacts::new(&context)).last().unwrap(), "fe80::1");
}

#[test]
fn m1_cluster_cidr_and_the_fallback_to_pod_cidrs() {
    let facts = NodeFacts::new(&context());
    assert_eq!(facts.detects_local_pods, PerFamily { v4: true, v6: true });
    assert!(facts.is_local_pod(ip("10.244.1.5")) && !facts.is_local_pod(ip("10.244.2.5")));
    let given = with(Policy { cluster_cidrs: vec![net("10.244.0.0/16")], ..Policy::default() });
    let facts = NodeFacts::new(&given);
    // Given for one family: the podCIDR of the other is not taken instead.
    assert_eq!(facts.detects_local_pods, PerFamily { v4: true, v6: false });
    // A pod of another node counts as local in this mode.
    assert!(facts.is_local_pod(ip("10.244.2.5")));
    assert_eq!(facts.problems, []);
    let other = with(Policy { cluster_cidrs: vec![net("fd00:244::/48")], ..Policy::default() });
    assert_eq!(NodeFacts::new(&other).problems.len(), 1);
}

#[test]
fn m1_without_any_range_there_is_no_detection() {
    let mut context = context();
    context.node.as_mut().unwrap().pod_cidrs.clear();
    let facts = NodeFacts::new(&context);
    assert_eq!(facts.detects_local_pods, PerFamily { v4: false, v6: false });
    assert_eq!(facts.problems, []);
    context.policy.detect_local = DetectLocal::NodeCidr;
    assert_eq!(NodeFacts::new(&context).problems.len(), 1);
}

#[test]
fn m1_node_cidr_takes_the_first_of_each_family() {
    let mut context = with(Policy {
        detect_local: DetectLocal::NodeCidr,
        cluster_cidrs: vec![net("10.0.0.0/8")],
        ..Policy::default()
    });
    context.node.as_mut().unwrap().pod_cidrs.push(net("10.244.9.0/24"));
    let facts = NodeFacts::new(&context);
    assert_eq!(facts.local_pod_cidrs, [net("10.244.1.0/24"), net("fd00:244:1::/64")]);
}

#[test]
fn m1_interface_modes_hold_for_both_families() {
    for detect_local in
        [DetectLocal::BridgeInterface("cni0".into()), DetectLocal::InterfaceNamePrefix("veth".into())]
    {
        let facts = NodeFacts::new(&with(Policy { detect_local, ..Policy::default() }));
        assert_eq!(facts.detects_local_pods, PerFamily { v4: true, v6: true });
        assert!(!facts.is_local_pod(ip("10.244.1.5")));
    }
}
