//! The backends of one record by their address: a sorted list, since there are many records and most have few.

use std::net::SocketAddr;

use proxy_common::abi::{Address, BackendId, BackendState};

/// A backend as written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Member {
    pub(super) id: BackendId,
    pub(super) state: BackendState,
}

/// See the module. In the order of socket addresses, in which they are added.
#[derive(Debug, Default)]
pub(super) struct Members(Vec<Entry>);

/// Smaller than address and member side by side.
#[derive(Debug)]
struct Entry {
    id: BackendId,
    address: Address,
    port: u16,
    state: BackendState,
}

impl Entry {
    fn at(&self) -> SocketAddr {
        SocketAddr::new(self.address.ip(), self.port)
    }
}

impl Members {
    pub(super) fn with_capacity(count: usize) -> Self {
        Self(Vec::with_capacity(count))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn get(&self, at: &SocketAddr) -> Option<Member> {
        let entry = self.find(at).ok().and_then(|place| self.0.get(place))?;
        Some(Member { id: entry.id, state: entry.state })
    }

    /// In place of the one at this address, if there is one.
    pub(super) fn insert(&mut self, at: SocketAddr, member: Member) {
        let Member { id, state } = member;
        let entry = Entry { id, address: at.ip().into(), port: at.port(), state };
        match self.find(&at) {
            Ok(place) => {
                if let Some(old) = self.0.get_mut(place) {
                    *old = entry;
                }
            }
            Err(place) => self.0.insert(place, entry),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (SocketAddr, Member)> {
        self.0.iter().map(|entry| (entry.at(), Member { id: entry.id, state: entry.state }))
    }

    fn find(&self, at: &SocketAddr) -> Result<usize, usize> {
        self.0.binary_search_by_key(at, Entry::at)
    }
}
