//! The agent without a kernel: model, claims, reconciler, tables in memory.

use std::collections::{BTreeMap, BTreeSet};

use proxy_agent::dataplane::faulty::Faulty;
use proxy_agent::dataplane::memory::Memory;
use proxy_agent::dataplane::{Limits, Write};
use proxy_agent::dump;
use proxy_agent::model::{Model, OwnAddresses};
use proxy_agent::object::{Change, Delta, ObjectKey};
use proxy_agent::reconcile::{REST_MS, Reconciler, Report, WantedPort, WantedService};
use proxy_agent::resolve::{Policy, Resolved};
use proxy_agent::view;
use proxy_agent::wanted::Wanted;

/// More than this many members of a set are not dumped one by one.
const MANY: usize = 20;

/// Adopting reads whole tables: no larger than the largest scenario needs.
const LIMITS: Limits = Limits { frontends: 4096, services: 4096, slots: 16_384, backends: 8192 };

pub(crate) type Fails = Box<dyn FnMut(&Write) -> bool>;

pub(crate) struct Engine {
    model: Model,
    wanted: Wanted,
    reconciler: Reconciler,
    pub(crate) dataplane: Faulty<Memory, Fails>,
    synced: bool,
    failed: BTreeSet<ObjectKey>,
    now_ms: u64,
}

impl Engine {
    /// Starts on what a former agent left in `tables`.
    pub(crate) fn on(tables: Memory, policy: Policy) -> Self {
        Self {
            model: Model::new("n1", policy, OwnAddresses::FromNode),
            wanted: Wanted::default(),
            reconciler: Reconciler::adopt(&tables).unwrap(),
            dataplane: Faulty { inner: tables, fails: Box::new(|_| false) },
            synced: false,
            failed: BTreeSet::new(),
            now_ms: 0,
        }
    }

    /// Starts on empty tables with nothing to be served, lists complete.
    pub(crate) fn new(policy: Policy) -> Self {
        let mut engine = Self::on(Memory::new(LIMITS), policy);
        engine.take([
            Change::Node(Delta::List(Vec::new())),
            Change::Service(Delta::List(Vec::new())),
            Change::Slice(Delta::List(Vec::new())),
        ]);
        engine.sync();
        engine
    }

    pub(crate) fn take(&mut self, changes: impl IntoIterator<Item = Change>) {
        for change in changes {
            self.model.apply(change);
        }
    }

    /// As the agent does it.
    pub(crate) fn sync(&mut self) -> Report {
        assert!(self.model.ready());
        self.now_ms += REST_MS / 3;
        let mut dirty = self.model.take_dirty();
        dirty.append(&mut self.failed);
        let full = !self.synced || self.reconciler.needs_full_sync();
        if full {
            dirty.extend(self.model.services().cloned());
        }
        let resolved = self.wanted.update(&self.model, &dirty);
        let wanted: Vec<WantedService> =
            resolved.into_iter().map(|(key, resolved)| self.wanted_service(key, &resolved)).collect();
        let report = self.reconciler.sync(&mut self.dataplane, &wanted, full, self.now_ms);
        self.synced = true;
        self.failed = report.failed.iter().map(|(key, _)| key.service.clone()).collect();
        report
    }

    /// Lets everything rest that waits for it.
    pub(crate) fn rest(&mut self) {
        self.now_ms += 2 * REST_MS;
        self.reconciler.rest(&mut self.dataplane, self.now_ms);
    }

    /// Syncs until nothing is left to do.
    pub(crate) fn settle(&mut self) {
        for _ in 0..4 {
            if self.sync().failed.is_empty() && !self.reconciler.needs_full_sync() {
                return;
            }
        }
        panic!("{:?} fail for ever", self.failed);
    }

    fn wanted_service(&self, key: ObjectKey, resolved: &[Resolved]) -> WantedService {
        let port = |resolved| WantedPort::new(resolved, self.wanted.claims(), self.model.facts());
        WantedService { key, ports: resolved.iter().map(port).collect() }
    }

    /// The tables in symbols, one entry per line, sorted; then what could not be used.
    pub(crate) fn dump(&self) -> Vec<String> {
        let names: BTreeMap<_, _> = self.reconciler.names().map(|(id, key)| (id, key.to_string())).collect();
        let mut lines = Vec::new();
        for record in dump::records(&self.dataplane, &names).unwrap() {
            let name = record.service.unwrap_or_else(|| format!("record {}", record.service_id));
            let family =
                if record.frontends.iter().any(|frontend| frontend.starts_with('[')) { 6 } else { 4 };
            let mut line = |text: String| lines.push(format!("{name} v{family} {text}"));
            record.frontends.iter().for_each(|frontend| line(format!("frontend {frontend}")));
            let sets = [
                ("cluster set", record.cluster_set),
                ("local set", record.local_set),
                ("draining", Some(record.draining).filter(|draining| !draining.is_empty())),
            ];
            for (set, members) in sets {
                match (members.as_deref(), record.when_empty) {
                    (None, _) => {}
                    (Some([]), when_empty) => {
                        line(format!("{set} empty: {}", when_empty.unwrap_or("untouched")))
                    }
                    (Some(all @ [first, .., last]), _) if all.len() > MANY => {
                        line(format!("{set} {} backends, {first} to {last}", all.len()));
                    }
                    (Some(all), _) => all.iter().for_each(|member| line(format!("{set} {member}"))),
                }
            }
            if let Some(seconds) = record.session_affinity_seconds {
                line(format!("affinity {seconds} s"));
            }
        }
        lines.sort();
        let problems: BTreeSet<_> =
            self.model.problems().into_iter().chain(self.wanted.problems(&self.model)).collect();
        lines.extend(
            problems
                .iter()
                .map(|problem| format!("problem {}: {}: {}", problem.object, problem.field, problem.message)),
        );
        lines
    }

    /// What people would be told.
    pub(crate) fn explain_all(&self) {
        let plan = serde_json::to_string(&view::plan::plan(&self.model)).unwrap();
        assert!(plan.starts_with('{'));
    }
}
