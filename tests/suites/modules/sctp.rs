//! Real associations: SCTP clients are served by packets only, and keep their port (T1 to T4).

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{SockaddrStorage, bind, connect, getpeername},
};
use sheave_tests::{
    lab::Place,
    manifests::{Object, service, slice},
    nodes::{Attachment, Layout, World},
};

/// Of Service and servers: an SCTP port is not changed (T2).
const PORT: u16 = 5060;

/// Longer than any answer takes, on a machine that interprets every instruction too.
const PATIENCE: Duration = Duration::from_secs(20);

/// A one-to-one socket, which is read and written like one of TCP.
fn socket(like: SocketAddr) -> OwnedFd {
    let family = if like.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no pointers.
    let descriptor =
        unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::IPPROTO_SCTP) };
    let descriptor = Errno::result(descriptor).expect("an SCTP socket (module sctp)");
    // SAFETY: the kernel just gave us this descriptor.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// Answers each association with the place's name and what it says, until the test ends.
fn serve(place: &Place) {
    for address in place.sockets(PORT) {
        let listen = || {
            let descriptor = socket(address);
            bind(descriptor.as_raw_fd(), &SockaddrStorage::from(address)).unwrap();
            // SAFETY: no pointers.
            Errno::result(unsafe { libc::listen(descriptor.as_raw_fd(), 16) }).unwrap();
            TcpListener::from(descriptor)
        };
        let (listener, name) = (place.netns().run(listen).unwrap(), place.name().to_owned());
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let name = name.clone();
                thread::spawn(move || {
                    let mut question = [0; 64];
                    while let Ok(length) = stream.read(&mut question)
                        && length > 0
                    {
                        let answer = [name.as_bytes(), b" ", &question[..length]].concat();
                        if stream.write_all(&answer).is_err() {
                            return;
                        }
                    }
                });
            }
        });
    }
}

/// Connects, asks twice, and ends in order. Who answered.
#[track_caller]
fn ask(from: &Place, to: SocketAddr) -> String {
    let open = || {
        let stream = TcpStream::from(socket(to));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        connect(stream.as_raw_fd(), &SockaddrStorage::from(to))
            .unwrap_or_else(|error| panic!("{} to {to}: {error}", from.name()));
        stream
    };
    let mut stream = from.netns().run(open).unwrap();
    let mut server = String::new();
    for question in ["one", "two"] {
        stream.write_all(question.as_bytes()).unwrap();
        let mut answer = [0; 128];
        let length =
            stream.read(&mut answer).unwrap_or_else(|error| panic!("{} to {to}: {error}", from.name()));
        let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
        let (name, echo) = answer.split_once(' ').unwrap();
        assert_eq!(echo, question);
        name.clone_into(&mut server);
    }
    let peer: SockaddrStorage = getpeername(stream.as_raw_fd()).unwrap();
    let peer = peer
        .as_sockaddr_in()
        .map(|peer| IpAddr::from(peer.ip()))
        .or_else(|| peer.as_sockaddr_in6().map(|peer| IpAddr::from(peer.ip())));
    assert_eq!(peer, Some(to.ip()), "{} is at another address than it dialled", from.name());
    server
}

fn cluster_ips(number: u8) -> [IpAddr; 2] {
    [format!("10.96.7.{number}").parse().unwrap(), format!("fd00:10:96::7{number:02}").parse().unwrap()]
}

fn external_ips(number: u8) -> [IpAddr; 2] {
    [format!("203.0.113.{number}").parse().unwrap(), format!("fd00:203:0:113::{number}").parse().unwrap()]
}

fn objects(world: &World, name: &str, number: u8, node: usize, place: &Place) -> Vec<Object> {
    let text = |addresses: [IpAddr; 2]| addresses.map(|address| address.to_string());
    let cluster_ips = text(cluster_ips(number));
    let object = service(name, &cluster_ips.each_ref().map(String::as_str))
        .port("sip", "SCTP", PORT, PORT)
        .set("spec.externalIPs", text(external_ips(number)).to_vec());
    let slices = [(0, "IPv4"), (1, "IPv6")].map(|(index, family)| {
        slice(&format!("{name}-{index}"), name, family)
            .slice_port("sip", "SCTP", PORT)
            .endpoint(&place.sockets(0)[index].ip().to_string(), world.node(node).unwrap().name())
    });
    [vec![object], slices.to_vec()].concat()
}

/// Every frontend that keeps its port, from everywhere, to a backend here and one on the other node.
#[test]
fn associations_through_every_frontend() {
    let mut world = World::new(Layout::default()).unwrap();
    let (here, there) = {
        let pod = |node| world.pod(node, Attachment::Bridge, 0).unwrap();
        let (here, there) = (pod(0), pod(1));
        serve(here);
        serve(there);
        (here.name().to_owned(), there.name().to_owned())
    };
    world.start_agent(0, &[]).unwrap();
    for (name, number, node) in [("here", 1, 0), ("there", 2, 1)] {
        let pod = world.pod(node, Attachment::Bridge, 0).unwrap();
        world.apply(name, &objects(&world, name, number, node, pod)).unwrap();
    }
    let pod = |attachment| world.pod(0, attachment, 1).unwrap();
    let clients = [
        world.outside(),
        world.far(),
        pod(Attachment::Bridge),
        pod(Attachment::PointToPoint),
        world.node(0).unwrap().host(),
    ];
    for from in clients {
        for (number, server) in [(1, &here), (2, &there)] {
            for address in [cluster_ips(number), external_ips(number)].concat() {
                assert_eq!(ask(from, SocketAddr::new(address, PORT)), *server);
            }
        }
    }
}
