//! EndpointSlices derived from Pods, as the EndpointSlice controller of a cluster would write them.
//!
//! With it one Linux machine without a cluster runs "pods come and go, the VIP stays" from files alone. Pure: no
//! clock, no IO; only Services that a change can touch are computed again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::object::address::{parse_ip, unusable_as_endpoint};
use crate::object::{
    self, Delta, Family, Labels, Name, ObjectKey, Protocol, Service, Slice, SliceEndpoint, SlicePort,
};

/// What a Service says about which Pods are behind it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Selection {
    selector: Labels,
    ports: Vec<TargetPort>,
    families: Vec<Family>,
    publish_not_ready: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct TargetPort {
    name: Name,
    protocol: Protocol,
    target: Target,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Target {
    Number(u16),
    /// A named container port: each Pod may have another number for it (E5).
    Name(String),
}

/// A Pod, reduced to what decides where and how it is an endpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pod {
    /// Key.
    pub key: ObjectKey,
    labels: Labels,
    addresses: Vec<IpAddr>,
    node: Option<Name>,
    /// Succeeded or Failed: no endpoint any more.
    finished: bool,
    ready: bool,
    terminating: bool,
    named_ports: Vec<(String, Protocol, u16)>,
}

/// Reads which Pods a Service selects; `None` if none are to be derived: not proxied, or without a selector (then its
/// slices are made by hand).
pub fn selection(object: &core::Service, service: &Service) -> Option<Selection> {
    let spec = object.spec.as_ref()?;
    let selector = spec.selector.clone().filter(|selector| !selector.is_empty())?;
    if !service.proxied {
        return None;
    }
    let named: Vec<Family> = spec
        .ip_families
        .iter()
        .flatten()
        .filter_map(|name| Family::ALL.into_iter().find(|family| family.name() == name))
        .collect();
    let families = if named.is_empty() {
        Family::ALL.into_iter().filter(|&family| service.cluster_ip.get(family).is_some()).collect()
    } else {
        named
    };
    let ports = spec.ports.iter().flatten().filter_map(target_port).collect();
    let publish_not_ready = spec.publish_not_ready_addresses.unwrap_or(false);
    Some(Selection { selector, ports, families, publish_not_ready })
}

fn target_port(port: &core::ServicePort) -> Option<TargetPort> {
    let protocol = object::protocol(port.protocol.as_deref())?;
    let target = match &port.target_port {
        Some(IntOrString::String(name)) if !name.is_empty() => Target::Name(name.clone()),
        Some(IntOrString::Int(number)) if *number != 0 => Target::Number(object::port_number(*number)?),
        // The API server's default.
        None | Some(IntOrString::Int(_) | IntOrString::String(_)) => {
            Target::Number(object::port_number(port.port)?)
        }
    };
    Some(TargetPort { name: port.name.as_deref().unwrap_or_default().into(), protocol, target })
}

/// Reads a Pod.
pub fn pod(object: &core::Pod) -> Pod {
    let spec = object.spec.as_ref();
    let status = object.status.as_ref();
    let phase = status.and_then(|s| s.phase.as_deref());
    let ready = status
        .and_then(|s| s.conditions.as_deref())
        .and_then(|conditions| conditions.iter().find(|c| c.type_ == "Ready"))
        .is_some_and(|c| c.status == "True");

    // `podIPs` holds `podIP` too; hand-written files may have only the one.
    let many = status.iter().flat_map(|s| &s.pod_ips).flatten().map(|ip| ip.ip.as_str());
    let one = status.and_then(|s| s.pod_ip.as_deref());
    let mut addresses = Vec::new();
    for text in many.chain(one) {
        if let Some(ip) = parse_ip(text).filter(|ip| unusable_as_endpoint(ip).is_none())
            && !addresses.contains(&ip)
        {
            addresses.push(ip);
        }
    }

    // Sidecars are init containers that are restarted for ever; the ports of others are gone when the Pod runs.
    let sidecars = spec
        .iter()
        .flat_map(|s| &s.init_containers)
        .flatten()
        .filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let named_ports = spec
        .iter()
        .flat_map(|s| &s.containers)
        .chain(sidecars)
        .flat_map(|c| &c.ports)
        .flatten()
        .filter_map(|port| {
            let name = port.name.clone().filter(|name| !name.is_empty())?;
            let number = object::port_number(port.container_port)?;
            Some((name, object::protocol(port.protocol.as_deref())?, number))
        })
        .collect();

    Pod {
        key: ObjectKey::given(object.metadata.namespace.as_deref(), object.metadata.name.as_deref()),
        labels: object.metadata.labels.clone().unwrap_or_default(),
        addresses,
        node: spec.and_then(|s| s.node_name.as_deref()).filter(|name| !name.is_empty()).map(Name::from),
        finished: matches!(phase, Some("Succeeded" | "Failed")),
        ready,
        terminating: object.metadata.deletion_timestamp.is_some(),
        named_ports,
    }
}

