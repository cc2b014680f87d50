//! From objects to what must be programmed, per service port and family. Pure: no clock, no IO, sorted everywhere.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use proxy_common::abi::FrontendKind;

use crate::object::{Family, Node, ObjectKey, PerFamily, Problem, Protocol};

/// The unit of work (S7), in one family (S4).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServicePortKey {
    /// The Service.
    pub service: ObjectKey,
    /// The port's name, may be empty.
    pub port_name: String,
    /// The port's protocol.
    pub protocol: Protocol,
    /// The family.
    pub family: Family,
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

/// An endpoint with the reason why it is used or not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointView {
    /// Address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// `nodeName`.
    pub node: Option<String>,
    /// `zone`.
    pub zone: Option<String>,
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
    pub reason: String,
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
    /// What is odd, for the log.
    pub problems: Vec<Problem>,
}

impl ServicePortKey {
    /// Sorts before every service port of this Service.
    pub fn first_of(service: &ObjectKey) -> Self {
        Self {
            service: service.clone(),
            port_name: String::new(),
            protocol: Protocol::Tcp,
            family: Family::V4,
        }
    }
}
