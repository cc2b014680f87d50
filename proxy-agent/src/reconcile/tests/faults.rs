//! Writes that fail (Q5): named, tried again, nobody else's trouble. The property over all prefixes is in `prefixes`.

use super::world::{READY, endpoint, frontend, plain, port_key};
use super::*;
use crate::dataplane::faulty::Faulty;
use crate::dataplane::{Failure, Write};
use crate::reconcile::{Error, REST_MS, Table};
use proxy_common::abi::BackendState;

type Fails = Box<dyn FnMut(&Write) -> bool>;

fn engine(fails: impl FnMut(&Write) -> bool + 'static) -> Engine<Faulty<Memory, Fails>> {
    Engine::new(Faulty { inner: tables(), fails: Box::new(fails) })
}

fn of_host(write: &Write, host: u8) -> bool {
    matches!(write, Write::Backend { value, .. } if value.address == endpoint(host).ip().into())
}

#[test]
fn q5_one_services_failure_does_not_hold_up_others() {
    let (a, b) = (port_key("a", ""), port_key("b", ""));
    let mut engine = engine(|write| of_host(write, 1));
    let world = World::of([plain(&a, &[0], &[1, 2]), plain(&b, &[1], &[3])]);
    let report = engine.follow(&world);
    let [(key, error)] = &report.failed[..] else { panic!("{report:?}") };
    assert_eq!(*key, a);
    assert!(matches!(error, Error::Write { table: Table::Backends, .. }), "{error:?}");
    assert_eq!(engine.dump(), from_scratch(&World::of([plain(&b, &[1], &[3])])));
    // A change of the other one goes through as well.
    let world = World::of([plain(&a, &[0], &[1, 2]), plain(&b, &[1], &[3, 4])]);
    assert_eq!(engine.follow(&world).failed.len(), 1);
    engine.dataplane.fails = Box::new(|_| false);
    assert!(engine.follow(&world).failed.is_empty());
    assert_eq!(engine.dump(), from_scratch(&world));
}

#[test]
fn every_kind_of_write_is_named_when_it_fails() {
    let world = World::of([plain(&port_key("a", ""), &[0], &[1])]);
    type Case = (fn(&Write) -> bool, Table);
    let cases: [Case; 4] = [
        (|write| matches!(write, Write::Backend { .. }), Table::Backends),
        (|write| matches!(write, Write::Slot { .. }), Table::Slots),
        (|write| matches!(write, Write::Word { .. }), Table::Services),
        (|write| matches!(write, Write::Frontend { .. }), Table::Frontends),
    ];
    for (fails, expected) in cases {
        let mut engine = engine(fails);
        let report = engine.follow(&world);
        let [(_, Error::Write { table, .. })] = &report.failed[..] else { panic!("{report:?}") };
        assert_eq!(*table, expected);
        assert_eq!(engine.dump(), []);
        engine.dataplane.fails = Box::new(|_| false);
        assert!(engine.follow(&world).failed.is_empty());
        assert_eq!(engine.dump(), from_scratch(&world));
    }
}

#[test]
fn q5_a_delete_wins_over_a_pending_add() {
    let (a, b) = (port_key("a", ""), port_key("b", ""));
    let with_b = World::of([plain(&a, &[0], &[1]), plain(&b, &[1], &[2])]);
    let without_b = World::of([plain(&a, &[0], &[1])]);
    for fails in [of_host as fn(&Write, u8) -> bool, |write, _| matches!(write, Write::Frontend { .. })] {
        let mut engine = engine(|_| false);
        engine.follow(&without_b);
        engine.dataplane.fails = Box::new(move |write| fails(write, 2));
        assert_eq!(engine.follow(&with_b).failed.len(), 1);
        engine.dataplane.fails = Box::new(|_| false);
        engine.follow(&without_b);
        assert_eq!(engine.dump(), from_scratch(&without_b));
        engine.now_ms += REST_MS;
        engine.follow(&World::default());
        engine.now_ms += REST_MS;
        engine.follow(&World::default());
        assert_eq!(engine.reconciler.in_use(), [0, 0, 0]);
    }
}

