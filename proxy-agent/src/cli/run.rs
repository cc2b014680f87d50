use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::options::{ControlArgs, KubeArgs, ManifestArgs, NodeArgs, PinArgs, PolicyArgs};
use crate::agent::{Agent, Config};
use crate::control;
use crate::dataplane::Limits;
use crate::source::{addresses, files, kube};

#[derive(Args, Debug)]
pub(super) struct RunArgs {
    #[command(flatten)]
    manifests: ManifestArgs,
    #[command(flatten)]
    kube: KubeArgs,
    #[command(flatten)]
    node: NodeArgs,
    /// Serve processes in this cgroup and below; by default the root of the cgroup v2 hierarchy.
    #[arg(long, value_name = "DIR")]
    cgroup_root: Option<PathBuf>,
    #[command(flatten)]
    pins: PinArgs,
    #[command(flatten)]
    control: ControlArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    policy: PolicyArgs,
}

/// Sizes that the tables start with. They grow by themselves; pinned ones keep their size.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Table sizes")]
struct LimitArgs {
    /// VIP:port/protocol triples.
    #[arg(long, value_name = "N", default_value_t = 1 << 14, value_parser = clap::value_parser!(u32).range(16..))]
    initial_frontends: u32,
    /// Service ports, each family by itself.
    #[arg(long, value_name = "N", default_value_t = 1 << 14, value_parser = clap::value_parser!(u32).range(16..))]
    initial_services: u32,
    /// Endpoints of all sets, with room for those being replaced.
    #[arg(long, value_name = "N", default_value_t = 1 << 16, value_parser = clap::value_parser!(u32).range(16..))]
    initial_slots: u32,
    /// Endpoints of all service ports.
    #[arg(long, value_name = "N", default_value_t = 1 << 16, value_parser = clap::value_parser!(u32).range(16..))]
    initial_backends: u32,
}

impl RunArgs {
    pub(super) fn run(self) -> Result<ExitCode> {
        let config = Config {
            node_name: self.node.name()?,
            policy: self.policy.policy()?,
            cgroup: match &self.cgroup_root {
                Some(directory) => directory.clone(),
                None => cgroup_root()?,
            },
            pins: self.pins.pins(),
            limits: Limits {
                frontends: self.limits.initial_frontends,
                services: self.limits.initial_services,
                slots: self.limits.initial_slots,
                backends: self.limits.initial_backends,
            },
        };
        if !nix::unistd::geteuid().is_root() {
            bail!(
                "`sheave run` needs root (CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON); plan and explain --manifests do not"
            );
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start the runtime")?;
        runtime.block_on(self.serve(config))?;
        Ok(ExitCode::SUCCESS)
    }

    async fn serve(&self, config: Config) -> Result<()> {
        let node_name = config.node_name.clone();
        check_cgroup(&config.cgroup)?;
        let source = match &self.manifests.manifests {
            Some(directory) => {
                let entries = std::fs::read_dir(directory).map(drop);
                entries.with_context(|| format!("--manifests: read directory {}", directory.display()))?;
                Source::Files(directory.clone())
            }
            None => Source::Kube(kube::connect(&self.kube.options()).await.context("find the API server")?),
        };
        // A second agent in the same pin directory, or on the same socket, ends here, before it writes anything.
        config.pins.prepare()?;
        let claim = config.pins.claim()?;
        let listener = control::listen(&self.control.control_socket).await?;
        let agent = Agent::start(config, claim).context("start")?;
        let (questions, asked) = mpsc::channel(16);
        tokio::spawn(control::serve(listener, questions));

        let (changes, changed) = mpsc::unbounded_channel();
        let mut sources = tokio::task::JoinSet::new();
        let to = changes.clone();
        sources.spawn(async move { addresses::run(to).await.context("follow this node's addresses") });
        match source {
            Source::Files(directory) => sources.spawn(async move {
                let result = files::run(directory.clone(), changes).await;
                result.with_context(|| format!("follow the manifests in {}", directory.display()))
            }),
            Source::Kube(connection) => sources.spawn(async move {
                kube::run(connection.client, node_name, changes).await;
                Ok(())
            }),
        };
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => tracing::info!("SIGTERM: going; what is in the kernel goes on working"),
                _ = interrupt.recv() => tracing::info!("interrupted: going; what is in the kernel goes on working"),
            }
        };
        tokio::select! {
            result = agent.run(changed, asked, stop) => result.context("program the kernel"),
            // A source runs for ever; when one ends, it is by an error that trying again does not mend.
            Some(ended) = sources.join_next() => ended.context("a source ended")?,
        }
    }
}

/// Where objects come from.
enum Source {
    Files(PathBuf),
    Kube(kube::Connection),
}

/// Before anything is touched: the kernel's own answer to a wrong directory names neither it nor the flag.
fn check_cgroup(path: &Path) -> Result<()> {
    let wrong = || format!("--cgroup-root: {}", path.display());
    let kind = nix::sys::statfs::statfs(path).with_context(wrong)?.filesystem_type();
    if kind != nix::sys::statfs::CGROUP2_SUPER_MAGIC {
        return Err(anyhow::anyhow!("not a directory of the cgroup v2 hierarchy")).with_context(wrong);
    }
    Ok(())
}

/// The first cgroup v2 mount.
fn cgroup_root() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
    let found = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    });
    found.context("no cgroup v2 hierarchy is mounted; name one with --cgroup-root")
}
