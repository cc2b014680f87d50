//! The hooks of the packet path follow the node's devices: which get them, what happens to those that come, go and move,
//! and that each has exactly ours, once.

#![expect(clippy::unwrap_used, reason = "the helpers of tests fail as tests do")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context, Result, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use proxy_agent::kernel::{Pins, table::Table};
use proxy_common::abi::Device;
use serde_json::{Value, json};
use sheave_tests::{
    agent::sheave,
    lab::{Node, Shape},
    manifests::service,
    netns::Netns,
    scene::{Scene, TARGET, eventually, slices},
};

/// Programs of a device at both hooks, by kernel id.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Hooks {
    ingress: Vec<u32>,
    egress: Vec<u32>,
}

fn hooks(netns: &Netns, device: &str) -> Result<Hooks> {
    let query = |direction| -> Result<Vec<u32>> {
        let asked = netns.run(|| SchedClassifier::query_tcx(device, direction))?;
        let (_, programs) = asked.with_context(|| format!("asking for the programs of {device}"))?;
        Ok(programs.iter().map(aya::programs::ProgramInfo::id).collect())
    };
    Ok(Hooks { ingress: query(TcAttachType::Ingress)?, egress: query(TcAttachType::Egress)? })
}

/// Of every device of the namespace, which the command `ip` names.
fn all_hooks(netns: &Netns) -> Result<BTreeMap<String, Hooks>> {
    let output = netns.command("ip").args(["-json", "link"]).output().context("running `ip`")?;
    let links: Value = serde_json::from_slice(&output.stdout).context("reading what `ip` said")?;
    let names = links.as_array().context("a list")?.iter().filter_map(|link| link["ifname"].as_str());
    names.map(|name| Ok((name.to_owned(), hooks(netns, name)?))).collect()
}

fn index(netns: &Netns, device: &str) -> Result<u32> {
    let name = std::ffi::CString::new(device)?;
    let index = netns.run(|| nix::net::if_::if_nametoindex(name.as_c_str()))?;
    index.with_context(|| format!("looking for {device}"))
}

fn pins(node: &Node) -> Pins {
    Pins::new(node.bpffs())
}

/// Indices of devices with a pin.
fn pinned(node: &Node) -> BTreeSet<u32> {
    let links = fs::read_dir(pins(node).links()).unwrap();
    let names = links.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names
        .filter(|name| name.starts_with("tc_"))
        .map(|name| name.rsplit_once('-').unwrap().1.parse().unwrap())
        .collect()
}

fn devices(node: &Node) -> BTreeMap<u32, Device> {
    let table: Table<u32, Device> = Table::open(&pins(node).state(), "DEVICES").unwrap();
    table.entries().unwrap().into_iter().collect()
}

/// Exactly these devices and `lo` have both programs, each once and all the same; pins know them and no other, `DEVICES`
/// besides the bridges, by which packets of the node itself leave.
fn hooked(node: &Node, expected: &[&str]) -> Result<Hooks> {
    let netns = node.host().netns();
    // The node's own clients of its own NodePorts pass there.
    let expected: Vec<&str> = expected.iter().copied().chain(["lo"]).collect();
    let mut ours = None;
    for (name, hooks) in all_hooks(netns)? {
        if expected.contains(&name.as_str()) {
            ensure!(hooks.ingress.len() == 1 && hooks.egress.len() == 1, "{name}: {hooks:?}");
            if name.starts_with("tun") {
                // Without link header: programs of its own.
                continue;
            }
            let first = ours.get_or_insert_with(|| hooks.clone());
            ensure!(*first == hooks, "{name} has {hooks:?}, another device {first:?}");
        } else {
            ensure!(hooks.ingress.is_empty() && hooks.egress.is_empty(), "{name}: {hooks:?}");
        }
    }
    let indices: BTreeSet<u32> = expected.iter().map(|name| index(netns, name)).collect::<Result<_>>()?;
    ensure!(pinned(node) == indices, "pinned {:?}, are {indices:?}", pinned(node));
    let bridges = all_hooks(netns)?.into_iter().filter(|(name, _)| name.starts_with("br"));
    let bridges: BTreeSet<u32> = bridges.map(|(name, _)| index(netns, &name)).collect::<Result<_>>()?;
    let known: BTreeSet<u32> = devices(node).into_keys().collect();
    ensure!(known == &indices | &bridges, "DEVICES has {known:?}, are {indices:?}");
    ours.context("no device is to be hooked")
}

