//! Objects with fields of any type and any value, as a watch brings them and as files hold them: nothing panics, and the
//! good Service beside them stays programmed.

use std::fs;

use proptest::prelude::*;
use proptest::sample::Index;
use proxy_agent::resolve::Policy;
use proxy_agent::source::files;
use serde_json::{Value, json};

use crate::engine::Engine;
use crate::objects::{Id, Objects, change, complete};

/// The Service beside them, and its endpoints.
fn good() -> [Value; 2] {
    [
        json!({"kind": "Service", "metadata": {"name": "good"}, "spec": {
            "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ipFamilies": ["IPv4"],
            "sessionAffinity": "ClientIP", "ports": [{"name": "http", "port": 80}],
        }}),
        json!({"kind": "EndpointSlice", "metadata": {
            "name": "good-1", "labels": {"kubernetes.io/service-name": "good"},
        }, "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}], "endpoints": [
            {"addresses": ["10.244.1.1"]}, {"addresses": ["10.244.1.2"]},
        ]}),
    ]
    .map(complete)
}

/// Objects that use every field that is read.
fn victims() -> [Value; 5] {
    [
        json!({"kind": "Service", "metadata": {
            "name": "victim", "creationTimestamp": "2026-01-01T00:00:00Z", "labels": {"a": "b"},
        }, "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00:96::9"],
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "PreferDualStack",
            "externalIPs": ["203.0.113.9", "2001:db8:f::9"], "selector": {"app": "victim"},
            "loadBalancerSourceRanges": ["198.51.100.0/24"], "healthCheckNodePort": 32000,
            "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local",
            "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
            "ports": [
                {"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080, "targetPort": "web"},
                {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053, "targetPort": 53},
            ],
        }, "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.10", "ipMode": "VIP"}, {"hostname": "x"}]}}}),
        json!({"kind": "EndpointSlice", "metadata": {
            "name": "victim-1", "labels": {"kubernetes.io/service-name": "victim"},
        }, "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}],
        "endpoints": [
            {"addresses": ["10.244.1.9"], "nodeName": "n1", "zone": "a",
             "conditions": {"ready": true, "serving": true, "terminating": false},
             "hints": {"forZones": [{"name": "a"}], "forNodes": [{"name": "n1"}]}},
            {"addresses": ["10.244.2.9"], "conditions": {"ready": false, "serving": true, "terminating": true}},
        ]}),
        json!({"kind": "EndpointSlice", "metadata": {
            "name": "victim-2", "labels": {"kubernetes.io/service-name": "victim"},
        }, "addressType": "IPv6", "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": ["fd00:244::9"]}]}),
        json!({"kind": "Node", "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "a"}},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:244:1::/64"]},
        "status": {"addresses": [
            {"type": "InternalIP", "address": "192.0.2.1"}, {"type": "ExternalIP", "address": "2001:db8::1"},
        ]}}),
        json!({"kind": "Pod", "metadata": {"name": "pod", "labels": {"app": "victim"},
            "deletionTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"nodeName": "n1", "hostNetwork": false, "containers": [
            {"name": "c", "ports": [{"name": "web", "containerPort": 8080, "protocol": "TCP"}]},
        ]},
        "status": {"phase": "Running", "podIP": "10.244.1.10", "podIPs": [{"ip": "10.244.1.10"}],
            "conditions": [{"type": "Ready", "status": "True"}]}}),
    ]
    .map(complete)
}

fn text() -> impl Strategy<Value = Value> {
    let texts = prop::sample::select(vec![
        "",
        " ",
        "None",
        "0",
        "-1",
        "true",
        "Local",
        "ClientIP",
        "ExternalName",
        "SCTP",
        "tcp",
        "IPv6",
        "FQDN",
        "0.0.0.0",
        "::",
        "127.0.0.1",
        "::1",
        "ff02::1",
        "224.0.0.1",
        "255.255.255.255",
        "169.254.0.1",
        "10.96.0.256",
        "010.096.000.009",
        "::ffff:10.96.0.9",
        "fd00:96::9%eth0",
        "10.0.0.0/0",
        "::/0",
        "10.0.0.0/33",
        "2026-99-99T99:99:99Z",
        "9999-12-31T23:59:59.999999999Z",
        "-0001-01-01T00:00:00Z",
        "\u{0}",
        "\u{202e}",
        "a/b/c",
        "..",
        "\u{1f980}",
        "&anchor",
        "*alias",
        "{{}}",
    ]);
    prop_oneof![
        8 => texts.prop_map(|text| json!(text)),
        1 => any::<String>().prop_map(Value::from),
        1 => Just(json!("x".repeat(70_000))),
    ]
}

fn number() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        json!(0),
        json!(-1),
        json!(1),
        json!(65_535),
        json!(65_536),
        json!(i32::MAX),
        json!(i32::MIN),
        json!(i64::MAX),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(0.5),
        json!(1e308),
        json!(-0.0),
    ])
}

