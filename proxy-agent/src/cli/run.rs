use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use super::options::{ControlArgs, KubeArgs, ManifestArgs, NodeArgs, PinArgs, PolicyArgs};
use crate::agent::{Agent, Config};
use crate::control;
use crate::dataplane::Limits;
use crate::kernel::devices::Hooks;
use crate::kernel::programs::FlowLimits;
use crate::packet::{self, fast::Watch, settings::SnatPorts};
use crate::source::{addresses, files, kube, links};

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
    #[command(flatten)]
    packets: PacketArgs,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum DeviceHooks {
    Auto,
    Tcx,
    Clsact,
}

/// How packets are served, where no socket hook serves them.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Packet path")]
struct PacketArgs {
    /// Ports of replaced source addresses. Sockets and NodePorts of this node should have none of them.
    #[arg(long, value_name = "FIRST-LAST", default_value_t)]
    snat_port_range: SnatPorts,
    /// How programs are put on devices: `clsact` filters for kernels before 6.6, or where a CNI has classic filters at
    /// egress, which then come before ours and see pods' addresses; `auto` takes tcx where the kernel has it.
    #[arg(long, value_enum, default_value = "auto")]
    device_hooks: DeviceHooks,
    /// Remove kube-proxy's rules (nftables and iptables) once this agent serves and no kube-proxy runs. Its connections go
    /// on.
    #[arg(long)]
    take_over: bool,
    /// Let connections that the node's network stack has accepted in both directions skip it afterwards. Costs: netfilter
    /// sees one packet of each direction a second, and those that begin and end a connection, so whatever counts, limits,
    /// logs or marks packets sees those only; rules against a connection that runs take hold at once in nftables, within a
    /// second in iptables and ipsets, and without an agent routes and devices too; a CNI's programs at ingress of a device,
    /// after these, do not run, those at egress do. Sets net.netfilter.nf_conntrack_tcp_be_liberal to 1, and leaves it so:
    /// connection tracking would take what it has not seen grow for invalid.
    #[arg(long)]
    fast_path: bool,
    /// How often the tables of connections are looked through.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 10_000, hide = true,
        value_parser = clap::value_parser!(u64).range(1..))]
    flow_sweep_ms: u64,
}

/// Sizes of tables; pinned ones keep theirs. Those that are called initial grow by themselves.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Table sizes")]
struct LimitArgs {
    /// VIP:port/protocol triples.
    #[arg(long, value_name = "N", default_value_t = 1 << 12, value_parser = clap::value_parser!(u32).range(16..))]
    initial_frontends: u32,
    /// Service ports, each family by itself.
    #[arg(long, value_name = "N", default_value_t = 1 << 12, value_parser = clap::value_parser!(u32).range(16..))]
    initial_services: u32,
    /// Endpoints of all sets, with room for those being replaced.
    #[arg(long, value_name = "N", default_value_t = 1 << 14, value_parser = clap::value_parser!(u32).range(16..))]
    initial_slots: u32,
    /// Endpoints of all service ports.
    #[arg(long, value_name = "N", default_value_t = 1 << 14, value_parser = clap::value_parser!(u32).range(16..))]
    initial_backends: u32,
    /// Connections by packet whose clients have gone on after the first answer: these give way to nobody. One that finds
    /// no room stays among the others. About 300 bytes each; made once, until `sheave cleanup`.
    #[arg(long, value_name = "N", default_value_t = 1 << 16, value_parser = flow_table_size())]
    flow_table_size: u32,
    /// Other connections by packet: the oldest give way to new ones. About 300 bytes each; made once, until `sheave cleanup`.
    #[arg(long, value_name = "N", default_value_t = 1 << 14, value_parser = flow_table_size())]
    young_flow_table_size: u32,
}

