//! One service port's record: claiming one, bringing it to what is wanted, freeing it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use proxy_common::abi::{
    AffinityWord, Backend, BackendId, BackendState, FrontendKey, FrontendValue, Port, ServiceId,
    ServiceRecord, SetWord, WhenEmpty,
};

use super::members::{Member, Members};
use super::{Error, Reconciler, Table, WantedPort};
use crate::dataplane::{Dataplane, RecordWord, Write};
use crate::resolve::ServicePortKey;

/// What is written for one service port.
#[derive(Debug)]
pub(super) struct PortState {
    pub(super) id: ServiceId,
    /// The words as written.
    pub(super) record: ServiceRecord,
    /// The runs that the words point to, in the order of [`SETS`].
    pub(super) runs: [Run; 3],
    /// Backends of the cluster and the local set.
    pub(super) members: Members,
    /// Backends that left both sets and still serve. One that comes back to a set gets a new id there, so that affinity
    /// does not draw its old clients back (A4), while datagram flows stay with the old one (C2).
    pub(super) drained: Members,
    /// Which of [`SETS`] the service port no longer uses. The word stays until no frontend asks for it: before that, it
    /// would be missing.
    pub(super) withdrawn: [bool; 3],
    /// Backends that only words as they are written may still lead to.
    pub(super) held: BTreeMap<BackendId, (SocketAddr, BackendState)>,
    /// Frontends that point here, or will; each once.
    pub(super) frontends: Vec<FrontendKey>,
}

/// A run of slots.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Run {
    pub(super) first: u32,
    /// Sorted.
    pub(super) ids: Box<[BackendId]>,
}

/// The record's words that are sets.
pub(super) const SETS: [RecordWord; 3] = [RecordWord::Cluster, RecordWord::Local, RecordWord::Draining];

impl PortState {
    pub(super) fn new(id: ServiceId, record: ServiceRecord) -> Self {
        Self {
            id,
            record,
            runs: Default::default(),
            members: Members::default(),
            drained: Members::default(),
            withdrawn: [false; 3],
            held: BTreeMap::new(),
            frontends: Vec::new(),
        }
    }

    pub(super) fn is_withdrawing(&self) -> bool {
        SETS.iter()
            .zip(&self.withdrawn)
            .any(|(word, withdrawn)| *withdrawn && word.read(&self.record) != SetWord::ABSENT.bits())
    }

    fn are_unsure(&mut self, changes: &[StateChange]) {
        for change in changes {
            change.is_unsure(&mut self.members);
            change.is_unsure(&mut self.drained);
        }
    }

    /// All backends of this record.
    pub(super) fn tenants(&self) -> BTreeMap<BackendId, (SocketAddr, BackendState)> {
        let named = self.members.iter().chain(self.drained.iter());
        let mut tenants = self.held.clone();
        tenants.extend(named.map(|(address, member)| (member.id, (address, member.state))));
        tenants
    }

    /// Tells held backends which sets they are in still: affinity shall not lead to them from any other.
    fn write_held(&mut self, dataplane: &mut impl Dataplane) -> usize {
        let [cluster, local, _] = &self.runs;
        let mut written = 0;
        for (id, (address, state)) in &mut self.held {
            let is_in = |run: &Run| run.ids.binary_search(id).is_ok();
            let to = BackendState { cluster: is_in(cluster), local: is_in(local), serving: false };
            let write = Write::Backend { index: id.index(), value: backend(*address, to, *id) };
            // If it fails, the next commit finds it again.
            if *state != to && dataplane.apply(&[write]).is_empty() {
                *state = to;
                written += 1;
            }
        }
        written
    }

    /// Keeps those of `old` that are backends no more but that a set as written still leads to; returns the others.
    fn hold(&mut self, mut old: BTreeMap<BackendId, (SocketAddr, BackendState)>) -> Vec<BackendId> {
        self.held.clear();
        for id in self.tenants().keys() {
            old.remove(id);
        }
        let reached: BTreeSet<BackendId> = self.runs.iter().flat_map(|run| run.ids.iter().copied()).collect();
        let (held, gone) = old.into_iter().partition(|(id, _)| reached.contains(id));
        self.held = held;
        BTreeMap::into_keys(gone).collect()
    }
}

