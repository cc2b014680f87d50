//! M11: one client port with two VIPs in front of one backend, and with that backend itself.

use super::*;

/// All but SCTP, whose ports cannot be changed (T2).
fn each_with_ports(test: impl Fn(bool, Carries)) {
    each(|v6, carries| {
        if carries != Carries::Sctp {
            test(v6, carries);
        }
    });
}

/// Services 1 to 3 in front of backend 1.
fn shared(v6: bool, carries: &Carries) -> Node {
    let mut node = Node::of(v6, carries);
    node.maps.lab.plain(2, &[1]);
    node.maps.lab.plain(3, &[1]);
    node
}

/// Who the packet is from inside the node.
fn inside(node: &Node, sent: &Build) -> SocketAddr {
    let mut frame = sent.frame();
    assert_eq!(node.comes_in(&mut frame), After::Next);
    ends(&frame).0
}

fn answers(carries: &Carries) -> [Carries; 2] {
    if matches!(carries, Carries::Tcp { .. }) {
        [tcp(SYN | ACK), tcp(ACK)]
    } else {
        [(); 2].map(|()| carries.clone())
    }
}

/// Inside the node the second one has another port; outside, nobody sees it.
#[test]
fn two_vips_with_one_backend() {
    each_with_ports(|v6, carries| {
        for from_outside in [false, true] {
            let node = shared(v6, &carries);
            let client = if from_outside { node.client(40_000) } else { node.pod(40_000) };
            let backend = node.backend(1);
            let requests = [1, 2, 3].map(|n| build(carries.clone(), client, node.vip(n)));
            let clients = requests.each_ref().map(|request| inside(&node, request));
            assert_eq!(clients[0], client);
            for other in &clients[1..] {
                assert!(other.ip() == client.ip() && (10_000..30_000).contains(&other.port()), "{other}");
            }
            assert_ne!(clients[1], clients[2]);
            let seen = requests.each_ref().map(|request| node.source_at(request));
            if !from_outside {
                assert_eq!(seen, clients);
            }
            // Each with each other's packets in between, before and after the flow has grown up.
            for answer in answers(&carries) {
                for n in [0, 1, 2, 1, 0, 2] {
                    let (vip, seen) = (requests[n].to, seen[n]);
                    node.translates(&requests[n], (clients[n], backend), (seen, backend));
                    let answer = build(answer.clone(), backend, seen);
                    node.translates(&answer, (backend, clients[n]), (vip, client));
                }
            }
            for (n, request) in requests.iter().enumerate() {
                let request = build(going_on(&carries), client, request.to);
                for _ in 0..2 {
                    node.translates(&request, (clients[n], backend), (seen[n], backend));
                }
            }
            let ways = |table: &std::cell::RefCell<std::collections::BTreeMap<_, _>>| table.borrow().len();
            let expected = if from_outside { 5 } else { 2 };
            assert_eq!((ways(&node.maps.young_snat), ways(&node.maps.grown_snat)), (0, expected));
        }
    });
}

/// T2: the flow of the other VIP gives way.
#[test]
fn t2_sctp_keeps_its_port() {
    both(|v6| {
        let node = shared(v6, &Carries::Sctp);
        let (pod, backend) = (node.pod(40_000), node.backend(1));
        for n in [1, 2, 1] {
            node.translates(&build(Carries::Sctp, pod, node.vip(n)), (pod, backend), (pod, backend));
            node.translates(&build(Carries::Sctp, backend, pod), (backend, pod), (node.vip(n), pod));
        }
        node.leaves_alone(&build(Carries::Sctp, pod, node.backend(1)));
    });
}

/// A port inside the node that another client of the pod has as its own.
#[test]
fn a_port_inside_is_nobody_elses() {
    each_with_ports(|v6, carries| {
        let mut node = shared(v6, &carries);
        (node.settings().snat_first, node.settings().snat_count) = (10_000, 2);
        let request = |port, n| build(carries.clone(), node.pod(port), node.vip(n));
        assert_eq!(inside(&node, &request(10_000, 1)).port(), 10_000);
        assert_eq!(inside(&node, &request(40_000, 1)).port(), 40_000);
        assert_eq!(inside(&node, &request(40_000, 2)).port(), 10_001);
        // Whoever comes later cannot have it either. None is left.
        node.maps.counted();
        assert_eq!(node.fate(&request(10_001, 1)), After::Drop);
        assert_eq!(node.maps.counted(), [("packet_no_source_port", 1)]);
        assert_eq!(inside(&node, &request(40_000, 2)).port(), 10_001);
    });
}

