use super::flow::{claim_this, find, find_inside, grow_up, is_a_while_ago, make_way, touch};
use super::headers::{FIN, RST, SYN, with_ports};
use super::nat::{Side, rewrite, rewrite_port};
use super::own_node::own_node_reply;
use super::{FlowEntry, Headers, Packet, PacketTables, Verdict};
use crate::abi::{Address, Device, Flow, FlowKey, Outcome, Port, Protocol, SnatKey};
use crate::decide::Peer;

/// A TCP, UDP or SCTP packet that leaves by a device. `None`: cut short; it is left alone.
#[inline(always)]
pub fn egress(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &mut Headers,
) -> Option<Verdict> {
    let Some(()) = with_ports(tables, headers, true) else { return Some(Verdict::Next) };
    let headers = &*headers;
    if headers.transport().is_none() {
        return Some(Verdict::Next);
    }
    let (source, destination) = (headers.source, headers.destination);
    // A reply that one process of this node sends to another one.
    if tables.is_own()
        && tables.may_be_snat(destination.1)
        && let Some(client) = tables.snat(&headers.way_back())
        && let Some(entry) = tables.flow(&client)
        && entry.flow().flags & Flow::OWN_NODE != 0
    {
        return own_node_reply(packet, tables, headers, &client, &entry);
    }
    let (to, from) =
        (tables.may_be_flow(&destination.0, destination.1), tables.may_be_flow(&source.0, source.1));
    if to {
        let known = find(tables, &headers.of_destination(), |flow| flow.goes_to(source));
        if let Some((key, entry)) = known {
            if is_of_another(headers, entry.flow()) {
                return Some(Verdict::GiveWay);
            }
            // Read before the flow moves: its old place may be somebody else's at once.
            let vip = (entry.flow().vip, entry.flow().vip_port);
            answered(tables, headers, &key, &entry);
            rewrite(packet, headers, Side::Source, vip)?;
            tables.count(Outcome::PacketReplied);
            return Some(Verdict::Next);
        }
    }
    if from && let Some((_, entry)) = find_to_replace(tables, headers) {
        return leave_replaced(packet, tables, headers, entry.flow());
    }
    if (to || from) && tables.several_vips() {
        return Some(Verdict::OtherPort);
    }
    Some(of_own_node(tables, &destination.0))
}

#[inline(always)]
fn of_own_node(tables: &impl PacketTables, to: &Address) -> Verdict {
    if tables.is_own() && tables.may_be_vip(to) { Verdict::OwnNode } else { Verdict::Next }
}

/// Whether a backend has a connection of its own with what looks like this client: it says neither "welcome" nor "no" to
/// a first packet (M11).
#[inline(always)]
const fn is_of_another(headers: &Headers, flow: &Flow) -> bool {
    headers.protocol == Protocol::Tcp.number()
        && headers.tcp_flags & (SYN | RST) == 0
        && !flow.is_answered()
        && !flow.needs_snat()
        && !flow.is_over()
}

/// What [`egress`] does, for clients that have another port inside the node (M11).
#[inline(always)]
pub fn other_port(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &Headers,
) -> Option<Verdict> {
    if let Some((key, entry)) = find_inside(tables, &headers.of_inner_destination()) {
        let vip = (entry.flow().vip, entry.flow().vip_port);
        answered(tables, headers, &key, &entry);
        rewrite(packet, headers, Side::Source, vip)?;
        rewrite_port(packet, headers, Side::Destination, key.port)?;
        tables.count(Outcome::PacketReplied);
        return Some(Verdict::Next);
    }
    if let Some((_, entry)) = find_inside(tables, &headers.of_inner_source())
        && entry.flow().needs_snat()
    {
        return leave_replaced(packet, tables, headers, entry.flow());
    }
    Some(of_own_node(tables, &headers.destination.0))
}

/// The answer is for who talks to the backend directly. The client of the flow will try again, with another port inside
/// the node (M11).
#[inline(always)]
pub fn give_way(tables: &impl PacketTables, headers: &Headers) -> Verdict {
    if let Some((key, entry)) = find(tables, &headers.of_destination(), |flow| flow.goes_to(headers.source)) {
        make_way(tables, &key, &entry);
    }
    Verdict::Next
}

