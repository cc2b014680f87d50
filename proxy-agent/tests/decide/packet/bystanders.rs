//! Frames of any content: nothing breaks, and what is not ours stays as it is, bit for bit.

use super::*;
use proptest::prelude::*;

/// A node with a flow of each kind, one with a replaced source; filters that know everything or nothing.
fn busy(v6: bool, vague: bool) -> Node {
    let mut node = Node::new(v6);
    node.maps.lab.plain(2, &[]);
    for (n, carries) in [tcp(SYN), Carries::Udp].into_iter().enumerate() {
        let port = 40_000 + u16::try_from(n).unwrap();
        for client in [node.pod(port), node.client(port)] {
            let source = node.source_at(&build(carries.clone(), client, node.vip(1)));
            node.passes(&build(reply(&carries), node.backend(1), source).frame());
        }
    }
    node.maps.vague = vague;
    node.maps.counted();
    node
}

/// Whether any of our ways was taken. Refusals and drops count too.
fn touched(node: &Node) -> bool {
    node.maps.counted().iter().any(|(name, _)| *name != "packet_untouched")
}

fn any_carries() -> impl Strategy<Value = Carries> {
    prop_oneof![
        (any::<u8>(), any::<u32>(), any::<u32>(), 0..=10_usize).prop_map(
            |(flags, sequence, acknowledged, words)| Carries::Tcp {
                flags,
                sequence,
                acknowledged,
                options: vec![1; words * 4]
            }
        ),
        Just(Carries::Udp),
        Just(Carries::UdpWithout),
        Just(Carries::Sctp),
        (any::<[u8; 2]>(), any::<[u8; 4]>()).prop_map(|(kind, rest)| Carries::Icmp(kind, rest)),
        any::<u8>().prop_map(Carries::Other),
    ]
}

/// Who is not ours is spared the whole way, at both hooks; whatever may be ours is not. (That nobody is spared wrongly,
/// each test of this module shows: see `comes_in`.)
#[test]
fn bystanders_are_spared() {
    each(|v6, carries| {
        let node = busy(v6, false);
        let spared = |from, to| {
            let frame = build(carries.clone(), from, to).frame();
            (
                packet::passes_in(&frame, &node.maps, L2_BYTES, v6),
                packet::passes_out(&frame, &node.maps, L2_BYTES, v6),
            )
        };
        let (client, pod, router) = (node.client(50_000), node.pod(50_000), node.router());
        assert_eq!(spared(client, pod), (true, true));
        assert_eq!(spared(pod, router), (true, true));
        // The backend itself, asked by somebody without a flow.
        assert_eq!(spared(client, node.backend(1)), (true, true));
        assert_eq!(spared(client, node.vip(1)), (false, true));
        node.maps.own.set(true);
        assert_eq!(spared(client, node.vip(1)), (false, false));
        node.maps.own.set(false);
        // A reply, and what a client with a flow sends, wherever to (M11).
        assert_eq!(spared(node.backend(1), node.pod(40_000)), (true, false));
        assert_eq!(spared(node.pod(40_000), node.backend(1)), (false, false));
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bytes of any kind behind an IP header's first byte; addresses of ours more often than chance would have it.
    #[test]
    fn bytes_of_any_kind(
        v6: bool,
        vague: bool,
        at_egress: bool,
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        addresses in 0..16_u8,
    ) {
        let node = busy(v6, vague);
        if let Some(first) = bytes.get_mut(L3) {
            *first = if v6 { 0x60 } else { 0x45 };
        }
        let all = [node.vip(1), node.backend(1), node.pod(40_000), node.client(40_001)];
        let like = build(
            Carries::Udp,
            all[usize::from(addresses / 4)],
            all[usize::from(addresses % 4)],
        );
        let like = like.packet();
        let (from, to) = if v6 { (8, 40) } else { (12, 20) };
        if bytes.len() >= L3 + to {
            bytes[L3 + from..L3 + to].copy_from_slice(&like[from..to]);
        }
        let before = Frame::new(bytes);
        let mut frame = before.clone();
        let after = if at_egress { node.goes_out(&mut frame) } else { node.comes_in(&mut frame) };
        if after == After::Next && !touched(&node) {
            prop_assert_eq!(frame, before);
        }
    }

    /// Packets of ours that are cut short anywhere: either translated or left alone, not half of each.
    #[test]
    fn frames_cut_short(v6: bool, at_egress: bool, carries in any_carries(), cut in 0..120_usize) {
        let node = busy(v6, false);
        let sent = if at_egress {
            build(carries, node.backend(1), node.pod(40_000))
        } else {
            build(carries, node.pod(40_000), node.vip(1))
        };
        let mut before = sent.frame();
        before.bytes.truncate(cut);
        let mut frame = before.clone();
        let after = if at_egress { node.goes_out(&mut frame) } else { node.comes_in(&mut frame) };
        if after == After::Next && frame != before {
            // Changed, then all of it: there and back again is the same.
            let whole = packet::parse(&frame, L2_BYTES, v6).unwrap();
            let checksum = match whole.protocol { 6 => 18, 17 => 8, _ => 0 };
            prop_assert!(cut >= whole.l4 as usize + checksum, "{:?}", frame);
        }
    }

    /// There and back again: the client's packet comes out of the backend's as it went in.
    #[test]
    fn there_and_back(
        v6: bool,
        outside: bool,
        port in 1..=u16::MAX,
        vip_port in 1..=u16::MAX,
        kind in 0..3_usize,
        payload in prop::collection::vec(any::<u8>(), 0..64),
        unfinished: bool,
    ) {
        let carries = [tcp(SYN), Carries::Udp, Carries::UdpWithout][kind].clone();
        let mut node = Node::new(v6);
        let (address, _) = node.maps.lab.vip(1);
        let number = build(carries.clone(), node.pod(1), node.vip(1)).protocol();
        let key = proxy_common::abi::FrontendKey::new(address, Port::new(vip_port), number);
        let value = FrontendValue::new(1, FrontendKind::ClusterIp);
        node.maps.lab.write(proxy_agent::dataplane::Write::Frontend { key, value });
        let client = if outside { node.client(port) } else { node.pod(port) };
        let vip = SocketAddr::new(address.ip(), vip_port);
        let way = |build: &Build| if unfinished { build.frames().pop().unwrap() } else { build.frame() };
        let request = build(carries.clone(), client, vip).with(|build| build.payload.clone_from(&payload));
        let (_, sent) = node.passes(&way(&request));
        let (source, backend) = ends(&sent);
        prop_assert_eq!(&sent, &request.between(source, backend).frame());
        let answer = request.between(backend, source);
        let (_, got) = node.passes(&way(&answer));
        prop_assert_eq!(got, request.between(vip, client).frame());
    }
}
