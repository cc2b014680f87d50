//! Clients that do not exist.

use std::{fs, thread};

use anyhow::ensure;
use etherparse::PacketBuilder;
use nix::errno::Errno;
use proxy_agent::{
    kernel::{Pins, table::Table},
    packet::flows::now_ns,
};
use proxy_common::abi::{Flow, FlowKey, Port};
use serde_json::Value;
use sheave_tests::{
    lab::Place,
    measure::packets::{Arrivals, Counter, Flows, Generator, Target},
    nodes::{
        Layout, World,
        tap::{Tap, hardware_address},
    },
    scene::{TARGET, eventually},
};

use crate::{
    stage::{Stage, bridge_pod, cluster_ips, frontends, served},
    talk::{Talk, ask, datagrams},
};

/// Ten times what `FLOWS` holds unless it is told otherwise.
const SYNS: u32 = 10 * 65_536;

/// Addresses of the far client's network that nobody has.
const SENDERS: u16 = 240;

/// Sends first packets to a VIP, each from a client of its own.
struct Flood {
    tap: Tap,
    frame: Vec<u8>,
    sent: u32,
}

impl Flood {
    fn new(from: &Place, gateway: [u8; 6], vip: std::net::Ipv4Addr) -> Self {
        let own = hardware_address(from.netns(), "eth0").unwrap();
        let packet = PacketBuilder::ethernet2(own, gateway)
            .ipv4([198, 18, 1, 3], vip.octets(), 64)
            .tcp(10_000, 80, 0xf000_f000, 1000)
            .syn();
        let mut frame = Vec::new();
        packet.write(&mut frame, b"").unwrap();
        // The identification, which a header's sum is kept with.
        let checksum = u16::from_be_bytes([frame[24], frame[25]]);
        frame[18..20].copy_from_slice(&0xf000_u16.to_be_bytes());
        let mut sum = u32::from(!checksum) + 0xf000;
        sum = (sum & 0xffff) + (sum >> 16);
        frame[24..26].copy_from_slice(&(!u16::try_from(sum).unwrap()).to_be_bytes());
        Self { tap: Tap::open(from.netns(), "eth0").unwrap(), frame, sent: 0 }
    }

    /// The next ones. What a field gets more, another one of the same sum gets less, so both checksums hold.
    fn send(&mut self, count: u32) {
        for number in self.sent..self.sent + count {
            let (sender, port) = (number % u32::from(SENDERS), number / u32::from(SENDERS));
            let (sender, port) = (u16::try_from(sender).unwrap(), u16::try_from(port).unwrap());
            let mut frame = self.frame.clone();
            let mut put = |at: usize, value: u16| frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
            // Identification and source address; sequence number, whose lower half answers for the address and the upper
            // half for the port.
            put(18, 0xf000 - sender);
            put(28, 0x0103 + sender);
            put(34, 10_000 + port);
            put(38, 0xf000 - port);
            put(40, 0xf000 - sender);
            // The way may be full for a moment: a flood does not care, but each of its clients is to be heard.
            while let Err(error) = self.tap.send(&frame) {
                assert_eq!(error.root_cause().downcast_ref(), Some(&Errno::ENOBUFS), "{error:#}");
                thread::yield_now();
            }
        }
        self.sent += count;
    }
}

fn flows(world: &World, field: &str) -> u64 {
    let output = world.agent(0).unwrap().ask(&["status", "-o", "json"]).unwrap();
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    status["flows"][field].as_u64().unwrap()
}

/// Lines of the agent's log about a table.
fn said(world: &World, table: &str) -> usize {
    let log = fs::read_to_string(world.agent(0).unwrap().log()).unwrap();
    let about = format!("table=\"{table}\"");
    log.lines().filter(|line| line.contains(&about)).count()
}

