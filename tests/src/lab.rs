//! Nodes with pods, and the network between them.
//!
//! ```text
//!   outside ──┐                 172.18.0.0/24, fd00:172:18::/64
//!          router (bridge) ──┬── node-1 172.18.0.2 ──┬── pod-1-1 10.244.1.11, fd00:10:244:1::11
//!   swallows what            │   (forwards)          └── pod-1-2 10.244.1.12 ...
//!   it does not know         └── node-2 172.18.0.3 ───── pod-2-1 10.244.2.11 ...
//! ```
//! Every name above is a namespace of its own, and none is connected to the machine's. The router answers nothing for
//! an address it does not know: a VIP that nobody translates times out, as it does on a real network.
//!
//! Cgroups: `LAB/node-1` is where the agent of node-1 attaches; `LAB/node-1/host` holds the node's own processes, and
//! each pod has a directory beside it. `LAB/outside` is under no agent.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fmt::Write as _,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, umount2};

use crate::{cgroup, client::Client, manifests::Manifests, netns::Netns, server::Server};

/// Everything of the lab that has a name on the machine starts so, then come process id and counter.
const PREFIX: &str = "sheave-lab-";

/// Pods of a node are numbered from 11: the node's own end of their links is 1.
const FIRST_POD: u8 = 11;

/// Numbers the labs of this process.
static COUNTER: AtomicU32 = AtomicU32::new(0);

/// Somewhere a process can run: a network namespace, a cgroup and addresses.
#[derive(Debug)]
pub struct Place {
    name: String,
    netns: Netns,
    cgroup: PathBuf,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl Place {
    /// A place of a network that was built elsewhere; its cgroup exists.
    pub(crate) fn new(name: &str, netns: Netns, cgroup: PathBuf, v4: Ipv4Addr, v6: Ipv6Addr) -> Self {
        Self { name: name.to_owned(), netns, cgroup, v4, v6 }
    }

    /// Its name, which its servers answer with.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its network namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its cgroup directory.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Its IPv4 address.
    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    /// Its IPv6 address.
    #[must_use]
    pub fn v6(&self) -> Ipv6Addr {
        self.v6
    }

    /// Its two addresses with a port.
    #[must_use]
    pub fn sockets(&self, port: u16) -> [SocketAddr; 2] {
        [IpAddr::from(self.v4), IpAddr::from(self.v6)].map(|address| SocketAddr::new(address, port))
    }

    /// The same namespace and addresses under another cgroup, which exists: who runs there is in the pod, but not under
    /// what is attached to the pod's cgroup.
    #[must_use]
    pub fn under(&self, cgroup: PathBuf) -> Self {
        let Self { name, netns, v4, v6, .. } = self;
        Self { name: name.clone(), netns: netns.clone(), cgroup, v4: *v4, v6: *v6 }
    }

    /// A command whose process joins the place's cgroup and namespace before it becomes `program`; not only for the
    /// lab's own binaries (`curl`, `dig`).
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let procs = self.cgroup.join("cgroup.procs");
        let members = OpenOptions::new()
            .write(true)
            .open(&procs)
            .with_context(|| format!("opening {}", procs.display()))?;
        let mut command = self.netns.command(program);
        // SAFETY: between fork and exec the closure makes one system call on a descriptor that is already open.
        unsafe {
            // 0 is whoever writes.
            command.pre_exec(move || (&members).write_all(b"0"));
        }
        Ok(command)
    }

    /// Starts a client here.
    pub fn client(&self) -> Result<Client> {
        Client::start(self)
    }

    /// Starts a server here that answers with the place's name, on TCP and UDP, IPv4 and IPv6.
    pub fn serve(&self, port: u16) -> Result<Server> {
        self.serve_as(&self.name, port)
    }

    /// [`Place::serve`] under another name.
    pub fn serve_as(&self, name: &str, port: u16) -> Result<Server> {
        Server::start(&self.netns, name, &self.sockets(port))
    }
}

/// A node: its own namespace, and its pods.
#[derive(Debug)]
pub struct Node {
    index: u8,
    host: Place,
    cgroup: PathBuf,
    pods: Vec<Place>,
    directory: PathBuf,
}