impl Run {
    /// Sets are bounded by [`SetWord::MAX_COUNT`] before a run is made.
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.ids.len()).unwrap_or(SetWord::MAX_COUNT)
    }
}

/// What a port's record shall become; ids are given out, nothing is written.
#[derive(Default)]
struct Next {
    members: Members,
    drained: Members,
    new_ids: Vec<BackendId>,
    /// Backends that stay, with another state.
    changes: Vec<StateChange>,
    writes: Vec<Write>,
}

/// Before the commit a backend says what is true before or after it, afterwards only what is true after it.
struct StateChange {
    address: SocketAddr,
    id: BackendId,
    both: BackendState,
    to: BackendState,
}

impl StateChange {
    fn write(&self, state: BackendState) -> Write {
        Write::Backend { index: self.id.index(), value: backend(self.address, state, self.id) }
    }

    /// A write of this change failed somewhere: both states may be written.
    fn is_unsure(&self, members: &mut Members) {
        if members.get(&self.address).is_some_and(|member| member.id == self.id) {
            members.insert(self.address, Member { id: self.id, state: self.both });
        }
    }
}

impl Next {
    fn keep(&mut self, address: SocketAddr, member: Member, state: BackendState) {
        if member.state != state {
            let change = StateChange { address, id: member.id, both: member.state.or(state), to: state };
            if change.both != member.state {
                self.writes.push(change.write(change.both));
            }
            self.changes.push(change);
        }
        let into = if state.in_a_set() { &mut self.members } else { &mut self.drained };
        into.insert(address, Member { id: member.id, state });
    }
}

impl Reconciler {
    /// The record of this service port: its own, else one found in the kernel that one of its frontends points to, else
    /// a new one.
    pub(super) fn claim(
        &mut self,
        port: &WantedPort,
        claims: &BTreeMap<FrontendKey, ServicePortKey>,
        dataplane: &impl Dataplane,
        now_ms: u64,
    ) -> Result<Box<PortState>, Error> {
        if let Some(state) = self.ports.remove(&port.key) {
            return Ok(state);
        }
        // A record that two service ports have frontends of is nobody's: the sets of either would be wrong for the other.
        let is_mine = |key: &FrontendKey| claims.get(key).is_none_or(|claimant| *claimant == port.key);
        for (key, _) in &port.frontends {
            let Some(id) = self.frontends.get(key).map(FrontendValue::service) else { continue };
            if self.adopted.get(&id).is_some_and(|state| state.frontends.iter().all(is_mine))
                && let Some(state) = self.adopted.remove(&id)
            {
                return Ok(Box::new(state));
            }
        }
        let full = Error::Full { table: Table::Services, limit: self.limits.services };
        let id = self.service_ids.take(now_ms).ok_or(full)?;
        // Whatever a former tenant left there is compared, not assumed.
        Ok(Box::new(PortState::new(id, dataplane.record(id))))
    }

