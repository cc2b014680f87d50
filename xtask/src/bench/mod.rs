//! `cargo xtask bench`: Sheave beside the way without a Service, side by side in one run.
//!
//! Arms differ by cgroup and destination only, and alternate in short slices whose order is reversed each round. Figures
//! are ratios of a round's values to those of the direct arm of the same round; the direct arm is measured twice, and a
//! metric whose two direct arms differ beyond [`NOISE_MAX`] is void.

mod api;
mod baseline;
mod control;
mod data;
mod outside;
mod packets;
mod paths;
mod peers;
mod plot;
mod report;
mod rivals;
mod rounds;
mod row;
mod scale;
mod stats;
mod targets;
mod tools;
mod watcher;
mod world;

use std::{
    env, fs,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{self, Command},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::sys::signal::{SigSet, Signal};
use sheave_tests::kubernetes::{kube_proxy::Mode, programs};

use self::{
    data::Worlds,
    peers::{Hub, Peer},
    report::Report,
    scale::Scale,
    world::World,
};
use crate::{
    build::Binaries,
    shell::{output, seconds},
    vm::{self, Kernel},
};

/// Half the width of the interval around one that two equal arms may have.
pub(crate) const NOISE_MAX: f64 = 0.02;

/// What can be asked for.
const IDS: &str = "p1 p2 p3 p4 p5 p6 p8 p10 p11 a1 a2 a3 a4 a5 a6 a7 a9 tools api";

/// Set by Ctrl-C.
static STOPPED: AtomicBool = AtomicBool::new(false);

/// Options of the benchmark.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// 1, 1,000, 10,000 and 50,000 Services, longer slices
    #[arg(long, conflicts_with = "quick")]
    full: bool,
    /// 1 and 10,000 Services (what happens without an option, too)
    #[arg(long)]
    quick: bool,
    /// Only shows that everything works: short, and void as a measurement
    #[arg(long, conflicts_with = "full")]
    smoke: bool,
    /// Without kube-proxy: needs no program of Kubernetes
    #[arg(long)]
    alone: bool,
    /// Numbers of Services, instead of the usual ones
    #[arg(long, value_name = "NUMBER")]
    services: Vec<u32>,
    /// Adds to what an earlier run left in `target/bench/`
    #[arg(long)]
    add: bool,
    /// Compares ratios with a baseline (as `xtask/benchmarks/baseline.json`), and fails if one got worse
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
    /// Writes BENCHMARKS.md and `xtask/benchmarks/`
    #[arg(long)]
    publish: bool,
    /// Measures nothing: only reports again what an earlier run left
    #[arg(long, conflicts_with = "ids")]
    report: bool,
    /// The tools only (iperf3 by pod IP, VIP and NodePort; wrk) in a virtual machine with this kernel, as of `cargo xtask
    /// vm`. Without KVM that shows that all ways work, and no speed; nothing of it is kept
    #[arg(
        long,
        value_name = "KERNEL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "newest",
        conflicts_with_all = ["full", "quick", "smoke", "services", "add", "check", "publish", "report", "ids"]
    )]
    vm: Option<Kernel>,
    /// Metrics: p1 p2 p3 p4 p5 p6 p8 p10 p11 a1 a2 a3 a4 a5 a6 a7 a9 tools (p1 has p7 and p12, a2 has a7, a4 has a5, and the other way
    /// round); without, all of these. Only when named: api, an agent beside a real API server, which takes ten minutes at
    /// 10,000 Services
    ids: Vec<String>,
}

/// How thoroughly.
#[derive(Clone, Debug)]
pub(crate) struct Effort {
    /// Numbers of Services.
    pub(crate) sizes: Vec<u32>,
    /// Endpoints of each Service where kube-proxy is beside: it takes minutes for many.
    pub(crate) endpoints: u32,
    /// Rounds that count; one more is run first.
    pub(crate) rounds: u32,
    /// So many at most, where arms that are alike differ.
    pub(crate) rounds_max: u32,
    /// One arm's turn in a round.
    pub(crate) slice: Duration,
    /// Endpoint changes.
    pub(crate) flips: u32,
    /// Endpoint changes there and back by an API server.
    pub(crate) api_flips: u32,
    /// Starts of the agent.
    pub(crate) starts: u32,
    /// How long who serves is down before it is started again.
    pub(crate) down: Duration,
    /// How long the API server is away.
    pub(crate) outage: Duration,
}