impl Node {
    /// A node of a network that was built elsewhere; cgroup and directory exist.
    pub(crate) fn new(index: u8, host: Place, cgroup: PathBuf, pods: Vec<Place>, directory: PathBuf) -> Self {
        Self { index, host, cgroup, pods, directory }
    }

    /// Its name in Kubernetes.
    #[must_use]
    pub fn name(&self) -> &str {
        self.host.name()
    }

    /// The node's own processes, and those of pods with the host's network.
    #[must_use]
    pub fn host(&self) -> &Place {
        &self.host
    }

    /// Its pods.
    #[must_use]
    pub fn pods(&self) -> &[Place] {
        &self.pods
    }

    /// One of its pods, counted from 0.
    pub fn pod(&self, index: usize) -> Result<&Place> {
        self.pods.get(index).with_context(|| format!("{} has no pod {index}", self.name()))
    }

    /// A pod with the host's network: a cgroup of its own in the node's namespace.
    pub fn host_network_pod(&self, name: &str) -> Result<Place> {
        let cgroup = self.cgroup.join(name);
        cgroup::create(&cgroup)?;
        let Place { netns, v4, v6, .. } = &self.host;
        Ok(Place { name: name.to_owned(), netns: netns.clone(), cgroup, v4: *v4, v6: *v6 })
    }

    /// The cgroup of the node with everything on it: `--cgroup-root` of its agent.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// A directory of the node's own for `bpffs`, control socket and log.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where its agent pins what stays in the kernel.
    #[must_use]
    pub fn bpffs(&self) -> PathBuf {
        self.directory.join("bpffs")
    }

    /// What its pods' IPv4 addresses have in common.
    #[must_use]
    pub fn pod_cidr_v4(&self) -> String {
        format!("10.244.{}.0/24", self.index)
    }

    /// What its pods' IPv6 addresses have in common.
    #[must_use]
    pub fn pod_cidr_v6(&self) -> String {
        format!("fd00:10:244:{}::/64", self.index)
    }
}

/// The shape of a lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// How many nodes.
    pub nodes: u8,
    /// How many pods each node has.
    pub pods: u8,
}

/// A lab. Dropping it ends the processes in it and removes all of it.
#[derive(Debug)]
pub struct Lab {
    router: Netns,
    outside: Place,
    nodes: Vec<Node>,
    manifests: Manifests,
    // The last field: it goes when all that lies in it has gone.
    ground: Ground,
}

impl Lab {
    /// One node with so many pods.
    pub fn new(pods: u8) -> Result<Self> {
        Self::with(Shape { nodes: 1, pods })
    }

    /// Nodes with pods.
    pub fn with(shape: Shape) -> Result<Self> {
        ensure!(
            shape.nodes <= 200 && shape.pods <= 200,
            "the lab's addresses are numbered by one byte: {shape:?}"
        );
        let ground = Ground::new()?;
        let manifests = Manifests::new(ground.directory.join("manifests"))?;

        let router = router()?;
        let outside = uplink(&router, "outside", 254, ground.cgroup.join("outside"))?;

        let mut lab = Self { router, outside, nodes: Vec::new(), manifests, ground };
        for index in 1..=shape.nodes {
            lab.add_node(index)?;
            for _ in 0..shape.pods {
                lab.add_pod(usize::from(index) - 1)?;
            }
        }
        Ok(lab)
    }

