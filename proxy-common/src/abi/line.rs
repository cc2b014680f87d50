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
    /// Of the hash, one for each word of a key: odd and random.
    factors: [u64; 5],
    /// Number of lines, a power of two, less one. 0 until the agent has written the table's header.
    pub mask: u32,
    zero: u32,
}

layout!(Header, size = 48, fields = [u64; 5], u32, u32);

/// Of the hash, and of the numbers that its factors come from: 2^64 by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Header {
    /// Of a table of `mask + 1` lines. The factors are the numbers that splitmix64 draws from that seed.
    pub const fn new(seed: u64, mask: u32) -> Self {
        const fn draw(seed: u64, turn: u64) -> u64 {
            let state = seed.wrapping_add(GOLDEN.wrapping_mul(turn));
            let state = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let state = (state ^ state >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            (state ^ state >> 31) | 1
        }
        let factors = [draw(seed, 1), draw(seed, 2), draw(seed, 3), draw(seed, 4), draw(seed, 5)];
        Self { factors, mask, zero: 0 }
    }

    /// From the words that lie in the map.
    pub const fn from_words([a, b, c, d, e, mask]: [u64; 6]) -> Self {
        // The upper half of its word is zero.
        Self { factors: [a, b, c, d, e], mask: super::low(mask), zero: 0 }
    }

    /// As they lie in the map. The mask is last: with it the header is there.
    pub const fn words(&self) -> [u64; 6] {
        let [a, b, c, d, e] = self.factors;
        [a, b, c, d, e, self.mask as u64]
    }

    /// Points to the home of a key, for [`Self::place`]. The sum is that of multiply-shift: words of 32 bits, each by a
    /// random factor of 64, so whoever may choose frontends cannot choose those that meet. What lies side by side, as
    /// addresses of one range do, is scattered after that.
    #[inline(always)]
    pub const fn hash(&self, key: &FrontendKey) -> u32 {
        let ([a, b, c, d], (_, port)) = (key.address().words(), key.numbers());
        let [by_a, by_b, by_c, by_d, by_port] = self.factors;
        let sum = (a as u64)
            .wrapping_mul(by_a)
            .wrapping_add((b as u64).wrapping_mul(by_b))
            .wrapping_add((c as u64).wrapping_mul(by_c))
            .wrapping_add((d as u64).wrapping_mul(by_d))
            .wrapping_add((port as u64).wrapping_mul(by_port));
        ((sum ^ sum >> 32).wrapping_mul(GOLDEN) >> 32) as u32
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

/// What can be said of a frontend at once. To know no more than that takes few registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Glance {
    /// There is no such frontend.
    Nothing,
    /// All clients are let in, and each gets any backend of this set, which has some: so it is with most.
    Plain(SetWord),
    /// Something else.
    More,
}

impl Glance {
    /// What a glance tells of it; the local set is not looked at.
    #[inline(always)]
    pub const fn of(frontend: &Frontend) -> Self {
        if frontend.is_none() {
            Self::Nothing
        } else if frontend.value.is_plain()
            && frontend.affinity.timeout_s() == 0
            && frontend.cluster.count() != 0
        {
            Self::Plain(frontend.cluster)
        } else {
            Self::More
        }
    }
}

impl FrontendKey {
    /// The key as the numbers that lie in memory, on a little-endian machine: address, and port with protocol.
    #[inline(always)]
    const fn numbers(&self) -> ([u64; 2], u32) {
        (self.address().halves(), self.port().raw() as u32 | (self.protocol() as u32) << 16)
    }
}

impl FrontendLine {
    /// Looks for a key at its home, where nearly all lie: what is there of it, and whether [`Self::find`] must look.
    /// `line` gives the line at a place, which the agent may be writing; `record` is as for [`Self::read`].
    ///
    /// # Safety
    /// What `line` gives stays readable during the call.
    #[inline(always)]
    pub unsafe fn at_home(
        key: &FrontendKey,
        header: &Header,
        line: impl Fn(u32) -> Option<*const Self>,
        record: impl Fn(ServiceId) -> ServiceRecord,
    ) -> (Frontend, bool) {
        let Some(at) = line(header.place(header.hash(key), 0)) else { return (Frontend::NONE, false) };
        // SAFETY: readable by contract.
        let found = unsafe { Self::read(at, key, record) };
        (found, found.is_none() && load!(at, reach) != 0)
    }

    /// As [`Self::at_home`], of what can be said at once. [`Glance::Nothing`]: at some moment of the call there was none;
    /// [`Glance::More`] may always be.
    ///
    /// # Safety
    /// What `line` gives stays readable during the call.
    #[inline(always)]
    pub unsafe fn glance(
        key: &FrontendKey,
        header: &Header,
        line: impl Fn(u32) -> Option<*const Self>,
    ) -> Glance {
        let Some(at) = line(header.place(header.hash(key), 0)) else { return Glance::Nothing };
        let bits = load!(at, value);
        // SAFETY: readable by contract.
        if !unsafe { Self::is_of(at, key) } {
            return if load!(at, reach) == 0 { Glance::Nothing } else { Glance::More };
        }
        let (of, cluster, affinity) = (load!(at, copies_of), load!(at, cluster), load!(at, affinity));
        let value = FrontendValue::from_bits(load!(at, value));
        // As for [`Self::read`]: what is changing is for a closer look.
        if value.bits() != bits || of != value.service() {
            return Glance::More;
        }
        match Glance::of(&Frontend { value, cluster, local: SetWord::ABSENT, affinity }) {
            // The key stays in a line whose frontend has gone, and may have been put elsewhere.
            Glance::Nothing => Glance::More,
            glance @ (Glance::Plain(_) | Glance::More) => glance,
        }
    }

    /// Looks for a key's line; 0 if there is none. `line` gives the line at a place, which the agent may be writing.
    ///
    /// # Safety
    /// What `line` gives stays readable during the call.
    #[inline(always)]
    pub unsafe fn find(key: &FrontendKey, header: &Header, line: impl Fn(u32) -> Option<*const Self>) -> u32 {
        let hash = header.hash(key);
        let mut reach = 0;
        for step in 0..REACH {
            let place = header.place(hash, step);
            let Some(at) = line(place) else { break };
            // SAFETY: readable by contract.
            if load!(at, value) != 0 && unsafe { Self::is_of(at, key) } {
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

    /// Whether the line is this key's, with as few loads as there can be.
    ///
    /// # Safety
    /// `at` points to a line that stays readable during the call.
    #[inline(always)]
    unsafe fn is_of(at: *const Self, key: &FrontendKey) -> bool {
        const { assert!(core::mem::offset_of!(Self, key) % 8 == 0 && cfg!(target_endian = "little")) };
        // SAFETY: inside the line.
        let first = unsafe { &raw const (*at).key }.cast::<u64>();
        // SAFETY: readable by contract, as is what follows.
        let upper = unsafe { first.read_volatile() };
        // SAFETY: as above.
        let lower = unsafe { first.wrapping_add(1).read_volatile() };
        // SAFETY: as above.
        let rest = unsafe { first.wrapping_add(2).cast::<u32>().read_volatile() };
        ([upper, lower], rest) == key.numbers()
    }

    /// Reads a line, if it is this key's. `record` gives the service record of an id.
    ///
    /// What a line holds while it changes hands is told by reading its value before and after the rest, each with one
    /// load: it is 0 while the key changes. For the order of loads, see [`super::Backend::read`].
    ///
    /// # Safety
    /// `at` points to a line that stays readable during the call.
    #[inline(always)]
    pub unsafe fn read(
        at: *const Self,
        key: &FrontendKey,
        record: impl Fn(ServiceId) -> ServiceRecord,
    ) -> Frontend {
        let bits = load!(at, value);
        // SAFETY: readable by contract.
        if !unsafe { Self::is_of(at, key) } {
            return Frontend::NONE;
        }
        let (of, cluster, local) = (load!(at, copies_of), load!(at, cluster), load!(at, local));
        let (affinity, bits_after) = (load!(at, affinity), load!(at, value));
        let value = FrontendValue::from_bits(bits_after);
        if bits_after == bits && of == value.service() && bits != 0 {
            return Frontend { value, cluster, local, affinity };
        }
        // Re-pointed just now, or never: the copies come after. Or it has gone, and the line is another's.
        // SAFETY: readable by contract.
        if bits_after == 0 || !unsafe { Self::is_of(at, key) } {
            return Frontend::NONE;
        }
        Frontend::new(value, &record(value.service()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{Address, Port};

    /// Whoever may choose frontends does not know the factors: no two keys meet in all tables, nor in many. Here they
    /// differ in the highest bits of words and of halves, where products are weakest.
    #[test]
    fn no_keys_meet_whatever_the_factors() {
        const HIGH: u32 = 1 << 31;
        let key = |words| FrontendKey::new(Address::from_words(words), Port::new(443), 6);
        let mut all = [key([0; 4]); 16];
        for (bits, one) in (0_u32..).zip(&mut all) {
            *one = key([0, 1, 2, 3].map(|word| HIGH * (bits >> word & 1)));
        }
        for (number, one) in all.iter().enumerate() {
            for other in &all[..number] {
                let meet = |seed: &u64| {
                    let header = Header::new(*seed, 1023);
                    header.place(header.hash(one), 0) == header.place(header.hash(other), 0)
                };
                let meetings = (0..1024).filter(meet).count();
                assert!(meetings < 12, "{one:?} and {other:?} meet in {meetings} of 1024 tables");
            }
        }
    }
}
