//! The decision core on memory tables: the code that runs in the kernel, on the host.
//!
//! | what | value |
//! |---|---|
//! | VIP n | 10.96.0.n:80 or \[fd00:96::n\]:80, in front of service record n unless a test says otherwise |
//! | backend n | 10.244.0.n:8080 or \[fd00:244::n\]:8080, place n in `BACKENDS` |

#![expect(clippy::unwrap_used, clippy::panic, reason = "the helpers of tests fail as tests do")]

mod affinity;
mod connect;
mod datagram;
mod packet;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use proxy_agent::dataplane::memory::Memory;
use proxy_agent::dataplane::{Dataplane, RecordWord, Write};
use proxy_common::abi::{
    AffinityWord, Backend, BackendId, BackendState, ClientKey, FrontendKey, FrontendKind, FrontendValue,
    Origin, Port, Protocol, ServiceId, SetWord, WhenEmpty, WhichSet,
};
use proxy_common::decide::{self, Client, Connect, Peer};

const SERVING: BackendState = BackendState { cluster: false, local: false, serving: true };

/// Tables that a test fills by hand.
struct Lab {
    tables: Memory,
    next_slot: u32,
    states: BTreeMap<BackendId, BackendState>,
    /// All addresses are of this family.
    v6: bool,
    backend_port: u16,
    /// Of the frontends.
    protocols: Vec<Protocol>,
}

fn vip(number: u8) -> Peer {
    (IpAddr::from([10, 96, 0, number]).into(), Port::new(80))
}

fn at(backend: u32) -> Peer {
    let [_, _, high, low] = backend.to_be_bytes();
    (IpAddr::from([10, 244, high, low]).into(), Port::new(8080))
}

fn id(backend: u32) -> BackendId {
    BackendId::new(backend, 1)
}

impl Lab {
    fn new() -> Self {
        Self {
            tables: Memory::default(),
            next_slot: 0,
            states: BTreeMap::new(),
            v6: false,
            backend_port: 8080,
            protocols: vec![Protocol::Tcp, Protocol::Udp],
        }
    }

    fn vip(&self, number: u8) -> Peer {
        if self.v6 {
            (IpAddr::from(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number.into())).into(), Port::new(80))
        } else {
            vip(number)
        }
    }

    fn at(&self, backend: u32) -> Peer {
        let port = Port::new(self.backend_port);
        if self.v6 {
            let low = u16::try_from(backend).unwrap();
            (IpAddr::from(Ipv6Addr::new(0xfd00, 0x244, 0, 0, 0, 0, 0, low)).into(), port)
        } else {
            (at(backend).0, port)
        }
    }

    fn write(&mut self, write: Write) {
        assert!(self.tables.apply(&[write]).is_empty());
    }

    fn frontend(&mut self, number: u8, value: FrontendValue) {
        let (address, port) = self.vip(number);
        for protocol in self.protocols.clone() {
            let key = FrontendKey::new(address, port, protocol.number());
            self.write(Write::Frontend { key, value });
        }
    }

    /// VIP `service` in front of record `service`, all origins served from the cluster set.
    fn plain(&mut self, service: u8, backends: &[u32]) {
        self.set(service.into(), WhichSet::Cluster, backends, WhenEmpty::Reject);
        self.frontend(service, FrontendValue::new(service.into(), FrontendKind::ClusterIp));
    }

    /// Replaces a set, in the order of a commit.
    fn set(&mut self, service: ServiceId, which: WhichSet, backends: &[u32], when_empty: WhenEmpty) {
        let ids: Vec<BackendId> = backends.iter().map(|backend| id(*backend)).collect();
        self.set_ids(service, which, &ids, when_empty);
    }

    fn set_ids(&mut self, service: ServiceId, which: WhichSet, ids: &[BackendId], when_empty: WhenEmpty) {
        let belongs = |state: &mut BackendState, is_in| match which {
            WhichSet::Cluster => state.cluster = is_in,
            WhichSet::Local => state.local = is_in,
        };
        for id in ids {
            let mut state = self.states.get(id).copied().unwrap_or(SERVING);
            belongs(&mut state, true);
            self.state(*id, state);
        }
        let first = self.next_slot;
        for id in ids {
            self.write(Write::Slot { index: self.next_slot, value: *id });
            self.next_slot += 1;
        }
        let word = match which {
            WhichSet::Cluster => RecordWord::Cluster,
            WhichSet::Local => RecordWord::Local,
        };
        let old = SetWord::from_bits(word.read(&self.tables.record(service)));
        let bits = SetWord::new(first, u32::try_from(ids.len()).unwrap(), when_empty).bits();
        self.write(Write::Word { service, word, bits });
        let slots = old.first()..old.first() + old.count();
        let left: Vec<BackendId> = slots.map(|slot| Dataplane::slot(&self.tables, slot)).collect();
        for id in left.into_iter().filter(|id| !ids.contains(id)) {
            let mut state = self.states[&id];
            belongs(&mut state, false);
            self.state(id, state);
        }
    }

    fn state(&mut self, id: BackendId, state: BackendState) {
        self.states.insert(id, state);
        let (address, port) = self.at(id.index());
        let value = Backend::new(address, port, state, id.generation());
        self.write(Write::Backend { index: id.index(), value });
    }

    fn vacate(&mut self, id: BackendId) {
        self.write(Write::Backend { index: id.index(), value: Backend::vacant(id.generation()) });
    }

    fn affinity(&mut self, service: ServiceId, timeout_s: u32, epoch: u32) {
        let bits = AffinityWord::new(timeout_s, epoch).bits();
        self.write(Write::Word { service, word: RecordWord::Affinity, bits });
    }

    fn connect(&self, origin: Origin, number: u8) -> Connect {
        self.connect_as(ClientKey::netns(1), origin, number)
    }

    fn connect_as(&self, key: ClientKey, origin: Origin, number: u8) -> Connect {
        decide::connect(&self.tables, &|| Client { origin, key }, self.vip(number), Protocol::Tcp)
    }

    /// Which backend a new connection of a pod goes to.
    fn reach(&self, client: u64, number: u8) -> u32 {
        self.reach_from(Origin::Pod, client, number)
    }

    fn reach_from(&self, origin: Origin, client: u64, number: u8) -> u32 {
        let decision = self.connect_as(ClientKey::netns(client), origin, number);
        let Connect::Forward { id, to } = decision else { panic!("{decision:?}") };
        assert_eq!(to, self.at(id.index()));
        id.index()
    }

    fn pass_s(&self, seconds: u64) {
        self.tables.now_ns.set(self.tables.now_ns.get() + seconds * 1_000_000_000);
    }
}