fn soon(node: &Node, expected: &[&str]) -> Hooks {
    eventually(&format!("hooks on {expected:?}"), || hooked(node, expected)).unwrap()
}

fn sources(node: &Node, device: &str) -> Result<[String; 2]> {
    let found = devices(node).get(&index(node.host().netns(), device)?).copied();
    let device = found.context("no entry in DEVICES")?;
    Ok([device.v4.ip().to_string(), device.v6.ip().to_string()])
}

#[test]
fn roles_decide_which_devices_are_hooked() {
    let scene = Scene::new(2).unwrap();
    let node = scene.node().unwrap();
    // Pods' links and the uplink.
    let first = hooked(node, &["eth0", "veth1", "veth2"]).unwrap();
    let host = node.host().netns();
    host.ip("link add br7 type bridge\n\
             address add 198.51.100.1/24 dev br7\n\
             link add port0 type veth peer name port1\n\
             link set port0 master br7\n\
             link set br7 up\n\
             link add vx0 type vxlan id 7 dstport 4789\n\
             tuntap add tun0 mode tun\n\
             link set tun0 up\n")
        .unwrap();
    let now = soon(node, &["eth0", "veth1", "veth2", "port0", "port1", "vx0", "tun0"]);
    assert_eq!(first, now);
    let bridge = index(host, "br7").unwrap();
    let ports: Vec<u32> =
        ["port0", "port1"].map(|name| devices(node)[&index(host, name).unwrap()].bridge).into();
    assert_eq!(ports, [bridge, 0]);

    // M7: own address, the bridge's, or the node's primary one.
    let primary = [node.host().v4().to_string(), node.host().v6().to_string()];
    assert_eq!(sources(node, "eth0").unwrap(), primary);
    assert_eq!(sources(node, "port0").unwrap(), ["198.51.100.1".to_owned(), primary[1].clone()]);
    assert_eq!(sources(node, "port1").unwrap(), primary);
    host.ip("address add 203.0.113.7/24 dev port1\n").unwrap();
    eventually("the new address is the source", || {
        let sources = sources(node, "port1")?;
        ensure!(sources[0] == "203.0.113.7", "{sources:?}");
        Ok(())
    })
    .unwrap();

    let status = scene.agent().unwrap().status().unwrap();
    let told: BTreeMap<&str, (&str, bool)> = status["packet_path"]["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|device| {
            let text = |field: &str| device[field].as_str().unwrap();
            (text("name"), (text("role"), device["hooked"].as_bool().unwrap()))
        })
        .collect();
    assert_eq!(told["lo"], ("loopback", true));
    assert_eq!(told["eth0"], ("device", true));
    assert_eq!(told["port0"], ("bridge port", true));
    assert_eq!(told["br7"], ("bridge: its ports are hooked", false));
    assert_eq!(told["vx0"], ("overlay", true));
    assert_eq!(told["tun0"], ("tunnel without link header", true));
    assert_eq!(status["devices_hooked"].as_array().unwrap().len(), 8);
    assert_eq!(status["packet_path"]["failed"], json!({}));
    let text = String::from_utf8(sheave(node, &["status"]).unwrap().stdout).unwrap();
    assert!(text.contains("hooked on 8 devices") && text.contains("bridge port"), "{text}");
}

/// A device that flaps a hundred times ends with exactly ours, once, and nothing is left of those that went.
#[test]
fn a_device_that_flaps_has_each_program_once() {
    let scene = Scene::new(1).unwrap();
    let node = scene.node().unwrap();
    let host = node.host().netns();
    host.ip("link add br7 type bridge\nlink set br7 up\nlink add hop0 type veth peer name hop1\n").unwrap();
    for round in 0..100 {
        host.ip("link add flap0 type veth peer name flap1\n").unwrap();
        if round % 3 == 0 {
            // Sometimes it lives long enough to be hooked.
            soon(node, &["eth0", "veth1", "hop0", "hop1", "flap0", "flap1"]);
        }
        let to = if round % 2 == 0 { "master br7" } else { "nomaster" };
        host.ip(&format!("link set hop0 {to}\nlink del flap0\n")).unwrap();
    }
    host.ip("link add flap0 type veth peer name flap1\nlink set hop0 master br7\n").unwrap();
    soon(node, &["eth0", "veth1", "hop0", "hop1", "flap0", "flap1"]);
    eventually("the port knows its bridge", || {
        let bridge = index(host, "br7")?;
        ensure!(devices(node)[&index(host, "hop0")?].bridge == bridge);
        Ok(())
    })
    .unwrap();
    host.ip("link del flap0\nlink del hop0\n").unwrap();
    soon(node, &["eth0", "veth1"]);
}

