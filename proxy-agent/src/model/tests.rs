use super::*;
use crate::object::{PerFamily, Unreadable};
use crate::resolve::tests::build::*;

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("ns", name)
}

fn dirty(model: &mut Model) -> Vec<String> {
    model.take_dirty().into_iter().map(|key| key.name.to_string()).collect()
}

fn apply_service(model: &mut Model, service: Service) {
    model.apply(Change::Service(Delta::Apply(Ok(service.into()))));
}

fn apply_slice(model: &mut Model, slice: Slice) {
    model.apply(Change::Slice(Delta::Apply(Ok(slice.into()))));
}

fn endpoints_of(model: &Model, service: &str) -> Vec<String> {
    let (resolved, _) = model.resolve(&key(service)).unwrap();
    resolved[0].endpoints.iter().map(|view| view.address.to_string()).collect()
}

fn broken(key: Option<ObjectKey>, message: &str) -> Unreadable {
    let problem = Problem { object: "f.yaml".into(), field: String::new(), message: message.into() };
    Unreadable { key, problem }
}

/// Services `a` and `b`, each with one slice, nothing dirty.
fn two() -> Model {
    let mut model = model_with(
        Policy::default(),
        vec![service("a"), service("b")],
        vec![
            slice("a-1", "a", vec![endpoint("10.244.2.1")]),
            slice("b-1", "b", vec![endpoint("10.244.2.2")]),
        ],
    );
    assert_eq!(dirty(&mut model), ["a", "b"]);
    model
}

#[test]
fn q1_ready_only_when_every_list_is_there() {
    let parts: [fn() -> Change; 4] = [
        || Change::Service(Delta::List(Vec::new())),
        || Change::Slice(Delta::List(Vec::new())),
        || Change::Node(Delta::List(Vec::new())),
        || Change::OwnAddresses(Vec::new()),
    ];
    for missing in 0..parts.len() {
        let mut model = Model::new("n1", Policy::default(), OwnAddresses::Reported);
        apply_service(&mut model, service("a"));
        for (_, part) in parts.iter().enumerate().filter(|(i, _)| *i != missing) {
            model.apply(part());
        }
        assert!(!model.ready(), "without part {missing}");
        model.apply(parts[missing]());
        assert!(model.ready());
    }
    let mut offline = Model::new("n1", Policy::default(), OwnAddresses::FromNode);
    for part in &parts[..3] {
        assert!(!offline.ready());
        offline.apply(part());
    }
    assert!(offline.ready());
}

#[test]
fn s11_equal_data_is_no_change() {
    let mut model = two();
    apply_service(&mut model, service("a"));
    apply_slice(&mut model, slice("a-1", "a", vec![endpoint("10.244.2.1")]));
    // Another complaint about a field that is not used anyway.
    let complaint = Problem { object: "Service ns/a".into(), field: "spec.x".into(), message: "odd".into() };
    apply_service(&mut model, Service { problems: vec![complaint.clone()], ..service("a") });
    assert_eq!(dirty(&mut model), [""; 0]);
    assert_eq!(model.problems(), [complaint]);
    model.apply(Change::Service(Delta::List(vec![Ok(service("b").into()), Ok(service("a").into())])));
    assert_eq!(dirty(&mut model), [""; 0]);
    apply_service(&mut model, Service { internal_local: true, ..service("a") });
    assert_eq!(dirty(&mut model), ["a"]);
}

#[test]
fn s1_turning_headless_looks_like_a_delete() {
    let mut model = two();
    apply_service(
        &mut model,
        Service { proxied: false, cluster_ip: PerFamily { v4: None, v6: None }, ..service("a") },
    );
    assert_eq!(dirty(&mut model), ["a"]);
    assert_eq!(model.resolve(&key("a")), Some((vec![], vec![])));
    model.apply(Change::Service(Delta::Delete(key("a"))));
    assert_eq!(dirty(&mut model), ["a"]);
    assert_eq!(model.resolve(&key("a")), None);
}

