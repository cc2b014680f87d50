//! What a former run left in the kernel: it goes on working, and is compared instead of written anew (Q1, Q2).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;

use proxy_common::abi::{ServiceId, SetWord};

use super::Reconciler;
use super::pool::{Places, Runs};
use super::port::{Member, PortState, Run, SETS};
use crate::dataplane::{Dataplane, RecordWord};

impl Reconciler {
    /// Reads the tables. A record that makes no sense is not adopted; its frontends are pointed elsewhere by the first
    /// sync.
    ///
    /// # Errors
    /// If `FRONTENDS` cannot be read.
    pub fn adopt(dataplane: &impl Dataplane) -> io::Result<Self> {
        let limits = dataplane.limits();
        let frontends: BTreeMap<_, _> = dataplane.frontends()?.into_iter().collect();
        let mut references: BTreeMap<ServiceId, u32> = BTreeMap::new();
        for value in frontends.values() {
            *references.entry(value.service()).or_default() += 1;
        }
        let mut adopted: BTreeMap<ServiceId, PortState> = BTreeMap::new();
        let mut used_runs: BTreeMap<u32, u32> = BTreeMap::new();
        let mut used_backends = BTreeSet::new();
        for id in references.keys().copied() {
            let state = read(dataplane, id);
            let fits = state.as_ref().is_some_and(|state| {
                state.runs.iter().all(|run| run.ids.is_empty() || is_free(&used_runs, run))
                    && backends(state).all(|place| !used_backends.contains(&place))
            });
            let Some(state) = state.filter(|_| fits) else {
                tracing::warn!(
                    service_id = id,
                    "a service record in the kernel makes no sense; it is replaced"
                );
                continue;
            };
            for run in state.runs.iter().filter(|run| !run.ids.is_empty()) {
                used_runs.insert(run.first, run.len());
            }
            used_backends.extend(backends(&state));
            adopted.insert(id, state);
        }
        for (key, value) in &frontends {
            if let Some(state) = adopted.get_mut(&value.service()) {
                state.frontends.insert(*key);
            }
        }
        let generations = (0..limits.backends).map(|index| dataplane.backend(index).generation);
        let mut generations: Vec<u32> = generations.collect();
        generations
            .truncate(generations.iter().rposition(|generation| *generation != 0).map_or(0, |last| last + 1));
        Ok(Self {
            limits,
            ports: BTreeMap::new(),
            adopted,
            retired: Vec::new(),
            service_ids: Places::adopt(limits.services, &references.keys().copied().collect()),
            frontends,
            references,
            backend_places: Places::adopt(limits.backends, &used_backends),
            generations,
            slots: Runs::adopt(limits.slots, &used_runs),
            lost_track: false,
        })
    }
}

fn read(dataplane: &impl Dataplane, id: ServiceId) -> Option<PortState> {
    let limits = dataplane.limits();
    if id == 0 || id >= limits.services {
        return None;
    }
    let record = dataplane.record(id);
    let mut state = PortState::new(id, record);
    for (word, to) in SETS.into_iter().zip(&mut state.runs) {
        let set = SetWord::from_bits(word.read(&record));
        let end = set.first().checked_add(set.count())?;
        if end > limits.slots {
            return None;
        }
        let run =
            Run { first: set.first(), ids: (set.first()..end).map(|index| dataplane.slot(index)).collect() };
        for backend_id in &run.ids {
            let backend = dataplane.backend(backend_id.index());
            if !backend.is(*backend_id) {
                return None;
            }
            let address = SocketAddr::new(backend.address.ip(), backend.port.number());
            let member = Member { id: *backend_id, state: backend.state() };
            let known = match word {
                RecordWord::Draining => state.drained.insert(address, member),
                RecordWord::Cluster | RecordWord::Local | RecordWord::Affinity => {
                    state.members.insert(address, member)
                }
            };
            if known.is_some_and(|known| known != member) {
                return None;
            }
        }
        if run.ids.is_sorted() {
            *to = run
        } else {
            return None;
        };
    }
    Some(state)
}

fn backends(state: &PortState) -> impl Iterator<Item = u32> {
    state.members.values().chain(state.drained.values()).map(|member| member.id.index())
}

fn is_free(used: &BTreeMap<u32, u32>, run: &Run) -> bool {
    let end = run.first + run.len();
    let before = used.range(..end).next_back();
    before.is_none_or(|(first, length)| first + length <= run.first)
}
