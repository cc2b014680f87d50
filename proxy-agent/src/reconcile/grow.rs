//! Moving to larger tables: the same ids, in new maps.

use proxy_common::abi::{Backend, BackendId};

use super::port::{PortState, SETS};
use super::{Error, Reconciler, Report, Table, WantedService};
use crate::dataplane::{Dataplane, Failure, Limits, RecordWord, Write};

impl Report {
    /// Sizes to try after the failures of this sync; `None` if sizes are not what is missing, or if they are at their
    /// maximum. Places that only rest are no excuse: a table that is full of those is too small for its changes.
    pub fn larger(&self, limits: Limits) -> Option<Limits> {
        let mut larger = limits;
        for (_, error) in &self.failed {
            if let Error::Full { table, .. } = error {
                match table {
                    // All generations share it.
                    Table::SourceRanges => {}
                    Table::Frontends => larger.frontends = grown(limits.frontends, Limits::MAX.frontends),
                    Table::Services => larger.services = grown(limits.services, Limits::MAX.services),
                    Table::Slots => larger.slots = grown(limits.slots, Limits::MAX.slots),
                    Table::Backends => larger.backends = grown(limits.backends, Limits::MAX.backends),
                }
            }
        }
        (larger != limits).then_some(larger)
    }
}

/// Sizes are multiples of it, where they are not powers of two by themselves.
const GRAIN: u32 = 1 << 10;

/// Sizes that hold all that is wanted, with a quarter of that to spare: for the first sync of a large cluster, which
/// would otherwise grow again and again. Unchanged if it fits as it is, so that a restart writes nothing.
pub fn roomy(limits: Limits, wanted: &[WantedService]) -> Limits {
    let ports = || wanted.iter().flat_map(|service| &service.ports);
    let slots = ports()
        .flat_map(|port| port.endpoints.values())
        .map(|s| usize::from(s.cluster) + usize::from(s.local));
    let roomy = |size: u32, wanted: usize, max: u32| {
        if u32::try_from(wanted).is_ok_and(|wanted| wanted <= size) {
            return size;
        }
        let spare = u32::try_from(wanted + wanted / 4).unwrap_or(u32::MAX);
        if spare <= size { size } else { spare.checked_next_multiple_of(GRAIN).unwrap_or(max).min(max) }
    };
    let max = Limits::MAX;
    Limits {
        frontends: roomy(limits.frontends, ports().map(|port| port.frontends.len()).sum(), max.frontends),
        services: roomy(limits.services, ports().count(), max.services),
        slots: roomy(limits.slots, slots.sum(), max.slots),
        backends: roomy(limits.backends, ports().map(|port| port.endpoints.len()).sum(), max.backends),
    }
}

/// A table has all of its memory from the start: half as large again, or a few pages.
fn grown(size: u32, max: u32) -> u32 {
    size.saturating_add((size / 2).max(GRAIN)).min(max)
}

impl Reconciler {
    /// Writes all that is written into new, larger tables under the same ids, so that what the programs remember
    /// (affinity, flows) stays true. The old tables stay in use.
    ///
    /// # Errors
    /// The first write that failed.
    pub fn copy_to(&self, dataplane: &mut impl Dataplane) -> Result<(), Failure> {
        dataplane.apply(&self.everything()).into_iter().next().map_or(Ok(()), Err)
    }

    /// From now on every write goes to the tables that [`Self::copy_to`] filled, which are so large. The old ones go on
    /// serving until the links are updated.
    pub fn moved_to(&mut self, limits: Limits) {
        self.service_ids.extend(limits.services);
        self.backend_places.extend(limits.backends);
        self.slots.extend(self.limits.slots, limits.slots);
        self.limits = limits;
    }

    /// In the order of a commit.
    fn everything(&self) -> Vec<Write> {
        let states = || {
            let retired = self.retired.iter().map(|(_, state)| state);
            self.ports.iter().map(|(_, state)| state).chain(self.adopted.values()).chain(retired)
        };
        // Vacant places too: their generations keep stale ids from being believed. Tenants move in below.
        let vacant = (0..).zip(&self.generations).filter(|(_, generation)| **generation != 0);
        let vacant =
            vacant.map(|(index, generation)| Write::Backend { index, value: Backend::vacant(*generation) });
        let mut writes: Vec<Write> = vacant.collect();
        for state in states() {
            writes.extend(state.tenants().into_iter().map(|(id, (address, state))| Write::Backend {
                index: id.index(),
                value: super::port::backend(address, state, id),
            }));
            for run in &state.runs {
                writes.extend(
                    (run.first..)
                        .zip(&run.ids)
                        .map(|(index, id): (u32, &BackendId)| Write::Slot { index, value: *id }),
                );
            }
        }
        for state in states() {
            writes.extend(words(state));
        }
        // In the kernel all generations share them; written twice is written once.
        writes.extend(self.ranges.everything());
        writes.extend(self.frontends.iter().map(|(key, value)| Write::Frontend { key: *key, value: *value }));
        writes
    }
}

fn words(state: &PortState) -> impl Iterator<Item = Write> {
    let word = |word: RecordWord| Write::Word { service: state.id, word, bits: word.read(&state.record) };
    SETS.into_iter().chain([RecordWord::Affinity]).map(word)
}