    /// Steps 1 and 2 of the commit. After an error the record still is, word by word, either as before or as wanted.
    pub(super) fn commit(
        &mut self,
        state: &mut PortState,
        port: &WantedPort,
        dataplane: &mut impl Dataplane,
        now_ms: u64,
        written: &mut usize,
    ) -> Result<(), Error> {
        let mut next = self.next(state, port, now_ms)?;
        let wanted_ids: [Option<Box<[BackendId]>>; 3] = [
            port.uses_cluster_set.then(|| ids(&next.members, port, |m| m.cluster)),
            port.uses_local_set.then(|| ids(&next.members, port, |m| m.local)),
            (!next.drained.is_empty()).then(|| sorted(next.drained.iter().map(|(_, member)| member.id))),
        ];
        let runs = match self.place(state, wanted_ids, &mut next.writes, now_ms) {
            Ok(runs) => runs,
            Err(error) => {
                self.forget(&next.new_ids, &[]);
                return Err(error);
            }
        };
        let failures = dataplane.apply(&next.writes);
        *written += next.writes.len() - failures.len();
        if let Some(failure) = failures.into_iter().next() {
            let table = match next.writes.get(failure.index) {
                Some(Write::Slot { .. }) => Table::Slots,
                _ => Table::Backends,
            };
            let unused: Vec<&Run> = runs.iter().filter_map(|(run, _)| run.as_ref()).collect();
            self.forget(&next.new_ids, &unused);
            state.are_unsure(&next.changes);
            return Err(Error::Write { table, source: failure.error });
        }
        let old = state.tenants();
        let result = self.store_words(state, port, runs, dataplane, now_ms, written);
        if result.is_err() {
            // Some words may point to old members, others to new ones: keep all, the next comparison sorts it out.
            next.members.iter().for_each(|(address, member)| state.members.insert(address, member));
            next.drained.iter().for_each(|(address, member)| state.drained.insert(address, member));
            state.are_unsure(&next.changes);
            state.held.extend(old);
            return result;
        }
        state.members = next.members;
        state.drained = next.drained;
        let gone = state.hold(old);
        *written += self.vacate(&gone, dataplane, now_ms);
        *written += state.write_held(dataplane);
        next.changes.retain(|change| change.both != change.to);
        let writes: Vec<Write> = next.changes.iter().map(|change| change.write(change.to)).collect();
        let failures = dataplane.apply(&writes);
        *written += writes.len() - failures.len();
        match failures.into_iter().next() {
            Some(failure) => {
                state.are_unsure(&next.changes);
                Err(Error::Write { table: Table::Backends, source: failure.error })
            }
            None => Ok(()),
        }
    }

    /// Gives every wanted endpoint its backend id, keeping the ids of those that stay.
    fn next(&mut self, state: &PortState, port: &WantedPort, now_ms: u64) -> Result<Next, Error> {
        let mut next = Next { members: Members::with_capacity(port.endpoints.len()), ..Next::default() };
        for (address, wanted) in &port.endpoints {
            let (old, drained) = (state.members.get(address), state.drained.get(address));
            if wanted.in_a_set() {
                match old {
                    Some(member) => next.keep(*address, member, *wanted),
                    None => {
                        let Some(id) = self.new_backend(now_ms) else {
                            self.forget(&next.new_ids, &[]);
                            return Err(Error::Full { table: Table::Backends, limit: self.limits.backends });
                        };
                        next.new_ids.push(id);
                        let value = backend(*address, *wanted, id);
                        next.writes.push(Write::Backend { index: id.index(), value });
                        next.members.insert(*address, Member { id, state: *wanted });
                    }
                }
                if let (Some(member), true) = (drained, wanted.serving) {
                    next.drained.insert(*address, member);
                }
            } else if wanted.serving {
                // The younger id has the younger flows.
                if let Some(member) = old.or(drained) {
                    next.keep(*address, member, *wanted);
                }
            }
        }
        Ok(next)
    }

    /// Finds a run for every set that changed and writes its slots. For each set: the new run, if there is one, and the
    /// word that commits it.
    fn place(
        &mut self,
        state: &PortState,
        wanted: [Option<Box<[BackendId]>>; 3],
        writes: &mut Vec<Write>,
        now_ms: u64,
    ) -> Result<[(Option<Run>, Placed); 3], Error> {
        let mut placed: [(Option<Run>, Placed); 3] = Default::default();
        for (index, ids) in wanted.into_iter().enumerate() {
            let (Some(current), Some(to)) = (state.runs.get(index), placed.get_mut(index)) else { continue };
            let Some(ids) = ids else {
                *to = (None, Placed::Absent);
                continue;
            };
            if current.ids == ids {
                *to = (None, Placed::Same);
                continue;
            }
            let count = ids.len();
            let too_many = Error::TooManyEndpoints { count, max: SetWord::MAX_COUNT };
            let result = u32::try_from(count)
                .ok()
                .filter(|count| *count <= SetWord::MAX_COUNT)
                .ok_or(too_many)
                .and_then(|count| {
                    let full = Error::Full { table: Table::Slots, limit: self.limits.slots };
                    self.slots.take(count, now_ms).ok_or(full)
                });
            match result {
                Ok(first) => {
                    let numbered = (first..).zip(ids.iter());
                    writes.extend(numbered.map(|(index, id)| Write::Slot { index, value: *id }));
                    *to = (Some(Run { first, ids }), Placed::Moved);
                }
                Err(error) => {
                    for run in placed.iter().filter_map(|(run, _)| run.as_ref()) {
                        self.slots.give_unseen(run.first, run.len());
                    }
                    return Err(error);
                }
            }
        }
        Ok(placed)
    }

