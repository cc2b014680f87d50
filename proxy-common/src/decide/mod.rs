//! The decision core: which frontend, which set for whom, affinity, which backend.
//!
//! Safe code, generic over [`Tables`]. The kernel programs give it the maps, host tests and `sheave explain` give it
//! tables in memory; the decisions are the same because the code is. A hook is: context → destination → decide → apply.

mod affinity;
mod connect;
mod datagram;
pub mod packet;
mod select;
pub mod snat;

pub use connect::{Client, Connect, connect, connect_at_once, connect_closely, serve};
pub use datagram::{Sent, receive, send};
pub use select::get;

use crate::abi::{
    Address, AffinityEntry, AffinityKey, Backend, DatagramFlow, DatagramKey, DatagramOrigin, Frontend,
    FrontendKey, Glance, Port, Slot,
};

/// What the decision core reads and remembers. Two implementations: the kernel's maps, and memory.
pub trait Tables {
    /// `FRONTENDS`, with the words of the service record, each read atomically; [`Frontend::NONE`] if it is not there.
    fn frontend(&self, key: &FrontendKey) -> Frontend;
    /// What can be said of a frontend at once.
    fn glance(&self, key: &FrontendKey) -> Glance {
        Glance::of(&self.frontend(key))
    }
    /// `SLOTS`.
    fn slot(&self, index: u32) -> Option<Slot>;
    /// `BACKENDS`.
    fn backend(&self, index: u32) -> Option<Backend>;
    /// `AFFINITY`.
    fn affinity_entry(&self, key: &AffinityKey) -> Option<AffinityEntry>;
    /// `AFFINITY`: best effort, a full table forgets somebody else.
    fn remember_affinity(&self, key: &AffinityKey, entry: &AffinityEntry);
    /// `DATAGRAM_FLOWS`.
    fn datagram_flow(&self, key: &DatagramKey) -> Option<DatagramFlow>;
    /// `DATAGRAM_FLOWS`: best effort.
    fn remember_datagram_flow(&self, key: &DatagramKey, flow: &DatagramFlow);
    /// `DATAGRAM_ORIGIN`.
    fn datagram_origin(&self, key: &DatagramKey) -> Option<DatagramOrigin>;
    /// `DATAGRAM_ORIGIN`: best effort.
    fn remember_datagram_origin(&self, key: &DatagramKey, origin: &DatagramOrigin);
    /// Uniform 32 random bits.
    fn random(&self) -> u32;
    /// Nanoseconds of the monotonic clock, which may be those of its last tick: less than what the agent reads at that time.
    fn now_ns(&self) -> u64;
}

/// Address and port of one side of a connection.
pub type Peer = (Address, Port);
