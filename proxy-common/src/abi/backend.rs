//! `BACKENDS`: mmap-able array, index → backend, and `SLOTS`: mmap-able array of what sets are made of. Written by the
//! agent only.

use super::{Address, Port, WhichSet};

/// Index (bits 0–31) and generation (32–63) of a backend. An index is used again with the next generation, so a stale
/// id in an affinity entry or a flow names something that is gone and is not believed. 0 is never real.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct BackendId(u64);

layout!(BackendId, size = 8, fields = u64);

impl BackendId {
    /// Names nothing.
    pub const NONE: Self = Self(0);

    /// Of a place in `BACKENDS` and the generation that lives there.
    #[inline(always)]
    pub const fn new(index: u32, generation: u32) -> Self {
        Self(index as u64 | (generation as u64) << 32)
    }

    /// From the stored word.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The stored word.
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Place in `BACKENDS`.
    #[inline(always)]
    pub const fn index(self) -> u32 {
        super::low(self.0)
    }

    /// Which tenant of that place.
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// A member of a set, with the backend's address: who picks it needs not read `BACKENDS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Slot {
    /// Which backend.
    pub id: BackendId,
    address: Address,
    port: Port,
    zero: u16,
    seal: u32,
}

layout!(Slot, size = 32, fields = BackendId, Address, Port, u16, u32);

impl Slot {
    /// Of a backend.
    pub const fn new(id: BackendId, backend: &Backend) -> Self {
        let (address, port) = (backend.address, backend.port);
        Self { id, address, port, zero: 0, seal: Self::seal_of(id, address, port) }
    }

    /// Reads a slot that the agent may be writing, in as few loads as there can be.
    ///
    /// # Safety
    /// `at` points to a `Slot` that stays readable during the call.
    #[inline(always)]
    pub unsafe fn read(at: *const Self) -> Self {
        const { assert!(core::mem::offset_of!(Self, address) == 8 && cfg!(target_endian = "little")) };
        let word = at.cast::<u64>();
        // SAFETY: readable by contract, as is what follows; any bytes are a value.
        let id = unsafe { word.read_volatile() };
        // SAFETY: as above.
        let upper = unsafe { word.wrapping_add(1).read_volatile() };
        // SAFETY: as above.
        let lower = unsafe { word.wrapping_add(2).read_volatile() };
        // SAFETY: as above.
        let rest = unsafe { word.wrapping_add(3).read_volatile() };
        Self {
            id: BackendId::from_bits(id),
            address: Address::from_halves([upper, lower]),
            port: Port::from_word(super::low(rest)),
            zero: 0,
            seal: super::low(rest >> 32),
        }
    }

    /// Where the backend is. `None`: the slot is being written. It belongs to no set then, or to one that was replaced so
    /// long ago that its slots are used again: read the set's word again.
    #[inline(always)]
    pub const fn peer(&self) -> Option<(Address, Port)> {
        if self.seal == Self::seal_of(self.id, self.address, self.port) {
            Some((self.address, self.port))
        } else {
            None
        }
    }

    #[inline(always)]
    const fn seal_of(id: BackendId, address: Address, port: Port) -> u32 {
        let [upper, lower] = address.halves();
        // Not 0 for a slot of zeros: nothing was ever written there.
        super::seal(1 | (port.raw() as u32) << 16, upper ^ id.bits(), lower)
    }
}

/// An endpoint as the kernel stores it; it belongs to one service port.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Backend {
    /// Where connections go.
    pub address: Address,
    /// Where connections go.
    pub port: Port,
    flags: u16,
    /// Must equal the id's; 0 = never used.
    pub generation: u32,
}

layout!(Backend, size = 24, fields = Address, Port, u16, u32);

/// The place has a tenant.
const LIVE: u16 = 1;
/// The tenant serves (E7): datagram flows may stay with it.
const SERVING: u16 = 2;
/// The tenant is in its service port's cluster set.
const IN_CLUSTER_SET: u16 = 4;
/// The tenant is in its service port's local set.
const IN_LOCAL_SET: u16 = 8;

/// What may change about a tenant. That it knows its sets makes the membership test of session affinity (A4) one flag
/// instead of a search: the flag is set before the set is committed and cleared after.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BackendState {
    /// In the cluster set.
    pub cluster: bool,
    /// In the local set.
    pub local: bool,
    /// Serves (E7), whatever set it is in.
    pub serving: bool,
}

impl BackendState {
    /// Whether new connections may reach it.
    pub const fn in_a_set(&self) -> bool {
        self.cluster || self.local
    }

    /// Whatever either says.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self {
            cluster: self.cluster || other.cluster,
            local: self.local || other.local,
            serving: self.serving || other.serving,
        }
    }

    const fn flags(self) -> u16 {
        let mut flags = LIVE;
        if self.serving {
            flags |= SERVING;
        }
        if self.cluster {
            flags |= IN_CLUSTER_SET;
        }
        if self.local {
            flags |= IN_LOCAL_SET;
        }
        flags
    }
}

