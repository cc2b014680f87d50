//! Two nodes as packets see them: for clients that no hook of a socket saw.
//!
//! ```text
//!   far ── transit ── router ──┬── node-1 172.18.0.2 ──┬─ cbr0 ─┬─ bridge-1-1   10.244.1.11
//!   198.18.1.2     (bridge)    │   forwards, filters   │        └─ bridge-1-2   10.244.1.12
//!           outside ───────────┤                       ├─ p2p-1-1               10.244.1.131
//!           172.18.0.254       │                       └─ p2p-1-2               10.244.1.132
//!                              └── node-2 172.18.0.3 ────  the same with a 2
//! ```
//! Every name is a namespace of its own, without a way out; IPv6 addresses end in the same digits. Bridge pods share the
//! node's bridge, which has an address. Point-to-point pods are attached as Calico does it: the node's end of the link
//! has no address, and the pod's gateways are 169.254.1.1 and a link-local address. Between the nodes pod addresses are
//! routed plainly or through a tunnel: VXLAN, or one without link headers.
//!
//! Whoever is no node sends VIPs to the first node: the outside client, the far one behind two routers, and node-2 as
//! long as no agent of its own takes them there.

mod build;
pub mod matrix;
pub mod tap;
mod tunnel;
mod wireguard;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, bail, ensure};

use self::tunnel::Tunnel;
use crate::{
    agent::{Agent, SYNCED_WITHIN, Source},
    client::Client,
    lab::{Ground, Node, Place},
    manifests::{Manifests, Object, lab_node},
    netns::Netns,
    scene::{BARRIER, TARGET, barrier, wait_programmed},
    server::Server,
};

/// What all pods have in common.
pub const CLUSTER_CIDR: &str = "10.244.0.0/16,fd00:10:244::/48";
/// What all cluster IPs have in common.
pub const SERVICE_CIDR: &str = "10.96.0.0/16,fd00:10:96::/112";
/// Where external addresses are from, those of load balancers too.
pub const EXTERNAL_CIDR: &str = "203.0.113.0/24,fd00:203:0:113::/64";

/// How a pod is attached to its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Attachment {
    /// By a port of the node's bridge.
    Bridge,
    /// By a link of its own, whose node's end has no address.
    PointToPoint,
}

/// Pods of each kind on each node.
const PODS: usize = 2;

/// How pod addresses get from node to node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Between {
    /// As they are.
    #[default]
    Routes,
    /// Inside a VXLAN tunnel.
    Vxlan,
    /// Inside a tunnel whose frames have no link header.
    Bare,
    /// As [`Between::Bare`], inside IPv6, by the kernel's own device (module ip6_tunnel).
    Ip6,
    /// As [`Between::Ip6`], and encrypted (module wireguard).
    WireGuard,
}

/// What a node's firewall does with packets that it forwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Guard {
    /// There is none, nor connection tracking.
    #[default]
    Open,
    /// Drops what connection tracking finds invalid.
    DropInvalid,
    /// Besides, admits nothing but packets between clients and pods by their real addresses, as policies of CNIs do.
    OnlyReal,
}

/// What varies about the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// How pod addresses get from node to node.
    pub between: Between,
    /// `rp_filter` of the nodes: 0, 1 (strict) or 2 (loose).
    pub rp_filter: u8,
    /// Whether the nodes' bridges hand what they switch to netfilter.
    pub bridge_netfilter: bool,
    /// Whether devices leave checksums and segmentation to others.
    pub offload: bool,
    /// The nodes' firewall.
    pub guard: Guard,
    /// Whether the nodes masquerade what pods send out of the cluster, as many CNIs do.
    pub masquerade: bool,
    /// Whether the nodes tell clients of shorter ways (ICMP redirects of IPv4). To a kernel that rejects or translates
    /// after routing, a VIP looks as if the router had it.
    pub redirects: bool,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            between: Between::Routes,
            rp_filter: 1,
            bridge_netfilter: true,
            offload: true,
            guard: Guard::Open,
            masquerade: false,
            redirects: false,
        }
    }
}

impl Layout {
    /// With a tunnel without link headers between the nodes.
    #[must_use]
    pub fn bare_overlay() -> Self {
        Self { between: Between::Bare, ..Self::overlay() }
    }