impl Selection {
    fn matches(&self, pod: &Pod) -> bool {
        self.selector.iter().all(|(name, value)| pod.labels.get(name) == Some(value))
    }

    /// The ports of one Pod. A named port that the Pod lacks is missing, the others stay.
    fn ports_of(&self, pod: &Pod) -> Vec<SlicePort> {
        self.ports
            .iter()
            .filter_map(|port| {
                let number = match &port.target {
                    Target::Number(number) => *number,
                    Target::Name(wanted) => pod
                        .named_ports
                        .iter()
                        .find(|(name, protocol, _)| name == wanted && *protocol == port.protocol)
                        .map(|(_, _, number)| *number)?,
                };
                Some(SlicePort { name: port.name.clone(), protocol: port.protocol, port: number })
            })
            .collect()
    }
}

/// The ports of one slice: Pods with other numbers for a named port are in another one (E5).
type PortMapping = Vec<(Name, Protocol, u16)>;

type Slices = BTreeMap<ObjectKey, Slice>;

/// All Pods, Services with a selector, and the slices that follow from them.
#[derive(Default)]
pub struct Derive {
    services: BTreeMap<ObjectKey, Selection>,
    pods: BTreeMap<ObjectKey, Pod>,
    zones: BTreeMap<Name, Name>,
    slices: BTreeMap<ObjectKey, Slices>,
    dirty: BTreeSet<ObjectKey>,
}

impl Derive {
    /// A Service is new, changed, or (`None`) gone or without a selector.
    pub fn set_service(&mut self, key: &ObjectKey, selection: Option<Selection>) {
        let changed = match selection {
            Some(new) => self.services.insert(key.clone(), new.clone()).is_none_or(|old| old != new),
            None => self.services.remove(key).is_some(),
        };
        if changed {
            self.dirty.insert(key.clone());
        }
    }

    /// A Pod is new, changed or gone.
    pub fn set_pod(&mut self, key: &ObjectKey, pod: Option<Pod>) {
        let old = match &pod {
            Some(new) => self.pods.insert(key.clone(), new.clone()),
            None => self.pods.remove(key),
        };
        if old == pod {
            return;
        }
        for pod in old.iter().chain(&pod) {
            let from = ObjectKey::new(key.namespace.clone(), "");
            for (service, selection) in self.services.range(from..) {
                if service.namespace != key.namespace {
                    break;
                }
                if selection.matches(pod) {
                    self.dirty.insert(service.clone());
                }
            }
        }
    }

    /// The zone of a Node is known, changed, or (`None`) not known any more.
    pub fn set_zone(&mut self, node: &str, zone: Option<&str>) {
        let zone = zone.map(Name::from);
        let old = match zone.clone() {
            Some(zone) => self.zones.insert(node.into(), zone),
            None => self.zones.remove(&Name::from(node)),
        };
        if old != zone {
            // The zone of an endpoint is only shown: rare enough to compute all again.
            self.dirty.extend(self.services.keys().cloned());
        }
    }

    /// Computes what changes since the last call can have touched and returns the slices that differ, new and changed
    /// ones before those that are gone: an endpoint that moves between two slices is never missing (E11).
    pub fn flush(&mut self) -> Vec<Delta<Slice>> {
        let mut applied = Vec::new();
        let mut deleted = Vec::new();
        for service in std::mem::take(&mut self.dirty) {
            let new = self.compute(&service);
            let old = self.slices.remove(&service).unwrap_or_default();
            deleted.extend(old.keys().filter(|key| !new.contains_key(key)).cloned().map(Delta::Delete));
            applied.extend(
                new.iter()
                    .filter(|(key, slice)| old.get(key) != Some(slice))
                    .map(|(_, slice)| Delta::Apply(Ok(Arc::new(slice.clone())))),
            );
            if !new.is_empty() {
                self.slices.insert(service, new);
            }
        }
        applied.append(&mut deleted);
        applied
    }

    /// All derived slices as of the last [`Derive::flush`].
    pub fn slices(&self) -> impl Iterator<Item = &Slice> {
        self.slices.values().flat_map(BTreeMap::values)
    }