/// What may stand in for any field.
fn absurd() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![4 => text(), 4 => number(), 1 => Just(Value::Null), 1 => any::<bool>().prop_map(Value::from)];
    leaf.prop_recursive(3, 12, 4, |inner| {
        let key = prop::sample::select(vec!["name", "ip", "port", "clusterIP", "x", ""]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key.prop_map(str::to_owned), inner, 0..3)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

#[derive(Clone, Debug)]
enum Damage {
    /// By a value of the same type, which decodes, or nearly; it stays for the next blows.
    Absurd {
        text: Value,
        number: Value,
    },
    Replace(Value),
    Remove,
    /// Lists become long ones of equals.
    Repeat(usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        12 => (text(), number()).prop_map(|(text, number)| Damage::Absurd { text, number }),
        4 => absurd().prop_map(Damage::Replace),
        2 => Just(Damage::Remove),
        1 => (2..300_usize).prop_map(Damage::Repeat),
    ]
}

/// All places in an object but those that say which object it is.
fn places(value: &Value, at: &str, out: &mut Vec<String>) {
    if !matches!(at, "" | "/kind" | "/apiVersion" | "/metadata" | "/metadata/name" | "/metadata/namespace") {
        out.push(at.to_owned());
    }
    match value {
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(index, item)| places(item, &format!("{at}/{index}"), out));
        }
        Value::Object(fields) => fields.iter().for_each(|(key, field)| {
            let key = key.replace('~', "~0").replace('/', "~1");
            places(field, &format!("{at}/{key}"), out);
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn mangle(object: &mut Value, place: Index, damage: &Damage) {
    let mut all = Vec::new();
    places(object, "", &mut all);
    let leaf = |at: &String| object.pointer(at).is_some_and(|value| !value.is_object() && !value.is_array());
    match damage {
        Damage::Absurd { .. } => all.retain(leaf),
        Damage::Repeat(_) => all.retain(|at| object.pointer(at).is_some_and(Value::is_array)),
        Damage::Replace(_) | Damage::Remove => {}
    }
    if all.is_empty() {
        return;
    }
    let Some(field) = object.pointer_mut(&all[place.index(all.len())]) else { return };
    match (damage, field) {
        (Damage::Absurd { number, .. }, field @ Value::Number(_)) => *field = number.clone(),
        (Damage::Absurd { .. }, Value::Bool(flag)) => *flag = !*flag,
        (Damage::Absurd { text, .. }, field) => *field = text.clone(),
        (Damage::Replace(value), field) => *field = value.clone(),
        (Damage::Remove, field) => *field = Value::Null,
        (Damage::Repeat(times), Value::Array(items)) => {
            *items = items.iter().cycle().take(items.len() * times).cloned().collect();
        }
        (Damage::Repeat(_), _) => {}
    }
}

fn of_the_good_one(engine: &Engine) -> Vec<String> {
    engine.dump().into_iter().filter(|line| line.starts_with("default/good:")).collect()
}

/// Few enough cases for a test that runs all the time; `PROPTEST_CASES` asks for more.
fn config() -> ProptestConfig {
    let default = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_some() {
        default
    } else {
        ProptestConfig { cases: 96, ..default }
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn bad_objects_hurt_nobody_else(
        blows in prop::collection::vec((0..5_usize, any::<Index>(), damage()), 1..12),
        junk in prop::collection::vec(any::<u8>(), 0..200),
        cut in any::<Index>(),
    ) {
        let mut objects = Objects::default();
        let mut engine = Engine::new(Policy::default());
        let mut victims = victims();
        for object in good().into_iter().chain(victims.clone()) {
            let event = (Id::of(&object), Some(object));
            objects.apply(&event);
            if event.0.0 != "Pod" {
                engine.take([change(&event)]);
            }
        }
        engine.sync();
        let expected = of_the_good_one(&engine);
        prop_assert_eq!(expected.len(), 4, "frontend, two endpoints, affinity");
        for (victim, place, damage) in &blows {
            let mut mangled = victims[*victim].clone();
            mangle(&mut mangled, *place, damage);
            if matches!(damage, Damage::Absurd { .. }) {
                victims[*victim] = mangled.clone();
            }
            let event = (Id::of(&mangled), Some(mangled));
            objects.apply(&event);
            if event.0.0 != "Pod" {
                engine.take([change(&event)]);
            }
            let report = engine.sync();
            prop_assert!(report.failed.is_empty(), "{:?}", report);
            prop_assert_eq!(&of_the_good_one(&engine), &expected);
        }
        engine.explain_all();

        let directory = tempfile::tempdir().unwrap();
        objects.write(directory.path());
        fs::write(directory.path().join("junk.yaml"), &junk).unwrap();
        let text = serde_json::to_string_pretty(&victims[0]).unwrap();
        fs::write(directory.path().join("cut.yaml"), &text.as_bytes()[..cut.index(text.len())]).unwrap();
        let mut fresh = Engine::new(Policy::default());
        fresh.take(files::load(directory.path()).unwrap());
        let report = fresh.sync();
        prop_assert!(report.failed.is_empty(), "{:?}", report);
        prop_assert_eq!(of_the_good_one(&fresh), expected);
        fresh.explain_all();
    }
}
