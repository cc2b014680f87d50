//! The tables in symbols instead of numbers: what `sheave get` shows of the kernel, and what scenario tests compare.

use std::collections::BTreeMap;
use std::io;

use proxy_common::abi::{AffinityWord, Origin, Protocol, ServiceId, SetWord, WhenEmpty, WhichSet};
use serde::Serialize;

use crate::dataplane::Dataplane;

/// One service port's record with all that points to it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Record {
    /// Place in `SERVICES`.
    pub service_id: ServiceId,
    /// Name, if an agent was there to tell.
    pub service: Option<String>,
    /// `ADDRESS:PORT/PROTOCOL kind`, and which origins get the local set. Sorted.
    pub frontends: Vec<String>,
    /// Cluster set.
    pub cluster_set: Option<Vec<String>>,
    /// Local set.
    pub local_set: Option<Vec<String>>,
    /// Backends of no set that still serve.
    pub draining: Vec<String>,
    /// `reject` or `drop`: what an empty set means.
    pub when_empty: Option<&'static str>,
    /// Seconds.
    pub session_affinity_seconds: Option<u32>,
}

/// One backend.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct BackendRow {
    /// Place in `BACKENDS`.
    pub index: u32,
    /// Tenant of that place.
    pub generation: u32,
    /// `ip:port`.
    pub address: String,
    /// Whether it serves.
    pub serving: bool,
    /// The record that it belongs to.
    pub service_id: ServiceId,
    /// Its name, if an agent was there to tell.
    pub service: Option<String>,
    /// `cluster`, `local`, `draining`.
    pub sets: Vec<&'static str>,
}

/// All records that a frontend points to, by id.
///
/// # Errors
/// If the frontends cannot be read.
pub fn records(dataplane: &impl Dataplane, names: &BTreeMap<ServiceId, String>) -> io::Result<Vec<Record>> {
    let mut by_service: BTreeMap<ServiceId, Vec<String>> = BTreeMap::new();
    for (key, value) in dataplane.frontends()? {
        let address = std::net::SocketAddr::new(key.address().ip(), key.port().number());
        let protocol = Protocol::from_number(key.protocol()).map_or("?", Protocol::name);
        let kind = value.kind().map_or("?", |kind| kind.name());
        let mut text = format!("{address}/{protocol} {kind}");
        for (origin, name) in Origin::ALL.into_iter().zip(["node", "pod", "elsewhere"]) {
            if value.set_for(origin) == WhichSet::Local {
                text.push_str(" local-for-");
                text.push_str(name);
            }
        }
        if value.has_source_ranges() {
            text.push_str(" source-ranges");
        }
        by_service.entry(value.service()).or_default().push(text);
    }
    let record = |(service_id, mut frontends): (ServiceId, Vec<String>)| {
        frontends.sort();
        let record = dataplane.record(service_id);
        Record {
            service_id,
            service: names.get(&service_id).cloned(),
            frontends,
            cluster_set: set(dataplane, record.cluster),
            local_set: set(dataplane, record.local),
            draining: set(dataplane, record.draining).unwrap_or_default(),
            when_empty: when_empty(record.cluster).or(when_empty(record.local)),
            session_affinity_seconds: timeout(record.affinity),
        }
    };
    Ok(by_service.into_iter().map(record).collect())
}

/// All backends of those records, by service id and address.
///
/// # Errors
/// If the frontends cannot be read.
pub fn backends(
    dataplane: &impl Dataplane,
    names: &BTreeMap<ServiceId, String>,
) -> io::Result<Vec<BackendRow>> {
    let mut services: Vec<ServiceId> =
        dataplane.frontends()?.iter().map(|(_, value)| value.service()).collect();
    services.sort_unstable();
    services.dedup();
    let mut rows: BTreeMap<(ServiceId, u32), BackendRow> = BTreeMap::new();
    for service_id in services {
        let record = dataplane.record(service_id);
        for (set, name) in
            [(record.cluster, "cluster"), (record.local, "local"), (record.draining, "draining")]
        {
            for slot in set.first()..set.first().saturating_add(set.count()) {
                let id = dataplane.slot(slot);
                let backend = dataplane.backend(id.index());
                let row = rows.entry((service_id, id.index())).or_insert_with(|| BackendRow {
                    index: id.index(),
                    generation: id.generation(),
                    address: address(dataplane, slot),
                    serving: backend.is_serving(),
                    service_id,
                    service: names.get(&service_id).cloned(),
                    sets: Vec::new(),
                });
                row.sets.push(name);
            }
        }
    }
    Ok(rows.into_values().collect())
}

fn set(dataplane: &impl Dataplane, set: SetWord) -> Option<Vec<String>> {
    set.when_empty()?;
    let slots = set.first()..set.first().saturating_add(set.count());
    let mut backends: Vec<String> = slots.map(|slot| address(dataplane, slot)).collect();
    backends.sort();
    Some(backends)
}

/// A stale id shows, it is not resolved to whoever lives there now.
fn address(dataplane: &impl Dataplane, slot: u32) -> String {
    let id = dataplane.slot(slot);
    let backend = dataplane.backend(id.index());
    if backend.is(id) {
        std::net::SocketAddr::new(backend.address.ip(), backend.port.number()).to_string()
    } else {
        format!("stale backend {}.{}", id.index(), id.generation())
    }
}

const fn when_empty(set: SetWord) -> Option<&'static str> {
    match set.when_empty() {
        Some(WhenEmpty::Reject) => Some("reject"),
        Some(WhenEmpty::Drop) => Some("drop"),
        None => None,
    }
}

const fn timeout(word: AffinityWord) -> Option<u32> {
    match word.timeout_s() {
        0 => None,
        seconds => Some(seconds),
    }
}
