//! The devices of this network namespace and their addresses, followed by netlink.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use tokio::sync::watch::Sender;
use tracing::warn;

use super::notices::{Notices, REST};
use crate::netlink::{self, Netlink, attributes};

/// linux/rtnetlink.h: RTEXT_FILTER_SKIP_STATS.
const SKIP_STATS: u32 = 8;

/// Address flags (linux/if_addr.h) that keep an address from being chosen as a source: secondary (or temporary, IPv6),
/// deprecated, tentative, found to be somebody else's.
const UNUSABLE: u32 =
    libc::IFA_F_SECONDARY | libc::IFA_F_DEPRECATED | libc::IFA_F_TENTATIVE | libc::IFA_F_DADFAILED;

/// Why devices cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// They cannot be listed.
    #[error("cannot list this node's network devices (route netlink)")]
    List(#[source] io::Error),
    /// No notices of changes.
    #[error("cannot get notices of device changes from the kernel (route netlink socket)")]
    Notices(#[source] io::Error),
}

/// A network device.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// `ARPHRD_*`: which header its frames have.
    pub hardware: u16,
    /// Whether it is a loopback device.
    pub loopback: bool,
    /// Whether somebody has set it up.
    pub up: bool,
    /// What the kernel calls its kind: `veth`, `bridge`, `vxlan`; empty for hardware.
    pub kind: String,
    /// Interface index of the bridge, bond or VRF that it belongs to; 0: none.
    pub master: u32,
    /// Hardware address, which tells a device from another that got its index.
    pub mac: Vec<u8>,
    /// Addresses that may be the source of what leaves by it, in the kernel's order: of global scope, primary, usable.
    pub addresses: Vec<IpAddr>,
}

impl Link {
    /// Whether both are one device, as far as can be told.
    pub fn is_same(&self, other: &Self) -> bool {
        (self.index, self.hardware, &self.kind, &self.mac)
            == (other.index, other.hardware, &other.kind, &other.mac)
    }
}

/// All devices of this thread's network namespace, by index.
///
/// # Errors
/// If the kernel does not answer.
pub fn read() -> io::Result<Vec<Link>> {
    let mut links: BTreeMap<u32, Link> = BTreeMap::new();
    let mut request = [0; 24];
    // After an empty `struct ifinfomsg`: attribute IFLA_EXT_MASK, whose counters nobody needs here.
    request[16..18].copy_from_slice(&8u16.to_ne_bytes());
    request[18..20].copy_from_slice(&libc::IFLA_EXT_MASK.to_ne_bytes());
    request[20..24].copy_from_slice(&SKIP_STATS.to_ne_bytes());
    // What disturbs a dump gives notice, which starts the next one.
    let route = Netlink::open(netlink::Family::NetlinkRoute)?;
    links.extend(
        route.dump(libc::RTM_GETLINK, &request, |message| Some((word(message, 4)?, link(message)?)))?,
    );
    for (index, address) in route.dump(libc::RTM_GETADDR, &[0; 8], address)? {
        if let Some(link) = links.get_mut(&index) {
            link.addresses.push(address);
        }
    }
    Ok(links.into_values().collect())
}

/// Keeps `tx` equal to the list of devices until nobody looks at it any more.
///
/// # Errors
/// If devices cannot be listed at first, or not be followed.
pub async fn run(tx: Sender<Option<Vec<Link>>>) -> Result<(), Error> {
    // Listen first, read then: a change in between is read twice rather than missed.
    let notices = Notices::new().map_err(Error::Notices)?;
    tx.send_replace(Some(read().map_err(Error::List)?));
    loop {
        tokio::select! {
            () = tx.closed() => return Ok(()),
            result = notices.next() => result.map_err(Error::Notices)?,
        }
        match read() {
            Ok(links) => {
                tx.send_if_modified(|last| {
                    let modified = last.as_ref() != Some(&links);
                    *last = Some(links);
                    modified
                });
            }
            // The next notice tries again.
            Err(error) => warn!(%error, "cannot list network devices; the last known ones stay in use"),
        }
        tokio::time::sleep(REST).await;
    }
}

