//! A lab with a control plane and an agent on every node.

use std::{
    cell::Cell,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    account::{deploy, kubeconfig_with_token_file, token},
    api::Api,
    control_plane::ControlPlane,
};
use crate::{
    agent::{Agent, SYNCED_WITHIN, Source},
    lab::{Lab, Node, Place, Shape},
    manifests::{Object, lab_node, lab_pod, service, slice},
    scene::TARGET,
    server::Server,
};

/// A change is live within milliseconds; a busy machine gets more.
const LIVE_WITHIN: Duration = Duration::from_secs(60);

/// The Service that shows how far the agents have come.
const BARRIER: &str = "zz-barrier";
const BARRIER_VIP: &str = "10.96.255.254";

/// The label that says where a node is.
const ZONE: &str = "topology.kubernetes.io/zone";

/// A cluster. Dropping it ends and removes all of it.
#[derive(Debug)]
pub struct Cluster {
    // In the order in which they go: nobody uses what has gone.
    agents: Vec<Option<Agent>>,
    servers: Vec<Server>,
    control: ControlPlane,
    kubeconfig: PathBuf,
    lab: Lab,
    barriers: Cell<u16>,
}

impl Cluster {
    /// Nodes with pods, their Node objects, and a synced agent on each. Every node is a zone of its own: `zone-1`, ...
    pub fn new(shape: Shape) -> Result<Self> {
        let mut cluster = Self::without_agents(shape)?;
        for node in 0..usize::from(shape.nodes) {
            cluster.spawn_agent(node)?;
        }
        for agent in cluster.agents.iter_mut().flatten() {
            agent.wait_synced(SYNCED_WITHIN)?;
        }
        Ok(cluster)
    }

    /// As [`Cluster::new`], before any agent starts.
    pub fn without_agents(shape: Shape) -> Result<Self> {
        let lab = Lab::with(shape)?;
        let control = ControlPlane::start(&lab)?;
        deploy(&control)?;
        let api = control.api();
        for (index, node) in lab.nodes().iter().enumerate() {
            let object = lab_node(node).label(ZONE, &format!("zone-{}", index + 1));
            api.create(&object)?;
            api.set_status(&object)?;
        }
        let (kubeconfig, _) = kubeconfig_with_token_file(&control, "agent", &token(&api, None)?)?;
        let agents = lab.nodes().iter().map(|_| None).collect();
        Ok(Self { agents, servers: Vec::new(), control, kubeconfig, lab, barriers: Cell::new(0) })
    }

    /// The lab.
    #[must_use]
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The control plane.
    #[must_use]
    pub fn control(&self) -> &ControlPlane {
        &self.control
    }

    /// The control plane, to stop and start parts of it.
    #[must_use]
    pub fn control_mut(&mut self) -> &mut ControlPlane {
        &mut self.control
    }

    /// The way to the API server.
    #[must_use]
    pub fn api(&self) -> Api {
        self.control.api()
    }

    /// A node, counted from 0.
    pub fn node(&self, node: usize) -> Result<&Node> {
        self.lab.node(node)
    }

    /// A pod of a node; both are counted from 0.
    pub fn place(&self, node: usize, pod: usize) -> Result<&Place> {
        self.node(node)?.pod(pod)
    }

    /// The agent of a node.
    pub fn agent(&self, node: usize) -> Result<&Agent> {
        let agent = self.agents.get(node).and_then(Option::as_ref);
        agent.with_context(|| format!("no agent runs on node {node}"))
    }

    /// The agent of a node, given away: to end it as the test likes.
    pub fn take_agent(&mut self, node: usize) -> Result<Agent> {
        let agent = self.agents.get_mut(node).and_then(Option::take);
        agent.with_context(|| format!("no agent runs on node {node}"))
    }

    /// Starts the agent of a node with the kubeconfig of the account, and does not wait.
    pub fn spawn_agent(&mut self, node: usize) -> Result<()> {
        let kubeconfig = self.kubeconfig.clone();
        self.spawn_agent_with(node, &Source::Kubeconfig(&kubeconfig), &[])
    }

    /// Starts the agent of a node with any source and more arguments, and does not wait.
    pub fn spawn_agent_with(&mut self, node: usize, source: &Source<'_>, arguments: &[&str]) -> Result<()> {
        let place = self.lab.node(node)?;
        let slot = self.agents.get_mut(node).context("no such node")?;
        ensure!(slot.is_none(), "an agent runs already on node {node}");
        *slot = Some(Agent::spawn_with(place, source, place.cgroup(), arguments)?);
        Ok(())
    }

