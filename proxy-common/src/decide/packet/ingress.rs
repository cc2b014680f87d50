use super::flow::{find, grow_up, make_way, store, touch};
use super::headers::{FIN, RST, SYN, with_ports};
use super::nat::{Side, rewrite, rewrite_port};
use super::own_node::own_node_reply;
use super::{FlowEntry, Headers, Packet, PacketTables, Verdict};
use crate::abi::{
    Address, BackendId, ClientKey, Flow, FlowKey, FrontendKey, FrontendKind, FrontendValue, Origin, Outcome,
    PacketSettings, Port, Protocol, ServiceId, WhichSet,
};
use crate::decide::snat::Snat;
use crate::decide::{Client, Connect, get, serve};

/// A TCP, UDP or SCTP packet that comes in by a device; ICMP has a way of its own. `None`: cut short; it is left alone.
///
/// [`Verdict::Begin`] asks for [`decide`], and then for [`begin`] or [`stay`].
#[inline(always)]
pub fn ingress(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &mut Headers,
) -> Option<Verdict> {
    let Some(()) = with_ports(tables, headers, false) else { return Some(Verdict::Next) };
    let headers = &*headers;
    let Some(protocol) = headers.transport() else { return Some(other(tables, headers)) };
    if tables.may_be_snat(headers.destination.1)
        && let Some(client) = tables.snat(&headers.way_back())
    {
        // Netfilter replaced it, and restores it.
        if client.is_nobody() {
            return Some(Verdict::Next);
        }
        tables.count(Outcome::PacketSourceRestored);
        let mut port = client.port;
        if let Some(entry) = tables.flow(&client) {
            if entry.flow().flags & Flow::OWN_NODE != 0 {
                return own_node_reply(packet, tables, headers, &client, &entry);
            }
            port = entry.flow().port_inside(port);
        }
        rewrite(packet, headers, Side::Destination, (client.client, port))?;
        return Some(Verdict::Next);
    }
    if !tables.may_be_vip(&headers.destination.0) {
        let verdict = unassigned(tables, &headers.destination.0);
        let (client, port) = headers.source;
        let is_asked = matches!(verdict, Verdict::Next) && tables.may_be_flow(&client, port);
        return Some(if is_asked { Verdict::Direct } else { verdict });
    }
    let Some((key, entry)) = find_dialled(tables, headers) else {
        if begins(headers) {
            return Some(Verdict::Begin);
        }
        tables.count(Outcome::PacketUntouched);
        return Some(Verdict::Next);
    };
    if begins(headers) && is_over(tables, protocol, entry.flow()) {
        return Some(Verdict::Begin);
    }
    follow_and_forward(packet, tables, headers, &key, &entry)
}

/// A new connection that [`decide`] sends to a backend, or an old flow that goes on with another one.
#[inline(always)]
pub fn begin(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &Headers,
    flow: &Flow,
) -> Option<Verdict> {
    let Some(port) = store(tables, &headers.of_source(), flow) else { return Some(Verdict::Drop) };
    forward(packet, headers, flow, port)
}

/// One that [`decide`] sends to nobody: a datagram flow without anybody better stays as it is (C3, C7). A SYN that
/// comes here begins a connection, whatever its port was used for before: that is refused or dropped as any (Z, F2).
#[inline(always)]
pub fn stay(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &Headers,
    otherwise: Verdict,
) -> Option<Verdict> {
    let Some((key, entry)) = find_staying(tables, headers) else {
        // No VIP after all.
        return Some(if matches!(otherwise, Verdict::Next) { Verdict::Direct } else { otherwise });
    };
    follow_and_forward(packet, tables, headers, &key, &entry)
}

