//! The commit protocol on memory maps.

mod adopt;
mod faults;
mod ids;
mod prefixes;
mod world;

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use self::world::World;
use super::{Reconciler, Report};
use crate::dataplane::memory::Memory;
use crate::dataplane::{Dataplane, Limits};
use crate::dump::{self, Record};
use crate::object::ObjectKey;

/// A reconciler with its tables and its clock.
struct Engine<D> {
    reconciler: Reconciler,
    dataplane: D,
    now_ms: u64,
    /// What the last sync was asked for.
    world: World,
    failed: BTreeSet<ObjectKey>,
}

impl<D: Dataplane> Engine<D> {
    fn new(dataplane: D) -> Self {
        let reconciler = Reconciler::adopt(&dataplane).unwrap();
        Self { reconciler, dataplane, now_ms: 0, world: World::default(), failed: BTreeSet::new() }
    }

    /// As the agent does it: what changed, and what failed before.
    fn follow(&mut self, world: &World) -> Report {
        let wanted = world.changed_since(&self.world, &self.failed);
        let full = self.reconciler.needs_full_sync();
        let wanted = if full { world.all() } else { wanted };
        let report = self.reconciler.sync(&mut self.dataplane, &wanted, full, self.now_ms);
        self.done(world, &report);
        report
    }

    fn full(&mut self, world: &World) -> Report {
        let report = self.reconciler.sync(&mut self.dataplane, &world.all(), true, self.now_ms);
        self.done(world, &report);
        report
    }

    fn done(&mut self, world: &World, report: &Report) {
        self.world = world.clone();
        self.failed = report.failed.iter().map(|(key, _)| key.service.clone()).collect();
    }

    /// The tables in symbols, without numbers that depend on history.
    fn dump(&self) -> Vec<Record> {
        let names: BTreeMap<_, _> = self.reconciler.names().map(|(id, key)| (id, key.to_string())).collect();
        let mut records = dump::records(&self.dataplane, &names).unwrap();
        for record in &mut records {
            record.service_id = 0;
        }
        records.sort_by(|a, b| a.service.cmp(&b.service));
        records
    }
}

/// Adopting reads whole tables: no larger than needed.
fn tables() -> Memory {
    Memory::new(Limits { frontends: 128, services: 128, slots: 256, backends: 256 })
}

/// Goes through a world's wishes on tables of its own.
fn from_scratch(world: &World) -> Vec<Record> {
    let mut engine = Engine::new(tables());
    let report = engine.full(world);
    assert!(report.failed.is_empty(), "{report:?}");
    engine.dump()
}

/// Draining depends on what was there before.
fn without_draining(mut records: Vec<Record>) -> Vec<Record> {
    for record in &mut records {
        record.draining.clear();
    }
    records
}

/// Few enough cases for a test that runs all the time; `PROPTEST_CASES` asks for more.
fn cases(cases: u32) -> ProptestConfig {
    let asked_for = std::env::var_os("PROPTEST_CASES").is_some();
    let default = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if asked_for { default } else { ProptestConfig { cases, ..default } }
}
