use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipnet::IpNet;
use proxy_common::abi::{BackendState, FrontendKey, FrontendValue, Port, WhenEmpty};

use super::ranges::Range;
use crate::claims::Claims;
use crate::resolve::{NodeFacts, Resolved, ServicePortKey, frontend_value};

/// What one service port wants in the kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WantedPort {
    /// Which.
    pub key: ServicePortKey,
    /// Frontends that it wins (S12). The values' service id is filled in when it is known.
    pub frontends: Vec<(FrontendKey, FrontendValue)>,
    /// Endpoints that are in a set, or serve.
    pub endpoints: BTreeMap<SocketAddr, BackendState>,
    /// Whether the cluster set is used (P2).
    pub uses_cluster_set: bool,
    /// Whether the local set is used (P2).
    pub uses_local_set: bool,
    /// What an empty set means (Z).
    pub when_empty: WhenEmpty,
    /// A1.
    pub affinity_timeout_s: Option<u32>,
    /// F: clients that guarded frontends let in; empty if no frontend is guarded.
    pub source_ranges: BTreeSet<Range>,
}

impl WantedPort {
    /// Of a resolved service port, with those of its frontends that it wins.
    pub fn new(resolved: &Resolved, claims: &Claims, facts: &NodeFacts) -> Self {
        let protocol = resolved.key.protocol.number();
        let frontends = claims.won(resolved).map(|frontend| {
            let key = FrontendKey::new(frontend.address.into(), Port::new(frontend.port), protocol);
            // The record's place is not known yet.
            (key, frontend_value(resolved, frontend, facts, 0))
        });
        let frontends: Vec<(FrontendKey, FrontendValue)> = frontends.collect();
        let guarded = frontends.iter().any(|(_, value)| value.has_source_ranges());
        let endpoints = resolved.endpoints.iter().map(|endpoint| {
            let state = BackendState {
                cluster: endpoint.in_cluster_set,
                local: endpoint.in_local_set,
                serving: endpoint.serving,
            };
            (SocketAddr::new(endpoint.address, endpoint.port), state)
        });
        Self {
            key: resolved.key.clone(),
            frontends,
            endpoints: endpoints.filter(|(_, state)| state.in_a_set() || state.serving).collect(),
            uses_cluster_set: resolved.cluster_set.is_some(),
            uses_local_set: resolved.local_set.is_some(),
            // A cluster set can only be empty when there is no endpoint at all, so one answer fits both sets.
            when_empty: if resolved.has_any_endpoints { WhenEmpty::Drop } else { WhenEmpty::Reject },
            affinity_timeout_s: resolved.affinity_timeout_s,
            source_ranges: if guarded { source_ranges(resolved) } else { BTreeSet::new() },
        }
    }
}

/// F2, F4.
fn source_ranges(resolved: &Resolved) -> BTreeSet<Range> {
    let ranges = resolved.source_ranges.iter().map(|range| (range.addr().into(), bits(range)));
    let exceptions = resolved.source_exceptions.iter().map(|address| ((*address).into(), 128));
    ranges.chain(exceptions).collect()
}

/// Bits that count, from the start of the 128-bit form.
pub fn bits(range: &IpNet) -> u8 {
    match range {
        IpNet::V4(range) => 96 + range.prefix_len(),
        IpNet::V6(range) => range.prefix_len(),
    }
}