/// A VIP on its way from one Service to another goes with the new owner, though it never arrived there.
#[test]
fn q5_a_vip_that_never_arrived_goes_with_its_owner() {
    let (a, b) = (port_key("a", ""), port_key("b", ""));
    let worlds = [
        World::of([plain(&a, &[0, 5], &[1])]),
        World::of([plain(&a, &[0], &[1]), plain(&b, &[1, 5], &[2])]),
        World::of([plain(&a, &[0], &[1])]),
    ];
    for fails in [of_host as fn(&Write, u8) -> bool, |write, _| matches!(write, Write::Frontend { .. })] {
        let mut engine = engine(|_| false);
        engine.follow(&worlds[0]);
        engine.dataplane.fails = Box::new(move |write| fails(write, 2));
        engine.follow(&worlds[1]);
        let served = Dataplane::frontends(&engine.dataplane).unwrap();
        assert!(served.iter().any(|(key, _)| *key == frontend(5)), "S13: never missing");
        engine.dataplane.fails = Box::new(|_| false);
        engine.follow(&worlds[2]);
        assert_eq!(engine.dump(), from_scratch(&worlds[2]));
    }
}

#[test]
fn a_frontend_that_cannot_be_removed_is_found_by_the_next_full_sync() {
    let world = World::of([plain(&port_key("a", ""), &[0], &[1])]);
    let mut engine = engine(|write| matches!(write, Write::RemoveFrontend { .. }));
    engine.follow(&world);
    engine.follow(&World::default());
    assert!(engine.reconciler.needs_full_sync() && engine.reconciler.has_leftovers());
    engine.now_ms += 10 * REST_MS;
    engine.follow(&World::default());
    assert_eq!(
        engine.dump()[0].cluster_set,
        Some(vec!["10.244.1.1:8080".to_owned()]),
        "still served as it was"
    );
    engine.dataplane.fails = Box::new(|_| false);
    engine.follow(&World::default());
    assert!(!engine.reconciler.needs_full_sync());
    assert_eq!(engine.dump(), []);
    // The record rests from now on, however long ago its Service went.
    assert_eq!(engine.reconciler.in_use(), [1, 1, 1]);
    engine.now_ms += REST_MS;
    engine.reconciler.rest(&mut engine.dataplane, engine.now_ms);
    assert_eq!(engine.reconciler.in_use(), [0, 0, 0]);
    assert!(!engine.reconciler.has_leftovers());
}

/// An endpoint may have three ids at once while words fail: one that drains, one that is in a set, one that is to be.
#[test]
fn a_failed_commit_forgets_no_backend() {
    let world = |state: BackendState| {
        let mut port = plain(&port_key("a", ""), &[0], &[9]);
        port.endpoints.insert(endpoint(1), state);
        World::of([port])
    };
    let draining = BackendState { cluster: false, ..READY };
    let mut engine = engine(|_| false);
    for state in [READY, draining, READY] {
        engine.follow(&world(state));
    }
    engine.dataplane.fails = Box::new(|write| matches!(write, Write::Word { .. }));
    assert_eq!(engine.follow(&world(draining)).failed.len(), 1);
    engine.dataplane.fails = Box::new(|_| false);
    engine.follow(&world(draining));
    assert_eq!(engine.reconciler.in_use(), [1, 2, 2]);
    engine.follow(&World::default());
    engine.now_ms += REST_MS;
    engine.follow(&World::default());
    assert_eq!(engine.reconciler.in_use(), [0, 0, 0]);
}

/// The dataplane itself says which writes failed.
#[test]
fn a_faulty_dataplane_reports_the_index_of_each_failure() {
    let mut faulty = engine(|write| matches!(write, Write::RemoveFrontend { .. })).dataplane;
    let writes = [1, 2, 3].map(|vip| match vip {
        2 => Write::RemoveFrontend { key: frontend(vip) },
        _ => Write::Frontend { key: frontend(vip), value: Default::default() },
    });
    let failed: Vec<usize> = faulty.apply(&writes).iter().map(|Failure { index, .. }| *index).collect();
    assert_eq!((failed, faulty.inner.log.len()), (vec![1], 2));
}
