//! The matrix of the packet path: every kind of frontend from every origin to a backend at every place, under both
//! traffic policies, families and protocols; with what the rules say must come of it. Rules are cited by their numbers.
//!
//! Each Service has one backend, so the answer says which set was used. A server says whom it sees, which tells SNAT.

mod objects;
mod rules;
mod run;

use std::{fmt, net::SocketAddr};

use anyhow::Result;

pub use self::{
    objects::objects,
    rules::{Detection, Expected, Peer, Rule, Settings, apparent, expected, judge, rule},
    run::{Got, Row, Table, hold},
};
use super::{Attachment, World};
use crate::{lab::Place, protocol::Transport};

/// What a client dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Frontend {
    /// The cluster IP.
    ClusterIp,
    /// The node port at the first node's address.
    NodePort,
    /// An external IP.
    ExternalIp,
    /// An address of the load balancer.
    Balancer,
}

/// Who dials it. No agent's socket hooks see any of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A client on the nodes' network.
    Outside,
    /// A client behind two routers.
    Far,
    /// A pod: node, kind and number, from 0.
    Pod(usize, Attachment, usize),
    /// A process of a node itself.
    Host(usize),
}

/// Where the Service's only backend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// Nowhere.
    None,
    /// The first pod of a kind on a node.
    Pod(usize, Attachment),
    /// The node's own network.
    Host(usize),
}

/// Both traffic policies of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Policy {
    /// Any node's endpoints.
    Cluster,
    /// The own node's endpoints.
    Local,
}

/// One row of the matrix; each is dialled over both protocols in both families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Case {
    /// What.
    pub frontend: Frontend,
    /// From where.
    pub origin: Origin,
    /// To where.
    pub backend: Backend,
    /// How.
    pub policy: Policy,
}

/// All frontends.
pub const FRONTENDS: [Frontend; 4] =
    [Frontend::ClusterIp, Frontend::NodePort, Frontend::ExternalIp, Frontend::Balancer];

/// All origins.
pub const ORIGINS: [Origin; 9] = [
    Origin::Outside,
    Origin::Far,
    Origin::Pod(0, Attachment::Bridge, 0),
    Origin::Pod(0, Attachment::Bridge, 1),
    Origin::Pod(0, Attachment::PointToPoint, 0),
    Origin::Pod(0, Attachment::PointToPoint, 1),
    Origin::Pod(1, Attachment::Bridge, 0),
    Origin::Host(0),
    Origin::Host(1),
];

/// All places of a backend.
pub const BACKENDS: [Backend; 7] = [
    Backend::None,
    Backend::Pod(0, Attachment::Bridge),
    Backend::Pod(0, Attachment::PointToPoint),
    Backend::Host(0),
    Backend::Pod(1, Attachment::Bridge),
    Backend::Pod(1, Attachment::PointToPoint),
    Backend::Host(1),
];

/// Both policies.
pub const POLICIES: [Policy; 2] = [Policy::Cluster, Policy::Local];

/// How each row is dialled.
pub const WAYS: [(Transport, Version); 4] = [
    (Transport::Tcp, Version::V4),
    (Transport::Tcp, Version::V6),
    (Transport::UdpConnected, Version::V4),
    (Transport::UdpConnected, Version::V6),
];

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

/// All rows.
#[must_use]
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for origin in ORIGINS {
        for frontend in FRONTENDS {
            for policy in POLICIES {
                cases.extend(BACKENDS.map(|backend| Case { frontend, origin, backend, policy }));
            }
        }
    }
    cases
}

impl Origin {
    /// The node it is on.
    #[must_use]
    pub fn node(self) -> Option<usize> {
        match self {
            Self::Outside | Self::Far => None,
            Self::Pod(node, _, _) | Self::Host(node) => Some(node),
        }
    }

    /// Where its process runs.
    pub fn place(self, world: &World) -> Result<&Place> {
        match self {
            Self::Outside => Ok(world.outside()),
            Self::Far => Ok(world.far()),
            Self::Pod(node, attachment, index) => world.pod(node, attachment, index),
            Self::Host(node) => Ok(world.node(node)?.host()),
        }
    }
}

impl Backend {
    /// The node it is on.
    #[must_use]
    pub fn node(self) -> Option<usize> {
        match self {
            Self::None => None,
            Self::Pod(node, _) | Self::Host(node) => Some(node),
        }
    }

    /// Where its server runs.
    pub fn place(self, world: &World) -> Result<Option<&Place>> {
        match self {
            Self::None => Ok(None),
            Self::Pod(node, attachment) => world.pod(node, attachment, 0).map(Some),
            Self::Host(node) => Ok(Some(world.node(node)?.host())),
        }
    }

    /// Whether it is the pod that dials.
    #[must_use]
    pub fn is(self, origin: Origin) -> bool {
        matches!((self, origin), (Self::Pod(node, kind), Origin::Pod(from, from_kind, 0)) if node == from && kind == from_kind)
    }
}

impl Case {
    /// What the client dials.
    pub fn destination(self, world: &World, version: Version) -> Result<SocketAddr> {
        objects::destination(self, world, version)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outside => formatter.pad("outside"),
            Self::Far => formatter.pad("far"),
            Self::Pod(node, Attachment::Bridge, index) => {
                formatter.pad(&format!("bridge-{}-{}", node + 1, index + 1))
            }
            Self::Pod(node, Attachment::PointToPoint, index) => {
                formatter.pad(&format!("p2p-{}-{}", node + 1, index + 1))
            }
            Self::Host(node) => formatter.pad(&format!("node-{}", node + 1)),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::None => formatter.pad("none"),
            Self::Pod(node, attachment) => Origin::Pod(node, attachment, 0).fmt(formatter),
            Self::Host(node) => Origin::Host(node).fmt(formatter),
        }
    }
}

impl fmt::Display for Frontend {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::ExternalIp => "ExternalIP",
            Self::Balancer => "LoadBalancer",
        })
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Cluster => "Cluster",
            Self::Local => "Local",
        })
    }
}
