//! What tools say that everybody knows: `iperf3` and `wrk` on the same ways. They check our own generator; nothing is
//! judged by them, as throughput across two CPUs of a virtual machine has two or three stable values.

use std::{
    fs,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    Effort,
    data::{DIRECT, SHEAVE, Worlds, name_of},
    go_on,
    report::Report,
    row::{AGAIN, Goal, Row},
    scale::{Family, PORT, TARGET_PORT, TOOL_BACKEND, TOOL_NODE_PORT, TOOL_PORT, TOOL_VIP},
    world::{CLIENT_CPU, SERVER_CPU, Side, World},
};

/// Which metric this is.
pub(crate) const ID: &str = "tools";

/// How often each is run.
const ROUNDS: u32 = 5;

/// A server that takes longer to begin has failed.
const SERVES_WITHIN: Duration = Duration::from_secs(10);

/// What is run.
const RUNS: [(&str, &str, Run); 4] = [
    ("iperf3, one stream", "ns/kB", Run::Iperf3(Way::Vip)),
    ("iperf3, one stream by NodePort", "ns/kB", Run::Iperf3(Way::NodePort)),
    ("wrk, one connection kept", "ns", Run::Wrk(&[])),
    ("wrk, a connection a request", "ns", Run::Wrk(&["--header", "Connection: close"])),
];

/// A tool, and how it is used.
#[derive(Clone, Copy)]
enum Run {
    Iperf3(Way),
    /// With these arguments.
    Wrk(&'static [&'static str]),
}

/// What is dialled where there is a proxy; elsewhere it is the pod.
#[derive(Clone, Copy)]
enum Way {
    Vip,
    NodePort,
}

/// A server that is killed when dropped.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs them in the worlds of the data path.
pub(crate) fn measure(worlds: &Worlds, effort: &Effort, report: &mut Report) -> Result<()> {
    let mut arms =
        vec![(DIRECT, &worlds.direct, Side::Outside, false), (SHEAVE, &worlds.sheave, Side::Inside, true)];
    arms.extend(worlds.peers.iter().map(|peer| (name_of(peer.mode), &peer.world, Side::Outside, true)));
    arms.push((AGAIN, &worlds.again, Side::Outside, false));
    let servers = arms.iter().map(|(_, world, ..)| serve(world)).collect::<Result<Vec<_>>>()?;
    for (name, unit, tool) in RUNS {
        let mut values = vec![Vec::new(); arms.len()];
        worlds.still(|| {
            for _ in 0..ROUNDS.min(effort.rounds) {
                for ((arm, world, side, is_service), values) in arms.iter().zip(&mut values) {
                    go_on()?;
                    world.node()?.host().netns().forget_connections()?;
                    let value = match tool {
                        Run::Iperf3(way) => iperf3(world, *side, is_service.then_some(way)),
                        Run::Wrk(arguments) => wrk(world, *side, *is_service, arguments),
                    };
                    values.push(value.with_context(|| format!("{name}, {arm}"))?);
                }
            }
            Ok(())
        })?;
        let mut row = Row::new(ID, name.to_owned(), unit, worlds.sheave.scale.services, None);
        for ((arm, ..), values) in arms.iter().zip(values) {
            row.add(arm, values, None);
        }
        let goal = |to| Goal { arm: SHEAVE, to, at_most: None };
        row.compare(&[DIRECT, super::data::NFTABLES, super::data::IPTABLES].map(goal));
        report.add(row);
    }
    drop(servers);
    Ok(())
}

fn serve(world: &World) -> Result<Served> {
    let mut command = world.lab().pod(1)?.under(world.cgroup(Side::Outside)?).command("iperf3")?;
    command.args(["--server", "--bind", TOOL_BACKEND, "--port", &TOOL_PORT.to_string()]);
    command.args(["--affinity", &SERVER_CPU.to_string()]).stdin(Stdio::null()).stdout(Stdio::null());
    let mut served = Served(command.spawn().context("starting iperf3")?);
    let begun = Instant::now();
    while !world.lab().pod(1)?.netns().run(is_served)?? {
        go_on()?;
        let ended = served.0.try_wait().context("asking for iperf3")?;
        ensure!(ended.is_none() && begun.elapsed() < SERVES_WITHIN, "iperf3 does not serve: {ended:?}");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(served)
}

/// Whether somebody of this namespace listens on the tools' port. To try by connecting would be a test for the server.
fn is_served() -> Result<bool> {
    const LISTENS: &str = "0A";
    let table = fs::read_to_string("/proc/thread-self/net/tcp").context("reading the namespace's sockets")?;
    let port = format!(":{TOOL_PORT:04X}");
    Ok(table.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|own| own.ends_with(&port)) && fields.nth(1) == Some(LISTENS)
    }))
}

fn run(world: &World, side: Side, program: &str, arguments: &[&str]) -> Result<String> {
    let mut command = world.lab().pod(0)?.under(world.cgroup(side)?).command(program)?;
    let output = command.args(arguments).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("running {program}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{program}: {said}{}", String::from_utf8_lossy(&output.stderr));
    Ok(said)
}

/// The nanoseconds that a kilobyte takes.
fn iperf3(world: &World, side: Side, way: Option<Way>) -> Result<f64> {
    let (to, port) = match way {
        None => (TOOL_BACKEND.to_owned(), TOOL_PORT),
        Some(Way::Vip) => (TOOL_VIP.to_owned(), TOOL_PORT),
        Some(Way::NodePort) => (world.node()?.host().v4().to_string(), TOOL_NODE_PORT),
    };
    let (port, cpu) = (port.to_string(), CLIENT_CPU.to_string());
    let said = run(
        world,
        side,
        "iperf3",
        &["--client", &to, "--port", &port, "--time", "1", "--json", "--affinity", &cpu],
    )?;
    let said: Value = serde_json::from_str(&said).context("what iperf3 says")?;
    let bits = said.pointer("/end/sum_received/bits_per_second").and_then(Value::as_f64);
    Ok(8e12 / bits.with_context(|| format!("no rate in {said}"))?)
}

/// The nanoseconds that a request takes.
fn wrk(world: &World, side: Side, is_service: bool, arguments: &[&str]) -> Result<f64> {
    let scale = world.scale;
    let direct = scale.backends(Family::V4).first().context("a backend")?.ip();
    let url = if is_service {
        format!("http://{}:{PORT}/", scale.vip(Family::V4, 0).ip())
    } else {
        format!("http://{direct}:{TARGET_PORT}/")
    };
    let said = run(
        world,
        side,
        "wrk",
        &[&["--threads", "1", "--connections", "1", "--duration", "1s"], arguments, &[&url]].concat(),
    )?;
    let rate = said.lines().find_map(|line| line.strip_prefix("Requests/sec:")?.trim().parse::<f64>().ok());
    let rate = rate.filter(|rate| *rate > 0.0).with_context(|| format!("no rate in {said}"))?;
    ensure!(!said.contains("Non-2xx"), "{said}");
    Ok(1e9 / rate)
}
