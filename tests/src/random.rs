//! Numbers that repeat with their seed.

/// xorshift64*, which is cheap and good enough not to repeat itself.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Begins with a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        // Zero would stay zero.
        Self(seed | 1 << 63)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The next one below a bound that fits 32 bits: multiplied and shifted.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(((self.number() >> 32) * bound as u64) >> 32).unwrap_or_default()
    }
}
