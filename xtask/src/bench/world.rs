//! A lab with an agent, backends and a client that can be moved between cgroups.

use std::{
    fs,
    net::IpAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use sheave_tests::{
    agent::{Agent, sheave},
    cgroup,
    client::Client,
    lab::{Lab, Node, Place, Shape},
    manifests::lab_node,
    measure::packets::BareHooks,
};

use super::{
    go_on,
    scale::{CLUSTER_CIDR, Family, Group, Scale, TARGET_PORT},
};

/// Where the client under measurement runs, and where the servers do.
pub(crate) const CLIENT_CPU: usize = 1;
pub(crate) const SERVER_CPU: usize = 0;

/// The node's devices, to the clients and backends and outside.
const DEVICES: [&str; 4] = ["eth0", "veth1", "veth2", "veth3"];

/// What the largest size may take on a busy machine.
const SYNCED_WITHIN: Duration = Duration::from_secs(600);

/// Many connections of one address to one other: what a busy client's namespace has set. A lost SYN fails after seconds
/// instead of minutes.
const BUSY_CLIENT: [(&str, &str); 3] = [
    ("net/ipv4/ip_local_port_range", "1024 65535"),
    ("net/ipv4/tcp_tw_reuse", "1"),
    ("net/ipv4/tcp_syn_retries", "2"),
];

/// Where a client is while it measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// In the pod's cgroup, under the agent's programs.
    Inside,
    /// In a cgroup under no program.
    Outside,
    /// The same, on a machine that is no part of the cluster.
    Elsewhere,
}

/// See the module.
pub(crate) struct World {
    // In the order in which they go: nobody uses what has gone.
    agent: Option<Agent>,
    client: Client,
    servers: Vec<Client>,
    lab: Lab,
    /// What the manifests hold.
    pub(crate) scale: Scale,
    /// The same server outside and inside the agent's cgroup, by port.
    inside_port: u16,
}

impl World {
    /// Makes the lab; nobody serves its Services.
    pub(crate) fn new(scale: Scale) -> Result<Self> {
        Self::of_nodes(1, scale)
    }

    /// The same with a second node, where the backends are.
    pub(crate) fn of_two_nodes(scale: Scale) -> Result<Self> {
        Self::of_nodes(2, scale)
    }

    fn of_nodes(nodes: u8, scale: Scale) -> Result<Self> {
        let lab = Lab::with(Shape { nodes, pods: 3 })?;
        lay_routes(&lab)?;
        let client_pod = lab.pod(0)?;
        client_pod.netns().sysctls(&BUSY_CLIENT)?;
        let mut world = Self {
            agent: None,
            client: client_pod.client()?,
            servers: Vec::new(),
            lab,
            scale,
            inside_port: TARGET_PORT + 1,
        };
        cgroup::create(&world.cgroup(Side::Outside)?)?;
        world.start_servers()?;
        Ok(world)
    }

    fn start_servers(&mut self) -> Result<()> {
        let outside = self.cgroup(Side::Outside)?;
        for (index, group) in [(1, Group::A), (2, Group::B)] {
            // Outside: what a server's own sockets cost under the programs is measured by the bystander arm alone.
            let server = home(&self.lab)?.pod(index)?.under(outside.clone()).client()?;
            server.serve_measured(TARGET_PORT, Some(SERVER_CPU), group.tag())?;
            self.servers.push(server);
        }
        let server = home(&self.lab)?.pod(1)?.client()?;
        server.serve_measured(self.inside_port, Some(SERVER_CPU), Group::A.tag())?;
        self.servers.push(server);
        Ok(())
    }

    /// The lab.
    pub(crate) fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The node.
    pub(crate) fn node(&self) -> Result<&Node> {
        self.lab.node(0)
    }

    /// The client.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// The servers' processes.
    pub(crate) fn servers(&self) -> impl Iterator<Item = u32> {
        self.servers.iter().map(Client::pid)
    }

    /// Writes the manifests.
    pub(crate) fn write_manifests(&self) -> Result<()> {
        self.lab.manifests().write("node", &[lab_node(self.node()?)])?;
        self.scale.write(self.lab.manifests().path())
    }

