//! Which devices get hooks, and what the hooks need to know of each. Pure.
//!
//! * Bridge ports are hooked, bridges are not: what comes in by a port is tracked by netfilter before the bridge's own
//!   hook sees it, and replies that are switched from port to port never pass that hook.
//! * Of a bond or team the master is hooked: addresses and routes are the master's.
//! * `lo` is hooked for the node's own clients of its own NodePorts.
//! * Tunnels whose frames have no link header (WireGuard, ipip, tun) are hooked with programs of their own. Not hooked are
//!   devices with other headers: GRE and SIT show the outer IP header at ingress, and none at egress.

use std::collections::BTreeMap;
use std::net::IpAddr;

use proxy_common::abi::{Address, Device};

use crate::kernel::devices::LinkHeader;
use crate::object::{Family, PerFamily};
use crate::resolve::DetectLocal;
use crate::source::links::Link;

/// What a device is to the packet path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// To the outside, or to a pod that has it for itself; all that is nothing else.
    Device,
    /// To other nodes, through a tunnel.
    Overlay,
    /// Of a bridge.
    BridgePort,
    /// Of the node to itself.
    Loopback,
    /// To other nodes or the outside; its frames have no link header.
    Bare,
    /// Not hooked: its ports are.
    Bridge,
    /// Not hooked: its master is.
    BondPort,
    /// Not hooked: its members are.
    Vrf,
    /// Not hooked: the programs cannot read its frames.
    Unread,
}

impl Role {
    /// Its name in `sheave status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Overlay => "overlay",
            Self::BridgePort => "bridge port",
            Self::Loopback => "loopback",
            Self::Bare => "tunnel without link header",
            Self::Bridge => "bridge: its ports are hooked",
            Self::BondPort => "port of a bond: the bond is hooked",
            Self::Vrf => "VRF: its members are hooked",
            Self::Unread => "with a link header that is not read: not served",
        }
    }

    /// Whether the programs may ask about the device: packets of the node itself leave by a bridge too.
    pub const fn is_known(self) -> bool {
        self.is_hooked() || matches!(self, Self::Bridge)
    }

    /// What the device's frames begin with, if it is hooked.
    pub const fn link_header(self) -> LinkHeader {
        match self {
            Self::Bare => LinkHeader::Bare,
            Self::Device
            | Self::Overlay
            | Self::BridgePort
            | Self::Loopback
            | Self::Bridge
            | Self::BondPort
            | Self::Vrf
            | Self::Unread => LinkHeader::Ethernet,
        }
    }

    /// Whether the device gets hooks.
    pub const fn is_hooked(self) -> bool {
        match self {
            Self::Device | Self::Overlay | Self::BridgePort | Self::Loopback | Self::Bare => true,
            Self::Bridge | Self::BondPort | Self::Vrf | Self::Unread => false,
        }
    }
}

/// A device with its role.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// The device's name.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// What its hooks need to know; of no meaning if it is not hooked.
    pub device: Device,
}

/// All devices by index.
pub fn places(
    links: &[Link],
    primary: &PerFamily<Option<IpAddr>>,
    detect_local: &DetectLocal,
) -> BTreeMap<u32, Place> {
    let by_index: BTreeMap<u32, &Link> = links.iter().map(|link| (link.index, link)).collect();
    let place = |link: &Link| {
        let master = by_index.get(&link.master).copied();
        let role = role(link, master);
        let bridge = master.filter(|_| role == Role::BridgePort);
        let source = |family| source(links, bridge.unwrap_or(link), family, *primary.get(family));
        let mut flags = if is_of_local_pods(link, bridge, detect_local) { Device::LOCAL_PODS } else { 0 };
        if role == Role::Loopback {
            flags |= Device::LOOPBACK;
        }
        let device = Device {
            v4: source(Family::V4),
            v6: source(Family::V6),
            bridge: bridge.map_or(0, |bridge| bridge.index),
            flags,
            mac: link.mac.as_slice().try_into().unwrap_or_default(),
            zero: 0,
        };
        Place { name: link.name.clone(), role, device }
    };
    links.iter().map(|link| (link.index, place(link))).collect()
}

fn role(link: &Link, master: Option<&Link>) -> Role {
    if link.loopback {
        return Role::Loopback;
    }
    match link.hardware {
        libc::ARPHRD_ETHER => {}
        libc::ARPHRD_NONE | libc::ARPHRD_PPP | libc::ARPHRD_TUNNEL | libc::ARPHRD_TUNNEL6 => {
            return Role::Bare;
        }
        _ => return Role::Unread,
    }
    match link.kind.as_str() {
        "bridge" => return Role::Bridge,
        "vrf" => return Role::Vrf,
        _ => {}
    }
    match master.map(|master| master.kind.as_str()) {
        Some("bridge") => Role::BridgePort,
        Some("bond" | "team") => Role::BondPort,
        _ if matches!(link.kind.as_str(), "vxlan" | "geneve" | "gretap" | "ip6gretap") => Role::Overlay,
        _ => Role::Device,
    }
}

/// M7: the first address of the device itself; without one, what routing would choose: the node's primary address if it
/// is on a device, else any.
fn source(links: &[Link], holder: &Link, family: Family, primary: Option<IpAddr>) -> Address {
    let of_family = |address: &&IpAddr| Family::of(address) == family;
    let first = |link: &Link| link.addresses.iter().find(of_family).copied();
    let primary = || primary.filter(|primary| links.iter().any(|link| link.addresses.contains(primary)));
    // Addresses on `lo` are VIPs more often than not: last.
    let any = || {
        let (lo, others): (Vec<&Link>, Vec<&Link>) = links.iter().partition(|link| link.loopback);
        others.into_iter().chain(lo).find_map(first)
    };
    first(holder).or_else(primary).or_else(any).map_or_else(Address::default, Address::from)
}

