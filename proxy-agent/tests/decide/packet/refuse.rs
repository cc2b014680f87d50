//! Rule Z4: what a refused client is answered.

use super::*;

/// Nobody serves VIP 2.
fn node(v6: bool) -> Node {
    let mut node = Node::new(v6);
    node.maps.lab.plain(2, &[]);
    node
}

/// The frame with its addresses of the link layer the other way round.
fn back(frame: Frame) -> Frame {
    let mut bytes = frame.bytes;
    bytes[..12].rotate_left(6);
    Frame::new(bytes)
}

#[track_caller]
fn is_answered(node: &Node, sent: &Build, answer: &Build) {
    for mut frame in sent.frames() {
        assert_eq!(node.comes_in(&mut frame), After::Answer);
        assert_eq!(frame.finished(), back(answer.frame()));
    }
}

/// Of an answer: no options, no identification.
fn plain(build: &mut Build) {
    build.ttl = 64;
    build.payload = Vec::new();
    build.id = 0;
}

/// RFC 9293, 3.5.2: the answer to a SYN acknowledges it, and whatever came with it.
#[test]
fn a_syn_is_reset() {
    both(|v6| {
        let node = node(v6);
        for options in [0, 4, 20, 40] {
            for payload in [0, 1, 2, 99] {
                let (pod, vip) = (node.pod(40_000), node.vip(2));
                for sequence in [7, u32::MAX] {
                    let carries =
                        Carries::Tcp { flags: SYN, sequence, acknowledged: 5, options: vec![1; options] };
                    let sent = build(carries, pod, vip).with(|build| {
                        build.payload = (0..payload).collect();
                    });
                    let acknowledged = sequence.wrapping_add(1 + u32::from(payload));
                    let answer =
                        Carries::Tcp { flags: RST | ACK, sequence: 0, acknowledged, options: Vec::new() };
                    let mut expected = build(answer, vip, pod).with(plain);
                    expected.window = 0;
                    is_answered(&node, &sent, &expected);
                }
            }
        }
    });
}

/// A packet with ACK is answered where its sender is; no RST is answered.
#[test]
fn other_tcp_packets() {
    both(|v6| {
        let node = node(v6);
        let (pod, vip) = (node.pod(40_000), node.vip(2));
        let refuse = |flags| {
            let mut frame = build(tcp(flags), pod, vip).frame();
            let headers = packet::parse(&frame, L2_BYTES, v6).unwrap();
            packet::refuse(&mut frame, &headers).map(|()| frame)
        };
        let answer = Carries::Tcp { flags: RST, sequence: 0xf1f2_f3f4, acknowledged: 0, options: Vec::new() };
        let mut expected = build(answer, vip, pod).with(plain);
        expected.window = 0;
        assert_eq!(refuse(ACK), Some(back(expected.frame())));
        assert_eq!(refuse(RST), None);
        assert_eq!(refuse(RST | ACK), None);
        let expected = expected.with(|build| {
            let acknowledged = 0x0102_0304 + 1 + 15;
            build.carries = Carries::Tcp { flags: RST | ACK, sequence: 0, acknowledged, options: Vec::new() };
        });
        assert_eq!(refuse(FIN), Some(back(expected.frame())));
    });
}

/// RFC 792 and 4443: port unreachable, with the header and eight bytes of what was refused.
#[test]
fn everything_else_is_unreachable() {
    both(|v6| {
        let node = node(v6);
        let echo = Carries::Icmp([if v6 { 128 } else { 8 }, 0], [0, 1, 0, 1]);
        for carries in [Carries::Udp, Carries::UdpWithout, Carries::Sctp, echo, Carries::Other(47)] {
            let (pod, vip) = (node.pod(40_000), node.vip(2));
            let sent = build(carries, pod, vip);
            let kind = if v6 { [1, 4] } else { [3, 3] };
            let answer = build(Carries::Icmp(kind, [0; 4]), vip, pod).with(plain).with(|build| {
                build.payload = sent.packet();
                build.payload.truncate(if v6 { 48 } else { 28 });
            });
            // With a checksum that was to be finished, what is quoted has another.
            let ip_bytes = if v6 { 40 } else { 20 };
            let at = L3 + ip_bytes + 8 + ip_bytes + 6;
            for mut frame in sent.frames() {
                let unfinished = frame.unfinished.is_some();
                assert_eq!(node.comes_in(&mut frame), After::Answer);
                let [mut frame, mut answer] = [frame.finished(), back(answer.frame())];
                assert!(is_valid(&frame, v6), "{unfinished} {frame:?}");
                if unfinished {
                    for frame in [&mut frame, &mut answer] {
                        frame.bytes[at..at + 2].fill(0);
                        frame.bytes[at - ip_bytes - 12..][..2].fill(0);
                    }
                }
                assert_eq!(frame, answer);
            }
        }
    });
}

/// Padding of short frames is no part of the packet.
#[test]
fn padding() {
    let node = node(false);
    let (pod, vip) = (node.pod(40_000), node.vip(2));
    for carries in [tcp(SYN), Carries::Udp] {
        let sent = build(carries, pod, vip).with(|build| build.payload.clear());
        let mut padded = sent.frame();
        padded.bytes.resize(60, 0x55);
        let mut plain = sent.frame();
        assert_eq!(node.comes_in(&mut padded), After::Answer);
        assert_eq!(node.comes_in(&mut plain), After::Answer);
        assert_eq!(padded, plain);
    }
}

/// Errors are not answered with errors, and neither is what has options or extension headers.
#[test]
fn what_is_not_answered() {
    both(|v6| {
        let node = node(v6);
        let (pod, vip) = (node.pod(40_000), node.vip(2));
        let errors: &[u8] = if v6 { &[1, 2, 3, 4, 100, 127] } else { &[3, 4, 5, 11, 12] };
        for kind in errors {
            let mut frame = build(Carries::Icmp([*kind, 0], [0; 4]), pod, vip).frame();
            assert_ne!(node.comes_in(&mut frame), After::Answer, "{kind}");
        }
        for carries in [tcp(SYN), Carries::Udp] {
            let sent = build(carries, pod, vip).with(|build| {
                build.options = vec![1; 4];
                build.extensions = vec![(60, vec![0; 7])];
            });
            assert_eq!(node.fate(&sent), After::Drop);
        }
    });
}