    /// Step 2: one atomic store for each word that changed.
    fn store_words(
        &mut self,
        state: &mut PortState,
        port: &WantedPort,
        runs: [(Option<Run>, Placed); 3],
        dataplane: &mut impl Dataplane,
        now_ms: u64,
        written: &mut usize,
    ) -> Result<(), Error> {
        let mut result = Ok(());
        let sets = SETS.into_iter().zip(runs).zip(&mut state.runs).zip(&mut state.withdrawn);
        for (((word, (run, placed)), current), withdrawn) in sets {
            // No frontend asks for the draining set.
            *withdrawn = placed == Placed::Absent && word != RecordWord::Draining;
            if *withdrawn {
                continue;
            }
            let run = match placed {
                Placed::Absent => Run::default(),
                Placed::Same | Placed::Moved => run.unwrap_or_else(|| current.clone()),
            };
            let bits = match placed {
                Placed::Absent => SetWord::ABSENT.bits(),
                Placed::Same | Placed::Moved => {
                    SetWord::new(run.first, run.len(), when_empty(word, port)).bits()
                }
            };
            let stored = store(dataplane, state.id, word, word.read(&state.record), bits, written);
            match stored {
                Ok(()) => {
                    set_word(&mut state.record, word, bits);
                    let old = std::mem::replace(current, run);
                    if old.first != current.first || old.ids != current.ids {
                        self.slots.give(old.first, old.len(), now_ms);
                    }
                }
                Err(error) => {
                    if placed == Placed::Moved {
                        self.slots.give_unseen(run.first, run.len());
                    }
                    result = Err(error);
                }
            }
        }
        let affinity = next_affinity(state.record.affinity, port.affinity_timeout_s);
        store(
            dataplane,
            state.id,
            RecordWord::Affinity,
            state.record.affinity.bits(),
            affinity.bits(),
            written,
        )?;
        state.record.affinity = affinity;
        result
    }

    /// Step 5: sets that the service port no longer uses, if no frontend asks for them any more.
    pub(super) fn withdraw(
        &mut self,
        state: &mut PortState,
        dataplane: &mut impl Dataplane,
        now_ms: u64,
    ) -> usize {
        let mut written = 0;
        let references = self.references.get(&state.id);
        let (cluster, local) = references.map_or((0, 0), |counts| (counts.cluster, counts.local));
        for ((word, run), withdrawn) in SETS.into_iter().zip(&mut state.runs).zip(&mut state.withdrawn) {
            let asked_for = match word {
                RecordWord::Cluster => cluster,
                RecordWord::Local => local,
                RecordWord::Draining | RecordWord::Affinity => 0,
            };
            if !*withdrawn || asked_for > 0 {
                continue;
            }
            let absent = SetWord::ABSENT.bits();
            match store(dataplane, state.id, word, word.read(&state.record), absent, &mut written) {
                Ok(()) => {
                    set_word(&mut state.record, word, absent);
                    let run = std::mem::take(run);
                    self.slots.give(run.first, run.len(), now_ms);
                    *withdrawn = false;
                }
                Err(error) => tracing::warn!(%error, "a set that is not used any more stays for now"),
            }
        }
        let old = std::mem::take(&mut state.held);
        let gone = state.hold(old);
        written + self.vacate(&gone, dataplane, now_ms) + state.write_held(dataplane)
    }

    /// Step 6: the record and all that it held.
    pub(super) fn free(&mut self, state: PortState, dataplane: &mut impl Dataplane, now_ms: u64) -> usize {
        let tenants: Vec<BackendId> = state.tenants().into_keys().collect();
        let writes = self.vacate(&tenants, dataplane, now_ms);
        for run in &state.runs {
            self.slots.give(run.first, run.len(), now_ms);
        }
        self.service_ids.give(state.id, now_ms);
        writes + self.forget_ranges(state.id, dataplane)
    }

