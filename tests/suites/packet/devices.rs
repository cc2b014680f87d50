//! Devices come, go, flap and change sides: our programs are where they belong, once.

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::ensure;
use aya::programs::{SchedClassifier, tc::TcAttachType};
use sheave_tests::{
    agent::sheave,
    lab::Place,
    netns::Netns,
    nodes::{Layout, World},
    scene::eventually,
};

use crate::{
    stage::{Stage, bridge_pod, cluster_ips, served},
    talk::{Talk, ask, datagrams},
};

const TIMES: usize = 100;

/// The programs on a device, by their names: at its ingress and at its egress.
type Programs = BTreeMap<String, [Vec<String>; 2]>;

fn programs(netns: &Netns) -> Programs {
    let names = || {
        let devices = nix::net::if_::if_nameindex().unwrap();
        let on = |device: &str, direction| -> Vec<String> {
            let (_, programs) = SchedClassifier::query_tcx(device, direction).unwrap();
            programs.iter().map(|program| program.name_as_str().unwrap().to_owned()).collect()
        };
        let devices = devices.iter().map(|device| device.name().to_string_lossy().into_owned());
        devices
            .map(|device| {
                let both = [on(&device, TcAttachType::Ingress), on(&device, TcAttachType::Egress)];
                (device, both)
            })
            .collect()
    };
    netns.run(names).unwrap()
}

/// What belongs where: one program each way on every device that packets come and go by, none on a bridge whose ports
/// have them. What `lo` has is left open.
fn belongs(world: &World, programs: &Programs) -> anyhow::Result<()> {
    let ports = world.node(0)?.pods().iter().map(Place::name).chain(["eth0", "vxlan0"]);
    for port in ports.filter(|port| programs.contains_key(*port)) {
        let [ingress, egress] = &programs[port];
        ensure!(ingress.len() == 1 && egress.len() == 1, "{port}: {ingress:?} {egress:?}");
    }
    ensure!(programs["cbr0"] == [Vec::<String>::new(), Vec::new()], "cbr0: {:?}", programs["cbr0"]);
    Ok(())
}

fn works(from: &Place, number: u16) {
    for address in cluster_ips(number) {
        let to = SocketAddr::new(address, 80);
        Talk::open(from, 0, to).echo(1000).unwrap();
        ask(&datagrams(from, to), b"question").unwrap();
    }
}

fn node(world: &World) -> &Netns {
    world.node(0).unwrap().host().netns()
}

#[test]
fn every_device_has_its_programs_once() {
    for layout in [Layout::default(), Layout::overlay()] {
        let mut stage = Stage::new(layout);
        let devices = programs(node(&stage.world));
        belongs(&stage.world, &devices).unwrap();
        stage.kill_and_restart();
        assert_eq!(programs(node(&stage.world)), devices, "after a restart");
        stage.world.take_agent(0).unwrap().stop().unwrap();
        assert_eq!(programs(node(&stage.world)), devices, "an agent that ends leaves all at work (Q8)");
        assert!(sheave(stage.world.node(0).unwrap(), &["cleanup"]).unwrap().status.success());
        let left: Vec<_> = programs(node(&stage.world)).into_values().flatten().flatten().collect();
        assert!(left.is_empty(), "after cleanup: {left:?}");
    }
}

/// Down and up: nothing changes, and it works.
#[test]
fn a_device_that_flaps_keeps_its_programs() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    stage.apply("web", &served(world, "web", 1, &[(0, bridge_pod(world, 0, 0))]));
    let before = programs(node(world));
    let client = bridge_pod(world, 0, 1);
    let device = world.host_end(client);
    for _ in 0..TIMES {
        node(world).ip(&format!("link set {device} down\nlink set {device} up\n")).unwrap();
    }
    works(client, 1);
    assert_eq!(programs(node(world)), before);
}

/// A pod's link that comes and goes: each new one gets its programs, soon; none is left behind.
#[test]
fn devices_that_come_and_go() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    stage.apply("web", &served(world, "web", 1, &[(0, bridge_pod(world, 0, 0))]));
    let before = programs(node(world));
    let pod = Netns::new().unwrap();
    let add = |host_end: &str| {
        format!("link add new0 type veth peer name eth0 netns {}\n{host_end}", pod.path().display())
    };
    for turn in 0..TIMES {
        node(world).ip(&add("link set new0 up\n")).unwrap();
        if turn % 3 == 0 {
            // It changes sides, too.
            node(world).ip("link set new0 master cbr0\nlink set new0 nomaster\n").unwrap();
        }
        node(world).ip("link del new0\n").unwrap();
    }
    node(world).ip(&add("link set new0 up\nroute add 10.244.1.200/32 dev new0\n")).unwrap();
    pod.ip("address add 10.244.1.200/32 dev eth0\nlink set eth0 up\nroute add default dev eth0\n").unwrap();
    node(world)
        .sysctls(&[("net/ipv4/conf/new0/proxy_arp", "1"), ("net/ipv4/neigh/new0/proxy_delay", "0")])
        .unwrap();
    let mut expected = before.clone();
    expected.insert("new0".to_owned(), before["p2p-1-1"].clone());
    eventually("the new device has its programs", || {
        let now = programs(node(world));
        ensure!(now == expected, "{now:?}");
        Ok(())
    })
    .unwrap();
    // The pods' range is a black hole but for its routes: the answer finds the pod by the new device.
    let to = SocketAddr::new(cluster_ips(1)[0], 80);
    let socket = pod.run(|| std::net::UdpSocket::bind("10.244.1.200:0").unwrap()).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_millis(500))).unwrap();
    let server = eventually("the new pod reaches the VIP", || Ok(ask(&socket, b"question")?)).unwrap();
    assert_eq!(server, bridge_pod(world, 0, 0).name());
    node(world).ip("link del new0\n").unwrap();
    works(world.outside(), 1);
    assert_eq!(programs(node(world)), before);
}