/// A packet for no VIP, from a client port that may have flows (M11): sent to the backend of one of them, it would look
/// like one of that flow inside the node. So a connection that begins so becomes a flow of its own, as if the backend were
/// a VIP, with another port for the client; and one that was there first keeps the client's port for itself.
#[inline(always)]
pub fn direct(packet: &mut impl Packet, tables: &impl PacketTables, headers: &Headers) -> Option<Verdict> {
    let (source, to) = (headers.source, headers.destination);
    // T2: an SCTP port cannot be changed.
    if headers.protocol == Protocol::Sctp.number() || !tables.may_be_flow(&source.0, source.1) {
        return Some(Verdict::Next);
    }
    let its_own = find(tables, &headers.of_source(), |flow| {
        flow.vip == to.0 && flow.vip_port == to.1 && flow.backend == to.0
    });
    if let Some((key, entry)) = its_own {
        if !begins(headers) || !entry.flow().is_over() {
            return follow_and_forward(packet, tables, headers, &key, &entry);
        }
        // The next one need not clash.
        entry.replace(&Flow::NOBODYS);
    }
    let alike =
        find(tables, &headers.of_source(), |flow| flow.goes_to(to) && flow.flags & Flow::OWN_NODE == 0);
    let Some((key, entry)) = alike else { return Some(Verdict::Next) };
    if entry.flow().is_over() {
        if begins(headers) {
            // What the backend answers is not of the old one.
            entry.replace(&Flow::NOBODYS);
        }
        return Some(Verdict::Next);
    }
    let of_vip = entry.flow();
    if begins(headers) {
        let flow = Flow {
            vip: to.0,
            backend: to.0,
            backend_id: of_vip.backend_id,
            used_ns: tables.now_ns(),
            service: of_vip.service,
            vip_port: to.1,
            backend_port: to.1,
            ..Flow::default()
        };
        let Some(port) = store(tables, &headers.of_source(), &flow) else { return Some(Verdict::Drop) };
        return forward(packet, headers, &flow, port);
    }
    // Else the backend has one connection only, which is not this one.
    if of_vip.needs_snat() || !of_vip.is_answered() {
        make_way(tables, &key, &entry);
    }
    Some(Verdict::Next)
}

/// Only a first packet makes a flow: whatever goes on without us was set up by somebody else.
#[inline(always)]
pub(super) fn begins(headers: &Headers) -> bool {
    !headers.later_fragment && (headers.protocol != Protocol::Tcp.number() || headers.is_syn())
}

/// The flow of this client port to what the packet is for.
#[inline(always)]
pub(super) fn find_dialled<T: PacketTables>(tables: &T, headers: &Headers) -> Option<(FlowKey, T::Entry)> {
    let vip = headers.destination;
    find(tables, &headers.of_source(), |flow| flow.vip == vip.0 && flow.vip_port == vip.1)
}

/// The flow that stays although nobody serves it.
#[inline(always)]
pub(super) fn find_staying<T: PacketTables>(tables: &T, headers: &Headers) -> Option<(FlowKey, T::Entry)> {
    if headers.protocol == Protocol::Tcp.number() { None } else { find_dialled(tables, headers) }
}

#[inline(always)]
fn forward(packet: &mut impl Packet, headers: &Headers, flow: &Flow, port: Port) -> Option<Verdict> {
    if flow.is_held() {
        return Some(Verdict::Drop);
    }
    if flow.is_foreign() {
        return Some(Verdict::Next);
    }
    let (to, verdict) = ((flow.backend, flow.backend_port), to_backend(flow, port));
    rewrite(packet, headers, Side::Destination, to)?;
    if port != Port::new(0) {
        rewrite_port(packet, headers, Side::Source, port)?;
    }
    Some(verdict)
}

#[inline(always)]
const fn to_backend(flow: &Flow, port: Port) -> Verdict {
    if flow.needs_snat() {
        Verdict::Next
    } else if port.raw() != 0 {
        Verdict::ToBackendByPort
    } else {
        Verdict::ToBackend
    }
}

/// Whether a first packet, or any datagram, of a known flow is to find another backend.
#[inline(always)]
pub(super) fn is_over(tables: &impl PacketTables, protocol: Protocol, flow: &Flow) -> bool {
    match protocol {
        // The client's port is used anew, or nobody is left to answer.
        Protocol::Tcp => flow.is_over() || get(tables, flow.backend_id).is_none(),
        Protocol::Udp => {
            // Which backend another proxy chose, the agent has yet to find out.
            let unknown = flow.is_foreign() && flow.backend_id == BackendId::NONE;
            // C2: a flow stays while its backend serves, whatever set it is in.
            flow.is_foreign() && is_idle(tables, flow)
                || !unknown && get(tables, flow.backend_id).is_none_or(|backend| !backend.is_serving())
        }
        Protocol::Sctp => false,
    }
}

