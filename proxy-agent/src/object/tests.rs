//! Rules of semantics.md as they show in what is read of an object.

use serde_json::{Value, json};

use super::*;

fn read<T: Readable>(object: Value) -> T {
    serde_json::from_value::<Reading<T>>(object).unwrap().content.unwrap()
}

/// A Service with these fields of its spec in place of the usual ones.
fn svc(spec: Value) -> Service {
    svc_with_status(spec, Value::Null)
}

fn svc_with_status(spec: Value, status: Value) -> Service {
    let mut full = json!({
        "type": "ClusterIP",
        "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00::7"], "ipFamilies": ["IPv4", "IPv6"],
        "ports": [{"name": "http", "port": 80}],
    });
    for (field, value) in spec.as_object().unwrap() {
        full[field] = value.clone();
    }
    let object = json!({
        "metadata": {"namespace": "ns", "name": "a", "creationTimestamp": "1970-01-01T00:01:40Z"},
        "spec": full, "status": status,
    });
    read(object)
}

fn slice_of(fields: Value) -> Slice {
    let mut full = json!({
        "metadata": {"namespace": "ns", "name": "a-1", "labels": {"kubernetes.io/service-name": "a"}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}], "endpoints": [],
    });
    for (field, value) in fields.as_object().unwrap() {
        full[field] = value.clone();
    }
    read(full)
}

fn strings(list: impl IntoIterator<Item = impl ToString>) -> Vec<String> {
    list.into_iter().map(|item| item.to_string()).collect()
}

fn fields(problems: &[Problem]) -> Vec<&str> {
    problems.iter().map(|p| p.field.as_str()).collect()
}

#[test]
fn a_plain_service_has_no_problems() {
    let s = svc(json!({}));
    assert!(s.problems.is_empty(), "{:?}", s.problems);
    assert_eq!((s.key.to_string(), s.created_s, s.proxied), ("ns/a".into(), Some(100), true));
    assert_eq!(strings(s.cluster_ip.v4.iter().chain(&s.cluster_ip.v6)), ["10.96.0.7", "fd00::7"]);
    assert_eq!(
        s.ports,
        [ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80, node_port: None }]
    );
}

/// S1, S2: nothing else of such a Service is read.
#[test]
fn s1_s2_what_is_not_proxied() {
    for (spec, proxied) in [
        (json!({"clusterIP": "None", "clusterIPs": ["None"]}), false),
        (json!({"clusterIP": ""}), false),
        (json!({"clusterIP": null}), false),
        (json!({"type": "ExternalName"}), false),
        (
            json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "healthCheckNodePort": 1}),
            true,
        ),
    ] {
        let mut spec = spec;
        spec["externalIPs"] = json!(["bad"]);
        let s = svc(spec.clone());
        assert_eq!(s.proxied, proxied, "{spec}");
        assert_eq!(s.problems.is_empty(), !proxied, "{spec}");
        assert_eq!(s.ports.is_empty(), !proxied, "{spec}");
    }
}

/// S4, S5: each family on its own.
#[test]
fn s4_s5_cluster_ip_of_each_family() {
    for (spec, v4, v6, problems) in [
        (
            json!({"ipFamilies": ["IPv6", "IPv4"], "clusterIPs": ["fd00::1", "10.0.0.1"]}),
            "10.0.0.1",
            "fd00::1",
            0,
        ),
        (
            json!({"ipFamilies": ["IPv6"], "clusterIPs": ["fd00::1"], "clusterIP": "fd00::1"}),
            "-",
            "fd00::1",
            0,
        ),
        // Without families the one address counts, and clusterIPs are not read.
        (
            json!({"ipFamilies": [], "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"]}),
            "10.0.0.1",
            "-",
            0,
        ),
        (json!({"ipFamilies": null, "clusterIP": "fd00::1"}), "-", "fd00::1", 0),
        (json!({"ipFamilies": ["IPv4"], "clusterIPs": []}), "-", "-", 1),
        (json!({"ipFamilies": ["IPv4", "IPv6"], "clusterIPs": ["bad", "fd00::1"]}), "-", "fd00::1", 1),
        (json!({"ipFamilies": ["IPv4", "IPv5"], "clusterIPs": ["010.0.0.001", "1"]}), "10.0.0.1", "-", 1),
        // Of the other family than said.
        (json!({"ipFamilies": ["IPv6"], "clusterIPs": ["::ffff:10.0.0.1"]}), "-", "-", 1),
        // Never a wildcard.
        (json!({"ipFamilies": ["IPv4"], "clusterIPs": ["0.0.0.0"]}), "-", "-", 1),
    ] {
        let s = svc(spec.clone());
        let show = |ip: Option<std::net::IpAddr>| ip.map_or_else(|| "-".into(), |ip| ip.to_string());
        assert_eq!((show(s.cluster_ip.v4).as_str(), show(s.cluster_ip.v6).as_str()), (v4, v6), "{spec}");
        assert_eq!(s.problems.len(), problems, "{spec} {:?}", s.problems);
        assert!(s.proxied, "{spec}");
    }
}

