//! Which VIPs a service port wants, who may use them, and which set serves whom there.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use proxy_common::abi::{FrontendKind, FrontendValue, Origin, ServiceId};

use super::{Context, Frontend, NodeFacts, Resolved};
use crate::object::{Family, Service, ServicePort};

/// The frontends of one port in the family of its cluster IP, sorted, each address:port once (X6).
pub(super) fn wanted(
    service: &Service,
    port: &ServicePort,
    cluster_ip: IpAddr,
    context: &Context,
    facts: &NodeFacts,
) -> Vec<Frontend> {
    let family = Family::of(&cluster_ip);
    let mut kinds: BTreeMap<(IpAddr, u16), FrontendKind> = BTreeMap::new();
    let mut add = |address: IpAddr, number: u16, kind: FrontendKind| {
        if Family::of(&address) == family && !context.policy.excludes(address, number, port.protocol) {
            let first = kinds.entry((address, number)).or_insert(kind);
            *first = (*first).min(kind);
        }
    };
    add(cluster_ip, port.port, FrontendKind::ClusterIp);
    // S10: whatever the type of the Service.
    for &address in &service.load_balancer_ips {
        add(address, port.port, FrontendKind::LoadBalancer);
    }
    if !context.policy.no_external_ips {
        for &address in &service.external_ips {
            add(address, port.port, FrontendKind::ExternalIp);
        }
    }
    if let Some(number) = port.node_port {
        for &address in facts.nodeport_addresses.get(family) {
            add(address, number, FrontendKind::NodePort);
        }
    }
    kinds.into_iter().map(|((address, port), kind)| Frontend { address, port, kind }).collect()
}

/// The family's ranges, sorted; empty = open (F5, F6).
pub(super) fn source_ranges(service: &Service, family: Family) -> Vec<IpNet> {
    let of_family = service.source_ranges.iter().filter(|range| Family::of(&range.addr()) == family);
    let mut ranges: Vec<IpNet> = of_family.map(IpNet::trunc).collect();
    if ranges.iter().any(|range| range.prefix_len() == 0) {
        ranges.clear();
    }
    ranges.sort();
    ranges.dedup();
    ranges
}

/// What the kernel looks up for one frontend: rules P10 and P11 as one set per origin, and rule F1.
pub fn frontend_value(
    resolved: &Resolved,
    frontend: &Frontend,
    facts: &NodeFacts,
    service_id: ServiceId,
) -> FrontendValue {
    let mut value = FrontendValue::new(service_id, frontend.kind);
    for origin in Origin::ALL {
        let local = match frontend.kind {
            FrontendKind::ClusterIp => resolved.internal_local,
            FrontendKind::LoadBalancer | FrontendKind::ExternalIp | FrontendKind::NodePort => {
                resolved.external_local
                    && match origin {
                        Origin::Node => false,
                        // P11: pods that cannot be told are served like anybody else.
                        Origin::Pod => !*facts.detects_local_pods.get(resolved.key.family),
                        Origin::Elsewhere => true,
                    }
            }
        };
        if local {
            value = value.with_local_set_for(origin);
        }
    }
    if frontend.kind == FrontendKind::LoadBalancer && !resolved.source_ranges.is_empty() {
        value = value.with_source_ranges();
    }
    value
}
