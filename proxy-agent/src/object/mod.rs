//! The objects that the proxy reads, reduced to the fields that it reads and checked once, at the door.
//!
//! A field that cannot be used is left out and reported as a [`Problem`]; it never costs more than what depends on it.

pub mod address;
mod fields;
mod name;
mod node;
mod problems;
mod reading;
mod service;
mod slice;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Serialize;

pub use fields::Mismatch;
pub(crate) use fields::{Step, format_path};
pub use name::Name;
pub use node::ZONE_LABEL;
pub(crate) use problems::{port_number, protocol};
pub use proxy_common::abi::Protocol;
pub use reading::{Readable, Reading};
pub use slice::SERVICE_NAME_LABEL;

/// Namespace and name; the namespace is empty for cluster-scoped objects.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ObjectKey {
    /// Namespace.
    pub namespace: Name,
    /// Name.
    pub name: Name,
}

impl ObjectKey {
    /// From both parts.
    pub fn new(namespace: impl Into<Name>, name: impl Into<Name>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// From what an object says of itself; what is not given is empty.
    pub(crate) fn given(namespace: Option<&str>, name: Option<&str>) -> Self {
        Self::new(namespace.unwrap_or_default(), name.unwrap_or_default())
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// Something in an object that cannot be used, for the log, `sheave plan` and events.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct Problem {
    /// Kind and key: `Service ns/name`.
    pub object: String,
    /// Path of the field: `spec.clusterIPs[0]`; empty if the whole object is meant.
    pub field: String,
    /// What is wrong and what follows from it.
    pub message: String,
}

/// IP family. Each is proxied on its own (S4).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Of an address. Callers pass canonical addresses: an IPv4-mapped one counts as IPv6 here.
    pub const fn of(ip: &IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Kubernetes' name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// A value for each family.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PerFamily<T> {
    /// IPv4's.
    pub v4: T,
    /// IPv6's.
    pub v6: T,
}

impl<T> PerFamily<T> {
    /// One family's value.
    pub const fn get(&self, family: Family) -> &T {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// One family's value, to change.
    pub const fn get_mut(&mut self, family: Family) -> &mut T {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }
}

/// A Service. What S1 and S2 exclude keeps its place with `proxied: false`, so that a Service that turns into one of
/// those looks like a delete.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Key.
    pub key: ObjectKey,
    /// `metadata.creationTimestamp`, seconds since the epoch; decides S12. Objects without one count as youngest.
    pub created_s: Option<i64>,
    /// False for headless ones, ones without a cluster IP, and ExternalName (S1, S2).
    pub proxied: bool,
    /// Cluster IP of each family (S4); a family without one does not exist for this Service.
    pub cluster_ip: PerFamily<Option<IpAddr>>,
    /// Ports, in the object's order.
    pub ports: Vec<ServicePort>,
    /// `spec.externalIPs`, canonical, both families mixed, without what S5 and X7 exclude.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` in VIP mode (X2), as above.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges` that parse (F5, S6), host bits masked off, both families mixed.
    pub source_ranges: Vec<IpNet>,
    /// `internalTrafficPolicy: Local` (P1).
    pub internal_local: bool,
    /// Effective `externalTrafficPolicy: Local`: false where P1 says that it does not count.
    pub external_local: bool,
    /// Seconds, if `sessionAffinity: ClientIP` (A1).
    pub affinity_timeout_s: Option<u32>,
    /// `healthCheckNodePort`, where H1 gives it a meaning.
    pub health_check_node_port: Option<u16>,
    /// What could not be used.
    pub problems: Vec<Problem>,
}

/// One element of `spec.ports`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// May be empty.
    pub name: Name,
    /// TCP if absent (S8).
    pub protocol: Protocol,
    /// `port`, 1–65535.
    pub port: u16,
    /// `nodePort`, if not 0.
    pub node_port: Option<u16>,
}

/// An EndpointSlice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slice {
    /// Key.
    pub key: ObjectKey,
    /// Name of the Service by the label (E2); `None` or empty: the slice is ignored.
    pub service: Option<Name>,
    /// `addressType`; `None` for FQDN and unknown ones (E1).
    pub family: Option<Family>,
    /// Ports with a name and a number (E4).
    pub ports: Arc<[SlicePort]>,
    /// Endpoints with a usable address (E6, E12).
    pub endpoints: Arc<[SliceEndpoint]>,
    /// What could not be used.
    pub problems: Vec<Problem>,
}

