//! A pinned hash as the agent reads and writes it: in batches where it is much, singly where a batch fails.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError};

use super::Error;
use super::programs::open_pinned;
use super::sys::{batch_entries, update_batch};

/// Flags of an update.
const BPF_NOEXIST: u64 = 1;
const BPF_EXIST: u64 = 2;

/// See the module.
pub struct Table<K, V> {
    map: HashMap<MapData, K, V>,
    /// The same map, for batches.
    fd: OwnedFd,
    limit: u32,
}

impl<K: Pod + Default, V: Pod + Default> Table<K, V> {
    /// Of a pinned hash.
    ///
    /// # Errors
    /// If it is not pinned, or no hash.
    pub fn open(directory: &Path, name: &'static str) -> Result<Self, Error> {
        let error = |source| Error::Map { map: name, source };
        let data = open_pinned(directory, name)?;
        let limit = data.info().map_err(error)?.max_entries();
        let fd = data.fd().as_fd().try_clone_to_owned().map_err(Error::path("duplicate", name))?;
        Ok(Self { map: Map::from_map_data(data).map_err(error)?.try_into().map_err(error)?, fd, limit })
    }

    /// How many entries it holds at most.
    pub const fn limit(&self) -> u32 {
        self.limit
    }

    /// All entries, in any order. While others write, one may be missed or come twice.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn entries(&self) -> io::Result<Vec<(K, V)>> {
        batch_entries(self.fd.as_fd())
    }

    /// One entry.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn get(&self, key: &K) -> io::Result<Option<V>> {
        match self.map.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(io_error(error)),
        }
    }

    /// Writes all that can be written; returns which could not.
    pub fn put_all(&mut self, entries: &[(K, V)]) -> Vec<(usize, io::Error)> {
        let mut failures = Vec::new();
        let mut done = 0;
        while let Some(rest) = entries.get(done..).filter(|rest| !rest.is_empty()) {
            let (written, error) = update_batch(self.fd.as_fd(), rest);
            done += written;
            if let Some(error) = error {
                // The first one that was not written, by itself: the kernel may refuse batches as such.
                let single = entries.get(done).map(|(key, value)| self.map.insert(key, value, 0));
                if let Some(Err(single)) = single {
                    tracing::debug!(%error, "a batch was cut short");
                    failures.push((done, io_error(single)));
                }
                done += 1;
            }
        }
        failures
    }

    /// Writes an entry where there is none.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn add(&mut self, key: &K, value: &V) -> io::Result<()> {
        match self.map.insert(key, value, BPF_NOEXIST).map_err(io_error) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Writes an entry where there is one.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn replace(&mut self, key: &K, value: &V) -> io::Result<()> {
        match self.map.insert(key, value, BPF_EXIST).map_err(io_error) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Removes an entry; one that is not there is as good as removed.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove(&mut self, key: &K) -> io::Result<()> {
        match self.map.remove(key).map_err(io_error) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// The kernel's answer, without aya's words around it.
pub fn io_error(error: MapError) -> io::Error {
    if let MapError::SyscallError(error) = error { error.io_error } else { io::Error::other(error) }
}