/// Another device under the index and the name of one that went gets hooks of its own; one that went to another
/// namespace keeps none.
#[test]
fn hooks_belong_to_the_device_not_to_its_index() {
    let scene = Scene::new(1).unwrap();
    let node = scene.node().unwrap();
    let host = node.host().netns();
    for _ in 0..20 {
        host.ip("link add twin0 index 7777 type veth peer name twin1 index 7778\n").unwrap();
        soon(node, &["eth0", "veth1", "twin0", "twin1"]);
        host.ip("link del twin0\nlink add twin0 index 7777 type veth peer name twin1 index 7778\n").unwrap();
        soon(node, &["eth0", "veth1", "twin0", "twin1"]);
        host.ip("link del twin0\n").unwrap();
    }
    host.ip("link add away0 type veth peer name away1\n").unwrap();
    soon(node, &["eth0", "veth1", "away0", "away1"]);
    let pod = node.pod(0).unwrap().netns();
    host.ip(&format!("link set away1 netns {}\n", pod.path().display())).unwrap();
    soon(node, &["eth0", "veth1", "away0"]);
    let left = hooks(pod, "away1").unwrap();
    assert!(left.ingress.is_empty() && left.egress.is_empty(), "{left:?}");
}

/// Somebody takes a hook off: it is put on again.
#[test]
fn a_hook_that_was_taken_off_comes_back() {
    let scene = Scene::with(Shape { nodes: 1, pods: 1 }, &["--flow-sweep-ms", "50"]).unwrap();
    let node = scene.node().unwrap();
    let before = soon(node, &["eth0", "veth1"]);
    let eth0 = index(node.host().netns(), "eth0").unwrap();
    fs::remove_file(pins(node).links().join(format!("tc_ingress-{eth0}"))).unwrap();
    assert_eq!(soon(node, &["eth0", "veth1"]), before);
}

/// Q2, Q8: hooks stay when the agent goes; the next one takes them over, and finds what changed meanwhile.
#[test]
fn q2_hooks_are_adopted() {
    let mut scene = Scene::new(1).unwrap();
    let expected = ["eth0", "veth1", "old0", "old1", "twin0", "twin1"];
    let node = scene.node().unwrap();
    node.host()
        .netns()
        .ip("link add old0 type veth peer name old1\n\
             link add twin0 index 7777 type veth peer name twin1 index 7778\n")
        .unwrap();
    let mut last = soon(node, &expected);
    for _ in 0..2 {
        scene.take_agent().unwrap().kill().unwrap();
        assert_eq!(hooked(scene.node().unwrap(), &expected).unwrap(), last);
        scene.start_agent().unwrap();
        let now = soon(scene.node().unwrap(), &expected);
        assert_ne!(now, last, "the new agent's programs");
        assert_eq!(scene.agent().unwrap().status().unwrap()["writes"], 0);
        last = now;
    }
    scene.take_agent().unwrap().kill().unwrap();
    let node = scene.node().unwrap();
    node.host()
        .netns()
        .ip("link del old0\n\
             link del twin0\n\
             link add twin0 index 7777 type veth peer name twin1 index 7778\n\
             link add new0 type veth peer name new1\n")
        .unwrap();
    scene.start_agent().unwrap();
    soon(scene.node().unwrap(), &["eth0", "veth1", "twin0", "twin1", "new0", "new1"]);
}

/// Kernel ids of programs in our filters at both hooks of a device.
fn filters(netns: &Netns, device: &str) -> Result<Hooks> {
    let list = |direction: &str, name: &str| -> Result<Vec<u32>> {
        let arguments = ["-json", "filter", "show", "dev", device, direction];
        let output = netns.command("tc").args(arguments).output().context("running `tc`")?;
        let filters: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let options = filters.as_array().into_iter().flatten().map(|filter| &filter["options"]);
        let ours = options.filter(|options| options["bpf_name"] == name);
        ours.map(|options| Ok(options["prog"]["id"].as_u64().context("no program")?.try_into()?)).collect()
    };
    Ok(Hooks { ingress: list("ingress", "tc_ingress")?, egress: list("egress", "tc_egress")? })
}

