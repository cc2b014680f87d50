//! The lab itself: what the other suites take for granted.

#![expect(clippy::unwrap_used, clippy::panic, reason = "the helpers of tests fail as tests do")]

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, Instant},
};

use sheave_tests::{
    cgroup,
    client::Client,
    lab::{Lab, Place, Shape},
    measure::packets::{Arrivals, Arrived, Counter, Flows, Generator, Target, mac_of},
    protocol::{Dial, LoopSpec, Transport},
};

const TRANSPORTS: [Transport; 3] = [Transport::Tcp, Transport::UdpConnected, Transport::UdpUnconnected];

/// An address that no lab has: a VIP before anyone serves it.
const NOBODY: [&str; 2] = ["10.96.0.1:80", "[fd00:10:96::1]:80"];

fn answered_by(client: &Client, transport: Transport, dial: Dial) -> String {
    client
        .connect(transport, dial)
        .unwrap()
        .unwrap_or_else(|failure| panic!("{dial:?}: {failure}"))
        .answer
        .unwrap()
}

fn reaches(from: &Place, to: &Place) {
    let _server = to.serve(9876).unwrap();
    let client = from.client().unwrap();
    for destination in to.sockets(9876) {
        for transport in TRANSPORTS {
            assert_eq!(
                answered_by(&client, transport, Dial::new(destination)),
                to.name(),
                "{transport:?} {destination}"
            );
        }
    }
}

#[test]
fn pods_reach_pods_in_both_families() {
    let lab = Lab::new(2).unwrap();
    let (from, to) = (lab.pod(0).unwrap(), lab.pod(1).unwrap());
    reaches(from, to);
    reaches(from, from);
}

#[test]
fn nodes_pods_and_outside_reach_each_other() {
    let lab = Lab::with(Shape { nodes: 2, pods: 1 }).unwrap();
    let (first, second) = (lab.node(0).unwrap(), lab.node(1).unwrap());
    reaches(first.pod(0).unwrap(), second.pod(0).unwrap());
    reaches(first.host(), first.pod(0).unwrap());
    reaches(first.host(), second.pod(0).unwrap());
    reaches(first.pod(0).unwrap(), second.host());
    reaches(lab.outside(), first.host());
    reaches(first.pod(0).unwrap(), lab.outside());
}

#[test]
fn answers_name_peer_and_source() {
    let lab = Lab::new(2).unwrap();
    let (from, to) = (lab.pod(0).unwrap(), lab.pod(1).unwrap());
    let _server = to.serve(53).unwrap();
    let client = from.client().unwrap();
    let destination = SocketAddr::new(to.v4().into(), 53);
    let mapped = SocketAddr::new(to.v4().to_ipv6_mapped().into(), 53);
    for (dial, expected) in [(Dial::new(destination), destination), (Dial::new(destination).mapped(), mapped)]
    {
        let tcp = client.tcp(dial).unwrap().unwrap();
        assert_eq!((tcp.peer, tcp.source), (Some(expected), None));
        assert!(tcp.connect_ns > 0 && tcp.connect_ns <= tcp.total_ns, "{tcp:?}");
        let connected = client.udp_connected(dial).unwrap().unwrap();
        assert_eq!((connected.peer, connected.source), (Some(expected), None));
        let unconnected = client.udp_unconnected(dial).unwrap().unwrap();
        assert_eq!((unconnected.peer, unconnected.source), (None, Some(expected)));
    }
}

#[test]
fn an_unknown_address_times_out_and_a_closed_port_refuses() {
    let lab = Lab::new(2).unwrap();
    let client = lab.pod(0).unwrap().client().unwrap();
    // Longer than a neighbour is looked for: an address of a network that is there would fail by then.
    let patience = Duration::from_millis(3500);
    let started = Instant::now();
    let mut loops = Vec::new();
    for destination in NOBODY.map(|text| text.parse::<SocketAddr>().unwrap()) {
        for transport in TRANSPORTS {
            let spec = LoopSpec::new(transport, Dial::new(destination).timeout(patience)).count(1);
            loops.push((transport, destination, client.start_loop(spec).unwrap()));
        }
    }
    for (transport, destination, id) in loops {
        let report = client.wait_loop(id).unwrap();
        assert!(report.first_failures[0].is_timeout(), "{transport:?} {destination}: {report:?}");
    }
    assert!(started.elapsed() >= patience);
    for destination in lab.pod(1).unwrap().sockets(9) {
        assert!(client.tcp(Dial::new(destination)).unwrap().unwrap_err().is_refused());
        assert!(client.udp_connected(Dial::new(destination)).unwrap().unwrap_err().is_refused());
    }
}

