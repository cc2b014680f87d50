//! Which packets make flows, keep to them and end them.

use super::*;

fn syn(from: SocketAddr, to: SocketAddr) -> Build {
    build(tcp(SYN), from, to)
}

/// Only a first packet makes a flow.
#[test]
fn tcp_without_a_syn_and_a_flow_is_left_alone() {
    both(|v6| {
        let node = Node::new(v6);
        for flags in [ACK, SYN | ACK, FIN | ACK, RST, RST | ACK, SYN | FIN, SYN | RST, 0] {
            node.leaves_alone(&build(tcp(flags), node.pod(40_000), node.vip(1)));
            assert_eq!(node.maps.counted(), [("packet_untouched", 2)], "{flags}");
        }
        assert!(node.maps.young.all().is_empty());
    });
}

/// P12: one choice for a connection, not for a packet. A SYN that is sent again is the same connection.
#[test]
fn p12_a_connection_stays_with_its_backend() {
    both(|v6| {
        let mut node = Node::new(v6);
        node.maps.lab.plain(1, &[1, 2, 3, 4, 5, 6, 7, 8]);
        let (pod, vip) = (node.pod(40_000), node.vip(1));
        let first = node.reaches(&syn(pod, vip));
        for flags in [SYN, ACK, SYN, FIN | ACK, SYN] {
            assert_eq!(node.reaches(&build(tcp(flags), pod, vip)), first);
        }
        // Z8: even when its backend is in no set any more.
        let rest: Vec<u32> = (1..=8).filter(|n| node.backend(*n) != first).collect();
        node.maps.lab.set(1, WhichSet::Cluster, &rest, WhenEmpty::Reject);
        for flags in [SYN, ACK] {
            assert_eq!(node.reaches(&build(tcp(flags), pod, vip)), first);
        }
        node.maps.lab.set(1, WhichSet::Cluster, &[], WhenEmpty::Reject);
        assert_eq!(node.reaches(&build(tcp(ACK), pod, vip)), first);
        // P12: others choose for themselves.
        node.maps.lab.set(1, WhichSet::Cluster, &[1, 2, 3, 4, 5, 6, 7, 8], WhenEmpty::Reject);
        let others: std::collections::BTreeSet<SocketAddr> =
            (0..100).map(|port| node.reaches(&syn(node.pod(port + 1), vip))).collect();
        assert_eq!(others.len(), 8);
    });
}

/// Moves Service 1 from backend 1 to backend 2; who is connected to 1 stays there.
fn move_on(node: &mut Node) {
    node.maps.lab.set(1, WhichSet::Cluster, &[2], WhenEmpty::Reject);
}

/// A client's port is used again after both sides have ended the connection, or either has cut it.
#[test]
fn a_port_that_is_used_again_is_a_new_connection() {
    both(|v6| {
        let ends: [&[(bool, u8)]; 4] = [
            &[(true, FIN | ACK), (false, FIN | ACK)],
            &[(false, FIN | ACK), (true, FIN | ACK)],
            &[(true, RST)],
            &[(false, RST | ACK)],
        ];
        for (number, ends) in ends.into_iter().enumerate() {
            for answered in [false, true] {
                let mut node = Node::new(v6);
                let (pod, vip, old) = (node.pod(40_000), node.vip(1), node.backend(1));
                node.translates(&syn(pod, vip), (pod, old), (pod, old));
                if answered {
                    node.translates(&build(tcp(SYN | ACK), old, pod), (old, pod), (vip, pod));
                }
                move_on(&mut node);
                // Who has not said yes does not end it: that is somebody else's answer (M11).
                if !answered && ends.iter().any(|(_, flags)| flags & FIN != 0) {
                    continue;
                }
                for (from_client, flags) in ends {
                    assert_eq!(node.reaches(&syn(pod, vip)), old, "not over yet: {number}");
                    let (from, to) = if *from_client { (pod, vip) } else { (old, pod) };
                    node.passes(&build(tcp(*flags), from, to).frame());
                }
                // Its last packets still find their way.
                assert_eq!(node.reaches(&build(tcp(ACK), pod, vip)), old);
                assert_eq!(
                    node.passes(&build(tcp(ACK), old, pod).frame()).1,
                    build(tcp(ACK), vip, pod).frame()
                );
                let new = node.backend(2);
                assert_eq!(node.reaches(&syn(pod, vip)), new, "{number}, answered: {answered}");
                node.translates(&build(tcp(SYN | ACK), new, pod), (new, pod), (vip, pod));
                let flow = node.flow();
                assert_eq!((socket((flow.backend, flow.backend_port)), flow.is_over()), (new, false));
            }
        }
    });
}

