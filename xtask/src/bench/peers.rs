//! kube-proxy, in worlds like ours: one API server for all of them, each in a namespace of its own.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sheave_tests::{
    cgroup,
    client::Client,
    kubernetes::{
        control_plane::ControlPlane,
        kube_proxy::{KubeProxy, Mode},
    },
    lab::{Lab, Node, Shape},
    manifests::lab_node,
    measure::All,
};

use super::{
    go_on,
    scale::{CLUSTER_CIDR, NAMESPACE, Scale},
    world::World,
};

/// What kube-proxy may take for the largest size on a busy machine.
const SYNCED_WITHIN: Duration = Duration::from_secs(1800);

/// An API server that has the objects of a scale.
pub(crate) struct Hub {
    // In the order in which they go.
    plane: ControlPlane,
    _lab: Lab,
}

impl Hub {
    /// Starts it and fills it.
    pub(crate) fn new(scale: &Scale) -> Result<Self> {
        let lab = Lab::with(Shape { nodes: 0, pods: 0 })?;
        let plane = ControlPlane::start(&lab)?;
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}, "status": {"phase": "Active"}});
        plane.store([(format!("namespaces/{NAMESPACE}"), namespace)])?;
        let objects = scale.objects().chain(Scale::tools()).take_while(|_| go_on().is_ok());
        plane.store(objects.map(|object| {
            let text = |pointer| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
            let kind = if text("/kind") == "Service" { "services/specs" } else { "endpointslices" };
            (format!("{kind}/{}/{}", text("/metadata/namespace"), text("/metadata/name")), object)
        }))?;
        go_on()?;
        Ok(Self { plane, _lab: lab })
    }

    /// The control plane.
    pub(crate) fn plane(&self) -> &ControlPlane {
        &self.plane
    }

    /// The control plane, to take parts of it away.
    pub(crate) fn plane_mut(&mut self) -> &mut ControlPlane {
        &mut self.plane
    }

    /// Has a node's object in the API server, and the API server in its reach. Every world's node has the same name.
    pub(crate) fn admit(&self, node: &Node, number: u8) -> Result<PathBuf> {
        self.plane.store([(format!("minions/{}", node.name()), lab_node(node).json().clone())])?;
        self.plane.join(node, number)
    }

    /// Stops the processes of the control plane, or lets them go on.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<()> {
        cgroup::freeze(self.plane.machine().cgroup(), frozen)
    }
}

/// How long is waited before somebody looks whether to go on.
const LOOK: Duration = Duration::from_secs(2);

/// A world with a kube-proxy.
pub(crate) struct Peer {
    proxy: KubeProxy,
    /// How it programs the kernel.
    pub(crate) mode: Mode,
    /// Where it is.
    pub(crate) world: World,
}

impl Peer {
    /// Starts kube-proxy in a world that has none; `number` differs by world.
    pub(crate) fn start(hub: &Hub, world: World, number: u8, mode: Mode) -> Result<Self> {
        let node = world.node()?;
        let kubeconfig = hub.admit(node, number)?;
        let proxy = KubeProxy::start(node, &kubeconfig, mode, CLUSTER_CIDR, 1000)?;
        Ok(Self { proxy, mode, world })
    }

    /// Waits until its Services answer; returns how long that took.
    pub(crate) fn await_synced(&mut self, started: Instant) -> Result<Duration> {
        let client = self.world.client();
        let targets = client.targets(self.world.scale.vips(super::scale::Family::V4))?;
        await_all_answer(client, targets, SYNCED_WITHIN, || self.proxy.check())
            .with_context(|| format!("kube-proxy, {}", self.mode.name()))?;
        Ok(started.elapsed())
    }

    /// Stops kube-proxy, or lets it go on.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<()> {
        cgroup::freeze(self.proxy.cgroup(), frozen)
    }
}

/// Waits until all destinations answer, and looks meanwhile whether there is still something to wait for.
pub(crate) fn await_all_answer(
    client: &Client,
    targets: u64,
    within: Duration,
    mut check: impl FnMut() -> Result<()>,
) -> Result<All> {
    let begun = Instant::now();
    loop {
        match client.await_answers(targets, LOOK) {
            Ok(all) => return Ok(all),
            Err(error) if begun.elapsed() > within => return Err(error),
            Err(_) => go_on().and_then(|()| check())?,
        }
    }
}
