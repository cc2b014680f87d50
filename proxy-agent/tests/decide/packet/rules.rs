//! Rules M, F, Z and P by who sends.

use super::*;

const EXTERNAL: [FrontendKind; 3] =
    [FrontendKind::LoadBalancer, FrontendKind::ExternalIp, FrontendKind::NodePort];

/// VIP 4 is an external one of service 1; with a local set for outside clients, if `local`.
fn external(node: &mut Node, kind: FrontendKind, local: bool) {
    let mut value = FrontendValue::new(1, kind);
    if local {
        value = value.with_local_set_for(Origin::Elsewhere);
    }
    node.maps.lab.frontend(4, value);
}

/// Whether the sources of a local pod and of somebody else are replaced on the way to a VIP.
fn replaced(node: &Node, vip: u8) -> [bool; 2] {
    [node.pod(40_000 + u16::from(vip)), node.client(40_000 + u16::from(vip))]
        .map(|from| node.source_at(&build(tcp(SYN), from, node.vip(vip))) != from)
}

#[test]
fn m2_to_a_cluster_ip() {
    both(|v6| {
        assert_eq!(replaced(&Node::new(v6), 1), [false, true]);
        let mut node = Node::new(v6);
        node.settings().flags |= PacketSettings::MASQUERADE_ALL;
        assert_eq!(replaced(&node, 1), [true, true]);
        // Detection is a matter of the family.
        let own = if v6 { PacketSettings::DETECTS_V6 } else { PacketSettings::DETECTS_V4 };
        let mut node = Node::new(v6);
        node.settings().flags &= !own;
        assert_eq!(replaced(&node, 1), [false, false]);
        let mut node = Node::new(v6);
        node.settings().flags = own;
        assert_eq!(replaced(&node, 1), [false, true]);
    });
}

#[test]
fn m3_m4_to_an_external_vip() {
    both(|v6| {
        for kind in EXTERNAL {
            let mut node = Node::new(v6);
            external(&mut node, kind, false);
            assert_eq!(replaced(&node, 4), [true, true]);
            let mut node = Node::new(v6);
            external(&mut node, kind, true);
            node.maps.lab.set(1, WhichSet::Local, &[1], WhenEmpty::Drop);
            assert_eq!(replaced(&node, 4), [false, false], "M4");
        }
    });
}

/// M1: by the device that a packet comes in by, as well as by its source.
#[test]
fn m1_local_pods_by_device() {
    both(|v6| {
        let mut node = Node::new(v6);
        node.settings().local_pods_count = 0;
        assert_eq!(replaced(&node, 1), [true, true]);
        node.maps.device.as_mut().unwrap().flags = Device::LOCAL_PODS;
        let node = Node { maps: node.maps, settled: Cell::new(false) };
        let from = node.client(50_000);
        assert_eq!(node.source_at(&build(tcp(SYN), from, node.vip(1))), from);
        // A device that nobody has described has no pods behind it.
        let mut node = Node::new(v6);
        node.settings().local_pods_count = 0;
        node.maps.device = None;
        node.comes_in(&mut build(tcp(SYN), node.pod(40_000), node.vip(1)).frame());
        assert!(node.flow().needs_snat());
    });
}

/// M5: a pod that is sent to itself.
#[test]
fn m5_hairpin() {
    each(|v6, carries| {
        let mut node = Node::of(v6, &carries);
        node.settings().flags = 0;
        let (backend, vip) = (node.backend(1), node.vip(1));
        let pod = SocketAddr::new(backend.ip(), 40_000);
        let request = build(carries.clone(), pod, vip);
        let source = node.source_at(&request);
        assert_eq!(source.ip(), node.node());
        node.translates(&request, (pod, backend), (source, backend));
        node.translates(&build(reply(&carries), backend, source), (backend, pod), (vip, pod));
    });
}

/// P10, P11: outside clients get the local set, local pods the cluster set.
#[test]
fn p11_which_set_serves_whom() {
    both(|v6| {
        let mut node = Node::new(v6);
        external(&mut node, FrontendKind::NodePort, true);
        node.maps.lab.set(1, WhichSet::Local, &[2], WhenEmpty::Drop);
        let to = |from| node.reaches(&build(tcp(SYN), from, node.vip(4)));
        assert_eq!(to(node.pod(1)), node.backend(1));
        assert_eq!(to(node.client(1)), node.backend(2));
    });
}

/// F2, F3, F7: who is in no range is dropped, before anything else; only new connections are asked.
#[test]
fn f2_source_ranges() {
    both(|v6| {
        for carries in kinds() {
            let mut node = Node::of(v6, &carries);
            let vip = FrontendValue::new(1, FrontendKind::LoadBalancer).with_source_ranges();
            node.maps.lab.frontend(4, vip);
            let (client, pod) = (node.client(40_000), node.pod(40_000));
            let request = build(carries.clone(), client, node.vip(4));
            let old = build(carries.clone(), node.client(50_000), node.vip(4));
            node.maps.source_ranges = vec![(1, Prefix::new(client.ip().into(), 128))];
            assert_eq!(node.reaches(&old), node.backend(1));
            assert_eq!(node.fate(&build(carries.clone(), pod, node.vip(4))), After::Drop, "F3");
            // Of another service, or another client's.
            node.maps.source_ranges =
                vec![(2, Prefix::new(client.ip().into(), 128)), (1, Prefix::new(pod.ip().into(), 128))];
            node.maps.counted();
            assert_eq!(node.fate(&request), After::Drop);
            assert_eq!(node.maps.counted(), [("packet_source_refused", 1)]);
            assert_eq!(node.reaches(&old), node.backend(1), "F7");
            assert_eq!(node.reaches(&build(carries.clone(), pod, node.vip(4))), node.backend(1));
            node.maps.lab.set(1, WhichSet::Cluster, &[], WhenEmpty::Reject);
            assert_eq!(node.fate(&request), After::Drop, "a blocked client sees a drop");
            // F1: not to the cluster IP.
            assert_eq!(node.fate(&build(carries, client, node.vip(1))), After::Answer);
        }
    });
}

