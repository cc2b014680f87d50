//! What a line of `FRONTENDS` says: VIP:port/protocol → service.

use super::{Address, Port, ServiceId, WhichSet};

/// One VIP:port/protocol that the kernel looks up.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct FrontendKey {
    address: Address,
    port: Port,
    protocol: u8,
    zero: u8,
}

layout!(FrontendKey, size = 20, fields = Address, Port, u8, u8);

impl FrontendKey {
    /// `protocol` is the IP protocol number.
    #[inline(always)]
    pub const fn new(address: Address, port: Port, protocol: u8) -> Self {
        Self { address, port, protocol, zero: 0 }
    }

    /// The VIP.
    #[inline(always)]
    pub const fn address(&self) -> Address {
        self.address
    }

    /// The VIP's port.
    #[inline(always)]
    pub const fn port(&self) -> Port {
        self.port
    }

    /// IP protocol number.
    #[inline(always)]
    pub const fn protocol(&self) -> u8 {
        self.protocol
    }
}

/// Transport protocols that a Service may name (rules S7, T1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Protocol {
    /// TCP, 6.
    Tcp = 6,
    /// UDP, 17.
    Udp = 17,
    /// SCTP, 132.
    Sctp = 132,
}

impl Protocol {
    /// The IP protocol number.
    #[inline(always)]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// Kubernetes' name of it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }

    /// From an IP protocol number.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }
}

/// What a VIP is to its Service (rules S8, N, X).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIp = 1,
    /// `status.loadBalancer.ingress[].ip` in VIP mode.
    LoadBalancer = 2,
    /// `spec.externalIPs`.
    ExternalIp = 3,
    /// An own address with `spec.ports[].nodePort`.
    NodePort = 4,
}

impl FrontendKind {
    /// The name that `sheave plan` prints.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClusterIp => "ClusterIP",
            Self::LoadBalancer => "LoadBalancer",
            Self::ExternalIp => "ExternalIP",
            Self::NodePort => "NodePort",
        }
    }

    /// From its stored number; 0 is never real, so an unset value shows.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::ClusterIp),
            2 => Some(Self::LoadBalancer),
            3 => Some(Self::ExternalIp),
            4 => Some(Self::NodePort),
            _ => None,
        }
    }
}

/// Who asks (rules P10, P11, B3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Origin {
    /// The node itself, hostNetwork pods included.
    Node = 0,
    /// A pod of this node.
    Pod = 1,
    /// Anything else.
    Elsewhere = 2,
}

impl Origin {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Node, Self::Pod, Self::Elsewhere];
}

/// What the kernel needs to know of a frontend before it looks at its sets, as one word: service (bits 0–31), kind
/// (32–39), origins that the local set serves (40–47), flags (48–55).
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FrontendValue(u64);

const KIND: u32 = 32;
/// Bit n: origin n is served from the local set, else from the cluster set.
const LOCAL_FOR: u32 = 40;
/// Rule F: clients are let in by source address.
const SOURCE_RANGES: u64 = 1 << 48;

impl FrontendValue {
    /// Points nowhere.
    pub const NONE: Self = Self(0);

    /// Every origin is served from the cluster set until [`Self::with_local_set_for`] says otherwise.
    pub const fn new(service: ServiceId, kind: FrontendKind) -> Self {
        Self(service as u64 | (kind as u64) << KIND)
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

    /// Serves `origin` from the local set.
    #[must_use]
    pub const fn with_local_set_for(self, origin: Origin) -> Self {
        Self(self.0 | 1 << (LOCAL_FOR + origin as u32))
    }

    /// Marks the frontend as guarded by `loadBalancerSourceRanges`.
    #[must_use]
    pub const fn with_source_ranges(self) -> Self {
        Self(self.0 | SOURCE_RANGES)
    }

    /// The same for another service record.
    #[must_use]
    pub const fn with_service(self, service: ServiceId) -> Self {
        Self(self.0 & !(u32::MAX as u64) | service as u64)
    }

    /// The service record's place in `SERVICES`.
    #[inline(always)]
    pub const fn service(&self) -> ServiceId {
        super::low(self.0)
    }

    /// `None` only for a value that this version did not write.
    pub const fn kind(&self) -> Option<FrontendKind> {
        let [kind, ..] = (self.0 >> KIND).to_le_bytes();
        FrontendKind::from_number(kind)
    }

    /// Which set serves clients of this origin (P10, P11).
    #[inline(always)]
    pub const fn set_for(&self, origin: Origin) -> WhichSet {
        if self.0 & 1 << (LOCAL_FOR + origin as u32) != 0 { WhichSet::Local } else { WhichSet::Cluster }
    }

    /// Whether it does not matter who asks.
    #[inline(always)]
    pub const fn serves_all_alike(&self) -> bool {
        let local_for = self.0 >> LOCAL_FOR & 0b111;
        local_for == 0 || local_for == 0b111
    }

    /// Whether everybody is let in and served from the cluster set.
    #[inline(always)]
    pub const fn is_plain(&self) -> bool {
        self.0 & (SOURCE_RANGES | 0b111 << LOCAL_FOR) == 0
    }

    /// Whether the client's address must be checked first (F1).
    #[inline(always)]
    pub const fn has_source_ranges(&self) -> bool {
        self.0 & SOURCE_RANGES != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::IpAddr;

    #[test]
    fn key_bytes() {
        let key = FrontendKey {
            address: Address::from(IpAddr::from([10, 96, 0, 7])),
            port: Port::new(80),
            protocol: 6,
            zero: 0,
        };
        // SAFETY: the layout assertion proves 20 bytes without padding.
        let bytes: [u8; 20] = unsafe { core::mem::transmute(key) };
        assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 96, 0, 7, 0, 80, 6, 0]);
    }

    #[test]
    fn value_says_which_set() {
        let value = FrontendValue::new(7, FrontendKind::NodePort).with_local_set_for(Origin::Elsewhere);
        assert_eq!(
            Origin::ALL.map(|o| value.set_for(o)),
            [WhichSet::Cluster, WhichSet::Cluster, WhichSet::Local]
        );
        assert!(!value.has_source_ranges() && value.with_source_ranges().has_source_ranges());
        let bits = value.with_source_ranges().bits();
        assert_eq!(bits.to_le_bytes(), [7, 0, 0, 0, 4, 0b100, 1, 0]);
        assert_eq!(FrontendValue::from_bits(bits), value.with_source_ranges());
    }
}