/// The backend answers every one of them; connections of clients that go on stay, however long they rest, and new ones come
/// through. The agent says once what happens.
#[test]
fn connections_outlive_a_flood_of_ten_table_sizes() {
    let stage = Stage::with(Layout::default(), &["--flow-sweep-ms", "500"]);
    let world = &stage.world;
    let pod = bridge_pod(world, 0, 0);
    stage.apply("web", &served(world, "web", 1, &[(0, pod)]));
    let vip = |family| std::net::SocketAddr::new(cluster_ips(1)[family], 80);
    let std::net::IpAddr::V4(vip_v4) = vip(0).ip() else { panic!("{}", vip(0)) };
    let far = world.far();
    // Whoever has only been greeted, and whoever has asked.
    let mut resting: Vec<Talk> = [0, 1, 0, 1].map(|family| Talk::open(far, 0, vip(family))).into();
    resting[2].echo(100).unwrap();
    resting[3].echo(100).unwrap();
    let datagrams = [0, 1].map(|family| datagrams(far, vip(family)));
    for socket in &datagrams {
        for question in [b"1", b"2"] {
            ask(socket, question).unwrap();
        }
    }
    let gateway = hardware_address(world.transit(), "far").unwrap();
    let mut flood = Flood::new(far, gateway, vip_v4);
    flood.send(SYNS / 2);
    let mut young = Talk::open(far, 0, vip(0));
    flood.send(SYNS / 2);
    eventually("the agent has looked", || {
        let young = flows(world, "young_flows");
        ensure!(young > 16_000, "{young} unanswered connections: the flood came to nothing");
        Ok(())
    })
    .unwrap();
    assert_eq!(flows(world, "flows"), 7, "somebody who does not exist has got into FLOWS");
    for talk in resting.iter_mut().chain([&mut young]) {
        talk.echo(3000).unwrap_or_else(|error| panic!("{}: {error}", talk.local()));
    }
    for socket in &datagrams {
        ask(socket, b"3").unwrap();
    }
    eventually("the agent says so", || {
        ensure!(said(world, "YOUNG_FLOWS") > 0);
        Ok(())
    })
    .unwrap();
    assert_eq!(said(world, "YOUNG_FLOWS"), 1);
}

/// Three times what `YOUNG_FLOWS` holds.
const DATAGRAMS: u32 = 3 * 16_384;

/// M2: a full table of young flows throws out old ones, not the one whose first packet is still on its way: that would leave
/// with its own source.
#[test]
fn m2_no_packet_of_a_flood_keeps_its_source() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    let pod = bridge_pod(world, 0, 0);
    stage.apply("web", &served(world, "web", 1, &[(0, pod)]));
    let std::net::SocketAddr::V4(node_port) = frontends(world, 1, 0)[1] else { panic!("not IPv4") };
    let host = world.node(0).unwrap().host().netns();
    let target = Target { address: *node_port.ip(), port: node_port.port(), ports: 1 };
    let generator = Generator::new(host, "eth0").unwrap();
    let frames = generator.frames(Flows::New, target).unwrap();
    let arrivals = Arrivals { prefix: pod.v4(), prefix_len: 32, port: TARGET };
    let counter = Counter::new(pod.netns(), "eth0", arrivals).unwrap();
    generator.run(&frames, DATAGRAMS, 0).unwrap();
    let arrived = counter.read().unwrap();
    assert!(arrived.replaced > u64::from(DATAGRAMS / 2), "the flood came to nothing: {arrived:?}");
    assert_eq!(arrived.unchanged, 0, "{arrived:?}");
}

/// What the smallest tables hold.
const FEW: u32 = 1024;

const SMALL: [&str; 6] =
    ["--flow-sweep-ms", "200", "--flow-table-size", "1024", "--young-flow-table-size", "1024"];

fn given_way(world: &World) -> u64 {
    world.agent(0).unwrap().status().unwrap()["packet_path"]["young_flows_given_way"].as_u64().unwrap()
}

