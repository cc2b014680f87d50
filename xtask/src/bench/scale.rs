//! Any number of Services, as files of manifests, and where their clients dial.
//!
//! All endpoints are real: a backend pod answers on every address of a wide prefix, so that a hundred thousand endpoints
//! need no hundred thousand pods, and the direct way goes to as many addresses as the way through Services.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Effort;

/// What the Services' ports are, and what backends listen on.
pub(crate) const PORT: u16 = 80;
pub(crate) const TARGET_PORT: u16 = 8080;

/// The first port of the node, and how many there are at most.
pub(crate) const NODE_PORT: u16 = 30_000;
pub(crate) const NODE_PORTS_MAX: u32 = 2000;

/// A Service more, for tools that have servers of their own: its address, its endpoint and their port.
pub(crate) const TOOL_VIP: &str = "10.97.0.1";
pub(crate) const TOOL_BACKEND: &str = "10.208.0.9";
pub(crate) const TOOL_PORT: u16 = 5201;
/// Its port of the node, behind those of the others.
pub(crate) const TOOL_NODE_PORT: u16 = 32_201;

/// Where pods and their clients are, so that nobody's source is replaced.
pub(crate) const CLUSTER_CIDR: &str = "10.192.0.0/10,fd00::/16";

/// The namespace of all objects.
pub(crate) const NAMESPACE: &str = "bench";

/// Services of one file: a user has files of a reasonable size.
const SERVICES_PER_FILE: u32 = 250;

/// Services whose endpoints are a file of their own, which a test changes; spread over all.
const MOVABLE_MAX: u32 = 64;

/// How much there is of everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scale {
    /// Services.
    pub(crate) services: u32,
    /// Endpoints of each, in each family.
    pub(crate) endpoints: u32,
    /// Whether Services have an IPv6 address too.
    pub(crate) dual_stack: bool,
    /// The protocols of a Service's port.
    pub(crate) protocols: &'static [&'static str],
    /// Whether the first [`NODE_PORTS_MAX`] have a port of the node, from [`NODE_PORT`]; every second of them, from the
    /// first, is for endpoints of the node alone and keeps sources as they are.
    pub(crate) node_ports: bool,
}

/// A group of backends: a pod with a prefix of addresses in each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// Where Services lead.
    A,
    /// Where a moved endpoint is.
    B,
}

impl Group {
    /// Its IPv4 prefix.
    pub(crate) fn prefix_v4(self) -> &'static str {
        match self {
            Self::A => "10.208.0.0/12",
            Self::B => "10.203.0.0/16",
        }
    }

    /// Its IPv6 prefix.
    pub(crate) fn prefix_v6(self) -> &'static str {
        match self {
            Self::A => "fd00:208::/64",
            Self::B => "fd00:203::/64",
        }
    }

    /// The source addresses of clients towards it.
    pub(crate) fn sources(self) -> (Ipv4Addr, Ipv6Addr) {
        match self {
            Self::A => (Ipv4Addr::new(10, 202, 0, 1), Ipv6Addr::new(0xfd00, 0x202, 0, 0, 0, 0, 0, 1)),
            Self::B => (Ipv4Addr::new(10, 202, 0, 2), Ipv6Addr::new(0xfd00, 0x202, 0, 0, 0, 0, 0, 2)),
        }
    }

    /// What its servers answer when they are asked who they are.
    pub(crate) fn tag(self) -> u8 {
        match self {
            Self::A => b'A',
            Self::B => b'B',
        }
    }

    fn address(self, family: Family, number: u32) -> IpAddr {
        let (v4, v6) = match self {
            Self::A => (Ipv4Addr::new(10, 208, 1, 0), 0x208),
            Self::B => (Ipv4Addr::new(10, 203, 1, 0), 0x203),
        };
        numbered(family, v4, Ipv6Addr::new(0xfd00, v6, 0, 0, 0, 0, 1, 0), number)
    }
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// As Kubernetes writes it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

fn numbered(family: Family, v4: Ipv4Addr, v6: Ipv6Addr, number: u32) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(u32::from(v4) + number).into(),
        Family::V6 => Ipv6Addr::from_bits(u128::from(v6) + u128::from(number)).into(),
    }
}

impl Scale {
    /// What clients of the data path use, without ports of the node.
    pub(crate) fn of_clients(services: u32, effort: &Effort) -> Self {
        let protocols = &["TCP", "UDP"];
        Self { services, endpoints: effort.endpoints, dual_stack: true, protocols, node_ports: false }
    }

