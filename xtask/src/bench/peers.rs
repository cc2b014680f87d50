//! kube-proxy, in worlds like ours: one API server for all of them, each in a namespace of its own.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sheave_tests::{
    cgroup,
    kubernetes::{
        control_plane::ControlPlane,
        kube_proxy::{KubeProxy, Mode},
    },
    lab::{Lab, Node, Shape},
    manifests::lab_node,
};

use super::{
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
        plane.store(scale.objects().map(|object| {
            let text = |pointer| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
            let kind = if text("/kind") == "Service" { "services/specs" } else { "endpointslices" };
            (format!("{kind}/{}/{}", text("/metadata/namespace"), text("/metadata/name")), object)
        }))?;
        Ok(Self { plane, _lab: lab })
    }

    /// The control plane.
    pub(crate) fn plane(&self) -> &ControlPlane {
        &self.plane
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
        let vips = self.world.scale.vips(super::scale::Family::V4);
        let client = self.world.client();
        client
            .await_answers(client.targets(vips)?, SYNCED_WITHIN)
            .with_context(|| format!("kube-proxy, {}", self.mode.name()))?;
        self.proxy.check()?;
        Ok(started.elapsed())
    }

    /// Stops kube-proxy, or lets it go on.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<()> {
        cgroup::freeze(self.proxy.cgroup(), frozen)
    }
}
