//! What the packet path is told by the agent, and the filters that spare bystanders a hash look-up.

use super::{Address, Port, ServiceId};

/// A range of addresses; an IPv4 one is that of IPv4-mapped addresses.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Prefix {
    /// First address.
    pub network: Address,
    /// Which bits count.
    pub mask: Address,
}

layout!(Prefix, size = 32, fields = Address, Address);

impl Prefix {
    /// `bits` counts from the start of the 128-bit form: an IPv4 /16 is 112.
    pub fn new(network: Address, bits: u8) -> Self {
        let mask = if bits == 0 { 0 } else { u128::MAX << (128 - u32::from(bits.min(128))) };
        let bytes = mask.to_be_bytes();
        let word = |i: usize| u32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let mask = Address::from_words([word(0), word(4), word(8), word(12)]);
        let (n, m) = (network.words(), mask.words());
        let network = Address::from_words([n[0] & m[0], n[1] & m[1], n[2] & m[2], n[3] & m[3]]);
        Self { network, mask }
    }

    /// Whether the address is in the range. An all-zero mask would match everything: unused places are not asked.
    #[inline(always)]
    pub const fn contains(&self, address: &Address) -> bool {
        let (a, n, m) = (address.words(), self.network.words(), self.mask.words());
        (a[0] & m[0]) ^ n[0] | (a[1] & m[1]) ^ n[1] | (a[2] & m[2]) ^ n[2] | (a[3] & m[3]) ^ n[3] == 0
    }
}

/// How many ranges of each kind the kernel can hold.
pub const PREFIXES: usize = 4;

/// `PACKET_SETTINGS`: array of one. Written by the agent only, whole.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PacketSettings {
    /// Where pods of this node have their addresses (M1, the modes that tell by address).
    pub local_pods: [Prefix; PREFIXES],
    /// Where cluster IPs come from (Z6).
    pub service_ranges: [Prefix; PREFIXES],
    /// How many of `local_pods` are in use.
    pub local_pods_count: u32,
    /// How many of `service_ranges` are in use.
    pub service_ranges_count: u32,
    /// First port of replaced sources, host order.
    pub snat_first: u16,
    /// How many ports; 0 is never right.
    pub snat_count: u16,
    /// See the constants.
    pub flags: u32,
}

layout!(PacketSettings, size = 272, fields = [Prefix; PREFIXES], [Prefix; PREFIXES], u32, u32, u16, u16, u32);

impl PacketSettings {
    /// Local pods can be told in IPv4 (M1).
    pub const DETECTS_V4: u32 = 1;
    /// Local pods can be told in IPv6 (M1).
    pub const DETECTS_V6: u32 = 2;
    /// M2.
    pub const MASQUERADE_ALL: u32 = 4;
    /// What begins now is another proxy's: flows change hands. Not what this node's NAT has let pass.
    pub const LEAVE_NEW: u32 = 8;
    /// No device is a port of a bridge.
    pub const NO_BRIDGE_PORTS: u32 = 16;
}

/// `DEVICES`: hash, interface index → what its hooks need to know. Written by the agent only.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Device {
    /// The IPv4 source that packets leaving by it get when theirs is replaced (M7); unset: none.
    pub v4: Address,
    /// The same for IPv6.
    pub v6: Address,
    /// Interface index of the bridge that it is a port of; 0: of none.
    pub bridge: u32,
    /// See the constants.
    pub flags: u32,
    /// Its link address.
    pub mac: [u8; 6],
    /// Always 0.
    pub zero: u16,
}

layout!(Device, size = 48, fields = Address, Address, u32, u32, [u8; 6], u16);

impl Device {
    /// What comes in by it is from a local pod (M1, the modes that tell by interface).
    pub const LOCAL_PODS: u32 = 1;
    /// It is the loopback device: what leaves by it comes in again.
    pub const LOOPBACK: u32 = 2;
}

/// `SOURCE_RANGES`: LPM trie, service id + client prefix → nothing of meaning (F). Written by the agent only.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SourceRange {
    /// Whose.
    pub service: ServiceId,
    /// Which clients are let in.
    pub client: Address,
}

layout!(SourceRange, size = 20, fields = ServiceId, Address);