    /// The agent, if it runs.
    pub(crate) fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("no agent runs")
    }

    /// The port of the server that is under the programs itself.
    pub(crate) fn inside_port(&self) -> u16 {
        self.inside_port
    }

    /// Starts the agent, and waits until it has synced; returns how long that took.
    pub(crate) fn start_agent(&mut self) -> Result<Duration> {
        self.start_agent_with(&[])
    }

    /// [`Self::start_agent`] with more arguments.
    pub(crate) fn start_agent_with(&mut self, arguments: &[&str]) -> Result<Duration> {
        let started = Instant::now();
        self.spawn_agent_with(arguments)?;
        self.await_agent()?;
        Ok(started.elapsed())
    }

    /// Starts the agent.
    pub(crate) fn spawn_agent(&mut self) -> Result<()> {
        self.spawn_agent_with(&[])
    }

    fn spawn_agent_with(&mut self, arguments: &[&str]) -> Result<()> {
        let all = [&["--cluster-cidr", CLUSTER_CIDR], arguments].concat();
        self.agent = Some(Agent::spawn(&self.lab, self.lab.node(0)?, &all)?);
        Ok(())
    }

    /// Waits until the agent says that it has synced.
    pub(crate) fn await_agent(&mut self) -> Result<()> {
        self.agent.as_mut().context("no agent runs")?.wait_synced_while(SYNCED_WITHIN, go_on)
    }

    /// Ends the agent at once; what is in the kernel stays.
    pub(crate) fn kill_agent(&mut self) -> Result<()> {
        self.agent.take().context("no agent runs")?.kill()
    }

    /// Removes what the agent has left in the kernel.
    pub(crate) fn clean_up(&self) -> Result<()> {
        let output = sheave(self.node()?, &["cleanup"])?;
        anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Stops the agent's process, or lets it go on.
    pub(crate) fn freeze_agent(&self, frozen: bool) -> Result<()> {
        self.agent()?.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT })
    }

    /// Programs that do nothing, where an agent has its own.
    pub(crate) fn empty_hooks(&self) -> Result<BareHooks> {
        BareHooks::empty(&self.cgroup(Side::Inside)?, self.node()?.host().netns(), &DEVICES)
    }

    /// Programs that read as little as one can, where an agent has its own.
    pub(crate) fn reading_hooks(&self) -> Result<BareHooks> {
        let services = self.scale.services;
        BareHooks::reading(services, &self.cgroup(Side::Inside)?, self.node()?.host().netns(), &DEVICES)
    }

    /// Where a client is that is there.
    pub(crate) fn cgroup(&self, side: Side) -> Result<PathBuf> {
        Ok(match side {
            Side::Inside => self.lab.pod(0)?.cgroup().to_owned(),
            Side::Outside | Side::Elsewhere => self.lab.cgroup().join("bench-outside"),
        })
    }

    /// Puts a client into a cgroup of this world. Its sockets belong to the cgroup in which they are made.
    pub(crate) fn admit(&self, client: &Client, side: Side) -> Result<()> {
        let members = self.cgroup(side)?.join("cgroup.procs");
        fs::write(&members, client.pid().to_string())
            .with_context(|| format!("moving a client to {}", members.display()))
    }

    /// Where a measuring client's sockets are made.
    pub(crate) fn client_netns(&self, side: Side) -> Result<PathBuf> {
        Ok(match side {
            Side::Inside | Side::Outside => self.lab.pod(0)?.netns().path(),
            Side::Elsewhere => self.lab.outside().netns().path(),
        })
    }

    /// Lets the machine outside reach backends by their own addresses, and make many connections.
    pub(crate) fn open(&self) -> Result<()> {
        let (outside, node) = (self.lab.outside().netns(), self.node()?.host().v4());
        outside.ip(&format!("route add {} via {node}\n", Group::A.prefix_v4()))?;
        outside.sysctls(&BUSY_CLIENT)
    }

    /// The source address of the client's sockets towards a group.
    pub(crate) fn source(family: Family, group: Group) -> IpAddr {
        let (v4, v6) = group.sources();
        match family {
            Family::V4 => v4.into(),
            Family::V6 => v6.into(),
        }
    }
}

/// The node that has the backends: the last one.
fn home(lab: &Lab) -> Result<&Node> {
    lab.nodes().last().context("a node")
}

/// Leads the groups' prefixes to their pods, and gives the client a source address towards each.
fn lay_routes(lab: &Lab) -> Result<()> {
    let (node, home) = (lab.node(0)?, home(lab)?);
    let (near, far) = (node.host(), home.host());
    let (mut to_node, mut to_home, mut client) = (String::new(), String::new(), String::new());
    for (index, group) in [(1, Group::A), (2, Group::B)] {
        let pod = home.pod(index)?;
        let (v4, v6) = (group.prefix_v4(), group.prefix_v6());
        pod.netns().ip(&format!("route add local {v4} dev lo\nroute add local {v6} dev lo\n"))?;
        // An answer comes from the address that was asked, which is routed here but is on no device.
        pod.netns().sysctls(&[("net/ipv6/ip_nonlocal_bind", "1")])?;
        let device = format!("veth{}", index + 1);
        to_home += &format!(
            "route add {v4} via {} dev {device}\nroute add {v6} via {} dev {device}\n",
            pod.v4(),
            pod.v6()
        );
        to_node += &format!("route add {v4} via {}\nroute add {v6} via {}\n", far.v4(), far.v6());
        let (source_v4, source_v6) = group.sources();
        client += &format!(
            "address add {source_v4}/32 dev lo\naddress add {source_v6}/128 dev lo nodad\n\
             route add {v4} via 10.244.1.1 dev eth0 src {source_v4}\n\
             route add {v6} via fd00:10:244:1::1 dev eth0 src {source_v6}\n"
        );
    }
    let pod = node.pod(0)?;
    let to_client = |via: &Place| {
        format!("route add 10.202.0.0/16 via {}\nroute add fd00:202::/64 via {}\n", via.v4(), via.v6())
    };
    pod.netns().ip(&client)?;
    near.netns().ip(&to_client(pod))?;
    if lab.nodes().len() > 1 {
        near.netns().ip(&to_node)?;
        // Answers to the machine outside take the same way back, though there is a shorter one.
        let outside = lab.outside().v4();
        far.netns().ip(&format!("{}route add {outside} via {}\n", to_client(near), near.v4()))?;
        let silent = ["all", "eth0"].map(|device| format!("net/ipv4/conf/{device}/send_redirects"));
        let silent: Vec<_> = silent.iter().map(|key| (key.as_str(), "0")).collect();
        [near, far].iter().try_for_each(|host| host.netns().sysctls(&silent))?;
    }
    far.netns().ip(&to_home)
}
