//! ICMP errors: what they quote is translated with them, in all four positions.

use super::*;

/// Types and codes: too big, time exceeded, parameter problem, port unreachable.
fn errors(v6: bool) -> Vec<([u8; 2], [u8; 4])> {
    if v6 {
        vec![([2, 0], [0, 0, 5, 0]), ([3, 0], [0; 4]), ([4, 0], [0, 0, 0, 6]), ([1, 4], [0; 4])]
    } else {
        vec![([3, 4], [0, 0, 5, 0]), ([11, 0], [0; 4]), ([12, 0], [9, 0, 0, 0]), ([3, 3], [0; 4])]
    }
}

/// An error that quotes so many bytes of a packet.
fn error(from: SocketAddr, to: SocketAddr, kind: ([u8; 2], [u8; 4]), quoted: &Build, bytes: usize) -> Build {
    build(Carries::Icmp(kind.0, kind.1), from, to).with(|build| {
        build.payload = quoted.packet();
        build.payload.truncate(bytes);
    })
}

const ALL: usize = 1000;

/// Quotes that end after the ports, after eight bytes as the oldest RFC wants it, or nowhere.
fn cuts(v6: bool) -> [usize; 3] {
    let header = if v6 { 40 } else { 20 };
    [header + 4, header + 8, ALL]
}

/// A TCP checksum in a quote stays as it was: it is not among the bytes that are sure to be quoted, and nobody looks.
fn without_tcp_checksum(frame: &Frame, sent: &Build, v6: bool) -> Vec<u8> {
    let mut bytes = frame.bytes.clone();
    let at = L3 + if v6 { 40 + 8 + 40 } else { 20 + 8 + 20 } + 16;
    if matches!(sent.carries, Carries::Tcp { .. }) && bytes.len() > at + 1 {
        bytes[at..at + 2].fill(0);
        let checksum = L3 + if v6 { 42 } else { 22 };
        bytes[checksum..checksum + 2].fill(0);
    }
    bytes
}

/// Sends an error about `about` through a node where a client talks to backend 1, from `pod` or from outside, and
/// compares what comes out at each hook.
#[track_caller]
fn translates(
    node: &Node,
    about: &Build,
    sent: (SocketAddr, SocketAddr),
    quoted: (SocketAddr, SocketAddr),
    steps: [((SocketAddr, SocketAddr), (SocketAddr, SocketAddr)); 2],
) {
    for kind in errors(node.v6()) {
        for cut in cuts(node.v6()) {
            let with = |outer: (SocketAddr, SocketAddr), inner: (SocketAddr, SocketAddr)| {
                error(outer.0, outer.1, kind, &about.between(inner.0, inner.1), cut).frame()
            };
            let (inside, outside) = node.passes(&with(sent, quoted));
            for (frame, (outer, inner)) in [inside, outside].iter().zip(steps) {
                let plain = |frame: &Frame| without_tcp_checksum(frame, about, node.v6());
                assert_eq!(plain(frame), plain(&with(outer, inner)), "{kind:?} {cut}");
                assert!(is_valid(frame, node.v6()), "{kind:?} {cut} {frame:?}");
            }
        }
    }
}

/// Who talks to VIP 1.
struct Client {
    /// As it is outside.
    itself: SocketAddr,
    /// As it is inside the node.
    inside: SocketAddr,
    /// As the backend sees it.
    source: SocketAddr,
}

/// What goes on between whom, for a client whose source is kept and for one whose is replaced; with its own port inside
/// the node, or with another (M11).
fn scenes(test: impl Fn(&Node, &Carries, &Client)) {
    each(|v6, carries| {
        for (outside, clashes) in [(false, false), (false, true), (true, false), (true, true)] {
            if clashes && carries == Carries::Sctp {
                continue;
            }
            let mut node = Node::of(v6, &carries);
            node.maps.lab.plain(4, &[1]);
            let itself = if outside { node.client(40_000) } else { node.pod(40_000) };
            if clashes {
                node.passes(&build(carries.clone(), itself, node.vip(4)).frame());
            }
            let (inside, outside) = node.passes(&build(carries.clone(), itself, node.vip(1)).frame());
            let client = Client { itself, inside: ends(&inside).0, source: ends(&outside).0 };
            assert_eq!(client.inside != itself, clashes);
            node.passes(&build(reply(&carries), node.backend(1), client.source).frame());
            node.maps.counted();
            test(&node, &carries, &client);
        }
    });
}

/// Of a router, or of the backend itself, about what the client sent: to the client, who knows the VIP only.
#[test]
fn about_a_request_from_behind_the_node() {
    scenes(|node, carries, &Client { itself: client, inside, source }| {
        let (vip, backend) = (node.vip(1), node.backend(1));
        let about = build(carries.clone(), client, vip);
        for from in [node.router(), backend] {
            translates(
                node,
                &about,
                (from, source),
                (source, backend),
                [((from, inside), (inside, backend)), ((vip, client), (client, vip))],
            );
        }
    });
}

