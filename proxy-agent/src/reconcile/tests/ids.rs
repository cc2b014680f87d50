//! Which ids are given out, kept and used again, and what happens when there are no more.

use proxy_common::abi::{BackendId, BackendState, ClientKey, Origin, Protocol, WhichSet};
use proxy_common::decide::{self, Client, Connect};

use super::world::{READY, endpoint, frontend, plain, port_key};
use super::*;
use crate::reconcile::{Error, REST_MS, Table, WantedPort};

const DRAINING: BackendState = BackendState { cluster: false, local: false, serving: true };

fn key() -> crate::resolve::ServicePortKey {
    port_key("a", "")
}

/// Service `a` with one endpoint in that state, and a neighbour.
fn with(state: Option<BackendState>) -> World {
    let mut port = plain(&key(), &[0], &[9]);
    port.endpoints.extend(state.map(|state| (endpoint(1), state)));
    World::of([port])
}

/// The ids in a set, by address.
fn ids(engine: &Engine<Memory>, draining: bool) -> BTreeMap<std::net::SocketAddr, BackendId> {
    let record = engine.dataplane.record(engine.reconciler.service_id(&key()).unwrap());
    let set = if draining { record.draining } else { record.cluster };
    let slots = (set.first()..set.first() + set.count()).map(|slot| Dataplane::slot(&engine.dataplane, slot));
    slots
        .map(|id| {
            let backend = decide::get(&engine.dataplane, id).unwrap();
            (std::net::SocketAddr::new(backend.address.ip(), backend.port.number()), id)
        })
        .collect()
}

#[test]
fn a4_an_endpoint_that_comes_back_is_somebody_else() {
    for pause_ms in [0, REST_MS] {
        let mut engine = Engine::new(tables());
        engine.follow(&with(Some(READY)));
        let first = ids(&engine, false);
        engine.follow(&with(None));
        assert!(decide::get(&engine.dataplane, first[&endpoint(1)]).is_none(), "gone at once");
        engine.now_ms += pause_ms;
        engine.follow(&with(Some(READY)));
        let second = ids(&engine, false);
        assert_eq!(first[&endpoint(9)], second[&endpoint(9)], "whoever stays keeps its id");
        let (old, new) = (first[&endpoint(1)], second[&endpoint(1)]);
        assert_ne!(old, new);
        // The same place only after a rest, and then with the next generation.
        assert_eq!(old.index() == new.index(), pause_ms >= REST_MS);
        assert!(decide::get(&engine.dataplane, old).is_none());
    }
}

#[test]
fn c2_a_draining_endpoint_keeps_its_id_for_flows() {
    let mut engine = Engine::new(tables());
    engine.follow(&with(Some(READY)));
    let old = ids(&engine, false)[&endpoint(1)];
    engine.follow(&with(Some(DRAINING)));
    assert_eq!(ids(&engine, true), BTreeMap::from([(endpoint(1), old)]));
    assert!(!ids(&engine, false).contains_key(&endpoint(1)));
    let backend = decide::get(&engine.dataplane, old).unwrap();
    assert!(backend.is_serving() && !backend.is_in(WhichSet::Cluster));
    // Back in the set: new connections go to a new id, old flows stay with the old one.
    engine.follow(&with(Some(READY)));
    let new = ids(&engine, false)[&endpoint(1)];
    assert_ne!(new, old);
    assert_eq!(ids(&engine, true), BTreeMap::from([(endpoint(1), old)]));
    // Drained once more: the younger id has the younger flows.
    engine.follow(&with(Some(DRAINING)));
    assert_eq!(ids(&engine, true), BTreeMap::from([(endpoint(1), new)]));
    assert!(decide::get(&engine.dataplane, old).is_none());
    // It serves no more.
    engine.follow(&with(None));
    assert_eq!(ids(&engine, true), BTreeMap::new());
    assert!(decide::get(&engine.dataplane, new).is_none());
}

/// Where a new connection of that pod to VIP 0 goes.
fn reach(engine: &Engine<Memory>, pod: u64) -> BackendId {
    let client = || Client { origin: Origin::Pod, key: ClientKey::netns(pod) };
    let vip = frontend(0);
    let decision = decide::connect(&engine.dataplane, &client, (vip.address(), vip.port()), Protocol::Tcp);
    let Connect::Forward { id, .. } = decision else { panic!("{decision:?}") };
    id
}

