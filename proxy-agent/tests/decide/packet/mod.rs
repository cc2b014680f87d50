//! The packet path on frames and tables in memory.
//!
//! | what | IPv4 | IPv6 |
//! |---|---|---|
//! | client n, from outside | 192.0.2.n | 2001:db8::n |
//! | local pod n | 10.244.128.n | fd00:244:1::n |
//! | the node | 198.51.100.1 | 2001:db8:1::1 |
//! | VIP n, backend n | as in the tables of the decision core | |
//!
//! Replaced sources have ports 10000-29999 and the address of the node.

mod build;
mod frame;
mod tables;

mod bystanders;
mod fast;
mod flows;
mod fragments;
mod icmp;
mod m11;
mod nat;
mod refuse;
mod rules;
mod snat;
mod takeover;

use std::cell::Cell;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use proxy_common::abi::{
    BackendState, Device, Flow, FlowKey, FrontendKind, FrontendValue, Lane, Origin, PacketSettings, Port,
    Prefix, Protocol, WhenEmpty, WhichSet,
};
use proxy_common::decide::Peer;
use proxy_common::decide::packet::{self, Decision, Headers, L2_BYTES, Verdict};

use super::{Lab, SERVING, id};
use build::{ACK, Build, Carries, FIN, RST, SYN, build, tcp};
use frame::{Frame, L3};
use tables::Maps;

/// What a hook does with a frame, the answer of a refusal already made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum After {
    /// Goes on.
    Next,
    Drop,
    /// Became the answer.
    Answer,
    Leave(u32),
    ComeIn(u32),
}

/// A node whose hooks are run by hand.
struct Node {
    maps: Maps,
    /// Whether the last frame that came in was said to need nothing at egress.
    settled: Cell<bool>,
}

fn socket((address, port): Peer) -> SocketAddr {
    SocketAddr::new(address.ip(), port.number())
}

fn host(v6: bool, v4: [u8; 4], segments: [u16; 3]) -> IpAddr {
    let [a, b, c] = segments;
    if v6 { Ipv6Addr::new(a, b, c, 0, 0, 0, 0, v4[3].into()).into() } else { v4.into() }
}

impl Node {
    /// Service 1 in front of backend 1, local pods told by their addresses.
    fn new(v6: bool) -> Self {
        let mut node = Self::bare(v6);
        node.maps.lab.plain(1, &[1]);
        node
    }

    /// The node of a protocol: SCTP ports cannot be changed (T2).
    fn of(v6: bool, carries: &Carries) -> Self {
        let mut node = Self::bare(v6);
        if *carries == Carries::Sctp {
            node.maps.lab.backend_port = 80;
        }
        node.maps.lab.plain(1, &[1]);
        node
    }

    fn bare(v6: bool) -> Self {
        let mut lab = Lab::new();
        lab.v6 = v6;
        lab.protocols.push(Protocol::Sctp);
        let mut maps = Maps::new(lab);
        maps.vips = (1..=9).map(|n| maps.lab.vip(n).0).collect();
        maps.cluster_ips = (1..=3).map(|n| maps.lab.vip(n).0).collect();
        let mut settings = PacketSettings {
            snat_first: 10_000,
            snat_count: 20_000,
            flags: PacketSettings::DETECTS_V4 | PacketSettings::DETECTS_V6,
            local_pods_count: 2,
            service_ranges_count: 2,
            ..PacketSettings::default()
        };
        settings.local_pods[0] = Prefix::new(host(false, [10, 244, 128, 0], [0; 3]).into(), 96 + 24);
        settings.local_pods[1] = Prefix::new(host(true, [0; 4], [0xfd00, 0x244, 1]).into(), 48);
        settings.service_ranges[0] = Prefix::new(host(false, [10, 96, 0, 0], [0; 3]).into(), 96 + 16);
        settings.service_ranges[1] = Prefix::new(host(true, [0; 4], [0xfd00, 0x96, 0]).into(), 48);
        maps.settings = Some(settings);
        maps.device = Some(Device {
            v4: host(false, [198, 51, 100, 1], [0; 3]).into(),
            v6: host(true, [0, 0, 0, 1], [0x2001, 0xdb8, 1]).into(),
            ..Device::default()
        });
        Self { maps, settled: Cell::new(false) }
    }

    fn v6(&self) -> bool {
        self.maps.lab.v6
    }

    fn vip(&self, number: u8) -> SocketAddr {
        socket(self.maps.lab.vip(number))
    }

    fn backend(&self, number: u32) -> SocketAddr {
        socket(self.maps.lab.at(number))
    }

    fn client(&self, port: u16) -> SocketAddr {
        SocketAddr::new(host(self.v6(), [192, 0, 2, 9], [0x2001, 0xdb8, 0]), port)
    }

