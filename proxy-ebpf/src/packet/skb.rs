//! The frame as the decision core sees it: direct reads and writes, helpers only where the kernel keeps books.

use core::arch::asm;

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::{
        bpf_csum_update, bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_change_head, bpf_skb_change_tail,
        bpf_skb_pull_data,
    },
    programs::TcContext,
};
use proxy_common::decide::packet::{Covers, L2_BYTES, Packet};

/// `BPF_F_PSEUDO_HDR`, `BPF_F_MARK_MANGLED_0`.
const PSEUDO_HEADER: u64 = 1 << 4;
const ZERO_IS_NONE: u64 = 1 << 5;
/// `ETH_P_IP`, `ETH_P_IPV6` in network order.
const IPV4: u32 = 0x0800_u16.to_be() as u32;
const IPV6: u32 = 0x86dd_u16.to_be() as u32;
/// `BPF_ADJ_ROOM_MAC`.
const AFTER_L2: u32 = 1;

/// No header that is read starts later; also what the verifier needs to bound an offset.
const OFFSETS: u32 = 0x3ff;
/// Link, IP and transport headers of nearly all packets, an ICMP error's quote included.
const USUAL_BYTES: u32 = 118;

pub(super) struct Skb<'a>(&'a TcContext);

impl<'a> Skb<'a> {
    #[inline(always)]
    pub(super) const fn new(ctx: &'a TcContext) -> Self {
        Self(ctx)
    }

    #[inline(always)]
    fn raw(&self) -> *mut __sk_buff {
        self.0.skb.skb
    }

    /// Whether it is IPv6, else IPv4; `None`: neither.
    #[inline(always)]
    pub(super) fn is_v6(&self) -> Option<bool> {
        match self.protocol() {
            IPV4 => Some(false),
            IPV6 => Some(true),
            _ => None,
        }
    }

    /// Ethernet type, network order.
    #[inline(always)]
    fn protocol(&self) -> u32 {
        // SAFETY: the kernel gives a valid context; the verifier checks the offset.
        unsafe { (&raw const (*self.raw()).protocol).read_volatile() }
    }

    /// Interface index of the hook's device.
    #[inline(always)]
    pub(super) fn device(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.raw()).ifindex).read_volatile() }
    }

    /// Interface index of the device that it came in by; 0: a process of this node made it.
    #[inline(always)]
    pub(super) fn arrived_by(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.raw()).ingress_ifindex).read_volatile() }
    }

    /// What an earlier hook of this node said of the packet.
    #[inline(always)]
    pub(super) fn hint(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.raw()).tc_index).read_volatile() }
    }

    /// For the hooks that it has still to pass. It stays with the packet through routing, bridges, netfilter and tunnels.
    #[inline(always)]
    pub(super) fn set_hint(&self, hint: u32) {
        // SAFETY: as above, and the field may be written by programs of this type.
        unsafe { (&raw mut (*self.raw()).tc_index).write_volatile(hint) };
    }

    /// Whole length.
    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.raw()).len).read_volatile() }
    }

    /// Makes the headers readable where they lie in fragments. What cannot be had is found missing when it is read.
    #[inline(always)]
    pub(super) fn pull(&self) {
        let want = self.length().min(USUAL_BYTES);
        if self.start() + want as usize > self.end() {
            // SAFETY: the context is valid.
            let _ = unsafe { bpf_skb_pull_data(self.raw(), want) };
        }
    }

    /// Gives a frame that has none an Ethernet header, without addresses.
    #[inline(always)]
    pub(super) fn add_link_header(&self) -> Option<()> {
        // SAFETY: the context is valid.
        if unsafe { bpf_skb_change_head(self.raw(), L2_BYTES, 0) } != 0 {
            return None;
        }
        // SAFETY: inside the frame.
        unsafe { *self.at::<u16>(12)? = self.protocol() as u16 };
        Some(())
    }

    // In assembly: the offset must stay in the instruction, and the loads in their place. The compiler makes "context plus
    // 76" a value of its own where it reads the field often, which the verifier refuses.
    #[inline(always)]
    fn start(&self) -> usize {
        const { assert!(core::mem::offset_of!(__sk_buff, data) == 76) };
        let start: usize;
        // SAFETY: reads a field of the context, which is valid.
        unsafe { asm!("{start} = *(u32 *)({skb} + 76)", start = out(reg) start, skb = in(reg) self.raw()) };
        start
    }

    #[inline(always)]
    fn end(&self) -> usize {
        const { assert!(core::mem::offset_of!(__sk_buff, data_end) == 80) };
        let end: usize;
        // SAFETY: as above.
        unsafe { asm!("{end} = *(u32 *)({skb} + 80)", end = out(reg) end, skb = in(reg) self.raw()) };
        end
    }

    #[inline(always)]
    fn at<T>(&self, at: u32) -> Option<*mut T> {
        // For a single byte the compiler compares with ">=", from which the verifier learns nothing. No byte that is read
        // is a frame's last one.
        let bytes = if size_of::<T>() == 1 { 2 } else { size_of::<T>() };
        let from = self.start() + (at & OFFSETS) as usize;
        if from + bytes > self.end() { None } else { Some(from as *mut T) }
    }
}