/// Exactly these devices and `lo` have one filter of ours at each hook, all with the same programs, and no links.
fn filtered(node: &Node, expected: &[&str]) -> Result<Hooks> {
    let netns = node.host().netns();
    let expected: Vec<&str> = expected.iter().copied().chain(["lo"]).collect();
    let mut ours = None;
    for (name, links) in all_hooks(netns)? {
        let filters = filters(netns, &name)?;
        ensure!(links.ingress.is_empty() && links.egress.is_empty(), "{name} has links: {links:?}");
        if expected.contains(&name.as_str()) {
            ensure!(filters.ingress.len() == 1 && filters.egress.len() == 1, "{name}: {filters:?}");
            let first = ours.get_or_insert_with(|| filters.clone());
            ensure!(*first == filters, "{name} has {filters:?}, another device {first:?}");
        } else {
            ensure!(filters.ingress.is_empty() && filters.egress.is_empty(), "{name}: {filters:?}");
        }
    }
    ours.context("no device is to be hooked")
}

fn filtered_soon(node: &Node, expected: &[&str]) -> Hooks {
    eventually(&format!("filters on {expected:?}"), || filtered(node, expected)).unwrap()
}

/// Classic filters, as on kernels before 6.6: they follow the devices, outlive the agent, are replaced in their places, and
/// come back when somebody removes them. Filters of others stay what they are, before and after.
#[test]
fn classic_filters_are_hooks_too() {
    let arguments = ["--device-hooks", "clsact", "--flow-sweep-ms", "50"];
    let mut scene = Scene::without_agent(Shape { nodes: 1, pods: 1 }, &arguments).unwrap();
    let host = scene.node().unwrap().host().netns().clone();
    let tc = |arguments: &str| {
        let output = host.command("tc").args(arguments.split(' ')).output().unwrap();
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let others = || {
        ["ingress", "egress"].map(|hook| {
            let all = tc(&format!("filter show dev eth0 {hook}"));
            all.lines().filter(|line| line.contains("u32") && line.contains("fh")).count()
        })
    };
    tc("qdisc add dev eth0 clsact");
    for hook in ["ingress", "egress"] {
        tc(&format!("filter add dev eth0 {hook} pref 1000 protocol all u32 match u32 0 0 flowid 1:1"));
    }
    let foreign = others();
    scene.start_agent().unwrap();
    let mut last = filtered_soon(scene.node().unwrap(), &["eth0", "veth1"]);
    assert_eq!(scene.agent().unwrap().status().unwrap()["packet_path"]["hooks"], "clsact");
    // First at ingress, last at egress.
    let order = |hook: &str| {
        let all = tc(&format!("filter show dev eth0 {hook}"));
        let place = |what: &str| all.find(what).unwrap();
        (place(" bpf "), place(" u32 "))
    };
    assert!(order("ingress").0 < order("ingress").1 && order("egress").0 > order("egress").1);

    for _ in 0..2 {
        scene.take_agent().unwrap().kill().unwrap();
        assert_eq!(filtered(scene.node().unwrap(), &["eth0", "veth1"]).unwrap(), last);
        scene.start_agent().unwrap();
        let now = filtered_soon(scene.node().unwrap(), &["eth0", "veth1"]);
        assert_ne!(now, last, "the new agent's programs");
        assert_eq!(scene.agent().unwrap().status().unwrap()["writes"], 0);
        last = now;
    }
    tc("filter del dev eth0 ingress pref 1");
    assert_eq!(filtered_soon(scene.node().unwrap(), &["eth0", "veth1"]), last);
    tc("qdisc del dev veth1 clsact");
    assert_eq!(filtered_soon(scene.node().unwrap(), &["eth0", "veth1"]), last);
    host.ip("link add new0 type veth peer name new1\n").unwrap();
    filtered_soon(scene.node().unwrap(), &["eth0", "veth1", "new0", "new1"]);
    host.ip("link del new0\n").unwrap();
    filtered_soon(scene.node().unwrap(), &["eth0", "veth1"]);

    // From one kind to the other and back.
    scene.take_agent().unwrap().kill().unwrap();
    let spawn = |scene: &Scene, arguments: &[&str]| {
        let agent = sheave_tests::agent::Agent::spawn(scene.lab(), scene.node().unwrap(), arguments);
        let mut agent = agent.unwrap();
        agent.wait_synced(std::time::Duration::from_secs(60)).unwrap();
        agent
    };
    let linked = spawn(&scene, &[]);
    soon(scene.node().unwrap(), &["eth0", "veth1"]);
    for device in ["eth0", "veth1", "lo"] {
        let left = filters(&host, device).unwrap();
        assert!(left.ingress.is_empty() && left.egress.is_empty(), "{device}: {left:?}");
    }
    linked.kill().unwrap();
    let filtering = spawn(&scene, &arguments);
    filtered_soon(scene.node().unwrap(), &["eth0", "veth1"]);
    filtering.stop().unwrap();
    assert!(sheave(scene.node().unwrap(), &["cleanup"]).unwrap().status.success());
    for device in ["eth0", "veth1", "lo"] {
        let left = filters(&host, device).unwrap();
        assert!(left.ingress.is_empty() && left.egress.is_empty(), "{device}: {left:?}");
    }
    assert_eq!(others(), foreign, "those of others");
}

/// Larger tables come with programs of their own: every device gets them.
#[test]
fn growth_switches_every_hook() {
    let small = ["frontends", "services", "slots", "backends"]
        .map(|table| [format!("--initial-{table}"), "16".to_owned()])
        .concat();
    let small: Vec<&str> = small.iter().map(String::as_str).collect();
    let scene = Scene::with(Shape { nodes: 1, pods: 2 }, &small).unwrap();
    let node = scene.node().unwrap();
    let before = soon(node, &["eth0", "veth1", "veth2"]);
    let pod = node.pod(0).unwrap();
    for number in 1..=40 {
        let name = format!("svc-{number}");
        let mut objects =
            vec![service(&name, &[&format!("10.96.1.{number}")]).port("http", "TCP", 80, TARGET)];
        objects.extend(slices(&name, "http", "TCP", &[(node, pod)]));
        scene.apply(&name, &objects).unwrap();
    }
    assert!(scene.agent().unwrap().log_tail().contains("moving to larger tables"));
    let after = hooked(node, &["eth0", "veth1", "veth2"]).unwrap();
    assert!(before.ingress != after.ingress && before.egress != after.egress, "{before:?} {after:?}");
}

/// `--packet-path off` and `sheave cleanup` take all of them off.
#[test]
fn hooks_can_be_taken_off() {
    let mut scene = Scene::new(1).unwrap();
    let none = |scene: &Scene| {
        let hooks = all_hooks(scene.node().unwrap().host().netns()).unwrap();
        assert!(hooks.values().all(|hooks| hooks.ingress.is_empty() && hooks.egress.is_empty()), "{hooks:?}");
    };
    soon(scene.node().unwrap(), &["eth0", "veth1"]);
    scene.take_agent().unwrap().stop().unwrap();
    let node = scene.node().unwrap();
    let mut off = sheave_tests::agent::Agent::spawn(scene.lab(), node, &["--packet-path", "off"]).unwrap();
    off.wait_synced(std::time::Duration::from_secs(60)).unwrap();
    none(&scene);
    let status = off.status().unwrap();
    assert_eq!((&status["packet_path"], &status["devices_hooked"]), (&Value::Null, &json!([])));
    off.stop().unwrap();
    scene.start_agent().unwrap();
    soon(scene.node().unwrap(), &["eth0", "veth1"]);
    scene.take_agent().unwrap().stop().unwrap();
    assert!(sheave(scene.node().unwrap(), &["cleanup"]).unwrap().status.success());
    none(&scene);
}

/// M1: pods are told by the interface that they come in by.
#[test]
fn m1_devices_of_local_pods() {
    let arguments = ["--detect-local-mode", "InterfaceNamePrefix", "--pod-interface-name-prefix", "veth"];
    let scene = Scene::with(Shape { nodes: 1, pods: 2 }, &arguments).unwrap();
    let node = scene.node().unwrap();
    soon(node, &["eth0", "veth1", "veth2"]);
    let local = |name: &str| {
        devices(node)[&index(node.host().netns(), name).unwrap()].flags & Device::LOCAL_PODS != 0
    };
    assert_eq!(["eth0", "veth1", "veth2"].map(local), [false, true, true]);
}
