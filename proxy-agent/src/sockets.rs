//! Connected UDP sockets that a VIP led to an endpoint which serves no more (B5).
//!
//! Nothing would tell such a socket: its datagrams go to an address that nobody has any more, or that a stranger has. So
//! it is closed: the application's next call fails with ECONNABORTED, and its next `connect()` finds who serves now. The
//! kernel does so by socket diagnosis, in each network namespace; that is why the agent must see the node's processes
//! (`hostPID`), which lead to the namespaces. TCP needs nothing of this: its peer, or the lack of one, says so itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use proxy_common::abi::socket::SOCKET_PLACES;
use proxy_common::abi::{Address, Port, SocketPlace};

use crate::kernel::mapping::Mapping;
use crate::kernel::programs::open_pinned;
use crate::kernel::{self, Pins};
use crate::netlink::{self, Message, Netlink};
use crate::parallel::give_way;
use crate::served::Served;

/// linux/sock_diag.h: `SOCK_DIAG_BY_FAMILY`, `SOCK_DESTROY`.
const DUMP: u16 = 20;
const DESTROY: u16 = 21;

/// What the kernel calls the state of a connected socket: `1 << TCP_ESTABLISHED`.
const CONNECTED: u32 = 1 << 1;

/// Between the end of a walk and the next: changes come in heaps, and a socket that is just being connected by what was
/// right a moment ago must be there to be found.
const PAUSE: Duration = Duration::from_millis(100);

/// The inode of the first process namespace (`PROC_PID_INIT_INO`).
const FIRST_PID_NAMESPACE: u64 = 0xefff_fffc;

/// The thread that closes them. It ends when this is dropped.
pub struct Closer(Sender<Served>);

impl Closer {
    /// Starts it, on what the programs pinned.
    ///
    /// # Errors
    /// If the map cannot be had, or no thread.
    pub fn start(pins: &Pins) -> Result<Self, kernel::Error> {
        const NAME: &str = "SOCKET_PLACES";
        let state = pins.state();
        let places = Mapping::new(open_pinned(&state, NAME)?.fd(), SOCKET_PLACES, false)
            .map_err(kernel::Error::path("map into memory", state.join(NAME)))?;
        let (orders, ordered) = channel();
        thread::Builder::new()
            .name("sockets".to_owned())
            .spawn(move || run(&places, &ordered))
            .map_err(kernel::Error::path("start the thread for", state.join(NAME)))?;
        Ok(Self(orders))
    }

    /// These VIPs may be served by others than before.
    pub fn served(&self, served: Served) {
        if !served.is_empty() {
            // The thread lives as long as this.
            let _ = self.0.send(served);
        }
    }
}

fn run(places: &Mapping<SocketPlace>, orders: &Receiver<Served>) {
    give_way();
    if fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() != FIRST_PID_NAMESPACE) {
        tracing::warn!(
            "the agent does not see the node's processes (hostPID): connected UDP sockets of pods stay with an endpoint \
             that is gone until they connect again"
        );
    }
    let mut told = false;
    while let Ok(mut served) = orders.recv() {
        thread::sleep(PAUSE);
        // One walk for all that wait (C6).
        served.extend(orders.try_iter().flatten());
        match close_all(places, &served) {
            Ok(0) => told = false,
            Ok(closed) => {
                told = false;
                tracing::info!(closed, "connected UDP sockets of endpoints that serve no more");
            }
            Err(error) if told => tracing::debug!(error = &error as &dyn std::error::Error, "sockets"),
            Err(error) => {
                told = true;
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "connected UDP sockets may stay with an endpoint that serves no more"
                );
            }
        }
    }
}

/// Cookies of sockets to close, each with the peer that it has while it is to be closed.
type Stale = BTreeMap<u64, SocketAddr>;

