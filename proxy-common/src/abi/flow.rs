//! `FLOWS` and `YOUNG_FLOWS`: client endpoint → connection, and `SNAT` and `YOUNG_SNAT`: replaced source → client; a
//! client's port inside the node is one of those too.
//! Written by the kernel programs; the agent removes what is old.
//!
//! A connection is young until its client goes on after the first answer. Young ones live in LRU tables, where a flood of
//! them turns over nothing but each other; the others live in preallocated hashes, where nothing is ever thrown out.

use super::{Address, BackendId, Port, ServiceId};

/// The client's side of a connection, as it came in.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct FlowKey {
    /// The client.
    pub client: Address,
    /// Its port.
    pub port: Port,
    /// IP protocol number.
    pub protocol: u8,
    /// One client port may talk to several VIPs: each has a slot of its own (M11).
    pub slot: u8,
}

layout!(FlowKey, size = 20, fields = Address, Port, u8, u8);

impl FlowKey {
    /// How many VIPs one client port can talk to at a time.
    pub const SLOTS: u8 = 4;

    /// Who has a replaced source that netfilter's NAT gave away: no client of ours. In `SNAT` only.
    pub const NOBODY: Self =
        Self { client: Address::from_words([0; 4]), port: Port::new(0), protocol: 0, slot: u8::MAX };

    /// Whether it is [`Self::NOBODY`].
    #[inline(always)]
    pub const fn is_nobody(&self) -> bool {
        self.slot == u8::MAX
    }

    /// Slot 0.
    #[inline(always)]
    pub const fn new(client: Address, port: Port, protocol: u8) -> Self {
        Self { client, port, protocol, slot: 0 }
    }

    /// The same in another slot.
    #[inline(always)]
    #[must_use]
    pub const fn in_slot(mut self, slot: u8) -> Self {
        self.slot = slot;
        self
    }
}

/// One connection.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flow {
    /// What was dialled.
    pub vip: Address,
    /// Where it goes.
    pub backend: Address,
    /// The source that the backend sees, if it is replaced; unset until the first packet leaves.
    pub snat: Address,
    /// Which backend that is; a datagram flow stays only while it serves (C2).
    pub backend_id: BackendId,
    /// When a packet last passed: nanoseconds of the monotonic clock, kept to within a second.
    pub used_ns: u64,
    /// Whose VIP it was.
    pub service: ServiceId,
    /// Dialled port.
    pub vip_port: Port,
    /// The backend's port.
    pub backend_port: Port,
    /// Replaced source port; 0: none yet.
    pub snat_port: Port,
    /// The port that the client has inside the node, where its own would clash with another flow (M11); 0: its own.
    pub inner_port: Port,
    /// See the constants.
    pub flags: u32,
    /// Where a process of this node sent it to, so that replies can come from there: an interface index.
    pub device: u32,
    /// Always 0.
    pub zero: u32,
}

layout!(
    Flow,
    size = 88,
    fields = Address,
    Address,
    Address,
    BackendId,
    u64,
    ServiceId,
    Port,
    Port,
    Port,
    Port,
    u32,
    u32,
    u32
);

impl Flow {
    /// The source must be replaced when the packet leaves (rule M).
    pub const NEEDS_SNAT: u32 = 1;
    /// The backend has answered, and the client has gone on: it is in `FLOWS`.
    pub const ANSWERED: u32 = 2;
    /// The client has ended its direction (TCP FIN).
    pub const CLIENT_FIN: u32 = 4;
    /// The backend has ended its direction (TCP FIN).
    pub const BACKEND_FIN: u32 = 8;
    /// Either side has cut it (TCP RST).
    pub const RESET: u32 = 16;
    /// The client is a process of this node that no socket hook saw: replies go back to it here.
    pub const OWN_NODE: u32 = 32;
    /// A datagram flow that netfilter's NAT owns: its packets are left alone as long as the backend serves. Its backend is
    /// unset; `backend_id` may be, while it is not known.
    pub const FOREIGN: u32 = 64;
    /// The agent is handing it to netfilter's NAT: its packets are dropped for that moment, and sent again.
    pub const HELD: u32 = 128;
    /// The backend has answered. Its client need not exist: whoever floods a backend that answers has senders of its
    /// invention.
    pub const HEARD: u32 = 256;
    /// The client has gone on after that, but `FLOWS` had no room.
    pub const CROWDED_OUT: u32 = 512;

    /// How long a foreign flow lives without a packet, in nanoseconds, whether an agent runs or not: as long as netfilter
    /// keeps one that was answered.
    pub const FOREIGN_IDLE_NS: u64 = 120_000_000_000;

    /// Whether netfilter's NAT owns it.
    #[inline(always)]
    pub const fn is_foreign(&self) -> bool {
        self.flags & Self::FOREIGN != 0
    }

    /// Whether it is being handed over.
    #[inline(always)]
    pub const fn is_held(&self) -> bool {
        self.flags & Self::HELD != 0
    }

    /// Whether the backend has answered.
    #[inline(always)]
    pub const fn is_answered(&self) -> bool {
        self.flags & (Self::ANSWERED | Self::HEARD) != 0
    }

