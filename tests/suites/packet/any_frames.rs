//! Frames of any content through the very programs and tables that a node has (`BPF_PROG_TEST_RUN`): what is of no Service
//! stays as it is, bit for bit; of others only addresses, ports and checksums change, and sound ones stay sound.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
};

use aya::{
    Ebpf, EbpfLoader, TestRunOptions,
    programs::{SchedClassifier, TestRun},
};
use etherparse::PacketBuilder;
use proxy_agent::kernel::{
    Pins,
    programs::{self, CLASSIFIERS, CONTINUATIONS, OBJECT},
};
use sheave_tests::{
    engine::monotonic_ns,
    lab::Place,
    measure::packets::{DROP, NEXT},
    nodes::{Layout, World},
    random::Random,
    scene::TARGET,
};

use crate::{
    stage::{
        Stage, balancer_ips, bridge_pod, cluster_ips, everything, external_ips, node_port, p2p_pod, served,
    },
    talk::Talk,
};

const FRAMES: u32 = 200_000;

/// `ETH_P_IP`, `ETH_P_IPV6`.
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const L3: usize = 14;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// What a program says besides: `TC_ACT_REDIRECT`.
const REDIRECT: u32 = 7;

/// How addresses of the lab and of its Services begin. A frame without any of these, wherever, is of no Service.
const OURS: [[u8; 2]; 6] = [[10, 96], [10, 244], [172, 18], [198, 18], [203, 0], [0xfd, 0x00]];

fn byte(random: &mut Random) -> u8 {
    random.number().to_be_bytes()[0]
}

fn one<T: Copy>(random: &mut Random, of: &[T]) -> T {
    of[random.below(of.len())]
}

/// The IP header at `l3` and what follows: where the transport header is, and whose. `None`: there is none.
fn transport(frame: &[u8], l3: usize, v6: bool) -> Option<(u8, usize)> {
    if !v6 {
        let length = usize::from(frame.get(l3)? & 15) * 4;
        let fragment = u16::from_be_bytes([*frame.get(l3 + 6)?, *frame.get(l3 + 7)?]);
        return (fragment & 0x1fff == 0).then_some((*frame.get(l3 + 9)?, l3 + length));
    }
    let (mut protocol, mut at) = (*frame.get(l3 + 6)?, l3 + 40);
    loop {
        let next = *frame.get(at)?;
        match protocol {
            0 | 43 | 60 => at += (usize::from(*frame.get(at + 1)?) + 1) * 8,
            44 => {
                if u16::from_be_bytes([*frame.get(at + 2)?, *frame.get(at + 3)?]) & 0xfff8 != 0 {
                    return None;
                }
                at += 8;
            }
            _ => return Some((protocol, at)),
        }
        protocol = next;
    }
}

/// The family, unless it is no IP.
fn is_v6(frame: &[u8]) -> Option<bool> {
    match frame.get(12..14)? {
        kind if kind == IPV4 => Some(false),
        kind if kind == IPV6 => Some(true),
        _ => None,
    }
}

/// Which bytes a translation may change: addresses, ports, checksums; of an ICMP error those of its quote too.
fn changeable(frame: &[u8]) -> Vec<bool> {
    let mut may = vec![false; frame.len()];
    let mut mark = |from: usize, to: usize| {
        let to = to.min(may.len());
        may[from.min(to)..to].fill(true);
    };
    let Some(v6) = is_v6(frame) else { return may };
    let mut l3 = L3;
    loop {
        if v6 {
            mark(l3 + 8, l3 + 40)
        } else {
            mark(l3 + 10, l3 + 20)
        }
        let Some((protocol, l4)) = transport(frame, l3, v6) else { break };
        match protocol {
            TCP | UDP => {
                let checksum = l4 + if protocol == TCP { 16 } else { 6 };
                mark(l4, l4 + 4);
                mark(checksum, checksum + 2);
            }
            ICMP | ICMPV6 if l3 == L3 => {
                mark(l4 + 2, l4 + 4);
                l3 = l4 + 8;
                continue;
            }
            _ => {}
        }
        break;
    }
    may
}

