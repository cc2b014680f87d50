//! The agent's part in the fast path: it ends the epoch when routes, devices or rules change, so that every packet goes
//! through the stack again until that has let it pass.
//!
//! What gives no notice (rules of iptables, sets of addresses, neighbours) is found when the stack's word ends, a second
//! after it was given (`Lane::LEASE_NS` in `proxy_common`). That needs no agent.

use std::future::pending;
use std::io;
use std::path::Path;
use std::time::Duration;

use aya::maps::{Array, Map, MapData};
use nix::sys::socket::SockProtocol;

use crate::kernel::table::io_error;
use crate::kernel::{self, Pins, programs::EPOCH, programs::open_pinned};
use crate::source::notices::{Notices, REST};

/// Connection tracking must take a connection for valid though it has not seen most of its packets.
const LIBERAL: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";

/// How often that is looked after: the kernel may get connection tracking at any time.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// linux/rtnetlink.h: `RTNLGRP_LINK`, `_IPV4_ROUTE`, `_IPV4_RULE`, `_IPV6_ROUTE`, `_IPV6_RULE`, `_NEXTHOP`.
const ROUTE_GROUPS: [u32; 6] = [1, 7, 8, 11, 19, 32];
/// linux/netfilter/nfnetlink.h: `NFNLGRP_NFTABLES`.
const RULE_GROUPS: [u32; 1] = [7];

/// Why routes and rules cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No notices of changes.
    #[error("cannot get notices of changed routes and rules from the kernel (netlink socket)")]
    Notices(#[source] io::Error),
    /// `EPOCH` cannot be written.
    #[error("cannot end what the fast path has learned")]
    Epoch(#[source] io::Error),
}

/// See the module.
pub struct Watch {
    epoch: Array<MapData, u32>,
    /// Whether packets may skip the stack; `None`: what a former run said.
    is_on: Option<bool>,
}

impl Watch {
    /// Opens what [`kernel::Loaded::prepare`] pinned.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn open(pins: &Pins) -> Result<Self, kernel::Error> {
        let error = |source| kernel::Error::Map { map: EPOCH, source };
        let epoch = Map::from_map_data(open_pinned(&pins.state(), EPOCH)?).map_err(error)?;
        Ok(Self { epoch: epoch.try_into().map_err(error)?, is_on: None })
    }

    /// Ends epochs for ever.
    ///
    /// # Errors
    /// If changes cannot be followed at all.
    pub async fn run(mut self) -> Result<(), Error> {
        let routes = Notices::of(SockProtocol::NetlinkRoute, mask(&ROUTE_GROUPS)).map_err(Error::Notices)?;
        // A kernel without nftables has no such family, and no such rules.
        let rules = Notices::of(SockProtocol::NetlinkNetFilter, mask(&RULE_GROUPS)).ok();
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                result = routes.next() => result.map_err(Error::Notices)?,
                result = next(rules.as_ref()) => result.map_err(Error::Notices)?,
                _ = look.tick() => {
                    let is_on = Some(liberal());
                    if is_on == self.is_on {
                        continue;
                    }
                    self.is_on = is_on;
                }
            }
            self.end().map_err(Error::Epoch)?;
            tokio::time::sleep(REST).await;
        }
    }

    /// Epochs have any numbers but 0, in which nothing skips the stack.
    fn end(&mut self) -> io::Result<()> {
        let next = if self.is_on == Some(true) {
            // Of a former run there may be lanes still.
            self.epoch.get(&0, 0).map_err(io_error)?.wrapping_add(1).max(1)
        } else {
            0
        };
        self.epoch.set(0, next, 0).map_err(io_error)
    }
}

/// A bit for each group.
fn mask(groups: &[u32]) -> u32 {
    groups.iter().fold(0, |mask, group| mask | 1 << (group - 1))
}

async fn next(notices: Option<&Notices>) -> io::Result<()> {
    match notices {
        Some(notices) => notices.next().await,
        None => pending().await,
    }
}

/// Whether connection tracking, if there is any, does without what it does not see. Said once if it cannot be made to.
fn liberal() -> bool {
    let path = Path::new(LIBERAL);
    match std::fs::read_to_string(path) {
        Ok(value) if value.trim() == "1" => return true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return true,
        Ok(_) | Err(_) => {}
    }
    match std::fs::write(path, "1") {
        Ok(()) => {
            tracing::info!(path = LIBERAL, "set to 1 for the fast path");
            true
        }
        Err(error) => {
            tracing::warn!(path = LIBERAL, %error, "cannot be set to 1: no fast path");
            false
        }
    }
}
