//! The kernel's maps as a [`Dataplane`], written through memory, but for the source ranges.

use std::io;
use std::path::Path;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Map, MapData, MapError};
use proxy_common::abi::{
    AffinityWord, Backend, BackendId, FrontendKey, FrontendValue, ServiceId, ServiceRecord, SetWord, Slot,
    SourceRange,
};

use super::frontends::Frontends;
use super::{Dataplane, Failure, Limits, RecordWord, Write};
use crate::kernel::mapping::Mapping;
use crate::kernel::table::io_error;
use crate::kernel::{self, Pins, programs::open_pinned};

/// See the module.
pub struct Kernel {
    limits: Limits,
    frontends: Frontends,
    /// Of all generations.
    source_ranges: LpmTrie<MapData, SourceRange, u32>,
    services: Mapping<ServiceRecord>,
    slots: Mapping<Slot>,
    backends: Mapping<Backend>,
}

impl Kernel {
    /// The tables that are pinned in a directory, to write.
    ///
    /// # Errors
    /// If a map is missing or cannot be mapped.
    pub fn of(tables: &Path, pins: &Pins) -> Result<Self, kernel::Error> {
        let mut this = Self::open_in(tables, &pins.state(), true)?;
        let Self { frontends, services, .. } = &mut this;
        frontends.repair(|service| record(services, service));
        Ok(this)
    }

    /// The pinned tables, to read, whoever writes them.
    ///
    /// # Errors
    /// If nothing is pinned.
    pub fn open(pins: &Pins) -> Result<Option<Self>, kernel::Error> {
        pins.newest()?
            .map(|generation| Self::open_in(&pins.tables(generation), &pins.state(), false))
            .transpose()
    }

    fn open_in(tables: &Path, state: &Path, writable: bool) -> Result<Self, kernel::Error> {
        let frontends = Frontends::open(tables, writable)?;
        let (services_limit, services) = map(tables, "SERVICES", writable)?;
        let (slots_limit, slots) = map(tables, "SLOTS", writable)?;
        let (backends_limit, backends) = map(tables, "BACKENDS", writable)?;
        Ok(Self {
            limits: Limits {
                frontends: frontends.limit(),
                services: services_limit,
                slots: slots_limit,
                backends: backends_limit,
            },
            frontends,
            source_ranges: Map::from_map_data(open_pinned(state, "SOURCE_RANGES")?)
                .and_then(TryInto::try_into)
                .map_err(|source| kernel::Error::Map { map: "SOURCE_RANGES", source })?,
            services,
            slots,
            backends,
        })
    }
}

fn entries(name: &'static str, map: &MapData) -> Result<u32, kernel::Error> {
    map.info().map(|info| info.max_entries()).map_err(|source| kernel::Error::Map { map: name, source })
}

pub(super) fn map<T>(
    tables: &Path,
    name: &'static str,
    writable: bool,
) -> Result<(u32, Mapping<T>), kernel::Error> {
    let data = open_pinned(tables, name)?;
    let limit = entries(name, &data)?;
    let mapping = Mapping::new(data.fd(), limit, writable)
        .map_err(kernel::Error::path("map into memory", tables.join(name)))?;
    Ok((limit, mapping))
}

fn lpm_key(range: SourceRange, bits: u8) -> Key<SourceRange> {
    Key::new(SourceRange::SERVICE_BITS + u32::from(bits), range)
}

impl Dataplane for Kernel {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn apply(&mut self, writes: &[Write]) -> Vec<Failure> {
        let mut failures = Vec::new();
        for (index, write) in writes.iter().enumerate() {
            let result = match write {
                Write::Backend { index, value } => self.backends.store(*index, *value),
                Write::Slot { index, value } => {
                    self.slots.store(*index, Slot::new(*value, &self.backends.load(value.index())))
                }
                Write::Word { service, word, bits } => self
                    .services
                    .store(*service, *word, *bits)
                    .inspect(|()| self.frontends.follow(*service, *word, *bits)),
                Write::Frontend { key, value } => {
                    self.frontends.put(key, *value, &record(&self.services, value.service()))
                }
                Write::RemoveFrontend { key } => {
                    self.frontends.remove(key);
                    Ok(())
                }
                Write::SourceRange { range, bits } => {
                    self.source_ranges.insert(&lpm_key(*range, *bits), 1, 0).map_err(io_error)
                }
                Write::RemoveSourceRange { range, bits } => {
                    match self.source_ranges.remove(&lpm_key(*range, *bits)).map_err(io_error) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                        Ok(()) | Err(_) => Ok(()),
                    }
                }
            };
            if let Err(error) = result {
                failures.push(Failure { index, error });
            }
        }
        failures
    }

    fn frontends(&self) -> io::Result<Vec<(FrontendKey, FrontendValue)>> {
        Ok(self.frontends.entries())
    }

    fn source_ranges(&self) -> io::Result<Vec<(SourceRange, u8)>> {
        let read = |entry: Result<(Key<SourceRange>, u32), MapError>| {
            let (key, _) = entry.map_err(io_error)?;
            let bits = key.prefix_len().saturating_sub(SourceRange::SERVICE_BITS);
            Ok((key.data(), u8::try_from(bits).unwrap_or(u8::MAX)))
        };
        self.source_ranges.iter().map(read).collect()
    }

    fn record(&self, service: ServiceId) -> ServiceRecord {
        record(&self.services, service)
    }

    fn slot(&self, index: u32) -> BackendId {
        self.slots.load(index)
    }

    fn backend(&self, index: u32) -> Backend {
        self.backends.load(index)
    }
}

fn record(services: &Mapping<ServiceRecord>, service: ServiceId) -> ServiceRecord {
    ServiceRecord {
        cluster: SetWord::from_bits(services.load(service, RecordWord::Cluster)),
        local: SetWord::from_bits(services.load(service, RecordWord::Local)),
        draining: SetWord::from_bits(services.load(service, RecordWord::Draining)),
        affinity: AffinityWord::from_bits(services.load(service, RecordWord::Affinity)),
    }
}