/// In every network namespace of the node, until all are found; returns how many were closed. What fails in one does not
/// spare the others.
fn close_all(places: &Mapping<SocketPlace>, served: &Served) -> io::Result<usize> {
    let mut stale: Stale = places.taken().filter_map(|place| stale(served, &place)).collect();
    if stale.is_empty() {
        return Ok(0);
    }
    let own = File::open("/proc/thread-self/ns/net")?;
    let (mut closed, mut failure) = (0, None);
    for namespace in namespaces()? {
        let in_there = |stale: &mut Stale| {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            close(stale)
        };
        match in_there(&mut stale) {
            Ok(more) => closed += more,
            Err(error) => failure = Some(error),
        }
        if stale.is_empty() {
            break;
        }
    }
    // Held, the last one would stay when its pod has gone.
    setns(&own, CloneFlags::CLONE_NEWNET)?;
    failure.map_or(Ok(closed), Err)
}

/// Those of all processes.
fn namespaces() -> io::Result<Vec<File>> {
    let (mut found, mut known) = (Vec::new(), BTreeSet::new());
    for process in fs::read_dir("/proc")? {
        let path = process?.path();
        if path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok()).is_none() {
            continue;
        }
        let namespace = path.join("ns/net");
        // Asked before it is opened: most processes share one. A process may be gone at any step.
        let Ok(metadata) = fs::metadata(&namespace) else { continue };
        if known.insert(metadata.ino())
            && let Ok(file) = File::open(&namespace)
        {
            found.push(file);
        }
    }
    Ok(found)
}

/// In this thread's namespace. What was found is taken out of `stale`.
fn close(stale: &mut Stale) -> io::Result<usize> {
    let netlink = Netlink::open(netlink::Family::NetlinkSockDiag)?;
    let mut closed = 0;
    for family in [libc::AF_INET, libc::AF_INET6] {
        let sockets = netlink.dump(DUMP, &request(family, &[0; Id::BYTES]), Id::parse)?;
        for socket in sockets {
            if stale.get(&socket.cookie) != Some(&socket.peer) {
                continue;
            }
            let kill =
                Message { kind: DESTROY, flags: libc::NLM_F_ACK, payload: request(family, &socket.bytes) };
            match netlink.ask(&[kill])?.pop() {
                Some(Ok(())) => closed += 1,
                // It is gone already.
                Some(Err(error)) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Some(Err(error)) => return Err(error),
                None => {}
            }
            stale.remove(&socket.cookie);
        }
    }
    Ok(closed)
}

/// The socket of a place, and the peer that its VIP gave it, if that serves the VIP no more while others do. The socket
/// may be one of TCP, which is not looked for, or have another peer by now.
fn stale(served: &Served, place: &SocketPlace) -> Option<(u64, SocketAddr)> {
    let origin = place.origin_of(place.cookie)?;
    let at = |(address, port): (Address, Port)| SocketAddr::new(address.ip(), port.number());
    let (vip, backend) = (at(origin.vip()), at(origin.backend()));
    let serving = served.get(&vip)?;
    (place.cookie != 0 && !serving.contains(&backend)).then_some((place.cookie, backend))
}

/// A `struct inet_diag_req_v2`.
fn request(family: i32, id: &[u8; Id::BYTES]) -> Vec<u8> {
    // Families and protocols are small numbers.
    let [family, protocol] = [family, libc::IPPROTO_UDP].map(|number| number.to_le_bytes()[0]);
    [&[family, protocol, 0, 0][..], &CONNECTED.to_ne_bytes(), id].concat()
}

/// What of a `struct inet_diag_msg` names a socket: a `struct inet_diag_sockid`.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Id {
    bytes: [u8; Self::BYTES],
    peer: SocketAddr,
    cookie: u64,
}

impl Id {
    /// Ports, both addresses, interface, cookie.
    const BYTES: usize = 48;

