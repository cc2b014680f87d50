use std::collections::BTreeSet;

use super::*;
use proxy_common::abi::Outcome;
use proxy_common::decide::Sent;

const COOKIE: u64 = 42;

fn send_to(lab: &Lab, cookie: u64, to: Peer) -> Sent {
    let client = || Client { origin: Origin::Pod, key: ClientKey::netns(1) };
    decide::send(&lab.tables, &client, cookie, to)
}

/// Sends one datagram; whether it followed an earlier one, and where it went.
fn send(lab: &Lab, number: u8) -> (bool, Peer) {
    let sent = send_to(lab, COOKIE, vip(number));
    assert!(matches!(sent.outcome, Outcome::SendFollowed | Outcome::SendForwarded), "{sent:?}");
    (sent.outcome == Outcome::SendFollowed, sent.to)
}

fn receive(lab: &Lab, from: Peer) -> Option<Peer> {
    decide::receive(&lab.tables, COOKIE, from)
}

const MANY: [u32; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.plain(1, &MANY);
    lab
}

#[test]
fn b12_one_backend_per_socket_and_vip() {
    let lab = lab();
    let (followed, first) = send(&lab, 1);
    assert!(!followed);
    assert!((0..20).all(|_| send(&lab, 1) == (true, first)));
    // Another socket chooses for itself.
    let others: BTreeSet<String> =
        (100..200).map(|cookie| format!("{:?}", send_to(&lab, cookie, vip(1)))).collect();
    assert_eq!(others.len(), 8);
    assert_eq!(receive(&lab, first), Some(vip(1)));
}

#[test]
fn b12_idle_times() {
    let lab = lab();
    let (_, first) = send(&lab, 1);
    lab.pass_s(29);
    assert!(send(&lab, 1).0, "30 s without an answer");
    lab.pass_s(29);
    assert_eq!(receive(&lab, first), Some(vip(1)));
    lab.pass_s(119);
    assert!(send(&lab, 1).0, "120 s once answered");
    lab.pass_s(119);
    assert_eq!(receive(&lab, first), Some(vip(1)), "an answer counts too");
    lab.pass_s(119);
    assert_eq!(send(&lab, 1), (true, first));
    lab.pass_s(120);
    let (followed, second) = send(&lab, 1);
    assert!(!followed);
    lab.pass_s(30);
    assert!(!send(&lab, 1).0, "the new flow has no answer yet");
    assert_eq!(receive(&lab, second), (send(&lab, 1).1 == second).then(|| vip(1)));
}

/// C2: a flow stays while its endpoint serves, in whatever set.
#[test]
fn c2_a_draining_endpoint_keeps_its_flows_and_a_gone_one_does_not() {
    let mut lab = lab();
    let (_, first) = send(&lab, 1);
    let number = MANY.into_iter().find(|number| at(*number) == first).unwrap();
    let rest: Vec<u32> = MANY.into_iter().filter(|other| *other != number).collect();
    lab.set(1, WhichSet::Cluster, &rest, WhenEmpty::Reject);
    assert_eq!(send(&lab, 1), (true, first));
    lab.state(id(number), BackendState { serving: false, ..SERVING });
    let (followed, second) = send(&lab, 1);
    assert!(!followed && second != first);
    // The same place with another tenant is another endpoint.
    let number = MANY.into_iter().find(|number| at(*number) == second).unwrap();
    lab.state(BackendId::new(number, 2), SERVING);
    assert!(!send(&lab, 1).0);
}

/// C3: a client that was there first gets through when the first endpoint comes.
#[test]
fn c3_too_early_is_not_too_late() {
    let mut lab = Lab::new();
    lab.plain(1, &[]);
    assert_eq!(send_to(&lab, COOKIE, vip(1)), Sent { to: vip(1), outcome: Outcome::SendLeft });
    assert_eq!(
        send_to(&lab, COOKIE, vip(1)),
        Sent { to: vip(1), outcome: Outcome::SendLeft },
        "nothing was remembered"
    );
    lab.set(1, WhichSet::Cluster, &[3], WhenEmpty::Reject);
    assert_eq!(send(&lab, 1), (false, at(3)));
    // Nobody serves any more. New datagrams are refused; the tables are not asked to forget.
    lab.state(id(3), BackendState { cluster: true, local: false, serving: false });
    lab.set(1, WhichSet::Cluster, &[], WhenEmpty::Reject);
    assert_eq!(send_to(&lab, COOKIE, vip(1)), Sent { to: vip(1), outcome: Outcome::SendLeft });
}

