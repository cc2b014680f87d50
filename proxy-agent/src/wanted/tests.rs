use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use proxy_common::abi::FrontendValue;

use super::*;
use crate::model::OwnAddresses;
use crate::object::{Change, Delta, Node, Service, Slice, SliceEndpoint, Unreadable};
use crate::resolve::tests::build::*;
use crate::resolve::{Frontend, Policy, frontend_value};

/// The incremental way and the full way give the same, whatever the order, and only what changed is named.
#[test]
fn an_update_equals_a_full_resolve() {
    let claiming = |name: &str, cluster_ip: &str| {
        let mut service = Service { external_ips: ips(&["203.0.113.1"]), ..service(name) };
        service.cluster_ip.v4 = Some(ip(cluster_ip));
        service
    };
    let (a, b, c) = (claiming("a", "10.96.0.1"), claiming("b", "10.96.0.2"), claiming("c", "10.96.0.3"));
    let b_ready = slice("b-1", "b", vec![endpoint("10.244.2.1")]);
    let steps: Vec<(Change, &[&str])> = vec![
        (Change::Service(Delta::Apply(Ok(a.clone().into()))), &["a"]),
        (Change::Service(Delta::Apply(Ok(b.into()))), &["b"]),
        (Change::Service(Delta::Apply(Ok(c.into()))), &["c"]),
        // S12: b gets an endpoint and with it the external IP.
        (Change::Slice(Delta::Apply(Ok(b_ready.into()))), &["a", "b"]),
        (Change::Service(Delta::Apply(Ok(a.clone().into()))), &[]),
        (Change::Service(Delta::Delete(ObjectKey::new("ns", "b"))), &["a", "b"]),
        (Change::Service(Delta::Delete(ObjectKey::new("ns", "a"))), &["a", "c"]),
    ];
    let mut model = model_with(Policy::default(), Vec::new(), Vec::new());
    let mut wanted = Wanted::default();
    for (step, (change, expected)) in steps.into_iter().enumerate() {
        model.apply(change);
        let dirty = model.take_dirty();
        let changed = wanted.update(&model, &dirty);
        let names: Vec<&str> = changed.keys().map(|key| key.name.as_str()).collect();
        assert_eq!(names, expected, "step {step}");
        let full = Wanted::of(&model);
        assert_eq!(wanted.problems(&model), full.problems(&model), "step {step}");
        for resolved in full.all(&model) {
            assert!(wanted.claims.won(&resolved).eq(full.claims.won(&resolved)), "step {step}");
        }
    }
}

#[test]
fn nothing_is_wanted_before_the_first_update() {
    let model = model_with(Policy::default(), vec![service("a")], Vec::new());
    assert_eq!(Wanted::default().all(&model).count(), 0);
    assert_eq!(Wanted::of(&model).all(&model).count(), 1);
}

#[test]
fn p11_a_change_of_local_detection_names_every_service() {
    let mut model = model_with(Policy::default(), vec![service("a")], Vec::new());
    let mut wanted = Wanted::default();
    let dirty = model.take_dirty();
    wanted.update(&model, &dirty);
    model.apply(Change::Node(Delta::Apply(Ok(Node { pod_cidrs: Vec::new(), ..node() }.into()))));
    let dirty = model.take_dirty();
    assert!(wanted.update(&model, &dirty).keys().eq(&dirty));
    assert_eq!(dirty.len(), 1);
}

/// What a dataplane would hold for one Service.
type Programmed = Vec<(Resolved, Vec<(Frontend, FrontendValue)>)>;

fn program(model: &Model, wanted: &Wanted, resolved: &[Resolved]) -> Programmed {
    let of = |resolved: &Resolved| {
        let value = |frontend: &Frontend| frontend_value(resolved, frontend, model.facts(), 1);
        (
            resolved.clone(),
            wanted.claims().won(resolved).map(|frontend| (*frontend, value(frontend))).collect(),
        )
    };
    resolved.iter().map(of).collect()
}

