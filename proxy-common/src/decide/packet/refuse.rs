//! Rule Z4: the client learns at once that nobody serves it. TCP is answered with a reset: some stacks take an ICMP
//! error to a connection attempt for a passing trouble. Everything else gets "port unreachable".

use core::hint::black_box;

use super::checksum::{add, fold, replaced};
use super::headers::{ACK, FIN, ICMP, ICMPV6, RST, SYN, ip_bytes};
use super::{Covers, Headers, L2_BYTES, Packet};
use crate::abi::{Address, Protocol};

const V4_BYTES: u32 = ip_bytes(false);
const V6_BYTES: u32 = ip_bytes(true);
const TCP_BYTES: u32 = 20;
const ICMP_BYTES: u32 = 8;
/// Of the refused packet's transport header.
const QUOTED_BYTES: u32 = 8;
/// Hops that an answer may take.
const TTL: u8 = 64;

/// Turns the packet into its answer, which goes back by the device that it came from. `None`: there is none, and the
/// packet is to be dropped.
#[inline(always)]
pub fn refuse(packet: &mut impl Packet, headers: &Headers) -> Option<()> {
    if headers.later_fragment || headers.protocol == ICMPV6 && is_error(packet, headers)? {
        return None;
    }
    swap_link_addresses(packet)?;
    if headers.protocol == Protocol::Tcp.number() {
        reset(packet, headers)
    } else {
        unreachable(packet, headers)
    }
}

/// An error is never answered with an error.
#[inline(always)]
fn is_error(packet: &impl Packet, headers: &Headers) -> Option<bool> {
    Some(packet.load8(headers.l4)? < 128)
}

#[inline(always)]
fn swap_link_addresses(packet: &mut impl Packet) -> Option<()> {
    let (to, to_rest) = (packet.load32(0)?, packet.load16(4)?);
    let (from, from_rest) = (packet.load16(6)?, packet.load32(8)?);
    packet.store16(0, from)?;
    packet.store32(2, from_rest)?;
    packet.store32(6, to)?;
    packet.store16(10, to_rest)
}

/// A length in network order. No packet is longer than sixteen bits can say.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "see above")]
const fn length(bytes: u32) -> u16 {
    (bytes as u16).to_be()
}

/// A 16-bit number in network order, as part of a sum.
#[inline(always)]
const fn word(number: u32) -> u32 {
    length(number) as u32
}

/// RFC 9293, 3.5.2.
#[inline(always)]
fn reset(packet: &mut impl Packet, headers: &Headers) -> Option<()> {
    let l4 = headers.l4;
    let flags = headers.tcp_flags;
    if flags & RST != 0 || l4 != L2_BYTES + ip_bytes(headers.v6) {
        return None;
    }
    let header_bytes = (packet.load8(l4 + 12)? as u32 >> 4) * 4;
    let total = if headers.v6 {
        u16::from_be(packet.load16(L2_BYTES + 4)?) as u32
    } else {
        (u16::from_be(packet.load16(L2_BYTES + 2)?) as u32).checked_sub(V4_BYTES)?
    };
    let payload = total.checked_sub(header_bytes)?;
    let (sequence, acknowledged) = (packet.load32(l4 + 4)?, packet.load32(l4 + 8)?);
    let ports = packet.load32(l4)?;
    let (old_flags, old_urgent) = (packet.load32(l4 + 12)?, packet.load16(l4 + 18)?);
    let mut content = 0;
    // Options go; they are part of the old sum.
    for n in 0..10 {
        let at = TCP_BYTES + n * 4;
        if at < header_bytes {
            content = add(content, !packet.load32(l4 + at)?);
        }
    }
    let (new_sequence, new_acknowledged, new_flags) = if flags & ACK != 0 {
        (acknowledged, 0, RST)
    } else {
        let more = payload + (flags & SYN != 0) as u32 + (flags & FIN != 0) as u32;
        (0, u32::from_be(sequence).wrapping_add(more).to_be(), RST | ACK)
    };
    let flags_word = u32::from_ne_bytes([5 << 4, new_flags, 0, 0]);
    packet.resize(l4 + TCP_BYTES)?;
    let swapped = ports.rotate_left(16);
    packet.store32(l4, swapped)?;
    packet.store32(l4 + 4, new_sequence)?;
    packet.store32(l4 + 8, new_acknowledged)?;
    packet.store32(l4 + 12, flags_word)?;
    packet.store16(l4 + 18, 0)?;
    content = replaced(content, sequence, new_sequence);
    content = replaced(content, acknowledged, new_acknowledged);
    content = replaced(content, old_flags, flags_word);
    content = replaced(content, old_urgent as u32, 0);
    ip_header(packet, headers, TCP_BYTES, Protocol::Tcp.number())?;
    if payload == 0 || is_unfinished(packet, l4 + 16)? {
        // By difference: the checksum may be one that a device is still to finish.
        packet.fix_checksum(l4 + 16, content, Covers::Content, false)?;
        let shorter = replaced(0, word(total), word(TCP_BYTES));
        packet.fix_checksum(l4 + 16, shorter, Covers::PseudoHeader, false)?;
    } else {
        packet.store16(l4 + 16, 0)?;
        let mut sum = pseudo_header(headers, TCP_BYTES, Protocol::Tcp.number());
        for n in 0..5 {
            sum = add(sum, packet.load32(l4 + n * 4)?);
        }
        packet.store16(l4 + 16, !fold(sum))?;
    }
    Some(())
}