#[inline(always)]
fn is_idle(tables: &impl PacketTables, flow: &Flow) -> bool {
    tables.now_ns().saturating_sub(flow.used_ns) > Flow::FOREIGN_IDLE_NS
}

/// A packet of a known connection.
#[inline(always)]
fn follow_and_forward<T: PacketTables>(
    packet: &mut impl Packet,
    tables: &T,
    headers: &Headers,
    key: &FlowKey,
    entry: &T::Entry,
) -> Option<Verdict> {
    // In this order: once it has grown up, the entry may be somebody else's.
    let verdict = forward(packet, headers, entry.flow(), entry.flow().inner_port);
    follow(tables, headers, key, entry);
    verdict
}

/// What a packet of a known connection does to it: with the first one after the backend's answer the flow grows up.
#[inline(always)]
pub(super) fn follow<T: PacketTables>(tables: &T, headers: &Headers, key: &FlowKey, entry: &T::Entry) {
    let foreign = entry.flow().is_foreign();
    tables.count(if foreign { Outcome::PacketUntouched } else { Outcome::PacketFollowed });
    let mut flags = 0;
    if headers.tcp_flags & FIN != 0 {
        flags |= Flow::CLIENT_FIN;
    }
    if headers.tcp_flags & RST != 0 {
        flags |= Flow::RESET;
    }
    if entry.flow().flags & (Flow::ANSWERED | Flow::HEARD) == Flow::HEARD
        && headers.tcp_flags & (SYN | RST) == 0
    {
        if grow_up(tables, key, entry, flags) {
            return;
        }
        flags |= Flow::CROWDED_OUT;
    }
    if flags & !entry.flow().flags != 0 {
        entry.set_flags(flags);
    }
    touch(entry, tables.now_ns());
}

/// What becomes of a new connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// It makes this flow.
    Forward(Flow),
    /// It makes none.
    Verdict(Verdict),
}

/// Decides a new connection.
#[inline(always)]
pub fn decide(tables: &impl PacketTables, headers: &Headers) -> Decision {
    let Some(protocol) = headers.transport() else { return Decision::Verdict(Verdict::Next) };
    let (source, vip) = (headers.source, headers.destination);
    let key = FrontendKey::new(vip.0, vip.1, headers.protocol);
    let frontend = tables.frontend(&key);
    if frontend.is_none() {
        return Decision::Verdict(other(tables, headers));
    }
    let value = frontend.value;
    let Some(settings) = tables.settings() else { return Decision::Verdict(Verdict::Next) };
    // A packet of this node passed netfilter before it came here: nobody else wants it.
    if settings.flags & PacketSettings::LEAVE_NEW != 0 && !tables.is_own() {
        return leave(tables, headers, value.service());
    }
    if value.has_source_ranges() && !tables.lets_in(value.service(), &source.0) {
        tables.count(Outcome::PacketSourceRefused);
        return Decision::Verdict(Verdict::Drop);
    }
    let origin = origin(tables, settings, &source.0);
    let client = || Client { origin, key: ClientKey::address(source.0) };
    match serve(tables, &client, &key, frontend) {
        Connect::Forward { id, to: backend } => {
            // T2: rewriting a port would need the whole packet's checksum.
            if matches!(protocol, Protocol::Sctp) && backend.1 != vip.1 {
                tables.count(Outcome::PacketRejected);
                return Decision::Verdict(Verdict::Refuse);
            }
            let hairpin = backend.0 == source.0;
            let mut flags = 0;
            if matches!(origin, Origin::Node) {
                // Whatever rule M says: only a replaced source finds its way back here.
                flags = Flow::OWN_NODE | Flow::NEEDS_SNAT;
            } else if replaces_source(settings, &value, origin, headers.v6, hairpin) {
                flags = Flow::NEEDS_SNAT;
            }
            Decision::Forward(Flow {
                vip: vip.0,
                backend: backend.0,
                backend_id: id,
                used_ns: tables.now_ns(),
                service: value.service(),
                vip_port: vip.1,
                backend_port: backend.1,
                flags,
                ..Flow::default()
            })
        }
        Connect::Reject => {
            tables.count(Outcome::PacketRejected);
            Decision::Verdict(Verdict::Refuse)
        }
        Connect::Drop => {
            tables.count(Outcome::PacketDropped);
            Decision::Verdict(Verdict::Drop)
        }
        Connect::Untouched => {
            tables.count(Outcome::PacketUntouched);
            Decision::Verdict(Verdict::Next)
        }
        Connect::SourceRanges | Connect::Contended => {
            tables.count(Outcome::Contended);
            Decision::Verdict(Verdict::Drop)
        }
    }
}