/// One event of a small cluster in which Services compete for addresses and slices move about.
fn event() -> impl Strategy<Value = Change> {
    let name = prop::sample::select(vec!["a", "b", "c"]);
    let service = (name.clone(), any::<[bool; 5]>(), 0..3u8, prop::option::of(0..3i64)).prop_map(
        |(name, [proxied, internal_local, external_local, external_ip, ported], host, created_s)| {
            let mut service = Service { proxied, internal_local, external_local, created_s, ..service(name) };
            service.cluster_ip.v4 = Some(ip(&format!("10.96.0.{host}")));
            if external_ip {
                service.external_ips = ips(&["203.0.113.1"]);
            }
            if ported {
                service.ports = vec![node_port("", 80, 30080)];
            }
            service
        },
    );
    let endpoint =
        (0..3u8, any::<[bool; 5]>()).prop_map(|(host, [ready, serving, terminating, here, hinted])| {
            let base = endpoint(&format!("10.244.2.{host}"));
            let base = SliceEndpoint { ready, serving, terminating, ..base };
            let base = hinted_zones(if hinted { &["a"] } else { &["b"] }, base);
            on(if here { "n1" } else { "n2" }, base)
        });
    let slice_name = prop::sample::select(vec!["s", "t", "u"]);
    let slice = (slice_name.clone(), name.clone(), prop::collection::vec(endpoint, 0..3))
        .prop_map(|(slice_name, owner, endpoints)| slice(slice_name, owner, endpoints));
    let node = any::<[bool; 2]>().prop_map(|[zone, pod_cidr]| {
        let mut node = node();
        node.zone = zone.then(|| "b".to_owned());
        if pod_cidr {
            node.pod_cidrs.clear();
        }
        node
    });
    let unreadable = |key: ObjectKey| Unreadable {
        problem: Problem { object: key.to_string(), field: String::new(), message: "junk".into() },
        key: Some(key),
    };
    prop_oneof![
        4 => service.clone().prop_map(|service| Change::Service(Delta::Apply(Ok(service.into())))),
        1 => prop::collection::vec(service, 0..3)
            .prop_map(|list| Change::Service(Delta::List(list.into_iter().map(Arc::new).map(Ok).collect()))),
        1 => name.clone().prop_map(|name| Change::Service(Delta::Delete(ObjectKey::new("ns", name)))),
        1 => name.prop_map(move |name| {
            Change::Service(Delta::Apply(Err(unreadable(ObjectKey::new("ns", name)))))
        }),
        6 => slice.clone().prop_map(|slice| Change::Slice(Delta::Apply(Ok(slice.into())))),
        1 => prop::collection::vec(slice, 0..3)
            .prop_map(|list| Change::Slice(Delta::List(list.into_iter().map(Arc::new).map(Ok).collect()))),
        1 => slice_name.prop_map(|name| Change::Slice(Delta::Delete(ObjectKey::new("ns", name)))),
        1 => node.prop_map(|node| Change::Node(Delta::Apply(Ok(node.into())))),
        1 => any::<bool>().prop_map(|more| {
            Change::OwnAddresses(ips(if more { &["192.0.2.1", "192.0.2.2"] } else { &["192.0.2.2"] }))
        }),
    ]
}

/// The objects as one complete list each, as after a restart.
fn restart(changes: &[Change]) -> Model {
    let mut objects: (BTreeMap<ObjectKey, Arc<Service>>, BTreeMap<ObjectKey, Arc<Slice>>) =
        Default::default();
    let mut model = Model::new("n1", Policy::default(), OwnAddresses::Reported);
    fn take<T>(objects: &mut BTreeMap<ObjectKey, Arc<T>>, delta: &Delta<T>, key: impl Fn(&T) -> ObjectKey) {
        match delta {
            Delta::List(reads) => {
                let read = reads.iter().filter_map(|read| read.as_ref().ok());
                *objects = read.map(|object| (key(object), object.clone())).collect();
            }
            Delta::Apply(Ok(object)) => {
                objects.insert(key(object), object.clone());
            }
            Delta::Apply(Err(_)) => {}
            Delta::Delete(key) => {
                objects.remove(key);
            }
        }
    }
    for change in changes {
        match change {
            Change::Service(delta) => take(&mut objects.0, delta, |service| service.key.clone()),
            Change::Slice(delta) => take(&mut objects.1, delta, |slice| slice.key.clone()),
            Change::Node(_) | Change::OwnAddresses(_) | Change::Mended(_) | Change::Following { .. } => {
                model.apply(change.clone())
            }
        }
    }
    model.apply(Change::Slice(Delta::List(objects.1.into_values().map(Ok).collect())));
    model.apply(Change::Service(Delta::List(objects.0.into_values().map(Ok).collect())));
    model
}

proptest! {
    /// After any events in any batches, what was programmed by following the named changes alone is what a restart
    /// computes from scratch.
    #[test]
    fn following_changes_equals_starting_over(batches in prop::collection::vec(prop::collection::vec(event(), 1..4), 1..8)) {
        let mut model = Model::new("n1", Policy::default(), OwnAddresses::Reported);
        let mut wanted = Wanted::default();
        let mut programmed: BTreeMap<ObjectKey, Programmed> = BTreeMap::new();
        for batch in &batches {
            for change in batch {
                model.apply(change.clone());
            }
            let dirty = model.take_dirty();
            for (key, resolved) in wanted.update(&model, &dirty) {
                let program = program(&model, &wanted, &resolved);
                if program.is_empty() {
                    programmed.remove(&key);
                } else {
                    programmed.insert(key, program);
                }
            }
        }
        let fresh = restart(&batches.concat());
        let from_scratch = Wanted::of(&fresh);
        let expected: BTreeMap<ObjectKey, Programmed> = fresh
            .services()
            .map(|key| (key.clone(), program(&fresh, &from_scratch, &from_scratch.service(&fresh, key))))
            .filter(|(_, program)| !program.is_empty())
            .collect();
        prop_assert_eq!(programmed, expected);
        prop_assert_eq!(wanted.problems(&model), from_scratch.problems(&fresh));
    }
}
