//! `DATAGRAM_FLOWS` and `DATAGRAM_ORIGIN`: LRU hashes for unconnected UDP sockets. Written by the kernel programs only.
//!
//! One socket may talk to many VIPs, so socket storage is not enough here. Way out: (socket, VIP:port) → flow. Way back:
//! (socket, backend:port) → VIP, believed only if the flow of that VIP still goes to that backend (B12).

use super::{Address, BackendId, Port, ServiceId};

/// A socket and a peer of it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DatagramKey {
    cookie: u64,
    address: Address,
    port: Port,
    zero: [u16; 3],
}

layout!(DatagramKey, size = 32, fields = u64, Address, Port, [u16; 3]);

impl DatagramKey {
    /// `cookie` is the kernel's socket cookie.
    #[inline(always)]
    pub const fn new(cookie: u64, peer: (Address, Port)) -> Self {
        Self { cookie, address: peer.0, port: peer.1, zero: [0; 3] }
    }
}

/// One endpoint per socket and VIP:port while it serves and the flow is not idle (B12).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DatagramFlow {
    /// Which backend.
    pub backend_id: BackendId,
    /// The last datagram of either direction: nanoseconds of the monotonic clock.
    pub last_ns: u64,
    /// The backend's address.
    pub backend: Address,
    /// The backend's port.
    pub backend_port: Port,
    answered: u16,
    seal: u32,
}

layout!(DatagramFlow, size = 40, fields = BackendId, u64, Address, Port, u16, u32);

/// `nf_conntrack_udp_timeout` of the kernel: idle time of a flow that has no answer yet.
const UNANSWERED_NS: u64 = 30_000_000_000;
/// `nf_conntrack_udp_timeout_stream`: idle time of an answered flow.
const ANSWERED_NS: u64 = 120_000_000_000;

impl DatagramFlow {
    /// A new flow of a datagram to `service`.
    #[inline(always)]
    pub const fn new(
        service: ServiceId,
        backend_id: BackendId,
        backend: (Address, Port),
        now_ns: u64,
    ) -> Self {
        Self {
            backend_id,
            last_ns: now_ns,
            backend: backend.0,
            backend_port: backend.1,
            answered: 0,
            seal: super::seal(service, backend_id.bits(), 0),
        }
    }

    /// Whether the backend was chosen for `service`: the VIP may have gone to another one (C2), or the element to another
    /// key. Time and answer are not sealed: threads of one socket write them into one element at the same time.
    #[inline(always)]
    pub const fn is_of(&self, service: ServiceId) -> bool {
        self.seal == super::seal(service, self.backend_id.bits(), 0)
    }

    /// Whether the flow has been idle for so long that the next datagram chooses anew.
    #[inline(always)]
    pub const fn is_idle(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.last_ns) >= if self.answered != 0 { ANSWERED_NS } else { UNANSWERED_NS }
    }

    /// A datagram came back from the backend.
    #[inline(always)]
    pub const fn answer(&mut self, now_ns: u64) {
        self.answered = 1;
        self.last_ns = now_ns;
    }
}

/// The VIP of a reply.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DatagramOrigin {
    /// The VIP that was dialled.
    pub vip: Address,
    /// Its port.
    pub vip_port: Port,
    zero: u16,
}

layout!(DatagramOrigin, size = 20, fields = Address, Port, u16);

impl DatagramOrigin {
    /// Of a dialled VIP.
    #[inline(always)]
    pub const fn new(vip: (Address, Port)) -> Self {
        Self { vip: vip.0, vip_port: vip.1, zero: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::IpAddr;

    #[test]
    fn key_bytes() {
        let key =
            DatagramKey::new(0x0807_0605_0403_0201, (IpAddr::from([10, 96, 0, 10]).into(), Port::new(53)));
        // SAFETY: the layout assertion proves 32 bytes without padding.
        let bytes: [u8; 32] = unsafe { core::mem::transmute(key) };
        let expected = [
            1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 96, 0, 10, 0, 53, 0, 0, 0,
            0, 0, 0,
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn idle_times_are_the_kernels() {
        let mut flow = DatagramFlow::new(7, BackendId::new(1, 1), (Address::default(), Port::new(53)), 1_000);
        assert!(!flow.is_idle(1_000 + UNANSWERED_NS - 1) && flow.is_idle(1_000 + UNANSWERED_NS));
        flow.answer(1_000);
        assert!(!flow.is_idle(1_000 + ANSWERED_NS - 1) && flow.is_idle(1_000 + ANSWERED_NS));
        assert!(flow.is_of(7) && !flow.is_of(8));
        flow.backend_id = BackendId::new(2, 1);
        assert!(!flow.is_of(7), "an element that changes hands while it is read");
    }
}