/// RFC 1071.
fn sum<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u16 {
    let words = parts.into_iter().flat_map(|part| part.chunks(2));
    let word = |word: &[u8]| u64::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]));
    let mut sum: u64 = words.map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

/// Whether it is a whole packet of a known protocol, with lengths and checksums that are right.
fn is_sound(frame: &[u8]) -> bool {
    let check = || {
        let v6 = is_v6(frame)?;
        let (protocol, l4) = transport(frame, L3, v6)?;
        let length =
            |at: usize| Some(usize::from(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?])));
        let whole = if v6 { length(L3 + 4)? + L3 + 40 } else { length(L3 + 2)? + L3 };
        let is_part = !v6 && u16::from_be_bytes([frame[L3 + 6], frame[L3 + 7]]) & 0x3fff != 0;
        let version = if v6 { 6 } else { 4 };
        if whole != frame.len() || is_part || frame[L3] >> 4 != version || l4 < L3 + 20 {
            return None;
        }
        if !v6 && sum([frame.get(L3..l4)?]) != 0xffff {
            return None;
        }
        let segment = frame.get(l4..)?;
        let is_right = |with_addresses: bool| {
            let addresses = if v6 { &frame[L3 + 8..L3 + 40] } else { &frame[L3 + 12..L3 + 20] };
            let size = u32::try_from(segment.len()).unwrap().to_be_bytes();
            let rest = [0, protocol];
            let pseudo = if with_addresses { [addresses, &size, &rest] } else { [&[][..]; 3] };
            sum(pseudo.into_iter().chain([segment])) == 0xffff
        };
        Some(match protocol {
            TCP => segment.len() >= 20 && is_right(true),
            UDP => {
                let size = segment.get(4..6)?;
                let is_whole = usize::from(u16::from_be_bytes([size[0], size[1]])) == segment.len();
                is_whole && (!v6 && segment.get(6..8)? == [0, 0] || is_right(true))
            }
            ICMP if !v6 => segment.len() >= 8 && is_right(false),
            ICMPV6 if v6 => segment.len() >= 8 && is_right(true),
            _ => return None,
        })
    };
    check().unwrap_or(false)
}

/// Makes frames.
struct Maker {
    random: Random,
    /// Addresses of each family, with ports.
    ends: [Vec<(IpAddr, u16)>; 2],
    /// What programs made of frames. These are answered, quoted, and sent again.
    seen: Vec<Vec<u8>>,
}

impl Maker {
    fn frame(&mut self) -> Vec<u8> {
        let mut frame = match self.random.below(8) {
            0 => return self.noise(),
            1 if !self.seen.is_empty() => self.answer(),
            2 if !self.seen.is_empty() => self.error(),
            3 if !self.seen.is_empty() => self.quoted(),
            _ => self.packet(),
        };
        if self.random.below(3) == 0 {
            self.mutate(&mut frame);
        }
        frame
    }

    /// An Ethernet header and nothing of sense.
    fn noise(&mut self) -> Vec<u8> {
        let length = L3 + self.random.below(200);
        let mut frame: Vec<u8> = (0..length).map(|_| byte(&mut self.random)).collect();
        let (kind, first) =
            one(&mut self.random, &[(IPV4, 0x45), (IPV4, 0x46), (IPV6, 0x60), ([0x08, 0x06], 0)]);
        frame[12..14].copy_from_slice(&kind);
        if let Some(byte) = frame.get_mut(L3) {
            *byte = first;
        }
        frame
    }

