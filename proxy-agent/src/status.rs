//! What `sheave status` shows of a running agent.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::agent::Config;
use crate::model::Model;
use crate::object::{ObjectKey, Problem};
use crate::packet::{DeviceView, PacketPath};

/// Counts and times, kept by the agent's loop.
#[derive(Debug)]
pub struct Status {
    node_name: String,
    cgroup: String,
    adopted_frontends: usize,
    frontends: usize,
    /// Whether the first, full sync is done.
    pub synced: bool,
    /// Writes since the start.
    pub writes: usize,
    syncs: u64,
    last_sync: Option<(SystemTime, Duration)>,
}

/// The document.
#[derive(Serialize)]
pub struct StatusView<'a> {
    synced: bool,
    node: &'a str,
    node_found: bool,
    cgroup: &'a str,
    services: usize,
    frontends: usize,
    adopted_frontends: usize,
    syncs: u64,
    writes: usize,
    last_sync_unix_seconds: Option<u64>,
    last_sync_microseconds: Option<u64>,
    /// Services that are not programmed as wanted, with the reason.
    failed: BTreeMap<String, &'a str>,
    problems: &'a [Problem],
    /// `None`: it is off.
    packet_path: Option<PacketView<'a>>,
}

/// The packet path's part of it.
#[derive(Serialize)]
struct PacketView<'a> {
    devices: Vec<DeviceView>,
    /// How programs are put on devices.
    hooks: &'static str,
    /// Connections whose clients had not gone on and that gave way to newer ones, since the agent started.
    young_flows_given_way: u64,
    /// What could not be done, with the reason.
    failed: &'a BTreeMap<String, String>,
}

impl Status {
    /// Of an agent that starts.
    pub fn new(config: &Config, adopted_frontends: usize) -> Self {
        Self {
            node_name: config.node_name.clone(),
            cgroup: config.cgroup.display().to_string(),
            adopted_frontends,
            frontends: adopted_frontends,
            synced: false,
            writes: 0,
            syncs: 0,
            last_sync: None,
        }
    }

    /// Counts a sync.
    pub fn synced(&mut self, writes: usize, took: Duration, frontends: usize) {
        self.writes += writes;
        self.syncs += 1;
        self.frontends = frontends;
        self.last_sync = Some((SystemTime::now(), took));
    }

    /// The document.
    pub fn view<'a>(
        &'a self,
        model: &Model,
        failed: &'a BTreeMap<ObjectKey, String>,
        problems: &'a [Problem],
        packets: Option<&'a PacketPath>,
    ) -> StatusView<'a> {
        let unix =
            |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        StatusView {
            synced: self.synced,
            node: &self.node_name,
            node_found: model.context().node.is_some(),
            cgroup: &self.cgroup,
            services: model.services().count(),
            frontends: self.frontends,
            adopted_frontends: self.adopted_frontends,
            syncs: self.syncs,
            writes: self.writes,
            last_sync_unix_seconds: self.last_sync.map(|(at, _)| unix(at)),
            last_sync_microseconds: self
                .last_sync
                .map(|(_, took)| u64::try_from(took.as_micros()).unwrap_or(u64::MAX)),
            failed: failed.iter().map(|(key, error)| (key.to_string(), error.as_str())).collect(),
            problems,
            packet_path: packets.map(|packets| PacketView {
                devices: packets.device_views(),
                hooks: packets.hooks().name(),
                young_flows_given_way: packets.given_way(),
                failed: packets.failed(),
            }),
        }
    }
}
