//! Netfilter's connection tracking, by ctnetlink: which connections its NAT sends on, and how one more is made so.

use std::io;
use std::net::{IpAddr, SocketAddr};

use proxy_common::abi::Protocol;

use crate::netlink::{self, Attributes, Message, Netlink, attributes};

/// linux/netfilter/nfnetlink_conntrack.h: `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_*`.
const NEW: u16 = 0x100;
const GET: u16 = 0x101;
const DELETE: u16 = 0x102;

/// `CTA_*`.
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOINFO: u16 = 4;
const NAT_SRC: u16 = 6;
const TIMEOUT: u16 = 7;
const NAT_DST: u16 = 13;
const STATUS_MASK: u16 = 26;
/// In a tuple.
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
/// In `TUPLE_IP`, for each family.
const IP_SRC: [u16; 2] = [1, 3];
const IP_DST: [u16; 2] = [2, 4];
/// In `TUPLE_PROTO`.
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;
/// In `NAT_SRC` and `NAT_DST`: the least and the greatest address for each family, and the same for ports inside
/// `NAT_PROTO`.
const NAT_IP: [[u16; 2]; 2] = [[1, 2], [4, 5]];
const NAT_PROTO: u16 = 3;
const NAT_PORT: [u16; 2] = [1, 2];
/// In `PROTOINFO`, and in that.
const PROTOINFO_TCP: u16 = 1;
const TCP_STATE: u16 = 1;
const TCP_FLAGS: [u16; 2] = [4, 5];

/// `IPS_*`.
const SEEN_REPLY: u32 = 2;
const ASSURED: u32 = 4;
const CONFIRMED: u32 = 8;
const DST_NAT: u32 = 32;

/// `TCP_CONNTRACK_ESTABLISHED`, and a `struct nf_ct_tcp_flags` that says: windows were not followed, so none is wrong
/// (`IP_CT_TCP_FLAG_BE_LIBERAL`, value and mask).
const ESTABLISHED: u8 = 3;
const LIBERAL: [u8; 2] = [8, 8];

/// What a made entry lives without a packet, in seconds; with the next one it gets what the node's settings say.
const TCP_S: u32 = 24 * 3600;
const ANSWERED_S: u32 = 120;
const UNANSWERED_S: u32 = 30;

/// How often an entry is made anew whose place a packet took in between.
const TRIES: usize = 8;

/// One direction of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuple {
    /// IP protocol number.
    pub protocol: u8,
    /// Who sends.
    pub source: SocketAddr,
    /// To whom.
    pub destination: SocketAddr,
}

impl Tuple {
    /// The other direction.
    #[must_use]
    pub const fn reversed(self) -> Self {
        Self { source: self.destination, destination: self.source, ..self }
    }

    const fn family(&self) -> usize {
        if self.source.is_ipv4() { 0 } else { 1 }
    }

    fn attributes(&self) -> Attributes {
        let family = self.family();
        let ips = Attributes::default()
            .with(IP_SRC[family], &octets(self.source.ip()))
            .with(IP_DST[family], &octets(self.destination.ip()));
        let ports = Attributes::default()
            .with(PROTO_NUM, &[self.protocol])
            .with(PROTO_SRC_PORT, &self.source.port().to_be_bytes())
            .with(PROTO_DST_PORT, &self.destination.port().to_be_bytes());
        Attributes::default().nest(TUPLE_IP, ips).nest(TUPLE_PROTO, ports)
    }

    /// `None`: of a protocol without ports.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (mut source, mut destination) = (None, None);
        let (mut protocol, mut ports) = (None, (None, None));
        for (kind, inner) in attributes(bytes) {
            for (key, value) in attributes(inner) {
                match kind {
                    TUPLE_IP if IP_SRC.contains(&key) => source = ip(value),
                    TUPLE_IP if IP_DST.contains(&key) => destination = ip(value),
                    TUPLE_PROTO if key == PROTO_NUM => protocol = value.first().copied(),
                    TUPLE_PROTO if key == PROTO_SRC_PORT => ports.0 = port(value),
                    TUPLE_PROTO if key == PROTO_DST_PORT => ports.1 = port(value),
                    _ => {}
                }
            }
        }
        Some(Self {
            protocol: protocol?,
            source: SocketAddr::new(source?, ports.0?),
            destination: SocketAddr::new(destination?, ports.1?),
        })
    }
}

/// A connection that is sent elsewhere than it was dialled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translated {
    /// What the client sends.
    pub original: Tuple,
    /// What the backend sends.
    pub reply: Tuple,
}

impl Translated {
    /// Whether the backend sees another source than the client's.
    pub fn is_masqueraded(&self) -> bool {
        self.reply.destination != self.original.source
    }

