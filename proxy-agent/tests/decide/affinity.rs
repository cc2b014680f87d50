use std::collections::BTreeSet;

use super::*;
use proxy_common::abi::AffinityKey;
use proxy_common::decide::Tables as _;

const TIMEOUT_S: u32 = 100;

/// Record 1 with affinity, behind VIP 1 (cluster set) and VIP 2 (local set for clients from elsewhere).
fn lab(cluster: &[u32], local: &[u32]) -> Lab {
    let mut lab = Lab::new();
    lab.plain(1, cluster);
    lab.set(1, WhichSet::Local, local, WhenEmpty::Drop);
    lab.frontend(2, FrontendValue::new(1, FrontendKind::NodePort).with_local_set_for(Origin::Elsewhere));
    lab.affinity(1, TIMEOUT_S, 1);
    lab
}

const MANY: [u32; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

fn stays(lab: &Lab, origin: Origin, number: u8, backend: u32) -> bool {
    (0..20).all(|_| lab.reach_from(origin, 1, number) == backend)
}

#[test]
fn a2_the_key_is_client_and_service_port() {
    let mut lab = lab(&MANY, &[]);
    lab.plain(3, &MANY);
    lab.affinity(3, TIMEOUT_S, 1);
    let first = lab.reach(1, 1);
    // Any VIP of the service port.
    assert!(stays(&lab, Origin::Pod, 1, first) && stays(&lab, Origin::Pod, 2, first));
    // Other clients, and another service port, are spread.
    let others = |number| -> BTreeSet<u32> { (2..200).map(|client| lab.reach(client, number)).collect() };
    assert_eq!((others(1).len(), others(3).len()), (8, 8));
    // B4: an address is another kind of client.
    let address = ClientKey::address(IpAddr::from([0, 0, 0, 1]).into());
    assert_ne!(address, ClientKey::netns(1));
}

/// The last moment of an entry is one nanosecond before its time-out.
#[test]
fn a3_a_new_connection_renews_and_silence_ends() {
    let lab = lab(&MANY, &[]);
    let first = lab.reach(1, 1);
    for _ in 0..30 {
        lab.pass_s(u64::from(TIMEOUT_S) - 1);
        assert_eq!(lab.reach(1, 1), first);
    }
    let last_ns = lab.tables.now_ns.get();
    let timeout_ns = u64::from(TIMEOUT_S) * 1_000_000_000;
    lab.tables.now_ns.set(last_ns + timeout_ns - 1);
    assert_eq!(lab.reach(1, 1), first);
    // Each of these waits for the full time-out: a choice among eight that always is the same would be no choice.
    let after: BTreeSet<u32> = (0..100)
        .map(|_| {
            lab.pass_s(u64::from(TIMEOUT_S));
            lab.reach(1, 1)
        })
        .collect();
    assert_eq!(after.len(), 8);
}

/// A clock that goes back (another CPU's) makes no entry old.
#[test]
fn a3_a_clock_that_is_behind() {
    let lab = lab(&MANY, &[]);
    lab.tables.now_ns.set(5_000_000_000);
    let first = lab.reach(1, 1);
    lab.tables.now_ns.set(4_999_999_999);
    assert!(stays(&lab, Origin::Pod, 1, first));
}

#[test]
fn a4_an_endpoint_that_leaves_is_forgotten_also_when_it_comes_back() {
    let mut lab = lab(&MANY, &[]);
    let first = lab.reach(1, 1);
    let rest: Vec<u32> = MANY.into_iter().filter(|backend| *backend != first).collect();
    lab.set(1, WhichSet::Cluster, &rest, WhenEmpty::Reject);
    let second = lab.reach(1, 1);
    assert_ne!(second, first);
    // Back under a new id, as the agent gives it.
    let mut ids: Vec<BackendId> = rest.iter().map(|backend| id(*backend)).collect();
    ids.push(BackendId::new(first, 2));
    ids.sort();
    lab.set_ids(1, WhichSet::Cluster, &ids, WhenEmpty::Reject);
    assert!(stays(&lab, Origin::Pod, 1, second));
}

/// It still lives, drains in peace, but is in no set of this connection.
#[test]
fn a4_a_draining_endpoint_gets_no_new_connection() {
    let mut lab = lab(&MANY, &[]);
    let first = lab.reach(1, 1);
    lab.state(id(first), SERVING);
    let rest: Vec<u32> = MANY.into_iter().filter(|backend| *backend != first).collect();
    lab.set(1, WhichSet::Cluster, &rest, WhenEmpty::Reject);
    lab.state(id(first), SERVING);
    assert!((0..50).all(|_| lab.reach(1, 1) != first));
}

#[test]
fn a4_two_sets_do_not_ping_pong() {
    let lab = lab(&MANY, &[7, 8, 9, 10]);
    let client = |origin, number| lab.reach_from(origin, 1, number);
    for _ in 0..20 {
        let cluster = client(Origin::Pod, 2);
        let local = client(Origin::Elsewhere, 2);
        for _ in 0..20 {
            assert_eq!((client(Origin::Pod, 2), client(Origin::Elsewhere, 2)), (cluster, local));
        }
        lab.pass_s(u64::from(TIMEOUT_S));
    }
}

/// The other set's choice is taken over if it is in this set as well, and then both are one.
#[test]
fn a4_the_other_slot_counts() {
    let lab = lab(&MANY, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let first = lab.reach_from(Origin::Pod, 1, 2);
    assert!(stays(&lab, Origin::Elsewhere, 2, first));
    // Renewed through one set, alive in the other.
    lab.pass_s(u64::from(TIMEOUT_S) - 1);
    assert_eq!(lab.reach_from(Origin::Elsewhere, 1, 2), first);
    lab.pass_s(2);
    assert_eq!(lab.reach_from(Origin::Pod, 1, 2), first);
}

/// A connection to an endpoint renews it for both sets, so a choice outlives the set in which it was renewed.
#[test]
fn a4_a_renewal_counts_for_both_slots() {
    let mut lab = lab(&MANY, &MANY);
    let first = lab.reach_from(Origin::Elsewhere, 1, 2);
    lab.reach_from(Origin::Pod, 1, 2);
    lab.pass_s(u64::from(TIMEOUT_S) - 1);
    assert_eq!(lab.reach_from(Origin::Pod, 1, 2), first);
    lab.set(1, WhichSet::Cluster, &[9], WhenEmpty::Reject);
    assert_eq!(lab.reach_from(Origin::Pod, 1, 2), 9);
    lab.pass_s(2);
    assert!(stays(&lab, Origin::Elsewhere, 2, first));
}

/// A5: the fallback set is a set like any other.
#[test]
fn a5_entries_work_in_the_terminating_fallback() {
    let mut lab = lab(&MANY, &[]);
    let first = lab.reach(1, 1);
    for backend in MANY {
        lab.state(id(backend), BackendState { cluster: true, ..SERVING });
    }
    assert!(stays(&lab, Origin::Pod, 1, first));
}

#[test]
fn a6_off_and_on_again_forgets() {
    let mut lab = lab(&MANY, &[]);
    let clients = 1..100;
    let reach = |lab: &Lab| clients.clone().map(|client| lab.reach(client, 1)).collect::<Vec<_>>();
    let first = reach(&lab);
    assert_eq!(reach(&lab), first);
    lab.affinity(1, 0, 1);
    assert_ne!(reach(&lab), reach(&lab), "off: every connection chooses");
    lab.affinity(1, TIMEOUT_S, 2);
    let second = reach(&lab);
    assert_ne!(second, first);
    assert_eq!(reach(&lab), second);
}

#[test]
fn a6_a_changed_timeout_rules_old_entries() {
    let mut lab = lab(&MANY, &[]);
    let first = lab.reach(1, 1);
    lab.affinity(1, 2 * TIMEOUT_S, 1);
    lab.pass_s(u64::from(TIMEOUT_S) + 1);
    assert_eq!(lab.reach(1, 1), first);
    lab.affinity(1, 10, 1);
    lab.pass_s(10);
    let after: BTreeSet<u32> = (0..100)
        .map(|_| {
            lab.pass_s(10);
            lab.reach(1, 1)
        })
        .collect();
    assert_eq!(after.len(), 8);
}

/// A7: record and address are used again by another Service.
#[test]
fn a7_nothing_leaks_through_a_reused_record() {
    let mut lab = lab(&[1], &[]);
    let places = |lab: &Lab| -> BTreeSet<u32> { (1..200).map(|client| lab.reach(client, 1)).collect() };
    assert_eq!(places(&lab).len(), 1);
    lab.set(1, WhichSet::Cluster, &[], WhenEmpty::Reject);
    lab.vacate(id(1));
    // Same record, same epoch, same address and place: the next generation of the place.
    let ids: Vec<BackendId> = MANY.into_iter().map(|backend| BackendId::new(backend, 2)).collect();
    lab.set_ids(1, WhichSet::Cluster, &ids, WhenEmpty::Reject);
    assert_eq!(places(&lab).len(), 8);
}

#[test]
fn an_empty_set_remembers_nothing() {
    let mut lab = lab(&[], &[]);
    assert_eq!(lab.connect(Origin::Pod, 1), Connect::Reject);
    lab.set(1, WhichSet::Cluster, &MANY, WhenEmpty::Reject);
    let first = lab.reach(1, 1);
    assert!(stays(&lab, Origin::Pod, 1, first));
}

/// A7: the kernel may give an element of the table to another key while a program reads it.
#[test]
fn a7_what_was_stored_for_another_service_is_not_believed() {
    let mut lab = lab(&[1], &[]);
    lab.plain(3, &[9]);
    lab.affinity(3, TIMEOUT_S, 1);
    assert_eq!((lab.reach(1, 1), lab.reach(1, 3)), (1, 9));
    let key = |service| AffinityKey::new(service, ClientKey::netns(1));
    let foreign = lab.tables.affinity_entry(&key(3)).unwrap();
    lab.tables.remember_affinity(&key(1), &foreign);
    assert_eq!(lab.reach(1, 1), 1);
    assert_eq!(lab.tables.affinity_entry(&key(3)).map(|entry| entry.is_of(3)), Some(true));
}