impl Options {
    /// The virtual machine that measures instead, if one is asked for.
    pub(crate) fn vm(&self) -> Option<vm::Options> {
        let alone = self.alone.then_some("--alone");
        let command = ["bench", "--smoke", "--services=1"].into_iter().chain(alone).chain([tools::ID]);
        self.vm.map(|kernel| vm::Options::new(kernel, command.map(ToOwned::to_owned).collect()))
    }

    fn effort(&self) -> Effort {
        let effort = self.usual();
        match &*self.services {
            [] => effort,
            sizes => Effort { sizes: sizes.to_vec(), ..effort },
        }
    }

    fn usual(&self) -> Effort {
        let ms = Duration::from_millis;
        if self.smoke {
            return Effort {
                sizes: vec![1, 1000],
                endpoints: 2,
                rounds: 3,
                rounds_max: 3,
                slice: ms(50),
                flips: 20,
                api_flips: 3,
                starts: 1,
                down: ms(2000),
                outage: ms(5000),
            };
        }
        if self.full {
            let sizes = vec![1, 1000, 10_000, 50_000];
            return Effort {
                sizes,
                endpoints: 10,
                rounds: 20,
                rounds_max: 60,
                slice: ms(300),
                flips: 500,
                api_flips: 50,
                starts: 5,
                down: ms(5000),
                outage: ms(30_000),
            };
        }
        Effort {
            sizes: vec![1, 10_000],
            endpoints: 2,
            // What a shared machine does besides lasts longer than a turn: the shorter the turns, the more alike are those of
            // one round.
            rounds: 60,
            rounds_max: 180,
            slice: ms(50),
            flips: 300,
            api_flips: 10,
            starts: 3,
            down: ms(5000),
            outage: ms(30_000),
        }
    }

    /// Whether a real API server is needed.
    pub(crate) fn wants_api_server(&self) -> bool {
        !self.alone || self.ids.iter().any(|wanted| wanted.eq_ignore_ascii_case(api::ID))
    }

    pub(crate) fn wants(&self, id: &str) -> bool {
        self.ids.is_empty() || self.ids.iter().any(|wanted| wanted.eq_ignore_ascii_case(id))
    }
}

/// Becomes the same command with the binaries in variables: the lab finds them by these, and a process cannot safely
/// change its own.
pub(crate) fn prepared(binaries: &Binaries) -> Result<()> {
    let own = env::current_exe().context("asking for this program's own path")?;
    let error = Command::new(own)
        .args(env::args_os().skip(1))
        .env("SHEAVE_BIN", &binaries.sheave)
        .env("SHEAVE_LAB_CLIENT", &binaries.lab_client)
        .env(crate::build::PREPARED, "1")
        .exec();
    Err(error).context("starting the benchmark")
}

/// Runs the benchmark and writes `target/bench/`.
pub(crate) fn run(options: &Options) -> Result<()> {
    for id in &options.ids {
        if !IDS.split(' ').any(|known| known.eq_ignore_ascii_case(id)) {
            bail!("no metric {id}: {IDS}");
        }
    }
    // Threads started later inherit the mask; commands start with an empty one.
    let interrupts = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    interrupts.thread_block().context("holding back Ctrl-C")?;
    thread::spawn(move || {
        if interrupts.wait().is_ok() {
            STOPPED.store(true, Ordering::Relaxed);
            eprintln!("\nstopping: what is in progress ends first, then everything is removed");
        }
        if interrupts.wait().is_ok() {
            eprintln!("\nended at once: the next run removes what is left");
            process::exit(130);
        }
    });
    let effort = options.effort();
    let mut report = Report::new(&effort, options.add || options.report)?;
    let started = Instant::now();
    let measured = if options.report { Ok(()) } else { measure(options, &effort, &mut report) };
    // What there is so far is kept, whatever came then.
    report.growth();
    report.write()?;
    // A terminal interrupts the lab's processes as well: what they say then is not what happened.
    go_on()?;
    measured?;
    println!("── all of it took {}; see {}", seconds(started.elapsed()), report.directory().display());
    if options.publish {
        report.publish()?;
    }
    options.check.iter().try_for_each(|baseline| report.check(baseline))
}

