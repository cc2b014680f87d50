//! From a Service to what the proxy reads of it (S1–S10, P1, A1, X1, X2, X7, F5, H1).

use std::net::IpAddr;

use ipnet::IpNet;

use super::address::{parse_cidr, parse_ip, unusable_as_endpoint, unusable_as_vip};
use super::fields::{Mismatch, mapping_of};
use super::problems::{Problems, port_number, protocol};
use super::reading::{Labelled, Readable, Reading};
use super::{Family, Name, ObjectKey, PerFamily, Service, ServicePort};

/// S3: a Service with this label belongs to another proxy.
const OTHER_PROXY_LABEL: &str = "service.kubernetes.io/service-proxy-name";

/// A1: three hours.
const DEFAULT_AFFINITY_S: u32 = 10_800;
/// A1: one day.
const MAX_AFFINITY_S: u32 = 86_400;

/// Whatever cannot be used of a Service is left out and is named in its `problems`.
impl Readable for Service {
    type Given = Given;

    fn reading(mut given: Given, wrong: Option<Mismatch>) -> Reading<Self> {
        let Labelled { metadata, labels, created } = std::mem::take(&mut given.about);
        Reading::new(metadata, labels.other_proxy.is_some(), wrong, |key| service(key, created.s, given))
    }
}

/// A Service, field by field.
#[derive(Default)]
pub struct Given {
    about: Labelled<Labels>,
    spec: Spec,
    ingress: Vec<Ingress>,
}

mapping_of!(Given, "Service", {
    "metadata" => about,
    "spec" => spec,
    "status" => ingress within ["loadBalancer", "ingress"],
});

#[derive(Default)]
struct Labels {
    other_proxy: Option<String>,
}

mapping_of!(Labels, "a map", { OTHER_PROXY_LABEL => other_proxy });

#[derive(Default)]
struct Spec {
    type_: Option<String>,
    cluster_ip: Option<String>,
    cluster_ips: Vec<String>,
    ip_families: Vec<String>,
    ports: Vec<Port>,
    external_ips: Vec<String>,
    load_balancer_source_ranges: Vec<String>,
    internal_traffic_policy: Option<String>,
    external_traffic_policy: Option<String>,
    session_affinity: Option<String>,
    affinity_timeout_s: Option<i32>,
    health_check_node_port: Option<i32>,
}

mapping_of!(Spec, "ServiceSpec", {
    "type" => type_,
    "clusterIP" => cluster_ip,
    "clusterIPs" => cluster_ips,
    "ipFamilies" => ip_families,
    "ports" => ports,
    "externalIPs" => external_ips,
    "loadBalancerSourceRanges" => load_balancer_source_ranges,
    "internalTrafficPolicy" => internal_traffic_policy,
    "externalTrafficPolicy" => external_traffic_policy,
    "sessionAffinity" => session_affinity,
    "sessionAffinityConfig" => affinity_timeout_s within ["clientIP", "timeoutSeconds"],
    "healthCheckNodePort" => health_check_node_port,
});

#[derive(Default)]
struct Port {
    name: Option<Name>,
    protocol: Option<String>,
    port: Option<i32>,
    node_port: Option<i32>,
}

mapping_of!(Port, "ServicePort", {
    "name" => name,
    "protocol" => protocol,
    "port" => port,
    "nodePort" => node_port,
});

#[derive(Default)]
struct Ingress {
    ip: Option<String>,
    ip_mode: Option<String>,
}

mapping_of!(Ingress, "LoadBalancerIngress", { "ip" => ip, "ipMode" => ip_mode });

fn service(key: ObjectKey, created_s: Option<i64>, given: Given) -> Service {
    let mut problems = Problems::of("Service", &key);
    let mut out = Service {
        key,
        created_s,
        proxied: false,
        cluster_ip: PerFamily::default(),
        ports: Vec::new(),
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        internal_local: false,
        external_local: false,
        affinity_timeout_s: None,
        health_check_node_port: None,
        problems: Vec::new(),
    };
    let spec = &given.spec;
    // S1, S2: nothing else of such a Service is read, so nothing else of it can be wrong.
    out.proxied = !matches!(spec.cluster_ip.as_deref(), None | Some("" | "None"))
        && spec.type_.as_deref() != Some("ExternalName");
    if !out.proxied {
        return out;
    }

    out.cluster_ip = cluster_ips(spec, &mut problems);
    out.ports = ports(&spec.ports, &mut problems);
    out.external_ips = external_ips(spec, &mut problems);
    out.load_balancer_ips = load_balancer_ips(&given.ingress, &mut problems);
    out.source_ranges = source_ranges(spec, &out.cluster_ip, &mut problems);

    let kind = Type::of(spec, &mut problems);
    out.internal_local =
        local_policy("internalTrafficPolicy", spec.internal_traffic_policy.as_deref(), &mut problems);
    let external_local =
        local_policy("externalTrafficPolicy", spec.external_traffic_policy.as_deref(), &mut problems);
    // P1: any element counts, of whichever family and whether or not it can be used.
    let has_external_ips = !spec.external_ips.is_empty();
    out.external_local = external_local
        && match kind {
            Type::NodePort | Type::LoadBalancer => true,
            Type::ClusterIp => has_external_ips,
        };
    out.affinity_timeout_s = affinity(spec, &mut problems);
    out.health_check_node_port = match kind {
        Type::LoadBalancer if out.external_local => health_check_node_port(spec, &mut problems),
        Type::LoadBalancer | Type::NodePort | Type::ClusterIp => None,
    };
    out.problems = problems.finish();
    out
}

