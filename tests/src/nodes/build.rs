//! How the two nodes and their surroundings are built.

use std::{fs, net::Ipv6Addr, sync::atomic::AtomicU32};

use anyhow::{Context, Result, bail, ensure};

use super::tunnel::Tunnel;
use super::wireguard;
use super::{Attachment, Between, EXTERNAL_CIDR, Guard, Layout, PODS, SERVICE_CIDR, World, nft};
use crate::{
    cgroup,
    lab::{self, Ground, Node, Place},
    manifests::Manifests,
    netns::Netns,
};

/// The link-local address that the kernel makes of the hardware address below; the gateway of point-to-point pods.
const GATEWAY_MAC: &str = "ee:ee:ee:ee:ee:ee";
const GATEWAY_V6: &str = "fe80::ecee:eeff:feee:eeee";
const GATEWAY_V4: &str = "169.254.1.1";

/// Name of the device of a tunnel without link headers.
const BARE: &str = "tun0";

/// Routes of the router for packets from behind it and for its own: what a node cannot place shall not come back to it.
const FAR_TABLE: u8 = 100;

pub(super) fn world(layout: Layout) -> Result<World> {
    let ground = Ground::new()?;
    let manifests = Manifests::new(ground.directory.join("manifests"))?;
    let unhooked = ground.cgroup.join("unhooked");
    cgroup::create(&unhooked)?;

    let router = lab::router()?;
    router.sysctls(&[
        ("net/bridge/bridge-nf-call-iptables", "0"),
        ("net/bridge/bridge-nf-call-ip6tables", "0"),
    ])?;
    let outside = lab::uplink(&router, "outside", 254, ground.cgroup.join("outside"))?;
    is_no_router(outside.netns())?;
    let (transit, far) = behind_routers(&router, &ground)?;

    let mut nodes = Vec::new();
    for index in [1, 2] {
        nodes.push(node(index, &layout, &router, &ground)?);
    }
    let [first, second] = nodes.as_slice() else { bail!("there are two nodes") };
    let tunnel = match layout.between {
        Between::Bare => Some(Tunnel::new([first.host().netns(), second.host().netns()], BARE)?),
        Between::Routes | Between::Vxlan | Between::Ip6 | Between::WireGuard => None,
    };
    for (near, there) in [(first, second), (second, first)] {
        between(near, there, layout.between)?;
        guard(near.host().netns(), &layout)?;
        router.ip(&pods_via(there, &there.host().v4().to_string(), &there.host().v6().to_string(), ""))?;
    }
    match layout.between {
        Between::WireGuard => wireguard::wait(first.host().netns())?,
        Between::Routes | Between::Vxlan | Between::Bare | Between::Ip6 => {}
    }
    vips_via(first, &router, &[outside.netns(), second.host().netns()])?;
    // As on the nodes, clients do not know pods but by a route.
    for node in &nodes {
        let (v4, v6) = (node.host().v4().to_string(), node.host().v6().to_string());
        outside.netns().ip(&pods_via(node, &v4, &v6, ""))?;
    }
    let world = World {
        agents: vec![None, None],
        servers: Vec::new(),
        peers: Vec::new(),
        layout,
        router,
        transit,
        outside,
        far,
        nodes,
        _tunnel: tunnel,
        unhooked,
        manifests,
        barriers: AtomicU32::new(0),
        ground,
    };
    if !layout.offload {
        for netns in world.places().iter().map(|place| place.netns()).chain([&world.router, &world.transit]) {
            without_offload(netns)?;
        }
    }
    Ok(world)
}

/// Hosts do not forward; so they follow redirects, and so on.
fn is_no_router(netns: &Netns) -> Result<()> {
    netns.sysctls(&[("net/ipv4/ip_forward", "0"), ("net/ipv6/conf/all/forwarding", "0")])
}

