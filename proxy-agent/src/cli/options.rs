//! What was typed, and what it means. Names are kube-proxy's where it has the option (rule O1).

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use ipnet::IpNet;

use super::{Output, block_on};
use crate::control::{self, Request};
use crate::kernel::Pins;
use crate::object::{Protocol, address};
use crate::resolve::{DetectLocal, ExcludedFrontend, NodePortAddresses, Policy};
use crate::source::kube;

/// Log form.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LogFormat {
    /// A line of text.
    Text,
    /// A JSON object a line.
    Json,
}

/// Where the agent's things are.
#[derive(Args, Clone, Debug)]
pub(super) struct PinArgs {
    /// The BPF file system to pin in; mounted if it is none.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,
}

impl PinArgs {
    pub(super) fn pins(&self) -> Pins {
        Pins::new(&self.bpffs)
    }
}

/// Where the agent answers.
#[derive(Args, Clone, Debug)]
pub(super) struct ControlArgs {
    /// The agent's control socket.
    #[arg(long, value_name = "PATH", default_value = "/run/sheave/sheave.sock")]
    pub(super) control_socket: PathBuf,
}

/// Where a read command that looks at the kernel and asks the agent finds them.
#[derive(Args, Clone, Debug)]
pub(super) struct LiveArgs {
    #[command(flatten)]
    pins: PinArgs,
    #[command(flatten)]
    control: ControlArgs,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value = "table")]
    pub(super) output: Output,
}

impl LiveArgs {
    pub(super) fn pins(&self) -> Pins {
        self.pins.pins()
    }

    /// Before an answer that would be wrong: who may not look must not be told that there is nothing.
    pub(super) fn check(&self) -> Result<()> {
        self.pins().readable().context("this needs root")
    }

    /// The agent's answer; the outer error is ours.
    pub(super) fn ask(&self, request: &Request) -> Result<Result<serde_json::Value, control::Error>> {
        block_on(control::ask(&self.control.control_socket, request))
    }
}

/// Which node this is.
#[derive(Args, Clone, Debug)]
pub(super) struct NodeArgs {
    /// Name of the own Node; by default the host name, in lower case (O4).
    #[arg(long, visible_alias = "hostname-override", value_name = "NAME")]
    node_name: Option<String>,
}

impl NodeArgs {
    pub(super) const fn is_given(&self) -> bool {
        self.node_name.is_some()
    }

    pub(super) fn name(&self) -> Result<String> {
        let name = match &self.node_name {
            Some(name) => name.clone(),
            None => nix::unistd::gethostname().context("read the host name")?.to_string_lossy().into_owned(),
        };
        let name = name.trim().to_lowercase();
        if name.is_empty() {
            bail!("--node-name: empty, and so is the host name");
        }
        Ok(name)
    }
}