/// S7, S8, S10: ports; those that are none are left out and named, the others stay.
#[test]
fn s7_s8_s10_ports() {
    let s = svc(json!({"ports": [
        {"port": 53, "protocol": "UDP", "nodePort": 30053, "targetPort": "dns"},
        {"name": "a", "port": 0},
        {"name": "b", "port": 65536},
        {"name": "c", "port": -1},
        {"name": "d", "port": 1, "protocol": "ICMP"},
        {"name": "e", "port": 65535, "protocol": "", "nodePort": 0},
        {"name": "f", "port": 2, "protocol": "SCTP", "nodePort": 70000},
        {"name": "e", "port": 3, "protocol": "TCP"},
        {"name": "e", "port": 3, "protocol": "UDP"},
        {"name": "g"},
    ]}));
    let ports: Vec<_> = s
        .ports
        .iter()
        .map(|p| format!("{}:{}/{}:{}", p.name, p.port, p.protocol.name(), p.node_port.unwrap_or(0)))
        .collect();
    assert_eq!(ports, [":53/UDP:30053", "e:3/TCP:0", "f:2/SCTP:0", "e:3/UDP:0"]);
    assert_eq!(
        fields(&s.problems),
        [
            "spec.ports[1].port",
            "spec.ports[2].port",
            "spec.ports[3].port",
            "spec.ports[4].protocol",
            "spec.ports[6].nodePort",
            "spec.ports[7].name",
            "spec.ports[9].port"
        ]
    );
    assert_eq!(s.problems[2].message, "-1 is not within 1-65535; the port is left out");
    assert!(svc(json!({"ports": null})).ports.is_empty());
}

/// S5, X1, X6, X7: external IPs.
#[test]
fn x1_x6_x7_external_ips() {
    let s = svc(json!({"externalIPs": [
        "192.0.2.1", "", "bad", "192.000.2.1", "0.0.0.0", "127.0.0.1", "::1", "224.0.0.1", "fe80::1", "2001:DB8::1",
    ]}));
    assert_eq!(strings(&s.external_ips), ["192.0.2.1", "2001:db8::1"]);
    let indices: Vec<_> = [2, 4, 5, 6, 7, 8].iter().map(|i| format!("spec.externalIPs[{i}]")).collect();
    assert_eq!(fields(&s.problems), indices);
}

/// S10, X2, X6, X7: load-balancer IPs count whatever the type.
#[test]
fn x2_x7_load_balancer_ips() {
    let s = svc_with_status(
        json!({}),
        json!({"loadBalancer": {"ingress": [
            {"ip": "192.0.2.1"},
            {"ip": "192.0.2.2", "ipMode": "VIP"},
            {"ip": "192.0.2.3", "ipMode": "Proxy"},
            {"ip": "192.0.2.4", "ipMode": "Weird"},
            {"hostname": "lb.example"},
            {"ip": "::ffff:192.0.2.1"},
            {"ip": "0.0.0.0"},
            {"ip": "x"},
            {"ip": "169.254.0.1"},
        ]}}),
    );
    assert_eq!(strings(&s.load_balancer_ips), ["192.0.2.1", "192.0.2.2", "169.254.0.1"]);
    assert_eq!(
        fields(&s.problems),
        [
            "status.loadBalancer.ingress[3].ipMode",
            "status.loadBalancer.ingress[6].ip",
            "status.loadBalancer.ingress[7].ip"
        ]
    );
}

