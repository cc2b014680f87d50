//! From a real kube-proxy to Sheave and back, under connections that last: none breaks, none moves.
//!
//! A hundred TCP connections and twenty datagram flows are made under kube-proxy alone, as many under Sheave alone. They
//! come from outside (NodePort, load balancer), from pods and from the node itself, with and without socket hooks, over
//! both families, and talk all the time. Nothing but kube-proxy uses NAT, and nothing but that uses connection tracking
//! unless the node's firewall drops what tracking finds invalid.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "the helpers of tests fail and tell as tests do"
)]

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use aya::maps::{Array, Map, MapData};
use proxy_agent::{
    kernel::{Pins, table::Table},
    takeover::conntrack::Conntrack,
};
use proxy_common::abi::{Flow, FlowKey, PacketSettings, Protocol, SnatKey};
use serde_json::{Value, json};
use sheave_tests::{
    agent::sheave,
    client::Client,
    kubernetes::{
        control_plane::ControlPlane,
        kube_proxy::{KubeProxy, Mode},
    },
    lab::{Lab, Shape},
    manifests::{Object, lab_node, service},
    nodes::{Attachment, CLUSTER_CIDR, Guard, Layout, World},
    protocol::{Dial, Transport},
    scene::{eventually, reach, slices},
};

const PORT: u16 = 80;
const NODE_PORT: u16 = 30_080;
const CLUSTER_IPS: [&str; 2] = ["10.96.7.7", "fd00:10:96::707"];
const BALANCER_IPS: [&str; 2] = ["203.0.113.77", "fd00:203:0:113::77"];

/// A slow machine, two proxies.
const PATIENCE: Duration = Duration::from_secs(5);

/// Ways of datagrams whose sockets keep their flow: an unconnected socket that is hooked asks the hook for each.
const CONNECTED: &[Transport] = &[Transport::UdpConnected];
const BOTH: &[Transport] = &[Transport::UdpConnected, Transport::UdpUnconnected];

/// One place's connections.
struct Talk {
    name: &'static str,
    client: Client,
    /// Groups of TCP connections.
    held: Vec<u64>,
    /// Datagram sockets, each with who answered it first, and whom that saw.
    datagrams: Vec<(u64, String)>,
}

impl Talk {
    fn start(name: &'static str, client: Client, to: &[SocketAddr], tcp: u32, udp: &[Transport]) -> Self {
        let (mut held, mut datagrams) = (Vec::new(), Vec::new());
        for &to in to {
            let dial = Dial::new(to).timeout(PATIENCE);
            let report = client.hold(dial, tcp).unwrap();
            assert_eq!(report.alive, u64::from(tcp), "{name} to {to}: {report:?}");
            held.push(report.id);
            for &transport in udp {
                let exchange = client.open(transport, dial).unwrap();
                let exchange = exchange.unwrap_or_else(|error| panic!("{name} to {to}: {error}"));
                datagrams.push((exchange.id.unwrap(), exchange.answer.unwrap()));
            }
        }
        Self { name, client, held, datagrams }
    }

    /// What is broken and what has moved, in words; and how many TCP connections and datagram flows there are.
    fn check(&self) -> (Vec<String>, u64, u64) {
        let (mut wrong, mut tcp) = (Vec::new(), 0);
        for id in &self.held {
            let report = self.client.check_held(*id).unwrap();
            tcp += report.alive + report.failures.values().sum::<u64>();
            if !report.failures.is_empty() {
                wrong.push(format!("{} TCP: {:?}", self.name, report.failures));
            }
        }
        for (id, first) in &self.datagrams {
            // One datagram may be lost in the moment in which a flow changes hands.
            let answer = self.client.send(*id, Duration::from_secs(1)).unwrap();
            match answer.or_else(|_| self.client.send(*id, PATIENCE).unwrap()) {
                Ok(exchange) if exchange.answer.as_ref() == Some(first) => {}
                Ok(exchange) => wrong.push(format!("{} UDP: {first} -> {:?}", self.name, exchange.answer)),
                Err(failure) => wrong.push(format!("{} UDP: {failure}", self.name)),
            }
        }
        (wrong, tcp, self.datagrams.len() as u64)
    }
}

