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
use proxy_common::abi::{AffinityEntry, AffinityKey, AffinitySlot, ClientKey, ServiceId};
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

/// Where session affinity sends `client`, if it has a live entry for this record. A hook knows a client by its network
/// namespace, the packet path by its address: whichever was used last counts.
pub(super) fn of(pins: &Pins, service: ServiceId, client: IpAddr) -> Result<Option<AffinityView>> {
    let Some(kernel) = Kernel::open(pins).context("open the tables")? else { return Ok(None) };
    let word = kernel.record(service).affinity;
    if word.timeout_s() == 0 {
        return Ok(None);
    }
    let map = programs::open_pinned(&pins.state(), "AFFINITY").context("open the affinity table")?;
    let map: HashMap<MapData, AffinityKey, AffinityEntry> =
        Map::from_map_data(map).and_then(TryInto::try_into).context("use the affinity table")?;
    let cookies = netns_cookies(client).into_iter().map(ClientKey::netns);
    let now_ns = std::time::Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_nanos();
    let mut best: Option<(AffinitySlot, u64)> = None;
    for key in cookies.chain([ClientKey::address(client.into())]) {
        let entry = match map.get(&AffinityKey::new(service, key), 0) {
            Ok(entry) => entry,
            Err(MapError::KeyNotFound) => continue,
            Err(error) => return Err(error).context("read the affinity table"),
        };
        if entry.epoch != word.epoch() {
            continue;
        }
        for slot in [entry.cluster, entry.local] {
            let age_ns = now_ns.saturating_sub(u128::from(slot.renewed_ns));
            let age_s = u64::try_from(age_ns / 1_000_000_000).unwrap_or(u64::MAX);
            let left_s = u64::from(word.timeout_s()).saturating_sub(age_s);
            let alive = left_s > 0 && kernel.backend(slot.backend.index()).is(slot.backend);
            if alive && best.is_none_or(|(known, _)| known.renewed_ns < slot.renewed_ns) {
                best = Some((slot, left_s));
            }
        }
    }
    Ok(best.map(|(slot, expires_in_seconds)| {
        let backend = kernel.backend(slot.backend.index());
        let endpoint = SocketAddr::new(backend.address.ip(), backend.port.number()).to_string();
        AffinityView { endpoint, expires_in_seconds }
    }))
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