#[test]
fn e2_a_changed_label_moves_the_slice() {
    let mut model = two();
    apply_slice(&mut model, slice("a-1", "b", vec![endpoint("10.244.2.1")]));
    assert_eq!(dirty(&mut model), ["a", "b"]);
    assert_eq!(endpoints_of(&model, "a"), [""; 0]);
    assert_eq!(endpoints_of(&model, "b"), ["10.244.2.1", "10.244.2.2"]);
    // Away altogether.
    apply_slice(&mut model, Slice { service: Some("".into()), ..slice("a-1", "", Vec::new()) });
    assert_eq!(dirty(&mut model), ["b"]);
    assert_eq!(endpoints_of(&model, "b"), ["10.244.2.2"]);
}

#[test]
fn e2_equal_slice_names_in_two_namespaces() {
    let mut model = two();
    let mut other = slice("a-1", "a", vec![endpoint("10.244.2.9")]);
    other.key.namespace = "other".into();
    apply_slice(&mut model, other);
    assert_eq!(dirty(&mut model), [""; 0]);
    assert_eq!(endpoints_of(&model, "a"), ["10.244.2.1"]);
}

#[test]
fn e3_a_slice_before_and_after_its_service() {
    let mut model = two();
    apply_slice(&mut model, slice("c-1", "c", vec![endpoint("10.244.2.3")]));
    assert_eq!(dirty(&mut model), [""; 0]);
    apply_service(&mut model, service("c"));
    assert_eq!(dirty(&mut model), ["c"]);
    assert_eq!(endpoints_of(&model, "c"), ["10.244.2.3"]);
    model.apply(Change::Service(Delta::Delete(key("c"))));
    apply_service(&mut model, service("c"));
    assert_eq!(endpoints_of(&model, "c"), ["10.244.2.3"]);
}

#[test]
fn e11_a_slice_takes_only_its_own_endpoints_away() {
    let mut model = two();
    apply_slice(&mut model, slice("a-2", "a", vec![endpoint("10.244.2.1"), endpoint("10.244.2.7")]));
    assert_eq!(endpoints_of(&model, "a"), ["10.244.2.1", "10.244.2.7"]);
    model.apply(Change::Slice(Delta::Delete(key("a-1"))));
    assert_eq!(endpoints_of(&model, "a"), ["10.244.2.1", "10.244.2.7"]);
    assert_eq!(dirty(&mut model), ["a"]);
}

#[test]
fn q7_absence_counts_in_a_list_only() {
    let mut model = two();
    model.apply(Change::Slice(Delta::List(vec![Ok(slice("b-1", "b", vec![endpoint("10.244.2.2")]).into())])));
    assert_eq!(dirty(&mut model), ["a"]);
    assert_eq!(endpoints_of(&model, "a"), [""; 0]);
    model.apply(Change::Service(Delta::List(Vec::new())));
    assert_eq!(dirty(&mut model), ["a", "b"]);
    assert_eq!(model.services().count(), 0);
}

#[test]
fn an_unreadable_object_keeps_its_last_good_state() {
    let mut model = two();
    let bad = broken(Some(key("a")), "bad");
    for delta in
        [Delta::Apply(Err(bad.clone())), Delta::List(vec![Err(bad.clone()), Ok(service("b").into())])]
    {
        model.apply(Change::Service(delta));
        assert_eq!(dirty(&mut model), [""; 0]);
        assert_eq!(endpoints_of(&model, "a"), ["10.244.2.1"]);
        assert_eq!(model.problems(), std::slice::from_ref(&bad.problem));
    }
    // A good one takes the complaint away, whatever comes first in the list.
    for reads in [
        vec![Ok(service("a").into()), Ok(service("b").into())],
        vec![Err(bad.clone()), Ok(service("a").into()), Ok(service("b").into())],
    ] {
        model.apply(Change::Service(Delta::List(reads)));
        assert_eq!((dirty(&mut model), model.problems()), (vec![], vec![]));
    }
    // One that was never good is only a complaint.
    model.apply(Change::Service(Delta::Apply(Err(broken(Some(key("new")), "bad")))));
    model.apply(Change::Service(Delta::Apply(Err(broken(None, "binary junk")))));
    assert_eq!(dirty(&mut model), [""; 0]);
    assert_eq!(model.problems().len(), 2);
    // Deleted or no longer listed: the complaint goes with it.
    model.apply(Change::Service(Delta::Delete(key("new"))));
    assert_eq!(model.problems().len(), 1);
    model.apply(Change::Service(Delta::List(vec![Ok(service("a").into()), Ok(service("b").into())])));
    assert_eq!(model.problems(), []);
}