    /// The families of its Services.
    pub(crate) fn families(&self) -> &'static [Family] {
        if self.dual_stack { &[Family::V4, Family::V6] } else { &[Family::V4] }
    }

    /// The VIP of a Service.
    pub(crate) fn vip(&self, family: Family, service: u32) -> SocketAddr {
        let base = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 1, 0);
        SocketAddr::new(numbered(family, Ipv4Addr::new(10, 96, 1, 0), base, service), PORT)
    }

    /// All VIPs.
    pub(crate) fn vips(&self, family: Family) -> Vec<SocketAddr> {
        (0..self.services).map(|service| self.vip(family, service)).collect()
    }

    /// All endpoints, as clients without Services dial them.
    pub(crate) fn backends(&self, family: Family) -> Vec<SocketAddr> {
        let address = |number| SocketAddr::new(Group::A.address(family, number), TARGET_PORT);
        (0..self.services * self.endpoints).map(address).collect()
    }

    /// Services that a test may move: evenly spread over all.
    pub(crate) fn movable(&self) -> Vec<u32> {
        let count = self.services.min(MOVABLE_MAX);
        (0..count).map(|index| index * (self.services / count)).collect()
    }

    /// Everything, as an API server has it.
    pub(crate) fn objects(&self) -> impl Iterator<Item = Value> + use<> {
        let (scale, movable) = (*self, self.movable());
        (0..self.services).flat_map(move |service| {
            let endpoints = if movable.contains(&service) { 1 } else { scale.endpoints };
            let slices = Self { endpoints, ..scale };
            let slice = move |family: &Family| slices.slice(service, *family, Group::A);
            [scale.service(service)].into_iter().chain(scale.families().iter().map(slice))
        })
    }

    /// The Service for tools, and its slice.
    pub(crate) fn tools() -> [Value; 2] {
        use sheave_tests::manifests;
        let service = manifests::service("tools", &[TOOL_VIP]).port("tcp", "TCP", TOOL_PORT, TOOL_PORT);
        let service = service.node_ports(&[TOOL_NODE_PORT]);
        let slice = manifests::slice("tools-1", "tools", "IPv4")
            .slice_port("tcp", "TCP", TOOL_PORT)
            .endpoint(TOOL_BACKEND, "node-1");
        [service, slice].map(|object| object.namespace(NAMESPACE).json().clone())
    }

    /// Writes everything.
    pub(crate) fn write(&self, directory: &Path) -> Result<()> {
        let movable = self.movable();
        let services: Vec<u32> = (0..self.services).collect();
        for (number, services) in services.chunks(SERVICES_PER_FILE as usize).enumerate() {
            let path = directory.join(format!("services-{number}.json"));
            let file = File::create(&path).with_context(|| format!("writing {}", path.display()))?;
            let mut file = BufWriter::new(file);
            for service in services {
                serde_json::to_writer(&mut file, &self.service(*service))?;
                for family in self.families() {
                    if !movable.contains(service) {
                        serde_json::to_writer(&mut file, &self.slice(*service, *family, Group::A))?;
                    }
                }
                file.write_all(b"\n")?;
            }
            file.flush()?;
        }
        let tools = Self::tools().map(|object| object.to_string()).join("\n");
        fs::write(directory.join("tools.json"), tools)?;
        for service in movable {
            fs::write(directory.join(Self::movable_file(service)), self.movable_text(service, Group::A)?)?;
        }
        Ok(())
    }

    /// The file of a movable Service's endpoints.
    pub(crate) fn movable_file(service: u32) -> String {
        format!("endpoints-{service}.json")
    }

    /// What it holds when they are in a group. There is one endpoint a family, or a look would see either of two.
    pub(crate) fn movable_text(&self, service: u32, group: Group) -> Result<String> {
        let one = Self { endpoints: 1, ..*self };
        let slices = self.families().iter().map(|family| one.slice(service, *family, group).to_string());
        Ok(slices.collect::<Vec<_>>().join("\n"))
    }

    /// The IPv4 slice of a movable Service when it is in a group, and where the API server has it.
    pub(crate) fn moved(&self, service: u32, group: Group) -> (String, Value) {
        let slice = Self { endpoints: 1, ..*self }.slice(service, Family::V4, group);
        let name = slice.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
        (format!("/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices/{name}"), slice)
    }

    /// The IPv4 slice of a Service that has one endpoint, or all in every second lap, and what the store has it under. A
    /// movable one, which has one only, changes its address.
    pub(crate) fn churned(&self, service: u32, lap: u32) -> (String, Value) {
        let is_even = lap.is_multiple_of(2);
        let slice = if self.movable().contains(&service) {
            self.moved(service, if is_even { Group::A } else { Group::B }).1
        } else {
            let endpoints = if is_even { 1 } else { self.endpoints };
            Self { endpoints, ..*self }.slice(service, Family::V4, Group::A)
        };
        let name = slice.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
        (format!("endpointslices/{NAMESPACE}/{name}"), slice)
    }

    /// The Service.
    pub(crate) fn service(&self, service: u32) -> Value {
        let vips: Vec<_> =
            self.families().iter().map(|family| self.vip(*family, service).ip().to_string()).collect();
        let families: Vec<_> = self.families().iter().map(|family| family.name()).collect();
        let port = |protocol: &&str| json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": PORT, "targetPort": TARGET_PORT});
        let mut object = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": service_name(service), "namespace": NAMESPACE},
            "spec": {
                "type": "ClusterIP",
                "clusterIP": vips.first(),
                "clusterIPs": vips,
                "ipFamilies": families,
                "ipFamilyPolicy": if self.dual_stack { "RequireDualStack" } else { "SingleStack" },
                "ports": self.protocols.iter().map(port).collect::<Vec<_>>(),
            },
        });
        if self.node_ports && service < NODE_PORTS_MAX {
            object["spec"]["type"] = json!("NodePort");
            let policy = if service.is_multiple_of(2) { "Local" } else { "Cluster" };
            object["spec"]["externalTrafficPolicy"] = json!(policy);
            for index in 0..self.protocols.len() {
                object["spec"]["ports"][index]["nodePort"] = json!(u32::from(NODE_PORT) + service);
            }
        }
        object
    }

    /// A slice with all endpoints of a Service in a family, as the EndpointSlice controller writes it.
    pub(crate) fn slice(&self, service: u32, family: Family, group: Group) -> Value {
        let port = |protocol: &&str| json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": TARGET_PORT});
        let endpoint = |index| {
            // A movable Service keeps the first of its addresses.
            let number = match group {
                Group::A => service * self.endpoints.max(1) + index,
                Group::B => service % 4096,
            };
            json!({
                "addresses": [group.address(family, number)],
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": "node-1",
                "targetRef": {"kind": "Pod", "name": format!("{}-{index}", service_name(service)), "namespace": NAMESPACE},
            })
        };
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-{}", service_name(service), family.name().to_lowercase()),
                "namespace": NAMESPACE,
                "labels": {
                    "kubernetes.io/service-name": service_name(service),
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                },
            },
            "addressType": family.name(),
            "ports": self.protocols.iter().map(port).collect::<Vec<_>>(),
            "endpoints": (0..self.endpoints).map(endpoint).collect::<Vec<_>>(),
        })
    }
}

fn service_name(service: u32) -> String {
    format!("service-{service}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn addresses_are_distinct_and_inside_their_prefix() {
        let scale = Scale {
            services: 50_000,
            endpoints: 10,
            dual_stack: true,
            protocols: &["TCP"],
            node_ports: false,
        };
        for family in scale.families() {
            let backends: BTreeSet<_> = scale.backends(*family).into_iter().collect();
            assert_eq!(backends.len(), 500_000);
            let vips: BTreeSet<_> = scale.vips(*family).into_iter().collect();
            assert_eq!(vips.len(), 50_000);
            assert!(vips.is_disjoint(&backends));
        }
        let last = scale.backends(Family::V4).pop().map(|address| address.ip());
        assert_eq!(last, Some(IpAddr::from(Ipv4Addr::new(10, 215, 162, 31))));
    }

    #[test]
    fn movable_services_are_spread_over_all() {
        let scale = |services| Scale {
            services,
            endpoints: 1,
            dual_stack: false,
            protocols: &["UDP"],
            node_ports: false,
        };
        assert_eq!(scale(1).movable(), [0]);
        let movable = scale(10_000).movable();
        assert_eq!((movable.len(), movable[1] - movable[0]), (64, 156));
    }
}
