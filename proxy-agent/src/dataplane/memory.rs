//! Tables in memory, for tests and offline answers. They also are [`Tables`], so the decision core runs on what the
//! agent wrote, as it does in the kernel.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;

use proxy_common::abi::{
    AffinityEntry, AffinityKey, AffinityWord, Backend, BackendId, DatagramFlow, DatagramKey, DatagramOrigin,
    Frontend, FrontendKey, FrontendValue, ServiceId, ServiceRecord, SetWord, Slot, SourceRange,
};
use proxy_common::decide::Tables;

use super::{Dataplane, Failure, Limits, RecordWord, Write};

/// See the module.
#[derive(Clone, Debug)]
pub struct Memory {
    limits: Limits,
    frontends: BTreeMap<FrontendKey, FrontendValue>,
    services: BTreeMap<ServiceId, ServiceRecord>,
    slots: BTreeMap<u32, Slot>,
    backends: BTreeMap<u32, Backend>,
    source_ranges: BTreeSet<(SourceRange, u8)>,
    affinity: RefCell<HashMap<AffinityKey, AffinityEntry>>,
    datagram_flows: RefCell<HashMap<DatagramKey, DatagramFlow>>,
    datagram_origins: RefCell<HashMap<DatagramKey, DatagramOrigin>>,
    random: Cell<u32>,
    /// What [`Tables::now_ns`] answers.
    pub now_ns: Cell<u64>,
    /// Every write that was applied, in order.
    pub log: Vec<Write>,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new(Limits { frontends: 1 << 18, services: 1 << 16, slots: 1 << 19, backends: 1 << 18 })
    }
}

impl Memory {
    /// Empty tables of the given sizes.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            frontends: BTreeMap::new(),
            services: BTreeMap::new(),
            slots: BTreeMap::new(),
            backends: BTreeMap::new(),
            source_ranges: BTreeSet::new(),
            affinity: RefCell::default(),
            datagram_flows: RefCell::default(),
            datagram_origins: RefCell::default(),
            random: Cell::new(0x9e37_79b9),
            now_ns: Cell::new(1),
            log: Vec::new(),
        }
    }

    /// As a full LRU does on its own.
    pub fn forget_datagram_origins(&self) {
        self.datagram_origins.borrow_mut().clear();
    }

    fn apply_one(&mut self, write: Write) -> io::Result<()> {
        match write {
            Write::Backend { index, value } => {
                in_range(index, self.limits.backends)?;
                self.backends.insert(index, value);
            }
            Write::Slot { index, value } => {
                in_range(index, self.limits.slots)?;
                let slot = Slot::new(value, &Dataplane::backend(self, value.index()));
                self.slots.insert(index, slot);
            }
            Write::Word { service, word, bits } => {
                in_range(service, self.limits.services)?;
                let record = self.services.entry(service).or_default();
                match word {
                    RecordWord::Cluster => record.cluster = SetWord::from_bits(bits),
                    RecordWord::Local => record.local = SetWord::from_bits(bits),
                    RecordWord::Draining => record.draining = SetWord::from_bits(bits),
                    RecordWord::Affinity => record.affinity = AffinityWord::from_bits(bits),
                }
            }
            Write::Frontend { key, value } => {
                if !self.frontends.contains_key(&key)
                    && self.frontends.len() >= self.limits.frontends as usize
                {
                    return Err(io::Error::from_raw_os_error(libc::E2BIG));
                }
                self.frontends.insert(key, value);
            }
            Write::RemoveFrontend { key } => {
                self.frontends.remove(&key);
            }
            Write::SourceRange { range, bits } => {
                self.source_ranges.insert((range, bits));
            }
            Write::RemoveSourceRange { range, bits } => {
                self.source_ranges.remove(&(range, bits));
            }
        }
        self.log.push(write);
        Ok(())
    }
}

fn in_range(index: u32, limit: u32) -> io::Result<()> {
    if index < limit { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::E2BIG)) }
}

impl Dataplane for Memory {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn apply(&mut self, writes: &[Write]) -> Vec<Failure> {
        let mut failures = Vec::new();
        for (index, write) in writes.iter().enumerate() {
            if let Err(error) = self.apply_one(*write) {
                failures.push(Failure { index, error });
            }
        }
        failures
    }

    fn frontends(&self) -> io::Result<Vec<(FrontendKey, FrontendValue)>> {
        Ok(self.frontends.iter().map(|(key, value)| (*key, *value)).collect())
    }

    fn source_ranges(&self) -> io::Result<Vec<(SourceRange, u8)>> {
        Ok(self.source_ranges.iter().copied().collect())
    }

    fn record(&self, service: ServiceId) -> ServiceRecord {
        self.services.get(&service).copied().unwrap_or_default()
    }

    fn slot(&self, index: u32) -> BackendId {
        self.slots.get(&index).copied().unwrap_or_default().id
    }

    fn backend(&self, index: u32) -> Backend {
        self.backends.get(&index).copied().unwrap_or(Backend::vacant(0))
    }
}

impl Tables for Memory {
    fn frontend(&self, key: &FrontendKey) -> Frontend {
        let value = self.frontends.get(key).copied().unwrap_or(FrontendValue::NONE);
        Frontend::new(value, &self.record(value.service()))
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.slots.get(&index).copied()
    }

    fn backend(&self, index: u32) -> Option<Backend> {
        self.backends.get(&index).copied()
    }

    fn affinity_entry(&self, key: &AffinityKey) -> Option<AffinityEntry> {
        self.affinity.borrow().get(key).copied()
    }

    fn remember_affinity(&self, key: &AffinityKey, entry: &AffinityEntry) {
        self.affinity.borrow_mut().insert(*key, *entry);
    }

    fn datagram_flow(&self, key: &DatagramKey) -> Option<DatagramFlow> {
        self.datagram_flows.borrow().get(key).copied()
    }

    fn remember_datagram_flow(&self, key: &DatagramKey, flow: &DatagramFlow) {
        self.datagram_flows.borrow_mut().insert(*key, *flow);
    }

    fn datagram_origin(&self, key: &DatagramKey) -> Option<DatagramOrigin> {
        self.datagram_origins.borrow().get(key).copied()
    }

    fn remember_datagram_origin(&self, key: &DatagramKey, origin: &DatagramOrigin) {
        self.datagram_origins.borrow_mut().insert(*key, *origin);
    }

    fn random(&self) -> u32 {
        // xorshift32: tests repeat.
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        self.random.set(x);
        x
    }

    fn now_ns(&self) -> u64 {
        self.now_ns.get()
    }
}