    /// With a tunnel of the kernel's own without link headers between the nodes.
    #[must_use]
    pub fn ip6_overlay() -> Self {
        Self { between: Between::Ip6, ..Self::overlay() }
    }

    /// With WireGuard between the nodes.
    #[must_use]
    pub fn wireguard_overlay() -> Self {
        Self { between: Between::WireGuard, ..Self::overlay() }
    }

    /// With a VXLAN tunnel between the nodes. A pod's packet to a node's own address does not fit through it and back by
    /// the same way, so a CNI masquerades it.
    #[must_use]
    pub fn overlay() -> Self {
        Self { between: Between::Vxlan, masquerade: true, ..Self::default() }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { between, rp_filter, bridge_netfilter, offload, guard, masquerade, redirects } = self;
        write!(
            formatter,
            "{between:?}, rp_filter {rp_filter}, br_netfilter {}, offload {offload}, {guard:?}, masquerade {masquerade}, redirects {redirects}",
            u8::from(*bridge_netfilter)
        )
    }
}

/// Links whose size can be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Between the two routers on the way to the far client.
    Transit,
    /// Between a point-to-point pod and its node: by node and number, from 0.
    Pod(usize, usize),
}

/// Two nodes and who is around. Dropping it ends the processes in it and removes all of it.
#[derive(Debug)]
pub struct World {
    // In the order in which they go: nobody uses what has gone.
    agents: Vec<Option<Agent>>,
    servers: Vec<Server>,
    peers: Vec<usize>,
    layout: Layout,
    router: Netns,
    transit: Netns,
    outside: Place,
    far: Place,
    nodes: Vec<Node>,
    _tunnel: Option<Tunnel>,
    unhooked: PathBuf,
    manifests: Manifests,
    barriers: AtomicU32,
    ground: Ground,
}

impl World {
    /// Builds it. No agent runs yet; the manifests have both Node objects.
    pub fn new(layout: Layout) -> Result<Self> {
        let world = build::world(layout).with_context(|| format!("building nodes with {layout}"))?;
        let nodes: Vec<_> = world.nodes.iter().map(lab_node).collect();
        world.manifests.write("nodes", &nodes)?;
        Ok(world)
    }

    /// What it was built with.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// A client on the nodes' network that is no node.
    #[must_use]
    pub fn outside(&self) -> &Place {
        &self.outside
    }

    /// A client behind two routers.
    #[must_use]
    pub fn far(&self) -> &Place {
        &self.far
    }

    /// The router that nodes have as their gateway; its bridge is the wire between them.
    #[must_use]
    pub fn router(&self) -> &Netns {
        &self.router
    }

    /// The router behind it.
    #[must_use]
    pub fn transit(&self) -> &Netns {
        &self.transit
    }

    /// Both nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A node, counted from 0.
    pub fn node(&self, index: usize) -> Result<&Node> {
        self.nodes.get(index).with_context(|| format!("there is no node {index}"))
    }

    /// A pod of a node; both are counted from 0.
    pub fn pod(&self, node: usize, attachment: Attachment, index: usize) -> Result<&Place> {
        ensure!(index < PODS, "there are {PODS} pods of each kind on a node");
        let first = match attachment {
            Attachment::Bridge => 0,
            Attachment::PointToPoint => PODS,
        };
        self.node(node)?.pod(first + index)
    }

    /// Everywhere a process can run.
    #[must_use]
    pub fn places(&self) -> Vec<&Place> {
        let on_nodes = self.nodes.iter().flat_map(|node| std::iter::once(node.host()).chain(node.pods()));
        [&self.outside, &self.far].into_iter().chain(on_nodes).collect()
    }

    /// A client in a place whose sockets no agent sees.
    pub fn unhooked(&self, place: &Place) -> Result<Client> {
        place.under(self.unhooked.clone()).client()
    }

