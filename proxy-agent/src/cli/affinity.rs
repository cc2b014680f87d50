//! The affinity entry of one client, from the live maps.

use std::collections::HashSet;
use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result};
use aya::maps::{HashMap, Map, MapData, MapError};
use nix::sched::{CloneFlags, setns};
use nix::time::{ClockId, clock_gettime};
use proxy_common::abi::{AffinityEntry, AffinityKey, AffinitySlot, ClientKey, Origin, ServiceId, WhichSet};
use serde::Serialize;

use crate::dataplane::Dataplane;
use crate::dataplane::bpf::Kernel;
use crate::kernel::{Pins, netns_cookie, programs};

/// Where session affinity sends a client, as `cli-json.md` has it.
#[derive(Serialize)]
pub(super) struct AffinityView {
    /// `ip:port`.
    pub(super) endpoint: String,
    /// Until the entry is dead (A3).
    pub(super) expires_in_seconds: u64,
}

/// Whom affinity is asked about.
pub(super) struct Client {
    /// Its address.
    pub(super) address: IpAddr,
    /// Where it is, by the rules: as a hook sees it.
    pub(super) origin: Origin,
}

/// Where session affinity sends a client that is served from the set `which`, if it has an entry that counts: alive, and in
/// that set (A4). A hook knows a client by its network namespace, the packet path by its address: if it has entries as
/// both, whichever was used last is shown.
pub(super) fn of(
    pins: &Pins,
    service: ServiceId,
    which: WhichSet,
    client: &Client,
) -> Result<Option<AffinityView>> {
    let Some(kernel) = Kernel::open(pins).context("open the tables")? else { return Ok(None) };
    let word = kernel.record(service).affinity;
    if word.timeout_s() == 0 {
        return Ok(None);
    }
    let map = programs::open_pinned(&pins.state(), "AFFINITY").context("open the affinity table")?;
    let map: HashMap<MapData, AffinityKey, AffinityEntry> =
        Map::from_map_data(map).and_then(TryInto::try_into).context("use the affinity table")?;
    let now_ns = std::time::Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_nanos();
    let mut best: Option<(u64, AffinityView)> = None;
    for key in keys(client) {
        let entry = match map.get(&AffinityKey::new(service, key), 0) {
            Ok(entry) => entry,
            Err(MapError::KeyNotFound) => continue,
            Err(error) => return Err(error).context("read the affinity table"),
        };
        if !entry.is_of(service) || entry.epoch != word.epoch() {
            continue;
        }
        let (this, other) = entry.slots(which);
        let usable = |slot: AffinitySlot| {
            let age_ns = now_ns.saturating_sub(u128::from(slot.renewed_ns));
            let age_s = u64::try_from(age_ns / 1_000_000_000).unwrap_or(u64::MAX);
            let left_s = u64::from(word.timeout_s()).saturating_sub(age_s);
            let backend = kernel.backend(slot.backend.index());
            let counts = left_s > 0 && backend.is(slot.backend) && backend.is_in(which);
            let endpoint = SocketAddr::new(backend.address.ip(), backend.port.number()).to_string();
            counts.then_some((slot.renewed_ns, AffinityView { endpoint, expires_in_seconds: left_s }))
        };
        let found = usable(this).or_else(|| usable(other));
        best = best.into_iter().chain(found).max_by_key(|(renewed_ns, _)| *renewed_ns);
    }
    Ok(best.map(|(_, view)| view))
}

/// Under what a client may be known. The node is one namespace, this one; every namespace has a loopback address.
fn keys(client: &Client) -> Vec<ClientKey> {
    let cookies = match client.origin {
        Origin::Node => netns_cookie().into_iter().collect(),
        Origin::Pod => netns_cookies(client.address),
        Origin::Elsewhere => Vec::new(),
    };
    let address = ClientKey::address(client.address.into());
    cookies.into_iter().map(ClientKey::netns).chain([address]).collect()
}

/// Cookies of the network namespaces on this machine that have this address on an interface.
fn netns_cookies(address: IpAddr) -> Vec<u64> {
    let mut seen = HashSet::new();
    let mut cookies = Vec::new();
    for path in namespaces() {
        let Ok(file) = File::open(path) else { continue };
        let Ok(inode) = file.metadata().map(|metadata| metadata.ino()) else { continue };
        if !seen.insert(inode) {
            continue;
        }
        // setns moves a thread; this one lives for one question.
        let asked = thread::spawn(move || {
            setns(&file, CloneFlags::CLONE_NEWNET).ok()?;
            let mut addresses = nix::ifaddrs::getifaddrs().ok()?;
            let has = addresses.any(|interface| {
                let storage = interface.address;
                let v4 = storage.as_ref().and_then(|s| s.as_sockaddr_in()).map(|s| IpAddr::V4(s.ip()));
                let v6 = storage.as_ref().and_then(|s| s.as_sockaddr_in6()).map(|s| IpAddr::V6(s.ip()));
                v4.or(v6) == Some(address)
            });
            if has { netns_cookie() } else { None }
        });
        cookies.extend(asked.join().ok().flatten());
    }
    cookies
}

/// Of every process, and those that are only mounted, as container runtimes keep them.
fn namespaces() -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for directory in ["/run/netns", "/var/run/netns"] {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        paths.extend(entries.map(|entry| entry.path()));
    }
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    paths.extend(processes.map(|entry| entry.path().join("ns/net")));
    paths
}
