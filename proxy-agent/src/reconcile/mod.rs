//! Wanted state minus written state = writes, in an order that leaves every prefix safe.
//!
//! 1. New backends and slots, where nothing points to them.
//! 2. The set words of each record: the commit; then the clients that it lets in. A new record is complete before step 3.
//! 3. Frontends, new and re-pointed: a frontend that changes hands is never missing (S13).
//! 4. Frontends that nobody wants any more.
//! 5. Sets that a record no longer uses, once no frontend asks for them.
//! 6. What nothing points to any more rests, and is used again later.
//!
//! Only what succeeded is remembered, so a failed write is found again by the next comparison. One Service's failure
//! does not hold up others (Q5).

mod adopt;
mod grow;
mod members;
mod pool;
mod port;
mod ports;
mod ranges;
#[cfg(test)]
mod tests;
mod wanted;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;

use proxy_common::abi::{FrontendKey, FrontendValue, Origin, ServiceId, WhichSet};

use crate::dataplane::{Dataplane, Limits, Write};
use crate::object::ObjectKey;
use crate::resolve::ServicePortKey;

pub use grow::roomy;
pub use pool::REST_MS;
pub use wanted::{WantedPort, bits};

use pool::{Places, Runs};
use port::PortState;
use ports::Ports;
use ranges::Ranges;

/// Why a Service is not, or not fully, programmed. It is tried again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A table is full.
    #[error("{table} is full: it holds {limit} entries")]
    Full {
        /// Which.
        table: Table,
        /// Its size.
        limit: u32,
    },
    /// A table is full that does not grow.
    #[error("{table} is full")]
    NoRoom {
        /// Which.
        table: Table,
    },
    /// A write failed.
    #[error("writing {table} failed")]
    Write {
        /// Which.
        table: Table,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A set is larger than a set word can say.
    #[error("{count} endpoints in one set: at most {max} can be programmed")]
    TooManyEndpoints {
        /// How many.
        count: usize,
        /// The bound.
        max: u32,
    },
}

/// A table that the agent writes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Table {
    /// `FRONTENDS`
    Frontends,
    /// `SERVICES`
    Services,
    /// `SLOTS`
    Slots,
    /// `BACKENDS`
    Backends,
    /// `SOURCE_RANGES`
    SourceRanges,
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Frontends => "FRONTENDS",
            Self::Services => "SERVICES",
            Self::Slots => "SLOTS",
            Self::Backends => "BACKENDS",
            Self::SourceRanges => "SOURCE_RANGES",
        })
    }
}

/// What one Service wants: all its ports, in both families. Empty: it is gone.
#[derive(Clone, Debug)]
pub struct WantedService {
    /// Which Service.
    pub key: ObjectKey,
    /// Ports with the frontends that they win (S12).
    pub ports: Vec<WantedPort>,
}

/// What a sync did.
#[derive(Debug, Default)]
pub struct Report {
    /// Number of writes that happened.
    pub writes: usize,
    /// Services to try again.
    pub failed: Vec<(ServicePortKey, Error)>,
}

/// How many frontends point to a record.
#[derive(Debug, Default)]
struct References {
    frontends: u32,
    /// Those of them that ask for the cluster set for some origin.
    cluster: u32,
    /// The same for the local set.
    local: u32,
}

impl References {
    fn of(values: impl Iterator<Item = FrontendValue>) -> HashMap<ServiceId, Self> {
        let mut references: HashMap<ServiceId, Self> = HashMap::new();
        for value in values {
            references.entry(value.service()).or_default().count(value, |count| *count += 1);
        }
        references
    }

    fn count(&mut self, value: FrontendValue, change: impl Fn(&mut u32)) {
        change(&mut self.frontends);
        let asks_for = |which| Origin::ALL.into_iter().any(|origin| value.set_for(origin) == which);
        if asks_for(WhichSet::Cluster) {
            change(&mut self.cluster);
        }
        if asks_for(WhichSet::Local) {
            change(&mut self.local);
        }
    }
}