/// Tables have the sizes that were asked for, and keep them. Whoever gives way to a flood is counted, and it is said once;
/// whoever rests does not. With no room for connections that go on, new ones are served none the less.
#[test]
fn small_tables_are_full_and_serve() {
    let mut stage = Stage::with(Layout::default(), &SMALL);
    let pod = bridge_pod(&stage.world, 0, 0);
    stage.apply("web", &served(&stage.world, "web", 1, &[(0, pod)]));
    let world = &stage.world;
    let vip = |family| std::net::SocketAddr::new(cluster_ips(1)[family], 80);
    let std::net::IpAddr::V4(vip_v4) = vip(0).ip() else { panic!("{}", vip(0)) };
    assert_eq!((flows(world, "flows_limit"), flows(world, "young_flows_limit")), (FEW.into(), FEW.into()));
    assert_eq!(flows(world, "snat_limit"), u64::from(FEW));

    let mut resting = [0, 1].map(|family| Talk::open(world.far(), 0, vip(family)));
    assert_eq!((given_way(world), said(world, "YOUNG_FLOWS")), (0, 0));
    let gateway = hardware_address(world.transit(), "far").unwrap();
    let mut flood = Flood::new(world.far(), gateway, vip_v4);
    flood.send(10 * FEW);
    eventually("those that gave way are counted", || {
        let (gave_way, sent) = (given_way(world), u64::from(10 * FEW));
        // What is there still, and what a walk may miss.
        let left = flows(world, "young_flows");
        ensure!(gave_way + u64::from(FEW) >= sent, "{gave_way} of {sent}, {left} are left");
        assert!(gave_way <= sent, "{gave_way} of {sent}, {left} are left");
        ensure!(said(world, "YOUNG_FLOWS") > 0, "nothing is said");
        Ok(())
    })
    .unwrap();
    flood.send(FEW);
    eventually("these are counted too", || {
        ensure!(given_way(world) >= u64::from(10 * FEW));
        Ok(())
    })
    .unwrap();
    assert_eq!(said(world, "YOUNG_FLOWS"), 1);
    let status = world.agent(0).unwrap().ask(&["status"]).unwrap();
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.contains(" gave way to newer ones)"), "{status}");
    for talk in &mut resting {
        talk.echo(3000).unwrap_or_else(|error| panic!("{}: {error}", talk.local()));
    }

    // Others have all the room there is.
    let pins = Pins::new(world.node(0).unwrap().bpffs());
    let mut table: Table<FlowKey, Flow> = Table::open(&pins.state(), "FLOWS").unwrap();
    let others: Vec<_> = (1..=u16::try_from(FEW).unwrap())
        .map(|port| {
            let client = std::net::IpAddr::from([192, 0, 2, 9]).into();
            let flow = Flow { flags: Flow::ANSWERED, used_ns: now_ns(), ..Flow::default() };
            (FlowKey::new(client, Port::new(port), 6), flow)
        })
        .collect();
    assert_eq!(table.put_all(&others).len(), resting.len(), "FLOWS has another size");
    let crowded_out = || world.agent(0).unwrap().counter("packet_flows_full").unwrap();
    assert_eq!(crowded_out(), 0);
    let mut late = Talk::open(world.far(), 0, vip(0));
    late.echo(3000).unwrap();
    assert!(crowded_out() > 0);
    eventually("the agent says so", || {
        ensure!(said(world, "FLOWS") > 0);
        Ok(())
    })
    .unwrap();
    assert_eq!(said(world, "FLOWS"), 1);

    // Another size is for tables that are not there yet.
    stage.kill_and_restart();
    let world = &stage.world;
    assert_eq!((flows(world, "flows_limit"), flows(world, "young_flows_limit")), (FEW.into(), FEW.into()));
    let log = fs::read_to_string(world.agent(0).unwrap().log()).unwrap();
    assert!(log.contains("flag=\"--flow-table-size\" asked=65536 is=1024"), "{log}");
    for talk in resting.iter_mut().chain([&mut late]) {
        talk.echo(3000).unwrap_or_else(|error| panic!("{}: {error}", talk.local()));
    }
}
