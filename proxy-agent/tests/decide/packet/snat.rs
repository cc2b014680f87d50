//! Sources that are replaced: which ports, whose, and when there are none left.

use super::*;
use std::collections::BTreeSet;

fn ports(node: &mut Node, count: u16) {
    node.settings().snat_count = count;
}

/// M7: within the reserved range, and no two connections to one backend on the same port.
#[test]
fn m7_ports_are_reserved_ones_and_differ() {
    both(|v6| {
        for carries in [tcp(SYN), Carries::Udp] {
            let mut node = Node::new(v6);
            ports(&mut node, 64);
            let sources: BTreeSet<SocketAddr> = (1..=20)
                .map(|n| node.source_at(&build(carries.clone(), node.client(n), node.vip(1))))
                .collect();
            assert_eq!(sources.len(), 20);
            assert!(sources.iter().all(|source| (10_000..10_064).contains(&source.port())));
            // Each answer goes to whom it is for.
            for n in 1..=20 {
                let source = node.source_at(&build(carries.clone(), node.client(n), node.vip(1)));
                let answer = build(reply(&carries), node.backend(1), source);
                node.translates(&answer, (node.backend(1), node.client(n)), (node.vip(1), node.client(n)));
            }
        }
    });
}

/// Where anybody may have any of the ports they are given in turn: who was given one longest ago is the first to be gone.
#[test]
fn m7_ports_that_may_be_taken_are_given_in_turn() {
    both(|v6| {
        let mut node = Node::new(v6);
        ports(&mut node, 8);
        node.maps.vague = true;
        let sources: Vec<u16> =
            (1..=8).map(|n| node.source_at(&build(tcp(SYN), node.client(n), node.vip(1))).port()).collect();
        let next = |port: u16| 10_000 + (port - 10_000 + 1) % 8;
        assert!(sources.windows(2).all(|pair| next(pair[0]) == pair[1]), "{sources:?}");
    });
}

/// One port serves any number of backends and protocols: the whole tuple counts.
#[test]
fn m7_a_port_for_each_backend_and_protocol() {
    both(|v6| {
        let mut node = Node::new(v6);
        ports(&mut node, 1);
        node.maps.lab.plain(2, &[2]);
        for (n, (vip, carries)) in
            [(1, tcp(SYN)), (2, tcp(SYN)), (1, Carries::Udp), (2, Carries::Udp)].into_iter().enumerate()
        {
            let client = node.client(1 + u16::try_from(n).unwrap());
            let source = node.source_at(&build(carries.clone(), client, node.vip(vip)));
            assert_eq!(source, SocketAddr::new(node.node(), 10_000));
            let answer = build(reply(&carries), node.backend(vip.into()), source);
            assert_eq!(node.passes(&answer.frame()).1, answer.between(node.vip(vip), client).frame());
        }
    });
}

/// None left: dropped and counted, until a connection is over, cut, or forgotten.
#[test]
fn ports_run_out_and_are_taken_over() {
    both(|v6| {
        for (grown, end) in [(false, "reset"), (true, "reset"), (true, "ended"), (false, "forgotten")] {
            let mut node = Node::new(v6);
            ports(&mut node, 1);
            let (vip, backend, first, second) =
                (node.vip(1), node.backend(1), node.client(1), node.client(2));
            let source = node.source_at(&build(tcp(SYN), first, vip));
            if grown {
                node.passes(&build(tcp(SYN | ACK), backend, source).frame());
            }
            let late = build(tcp(SYN), second, vip);
            let mut frame = late.frame();
            assert_eq!(node.comes_in(&mut frame), After::Next);
            node.maps.counted();
            assert_eq!(node.goes_out(&mut frame), After::Drop);
            assert_eq!(node.maps.counted(), [("packet_no_source_port", 1)]);
            match end {
                "reset" => {
                    node.passes(&build(tcp(RST), first, vip).frame());
                }
                "ended" => {
                    node.passes(&build(tcp(FIN | ACK), first, vip).frame());
                    assert_eq!(node.goes_out(&mut late.between(second, backend).frame()), After::Drop);
                    node.passes(&build(tcp(FIN | ACK), backend, source).frame());
                }
                _ => assert!(node.maps.young.remove(&FlowKey::new(first.ip().into(), Port::new(1), 6))),
            }
            node.translates(&late, (second, backend), (source, backend));
            let answer = build(tcp(SYN | ACK), backend, source);
            node.translates(&answer, (backend, second), (vip, second));
        }
    });
}

