//! `LANES`: LRU hash, a packet as it comes in → how the node's stack let one like it leave (`--fast-path`). And `EPOCH`,
//! one word that ends what was learned before. Lanes are written by the kernel programs, the epoch by the agent.

use super::{Address, Port};

/// A packet as it comes in.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LaneKey {
    /// Its source.
    pub source: Address,
    /// Its destination.
    pub destination: Address,
    /// Its source port.
    pub source_port: Port,
    /// Its destination port.
    pub destination_port: Port,
    /// IP protocol number.
    pub protocol: u32,
}

layout!(LaneKey, size = 40, fields = Address, Address, Port, Port, u32);

impl LaneKey {
    /// From and to whom.
    #[inline(always)]
    pub const fn new(source: (Address, Port), destination: (Address, Port), protocol: u8) -> Self {
        Self {
            source: source.0,
            destination: destination.0,
            source_port: source.1,
            destination_port: destination.1,
            protocol: protocol as u32,
        }
    }

    /// What a lane of this key bears: an element of an LRU table may be given to another key while it is read or written.
    #[inline(always)]
    pub const fn seal(&self) -> u32 {
        let (s, d) = (self.source.words(), self.destination.words());
        let source = s[3] ^ s[2].rotate_left(11) ^ s[1].rotate_left(19) ^ s[0].rotate_left(27);
        let destination = d[3] ^ d[2].rotate_left(11) ^ d[1].rotate_left(19) ^ d[0].rotate_left(27);
        let ports = self.source_port.word() << 16 ^ self.destination_port.word();
        // Odd constants, as of other hashes here. What comes first reaches all bits before the next comes in: addresses of
        // one network differ in few, and so do ports.
        let hash = source.wrapping_mul(0x85eb_ca6b);
        let hash = (hash ^ hash >> 15 ^ destination).wrapping_mul(0xc2b2_ae35);
        let hash = (hash ^ hash >> 13 ^ ports ^ self.protocol << 9).wrapping_mul(0x9e37_79b1);
        hash ^ hash >> 16
    }
}

/// What becomes of such packets without the stack.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Lane {
    /// [`LaneKey::seal`]. First: whoever gives the element to another key writes it before the rest.
    pub seal: u32,
    /// By which interface they leave; 0: the stack has not let one pass yet.
    pub device: u32,
    /// When the stack last let one pass: nanoseconds of the monotonic clock.
    pub accepted_ns: u64,
    /// The source that they leave with.
    pub source: Address,
    /// The destination that they leave with.
    pub destination: Address,
    /// Its port.
    pub source_port: Port,
    /// Its port.
    pub destination_port: Port,
    /// By which interface they come in.
    pub from: u32,
    /// In which epoch that was.
    pub epoch: u32,
    /// The longest IP packet that the stack let pass since then: nothing longer may skip it.
    pub length: u32,
    /// See the constants.
    pub flags: u32,
    /// The link addresses that they leave with: the first twelve bytes of the frame.
    pub link: [u32; 3],
    /// The link address that they come in for: the first six bytes of the frame.
    pub addressed: [u16; 3],
    /// Always 0.
    pub zero: u16,
}

layout!(
    Lane,
    size = 88,
    fields = u32,
    u32,
    u64,
    Address,
    Address,
    Port,
    Port,
    u32,
    u32,
    u32,
    u32,
    [u32; 3],
    [u16; 3],
    u16
);

impl Lane {
    /// The stack lets the other direction pass too.
    pub const OPEN: u32 = 1;

    /// How long the stack's word holds: one packet of each direction goes through it so often. Whatever gives no notice of a
    /// change (iptables, neighbours, a node without its agent) is found after that time, and netfilter's entries stay alive.
    pub const LEASE_NS: u64 = 1_000_000_000;

    /// Whether the stack has let one pass so lately that its word holds.
    #[inline(always)]
    pub const fn holds(&self, epoch: u32, now_ns: u64) -> bool {
        self.device != 0
            && self.epoch == epoch
            && epoch != 0
            && now_ns.saturating_sub(self.accepted_ns) < Self::LEASE_NS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::IpAddr;

    fn key(source: &str, port: u16, destination: &str) -> LaneKey {
        let address = |text: &str| text.parse::<IpAddr>().unwrap().into();
        LaneKey::new((address(source), Port::new(port)), (address(destination), Port::new(80)), 6)
    }

    #[test]
    fn key_bytes() {
        // SAFETY: the layout assertion proves 40 bytes without padding.
        let bytes: [u8; 40] = unsafe { core::mem::transmute(key("10.0.0.9", 40_000, "fd00::1")) };
        assert_eq!(bytes[..16], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 9]);
        assert_eq!(bytes[16..32], [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(bytes[32..36], [0x9c, 0x40, 0, 80]);
        assert_eq!(u32::from_ne_bytes(bytes[36..].try_into().unwrap()), 6);
    }

    #[test]
    fn seals_tell_keys_apart() {
        let mut seals = std::collections::BTreeSet::new();
        for port in 1..2000 {
            for source in ["10.0.0.8", "10.0.0.9", "fd00::9"] {
                assert!(seals.insert(key(source, port, "10.96.0.1").seal()), "{source} {port}");
            }
        }
        let (one, other) = (key("10.0.0.8", 7, "10.0.0.9"), key("10.0.0.9", 7, "10.0.0.8"));
        assert_ne!(one.seal(), other.seal());
    }

    #[test]
    fn the_stacks_word_holds_for_an_epoch_and_a_while() {
        let lane = Lane { device: 3, epoch: 7, accepted_ns: 5, ..Lane::default() };
        assert!(lane.holds(7, 5) && lane.holds(7, 4 + Lane::LEASE_NS));
        assert!(!lane.holds(7, 5 + Lane::LEASE_NS) && !lane.holds(8, 5));
        assert!(!Lane { device: 0, ..lane }.holds(7, 5), "it has let none pass");
        assert!(!Lane { epoch: 0, ..lane }.holds(0, 5), "there is no agent yet that knows of changes");
    }
}
