//! `SERVICES`: mmap-able array, service id → record. Written by the agent only, one aligned 64-bit word at a time, so a
//! reader sees either the old set or the new one, never a mixture.

/// A service record's index in `SERVICES`. 0 is never given out, so an unset value shows.
pub type ServiceId = u32;

/// The two sets of a service port (rule P2).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum WhichSet {
    /// Endpoints of the whole cluster (P3).
    Cluster,
    /// Endpoints of this node (P4).
    Local,
}

/// What a client gets when its set is empty (rule Z).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum WhenEmpty {
    /// Z1: nothing serves this port anywhere.
    Reject,
    /// Z2, Z3: others serve it, but policy keeps this client to local ones.
    Drop,
}

/// A run of slots in `SLOTS` as one word: first slot (bits 0–31), count (32–55), what an empty set means (56–57).
/// 0 = this service port does not use the set.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct SetWord(u64);

const COUNT_BITS: u32 = 24;
const REJECT: u64 = 1 << 56;
const DROP: u64 = 2 << 56;

impl SetWord {
    /// Not used by this service port.
    pub const ABSENT: Self = Self(0);
    /// The largest set that a word can name.
    pub const MAX_COUNT: u32 = (1 << COUNT_BITS) - 1;

    /// `count` is at most [`Self::MAX_COUNT`]; higher bits are cut off.
    pub const fn new(first: u32, count: u32, when_empty: WhenEmpty) -> Self {
        let empty = match when_empty {
            WhenEmpty::Reject => REJECT,
            WhenEmpty::Drop => DROP,
        };
        Self(first as u64 | ((count & Self::MAX_COUNT) as u64) << 32 | empty)
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

    /// First slot.
    #[inline(always)]
    pub const fn first(self) -> u32 {
        super::low(self.0)
    }

    /// Number of slots.
    #[inline(always)]
    pub const fn count(self) -> u32 {
        (self.0 >> 32) as u32 & Self::MAX_COUNT
    }

    /// What an empty set means; `None` if the set is not used.
    #[inline(always)]
    pub const fn when_empty(self) -> Option<WhenEmpty> {
        if self.0 & REJECT != 0 {
            Some(WhenEmpty::Reject)
        } else if self.0 & DROP != 0 {
            Some(WhenEmpty::Drop)
        } else {
            None
        }
    }
}

/// Session affinity of a service port as one word: time-out in seconds (bits 0–31, 0 = off), epoch (32–63).
/// Entries of another epoch are not believed: switching affinity off forgets them without a walk (A6).
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct AffinityWord(u64);

impl AffinityWord {
    /// No affinity.
    pub const OFF: Self = Self(0);

    /// `timeout_s` 0 switches affinity off.
    pub const fn new(timeout_s: u32, epoch: u32) -> Self {
        Self(timeout_s as u64 | (epoch as u64) << 32)
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

    /// Seconds since the last new connection after which an entry is dead (A3); 0 = no affinity.
    #[inline(always)]
    pub const fn timeout_s(self) -> u32 {
        super::low(self.0)
    }

    /// Raised each time affinity is switched on.
    #[inline(always)]
    pub const fn epoch(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// One service port in one family.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ServiceRecord {
    /// Cluster set.
    pub cluster: SetWord,
    /// Local set.
    pub local: SetWord,
    /// Backends that still serve but are in neither set: no new connection reaches them, old datagram flows do (C2).
    pub draining: SetWord,
    /// Session affinity.
    pub affinity: AffinityWord,
}

layout!(ServiceRecord, size = 32, fields = SetWord, SetWord, SetWord, AffinityWord);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_word_bits() {
        let word = SetWord::new(0x0102_0304, 0x0a_0b0c, WhenEmpty::Drop);
        assert_eq!(word.bits(), 0x020a_0b0c_0102_0304);
        assert_eq!((word.first(), word.count()), (0x0102_0304, 0x0a_0b0c));
        assert_eq!(word.when_empty(), Some(WhenEmpty::Drop));
        assert_eq!(SetWord::new(0, 0, WhenEmpty::Reject).when_empty(), Some(WhenEmpty::Reject));
        assert_eq!(SetWord::ABSENT.when_empty(), None);
    }

    #[test]
    fn record_bytes() {
        let record = ServiceRecord {
            cluster: SetWord::from_bits(1),
            local: SetWord::from_bits(2),
            draining: SetWord::from_bits(3),
            affinity: AffinityWord::new(10800, 5),
        };
        // SAFETY: the layout assertion proves 32 bytes without padding.
        let words: [u64; 4] = unsafe { core::mem::transmute(record) };
        assert_eq!(words, [1, 2, 3, 0x0000_0005_0000_2a30]);
    }
}
