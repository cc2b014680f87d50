//! Which endpoints a service port has (E4, E5, E8, E9), and which of them its two sets hold (P3–P8), with reasons.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::EndpointView;
use crate::object::{Family, Name, Problem, Protocol, ServicePort, Slice, SliceEndpoint};

/// The own node, as endpoints and hints name it.
pub(super) struct ThisNode<'a> {
    /// May be empty: then nothing is local (E8) and no hint names it.
    pub(super) name: &'a str,
    /// P7.
    pub(super) zone: Option<&'a str>,
}

impl ThisNode<'_> {
    /// E8.
    fn runs(&self, endpoint: &SliceEndpoint) -> bool {
        !self.name.is_empty() && endpoint.node.as_deref() == Some(self.name)
    }

    fn hinted(&self, endpoint: &SliceEndpoint) -> bool {
        !self.name.is_empty() && endpoint.node_hints().iter().any(|hint| *hint == self.name)
    }

    fn zone_hinted(&self, endpoint: &SliceEndpoint) -> bool {
        self.zone.is_some_and(|zone| endpoint.zone_hints().iter().any(|hint| *hint == zone))
    }
}

/// Which sets a service port uses (P2).
#[derive(Clone, Copy)]
pub(super) struct Needs {
    pub(super) cluster: bool,
    pub(super) local: bool,
}

/// What [`Endpoints::sets`] finds.
pub(super) struct Sets {
    pub(super) cluster: Option<Vec<SocketAddr>>,
    pub(super) local: Option<Vec<SocketAddr>>,
    pub(super) draining: Vec<SocketAddr>,
    pub(super) has_any: bool,
    pub(super) views: Vec<EndpointView>,
}

/// One endpoint at one of its slice's ports.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    at: SocketAddr,
    slice: &'a str,
    endpoint: &'a SliceEndpoint,
}

impl Candidate<'_> {
    fn ready(&self) -> bool {
        self.endpoint.ready
    }

    /// What the fallbacks of P3 and P4 take; they come into play only where nothing is ready.
    fn last_resort(&self) -> bool {
        self.endpoint.serving && self.endpoint.terminating
    }

    /// By place, and at one place the one that E9 keeps first. What E9 leaves open is ordered by content, so that the
    /// order of a slice's endpoints does not matter (E10).
    fn order(&self, other: &Self) -> Ordering {
        let (a, b) = (self.endpoint, other.endpoint);
        self.at
            .cmp(&other.at)
            .then_with(|| a.terminating.cmp(&b.terminating))
            .then_with(|| b.ready.cmp(&a.ready))
            .then_with(|| b.serving.cmp(&a.serving))
            .then_with(|| self.slice.cmp(other.slice))
            .then_with(|| a.node.cmp(&b.node))
            .then_with(|| a.zone.cmp(&b.zone))
            .then_with(|| a.hints.cmp(&b.hints))
    }
}

/// All endpoints of one Service in one family, by port.
pub(super) struct Endpoints<'a> {
    /// Slice port name and protocol (E4) → endpoints, sorted by place, each place once (E9).
    ports: BTreeMap<(&'a str, Protocol), Vec<Candidate<'a>>>,
    /// H3.
    pub(super) local_ready: usize,
}

impl<'a> Endpoints<'a> {
    /// Union over the slices of the family (E1, E4). Each endpoint keeps its own slice's port number (E5).
    pub(super) fn merge(
        slices: &[&'a Slice],
        family: Family,
        node: &ThisNode<'_>,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let mut ports: BTreeMap<(&'a str, Protocol), Vec<Candidate<'a>>> = BTreeMap::new();
        for slice in slices.iter().filter(|slice| slice.family == Some(family)) {
            let of_family = |endpoint: &&SliceEndpoint| Family::of(&endpoint.address) == family;
            for (index, endpoint) in slice.endpoints.iter().enumerate().filter(|(_, e)| !of_family(e)) {
                problems.push(Problem {
                    object: format!("EndpointSlice {}", slice.key),
                    field: format!("endpoints[{index}].addresses[0]"),
                    message: format!(
                        "{} is not {}: the endpoint is ignored (E6)",
                        endpoint.address,
                        family.name()
                    ),
                });
            }
            for port in slice.ports.iter() {
                ports.entry((&port.name, port.protocol)).or_default().extend(
                    slice.endpoints.iter().filter(of_family).map(|endpoint| Candidate {
                        at: SocketAddr::new(endpoint.address, port.port),
                        slice: &slice.key.name,
                        endpoint,
                    }),
                );
            }
        }
        for candidates in ports.values_mut() {
            candidates.sort_unstable_by(Candidate::order);
            candidates.dedup_by_key(|candidate| candidate.at);
        }
        // H3 counts addresses, over all slice ports, also those that no service port names.
        let local_ready: BTreeSet<IpAddr> = ports
            .values()
            .flatten()
            .filter(|candidate| candidate.ready() && node.runs(candidate.endpoint))
            .map(|candidate| candidate.at.ip())
            .collect();
        Self { ports, local_ready: local_ready.len() }
    }

