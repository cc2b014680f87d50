//! There and back: addresses, ports and checksums.

use super::*;

/// A client whose source is kept: DNAT at ingress, un-DNAT at egress.
#[test]
fn a_vip_becomes_a_backend_and_back() {
    each(|v6, carries| {
        let node = Node::of(v6, &carries);
        let (pod, vip, backend) = (node.pod(40_000), node.vip(1), node.backend(1));
        node.translates(&build(carries.clone(), pod, vip), (pod, backend), (pod, backend));
        assert_eq!(node.flow().flags, 0);
        let answer = build(reply(&carries), backend, pod).with(|build| build.payload = b"odd".to_vec());
        node.translates(&answer, (backend, pod), (vip, pod));
        assert_eq!(node.flow().flags, Flow::HEARD);
        // And it goes on: the flow grows up.
        node.translates(&build(going_on(&carries), pod, vip), (pod, backend), (pod, backend));
        assert_eq!(node.flow().flags, Flow::HEARD | Flow::ANSWERED);
        node.translates(&answer, (backend, pod), (vip, pod));
    });
}

/// M3: a client whose source is replaced, by the node's address at egress and back at ingress.
#[test]
fn m7_a_source_is_replaced_and_restored() {
    each(|v6, carries| {
        let node = Node::of(v6, &carries);
        let (client, vip, backend) = (node.client(40_000), node.vip(1), node.backend(1));
        let request = build(carries.clone(), client, vip);
        let source = node.source_at(&request);
        assert_eq!(source.ip(), node.node());
        if carries == Carries::Sctp {
            assert_eq!(source.port(), 40_000, "T2");
        } else {
            assert!((10_000..30_000).contains(&source.port()));
        }
        node.translates(&request, (client, backend), (source, backend));
        let answer = build(reply(&carries), backend, source).with(|build| build.payload = b"odd".to_vec());
        node.translates(&answer, (backend, client), (vip, client));
        assert_eq!(node.flow().flags, Flow::HEARD | Flow::NEEDS_SNAT);
        node.translates(&build(going_on(&carries), client, vip), (client, backend), (source, backend));
        assert_eq!(node.flow().flags, Flow::HEARD | Flow::ANSWERED | Flow::NEEDS_SNAT);
        node.translates(&answer, (backend, client), (vip, client));
    });
}

/// Every way out is counted, and nothing else is.
#[test]
fn what_is_counted() {
    both(|v6| {
        let node = Node::new(v6);
        let (client, vip, backend) = (node.client(40_000), node.vip(1), node.backend(1));
        let request = build(tcp(SYN), client, vip);
        let source = node.source_at(&request);
        let begun = [("packet_flow_begun", 1), ("packet_forwarded", 1), ("packet_source_replaced", 1)];
        assert_eq!(node.maps.counted(), begun);
        node.passes(&request.frame());
        assert_eq!(node.maps.counted(), [("packet_followed", 1), ("packet_source_replaced", 1)]);
        node.passes(&build(tcp(SYN | ACK), backend, source).frame());
        assert_eq!(node.maps.counted(), [("packet_replied", 1), ("packet_source_restored", 1)]);
        node.passes(&build(tcp(ACK), client, vip).frame());
        let grown = [("packet_flow_grown", 1), ("packet_followed", 1), ("packet_source_replaced", 1)];
        assert_eq!(node.maps.counted(), grown);
        // The next one from this port has its place, where nothing is thrown out.
        node.passes(&build(tcp(RST), client, vip).frame());
        node.maps.counted();
        let source = node.source_at(&request);
        assert_eq!(node.maps.counted(), [("packet_forwarded", 1), ("packet_source_replaced", 1)]);
        node.passes(&build(tcp(SYN | ACK), backend, source).frame());
        assert_eq!(node.maps.counted(), [("packet_replied", 1), ("packet_source_restored", 1)]);
        node.passes(&build(tcp(ACK), client, vip).frame());
        assert_eq!(node.maps.counted(), [("packet_followed", 1), ("packet_source_replaced", 1)]);
    });
}

/// IPv4 options lie between addresses and ports.
#[test]
fn ipv4_options() {
    let node = Node::new(false);
    let (pod, vip, backend) = (node.pod(40_000), node.vip(1), node.backend(1));
    for bytes in [4, 24, 40] {
        let options = |build: &mut Build| build.options = vec![1; bytes];
        for carries in [tcp(SYN), Carries::Udp] {
            let request = build(carries.clone(), pod, vip).with(options);
            node.translates(&request, (pod, backend), (pod, backend));
            node.translates(&build(reply(&carries), backend, pod).with(options), (backend, pod), (vip, pod));
        }
    }
}

/// Hop-by-hop options, destination options, a routing header and an atomic fragment's.
fn extensions(count: usize) -> Vec<(u8, Vec<u8>)> {
    let all = [
        (0, vec![0, 1, 4, 0, 0, 0, 0]),
        (60, [vec![1], vec![0; 14]].concat()),
        (43, vec![0, 4, 0, 0, 0, 0, 0]),
        (44, vec![0, 0, 0, 1, 2, 3, 4]),
        (60, vec![0; 7]),
        (60, vec![0; 7]),
        (60, vec![0; 7]),
    ];
    all[..count].to_vec()
}

#[test]
fn ipv6_extension_headers() {
    let node = Node::new(true);
    let (pod, vip, backend) = (node.pod(40_000), node.vip(1), node.backend(1));
    for count in 0..=6 {
        let with = |build: &mut Build| build.extensions = extensions(count);
        for carries in [tcp(SYN), Carries::Udp] {
            let request = build(carries.clone(), pod, vip).with(with);
            node.translates(&request, (pod, backend), (pod, backend));
            node.translates(&build(reply(&carries), backend, pod).with(with), (backend, pod), (vip, pod));
        }
    }
}

/// More of them than anybody sends, or longer, or cut short: not ours.
#[test]
fn ipv6_extension_headers_without_end() {
    let node = Node::new(true);
    let request = build(tcp(SYN), node.pod(40_000), node.vip(1));
    node.leaves_alone(&request.clone().with(|build| build.extensions = extensions(7)));
    let long = [vec![59], vec![0; 478]].concat();
    node.leaves_alone(&request.clone().with(|build| build.extensions = vec![(60, long)]));
    let chain = request.with(|build| build.extensions = extensions(5)).frame();
    let headers = chain.bytes.len() - L3 - 40;
    for cut in 1..headers.min(90) {
        let mut short = Frame::new(chain.bytes[..L3 + 40 + cut].to_vec());
        let before = short.clone();
        if node.comes_in(&mut short) == After::Next && node.maps.young.all().is_empty() {
            assert_eq!(short, before);
        }
    }
}

/// A checksum that comes out as zero is written as its other form: zero says that there is none.
#[test]
fn udp_checksums_of_zero() {
    each(|v6, carries| {
        if carries != Carries::Udp {
            return;
        }
        let node = Node::new(v6);
        let (pod, vip, backend) = (node.pod(40_000), node.vip(1), node.backend(1));
        let request = build(carries, pod, vip).with(|build| build.payload = vec![0, 0, 7, 7]);
        // The payload's first word is what the rest sums to: with it the sum is zero's other form.
        let translated = request.between(pod, backend);
        let segment = translated.segment();
        let rest = u16::from_be_bytes([segment[6], segment[7]]);
        let request = request.with(|build| build.payload[..2].copy_from_slice(&rest.to_be_bytes()));
        let translated = request.between(pod, backend).segment();
        assert_eq!(translated[6..8], [0xff, 0xff]);
        node.translates(&request, (pod, backend), (pod, backend));
    });
}