/// Only an answer of this flow's endpoint shows the VIP.
#[test]
fn b12_late_and_foreign_answers() {
    let mut lab = Lab::new();
    lab.plain(1, &[1]);
    assert_eq!(receive(&lab, at(1)), None, "nothing was sent");
    send(&lab, 1);
    assert_eq!(receive(&lab, at(2)), None, "somebody else");
    assert_eq!(decide::receive(&lab.tables, COOKIE + 1, at(1)), None, "another socket's");
    lab.set(1, WhichSet::Cluster, &[2], WhenEmpty::Reject);
    lab.vacate(id(1));
    assert_eq!(send(&lab, 1), (false, at(2)));
    assert_eq!(receive(&lab, at(1)), None, "a late answer of the endpoint before");
    assert_eq!(receive(&lab, at(2)), Some(vip(1)));
}

#[test]
fn two_vips_of_one_socket() {
    let mut lab = Lab::new();
    lab.plain(1, &[1]);
    lab.plain(2, &[2]);
    send(&lab, 1);
    send(&lab, 2);
    assert_eq!([1, 2].map(|backend| receive(&lab, at(backend))), [Some(vip(1)), Some(vip(2))]);
    // Both lead to one endpoint: an answer belongs to whoever sent last.
    lab.frontend(3, FrontendValue::new(1, FrontendKind::ExternalIp));
    send(&lab, 3);
    assert_eq!(receive(&lab, at(1)), Some(vip(3)));
    assert_eq!(send(&lab, 1), (true, at(1)));
    assert_eq!(receive(&lab, at(1)), Some(vip(1)));
}

/// The tables are LRUs and forget on their own.
#[test]
fn an_active_flow_gets_its_way_back_again() {
    let lab = lab();
    let (_, first) = send(&lab, 1);
    lab.tables.forget_datagram_origins();
    assert_eq!(receive(&lab, first), None);
    assert_eq!(send(&lab, 1), (true, first));
    assert_eq!(receive(&lab, first), Some(vip(1)));
}

#[test]
fn what_is_for_no_service_is_not_remembered() {
    let lab = lab();
    assert_eq!(send_to(&lab, COOKIE, vip(9)).outcome, Outcome::SendUntouched);
    assert_eq!(receive(&lab, vip(9)), None);
}

/// C2, B12: a flow belongs to the service port that its VIP had; whoever has the VIP now serves the next datagram.
#[test]
fn c2_a_vip_that_moves_to_another_service_takes_its_flows_along() {
    let mut lab = Lab::new();
    lab.plain(1, &[1]);
    lab.plain(2, &[2]);
    assert_eq!(send(&lab, 1), (false, at(1)));
    // The first Service lives on, and its backend serves.
    lab.frontend(1, FrontendValue::new(2, FrontendKind::ExternalIp));
    assert_eq!(send(&lab, 1), (false, at(2)));
    assert_eq!(send(&lab, 1), (true, at(2)));
    assert_eq!(receive(&lab, at(1)), None, "a late answer of the Service before");
    assert_eq!(receive(&lab, at(2)), Some(vip(1)));
}

#[test]
fn a_vip_that_no_service_has_any_more_is_left_alone() {
    let mut lab = Lab::new();
    lab.plain(1, &[1]);
    send(&lab, 1);
    let (address, port) = vip(1);
    lab.write(Write::RemoveFrontend { key: FrontendKey::new(address, port, Protocol::Udp.number()) });
    assert_eq!(send_to(&lab, COOKIE, vip(1)).outcome, Outcome::SendUntouched);
}