/// The single writer of the agent-owned maps.
#[derive(Debug)]
pub struct Reconciler {
    limits: Limits,
    ports: Ports,
    /// Records found in the kernel at start that no wanted service port has claimed yet.
    adopted: BTreeMap<ServiceId, PortState>,
    /// Records that no service port wants; they stay until no frontend points to them and they have rested.
    retired: Vec<(u64, PortState)>,
    /// `FRONTENDS` as written.
    frontends: HashMap<FrontendKey, FrontendValue>,
    /// Frontends that came to another record than before since [`Self::take_moved`].
    moved: BTreeMap<FrontendKey, ServiceId>,
    /// What points to a record.
    references: HashMap<ServiceId, References>,
    /// Frontends that a failed service port wants and that point elsewhere still: nobody else remembers them if it goes.
    astray: BTreeMap<FrontendKey, ServicePortKey>,
    /// Service ports with a set that they no longer use and that a frontend still asked for when last looked at.
    withdrawing: BTreeSet<ServicePortKey>,
    service_ids: Places,
    backend_places: Places,
    /// Last generation of each backend place.
    generations: Vec<u32>,
    slots: Runs,
    /// A frontend could not be removed.
    lost_track: bool,
    ranges: Ranges,
    /// Backends found live in the kernel that belong to no record.
    strays: Vec<Write>,
}

impl Reconciler {
    /// Brings the kernel to what is wanted. With `full`, `wanted` names every Service, and what it does not name goes
    /// (Q2); otherwise only the named Services change. `now_ms` is any monotonic clock.
    pub fn sync(
        &mut self,
        dataplane: &mut impl Dataplane,
        wanted: &[WantedService],
        full: bool,
        now_ms: u64,
    ) -> Report {
        let mut report = Report::default();
        // Before anything is written where they are.
        let strays = std::mem::take(&mut self.strays);
        report.writes += strays.len() - dataplane.apply(&strays).len();
        // Frontends that may have lost their owner, and where they pointed.
        let mut orphans: BTreeSet<(FrontendKey, ServiceId)> = BTreeSet::new();
        for (key, _) in self.take_astray(wanted, full) {
            orphans.extend(self.frontends.get(&key).map(|value| (key, value.service())));
        }
        let claims = self.claims_on_adopted(wanted);
        let mut kept: BTreeSet<FrontendKey> = BTreeSet::new();

        for key in self.gone(wanted, full) {
            if let Some(state) = self.ports.remove(&key) {
                orphans.extend(state.frontends.iter().map(|key| (*key, state.id)));
                self.retired.push((now_ms, *state));
            }
        }
        let mut upserts: Vec<(&ServicePortKey, FrontendKey, FrontendValue)> = Vec::new();
        let mut ports: Vec<&WantedPort> = wanted
            .iter()
            .flat_map(|service| &service.ports)
            .filter(|port| !port.frontends.is_empty())
            .collect();
        // A client asks mostly over one family and protocol: what those connections read lies together, not in every
        // fourth place of tables of which most is cold then.
        ports.sort_by_key(|port| (port.key.protocol, port.key.family));
        for port in ports {
            let mut state = self.claim(port, &claims, dataplane, now_ms);
            let result = match &mut state {
                Ok(state) => self
                    .commit(state, port, dataplane, now_ms, &mut report.writes)
                    .and_then(|()| self.let_in(state.id, port, dataplane, &mut report.writes)),
                Err(_) => Ok(()),
            };
            let error = match (state, result) {
                (Ok(mut state), result) => {
                    orphans.extend(state.frontends.iter().map(|key| (*key, state.id)));
                    if result.is_ok() {
                        state.frontends = port.frontends.iter().map(|(key, _)| *key).collect();
                        for (key, value) in &port.frontends {
                            upserts.push((&port.key, *key, value.with_service(state.id)));
                        }
                    }
                    if state.is_withdrawing() {
                        self.withdrawing.insert(port.key.clone());
                    }
                    self.ports.insert(port.key.clone(), state);
                    result.err()
                }
                (Err(error), _) => Some(error),
            };
            if let Some(error) = error {
                // Not programmed as wanted: what the frontends point to now is the best there is.
                kept.extend(port.frontends.iter().map(|(key, _)| *key));
                self.astray.extend(port.frontends.iter().map(|(key, _)| (*key, port.key.clone())));
                report.failed.push((port.key.clone(), error));
            }
        }

        let stale: Vec<_> = upserts
            .into_iter()
            .filter(|(_, key, value)| {
                kept.insert(*key);
                self.frontends.get(key) != Some(value)
            })
            .collect();
        let writes: Vec<_> =
            stale.iter().map(|(_, key, value)| Write::Frontend { key: *key, value: *value }).collect();
        let mut failures = dataplane.apply(&writes).into_iter().peekable();
        for (index, (port, key, value)) in stale.iter().enumerate() {
            if let Some(failure) = failures.next_if(|failure| failure.index == index) {
                self.astray.insert(*key, (*port).clone());
                report.failed.push(((*port).clone(), self.write_error(failure.error)));
            } else {
                report.writes += 1;
                self.point(*key, *value);
            }
        }

        // Written, but wanted by nobody: in a full sync all that was not named, else what a named Service gave up.
        let orphans: Vec<FrontendKey> = if full {
            self.frontends.keys().copied().filter(|key| !kept.contains(key)).collect()
        } else {
            let still_its = |(key, id): &(FrontendKey, ServiceId)| {
                !kept.contains(key) && self.frontends.get(key).is_some_and(|value| value.service() == *id)
            };
            orphans.into_iter().filter(still_its).map(|(key, _)| key).collect()
        };
        let writes: Vec<_> = orphans.iter().map(|key| Write::RemoveFrontend { key: *key }).collect();
        let mut failures = dataplane.apply(&writes).into_iter().peekable();
        if full {
            self.lost_track = false;
        }
        for (index, key) in orphans.iter().enumerate() {
            if let Some(failure) = failures.next_if(|failure| failure.index == index) {
                tracing::warn!(?key, error = %failure.error, "a frontend that nobody wants could not be removed");
                self.lost_track = true;
            } else {
                report.writes += 1;
                self.unpoint(key);
            }
        }

        let failed: BTreeSet<ServicePortKey> = report.failed.iter().map(|(key, _)| key.clone()).collect();
        for port in wanted.iter().flat_map(|service| &service.ports) {
            // What failed may still be guarded as before.
            let Some(id) = self.service_id(&port.key).filter(|_| !failed.contains(&port.key)) else {
                continue;
            };
            if let Err(error) = self.shut_out(id, &port.source_ranges, dataplane, &mut report.writes) {
                report.failed.push((port.key.clone(), error));
            }
        }
        if full {
            report.writes += self.shut_out_strays(dataplane);
            self.retired.extend(std::mem::take(&mut self.adopted).into_values().map(|state| (now_ms, state)));
        }
        report.writes += self.rest(dataplane, now_ms);
        report
    }

