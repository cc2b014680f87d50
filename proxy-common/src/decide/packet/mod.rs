//! The packet path: what becomes of a frame at a device's hook.
//!
//! Inside the node there are only real addresses: at ingress a VIP becomes a backend, and a replaced source the client
//! again; at egress a backend becomes the VIP again, and a source is replaced where rule M says so. Whatever lies
//! between the hooks (routing, netfilter, policy engines) sees client and backend in both directions.
//!
//! Safe code over two traits: [`Packet`], the bytes, and [`PacketTables`], the maps. In the kernel they are the frame and
//! the maps, in tests a vector and tables in memory.

mod bystander;
mod checksum;
mod egress;
mod fast;
mod flow;
mod headers;
mod icmp;
mod ingress;
mod nat;
mod own_node;
mod refuse;

pub use bystander::{passes_in, passes_out};
pub use egress::{egress, give_way, other_port, replace_source};
pub use fast::{accept, ask, fast};
pub use flow::claim_port;
pub use headers::{Headers, L2_BYTES, parse};
pub use icmp::{icmp_egress, icmp_ingress, icmp_other_port};
pub use ingress::{Decision, begin, decide, direct, ingress, stay};
pub use nat::address_to;
pub use own_node::{begin_own, leave_own, own_node, stay_own};
pub use refuse::refuse;

use super::Tables;
use crate::abi::{
    Address, Device, Flow, FlowKey, FragmentKey, FragmentPorts, Lane, LaneKey, Outcome, PacketSettings, Port,
    ServiceId, SnatKey,
};

/// Which part of a transport checksum a change belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Covers {
    /// Addresses and lengths: also part of an unfinished checksum.
    PseudoHeader,
    /// Ports and payload: a device that finishes the checksum sums them itself.
    Content,
}

/// A frame, from its Ethernet header on. Words are as they lie in memory. `None`: the frame is too short.
pub trait Packet {
    /// One byte.
    fn load8(&self, at: u32) -> Option<u8>;
    /// Two bytes.
    fn load16(&self, at: u32) -> Option<u16>;
    /// Four bytes.
    fn load32(&self, at: u32) -> Option<u32>;
    /// `N` times four bytes, or none of them.
    fn load_words<const N: usize>(&self, at: u32) -> Option<[u32; N]>;
    /// One byte.
    fn store8(&mut self, at: u32, value: u8) -> Option<()>;
    /// Two bytes.
    fn store16(&mut self, at: u32, value: u16) -> Option<()>;
    /// Four bytes.
    fn store32(&mut self, at: u32, value: u32) -> Option<()>;
    /// Changes the transport checksum at `at` by a ones'-complement difference. In UDP, where `zero_is_none`, a checksum
    /// of zero says that there is none.
    fn fix_checksum(&mut self, at: u32, difference: u32, covers: Covers, zero_is_none: bool) -> Option<()>;
    /// Cuts the frame, or fills it up with zeros, to this many bytes.
    fn resize(&mut self, bytes: u32) -> Option<()>;
    /// Says that the sum over the whole packet has changed by a ones'-complement difference that no checksum in it takes up.
    fn change_sum(&mut self, difference: u32);
    /// Bytes of the frame.
    fn bytes(&self) -> u32;
    /// Payload of each of the packets that the frame stands for; 0: it is one.
    fn segment_bytes(&self) -> u32;
    /// Whether a VLAN tag lies beside it.
    fn is_tagged(&self) -> bool;
    /// Makes room between the Ethernet header and what follows it.
    fn insert_after_l2(&mut self, bytes: u32) -> Option<()>;
}

/// A flow in its table.
pub trait FlowEntry: Copy {
    /// As it is now; other packets may change it at any time.
    fn flow(&self) -> &Flow;
    /// Sets flags.
    fn set_flags(&self, flags: u32);
    /// A packet passed.
    fn touch(&self, now_ns: u64);
    /// Its replaced source.
    fn set_snat(&self, snat: Address, port: Port);
    /// By which device a process of this node sends.
    fn set_device(&self, index: u32);
    /// Another flow in the same place.
    fn replace(&self, flow: &Flow);
}

/// A lane in its table.
pub trait LaneEntry: Copy {
    /// As it is now; other packets may change it at any time, or give it to another key.
    fn read(&self) -> Lane;
    /// Its seal, read after whatever was read before.
    fn seal(&self) -> u32;
    /// Another content.
    fn write(&self, lane: &Lane);
    /// Sets [`Lane::OPEN`].
    fn open(&self);
}

/// What the packet path reads and remembers besides [`Tables`].
pub trait PacketTables: Tables {
    /// A flow in `FLOWS` or `YOUNG_FLOWS`.
    type Entry: FlowEntry;
    /// A lane in `LANES`.
    type Lane: LaneEntry;