    /// Tells flows that these backends are gone; their places rest. A place whose write fails keeps its tenant's
    /// content: the id is not given out for that generation again, and no set points to it.
    fn vacate(&mut self, ids: &[BackendId], dataplane: &mut impl Dataplane, now_ms: u64) -> usize {
        let writes: Vec<Write> = ids
            .iter()
            .map(|id| Write::Backend { index: id.index(), value: Backend::vacant(id.generation()) })
            .collect();
        for write in &writes {
            if let Write::Backend { index, .. } = write {
                self.backend_places.give(*index, now_ms);
            }
        }
        writes.len() - dataplane.apply(&writes).len()
    }

    fn new_backend(&mut self, now_ms: u64) -> Option<BackendId> {
        let index = self.backend_places.take(now_ms)?;
        let place = index as usize;
        if self.generations.len() <= place {
            self.generations.resize(place + 1, 0);
        }
        let generation = self.generations.get_mut(place)?;
        // 0 is never real.
        *generation = generation.wrapping_add(1).max(1);
        Some(BackendId::new(index, *generation))
    }

    /// Gives back what was taken for a commit that did not happen.
    fn forget(&mut self, ids: &[BackendId], runs: &[&Run]) {
        for id in ids {
            self.backend_places.give_unseen(id.index());
        }
        for run in runs {
            self.slots.give_unseen(run.first, run.len());
        }
    }
}

/// What becomes of a set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Placed {
    /// Not used.
    #[default]
    Absent,
    /// Stays where it is.
    Same,
    /// Goes to a new run.
    Moved,
}

fn when_empty(word: RecordWord, port: &WantedPort) -> WhenEmpty {
    match word {
        // Nobody connects through it; one value, so that nothing is written for nothing.
        RecordWord::Draining => WhenEmpty::Reject,
        RecordWord::Cluster | RecordWord::Local | RecordWord::Affinity => port.when_empty,
    }
}

fn store(
    dataplane: &mut impl Dataplane,
    service: ServiceId,
    word: RecordWord,
    old: u64,
    bits: u64,
    written: &mut usize,
) -> Result<(), Error> {
    if old == bits {
        return Ok(());
    }
    match dataplane.apply(&[Write::Word { service, word, bits }]).into_iter().next() {
        Some(failure) => Err(Error::Write { table: Table::Services, source: failure.error }),
        None => {
            *written += 1;
            Ok(())
        }
    }
}

fn set_word(record: &mut ServiceRecord, word: RecordWord, bits: u64) {
    match word {
        RecordWord::Cluster => record.cluster = SetWord::from_bits(bits),
        RecordWord::Local => record.local = SetWord::from_bits(bits),
        RecordWord::Draining => record.draining = SetWord::from_bits(bits),
        RecordWord::Affinity => record.affinity = AffinityWord::from_bits(bits),
    }
}

/// A6: switched on anew, old entries are not believed; a changed time-out rules them at once.
fn next_affinity(current: AffinityWord, timeout_s: Option<u32>) -> AffinityWord {
    let wanted = timeout_s.unwrap_or(0);
    let switched_on = current.timeout_s() == 0 && wanted != 0;
    let epoch = if switched_on { current.epoch().wrapping_add(1) } else { current.epoch() };
    AffinityWord::new(wanted, epoch)
}

fn ids(members: &Members, port: &WantedPort, belongs: impl Fn(&BackendState) -> bool) -> Box<[BackendId]> {
    let in_set = port.endpoints.iter().filter(|(_, state)| belongs(state));
    sorted(in_set.filter_map(|(address, _)| members.get(address)).map(|member| member.id))
}

fn sorted(ids: impl Iterator<Item = BackendId>) -> Box<[BackendId]> {
    let mut ids: Vec<_> = ids.collect();
    ids.sort_unstable();
    ids.into()
}

pub(super) fn backend(address: SocketAddr, state: BackendState, id: BackendId) -> Backend {
    Backend::new(address.ip().into(), Port::new(address.port()), state, id.generation())
}
