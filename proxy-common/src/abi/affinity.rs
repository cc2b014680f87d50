//! `AFFINITY`: LRU hash, service port + client → where the client was sent. Written by the kernel programs only.

use super::{Address, BackendId, ServiceId, WhichSet};

/// Who the client is to session affinity: its address, or at a connect hook, where that is not known yet, its network
/// namespace (B4, A8).
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ClientKey([u32; 4]);

/// First word of a namespace key. ff00::/8 is multicast and never a source address, so the two kinds cannot meet.
const NETNS: u32 = u32::from_ne_bytes([0xff, 0, 0, 0]);

impl ClientKey {
    /// A client known by its address.
    #[inline(always)]
    pub const fn address(address: Address) -> Self {
        Self(address.words())
    }

    /// A client known by its network namespace's cookie.
    #[inline(always)]
    pub const fn netns(cookie: u64) -> Self {
        Self([NETNS, 0, (cookie >> 32) as u32, super::low(cookie)])
    }
}

/// Key: rule A2.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AffinityKey {
    client: ClientKey,
    service: ServiceId,
}

layout!(AffinityKey, size = 20, fields = ClientKey, ServiceId);

impl AffinityKey {
    /// Of one client and one service port.
    #[inline(always)]
    pub const fn new(service: ServiceId, client: ClientKey) -> Self {
        Self { client, service }
    }
}

/// Where the client was sent last, and when, for one set.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct AffinitySlot {
    /// Where to.
    pub backend: BackendId,
    /// When a new connection last went there: nanoseconds of the monotonic clock.
    pub renewed_ns: u64,
}

layout!(AffinitySlot, size = 16, fields = BackendId, u64);

/// Rule A4: a slot for each set, or a client that uses both would ping-pong.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct AffinityEntry {
    /// Choice made in the cluster set.
    pub cluster: AffinitySlot,
    /// Choice made in the local set.
    pub local: AffinitySlot,
    /// Epoch of the record's affinity word that made this entry.
    pub epoch: u32,
    seal: u32,
}

layout!(AffinityEntry, size = 40, fields = AffinitySlot, AffinitySlot, u32, u32);

impl AffinityEntry {
    /// Without any choice yet.
    #[inline(always)]
    pub const fn new(epoch: u32) -> Self {
        const NONE: AffinitySlot = AffinitySlot { backend: BackendId::NONE, renewed_ns: 0 };
        Self { cluster: NONE, local: NONE, epoch, seal: 0 }
    }

    /// To be stored for `service`.
    #[inline(always)]
    #[must_use]
    pub const fn sealed(mut self, service: ServiceId) -> Self {
        self.seal = super::seal(service, self.cluster.backend.bits(), self.local.backend.bits());
        self
    }

    /// Whether all of it was stored for `service`: nothing of it may be believed otherwise.
    #[inline(always)]
    pub const fn is_of(&self, service: ServiceId) -> bool {
        self.seal == super::seal(service, self.cluster.backend.bits(), self.local.backend.bits())
    }

    /// This set's slot and the other set's.
    #[inline(always)]
    pub const fn slots(&self, which: WhichSet) -> (AffinitySlot, AffinitySlot) {
        match which {
            WhichSet::Cluster => (self.cluster, self.local),
            WhichSet::Local => (self.local, self.cluster),
        }
    }

    /// Replaces this set's slot and the other set's.
    #[inline(always)]
    pub const fn set_slots(&mut self, which: WhichSet, this: AffinitySlot, other: AffinitySlot) {
        match which {
            WhichSet::Cluster => (self.cluster, self.local) = (this, other),
            WhichSet::Local => (self.local, self.cluster) = (this, other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::IpAddr;

    #[test]
    fn key_bytes() {
        // SAFETY: the layout assertion proves 20 bytes without padding.
        let bytes = |key: AffinityKey| -> [u8; 20] { unsafe { core::mem::transmute(key) } };
        let address = AffinityKey::new(3, ClientKey::address(IpAddr::from([10, 0, 0, 9]).into()));
        assert_eq!(bytes(address), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 9, 3, 0, 0, 0]);
        let netns = AffinityKey::new(3, ClientKey::netns(0x0102_0304_0506_0708));
        assert_eq!(bytes(netns), [0xff, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 8, 7, 6, 5, 3, 0, 0, 0]);
    }

    /// A7, for a reader whose element changes hands.
    #[test]
    fn an_entry_of_another_service_and_a_mixture_of_two_are_told() {
        let slot = |index| AffinitySlot { backend: BackendId::new(index, 1), renewed_ns: 9 };
        let entry = |service, cluster, local| {
            let mut entry = AffinityEntry::new(1);
            entry.set_slots(WhichSet::Cluster, slot(cluster), slot(local));
            entry.sealed(service)
        };
        let (own, other) = (entry(3, 10, 11), entry(4, 20, 21));
        assert!(own.is_of(3) && !own.is_of(4) && other.is_of(4) && !other.is_of(3));
        for mixture in [
            AffinityEntry { cluster: other.cluster, ..own },
            AffinityEntry { local: other.local, ..own },
            AffinityEntry { cluster: other.cluster, local: other.local, ..own },
            AffinityEntry { cluster: own.local, local: own.cluster, ..own },
        ] {
            assert!(!mixture.is_of(3), "{mixture:?}");
        }
        assert!(AffinityEntry { cluster: AffinitySlot { renewed_ns: 10, ..own.cluster }, ..own }.is_of(3));
    }
}
