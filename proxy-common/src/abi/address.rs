use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IP address: 16 bytes in network order. IPv4 is stored IPv4-mapped (`::ffff:a.b.c.d`), so one map serves both
/// families and IPv4-mapped sockets meet IPv4 Services without a case of their own (rule B1).
///
/// The order is that of memory words: good for sorted tables, not numeric.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Address([u32; 4]);

layout!(Address, size = 16, fields = [u32; 4]);

/// The third word of every IPv4-mapped address, as it lies in memory.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

impl Address {
    /// From a word that already is in network order, as contexts and headers hold it.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self([0, 0, MAPPED, word])
    }

    /// From four words that already are in network order.
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// The words in network order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        self.0
    }

    /// From two halves, as [`Self::halves`] makes them.
    #[inline(always)]
    pub const fn from_halves([upper, lower]: [u64; 2]) -> Self {
        use super::low;
        Self([low(upper), low(upper >> 32), low(lower), low(lower >> 32)])
    }

    /// The words, two by two: the first of each pair is the lower part.
    #[inline(always)]
    pub const fn halves(&self) -> [u64; 2] {
        let [a, b, c, d] = self.0;
        [a as u64 | (b as u64) << 32, c as u64 | (d as u64) << 32]
    }

    /// The IPv4 word in network order, if this is an IPv4 address.
    #[inline(always)]
    pub const fn v4_word(&self) -> Option<u32> {
        if self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED { Some(self.0[3]) } else { None }
    }

    /// The standard library's type; IPv4-mapped addresses come back as IPv4.
    pub fn ip(&self) -> IpAddr {
        match self.v4_word() {
            Some(word) => IpAddr::V4(Ipv4Addr::from(word.to_ne_bytes())),
            None => {
                let mut bytes = [0; 16];
                for (to, word) in bytes.chunks_exact_mut(4).zip(self.0) {
                    to.copy_from_slice(&word.to_ne_bytes());
                }
                IpAddr::V6(Ipv6Addr::from(bytes))
            }
        }
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        let bytes = match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let word = |i: usize| u32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        Self([word(0), word(4), word(8), word(12)])
    }
}

impl core::fmt::Debug for Address {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", self.ip())
    }
}

/// A port in network order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Port(u16);

layout!(Port, size = 2, fields = u16);

impl Port {
    /// From a host-order number.
    #[inline(always)]
    pub const fn new(port: u16) -> Self {
        Self(port.to_be())
    }

    /// From the low half of a context's `user_port`, which is in network order.
    #[inline(always)]
    pub const fn from_word(word: u32) -> Self {
        let bytes = word.to_ne_bytes();
        Self(u16::from_ne_bytes([bytes[0], bytes[1]]))
    }

    /// As a context's `user_port` wants it.
    #[inline(always)]
    pub const fn word(self) -> u32 {
        let bytes = self.0.to_ne_bytes();
        u32::from_ne_bytes([bytes[0], bytes[1], 0, 0])
    }

    /// From a half-word that already is in network order, as headers hold it.
    #[inline(always)]
    pub const fn from_raw(raw: u16) -> Self {
        Self(raw)
    }

    /// The half-word in network order.
    #[inline(always)]
    pub const fn raw(self) -> u16 {
        self.0
    }

    /// The number in host order.
    pub const fn number(self) -> u16 {
        u16::from_be(self.0)
    }
}

impl core::fmt::Debug for Port {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", self.number())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_in_network_order() {
        let v4 = Address::from(IpAddr::from([10, 96, 0, 7]));
        assert_eq!(bytes(&v4), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 96, 0, 7]);
        assert_eq!(v4, Address::from_v4_word(u32::from_ne_bytes([10, 96, 0, 7])));
        assert_eq!(v4.ip(), IpAddr::from([10, 96, 0, 7]));
        let v6: IpAddr = "fd00:96::1".parse().unwrap();
        assert_eq!(bytes(&Address::from(v6)), [0xfd, 0, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(Address::from(v6).ip(), v6);
        assert_eq!(Address::from(v6).v4_word(), None);
        assert_eq!(Address::from_halves(Address::from(v6).halves()), Address::from(v6));
    }

    #[test]
    fn ports_are_in_network_order() {
        assert_eq!(Port::new(0x1f90).0.to_ne_bytes(), [0x1f, 0x90]);
        assert_eq!(Port::from_word(u32::from_ne_bytes([0x1f, 0x90, 0, 0])), Port::new(0x1f90));
        assert_eq!(Port::new(0x1f90).word().to_ne_bytes(), [0x1f, 0x90, 0, 0]);
        assert_eq!(Port::new(53).number(), 53);
    }

    fn bytes(address: &Address) -> [u8; 16] {
        let mut out = [0; 16];
        for (to, word) in out.chunks_exact_mut(4).zip(address.words()) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        out
    }
}