    /// Withdraws sets that nothing asks for any more, and frees what has been retired and has rested; returns the number
    /// of writes. Call it again while [`Self::has_leftovers`].
    pub fn rest(&mut self, dataplane: &mut impl Dataplane, now_ms: u64) -> usize {
        let mut writes = 0;
        for key in std::mem::take(&mut self.withdrawing) {
            let Some(mut state) = self.ports.remove(&key) else { continue };
            writes += self.withdraw(&mut state, dataplane, now_ms);
            if state.is_withdrawing() {
                self.withdrawing.insert(key.clone());
            }
            self.ports.insert(key, state);
        }
        for (retired_ms, state) in std::mem::take(&mut self.retired) {
            // The rest begins when the last frontend has gone.
            let retired_ms = if self.references.contains_key(&state.id) { now_ms } else { retired_ms };
            if now_ms.saturating_sub(retired_ms) < REST_MS {
                self.retired.push((retired_ms, state));
            } else {
                writes += self.free(state, dataplane, now_ms);
            }
        }
        writes
    }

    /// Whether retired records or sets still wait.
    pub fn has_leftovers(&self) -> bool {
        !self.retired.is_empty() || !self.withdrawing.is_empty()
    }

    /// Whether a frontend that nobody wants is still written: only a full sync finds it again.
    pub fn needs_full_sync(&self) -> bool {
        self.lost_track
    }

    /// The record of a service port, if it is programmed.
    pub fn service_id(&self, key: &ServicePortKey) -> Option<ServiceId> {
        self.ports.get(key).map(|state| state.id)
    }

    /// Which service port a record belongs to.
    pub fn names(&self) -> impl Iterator<Item = (ServiceId, &ServicePortKey)> {
        self.ports.iter().map(|(key, state)| (state.id, key))
    }

