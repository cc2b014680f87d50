//! Only the first fragment of a packet has its ports.

use super::*;

/// Three fragments of one packet.
fn fragments(whole: &Build, id: u16) -> [Build; 3] {
    let whole = whole.clone().with(|build| build.payload = (0..100).collect());
    let end = whole.segment().len();
    [0..48, 48..72, 72..end].map(|part| whole.clone().with(|build| build.fragment = Some((part, id))))
}

/// What the pieces make when they are put together: the IP payload.
fn assembled(v6: bool, frames: &[Frame]) -> Vec<u8> {
    let header = L3 + if v6 { 48 } else { 20 };
    frames.iter().flat_map(|frame| frame.bytes[header..].to_vec()).collect()
}

/// Goes through both hooks in pieces and comes out as if it had gone through whole.
#[track_caller]
fn translates(
    node: &Node,
    pieces: &[Build; 3],
    inside: (SocketAddr, SocketAddr),
    outside: (SocketAddr, SocketAddr),
) {
    let passed = pieces.iter().map(|piece| node.passes(&piece.frame()));
    let (insides, outsides): (Vec<Frame>, Vec<Frame>) = passed.unzip();
    for (frames, (from, to)) in [(insides, inside), (outsides, outside)] {
        for (frame, piece) in frames.iter().zip(pieces) {
            let length = piece.frame().bytes.len() - piece.fragment.as_ref().unwrap().0.len();
            assert_eq!(frame.bytes[..length], piece.between(from, to).frame().bytes[..length], "its header");
        }
        let whole = pieces[0].between(from, to);
        assert_eq!(assembled(node.v6(), &frames), whole.segment(), "the whole of it");
    }
}

/// With and without a replaced source, there and back.
#[test]
fn fragments_follow_the_first_one() {
    each(|v6, carries| {
        let node = Node::of(v6, &carries);
        for (n, client) in [node.pod(40_000), node.client(40_000)].into_iter().enumerate() {
            let (vip, backend) = (node.vip(1), node.backend(1));
            let request = build(carries.clone(), client, vip);
            let source = node.source_at(&request);
            let id = 9 * u16::try_from(n).unwrap();
            translates(&node, &fragments(&request, id), (client, backend), (source, backend));
            let answer = build(reply(&carries), backend, source);
            translates(&node, &fragments(&answer, id + 1), (backend, client), (vip, client));
            let (there, back) = (request.clone(), answer.clone());
            node.translates(&there, (client, backend), (source, backend));
            node.translates(&back, (backend, client), (vip, client));
        }
    });
}

/// A first fragment may also be a connection's first packet.
#[test]
fn a_first_fragment_makes_a_flow() {
    each(|v6, carries| {
        let node = Node::of(v6, &carries);
        let (pod, vip, backend) = (node.pod(40_000), node.vip(1), node.backend(1));
        translates(&node, &fragments(&build(carries, pod, vip), 5), (pod, backend), (pod, backend));
    });
}

/// Without the first one, or with that of another packet, nothing is known of it.
#[test]
fn later_fragments_of_unknown_packets() {
    each(|v6, carries| {
        let node = Node::of(v6, &carries);
        let (pod, vip) = (node.pod(40_000), node.vip(1));
        let [first, later, last] = fragments(&build(carries.clone(), pod, vip), 5);
        node.leaves_alone(&later);
        node.leaves_alone(&last);
        assert!(node.maps.young.all().is_empty());
        node.passes(&first.frame());
        let [_, other, _] = fragments(&build(carries, pod, vip), 6);
        node.leaves_alone(&other);
        let [_, other, _] = fragments(&build(Carries::Other(47), pod, vip), 5);
        let mut frame = other.frame();
        assert_eq!(node.comes_in(&mut frame), After::Next);
        assert_eq!(frame, other.frame());
    });
}

/// What a later fragment seems to have at the place of its ports, or of a TCP header's flags, is payload.
#[test]
fn payload_is_not_read_as_ports() {
    each(|v6, carries| {
        let node = Node::of(v6, &carries);
        let (pod, vip) = (node.pod(40_000), node.vip(1));
        let whole = build(carries.clone(), pod, vip)
            .with(|build| build.payload = [vec![0; 60], build.segment(), vec![0; 60]].concat());
        let start = whole.segment().len() - 60 - build(carries.clone(), pod, vip).segment().len();
        let start = start / 8 * 8;
        let piece = whole.clone().with(|build| build.fragment = Some((start..start + 32, 5)));
        node.leaves_alone(&piece);
        assert!(node.maps.young.all().is_empty() && node.maps.fragments.borrow().is_empty());
    });
}

/// No answer to what is no beginning; none either to IPv6 fragments, whose quote would need another length.
#[test]
fn refusals_of_fragments() {
    both(|v6| {
        let mut node = Node::new(v6);
        node.maps.lab.plain(2, &[]);
        let [first, later, last] = fragments(&build(Carries::Udp, node.pod(40_000), node.vip(2)), 5);
        let answered = if v6 { After::Drop } else { After::Answer };
        assert_eq!(node.fate(&first), answered);
        for piece in [later, last] {
            let mut frame = piece.frame();
            assert_ne!(node.comes_in(&mut frame), After::Answer);
            assert_eq!(frame, piece.frame());
        }
        // A ping to a cluster IP.
        let echo = Carries::Icmp([if v6 { 128 } else { 8 }, 0], [0, 1, 0, 1]);
        let [first, later, _] = fragments(&build(echo, node.pod(40_000), node.vip(1)), 6);
        assert_eq!(node.fate(&first), answered);
        assert_ne!(node.fate(&later), After::Answer);
    });
}