/// Options that change what is programmed.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Policy")]
pub(super) struct PolicyArgs {
    /// Own addresses that answer NodePorts: CIDRs, or `primary` (one address per family).
    #[arg(long, value_name = "CIDRS", value_delimiter = ',', default_value = "primary")]
    nodeport_addresses: Vec<String>,
    /// Ranges of pod addresses, at most one per family.
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    cluster_cidr: Vec<String>,
    /// Ranges that cluster IPs come from: an unassigned address in them is dropped.
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    service_cidr: Vec<String>,
    /// Replace the source address of everything that goes to a cluster IP by packets.
    #[arg(long)]
    masquerade_all: bool,
    /// How a local pod is told: ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix.
    #[arg(long, value_name = "MODE", default_value = "ClusterCIDR")]
    detect_local_mode: String,
    /// The interface of BridgeInterface mode.
    #[arg(long, value_name = "NAME")]
    pod_bridge_interface: Option<String>,
    /// The prefix of InterfaceNamePrefix mode.
    #[arg(long, value_name = "PREFIX")]
    pod_interface_name_prefix: Option<String>,
    /// If not unspecified: the primary address of its family.
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    bind_address: String,
    /// Kubernetes feature gates; AllowServiceExternalIPs=false switches external IPs off, others have no effect.
    #[arg(long, value_name = "GATE=BOOL", value_delimiter = ',')]
    feature_gates: Vec<String>,
    /// Frontends to leave alone: ADDRESS, ADDRESS:PORT or ADDRESS:PORT/PROTOCOL. NodeLocal DNSCache needs its cluster IP
    /// here.
    #[arg(long, value_name = "FRONTENDS", value_delimiter = ',')]
    exclude_frontends: Vec<String>,
    /// Serve packets that no socket of this node made, by programs on the network devices.
    #[arg(long, value_enum, default_value = "on")]
    packet_path: Switch,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Switch {
    On,
    Off,
}

impl PolicyArgs {
    /// The flags that say something else than nothing at all does.
    pub(super) fn given(&self) -> Vec<&'static str> {
        let Self {
            nodeport_addresses,
            cluster_cidr,
            service_cidr,
            masquerade_all,
            detect_local_mode,
            pod_bridge_interface,
            pod_interface_name_prefix,
            bind_address,
            feature_gates,
            exclude_frontends,
            packet_path,
        } = self;
        let flags = [
            ("--nodeport-addresses", nodeport_addresses != &["primary"]),
            ("--cluster-cidr", !cluster_cidr.is_empty()),
            ("--service-cidr", !service_cidr.is_empty()),
            ("--masquerade-all", *masquerade_all),
            ("--detect-local-mode", detect_local_mode != "ClusterCIDR"),
            ("--pod-bridge-interface", pod_bridge_interface.is_some()),
            ("--pod-interface-name-prefix", pod_interface_name_prefix.is_some()),
            ("--bind-address", bind_address != "0.0.0.0"),
            ("--feature-gates", !feature_gates.is_empty()),
            ("--exclude-frontends", !exclude_frontends.is_empty()),
            ("--packet-path", *packet_path != Switch::On),
        ];
        flags.into_iter().filter(|(_, given)| *given).map(|(flag, _)| flag).collect()
    }

    /// Every error names the flag.
    pub(super) fn policy(&self) -> Result<Policy> {
        let cluster_cidrs = cidrs("--cluster-cidr", &self.cluster_cidr)?;
        let v4 = cluster_cidrs.iter().filter(|cidr| cidr.addr().is_ipv4()).count();
        if v4 > 1 || cluster_cidrs.len() - v4 > 1 {
            bail!("--cluster-cidr: at most one range per family");
        }
        Ok(Policy {
            nodeport_addresses: self.nodeport_addresses()?,
            bind_address: self.bind_address()?,
            detect_local: self.detect_local()?,
            cluster_cidrs,
            service_cidrs: cidrs("--service-cidr", &self.service_cidr)?,
            masquerade_all: self.masquerade_all,
            no_external_ips: self.no_external_ips()?,
            excluded_frontends: self
                .exclude_frontends
                .iter()
                .map(|text| excluded_frontend(text).with_context(|| format!("--exclude-frontends: {text:?}")))
                .collect::<Result<_>>()?,
            no_packet_path: self.packet_path == Switch::Off,
        })
    }

    fn nodeport_addresses(&self) -> Result<NodePortAddresses> {
        const FLAG: &str = "--nodeport-addresses";
        let words: Vec<&str> =
            self.nodeport_addresses.iter().map(String::as_str).filter(|w| !w.is_empty()).collect();
        // Empty is the default, as in kube-proxy's configuration (O2): it must not open every address.
        if words.is_empty() || words == ["primary"] {
            return Ok(NodePortAddresses::Primary);
        }
        if words.contains(&"primary") {
            bail!("{FLAG}: `primary` stands alone");
        }
        let mut ranges = Vec::new();
        for word in words {
            match word {
                "all" => ranges.extend(["0.0.0.0/0", "::/0"]),
                "localhost" => ranges.extend(["127.0.0.0/8", "::1/128"]),
                cidr => ranges.push(cidr),
            }
        }
        Ok(NodePortAddresses::Cidrs(cidrs(FLAG, &ranges)?))
    }

    fn bind_address(&self) -> Result<Option<IpAddr>> {
        if self.bind_address.is_empty() {
            return Ok(None);
        }
        let text = &self.bind_address;
        let parsed = address::parse_ip(text);
        let ip = parsed.with_context(|| format!("--bind-address: {text:?} is not an IP address"))?;
        Ok((!ip.is_unspecified()).then_some(ip))
    }