/// A packet that leaves with another source, which its flow has already, or is to get first.
#[inline(always)]
fn leave_replaced(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &Headers,
    flow: &Flow,
) -> Option<Verdict> {
    let to = (flow.snat, flow.snat_port);
    if to.1 == Port::new(0) {
        return Some(Verdict::ReplaceSource);
    }
    rewrite(packet, headers, Side::Source, to)?;
    tables.count(Outcome::PacketSourceReplaced);
    Some(Verdict::Next)
}

/// The first packet of a flow that leaves with another source.
#[inline(always)]
pub fn replace_source(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &Headers,
) -> Option<Verdict> {
    let found = find_to_replace(tables, headers).or_else(|| find_inside(tables, &headers.of_inner_source()));
    let Some((key, entry)) = found else { return Some(Verdict::Drop) };
    let snat = source_by(tables.device(), headers.v6);
    let Some(to) = claim_source(tables, snat, headers, &key, headers.destination) else {
        tables.count(Outcome::PacketNoSourcePort);
        return Some(Verdict::Drop);
    };
    entry.set_snat(to.0, to.1);
    rewrite(packet, headers, Side::Source, to)?;
    tables.count(Outcome::PacketSourceReplaced);
    Some(Verdict::Next)
}

/// The flow of a packet that goes to a backend with a source that is not to be seen there.
#[inline(always)]
fn find_to_replace<T: PacketTables>(tables: &T, headers: &Headers) -> Option<(FlowKey, T::Entry)> {
    let backend = headers.destination;
    // A process of this node may talk to the backend directly too: what is for a VIP does not come here.
    find(tables, &headers.of_source(), |flow| {
        flow.flags & (Flow::NEEDS_SNAT | Flow::OWN_NODE) == Flow::NEEDS_SNAT && flow.goes_to(backend)
    })
}

/// The backend has answered. After its first answer it is the client's turn; but a datagram's client may ask once and be
/// answered for long, and packets of a TCP client may take another way: what is still answered later grows up too.
#[inline(always)]
pub(super) fn answered<T: PacketTables>(tables: &T, headers: &Headers, key: &FlowKey, entry: &T::Entry) {
    let flow = entry.flow();
    let tcp_flags = headers.tcp_flags;
    let mut flags = 0;
    if tcp_flags & FIN != 0 {
        flags |= Flow::BACKEND_FIN;
    }
    if tcp_flags & RST != 0 {
        flags |= Flow::RESET;
    }
    if flow.flags & Flow::ANSWERED == 0 {
        // The backend's first packet, however often it is sent, is no sign of a client.
        let again =
            flow.is_answered() && tcp_flags & (SYN | RST) == 0 && is_a_while_ago(flow, tables.now_ns());
        if again && grow_up(tables, key, entry, flags) {
            return;
        }
        flags |= if again { Flow::HEARD | Flow::CROWDED_OUT } else { Flow::HEARD };
    }
    if flags & !flow.flags != 0 {
        entry.set_flags(flags);
    }
    touch(entry, tables.now_ns());
}

/// The source that packets get which leave by a device (M7); unset: none.
#[inline(always)]
pub(super) fn source_by(device: Option<Device>, v6: bool) -> Address {
    let Some(device) = device else { return Address::default() };
    if v6 { device.v6 } else { device.v4 }
}

/// A source for a connection that nobody else with this backend has (M7).
#[inline(always)]
pub(super) fn claim_source(
    tables: &impl PacketTables,
    snat: Address,
    headers: &Headers,
    client: &FlowKey,
    backend: Peer,
) -> Option<Peer> {
    if snat == Address::default() {
        return None;
    }
    let key = SnatKey::new((snat, headers.source.1), backend, headers.protocol);
    // T2: an SCTP port cannot be changed.
    if headers.protocol == Protocol::Sctp.number() {
        return if claim_this(tables, &key, client) { Some((snat, key.snat_port)) } else { None };
    }
    let port = tables.claim_port(&key, client)?;
    Some((snat, port))
}