    /// The sets of one service port (P3, P4, P13). Hints are judged by this port's endpoints alone (P8).
    pub(super) fn sets(&self, port: &ServicePort, needs: Needs, node: &ThisNode<'_>) -> Sets {
        let candidates = self.ports.get(&(port.name.as_str(), port.protocol)).map_or(&[][..], Vec::as_slice);
        let found = Found {
            needs,
            node,
            topology: Topology::of(candidates, node),
            any_ready: candidates.iter().any(Candidate::ready),
            any_local_ready: candidates.iter().any(|c| c.ready() && node.runs(c.endpoint)),
        };
        let mut sets = Sets {
            cluster: needs.cluster.then(Vec::new),
            local: needs.local.then(Vec::new),
            draining: Vec::new(),
            has_any: false,
            views: Vec::with_capacity(candidates.len()),
        };
        for candidate in candidates {
            let endpoint = candidate.endpoint;
            let local = node.runs(endpoint);
            let (in_cluster_set, in_local_set) =
                (found.in_cluster_set(candidate), found.in_local_set(candidate, local));
            if in_cluster_set && let Some(set) = &mut sets.cluster {
                set.push(candidate.at);
            }
            if in_local_set && let Some(set) = &mut sets.local {
                set.push(candidate.at);
            }
            if endpoint.serving && !in_cluster_set && !in_local_set {
                sets.draining.push(candidate.at);
            }
            // P13: the second half of the rule needs no look at `needs`. If only the cluster set is used, it holds
            // something as soon as any endpoint is ready or a last resort.
            sets.has_any |= candidate.ready() || candidate.last_resort();
            sets.views.push(EndpointView {
                address: candidate.at.ip(),
                port: candidate.at.port(),
                node: endpoint.node.clone(),
                zone: endpoint.zone.clone(),
                local,
                ready: endpoint.ready,
                serving: endpoint.serving,
                terminating: endpoint.terminating,
                in_cluster_set,
                in_local_set,
                reason: found.reason(candidate, local, in_cluster_set, in_local_set).into(),
            });
        }
        for set in [&mut sets.cluster, &mut sets.local].into_iter().flatten() {
            set.shrink_to_fit();
        }
        sets
    }
}

/// P6.
#[derive(Clone, Copy)]
enum Topology {
    /// Keep the endpoints hinted for this node.
    SameNode,
    /// Keep the endpoints hinted for this zone.
    SameZone,
    /// Keep all. `unused_hints`: why hints that are there do not count.
    All { unused_hints: &'static str },
}

impl Topology {
    fn of(candidates: &[Candidate<'_>], node: &ThisNode<'_>) -> Self {
        // Only ready endpoints are asked: others must neither switch a step on nor off.
        let ready =
            || candidates.iter().filter(|candidate| candidate.ready()).map(|candidate| candidate.endpoint);
        if ready().next().is_none() {
            return Self::All { unused_hints: "" };
        }
        let all_name_nodes = ready().all(|endpoint| !endpoint.node_hints().is_empty());
        if all_name_nodes && ready().any(|endpoint| node.hinted(endpoint)) {
            return Self::SameNode;
        }
        let all_name_zones = ready().all(|endpoint| !endpoint.zone_hints().is_empty());
        if all_name_zones && ready().any(|endpoint| node.zone_hinted(endpoint)) {
            return Self::SameZone;
        }
        let unused_hints = if !all_name_zones && !all_name_nodes {
            "hints do not count, as not every ready endpoint has one (P6)"
        } else if all_name_zones && node.zone.is_none() {
            "zone hints do not count, as this node has no zone label (P7)"
        } else {
            "hints do not count, as none is for this node or its zone (P6)"
        };
        Self::All { unused_hints }
    }
}

/// What is known of a port's endpoints as a whole when each is judged.
struct Found<'a> {
    needs: Needs,
    node: &'a ThisNode<'a>,
    topology: Topology,
    any_ready: bool,
    any_local_ready: bool,
}

impl Found<'_> {
    /// P3. A topology filter never empties the set: it is on only if some ready endpoint passes it.
    fn in_cluster_set(&self, candidate: &Candidate<'_>) -> bool {
        self.needs.cluster
            && if self.any_ready {
                candidate.ready() && self.near(candidate.endpoint)
            } else {
                candidate.last_resort()
            }
    }

