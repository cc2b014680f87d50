//! Ones'-complement sums (RFC 1071) and their differences (RFC 1624), over words as they lie in memory.

/// Adds with the carry brought round.
#[inline(always)]
pub(super) const fn add(a: u32, b: u32) -> u32 {
    let sum = a.wrapping_add(b);
    sum.wrapping_add((sum < b) as u32)
}

/// The difference that replacing a word makes, added to `difference`.
#[inline(always)]
pub(super) const fn replaced(difference: u32, old: u32, new: u32) -> u32 {
    add(add(difference, !old), new)
}

/// Folds a sum into sixteen bits.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "folded twice, it fits")]
pub(super) const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// A stored checksum after what it covers has changed by `difference`.
#[inline(always)]
pub(super) const fn adjusted(checksum: u16, difference: u32) -> u16 {
    !fold(add(!checksum as u32, difference))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn whole(words: &[u16]) -> u16 {
        !fold(words.iter().fold(0, |sum, word| add(sum, u32::from(*word))))
    }

    #[test]
    fn a_difference_is_as_good_as_a_new_sum() {
        let mut words: Vec<u16> = (0..40).map(|n: u16| n.wrapping_mul(0x9e37) ^ 0x5a5a).collect();
        for n in 0..400usize {
            let old = whole(&words);
            let at = (n * 7) % 40;
            let (before, after) = (words[at], words[at].wrapping_add(0x1234).rotate_left(3));
            words[at] = after;
            let new = adjusted(old, replaced(0, before.into(), after.into()));
            // Zero has two forms in ones' complement; both say the same.
            assert!(new == whole(&words) || (new ^ whole(&words)) == 0xffff, "{n}");
        }
    }
}
