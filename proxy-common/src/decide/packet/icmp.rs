//! ICMP errors: what they quote is a packet of ours, so its addresses are translated with theirs (M7).

use super::checksum::{add, adjusted, replaced};
use super::flow::{find, find_inside};
use super::headers::{ICMP, ICMPV6};
use super::nat::{Side, checksum_at, store_address};
use super::{Covers, FlowEntry, Headers, L2_BYTES, Packet, PacketTables, Verdict, ingress::other, parse};
use crate::abi::{Outcome, Port, Protocol, SnatKey};
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
        let key = SnatKey::new(inner.source, inner.destination, inner.protocol);
        if let Some(client) = tables.snat(&key)
            && !client.is_nobody()
        {
            let mut port = client.port;
            if let Some(entry) = tables.flow(&client) {
                port = entry.flow().port_inside(port);
            }
            let changed =
                Changed { side: Side::Source, to: (client.client, port), other: inner.destination.1 };
            return translate(packet, tables, headers, &inner, &changed);
        }
    }
    // About a reply that left with the VIP as its source: on to the backend.
    // Who is talked to directly may be dialled too (M11).
    if (tables.may_be_vip(&headers.destination.0) || tables.several_vips())
        && tables.may_be_flow(&inner.destination.0, inner.destination.1)
        && let Some((_, entry)) = find(tables, &inner.of_destination(), |flow| {
            !flow.is_foreign() && flow.vip == inner.source.0 && flow.vip_port == inner.source.1
        })
    {
        let to = (entry.flow().backend, entry.flow().backend_port);
        let other = entry.flow().port_inside(inner.destination.1);
        return translate(packet, tables, headers, &inner, &Changed { side: Side::Source, to, other });
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
    if tables.may_be_flow(&inner.source.0, inner.source.1)
        && let Some((_, entry)) = find(tables, &inner.of_source(), |flow| flow.goes_to(inner.destination))
    {
        let to = (entry.flow().vip, entry.flow().vip_port);
        let changed = Changed { side: Side::Destination, to, other: inner.source.1 };
        return translate(packet, tables, headers, &inner, &changed);
    }
    // To the backend, about its reply: it knows the replaced source only.
    if tables.may_be_flow(&inner.destination.0, inner.destination.1)
        && let Some((_, entry)) = find(tables, &inner.of_destination(), |flow| {
            flow.snat_port != Port::new(0) && flow.goes_to(inner.source)
        })
    {
        let to = (entry.flow().snat, entry.flow().snat_port);
        let changed = Changed { side: Side::Destination, to, other: inner.source.1 };
        return translate(packet, tables, headers, &inner, &changed);
    }
    if tables.several_vips() { Some(Verdict::OtherPort) } else { Some(Verdict::Next) }
}

/// What [`icmp_egress`] does, for clients that have another port inside the node (M11).
#[inline(always)]
pub fn icmp_other_port(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &Headers,
) -> Option<Verdict> {
    let inner = quoted(packet, headers)?;
    if let Some((key, entry)) = find_inside(tables, &inner.of_inner_source()) {
        let to = (entry.flow().vip, entry.flow().vip_port);
        let changed = Changed { side: Side::Destination, to, other: key.port };
        return translate(packet, tables, headers, &inner, &changed);
    }
    if let Some((_, entry)) = find_inside(tables, &inner.of_inner_destination())
        && entry.flow().snat_port != Port::new(0)
    {
        let to = (entry.flow().snat, entry.flow().snat_port);
        let changed = Changed { side: Side::Destination, to, other: inner.source.1 };
        return translate(packet, tables, headers, &inner, &changed);
    }
    Some(Verdict::Next)
}

/// What changes in a quoted packet.
struct Changed {
    side: Side,
    /// What that side becomes.
    to: Peer,
    /// The other side's port: the client may have another one inside the node (M11).
    other: Port,
}

/// Changes one side of the quoted packet (and the other's port), the same address on the other side of the packet that
/// quotes it (an error goes against the way of what it is about), and the message's checksum. A redirect is dropped: it
/// would send elsewhere what is for the VIP.
#[inline(always)]
fn translate(
    packet: &mut impl Packet,
    tables: &impl PacketTables,
    headers: &Headers,
    inner: &Headers,
    changed: &Changed,
) -> Option<Verdict> {
    let Changed { side, to, other } = *changed;
    if headers.protocol == ICMP && packet.load8(headers.l4)? == REDIRECT {
        tables.count(Outcome::PacketDropped);
        return Some(Verdict::Drop);
    }
    let l3 = headers.l4 + ICMP_BYTES;
    let (old, other_old) = match side {
        Side::Source => (inner.source, inner.destination.1),
        Side::Destination => (inner.destination, inner.source.1),
    };
    let moved = store_address(packet, l3, headers.v6, side, old.0, to.0)?;
    // An IPv4 header sums to the same with its own checksum; an IPv6 header has none.
    let mut difference = if headers.v6 { moved } else { 0 };
    if !inner.later_fragment && inner.transport().is_some() {
        let (at, other_at) = match side {
            Side::Source => (inner.l4, inner.l4 + 2),
            Side::Destination => (inner.l4 + 2, inner.l4),
        };
        packet.store16(at, to.1.raw())?;
        packet.store16(other_at, other.raw())?;
        let ports = replaced(0, old.1.raw() as u32, to.1.raw() as u32);
        let ports = replaced(ports, other_old.raw() as u32, other.raw() as u32);
        difference = add(difference, ports);
        // Of TCP only the first eight bytes are sure to be quoted, and its checksum is not among them.
        if let Some(Protocol::Udp) = inner.transport()
            && let at = checksum_at(Protocol::Udp, inner.l4)
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
    let (other_side, from) = match side {
        Side::Source => (Side::Destination, headers.destination.0),
        Side::Destination => (Side::Source, headers.source.0),
    };
    let outside = store_address(packet, L2_BYTES, headers.v6, other_side, from, to.0)?;
    let at = headers.l4 + 2;
    packet.fix_checksum(at, difference, Covers::Content, false)?;
    if headers.v6 {
        packet.fix_checksum(at, outside, Covers::PseudoHeader, false)?;
    }
    tables.count(Outcome::PacketIcmpTranslated);
    Some(Verdict::Next)
}
