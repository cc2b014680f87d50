//! What netfilter's NAT owns, from another proxy or handed to it, is left alone.

use super::*;
use proxy_common::abi::{BackendId, BackendState, SnatKey};
use proxy_common::decide::packet::PacketTables;

fn leave_new(node: &mut Node, leaves: bool) {
    let flags = &mut node.settings().flags;
    *flags = *flags & !PacketSettings::LEAVE_NEW | if leaves { PacketSettings::LEAVE_NEW } else { 0 };
}

/// A datagram flow of another proxy, to the backend with this id, as the agent writes it.
fn seed(node: &Node, client: SocketAddr, carries: &Carries, backend: BackendId) {
    let vip = node.maps.lab.vip(1);
    let protocol = build(carries.clone(), client, socket(vip)).protocol();
    let key = FlowKey::new(client.ip().into(), Port::new(client.port()), protocol);
    let flow = Flow {
        vip: vip.0,
        vip_port: vip.1,
        backend_id: backend,
        used_ns: node.maps.lab.tables.now_ns.get(),
        flags: Flow::FOREIGN | Flow::ANSWERED,
        ..Flow::default()
    };
    assert!(node.maps.remember_flow(&key, &flow));
    assert!(node.maps.grow_up(&key, &node.maps.flow(&key).unwrap(), |_| {}));
}

/// While flows change hands, what begins is another proxy's: TCP without a note, datagrams with one, so that they stay
/// where they are afterwards.
#[test]
fn what_begins_meanwhile_is_left_to_the_other() {
    each(|v6, carries| {
        let mut node = Node::of(v6, &carries);
        leave_new(&mut node, true);
        let begins = build(carries.clone(), node.client(1), node.vip(1));
        node.leaves_alone(&begins);
        node.leaves_alone(&begins);
        let known = ["packet_untouched", "packet_flow_begun"];
        assert!(node.maps.counted().iter().all(|(name, _)| known.contains(name)));
        leave_new(&mut node, false);
        let is_tcp = begins.protocol() == 6;
        if !is_tcp {
            node.leaves_alone(&begins);
            assert!(node.flow().is_foreign());
        }
        let other = build(carries.clone(), node.client(2), node.vip(1));
        for ours in if is_tcp { vec![begins, other] } else { vec![other] } {
            assert_eq!(node.reaches(&ours), node.backend(1));
        }
    });
}

/// M11: notes of one client port about several VIPs.
#[test]
fn m11_what_is_left_to_the_other_has_a_note_for_each_vip() {
    both(|v6| {
        let mut node = Node::new(v6);
        node.maps.lab.plain(2, &[2]);
        leave_new(&mut node, true);
        let datagrams = [1, 2].map(|vip| build(Carries::Udp, node.client(1), node.vip(vip)));
        datagrams.iter().for_each(|datagram| node.leaves_alone(datagram));
        leave_new(&mut node, false);
        datagrams.iter().for_each(|datagram| node.leaves_alone(datagram));
    });
}

/// A packet of the node passed netfilter before it comes here with a VIP: nobody there wants it.
#[test]
fn what_the_node_sends_to_a_vip_is_never_left_to_the_other() {
    both(|v6| {
        for carries in [tcp(SYN), Carries::Udp] {
            let mut node = Node::new(v6);
            leave_new(&mut node, true);
            node.maps.own.set(true);
            let own = SocketAddr::new(node.node(), 40_000);
            let mut frame = build(carries.clone(), own, node.vip(1)).frame();
            assert_eq!(node.goes_out(&mut frame), After::Leave(tables::DEVICE));
            assert_eq!(ends(&frame).1, node.backend(1));
        }
        // Not even if it was, a moment ago.
        let node = Node::new(v6);
        node.maps.own.set(true);
        let own = SocketAddr::new(node.node(), 40_000);
        seed(&node, own, &Carries::Udp, id(1));
        let mut frame = build(Carries::Udp, own, node.vip(1)).frame();
        assert_eq!(node.goes_out(&mut frame), After::Leave(tables::DEVICE));
        assert!(!node.flow().is_foreign());
    });
}

/// C2, C3: a foreign flow stays while its backend serves, and as long as nobody else does.
#[test]
fn c2_a_foreign_flow_stays_while_its_backend_serves() {
    both(|v6| {
        let mut node = Node::new(v6);
        let client = node.client(1);
        seed(&node, client, &Carries::Udp, id(1));
        let datagram = build(Carries::Udp, client, node.vip(1));
        node.leaves_alone(&datagram);
        // P5, C2: terminating, but serving.
        node.maps.lab.set(1, WhichSet::Cluster, &[2], WhenEmpty::Reject);
        node.leaves_alone(&datagram);
        node.maps.lab.state(id(1), BackendState::default());
        node.maps.lab.set(1, WhichSet::Cluster, &[], WhenEmpty::Reject);
        node.leaves_alone(&datagram);
        node.maps.counted();
        node.maps.lab.set(1, WhichSet::Cluster, &[2], WhenEmpty::Reject);
        assert_eq!(node.reaches(&datagram), node.backend(2));
        assert_eq!(node.maps.counted(), [("packet_forwarded", 1)]);
        assert!(!node.flow().is_foreign());
    });
}

