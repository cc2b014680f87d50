//! `SOCKET_PLACES`, an array, and `SOCKET_ORIGIN`, socket storage: what TCP and connected UDP sockets dialled. Written by
//! the kernel programs only.
//!
//! Making and freeing a socket's storage costs 0.9 µs, more than all the rest of a connection through a VIP. So a socket
//! takes the place that its cookie points to, and leaves it when it is closed; storage is for those who find it taken.

use super::{Address, BackendId, Port};

/// How many sockets can have a place, a power of two. Cookies are given out in turn, so few sockets meet.
pub const SOCKET_PLACES: u32 = 1 << 15;

/// What the application dialled and where the connection went instead.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SocketOrigin {
    /// The backend, for whoever must find sockets of backends that are gone (B5).
    pub backend_id: BackendId,
    // Halves, not words: what a program puts together in words and copies in larger pieces, the processor holds up until all
    // of it is written.
    vip: [u64; 2],
    backend: [u64; 2],
    /// The VIP's in the lowest quarter, the backend's in the next.
    ports: u64,
}

layout!(SocketOrigin, size = 48, fields = BackendId, [u64; 2], [u64; 2], u64);

impl SocketOrigin {
    /// Remembers that `vip` was dialled and `backend` is the peer.
    #[inline(always)]
    pub const fn new(vip: (Address, Port), backend_id: BackendId, backend: (Address, Port)) -> Self {
        Self {
            backend_id,
            vip: vip.0.halves(),
            backend: backend.0.halves(),
            ports: vip.1.raw() as u64 | (backend.1.raw() as u64) << 16,
        }
    }

    /// The VIP that was dialled.
    #[inline(always)]
    pub const fn vip(&self) -> (Address, Port) {
        (Address::from_halves(self.vip), Port::from_word(super::low(self.ports)))
    }

    /// Where the connection went: [`Self::vip_of`] holds only while the peer still is this.
    #[inline(always)]
    pub const fn backend(&self) -> (Address, Port) {
        (Address::from_halves(self.backend), Port::from_word(super::low(self.ports >> 16)))
    }

    /// The VIP, if `peer` is the backend that this socket was sent to.
    #[inline(always)]
    pub fn vip_of(&self, peer: (Address, Port)) -> Option<(Address, Port)> {
        if self.backend() == peer { Some(self.vip()) } else { None }
    }
}

/// The place of the sockets whose cookies end alike.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SocketPlace {
    /// Whose it is; 0: nobody's.
    pub cookie: u64,
    /// What that socket dialled.
    pub origin: SocketOrigin,
    /// Of the cookie and the origin: two sockets may take a free place at the same instant, and mix.
    seal: u32,
    /// Not 0 once a socket found the place taken: one that is not here may be in storage.
    pub overflowed: u32,
}

layout!(SocketPlace, size = 64, fields = u64, SocketOrigin, u32, u32);

impl SocketPlace {
    /// Taken by a socket.
    #[inline(always)]
    pub const fn new(cookie: u64, origin: SocketOrigin, overflowed: u32) -> Self {
        Self { cookie, seal: Self::seal_of(cookie, &origin), origin, overflowed }
    }

    /// Its place in the array.
    #[inline(always)]
    pub const fn index(cookie: u64) -> u32 {
        super::low(cookie) & (SOCKET_PLACES - 1)
    }

    /// What the socket of that cookie dialled, if it has the place.
    #[inline(always)]
    pub fn origin_of(&self, cookie: u64) -> Option<&SocketOrigin> {
        if self.cookie == cookie && self.seal == Self::seal_of(cookie, &self.origin) {
            Some(&self.origin)
        } else {
            None
        }
    }

    #[inline(always)]
    const fn seal_of(cookie: u64, origin: &SocketOrigin) -> u32 {
        let [upper, lower] = origin.vip;
        super::seal(super::low(origin.ports), upper ^ lower ^ cookie, origin.backend_id.bits())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::IpAddr;

    #[test]
    fn a_place_that_two_sockets_mixed_is_nobodys() {
        let peer = |last| (Address::from(IpAddr::from([10, 96, 0, last])), Port::new(80));
        let origin = |vip, backend| SocketOrigin::new(peer(vip), BackendId::new(backend, 1), peer(9));
        let place = SocketPlace::new(7, origin(1, 3), 0);
        assert_eq!(place.origin_of(7), Some(&origin(1, 3)));
        assert_eq!(place.origin_of(8), None);
        for mixed in [origin(2, 3), origin(1, 4)] {
            assert_eq!(SocketPlace { origin: mixed, ..place }.origin_of(7), None);
        }
        assert_eq!(SocketPlace { cookie: 7 + u64::from(SOCKET_PLACES), ..place }.origin_of(7), None);
        assert_eq!(SocketPlace::index(7), SocketPlace::index(7 + u64::from(SOCKET_PLACES)));
    }
}
