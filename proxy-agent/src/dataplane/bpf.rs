//! The kernel's maps as a [`Dataplane`]: one hash by system calls, three arrays by memory.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use aya::maps::{HashMap, Map, MapData, MapError};
use proxy_common::abi::{
    AffinityWord, Backend, BackendId, FrontendKey, FrontendValue, ServiceId, ServiceRecord, SetWord,
};

use super::{Dataplane, Failure, Limits, RecordWord, Write};
use crate::kernel::mapping::Mapping;
use crate::kernel::{self, Pins, batch_entries, programs::open_pinned, update_batch};

/// See the module.
pub struct Kernel {
    limits: Limits,
    frontends: HashMap<MapData, FrontendKey, FrontendValue>,
    /// The same map, for batches.
    frontends_fd: OwnedFd,
    services: Mapping<ServiceRecord>,
    slots: Mapping<BackendId>,
    backends: Mapping<Backend>,
}

impl Kernel {
    /// The tables that are pinned in a directory, to write.
    ///
    /// # Errors
    /// If a map is missing or cannot be mapped.
    pub fn of(tables: &Path) -> Result<Self, kernel::Error> {
        Self::open_in(tables, true)
    }

    /// The pinned tables, to read, whoever writes them.
    ///
    /// # Errors
    /// If nothing is pinned.
    pub fn open(pins: &Pins) -> Result<Option<Self>, kernel::Error> {
        pins.newest()?.map(|generation| Self::open_in(&pins.tables(generation), false)).transpose()
    }

    fn open_in(tables: &Path, writable: bool) -> Result<Self, kernel::Error> {
        let frontends = open_pinned(tables, "FRONTENDS")?;
        let frontends_limit = entries("FRONTENDS", &frontends)?;
        let frontends_fd = frontends
            .fd()
            .as_fd()
            .try_clone_to_owned()
            .map_err(kernel::Error::path("duplicate", tables.join("FRONTENDS")))?;
        let (services_limit, services) = map(tables, "SERVICES", writable)?;
        let (slots_limit, slots) = map(tables, "SLOTS", writable)?;
        let (backends_limit, backends) = map(tables, "BACKENDS", writable)?;
        let error = |source| kernel::Error::Map { map: "FRONTENDS", source };
        Ok(Self {
            limits: Limits {
                frontends: frontends_limit,
                services: services_limit,
                slots: slots_limit,
                backends: backends_limit,
            },
            frontends: Map::from_map_data(frontends).map_err(error)?.try_into().map_err(error)?,
            frontends_fd,
            services,
            slots,
            backends,
        })
    }

    /// Writes a run of frontends; failures are single, not of the whole batch.
    fn put_frontends(
        &mut self,
        from: usize,
        entries: &[(FrontendKey, FrontendValue)],
        failures: &mut Vec<Failure>,
    ) {
        let mut done = 0;
        while let Some(rest) = entries.get(done..).filter(|rest| !rest.is_empty()) {
            let (written, error) = update_batch(self.frontends_fd.as_fd(), rest);
            done += written;
            if let Some(error) = error {
                // The first one that was not written, by itself: the kernel may refuse batches as such.
                let single = entries.get(done).map(|(key, value)| self.frontends.insert(key, value, 0));
                if let Some(Err(single)) = single {
                    tracing::debug!(%error, "a batch of frontends was cut short");
                    failures.push(Failure { index: from + done, error: io_error(single) });
                }
                done += 1;
            }
        }
    }
}

fn entries(name: &'static str, map: &MapData) -> Result<u32, kernel::Error> {
    map.info().map(|info| info.max_entries()).map_err(|source| kernel::Error::Map { map: name, source })
}

fn map<T>(tables: &Path, name: &'static str, writable: bool) -> Result<(u32, Mapping<T>), kernel::Error> {
    let data = open_pinned(tables, name)?;
    let limit = entries(name, &data)?;
    let mapping = Mapping::new(data.fd(), limit, writable)
        .map_err(kernel::Error::path("map into memory", tables.join(name)))?;
    Ok((limit, mapping))
}

fn io_error(error: MapError) -> io::Error {
    if let MapError::SyscallError(error) = error { error.io_error } else { io::Error::other(error) }
}

impl Dataplane for Kernel {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn apply(&mut self, writes: &[Write]) -> Vec<Failure> {
        let mut failures = Vec::new();
        let mut batch = Vec::new();
        for (index, write) in writes.iter().enumerate() {
            if let Write::Frontend { key, value } = write {
                batch.push((*key, *value));
                continue;
            }
            // Order is kept: what was gathered goes first.
            self.put_frontends(index - batch.len(), &batch, &mut failures);
            batch.clear();
            let result = match write {
                Write::Backend { index, value } => self.backends.store(*index, *value),
                Write::Slot { index, value } => self.slots.store(*index, *value),
                Write::Word { service, word, bits } => self.services.store(*service, *word, *bits),
                Write::RemoveFrontend { key } => match self.frontends.remove(key) {
                    Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
                    Err(error) => Err(io_error(error)),
                },
                Write::Frontend { .. } => Ok(()),
            };
            if let Err(error) = result {
                failures.push(Failure { index, error });
            }
        }
        self.put_frontends(writes.len() - batch.len(), &batch, &mut failures);
        failures
    }

    fn frontends(&self) -> io::Result<Vec<(FrontendKey, FrontendValue)>> {
        batch_entries(self.frontends_fd.as_fd())
    }

    fn record(&self, service: ServiceId) -> ServiceRecord {
        ServiceRecord {
            cluster: SetWord::from_bits(self.services.load(service, RecordWord::Cluster)),
            local: SetWord::from_bits(self.services.load(service, RecordWord::Local)),
            draining: SetWord::from_bits(self.services.load(service, RecordWord::Draining)),
            affinity: AffinityWord::from_bits(self.services.load(service, RecordWord::Affinity)),
        }
    }

    fn slot(&self, index: u32) -> BackendId {
        self.slots.load(index)
    }

    fn backend(&self, index: u32) -> Backend {
        self.backends.load(index)
    }
}