/// Of an answer with a `struct ifinfomsg`: family, padding, type, index, flags, change mask; then attributes.
fn link(message: &[u8]) -> Option<Link> {
    let index = word(message, 4)?;
    let flags = word(message, 8)?;
    let mut link = Link {
        index,
        hardware: u16::from_ne_bytes(message.get(2..4)?.try_into().ok()?),
        loopback: flags & libc::IFF_LOOPBACK.unsigned_abs() != 0,
        up: flags & libc::IFF_UP.unsigned_abs() != 0,
        ..Link::default()
    };
    for (kind, value) in attributes(message.get(16..)?) {
        match kind {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_ADDRESS => link.mac = value.to_vec(),
            libc::IFLA_MASTER => link.master = word(value, 0)?,
            libc::IFLA_LINKINFO => {
                let found = attributes(value).find(|(kind, _)| *kind == libc::IFLA_INFO_KIND);
                link.kind = found.map(|(_, value)| text(value)).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(link)
}

/// Of an answer with a `struct ifaddrmsg`: family, prefix length, flags, scope, index; then attributes. Nothing if the
/// address is no source to choose.
fn address(message: &[u8]) -> Option<(u32, IpAddr)> {
    let (short_flags, scope) = (u32::from(*message.get(2)?), *message.get(3)?);
    let index = word(message, 4)?;
    let (mut local, mut address, mut flags) = (None, None, short_flags);
    for (kind, value) in attributes(message.get(8..)?) {
        match kind {
            // With a peer, IFA_ADDRESS is the peer's.
            libc::IFA_LOCAL => local = ip(value),
            libc::IFA_ADDRESS => address = ip(value),
            libc::IFA_FLAGS => flags = word(value, 0)?,
            _ => {}
        }
    }
    let address = local.or(address)?;
    (scope == libc::RT_SCOPE_UNIVERSE && flags & UNUSABLE == 0 && !address.is_loopback())
        .then_some((index, address))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use tokio::sync::watch;

    use super::*;
    use crate::netlink::in_own_namespace;

    fn ip_command(arguments: &str) {
        let status = Command::new("ip").args(arguments.split(' ')).status();
        assert!(status.unwrap().success(), "ip {arguments}");
    }

    /// M7: the addresses that masquerading would choose from.
    #[test]
    fn m7_devices_are_read_with_the_addresses_that_may_be_sources() {
        in_own_namespace(|| {
            for arguments in [
                "link add br7 type bridge",
                "link add v0 type veth peer v1",
                "link set v0 master br7",
                "link set v1 up",
                "link set br7 up",
                "link set lo up",
                "addr add 192.0.2.1/24 dev br7",
                "addr add 192.0.2.2/24 dev br7",
                "addr add 169.254.1.1/16 dev br7 scope link",
                "addr add 198.51.100.1 peer 198.51.100.2 dev br7",
                "addr add 2001:db8::1/64 dev br7 nodad",
                "addr add 2001:db8::2/64 dev br7 nodad preferred_lft 0",
                "addr add 203.0.113.1/32 dev lo",
            ] {
                ip_command(arguments);
            }
            let links = read().unwrap();
            let of = |name: &str| links.iter().find(|link| link.name == name).unwrap();
            let (bridge, port, lo) = (of("br7"), of("v0"), of("lo"));
            assert_eq!(links.len(), 4, "{links:?}");
            assert_eq!((bridge.kind.as_str(), port.kind.as_str(), lo.kind.as_str()), ("bridge", "veth", ""));
            assert_eq!((port.master, of("v1").master, bridge.master), (bridge.index, 0, 0));
            assert_eq!(bridge.hardware, libc::ARPHRD_ETHER);
            assert!(lo.loopback && !bridge.loopback);
            let texts = |link: &Link| link.addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
            assert_eq!(texts(bridge), ["192.0.2.1", "198.51.100.1", "2001:db8::1"]);
            assert_eq!(texts(lo), ["203.0.113.1"]);
        });
    }

    #[test]
    fn changes_are_followed() {
        in_own_namespace(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (tx, mut rx) = watch::channel(None);
                let task = tokio::spawn(run(tx));
                let mut wait = async |what: &str, is: fn(&[Link]) -> bool| {
                    let found = rx.wait_for(|links| links.as_deref().is_some_and(is));
                    drop(tokio::time::timeout(Duration::from_secs(10), found).await.expect(what).unwrap());
                };
                wait("nothing but lo", |links| links.len() == 1).await;
                ip_command("link add v0 type veth peer v1");
                wait("a pair", |links| links.len() == 3).await;
                ip_command("link add br7 type bridge");
                ip_command("link set v0 master br7");
                wait("a port", |links| links.iter().any(|link| link.name == "v0" && link.master != 0)).await;
                ip_command("link set br7 up");
                ip_command("addr add 192.0.2.1/24 dev br7");
                wait("an address", |links| links.iter().any(|link| !link.addresses.is_empty())).await;
                ip_command("link del v0");
                wait("they are gone", |links| links.len() == 2).await;
                drop(rx);
                task.await.unwrap().unwrap();
            });
        });
    }

    #[test]
    fn a_message_that_is_cut_short_is_no_device() {
        for length in 0..16 {
            assert_eq!(link(&vec![0; length]), None, "{length}");
        }
        // An attribute that says that it is longer than it is.
        let mut message = vec![0; 24];
        message[16..18].copy_from_slice(&200u16.to_ne_bytes());
        assert_eq!(link(&message).unwrap().name, "");
        assert_eq!(address(&[2, 32, 0]), None);
    }
}
