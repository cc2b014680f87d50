use core::borrow::Borrow;

use super::flow::{find, store, touch};
use super::headers::{FIN, RST, with_ports};
use super::nat::{Side, rewrite};
use super::{FlowEntry, Headers, Packet, PacketTables, Verdict};
use crate::abi::{
    Address, BackendId, ClientKey, Flow, FlowKey, FrontendKey, FrontendKind, FrontendValue, Origin, Outcome,
    PacketSettings, Protocol, SnatKey, WhichSet,
};
use crate::decide::snat::Snat;
use crate::decide::{Client, Connect, get, serve};

/// A TCP, UDP or SCTP packet that comes in by a device; ICMP has a way of its own. `None`: cut short; it is left alone.
///
/// `decide` is [`decide`] of these headers, in whatever way the caller has to call it.
#[inline(always)]
pub fn ingress<F: Borrow<Flow>>(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &mut Headers,
    decide: impl Fn(&Headers) -> Decision<F>,
) -> Option<Verdict> {
    let Some(()) = with_ports(tables, headers, false) else { return Some(Verdict::Next) };
    let headers = &*headers;
    let Some(protocol) = headers.transport() else { return Some(other(tables, headers)) };
    if tables.may_be_snat(headers.destination.1) {
        let key = SnatKey {
            snat: headers.destination.0,
            backend: headers.source.0,
            snat_port: headers.destination.1,
            backend_port: headers.source.1,
            protocol: headers.protocol,
            zero: 0,
            zeros: 0,
        };
        if let Some(client) = tables.snat(&key) {
            rewrite(packet, headers, Side::Destination, (client.client, client.port))?;
            tables.count(Outcome::PacketSourceRestored);
            return Some(Verdict::Next);
        }
    }
    if !tables.may_be_vip(&headers.destination.0) {
        return Some(unassigned(tables, &headers.destination.0));
    }
    let key = FlowKey::new(headers.source.0, headers.source.1, headers.protocol);
    let vip = headers.destination;
    // Only a first packet makes a flow: whatever goes on without us was set up by somebody else.
    let begins = !headers.later_fragment && (!matches!(protocol, Protocol::Tcp) || headers.is_syn());
    let known = find(tables, &key, |flow| flow.vip == vip.0 && flow.vip_port == vip.1);
    if let Some((_, entry)) = known {
        // C3, C7: without anybody better it stays as it is.
        if begins
            && is_over(tables, protocol, entry.flow())
            && let Decision::Forward(flow) = decide(headers)
        {
            entry.replace(flow.borrow());
            tables.count(Outcome::PacketForwarded);
        } else {
            follow(tables, headers, &entry);
            tables.count(Outcome::PacketFollowed);
        }
        let to = (entry.flow().backend, entry.flow().backend_port);
        rewrite(packet, headers, Side::Destination, to)?;
        return Some(Verdict::Next);
    }
    if !begins {
        tables.count(Outcome::PacketUntouched);
        return Some(Verdict::Next);
    }
    match decide(headers) {
        Decision::Forward(flow) => {
            let flow = flow.borrow();
            if store(tables, &key, flow).is_none() {
                tables.count(Outcome::PacketNoRoom);
                return Some(Verdict::Drop);
            }
            rewrite(packet, headers, Side::Destination, (flow.backend, flow.backend_port))?;
            tables.count(Outcome::PacketForwarded);
            Some(Verdict::Next)
        }
        Decision::Verdict(verdict) => Some(verdict),
    }
}

/// Whether a first packet, or any datagram, of a known flow is to find another backend.
#[inline(always)]
fn is_over(tables: &impl PacketTables, protocol: Protocol, flow: &Flow) -> bool {
    match protocol {
        // The client's port is used anew, or nobody is left to answer.
        Protocol::Tcp => flow.is_over() || get(tables, flow.backend_id).is_none(),
        // C2: a flow stays while its backend serves, whatever set it is in.
        Protocol::Udp => get(tables, flow.backend_id).is_none_or(|backend| !backend.is_serving()),
        Protocol::Sctp => false,
    }
}

/// What a packet of a known connection does to it.
#[inline(always)]
fn follow<T: PacketTables>(tables: &T, headers: &Headers, entry: &T::Entry) {
    let mut flags = 0;
    if headers.tcp_flags & FIN != 0 {
        flags |= Flow::CLIENT_FIN;
    }
    if headers.tcp_flags & RST != 0 {
        flags |= Flow::RESET;
    }
    if flags & !entry.flow().flags != 0 {
        entry.set_flags(flags);
    }
    touch(entry, tables.now_ns());
}

/// What becomes of a new connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision<F = Flow> {
    /// It makes this flow.
    Forward(F),
    /// It makes none.
    Verdict(Verdict),
}

/// Decides a new connection.
#[inline(always)]
pub fn decide(tables: &impl PacketTables, headers: &Headers) -> Decision {
    let Some(protocol) = headers.transport() else { return Decision::Verdict(Verdict::Next) };
    let (source, vip) = (headers.source, headers.destination);
    let key = FrontendKey::new(vip.0, vip.1, headers.protocol);
    let Some(frontend) = tables.frontend(&key) else { return Decision::Verdict(other(tables, headers)) };
    if frontend.has_source_ranges() && !tables.lets_in(frontend.service(), &source.0) {
        tables.count(Outcome::PacketSourceRefused);
        return Decision::Verdict(Verdict::Drop);
    }
    let Some(settings) = tables.settings() else { return Decision::Verdict(Verdict::Next) };
    let origin = origin(tables, settings, &source.0);
    let client = || Client { origin, key: ClientKey::address(source.0) };
    match serve(tables, &client, &frontend) {
        Connect::Forward { id, backend } => {
            // T2: rewriting a port would need the whole packet's checksum.
            if matches!(protocol, Protocol::Sctp) && backend.port != vip.1 {
                tables.count(Outcome::PacketRejected);
                return Decision::Verdict(Verdict::Refuse);
            }
            let snat = replaces_source(settings, &frontend, origin, headers.v6, backend.address == source.0);
            Decision::Forward(new_flow(tables, &frontend, headers, id, (backend.address, backend.port), snat))
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

#[inline(always)]
fn new_flow(
    tables: &impl PacketTables,
    frontend: &FrontendValue,
    headers: &Headers,
    backend_id: BackendId,
    backend: crate::decide::Peer,
    snat: bool,
) -> Flow {
    Flow {
        vip: headers.destination.0,
        backend: backend.0,
        backend_id,
        used_ns: tables.now_ns(),
        service: frontend.service(),
        vip_port: headers.destination.1,
        backend_port: backend.1,
        flags: if snat { Flow::NEEDS_SNAT } else { 0 },
        ..Flow::default()
    }
}

/// M1. A packet that comes in by a device is never the node's own.
#[inline(always)]
fn origin(tables: &impl PacketTables, settings: &PacketSettings, source: &Address) -> Origin {
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
    if let Some(settings) = tables.settings() {
        let ranges = settings.service_ranges.iter().take(settings.service_ranges_count as usize);
        for range in ranges {
            if range.contains(address) {
                tables.count(Outcome::PacketUnassigned);
                return Verdict::Drop;
            }
        }
    }
    Verdict::Next
}