impl Backend {
    /// A live backend.
    pub const fn new(address: Address, port: Port, state: BackendState, generation: u32) -> Self {
        Self { address, port, flags: state.flags(), generation }
    }

    /// A place whose last tenant had `generation`.
    pub const fn vacant(generation: u32) -> Self {
        Self { address: Address::from_words([0; 4]), port: Port::new(0), flags: 0, generation }
    }

    /// Reads a place that the agent may be writing: the generation before and after, as with a sequence lock. A reader
    /// whose id went stale long ago (in an affinity entry or a flow) may come while the next tenant moves in: it would
    /// see its own generation first and the new address after. `None`: somebody is moving; nothing lives there yet.
    ///
    /// The compiler keeps volatile reads in order (a fence, even the compiler's own, is nothing that LLVM can select for
    /// BPF), and so does x86. On arm64 the processor may swap the last two by a few cycles; BPF has no load that forbids
    /// it before kernel 6.15. The writer's fence keeps the window that small, and a place rests before it is used again.
    ///
    /// # Safety
    /// `at` points to a `Backend` that stays readable during the call.
    #[inline(always)]
    pub unsafe fn read(at: *const Self) -> Option<Self> {
        // SAFETY: inside the backend that the caller vouches for.
        let generation = unsafe { &raw const (*at).generation };
        // SAFETY: as above, aligned by its type.
        let before = unsafe { generation.read_volatile() };
        // SAFETY: the caller vouches for it; any bytes are a value.
        let backend = unsafe { at.read_volatile() };
        // SAFETY: as for the first one.
        let after = unsafe { generation.read_volatile() };
        if before == after && backend.generation == after { Some(backend) } else { None }
    }

    /// Where the flags lie, for the agent, which stores them alone.
    pub const FLAGS_OFFSET: usize = core::mem::offset_of!(Self, flags);

    /// The flags as stored.
    pub const fn flags(&self) -> u16 {
        self.flags
    }

    /// Whether `id` names this very tenant.
    #[inline(always)]
    pub const fn is(&self, id: BackendId) -> bool {
        self.flags & LIVE != 0 && self.generation == id.generation()
    }

    /// Whether the place has a tenant at all.
    pub const fn is_live(&self) -> bool {
        self.flags & LIVE != 0
    }

    /// Whether the tenant serves.
    #[inline(always)]
    pub const fn is_serving(&self) -> bool {
        self.flags & SERVING != 0
    }

    /// Whether the tenant is in that set of its service port.
    #[inline(always)]
    pub const fn is_in(&self, which: WhichSet) -> bool {
        let flag = match which {
            WhichSet::Cluster => IN_CLUSTER_SET,
            WhichSet::Local => IN_LOCAL_SET,
        };
        self.flags & flag != 0
    }

    /// All that may change about the tenant.
    pub const fn state(&self) -> BackendState {
        BackendState {
            cluster: self.is_in(WhichSet::Cluster),
            local: self.is_in(WhichSet::Local),
            serving: self.is_serving(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::IpAddr;

    const STATE: BackendState = BackendState { cluster: false, local: true, serving: true };

    #[test]
    fn backend_bytes() {
        let backend = Backend::new(IpAddr::from([10, 244, 1, 5]).into(), Port::new(9876), STATE, 0x0102_0304);
        // SAFETY: the layout assertion proves 24 bytes without padding.
        let bytes: [u8; 24] = unsafe { core::mem::transmute(backend) };
        let expected =
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 244, 1, 5, 0x26, 0x94, 0b1011, 0, 4, 3, 2, 1];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_slot_that_is_being_written_leads_nowhere() {
        let backend =
            |last, port| Backend::new(IpAddr::from([10, 244, 1, last]).into(), Port::new(port), STATE, 4);
        let slot = Slot::new(BackendId::new(9, 4), &backend(5, 9876));
        assert_eq!(slot.peer(), Some((backend(5, 9876).address, Port::new(9876))));
        let other = Slot::new(BackendId::new(9, 5), &backend(6, 9877));
        for mixed in [
            Slot { id: other.id, ..slot },
            Slot { address: other.address, ..slot },
            Slot { port: other.port, ..slot },
            Slot { seal: other.seal, ..slot },
            Slot::default(),
        ] {
            assert_eq!(mixed.peer(), None, "{mixed:?}");
        }
    }

    #[test]
    fn stale_id_is_not_believed() {
        let backend = Backend::new(Address::default(), Port::new(1), STATE, 4);
        assert!(backend.is(BackendId::new(9, 4)) && !backend.is(BackendId::new(9, 3)));
        assert!(!Backend::vacant(4).is(BackendId::new(9, 4)));
        assert_eq!(BackendId::new(9, 4).bits(), 0x0000_0004_0000_0009);
    }
}
