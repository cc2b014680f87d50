//! From an EndpointSlice to what the proxy reads of it (E1–E12). Most of what a cluster says is slices, so there is nothing
//! in between.

use std::net::IpAddr;

use serde::de::SeqAccess;

use super::address::{parse_ip, unusable_as_endpoint};
use super::fields::{Field, Found, Mismatch, Wrong, mapping_of};
use super::problems::{Problems, port_number, protocol};
use super::reading::{Labelled, Readable, Reading};
use super::{Family, Hints, Name, ObjectKey, Slice, SliceEndpoint, SlicePort};

/// E2: names the Service of a slice.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// S3: a slice with this label is of a headless Service.
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// Whatever cannot be used of a slice is left out and is named in its `problems`.
impl Readable for Slice {
    type Given = Given;

    fn reading(mut given: Given, wrong: Option<Mismatch>) -> Reading<Self> {
        let Labelled { metadata, labels, .. } = std::mem::take(&mut given.about);
        Reading::new(metadata, labels.headless.is_some(), wrong, |key| slice(key, labels.service, given))
    }
}

/// A slice, field by field.
#[derive(Default)]
pub struct Given {
    about: Labelled<Labels>,
    address_type: Option<String>,
    ports: Vec<Port>,
    endpoints: Vec<Endpoint>,
}

mapping_of!(Given, "EndpointSlice", {
    "metadata" => about,
    "addressType" => address_type,
    "ports" => ports,
    "endpoints" => endpoints,
});

#[derive(Default)]
struct Labels {
    service: Option<Name>,
    headless: Option<String>,
}

mapping_of!(Labels, "a map", { SERVICE_NAME_LABEL => service, HEADLESS_LABEL => headless });

#[derive(Default)]
struct Port {
    name: Option<Name>,
    port: Option<i32>,
    protocol: Option<String>,
}

mapping_of!(Port, "EndpointPort", { "name" => name, "port" => port, "protocol" => protocol });

#[derive(Default)]
struct Endpoint {
    address: FirstAddress,
    conditions: Conditions,
    node: Option<Name>,
    zone: Option<Name>,
    hints: GivenHints,
}

mapping_of!(Endpoint, "Endpoint", {
    "addresses" => address,
    "conditions" => conditions,
    "nodeName" => node,
    "zone" => zone,
    "hints" => hints,
});

/// E6: of the addresses only the first counts.
#[derive(Default)]
struct FirstAddress(Option<Address>);

impl Field for FirstAddress {
    const EXPECTED: &'static str = "a sequence";

    fn list<'de, A: SeqAccess<'de>>(list: A) -> Result<Found<Self>, A::Error> {
        let (addresses, wrong) = Vec::<Option<Address>>::list(list)?;
        Ok((Self(addresses.into_iter().next().flatten()), wrong))
    }
}

enum Address {
    Ip(IpAddr),
    Other(String),
}

impl Field for Option<Address> {
    const EXPECTED: &'static str = "a string";

    fn text(text: &str) -> Result<Self, Wrong> {
        Ok(Some(parse_ip(text).map_or_else(|| Address::Other(text.to_owned()), Address::Ip)))
    }
}

#[derive(Default)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

mapping_of!(Conditions, "EndpointConditions", {
    "ready" => ready,
    "serving" => serving,
    "terminating" => terminating,
});

#[derive(Default)]
struct GivenHints {
    nodes: Vec<Hint>,
    zones: Vec<Hint>,
}

mapping_of!(GivenHints, "EndpointHints", { "forNodes" => nodes, "forZones" => zones });

#[derive(Default)]
struct Hint {
    name: Option<Name>,
}

mapping_of!(Hint, "ForZone or ForNode", { "name" => name });

fn slice(key: ObjectKey, service: Option<Name>, given: Given) -> Slice {
    let mut problems = Problems::of("EndpointSlice", &key);
    let service = service.filter(|name| !name.is_empty());
    let family = match given.address_type.as_deref().unwrap_or_default() {
        "IPv4" => Some(Family::V4),
        "IPv6" => Some(Family::V6),
        "FQDN" => None,
        other => {
            problems.add(
                "addressType",
                format_args!("{other:?} is not one of IPv4, IPv6 and FQDN; the slice is ignored"),
            );
            None
        }
    };
    let ports = ports(given.ports, &mut problems).into();
    let endpoints = family.map_or_else(Vec::new, |family| {
        let given = given.endpoints.into_iter().enumerate();
        given.filter_map(|(i, given)| endpoint(i, given, family, &mut problems)).collect()
    });
    Slice { key, service, family, ports, endpoints: endpoints.into(), problems: problems.finish() }
}

/// E4: only ports with a name and a number count.
fn ports(given: Vec<Port>, problems: &mut Problems) -> Vec<SlicePort> {
    let mut out = Vec::with_capacity(given.len());
    for (i, port) in given.into_iter().enumerate() {
        let (Some(name), Some(number)) = (port.name, port.port.filter(|&number| number != 0)) else {
            continue;
        };
        let Some(protocol) = protocol(port.protocol.as_deref()) else {
            let name = port.protocol.as_deref().unwrap_or_default();
            problems.add(
                format_args!("ports[{i}].protocol"),
                format_args!("{name:?} is not one of TCP, UDP and SCTP; the port is left out"),
            );
            continue;
        };
        let Some(port) = port_number(number) else {
            problems.add(
                format_args!("ports[{i}].port"),
                format_args!("{number} is not within 1-65535; the port is left out"),
            );
            continue;
        };
        let port = SlicePort { name, protocol, port };
        if !out.contains(&port) {
            out.push(port);
        }
    }
    out
}

/// E6, E7, E12.
fn endpoint(i: usize, given: Endpoint, family: Family, problems: &mut Problems) -> Option<SliceEndpoint> {
    let mut ignored = |field: &str, why: std::fmt::Arguments<'_>| {
        problems.add(
            format_args!("endpoints[{i}].addresses{field}"),
            format_args!("{why}; the endpoint is ignored"),
        );
        None
    };
    let address = match given.address.0 {
        None => return ignored("", format_args!("empty")),
        Some(Address::Other(text)) => return ignored("[0]", format_args!("{text:?} is not an IP address")),
        Some(Address::Ip(address)) => address,
    };
    if Family::of(&address) != family {
        let family = family.name();
        return ignored("[0]", format_args!("{address} is not of the slice's addressType {family}"));
    }
    if let Some(why) = unusable_as_endpoint(&address) {
        return ignored("[0]", format_args!("{address} cannot be an endpoint: {why}"));
    }
    let name = |name: Option<Name>| name.filter(|name| !name.is_empty());
    let names = |hints: Vec<Hint>| hints.into_iter().map(|hint| hint.name.unwrap_or_default()).collect();
    let hints = Hints { nodes: names(given.hints.nodes), zones: names(given.hints.zones) };
    Some(SliceEndpoint {
        address,
        node: name(given.node),
        zone: name(given.zone),
        // E7: serving does not follow ready.
        ready: given.conditions.ready.unwrap_or(true),
        serving: given.conditions.serving.unwrap_or(true),
        terminating: given.conditions.terminating.unwrap_or(false),
        hints: Some(hints).filter(|hints| *hints != Hints::default()).map(Box::new),
    })
}