    fn pod(&self, port: u16) -> SocketAddr {
        SocketAddr::new(host(self.v6(), [10, 244, 128, 7], [0xfd00, 0x244, 1]), port)
    }

    fn router(&self) -> SocketAddr {
        SocketAddr::new(host(self.v6(), [203, 0, 113, 1], [0x2001, 0xdb8, 9]), 0)
    }

    fn node(&self) -> IpAddr {
        host(self.v6(), [198, 51, 100, 1], [0x2001, 0xdb8, 1])
    }

    fn settings(&mut self) -> &mut PacketSettings {
        self.maps.settings.as_mut().unwrap()
    }

    /// As the ingress programs of the kernel do: whoever is spared the whole way must be left alone by it.
    fn comes_in(&self, frame: &mut Frame) -> After {
        let before = frame.clone();
        let spared = packet::passes_in(frame, &self.maps, L2_BYTES, self.v6());
        let after = self.comes_in_whole(frame);
        assert!(
            !spared || (after == After::Next && *frame == before),
            "spared at ingress: {after:?} {before:?}"
        );
        after
    }

    fn comes_in_whole(&self, frame: &mut Frame) -> After {
        self.settled.set(false);
        let Some(mut headers) = packet::parse(frame, L2_BYTES, self.v6()) else { return After::Next };
        let mut verdict = if matches!(headers.protocol, 1 | 58) {
            packet::icmp_ingress(frame, &self.maps, &headers)
        } else {
            packet::ingress(frame, &self.maps, &mut headers)
        };
        if verdict == Some(Verdict::Begin) {
            verdict = match packet::decide(&self.maps, &headers) {
                Decision::Forward(flow) => packet::begin(frame, &self.maps, &headers, &flow),
                Decision::Verdict(otherwise) => packet::stay(frame, &self.maps, &headers, otherwise),
            };
        }
        if verdict == Some(Verdict::Direct) {
            verdict = packet::direct(frame, &self.maps, &headers);
        }
        self.after(verdict, frame, &headers)
    }

    /// As the egress programs of the kernel do, and with the same condition.
    fn goes_out(&self, frame: &mut Frame) -> After {
        let before = frame.clone();
        let spared = packet::passes_out(frame, &self.maps, L2_BYTES, self.v6());
        let after = self.goes_out_whole(frame);
        assert!(
            !spared || (after == After::Next && *frame == before),
            "spared at egress: {after:?} {before:?}"
        );
        after
    }

    fn goes_out_whole(&self, frame: &mut Frame) -> After {
        let Some(mut headers) = packet::parse(frame, L2_BYTES, self.v6()) else { return After::Next };
        let mut verdict = if matches!(headers.protocol, 1 | 58) {
            match packet::icmp_egress(frame, &self.maps, &headers) {
                Some(Verdict::OtherPort) => packet::icmp_other_port(frame, &self.maps, &headers),
                verdict => verdict,
            }
        } else {
            match packet::egress(frame, &self.maps, &mut headers) {
                Some(Verdict::OtherPort) => packet::other_port(frame, &self.maps, &headers),
                Some(Verdict::GiveWay) => Some(packet::give_way(&self.maps, &headers)),
                verdict => verdict,
            }
        };
        if verdict == Some(Verdict::OwnNode) {
            verdict = Some(packet::own_node(&self.maps, &headers));
        }
        if verdict == Some(Verdict::Begin) {
            verdict = Some(match packet::decide(&self.maps, &headers) {
                Decision::Forward(flow) => packet::begin_own(&self.maps, &headers, &flow),
                Decision::Verdict(otherwise) => packet::stay_own(&self.maps, &headers, otherwise),
            });
        }
        if verdict == Some(Verdict::LeaveOwn) {
            verdict = packet::leave_own(frame, &self.maps, &headers);
        }
        if verdict == Some(Verdict::ReplaceSource) {
            verdict = packet::replace_source(frame, &self.maps, &headers);
        }
        self.after(verdict, frame, &headers)
    }

    fn after(&self, verdict: Option<Verdict>, frame: &mut Frame, headers: &Headers) -> After {
        match verdict {
            None | Some(Verdict::Next) => After::Next,
            Some(verdict @ (Verdict::ToBackend | Verdict::ToBackendByPort)) => {
                self.settled.set(verdict == Verdict::ToBackend);
                assert!(!self.maps.own.get());
                After::Next
            }
            Some(Verdict::Drop) => After::Drop,
            Some(Verdict::Refuse) => match packet::refuse(frame, headers) {
                Some(()) => After::Answer,
                None => After::Drop,
            },
            Some(Verdict::Leave(device)) => After::Leave(device),
            Some(Verdict::ComeIn(device)) => After::ComeIn(device),
            Some(
                verdict @ (Verdict::Begin
                | Verdict::Direct
                | Verdict::GiveWay
                | Verdict::OtherPort
                | Verdict::OwnNode
                | Verdict::LeaveOwn
                | Verdict::ReplaceSource),
            ) => panic!("{verdict:?} is no end"),
        }
    }

