//! A lab with an agent in it: what most suites start from.
//!
//! Changes are exact, not waited for: [`Scene::apply`] returns when what was written is in the kernel, so the line after
//! it may expect the new state at once.

use std::{
    cell::Cell,
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    agent::{Agent, SYNCED_WITHIN},
    client::Client,
    lab::{Lab, Node, Place, Shape},
    manifests::{Object, lab_node, service, slice},
    protocol::{Dial, Exchange, Failure, LoopSpec, Transport},
    server::Server,
};

/// A change is live within milliseconds; a busy machine gets more.
const LIVE_WITHIN: Duration = Duration::from_secs(30);

/// The file and the Service that show how far the agent has come. By its name it is the last of files that are read
/// together.
pub(crate) const BARRIER: &str = "zz-barrier";
const BARRIER_VIP: &str = "10.96.255.254";

/// What the pods of a scene listen on.
pub const TARGET: u16 = 9876;

/// Connections enough that each of up to four backends gets one: it fails once in 10^9 runs.
pub const ENOUGH: u64 = 80;

/// All ways to talk.
pub const TRANSPORTS: [Transport; 3] = [Transport::Tcp, Transport::UdpConnected, Transport::UdpUnconnected];

/// A lab with an agent on its first node.
#[derive(Debug)]
pub struct Scene {
    // In the order in which they go: nobody uses what has gone.
    agent: Option<Agent>,
    servers: Vec<Server>,
    lab: Lab,
    arguments: Vec<String>,
    barriers: Cell<u32>,
}

impl Scene {
    /// One node with so many pods. Its Node object is there; the agent runs.
    pub fn new(pods: u8) -> Result<Self> {
        Self::with(Shape { nodes: 1, pods }, &[])
    }

    /// Nodes with pods, and an agent on the first with more arguments.
    pub fn with(shape: Shape, arguments: &[&str]) -> Result<Self> {
        let mut scene = Self::without_agent(shape, arguments)?;
        scene.start_agent()?;
        Ok(scene)
    }

    /// As [`Scene::with`], before the agent starts.
    pub fn without_agent(shape: Shape, arguments: &[&str]) -> Result<Self> {
        let lab = Lab::with(shape)?;
        lab.manifests().write("node", &[lab_node(lab.node(0)?)])?;
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        Ok(Self { agent: None, servers: Vec::new(), lab, arguments, barriers: Cell::new(0) })
    }

    /// The lab.
    #[must_use]
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The node with the agent.
    pub fn node(&self) -> Result<&Node> {
        self.lab.node(0)
    }

    /// A pod of that node, counted from 0.
    pub fn pod(&self, index: usize) -> Result<&Place> {
        self.lab.pod(index)
    }

    /// The agent that runs.
    pub fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("no agent runs in this scene now")
    }

    /// Starts the agent and waits until it has synced.
    pub fn start_agent(&mut self) -> Result<()> {
        ensure!(self.agent.is_none(), "an agent runs already");
        let mut agent = Agent::spawn(&self.lab, self.lab.node(0)?, &self.arguments)?;
        agent.wait_synced(SYNCED_WITHIN)?;
        self.agent = Some(agent);
        Ok(())
    }

    /// Gives the agent away: to end it as the test likes.
    pub fn take_agent(&mut self) -> Result<Agent> {
        self.agent.take().context("no agent runs in this scene now")
    }

    /// Starts a server in every pod of every node, at [`TARGET`]; it answers with the pod's name.
    pub fn serve(&mut self) -> Result<()> {
        for node in self.lab.nodes() {
            for pod in node.pods() {
                self.servers.push(pod.serve(TARGET)?);
            }
        }
        Ok(())
    }

    /// Ends these servers, with their connections.
    pub fn stop_serving(&mut self) {
        self.servers.clear();
    }

    /// Writes objects into a file and waits until the kernel has what they say.
    pub fn apply(&self, name: &str, objects: &[Object]) -> Result<()> {
        self.lab.manifests().write(name, objects)?;
        self.settle()
    }

    /// Removes a file and waits until the kernel has what is left.
    pub fn delete(&self, name: &str) -> Result<()> {
        self.lab.manifests().remove(name)?;
        self.settle()
    }

    /// Waits until everything that was written to the manifests before is in the kernel: the agent takes changes in
    /// their order, so a Service written now is programmed after them.
    pub fn settle(&self) -> Result<()> {
        let number = self.barriers.get() + 1;
        self.barriers.set(number);
        let (object, wanted) = barrier(number);
        self.lab.manifests().write(BARRIER, &[object])?;
        wait_programmed(self.agent()?, &wanted)
    }
}