#[test]
fn z1_z2_z3_no_usable_endpoint() {
    both(|v6| {
        for carries in kinds() {
            let mut node = Node::of(v6, &carries);
            let (client, pod) = (node.client(40_000), node.pod(40_000));
            let fate = |node: &Node, from, vip| node.fate(&build(carries.clone(), from, node.vip(vip)));
            // Z1: nobody at all.
            node.maps.lab.plain(2, &[]);
            assert_eq!([fate(&node, client, 2), fate(&node, pod, 2)], [After::Answer; 2]);
            assert_eq!(node.maps.counted(), [("packet_rejected", 2)]);
            // Z2: internalTrafficPolicy Local.
            node.maps.lab.set(1, WhichSet::Local, &[], WhenEmpty::Drop);
            let internal = FrontendValue::new(1, FrontendKind::ClusterIp);
            let internal = Origin::ALL.into_iter().fold(internal, FrontendValue::with_local_set_for);
            node.maps.lab.frontend(3, internal);
            assert_eq!([fate(&node, client, 3), fate(&node, pod, 3)], [After::Drop; 2]);
            assert_eq!(node.maps.counted(), [("packet_dropped", 2)]);
            // Z3: externalTrafficPolicy Local.
            external(&mut node, FrontendKind::LoadBalancer, true);
            assert_eq!([fate(&node, client, 4), fate(&node, pod, 4)], [After::Drop, After::Next]);
            assert_eq!(node.maps.young.all().len(), 1);
        }
    });
}

/// A record that is not written yet, or settings: no rule to apply.
#[test]
fn what_the_agent_has_not_written() {
    both(|v6| {
        let mut node = Node::new(v6);
        node.maps.lab.frontend(2, FrontendValue::new(2, FrontendKind::ClusterIp));
        node.leaves_alone(&build(tcp(SYN), node.pod(1), node.vip(2)));
        assert_eq!(node.maps.counted(), [("packet_untouched", 2)]);
        node.maps.settings = None;
        node.leaves_alone(&build(tcp(SYN), node.pod(1), node.vip(1)));
        assert!(node.maps.young.all().is_empty());
    });
}

/// Z6: ports, protocols and addresses that no Service has.
#[test]
fn z6_elsewhere_in_the_service_ranges() {
    both(|v6| {
        let mut node = Node::new(v6);
        let pod = node.pod(40_000);
        let port = |vip: SocketAddr| SocketAddr::new(vip.ip(), 81);
        let echo = Carries::Icmp([if v6 { 128 } else { 8 }, 0], [0, 1, 0, 1]);
        let mut all = kinds().to_vec();
        all.extend([Carries::Other(47), echo]);
        for carries in all {
            let fate = |to| node.fate(&build(carries.clone(), pod, to));
            assert_eq!(fate(port(node.vip(1))), After::Answer, "a cluster IP: {carries:?}");
            assert_eq!(node.maps.counted(), [("packet_rejected", 1)]);
            let nobody = SocketAddr::new(socket(node.maps.lab.vip(99)).ip(), 80);
            assert_eq!(fate(nobody), After::Drop, "an address of nobody: {carries:?}");
            assert_eq!(node.maps.counted(), [("packet_unassigned", 1)]);
        }
        // An external VIP, in no Service range, is what it is (X4).
        node.settings().service_ranges_count = 0;
        for carries in kinds() {
            node.leaves_alone(&build(carries.clone(), pod, port(node.vip(5))));
            node.leaves_alone(&build(carries, pod, socket(node.maps.lab.vip(99))));
        }
        assert_eq!(node.maps.counted(), []);
        // A connection that goes on is none that begins.
        node.leaves_alone(&build(tcp(ACK), pod, port(node.vip(1))));
    });
}

/// T2: an SCTP port cannot be changed.
#[test]
fn t2_sctp_to_another_port_is_refused() {
    both(|v6| {
        let node = Node::new(v6);
        assert_eq!(node.fate(&build(Carries::Sctp, node.pod(40_000), node.vip(1))), After::Answer);
        assert!(node.maps.young.all().is_empty());
        assert_eq!(node.maps.counted(), [("packet_rejected", 1)]);
    });
}

/// N7: the same number may be another Service's in another protocol.
#[test]
fn n7_by_protocol() {
    both(|v6| {
        let mut node = Node::new(v6);
        let (address, port) = node.maps.lab.vip(5);
        let key = proxy_common::abi::FrontendKey::new(address, port, 17);
        let value = FrontendValue::new(1, FrontendKind::NodePort);
        node.maps.lab.write(proxy_agent::dataplane::Write::Frontend { key, value });
        node.settings().service_ranges_count = 0;
        node.leaves_alone(&build(tcp(SYN), node.client(1), node.vip(5)));
        assert_eq!(node.reaches(&build(Carries::Udp, node.client(1), node.vip(5))), node.backend(1));
    });
}