    /// Frontends that were written for the first time, or came to another record, since the last call: what clients
    /// remember of them is somebody else's (C2).
    pub fn take_moved(&mut self) -> BTreeMap<FrontendKey, ServiceId> {
        std::mem::take(&mut self.moved)
    }

    /// The record that a frontend points to.
    pub fn owner(&self, key: &FrontendKey) -> Option<ServiceId> {
        self.frontends.get(key).map(FrontendValue::service)
    }

    /// All frontends that are written, in no order.
    pub fn frontends(&self) -> impl Iterator<Item = (FrontendKey, ServiceId)> {
        self.frontends.iter().map(|(key, value)| (*key, value.service()))
    }

    /// How many frontends are written.
    pub fn frontend_count(&self) -> usize {
        self.frontends.len()
    }

    /// How many frontends were found in the kernel at start.
    pub fn adopted_frontends(&self) -> usize {
        self.adopted.values().map(|state| state.frontends.len()).sum()
    }

    /// How many service ids, backend places and slots are given out and neither free nor resting.
    #[cfg(test)]
    fn in_use(&self) -> [usize; 3] {
        [self.service_ids.in_use(), self.backend_places.in_use(), self.slots.in_use(self.limits.slots)]
    }

    /// Service ports that are programmed but no longer wanted.
    fn gone(&self, wanted: &[WantedService], full: bool) -> Vec<ServicePortKey> {
        let wanted_ports: BTreeSet<&ServicePortKey> = wanted
            .iter()
            .flat_map(|service| &service.ports)
            .filter(|port| !port.frontends.is_empty())
            .map(|port| &port.key)
            .collect();
        let is_gone = |key: &&ServicePortKey| !wanted_ports.contains(key);
        if full {
            return self.ports.iter().map(|(key, _)| key).filter(is_gone).cloned().collect();
        }
        let of_service = |service: &WantedService| self.ports.of(&service.key).iter().map(|(key, _)| key);
        wanted.iter().flat_map(of_service).filter(is_gone).cloned().collect()
    }

    /// Frontends that failed service ports wanted, of the Services that are named now.
    fn take_astray(
        &mut self,
        wanted: &[WantedService],
        full: bool,
    ) -> impl Iterator<Item = (FrontendKey, ServicePortKey)> + use<> {
        let named: BTreeSet<&ObjectKey> = wanted.iter().map(|service| &service.key).collect();
        let taken = std::mem::take(&mut self.astray);
        let (taken, left) = taken.into_iter().partition(|(_, port)| full || named.contains(&port.service));
        self.astray = left;
        BTreeMap::into_iter(taken)
    }

    /// Who wants the frontends that point to adopted records.
    fn claims_on_adopted(&self, wanted: &[WantedService]) -> BTreeMap<FrontendKey, ServicePortKey> {
        let adopted = |key: &FrontendKey| {
            self.frontends.get(key).is_some_and(|value| self.adopted.contains_key(&value.service()))
        };
        let ports = wanted.iter().flat_map(|service| &service.ports).filter(|_| !self.adopted.is_empty());
        ports
            .flat_map(|port| port.frontends.iter().map(|(key, _)| (*key, &port.key)))
            .filter(|(key, _)| adopted(key))
            .map(|(key, port)| (key, port.clone()))
            .collect()
    }

    fn point(&mut self, key: FrontendKey, value: FrontendValue) {
        if self.owner(&key) != Some(value.service()) {
            self.moved.insert(key, value.service());
        }
        self.unpoint(&key);
        self.frontends.insert(key, value);
        self.references.entry(value.service()).or_default().count(value, |count| *count += 1);
    }

    fn unpoint(&mut self, key: &FrontendKey) {
        let Some(old) = self.frontends.remove(key) else { return };
        if let Some(references) = self.references.get_mut(&old.service()) {
            references.count(old, |count| *count -= 1);
            if references.frontends == 0 {
                self.references.remove(&old.service());
            }
        }
    }

    fn write_error(&self, source: io::Error) -> Error {
        if source.raw_os_error() == Some(libc::E2BIG) {
            Error::Full { table: Table::Frontends, limit: self.limits.frontends }
        } else {
            Error::Write { table: Table::Frontends, source }
        }
    }
}