/// A Service of which each number is another one, and the part of the name that shows when it is programmed.
pub(crate) fn barrier(number: u32) -> (Object, String) {
    let port_name = format!("b{number}");
    let object = service(BARRIER, &[BARRIER_VIP]).port(&port_name, "TCP", 1, 1);
    (object, format!("{BARRIER}:{port_name}/"))
}

/// Waits until an agent has programmed a service port with this in its name.
pub(crate) fn wait_programmed(agent: &Agent, wanted: &str) -> Result<()> {
    let deadline = Instant::now() + LIVE_WITHIN;
    while !agent.programmed()?.iter().any(|name| name.contains(wanted)) {
        if Instant::now() > deadline {
            bail!(
                "the agent did not take a change within {LIVE_WITHIN:?}; its log ends:\n{}",
                agent.log_tail()
            );
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Tries until it works; for what nobody tells the end of.
pub fn eventually<T>(what: &str, attempt: impl FnMut() -> Result<T>) -> Result<T> {
    eventually_within(LIVE_WITHIN, what, attempt)
}

/// As [`eventually`], with another patience.
pub fn eventually_within<T>(
    within: Duration,
    what: &str,
    mut attempt: impl FnMut() -> Result<T>,
) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("not within {within:?}: {what}"));
            }
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// An address with a port.
pub fn at(address: &str, port: u16) -> Result<SocketAddr> {
    let address: IpAddr = address.parse().with_context(|| format!("the address {address}"))?;
    Ok(SocketAddr::new(address, port))
}

/// Every kind of socket that can dial a VIP that has both families: three ways to talk, IPv4, IPv6 and IPv4 on an IPv6
/// socket; with what such a socket calls the VIP.
pub fn socket_kinds(v4: &str, v6: &str, port: u16) -> Result<Vec<(Transport, Dial, SocketAddr)>> {
    let (v4, v6) = (at(v4, port)?, at(v6, port)?);
    let mapped = match v4.ip() {
        IpAddr::V4(address) => SocketAddr::new(address.to_ipv6_mapped().into(), port),
        IpAddr::V6(_) => bail!("{v4} is not IPv4"),
    };
    let dials = [(Dial::new(v4), v4), (Dial::new(v6), v6), (Dial::new(v4).mapped(), mapped)];
    let each = |transport| dials.map(|(dial, shown)| (transport, dial, shown));
    Ok(TRANSPORTS.into_iter().flat_map(each).collect())
}

/// The slices of a Service, one for each family, with one port and these places as ready endpoints.
pub fn slices(of: &str, port_name: &str, protocol: &str, places: &[(&Node, &Place)]) -> Vec<Object> {
    [("IPv4", "4"), ("IPv6", "6")]
        .map(|(family, end)| {
            let empty = slice(&format!("{of}-{protocol}-{end}").to_lowercase(), of, family)
                .slice_port(port_name, protocol, TARGET);
            places.iter().fold(empty, |slice, (node, place)| {
                let address = if end == "4" { place.v4().to_string() } else { place.v6().to_string() };
                slice.endpoint(&address, node.name())
            })
        })
        .to_vec()
}

/// Who answers, of many attempts; a failure among them is an error.
pub fn answers(client: &Client, transport: Transport, dial: Dial, attempts: u64) -> Result<BTreeSet<String>> {
    let report = client.run_loop(LoopSpec::new(transport, dial).count(attempts))?;
    ensure!(
        report.failed() == 0,
        "{transport:?} to {}: {} of {attempts} attempts failed, the first: {:?}",
        dial.to,
        report.failed(),
        report.first_failures
    );
    Ok(report.answers.into_keys().collect())
}

/// One attempt that must work.
pub fn reach(client: &Client, transport: Transport, dial: Dial) -> Result<Exchange> {
    client.connect(transport, dial)?.with_context(|| format!("{transport:?} to {}", dial.to))
}

/// One attempt that must not.
pub fn fail(client: &Client, transport: Transport, dial: Dial) -> Result<Failure> {
    match client.connect(transport, dial)? {
        Ok(exchange) => bail!("{transport:?} to {} should fail, but: {exchange:?}", dial.to),
        Err(failure) => Ok(failure),
    }
}

/// A set of names.
#[must_use]
pub fn names(of: &[&str]) -> BTreeSet<String> {
    of.iter().map(|&name| name.to_owned()).collect()
}