#[test]
fn nameless_junk_has_a_bound() {
    let mut model = two();
    for i in 0..1000 {
        model.apply(Change::Slice(Delta::Apply(Err(broken(None, &i.to_string())))));
    }
    assert_eq!(model.problems().len(), store::MAX_NAMELESS);
}

#[test]
fn an_object_twice_in_one_list_leaves_no_trace_of_the_first() {
    let mut model = two();
    model.apply(Change::Slice(Delta::List(vec![
        Ok(slice("x", "a", vec![endpoint("10.244.2.8")]).into()),
        Ok(slice("x", "b", vec![endpoint("10.244.2.9")]).into()),
    ])));
    assert_eq!(endpoints_of(&model, "a"), [""; 0]);
    assert_eq!(endpoints_of(&model, "b"), ["10.244.2.9"]);
    assert_eq!(dirty(&mut model), ["a", "b"]);
}

#[test]
fn p9_only_the_own_nodes_zone_matters() {
    let mut model = two();
    let apply = |model: &mut Model, node: Node| model.apply(Change::Node(Delta::Apply(Ok(node.into()))));
    apply(&mut model, node());
    apply(&mut model, Node { name: "n2".into(), zone: Some("z".into()), ..node() });
    assert_eq!(dirty(&mut model), [""; 0]);
    apply(&mut model, Node { zone: Some("b".into()), ..node() });
    assert_eq!(dirty(&mut model), ["a", "b"]);
    // Deleted, or missing from a list: the last zone stays.
    model.apply(Change::Node(Delta::Delete(ObjectKey::new("", "n1"))));
    model.apply(Change::Node(Delta::List(Vec::new())));
    assert_eq!(dirty(&mut model), [""; 0]);
    assert_eq!(model.context().node.as_ref().unwrap().zone.as_deref(), Some("b"));
    apply(&mut model, Node { zone: None, ..node() });
    assert_eq!(dirty(&mut model), ["a", "b"]);
    model.apply(Change::Node(Delta::Apply(Err(broken(Some(ObjectKey::new("", "n1")), "bad")))));
    model.apply(Change::Node(Delta::Apply(Err(broken(Some(ObjectKey::new("", "n2")), "not ours")))));
    assert_eq!(model.problems().len(), 1);
    assert!(model.context().node.is_some());
}

#[test]
fn o4_a_node_that_is_not_there_is_said() {
    let mut model = Model::new("n9", Policy::default(), OwnAddresses::FromNode);
    assert_eq!(model.problems(), []);
    model.apply(Change::Node(Delta::List(vec![Ok(node().into())])));
    assert_eq!(model.problems()[0].object, "Node n9");
}

#[test]
fn n4_address_changes_that_matter_mark_all() {
    let mut model = two();
    let report = |model: &mut Model, texts: &[&str]| model.apply(Change::OwnAddresses(ips(texts)));
    // Not the primary one, loopback, the same in another order: no effect.
    report(&mut model, &["2001:db8::1", "192.0.2.77", "192.0.2.1", "127.0.0.1"]);
    assert_eq!(dirty(&mut model), [""; 0]);
    assert!(!model.context().own_addresses.contains(&ip("127.0.0.1")));
    report(&mut model, &["2001:db8::1"]);
    assert_eq!(dirty(&mut model), ["a", "b"]);
    // M1: so does the range that tells pods.
    let node = Node { pod_cidrs: vec![net("10.244.7.0/24")], ..node() };
    model.apply(Change::Node(Delta::Apply(Ok(node.into()))));
    assert_eq!(dirty(&mut model), ["a", "b"]);
}

#[test]
fn offline_the_nodes_addresses_are_the_own_ones() {
    let mut model = Model::new("n1", Policy::default(), OwnAddresses::FromNode);
    model.apply(Change::OwnAddresses(ips(&["198.51.100.1"])));
    model.apply(Change::Node(Delta::List(vec![Ok(node().into())])));
    let own: Vec<String> = model.context().own_addresses.iter().map(ToString::to_string).collect();
    assert_eq!(own, ["192.0.2.1", "2001:db8::1"]);
}