/// Z1, F2: a new connection is decided as one, whatever its port was used for before.
#[test]
fn a_port_that_is_used_again_is_refused_as_others_are() {
    both(|v6| {
        let mut node = Node::new(v6);
        let (pod, vip, old) = (node.pod(40_000), node.vip(1), node.backend(1));
        node.passes(&syn(pod, vip).frame());
        node.passes(&build(tcp(RST | ACK), old, pod).frame());
        node.maps.lab.set(1, WhichSet::Cluster, &[], WhenEmpty::Reject);
        assert_eq!(node.fate(&syn(pod, vip)), After::Answer, "Z1");
        assert_eq!(node.reaches(&build(tcp(ACK), pod, vip)), old, "Z8: it may still be on its way");
        node.maps.lab.set(1, WhichSet::Cluster, &[], WhenEmpty::Drop);
        assert_eq!(node.fate(&syn(pod, vip)), After::Drop, "Z2");
        node.maps.lab.plain(1, &[2]);
        let guarded = FrontendValue::new(1, FrontendKind::LoadBalancer).with_source_ranges();
        node.maps.lab.frontend(1, guarded);
        assert_eq!(node.fate(&syn(pod, vip)), After::Drop, "F2");
    });
}

/// A backend that is gone answers no SYN; a new tenant of its place is somebody else.
#[test]
fn a_syn_to_a_backend_that_is_gone_chooses_anew() {
    both(|v6| {
        for replaced in [false, true] {
            let mut node = Node::new(v6);
            let (pod, vip) = (node.pod(40_000), node.vip(1));
            assert_eq!(node.reaches(&syn(pod, vip)), node.backend(1));
            move_on(&mut node);
            if replaced {
                node.maps.lab.state(proxy_common::abi::BackendId::new(1, 2), SERVING);
            } else {
                node.maps.lab.vacate(id(1));
            }
            assert_eq!(node.reaches(&build(tcp(ACK), pod, vip)), node.backend(1), "Z8");
            assert_eq!(node.reaches(&syn(pod, vip)), node.backend(2));
            assert_eq!(node.reaches(&build(tcp(ACK), pod, vip)), node.backend(2));
        }
    });
}

const SERVES_NOT: BackendState = BackendState { cluster: false, local: false, serving: false };

/// C2: a datagram flow stays while its backend serves, in whatever set; then it is balanced anew.
#[test]
fn c2_datagrams_leave_a_backend_that_serves_no_more() {
    both(|v6| {
        for gone in [false, true] {
            let mut node = Node::new(v6);
            let (pod, vip) = (node.pod(40_000), node.vip(1));
            let datagram = build(Carries::Udp, pod, vip);
            assert_eq!(node.reaches(&datagram), node.backend(1));
            move_on(&mut node);
            assert_eq!(node.reaches(&datagram), node.backend(1), "serving, in no set");
            if gone {
                node.maps.lab.vacate(id(1));
            } else {
                node.maps.lab.state(id(1), SERVES_NOT);
            }
            assert_eq!(node.reaches(&datagram), node.backend(2));
            let answer = |backend| node.passes(&build(Carries::Udp, node.backend(backend), pod).frame()).1;
            assert_eq!(answer(2), build(Carries::Udp, vip, pod).frame());
            assert_eq!(answer(1), build(Carries::Udp, node.backend(1), pod).frame(), "a late answer");
        }
    });
}