fn behind_routers(router: &Netns, ground: &Ground) -> Result<(Netns, Place)> {
    let (transit, netns) = (Netns::new()?, Netns::new()?);
    is_no_router(&netns)?;
    router.ip(&format!(
        "link add transit type veth peer name eth0 netns {path}\n\
         address add 198.18.0.1/24 dev transit\n\
         address add fd00:198:18::1/64 dev transit nodad\n\
         link set transit up\n",
        path = transit.path().display(),
    ))?;
    transit.ip(&format!(
        "address add 198.18.0.2/24 dev eth0\n\
         address add fd00:198:18::2/64 dev eth0 nodad\n\
         link set eth0 up\n\
         link add far type veth peer name eth0 netns {path}\n\
         address add 198.18.1.1/24 dev far\n\
         address add fd00:198:18:1::1/64 dev far nodad\n\
         link set far up\n\
         route add default via 198.18.0.1\n\
         route add ::/0 via fd00:198:18::1\n",
        path = netns.path().display(),
    ))?;
    router.ip("route add 198.18.1.0/24 via 198.18.0.2\nroute add fd00:198:18:1::/64 via fd00:198:18::2\n")?;
    netns.ip("address add 198.18.1.2/24 dev eth0\n\
         address add fd00:198:18:1::2/64 dev eth0 nodad\n\
         link set eth0 up\n\
         route add default via 198.18.1.1\n\
         route add ::/0 via fd00:198:18:1::1\n")?;
    let cgroup = ground.cgroup.join("far");
    cgroup::create(&cgroup)?;
    let v6: Ipv6Addr = "fd00:198:18:1::2".parse().context("the far client's address")?;
    Ok((transit, Place::new("far", netns, cgroup, [198, 18, 1, 2].into(), v6)))
}

fn node(index: u8, layout: &Layout, router: &Netns, ground: &Ground) -> Result<Node> {
    let name = format!("node-{index}");
    let (cgroup, directory) = (ground.cgroup.join(&name), ground.directory.join(&name));
    cgroup::create(&cgroup)?;
    cgroup::create(&cgroup.join("host"))?;
    fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
    let netns = Netns::new()?;
    let (filter, bridged) = (layout.rp_filter.to_string(), u8::from(layout.bridge_netfilter).to_string());
    let redirects = if layout.redirects { "1" } else { "0" };
    // Before there are devices: these start with the defaults.
    netns.sysctls(&[
        ("net/ipv4/conf/all/rp_filter", &filter),
        ("net/ipv4/conf/default/rp_filter", &filter),
        ("net/ipv4/conf/all/send_redirects", redirects),
        ("net/ipv4/conf/default/send_redirects", redirects),
        ("net/bridge/bridge-nf-call-iptables", &bridged),
        ("net/bridge/bridge-nf-call-ip6tables", &bridged),
    ])?;
    let host = lab::attach(router, &name, index + 1, netns, cgroup.join("host"))?;
    // A pod that is gone is silent.
    host.netns().ip(&format!(
        "route add blackhole 10.244.{index}.0/24\n\
         route add blackhole fd00:10:244:{index}::/64\n\
         link add cbr0 address 0a:58:0a:f4:{index:02x}:01 type bridge stp_state 0 mcast_snooping 0\n\
         address add 10.244.{index}.1/25 dev cbr0\n\
         address add fd00:10:244:{index}::1/80 dev cbr0 nodad\n\
         link set cbr0 up\n"
    ))?;
    let mut pods = Vec::new();
    for attachment in [Attachment::Bridge, Attachment::PointToPoint] {
        for number in 1..=PODS {
            pods.push(pod(index, &host, attachment, number, &cgroup)?);
        }
    }
    Ok(Node::new(index, host, cgroup, pods, directory))
}

/// The node's end of a pod's link has the pod's name.
pub(super) fn host_end(pod: &Place) -> String {
    pod.name().to_owned()
}

