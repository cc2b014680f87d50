//! `SOURCE_RANGES`: which clients each record lets in (rule F). The table is asked only where a frontend says so.
//!
//! A record's new ranges are written before its frontends, and those that it wants no more go after them: a frontend
//! that is guarded finds all that it lets in, and never more than before and after together. A record that nothing
//! points to yet starts without what a former tenant of its id let in.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use proxy_common::abi::{Address, ServiceId, SourceRange};

use super::{Error, Reconciler, Table, WantedPort};
use crate::dataplane::{Dataplane, Write};

/// First address of a range, and how many bits of the 128-bit form count.
pub(crate) type Range = (Address, u8);

/// As written, by record.
#[derive(Debug, Default)]
pub(super) struct Ranges(BTreeMap<ServiceId, BTreeSet<Range>>);

impl Ranges {
    pub(super) fn adopt(dataplane: &impl Dataplane) -> io::Result<Self> {
        let mut written: BTreeMap<ServiceId, BTreeSet<Range>> = BTreeMap::new();
        for (range, bits) in dataplane.source_ranges()? {
            written.entry(range.service).or_default().insert((range.client, bits));
        }
        Ok(Self(written))
    }

    pub(super) fn everything(&self) -> impl Iterator<Item = Write> {
        self.0.iter().flat_map(|(service, ranges)| ranges.iter().map(|range| add(*service, *range)))
    }

    fn of(&self, service: ServiceId) -> BTreeSet<Range> {
        self.0.get(&service).cloned().unwrap_or_default()
    }

    fn apply(&mut self, dataplane: &mut impl Dataplane, writes: &[Write]) -> (usize, Option<io::Error>) {
        let failures = dataplane.apply(writes);
        let failed: BTreeSet<usize> = failures.iter().map(|failure| failure.index).collect();
        for (_, write) in writes.iter().enumerate().filter(|(index, _)| !failed.contains(index)) {
            match write {
                Write::SourceRange { range, bits } => {
                    self.0.entry(range.service).or_default().insert((range.client, *bits));
                }
                Write::RemoveSourceRange { range, bits } => {
                    if let Some(written) = self.0.get_mut(&range.service) {
                        written.remove(&(range.client, *bits));
                        if written.is_empty() {
                            self.0.remove(&range.service);
                        }
                    }
                }
                Write::Backend { .. }
                | Write::Slot { .. }
                | Write::Word { .. }
                | Write::Frontend { .. }
                | Write::RemoveFrontend { .. } => {}
            }
        }
        (writes.len() - failed.len(), failures.into_iter().next().map(|failure| failure.error))
    }
}

impl Reconciler {
    /// Before the frontends of a record are written.
    pub(super) fn let_in(
        &mut self,
        service: ServiceId,
        port: &WantedPort,
        dataplane: &mut impl Dataplane,
        written: &mut usize,
    ) -> Result<(), Error> {
        let old = self.ranges.of(service);
        let mut writes = Vec::new();
        if !self.references.contains_key(&service) {
            writes.extend(old.difference(&port.source_ranges).map(|range| remove(service, *range)));
        }
        writes.extend(port.source_ranges.difference(&old).map(|range| add(service, *range)));
        if writes.is_empty() {
            return Ok(());
        }
        let (count, error) = self.ranges.apply(dataplane, &writes);
        *written += count;
        error.map_or(Ok(()), |error| Err(range_error(error)))
    }

    /// After the frontends of a record were written: clients that it lets in no more.
    pub(super) fn shut_out(
        &mut self,
        service: ServiceId,
        wanted: &BTreeSet<Range>,
        dataplane: &mut impl Dataplane,
        written: &mut usize,
    ) -> Result<(), Error> {
        let old = self.ranges.of(service);
        let writes: Vec<Write> = old.difference(wanted).map(|range| remove(service, *range)).collect();
        if writes.is_empty() {
            return Ok(());
        }
        let (count, error) = self.ranges.apply(dataplane, &writes);
        *written += count;
        error.map_or(Ok(()), |error| Err(range_error(error)))
    }

    /// Of a record that nothing points to. Returns the number of writes.
    pub(super) fn forget_ranges(&mut self, service: ServiceId, dataplane: &mut impl Dataplane) -> usize {
        let mut written = 0;
        if let Err(error) = self.shut_out(service, &BTreeSet::new(), dataplane, &mut written) {
            tracing::warn!(service_id = service, %error, "source ranges of a record that is gone stay for now");
            self.lost_track = true;
        }
        written
    }

    /// In a full sync: ranges of ids that belong to nobody.
    pub(super) fn shut_out_strays(&mut self, dataplane: &mut impl Dataplane) -> usize {
        let known: BTreeSet<ServiceId> = self
            .ports
            .iter()
            .map(|(_, state)| state)
            .chain(self.adopted.values())
            .chain(self.retired.iter().map(|(_, state)| state))
            .map(|state| state.id)
            .collect();
        let strays: Vec<ServiceId> = self.ranges.0.keys().filter(|id| !known.contains(id)).copied().collect();
        strays.into_iter().map(|id| self.forget_ranges(id, dataplane)).sum()
    }
}

fn range_error(source: io::Error) -> Error {
    // A trie says ENOSPC where a hash says E2BIG.
    match source.raw_os_error() {
        Some(libc::ENOSPC | libc::E2BIG) => Error::NoRoom { table: Table::SourceRanges },
        _ => Error::Write { table: Table::SourceRanges, source },
    }
}

const fn add(service: ServiceId, (client, bits): Range) -> Write {
    Write::SourceRange { range: SourceRange { service, client }, bits }
}

const fn remove(service: ServiceId, (client, bits): Range) -> Write {
    Write::RemoveSourceRange { range: SourceRange { service, client }, bits }
}
