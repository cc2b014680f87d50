//! The control plane: how soon a change is live, how soon a start, and what the agent takes.

use std::{collections::BTreeMap, fs, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use sheave_tests::{
    engine::monotonic_ns,
    protocol::{Dial, LoopSpec, Transport},
};

use super::{
    Effort, Options, go_on,
    report::{Fact, Report},
    scale::{Family, Group, Scale},
    stats::{quantile, sorted},
    watcher,
    world::{CLIENT_CPU, Side, World},
};

/// A start or a change that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(600);

/// Measures all that is wanted; starts the agent.
pub(crate) fn measure(
    world: &mut World,
    options: &Options,
    effort: &Effort,
    report: &mut Report,
) -> Result<()> {
    world.admit(world.client(), Side::Inside)?;
    if options.wants("a1") {
        cold_starts(world, effort, report)?;
    } else {
        world.start_agent()?;
    }
    if options.wants("a4") || options.wants("a5") {
        memory(world, report)?;
    }
    if options.wants("a2") || options.wants("a7") {
        flips(world, effort, report)?;
    }
    if options.wants("a6") {
        restart(world, report)?;
    }
    Ok(())
}

/// A1: from exec to the last Service, with nothing in the kernel. The last agent stays.
fn cold_starts(world: &mut World, effort: &Effort, report: &mut Report) -> Result<()> {
    let targets = world.client().targets(world.scale.vips(Family::V4))?;
    let source = World::source(Family::V4, Group::A);
    let mut all_ns = Vec::new();
    for start in 0..effort.starts {
        go_on()?;
        if start > 0 {
            world.kill_agent()?;
            world.clean_up()?;
        }
        let begin_ns = monotonic_ns();
        world.spawn_agent()?;
        let all = world.client().await_all(targets, source, PATIENCE)?;
        ensure!(all.late == 0, "{} Services were not there when the last one was", all.late);
        all_ns.push(all.all_ns - begin_ns);
        world.await_agent()?;
    }
    report.fact(Fact::times(
        "a1",
        "cold start: exec to every Service answering",
        world.scale.services,
        all_ns,
    ));
    Ok(())
}

/// A2: one endpoint moves; from just before the `rename` to the first socket that goes to the new place.
fn flips(world: &World, effort: &Effort, report: &mut Report) -> Result<()> {
    let directory = world.lab().manifests().path();
    let movable = world.scale.movable();
    let mut live_ns = Vec::new();
    let mut stale = 0;
    let mut unseen = 0;
    for flip in 0..effort.flips {
        go_on()?;
        let index = usize::try_from(flip)? % movable.len();
        let service = *movable.get(index).context("a movable Service")?;
        let lap = usize::try_from(flip)? / movable.len();
        let group = if lap.is_multiple_of(2) { Group::B } else { Group::A };
        let path = directory.join(Scale::movable_file(service));
        let unfinished = directory.join(".flip");
        fs::write(&unfinished, world.scale.movable_text(service, group)?)?;
        let vip = world.scale.vip(Family::V4, service);
        let before = if group == Group::A { Group::B } else { Group::A };
        let old = World::source(Family::V4, before).to_string();
        let (begin_ns, change) = thread::scope(|scope| {
            let prober = scope
                .spawn(|| world.client().await_change(vip, &old, Some(CLIENT_CPU), Duration::from_secs(10)));
            rest(flip);
            let begin_ns = monotonic_ns();
            fs::rename(&unfinished, &path)?;
            let change = prober.join().map_err(|_| anyhow::anyhow!("the prober panicked"))??;
            anyhow::Ok((begin_ns, change))
        })?;
        ensure!(change.to == World::source(Family::V4, group).to_string(), "it led to {}", change.to);
        stale += change.stale;
        if change.last_old_ns == 0 {
            unseen += 1;
            continue;
        }
        live_ns.push(change.first_new_ns - begin_ns);
    }
    report.fact(Fact::times("a2", "one endpoint change: rename to visible", world.scale.services, live_ns));
    // While the agent rests, beside its manifests: on the same file system.
    let beside = directory.with_extension("watched");
    fs::create_dir(&beside).with_context(|| format!("making {}", beside.display()))?;
    let text = world.scale.movable_text(*movable.first().context("a movable Service")?, Group::A)?;
    let least_ns = watcher::renames(&beside, text.as_bytes(), effort.flips)?;
    report.fact(Fact::times("a2", "a bare watcher: rename to visible", world.scale.services, least_ns));
    report.fact(Fact::count(
        "a2",
        "changes before the prober's first look, not counted",
        world.scale.services,
        unseen,
    ));
    report.fact(Fact::count(
        "a7",
        "looks that saw the removed endpoint after the new one",
        world.scale.services,
        stale,
    ));
    Ok(())
}

/// Before the change of a number. Who looks does so every few microseconds by the end of it; the wait differs so that
/// nothing falls into step.
pub(crate) fn rest(number: u32) {
    thread::sleep(Duration::from_micros(20_000 + u64::from(number * 37 % 1000)));
}

/// What a process has in memory.
pub(crate) fn process_memory(
    id: &str,
    who: &str,
    pid: u32,
    services: u32,
    report: &mut Report,
) -> Result<()> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    for (text, field, name) in
        [(&rollup, "Rss:", "RSS"), (&rollup, "Pss:", "PSS"), (&status, "VmHWM:", "RSS at its highest")]
    {
        report.fact(Fact::bytes(id, &format!("{who}: {name}"), services, field_of(text, field)? * 1024));
    }
    Ok(())
}

