//! Packets made from scratch. A rewritten frame is compared with one that is made as it should have become: so every
//! checksum of every rewrite is held against one that nobody adjusted.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use etherparse::{EtherType, Ethernet2Header, IpNumber, Ipv4Header, Ipv6Header, TcpHeader, UdpHeader};

use super::frame::{Frame, Unfinished, sum};

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

pub(crate) const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
pub(crate) const NODE_MAC: [u8; 6] = [2, 0, 0xaa, 0xbb, 0xcc, 1];

/// What a packet carries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Carries {
    Tcp {
        flags: u8,
        sequence: u32,
        acknowledged: u32,
        options: Vec<u8>,
    },
    Udp,
    /// With a checksum of zero.
    UdpWithout,
    Sctp,
    /// Type and code, and the four bytes after the checksum.
    Icmp([u8; 2], [u8; 4]),
    /// Another protocol.
    Other(u8),
}

pub(crate) fn tcp(flags: u8) -> Carries {
    Carries::Tcp { flags, sequence: 0x0102_0304, acknowledged: 0xf1f2_f3f4, options: Vec::new() }
}

/// All there is to say about a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Build {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) carries: Carries,
    pub(crate) payload: Vec<u8>,
    pub(crate) ttl: u8,
    /// Of an IPv4 packet that is no fragment.
    pub(crate) id: u16,
    /// Of TCP.
    pub(crate) window: u16,
    /// Of IPv4.
    pub(crate) options: Vec<u8>,
    /// Of IPv6: number and bytes, the next header left out of them.
    pub(crate) extensions: Vec<(u8, Vec<u8>)>,
    /// Which bytes of transport header and payload this fragment has, and of which packet.
    pub(crate) fragment: Option<(Range<usize>, u16)>,
}

pub(crate) fn build(carries: Carries, from: SocketAddr, to: SocketAddr) -> Build {
    Build {
        from,
        to,
        carries,
        payload: b"what is carried".to_vec(),
        ttl: 61,
        id: 0x3137,
        window: 0x4000,
        options: Vec::new(),
        extensions: Vec::new(),
        fragment: None,
    }
}

/// The transport checksum between two addresses of one family.
fn checksum<E: std::fmt::Debug>(
    ips: (IpAddr, IpAddr),
    v4: impl FnOnce([u8; 4], [u8; 4]) -> Result<u16, E>,
    v6: impl FnOnce([u8; 16], [u8; 16]) -> Result<u16, E>,
) -> u16 {
    match ips {
        (IpAddr::V4(from), IpAddr::V4(to)) => v4(from.octets(), to.octets()),
        (IpAddr::V6(from), IpAddr::V6(to)) => v6(from.octets(), to.octets()),
        mixed => panic!("{mixed:?}"),
    }
    .unwrap()
}

fn pseudo_header(from: IpAddr, to: IpAddr, protocol: u8, bytes: usize) -> Vec<u8> {
    let octets = |ip| match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let mut header = [octets(from), octets(to)].concat();
    header.extend(u32::try_from(bytes).unwrap().to_be_bytes());
    header.extend([0, 0, 0, protocol]);
    header
}

impl Build {
    pub(crate) fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// The same packet between others.
    pub(crate) fn between(&self, from: SocketAddr, to: SocketAddr) -> Self {
        self.clone().with(|build| (build.from, build.to) = (from, to))
    }

    pub(crate) fn protocol(&self) -> u8 {
        match &self.carries {
            Carries::Tcp { .. } => 6,
            Carries::Udp | Carries::UdpWithout => 17,
            Carries::Sctp => 132,
            Carries::Icmp(..) if self.from.is_ipv6() => 58,
            Carries::Icmp(..) => 1,
            Carries::Other(number) => *number,
        }
    }