/// Does something while all of them talk.
fn amid<T>(talks: &[&[Talk]], action: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    let talk_on = |talk: &Talk| {
        let mut rounds = 0;
        while !over.load(Ordering::Relaxed) {
            let (wrong, ..) = talk.check();
            assert!(wrong.is_empty(), "amid, in round {rounds}: {wrong:#?}");
            rounds += 1;
            thread::sleep(Duration::from_millis(5));
        }
    };
    thread::scope(|scope| {
        for talk in talks.iter().copied().flatten() {
            scope.spawn(move || talk_on(talk));
        }
        let _end = End(&over);
        action()
    })
}

/// They end whether that worked or failed.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Stage {
    world: World,
    _plane: ControlPlane,
    _lab: Lab,
    kubeconfig: PathBuf,
    mode: Mode,
    began: Instant,
}

impl Stage {
    fn new(mode: Mode, guard: Guard) -> Self {
        let began = Instant::now();
        let mut world = World::new(Layout { guard, ..Layout::default() }).unwrap();
        world.serve().unwrap();
        world.set_proxied(0);
        let lab = Lab::with(Shape { nodes: 0, pods: 0 }).unwrap();
        let plane = ControlPlane::start(&lab).unwrap();
        let kubeconfig = plane.join(world.node(0).unwrap(), 0).unwrap();
        let objects = objects(&world, &[0, 1]);
        let api = plane.api();
        for object in world.nodes().iter().map(lab_node).chain(objects.iter().cloned()) {
            api.create(&object).unwrap();
            if object.json().get("status").is_some() {
                api.set_status(&object).unwrap();
            }
        }
        world.manifests().write("web", &objects).unwrap();
        Self { world, _plane: plane, _lab: lab, kubeconfig, mode, began }
    }

    /// Starts a kube-proxy and waits until its first sync, which ends with its clean-up of connections.
    fn start_kube_proxy(&self) -> KubeProxy {
        let node = self.world.node(0).unwrap();
        if self.mode == Mode::Nftables {
            without_iptables(node.directory());
        }
        let proxy = KubeProxy::start(node, &self.kubeconfig, self.mode, CLUSTER_CIDR, 100).unwrap();
        eventually("kube-proxy has synced both families", || {
            let metrics = self.on_node("curl", &["-s", "http://127.0.0.1:10249/metrics"])?;
            for family in ["IPv4", "IPv6"] {
                let reconciled = format!(
                    "kubeproxy_conntrack_reconciler_sync_duration_seconds_count{{ip_family=\"{family}\"}}"
                );
                let line = metrics.lines().find(|line| line.starts_with(&reconciled));
                ensure!(line.is_some_and(|line| !line.ends_with(" 0")), "{family}: {line:?}");
            }
            Ok(())
        })
        .unwrap();
        assert!(self.has_rules(), "kube-proxy has written rules");
        proxy
    }

