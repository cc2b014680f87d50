//! `--fast-path`: answered connections skip the node's stack, as long as that would let them pass.

use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context, ensure};
use proxy_agent::kernel::{Pins, programs::open_pinned};
use sheave_tests::{
    lab::Place,
    nodes::{Guard, Layout, World, nft},
    scene::eventually,
};

use crate::{
    stage::{Stage, bridge_pod, frontends, p2p_pod, served},
    talk::{SILENCE, Talk, ask, datagrams},
};

const FAST: [&str; 1] = ["--fast-path"];

/// Far more than packets that have to go through the stack while they are exchanged: a few of each direction a second.
const EXCHANGES: u64 = 400;

/// Counts what the node forwards.
const COUNTER: &str = "table inet counted { counter forwarded { }; \
                       chain forward { type filter hook forward priority -10; \
                       meta l4proto { tcp, udp } counter name forwarded; }; }";

fn counted(world: &World) -> u64 {
    let netns = world.node(0).unwrap().host().netns();
    let arguments = ["-j", "list", "counter", "inet", "counted", "forwarded"];
    let output = netns.command("nft").args(arguments).output().unwrap();
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let counter = said["nftables"].as_array().unwrap().iter().find_map(|part| part.get("counter"));
    counter.unwrap()["packets"].as_u64().unwrap()
}

/// What talks to a Service, by TCP or UDP.
enum Client {
    Stream(Talk),
    Datagrams(UdpSocket),
}

impl Client {
    fn both(from: &Place, to: SocketAddr) -> [Self; 2] {
        [Self::Stream(Talk::open(from, 0, to)), Self::Datagrams(datagrams(from, to))]
    }

    fn exchange(&mut self) -> std::io::Result<()> {
        match self {
            Self::Stream(talk) => talk.echo(100),
            Self::Datagrams(socket) => ask(socket, b"question").map(drop),
        }
    }

    /// Whether an answer is heard within a moment.
    fn is_heard(&mut self) -> bool {
        match self {
            Self::Stream(talk) => talk.patience(SILENCE),
            Self::Datagrams(socket) => socket.set_read_timeout(Some(SILENCE)).unwrap(),
        }
        self.exchange().is_ok()
    }

    /// How many packets of so many exchanges the stack sees.
    fn seen(&mut self, world: &World) -> u64 {
        // The first ones are what it has to see.
        for _ in 0..3 {
            self.exchange().unwrap();
        }
        let before = counted(world);
        for _ in 0..EXCHANGES {
            self.exchange().unwrap();
        }
        counted(world) - before
    }
}

/// By node port, from outside the cluster.
fn clients(world: &World, number: u16) -> Vec<Client> {
    let to = |family| frontends(world, number, family)[1];
    [to(0), to(1)].into_iter().flat_map(|to| Client::both(world.outside(), to)).collect()
}

fn backends(world: &World) -> [(u16, (usize, &Place)); 3] {
    [(1, (0, bridge_pod(world, 0, 0))), (2, (0, p2p_pod(world, 0, 0))), (3, (1, bridge_pod(world, 1, 0)))]
}

fn node(world: &World) -> &sheave_tests::netns::Netns {
    world.node(0).unwrap().host().netns()
}

fn counting(layout: Layout, arguments: &[&str]) -> Stage {
    let stage = Stage::with(layout, arguments);
    nft(node(&stage.world), COUNTER).unwrap();
    for (number, backend) in backends(&stage.world) {
        let name = format!("web-{number}");
        stage.apply(&name, &served(&stage.world, &name, number, &[backend]));
    }
    stage
}

/// The same with the fast path, from when packets may take it: the agent first looks at what else is on the node.
fn skipping(layout: Layout) -> Stage {
    let stage = counting(layout, &FAST);
    eventually("the first epoch", || {
        ensure!(epoch(&stage) != 0);
        Ok(())
    })
    .unwrap();
    stage
}

fn epoch(stage: &Stage) -> u32 {
    let pins = Pins::new(stage.world.node(0).unwrap().bpffs());
    let map = open_pinned(&pins.state(), "EPOCH").unwrap();
    let epoch: aya::maps::Array<_, u32> = aya::maps::Map::from_map_data(map).unwrap().try_into().unwrap();
    epoch.get(&0, 0).unwrap()
}

/// Local pods on a bridge and by themselves, and a pod of another node, for which the source is replaced.
#[test]
fn answered_connections_skip_the_stack() {
    let overlay = Layout { guard: Guard::DropInvalid, ..Layout::overlay() };
    for layout in [Layout::default(), Layout { offload: false, ..Layout::default() }, overlay] {
        let stage = skipping(layout);
        for number in 1..=3 {
            for client in &mut clients(&stage.world, number) {
                let seen = client.seen(&stage.world);
                assert!(
                    seen < EXCHANGES / 2,
                    "{layout}, backend {number}: the stack has seen {seen} packets"
                );
            }
        }
    }
}

#[test]
fn nobody_skips_the_stack_unless_told() {
    let stage = counting(Layout::default(), &[]);
    for number in 1..=3 {
        for client in &mut clients(&stage.world, number) {
            let seen = client.seen(&stage.world);
            assert!(seen >= 2 * EXCHANGES, "backend {number}: the stack has seen only {seen} packets");
        }
    }
}