#[test]
fn kept_sockets_go_on() {
    let lab = Lab::new(3).unwrap();
    let second = Duration::from_secs(1);
    let client = lab.pod(0).unwrap().client().unwrap();
    let server = lab.pod(1).unwrap().serve(80).unwrap();
    let _other = lab.pod(2).unwrap().serve(80).unwrap();
    let destination = SocketAddr::new(lab.pod(1).unwrap().v6().into(), 80);

    let tcp = client.open(Transport::Tcp, Dial::new(destination)).unwrap().unwrap().id.unwrap();
    assert_eq!(client.send(tcp, second).unwrap().unwrap().answer.unwrap(), "pod-1-2");
    assert_eq!(server.connections(), 1);

    let udp = client.open(Transport::UdpUnconnected, Dial::new(destination).connect_only()).unwrap().unwrap();
    let udp = udp.id.unwrap();
    assert_eq!(client.send(udp, second).unwrap().unwrap().answer.unwrap(), "pod-1-2");
    let elsewhere = SocketAddr::new(lab.pod(2).unwrap().v6().into(), 80);
    assert_eq!(client.send_to(udp, elsewhere, second).unwrap().unwrap().answer.unwrap(), "pod-1-3");

    let held = client.hold(Dial::new(destination), 50).unwrap();
    assert_eq!((held.alive, held.answers["pod-1-2"]), (50, 50));
    assert_eq!(client.check_held(held.id).unwrap().alive, 50);

    drop(server);
    assert_eq!(client.check_held(held.id).unwrap().alive, 0);
    assert!(client.send(tcp, second).unwrap().is_err());
    client.close(tcp).unwrap();
    assert!(client.send(tcp, second).is_err(), "the id is gone");
}

#[test]
fn loops_count_answers_and_failures() {
    let lab = Lab::new(2).unwrap();
    let client = lab.pod(0).unwrap().client().unwrap();
    let to = lab.pod(1).unwrap();
    let server = to.serve(80).unwrap();
    let dial = Dial::new(SocketAddr::new(to.v4().into(), 80));

    let report = client.run_loop(LoopSpec::new(Transport::Tcp, dial).threads(2).count(100)).unwrap();
    assert_eq!((report.attempts, report.answers["pod-1-2"], report.failed()), (200, 200, 0));
    assert_eq!(report.connect.count, 200);
    assert!(report.connect.min_ns <= report.connect.p50_ns && report.connect.p99_ns <= report.connect.max_ns);

    let udp =
        client.run_loop(LoopSpec::new(Transport::UdpConnected, dial.connect_only()).count(100)).unwrap();
    assert_eq!((udp.attempts, udp.answers[""]), (100, 100));
    assert_eq!(server.datagrams(), 0);

    let running = client.start_loop(LoopSpec::new(Transport::Tcp, dial).threads(2).record()).unwrap();
    assert_eq!(
        answered_by(&client, Transport::UdpConnected, dial),
        "pod-1-2",
        "the client does other things meanwhile"
    );
    while client.read_loop(running).unwrap().attempts < 10 {}
    drop(server);
    while client.read_loop(running).unwrap().failures.is_empty() {}
    let report = client.stop_loop(running).unwrap();
    assert!(report.failures.contains_key("ECONNREFUSED"), "{:?}", report.failures);
    assert_eq!(report.records.len() as u64, report.attempts);
    assert!(report.records.iter().all(|record| record.start_ns <= record.end_ns));
}

#[test]
fn clients_are_in_the_cgroup_and_namespace_of_their_pod() {
    let lab = Lab::new(1).unwrap();
    let pod = lab.pod(0).unwrap();
    let client = pod.client().unwrap();
    let members = fs::read_to_string(pod.cgroup().join("cgroup.procs")).unwrap();
    assert_eq!(members.trim(), client.pid().to_string());
    let netns = fs::metadata(format!("/proc/{}/ns/net", client.pid())).unwrap().ino();
    assert_eq!(netns, pod.netns().inode().unwrap());
    assert!(pod.cgroup().starts_with(lab.node(0).unwrap().cgroup()));

    let host_network = lab.node(0).unwrap().host_network_pod("kube-dns").unwrap();
    assert_eq!(host_network.netns().inode().unwrap(), lab.node(0).unwrap().host().netns().inode().unwrap());
    reaches(&host_network, pod);

    client.serve("inside", &pod.sockets(81)).unwrap();
    let dial = Dial::new(SocketAddr::new(pod.v4().into(), 81));
    assert_eq!(answered_by(&pod.client().unwrap(), Transport::Tcp, dial), "inside");
}