    fn on_node(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.world.node(0)?.host().netns().command(program).args(arguments).output()?;
        ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Whether any rule of kube-proxy is there.
    fn has_rules(&self) -> bool {
        match self.mode {
            Mode::Nftables => self.tables().contains("kube-proxy"),
            Mode::Iptables => ["iptables-legacy-save", "ip6tables-legacy-save"]
                .iter()
                .any(|save| self.on_node(save, &[]).unwrap().contains("KUBE-SERVICES")),
        }
    }

    fn tables(&self) -> String {
        self.on_node("nft", &["list", "tables"]).unwrap()
    }

    /// What can be dialled, from outside and from inside.
    fn frontends(&self) -> ([SocketAddr; 4], [SocketAddr; 2]) {
        let at = |text: &str| SocketAddr::new(text.parse::<IpAddr>().unwrap(), PORT);
        let [v4, v6] = self.world.node(0).unwrap().host().sockets(NODE_PORT);
        ([v4, v6, at(BALANCER_IPS[0]), at(BALANCER_IPS[1])], CLUSTER_IPS.map(at))
    }

    /// A hundred TCP connections and twenty datagram flows.
    fn talks(&self) -> Vec<Talk> {
        let (outside, inside) = self.frontends();
        let host = self.world.node(0).unwrap().host();
        let pod = |attachment| self.world.pod(0, attachment, 1).unwrap();
        let unhooked = |place| self.world.unhooked(place).unwrap();
        let (bridge, p2p) = (pod(Attachment::Bridge), pod(Attachment::PointToPoint));
        vec![
            Talk::start("outside", self.world.outside().client().unwrap(), &outside, 10, BOTH),
            Talk::start("hooked pod", bridge.client().unwrap(), &inside, 10, CONNECTED),
            Talk::start("pod", unhooked(p2p), &inside, 10, BOTH),
            Talk::start("hooked node", host.client().unwrap(), &inside, 5, CONNECTED),
            Talk::start("node", unhooked(host), &inside, 5, BOTH),
        ]
    }

    /// Nothing may be broken or have moved, and new connections must work from everywhere.
    fn check(&self, step: &str, talks: &[&[Talk]]) {
        let (mut wrong, mut tcp, mut udp) = (Vec::new(), 0, 0);
        for talk in talks.iter().flat_map(|talks| talks.iter()) {
            let (more, connections, flows) = talk.check();
            wrong.extend(more);
            (tcp, udp) = (tcp + connections, udp + flows);
        }
        let mode = self.mode.name();
        let after = self.began.elapsed().as_secs();
        println!("{mode}: {step}: {tcp} TCP, {udp} UDP, broken or moved: {} ({after} s)", wrong.len());
        assert_eq!((tcp, udp), (100 * talks.len() as u64, 20 * talks.len() as u64));
        assert!(wrong.is_empty(), "{mode}: {step}: {wrong:#?}");
        let (outside, inside) = self.frontends();
        for (talk, to) in talks[0].iter().zip([&outside[..], &inside, &inside, &inside, &inside]) {
            for &to in to {
                for transport in [Transport::Tcp, Transport::UdpConnected] {
                    let exchange = reach(&talk.client, transport, Dial::new(to).timeout(PATIENCE));
                    exchange
                        .unwrap_or_else(|error| panic!("{mode}: {step}: new from {}: {error:#}", talk.name));
                }
            }
        }
    }

    /// Connections that begin now from outside are Sheave's, each of them.
    fn are_ours(&self) {
        let agent = self.world.agent(0).unwrap();
        let before = agent.counter("packet_forwarded").unwrap();
        let client = self.world.outside().client().unwrap();
        for to in self.frontends().0 {
            for transport in [Transport::Tcp, Transport::UdpConnected] {
                reach(&client, transport, Dial::new(to)).unwrap();
            }
        }
        assert_eq!(agent.counter("packet_forwarded").unwrap() - before, 8);
    }

    fn flows(&self) -> Vec<Value> {
        let output = self.world.agent(0).unwrap().ask(&["get", "flows", "-o", "json"]).unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Netfilter sees those with the VIP, so a kube-proxy that comes back would send their datagrams elsewhere (C2).
    fn wait_own_handed_over(&self) {
        let host = self.world.node(0).unwrap().host();
        let own = [format!("{}:", host.v4()), format!("[{}]:", host.v6())];
        let is_own = |flow: &&Value| own.iter().any(|own| flow["client"].as_str().unwrap().starts_with(own));
        eventually("the node's own connections are netfilter's", || {
            let flows = self.flows();
            let left: Vec<_> =
                flows.iter().filter(is_own).filter(|flow| flow["state"] == "answered").collect();
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        })
        .unwrap();
    }

    /// M7: sources that kube-proxy's masquerading took from our range of ports are in our table, as nobody's.
    fn reserved(&self) -> (BTreeSet<SocketAddr>, BTreeSet<SocketAddr>) {
        let node = self.world.node(0).unwrap();
        let translated =
            node.host().netns().run(|| Conntrack::open().unwrap().translated()).unwrap().unwrap();
        let given = translated.iter().filter(|connection| connection.is_masqueraded());
        let given = given.map(|connection| connection.reply.destination);
        let table: Table<SnatKey, FlowKey> = Table::open(&self.state(), "SNAT").unwrap();
        let entries = table.entries().unwrap();
        let nobodys = entries.iter().filter(|(_, owner)| owner.is_nobody());
        let source = |key: &SnatKey| SocketAddr::new(key.snat.ip(), key.snat_port.number());
        (
            given.filter(|source| (10_000..30_000).contains(&source.port())).collect(),
            nobodys.map(|(key, _)| source(key)).collect(),
        )
    }

    fn state(&self) -> PathBuf {
        Pins::new(self.world.node(0).unwrap().bpffs()).state()
    }

    /// As if whoever lets flows change hands had ended in the midst of it: what begins is left to kube-proxy, and
    /// connections of TCP are held.
    fn cut_short(&self, holds: bool) {
        let settings = MapData::from_pin(self.state().join("PACKET_SETTINGS")).unwrap();
        let mut settings: Array<MapData, PacketSettings> =
            Map::from_map_data(settings).unwrap().try_into().unwrap();
        let mut value = settings.get(&0, 0).unwrap();
        value.flags |= PacketSettings::LEAVE_NEW;
        settings.set(0, value, 0).unwrap();
        let mut table: Table<FlowKey, Flow> = Table::open(&self.state(), "FLOWS").unwrap();
        let entries = table.entries().unwrap();
        let held = entries.into_iter().filter(|(key, _)| holds && key.protocol == Protocol::Tcp.number());
        for (key, flow) in held {
            table.replace(&key, &Flow { flags: flow.flags | Flow::HELD, ..flow }).unwrap();
        }
    }

    fn wait_logged(&self, words: &str) {
        let log = self.world.node(0).unwrap().directory().join("agent.log");
        eventually(words, || {
            let text = std::fs::read_to_string(&log)?;
            ensure!(text.contains(words), "{text}");
            Ok(())
        })
        .unwrap();
    }
}

/// In nftables mode kube-proxy cleans up after iptables mode, which makes the kernel's own NAT table: that keeps NAT in
/// work by itself. So its commands fail here, as where there are none.
fn without_iptables(directory: &Path) {
    let commands = directory.join("iptables-legacy");
    std::fs::create_dir_all(&commands).unwrap();
    for family in ["iptables", "ip6tables"] {
        for verb in ["", "-save", "-restore"] {
            let command = commands.join(format!("{family}{verb}"));
            if !command.exists() {
                std::os::unix::fs::symlink("/bin/false", command).unwrap();
            }
        }
    }
}

/// With pods of these nodes behind it, and with the nodes themselves.
fn objects(world: &World, nodes: &[usize]) -> Vec<Object> {
    let ingress = BALANCER_IPS.map(|ip| json!({"ip": ip, "ipMode": "VIP"}));
    let web = service("web", &CLUSTER_IPS)
        .port("tcp", "TCP", PORT, 9876)
        .port("udp", "UDP", PORT, 9876)
        .node_ports(&[NODE_PORT; 2])
        .set("spec.type", "LoadBalancer")
        .set("status.loadBalancer.ingress", ingress.to_vec());
    let pods = nodes.iter().flat_map(|&node| {
        let of = world.node(node).unwrap();
        let pod = |attachment| world.pod(node, attachment, 0).unwrap();
        [pod(Attachment::Bridge), pod(Attachment::PointToPoint), of.host()].map(|place| (of, place))
    });
    let places: Vec<_> = pods.collect();
    let both = [slices("web", "tcp", "TCP", &places), slices("web", "udp", "UDP", &places)];
    [web].into_iter().chain(both.concat()).collect()
}

fn there_and_back(mode: Mode, guard: Guard) {
    let mut stage = Stage::new(mode, guard);
    let proxy = stage.start_kube_proxy();
    let old = stage.talks();
    stage.check("kube-proxy alone", &[&old]);

    // Flows from outside rest meanwhile, so that nothing but connection tracking tells of them.
    amid(&[&old[1..]], || stage.world.start_agent(0, &["--take-over", "--flow-sweep-ms", "500"]).unwrap());
    stage.check("Sheave beside kube-proxy", &[&old]);
    stage.are_ours();
    stage.wait_logged("a kube-proxy runs and would write its rules again");
    assert!(stage.has_rules(), "they stay while kube-proxy runs");
    let foreign = stage.flows().iter().filter(|flow| flow["state"] == "foreign").count();
    assert!(foreign >= 12, "datagram flows through the devices are left to netfilter: {foreign}");

    amid(&[&old], || {
        drop(proxy);
        stage.wait_logged("kube-proxy's rules are removed");
    });
    assert!(!stage.has_rules());
    stage.check("Sheave alone", &[&old]);
    assert!(stage.tables().contains("sheave-keep-nat"), "{}", stage.tables());
    // Netfilter gives away more with each new connection.
    eventually("netfilter's sources are nobody's", || {
        let (given, reserved) = stage.reserved();
        ensure!(given.len() >= 5 && given.is_subset(&reserved), "{given:?} of netfilter's, {reserved:?}");
        Ok(())
    })
    .unwrap();
    stage.are_ours();
    let new = stage.talks();
    amid(&[&old, &new], || stage.wait_own_handed_over());
    stage.check("Sheave alone, with connections of its own", &[&old, &new]);

    let mut proxy = amid(&[&old, &new], || stage.start_kube_proxy());
    stage.check("kube-proxy beside Sheave", &[&old, &new]);
    stage.are_ours();

    let said = amid(&[&old, &new], || {
        assert!(stage.world.take_agent(0).unwrap().stop().unwrap().success());
        let output = sheave(stage.world.node(0).unwrap(), &["cleanup"]).unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    });
    println!("{}: {said}", mode.name());
    assert!(said.contains("could not be handed over: 0"), "{said}");
    assert!(!stage.tables().contains("sheave"), "{}", stage.tables());
    stage.check("kube-proxy alone again", &[&old, &new]);
    proxy.check().unwrap();
    // Before the control plane goes.
    drop(proxy);
}

#[test]
fn there_and_back_with_nftables() {
    there_and_back(Mode::Nftables, Guard::DropInvalid);
}

#[test]
fn there_and_back_with_iptables() {
    there_and_back(Mode::Iptables, Guard::Open);
}

/// An agent and a cleanup that end in the midst of it: the next ones go on.
#[test]
fn what_was_cut_short_goes_on() {
    let take_over = &["--take-over", "--flow-sweep-ms", "500"];
    let mut stage = Stage::new(Mode::Nftables, Guard::DropInvalid);
    let proxy = stage.start_kube_proxy();
    let old = stage.talks();
    stage.world.start_agent(0, take_over).unwrap();
    stage.world.take_agent(0).unwrap().kill().unwrap();
    stage.cut_short(false);
    stage.check("an agent ended in the midst", &[&old]);
    stage.world.start_agent(0, take_over).unwrap();
    stage.are_ours();
    drop(proxy);
    stage.wait_logged("kube-proxy's rules are removed");
    stage.check("the next one went on", &[&old]);

    let new = stage.talks();
    stage.world.take_agent(0).unwrap().kill().unwrap();
    stage.cut_short(true);
    stage.world.start_agent(0, take_over).unwrap();
    stage.are_ours();
    eventually("nothing is held", || {
        let wrong: Vec<_> = new.iter().flat_map(|talk| talk.check().0).collect();
        ensure!(wrong.is_empty(), "{wrong:#?}");
        Ok(())
    })
    .unwrap();
    stage.check("an agent after a cleanup that ended in the midst", &[&old, &new]);

    // A firewall that is loaded anew takes our table with it. What is on its way in that moment is lost: an acknowledgement
    // that TCP put off would end its connection.
    thread::sleep(Duration::from_millis(500));
    stage.on_node("nft", &["flush ruleset"]).unwrap();
    eventually("NAT is kept again", || {
        ensure!(stage.tables().contains("sheave-keep-nat"), "{}", stage.tables());
        Ok(())
    })
    .unwrap();
    stage.check("after a flush", &[&old, &new]);

    let _proxy = stage.start_kube_proxy();
    assert!(stage.world.take_agent(0).unwrap().stop().unwrap().success());
    stage.cut_short(true);
    let output = sheave(stage.world.node(0).unwrap(), &["cleanup"]).unwrap();
    assert!(output.status.success(), "{output:?}");
    stage.check("a cleanup after one that ended in the midst", &[&old, &new]);
}

/// Without `--take-over`, and with the rules removed by hand. C2, C3: what netfilter owns leaves an endpoint that serves
/// no more, but not for nothing. NAT is kept as long as anybody needs it.
#[test]
fn c2_datagrams_of_kube_proxy_leave_an_endpoint_that_is_gone() {
    let mut stage = Stage::new(Mode::Nftables, Guard::Open);
    let proxy = stage.start_kube_proxy();
    let old = stage.talks();
    stage.world.start_agent(0, &["--flow-sweep-ms", "500"]).unwrap();
    eventually("NAT is kept before anybody removes rules", || {
        ensure!(stage.tables().contains("sheave-keep-nat"), "{}", stage.tables());
        Ok(())
    })
    .unwrap();
    drop(proxy);
    assert!(stage.has_rules(), "nobody said that they should go");
    amid(&[&old], || {
        stage.on_node("nft", &["delete table ip kube-proxy; delete table ip6 kube-proxy"]).unwrap();
    });
    stage.check("rules removed by hand", &[&old]);

    stage.world.apply("web", &objects(&stage.world, &[1])).unwrap();
    let is_gone =
        |answer: &str| ["bridge-1-", "p2p-1-", "node-1 "].iter().any(|gone| answer.starts_with(gone));
    let mut moved = 0;
    let mut old = old;
    for talk in &mut old {
        for (id, answerer) in &mut talk.datagrams {
            let now = eventually("its datagrams are answered elsewhere", || {
                let answer = talk.client.send(*id, PATIENCE)?;
                let answer = answer.with_context(|| format!("{}: at first {answerer}", talk.name))?;
                let answer = answer.answer.context("an answer has a name")?;
                ensure!(!is_gone(&answer), "{}: {answer}", talk.name);
                Ok(answer)
            });
            let now = now.unwrap();
            moved += usize::from(is_gone(answerer));
            assert!(is_gone(answerer) || now == *answerer, "{answerer} served and serves: {now}");
            *answerer = now;
        }
    }
    assert!(moved > 0, "half of the endpoints went");
    stage.world.apply("web", &objects(&stage.world, &[])).unwrap();
    for talk in &old {
        assert_eq!(talk.check().0, [""; 0], "C3, Z8: nobody serves instead");
    }

    // As if all of them had ended; those of the node that were ours meanwhile are handed over until the last one is.
    let node = stage.world.node(0).unwrap().host().netns();
    eventually("NAT is given up", || {
        node.run(|| {
            let conntrack = Conntrack::open()?;
            conntrack.translated()?.iter().try_for_each(|connection| conntrack.forget(&connection.original))
        })??;
        ensure!(!stage.tables().contains("sheave"), "{}", stage.tables());
        Ok(())
    })
    .unwrap();
    let left = stage.flows().into_iter().filter(|flow| flow["state"] == "foreign").count();
    assert_eq!(left, 0);
}