/// F5, F6, S6: ranges, and a warning where a family or all of the Service stays open.
#[test]
fn f5_f6_source_ranges() {
    for (ranges, want, problems) in [
        (json!([]), vec![], vec![]),
        (json!(null), vec![], vec![]),
        (json!(["", " "]), vec![], vec![]),
        (json!([" 10.0.0.1/8 ", "fd00::/8"]), vec!["10.0.0.0/8", "fd00::/8"], vec![]),
        (json!(["0.0.0.0/0", "::/0"]), vec!["0.0.0.0/0", "::/0"], vec![]),
        (
            json!(["10.0.0.0/8", "10.0.0.1", "10.1.0.0/8"]),
            vec!["10.0.0.0/8"],
            vec![
                "spec.loadBalancerSourceRanges[1]: \"10.0.0.1\" is not a CIDR; ignored",
                "spec.loadBalancerSourceRanges: no IPv6 range: the IPv6 load-balancer IPs are open to all",
            ],
        ),
        (
            json!(["bad"]),
            vec![],
            vec![
                "spec.loadBalancerSourceRanges[0]: \"bad\" is not a CIDR; ignored",
                "spec.loadBalancerSourceRanges: no range can be used: the load-balancer IPs are open to all",
            ],
        ),
    ] {
        let s = svc(json!({"loadBalancerSourceRanges": ranges}));
        assert_eq!(strings(&s.source_ranges), want);
        let said: Vec<_> = s.problems.iter().map(|p| format!("{}: {}", p.field, p.message)).collect();
        assert_eq!(said, problems);
    }
    // The other family is not served: nothing is open.
    let s = svc(json!({"ipFamilies": ["IPv4"], "loadBalancerSourceRanges": ["10.0.0.0/8"]}));
    assert!(s.problems.is_empty());
}

/// P1: when externalTrafficPolicy counts, and what is not Local is Cluster.
#[test]
fn p1_traffic_policies() {
    for (spec, internal, external, problems) in [
        (json!({}), false, false, 0),
        (json!({"internalTrafficPolicy": "Local"}), true, false, 0),
        (json!({"internalTrafficPolicy": "Cluster", "externalTrafficPolicy": "Cluster"}), false, false, 0),
        (json!({"externalTrafficPolicy": "Local"}), false, false, 0),
        (json!({"externalTrafficPolicy": "Local", "type": "NodePort"}), false, true, 0),
        (
            json!({"externalTrafficPolicy": "Local", "type": "LoadBalancer", "healthCheckNodePort": 3}),
            false,
            true,
            0,
        ),
        (json!({"externalTrafficPolicy": "Local", "externalIPs": ["192.0.2.1"]}), false, true, 0),
        (json!({"externalTrafficPolicy": "Local", "externalIPs": []}), false, false, 0),
        // Counts even if none of them can be used.
        (json!({"externalTrafficPolicy": "Local", "externalIPs": ["bad"]}), false, true, 1),
        (json!({"externalTrafficPolicy": "Weird", "type": "NodePort"}), false, false, 1),
        (json!({"internalTrafficPolicy": "local"}), false, false, 1),
        (json!({"type": "Weird", "externalTrafficPolicy": "Local"}), false, false, 1),
    ] {
        let s = svc(spec.clone());
        assert_eq!((s.internal_local, s.external_local), (internal, external), "{spec}");
        assert_eq!(s.problems.len(), problems, "{spec} {:?}", s.problems);
    }
}