/// C3: with nobody who serves it stays, until somebody comes.
#[test]
fn c3_datagrams_stay_while_nobody_serves() {
    both(|v6| {
        let mut node = Node::new(v6);
        let (pod, vip) = (node.pod(40_000), node.vip(1));
        let datagram = build(Carries::Udp, pod, vip);
        assert_eq!(node.reaches(&datagram), node.backend(1));
        node.maps.lab.set(1, WhichSet::Cluster, &[], WhenEmpty::Reject);
        node.maps.lab.state(id(1), SERVES_NOT);
        assert_eq!(node.reaches(&datagram), node.backend(1));
        assert_eq!(node.fate(&build(Carries::Udp, node.pod(2), vip)), After::Answer, "new ones are refused");
        move_on(&mut node);
        assert_eq!(node.reaches(&datagram), node.backend(2));
    });
}

/// C3: a client that was too early is served as soon as somebody is there.
#[test]
fn c3_a_refused_datagram_leaves_nothing_behind() {
    both(|v6| {
        let mut node = Node::new(v6);
        node.maps.lab.plain(2, &[]);
        let datagram = build(Carries::Udp, node.pod(40_000), node.vip(2));
        assert_eq!(node.fate(&datagram), After::Answer);
        node.maps.lab.set(2, WhichSet::Cluster, &[2], WhenEmpty::Reject);
        assert_eq!(node.reaches(&datagram), node.backend(2));
    });
}

/// T3, C7: no clean-up for SCTP, and none for a Service that is gone.
#[test]
fn t3_c7_flows_that_nobody_cleans() {
    each(|v6, carries| {
        let mut node = Node::of(v6, &carries);
        let (pod, vip) = (node.pod(40_000), node.vip(1));
        let request = build(carries.clone(), pod, vip);
        assert_eq!(node.reaches(&request), node.backend(1));
        node.maps.lab.set(1, WhichSet::Cluster, &[], WhenEmpty::Reject);
        node.maps.lab.vacate(id(1));
        let (address, port) = node.maps.lab.vip(1);
        let key = proxy_common::abi::FrontendKey::new(address, port, request.protocol());
        node.maps.lab.write(proxy_agent::dataplane::Write::RemoveFrontend { key });
        if let Carries::Tcp { .. } = carries {
            assert_eq!(node.reaches(&build(tcp(ACK), pod, vip)), node.backend(1));
            assert_eq!(node.fate(&request), After::Answer, "a new connection: Z6");
        } else {
            assert_eq!(node.reaches(&request), node.backend(1));
        }
    });
}

/// M11: each VIP that a client's port talks to has a flow of its own.
#[test]
fn m11_several_vips_on_one_port() {
    each(|v6, carries| {
        let mut node = Node::of(v6, &carries);
        for n in 2..=4_u8 {
            node.maps.lab.plain(n, &[n.into()]);
        }
        let pod = node.pod(40_000);
        let go = |n: u8, carries: &Carries| {
            let (vip, backend) = (node.vip(n), node.backend(n.into()));
            node.translates(&build(carries.clone(), pod, vip), (pod, backend), (pod, backend));
            node.translates(&build(reply(carries), backend, pod), (backend, pod), (vip, pod));
        };
        (1..=4).for_each(|n| go(n, &carries));
        (1..=4).rev().for_each(|n| go(n, &going_on(&carries)));
        let mut slots: Vec<u8> = node.maps.grown.all().iter().map(|(key, _)| key.slot).collect();
        slots.sort_unstable();
        assert_eq!(slots, [0, 1, 2, 3]);
        assert!(node.maps.young.all().is_empty());
    });
}

/// Young flows are thrown out one by one: a hole does not hide what is behind it, and is filled.
#[test]
fn holes_in_the_slots() {
    both(|v6| {
        let mut node = Node::new(v6);
        for n in 2..=4_u8 {
            node.maps.lab.plain(n, &[n.into()]);
        }
        let pod = node.pod(40_000);
        for n in 1..=3 {
            node.passes(&build(Carries::Udp, pod, node.vip(n)).frame());
        }
        let key = |slot| FlowKey::new(pod.ip().into(), Port::new(pod.port()), 17).in_slot(slot);
        for hole in [0, 1] {
            assert!(node.maps.young.remove(&key(hole)));
            let before = node.maps.young.all().len();
            assert_eq!(node.reaches(&build(Carries::Udp, pod, node.vip(3))), node.backend(3));
            let answer = build(Carries::Udp, node.backend(3), pod);
            assert_eq!(node.passes(&answer.frame()).1, answer.between(node.vip(3), pod).frame());
            assert_eq!(node.reaches(&build(Carries::Udp, pod, node.vip(4))), node.backend(4));
            assert_eq!(node.reaches(&build(Carries::Udp, pod, node.vip(3))), node.backend(3));
            assert!(node.maps.young.all().len() <= before + 1);
        }
    });
}

