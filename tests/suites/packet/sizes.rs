//! Packets that do not fit: path MTU through a VIP, and fragments.

use std::{
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    time::Duration,
};

use nix::{errno::Errno, libc};
use sheave_tests::{
    lab::Place,
    nodes::{Guard, Layout, Link, World},
    scene::eventually,
};

use crate::{
    stage::{Stage, bridge_pod, frontends, p2p_pod, served},
    talk::{Talk, ask, datagrams},
};

const SMALL: u16 = 1300;

fn set(socket: &UdpSocket, level: i32, option: i32, value: &[u8]) {
    let size = u32::try_from(value.len()).unwrap();
    // SAFETY: the pointer is to as many bytes, which the call only reads.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value.as_ptr().cast(), size) };
    Errno::result(result).unwrap();
}

fn get(socket: &UdpSocket, level: i32, option: i32) -> i32 {
    let (mut value, mut size) = (0_i32, u32::try_from(size_of::<i32>()).unwrap());
    let pointer = (&raw mut value).cast();
    // SAFETY: the pointer is to a number of that size, which the call writes.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, pointer, &raw mut size) };
    Errno::result(result).unwrap();
    value
}

fn all_frontends(world: &World, number: u16) -> Vec<SocketAddr> {
    [0, 1].map(|family| frontends(world, number, family)).concat()
}

/// What a connected UDP socket, which never fragments, learns of the way: its path MTU once a datagram was too long. One
/// that fits is answered.
fn path_mtu(from: &Place, to: SocketAddr) -> i32 {
    let socket = datagrams(from, to);
    let (level, discover, mtu) = if to.is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_MTU)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_MTU)
    };
    // IPV6_PMTUDISC_DO is the same number.
    set(&socket, level, discover, &libc::IP_PMTUDISC_DO.to_ne_bytes());
    let said = ask(&socket, b"small");
    said.unwrap_or_else(|error| panic!("{} {to}, a small one: {error}", from.name()));
    let long = vec![b'x'; 1400];
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    // The first is lost, and its error is told at a later call.
    let told = eventually("the client hears that its datagram was too long", || match ask(&socket, &long) {
        Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => Ok(()),
        other => anyhow::bail!("{other:?}"),
    });
    told.unwrap_or_else(|error| panic!("{} {to}: {error:#}", from.name()));
    get(&socket, level, mtu)
}

fn clients(world: &World) -> [&Place; 4] {
    [world.outside(), world.far(), bridge_pod(world, 0, 1), p2p_pod(world, 0, 1)]
}

/// The small link is behind the node: the node itself sends the error, as from the VIP.
#[test]
fn udp_learns_the_mtu_of_a_pods_link() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    world.set_mtu(Link::Pod(0, 0), SMALL).unwrap();
    stage.apply("small", &served(world, "small", 1, &[(0, p2p_pod(world, 0, 0))]));
    for from in clients(world) {
        for to in all_frontends(world, 1) {
            assert_eq!(path_mtu(from, to), i32::from(SMALL), "{} {to}", from.name());
        }
    }
}

/// The small link is a tunnel between the nodes.
#[test]
fn udp_learns_the_mtu_of_a_tunnel() {
    let stage = Stage::new(Layout::overlay());
    let world = &stage.world;
    world.set_tunnel_mtu(SMALL).unwrap();
    stage.apply("there", &served(world, "there", 1, &[(1, bridge_pod(world, 1, 0))]));
    for from in clients(world) {
        for to in all_frontends(world, 1) {
            assert_eq!(path_mtu(from, to), i32::from(SMALL), "{} {to}", from.name());
        }
    }
}

