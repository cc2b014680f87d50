use super::*;
use std::cell::Cell;

/// P10, P11: who gets which set is the frontend's matter.
#[test]
fn p10_p11_the_set_depends_on_the_origin() {
    let mut lab = Lab::new();
    lab.plain(1, &[1]);
    lab.set(1, WhichSet::Local, &[2], WhenEmpty::Drop);
    let external = FrontendValue::new(1, FrontendKind::NodePort);
    lab.frontend(2, external.with_local_set_for(Origin::Elsewhere));
    let all_local = Origin::ALL.into_iter().fold(external, FrontendValue::with_local_set_for);
    lab.frontend(3, all_local);
    for (origin, expected) in Origin::ALL.into_iter().zip([[1, 1, 2], [1, 1, 2], [1, 2, 2]]) {
        assert_eq!([1, 2, 3].map(|number| lab.reach_from(origin, 1, number)), expected, "{origin:?}");
    }
}

/// Z1, Z2, Z3: an empty set says why it is empty.
#[test]
fn z1_z2_z3_empty_sets() {
    let mut lab = Lab::new();
    lab.plain(1, &[]);
    lab.plain(2, &[1]);
    lab.set(2, WhichSet::Local, &[], WhenEmpty::Drop);
    lab.frontend(3, FrontendValue::new(2, FrontendKind::NodePort).with_local_set_for(Origin::Elsewhere));
    assert_eq!(Origin::ALL.map(|origin| lab.connect(origin, 1)), [Connect::Reject; 3]);
    assert_eq!(lab.connect(Origin::Elsewhere, 3), Connect::Drop);
    assert_eq!(lab.reach(1, 3), 1);
    // Endpoints come: the same record serves at once.
    lab.set(1, WhichSet::Cluster, &[4], WhenEmpty::Reject);
    assert_eq!(lab.reach(1, 1), 4);
}

#[test]
fn what_is_no_frontend_is_left_alone_and_asks_nobody() {
    let mut lab = Lab::new();
    lab.plain(1, &[1]);
    let asked = Cell::new(0);
    let client = || {
        asked.set(asked.get() + 1);
        Client { origin: Origin::Pod, key: ClientKey::netns(1) }
    };
    let (address, port) = vip(1);
    for (to, protocol) in [
        (vip(9), Protocol::Tcp),
        ((address, Port::new(81)), Protocol::Tcp),
        ((address, port), Protocol::Sctp),
    ] {
        assert_eq!(decide::connect(&lab.tables, &client, to, protocol), Connect::Untouched);
    }
    assert_eq!(asked.get(), 0);
    // Nor is anybody asked where all are served alike; once where it matters.
    assert!(matches!(decide::connect(&lab.tables, &client, vip(1), Protocol::Tcp), Connect::Forward { .. }));
    assert_eq!(asked.get(), 0);
    lab.frontend(4, FrontendValue::new(1, FrontendKind::NodePort).with_local_set_for(Origin::Elsewhere));
    assert!(matches!(decide::connect(&lab.tables, &client, vip(4), Protocol::Tcp), Connect::Forward { .. }));
    assert_eq!(asked.get(), 1);
    // A record that is not written yet, or a set that is not used.
    lab.frontend(2, FrontendValue::new(77, FrontendKind::ClusterIp));
    lab.frontend(3, FrontendValue::new(1, FrontendKind::ClusterIp).with_local_set_for(Origin::Pod));
    assert_eq!([2, 3].map(|number| lab.connect(Origin::Pod, number)), [Connect::Untouched; 2]);
}

/// F2: before anything else, "no endpoint" too.
#[test]
fn f2_source_ranges_come_first() {
    let mut lab = Lab::new();
    lab.plain(1, &[1]);
    lab.plain(2, &[]);
    for service in [1, 2] {
        let value = FrontendValue::new(service.into(), FrontendKind::LoadBalancer);
        lab.frontend(service, value.with_source_ranges());
    }
    for origin in Origin::ALL {
        assert_eq!([1, 2].map(|number| lab.connect(origin, number)), [Connect::SourceRanges; 2]);
    }
}

/// The slot says where its backend is: a reader that was on its way when the set was replaced gets there as if it had come
/// before. Slots that are not written mean that the set was replaced long ago: it is read again, but not for ever.
#[test]
fn stale_slots_are_tried_again() {
    for v6 in [false, true] {
        let mut lab = Lab::new();
        lab.v6 = v6;
        lab.plain(1, &[1]);
        lab.vacate(id(1));
        assert_eq!(lab.reach(1, 1), 1);
        // The second slot of the run was never written.
        let bits = SetWord::new(0, 2, WhenEmpty::Reject).bits();
        lab.write(Write::Word { service: 1, word: RecordWord::Cluster, bits });
        let decisions: Vec<Connect> = (0..4000).map(|_| lab.connect(Origin::Pod, 1)).collect();
        let contended = decisions.iter().filter(|decision| **decision == Connect::Contended).count();
        let forwarded = decisions
            .iter()
            .filter(|decision| matches!(decision, Connect::Forward { id: found, .. } if *found == id(1)))
            .count();
        assert_eq!(contended + forwarded, decisions.len());
        // One at a glance and three tries, of one half each: a sixteenth.
        assert!((180..320).contains(&contended), "{contended}");
        let bits = SetWord::new(1000, 5, WhenEmpty::Reject).bits();
        lab.write(Write::Word { service: 1, word: RecordWord::Cluster, bits });
        assert_eq!(lab.connect(Origin::Pod, 1), Connect::Contended);
    }
}

/// P12. The bound is ten standard deviations of chi-square: the seed is fixed, so it holds always or never.
#[test]
fn p12_choice_is_uniform() {
    for count in [1, 2, 3, 7, 1000_u32] {
        let mut lab = Lab::new();
        lab.plain(1, &(1..=count).collect::<Vec<_>>());
        let draws = 40 * u64::from(count).max(50);
        let mut hits: BTreeMap<u32, u64> = BTreeMap::new();
        for client in 0..draws {
            *hits.entry(lab.reach(client, 1)).or_default() += 1;
        }
        assert_eq!(hits.len(), count as usize, "every backend of {count} gets some");
        let expected = draws as f64 / f64::from(count);
        let chi_square: f64 = hits.values().map(|hits| (*hits as f64 - expected).powi(2) / expected).sum();
        let freedom = f64::from(count) - 1.0;
        assert!(chi_square <= freedom + 10.0 * (2.0 * freedom).sqrt(), "{count}: {chi_square}");
    }
}