/// `spec.type`, without ExternalName.
#[derive(Clone, Copy)]
enum Type {
    ClusterIp,
    NodePort,
    LoadBalancer,
}

impl Type {
    fn of(spec: &Spec, problems: &mut Problems) -> Self {
        match spec.type_.as_deref() {
            None | Some("" | "ClusterIP") => Self::ClusterIp,
            Some("NodePort") => Self::NodePort,
            Some("LoadBalancer") => Self::LoadBalancer,
            Some(other) => {
                problems.add("spec.type", format_args!("{other:?} is not a known type; served as ClusterIP"));
                Self::ClusterIp
            }
        }
    }
}

/// S4.
fn cluster_ips(spec: &Spec, problems: &mut Problems) -> PerFamily<Option<IpAddr>> {
    let mut out = PerFamily::default();
    let families = &spec.ip_families;
    if families.is_empty() {
        let text = spec.cluster_ip.as_deref().unwrap_or_default();
        if let Some(ip) = cluster_ip("spec.clusterIP", text, problems) {
            *out.get_mut(Family::of(&ip)) = Some(ip);
        }
        return out;
    }
    let addresses = &spec.cluster_ips;
    for (i, name) in families.iter().enumerate() {
        let Some(family) = Family::ALL.into_iter().find(|family| family.name() == name) else {
            problems.add(
                format_args!("spec.ipFamilies[{i}]"),
                format_args!("{name:?} is not an IP family; ignored"),
            );
            continue;
        };
        if out.get(family).is_some() {
            continue;
        }
        let Some(text) = addresses.get(i).filter(|text| !text.is_empty()) else {
            problems.add(
                format_args!("spec.clusterIPs[{i}]"),
                format_args!(
                    "missing, while spec.ipFamilies has {name}; the Service is not served over {name}"
                ),
            );
            continue;
        };
        let field = format!("spec.clusterIPs[{i}]");
        match cluster_ip(&field, text, problems) {
            Some(ip) if Family::of(&ip) == family => *out.get_mut(family) = Some(ip),
            Some(ip) => problems.add(
                field,
                format_args!("{ip} is not of family {name}; the Service is not served over {name}"),
            ),
            None => {}
        }
    }
    out
}

fn cluster_ip(field: &str, text: &str, problems: &mut Problems) -> Option<IpAddr> {
    let Some(ip) = parse_ip(text) else {
        problems.add(
            field,
            format_args!("{text:?} is not an IP address; the Service is not served in that family"),
        );
        return None;
    };
    if let Some(why) = unusable_as_vip(&ip) {
        problems.add(
            field,
            format_args!("{ip} cannot be a cluster IP: {why}; the Service is not served in that family"),
        );
        return None;
    }
    Some(ip)
}

/// S7, S8.
fn ports(ports: &[Port], problems: &mut Problems) -> Vec<ServicePort> {
    let mut out: Vec<ServicePort> = Vec::with_capacity(ports.len());
    for (i, port) in ports.iter().enumerate() {
        let Some(protocol) = protocol(port.protocol.as_deref()) else {
            let name = port.protocol.as_deref().unwrap_or_default();
            problems.add(
                format_args!("spec.ports[{i}].protocol"),
                format_args!("{name:?} is not one of TCP, UDP and SCTP; the port is left out"),
            );
            continue;
        };
        let given = port.port.unwrap_or_default();
        let Some(number) = port_number(given) else {
            problems.add(
                format_args!("spec.ports[{i}].port"),
                format_args!("{given} is not within 1-65535; the port is left out"),
            );
            continue;
        };
        let node_port = match port.node_port {
            None | Some(0) => None,
            Some(given) => {
                let number = port_number(given);
                if number.is_none() {
                    problems.add(
                        format_args!("spec.ports[{i}].nodePort"),
                        format_args!("{given} is not within 1-65535; no NodePort"),
                    );
                }
                number
            }
        };
        let port =
            ServicePort { name: port.name.clone().unwrap_or_default(), protocol, port: number, node_port };
        // S7: name and protocol are the identity. The API forbids two; kube-proxy's map would keep the later one.
        if let Some(earlier) = out.iter_mut().find(|p| p.name == port.name && p.protocol == port.protocol) {
            problems.add(
                format_args!("spec.ports[{i}].name"),
                format_args!("{:?} with {} is there twice; the later one counts", port.name, protocol.name()),
            );
            *earlier = port;
        } else {
            out.push(port);
        }
    }
    out
}