    /// Transport header and payload.
    pub(crate) fn segment(&self) -> Vec<u8> {
        let (from, to, payload) = (self.from.port(), self.to.port(), &self.payload);
        let ips = (self.from.ip(), self.to.ip());
        let mut segment = match &self.carries {
            Carries::Tcp { flags, sequence, acknowledged, options } => {
                let mut header = TcpHeader::new(from, to, *sequence, self.window);
                (header.fin, header.syn) = (flags & FIN != 0, flags & SYN != 0);
                (header.rst, header.ack) = (flags & RST != 0, flags & ACK != 0);
                header.acknowledgment_number = *acknowledged;
                header.set_options_raw(options).unwrap();
                header.checksum = checksum(
                    ips,
                    |from, to| header.calc_checksum_ipv4_raw(from, to, payload),
                    |from, to| header.calc_checksum_ipv6_raw(from, to, payload),
                );
                header.to_bytes().to_vec()
            }
            Carries::Udp | Carries::UdpWithout => {
                let length = u16::try_from(8 + payload.len()).unwrap();
                let mut header = UdpHeader { source_port: from, destination_port: to, length, checksum: 0 };
                if self.carries == Carries::Udp {
                    header.checksum = checksum(
                        ips,
                        |from, to| header.calc_checksum_ipv4_raw(from, to, payload),
                        |from, to| header.calc_checksum_ipv6_raw(from, to, payload),
                    );
                }
                header.to_bytes().to_vec()
            }
            // The last four bytes stand for a CRC32c: whatever it is, it has to stay.
            Carries::Sctp => {
                [from.to_be_bytes().as_slice(), &to.to_be_bytes(), &[0, 0, 0, 9, 12, 13, 14, 15]].concat()
            }
            Carries::Icmp([kind, code], rest) => {
                let mut message = [&[*kind, *code, 0, 0], rest.as_slice()].concat();
                let mut covered = [message.as_slice(), payload].concat();
                if self.from.is_ipv6() {
                    covered.splice(0..0, pseudo_header(ips.0, ips.1, 58, message.len() + payload.len()));
                }
                message[2..4].copy_from_slice(&(!sum(&covered)).to_be_bytes());
                message
            }
            Carries::Other(_) => Vec::new(),
        };
        segment.extend(payload);
        segment
    }

    /// IP header and what follows.
    pub(crate) fn packet(&self) -> Vec<u8> {
        let mut body = self.segment();
        let (mut offset, mut more) = (0, false);
        if let Some((part, _)) = &self.fragment {
            (offset, more) = (u16::try_from(part.start / 8).unwrap(), part.end < body.len());
            body = body[part.clone()].to_vec();
        }
        match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut header =
                    Ipv4Header::new(0, self.ttl, IpNumber(self.protocol()), from.octets(), to.octets())
                        .unwrap();
                header.options = self.options.as_slice().try_into().unwrap();
                header.identification = self.fragment.as_ref().map_or(self.id, |(_, id)| *id);
                header.dont_fragment = self.fragment.is_none();
                header.more_fragments = more;
                header.fragment_offset = offset.try_into().unwrap();
                header.set_payload_len(body.len()).unwrap();
                header.header_checksum = header.calc_header_checksum();
                [header.to_bytes().as_slice(), &body].concat()
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let mut extensions = self.extensions.clone();
                if let Some((_, id)) = &self.fragment {
                    let [high, low] = (offset << 3 | u16::from(more)).to_be_bytes();
                    let [id_high, id_low] = id.to_be_bytes();
                    extensions.push((44, vec![0, high, low, 0xaa, 0xbb, id_high, id_low]));
                }
                let mut next = self.protocol();
                for (number, bytes) in extensions.iter().rev() {
                    body = [&[next], bytes.as_slice(), &body].concat();
                    next = *number;
                }
                let header = Ipv6Header {
                    payload_length: u16::try_from(body.len()).unwrap(),
                    next_header: IpNumber(next),
                    hop_limit: self.ttl,
                    source: from.octets(),
                    destination: to.octets(),
                    ..Ipv6Header::default()
                };
                [header.to_bytes().as_slice(), &body].concat()
            }
            mixed => panic!("{mixed:?}"),
        }
    }

    pub(crate) fn frame(&self) -> Frame {
        let ether_type = if self.from.is_ipv6() { EtherType::IPV6 } else { EtherType::IPV4 };
        let header = Ethernet2Header { source: CLIENT_MAC, destination: NODE_MAC, ether_type };
        Frame::new([header.to_bytes().as_slice(), &self.packet()].concat())
    }

    /// As it leaves a socket when a device can do checksums.
    pub(crate) fn unfinished(&self) -> Frame {
        let mut frame = self.frame();
        let length = self.segment().len();
        let start = frame.bytes.len() - length;
        let udp = self.carries == Carries::Udp;
        let field = start + if udp { 6 } else { 16 };
        let seed = sum(&pseudo_header(self.from.ip(), self.to.ip(), self.protocol(), length));
        frame.bytes[field..field + 2].copy_from_slice(&seed.to_be_bytes());
        frame.unfinished = Some(Unfinished { start, field, udp });
        assert_eq!(frame.finished(), self.frame());
        frame
    }

    /// In every way that the kernel may hold it.
    pub(crate) fn frames(&self) -> Vec<Frame> {
        let can_be_left = matches!(self.carries, Carries::Tcp { .. } | Carries::Udp);
        if can_be_left && self.fragment.is_none() {
            vec![self.frame(), self.unfinished()]
        } else {
            vec![self.frame()]
        }
    }
}