#[test]
fn a_lab_has_no_way_out() {
    let lab = Lab::new(1).unwrap();
    let host = fs::metadata("/proc/self/ns/net").unwrap().ino();
    let node = lab.node(0).unwrap();
    for place in [node.host(), node.pod(0).unwrap(), lab.outside()] {
        assert_ne!(place.netns().inode().unwrap(), host);
    }
    // A link whose other end is in a namespace of its own names that namespace; all of them are the lab's.
    let links = |place: &Place| {
        let output = place.command("ip").unwrap().args(["-o", "link"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().lines().count()
    };
    assert_eq!((links(lab.pod(0).unwrap()), links(node.host()), links(lab.outside())), (2, 3, 2));
}

#[test]
fn two_labs_do_not_meet() {
    let (one, two) = (Lab::new(2).unwrap(), Lab::new(2).unwrap());
    let _in_one = one.pod(1).unwrap().serve_as("one", 80).unwrap();
    let _in_two = two.pod(1).unwrap().serve_as("two", 80).unwrap();
    let destination = SocketAddr::new(IpAddr::from(one.pod(1).unwrap().v4()), 80);
    for (lab, name) in [(&one, "one"), (&two, "two")] {
        let client = lab.pod(0).unwrap().client().unwrap();
        let report =
            client.run_loop(LoopSpec::new(Transport::Tcp, Dial::new(destination)).count(20)).unwrap();
        assert_eq!(report.answers.into_iter().collect::<Vec<_>>(), [(name.to_owned(), 20)]);
    }
}

#[test]
fn nothing_is_left() {
    let lab = Lab::new(2).unwrap();
    let node = lab.node(0).unwrap();
    let _server = node.pod(0).unwrap().serve(80).unwrap();
    let client = node.pod(1).unwrap().client().unwrap();
    // As the agent does.
    let bpffs = node.bpffs();
    fs::create_dir(&bpffs).unwrap();
    nix::mount::mount(Some("bpf"), &bpffs, Some("bpf"), nix::mount::MsFlags::empty(), None::<&str>).unwrap();

    let namespaces =
        [node.host(), node.pod(0).unwrap(), node.pod(1).unwrap()].map(|place| place.netns().inode().unwrap());
    let (cgroup, directory, pid) = (lab.cgroup().to_owned(), lab.directory().to_owned(), client.pid());
    assert!(cgroup.exists() && directory.exists());
    drop((_server, client, lab));

    assert!(!cgroup.exists() && !directory.exists());
    assert!(!fs::read_to_string("/proc/self/mounts").unwrap().contains(directory.to_str().unwrap()));
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    let held = |path: &Path| fs::metadata(path).is_ok_and(|file| namespaces.contains(&file.ino()));
    for process in fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path()) {
        assert!(!held(&process.join("ns/net")), "{} is in a namespace of the lab", process.display());
    }
    for descriptor in fs::read_dir("/proc/self/fd").unwrap().flatten().map(|entry| entry.path()) {
        assert!(!held(&descriptor), "{} holds a namespace of the lab", descriptor.display());
    }
}

#[test]
fn the_next_run_sweeps_up_after_a_dead_one() {
    // A number above the kernel's limit, so of no process, and one that no other run of this test takes.
    let name = format!("sheave-lab-{}-0", 4_194_304 + std::process::id());
    let (cgroup, directory) = (cgroup::mount_point().unwrap().join(&name), std::env::temp_dir().join(&name));
    cgroup::create(&cgroup).unwrap();
    fs::create_dir_all(directory.join("node-1")).unwrap();
    sheave_tests::lab::sweep().unwrap();
    assert!(!cgroup.exists() && !directory.exists());
}

#[test]
fn frames_that_the_kernel_makes_are_forwarded_and_counted() {
    let lab = Lab::new(2).unwrap();
    let (host, pod) = (lab.node(0).unwrap().host().netns(), lab.pod(1).unwrap());
    let mac = mac_of(pod.netns(), "eth0").unwrap().map(|byte| format!("{byte:02x}")).join(":");
    host.ip(&format!("neighbour replace {} lladdr {mac} dev veth2 nud permanent\n", pod.v4())).unwrap();
    let generator = Generator::new(host, "eth0").unwrap();
    let arrivals = Arrivals { prefix: pod.v4(), prefix_len: 32, port: 9876 };
    let counter = Counter::new(pod.netns(), "eth0", arrivals).unwrap();
    let run = |flows, port, count| {
        let frames = generator.frames(flows, Target { address: pod.v4(), port, ports: 1 }).unwrap();
        assert!(generator.run(&frames, count, 0).unwrap() > 0);
        counter.read().unwrap()
    };
    // A wrong checksum of any of them would be the end of it on the way.
    assert_eq!(run(Flows::New, 9876, 100_000), Arrived { unchanged: 100_000, replaced: 0 });
    assert_eq!(run(Flows::Known, 9876, 1000), Arrived { unchanged: 101_000, replaced: 0 });
    assert_eq!(run(Flows::Known, 9877, 1000), Arrived { unchanged: 101_000, replaced: 0 });

    sheave_tests::nodes::nft(
        host,
        "add table ip nat; add chain ip nat post { type nat hook postrouting priority 100; }; \
         add rule ip nat post masquerade",
    )
    .unwrap();
    assert_eq!(run(Flows::Known, 9876, 1000), Arrived { unchanged: 101_000, replaced: 1000 });
}