/// S5, X1, X6, X7.
fn external_ips(spec: &Spec, problems: &mut Problems) -> Vec<IpAddr> {
    let mut out = Vec::new();
    for (i, text) in spec.external_ips.iter().enumerate() {
        vip(&mut out, || format!("spec.externalIPs[{i}]"), text, unusable_as_endpoint, problems);
    }
    out
}

/// X2, X6, X7.
fn load_balancer_ips(ingress: &[Ingress], problems: &mut Problems) -> Vec<IpAddr> {
    let mut out = Vec::new();
    for (i, ingress) in ingress.iter().enumerate() {
        let field = || format!("status.loadBalancer.ingress[{i}].ip");
        match (ingress.ip.as_deref(), ingress.ip_mode.as_deref()) {
            (None, _) | (Some(_), Some("Proxy")) => {}
            (Some(text), None | Some("VIP")) => vip(&mut out, field, text, unusable_as_vip, problems),
            (Some(_), Some(mode)) => problems.add(
                format_args!("status.loadBalancer.ingress[{i}].ipMode"),
                format_args!("{mode:?} is not one of VIP and Proxy; the address is left alone"),
            ),
        }
    }
    out
}

fn vip(
    out: &mut Vec<IpAddr>,
    field: impl FnOnce() -> String,
    text: &str,
    unusable: impl FnOnce(&IpAddr) -> Option<&'static str>,
    problems: &mut Problems,
) {
    if text.is_empty() {
        return;
    }
    let Some(ip) = parse_ip(text) else {
        problems.add(field(), format_args!("{text:?} is not an IP address; ignored"));
        return;
    };
    if let Some(why) = unusable(&ip) {
        problems.add(field(), format_args!("{ip} cannot be a VIP: {why}; ignored"));
    } else if !out.contains(&ip) {
        out.push(ip);
    }
}

/// F5: the sharp edges stay, but not silently.
fn source_ranges(spec: &Spec, cluster_ip: &PerFamily<Option<IpAddr>>, problems: &mut Problems) -> Vec<IpNet> {
    const FIELD: &str = "spec.loadBalancerSourceRanges";
    let mut out: Vec<IpNet> = Vec::new();
    let mut given = false;
    for (i, text) in spec.load_balancer_source_ranges.iter().enumerate() {
        if text.trim().is_empty() {
            continue;
        }
        given = true;
        match parse_cidr(text) {
            Some(net) if out.contains(&net) => {}
            Some(net) => out.push(net),
            None => {
                problems.add(format_args!("{FIELD}[{i}]"), format_args!("{text:?} is not a CIDR; ignored"))
            }
        }
    }
    if given && out.is_empty() {
        problems.add(FIELD, "no range can be used: the load-balancer IPs are open to all");
    } else if given {
        for family in Family::ALL {
            let served = cluster_ip.get(family).is_some();
            if served && !out.iter().any(|net| Family::of(&net.addr()) == family) {
                let name = family.name();
                problems.add(
                    FIELD,
                    format_args!("no {name} range: the {name} load-balancer IPs are open to all"),
                );
            }
        }
    }
    out
}

/// P1: nil or any value but `Local` is Cluster.
fn local_policy(field: &str, value: Option<&str>, problems: &mut Problems) -> bool {
    match value {
        Some("Local") => true,
        None | Some("" | "Cluster") => false,
        Some(other) => {
            problems.add(
                format_args!("spec.{field}"),
                format_args!("{other:?} is not one of Cluster and Local; taken as Cluster"),
            );
            false
        }
    }
}

/// A1.
fn affinity(spec: &Spec, problems: &mut Problems) -> Option<u32> {
    const FIELD: &str = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return None,
        Some("ClientIP") => {}
        Some(other) => {
            problems.add(
                "spec.sessionAffinity",
                format_args!("{other:?} is not one of None and ClientIP; no affinity"),
            );
            return None;
        }
    }
    let Some(given) = spec.affinity_timeout_s else {
        return Some(DEFAULT_AFFINITY_S);
    };
    match u32::try_from(given) {
        Ok(1..=MAX_AFFINITY_S) => u32::try_from(given).ok(),
        Ok(1..) => {
            problems
                .add(FIELD, format_args!("{given} is more than {MAX_AFFINITY_S}; {MAX_AFFINITY_S} is used"));
            Some(MAX_AFFINITY_S)
        }
        Ok(0) | Err(_) => {
            problems.add(FIELD, format_args!("{given} is less than 1; {DEFAULT_AFFINITY_S} is used"));
            Some(DEFAULT_AFFINITY_S)
        }
    }
}

/// H1.
fn health_check_node_port(spec: &Spec, problems: &mut Problems) -> Option<u16> {
    const FIELD: &str = "spec.healthCheckNodePort";
    match spec.health_check_node_port {
        None | Some(0) => {
            problems.add(FIELD, "not set, while externalTrafficPolicy is Local: no health check server");
            None
        }
        Some(given) => {
            let port = port_number(given);
            if port.is_none() {
                problems.add(FIELD, format_args!("{given} is not within 1-65535: no health check server"));
            }
            port
        }
    }
}