/// A1: default, bounds.
#[test]
fn a1_affinity_timeout() {
    for (affinity, timeout, want, problems) in [
        (json!(null), json!(7), None, 0),
        (json!("None"), json!(7), None, 0),
        (json!("ClientIP"), json!(null), Some(10_800), 0),
        (json!("ClientIP"), json!(1), Some(1), 0),
        (json!("ClientIP"), json!(86_400), Some(86_400), 0),
        (json!("ClientIP"), json!(86_401), Some(86_400), 1),
        (json!("ClientIP"), json!(0), Some(10_800), 1),
        (json!("ClientIP"), json!(-5), Some(10_800), 1),
        (json!("Cookie"), json!(7), None, 1),
    ] {
        let s = svc(
            json!({"sessionAffinity": affinity, "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": timeout}}}),
        );
        assert_eq!(s.affinity_timeout_s, want, "{affinity} {timeout}");
        assert_eq!(s.problems.len(), problems, "{affinity} {timeout}");
    }
    assert_eq!(svc(json!({"sessionAffinity": "ClientIP"})).affinity_timeout_s, Some(10_800));
}

/// H1: where a health check port means something.
#[test]
fn h1_health_check_node_port() {
    for (kind, policy, port, want, problems) in [
        ("LoadBalancer", "Local", 32_000, Some(32_000), 0),
        ("LoadBalancer", "Local", 0, None, 1),
        ("LoadBalancer", "Local", 70_000, None, 1),
        ("LoadBalancer", "Cluster", 32_000, None, 0),
        ("NodePort", "Local", 32_000, None, 0),
        ("ClusterIP", "Local", 32_000, None, 0),
    ] {
        let s = svc(json!({"type": kind, "externalTrafficPolicy": policy, "healthCheckNodePort": port}));
        assert_eq!(s.health_check_node_port, want, "{kind} {policy} {port}");
        assert_eq!(s.problems.len(), problems, "{kind} {policy} {port}");
    }
}

/// E1, E2: which slices count, and for which Service.
#[test]
fn e1_e2_family_and_service() {
    for (kind, want, problems) in [
        ("IPv4", Some(Family::V4), 0),
        ("IPv6", Some(Family::V6), 0),
        ("FQDN", None, 0),
        ("IPv5", None, 1),
        ("", None, 1),
    ] {
        let s = slice_of(json!({"addressType": kind, "endpoints": [{"addresses": []}]}));
        assert_eq!(s.family, want, "{kind}");
        // What is in an ignored slice cannot be wrong.
        assert_eq!(s.problems.len(), if want.is_some() { 1 } else { problems }, "{kind}");
        assert!(s.endpoints.is_empty());
    }
    for (labels, want) in [
        (
            json!({"kubernetes.io/service-name": "x", "endpointslice.kubernetes.io/managed-by": "me"}),
            Some("x"),
        ),
        (json!({"kubernetes.io/service-name": ""}), None),
        (json!({}), None),
        (json!(null), None),
    ] {
        let s = slice_of(json!({"metadata": {"namespace": "ns", "name": "s", "labels": labels}}));
        assert_eq!(s.service.as_deref(), want);
    }
}

/// E4: a port needs a name, though it may be empty, and a number.
#[test]
fn e4_slice_ports() {
    let s = slice_of(json!({"ports": [
        {"name": "", "port": 1}, {"port": 2}, {"name": "a"}, {"name": "b", "port": 0}, {"name": "c", "port": 65536},
        {"name": "d", "port": 3, "protocol": "UDP"}, {"name": "e", "port": 4, "protocol": "ICMP"},
        {"name": "d", "port": 3, "protocol": "UDP"}, {"name": "d", "port": 5, "protocol": "UDP"},
    ]}));
    let ports: Vec<_> =
        s.ports.iter().map(|p| format!("{}:{}/{}", p.name, p.port, p.protocol.name())).collect();
    assert_eq!(ports, [":1/TCP", "d:3/UDP", "d:5/UDP"]);
    assert_eq!(fields(&s.problems), ["ports[4].port", "ports[6].protocol"]);
    assert!(slice_of(json!({"ports": null})).ports.is_empty());
}