/// Leaves a new connection to another proxy. Datagrams need a note, since any of them could begin a flow.
#[inline(always)]
fn leave(tables: &impl PacketTables, headers: &Headers, service: ServiceId) -> Decision {
    if headers.protocol == Protocol::Tcp.number() {
        tables.count(Outcome::PacketUntouched);
        return Decision::Verdict(Verdict::Next);
    }
    Decision::Forward(Flow {
        vip: headers.destination.0,
        vip_port: headers.destination.1,
        used_ns: tables.now_ns(),
        service,
        flags: Flow::FOREIGN,
        ..Flow::default()
    })
}

/// M1. A packet that comes in by a device is never the node's own.
#[inline(always)]
fn origin(tables: &impl PacketTables, settings: &PacketSettings, source: &Address) -> Origin {
    if tables.is_own() {
        return Origin::Node;
    }
    let ranges = settings.local_pods.iter().take(settings.local_pods_count as usize);
    for range in ranges {
        if range.contains(source) {
            return Origin::Pod;
        }
    }
    match tables.device() {
        Some(device) if device.flags & crate::abi::Device::LOCAL_PODS != 0 => Origin::Pod,
        Some(_) | None => Origin::Elsewhere,
    }
}

/// Rule M. A backend that is the node itself needs no exception (M10): such a packet never comes to the place where
/// sources are replaced.
#[inline(always)]
fn replaces_source(
    settings: &PacketSettings,
    frontend: &FrontendValue,
    origin: Origin,
    v6: bool,
    hairpin: bool,
) -> bool {
    let detects = if v6 { PacketSettings::DETECTS_V6 } else { PacketSettings::DETECTS_V4 };
    let kind = frontend.kind().unwrap_or(FrontendKind::ClusterIp);
    let snat = Snat {
        kind,
        origin,
        detects_local_pods: settings.flags & detects != 0,
        masquerade_all: settings.flags & PacketSettings::MASQUERADE_ALL != 0,
        external_local: matches!(frontend.set_for(Origin::Elsewhere), WhichSet::Local),
        hairpin,
        endpoint_is_own_node: false,
    };
    snat.applies()
}

/// Z6: no Service has this port or protocol there.
#[inline(always)]
pub(super) fn other(tables: &impl PacketTables, headers: &Headers) -> Verdict {
    if tables.may_be_vip(&headers.destination.0) && tables.is_cluster_ip(&headers.destination.0) {
        tables.count(Outcome::PacketRejected);
        return Verdict::Refuse;
    }
    unassigned(tables, &headers.destination.0)
}

/// Z6: an address that no Service has, in a range that cluster IPs come from.
#[inline(always)]
fn unassigned(tables: &impl PacketTables, address: &Address) -> Verdict {
    if is_unassigned(tables, address) {
        tables.count(Outcome::PacketUnassigned);
        return Verdict::Drop;
    }
    Verdict::Next
}

/// Whether cluster IPs come from the range that the address is in.
#[inline(always)]
pub(super) fn is_unassigned(tables: &impl PacketTables, address: &Address) -> bool {
    let Some(settings) = tables.settings() else { return false };
    let ranges = settings.service_ranges.iter().take(settings.service_ranges_count as usize);
    for range in ranges {
        if range.contains(address) {
            return true;
        }
    }
    false
}