impl SourceRange {
    /// Bits of the key before the client's address.
    pub const SERVICE_BITS: u32 = 32;
}

/// Places of `PACKET_PROGRAMS`: what goes on with a packet that comes in.
pub const INGRESS: u32 = 0;
/// The same for one that leaves.
pub const EGRESS: u32 = 1;
/// What comes before [`INGRESS`] where packets may skip the stack.
pub const FAST: u32 = 2;
/// What comes before [`EGRESS`] there, for those that are to be seen leaving.
pub const ACCEPT: u32 = 3;
/// How many places `PACKET_PROGRAMS` has.
pub const PROGRAMS: u32 = 4;

/// Places of `VIPS`: one bit each, 1 where at least one VIP has its place. Written by the agent only. As many that of
/// 100,000 VIPs (50,000 Services of two families) not a tenth of all other addresses has the place of one.
pub const VIP_PLACES: usize = 1 << 20;

/// How many bytes that is.
pub const VIP_BYTES: usize = VIP_PLACES / 8;

/// Where an address has its place in `VIPS`.
#[inline(always)]
pub const fn vip_place(address: &Address) -> usize {
    let words = address.words();
    let mixed = words[0].wrapping_mul(0x85eb_ca6b) ^ words[1].wrapping_mul(0xc2b2_ae35) ^ words[3] ^ words[2];
    (mixed.wrapping_mul(0x9e37_79b1) >> 12) as usize & (VIP_PLACES - 1)
}

/// The byte that a place of `VIPS` is in, and its bit there.
#[inline(always)]
pub const fn vip_bit(place: usize) -> (usize, u8) {
    (place / 8, 1 << (place % 8))
}

/// A byte of `FLOW_FILTER` or `SNAT_PORTS` that a program has written: an entry of this place has been made, or is about
/// to be. 0: there is none.
pub const FRESH: u8 = 1;

/// The same byte once the agent has seen it. Only such a byte does it clear, if it finds no entry of its place later.
pub const SEEN: u8 = 2;

/// Places of `FLOW_FILTER`: one byte each, not 0 where a flow has, or had, its place. Written by the programs; the agent
/// ages it.
pub const FLOW_PLACES: usize = 1 << 18;

/// Where a client endpoint has its place in `FLOW_FILTER`.
#[inline(always)]
pub const fn flow_place(client: &Address, port: Port) -> usize {
    let words = client.words();
    let mixed = words[0].wrapping_mul(0x85eb_ca6b) ^ words[1].wrapping_mul(0xc2b2_ae35) ^ words[3] ^ words[2];
    let mixed = mixed.wrapping_add(port.word()).wrapping_mul(0x9e37_79b1);
    (mixed >> 14) as usize & (FLOW_PLACES - 1)
}

/// Places of `SNAT_PORTS`: one byte for each port, not 0 where a flow has, or had, it as its source.
/// Written by the programs; the agent ages it.
pub const SNAT_PLACES: usize = 1 << 16;

/// Where a replaced source port has its place in `SNAT_PORTS`.
#[inline(always)]
pub const fn snat_place(port: Port) -> usize {
    port.raw() as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::IpAddr;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn prefixes_contain_what_they_should() {
        let v4 = Prefix::new(address("10.244.1.9"), 96 + 16);
        assert!(v4.contains(&address("10.244.255.1")) && !v4.contains(&address("10.245.0.1")));
        assert!(!v4.contains(&address("fd00::1")));
        let v6 = Prefix::new(address("fd00:10:244::"), 56);
        assert!(v6.contains(&address("fd00:10:244:ff::1")) && !v6.contains(&address("fd00:10:245::1")));
        assert!(Prefix::new(address("::"), 0).contains(&address("10.0.0.1")));
    }

    #[test]
    fn places_spread() {
        let places = |count: u32| -> std::collections::BTreeSet<usize> {
            (0..count).map(|n| vip_place(&IpAddr::from((0x0a60_0000 + n).to_be_bytes()).into())).collect()
        };
        assert!(places(10_000).len() > 9_800);
        let bits = |place| vip_bit(place).0 * 8 + vip_bit(place).1.trailing_zeros() as usize;
        assert!((0..VIP_PLACES).all(|place| bits(place) == place && vip_bit(place).0 < VIP_BYTES));
    }
}