/// Of the node itself about what the client sent: the link behind it is too narrow.
#[test]
fn about_a_request_from_the_node_itself() {
    scenes(|node, carries, &Client { itself: client, inside, .. }| {
        let (vip, backend) = (node.vip(1), node.backend(1));
        let own = SocketAddr::new(node.node(), 0);
        let about = build(carries.clone(), inside, backend);
        let mut frame = error(own, client, errors(node.v6())[0], &about, cuts(node.v6())[1]).frame();
        assert_eq!(node.goes_out(&mut frame), After::Next);
        let expected = error(
            vip,
            client,
            errors(node.v6())[0],
            &build(carries.clone(), client, vip),
            cuts(node.v6())[1],
        );
        let plain = |frame: &Frame| {
            let mut bytes = without_tcp_checksum(frame, &about, node.v6());
            // A UDP checksum is that of the translated packet: `between` would make the same.
            bytes.truncate(L3 + ALL);
            bytes
        };
        assert_eq!(plain(&frame), plain(&expected.frame()));
        assert_eq!(node.maps.counted(), [("packet_icmp_translated", 1)]);
    });
}

/// Of a router in front of the node about a reply: to the backend, who knows the client or its replaced source.
#[test]
fn about_a_reply() {
    scenes(|node, carries, &Client { itself: client, inside, source }| {
        let (vip, backend) = (node.vip(1), node.backend(1));
        let about = build(reply(carries), vip, client);
        // Who sent the error gives way to who was sent to, but only where the source was replaced.
        let outer = if source == inside { node.router() } else { source };
        translates(
            node,
            &about,
            (node.router(), vip),
            (vip, client),
            [((node.router(), backend), (backend, inside)), ((outer, backend), (backend, source))],
        );
    });
}

/// About packets of nobody, cut off before their ports, or no packets at all.
#[test]
fn about_something_else() {
    scenes(|node, carries, &Client { itself: client, source, .. }| {
        let (v6, vip, backend) = (node.v6(), node.vip(1), node.backend(1));
        let kind = errors(v6)[0];
        let other = SocketAddr::new(client.ip(), 9);
        let router = node.router();
        let ours = build(carries.clone(), source, backend);
        for build in [
            error(router, other, kind, &build(carries.clone(), other, backend), ALL),
            error(router, client, kind, &build(carries.clone(), client, node.backend(3)), ALL),
            error(router, source, kind, &ours, if v6 { 43 } else { 23 }),
            error(router, source, kind, &ours, 12),
            error(router, source, kind, &ours, 0),
            error(router, vip, kind, &build(carries.clone(), node.vip(2), client), ALL),
            error(router, source, kind, &build(Carries::Other(47), source, backend), ALL),
        ] {
            node.leaves_alone(&build);
        }
        assert_eq!(node.maps.counted(), []);
        // Z6 is not for errors.
        let echo = build(Carries::Icmp([if v6 { 129 } else { 0 }, 0], [0; 4]), router, client);
        node.leaves_alone(&echo);
    });
}

/// A redirect about a flow would send the client elsewhere with what is for the VIP.
#[test]
fn redirects_about_a_flow_are_dropped() {
    scenes(|node, carries, &Client { itself: client, inside, source }| {
        if node.v6() {
            return;
        }
        let (vip, backend, router) = (node.vip(1), node.backend(1), node.router());
        let redirect = |from, to, quoted: (SocketAddr, SocketAddr)| {
            error(from, to, ([5, 1], [192, 0, 2, 77]), &build(carries.clone(), quoted.0, quoted.1), 28)
                .frame()
        };
        assert_eq!(node.goes_out(&mut redirect(router, client, (inside, backend))), After::Drop);
        if source != inside {
            assert_eq!(node.comes_in(&mut redirect(router, source, (source, backend))), After::Drop);
            assert_eq!(node.goes_out(&mut redirect(router, backend, (backend, inside))), After::Drop);
        }
        assert_eq!(node.comes_in(&mut redirect(router, vip, (vip, client))), After::Drop);
        node.leaves_alone(&error(
            router,
            client,
            ([5, 1], [192, 0, 2, 77]),
            &build(carries.clone(), client, node.backend(3)),
            28,
        ));
    });
}

/// The quoted UDP checksum may come out as zero, which says that there is none.
#[test]
fn a_quoted_udp_checksum_of_zero() {
    both(|v6| {
        let node = Node::new(v6);
        let (pod, vip, backend) = (node.pod(40_000), node.vip(1), node.backend(1));
        let request = build(Carries::Udp, pod, vip).with(|build| build.payload = vec![0, 0, 7, 7]);
        let segment = request.segment();
        let request = request.with(|build| build.payload[..2].copy_from_slice(&segment[6..8]));
        assert_eq!(request.segment()[6..8], [0xff, 0xff]);
        node.passes(&request.frame());
        let about = request.between(pod, backend);
        let kind = errors(v6)[0];
        let mut frame = error(node.router(), pod, kind, &about, ALL).frame();
        assert_eq!(node.goes_out(&mut frame), After::Next);
        assert_eq!(frame, error(vip, pod, kind, &request, ALL).frame());
    });
}