    /// What the agents read.
    #[must_use]
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// A directory for files.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.ground.directory
    }

    /// Starts a server in every pod and on every node at [`TARGET`]; it answers with the place's name and with the
    /// address that it sees.
    pub fn serve(&mut self) -> Result<()> {
        for place in self.nodes.iter().flat_map(|node| std::iter::once(node.host()).chain(node.pods())) {
            self.servers.push(Server::start_telling(place.netns(), place.name(), &place.sockets(TARGET))?);
        }
        Ok(())
    }

    /// Starts the agent of a node with the cluster's ranges and more arguments, and waits until it has synced.
    pub fn start_agent(&mut self, node: usize, arguments: &[&str]) -> Result<()> {
        let source = Source::Manifests(self.manifests.path());
        let on = self.node(node)?;
        let mut all = vec!["--cluster-cidr", CLUSTER_CIDR, "--service-cidr", SERVICE_CIDR];
        all.extend(arguments);
        let mut agent = Agent::spawn_with(on, &source, on.cgroup(), &all)?;
        agent.wait_synced(SYNCED_WITHIN)?;
        let slot = self.agents.get_mut(node).context("a slot for each node")?;
        ensure!(slot.is_none(), "an agent runs on node {node} already");
        *slot = Some(agent);
        Ok(())
    }

    /// The agent of a node.
    pub fn agent(&self, node: usize) -> Result<&Agent> {
        self.agents
            .get(node)
            .and_then(Option::as_ref)
            .with_context(|| format!("no agent runs on node {node}"))
    }

    /// Gives the agent of a node away: to end it as the test likes.
    pub fn take_agent(&mut self, node: usize) -> Result<Agent> {
        let agent = self.agents.get_mut(node).and_then(Option::take);
        agent.with_context(|| format!("no agent runs on node {node}"))
    }

    /// Whether a node translates VIPs.
    #[must_use]
    pub fn proxied(&self, node: usize) -> bool {
        self.peers.contains(&node) || self.agents.get(node).is_some_and(Option::is_some)
    }

    /// Another proxy than ours serves a node.
    pub fn set_proxied(&mut self, node: usize) {
        self.peers.push(node);
    }

    /// Writes objects into a file and waits until every agent's kernel has what they say.
    pub fn apply(&self, name: &str, objects: &[Object]) -> Result<()> {
        self.manifests.write(name, objects)?;
        self.settle()
    }

    /// Removes a file and waits until every agent's kernel has what is left.
    pub fn delete(&self, name: &str) -> Result<()> {
        self.manifests.remove(name)?;
        self.settle()
    }

    /// Waits until every agent's kernel has everything that was written before.
    pub fn settle(&self) -> Result<()> {
        let (object, wanted) = barrier(self.barriers.fetch_add(1, Ordering::Relaxed));
        self.manifests.write(BARRIER, &[object])?;
        self.agents.iter().flatten().try_for_each(|agent| wait_programmed(agent, &wanted))
    }

    /// Sets the largest packet of a link, at both ends.
    pub fn set_mtu(&self, link: Link, mtu: u16) -> Result<()> {
        let (one, device, other, peer) = match link {
            Link::Transit => (&self.router, "transit".to_owned(), &self.transit, "eth0".to_owned()),
            Link::Pod(node, index) => {
                let pod = self.pod(node, Attachment::PointToPoint, index)?;
                (self.node(node)?.host().netns(), build::host_end(pod), pod.netns(), "eth0".to_owned())
            }
        };
        one.ip(&format!("link set {device} mtu {mtu}\n"))?;
        other.ip(&format!("link set {peer} mtu {mtu}\n"))
    }

    /// Sets the largest packet that fits through the tunnel between the nodes.
    pub fn set_tunnel_mtu(&self, mtu: u16) -> Result<()> {
        ensure!(self.layout.between == Between::Vxlan, "the nodes have no tunnel");
        self.nodes.iter().try_for_each(|node| node.host().netns().ip(&format!("link set vxlan0 mtu {mtu}\n")))
    }

    /// The node's end of a pod's link.
    #[must_use]
    pub fn host_end(&self, pod: &Place) -> String {
        build::host_end(pod)
    }
}

/// Runs a script of nftables in a namespace.
pub fn nft(netns: &Netns, script: &str) -> Result<()> {
    let output = netns.command("nft").arg(script).output();
    let output =
        output.context("cannot run `nft` (Debian package nftables): `cargo xtask setup` installs it")?;
    if !output.status.success() {
        bail!("`nft` failed: {}\nwith:\n{script}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