impl Packet for Skb<'_> {
    #[inline(always)]
    fn load8(&self, at: u32) -> Option<u8> {
        // SAFETY: inside the frame.
        Some(unsafe { *self.at(at)? })
    }

    #[inline(always)]
    fn load16(&self, at: u32) -> Option<u16> {
        // SAFETY: inside the frame; the machines that this runs on read unaligned words.
        Some(unsafe { *self.at(at)? })
    }

    #[inline(always)]
    fn load32(&self, at: u32) -> Option<u32> {
        // SAFETY: as above.
        Some(unsafe { *self.at(at)? })
    }

    #[inline(always)]
    fn load_words<const N: usize>(&self, at: u32) -> Option<[u32; N]> {
        // SAFETY: as above.
        Some(unsafe { *self.at(at)? })
    }

    #[inline(always)]
    fn store8(&mut self, at: u32, value: u8) -> Option<()> {
        // SAFETY: inside the frame.
        unsafe { *self.at(at)? = value };
        Some(())
    }

    #[inline(always)]
    fn store16(&mut self, at: u32, value: u16) -> Option<()> {
        // SAFETY: as above.
        unsafe { *self.at(at)? = value };
        Some(())
    }

    #[inline(always)]
    fn store32(&mut self, at: u32, value: u32) -> Option<()> {
        // SAFETY: as above.
        unsafe { *self.at(at)? = value };
        Some(())
    }

    #[inline(always)]
    fn fix_checksum(&mut self, at: u32, difference: u32, covers: Covers, zero_is_none: bool) -> Option<()> {
        let mut flags = match covers {
            Covers::PseudoHeader => PSEUDO_HEADER,
            Covers::Content => 0,
        };
        if zero_is_none {
            flags |= ZERO_IS_NONE;
        }
        // SAFETY: the helper checks the offset. Size 0 with "from" 0: "to" is a difference.
        let result = unsafe { bpf_l4_csum_replace(self.raw(), at, 0, difference as u64, flags) };
        if result == 0 { Some(()) } else { None }
    }

    #[inline(always)]
    fn resize(&mut self, bytes: u32) -> Option<()> {
        // SAFETY: the helper checks the length.
        let result = unsafe { bpf_skb_change_tail(self.raw(), bytes, 0) };
        if result == 0 { Some(()) } else { None }
    }

    #[inline(always)]
    fn change_sum(&mut self, difference: u32) {
        // SAFETY: the context is valid. Where the device has not summed the packet there is nothing to change.
        let _ = unsafe { bpf_csum_update(self.raw(), difference) };
    }

    #[inline(always)]
    fn bytes(&self) -> u32 {
        self.length()
    }

    #[inline(always)]
    fn segment_bytes(&self) -> u32 {
        // SAFETY: the kernel gives a valid context; the verifier checks the offset.
        unsafe { (&raw const (*self.raw()).gso_size).read_volatile() }
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: as above.
        unsafe { (&raw const (*self.raw()).vlan_present).read_volatile() != 0 }
    }

    #[inline(always)]
    fn insert_after_l2(&mut self, bytes: u32) -> Option<()> {
        // SAFETY: the helper checks the length.
        let result = unsafe { bpf_skb_adjust_room(self.raw(), bytes as i32, AFTER_L2, 0) };
        if result == 0 { Some(()) } else { None }
    }
}
