//! `SOCKET_ORIGIN`: socket storage of TCP and connected UDP sockets. Written by the kernel programs only.

use super::{Address, BackendId, Port};

/// What the application dialled and where the connection went instead.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SocketOrigin {
    /// The backend, for whoever must find sockets of backends that are gone (B5).
    pub backend_id: BackendId,
    /// The VIP that was dialled.
    pub vip: Address,
    /// The backend's address: the answer below holds only while the peer still is this.
    pub backend: Address,
    /// The VIP's port.
    pub vip_port: Port,
    /// The backend's port.
    pub backend_port: Port,
    zero: u32,
}

layout!(SocketOrigin, size = 48, fields = BackendId, Address, Address, Port, Port, u32);

impl SocketOrigin {
    /// Remembers that `vip` was dialled and `backend` is the peer.
    #[inline(always)]
    pub const fn new(vip: (Address, Port), backend_id: BackendId, backend: (Address, Port)) -> Self {
        Self { backend_id, vip: vip.0, backend: backend.0, vip_port: vip.1, backend_port: backend.1, zero: 0 }
    }

    /// The VIP, if `peer` is the backend that this socket was sent to.
    #[inline(always)]
    pub fn vip_of(&self, peer: (Address, Port)) -> Option<(Address, Port)> {
        if self.backend == peer.0 && self.backend_port == peer.1 {
            Some((self.vip, self.vip_port))
        } else {
            None
        }
    }
}
