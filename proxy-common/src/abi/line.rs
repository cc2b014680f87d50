//! `FRONTENDS`: mmap-able array of cache lines that is a hash by open addressing, VIP:port/protocol → service. Written by
//! the agent only.
//!
//! Place 0 is the [`Header`]; the lines follow. A key's *home* is where its hash points; it lies there or in one of the
//! next lines, and the home says how far to look. So a look-up that finds nothing ends after one line mostly, and one
//! that finds its key has read all that a decision needs: a line also bears copies of the service record's words.

use super::{AffinityWord, FrontendKey, FrontendValue, ServiceId, ServiceRecord, SetWord, WhichSet};

/// One load of a field of the line that the caller vouches for.
macro_rules! load {
    ($at:ident, $field:ident) => {{
        // SAFETY: inside the line.
        let field = unsafe { &raw const (*$at).$field };
        // SAFETY: as above, and aligned by its type; any bytes are a value of it.
        unsafe { field.read_volatile() }
    }};
}

/// A key lies less than so many lines behind its home: the bound is for the verifier.
pub const REACH: u32 = 64;

/// What the first place holds.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Header {
    /// Of the hash. Random: who may choose frontends cannot choose those that share a home.
    pub seed: u64,
    /// Number of lines, a power of two, less one. 0 until the agent has written the table's header.
    pub mask: u32,
    zero: u32,
}

layout!(Header, size = 16, fields = u64, u32, u32);

impl Header {
    /// Of a table of `mask + 1` lines.
    pub const fn new(seed: u64, mask: u32) -> Self {
        Self { seed, mask, zero: 0 }
    }

    /// Place of the line that is `step` behind the key's home.
    #[inline(always)]
    pub const fn place(&self, hash: u32, step: u32) -> u32 {
        1 + (hash.wrapping_add(step) & self.mask)
    }
}

/// One frontend.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FrontendLine {
    /// A [`FrontendValue`] as one word; 0 where nothing lives.
    pub value: u64,
    /// Copy of the record's word.
    pub cluster: SetWord,
    /// Copy of the record's word.
    pub local: SetWord,
    /// Copy of the record's word.
    pub affinity: AffinityWord,
    /// VIP:port/protocol.
    pub key: FrontendKey,
    /// The record that the copies are of. Where it is not the value's, the record itself rules: so a frontend is
    /// re-pointed by one store, and its copies follow.
    pub copies_of: ServiceId,
    /// As a home: how many lines behind this one its keys may lie.
    pub reach: u32,
    zero: u32,
}

layout!(
    FrontendLine,
    size = 64,
    fields = u64,
    SetWord,
    SetWord,
    AffinityWord,
    FrontendKey,
    ServiceId,
    u32,
    u32
);

/// What a decision reads of a frontend.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Frontend {
    /// What it points to.
    pub value: FrontendValue,
    /// The record's word.
    pub cluster: SetWord,
    /// The record's word.
    pub local: SetWord,
    /// The record's word.
    pub affinity: AffinityWord,
}

impl Frontend {
    /// There is no such frontend.
    pub const NONE: Self = Self {
        value: FrontendValue::NONE,
        cluster: SetWord::ABSENT,
        local: SetWord::ABSENT,
        affinity: AffinityWord::OFF,
    };

    /// With the words of its record.
    #[inline(always)]
    pub const fn new(value: FrontendValue, record: &ServiceRecord) -> Self {
        Self { value, cluster: record.cluster, local: record.local, affinity: record.affinity }
    }

    /// Whether there is none.
    #[inline(always)]
    pub const fn is_none(&self) -> bool {
        self.value.service() == 0
    }

    /// One of its sets.
    #[inline(always)]
    pub const fn set(&self, which: WhichSet) -> SetWord {
        match which {
            WhichSet::Cluster => self.cluster,
            WhichSet::Local => self.local,
        }
    }
}

impl FrontendKey {
    /// Where its home is, for [`Header::place`]: the constants and the mixing are those of splitmix64.
    #[inline(always)]
    pub const fn hash(&self, seed: u64) -> u32 {
        let [upper, lower] = self.address().halves();
        let port = self.port().raw() as u64 | (self.protocol() as u64) << 16;
        let mut hash = seed ^ upper;
        hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ lower;
        hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb) ^ port;
        hash = (hash ^ hash >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (hash >> 32) as u32
    }
}

impl FrontendLine {
    /// Looks for a key's line at its home, where nearly all lie: the line's place; 0 if there is no such line;
    /// [`Self::FARTHER`] if [`Self::find`] must look. `line` gives the line at a place, which the agent may be writing.
    ///
    /// # Safety
    /// What `line` gives stays readable during the call.
    #[inline(always)]
    pub unsafe fn at_home(
        key: &FrontendKey,
        header: &Header,
        line: impl Fn(u32) -> Option<*const Self>,
    ) -> u32 {
        let place = header.place(key.hash(header.seed), 0);
        let Some(at) = line(place) else { return 0 };
        if load!(at, value) != 0 && load!(at, key) == *key {
            return place;
        }
        if load!(at, reach) == 0 { 0 } else { Self::FARTHER }
    }

    /// No place.
    pub const FARTHER: u32 = u32::MAX;

    /// Looks for a key's line; 0 if there is none. `line` gives the line at a place, which the agent may be writing.
    ///
    /// # Safety
    /// What `line` gives stays readable during the call.
    #[inline(always)]
    pub unsafe fn find(key: &FrontendKey, header: &Header, line: impl Fn(u32) -> Option<*const Self>) -> u32 {
        let hash = key.hash(header.seed);
        let mut reach = 0;
        for step in 0..REACH {
            let place = header.place(hash, step);
            let Some(at) = line(place) else { break };
            if load!(at, value) != 0 && load!(at, key) == *key {
                return place;
            }
            if step == 0 {
                reach = load!(at, reach);
            }
            if step >= reach {
                break;
            }
        }
        0
    }

    /// Reads a line in which a key was found. `record` gives the service record of an id.
    ///
    /// What a line holds while it changes hands is told by reading its value before and after the rest, each with one
    /// load. For the order of loads, see [`super::Backend::read`].
    ///
    /// # Safety
    /// `at` points to a line that stays readable during the call.
    #[inline(always)]
    pub unsafe fn read(
        at: *const Self,
        key: &FrontendKey,
        record: impl Fn(ServiceId) -> ServiceRecord,
    ) -> Frontend {
        let (bits, of) = (load!(at, value), load!(at, copies_of));
        let (cluster, local, affinity) = (load!(at, cluster), load!(at, local), load!(at, affinity));
        let (bits_after, found) = (load!(at, value), load!(at, key));
        let value = FrontendValue::from_bits(bits_after);
        if found != *key {
            // It has gone, and the line is another's.
            Frontend::NONE
        } else if bits_after == bits && of == value.service() {
            Frontend { value, cluster, local, affinity }
        } else {
            // Re-pointed just now, or never: the copies come after.
            Frontend::new(value, &record(value.service()))
        }
    }
}