/// E6, E12: the first address counts, if it can be an endpoint's.
#[test]
fn e6_e12_endpoint_addresses() {
    let s = slice_of(json!({"endpoints": [
        {"addresses": ["010.1.0.1", "10.1.0.2"]}, {"addresses": []}, {"addresses": ["bad", "10.1.0.3"]},
        {"addresses": ["fd00::1"]}, {"addresses": ["127.0.0.1"]}, {"addresses": ["0.0.0.0"]},
        {"addresses": ["169.254.0.1"]}, {"addresses": ["224.0.0.1"]}, {"addresses": ["8.8.8.8"]}, {},
    ]}));
    assert_eq!(strings(s.endpoints.iter().map(|e| e.address)), ["10.1.0.1", "8.8.8.8"]);
    assert_eq!(s.problems.len(), 8);
    assert_eq!(s.problems[0].object, "EndpointSlice ns/a-1");
    assert_eq!(
        s.problems[2].message,
        "fd00::1 is not of the slice's addressType IPv4; the endpoint is ignored"
    );
    let s = slice_of(json!({"addressType": "IPv6", "endpoints": [{"addresses": ["::ffff:10.0.0.1"]}]}));
    assert!(s.endpoints.is_empty());
}

/// E7, E8: defaults of conditions; an empty node name is none.
#[test]
fn e7_e8_conditions_and_node() {
    let s = slice_of(json!({"endpoints": [
        {"addresses": ["10.1.0.1"]},
        {"addresses": ["10.1.0.2"], "conditions": {"ready": false}, "nodeName": "", "zone": ""},
        {"addresses": ["10.1.0.3"], "conditions": {"ready": false, "serving": false, "terminating": true},
         "nodeName": "n1", "zone": "a", "hints": {"forZones": [{"name": "a"}, {"name": "b"}], "forNodes": [{"name": "n1"}]}},
    ]}));
    let show: Vec<_> = s.endpoints.iter().map(|e| (e.ready, e.serving, e.terminating)).collect();
    // serving does not follow ready.
    assert_eq!(show, [(true, true, false), (false, true, false), (false, false, true)]);
    assert_eq!((s.endpoints[1].node.clone(), s.endpoints[1].zone.clone()), (None, None));
    let last = &s.endpoints[2];
    assert_eq!((last.node.as_deref(), last.zone.as_deref()), (Some("n1"), Some("a")));
    assert_eq!(
        (strings(last.zone_hints()).join(","), strings(last.node_hints()).join(",")),
        ("a,b".into(), "n1".into())
    );
}

/// P7, N2, M1: what is read of a Node.
#[test]
fn p7_n2_m1_node() {
    let n: Node = read(json!({
        "metadata": {"name": "n1", "namespace": "odd", "labels": {"topology.kubernetes.io/zone": "a"}},
        "spec": {"podCIDR": "10.9.0.0/24", "podCIDRs": ["10.1.0.1/24", "bad", "fd00::/64"]},
        "status": {"addresses": [
            {"type": "Hostname", "address": "n1"}, {"type": "ExternalIP", "address": "192.0.2.1"},
            {"type": "InternalIP", "address": "010.0.0.1"}, {"type": "InternalIP", "address": "fd00::1"},
            {"type": "InternalIP", "address": "x"}, {"type": "ExternalIP", "address": "10.0.0.1"},
        ]},
    }));
    assert_eq!((n.name.as_str(), n.zone.as_deref()), ("n1", Some("a")));
    assert_eq!(strings(&n.addresses), ["10.0.0.1", "fd00::1", "192.0.2.1"]);
    assert_eq!(strings(&n.pod_cidrs), ["10.1.0.0/24", "fd00::/64"]);
    assert_eq!(fields(&n.problems), ["status.addresses[4].address", "spec.podCIDRs[1]"]);
    assert_eq!(n.problems[0].object, "Node n1");
    let n: Node = read(
        json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": ""}}, "spec": {"podCIDR": "10.9.0.0/24"}}),
    );
    assert_eq!((n.zone, strings(&n.pod_cidrs)), (None, vec!["10.9.0.0/24".into()]));
}
