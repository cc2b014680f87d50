//! What a former run left in the kernel: it goes on working, and is compared instead of written anew (Q1, Q2).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;

use proxy_common::abi::{Backend, BackendId, ServiceId, SetWord};

use super::members::Member;
use super::pool::{Places, Runs};
use super::port::{PortState, Run, SETS};
use super::ports::Ports;
use super::ranges::Ranges;
use super::{Reconciler, References};
use crate::dataplane::{Dataplane, RecordWord, Write};

impl Reconciler {
    /// Reads the tables. A record that makes no sense is not adopted: the first sync points its frontends elsewhere, and
    /// then it goes like any other that nobody wants.
    ///
    /// # Errors
    /// If `FRONTENDS` or `SOURCE_RANGES` cannot be read.
    pub fn adopt(dataplane: &impl Dataplane) -> io::Result<Self> {
        let limits = dataplane.limits();
        let frontends: HashMap<_, _> = dataplane.frontends()?.into_iter().collect();
        let references = References::of(frontends.values().copied());
        // An id out of range names no record; place 0 is never given out.
        let ids: BTreeSet<ServiceId> =
            references.keys().copied().filter(|id| (1..limits.services).contains(id)).collect();
        let (mut adopted, mut retired) = (BTreeMap::new(), Vec::new());
        let mut used = Used::default();
        for id in ids.iter().copied() {
            let mut state = PortState::new(id, dataplane.record(id));
            if used.read(dataplane, &mut state) {
                adopted.insert(id, state);
            } else {
                tracing::warn!(
                    service_id = id,
                    "a service record in the kernel makes no sense; it is replaced"
                );
                retired.push((0, state));
            }
        }
        for (key, value) in &frontends {
            if let Some(state) = adopted.get_mut(&value.service()) {
                state.frontends.push(*key);
            }
        }
        // Left by an agent that went while they rested: flows must not believe in them.
        let strays = (0..limits.backends).filter(|index| !used.backends.contains(index));
        let strays = strays.filter(|index| dataplane.backend(*index).is_live()).map(|index| Write::Backend {
            index,
            value: Backend::vacant(dataplane.backend(index).generation),
        });
        let strays = strays.collect();
        let generations = (0..limits.backends).map(|index| dataplane.backend(index).generation);
        let mut generations: Vec<u32> = generations.collect();
        generations
            .truncate(generations.iter().rposition(|generation| *generation != 0).map_or(0, |last| last + 1));
        Ok(Self {
            limits,
            ports: Ports::default(),
            adopted,
            retired,
            service_ids: Places::adopt(limits.services, &ids),
            frontends,
            moved: BTreeMap::new(),
            references,
            astray: BTreeMap::new(),
            withdrawing: BTreeSet::new(),
            backend_places: Places::adopt(limits.backends, &used.backends),
            generations,
            slots: Runs::adopt(limits.slots, &used.runs),
            lost_track: false,
            ranges: Ranges::adopt(dataplane)?,
            strays,
        })
    }
}

/// Places that adopted records use. No two of them may share one.
#[derive(Default)]
struct Used {
    /// First slot → length.
    runs: BTreeMap<u32, u32>,
    backends: BTreeSet<u32>,
}

impl Used {
    /// Fills in what a record points to. False if that makes no sense; then `state` has the part that does, so that
    /// nobody else gets those places while frontends still point to it.
    fn read(&mut self, dataplane: &impl Dataplane, state: &mut PortState) -> bool {
        let limits = dataplane.limits();
        let mut makes_sense = true;
        let mut own = BTreeSet::new();
        for (index, word) in SETS.into_iter().enumerate() {
            let set = SetWord::from_bits(word.read(&state.record));
            let end = set.first().saturating_add(set.count());
            if set.count() == 0 {
                continue;
            }
            if end > limits.slots || !self.is_free(set) {
                makes_sense = false;
                continue;
            }
            self.runs.insert(set.first(), set.count());
            let ids: Vec<BackendId> = (set.first()..end).map(|slot| dataplane.slot(slot)).collect();
            makes_sense &= ids.is_sorted();
            for id in &ids {
                let backend = dataplane.backend(id.index());
                if !backend.is(*id) || self.backends.contains(&id.index()) {
                    makes_sense = false;
                    continue;
                }
                own.insert(id.index());
                let address = SocketAddr::new(backend.address.ip(), backend.port.number());
                let member = Member { id: *id, state: backend.state() };
                let to = if word == RecordWord::Draining { &mut state.drained } else { &mut state.members };
                // Two for one address: a set that is on its way out may lead to an older one. Either may stay.
                match to.get(&address) {
                    None => to.insert(address, member),
                    Some(other) if other.id == *id => {}
                    Some(_) => drop(state.held.insert(*id, (address, member.state))),
                }
            }
            if let Some(run) = state.runs.get_mut(index) {
                *run = Run { first: set.first(), ids: ids.into() };
            }
        }
        // Not `append`, which builds the whole set anew.
        self.backends.extend(own);
        makes_sense
    }

    fn is_free(&self, set: SetWord) -> bool {
        let end = set.first().saturating_add(set.count());
        let before = self.runs.range(..end).next_back();
        before.is_none_or(|(first, length)| first.saturating_add(*length) <= set.first())
    }
}
