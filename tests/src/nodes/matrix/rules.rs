//! What the rules say of a case.

use std::fmt;

use super::{Backend, Case, Frontend, Origin, Policy};
use crate::nodes::{Attachment, World};

/// What tells local pods (M1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Detection {
    /// Any pod of the cluster, by its address.
    #[default]
    ClusterCidr,
    /// The own node's pods, by their address.
    NodeCidr,
    /// What comes from the node's bridge.
    BridgeInterface,
    /// What comes from the links of point-to-point pods.
    InterfaceNamePrefix,
    /// Nothing does.
    None,
}

/// How the agents are told to act.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// What tells local pods.
    pub detection: Detection,
    /// `--masquerade-all`
    pub masquerade_all: bool,
}

/// What must come of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The backend answers, and sees this peer.
    Answer(Peer),
    /// The client hears at once that nobody is there (Z4).
    Refused,
    /// The client hears nothing (Z5).
    Dropped,
    /// The rules do not make this work, nor do they forbid it.
    Unjudged,
}

/// Whom the server sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The client itself: no SNAT.
    Client,
    /// An address of this node: SNAT.
    Node(usize),
    /// Anyone: a node that talks to itself.
    Any,
}

/// What the rules say, before the network has its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// To the backend, with SNAT or without.
    Forward {
        /// Whether the source is replaced.
        snat: bool,
    },
    /// Z1
    Reject,
    /// Z2, Z3
    Drop,
}

/// The node whose agent decides: the first that the packet comes to. NodePorts are the first node's and nobody else's
/// business (N10); everyone without an agent sends VIPs there too.
#[must_use]
pub fn judge(world: &World, case: Case) -> usize {
    match (case.frontend, case.origin.node()) {
        (Frontend::NodePort, _) | (_, None) => 0,
        (Frontend::ClusterIp | Frontend::ExternalIp | Frontend::Balancer, Some(node)) => {
            if world.proxied(node) { node } else { 0 }
        }
    }
}

/// Who the client seems to be to the judge: a CNI that masquerades lets no pod's address out of the cluster.
#[must_use]
pub fn apparent(world: &World, case: Case) -> Origin {
    match case.origin {
        Origin::Pod(node, _, _) if world.layout().masquerade && node != judge(world, case) => {
            Origin::Host(node)
        }
        Origin::Outside | Origin::Far | Origin::Pod(..) | Origin::Host(_) => case.origin,
    }
}

/// M1
fn is_local_pod(origin: Origin, judge: usize, detection: Detection) -> bool {
    let Origin::Pod(node, attachment, _) = origin else { return false };
    match detection {
        Detection::ClusterCidr => true,
        Detection::NodeCidr => node == judge,
        Detection::BridgeInterface => node == judge && attachment == Attachment::Bridge,
        Detection::InterfaceNamePrefix => node == judge && attachment == Attachment::PointToPoint,
        Detection::None => false,
    }
}

/// What the rules say.
#[must_use]
pub fn rule(world: &World, case: Case, settings: Settings) -> Rule {
    let (judge, origin) = (judge(world, case), apparent(world, case));
    let Some(backend) = case.backend.node() else { return Rule::Reject };
    let pod = is_local_pod(origin, judge, settings.detection);
    let own = origin == Origin::Host(judge);
    let internal = case.frontend == Frontend::ClusterIp;
    // P10, P11
    let local_set = case.policy == Policy::Local && (internal || !(pod || own));
    if local_set && backend != judge {
        return Rule::Drop;
    }
    let detects = settings.detection != Detection::None;
    let snat = if case.backend.is(origin) {
        // M5
        true
    } else if case.backend == Backend::Host(judge) && !own {
        // M10
        false
    } else if internal {
        // M2
        settings.masquerade_all || (detects && !pod)
    } else {
        match case.policy {
            // M3
            Policy::Cluster => true,
            // M4
            Policy::Local => own,
        }
    };
    Rule::Forward { snat }
}

/// What must come of it.
#[must_use]
pub fn expected(world: &World, case: Case, settings: Settings) -> Expected {
    let (judge, origin) = (judge(world, case), apparent(world, case));
    let snat = match rule(world, case, settings) {
        Rule::Reject => return Expected::Refused,
        Rule::Drop => return Expected::Dropped,
        Rule::Forward { snat } => snat,
    };
    if origin == Origin::Host(judge) {
        // Which of its addresses a node takes is its own choice; to itself it may even be the VIP.
        let itself = case.backend == Backend::Host(judge);
        return Expected::Answer(if itself { Peer::Any } else { Peer::Node(judge) });
    }
    if snat {
        return Expected::Answer(Peer::Node(judge));
    }
    // Without SNAT the answer goes straight to the client; past the judge, nobody makes the VIP of its source.
    let passes = case.backend.node() == Some(judge) || origin.node() == Some(judge);
    if !passes {
        return Expected::Unjudged;
    }
    // The other node's own address is out of the cluster.
    let masqueraded = world.layout().masquerade
        && matches!(origin, Origin::Pod(..))
        && matches!(case.backend, Backend::Host(node) if node != judge);
    if masqueraded {
        return Expected::Answer(Peer::Node(judge));
    }
    Expected::Answer(match origin {
        Origin::Host(node) => Peer::Node(node),
        Origin::Pod(node, _, _) if origin != case.origin => Peer::Node(node),
        Origin::Outside | Origin::Far | Origin::Pod(..) => Peer::Client,
    })
}

impl fmt::Display for Expected {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answer(Peer::Client) => formatter.pad("answer"),
            Self::Answer(Peer::Node(node)) => formatter.pad(&format!("answer, SNAT node-{}", node + 1)),
            Self::Answer(Peer::Any) => formatter.pad("answer, any source"),
            Self::Refused => formatter.pad("refused"),
            Self::Dropped => formatter.pad("dropped"),
            Self::Unjudged => formatter.pad("unjudged"),
        }
    }
}