    fn compute(&self, service: &ObjectKey) -> Slices {
        let Some(selection) = self.services.get(service) else {
            return Slices::new();
        };
        let mut groups: BTreeMap<(Family, PortMapping), Vec<SliceEndpoint>> = BTreeMap::new();
        let from = ObjectKey::new(service.namespace.clone(), "");
        let pods = self.pods.range(from..).take_while(|(key, _)| key.namespace == service.namespace);
        for (_, pod) in pods {
            if pod.finished || !selection.matches(pod) {
                continue;
            }
            let ports: PortMapping =
                selection.ports_of(pod).into_iter().map(|p| (p.name, p.protocol, p.port)).collect();
            if ports.is_empty() {
                continue;
            }
            for &family in &selection.families {
                let Some(&address) = pod.addresses.iter().find(|ip| Family::of(ip) == family) else {
                    continue;
                };
                let zone = pod.node.as_ref().and_then(|node| self.zones.get(node)).cloned();
                groups.entry((family, ports.clone())).or_default().push(SliceEndpoint {
                    address,
                    node: pod.node.clone(),
                    zone,
                    ready: selection.publish_not_ready || (pod.ready && !pod.terminating),
                    serving: pod.ready,
                    terminating: pod.terminating,
                    hints: None,
                });
            }
        }
        let mut index = 0;
        let mut last = None;
        groups
            .into_iter()
            .map(|((family, ports), endpoints)| {
                index = if last == Some(family) { index + 1 } else { 0 };
                last = Some(family);
                // '~' and ':' cannot be in a name of the API: no collision. '~' sorts last, so of two equal endpoints
                // the one from a file, which may carry hints, counts (E9).
                let name = format!("~derived:{}:{}:{index}", service.name, family.name());
                let key = ObjectKey::new(service.namespace.clone(), name);
                let ports = ports
                    .into_iter()
                    .map(|(name, protocol, port)| SlicePort { name, protocol, port })
                    .collect();
                let slice = Slice {
                    key: key.clone(),
                    service: Some(service.name.clone()),
                    family: Some(family),
                    ports,
                    endpoints: endpoints.into(),
                    problems: Vec::new(),
                };
                (key, slice)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A Service `ns/web` with these fields of its spec in place of the usual ones.
    fn svc(spec: Value) -> Option<Selection> {
        let mut full = json!({
            "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00::7"], "ipFamilies": ["IPv4", "IPv6"],
            "selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
        });
        for (field, value) in spec.as_object().unwrap() {
            full[field] = value.clone();
        }
        let value = json!({"metadata": {"namespace": "ns", "name": "web"}, "spec": full});
        let service: object::Reading<Service> = serde_json::from_value(value.clone()).unwrap();
        selection(&serde_json::from_value(value).unwrap(), &service.content.unwrap())
    }

    /// A ready Pod with label `app: web` and two addresses, changed by JSON pointers.
    fn pod_with(name: &str, last: u8, changes: &[(&str, Value)]) -> Pod {
        let mut full = json!({
            "metadata": {"namespace": "ns", "name": name, "labels": {"app": "web", "more": "x"}},
            "spec": {"nodeName": "n1", "containers": [{"name": "c"}], "initContainers": []},
            "status": {
                "phase": "Running", "podIP": format!("10.1.0.{last}"),
                "podIPs": [{"ip": format!("10.1.0.{last}")}, {"ip": format!("fd00:1::{last}")}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        for (path, value) in changes {
            let (parent, field) = path.rsplit_once('/').unwrap();
            full.pointer_mut(parent).unwrap()[field] = value.clone();
        }
        pod(&serde_json::from_value(full).unwrap())
    }

    fn web() -> ObjectKey {
        ObjectKey::new("ns", "web")
    }

    fn show_slice(slice: &Slice) -> String {
        let ports: Vec<_> =
            slice.ports.iter().map(|p| format!("{}:{}/{}", p.name, p.port, p.protocol.name())).collect();
        let endpoints: Vec<_> = slice
            .endpoints
            .iter()
            .map(|e| {
                let flag = |set, letter| if set { letter } else { '-' };
                let flags: String =
                    [flag(e.ready, 'r'), flag(e.serving, 's'), flag(e.terminating, 't')].iter().collect();
                format!("{} {flags}", e.address)
            })
            .collect();
        format!("{} [{}] {}", slice.key.name, ports.join(","), endpoints.join(", "))
    }

    /// The IPv4 slices that follow from a Service and Pods.
    fn derive(selection: Option<Selection>, pods: impl IntoIterator<Item = Pod>) -> Vec<String> {
        let mut derive = Derive::default();
        derive.set_service(&web(), selection);
        for pod in pods {
            derive.set_pod(&pod.key.clone(), Some(pod));
        }
        derive.flush();
        derive.slices().filter(|s| s.family == Some(Family::V4)).map(show_slice).collect()
    }

    const PLAIN: &str = "~derived:web:IPv4:0 [http:8080/TCP] ";

    #[test]
    fn every_family_of_the_service_has_a_slice() {
        let mut derive = Derive::default();
        derive.set_service(&web(), svc(json!({})));
        let pods = [pod_with("b", 2, &[]), pod_with("a", 1, &[("/status/podIPs", json!(null))])];
        for pod in pods {
            derive.set_pod(&pod.key.clone(), Some(pod));
        }
        derive.set_zone("n1", Some("z"));
        derive.flush();
        let all: Vec<_> = derive.slices().collect();
        assert_eq!(show_slice(all[0]), format!("{PLAIN}10.1.0.1 rs-, 10.1.0.2 rs-"));
        assert_eq!(show_slice(all[1]), "~derived:web:IPv6:0 [http:8080/TCP] fd00:1::2 rs-");
        assert_eq!(all.len(), 2);
        let endpoint = &all[0].endpoints[0];
        assert_eq!((endpoint.node.as_deref(), endpoint.zone.as_deref()), (Some("n1"), Some("z")));
        assert_eq!((all[0].key.namespace.as_str(), all[0].service.as_deref()), ("ns", Some("web")));
        // Without ipFamilies the cluster IP's family counts.
        derive.set_service(&web(), svc(json!({"ipFamilies": null})));
        derive.flush();
        assert!(derive.slices().all(|s| s.family == Some(Family::V4)));
    }

    #[test]
    fn conditions_follow_readiness_and_termination() {
        let not_ready = || ("/status/conditions", json!([{"type": "Ready", "status": "False"}]));
        let terminating = || ("/metadata/deletionTimestamp", json!("2026-01-01T00:00:00Z"));
        let cases = [
            (vec![], "rs-", "rs-"),
            (vec![not_ready()], "---", "r--"),
            (vec![("/status/conditions", json!(null))], "---", "r--"),
            (vec![("/status/conditions", json!([{"type": "Ready", "status": "Unknown"}]))], "---", "r--"),
            (vec![terminating()], "-st", "rst"),
            (vec![terminating(), not_ready()], "--t", "r-t"),
        ];
        for (changes, want, published) in cases {
            let pod = || pod_with("a", 1, &changes);
            assert_eq!(derive(svc(json!({})), [pod()]), [format!("{PLAIN}10.1.0.1 {want}")], "{changes:?}");
            let publish = svc(json!({"publishNotReadyAddresses": true}));
            assert_eq!(derive(publish, [pod()]), [format!("{PLAIN}10.1.0.1 {published}")], "{changes:?}");
        }
    }

    #[test]
    fn which_pods_count() {
        for (path, value, counts) in [
            ("/status/phase", json!("Pending"), true),
            ("/status/phase", json!(null), true),
            ("/status/phase", json!("Succeeded"), false),
            ("/status/phase", json!("Failed"), false),
            ("/spec/hostNetwork", json!(true), true),
            ("/metadata/labels", json!({"app": "web"}), true),
            ("/metadata/labels", json!({"app": "other"}), false),
            ("/metadata/labels", json!(null), false),
            ("/metadata/namespace", json!("elsewhere"), false),
            ("/status/podIPs", json!([{"ip": "fd00::1"}]), true),
            ("/status", json!(null), false),
        ] {
            let slices = derive(svc(json!({})), [pod_with("a", 1, &[(path, value.clone())])]);
            assert_eq!(slices.len(), usize::from(counts), "{path} {value}");
        }
    }

    #[test]
    fn which_services_have_derived_slices() {
        for (spec, derived) in [
            (json!({"selector": {}}), false),
            (json!({"selector": null}), false),
            (json!({"type": "ExternalName"}), false),
            (json!({"clusterIP": "None", "clusterIPs": ["None"]}), false),
            (json!({"selector": {"app": "web", "more": "x"}}), true),
            (json!({"selector": {"app": "web", "less": "x"}}), false),
            (json!({"ports": []}), false),
        ] {
            let slices = derive(svc(spec.clone()), [pod_with("a", 1, &[])]);
            assert_eq!(!slices.is_empty(), derived, "{spec}");
        }
    }

    /// E5: a named target port is each Pod's own; S8: absent, 0 and empty mean the Service's port.
    #[test]
    fn e5_target_ports() {
        let named = || {
            svc(json!({"ports": [
                {"name": "web", "port": 80, "targetPort": "web"},
                {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": "web"},
                {"name": "same", "port": 81},
                {"name": "zero", "port": 82, "targetPort": 0},
                {"name": "empty", "port": 83, "targetPort": ""},
            ]}))
        };
        let ports =
            |ports: Value| ("/spec/containers", json!([{"name": "x"}, {"name": "c", "ports": ports}]));
        let tcp = |port: u16| ports(json!([{"name": "web", "containerPort": port}]));
        let sidecar = |policy: &str| {
            let ports = json!([{"name": "web", "containerPort": 9002, "protocol": "TCP"}]);
            ("/spec/initContainers", json!([{"name": "i", "restartPolicy": policy, "ports": ports}]))
        };
        let pods = [
            pod_with("a", 1, &[tcp(9000)]),
            pod_with("b", 2, &[tcp(9001)]),
            pod_with("c", 3, &[ports(json!([{"name": "web", "containerPort": 9003, "protocol": "UDP"}]))]),
            pod_with("d", 4, &[sidecar("Always")]),
            pod_with("e", 5, &[sidecar("Never")]),
            pod_with("f", 6, &[tcp(9000), sidecar("Always")]),
        ];
        let rest = "same:81/TCP,zero:82/TCP,empty:83/TCP";
        let mut slices = derive(named(), pods);
        slices.sort_by_key(|line| line.rsplit("10.1.0.").next().map(str::to_owned));
        let without_name: Vec<_> = slices.iter().map(|l| l.split_once(' ').unwrap().1.to_owned()).collect();
        assert_eq!(
            without_name,
            [
                format!("[web:9001/TCP,{rest}] 10.1.0.2 rs-"),
                format!("[dns:9003/UDP,{rest}] 10.1.0.3 rs-"),
                format!("[web:9002/TCP,{rest}] 10.1.0.4 rs-"),
                format!("[{rest}] 10.1.0.5 rs-"),
                format!("[web:9000/TCP,{rest}] 10.1.0.1 rs-, 10.1.0.6 rs-"),
            ]
        );
    }

    #[test]
    fn only_what_changed_is_reported_and_what_is_new_comes_first() {
        let mut derive = Derive::default();
        let mut all = |f: &mut dyn FnMut(&mut Derive)| {
            f(&mut derive);
            let changes: Vec<_> = derive
                .flush()
                .into_iter()
                .map(|delta| match delta {
                    Delta::Apply(slice) => format!("+{}", show_slice(&slice.unwrap())),
                    Delta::Delete(key) => format!("-{key}"),
                    Delta::List(_) => unreachable!(),
                })
                .collect();
            changes
        };
        let key = |pod: &Pod| pod.key.clone();
        let a = pod_with("a", 1, &[]);
        let other = pod_with("other", 9, &[("/metadata/labels", json!({"app": "other"}))]);
        let v4 = || svc(json!({"ipFamilies": ["IPv4"]}));
        // Pods may come before their Service.
        assert!(all(&mut |d| d.set_pod(&key(&a), Some(a.clone()))).is_empty());
        assert_eq!(all(&mut |d| d.set_service(&web(), v4())), [format!("+{PLAIN}10.1.0.1 rs-")]);
        assert!(all(&mut |d| d.set_service(&web(), v4())).is_empty());
        assert!(all(&mut |d| d.set_pod(&key(&other), Some(other.clone()))).is_empty());
        // A label that makes it match, and one that ends that.
        let joined = pod_with("other", 9, &[]);
        assert_eq!(
            all(&mut |d| d.set_pod(&key(&other), Some(joined.clone()))),
            [format!("+{PLAIN}10.1.0.1 rs-, 10.1.0.9 rs-")]
        );
        assert_eq!(
            all(&mut |d| d.set_pod(&key(&other), Some(other.clone()))),
            [format!("+{PLAIN}10.1.0.1 rs-")]
        );
        // Into the other family: the new slice before the old one goes.
        assert_eq!(
            all(&mut |d| d.set_service(&web(), svc(json!({"ipFamilies": ["IPv6"]})))),
            ["+~derived:web:IPv6:0 [http:8080/TCP] fd00:1::1 rs-", "-ns/~derived:web:IPv4:0"]
        );
        assert_eq!(all(&mut |d| d.set_service(&web(), None)), ["-ns/~derived:web:IPv6:0"]);
        assert!(all(&mut |d| d.set_pod(&key(&a), None)).is_empty());
    }
}