/// One element of a slice's `ports`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlicePort {
    /// May be empty.
    pub name: Name,
    /// TCP if absent.
    pub protocol: Protocol,
    /// 1–65535.
    pub port: u16,
}

/// One element of a slice's `endpoints`, defaults applied (E7).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SliceEndpoint {
    /// `addresses[0]`, canonical (E6).
    pub address: IpAddr,
    /// `nodeName`, if not empty.
    pub node: Option<Name>,
    /// `zone`; shown, never used (P7).
    pub zone: Option<Name>,
    /// `conditions.ready`.
    pub ready: bool,
    /// `conditions.serving`.
    pub serving: bool,
    /// `conditions.terminating`.
    pub terminating: bool,
    /// `hints`, if there are any.
    pub hints: Option<Box<Hints>>,
}

/// Whom an endpoint is meant for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Hints {
    /// `forNodes[].name`.
    pub nodes: Vec<Name>,
    /// `forZones[].name`.
    pub zones: Vec<Name>,
}

impl SliceEndpoint {
    /// `hints.forNodes[].name`.
    pub fn node_hints(&self) -> &[Name] {
        self.hints.as_ref().map_or(&[], |hints| &hints.nodes)
    }

    /// `hints.forZones[].name`.
    pub fn zone_hints(&self) -> &[Name] {
        self.hints.as_ref().map_or(&[], |hints| &hints.zones)
    }
}

/// A Node; the agent reads only its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// `metadata.name`.
    pub name: String,
    /// Label `topology.kubernetes.io/zone`, if not empty (P7).
    pub zone: Option<String>,
    /// `status.addresses`: InternalIPs, then ExternalIPs, each in the object's order.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`, else `spec.podCIDR`.
    pub pod_cidrs: Vec<IpNet>,
    /// What could not be used.
    pub problems: Vec<Problem>,
}

/// An object that could not be read at all. If it is known which one it was, its last good state stays in force.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unreadable {
    /// Which object, if that could be read.
    pub key: Option<ObjectKey>,
    /// What is wrong.
    pub problem: Problem,
}

/// One object as a source reports it. Shared: a source may keep it, and the model does.
pub type Read<T> = Result<Arc<T>, Unreadable>;

/// What a source reports about one kind of object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Delta<T> {
    /// All objects of the kind: what is not named here is gone. The only way in which absence counts (Q7).
    List(Vec<Read<T>>),
    /// One object is new or changed.
    Apply(Read<T>),
    /// One object is gone.
    Delete(ObjectKey),
}

/// What sources send to the agent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// Services.
    Service(Delta<Service>),
    /// EndpointSlices.
    Slice(Delta<Slice>),
    /// Nodes; only the own one matters.
    Node(Delta<Node>),
    /// All addresses on interfaces of this node, loopback ones left out.
    OwnAddresses(Vec<IpAddr>),
    /// What was told of something without a key (a file, a Pod), named as in [`Problem::object`], holds no longer. What
    /// still holds is told again.
    Mended(String),
    /// Whether a source can follow a resource of the API server, and if not, why. Its last state stays in force (Q7).
    Following {
        /// Plural, as roles name it.
        resource: String,
        /// What is wrong now.
        trouble: Option<String>,
    },
}

/// Changes that happened together: no state between them was ever wanted (E11, S13), so none is programmed.
pub type Batch = Vec<Change>;

/// Labels.
pub type Labels = BTreeMap<String, String>;

#[cfg(test)]
mod tests;