/// Whether a device is still to finish the checksum at `at`: it holds the sum of the pseudo header, so it does not follow
/// a change of the content. The kernel does not say so otherwise.
#[inline(always)]
fn is_unfinished(packet: &mut impl Packet, at: u32) -> Option<bool> {
    let checksum = packet.load16(at)?;
    if checksum == 0 {
        return Some(false);
    }
    packet.fix_checksum(at, 1, Covers::Content, false)?;
    let follows = packet.load16(at)? != checksum;
    packet.store16(at, checksum)?;
    Some(!follows)
}

/// What finishing the UDP checksum in the quote will change of the message that quotes it.
#[inline(always)]
fn quote_to_finish(packet: &mut impl Packet, headers: &Headers) -> Option<u32> {
    if headers.protocol != Protocol::Udp.number() || !is_unfinished(packet, headers.l4 + 6)? {
        return Some(0);
    }
    let mut finished = !fold(add(packet.load32(headers.l4)?, packet.load32(headers.l4 + 4)?));
    if finished == 0 {
        finished = 0xffff;
    }
    Some(replaced(0, packet.load16(headers.l4 + 6)? as u32, finished as u32))
}

/// RFC 1122, 3.2.2.1 and RFC 4443, 3.1.
#[inline(always)]
fn unreachable(packet: &mut impl Packet, headers: &Headers) -> Option<()> {
    let ip_bytes = ip_bytes(headers.v6);
    // Neither IPv4 options nor IPv6 extension headers: rare, and the quote would need another length.
    if headers.l4 != L2_BYTES + ip_bytes {
        return None;
    }
    packet.resize(L2_BYTES + ip_bytes + QUOTED_BYTES)?;
    let to_finish = quote_to_finish(packet, headers)?;
    packet.insert_after_l2(ip_bytes + ICMP_BYTES)?;
    let (protocol, kind) = if headers.v6 {
        (ICMPV6, u32::from_ne_bytes([1, 4, 0, 0]))
    } else {
        (ICMP, u32::from_ne_bytes([3, 3, 0, 0]))
    };
    // Known to the compiler, it is kept in half a register's place, and kernels before 6.3 forget what they knew of that:
    // each access must bound it again.
    let at = black_box(L2_BYTES + ip_bytes);
    let bytes = ICMP_BYTES + ip_bytes + QUOTED_BYTES;
    packet.store32(at, kind)?;
    packet.store32(at + 4, 0)?;
    let mut sum = if headers.v6 { pseudo_header(headers, bytes, ICMPV6) } else { 0 };
    for n in 0..(ICMP_BYTES + V6_BYTES + QUOTED_BYTES) / 4 {
        if n * 4 < bytes {
            sum = add(sum, packet.load32(at + n * 4)?);
        }
    }
    packet.store16(at + 2, !fold(add(sum, to_finish)))?;
    ip_header(packet, headers, bytes, protocol)
}

/// The sum of a pseudo header; it is the same in both directions.
#[inline(always)]
fn pseudo_header(headers: &Headers, bytes: u32, protocol: u8) -> u32 {
    let mut sum = add(word(bytes), word(protocol as u32));
    let (source, destination) = (headers.source.0.words(), headers.destination.0.words());
    if headers.v6 {
        sum = add(add(add(sum, source[0]), source[1]), source[2]);
        sum = add(add(add(sum, destination[0]), destination[1]), destination[2]);
    }
    add(add(sum, source[3]), destination[3])
}

/// The header of the answer, from who was dialled to who dialled, in the place of the packet's own.
#[inline(always)]
fn ip_header(packet: &mut impl Packet, headers: &Headers, payload: u32, protocol: u8) -> Option<()> {
    let l3 = L2_BYTES;
    if headers.v6 {
        packet.store32(l3, u32::from_ne_bytes([0x60, 0, 0, 0]))?;
        packet.store16(l3 + 4, length(payload))?;
        packet.store8(l3 + 6, protocol)?;
        packet.store8(l3 + 7, TTL)?;
        store_v6(packet, l3 + 8, &headers.destination.0)?;
        return store_v6(packet, l3 + 24, &headers.source.0);
    }
    let length = length(V4_BYTES + payload).to_ne_bytes();
    let words = [
        u32::from_ne_bytes([0x45, 0, length[0], length[1]]),
        // Don't fragment.
        u32::from_ne_bytes([0, 0, 0x40, 0]),
        u32::from_ne_bytes([TTL, protocol, 0, 0]),
        headers.destination.0.words()[3],
        headers.source.0.words()[3],
    ];
    let sum = add(add(add(add(words[0], words[1]), words[2]), words[3]), words[4]);
    packet.store32(l3, words[0])?;
    packet.store32(l3 + 4, words[1])?;
    packet.store32(l3 + 8, words[2])?;
    packet.store16(l3 + 10, !fold(sum))?;
    packet.store32(l3 + 12, words[3])?;
    packet.store32(l3 + 16, words[4])
}

#[inline(always)]
fn store_v6(packet: &mut impl Packet, at: u32, address: &Address) -> Option<()> {
    let words = address.words();
    packet.store32(at, words[0])?;
    packet.store32(at + 4, words[1])?;
    packet.store32(at + 8, words[2])?;
    packet.store32(at + 12, words[3])
}
