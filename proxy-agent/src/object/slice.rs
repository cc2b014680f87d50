//! From an EndpointSlice of the API to what the proxy reads of it (E1–E12).

use k8s_openapi::api::discovery::v1 as discovery;

use super::address::{parse_ip, unusable_as_endpoint};
use super::problems::{Problems, port_number, protocol};
use super::service::key;
use super::{Family, Hints, Name, Slice, SliceEndpoint, SlicePort};

/// E2: names the Service of a slice.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Reads an EndpointSlice. Whatever cannot be used is left out and is named in `problems`.
pub fn slice(object: &discovery::EndpointSlice) -> Slice {
    let key = key(&object.metadata);
    let mut problems = Problems::of("EndpointSlice", &key);
    let service = object
        .metadata
        .labels
        .as_ref()
        .and_then(|labels| labels.get(SERVICE_NAME_LABEL))
        .filter(|name| !name.is_empty())
        .map(Name::from);
    let family = match object.address_type.as_str() {
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
    let ports = ports(object.ports.as_deref().unwrap_or_default(), &mut problems);
    let endpoints = family.map_or_else(Vec::new, |family| {
        object
            .endpoints
            .iter()
            .flatten()
            .enumerate()
            .filter_map(|(i, endpoint)| self::endpoint(i, endpoint, family, &mut problems))
            .collect()
    });
    let (ports, endpoints) = (ports.into(), endpoints.into());
    Slice { key, service, family, ports, endpoints, problems: problems.finish() }
}

/// E4: only ports with a name and a number count.
fn ports(ports: &[discovery::EndpointPort], problems: &mut Problems) -> Vec<SlicePort> {
    let mut out = Vec::with_capacity(ports.len());
    for (i, port) in ports.iter().enumerate() {
        let (Some(name), Some(number)) = (&port.name, port.port.filter(|&number| number != 0)) else {
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
        let port = SlicePort { name: name.into(), protocol, port };
        if !out.contains(&port) {
            out.push(port);
        }
    }
    out
}

/// E6, E7, E12.
fn endpoint(
    i: usize,
    endpoint: &discovery::Endpoint,
    family: Family,
    problems: &mut Problems,
) -> Option<SliceEndpoint> {
    let Some(text) = endpoint.addresses.first() else {
        problems.add(format_args!("endpoints[{i}].addresses"), "empty; the endpoint is ignored");
        return None;
    };
    let Some(address) = parse_ip(text) else {
        problems.add(
            format_args!("endpoints[{i}].addresses[0]"),
            format_args!("{text:?} is not an IP address; the endpoint is ignored"),
        );
        return None;
    };
    if Family::of(&address) != family {
        problems.add(
            format_args!("endpoints[{i}].addresses[0]"),
            format_args!(
                "{address} is not of the slice's addressType {}; the endpoint is ignored",
                family.name()
            ),
        );
        return None;
    }
    if let Some(why) = unusable_as_endpoint(&address) {
        problems.add(
            format_args!("endpoints[{i}].addresses[0]"),
            format_args!("{address} cannot be an endpoint: {why}; the endpoint is ignored"),
        );
        return None;
    }
    let conditions = endpoint.conditions.as_ref();
    let name = |name: &String| (!name.is_empty()).then(|| Name::from(name));
    let hints = endpoint.hints.as_ref().map(|hints| Hints {
        nodes: hints.for_nodes.iter().flatten().map(|hint| Name::from(&hint.name)).collect(),
        zones: hints.for_zones.iter().flatten().map(|hint| Name::from(&hint.name)).collect(),
    });
    Some(SliceEndpoint {
        address,
        node: endpoint.node_name.as_ref().and_then(name),
        zone: endpoint.zone.as_ref().and_then(name),
        // E7: serving does not follow ready.
        ready: conditions.and_then(|c| c.ready).unwrap_or(true),
        serving: conditions.and_then(|c| c.serving).unwrap_or(true),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        hints: hints.filter(|hints| *hints != Hints::default()).map(Box::new),
    })
}
