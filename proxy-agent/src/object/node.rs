//! From a Node to what the proxy reads of it (P7, N2, M1).

use super::address::{parse_cidr, parse_ip};
use super::fields::{Mismatch, mapping_of};
use super::problems::Problems;
use super::reading::{Labelled, Readable, Reading};
use super::{Name, Node, ObjectKey};

/// P7: the zone of a Node.
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// Whatever cannot be used of a Node is left out and is named in its `problems`.
impl Readable for Node {
    type Given = Given;

    fn reading(mut given: Given, wrong: Option<Mismatch>) -> Reading<Self> {
        let Labelled { metadata, labels, .. } = std::mem::take(&mut given.about);
        Reading::new(metadata, false, wrong, |key| node(key, labels.zone, given))
    }
}

/// A Node, field by field.
#[derive(Default)]
pub struct Given {
    about: Labelled<Labels>,
    spec: Spec,
    addresses: Vec<Address>,
}

mapping_of!(Given, "Node", {
    "metadata" => about,
    "spec" => spec,
    "status" => addresses within ["addresses"],
});

#[derive(Default)]
struct Labels {
    zone: Option<String>,
}

mapping_of!(Labels, "a map", { ZONE_LABEL => zone });

#[derive(Default)]
struct Spec {
    pod_cidr: Option<String>,
    pod_cidrs: Vec<String>,
}

mapping_of!(Spec, "NodeSpec", { "podCIDR" => pod_cidr, "podCIDRs" => pod_cidrs });

#[derive(Default)]
struct Address {
    kind: String,
    address: String,
}

mapping_of!(Address, "NodeAddress", { "type" => kind, "address" => address });

fn node(key: ObjectKey, zone: Option<String>, given: Given) -> Node {
    // A Node has no namespace; one in a file means nothing.
    let key = ObjectKey { namespace: Name::default(), ..key };
    let mut problems = Problems::of("Node", &key);
    let zone = zone.filter(|zone| !zone.is_empty());

    let mut addresses = Vec::new();
    for kind in ["InternalIP", "ExternalIP"] {
        for (i, address) in given.addresses.iter().enumerate().filter(|(_, a)| a.kind == kind) {
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

    let Spec { pod_cidr, pod_cidrs: many } = given.spec;
    let one = pod_cidr.unwrap_or_default();
    let mut pod_cidrs = Vec::new();
    let mut add = |field: String, text: &str| match parse_cidr(text) {
        Some(net) => pod_cidrs.push(net),
        None => problems.add(field, format_args!("{text:?} is not a CIDR; ignored")),
    };
    if many.is_empty() {
        if !one.is_empty() {
            add("spec.podCIDR".into(), &one);
        }
    } else {
        for (i, text) in many.iter().enumerate() {
            add(format!("spec.podCIDRs[{i}]"), text);
        }
    }
    Node { name: key.name.to_string(), zone, addresses, pod_cidrs, problems: problems.finish() }
}
