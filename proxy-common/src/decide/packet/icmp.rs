//! ICMP errors: what they quote is a packet of ours, so its addresses are translated with theirs (M7).

use super::checksum::{add, adjusted, replaced};
use super::flow::find;
use super::headers::{ICMP, ICMPV6};
use super::nat::{Side, checksum_at, store_address};
use super::{Covers, FlowEntry, Headers, L2_BYTES, Packet, PacketTables, Verdict, ingress::other, parse};
use crate::abi::{Flow, FlowKey, Outcome, Port, SnatKey};
use crate::decide::Peer;

/// Bytes of an ICMP error before what it quotes.
const ICMP_BYTES: u32 = 8;

/// Type of an IPv4 redirect.
const REDIRECT: u8 = 5;

/// Whether the message quotes a packet: errors do, redirects too.
#[inline(always)]
fn quotes(packet: &impl Packet, headers: &Headers) -> Option<bool> {
    let kind = packet.load8(headers.l4)?;
    Some(match headers.protocol {
        ICMP => matches!(kind, 3 | 4 | 5 | 11 | 12),
        ICMPV6 => matches!(kind, 1..=4),
        _ => false,
    })
}

#[inline(always)]
fn quoted(packet: &impl Packet, headers: &Headers) -> Option<Headers> {
    parse(packet, headers.l4 + ICMP_BYTES, headers.v6)
}

/// Comes in by a device.
#[inline(always)]
pub fn icmp_ingress(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &Headers,
) -> Option<Verdict> {
    if headers.later_fragment {
        return Some(Verdict::Next);
    }
    if !quotes(packet, headers)? {
        return Some(other(tables, headers));
    }
    let inner = quoted(packet, headers)?;
    // About a packet whose source was replaced: back to the client with it.
    if tables.may_be_snat(inner.source.1) {
        let key = SnatKey {
            snat: inner.source.0,
            backend: inner.destination.0,
            snat_port: inner.source.1,
            backend_port: inner.destination.1,
            protocol: inner.protocol,
            zero: 0,
            zeros: 0,
        };
        if let Some(client) = tables.snat(&key) {
            let outer = (Side::Destination, client.client);
            return translate(
                packet,
                tables,
                headers,
                &inner,
                Side::Source,
                (client.client, client.port),
                outer,
            );
        }
    }
    // About a reply that left with the VIP as its source: on to the backend.
    if tables.may_be_vip(&headers.destination.0)
        && tables.may_be_flow(&inner.destination.0, inner.destination.1)
    {
        let key = FlowKey::new(inner.destination.0, inner.destination.1, inner.protocol);
        let known = find(tables, &key, |flow| flow.vip == inner.source.0 && flow.vip_port == inner.source.1);
        if let Some((_, entry)) = known {
            let flow = entry.flow();
            let outer = (Side::Destination, flow.backend);
            return translate(
                packet,
                tables,
                headers,
                &inner,
                Side::Source,
                (flow.backend, flow.backend_port),
                outer,
            );
        }
    }
    Some(Verdict::Next)
}

/// Leaves by a device.
#[inline(always)]
pub fn icmp_egress(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &Headers,
) -> Option<Verdict> {
    if headers.later_fragment || !quotes(packet, headers)? {
        return Some(Verdict::Next);
    }
    let inner = quoted(packet, headers)?;
    // To the client, about what it sent: it knows the VIP only.
    if tables.may_be_flow(&inner.source.0, inner.source.1) {
        let key = FlowKey::new(inner.source.0, inner.source.1, inner.protocol);
        let known = find(tables, &key, |flow| {
            flow.backend == inner.destination.0 && flow.backend_port == inner.destination.1
        });
        if let Some((_, entry)) = known {
            let flow = entry.flow();
            let outer = (Side::Source, flow.vip);
            return translate(
                packet,
                tables,
                headers,
                &inner,
                Side::Destination,
                (flow.vip, flow.vip_port),
                outer,
            );
        }
    }
    // To the backend, about its reply: it knows the replaced source only.
    if tables.may_be_flow(&inner.destination.0, inner.destination.1) {
        let key = FlowKey::new(inner.destination.0, inner.destination.1, inner.protocol);
        let known = find(tables, &key, |flow: &Flow| {
            flow.snat_port != Port::new(0)
                && flow.backend == inner.source.0
                && flow.backend_port == inner.source.1
        });
        if let Some((_, entry)) = known {
            let flow = entry.flow();
            let outer = (Side::Source, flow.snat);
            return translate(
                packet,
                tables,
                headers,
                &inner,
                Side::Destination,
                (flow.snat, flow.snat_port),
                outer,
            );
        }
    }
    Some(Verdict::Next)
}

/// Changes one side of the quoted packet, one address of the packet that quotes it, and the message's checksum. A
/// redirect is dropped: it would send elsewhere what is for the VIP.
#[inline(always)]
fn translate(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &Headers,
    inner: &Headers,
    side: Side,
    to: Peer,
    outer: (Side, crate::abi::Address),
) -> Option<Verdict> {
    if headers.protocol == ICMP && packet.load8(headers.l4)? == REDIRECT {
        tables.count(Outcome::PacketDropped);
        return Some(Verdict::Drop);
    }
    let l3 = headers.l4 + ICMP_BYTES;
    let old = match side {
        Side::Source => inner.source,
        Side::Destination => inner.destination,
    };
    let moved = store_address(packet, l3, headers.v6, side, old.0, to.0)?;
    // An IPv4 header sums to the same with its own checksum; an IPv6 header has none.
    let mut difference = if headers.v6 { moved } else { 0 };
    if !inner.later_fragment && inner.transport().is_some() {
        let at = match side {
            Side::Source => inner.l4,
            Side::Destination => inner.l4 + 2,
        };
        packet.store16(at, to.1.raw())?;
        let ports = replaced(0, old.1.raw() as u32, to.1.raw() as u32);
        difference = add(difference, ports);
        // Of TCP only the first eight bytes are sure to be quoted, and its checksum is not among them.
        if let Some(crate::abi::Protocol::Udp) = inner.transport()
            && let Some(at) = checksum_at(crate::abi::Protocol::Udp, inner.l4)
            && let Some(checksum) = packet.load16(at)
            && checksum != 0
        {
            let mut new = adjusted(checksum, add(moved, ports));
            if new == 0 {
                // Zero would say that there is none.
                new = 0xffff;
            }
            packet.store16(at, new)?;
            difference = replaced(difference, checksum as u32, new as u32);
        }
    }
    let from = match outer.0 {
        Side::Source => headers.source.0,
        Side::Destination => headers.destination.0,
    };
    let outside = store_address(packet, L2_BYTES, headers.v6, outer.0, from, outer.1)?;
    let at = headers.l4 + 2;
    packet.fix_checksum(at, difference, Covers::Content, false, headers.v6)?;
    if headers.v6 {
        packet.fix_checksum(at, outside, Covers::PseudoHeader, false, true)?;
    }
    tables.count(Outcome::PacketIcmpTranslated);
    Some(Verdict::Next)
}
