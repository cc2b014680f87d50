//! Rule M: whose source address is replaced. Decided per packet that no socket hook saw.

use crate::abi::{FrontendKind, Origin};

/// What the M rules look at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Snat {
    /// How the VIP was dialled.
    pub kind: FrontendKind,
    /// Where the client is. A pod is a local pod only if `detects_local_pods`.
    pub origin: Origin,
    /// Whether pods can be told at all in this family (M1).
    pub detects_local_pods: bool,
    /// `masqueradeAll` (M2).
    pub masquerade_all: bool,
    /// Effective `externalTrafficPolicy: Local` (P1).
    pub external_local: bool,
    /// The chosen endpoint's address is the client's own (M5).
    pub hairpin: bool,
    /// The chosen endpoint's address is an own-node address (M10).
    pub endpoint_is_own_node: bool,
}

impl Snat {
    /// Whether the source is replaced.
    #[inline(always)]
    pub const fn applies(&self) -> bool {
        if self.hairpin {
            return true;
        }
        // M10: such a packet never passes the place where sources are replaced.
        if self.endpoint_is_own_node && !matches!(self.origin, Origin::Node) {
            return false;
        }
        let local_pod = self.detects_local_pods && matches!(self.origin, Origin::Pod);
        match self.kind {
            FrontendKind::ClusterIp => self.masquerade_all || (self.detects_local_pods && !local_pod),
            FrontendKind::LoadBalancer | FrontendKind::ExternalIp | FrontendKind::NodePort => {
                // M3, else M4.
                !self.external_local || matches!(self.origin, Origin::Node)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Snat = Snat {
        kind: FrontendKind::ClusterIp,
        origin: Origin::Pod,
        detects_local_pods: true,
        masquerade_all: false,
        external_local: false,
        hairpin: false,
        endpoint_is_own_node: false,
    };

    fn by_origin(base: Snat) -> [bool; 3] {
        Origin::ALL.map(|origin| Snat { origin, ..base }.applies())
    }

    #[test]
    fn m2_cluster_ip() {
        assert_eq!(by_origin(BASE), [true, false, true]);
        assert_eq!(by_origin(Snat { masquerade_all: true, ..BASE }), [true, true, true]);
        assert_eq!(by_origin(Snat { detects_local_pods: false, ..BASE }), [false, false, false]);
    }

    #[test]
    fn m3_m4_external_vip() {
        for kind in [FrontendKind::NodePort, FrontendKind::LoadBalancer, FrontendKind::ExternalIp] {
            assert_eq!(by_origin(Snat { kind, ..BASE }), [true, true, true]);
            assert_eq!(by_origin(Snat { kind, external_local: true, ..BASE }), [true, false, false]);
        }
    }

    #[test]
    fn m5_hairpin_in_every_mode() {
        for detects_local_pods in [false, true] {
            assert!(Snat { hairpin: true, detects_local_pods, ..BASE }.applies());
        }
    }

    #[test]
    fn m10_own_node_endpoint() {
        let base = Snat { endpoint_is_own_node: true, masquerade_all: true, ..BASE };
        assert_eq!(by_origin(base), [true, false, false]);
        assert_eq!(by_origin(Snat { kind: FrontendKind::NodePort, ..base }), [true, false, false]);
    }
}