/// A client that has a connection by the VIP makes one to the backend itself: that becomes a flow.
#[test]
fn the_backend_itself_after_a_vip() {
    each_with_ports(|v6, carries| {
        for from_outside in [false, true] {
            let node = shared(v6, &carries);
            let client = if from_outside { node.client(40_000) } else { node.pod(40_000) };
            let (vip, backend) = (node.vip(1), node.backend(1));
            let (request, direct) =
                (build(carries.clone(), client, vip), build(carries.clone(), client, backend));
            let seen = node.source_at(&request);
            let other = inside(&node, &direct);
            assert!(other.ip() == client.ip() && (10_000..30_000).contains(&other.port()), "{other}");
            for answer in answers(&carries) {
                node.translates(&request, (client, backend), (seen, backend));
                node.translates(&direct, (other, backend), (other, backend));
                let to = |to| build(answer.clone(), backend, to);
                node.translates(&to(other), (backend, other), (backend, client));
                node.translates(&to(seen), (backend, client), (vip, client));
            }
        }
    });
}

/// When both are over, the client's port is its own again.
#[test]
fn the_backend_itself_after_all() {
    both(|v6| {
        let node = shared(v6, &tcp(SYN));
        let (pod, vip, backend) = (node.pod(40_000), node.vip(1), node.backend(1));
        assert_eq!(inside(&node, &build(tcp(SYN), pod, vip)), pod);
        let other = inside(&node, &build(tcp(SYN), pod, backend));
        assert_ne!(other, pod);
        for to in [vip, backend] {
            node.passes(&build(tcp(RST), pod, to).frame());
        }
        // Late packets still find their way.
        assert_eq!(inside(&node, &build(tcp(ACK), pod, backend)), other);
        node.leaves_alone(&build(tcp(SYN), pod, backend));
        node.leaves_alone(&build(tcp(ACK), pod, backend));
        assert_eq!(inside(&node, &build(tcp(SYN), pod, vip)), pod);
    });
}

/// A connection to the backend itself was there first. The backend answers what looks like a second first packet of it
/// with the state of the first; that goes where it belongs, and the client's next try is another's.
#[test]
fn a_vip_after_the_backend_itself() {
    both(|v6| {
        for who_speaks in ["backend", "client"] {
            let node = shared(v6, &tcp(SYN));
            let (pod, vip, backend) = (node.pod(40_000), node.vip(1), node.backend(1));
            let request = build(tcp(SYN), pod, vip);
            assert_eq!(inside(&node, &request), pod);
            node.leaves_alone(&match who_speaks {
                "backend" => build(tcp(ACK), backend, pod),
                _ => build(tcp(ACK), pod, backend),
            });
            let other = inside(&node, &request);
            assert_ne!(other, pod);
            node.translates(&build(tcp(SYN | ACK), backend, other), (backend, other), (vip, pod));
            node.leaves_alone(&build(tcp(ACK), pod, backend));
            node.leaves_alone(&build(tcp(ACK), backend, pod));
            node.translates(&build(tcp(ACK), pod, vip), (other, backend), (other, backend));
        }
        // What is known to be the flow's stays so: whether there was room for it or not.
        for room in [0, 1] {
            let node = shared(v6, &tcp(SYN));
            node.maps.grown.room.set(room);
            let (pod, vip, backend) = (node.pod(40_000), node.vip(1), node.backend(1));
            node.passes(&build(tcp(SYN), pod, vip).frame());
            for flags in [SYN | ACK, ACK, FIN | ACK] {
                node.translates(&build(tcp(flags), backend, pod), (backend, pod), (vip, pod));
            }
        }
    });
}

/// The same where the backend sees another source: there the two do not meet, but inside the node.
#[test]
fn a_vip_with_another_source_after_the_backend_itself() {
    both(|v6| {
        for answered in [false, true] {
            let node = shared(v6, &tcp(SYN));
            let (client, vip, backend) = (node.client(40_000), node.vip(1), node.backend(1));
            let source = node.source_at(&build(tcp(SYN), client, vip));
            if answered {
                node.passes(&build(tcp(SYN | ACK), backend, source).frame());
            }
            for _ in 0..2 {
                node.leaves_alone(&build(tcp(ACK), client, backend));
                node.leaves_alone(&build(tcp(ACK), backend, client));
            }
            let request = build(tcp(ACK), client, vip);
            let other = inside(&node, &request);
            assert_ne!(other, client);
            node.translates(&request, (other, backend), (source, backend));
            node.translates(&build(tcp(SYN | ACK), backend, source), (backend, other), (vip, client));
            node.translates(&request, (other, backend), (source, backend));
            assert!(node.maps.young_snat.borrow().is_empty(), "nothing of it may be thrown out");
        }
    });
}

/// A process of this node whose first packet no hook saw may talk to the backend directly too.
#[test]
fn the_backend_itself_from_this_node() {
    each_with_ports(|v6, carries| {
        let node = shared(v6, &carries);
        let own = SocketAddr::new(node.node(), 40_000);
        node.maps.own.set(true);
        let mut frame = build(carries.clone(), own, node.vip(1)).frame();
        assert!(matches!(node.goes_out(&mut frame), After::Leave(_)));
        let direct = build(carries, own, node.backend(1));
        let mut frame = direct.frame();
        assert_eq!(node.goes_out(&mut frame), After::Next);
        assert_eq!(frame, direct.frame());
    });
}
