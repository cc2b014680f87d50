//! The kernel's tables as the agent writes them, behind one small trait with three users: [`bpf`] (the kernel),
//! [`memory`] (tests, offline answers) and [`faulty`] (tests of failing maps).

pub mod bpf;
pub mod faulty;
pub mod frontends;
pub mod memory;

use std::io;

use proxy_common::abi::{
    Backend, BackendId, FrontendKey, FrontendValue, ServiceId, ServiceRecord, SourceRange,
};

/// One change of a table. Every one of them is atomic for a reader, and writing it twice is the same as once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Write {
    /// A place in `BACKENDS`: one that no set points to, or one whose tenant only changes its state.
    Backend {
        /// Place.
        index: u32,
        /// New content.
        value: Backend,
    },
    /// A place in `SLOTS` that no set points to.
    Slot {
        /// Place.
        index: u32,
        /// New content.
        value: BackendId,
    },
    /// One word of a record in `SERVICES`: the commit of a set.
    Word {
        /// Which record.
        service: ServiceId,
        /// Which word of it.
        word: RecordWord,
        /// New content.
        bits: u64,
    },
    /// A frontend, new or re-pointed.
    Frontend {
        /// VIP:port/protocol.
        key: FrontendKey,
        /// What it points to.
        value: FrontendValue,
    },
    /// A frontend goes.
    RemoveFrontend {
        /// VIP:port/protocol.
        key: FrontendKey,
    },
    /// A record lets clients in (F).
    SourceRange {
        /// Record and first address.
        range: SourceRange,
        /// How many bits of the address count, in its 128-bit form.
        bits: u8,
    },
    /// It lets them in no more.
    RemoveSourceRange {
        /// Record and first address.
        range: SourceRange,
        /// How many bits of the address count, in its 128-bit form.
        bits: u8,
    },
}

/// A word of [`ServiceRecord`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum RecordWord {
    /// Cluster set.
    Cluster,
    /// Local set.
    Local,
    /// Draining set.
    Draining,
    /// Affinity.
    Affinity,
}

impl RecordWord {
    /// In the order of the record.
    pub const ALL: [Self; 4] = [Self::Cluster, Self::Local, Self::Draining, Self::Affinity];

    /// Of a record.
    pub const fn read(self, record: &ServiceRecord) -> u64 {
        match self {
            Self::Cluster => record.cluster.bits(),
            Self::Local => record.local.bits(),
            Self::Draining => record.draining.bits(),
            Self::Affinity => record.affinity.bits(),
        }
    }
}

/// A write that did not happen.
#[derive(Debug)]
pub struct Failure {
    /// Its place in the slice that was given to [`Dataplane::apply`].
    pub index: usize,
    /// Why.
    pub error: io::Error,
}

/// How many entries each table holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// `FRONTENDS`.
    pub frontends: u32,
    /// `SERVICES`.
    pub services: u32,
    /// `SLOTS`.
    pub slots: u32,
    /// `BACKENDS`.
    pub backends: u32,
}

impl Limits {
    /// What the layouts and a sane amount of memory allow; a cluster at the tested limits of Kubernetes needs a tenth.
    pub const MAX: Self = Self { frontends: 1 << 22, services: 1 << 20, slots: 1 << 24, backends: 1 << 22 };
}

/// The tables that the agent writes. It is their only writer.
pub trait Dataplane {
    /// Sizes.
    fn limits(&self) -> Limits;
    /// Applies the writes in order and goes on after a failure; returns those that did not happen.
    fn apply(&mut self, writes: &[Write]) -> Vec<Failure>;
    /// All of `FRONTENDS`, in any order.
    ///
    /// # Errors
    /// If the table cannot be read.
    fn frontends(&self) -> io::Result<Vec<(FrontendKey, FrontendValue)>>;
    /// All of `SOURCE_RANGES` with the number of bits that count, in any order.
    ///
    /// # Errors
    /// If the table cannot be read.
    fn source_ranges(&self) -> io::Result<Vec<(SourceRange, u8)>>;
    /// A record; empty if out of range.
    fn record(&self, service: ServiceId) -> ServiceRecord;
    /// A slot; [`BackendId::NONE`] if out of range.
    fn slot(&self, index: u32) -> BackendId;
    /// A backend; vacant if out of range.
    fn backend(&self, index: u32) -> Backend;
}
