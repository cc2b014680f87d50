//! Map layouts: keys, values, and the words packed into them.
//!
//! Rules kept by every layout: `repr(C)`, no padding (proved at compile time by [`layout!`]), no `bool`, `enum` or
//! `Option`; network byte order is a type ([`Address`], [`Port`]) whose words are private. Everything else is host order.

/// Declares that a struct is what a map stores: pins its size, proves that it has no padding (a padded key would be
/// hashed with whatever the stack held), and lets the agent pass it to aya.
macro_rules! layout {
    ($name:ident, size = $size:literal, fields = $($field:ty),+) => {
        const _: () = {
            assert!(core::mem::size_of::<$name>() == $size);
            assert!(core::mem::size_of::<$name>() == 0 $(+ core::mem::size_of::<$field>())+, "padding");
        };
        // SAFETY: `repr(C)`, `Copy`, and by the assertion above free of padding; every bit pattern is a value, since
        // all fields are integers.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name {}
    };
}

/// Ties what an entry of an LRU table says to the service port that it was made for. The kernel may give an element to
/// another key while a program reads it, so the reader may see the other key's value, or part of each; neither has the
/// seal that the reader's own service port and the words that it saw make.
#[inline(always)]
#[must_use]
const fn seal(service: ServiceId, first: u64, second: u64) -> u32 {
    // Two odd constants (of splitmix64), so that ids that differ in little, or change places, differ in the upper half.
    let mixed = first.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ second.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed >> 32) as u32 ^ service
}

/// The low half of a packed word.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
const fn low(word: u64) -> u32 {
    word as u32
}

mod address;
pub mod affinity;
pub mod backend;
pub mod counter;
pub mod datagram;
pub mod flow;
pub mod frontend;
pub mod lane;
pub mod line;
pub mod packet;
pub mod service;
pub mod socket;

pub use address::{Address, Port};
pub use affinity::{AffinityEntry, AffinityKey, AffinitySlot, ClientKey};
pub use backend::{Backend, BackendId, BackendState, Slot};
pub use counter::Outcome;
pub use datagram::{DatagramFlow, DatagramKey, DatagramOrigin};
pub use flow::{Flow, FlowKey, FragmentKey, FragmentPorts, SnatKey};
pub use frontend::{FrontendKey, FrontendKind, FrontendValue, Origin, Protocol};
pub use lane::{Lane, LaneKey};
pub use line::{Frontend, FrontendLine, Glance};
pub use packet::{Device, PacketSettings, Prefix, SourceRange};
pub use service::{AffinityWord, ServiceId, ServiceRecord, SetWord, WhenEmpty, WhichSet};
pub use socket::{SocketOrigin, SocketPlace};

/// Changes whenever any layout here, or the meaning of a field, changes. It is part of the pin directory's name, so an
/// agent never adopts maps that it would misread.
pub const LAYOUT_VERSION: u32 = 7;