    fn packet(&mut self) -> Vec<u8> {
        let family = self.random.below(2);
        let ends = self.ends[family].clone();
        let ((from, from_port), (to, to_port)) = (one(&mut self.random, &ends), one(&mut self.random, &ends));
        let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let ip = match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 33),
            (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 33),
            mixed => panic!("{mixed:?}"),
        };
        let payload = vec![0x5a; self.random.below(60)];
        let mut frame = Vec::new();
        match self.random.below(8) {
            0..3 => ip.udp(from_port, to_port).write(&mut frame, &payload),
            3 => ip.icmpv4_echo_request(1, 2).write(&mut frame, &payload),
            kind => {
                let tcp = ip.tcp(from_port, to_port, 7, 1000);
                match kind {
                    4 => tcp.syn(),
                    5 => tcp.fin().ack(9),
                    6 => tcp.rst(),
                    _ => tcp.ack(9),
                }
                .write(&mut frame, &payload)
            }
        }
        .unwrap();
        frame
    }

    /// The other side says the same. No checksum changes with it.
    fn answer(&mut self) -> Vec<u8> {
        let mut frame = self.quoted();
        let Some(v6) = is_v6(&frame) else { return frame };
        let (source, length) = if v6 { (L3 + 8, 16) } else { (L3 + 12, 4) };
        swap(&mut frame, 0, 6);
        swap(&mut frame, source, length);
        if let Some((TCP | UDP, l4)) = transport(&frame, L3, v6) {
            swap(&mut frame, l4, 2);
        }
        frame
    }

    /// A router quotes it to its sender.
    fn error(&mut self) -> Vec<u8> {
        let mut quoted = self.quoted();
        let Some(v6) = is_v6(&quoted).filter(|_| quoted.len() > L3 + 40) else { return quoted };
        quoted.truncate(L3 + 40 + self.random.below(60));
        let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let (quoted, mut frame) = (&quoted[L3..], Vec::new());
        // Unreachable, too big, redirects.
        if v6 {
            let to: [u8; 16] = quoted[8..24].try_into().unwrap();
            let ip = ethernet.ipv6([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], to, 33);
            let kind = one(&mut self.random, &[1, 2, 137]);
            ip.icmpv6_raw(kind, 0, [0, 0, 5, 0]).write(&mut frame, quoted).unwrap();
        } else {
            let to: [u8; 4] = quoted[12..16].try_into().unwrap();
            let (kind, code) = one(&mut self.random, &[(3, 3), (3, 4), (5, 1)]);
            let icmp = ethernet.ipv4([192, 0, 2, 1], to, 33).icmpv4_raw(kind, code, [0, 0, 5, 0]);
            icmp.write(&mut frame, quoted).unwrap();
        }
        frame
    }

    fn quoted(&mut self) -> Vec<u8> {
        let number = self.random.below(self.seen.len());
        self.seen[number].clone()
    }

    fn mutate(&mut self, frame: &mut Vec<u8>) {
        match self.random.below(4) {
            0 => frame.truncate(L3.max(self.random.below(frame.len() + 1))),
            1 => frame.extend((0..self.random.below(40)).map(|_| 0xa5)),
            _ => {}
        }
        for _ in 0..self.random.below(5) {
            let at = 12 + self.random.below(frame.len() - 12);
            frame[at] = byte(&mut self.random);
        }
    }

    /// What a program made of a frame comes back later.
    fn see(&mut self, frame: Vec<u8>) {
        const SEEN: usize = 256;
        if self.seen.len() < SEEN {
            self.seen.push(frame);
        } else {
            let number = self.random.below(SEEN);
            self.seen[number] = frame;
        }
    }
}

/// Two neighbouring fields change places.
fn swap(frame: &mut [u8], at: usize, length: usize) {
    if let Some(both) = frame.get_mut(at..at + 2 * length) {
        both.rotate_left(length);
    }
}