/// The small link is between the routers: for what the far client sends, and for what the backend answers, of which the
/// error comes to the node and must find the backend.
#[test]
fn tcp_transfers_over_small_links_everywhere() {
    let bytes = 400_000;
    for layout in [Layout::default(), Layout { guard: Guard::OnlyReal, ..Layout::overlay() }] {
        let stage = Stage::new(layout);
        let world = &stage.world;
        world.set_mtu(Link::Transit, SMALL).unwrap();
        world.set_mtu(Link::Pod(0, 1), SMALL).unwrap();
        let backends = [
            ("bridge", 1, (0, bridge_pod(world, 0, 0))),
            ("p2p", 2, (0, p2p_pod(world, 0, 0))),
            ("small", 3, (0, p2p_pod(world, 0, 1))),
            ("there", 4, (1, bridge_pod(world, 1, 0))),
            ("host", 5, (0, world.node(0).unwrap().host())),
        ];
        for (name, number, backend) in backends {
            stage.apply(name, &served(world, name, number, &[backend]));
            for from in [world.far(), world.outside(), bridge_pod(world, 0, 1)] {
                for to in all_frontends(world, number) {
                    let mut talk = Talk::open(from, 0, to);
                    assert_eq!(talk.server, backend.1.name());
                    let echoed = talk.echo(bytes);
                    echoed.unwrap_or_else(|error| panic!("{} {to} to {name}: {error}", from.name()));
                }
            }
        }
    }
}

fn fragments(stage: &Stage, froms: &[&Place]) {
    let world = &stage.world;
    let backends = [
        ("bridge", 1, (0, bridge_pod(world, 0, 0))),
        ("p2p", 2, (0, p2p_pod(world, 0, 0))),
        ("there", 3, (1, bridge_pod(world, 1, 0))),
        ("host", 4, (0, world.node(0).unwrap().host())),
    ];
    for (name, number, backend) in backends {
        stage.apply(name, &served(world, name, number, &[backend]));
        for from in froms {
            for to in all_frontends(world, number) {
                let socket = datagrams(from, to);
                socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
                // The first of a flow is in several fragments, then comes one alone, then more.
                for length in [4000, 10, 9000] {
                    let letters: Vec<_> =
                        (0..length).map(|index| b'a' + u8::try_from(index % 23).unwrap()).collect();
                    // A tunnel has client and server each lose one, before they know its size.
                    let said = eventually("an answer", || Ok(ask(&socket, &letters)?));
                    let said = said.unwrap_or_else(|error| {
                        panic!("{} {to} to {name}, {length} bytes: {error:#}", from.name())
                    });
                    assert_eq!(said, backend.1.name());
                }
            }
        }
    }
}

/// Questions and answers in several fragments each.
#[test]
fn udp_fragments() {
    let stage = Stage::new(Layout::default());
    fragments(&stage, &clients(&stage.world));
}

/// The same past a node that tracks connections, which puts fragments together, and through a tunnel.
#[test]
fn udp_fragments_through_a_tunnel() {
    let stage = Stage::new(Layout { guard: Guard::DropInvalid, ..Layout::overlay() });
    fragments(&stage, &[stage.world.outside(), bridge_pod(&stage.world, 0, 1)]);
}

/// IPv6 extension headers before UDP: destination options and hop-by-hop.
#[test]
fn ipv6_extension_headers() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    let pod = bridge_pod(world, 0, 0);
    stage.apply("web", &served(world, "web", 1, &[(0, pod)]));
    // Next header and length are the kernel's business; then padding of six bytes.
    let header = [0, 0, 1, 4, 0, 0, 0, 0];
    for option in [libc::IPV6_DSTOPTS, libc::IPV6_HOPOPTS] {
        for from in [world.outside(), p2p_pod(world, 0, 1)] {
            for to in frontends(world, 1, 1) {
                let socket = datagrams(from, to);
                set(&socket, libc::IPPROTO_IPV6, option, &header);
                let said = ask(&socket, b"options");
                let said = said.unwrap_or_else(|error| panic!("{} {to} {option}: {error}", from.name()));
                assert_eq!(said, pod.name());
            }
        }
    }
}