fn pod(
    node: u8,
    host: &Place,
    attachment: Attachment,
    number: usize,
    node_cgroup: &std::path::Path,
) -> Result<Place> {
    let (kind, first, subnet) = match attachment {
        Attachment::Bridge => ("bridge", 10, ""),
        Attachment::PointToPoint => ("p2p", 130, ":1"),
    };
    let name = format!("{kind}-{node}-{number}");
    let host_part = first + number;
    let (v4, v6) = (format!("10.244.{node}.{host_part}"), format!("fd00:10:244:{node}{subnet}::{host_part}"));
    let cgroup = node_cgroup.join(&name);
    cgroup::create(&cgroup)?;
    let netns = Netns::new()?;
    is_no_router(&netns)?;
    host.netns()
        .ip(&format!("link add {name} type veth peer name eth0 netns {}\n", netns.path().display()))?;
    match attachment {
        Attachment::Bridge => {
            host.netns().ip(&format!("link set {name} master cbr0 up\n"))?;
            netns.ip(&format!(
                "address add {v4}/25 dev eth0\n\
                 address add {v6}/80 dev eth0 nodad\n\
                 link set eth0 up\n\
                 route add default via 10.244.{node}.1\n\
                 route add ::/0 via fd00:10:244:{node}::1\n"
            ))?;
        }
        Attachment::PointToPoint => {
            host.netns().sysctls(&[
                (&format!("net/ipv4/conf/{name}/proxy_arp"), "1"),
                // Else the answer waits for up to 0.8 s.
                (&format!("net/ipv4/neigh/{name}/proxy_delay"), "0"),
            ])?;
            host.netns().ip(&format!(
                "link set {name} address {GATEWAY_MAC} up\n\
                 route add {v4}/32 dev {name}\n\
                 route add {v6}/128 dev {name}\n"
            ))?;
            netns.ip(&format!(
                "address add {v4}/32 dev eth0\n\
                 address add {v6}/128 dev eth0 nodad\n\
                 link set eth0 up\n\
                 route add {GATEWAY_V4} dev eth0 scope link\n\
                 route add default via {GATEWAY_V4} dev eth0\n\
                 route add ::/0 via {GATEWAY_V6} dev eth0\n"
            ))?;
        }
    }
    Ok(Place::new(
        &name,
        netns,
        cgroup,
        v4.parse().context("a pod's IPv4 address")?,
        v6.parse().context("a pod's IPv6 address")?,
    ))
}

/// The way to a node's pods.
fn pods_via(node: &Node, v4: &str, v6: &str, device: &str) -> String {
    format!(
        "route add {} via {v4} {device}\nroute add {} via {v6} {device}\n",
        node.pod_cidr_v4(),
        node.pod_cidr_v6()
    )
}

/// One node's way to the pods of the other.
fn between(near: &Node, there: &Node, kind: Between) -> Result<()> {
    let (host, other) = (near.host(), there.host());
    match kind {
        Between::Routes => {
            host.netns().ip(&pods_via(there, &other.v4().to_string(), &other.v6().to_string(), ""))
        }
        Between::Vxlan => {
            host.netns().ip(&format!(
                "link add vxlan0 type vxlan id 7 local {} remote {} dstport 4789 nolearning dev eth0\n",
                host.v4(),
                other.v4(),
            ))?;
            through(near, there, "vxlan0")
        }
        Between::Bare => through(near, there, BARE),
        Between::Ip6 => {
            host.netns().ip(&format!(
                "link add ip6tnl7 type ip6tnl mode any local {} remote {} encaplimit none\n",
                host.v6(),
                other.v6(),
            ))?;
            through(near, there, "ip6tnl7")
        }
        Between::WireGuard => {
            wireguard::device(host.netns(), near.name(), there.name(), other.v6())?;
            through(near, there, wireguard::DEVICE)
        }
    }
}