    fn detect_local(&self) -> Result<DetectLocal> {
        let named = |flag: &str, value: &Option<String>| match value.as_deref() {
            Some(name) if !name.is_empty() => Ok(name.to_owned()),
            Some(_) | None => bail!("--detect-local-mode {} needs {flag}", self.detect_local_mode),
        };
        Ok(match self.detect_local_mode.as_str() {
            "ClusterCIDR" | "" => DetectLocal::ClusterCidr,
            "NodeCIDR" => DetectLocal::NodeCidr,
            "BridgeInterface" => {
                DetectLocal::BridgeInterface(named("--pod-bridge-interface", &self.pod_bridge_interface)?)
            }
            "InterfaceNamePrefix" => DetectLocal::InterfaceNamePrefix(named(
                "--pod-interface-name-prefix",
                &self.pod_interface_name_prefix,
            )?),
            other => bail!(
                "--detect-local-mode: {other:?} is none of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix"
            ),
        })
    }

    fn no_external_ips(&self) -> Result<bool> {
        let mut off = false;
        for gate in &self.feature_gates {
            let Some((name, value)) = gate.split_once('=') else {
                bail!("--feature-gates: {gate:?} is not NAME=true or NAME=false");
            };
            let value: bool = value
                .trim()
                .to_lowercase()
                .parse()
                .with_context(|| format!("--feature-gates: {gate:?} is not NAME=true or NAME=false"))?;
            if name.trim() == "AllowServiceExternalIPs" {
                off = !value;
            } else {
                tracing::info!(gate = name, "this feature gate has no effect");
            }
        }
        Ok(off)
    }
}

fn cidrs(flag: &str, texts: &[impl AsRef<str>]) -> Result<Vec<IpNet>> {
    let parse = |text: &str| {
        let parsed = address::parse_cidr(text);
        parsed.with_context(|| {
            format!("{flag}: {text:?} is not a CIDR such as 10.244.0.0/16 or fd00:10:244::/56")
        })
    };
    texts.iter().map(|text| text.as_ref().trim()).filter(|text| !text.is_empty()).map(parse).collect()
}

fn excluded_frontend(text: &str) -> Result<ExcludedFrontend> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(ExcludedFrontend { address: ip.to_canonical(), port: None });
    }
    let (at, protocol) = match text.split_once('/') {
        Some((at, name)) => {
            let known = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
            let found = known.into_iter().find(|protocol| protocol.name().eq_ignore_ascii_case(name));
            (at, Some(found.with_context(|| format!("{name:?} is none of TCP, UDP, SCTP"))?))
        }
        None => (text, None),
    };
    let at: std::net::SocketAddr =
        at.parse().context("not ADDRESS, ADDRESS:PORT or ADDRESS:PORT/PROTOCOL")?;
    Ok(ExcludedFrontend { address: at.ip().to_canonical(), port: Some((at.port(), protocol)) })
}

/// The API server, as kube-proxy's flags have it.
#[derive(Args, Clone, Debug)]
pub(super) struct KubeArgs {
    /// Kubeconfig file of the cluster.
    #[arg(long, value_name = "FILE", conflicts_with = "manifests")]
    pub(super) kubeconfig: Option<PathBuf>,
    /// URL of the API server, over the kubeconfig's or the in-cluster account's. A cluster IP does not work before a proxy
    /// runs. The variable SHEAVE_MASTER gives it too.
    #[arg(long, value_name = "URL", conflicts_with = "manifests")]
    pub(super) master: Option<String>,
}

impl KubeArgs {
    pub(super) fn options(&self) -> kube::KubeOptions {
        // Not clap's: a variable that says where a cluster is does not say that it is to be asked.
        let master = self.master.clone().or_else(|| std::env::var("SHEAVE_MASTER").ok());
        kube::KubeOptions { kubeconfig: self.kubeconfig.clone(), master, context: None }
    }
}

/// Where objects come from when no agent is asked.
#[derive(Args, Clone, Debug)]
pub(super) struct ManifestArgs {
    /// Read Service, EndpointSlice, Node and Pod objects from the YAML files of this directory.
    #[arg(long, value_name = "DIR")]
    pub(super) manifests: Option<PathBuf>,
}
