//! From objects to what must be programmed, per service port and family. Pure: no clock, no IO, sorted everywhere.
//!
//! * `facts`: what holds for the whole node (N1–N4, M1), once.
//! * `endpoints`: which endpoints a port has (E) and which of them its two sets hold, with reasons (P).
//! * `frontends`: which VIPs a port wants (S8, S10, N, X) and who is served from which set there (P10, P11).
//! * here: one Service, all of its ports and families.

mod endpoints;
mod facts;
mod frontends;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use proxy_common::abi::FrontendKind;
use serde::Serialize;

use self::endpoints::{Endpoints, Needs, ThisNode};
pub use self::frontends::frontend_value;
use crate::object::{
    Family, Name, Node, ObjectKey, PerFamily, Problem, Protocol, Service, ServicePort, Slice,
};

/// Resolves one Service: one entry per service port and family, sorted by key, and what could not be used.
///
/// `slices` are those of the Service (E2); others are skipped. The order of slices and of endpoints does not matter
/// (E10). The cost depends on this Service and its slices alone.
pub fn resolve<'a>(
    service: &Service,
    slices: impl IntoIterator<Item = &'a Slice>,
    context: &Context,
    facts: &NodeFacts,
) -> (Vec<Resolved>, Vec<Problem>) {
    let (mut resolved, mut problems) = (Vec::new(), Vec::new());
    // S1, S2: to all that follows, such a Service does not exist.
    if !service.proxied {
        return (resolved, problems);
    }
    let slices: Vec<&Slice> = slices.into_iter().filter(|slice| owns(service, slice)).collect();
    let ports = distinct_ports(service, &mut problems);
    let node = ThisNode {
        name: &context.node_name,
        zone: context.node.as_ref().and_then(|node| node.zone.as_deref()).filter(|zone| !zone.is_empty()),
    };
    for family in Family::ALL {
        // S4: without a cluster IP of the family there is no node port and no external VIP of it either.
        let Some(cluster_ip) = *service.cluster_ip.get(family) else { continue };
        let endpoints = Endpoints::merge(&slices, family, &node, &mut problems);
        let ranges = frontends::source_ranges(service, family);
        let load_balancer_ips = of_family(&service.load_balancer_ips, family);
        // F4: the node itself may dial a VIP that is also its own address, and then the VIP is the source.
        let source_exceptions = match facts.primary.get(family) {
            Some(primary) if ranges.iter().any(|range| range.contains(primary)) => load_balancer_ips.clone(),
            Some(_) | None => BTreeSet::new(),
        };
        let external_ips = of_family(&service.external_ips, family);
        for port in &ports {
            // X1: the gate takes the frontends away, but P2 still counts the field.
            let has_external =
                port.node_port.is_some() || !load_balancer_ips.is_empty() || !external_ips.is_empty();
            let needs = Needs {
                cluster: !service.internal_local || has_external,
                local: service.internal_local || (service.external_local && has_external),
            };
            let sets = endpoints.sets(port, needs, &node);
            resolved.push(Resolved {
                key: ServicePortKey {
                    service: service.key.clone(),
                    port_name: port.name.clone(),
                    protocol: port.protocol,
                    family,
                },
                frontends: frontends::wanted(service, port, cluster_ip, context, facts),
                cluster_set: sets.cluster,
                local_set: sets.local,
                draining: sets.draining,
                has_any_endpoints: sets.has_any,
                internal_local: service.internal_local,
                external_local: service.external_local,
                affinity_timeout_s: service.affinity_timeout_s,
                source_ranges: ranges.clone(),
                source_exceptions: source_exceptions.iter().copied().collect(),
                health_check_node_port: service.health_check_node_port,
                local_ready_endpoints: endpoints.local_ready,
                created_s: service.created_s,
                endpoints: sets.views,
            });
        }
    }
    resolved.sort_by(|a, b| a.key.cmp(&b.key));
    // It is kept, and most Services have one port: not the room for four that a list begins with.
    resolved.shrink_to_fit();
    problems.sort();
    problems.dedup();
    (resolved, problems)
}

/// E2.
fn owns(service: &Service, slice: &Slice) -> bool {
    slice.key.namespace == service.key.namespace && slice.service.as_ref() == Some(&service.key.name)
}

fn of_family(addresses: &[IpAddr], family: Family) -> BTreeSet<IpAddr> {
    addresses.iter().copied().filter(|address| Family::of(address) == family).collect()
}

/// S12 inside one Service: numbers are unique by the API, but files are not checked by one. (Names are unique since the
/// object was read.)
fn distinct_ports<'a>(service: &'a Service, problems: &mut Vec<Problem>) -> Vec<&'a ServicePort> {
    let mut numbers = BTreeSet::new();
    let mut distinct = Vec::new();
    for (index, port) in service.ports.iter().enumerate() {
        if numbers.insert((port.port, port.protocol)) {
            distinct.push(port);
        } else {
            let what = format!("{}/{} is there twice", port.port, port.protocol.name());
            problems.push(Problem {
                object: format!("Service {}", service.key),
                field: format!("spec.ports[{index}]"),
                message: format!("{what}: this later port is ignored (S12)"),
            });
        }
    }
    distinct
}

/// The unit of work (S7), in one family (S4).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServicePortKey {
    /// The Service.
    pub service: ObjectKey,
    /// The port's name, may be empty.
    pub port_name: Name,
    /// The port's protocol.
    pub protocol: Protocol,
    /// The family.
    pub family: Family,
}

impl fmt::Display for ServicePortKey {
    /// `namespace/name:port/protocol`; the port's name may be empty, the colon always stands.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.service, self.port_name, self.protocol.name())
    }
}

