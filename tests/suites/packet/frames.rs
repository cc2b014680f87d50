//! Whoever dials no Service: every frame as it was, bit for bit; and what a node says to clients of a VIP beside answers.

use std::{net::SocketAddr, process::Stdio};

use etherparse::{
    IpFragOffset, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv6Extensions, Ipv6FlowLabel,
    Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader, PacketBuilder, VlanId, ip_number,
};
use sheave_tests::{
    lab::Place,
    nodes::{
        Layout, World,
        tap::{Tap, hardware_address},
    },
};

use crate::{
    stage::{Stage, bridge_pod, cluster_ips, frontends, p2p_pod, served},
    talk::{BOTH, SILENCE, Talk, ask, datagrams, try_once},
};

/// In every frame of a test, and in no other.
const MARK: &[u8] = b"as it was, bit for bit";

/// Where frames are sent, and where they are seen again.
struct Path<'a> {
    from: &'a Place,
    to: &'a Place,
    /// The hardware address that the sender gives.
    next_hop: [u8; 6],
    /// Whether a bridge carries them on, so that they may have tags.
    switched: bool,
}

fn paths(world: &World) -> Vec<Path<'_>> {
    let node = world.node(0).unwrap().host().netns();
    let mac = |netns, device| hardware_address(netns, device).unwrap();
    let [bridge, other, p2p] = [bridge_pod(world, 0, 0), bridge_pod(world, 0, 1), p2p_pod(world, 0, 0)];
    let routed = |from, to, next_hop| Path { from, to, next_hop, switched: false };
    vec![
        routed(world.outside(), bridge, mac(node, "eth0")),
        routed(world.outside(), p2p, mac(node, "eth0")),
        routed(bridge, world.outside(), mac(node, "cbr0")),
        routed(bridge, p2p, mac(node, "cbr0")),
        routed(p2p, bridge_pod(world, 1, 0), mac(node, p2p.name())),
        Path { from: bridge, to: other, next_hop: mac(other.netns(), "eth0"), switched: true },
    ]
}

/// Frames of many kinds, none of which a Service may take for its own; ports are those of backends, too.
fn frames(path: &Path<'_>) -> Vec<Vec<u8>> {
    let Path { from, to, next_hop, switched } = path;
    let own = hardware_address(from.netns(), "eth0").unwrap();
    let ethernet = || PacketBuilder::ethernet2(own, *next_hop);
    let v4 = || ethernet().ipv4(from.v4().octets(), to.v4().octets(), 33);
    let v6 = || ethernet().ipv6(from.v6().octets(), to.v6().octets(), 33);
    let mut frames = Vec::new();
    macro_rules! frame {
        ($builder:expr) => {{
            let mut frame = Vec::new();
            $builder.write(&mut frame, MARK).unwrap();
            frames.push(frame);
        }};
        ($builder:expr, $next:expr) => {{
            let mut frame = Vec::new();
            $builder.write(&mut frame, $next, MARK).unwrap();
            frames.push(frame);
        }};
    }
    for (source, destination) in [(40_000, 9876), (9876, 80), (80, 30_501)] {
        frame!(v4().tcp(source, destination, 7, 1000).syn());
        frame!(v4().tcp(source, destination, 7, 1000).ack(9).psh());
        frame!(v4().udp(source, destination));
        frame!(v6().tcp(source, destination, 7, 1000).syn());
        frame!(v6().tcp(source, destination, 7, 1000).rst());
        frame!(v6().udp(source, destination));
    }
    frame!(v4().icmpv4_echo_request(1, 2));
    frame!(v6().icmpv6_echo_request(1, 2));
    // A datagram without a checksum, and a segment with a wrong one, are none of our business.
    let last = |frames: &mut Vec<Vec<u8>>, change: &dyn Fn(&mut Vec<u8>)| change(frames.last_mut().unwrap());
    frame!(v4().udp(40_001, 9876));
    last(&mut frames, &|frame| frame[40..42].fill(0));
    frame!(v4().tcp(40_002, 9876, 7, 1000).syn());
    last(&mut frames, &|frame| frame[50] ^= 0xff);
    // Protocols that no Service has, and parts of datagrams.
    let ip4 = |protocol, offset: u16, more| {
        let mut header = Ipv4Header::new(0, 33, protocol, from.v4().octets(), to.v4().octets()).unwrap();
        header.identification = 77;
        header.fragment_offset = IpFragOffset::try_new(offset).unwrap();
        header.more_fragments = more;
        ethernet().ip(IpHeaders::Ipv4(header, Ipv4Extensions::default()))
    };
    for protocol in [ip_number::GRE, ip_number::SCTP, IpNumber(253)] {
        frame!(ip4(protocol, 0, false), protocol);
    }
    frame!(ip4(ip_number::UDP, 0, true), ip_number::UDP);
    frame!(ip4(ip_number::UDP, 3, false), ip_number::UDP);
    let ip6 = |extensions| {
        let header = Ipv6Header {
            traffic_class: 0,
            flow_label: Ipv6FlowLabel::ZERO,
            payload_length: 0,
            next_header: ip_number::UDP,
            hop_limit: 33,
            source: from.v6().octets(),
            destination: to.v6().octets(),
        };
        ethernet().ip(IpHeaders::Ipv6(header, extensions))
    };
    let padding = Ipv6RawExtHeader::new_raw(ip_number::UDP, &[1, 4, 0, 0, 0, 0]).unwrap();
    let options = Ipv6Extensions { destination_options: Some(padding), ..Ipv6Extensions::default() };
    frame!(ip6(options), ip_number::UDP);
    for (offset, more) in [(0, true), (3, false)] {
        let offset = IpFragOffset::try_new(offset).unwrap();
        let fragment = Ipv6FragmentHeader::new(ip_number::UDP, offset, more, 77);
        let part = Ipv6Extensions { fragment: Some(fragment), ..Ipv6Extensions::default() };
        frame!(ip6(part), ip_number::UDP);
    }
    if *switched {
        let tagged = || ethernet().single_vlan(VlanId::try_new(42).unwrap());
        frame!(tagged().ipv4(from.v4().octets(), to.v4().octets(), 33).udp(40_003, 9876));
        frame!(tagged().ipv6(from.v6().octets(), to.v6().octets(), 33).tcp(40_003, 9876, 7, 1000).syn());
    }
    frames
}