/// A whole packet back to the sender: a reset, or an error.
fn is_refusal(frame: &[u8], answer: &[u8]) -> bool {
    let Some(v6) = is_v6(frame) else { return false };
    let (source, length) = if v6 { (L3 + 8, 16) } else { (L3 + 12, 4) };
    let destination = source + length;
    let says = match transport(answer, L3, v6) {
        Some((TCP, l4)) => answer.get(l4 + 13).is_some_and(|flags| flags & 4 != 0),
        Some((ICMP, l4)) if !v6 => answer.get(l4) == Some(&3),
        Some((ICMPV6, l4)) if v6 => answer.get(l4) == Some(&1),
        Some(_) | None => false,
    };
    says && is_v6(answer) == Some(v6)
        && answer.get(source..destination) == frame.get(destination..destination + length)
        && answer.get(destination..destination + length) == frame.get(source..destination)
}

/// What is wrong with what became of a frame.
fn wrong(frame: &[u8], verdict: u32, out: &[u8]) -> Option<String> {
    let is_ours = frame[L3..].windows(2).any(|pair| OURS.iter().any(|ours| ours == pair));
    if is_v6(frame).is_none() || !is_ours {
        let same = verdict == NEXT && out == frame;
        return (!same).then(|| "it is of no Service, and not as it was".to_owned());
    }
    if verdict == DROP {
        return None;
    }
    if verdict == REDIRECT && is_refusal(frame, out) {
        return (is_sound(frame) && !is_sound(out)).then(|| "its refusal is unsound".to_owned());
    }
    let link = match verdict {
        // A bridge switches it to the backend.
        NEXT => 6,
        REDIRECT => 12,
        other => return Some(format!("verdict {other}")),
    };
    if out.len() != frame.len() {
        return Some(format!("{} bytes became {}", frame.len(), out.len()));
    }
    let may = changeable(frame);
    let changed = |at: &usize| *at >= link && !may[*at] && frame[*at] != out[*at];
    if let Some(at) = (0..frame.len()).find(changed) {
        return Some(format!("byte {at} is another"));
    }
    (is_sound(frame) && !is_sound(out)).then(|| "it is sound no more".to_owned())
}

/// The programs as the agent loads them, on its tables. Those that go on for others are found in its table.
fn load(pins: &Pins) -> Ebpf {
    let generation = pins.newest().unwrap().unwrap();
    let pinned: Vec<_> = [pins.state(), pins.tables(generation)]
        .iter()
        .flat_map(|directory| fs::read_dir(directory).unwrap())
        .map(|map| map.unwrap())
        .map(|map| (map.file_name().into_string().unwrap(), map.path()))
        .collect();
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    for (name, path) in &pinned {
        loader.map_pin_path(name, path);
    }
    loader.load(OBJECT).unwrap_or_else(|error| panic!("needs root: {error:?}"))
}

/// Runs a program on a frame: what it says, and the frame. `None`: the kernel takes no such frame.
fn run(program: &SchedClassifier, frame: &[u8], device: u32, came_by: u32) -> Option<(u32, Vec<u8>)> {
    // `struct __sk_buff`: the device of arrival and that of the hook.
    let mut context = [0_u8; 48];
    context[36..40].copy_from_slice(&came_by.to_ne_bytes());
    context[40..44].copy_from_slice(&device.to_ne_bytes());
    let mut out = vec![0; 2048];
    let options = TestRunOptions {
        data_in: Some(frame),
        data_out: Some(&mut out),
        ctx_in: Some(&context),
        ..TestRunOptions::default()
    };
    match program.test_run(options) {
        Ok(result) => {
            out.truncate(usize::try_from(result.data_size_out).unwrap());
            Some((result.return_value, out))
        }
        // Not even an IP header.
        Err(_) if frame.len() < L3 + 40 => None,
        Err(error) => panic!("{error:?}: {frame:02x?}"),
    }
}

