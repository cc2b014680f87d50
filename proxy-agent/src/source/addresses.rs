//! The addresses of this node's interfaces, followed by netlink (N4).

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockaddrStorage;
use tokio::sync::mpsc::UnboundedSender;
use tracing::warn;

use super::notices::{Notices, REST};
use crate::object::{Batch, Change};

/// Why own addresses cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The interfaces cannot be listed.
    #[error("cannot list the addresses of this node's interfaces (getifaddrs)")]
    List(#[source] io::Error),
    /// No notices of changes.
    #[error("cannot get notices of address changes from the kernel (route netlink socket)")]
    Notices(#[source] io::Error),
}

/// All addresses on interfaces of this network namespace, sorted, without loopback ones.
pub fn read() -> io::Result<Vec<IpAddr>> {
    let addresses: BTreeSet<IpAddr> = getifaddrs()?
        .filter_map(|interface| interface.address.as_ref().and_then(ip))
        .filter(|ip| !ip.is_loopback())
        .collect();
    Ok(addresses.into_iter().collect())
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
}

/// Sends all addresses, then again whenever they differ, until `tx` is closed.
pub async fn run(tx: UnboundedSender<Batch>) -> Result<(), Error> {
    // Listen first, read then: a change in between is read twice rather than missed.
    let notices = Notices::new().map_err(Error::Notices)?;
    let mut last = read().map_err(Error::List)?;
    if tx.send(vec![Change::OwnAddresses(last.clone())]).is_err() {
        return Ok(());
    }
    loop {
        tokio::select! {
            () = tx.closed() => return Ok(()),
            result = notices.next() => result.map_err(Error::Notices)?,
        }
        match read() {
            Ok(addresses) if addresses == last => {}
            Ok(addresses) => {
                if tx.send(vec![Change::OwnAddresses(addresses.clone())]).is_err() {
                    return Ok(());
                }
                last = addresses;
            }
            // Not knowing is no reason to give up addresses; the next notice tries again.
            Err(error) => warn!(%error, "cannot list own addresses; the last known ones stay in use"),
        }
        tokio::time::sleep(REST).await;
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use nix::sched::{CloneFlags, unshare};
    use tokio::sync::mpsc;

    use super::*;

    #[test]
    fn loopback_addresses_are_left_out() {
        let addresses = read().unwrap();
        assert!(addresses.iter().all(|ip| !ip.is_loopback()), "{addresses:?}");
        assert!(addresses.is_sorted(), "{addresses:?}");
    }

    /// N4, in a network namespace of its own.
    #[test]
    fn n4_address_changes_are_followed() {
        // A thread of its own, because a network namespace is a thread's.
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own, which needs root");
            let ip = |arguments: &str| Command::new("ip").args(arguments.split(' ')).status().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (tx, mut rx) = mpsc::unbounded_channel();
                let task = tokio::spawn(run(tx));
                let mut next = async || {
                    tokio::time::timeout(Duration::from_secs(10), rx.recv())
                        .await
                        .expect("no change")
                        .unwrap()
                };
                assert_eq!(next().await, [Change::OwnAddresses(vec![])]);
                assert!(ip("link set lo up").success());
                assert!(ip("addr add 192.0.2.1/32 dev lo").success());
                assert_eq!(next().await, [Change::OwnAddresses(vec!["192.0.2.1".parse().unwrap()])]);
                assert!(ip("addr add 2001:db8::1/128 dev lo nodad").success());
                let both = vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
                assert_eq!(next().await, [Change::OwnAddresses(both)]);
                assert!(ip("addr del 192.0.2.1/32 dev lo").success());
                assert_eq!(next().await, [Change::OwnAddresses(vec!["2001:db8::1".parse().unwrap()])]);
                drop(rx);
                task.await.unwrap().unwrap();
            });
        });
        thread.join().unwrap();
    }
}
