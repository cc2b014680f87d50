//! Processes of this node that no socket hook saw: sockets made before the start, and the kernel's own.
//!
//! Their packets meet no hook at ingress, so both sides are replaced where they leave: the VIP by the backend, and the
//! source, so that the reply finds its way back here. A reply is handed to the device by which the process sent.

use super::egress::{answered, claim_source, source_by};
use super::flow::store;
use super::ingress::{begins, find_dialled, find_staying, follow, is_over, other};
use super::nat::{Side, address_to, rewrite};
use super::{FlowEntry, Headers, Packet, PacketTables, Route, Verdict};
use crate::abi::{Device, Flow, FlowKey, Outcome, Port};

/// A packet that leaves for what may be a VIP. [`Verdict::Begin`] asks for a decision as at ingress, and then for
/// [`begin_own`] or [`stay_own`]; [`Verdict::LeaveOwn`] for [`leave_own`].
#[inline(always)]
pub fn own_node(tables: &impl PacketTables, headers: &Headers) -> Verdict {
    let Some(protocol) = headers.transport() else { return other(tables, headers) };
    let Some((key, entry)) = find_dialled(tables, headers) else {
        return if begins(headers) { Verdict::Begin } else { Verdict::Next };
    };
    // What leaves for a VIP passed netfilter's NAT: nobody there owns it (any more).
    if begins(headers) && (entry.flow().is_foreign() || is_over(tables, protocol, entry.flow())) {
        return Verdict::Begin;
    }
    follow(tables, headers, &key, &entry);
    Verdict::LeaveOwn
}

/// As [`super::begin`].
#[inline(always)]
pub fn begin_own(tables: &impl PacketTables, headers: &Headers, flow: &Flow) -> Verdict {
    if store(tables, &headers.of_source(), flow).is_some() { Verdict::LeaveOwn } else { Verdict::Drop }
}

/// As [`super::stay`].
#[inline(always)]
pub fn stay_own(tables: &impl PacketTables, headers: &Headers, otherwise: Verdict) -> Verdict {
    let Some((key, entry)) = find_staying(tables, headers) else { return otherwise };
    follow(tables, headers, &key, &entry);
    Verdict::LeaveOwn
}

/// Sends such a packet to its flow's backend.
#[inline(always)]
pub fn leave_own(packet: &mut impl Packet, tables: &impl PacketTables, headers: &Headers) -> Option<Verdict> {
    let Some((key, entry)) = find_dialled(tables, headers) else { return Some(Verdict::Drop) };
    if entry.flow().is_held() {
        return Some(Verdict::Drop);
    }
    if entry.flow().is_foreign() {
        return Some(Verdict::Next);
    }
    let backend = (entry.flow().backend, entry.flow().backend_port);
    let (snat, verdict) = match tables.route(&backend.0, headers.v6) {
        Route::Device(device) => (source_by(tables.other_device(device), headers.v6), Verdict::Leave(device)),
        Route::Local => {
            if let Some(here) = tables.device()
                && here.flags & Device::LOOPBACK != 0
            {
                // It comes in again just so, and the reply passes here.
                rewrite(packet, headers, Side::Destination, backend)?;
                return Some(Verdict::Next);
            }
            // Coming in, a source of this node's own would be taken for a forgery.
            (entry.flow().vip, Verdict::ComeIn(tables.device_index()))
        }
        Route::None => {
            tables.count(Outcome::PacketNoRoute);
            return Some(Verdict::Drop);
        }
    };
    let mut source = (entry.flow().snat, entry.flow().snat_port);
    if source.1 == Port::new(0) {
        let Some(claimed) = claim_source(tables, snat, headers, &key, backend) else {
            tables.count(Outcome::PacketNoSourcePort);
            return Some(Verdict::Drop);
        };
        entry.set_snat(claimed.0, claimed.1);
        entry.set_device(tables.device_index());
        source = claimed;
    }
    rewrite(packet, headers, Side::Source, source)?;
    rewrite(packet, headers, Side::Destination, backend)?;
    if let Verdict::ComeIn(_) = verdict {
        // Asked once more: kept until here, the verifier takes what is not there for a value that was never written.
        address_to(packet, tables.device()?.mac)?;
    }
    Some(verdict)
}

/// What a backend sends back to such a process.
#[inline(always)]
pub(super) fn own_node_reply<T: PacketTables>(
    packet: &mut impl Packet,
    tables: &T,
    headers: &Headers,
    client: &FlowKey,
    entry: &T::Entry,
) -> Option<Verdict> {
    if entry.flow().is_held() {
        return Some(Verdict::Drop);
    }
    let vip = (entry.flow().vip, entry.flow().vip_port);
    let index = entry.flow().device;
    answered(tables, headers, client, entry);
    rewrite(packet, headers, Side::Destination, (client.client, client.port))?;
    rewrite(packet, headers, Side::Source, vip)?;
    address_to(packet, tables.other_device(index)?.mac)?;
    Some(Verdict::ComeIn(index))
}