/// A client port that is used again leaves its old source behind: nobody needs that any more.
#[test]
fn a_port_of_an_earlier_connection_is_taken_over() {
    both(|v6| {
        for grown in [false, true] {
            let mut node = Node::new(v6);
            ports(&mut node, 2);
            let (vip, backend, client) = (node.vip(1), node.backend(1), node.client(1));
            let request = build(tcp(SYN), client, vip);
            let mut sources = BTreeSet::new();
            for _ in 0..9 {
                let source = node.source_at(&request);
                sources.insert(source);
                if grown {
                    let answer = build(tcp(SYN | ACK), backend, source);
                    node.translates(&answer, (backend, client), (vip, client));
                }
                node.passes(&build(tcp(RST), client, vip).frame());
            }
            assert_eq!(sources.len(), 2, "a new one each time");
            let source = node.source_at(&request);
            let other = node.source_at(&build(tcp(SYN), node.client(2), vip));
            assert_ne!(source, other);
        }
    });
}

/// A device without an address of the family, or one that nobody has described, has no source to give.
#[test]
fn no_address_to_leave_with() {
    each(|v6, carries| {
        for device in [None, Some(Device::default())] {
            let mut node = Node::of(v6, &carries);
            node.maps.device = device;
            let mut frame = build(carries.clone(), node.client(1), node.vip(1)).frame();
            assert_eq!(node.comes_in(&mut frame), After::Next);
            assert_eq!(node.goes_out(&mut frame), After::Drop);
            let counted = [("packet_flow_begun", 1), ("packet_forwarded", 1), ("packet_no_source_port", 1)];
            assert_eq!(node.maps.counted(), counted);
        }
    });
}

/// T2: an SCTP association keeps its port, so two clients with the same one cannot both reach a backend.
#[test]
fn t2_sctp_keeps_its_port_or_is_dropped() {
    both(|v6| {
        let node = Node::of(v6, &Carries::Sctp);
        let first = build(Carries::Sctp, node.client(5), node.vip(1));
        assert_eq!(node.source_at(&first), SocketAddr::new(node.node(), 5));
        let other = SocketAddr::new(node.router().ip(), 5);
        let mut second = build(Carries::Sctp, other, node.vip(1)).frame();
        assert_eq!(node.comes_in(&mut second), After::Next);
        assert_eq!(node.goes_out(&mut second), After::Drop);
    });
}

/// T2: once the flow of its owner is forgotten, an association's port is the next one's, its owner's too.
#[test]
fn t2_an_sctp_port_that_nobody_uses_is_taken_over() {
    both(|v6| {
        for same in [false, true] {
            let node = Node::of(v6, &Carries::Sctp);
            let client = node.client(5);
            let source = node.source_at(&build(Carries::Sctp, client, node.vip(1)));
            assert!(node.maps.young.remove(&FlowKey::new(client.ip().into(), Port::new(5), 132)));
            let next = if same { client } else { SocketAddr::new(node.router().ip(), 5) };
            assert_eq!(node.source_at(&build(Carries::Sctp, next, node.vip(1))), source);
            let answer = build(Carries::Sctp, node.backend(1), source);
            node.translates(&answer, (node.backend(1), next), (node.vip(1), next));
        }
    });
}

/// A reply that is for no replaced source of ours is left alone: the node's own connections are.
#[test]
fn bystanders_of_a_source() {
    each(|v6, carries| {
        let node = Node::of(v6, &carries);
        let source = node.source_at(&build(carries.clone(), node.client(5), node.vip(1)));
        let backend = node.backend(1);
        for (from, to) in [
            (backend, SocketAddr::new(node.router().ip(), source.port())),
            (node.backend(2), source),
            (SocketAddr::new(backend.ip(), 9), source),
        ] {
            node.leaves_alone(&build(carries.clone(), from, to));
        }
        let other = if carries == Carries::Udp { Carries::Sctp } else { Carries::Udp };
        if !matches!(carries, Carries::UdpWithout) {
            node.leaves_alone(&build(other, backend, source));
        }
    });
}