/// A4, A6, A7 with what the decision core remembers.
#[test]
fn a_clients_affinity_follows_ids() {
    let sticky = |key: &_, hosts: &[u8]| {
        World::of([WantedPort { affinity_timeout_s: Some(100), ..plain(key, &[0], hosts) }])
    };
    let mut engine = Engine::new(tables());
    engine.follow(&sticky(&key(), &[1]));
    let first = reach(&engine, 7);
    engine.follow(&sticky(&key(), &[1, 2, 3, 4, 5, 6, 7, 8]));
    assert!((0..20).all(|_| reach(&engine, 7) == first), "A6: endpoints of others change");
    let mut engine = Engine { now_ms: engine.now_ms, ..Engine::new(engine.dataplane) };
    engine.full(&sticky(&key(), &[1, 2, 3, 4, 5, 6, 7, 8]));
    assert!((0..20).all(|_| reach(&engine, 7) == first), "A6: the agent restarts");
    // A7: another Service takes over VIP, record and endpoint address.
    for _ in 0..2 {
        engine.follow(&World::default());
        engine.now_ms += REST_MS;
    }
    let other = port_key("b", "");
    engine.follow(&sticky(&other, &[1, 2, 3, 4, 5, 6, 7, 8]));
    assert_eq!(engine.reconciler.service_id(&other), Some(1), "the same record");
    let places: BTreeSet<BackendId> = (0..2000).map(|client| reach(&engine, client)).collect();
    assert!(!places.contains(&first) && places.len() == 8);
}

#[test]
fn a6_switching_affinity_off_and_on_forgets_and_a_timeout_does_not() {
    let epoch_after = |timeouts: &[Option<u32>]| {
        let mut engine = Engine::new(tables());
        for affinity_timeout_s in timeouts {
            engine.follow(&World::of([WantedPort {
                affinity_timeout_s: *affinity_timeout_s,
                ..plain(&key(), &[0], &[1])
            }]));
        }
        let word = engine.dataplane.record(1).affinity;
        (word.timeout_s(), word.epoch())
    };
    let on = epoch_after(&[Some(10)]);
    assert_eq!(epoch_after(&[Some(10), Some(20)]), (20, on.1));
    assert_eq!(epoch_after(&[Some(10), None]).0, 0);
    assert_eq!(epoch_after(&[Some(10), None, Some(10)]), (10, on.1 + 1));
}

const ROOMY: Limits = Limits { frontends: 64, services: 64, slots: 64, backends: 64 };

#[test]
fn a_full_table_is_named_and_holds_up_nobody() {
    let (big, small) = (port_key("big", ""), port_key("small", ""));
    // Place 0 of SERVICES and BACKENDS is never given out.
    let cases = [
        (Table::Frontends, 2, Limits { frontends: 2, ..ROOMY }),
        (Table::Services, 2, Limits { services: 2, ..ROOMY }),
        (Table::Slots, 3, Limits { slots: 3, ..ROOMY }),
        (Table::Backends, 4, Limits { backends: 4, ..ROOMY }),
    ];
    for (expected, size, limits) in cases {
        let mut engine = Engine::new(Memory::new(limits));
        let both = World::of([plain(&big, &[1, 2], &[1, 2, 3]), plain(&small, &[0], &[4])]);
        engine.follow(&World::of([plain(&small, &[0], &[4])]));
        let report = engine.follow(&both);
        let [(key, Error::Full { table, limit })] = &report.failed[..] else { panic!("{report:?}") };
        assert_eq!((key, *table, *limit), (&big, expected, size));
        assert_eq!(Report { writes: 0, ..report }.larger(limits).map(|larger| larger != limits), Some(true));
        // The other one is served, and can change.
        let both = World::of([plain(&big, &[1, 2], &[1, 2, 3]), plain(&small, &[0], &[])]);
        engine.follow(&both);
        let record = engine.dataplane.record(engine.reconciler.service_id(&small).unwrap());
        assert_eq!(record.cluster.count(), 0);
        // Room is made, and has rested.
        let alone = World::of([plain(&big, &[1, 2], &[1, 2, 3])]);
        engine.follow(&alone);
        engine.now_ms += REST_MS;
        engine.follow(&alone);
        engine.now_ms += REST_MS;
        let report = engine.follow(&alone);
        assert!(report.failed.is_empty(), "{expected}: {report:?}");
        assert_eq!(engine.dump(), from_scratch(&alone));
    }
}

proptest! {
    #![proptest_config(cases(32))]

    /// Larger tables get what the old ones had, under the same ids, and go on from there.
    #[test]
    fn growing_keeps_everything(worlds in world::history()) {
        let larger = Limits { frontends: 128, services: 128, slots: 256, backends: 128 };
        let mut engine = Engine::new(Memory::new(ROOMY));
        for world in &worlds[..worlds.len() - 1] {
            engine.follow(world);
        }
        let (dump, last) = (engine.dump(), worlds.last().cloned().unwrap_or_default());
        let mut new = Memory::new(larger);
        prop_assert!(engine.reconciler.copy_to(&mut new).is_ok());
        engine.reconciler.moved_to(new.limits());
        let mut grown = Engine { dataplane: new, ..engine };
        prop_assert_eq!(grown.dump(), dump);
        world::check(&grown.dataplane, &[&grown.world], false)?;
        prop_assert_eq!(grown.full(&grown.world.clone()).writes, 0);
        prop_assert!(grown.follow(&last).failed.is_empty());
        world::check(&grown.dataplane, &[&last], false)?;
    }
}
