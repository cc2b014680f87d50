use std::collections::BTreeMap;
use std::net::SocketAddr;

use proxy_common::abi::{FrontendKey, FrontendValue, WhenEmpty};

use crate::resolve::ServicePortKey;

/// What one service port wants in the kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WantedPort {
    /// Which.
    pub key: ServicePortKey,
    /// Frontends that it wins (S12). The values' service id is filled in when it is known.
    pub frontends: Vec<(FrontendKey, FrontendValue)>,
    /// Endpoints that are in a set, or serve.
    pub endpoints: BTreeMap<SocketAddr, Membership>,
    /// Whether the cluster set is used (P2).
    pub uses_cluster_set: bool,
    /// Whether the local set is used (P2).
    pub uses_local_set: bool,
    /// What an empty set means (Z).
    pub when_empty: WhenEmpty,
    /// A1.
    pub affinity_timeout_s: Option<u32>,
}

/// Where an endpoint belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Membership {
    /// In the cluster set.
    pub cluster: bool,
    /// In the local set.
    pub local: bool,
    /// Serves: old datagram flows stay with it even when it is in no set (C2).
    pub serving: bool,
}

impl Membership {
    /// Whether new connections may reach it.
    pub const fn in_a_set(&self) -> bool {
        self.cluster || self.local
    }
}