/// What `resolve` must know besides the Service and its slices.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Context {
    /// Own node name (O4); may be empty, then nothing is local (E8).
    pub node_name: String,
    /// Own node as last seen, if ever (P9).
    pub node: Option<Node>,
    /// Addresses on this node's interfaces, without loopback (N4).
    pub own_addresses: BTreeSet<IpAddr>,
    /// What the operator asked for.
    pub policy: Policy,
}

/// Options that change what is programmed. Flags and fields keep kube-proxy's names.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Policy {
    /// `--nodeport-addresses` (N2).
    pub nodeport_addresses: NodePortAddresses,
    /// `--bind-address`, if not unspecified: the primary address of its family (N2).
    pub bind_address: Option<IpAddr>,
    /// `--detect-local-mode` and what belongs to it (M1).
    pub detect_local: DetectLocal,
    /// `--cluster-cidr`; empty: none.
    pub cluster_cidrs: Vec<IpNet>,
    /// `--service-cidr` (Z6); empty: unknown.
    pub service_cidrs: Vec<IpNet>,
    /// `--masquerade-all` (M2).
    pub masquerade_all: bool,
    /// Gate `AllowServiceExternalIPs=false` (X1).
    pub no_external_ips: bool,
    /// Frontends to leave alone (P14).
    pub excluded_frontends: Vec<ExcludedFrontend>,
    /// `--packet-path off`: only sockets of this node are served.
    pub no_packet_path: bool,
}

impl Policy {
    /// Whether the operator asked to leave this VIP alone (P14).
    pub fn excludes(&self, address: IpAddr, port: u16, protocol: Protocol) -> bool {
        self.excluded_frontends.iter().any(|excluded| {
            excluded.address == address
                && excluded.port.is_none_or(|(number, only)| {
                    number == port && only.is_none_or(|excluded| excluded == protocol)
                })
        })
    }
}

/// `--nodeport-addresses` (N2, N3).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum NodePortAddresses {
    /// One address per family.
    #[default]
    Primary,
    /// Own addresses in these ranges; a family without a range accepts all of its own addresses.
    Cidrs(Vec<IpNet>),
}

/// `--detect-local-mode` (M1).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum DetectLocal {
    /// `--cluster-cidr`, or without that the own Node's podCIDRs.
    #[default]
    ClusterCidr,
    /// The own Node's first podCIDR of each family.
    NodeCidr,
    /// In-interface equals.
    BridgeInterface(String),
    /// In-interface starts with.
    InterfaceNamePrefix(String),
}

/// A frontend that Sheave does not serve (P14); what is absent matches all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExcludedFrontend {
    /// The VIP.
    pub address: IpAddr,
    /// The VIP's port and protocol.
    pub port: Option<(u16, Option<Protocol>)>,
}

/// A service port of one family, resolved.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resolved {
    /// Which.
    pub key: ServicePortKey,
    /// Wanted frontends, sorted, each address:port once (X6); whether this Service gets them is S12's matter.
    pub frontends: Vec<Frontend>,
    /// `None`: not used (P2). Sorted.
    pub cluster_set: Option<Vec<SocketAddr>>,
    /// `None`: not used (P2). Sorted.
    pub local_set: Option<Vec<SocketAddr>>,
    /// Endpoints that serve but are in neither set; old datagram flows may stay with them (C2). Sorted.
    pub draining: Vec<SocketAddr>,
    /// P13.
    pub has_any_endpoints: bool,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// Effective `externalTrafficPolicy: Local` (P1).
    pub external_local: bool,
    /// A1.
    pub affinity_timeout_s: Option<u32>,
    /// F5, F6: this family's ranges, sorted; empty = open.
    pub source_ranges: Vec<IpNet>,
    /// F4: client addresses let in besides the ranges: the Service's LB IPs if a range has the node's primary address.
    pub source_exceptions: Vec<IpAddr>,
    /// H1.
    pub health_check_node_port: Option<u16>,
    /// H3: distinct ready local addresses of the whole Service in this family.
    pub local_ready_endpoints: usize,
    /// For S12.
    pub created_s: Option<i64>,
    /// Every endpoint of this port and why it is in or out. Sorted by address and port.
    pub endpoints: Vec<EndpointView>,
}

/// One VIP:port of a service port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Frontend {
    /// VIP.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// What the VIP is to the Service; if it is several things (X6), the first in [`FrontendKind`]'s order.
    pub kind: FrontendKind,
}

/// An endpoint with the reason why it is used or not, as `sheave plan` prints it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct EndpointView {
    /// Address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// `nodeName`.
    pub node: Option<Name>,
    /// `zone`.
    pub zone: Option<Name>,
    /// E8.
    pub local: bool,
    /// E7.
    pub ready: bool,
    /// E7.
    pub serving: bool,
    /// E7.
    pub terminating: bool,
    /// In the cluster set.
    pub in_cluster_set: bool,
    /// In the local set.
    pub in_local_set: bool,
    /// Why, in words, with the rule's number.
    pub reason: Name,
}

/// What holds for the whole node and is derived from the context: computed once, not per Service.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NodeFacts {
    /// Addresses that answer NodePorts (N1, N4).
    pub nodeport_addresses: PerFamily<BTreeSet<IpAddr>>,
    /// `primary` of N2.
    pub primary: PerFamily<Option<IpAddr>>,
    /// M1: whether local pods can be told.
    pub detects_local_pods: PerFamily<bool>,
    /// M1: ranges that tell them, in the CIDR modes.
    pub local_pod_cidrs: Vec<IpNet>,
    /// What is odd, for the log and `sheave plan`.
    pub problems: Vec<Problem>,
}