    /// In by one device and out by another: what it is in between, and what it leaves as.
    fn passes(&self, frame: &Frame) -> (Frame, Frame) {
        let mut frame = frame.clone();
        assert_eq!(self.comes_in(&mut frame), After::Next);
        let inside = frame.clone();
        assert_eq!(self.goes_out(&mut frame), After::Next);
        assert!(!self.settled.get() || frame == inside, "settled at ingress, and yet changed at egress");
        (inside.finished(), frame.finished())
    }

    /// Passes, and is in between and afterwards as said. Holds for every way that the kernel may keep the frame.
    #[track_caller]
    fn translates(&self, sent: &Build, inside: (SocketAddr, SocketAddr), outside: (SocketAddr, SocketAddr)) {
        for frame in sent.frames() {
            let (was_inside, was_outside) = self.passes(&frame);
            assert_eq!(was_inside, sent.between(inside.0, inside.1).frame(), "inside");
            assert_eq!(was_outside, sent.between(outside.0, outside.1).frame(), "outside");
        }
    }

    /// Stays as it is, bit for bit.
    #[track_caller]
    fn leaves_alone(&self, sent: &Build) {
        for frame in sent.frames() {
            let mut after = frame.clone();
            assert_eq!(self.comes_in(&mut after), After::Next);
            assert_eq!(after, frame, "ingress");
            assert_eq!(self.goes_out(&mut after), After::Next);
            assert_eq!(after, frame, "egress");
        }
    }

    /// What becomes of a packet that comes in.
    fn fate(&self, sent: &Build) -> After {
        self.comes_in(&mut sent.frame())
    }

    /// The backend to which a packet goes that comes in.
    #[track_caller]
    fn reaches(&self, sent: &Build) -> SocketAddr {
        let mut frame = sent.frame();
        assert_eq!(self.comes_in(&mut frame), After::Next);
        ends(&frame).1
    }

    /// The only flow that there is.
    #[track_caller]
    fn flow(&self) -> Flow {
        let flows = [self.maps.young.all(), self.maps.grown.all()].concat();
        assert_eq!(flows.len(), 1, "{flows:?}");
        flows[0].1
    }

    /// The source as which a packet leaves for this backend.
    #[track_caller]
    fn source_at(&self, sent: &Build) -> SocketAddr {
        ends(&self.passes(&sent.frame()).1).0
    }
}

/// The sum over an ICMP message, as who gets it checks it.
fn is_valid(frame: &Frame, v6: bool) -> bool {
    let bytes = &frame.bytes[L3..];
    if !v6 {
        return frame::sum(&bytes[..20]) == 0xffff && frame::sum(&bytes[20..]) == 0xffff;
    }
    let length = u32::try_from(bytes.len() - 40).unwrap().to_be_bytes();
    frame::sum(&[&bytes[8..40], &length, &[0, 0, 0, 58], &bytes[40..]].concat()) == 0xffff
}

/// Source and destination of a frame with ports and without options or extensions.
fn ends(frame: &Frame) -> (SocketAddr, SocketAddr) {
    let headers = packet::parse(frame, L2_BYTES, frame.bytes[L3] >> 4 == 6).unwrap();
    (socket(headers.source), socket(headers.destination))
}

fn kinds() -> [Carries; 4] {
    [tcp(SYN), Carries::Udp, Carries::UdpWithout, Carries::Sctp]
}

/// Runs for each family and kind of packet.
fn each(test: impl Fn(bool, Carries)) {
    for v6 in [false, true] {
        for carries in kinds() {
            eprintln!("{} {carries:?}", if v6 { "IPv6" } else { "IPv4" });
            test(v6, carries);
        }
    }
}

/// Runs for each family.
fn both(test: impl Fn(bool)) {
    for v6 in [false, true] {
        eprintln!("{}", if v6 { "IPv6" } else { "IPv4" });
        test(v6);
    }
}

/// What a backend answers.
fn reply(carries: &Carries) -> Carries {
    if matches!(carries, Carries::Tcp { .. }) { tcp(SYN | ACK) } else { carries.clone() }
}

/// What the client sends then.
fn going_on(carries: &Carries) -> Carries {
    if matches!(carries, Carries::Tcp { .. }) { tcp(ACK) } else { carries.clone() }
}