/// More VIPs than slots: the last one gives way. One that is over gives way first.
#[test]
fn more_vips_than_slots() {
    both(|v6| {
        let mut node = Node::new(v6);
        for n in 2..=6_u8 {
            node.maps.lab.plain(n, &[n.into()]);
        }
        let pod = node.pod(40_000);
        for n in 1..=5 {
            assert_eq!(node.reaches(&syn(pod, node.vip(n))), node.backend(n.into()));
        }
        node.leaves_alone(&build(tcp(ACK), pod, node.vip(4)));
        let went: Vec<SocketAddr> =
            [1, 2, 3, 5].map(|n| node.reaches(&build(tcp(ACK), pod, node.vip(n)))).to_vec();
        assert_eq!(went, [1, 2, 3, 5].map(|n| node.backend(n)));
        node.passes(&build(tcp(RST), pod, node.vip(2)).frame());
        assert_eq!(node.reaches(&syn(pod, node.vip(6))), node.backend(6));
        node.leaves_alone(&build(tcp(ACK), pod, node.vip(2)));
        assert_eq!(node.reaches(&build(tcp(ACK), pod, node.vip(5))), node.backend(5));
        assert_eq!(node.maps.young.all().len(), 4);
    });
}

/// A flow grows up when its client goes on after the first answer, with its replaced source; packets find it as before.
#[test]
fn young_flows_grow_up() {
    each(|v6, carries| {
        let node = Node::of(v6, &carries);
        let (client, vip, backend) = (node.client(40_000), node.vip(1), node.backend(1));
        let source = node.source_at(&build(carries.clone(), client, vip));
        let sizes = || {
            let (young, grown) = (node.maps.young_snat.borrow().len(), node.maps.grown_snat.borrow().len());
            [node.maps.young.all().len(), young, node.maps.grown.all().len(), grown]
        };
        assert_eq!(sizes(), [1, 1, 0, 0]);
        let before = node.flow();
        let answer = build(reply(&carries), backend, source);
        node.translates(&answer, (backend, client), (vip, client));
        assert_eq!(sizes(), [1, 1, 0, 0]);
        assert_eq!(node.flow().flags, before.flags | Flow::HEARD);
        node.maps.lab.pass_s(3);
        node.translates(&build(going_on(&carries), client, vip), (client, backend), (source, backend));
        assert_eq!(sizes(), [0, 0, 1, 1]);
        let now = node.maps.lab.tables.now_ns.get();
        let flags = before.flags | Flow::HEARD | Flow::ANSWERED;
        assert_eq!(node.flow(), Flow { flags, used_ns: now, ..before });
        node.translates(&answer, (backend, client), (vip, client));
    });
}

/// A backend that answers whoever asks fills no table: neither with its first packet, however often it sends that, nor with
/// a refusal. What is still answered after a while is a connection all the same.
#[test]
fn answers_alone_make_nobody_grow_up() {
    each(|v6, carries| {
        let node = Node::of(v6, &carries);
        let (pod, vip, backend) = (node.pod(40_000), node.vip(1), node.backend(1));
        node.translates(&build(carries.clone(), pod, vip), (pod, backend), (pod, backend));
        let answers = |carries: Carries| {
            node.translates(&build(carries, backend, pod), (backend, pod), (vip, pod));
            node.maps.grown.all().len()
        };
        for _ in 0..3 {
            assert_eq!(answers(reply(&carries)), 0);
        }
        node.maps.lab.pass_s(2);
        if let Carries::Tcp { .. } = carries {
            assert_eq!(answers(tcp(SYN | ACK)), 0);
            node.maps.lab.pass_s(2);
            // The client's packets take another way.
            assert_eq!(answers(tcp(ACK)), 1);
        } else {
            assert_eq!(answers(reply(&carries)), 1);
        }
    });
    both(|v6| {
        let node = Node::new(v6);
        let (pod, vip, backend) = (node.pod(40_000), node.vip(1), node.backend(1));
        node.reaches(&syn(pod, vip));
        node.translates(&build(tcp(RST | ACK), backend, pod), (backend, pod), (vip, pod));
        node.maps.lab.pass_s(2);
        node.translates(&build(tcp(RST | ACK), backend, pod), (backend, pod), (vip, pod));
        node.translates(&build(tcp(RST), pod, vip), (pod, backend), (pod, backend));
        assert!(node.maps.grown.all().is_empty());
    });
}