/// Long segments, whole and cut, past connection tracking that drops what it thinks impossible: the content arrives, and
/// the end of the connection too.
#[test]
fn large_transfers_arrive_whole() {
    for offload in [true, false] {
        let stage = skipping(Layout { guard: Guard::DropInvalid, offload, ..Layout::default() });
        for number in 1..=3 {
            for to in [0, 1].map(|family| frontends(&stage.world, number, family)[1]) {
                let mut talk = Talk::open(stage.world.outside(), 0, to);
                let before = counted(&stage.world);
                talk.stream(20_000_000).unwrap_or_else(|error| panic!("{to}, offload {offload}: {error}"));
                let seen = counted(&stage.world) - before;
                assert!(seen < 600, "{to}, offload {offload}: the stack has seen {seen} packets");
                // Long after what connection tracking has seen of it.
                talk.echo(10).unwrap();
                talk.ends().unwrap_or_else(|error| panic!("{to}, offload {offload}: {error}"));
            }
        }
    }
}

/// A rule that comes later ends what runs.
#[test]
fn a_rule_of_nftables_ends_it() {
    let stage = skipping(Layout::default());
    for (number, (_, pod)) in backends(&stage.world) {
        let mut clients = clients(&stage.world, number);
        for client in &mut clients {
            assert!(client.seen(&stage.world) < EXCHANGES / 2);
        }
        let [v4, v6] = pod.sockets(0).map(|socket| socket.ip());
        let rules = format!(
            "table inet barred {{ chain forward {{ type filter hook forward priority 0; \
             ip daddr {v4} drop; ip6 daddr {v6} drop; }}; }}"
        );
        nft(node(&stage.world), &rules).unwrap();
        for client in &mut clients {
            let silent = eventually("the rule holds", || {
                ensure!(!client.is_heard(), "an answer");
                Ok(())
            });
            silent.unwrap();
            assert!(!client.is_heard());
        }
        nft(node(&stage.world), "delete table inet barred").unwrap();
        for client in &mut clients {
            if let Client::Datagrams(_) = client {
                assert!(client.seen(&stage.world) < EXCHANGES / 2, "it goes on when the rule is gone");
            }
        }
    }
}

fn sent_by(world: &World, device: &str) -> u64 {
    let output =
        node(world).command("ip").args(["-json", "-s", "link", "show", "dev", device]).output().unwrap();
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    said.pointer("/0/stats64/tx/packets").unwrap().as_u64().unwrap()
}

/// A pod gets a second link, by which its address is routed from then on, and loses it again.
#[test]
fn packets_follow_routes_and_devices() {
    let stage = skipping(Layout::default());
    let world = &stage.world;
    let pod = p2p_pod(world, 0, 0);
    let device = world.host_end(pod);
    let mut clients = clients(world, 2);
    let mut all_skip = |when: &str, by: &str| {
        for client in &mut clients {
            // Until everybody has noticed.
            eventually(when, || {
                let before = sent_by(world, by);
                let seen = client.seen(world);
                ensure!(seen < EXCHANGES / 2, "the stack has seen {seen} packets");
                ensure!(sent_by(world, by) - before >= EXCHANGES, "by another device than {by}");
                Ok(())
            })
            .unwrap();
        }
    };
    all_skip("at first", &device);
    let (v4, v6) = (pod.v4(), pod.v6());
    node(world)
        .ip(&format!("link add other0 type veth peer name other0 netns {}\n", pod.netns().path().display()))
        .unwrap();
    node(world)
        .sysctls(&[("net/ipv4/conf/other0/proxy_arp", "1"), ("net/ipv4/neigh/other0/proxy_delay", "0")])
        .unwrap();
    node(world).ip("link set other0 address ee:ee:ee:ee:ee:ee up\n").unwrap();
    pod.netns()
        .ip(&format!(
            "address add {v4}/32 dev other0\naddress add {v6}/128 dev other0 nodad\nlink set other0 up\n\
             route replace 169.254.1.1 dev other0 scope link\n\
             route replace default via 169.254.1.1 dev other0\n\
             route replace ::/0 via fe80::ecee:eeff:feee:eeee dev other0\n"
        ))
        .unwrap();
    node(world)
        .ip(&format!("route replace {v4}/32 dev other0\nroute replace {v6}/128 dev other0\n"))
        .unwrap();
    all_skip("the route is another one", "other0");
    node(world).ip("link del other0\n").unwrap();
    pod.netns()
        .ip("route replace 169.254.1.1 dev eth0 scope link\n\
             route replace default via 169.254.1.1 dev eth0\n\
             route replace ::/0 via fe80::ecee:eeff:feee:eeee dev eth0\n")
        .unwrap();
    node(world)
        .ip(&format!("route replace {v4}/32 dev {device}\nroute replace {v6}/128 dev {device}\n"))
        .unwrap();
    all_skip("the device is gone", &device);
}