/// A4 and A5.
fn memory(world: &World, report: &mut Report) -> Result<()> {
    let pid = world.agent()?.pid();
    let services = world.scale.services;
    process_memory("a4", "agent", pid, services, report)?;
    report.fact(Fact::bytes("a5", "kernel memory of our maps", services, map_bytes(pid)?));
    Ok(())
}

/// What the kernel says that the maps take which a process has.
pub(crate) fn map_bytes(pid: u32) -> Result<u64> {
    let mut maps = BTreeMap::new();
    for file in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor that closed meanwhile is none of ours.
        let Ok(text) = fs::read_to_string(file?.path()) else { continue };
        if text.contains("map_type:") {
            maps.insert(field_of(&text, "map_id:")?, field_of(&text, "memlock:")?);
        }
    }
    Ok(maps.values().sum())
}

/// A number of `/proc`, by the word before it.
pub(crate) fn field_of(text: &str, field: &str) -> Result<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.split_whitespace().next());
    value.and_then(|value| value.parse().ok()).with_context(|| format!("no {field} in {text}"))
}

/// A6: the agent is killed and started again while clients connect. Every socket must be led to a backend.
fn restart(world: &mut World, report: &mut Report) -> Result<()> {
    // Datagram sockets ask a server, so that who is reached is known by its answer's source as well.
    let services = world.scale.services;
    let name = "a6-server";
    let target = world.lab().pod(1)?;
    let _server = target.serve_as(name, super::scale::TARGET_PORT + 2)?;
    let manifests = world.lab().manifests();
    let object = sheave_tests::manifests::service("a6", &["10.97.0.2"]).port("tcp", "TCP", 80, 8082);
    let slice = sheave_tests::manifests::slice("a6-1", "a6", "IPv4")
        .slice_port("tcp", "TCP", super::scale::TARGET_PORT + 2)
        .endpoint(&target.v4().to_string(), "node-1");
    manifests.write("a6", &[object, slice])?;
    let dial = Dial::new("10.97.0.2:80".parse().context("a VIP")?);
    let client = world.lab().pod(0)?.client()?;
    let mut tries = 0;
    while client.connect(Transport::Tcp, dial.timeout(Duration::from_millis(100)))?.is_err() {
        tries += 1;
        ensure!(tries < 100, "the Service of the restart test did not come");
    }
    let held = client.hold(dial, 100)?;
    let running = client.start_loop(LoopSpec::new(Transport::Tcp, dial).threads(2))?;
    thread::sleep(Duration::from_millis(500));
    world.kill_agent()?;
    thread::sleep(Duration::from_secs(1));
    let took = world.start_agent()?;
    thread::sleep(Duration::from_millis(500));
    let seen = client.stop_loop(running)?;
    let alive = client.check_held(held.id)?;
    let wrong: u64 = seen.answers.iter().filter(|(who, _)| *who != name).map(|(_, count)| count).sum();
    let writes =
        world.agent()?.status()?.get("writes").and_then(serde_json::Value::as_u64).unwrap_or(u64::MAX);
    for (name, count) in [
        ("restart: connections during it", seen.attempts),
        ("restart: failed", seen.failed()),
        ("restart: led elsewhere", wrong),
        ("restart: held connections broken", held.alive - alive.alive),
        ("restart: writes to the kernel", writes),
    ] {
        report.fact(Fact::count("a6", name, services, count));
    }
    let took_ns = u64::try_from(took.as_nanos())?;
    report.fact(Fact::times("a6", "restart: exec to synced again", services, vec![took_ns]));
    Ok(())
}

/// The median and the 99th percentile.
pub(crate) fn p50_p99(ns: &[u64]) -> (f64, f64) {
    let ns = sorted(ns);
    (quantile(&ns, 0.5), quantile(&ns, 0.99))
}
