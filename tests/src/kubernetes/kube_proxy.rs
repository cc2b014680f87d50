//! kube-proxy itself, on a node of a lab: what Sheave is compared with.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::json;

use super::{control_plane::Process, programs::KUBE_PROXY};
use crate::{cgroup, lab::Node};

/// How it programs the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By `nft`.
    Nftables,
    /// By `iptables-restore` of the older kind, which writes the kernel's own tables.
    Iptables,
}

impl Mode {
    /// As kube-proxy writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// A kube-proxy that runs. It is killed when dropped; its rules go with the node's namespace.
#[derive(Debug)]
pub struct KubeProxy {
    process: Process,
    cgroup: PathBuf,
}

impl KubeProxy {
    /// Starts it in a node's namespace. `cluster_cidr` is what pods' addresses have in common, of each family;
    /// `min_sync_ms` is the least time between two writes: a second unless somebody sets it, and
    /// zero is a second too.
    pub fn start(
        node: &Node,
        kubeconfig: &Path,
        mode: Mode,
        cluster_cidr: &str,
        min_sync_ms: u32,
    ) -> Result<Self> {
        let directory = node.directory();
        let sync = json!({"minSyncPeriod": format!("{min_sync_ms}ms")});
        let config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": mode.name(),
            "hostnameOverride": node.name(),
            "clusterCIDR": cluster_cidr,
            "clientConnection": {"kubeconfig": kubeconfig},
            "iptables": sync,
            "nftables": sync,
            // These settings cannot be written outside the machine's first namespace; it would end.
            "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        });
        let path = directory.join("kube-proxy.conf");
        fs::write(&path, config.to_string()).with_context(|| format!("writing {}", path.display()))?;
        // A cgroup of its own: what else runs on the node is not stopped with it.
        let cgroup = node.host().cgroup().join("kube-proxy");
        if !cgroup.exists() {
            cgroup::create(&cgroup)?;
        }
        let mut command = node.host().under(cgroup.clone()).command(KUBE_PROXY.path()?)?;
        command.arg("--config").arg(&path).env("PATH", path_with_legacy(directory)?).env_remove("KUBECONFIG");
        Ok(Self { process: Process::spawn("kube-proxy", command, directory.join("kube-proxy.log"))?, cgroup })
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// It and the commands that it runs.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// An error if it has ended.
    pub fn check(&mut self) -> Result<()> {
        self.process.check()
    }
}

/// A `PATH` on which `iptables` is the older kind, whatever the machine's is.
fn path_with_legacy(directory: &Path) -> Result<std::ffi::OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let all: Vec<_> = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).collect();
    let links = directory.join("iptables-legacy");
    let multi =
        all.iter().map(|directory| directory.join("xtables-legacy-multi")).find(|path| path.is_file());
    let multi = multi
        .context("no xtables-legacy-multi (Debian package iptables): `cargo xtask setup` installs it")?;
    fs::create_dir_all(&links).with_context(|| format!("making {}", links.display()))?;
    for family in ["iptables", "ip6tables"] {
        for verb in ["", "-save", "-restore"] {
            let link = links.join(format!("{family}{verb}"));
            if !link.exists() {
                symlink(&multi, &link).with_context(|| format!("making {}", link.display()))?;
            }
        }
    }
    env::join_paths([links].into_iter().chain(all)).context("a directory's name in PATH")
}