/// Netfilter forgets a flow that rests, and without an agent nobody tells the programs.
#[test]
fn a_foreign_flow_that_rests_is_over() {
    both(|v6| {
        for backend in [id(1), BackendId::NONE] {
            let node = Node::new(v6);
            let client = node.client(1);
            seed(&node, client, &Carries::Udp, backend);
            let datagram = build(Carries::Udp, client, node.vip(1));
            for _ in 0..3 {
                node.maps.lab.pass_s(100);
                node.leaves_alone(&datagram);
            }
            node.maps.lab.pass_s(121);
            assert_eq!(node.reaches(&datagram), node.backend(1));
        }
    });
}

/// An error about its answer is netfilter's to translate.
#[test]
fn an_error_about_a_foreign_flow_is_left_alone() {
    both(|v6| {
        let mut node = Node::new(v6);
        let (client, vip) = (node.client(1), node.vip(1));
        seed(&node, client, &Carries::Udp, id(1));
        node.maps.vague = true;
        let kind = if v6 { [1, 4] } else { [3, 3] };
        let answer = build(Carries::Udp, vip, client);
        let error = build(Carries::Icmp(kind, [0; 4]), client, vip);
        node.leaves_alone(&error.with(|error| error.payload = answer.packet()));
    });
}

/// The port of a foreign flow talks to other VIPs too.
#[test]
fn m11_a_foreign_flow_is_one_of_several() {
    both(|v6| {
        let mut node = Node::new(v6);
        node.maps.lab.plain(2, &[2]);
        let client = node.client(1);
        seed(&node, client, &Carries::Udp, id(1));
        assert_eq!(node.reaches(&build(Carries::Udp, client, node.vip(2))), node.backend(2));
        node.leaves_alone(&build(Carries::Udp, client, node.vip(1)));
    });
}

/// M7: a source that netfilter gave away is nobody's: not given away again, its answers and errors about them not
/// translated.
#[test]
fn m7_a_source_of_netfilters_is_left_to_it() {
    both(|v6| {
        for carries in [tcp(SYN), Carries::Udp] {
            let mut node = Node::new(v6);
            node.settings().snat_count = 2;
            let taken = SocketAddr::new(node.node(), 10_000);
            let request = build(carries.clone(), taken, node.backend(1));
            let peer = |at: SocketAddr| (at.ip().into(), Port::new(at.port()));
            let key = SnatKey::new(peer(taken), peer(node.backend(1)), request.protocol());
            node.maps.grown_snat.borrow_mut().insert(key, FlowKey::NOBODY);
            let ours = SocketAddr::new(node.node(), 10_001);
            assert_eq!(node.source_at(&build(carries.clone(), node.client(1), node.vip(1))), ours);
            let mut none = build(carries.clone(), node.client(2), node.vip(1)).frame();
            assert_eq!(node.comes_in(&mut none), After::Next);
            assert_eq!(node.goes_out(&mut none), After::Drop);
            node.maps.vague = true;
            node.leaves_alone(&build(reply(&carries), node.backend(1), taken));
            let kind = if v6 { [1, 4] } else { [3, 3] };
            let error = build(Carries::Icmp(kind, [0; 4]), node.router(), SocketAddr::new(node.node(), 0));
            node.leaves_alone(&error.with(|error| error.payload = request.packet()));
        }
    });
}

/// For the moment in which a flow is handed to netfilter its packets wait: translated by both, they would get another
/// source. Answers pass.
#[test]
fn a_flow_that_changes_hands_waits() {
    both(|v6| {
        for carries in [tcp(SYN), Carries::Udp] {
            let node = Node::new(v6);
            let (pod, vip, backend) = (node.pod(40_000), node.vip(1), node.backend(1));
            let request = build(carries.clone(), pod, vip);
            node.translates(&request, (pod, backend), (pod, backend));
            let answer = build(reply(&carries), backend, pod);
            node.translates(&answer, (backend, pod), (vip, pod));
            let (key, _) = node.maps.young.all()[0];
            packet::FlowEntry::set_flags(&node.maps.young.get(&key).unwrap(), Flow::HELD);
            let mut frame = request.frame();
            assert_eq!(node.comes_in(&mut frame), After::Drop);
            assert_eq!(frame, request.frame());
            node.translates(&answer, (backend, pod), (vip, pod));
        }
        // The node's own, both ways.
        let node = Node::new(v6);
        let own = SocketAddr::new(node.node(), 40_000);
        let request = build(Carries::Udp, own, node.vip(1));
        node.maps.own.set(true);
        let mut frame = request.frame();
        assert_eq!(node.goes_out(&mut frame), After::Leave(tables::DEVICE));
        let answer = build(Carries::Udp, node.backend(1), ends(&frame).0);
        let (key, _) = node.maps.young.all()[0];
        packet::FlowEntry::set_flags(&node.maps.young.get(&key).unwrap(), Flow::HELD);
        assert_eq!(node.goes_out(&mut request.frame()), After::Drop);
        node.maps.own.set(false);
        assert_eq!(node.comes_in(&mut answer.frame()), After::Drop);
    });
}
