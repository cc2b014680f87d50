//! The Services of the matrix: one for each place of a backend and policy.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use serde_json::json;

use super::{BACKENDS, Backend, Case, Frontend, POLICIES, Policy, Version};
use crate::{
    manifests::{Object, service, slice},
    nodes::World,
    scene::TARGET,
};

/// The port of every Service, for both protocols.
const PORT: u16 = 80;

/// Node ports count from here.
const FIRST_NODE_PORT: u16 = 30_100;

/// The number of a Service: its addresses end in it.
fn number(backend: Backend, policy: Policy) -> Result<u16> {
    let all = POLICIES.iter().flat_map(|policy| BACKENDS.map(|backend| (backend, *policy)));
    let index =
        all.into_iter().position(|one| one == (backend, policy)).context("a Service of the matrix")?;
    u16::try_from(index + 1).context("few Services")
}

fn address(frontend: Frontend, number: u16, version: Version, world: &World) -> Result<IpAddr> {
    let node = world.node(0)?.host();
    let text = match (frontend, version) {
        (Frontend::ClusterIp, Version::V4) => format!("10.96.1.{number}"),
        (Frontend::ClusterIp, Version::V6) => format!("fd00:10:96::1{number:02}"),
        (Frontend::ExternalIp, Version::V4) => format!("203.0.113.{}", 100 + number),
        (Frontend::ExternalIp, Version::V6) => format!("fd00:203:0:113::{}", 100 + number),
        (Frontend::Balancer, Version::V4) => format!("203.0.113.{number}"),
        (Frontend::Balancer, Version::V6) => format!("fd00:203:0:113::{number}"),
        (Frontend::NodePort, Version::V4) => return Ok(node.v4().into()),
        (Frontend::NodePort, Version::V6) => return Ok(node.v6().into()),
    };
    text.parse().with_context(|| format!("the address {text}"))
}

pub(super) fn destination(case: Case, world: &World, version: Version) -> Result<SocketAddr> {
    let number = number(case.backend, case.policy)?;
    let port = match case.frontend {
        Frontend::NodePort => FIRST_NODE_PORT + number,
        Frontend::ClusterIp | Frontend::ExternalIp | Frontend::Balancer => PORT,
    };
    Ok(SocketAddr::new(address(case.frontend, number, version, world)?, port))
}

/// The name of a Service.
fn name(backend: Backend, policy: Policy) -> String {
    format!("{backend}-{policy}").to_lowercase()
}

/// All Services of the matrix with their slices.
pub fn objects(world: &World) -> Result<Vec<Object>> {
    let mut objects = Vec::new();
    for policy in POLICIES {
        for backend in BACKENDS {
            let (number, name) = (number(backend, policy)?, name(backend, policy));
            let both = |frontend| -> Result<[String; 2]> {
                let of =
                    |version| address(frontend, number, version, world).map(|address| address.to_string());
                Ok([of(Version::V4)?, of(Version::V6)?])
            };
            let cluster_ips = both(Frontend::ClusterIp)?;
            let balancer = both(Frontend::Balancer)?.map(|ip| json!({"ip": ip, "ipMode": "VIP"}));
            objects.push(
                service(&name, &cluster_ips.each_ref().map(String::as_str))
                    .port("tcp", "TCP", PORT, TARGET)
                    .port("udp", "UDP", PORT, TARGET)
                    .node_ports(&[FIRST_NODE_PORT + number; 2])
                    .set("spec.type", "LoadBalancer")
                    .set("spec.externalIPs", both(Frontend::ExternalIp)?.to_vec())
                    .set("spec.internalTrafficPolicy", policy.to_string())
                    .set("spec.externalTrafficPolicy", policy.to_string())
                    .set("status.loadBalancer.ingress", balancer.to_vec()),
            );
            for (family, end) in [("IPv4", "4"), ("IPv6", "6")] {
                let empty = slice(&format!("{name}-{end}"), &name, family)
                    .slice_port("tcp", "TCP", TARGET)
                    .slice_port("udp", "UDP", TARGET);
                let Some((place, node)) = backend.place(world)?.zip(backend.node()) else {
                    objects.push(empty);
                    continue;
                };
                let [v4, v6] = place.sockets(TARGET).map(|socket| socket.ip().to_string());
                let endpoint = if family == "IPv4" { v4 } else { v6 };
                objects.push(empty.endpoint(&endpoint, world.node(node)?.name()));
            }
        }
    }
    Ok(objects)
}
