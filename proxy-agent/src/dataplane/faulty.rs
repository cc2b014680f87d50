//! A dataplane whose writes fail when a test says so.

use std::io;

use proxy_common::abi::{
    Backend, BackendId, FrontendKey, FrontendValue, ServiceId, ServiceRecord, SourceRange,
};

use super::{Dataplane, Failure, Limits, Write};

/// Asks `fails` before every write.
pub struct Faulty<D, F> {
    /// Where writes go that do not fail.
    pub inner: D,
    /// Decides about a write.
    pub fails: F,
}

impl<D: Dataplane, F: FnMut(&Write) -> bool> Dataplane for Faulty<D, F> {
    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn apply(&mut self, writes: &[Write]) -> Vec<Failure> {
        let mut failures = Vec::new();
        for (index, write) in writes.iter().enumerate() {
            if (self.fails)(write) {
                failures.push(Failure { index, error: io::Error::from_raw_os_error(libc::ENOMEM) });
            } else {
                let inner = self.inner.apply(std::slice::from_ref(write));
                failures.extend(inner.into_iter().map(|failure| Failure { index, error: failure.error }));
            }
        }
        failures
    }

    fn frontends(&self) -> io::Result<Vec<(FrontendKey, FrontendValue)>> {
        self.inner.frontends()
    }

    fn source_ranges(&self) -> io::Result<Vec<(SourceRange, u8)>> {
        self.inner.source_ranges()
    }

    fn record(&self, service: ServiceId) -> ServiceRecord {
        self.inner.record(service)
    }

    fn slot(&self, index: u32) -> BackendId {
        self.inner.slot(index)
    }

    fn backend(&self, index: u32) -> Backend {
        self.inner.backend(index)
    }
}