/// What comes of them at the other end.
fn carried(path: &Path<'_>) -> Vec<Vec<u8>> {
    let sender = Tap::open(path.from.netns(), "eth0").unwrap();
    let receiver = Tap::open(path.to.netns(), "eth0").unwrap();
    frames(path).iter().for_each(|frame| sender.send(frame).unwrap());
    // Servers answer, and get errors for it that quote them: not our frames. In both families an error's type is below
    // that of an echo, and it follows a header without options.
    let is_error = |frame: &[u8]| match (&frame[12..14], frame[23], frame[20]) {
        ([0x08, 0x00], 1, _) => frame[34] == 3,
        ([0x86, 0xdd], _, 58) => frame[54] == 1,
        _ => false,
    };
    let marked = |frame: &[u8]| frame.windows(MARK.len()).any(|part| part == MARK) && !is_error(frame);
    let mut seen = receiver.receive_all(SILENCE, marked).unwrap();
    seen.sort();
    seen
}

/// Everyone knows their neighbours.
fn greet(world: &World) {
    for path in paths(world) {
        for to in path.to.sockets(9876) {
            for transport in BOTH {
                // Who does not serve refuses; its neighbours have found it by then.
                let _ = try_once(world, path.from, transport, to, SILENCE);
            }
        }
    }
}

/// The same frames come out as before there was an agent: with Services whose backends are the very same pods and ports,
/// and with flows of the very same clients.
#[test]
fn bystanders_are_untouched_bit_for_bit() {
    let mut world = World::new(Layout::default()).unwrap();
    world.serve().unwrap();
    greet(&world);
    let before: Vec<_> = paths(&world).iter().map(carried).collect();
    for (path, seen) in paths(&world).iter().zip(&before) {
        assert_eq!(seen.len(), frames(path).len(), "{} to {}", path.from.name(), path.to.name());
    }
    let stage = Stage::on(world);
    let world = &stage.world;
    let backends = [(0, bridge_pod(world, 0, 0)), (0, p2p_pod(world, 0, 0)), (1, bridge_pod(world, 1, 0))];
    stage.apply("web", &served(world, "web", 1, &backends));
    let all = [0, 1].map(|family| frontends(world, 1, family)).concat();
    let froms = [world.outside(), bridge_pod(world, 0, 0), p2p_pod(world, 0, 0)];
    let dial = |to: &SocketAddr| froms.map(|from| Talk::open(from, 0, *to));
    let _talks: Vec<_> = all.iter().filter(|to| to.port() != 80).flat_map(dial).collect();
    for (path, before) in paths(world).iter().zip(&before) {
        let after = carried(path);
        let pair = format!("{} to {}", path.from.name(), path.to.name());
        assert_eq!(after.len(), before.len(), "{pair}: not as many frames");
        for (after, before) in after.iter().zip(before) {
            assert_eq!(after, before, "{pair}: another frame");
        }
    }
}

/// A node that sends a client's packets on by the wire that they came from tells it of the shorter way: to a client of a
/// VIP that would be the backend's node, which knows nothing of the VIP.
#[test]
fn redirects_do_not_lead_clients_of_a_vip_away() {
    let stage = Stage::new(Layout { redirects: true, ..Layout::default() });
    let world = &stage.world;
    // On another node over the same wire.
    stage.apply("web", &served(world, "web", 1, &[(1, bridge_pod(world, 1, 0))]));
    let outside = world.outside();
    for (address, node) in cluster_ips(1).iter().zip(world.node(0).unwrap().host().sockets(0)) {
        let to = SocketAddr::new(*address, 80);
        for _ in 0..5 {
            Talk::open(outside, 0, to).echo(100).unwrap();
            ask(&datagrams(outside, to), b"question").unwrap();
        }
        let mut route = outside.command("ip").unwrap();
        let output =
            route.args(["route", "get", &address.to_string()]).stdin(Stdio::null()).output().unwrap();
        let route = String::from_utf8(output.stdout).unwrap();
        assert!(route.contains(&format!(" via {} ", node.ip())), "{route}");
    }
}
