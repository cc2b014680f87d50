//! The next agent on the tables of the last one (Q1, Q2).

use proxy_common::abi::{BackendId, FrontendKind, FrontendValue, SetWord, WhenEmpty};

use super::world::{frontend, plain, port_key};
use super::*;
use crate::dataplane::{RecordWord, Write};
use crate::reconcile::REST_MS;

fn world() -> World {
    World::of([
        plain(&port_key("a", ""), &[0, 4], &[1, 2]),
        plain(&port_key("b", "web"), &[1], &[3]),
        plain(&port_key("c", ""), &[2], &[]),
    ])
}

/// What an agent left that programmed this world.
fn left_by(world: &World) -> Memory {
    let mut engine = Engine::new(tables());
    engine.follow(world);
    engine.dataplane.log.clear();
    engine.dataplane
}

#[test]
fn q2_the_same_wishes_write_nothing() {
    let mut engine = Engine::new(left_by(&world()));
    assert_eq!(engine.reconciler.adopted_frontends(), 4);
    let report = engine.full(&world());
    assert_eq!((report.writes, engine.dataplane.log.len()), (0, 0));
    assert_eq!(engine.reconciler.adopted_frontends(), 0);
    assert_eq!(engine.dump(), from_scratch(&world()));
    assert!(!engine.reconciler.has_leftovers());
}

#[test]
fn q2_changed_wishes_write_the_difference() {
    let mut changed = world();
    changed.0.insert(port_key("b", "web"), plain(&port_key("b", "web"), &[1], &[3, 5]));
    let mut engine = Engine::new(left_by(&world()));
    let report = engine.full(&changed);
    let kinds: Vec<&str> = engine
        .dataplane
        .log
        .iter()
        .map(|write| match write {
            Write::Backend { .. } => "backend",
            Write::Slot { .. } => "slot",
            Write::Word { .. } => "word",
            Write::Frontend { .. } | Write::RemoveFrontend { .. } => "frontend",
            Write::SourceRange { .. } | Write::RemoveSourceRange { .. } => "source range",
        })
        .collect();
    assert_eq!(kinds, ["backend", "slot", "slot", "word"]);
    assert_eq!(report.writes, 4);
}

#[test]
fn q2_what_went_while_nobody_looked_is_pruned() {
    let mut fewer = world();
    fewer.0.remove(&port_key("a", ""));
    let mut engine = Engine::new(left_by(&world()));
    engine.full(&fewer);
    assert_eq!(engine.dump(), from_scratch(&fewer));
    engine.now_ms += REST_MS;
    engine.reconciler.rest(&mut engine.dataplane, engine.now_ms);
    assert_eq!(engine.reconciler.in_use(), [2, 1, 1]);
}

/// Records have no names in the kernel. One that two service ports have VIPs of would mislead the clients of one.
#[test]
fn a_record_that_two_service_ports_claim_is_nobodys() {
    let (a, b) = (port_key("a", ""), port_key("b", ""));
    let before = World::of([plain(&a, &[2], &[2]), plain(&b, &[1, 4], &[1])]);
    // The VIP that is looked at first points to the record of `b`.
    let after = World::of([plain(&a, &[4, 2], &[2]), plain(&b, &[1], &[1])]);
    let found = left_by(&before);
    let mut engine = Engine::new(found.clone());
    engine.full(&after);
    let mut tables = found;
    for write in &engine.dataplane.log {
        tables.apply(&[*write]);
        world::check(&tables, &[&before, &after], false).unwrap();
    }
    assert_eq!(engine.dump(), from_scratch(&after));
}

#[test]
fn damaged_records_are_not_believed_and_heal() {
    let word = |service, word, first, count| Write::Word {
        service,
        word,
        bits: SetWord::new(first, count, WhenEmpty::Drop).bits(),
    };
    let points_to = |vip, service| Write::Frontend {
        key: frontend(vip),
        value: FrontendValue::new(service, FrontendKind::ClusterIp),
    };
    let slots = tables().limits().slots;
    let (first, second) = (0, 1);
    // Service a has record 1 and slots 0 and 1, b has record 2 and slot 2.
    let damages = [
        ("runs of two records overlap", vec![word(2, RecordWord::Cluster, 1, 2)]),
        ("runs of one record overlap", vec![word(1, RecordWord::Local, 1, 1)]),
        ("two records share a backend", vec![Write::Slot { index: 2, value: BackendId::new(1, 1) }]),
        ("a run leaves the table", vec![word(1, RecordWord::Cluster, slots - 1, 2)]),
        ("a run wraps around", vec![word(1, RecordWord::Cluster, u32::MAX, 2)]),
        ("a run is huge", vec![word(1, RecordWord::Draining, 0, SetWord::MAX_COUNT)]),
        ("a stale backend", vec![Write::Slot { index: first, value: BackendId::new(1, 7) }]),
        ("no backend", vec![Write::Slot { index: first, value: BackendId::NONE }]),
        ("a backend out of range", vec![Write::Slot { index: second, value: BackendId::new(u32::MAX, 1) }]),
        (
            "unsorted",
            vec![
                Write::Slot { index: first, value: BackendId::new(2, 1) },
                Write::Slot { index: second, value: BackendId::new(1, 1) },
            ],
        ),
        ("record 0", vec![points_to(0, 0)]),
        ("a record out of range", vec![points_to(0, u32::MAX)]),
        ("a record that is not there", vec![points_to(0, 77)]),
        ("a value of another make", vec![Write::Frontend { key: frontend(0), value: Default::default() }]),
    ];
    for (name, damage) in damages {
        let mut tables = left_by(&world());
        assert!(tables.apply(&damage).is_empty());
        let mut engine = Engine::new(tables);
        let report = engine.full(&world());
        assert!(report.failed.is_empty(), "{name}: {report:?}");
        assert_eq!(engine.dump(), from_scratch(&world()), "{name}");
        assert_eq!(engine.full(&world()).writes, 0, "{name}");
        for _ in 0..2 {
            engine.follow(&World::default());
            engine.now_ms += REST_MS;
        }
        assert_eq!(engine.reconciler.in_use(), [0, 0, 0], "{name}");
    }
}