/// A full table: the flow stays young and works, and grows up when there is room. What ends it is not forgotten.
#[test]
fn no_room_for_grown_flows() {
    both(|v6| {
        let node = Node::new(v6);
        let (client, vip, backend) = (node.client(40_000), node.vip(1), node.backend(1));
        let source = node.source_at(&syn(client, vip));
        node.maps.counted();
        node.maps.grown.room.set(0);
        let answer = |flags| {
            let packet = build(tcp(flags), backend, source);
            node.translates(&packet, (backend, client), (vip, client));
        };
        answer(SYN | ACK);
        node.passes(&build(tcp(ACK), client, vip).frame());
        assert!(node.maps.counted().contains(&("packet_flows_full", 1)));
        let flags = Flow::NEEDS_SNAT | Flow::HEARD | Flow::CROWDED_OUT;
        assert_eq!((node.maps.young.all().len(), node.flow().flags), (1, flags));
        answer(FIN | ACK);
        node.passes(&build(tcp(FIN | ACK), client, vip).frame());
        assert!(node.flow().is_over());
        node.maps.grown.room.set(1);
        node.passes(&build(tcp(ACK), client, vip).frame());
        assert_eq!((node.maps.young.all().len(), node.maps.grown.all().len()), (0, 1));
        assert!(node.flow().is_over());
    });
}

/// No room for a new flow: its first packet is dropped, not sent where no answer could come back from.
#[test]
fn no_room_for_a_new_flow() {
    each(|v6, carries| {
        let node = Node::of(v6, &carries);
        node.maps.young.room.set(0);
        let request = build(carries, node.pod(40_000), node.vip(1));
        assert_eq!(node.fate(&request), After::Drop);
        assert_eq!(node.maps.counted(), [("packet_no_room", 1)]);
        node.maps.young.room.set(1);
        assert_eq!(node.reaches(&request), node.backend(1));
    });
}

/// The time of last use is kept to within a second, in both directions.
#[test]
fn when_a_flow_was_used() {
    both(|v6| {
        let node = Node::new(v6);
        let (pod, vip, backend) = (node.pod(40_000), node.vip(1), node.backend(1));
        let age_s = || (node.maps.lab.tables.now_ns.get() - node.flow().used_ns) / 1_000_000_000;
        node.passes(&syn(pod, vip).frame());
        node.maps.lab.pass_s(5);
        assert_eq!(age_s(), 5);
        node.passes(&build(tcp(ACK), pod, vip).frame());
        assert_eq!(age_s(), 0);
        for flags in [SYN | ACK, ACK] {
            node.maps.lab.pass_s(7);
            node.passes(&build(tcp(flags), backend, pod).frame());
            assert_eq!(age_s(), 0);
        }
        node.maps.lab.pass_s(1);
        node.passes(&build(tcp(ACK), backend, pod).frame());
        assert_eq!(age_s(), 1, "not written for every packet");
    });
}

/// Somebody's direct connection to a backend, on another port, is none of ours.
#[test]
fn bystanders_of_a_flow() {
    each(|v6, carries| {
        let node = Node::of(v6, &carries);
        let (pod, vip, backend) = (node.pod(40_000), node.vip(1), node.backend(1));
        node.passes(&build(carries.clone(), pod, vip).frame());
        let other = SocketAddr::new(backend.ip(), 9);
        for (from, to) in [
            (backend, node.pod(40_001)),
            (other, pod),
            (node.backend(2), pod),
            (pod, other),
            (backend, node.client(40_000)),
        ] {
            node.leaves_alone(&build(carries.clone(), from, to));
        }
    });
}