/// Whoever may meet: clients, pods and nodes; VIPs of a Service with endpoints and of one without; others.
fn ends(world: &World) -> [Vec<(IpAddr, u16)>; 2] {
    let places: [&Place; 5] = [
        world.far(),
        bridge_pod(world, 0, 0),
        bridge_pod(world, 0, 1),
        p2p_pod(world, 0, 0),
        bridge_pod(world, 1, 0),
    ];
    let others =
        [["192.0.2.1", "2001:db8::1"], ["198.51.100.1", "2001:db8:1::1"], ["10.96.77.7", "fd00:10:96::7777"]];
    [0, 1].map(|family| {
        let mut ends = Vec::new();
        for address in places.map(|place| place.sockets(0)[family].ip()) {
            ends.extend([40_000, 40_001, TARGET].map(|port| (address, port)));
        }
        for vips in [cluster_ips(1), external_ips(1), balancer_ips(1), cluster_ips(2)] {
            ends.extend([(vips[family], 80), (vips[family], 80), (vips[family], 81)]);
        }
        let node = world.node(0).unwrap().host().sockets(0)[family].ip();
        ends.extend([(node, node_port(1)), (node, node_port(2)), (node, 41_000)]);
        ends.extend(others.map(|both| (both[family].parse().unwrap(), 42_000)));
        ends
    })
}

#[test]
fn frames_of_any_content() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    let backends = [(0, bridge_pod(world, 0, 0)), (0, p2p_pod(world, 0, 0)), (1, bridge_pod(world, 1, 0))];
    let mut objects = served(world, "web", 1, &backends);
    objects.push(everything("empty", 2));
    stage.apply("web", &objects);
    let node = world.node(0).unwrap();
    let names = ["eth0", bridge_pod(world, 0, 1).name(), p2p_pod(world, 0, 0).name()];
    let seed = monotonic_ns();
    println!("seed {seed}");
    let mut maker = Maker { random: Random::new(seed), ends: ends(world), seen: Vec::new() };
    let mut verdicts = BTreeMap::new();
    let mut not_run = 0;
    let test = || {
        let mut ebpf = load(&Pins::new(node.bpffs()));
        // Frames of a test run have a link header.
        let classifiers = CLASSIFIERS.into_iter().filter(|name| !name.ends_with("_bare"));
        let all = classifiers.chain(CONTINUATIONS.map(|(name, _)| name));
        for name in all.clone() {
            programs::load(ebpf.program_mut(name).unwrap(), name)
                .unwrap_or_else(|error| panic!("{name}: {error:?}"));
        }
        let programs: Vec<(&str, &SchedClassifier)> =
            all.map(|name| (name, ebpf.program(name).unwrap().try_into().unwrap())).collect();
        let devices = names.map(|name| nix::net::if_::if_nametoindex(name).unwrap());
        for number in 0..FRAMES {
            let frame = maker.frame();
            let ((name, program), device) =
                (one(&mut maker.random, &programs), one(&mut maker.random, &devices));
            let came_by = one(&mut maker.random, &[0, device]);
            let Some((verdict, out)) = run(program, &frame, device, came_by) else {
                not_run += 1;
                continue;
            };
            *verdicts.entry((name, verdict)).or_insert(0) += 1;
            if let Some(wrong) = wrong(&frame, verdict, &out) {
                panic!("frame {number}, {name}, verdict {verdict}: {wrong}:\n{frame:02x?}\n{out:02x?}");
            }
            if out.len() > L3 + 20 && (out != frame || maker.random.below(8) == 0) {
                maker.see(out);
            }
        }
    };
    node.host().netns().run(test).unwrap();
    println!("{verdicts:?}, {not_run} not run");
    assert!(not_run < FRAMES / 10, "{not_run} frames were not taken");

    // Every way was taken.
    for counter in [
        "packet_forwarded",
        "packet_followed",
        "packet_replied",
        "packet_source_replaced",
        "packet_source_restored",
        "packet_icmp_translated",
        "packet_rejected",
        "packet_dropped",
        "packet_unassigned",
        "packet_flow_grown",
    ] {
        let count = world.agent(0).unwrap().counter(counter).unwrap();
        assert!(count >= 20, "{counter}: {count}");
    }
    // And whoever comes now is served.
    for address in cluster_ips(1) {
        Talk::open(world.far(), 0, SocketAddr::new(address, 80)).echo(3000).unwrap();
    }
}