    /// Of a connection that has ended, and whose packets are not to be told from those of the next one. What nobody dials is
    /// found by nobody, and swept away.
    pub const NOBODYS: Self = Self {
        vip: Address::from_words([0; 4]),
        backend: Address::from_words([0; 4]),
        snat: Address::from_words([0; 4]),
        backend_id: BackendId::NONE,
        used_ns: 0,
        service: 0,
        vip_port: Port::from_raw(0),
        backend_port: Port::from_raw(0),
        snat_port: Port::from_raw(0),
        inner_port: Port::from_raw(0),
        flags: Self::RESET,
        device: 0,
        zero: 0,
    };

    /// Whether nothing more is expected: the client's port may be used for a new connection.
    #[inline(always)]
    pub const fn is_over(&self) -> bool {
        const BOTH: u32 = Flow::CLIENT_FIN | Flow::BACKEND_FIN;
        self.flags & Self::RESET != 0 || self.flags & BOTH == BOTH
    }

    /// Whether the source is replaced.
    #[inline(always)]
    pub const fn needs_snat(&self) -> bool {
        self.flags & Self::NEEDS_SNAT != 0
    }

    /// Whether it goes to this backend with the client's own port.
    #[inline(always)]
    pub fn goes_to(&self, backend: (Address, Port)) -> bool {
        self.backend == backend.0 && self.backend_port == backend.1 && self.inner_port == Port::new(0)
    }

    /// The client's port inside the node, where its own is `own` (M11).
    #[inline(always)]
    pub fn port_inside(&self, own: Port) -> Port {
        if self.inner_port == Port::new(0) { own } else { self.inner_port }
    }

    /// How its replaced source comes back; of no meaning before there is one.
    #[inline(always)]
    pub const fn way_back(&self, protocol: u8) -> SnatKey {
        SnatKey::new((self.snat, self.snat_port), (self.backend, self.backend_port), protocol)
    }

    /// How this client is found by its port inside the node; of no meaning if that is its own.
    #[inline(always)]
    pub const fn inside(&self, client: &FlowKey) -> SnatKey {
        let backend = (self.backend, self.backend_port);
        SnatKey::inside((client.client, self.inner_port), backend, client.protocol)
    }
}

/// How a replaced source comes back: the destination and source of the backend's reply. Or how a client is found whose
/// port is another one inside the node (M11): the same, as it is there.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct SnatKey {
    /// The replaced source.
    pub snat: Address,
    /// Who was sent to.
    pub backend: Address,
    /// The replaced source port.
    pub snat_port: Port,
    /// The backend's port.
    pub backend_port: Port,
    /// IP protocol number.
    pub protocol: u8,
    /// 0: a replaced source, which is the node's. 1: a client's own address with its port inside the node.
    inside: u8,
    zeros: u16,
}

layout!(SnatKey, size = 40, fields = Address, Address, Port, Port, u8, u8, u16);

impl SnatKey {
    /// Of a replaced source and who was sent to.
    #[inline(always)]
    pub const fn new(snat: (Address, Port), backend: (Address, Port), protocol: u8) -> Self {
        Self {
            snat: snat.0,
            backend: backend.0,
            snat_port: snat.1,
            backend_port: backend.1,
            protocol,
            inside: 0,
            zeros: 0,
        }
    }

    /// Of a client as it is inside the node, and who was sent to.
    #[inline(always)]
    pub const fn inside(client: (Address, Port), backend: (Address, Port), protocol: u8) -> Self {
        Self { inside: 1, ..Self::new(client, backend, protocol) }
    }

    /// The port, read from memory: by that the verifier of Linux 6.1 knows that it has sixteen bits.
    #[inline(always)]
    pub fn stored_port(&self) -> Port {
        // SAFETY: a reference is readable.
        unsafe { (&raw const self.snat_port).read_volatile() }
    }

    /// Which of the two it is.
    #[inline(always)]
    pub const fn is_inside(&self) -> bool {
        self.inside != 0
    }
}

/// `FRAGMENTS`: LRU hash. Only the first fragment of a packet has its ports.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct FragmentKey {
    /// Source of the fragment, as it is at the hook.
    pub source: Address,
    /// Its destination.
    pub destination: Address,
    /// Identification: 16 bits of IPv4 or 32 of IPv6, as they lie in the header.
    pub id: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// 0 at ingress, 1 at egress: the addresses differ, but need not.
    pub at_egress: u8,
    /// Always 0.
    pub zero: u16,
}

layout!(FragmentKey, size = 40, fields = Address, Address, u32, u8, u8, u16);

/// What the first fragment said.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct FragmentPorts {
    /// Source port.
    pub source: Port,
    /// Destination port.
    pub destination: Port,
}

layout!(FragmentPorts, size = 4, fields = Port, Port);

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::IpAddr;

    #[test]
    fn flow_key_bytes() {
        let key = FlowKey::new(IpAddr::from([10, 0, 0, 9]).into(), Port::new(40000), 6).in_slot(2);
        // SAFETY: the layout assertion proves 20 bytes without padding.
        let bytes: [u8; 20] = unsafe { core::mem::transmute(key) };
        assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 9, 0x9c, 0x40, 6, 2]);
    }

    #[test]
    fn over_is_both_directions_or_a_reset() {
        let flow = |flags| Flow { flags, ..Flow::default() };
        assert!(!flow(Flow::CLIENT_FIN | Flow::ANSWERED).is_over() && !flow(Flow::BACKEND_FIN).is_over());
        assert!(flow(Flow::CLIENT_FIN | Flow::BACKEND_FIN).is_over() && flow(Flow::RESET).is_over());
    }
}