/// M1, the modes that tell by the interface. Netfilter sees what comes in by a bridge port come in by the bridge.
fn is_of_local_pods(link: &Link, bridge: Option<&Link>, detect_local: &DetectLocal) -> bool {
    match detect_local {
        DetectLocal::ClusterCidr | DetectLocal::NodeCidr => false,
        DetectLocal::BridgeInterface(name) => {
            link.name == *name || bridge.is_some_and(|bridge| bridge.name == *name)
        }
        DetectLocal::InterfaceNamePrefix(prefix) => bridge.unwrap_or(link).name.starts_with(prefix),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn link(index: u32, name: &str, kind: &str, master: u32, addresses: &[&str]) -> Link {
        Link {
            index,
            name: name.to_owned(),
            hardware: libc::ARPHRD_ETHER,
            loopback: false,
            up: true,
            kind: kind.to_owned(),
            master,
            mac: Vec::new(),
            addresses: addresses.iter().map(|text| ip(text)).collect(),
        }
    }

    fn world() -> Vec<Link> {
        let lo = Link {
            loopback: true,
            hardware: libc::ARPHRD_LOOPBACK,
            ..link(1, "lo", "", 0, &["203.0.113.9", "2001:db8:9::9"])
        };
        let tun = Link { hardware: libc::ARPHRD_NONE, ..link(9, "wg0", "wireguard", 0, &["10.9.0.1"]) };
        vec![
            lo,
            link(2, "eth0", "", 0, &["192.0.2.2", "192.0.2.3", "2001:db8::2"]),
            link(3, "cni0", "bridge", 0, &["10.244.1.1"]),
            link(4, "vetha", "veth", 3, &["169.0.0.1"]),
            link(5, "flannel.1", "vxlan", 0, &["10.244.1.0"]),
            link(6, "bond0", "bond", 0, &["198.51.100.1"]),
            link(7, "eth1", "", 6, &[]),
            link(8, "blue", "vrf", 0, &[]),
            tun,
            link(10, "eth0.5", "vlan", 8, &[]),
            link(11, "cali1", "veth", 0, &[]),
            Link { hardware: libc::ARPHRD_TUNNEL, ..link(12, "tunl0", "ipip", 0, &["10.244.1.7"]) },
            Link { hardware: libc::ARPHRD_IPGRE, ..link(13, "gre1", "gre", 0, &[]) },
        ]
    }

    fn none() -> PerFamily<Option<IpAddr>> {
        PerFamily { v4: None, v6: None }
    }

    #[test]
    fn roles() {
        let places = places(&world(), &none(), &DetectLocal::ClusterCidr);
        let roles: Vec<Role> = places.values().map(|place| place.role).collect();
        let expected = [
            Role::Loopback,
            Role::Device,
            Role::Bridge,
            Role::BridgePort,
            Role::Overlay,
            Role::Device,
            Role::BondPort,
            Role::Vrf,
            Role::Bare,
            Role::Device,
            Role::Device,
            Role::Bare,
            Role::Unread,
        ];
        assert_eq!(roles, expected);
        let bridges: Vec<u32> = places.values().map(|place| place.device.bridge).collect();
        assert_eq!(bridges, [0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn m7_the_source_is_the_devices_own_or_its_bridges_else_what_routing_would_choose() {
        let sources = |primary, index| {
            let places = places(&world(), &primary, &DetectLocal::ClusterCidr);
            let device = places[&index].device;
            (device.v4.ip().to_string(), device.v6.ip().to_string())
        };
        let primary = |v4: &str, v6: &str| PerFamily { v4: Some(ip(v4)), v6: Some(ip(v6)) };
        assert_eq!(sources(none(), 2), ("192.0.2.2".to_owned(), "2001:db8::2".to_owned()));
        // A port's own address does not count.
        assert_eq!(sources(none(), 4), ("10.244.1.1".to_owned(), "2001:db8::2".to_owned()));
        let known = primary("192.0.2.3", "2001:db8:9::9");
        assert_eq!(sources(known, 11), ("192.0.2.3".to_owned(), "2001:db8:9::9".to_owned()));
        assert_eq!(sources(known, 2).0, "192.0.2.2");
        // Not on this node: not a source.
        assert_eq!(sources(primary("192.0.2.77", "2001:db8::77"), 11).0, "192.0.2.2");
        let lo_only = vec![world()[0].clone(), link(2, "eth0", "", 0, &[])];
        let places = places(&lo_only, &none(), &DetectLocal::ClusterCidr);
        assert_eq!(places[&2].device.v4.ip(), ip("203.0.113.9"));
    }

    #[test]
    fn m1_local_pods_are_told_by_interface() {
        let local = |mode: DetectLocal| -> Vec<u32> {
            let places = places(&world(), &none(), &mode);
            let local = places.iter().filter(|(_, place)| place.device.flags & Device::LOCAL_PODS != 0);
            local.map(|(index, _)| *index).collect()
        };
        assert_eq!(local(DetectLocal::ClusterCidr), [0; 0]);
        assert_eq!(local(DetectLocal::BridgeInterface("cni0".to_owned())), [3, 4]);
        assert_eq!(local(DetectLocal::BridgeInterface("cali1".to_owned())), [11]);
        assert_eq!(local(DetectLocal::InterfaceNamePrefix("cali".to_owned())), [11]);
        // The port is called so, but what comes in by it comes in by the bridge.
        assert_eq!(local(DetectLocal::InterfaceNamePrefix("veth".to_owned())), [0; 0]);
        assert_eq!(local(DetectLocal::InterfaceNamePrefix("cni".to_owned())), [3, 4]);
    }
}