/// Nobody tells of that: it is found when the stack is asked again.
#[test]
fn packets_follow_neighbours() {
    let stage = skipping(Layout::default());
    let world = &stage.world;
    let mut clients = clients(world, 1);
    for client in &mut clients {
        assert!(client.seen(world) < EXCHANGES / 2);
    }
    bridge_pod(world, 0, 0).netns().ip("link set eth0 address ee:ee:ee:ee:ee:01\n").unwrap();
    node(world).ip("neigh flush all\n").unwrap();
    for client in &mut clients {
        eventually("it is found at its new link address", || {
            ensure!(client.is_heard(), "no answer");
            Ok(())
        })
        .unwrap();
        assert!(client.seen(world) < EXCHANGES / 2);
    }
}

/// On hooks that stay, and connections that go on.
#[test]
fn an_agent_that_is_told_otherwise_is_obeyed() {
    let mut stage = skipping(Layout::default());
    let mut clients = clients(&stage.world, 1);
    for (number, is_fast) in [true, false, true].into_iter().enumerate() {
        if number > 0 {
            stage.world.take_agent(0).unwrap().kill().unwrap();
            stage.world.start_agent(0, if is_fast { &FAST } else { &[] }).unwrap();
        }
        for client in &mut clients {
            let seen = client.seen(&stage.world);
            assert!(
                if is_fast { seen < EXCHANGES / 2 } else { seen >= 2 * EXCHANGES },
                "agent {number}: the stack has seen {seen} packets"
            );
        }
    }
}

/// The agent tells the programs of changes at once; without it they find them by themselves.
#[test]
fn epochs_end_with_routes_devices_and_rules() {
    let mut stage = skipping(Layout::default());
    let ip = |line: &str| node(&stage.world).ip(line);
    let changes: [(&str, &dyn Fn() -> anyhow::Result<()>); 6] = [
        ("a route", &|| ip("route add blackhole 192.0.2.0/24\n")),
        ("a route of IPv6", &|| ip("route add blackhole 2001:db8::/64\n")),
        ("a routing rule", &|| {
            let mut command = node(&stage.world).command("ip");
            let status = command.args(["rule", "add", "to", "192.0.2.1", "lookup", "main"]).status();
            ensure!(status.context("running `ip`")?.success());
            Ok(())
        }),
        ("a device", &|| ip("link add dummy7 type veth peer name dummy8\n")),
        ("a device's size", &|| ip("link set dummy7 mtu 1400\n")),
        ("a rule", &|| nft(node(&stage.world), "add table inet barred")),
    ];
    for (what, change) in changes {
        // What the one before has set off may still come.
        let mut last = epoch(&stage);
        eventually("it is quiet", || {
            std::thread::sleep(SILENCE / 2);
            let before = std::mem::replace(&mut last, epoch(&stage));
            ensure!(before == last);
            Ok(())
        })
        .unwrap();
        change().unwrap();
        eventually(what, || {
            ensure!(epoch(&stage) != last);
            Ok(())
        })
        .unwrap();
    }
    let mut client = Client::both(stage.world.outside(), frontends(&stage.world, 1, 0)[1]);
    stage.world.take_agent(0).unwrap().kill().unwrap();
    for client in &mut client {
        assert!(client.seen(&stage.world) < EXCHANGES / 2, "without the agent");
    }
    let pod = bridge_pod(&stage.world, 0, 0).v4();
    node(&stage.world).ip(&format!("route add blackhole {pod}/32\n")).unwrap();
    for client in &mut client {
        eventually("the route holds without the agent", || {
            ensure!(!client.is_heard(), "an answer");
            Ok(())
        })
        .unwrap();
    }
    node(&stage.world).ip(&format!("route del blackhole {pod}/32\n")).unwrap();
    for client in &mut client {
        eventually("it is gone", || {
            ensure!(client.is_heard(), "no answer");
            Ok(())
        })
        .unwrap();
        assert!(client.seen(&stage.world) < EXCHANGES / 2);
    }
    nft(
        node(&stage.world),
        "add chain inet barred forward { type filter hook forward priority 0; policy drop; }",
    )
    .unwrap();
    for client in &mut client {
        eventually("the rule holds without the agent", || {
            ensure!(!client.is_heard(), "an answer");
            Ok(())
        })
        .unwrap();
    }
}

/// C2, C3: what runs past the stack leaves a backend that serves no more, too.
#[test]
fn c2_udp_flows_leave_endpoints_that_do_not_serve() {
    let stage = skipping(Layout::default());
    let world = &stage.world;
    let mut clients = clients(world, 1);
    for client in &mut clients {
        assert!(client.seen(world) < EXCHANGES / 2);
    }
    let new = p2p_pod(world, 0, 0);
    stage.apply("web-1", &served(world, "web-1", 1, &[(0, new)]));
    for client in &mut clients {
        match client {
            Client::Stream(talk) => talk.echo(100).unwrap(),
            Client::Datagrams(socket) => eventually("the flow leaves the endpoint", || {
                let said = ask(socket, b"gone")?;
                ensure!(said == new.name(), "still {said}");
                Ok(())
            })
            .unwrap(),
        }
        assert!(client.seen(world) < EXCHANGES / 2);
    }
}
