//! From a Node of the API to what the proxy reads of it (P7, N2, M1).

use k8s_openapi::api::core::v1 as core;

use super::address::{parse_cidr, parse_ip};
use super::problems::Problems;
use super::service::key;
use super::{Name, Node};

/// P7: the zone of a Node.
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// Reads a Node. Whatever cannot be used is left out and is named in `problems`.
pub fn node(object: &core::Node) -> Node {
    // A Node has no namespace; one in a file means nothing.
    let key = super::ObjectKey { namespace: Name::default(), ..key(&object.metadata) };
    let mut problems = Problems::of("Node", &key);
    let zone = object
        .metadata
        .labels
        .as_ref()
        .and_then(|l| l.get(ZONE_LABEL))
        .filter(|zone| !zone.is_empty())
        .cloned();

    let mut addresses = Vec::new();
    let given = object.status.as_ref().and_then(|s| s.addresses.as_deref()).unwrap_or_default();
    for kind in ["InternalIP", "ExternalIP"] {
        for (i, address) in given.iter().enumerate().filter(|(_, a)| a.type_ == kind) {
            match parse_ip(&address.address) {
                Some(ip) if addresses.contains(&ip) => {}
                Some(ip) => addresses.push(ip),
                None => problems.add(
                    format_args!("status.addresses[{i}].address"),
                    format_args!("{:?} is not an IP address; ignored", address.address),
                ),
            }
        }
    }

    let spec = object.spec.as_ref();
    let many = spec.and_then(|s| s.pod_cidrs.as_deref()).unwrap_or_default();
    let one = spec.and_then(|s| s.pod_cidr.as_deref()).unwrap_or_default();
    let mut pod_cidrs = Vec::new();
    let mut add = |field: String, text: &str| match parse_cidr(text) {
        Some(net) => pod_cidrs.push(net),
        None => problems.add(field, format_args!("{text:?} is not a CIDR; ignored")),
    };
    if many.is_empty() {
        if !one.is_empty() {
            add("spec.podCIDR".into(), one);
        }
    } else {
        for (i, text) in many.iter().enumerate() {
            add(format!("spec.podCIDRs[{i}]"), text);
        }
    }
    Node { name: key.name.to_string(), zone, addresses, pod_cidrs, problems: problems.finish() }
}