    /// The lab's name, which names its cgroup and its directory.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.ground.name
    }

    /// The lab's cgroup; every node's is below it.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.ground.cgroup
    }

    /// The lab's directory for files.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.ground.directory
    }

    /// What the agents read with `--manifests`.
    #[must_use]
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// The router's namespace.
    #[must_use]
    pub fn router(&self) -> &Netns {
        &self.router
    }

    /// A machine on the nodes' network that is no node.
    #[must_use]
    pub fn outside(&self) -> &Place {
        &self.outside
    }

    /// The nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A node, counted from 0.
    pub fn node(&self, index: usize) -> Result<&Node> {
        self.nodes.get(index).with_context(|| format!("{} has no node {index}", self.name()))
    }

    /// A pod of the first node, counted from 0.
    pub fn pod(&self, index: usize) -> Result<&Place> {
        self.node(0)?.pod(index)
    }

    /// A machine more on the nodes' network that is no node, at the address 172.18.0.`host_part`.
    pub fn machine(&self, name: &str, host_part: u8) -> Result<Place> {
        uplink(&self.router, name, host_part, self.ground.cgroup.join(name))
    }

    fn add_node(&mut self, index: u8) -> Result<()> {
        let name = format!("node-{index}");
        let cgroup = self.ground.cgroup.join(&name);
        cgroup::create(&cgroup)?;
        let host = uplink(&self.router, &name, index + 1, cgroup.join("host"))?;
        let directory = self.ground.directory.join(&name);
        fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
        // A pod that is gone is silent.
        host.netns.ip(&format!(
            "route add blackhole 10.244.{index}.0/24\nroute add blackhole fd00:10:244:{index}::/64\n"
        ))?;
        // Router and nodes know where the pods of each node are, as a CNI would have it.
        self.router.ip(&routes_to(index))?;
        for other in &self.nodes {
            host.netns.ip(&routes_to(other.index))?;
            other.host.netns.ip(&routes_to(index))?;
        }
        self.nodes.push(Node { index, host, cgroup, pods: Vec::new(), directory });
        Ok(())
    }

    /// Adds a pod to a node (counted from 0) of the running lab.
    pub fn add_pod(&mut self, node: usize) -> Result<&Place> {
        let Some(node) = self.nodes.get_mut(node) else { bail!("{} has no node {node}", self.ground.name) };
        let number = u8::try_from(node.pods.len()).context("too many pods")? + 1;
        let host_part = FIRST_POD + number - 1;
        let name = format!("pod-{}-{number}", node.index);
        let v4 = Ipv4Addr::new(10, 244, node.index, host_part);
        // Written so that both addresses end in the same digits.
        let v6: Ipv6Addr =
            format!("fd00:10:244:{}::{host_part}", node.index).parse().context("an IPv6 address of a pod")?;
        let cgroup = node.cgroup.join(&name);
        cgroup::create(&cgroup)?;
        let netns = Netns::new()?;
        let (gateway4, gateway6) =
            (format!("10.244.{}.1", node.index), format!("fd00:10:244:{}::1", node.index));
        node.host.netns.ip(&format!(
            "link add veth{number} type veth peer name eth0 netns {pod}\n\
             address add {gateway4}/32 dev veth{number}\n\
             address add {gateway6}/128 dev veth{number} nodad\n\
             link set veth{number} up\n\
             route add {v4}/32 dev veth{number}\n\
             route add {v6}/128 dev veth{number}\n",
            pod = netns.path().display(),
        ))?;
        netns.ip(&format!(
            "address add {v4}/32 dev eth0\n\
             address add {v6}/128 dev eth0 nodad\n\
             link set eth0 up\n\
             route add {gateway4} dev eth0 scope link\n\
             route add default via {gateway4}\n\
             route add {gateway6} dev eth0\n\
             route add ::/0 via {gateway6}\n",
        ))?;
        let place = Place { name, netns, cgroup, v4, v6 };
        Ok(node.pods.push_mut(place))
    }
}

/// The middle of a lab's network, which leads nowhere else.
pub(crate) fn router() -> Result<Netns> {
    let router = Netns::new()?;
    // Not even an error comes back for what it does not know.
    router.ip("link add br0 type bridge stp_state 0 mcast_snooping 0\n\
         address add 172.18.0.1/24 dev br0\n\
         address add fd00:172:18::1/64 dev br0 nodad\n\
         link set br0 up\n\
         route add blackhole default\n\
         route add blackhole ::/0\n")?;
    Ok(router)
}

/// A namespace and a cgroup, with one device on the nodes' network.
pub(crate) fn uplink(router: &Netns, name: &str, host_part: u8, cgroup: PathBuf) -> Result<Place> {
    cgroup::create(&cgroup)?;
    attach(router, name, host_part, Netns::new()?, cgroup)
}