    fn parse(message: &[u8]) -> Option<Self> {
        let (mut original, mut reply, mut status) = (None, None, 0);
        for (kind, value) in attributes(message.get(NFGENMSG..)?) {
            match kind {
                TUPLE_ORIG => original = Tuple::parse(value),
                TUPLE_REPLY => reply = Tuple::parse(value),
                STATUS => status = u32::from_be_bytes(*value.first_chunk()?),
                _ => {}
            }
        }
        // Kernels that do not filter by status send everything.
        (status & DST_NAT != 0).then_some(Self { original: original?, reply: reply? })
    }
}

/// Bytes of a `struct nfgenmsg`: family, version, resource.
const NFGENMSG: usize = 4;

const fn nfgenmsg(family: i32) -> [u8; NFGENMSG] {
    // Families are small numbers.
    [family.to_le_bytes()[0], 0, 0, 0]
}

/// The connection tracking of a network namespace.
#[derive(Debug)]
pub struct Conntrack(Netlink);

impl Conntrack {
    /// Of this thread's.
    ///
    /// # Errors
    /// If the kernel has none.
    pub fn open() -> io::Result<Self> {
        Netlink::open(netlink::Family::NetlinkNetFilter).map(Self)
    }

    /// All connections with a translated destination. One dump; kernels from 6.0 pick them out themselves.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn translated(&self) -> io::Result<Vec<Translated>> {
        let status = DST_NAT.to_be_bytes();
        let wanted = Attributes::default().with(STATUS, &status).with(STATUS_MASK, &status);
        let found = self.0.dump(GET, &wanted.after(&nfgenmsg(libc::AF_UNSPEC)), Translated::parse);
        found.map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel does not tell its connections: its module nf_conntrack_netlink is missing",
            ),
            _ => error,
        })
    }

    /// Forgets a connection; one that is not there is as good as forgotten.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn forget(&self, tuple: &Tuple) -> io::Result<()> {
        match self.0.ask(&[deletion(tuple)])?.pop() {
            Some(Err(error)) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            Some(_) | None => Ok(()),
        }
    }

    /// Has netfilter's NAT send on a connection from now on, instead of whatever entries it has for these tuples. Old
    /// ones are deleted and the new one is made by one call, so that hardly a packet comes between.
    ///
    /// # Errors
    /// If the kernel refuses, or packets kept taking the place.
    pub fn adopt(&self, connection: &Translated, answered: bool, instead: &[Tuple]) -> io::Result<()> {
        for attempt in 1.. {
            let mut messages: Vec<Message> = instead.iter().map(deletion).collect();
            messages.push(Message {
                kind: NEW,
                flags: libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL,
                payload: made(connection, answered),
            });
            // That there was nothing to delete is as well.
            match self.0.ask(&messages)?.pop() {
                Some(Err(error)) if error.raw_os_error() == Some(libc::EEXIST) && attempt < TRIES => {}
                Some(result) => return result,
                None => break,
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

fn deletion(tuple: &Tuple) -> Message {
    let payload =
        Attributes::default().nest(TUPLE_ORIG, tuple.attributes()).after(&nfgenmsg(af(tuple.family())));
    Message { kind: DELETE, flags: libc::NLM_F_ACK, payload }
}

/// As the kernel makes it itself: the reply is that of an untranslated connection, and the NAT attributes change it.
fn made(connection: &Translated, answered: bool) -> Vec<u8> {
    let Translated { original, reply } = connection;
    let family = original.family();
    let is_tcp = original.protocol == Protocol::Tcp.number();
    let (status, timeout) = match (is_tcp, answered) {
        (true, _) => (SEEN_REPLY | ASSURED, TCP_S),
        (false, true) => (SEEN_REPLY | ASSURED, ANSWERED_S),
        (false, false) => (0, UNANSWERED_S),
    };
    let mut entry = Attributes::default()
        .nest(TUPLE_ORIG, original.attributes())
        .nest(TUPLE_REPLY, original.reversed().attributes())
        .with(STATUS, &(CONFIRMED | status).to_be_bytes())
        .with(TIMEOUT, &timeout.to_be_bytes())
        .nest(NAT_DST, nat(reply.source));
    if connection.is_masqueraded() {
        entry = entry.nest(NAT_SRC, nat(reply.destination));
    }
    if is_tcp {
        let tcp = Attributes::default()
            .with(TCP_STATE, &[ESTABLISHED])
            .with(TCP_FLAGS[0], &LIBERAL)
            .with(TCP_FLAGS[1], &LIBERAL);
        entry = entry.nest(PROTOINFO, Attributes::default().nest(PROTOINFO_TCP, tcp));
    }
    entry.after(&nfgenmsg(af(family)))
}

fn nat(to: SocketAddr) -> Attributes {
    let family = if to.is_ipv4() { 0 } else { 1 };
    let (ip, port) = (octets(to.ip()), to.port().to_be_bytes());
    let ports = Attributes::default().with(NAT_PORT[0], &port).with(NAT_PORT[1], &port);
    Attributes::default().with(NAT_IP[family][0], &ip).with(NAT_IP[family][1], &ip).nest(NAT_PROTO, ports)
}

const fn af(family: usize) -> i32 {
    if family == 0 { libc::AF_INET } else { libc::AF_INET6 }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

fn port(bytes: &[u8]) -> Option<u16> {
    bytes.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::in_own_namespace;
    use proptest::prelude::*;

    fn tuple(protocol: Protocol, source: &str, destination: &str) -> Tuple {
        let at = |text: &str| text.parse().unwrap();
        Tuple { protocol: protocol.number(), source: at(source), destination: at(destination) }
    }

    /// By the kernel's own connection tracking.
    #[test]
    fn what_is_given_to_netfilter_is_found_there() {
        in_own_namespace(|| {
            let conntrack = Conntrack::open().unwrap();
            assert_eq!(conntrack.translated().unwrap(), []);
            let sides = [
                ("192.0.2.9:4000", "10.96.0.1:80", "10.244.1.5:8080", "172.18.0.2:20000"),
                ("[2001:db8::9]:4000", "[fd00::1]:80", "[fd00:1::5]:8080", "[fd00:2::2]:20000"),
            ];
            let mut given = Vec::new();
            for (client, vip, backend, masquerade) in sides {
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    // The one with another client port, so that both have a place.
                    for (client, seen) in [(client, client), (&*client.replace("4000", "4001"), masquerade)] {
                        let connection = Translated {
                            original: tuple(protocol, client, vip),
                            reply: tuple(protocol, backend, seen),
                        };
                        assert_eq!(connection.is_masqueraded(), seen == masquerade);
                        conntrack.adopt(&connection, seen == masquerade, &[]).unwrap();
                        given.push(connection);
                    }
                }
            }
            let sorted = || {
                let mut found = conntrack.translated().unwrap();
                found.sort_by_key(|connection| given.iter().position(|one| one == connection));
                found
            };
            assert_eq!(sorted(), given);

            // Another one of the same client has its place only if it may take it.
            let (first, other) = (given[0], tuple(Protocol::Tcp, "10.244.1.6:8080", "192.0.2.9:4000"));
            let moved = Translated { reply: other, ..first };
            let refused = conntrack.adopt(&moved, true, &[]).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EEXIST));
            conntrack
                .adopt(&moved, true, &[first.original, tuple(Protocol::Tcp, "192.0.2.1:1", "192.0.2.2:2")])
                .unwrap();
            assert!(conntrack.translated().unwrap().contains(&moved));
            assert!(!conntrack.translated().unwrap().contains(&first));
            // By either direction.
            conntrack.forget(&moved.reply).unwrap();
            conntrack.forget(&moved.reply).unwrap();
            assert_eq!(conntrack.translated().unwrap().len(), given.len() - 1);
        });
    }

    fn message(connection: &Translated, status: u32) -> Vec<u8> {
        Attributes::default()
            .nest(TUPLE_ORIG, connection.original.attributes())
            .nest(TUPLE_REPLY, connection.reply.attributes())
            .with(STATUS, &status.to_be_bytes())
            .after(&nfgenmsg(libc::AF_INET))
    }

    #[test]
    fn a_message_that_is_cut_short_is_no_connection() {
        let connection = Translated {
            original: tuple(Protocol::Udp, "192.0.2.9:4000", "10.96.0.1:53"),
            reply: tuple(Protocol::Udp, "10.244.1.5:53", "192.0.2.9:4000"),
        };
        let message = message(&connection, DST_NAT);
        assert_eq!(Translated::parse(&message), Some(connection));
        for length in 0..message.len() {
            assert_eq!(Translated::parse(&message[..length]), None, "{length}");
        }
    }

    fn any_tuple() -> impl Strategy<Value = Tuple> {
        let v4 = any::<[(std::net::Ipv4Addr, u16); 2]>()
            .prop_map(|ends| ends.map(|(ip, port)| SocketAddr::new(ip.into(), port)));
        let v6 = any::<[(std::net::Ipv6Addr, u16); 2]>()
            .prop_map(|ends| ends.map(|(ip, port)| SocketAddr::new(ip.into(), port)));
        let ends = prop_oneof![v4, v6];
        (any::<u8>(), ends).prop_map(|(protocol, [source, destination])| Tuple {
            protocol,
            source,
            destination,
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read((original, reply) in (any_tuple(), any_tuple()), status: u32) {
            let connection = Translated { original, reply };
            let wanted = (status & DST_NAT != 0).then_some(connection);
            prop_assert_eq!(Translated::parse(&message(&connection, status)), wanted);
        }

        #[test]
        fn no_bytes_stop_the_reader(bytes: Vec<u8>) {
            let _ = Translated::parse(&bytes);
        }

        /// Bytes that look like a message as far as one can get.
        #[test]
        fn no_damage_stops_the_reader(
            (original, reply) in (any_tuple(), any_tuple()),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut bytes = message(&Translated { original, reply }, DST_NAT);
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let _ = Translated::parse(&bytes);
        }
    }
}