/// Fewer would be too few for the free places that each CPU keeps; more would take 5 GB.
fn flow_table_size() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1 << 10..=1 << 24)
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
            packets: packet::Options {
                snat_ports: self.packets.snat_port_range,
                flow_limits: FlowLimits {
                    grown: self.limits.flow_table_size,
                    young: self.limits.young_flow_table_size,
                },
                sweep_every: Duration::from_millis(self.packets.flow_sweep_ms),
                take_over: self.packets.take_over,
                hooks: match self.packets.device_hooks {
                    DeviceHooks::Auto => Hooks::of_this_kernel(),
                    DeviceHooks::Tcx => Hooks::Tcx,
                    DeviceHooks::Clsact => Hooks::Clsact,
                },
                fast_path: self.packets.fast_path,
            },
        };
        if config.policy.no_packet_path && config.packets.take_over {
            bail!("--take-over needs --packet-path on: without it kube-proxy is what serves packets");
        }
        if config.policy.no_packet_path && config.packets.fast_path {
            bail!("--fast-path needs --packet-path on");
        }
        if !config.policy.no_packet_path {
            warn_of_local_ports(config.packets.snat_ports);
        }
        if !nix::unistd::geteuid().is_root() {
            bail!(
                "`sheave run` needs root (CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON); plan and explain --manifests do not"
            );
        }
        give_back_large_pieces();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start the runtime")?;
        runtime.block_on(self.serve(config))?;
        Ok(ExitCode::SUCCESS)
    }

    async fn serve(&self, config: Config) -> Result<()> {
        let node_name = config.node_name.clone();
        let no_packet_path = config.policy.no_packet_path;
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
        let (pins, fast_path) = (config.pins.clone(), config.packets.fast_path);
        // Beside it the sources are read already: the verifier takes as long as those do.
        let agent = tokio::task::spawn_blocking(|| Agent::start(config, claim));

        let (changes, changed) = mpsc::unbounded_channel();
        let mut sources = tokio::task::JoinSet::new();
        let to = changes.clone();
        sources.spawn(async move { addresses::run(to).await.context("follow this node's addresses") });
        let (links, linked) = watch::channel(None);
        if !no_packet_path {
            sources
                .spawn(async move { links::run(links).await.context("follow this node's network devices") });
        }
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
        let agent = agent.await.context("start")?.context("start")?;
        if fast_path {
            let watch = Watch::open(&pins).context("prepare the fast path")?;
            sources.spawn(async move { watch.run().await.context("follow routes and rules") });
        }
        let (questions, asked) = mpsc::channel(16);
        tokio::spawn(control::serve(listener, questions));
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => tracing::info!("SIGTERM: going; what is in the kernel goes on working"),
                _ = interrupt.recv() => tracing::info!("interrupted: going; what is in the kernel goes on working"),
            }
        };
        tokio::select! {
            result = agent.run(changed, asked, linked, stop) => result.context("program the kernel"),
            // A source runs for ever; when one ends, it is by an error that trying again does not mend.
            Some(ended) = sources.join_next() => ended.context("a source ended")?,
        }
    }
}

/// Memory of large pieces goes back to the machine when they are freed. By itself glibc does so with the first, and keeps
/// the next of that size, and what lies between them: a tenth of all after the first sync of a large cluster.
fn give_back_large_pieces() {
    const LARGE_BYTES: libc::c_int = 128 << 10;
    // SAFETY: sets a number of the allocator, before there are other threads.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES) };
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

/// A socket of the node that has a port of a replaced source gets the replies of somebody else's connection.
fn warn_of_local_ports(ports: SnatPorts) {
    const PATH: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    let Ok(text) = std::fs::read_to_string(PATH) else { return };
    let mut numbers = text.split_whitespace().map_while(|number| number.parse().ok());
    if let (Some(first), Some(last)) = (numbers.next(), numbers.next())
        && ports.overlaps(first, last)
    {
        tracing::warn!(
            snat_port_range = %ports,
            local = format!("{first}-{last}"),
            "--snat-port-range overlaps the ports that this node gives to its sockets ({PATH}): reserve it in \
             net.ipv4.ip_local_reserved_ports"
        );
    }
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