/// Puts a namespace that is there on the nodes' network.
pub(crate) fn attach(
    router: &Netns,
    name: &str,
    host_part: u8,
    netns: Netns,
    cgroup: PathBuf,
) -> Result<Place> {
    let v4 = Ipv4Addr::new(172, 18, 0, host_part);
    let v6: Ipv6Addr = format!("fd00:172:18::{host_part}").parse().context("an IPv6 address of a node")?;
    router.ip(&format!(
        "link add {name} type veth peer name eth0 netns {path}\nlink set {name} master br0 up\n",
        path = netns.path().display(),
    ))?;
    netns.ip(&format!(
        "address add {v4}/24 dev eth0\n\
         address add {v6}/64 dev eth0 nodad\n\
         link set eth0 up\n\
         route add default via 172.18.0.1\n\
         route add ::/0 via fd00:172:18::1\n",
    ))?;
    Ok(Place { name: name.to_owned(), netns, cgroup, v4, v6 })
}

/// The way to a node's pods.
fn routes_to(index: u8) -> String {
    let host_part = index + 1;
    let mut lines = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(lines, "route add 10.244.{index}.0/24 via 172.18.0.{host_part}");
    let _ = writeln!(lines, "route add fd00:10:244:{index}::/64 via fd00:172:18::{host_part}");
    lines
}

/// What a lab has on the machine that would outlive this process. Dropping it ends the processes in it.
#[derive(Debug)]
pub(crate) struct Ground {
    pub(crate) name: String,
    pub(crate) cgroup: PathBuf,
    pub(crate) directory: PathBuf,
}

impl Ground {
    /// Under a name that no other lab has; what dead runs left goes first.
    pub(crate) fn new() -> Result<Self> {
        sweep_once()?;
        let name = format!("{PREFIX}{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let (cgroup, directory) = (cgroup::mount_point()?.join(&name), std::env::temp_dir().join(&name));
        let ground = Self { name, cgroup, directory };
        cgroup::create(&ground.cgroup)?;
        fs::create_dir(&ground.directory)
            .with_context(|| format!("making {}", ground.directory.display()))?;
        Ok(ground)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        remove(&self.cgroup, &self.directory);
    }
}

/// Removes what a lab has on the machine. What cannot be removed is told and left to the next sweep.
fn remove(cgroup: &Path, directory: &Path) {
    for result in [cgroup::remove(cgroup), remove_directory(directory)] {
        if let Err(error) = result {
            eprintln!("lab: {error:#}");
        }
    }
}

/// Unmounts what the agent mounted below a lab's directory, then removes the directory.
fn remove_directory(directory: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    // The innermost was mounted last.
    for line in mounts.lines().rev() {
        let Some(path) = line.split(' ').nth(1).map(Path::new).filter(|path| path.starts_with(directory))
        else {
            continue;
        };
        umount2(path, MntFlags::MNT_DETACH).with_context(|| format!("unmounting {}", path.display()))?;
    }
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", directory.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Before the first lab of this process: there can be none under its number but those of an earlier process.
fn sweep_once() -> Result<()> {
    static SWEPT: OnceLock<Result<(), String>> = OnceLock::new();
    let sweep = || sweep_owned_by(|pid| pid == std::process::id() || !is_alive(pid));
    SWEPT.get_or_init(|| sweep().map_err(|error| format!("{error:#}"))).clone().map_err(anyhow::Error::msg)
}

/// Removes what runs that were killed left. Namespaces vanish by themselves, but cgroups (with the processes in them),
/// mounts and directories stay. The first lab of a process does this.
pub fn sweep() -> Result<()> {
    sweep_owned_by(|pid| !is_alive(pid))
}

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn sweep_owned_by(is_stale: impl Fn(u32) -> bool) -> Result<()> {
    let (cgroups, directories) = (cgroup::mount_point()?, std::env::temp_dir());
    let mut stale = BTreeSet::new();
    for parent in [&cgroups, &directories] {
        let entries = fs::read_dir(parent).with_context(|| format!("listing {}", parent.display()))?;
        for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
            let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse().ok());
            if owner.is_some_and(&is_stale) {
                stale.insert(name);
            }
        }
    }
    for name in stale {
        remove(&cgroups.join(&name), &directories.join(&name));
    }
    Ok(())
}
