//! Frames as the kernel keeps them.

use proxy_common::decide::packet::{Covers, L2_BYTES, Packet};

/// Where the IP header starts.
pub(crate) const L3: usize = L2_BYTES as usize;
/// `OFFSETS` of the kernel's frame: it would read elsewhere.
const OFFSETS: u32 = 0x3ff;

/// Ones'-complement sum of big-endian words, not complemented.
pub(crate) fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

/// A checksum that a device is still to finish (`CHECKSUM_PARTIAL`): the field holds the sum of the pseudo header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Unfinished {
    /// Where the sum starts.
    pub(crate) start: usize,
    /// Where the checksum lies.
    pub(crate) field: usize,
    pub(crate) udp: bool,
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) bytes: Vec<u8>,
    pub(crate) unfinished: Option<Unfinished>,
    /// Payload of each packet that it stands for.
    pub(crate) segment_bytes: u32,
    /// Whether it has a VLAN tag.
    pub(crate) tagged: bool,
}

impl std::fmt::Debug for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (n, byte) in self.bytes.iter().enumerate() {
            write!(f, "{}{byte:02x} ", if n >= L3 && (n - L3).is_multiple_of(20) { "\n" } else { "" })?;
        }
        write!(f, "\n{:?}", self.unfinished)
    }
}

impl Frame {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, unfinished: None, segment_bytes: 0, tagged: false }
    }

    /// What a device makes of it that sends it on a wire.
    pub(crate) fn finished(&self) -> Self {
        let mut bytes = self.bytes.clone();
        if let Some(Unfinished { start, field, udp }) = self.unfinished {
            let mut checksum = !sum(&bytes[start..]);
            if udp && checksum == 0 {
                checksum = 0xffff;
            }
            bytes[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
        }
        Self::new(bytes)
    }

    fn get<const N: usize>(&self, at: u32) -> Option<[u8; N]> {
        assert!(at <= OFFSETS, "offset {at}");
        // As in the kernel: no byte that is read is a frame's last one.
        let from = at as usize;
        self.bytes.get(from..from + N.max(2))?[..N].try_into().ok()
    }

    fn put<const N: usize>(&mut self, at: u32, value: [u8; N]) -> Option<()> {
        self.get::<N>(at)?;
        self.bytes[at as usize..at as usize + N].copy_from_slice(&value);
        Some(())
    }
}

impl Packet for Frame {
    fn load8(&self, at: u32) -> Option<u8> {
        self.get::<1>(at).map(|[byte]| byte)
    }

    fn load16(&self, at: u32) -> Option<u16> {
        self.get(at).map(u16::from_ne_bytes)
    }

    fn load32(&self, at: u32) -> Option<u32> {
        self.get(at).map(u32::from_ne_bytes)
    }

    fn load_words<const N: usize>(&self, at: u32) -> Option<[u32; N]> {
        let end = at + 4 * u32::try_from(N).unwrap();
        let words: Option<Vec<u32>> = (at..end).step_by(4).map(|at| self.load32(at)).collect();
        words?.try_into().ok()
    }

    fn store8(&mut self, at: u32, value: u8) -> Option<()> {
        self.put(at, [value])
    }

    fn store16(&mut self, at: u32, value: u16) -> Option<()> {
        self.put(at, value.to_ne_bytes())
    }

    fn store32(&mut self, at: u32, value: u32) -> Option<()> {
        self.put(at, value.to_ne_bytes())
    }

    /// `bpf_l4_csum_replace` and `inet_proto_csum_replace_by_diff`.
    fn fix_checksum(&mut self, at: u32, difference: u32, covers: Covers, zero_is_none: bool) -> Option<()> {
        let old = self.load16(at)?;
        if zero_is_none && old == 0 {
            return Some(());
        }
        let plus = |old: u16| {
            let mut sum = u64::from(difference) + u64::from(old);
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            u16::try_from(sum).unwrap()
        };
        let mut new = match (self.unfinished, covers) {
            (None, Covers::PseudoHeader | Covers::Content) => !plus(!old),
            (Some(_), Covers::PseudoHeader) => plus(old),
            (Some(_), Covers::Content) => old,
        };
        if zero_is_none && new == 0 {
            new = 0xffff;
        }
        self.store16(at, new)
    }

    /// `bpf_skb_change_tail`: an unfinished checksum's field must stay.
    fn resize(&mut self, bytes: u32) -> Option<()> {
        if self.unfinished.is_some_and(|unfinished| unfinished.field + 2 > bytes as usize) {
            return None;
        }
        self.bytes.resize(bytes as usize, 0);
        Some(())
    }

    /// No device has summed the whole frame.
    fn change_sum(&mut self, _difference: u32) {}

    fn bytes(&self) -> u32 {
        u32::try_from(self.bytes.len()).unwrap()
    }

    fn segment_bytes(&self) -> u32 {
        self.segment_bytes
    }

    fn is_tagged(&self) -> bool {
        self.tagged
    }

    /// `bpf_skb_adjust_room`: an unfinished checksum stays where it was, in what moved.
    fn insert_after_l2(&mut self, bytes: u32) -> Option<()> {
        self.bytes.splice(L3..L3, std::iter::repeat_n(0, bytes as usize));
        if let Some(unfinished) = &mut self.unfinished {
            unfinished.start += bytes as usize;
            unfinished.field += bytes as usize;
        }
        Some(())
    }
}