    /// `PACKET_SETTINGS`; `None` before the agent has written any.
    fn settings(&self) -> Option<&PacketSettings>;
    /// `VIPS`: `false` is certain.
    fn may_be_vip(&self, address: &Address) -> bool;
    /// `CLUSTER_IPS`.
    fn is_cluster_ip(&self, address: &Address) -> bool;
    /// `SOURCE_RANGES` (F2).
    fn lets_in(&self, service: ServiceId, client: &Address) -> bool;
    /// The device of this hook.
    fn device(&self) -> Option<Device>;
    /// Its interface index.
    fn device_index(&self) -> u32;
    /// Whether a process of this node made the packet. At egress only.
    fn is_own(&self) -> bool;
    /// The device by which routing would send a packet of this node to `to`.
    fn route(&self, to: &Address, v6: bool) -> Route;
    /// Another device.
    fn other_device(&self, index: u32) -> Option<Device>;
    /// `FLOW_FILTER`: `false` is certain.
    fn may_be_flow(&self, client: &Address, port: Port) -> bool;
    /// Whether any client port has talked to several VIPs, or has another port inside the node; `false` is certain.
    fn several_vips(&self) -> bool;
    /// `FLOWS`, else `YOUNG_FLOWS`.
    fn flow(&self, key: &FlowKey) -> Option<Self::Entry>;
    /// A new flow, into `YOUNG_FLOWS`; `false` if there is no room.
    fn remember_flow(&self, key: &FlowKey, flow: &Flow) -> bool;
    /// Moves a flow, as `change` makes it, into `FLOWS`, where nothing is thrown out, and counts it unless it was there.
    /// `false` if there is no room; then it stays as it is. Else `entry` may be somebody else's at once.
    fn grow_up(&self, key: &FlowKey, entry: &Self::Entry, change: impl Fn(&mut Flow)) -> bool;
    /// `SNAT_PORTS`: `false` is certain.
    fn may_be_snat(&self, port: Port) -> bool;
    /// `SNAT`, else `YOUNG_SNAT`.
    fn snat(&self, key: &SnatKey) -> Option<FlowKey>;
    /// Takes a replaced source, or a port inside the node, that nobody had a moment ago, for a client; `false` if somebody
    /// else was faster.
    fn claim_snat(&self, key: &SnatKey, client: &FlowKey) -> bool;
    /// [`claim_port`]. The kernel has it in one place: it is a long way for the verifier.
    fn claim_port(&self, key: &SnatKey, client: &FlowKey) -> Option<Port>;
    /// Goes up by one with each question, on whatever CPU.
    fn turn(&self) -> u32;
    /// Takes it from whoever has it.
    fn take_snat(&self, key: &SnatKey, client: &FlowKey) -> bool;
    /// `FRAGMENTS`.
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts>;
    /// `FRAGMENTS`: best effort.
    fn remember_fragment(&self, key: &FragmentKey, ports: &FragmentPorts);
    /// Whether there is a fast path at all.
    fn fast_path(&self) -> bool;
    /// `EPOCH`; 0: nothing may skip the stack.
    fn epoch(&self) -> u32;
    /// The interface that the packet came in by; 0: by none.
    fn arrived_by(&self) -> u32;
    /// `LANES`.
    fn lane(&self, key: &LaneKey) -> Option<Self::Lane>;
    /// `LANES`: best effort.
    fn put_lane(&self, key: &LaneKey, lane: &Lane);
    /// `LANES`: it is not there any more.
    fn close_lane(&self, key: &LaneKey);
    /// Counts a way out.
    fn count(&self, outcome: Outcome);
}

/// Where routing sends a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    /// Out by this interface.
    Device(u32),
    /// To this node itself.
    Local,
    /// Nowhere.
    None,
}

/// What becomes of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It goes on, changed or not.
    Next,
    /// It begins a connection: [`decide`] says which.
    Begin,
    /// It goes on, now to a backend and with its own source: where that is behind the same bridge, it stays in the bridge.
    ToBackend,
    /// The same, with a port that only this node knows, and that egress has still to replace.
    ToBackendByPort,
    /// A process of this node sends it to what may be a VIP: [`own_node`] says what becomes of it.
    OwnNode,
    /// It is such a packet, and its flow is known: [`leave_own`] sends it.
    LeaveOwn,
    /// It is for no VIP, but its sender may have flows: [`direct`] says what becomes of it.
    Direct,
    /// At least one side may be a client with another port inside the node: [`other_port`] or
    /// [`icmp_other_port`] says what becomes of it.
    OtherPort,
    /// It answers somebody else than the flow that it looks like: [`give_way`] tells them apart.
    GiveWay,
    /// It leaves for a backend that has not seen its source yet: [`replace_source`] finds one.
    ReplaceSource,
    /// It leaves by this interface, by way of the neighbour tables.
    Leave(u32),
    /// It comes in by this interface.
    ComeIn(u32),
    /// Not answered (Z5).
    Drop,
    /// Answered at once (Z4): [`refuse`] makes the answer, which goes back by the device that it came from.
    Refuse,
}
