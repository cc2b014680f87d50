//! Tables that are full: the agent moves to larger ones, and nobody notices.

#![expect(clippy::unwrap_used, reason = "the helpers of tests fail as tests do")]

use std::{fs, time::Duration};

use anyhow::ensure;
use nix::mount::{MsFlags, mount, umount};
use proxy_agent::kernel::Pins;

use sheave_tests::{
    lab::Shape,
    manifests::{Object, service},
    protocol::{Dial, LoopSpec, Transport},
    scene::{Scene, TARGET, at, eventually, names, reach, slices},
};

/// More than the tables of [`SMALL`] hold.
const MANY: u8 = 60;
const SMALL: [&str; 8] = [
    "--initial-frontends",
    "16",
    "--initial-services",
    "16",
    "--initial-slots",
    "16",
    "--initial-backends",
    "16",
];

fn vip(number: u8) -> String {
    format!("10.96.1.{number}")
}

/// Sticky, so that growth shows whether it keeps what the programs remember.
fn sticky(scene: &Scene, number: u8) -> Vec<Object> {
    let node = scene.node().unwrap();
    let places: Vec<_> = node.pods().iter().map(|pod| (node, pod)).collect();
    let name = format!("svc-{number}");
    let mut objects = vec![
        service(&name, &[&vip(number)])
            .port("http", "TCP", 80, TARGET)
            .set("spec.sessionAffinity", "ClientIP"),
    ];
    objects.extend(slices(&name, "http", "TCP", &places));
    objects
}

#[test]
fn full_tables_grow_under_load_and_keep_affinity_and_connections() {
    let mut scene = Scene::with(Shape { nodes: 1, pods: 3 }, &SMALL).unwrap();
    scene.serve().unwrap();
    scene.apply("svc-1", &sticky(&scene, 1)).unwrap();
    let client = scene.pod(0).unwrap().client().unwrap();
    let dial = Dial::new(at(&vip(1), 80).unwrap());
    let first = reach(&client, Transport::Tcp, dial).unwrap().answer.unwrap();
    let held = client.hold(dial, 10).unwrap();
    let load = client.start_loop(LoopSpec::new(Transport::Tcp, dial).threads(2)).unwrap();

    for number in 2..=MANY {
        scene.apply(&format!("svc-{number}"), &sticky(&scene, number)).unwrap();
    }
    for number in 1..=MANY {
        reach(&client, Transport::Tcp, Dial::new(at(&vip(number), 80).unwrap())).unwrap();
    }
    let report = client.stop_loop(load).unwrap();
    assert!(report.failures.is_empty(), "{report:?}");
    // A6: the same backend all the time, under the same ids in the larger tables.
    assert_eq!(report.answers.into_keys().collect::<std::collections::BTreeSet<_>>(), names(&[&first]));
    assert_eq!(client.check_held(held.id).unwrap().alive, 10);
    assert!(scene.agent().unwrap().log_tail().contains("moving to larger tables"));

    // The next agent finds the larger tables, and has nothing to write.
    scene.take_agent().unwrap().kill().unwrap();
    scene.start_agent().unwrap();
    let status = scene.agent().unwrap().status().unwrap();
    assert_eq!(status["writes"], 0, "{status}");
    assert_eq!(reach(&client, Transport::Tcp, dial).unwrap().answer.unwrap(), first);
}

/// The first sync finds more than the tables hold.
#[test]
fn a_large_cluster_is_programmed_by_a_small_start() {
    let mut scene = Scene::without_agent(Shape { nodes: 1, pods: 2 }, &SMALL).unwrap();
    scene.serve().unwrap();
    for number in 1..=MANY {
        scene.lab().manifests().write(&format!("svc-{number}"), &sticky(&scene, number)).unwrap();
    }
    scene.start_agent().unwrap();
    let client = scene.pod(0).unwrap().client().unwrap();
    for number in 1..=MANY {
        let dial = Dial::new(at(&vip(number), 80).unwrap()).timeout(Duration::from_secs(2));
        reach(&client, Transport::Tcp, dial).unwrap();
    }
}

/// Q5: larger tables cannot be made. What fits is served, and the rest as soon as they can.
#[test]
fn q5_without_larger_tables_what_fits_is_served() {
    let mut scene = Scene::with(Shape { nodes: 1, pods: 2 }, &SMALL).unwrap();
    scene.serve().unwrap();
    scene.apply("svc-1", &sticky(&scene, 1)).unwrap();
    let client = scene.pod(0).unwrap().client().unwrap();
    let dial = |number| Dial::new(at(&vip(number), 80).unwrap()).timeout(Duration::from_secs(2));
    // A mount point cannot be removed, so the next generation cannot be made.
    let next = Pins::new(scene.node().unwrap().bpffs()).filling(1);
    fs::create_dir(&next).unwrap();
    mount(Some("bpf"), &next, Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
    for number in 2..=MANY {
        scene.lab().manifests().write(&format!("svc-{number}"), &sticky(&scene, number)).unwrap();
    }
    eventually("the agent says what it cannot do", || {
        let failed = scene.agent()?.status()?["failed"].as_object().map_or(0, |failed| failed.len());
        ensure!(failed > 0 && scene.agent()?.log_tail().contains("no larger tables"));
        Ok(())
    })
    .unwrap();
    reach(&client, Transport::Tcp, dial(1)).unwrap();

    umount(&next).unwrap();
    eventually("all are programmed at last", || {
        ensure!(scene.agent()?.status()?["failed"].as_object().is_some_and(|failed| failed.is_empty()));
        Ok(())
    })
    .unwrap();
    for number in 1..=MANY {
        reach(&client, Transport::Tcp, dial(number)).unwrap();
    }
}

/// Q2: the first sync had to grow, the programs are attached, and the agent ends before it has removed the old tables. The
/// ids that the kernel remembers (affinity, flows) are those of the new ones.
#[test]
fn q2_what_is_attached_is_adopted_although_older_tables_are_left() {
    let mut scene = Scene::with(Shape { nodes: 1, pods: 2 }, &SMALL).unwrap();
    scene.serve().unwrap();
    scene.apply("svc-1", &sticky(&scene, 1)).unwrap();
    scene.take_agent().unwrap().kill().unwrap();
    for number in 2..=MANY {
        scene.lab().manifests().write(&format!("svc-{number}"), &sticky(&scene, number)).unwrap();
    }
    // A mount point cannot be removed: that ends the agent, right after it attached.
    let pins = Pins::new(scene.node().unwrap().bpffs());
    let old = pins.tables(0).join("in-the-way");
    fs::create_dir(&old).unwrap();
    mount(Some("bpf"), &old, Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
    assert!(scene.start_agent().is_err());
    umount(&old).unwrap();
    assert_eq!(pins.newest().unwrap(), Some(1));
    assert!(pins.tables(0).exists(), "what this test is about");
    let client = scene.pod(0).unwrap().client().unwrap();
    let dial = |number| Dial::new(at(&vip(number), 80).unwrap()).timeout(Duration::from_secs(2));
    let before = reach(&client, Transport::Tcp, dial(MANY)).unwrap().answer;

    scene.start_agent().unwrap();
    let status = scene.agent().unwrap().status().unwrap();
    assert_eq!(status["writes"], 0, "{status}");
    assert_eq!(status["adopted_frontends"], status["frontends"], "{status}");
    assert!(!pins.tables(0).exists());
    for _ in 0..10 {
        assert_eq!(reach(&client, Transport::Tcp, dial(MANY)).unwrap().answer, before);
    }
}
