//! What holds for the whole node: the addresses of NodePorts (N1–N4) and how pods are told (M1).

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{Context, DetectLocal, NodeFacts, NodePortAddresses};
use crate::object::{Family, PerFamily, Problem};

impl NodeFacts {
    /// Derives them; cheap, but needed only when the context changes.
    pub fn new(context: &Context) -> Self {
        let mut facts = Self::default();
        for family in Family::ALL {
            *facts.primary.get_mut(family) = primary(context, family);
            let addresses =
                nodeport_addresses(context, family, *facts.primary.get(family), &mut facts.problems);
            *facts.nodeport_addresses.get_mut(family) = addresses;
        }
        detect_local_pods(context, &mut facts);
        facts.problems.sort();
        facts.problems.dedup();
        facts
    }

    /// Whether both program the same; what is odd about the node may differ.
    pub fn same_effect(&self, other: &Self) -> bool {
        let Self { nodeport_addresses, primary, detects_local_pods, local_pod_cidrs, problems: _ } = self;
        *nodeport_addresses == other.nodeport_addresses
            && *primary == other.primary
            && *detects_local_pods == other.detects_local_pods
            && *local_pod_cidrs == other.local_pod_cidrs
    }

    /// Whether the address is one of this node's pods, as far as ranges can tell (M1).
    pub fn is_local_pod(&self, address: IpAddr) -> bool {
        self.local_pod_cidrs.iter().any(|cidr| cidr.contains(&address))
    }
}

fn node_problem(context: &Context, field: &str, message: String) -> Problem {
    Problem { object: format!("Node {}", context.node_name), field: field.to_owned(), message }
}

/// N2. A loopback address answers nobody, so it counts as none: the family is then open, as in kube-proxy.
fn primary(context: &Context, family: Family) -> Option<IpAddr> {
    let bound = context.policy.bind_address.filter(|address| !address.is_unspecified());
    // Node::addresses has the InternalIPs first, then the ExternalIPs.
    let node = context.node.iter().flat_map(|node| node.addresses.iter().copied());
    let mut candidates = bound.into_iter().chain(node).filter(|address| Family::of(address) == family);
    candidates.next().filter(|address| !address.is_loopback() && !address.is_unspecified())
}

fn nodeport_addresses(
    context: &Context,
    family: Family,
    primary: Option<IpAddr>,
    problems: &mut Vec<Problem>,
) -> BTreeSet<IpAddr> {
    // N4: loopback never, whatever the list says.
    let own = context.own_addresses.iter().copied();
    let own = own.filter(|address| Family::of(address) == family && !address.is_loopback());
    let own: BTreeSet<IpAddr> = own.collect();
    match &context.policy.nodeport_addresses {
        NodePortAddresses::Primary => match primary {
            Some(primary) if own.contains(&primary) => BTreeSet::from([primary]),
            Some(primary) => {
                let message = format!(
                    "primary {} address {primary} is on no interface: it serves no NodePort (N2)",
                    family.name()
                );
                problems.push(node_problem(context, "status.addresses", message));
                BTreeSet::new()
            }
            None => {
                // N2: no range of the family means that all of its addresses are open. Only worth a word if there are any.
                if !own.is_empty() {
                    let message = format!(
                        "no primary {0} address is known: NodePorts are open on all {0} addresses of this node (N2)",
                        family.name()
                    );
                    problems.push(node_problem(context, "status.addresses", message));
                }
                own
            }
        },
        NodePortAddresses::Cidrs(cidrs) => {
            let of_family = |cidr: &&IpNet| Family::of(&cidr.addr()) == family;
            for cidr in cidrs.iter().filter(of_family).filter(|cidr| cidr.network().is_loopback()) {
                let message = format!("{cidr} is loopback: NodePorts are not served there (N5)");
                problems.push(Problem {
                    object: "options".to_owned(),
                    field: "--nodeport-addresses".to_owned(),
                    message,
                });
            }
            if !cidrs.iter().any(|cidr| of_family(&cidr)) {
                return own;
            }
            own.into_iter().filter(|address| cidrs.iter().any(|cidr| cidr.contains(address))).collect()
        }
    }
}

/// M1. Asking for what cannot be had is a problem; having asked for nothing is not.
fn detect_local_pods(context: &Context, facts: &mut NodeFacts) {
    let given = &context.policy.cluster_cidrs;
    let cidrs: Vec<IpNet> = match &context.policy.detect_local {
        DetectLocal::ClusterCidr if !given.is_empty() => given.iter().map(IpNet::trunc).collect(),
        DetectLocal::ClusterCidr | DetectLocal::NodeCidr => {
            let pod_cidrs = context.node.as_ref().map_or(&[][..], |node| &node.pod_cidrs);
            let first = |family| pod_cidrs.iter().find(|cidr| Family::of(&cidr.addr()) == family);
            Family::ALL.into_iter().filter_map(first).map(IpNet::trunc).collect()
        }
        DetectLocal::BridgeInterface(_) | DetectLocal::InterfaceNamePrefix(_) => {
            facts.detects_local_pods = PerFamily { v4: true, v6: true };
            return;
        }
    };
    for family in Family::ALL {
        *facts.detects_local_pods.get_mut(family) =
            cidrs.iter().any(|cidr| Family::of(&cidr.addr()) == family);
    }
    let family = primary_family(context);
    if !*facts.detects_local_pods.get(family) {
        let consequence = format!("pods of this node cannot be told in {} (M1)", family.name());
        match &context.policy.detect_local {
            DetectLocal::ClusterCidr if given.is_empty() => {}
            DetectLocal::ClusterCidr => facts.problems.push(Problem {
                object: "options".to_owned(),
                field: "--cluster-cidr".to_owned(),
                message: format!("no {} range: {consequence}", family.name()),
            }),
            DetectLocal::NodeCidr if context.node.is_none() => {}
            DetectLocal::NodeCidr | DetectLocal::BridgeInterface(_) | DetectLocal::InterfaceNamePrefix(_) => {
                let message = format!("no {} range: {consequence}", family.name());
                facts.problems.push(node_problem(context, "spec.podCIDRs", message));
            }
        }
    }
    facts.local_pod_cidrs = cidrs;
}

/// O5.
fn primary_family(context: &Context) -> Family {
    let node = context.node.iter().flat_map(|node| node.addresses.iter().copied());
    context
        .policy
        .bind_address
        .into_iter()
        .chain(node)
        .next()
        .map_or(Family::V4, |address| Family::of(&address))
}