/// The same through a tunnel's device. Its addresses are of the node's range, as flannel has it.
fn through(near: &Node, there: &Node, device: &str) -> Result<()> {
    let own = |node: &Node| -> (String, String) {
        let (v4, v6) = (node.pod_cidr_v4(), node.pod_cidr_v6());
        (v4.replace(".0/24", ".254"), v6.replace("::/64", ":2::254"))
    };
    let ((v4, v6), (there_v4, there_v6)) = (own(near), own(there));
    let netns = near.host().netns();
    netns.ip(&format!(
        "address add {v4}/32 dev {device}\n\
         address add {v6}/128 dev {device} nodad\n\
         link set {device} up\n",
    ))?;
    netns.ip(&pods_via(there, &there_v4, &there_v6, &format!("dev {device} onlink")))
}

/// Everyone who does not translate VIPs sends them to a node.
fn vips_via(node: &Node, router: &Netns, others: &[&Netns]) -> Result<()> {
    let routes = |table: &str| -> String {
        let ranges = [SERVICE_CIDR, EXTERNAL_CIDR].into_iter().flat_map(|both| both.split(','));
        let lines = ranges.map(|range| {
            let via =
                if range.contains(':') { node.host().v6().to_string() } else { node.host().v4().to_string() };
            format!("route add {range} via {via} {table}\n")
        });
        lines.collect()
    };
    for netns in others {
        netns.ip(&routes(""))?;
    }
    router.ip(&routes(&format!("table {FAR_TABLE}")))?;
    let table = FAR_TABLE.to_string();
    // `lo` stands for the router itself: its errors about packets that came from a VIP.
    for device in ["transit", "lo"] {
        // A batch of `ip` takes rules of one family only.
        for family in ["-4", "-6"] {
            let rule = [family, "rule", "add", "iif", device, "lookup", &table];
            let status = router.command("ip").args(rule).status().context("running `ip`")?;
            ensure!(status.success(), "`ip {}`: {status}", rule.join(" "));
        }
    }
    Ok(())
}

fn guard(netns: &Netns, layout: &Layout) -> Result<()> {
    let v4 = "10.244.0.0/16, 172.18.0.0/24, 198.18.0.0/16";
    let v6 = "fd00:10:244::/48, fd00:172:18::/64, fd00:198:18::/48";
    let rules = match layout.guard {
        Guard::Open => String::new(),
        Guard::DropInvalid => "table inet guard { chain forward { type filter hook forward priority 0; \
             ct state invalid counter drop; }; }"
            .to_owned(),
        // Switched frames come by here too, where bridges hand them over; neighbours must find each other.
        Guard::OnlyReal => format!(
            "table inet guard {{ chain forward {{ type filter hook forward priority 0; policy drop; \
             icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept; \
             ct state invalid counter drop; \
             ip saddr {{ {v4} }} ip daddr {{ {v4} }} accept; \
             ip6 saddr {{ {v6} }} ip6 daddr {{ {v6} }} accept; \
             counter; }}; }}"
        ),
    };
    if !rules.is_empty() {
        nft(netns, &rules)?;
    }
    if layout.masquerade {
        nft(
            netns,
            "table inet cni { chain postrouting { type nat hook postrouting priority 100; \
             ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 oifname \"eth0\" masquerade; \
             ip6 saddr fd00:10:244::/48 ip6 daddr != fd00:10:244::/48 oifname \"eth0\" masquerade; }; }",
        )?;
    }
    Ok(())
}

/// Every device computes its checksums and segments by itself.
fn without_offload(netns: &Netns) -> Result<()> {
    let names = || -> nix::Result<Vec<_>> {
        let devices = nix::net::if_::if_nameindex()?;
        Ok(devices.iter().map(|device| device.name().to_string_lossy().into_owned()).collect())
    };
    let devices = netns.run(names)?.context("listing devices")?;
    for device in devices.into_iter().filter(|device| device != "lo") {
        let output = netns
            .command("ethtool")
            .args(["-K", &device, "rx", "off", "tx", "off", "sg", "off", "gso", "off", "gro", "off"])
            .output();
        let output = output
            .context("cannot run `ethtool` (Debian package ethtool): `cargo xtask setup` installs it")?;
        if !output.status.success() {
            bail!("`ethtool -K {device}` failed: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
    Ok(())
}