    fn near(&self, endpoint: &SliceEndpoint) -> bool {
        match self.topology {
            Topology::SameNode => self.node.hinted(endpoint),
            Topology::SameZone => self.node.zone_hinted(endpoint),
            Topology::All { .. } => true,
        }
    }

    /// P4. Neither hints nor endpoints of other nodes matter.
    fn in_local_set(&self, candidate: &Candidate<'_>, local: bool) -> bool {
        self.needs.local
            && local
            && if self.any_local_ready { candidate.ready() } else { candidate.last_resort() }
    }

    fn reason(&self, candidate: &Candidate<'_>, local: bool, in_cluster: bool, in_local: bool) -> String {
        if !candidate.ready() && !candidate.last_resort() {
            return unusable(candidate.endpoint).to_owned();
        }
        let mut reason = String::new();
        if self.needs.cluster {
            self.cluster_reason(candidate, in_cluster, &mut reason);
        } else if !in_local {
            reason.push_str(
                "no cluster set, as internalTrafficPolicy is Local and nothing external is there (P2)",
            );
        }
        if self.needs.local {
            if !reason.is_empty() {
                reason.push_str("; ");
            }
            self.local_reason(candidate, local, in_local, &mut reason);
        }
        reason
    }

    fn cluster_reason(&self, candidate: &Candidate<'_>, inside: bool, reason: &mut String) {
        let endpoint = candidate.endpoint;
        if inside && !candidate.ready() {
            reason.push_str("in the cluster set: serving while terminating, as no endpoint is ready (P3)");
        } else if inside {
            reason.push_str("in the cluster set: ready");
            match self.topology {
                Topology::SameNode => reason.push_str(" and hinted for this node (P6)"),
                Topology::SameZone => {
                    reason.push_str(" and hinted for this node's zone ");
                    reason.push_str(self.node.zone.unwrap_or_default());
                    reason.push_str(" (P6)");
                }
                Topology::All { unused_hints } => {
                    if !unused_hints.is_empty()
                        && (!endpoint.node_hints().is_empty() || !endpoint.zone_hints().is_empty())
                    {
                        reason.push_str("; ");
                        reason.push_str(unused_hints);
                    }
                }
            }
        } else if !candidate.ready() {
            reason.push_str("not in the cluster set: terminating while others are ready (P3)");
        } else {
            reason.push_str("not in the cluster set: hinted for ");
            match self.topology {
                Topology::SameNode => {
                    name_all(reason, "node ", endpoint.node_hints());
                    reason.push_str(", this node is ");
                    reason.push_str(self.node.name);
                }
                Topology::SameZone | Topology::All { .. } => {
                    name_all(reason, "zone ", endpoint.zone_hints());
                    reason.push_str(", this node is in zone ");
                    reason.push_str(self.node.zone.unwrap_or_default());
                }
            }
            reason.push_str(" (P6)");
        }
    }

    fn local_reason(&self, candidate: &Candidate<'_>, local: bool, inside: bool, reason: &mut String) {
        if inside && candidate.ready() {
            reason.push_str("in the local set: ready on this node");
        } else if inside {
            reason.push_str(
                "in the local set: serving while terminating, as no endpoint of this node is ready (P4)",
            );
        } else if local {
            reason.push_str("not in the local set: terminating while others on this node are ready (P4)");
        } else {
            match candidate.endpoint.node.as_deref() {
                Some(node) => {
                    reason.push_str("not in the local set: on node ");
                    reason.push_str(node);
                    reason.push_str(" (E8)");
                }
                None => reason.push_str("not in the local set: on no known node (E8)"),
            }
        }
    }
}

/// P5: neither ready nor serving while terminating.
const fn unusable(endpoint: &SliceEndpoint) -> &'static str {
    match (endpoint.serving, endpoint.terminating) {
        (_, true) => "not used: terminating and not serving (P5)",
        (true, false) => "not used: serving but not ready (P5)",
        (false, false) => "not used: not ready (P5)",
    }
}

fn name_all(reason: &mut String, kind: &str, names: &[Name]) {
    for (index, name) in names.iter().enumerate() {
        if index > 0 {
            reason.push_str(" and ");
        }
        reason.push_str(kind);
        reason.push_str(name);
    }
}