    /// Waits until the agent of a node has synced.
    pub fn wait_synced(&mut self, node: usize) -> Result<()> {
        let agent = self.agents.get_mut(node).and_then(Option::as_mut).context("no agent runs")?;
        agent.wait_synced(SYNCED_WITHIN)
    }

    /// Starts a server at [`TARGET`] in every pod of every node; it answers with the place's name.
    pub fn serve(&mut self) -> Result<()> {
        for pod in self.lab.nodes().iter().flat_map(Node::pods) {
            self.servers.push(pod.serve(TARGET)?);
        }
        Ok(())
    }

    /// Starts the server of one pod again.
    pub fn serve_again(&mut self, node: usize, pod: usize) -> Result<()> {
        let server = self.place(node, pod)?.serve(TARGET)?;
        self.servers.push(server);
        Ok(())
    }

    /// Ends the server of one place, with its connections: its process has gone.
    pub fn stop_serving(&mut self, name: &str) {
        self.servers.retain(|server| server.name() != name);
    }

    /// The Pod object of a pod of the lab: with the label `app`, named after its place, running and ready.
    pub fn pod(&self, app: &str, node: usize, pod: usize) -> Result<Object> {
        let (node, place) = (self.node(node)?, self.place(node, pod)?);
        Ok(lab_pod(place.name(), app, node, place).set("spec.containers.0.image", "none"))
    }

    /// Makes a Pod object and says how it is, as the kubelet would.
    pub fn run(&self, pod: &Object) -> Result<()> {
        self.api().create(pod)?;
        self.api().set_status(pod).map(drop)
    }

    /// Runs pods of the lab, given as (node, pod).
    pub fn run_pods(&self, app: &str, pods: &[(usize, usize)]) -> Result<()> {
        pods.iter().try_for_each(|(node, pod)| self.run(&self.pod(app, *node, *pod)?))
    }

    /// The endpoints that the slices of a Service have now, as the API server has them, with port and state.
    pub fn endpoints(&self, namespace: &str, service: &str) -> Result<Vec<Value>> {
        let path = format!(
            "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices?labelSelector=kubernetes.io%2Fservice-name%3D{service}"
        );
        let slices = self.api().get_path(&path)?;
        let slices = slices["items"].as_array().context("a list without items")?;
        let endpoints = slices.iter().flat_map(|slice| {
            let endpoints = slice["endpoints"].as_array().map(Vec::as_slice).unwrap_or_default();
            endpoints.iter().map(|endpoint| {
                json!({"slice": slice["metadata"]["name"], "ports": slice["ports"], "endpoint": endpoint})
            })
        });
        Ok(endpoints.collect())
    }

    /// Waits until every Service and every slice that was given to the API server before is in the kernel of every node
    /// with an agent: each kind comes in its order, so it is when a Service and a slice of now are. What controllers
    /// make of Services and Pods comes later; for that see [`crate::scene::eventually`].
    pub fn settle(&self) -> Result<()> {
        let number = self.barriers.get() + 1;
        self.barriers.set(number);
        let name = format!("b{number}");
        let wanted = [format!("{BARRIER}:{name}/"), format!("10.244.255.1:{number}")];
        self.api().apply(&service(BARRIER, &[BARRIER_VIP]).port(&name, "TCP", number, number))?;
        let endpoint = slice(BARRIER, BARRIER, "IPv4").slice_port(&name, "TCP", number);
        self.api().apply(&endpoint.endpoint("10.244.255.1", "elsewhere"))?;
        let deadline = Instant::now() + LIVE_WITHIN;
        for agent in self.agents.iter().flatten() {
            loop {
                let output = agent.ask(&["get", "services", "-o", "json"])?;
                let text = String::from_utf8_lossy(&output.stdout);
                if wanted.iter().all(|wanted| text.contains(wanted)) {
                    break;
                }
                if Instant::now() > deadline {
                    bail!("an agent did not take a change; its log ends:\n{}", agent.log_tail());
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    /// Waits until a line of an agent's log has all of these words; the log is of all agents that ran on the node.
    pub fn wait_logged(&self, node: usize, words: &[&str]) -> Result<String> {
        let log = self.node(node)?.directory().join("agent.log");
        let deadline = Instant::now() + SYNCED_WITHIN;
        loop {
            let text = std::fs::read_to_string(&log).with_context(|| format!("reading {}", log.display()))?;
            let found = text.lines().find(|line| words.iter().all(|word| line.contains(word)));
            if let Some(line) = found {
                return Ok(line.to_owned());
            }
            if Instant::now() > deadline {
                bail!("no line with {words:?} within {SYNCED_WITHIN:?} in:\n{text}");
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}