    /// Of a message of a dump. `None`: it is cut short.
    fn parse(message: &[u8]) -> Option<Self> {
        let family = i32::from(*message.first()?);
        let bytes: [u8; Self::BYTES] = *message.get(4..)?.first_chunk()?;
        let peer_at = bytes.get(20..)?;
        let peer = if family == libc::AF_INET {
            IpAddr::V4(Ipv4Addr::from(*peer_at.first_chunk()?))
        } else {
            // An IPv4-mapped one of an IPv6 socket was sent to an IPv4 endpoint.
            Ipv6Addr::from(*peer_at.first_chunk()?).to_canonical()
        };
        let port = u16::from_be_bytes(*bytes.get(2..)?.first_chunk()?);
        let [low, high] = [40, 44].map(|at| bytes.get(at..).and_then(|word| word.first_chunk()));
        let cookie = u64::from(u32::from_ne_bytes(*low?)) | u64::from(u32::from_ne_bytes(*high?)) << 32;
        Some(Self { bytes, peer: SocketAddr::new(peer, port), cookie })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::in_own_namespace;
    use proxy_common::abi::{BackendId, SocketOrigin};
    use std::net::UdpSocket;
    use std::sync::Arc;

    const VIP: &str = "10.96.0.1:53";

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn place(cookie: u64, vip: SocketAddr, backend: SocketAddr) -> SocketPlace {
        let peer = |at: SocketAddr| (at.ip().into(), Port::new(at.port()));
        SocketPlace::new(cookie, SocketOrigin::new(peer(vip), BackendId::new(1, 1), peer(backend)), 0)
    }

    /// B5, C2, C3.
    #[test]
    fn b5_who_is_stale() {
        let (gone, serves, other) = (at("10.244.1.1:53"), at("10.244.1.2:53"), at("10.96.0.2:53"));
        let served: Served = [(at(VIP), Arc::new([serves].into()))].into();
        let stale = |vip, backend| stale(&served, &place(7, vip, backend));
        assert_eq!(stale(at(VIP), gone), Some((7, gone)));
        assert_eq!(stale(at(VIP), serves), None);
        assert_eq!(stale(other, gone), None, "of a VIP that nobody speaks of");
        // C4: the same address with another port.
        assert_eq!(stale(at(VIP), at("10.244.1.2:54")), Some((7, at("10.244.1.2:54"))));
        assert_eq!(super::stale(&served, &SocketPlace::default()), None);
    }

    /// By the kernel's own diagnosis: of sockets that look alike only the one that is meant is closed.
    #[test]
    fn b5_the_kernel_closes_the_socket() {
        in_own_namespace(|| {
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
            assert!(up.unwrap().success());
            for (bind, to) in [("127.0.0.1:0", "127.0.0.1:5300"), ("[::1]:0", "[::1]:5300")] {
                let _server = UdpSocket::bind(to).unwrap();
                let connected = || {
                    let socket = UdpSocket::bind(bind).unwrap();
                    socket.connect(to).unwrap();
                    socket
                };
                let (meant, direct) = (connected(), connected());
                let mut elsewhere = Stale::from([(cookie(&meant), at("127.0.0.1:1"))]);
                assert_eq!(
                    (close(&mut elsewhere).unwrap(), elsewhere.len()),
                    (0, 1),
                    "it was connected anew"
                );
                let mut stale = Stale::from([(cookie(&meant), at(to)), (u64::MAX, at(to))]);
                assert_eq!((close(&mut stale).unwrap(), stale.len()), (1, 1));
                let error = meant.recv(&mut [0]).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::ECONNABORTED));
                direct.send(b"on").unwrap();
                meant.connect(to).unwrap();
                meant.send(b"again").unwrap();
            }
        });
    }

    #[test]
    fn a_message_that_is_cut_short_names_no_socket() {
        let mut message = vec![0; 72];
        message[0] = 2;
        assert!(Id::parse(&message).is_some());
        for length in 0..4 + Id::BYTES {
            assert_eq!(Id::parse(&message[..length]), None, "{length}");
        }
    }

    fn cookie(socket: &UdpSocket) -> u64 {
        use std::os::fd::AsRawFd;
        let mut cookie = 0_u64;
        let mut length = 8;
        // SAFETY: the kernel writes eight bytes.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        assert_eq!(result, 0);
        cookie
    }
}
