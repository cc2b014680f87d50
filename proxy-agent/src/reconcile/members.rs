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

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_member_is_found_by_its_address_in_whatever_order_it_came() {
        let at = |n: u32| -> SocketAddr {
            let port = 80 + u16::from(n.is_multiple_of(3));
            let [.., a, b] = n.to_be_bytes();
            if n.is_multiple_of(2) {
                ([10, 244, a, b], port).into()
            } else {
                ([0xfd00, 0, 0, 0, 0, 0, u16::from(a), u16::from(b)], port).into()
            }
        };
        let (mut members, mut expected) = (Members::with_capacity(3), BTreeMap::new());
        assert!(members.is_empty());
        // 7,919 is prime: every number below 1,000 comes once, and then again with another state.
        for n in 0..2_000 {
            let address = at(n * 7_919 % 1_000);
            let state = BackendState { cluster: n < 1_000, serving: true, ..BackendState::default() };
            let member = Member { id: BackendId::new(n, 1), state };
            assert_eq!(members.get(&address), expected.insert(address, member));
            members.insert(address, member);
            assert_eq!(members.get(&address), Some(member));
        }
        assert!(members.iter().eq(expected), "in the order of addresses, each once");
        assert_eq!(members.get(&at(1_000)), None);
    }
}