/// All that is wanted, size by size.
fn measure(options: &Options, effort: &Effort, report: &mut Report) -> Result<()> {
    for services in &effort.sizes {
        let data = ["p1", "p2", "p3", "p4", "p5", "p6", tools::ID].iter().any(|id| options.wants(id));
        if data {
            let worlds = worlds(Scale::of_clients(*services, effort), options.alone, World::new)?;
            data::measure(&worlds, options, effort, report)?;
            if options.wants(tools::ID) {
                tools::measure(&worlds, effort, report)?;
            }
        }
        if options.wants(packets::ID) {
            println!("── {services} Services, packets");
            packets::measure(*services, options.alone, effort, report)?;
        }
        if options.wants(paths::ID) {
            println!("── {services} Services, programs by themselves");
            paths::measure(*services, effort, report)?;
        }
        if options.wants(outside::ID) {
            println!("── {services} Services, clients outside");
            outside::measure(*services, options.alone, effort, report)?;
        }
        if ["a1", "a2", "a4", "a5", "a6", "a7"].iter().any(|id| options.wants(id)) {
            let scale = Scale {
                services: *services,
                endpoints: 10,
                dual_stack: false,
                protocols: &["UDP"],
                node_ports: false,
            };
            let mut world = World::new(scale)?;
            world.write_manifests()?;
            println!("── {services} Services, control plane");
            control::measure(&mut world, options, effort, report)?;
        }
        if !options.alone && rivals::IDS.iter().any(|id| options.wants(id)) {
            println!("── {services} Services, control planes by one API server");
            rivals::measure(*services, options, effort, report)?;
        }
    }
    if options.ids.iter().any(|wanted| wanted.eq_ignore_ascii_case(api::ID)) {
        api::measure(effort, report)?;
    }
    Ok(())
}

/// The worlds of the data path at a size, each with its proxy at work.
fn worlds(scale: Scale, alone: bool, new_world: fn(Scale) -> Result<World>) -> Result<Worlds> {
    let services = scale.services;
    let mut peers = Vec::new();
    let mut hub = None;
    if !alone {
        // One family is enough for what takes minutes.
        let scale = Scale { dual_stack: false, ..scale };
        let new = Hub::new(&scale)?;
        for (number, mode) in [(1, Mode::Nftables), (2, Mode::Iptables)] {
            go_on()?;
            let started = Instant::now();
            let mut peer = Peer::start(&new, new_world(scale)?, number, mode)?;
            let synced = peer.await_synced(started)?;
            println!("── {services} Services, kube-proxy {}: serves after {}", mode.name(), seconds(synced));
            peers.push(peer);
        }
        hub = Some(new);
    }
    let mut sheave = new_world(scale)?;
    sheave.write_manifests()?;
    let synced = sheave.start_agent()?;
    println!("── {services} Services, Sheave: synced after {}", seconds(synced));
    let hooked = new_world(scale)?;
    let hooks = hooked.empty_hooks()?;
    let (direct, again) = (new_world(scale)?, new_world(scale)?);
    Ok(Worlds { direct, again, _hooks: hooks, hooked, sheave, peers, hub })
}

/// Ends the work when somebody pressed Ctrl-C; what is dropped on the way up removes itself.
pub(crate) fn go_on() -> Result<()> {
    if STOPPED.load(Ordering::Relaxed) {
        bail!("stopped by Ctrl-C");
    }
    Ok(())
}

/// Runs `work` while somebody is stopped: what they do is not part of it.
pub(crate) fn still<T>(freeze: impl Fn(bool) -> Result<()>, work: impl FnOnce() -> T) -> Result<T> {
    freeze(true)?;
    let result = work();
    freeze(false)?;
    Ok(result)
}

/// What is compared, by version.
pub(crate) fn versions() -> Result<Vec<String>> {
    let first = |program: &str, arguments: &[&str]| -> Result<String> {
        let said = output(Command::new(program).args(arguments))?;
        Ok(String::from_utf8_lossy(&said).lines().next().unwrap_or_default().trim().to_owned())
    };
    Ok(vec![
        format!("Sheave {}", env!("CARGO_PKG_VERSION")),
        format!("kube-proxy {}", programs::VERSION),
        first("nft", &["--version"])?,
        first("xtables-legacy-multi", &["iptables", "--version"])?,
    ])
}

/// The machine, as far as it matters.
pub(crate) fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model =
        cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|found| found.1);
    format!(
        "{} x {}, Linux {}",
        thread::available_parallelism().map_or(1, usize::from),
        model.unwrap_or("a CPU"),
        read("/proc/sys/kernel/osrelease").trim()
    )
}
