//! How many young connections gave way to newer ones. The kernel throws them out and does not say so: what began has grown
//! up, was removed, is there, or gave way. Pure.

/// What a walk found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Walk {
    /// Connections that began, ever.
    pub begun: u64,
    /// Those that grew up, ever.
    pub grown: u64,
    /// Young ones that this walk removed.
    pub removed: u64,
    /// Young ones that it left.
    pub left: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Turnover {
    /// With as many the table is full.
    full: u64,
    last: Option<Walk>,
    /// A walk is not of one moment: what one misses, the next one finds.
    given_way: i64,
}

impl Turnover {
    /// Of a table of this size on so many CPUs, which keep free places each for itself.
    pub(super) fn new(limit: u32, cpus: usize) -> Self {
        /// `LOCAL_FREE_TARGET` of the kernel's bpf_lru_list.c.
        const FREE_BY_CPU: u64 = 128;
        let limit = u64::from(limit);
        let free = u64::try_from(cpus).unwrap_or(u64::MAX).saturating_mul(FREE_BY_CPU);
        Self { full: limit - free.min(limit / 2), last: None, given_way: 0 }
    }

    /// Takes in a walk. Returns how many gave way since the last one; only where the table is full do any.
    pub(super) fn walked(&mut self, walk: Walk) -> u64 {
        let Some(last) = self.last.replace(walk) else { return 0 };
        if walk.left + walk.removed < self.full {
            return 0;
        }
        let signed = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let came = signed(last.left) + signed(walk.begun.saturating_sub(last.begun));
        let accounted =
            signed(walk.grown.saturating_sub(last.grown)) + signed(walk.removed) + signed(walk.left);
        let before = self.total();
        self.given_way += came - accounted;
        self.total().saturating_sub(before)
    }

    /// How many gave way in all.
    pub(super) fn total(&self) -> u64 {
        u64::try_from(self.given_way).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_began_and_is_nowhere_gave_way() {
        let mut turnover = Turnover::new(1024, 2);
        let walk = |begun, grown, removed, left| Walk { begun, grown, removed, left };
        // What was there before is nobody's business.
        assert_eq!(turnover.walked(walk(5000, 70, 0, 1000)), 0);
        assert_eq!(turnover.walked(walk(15_000, 90, 30, 950)), 1000 + 10_000 - 20 - 30 - 950);
        // A walk that missed some, and the next one that did not.
        assert_eq!((turnover.walked(walk(15_000, 90, 0, 940)), turnover.total()), (10, 10_010));
        assert_eq!((turnover.walked(walk(15_000, 90, 0, 950)), turnover.total()), (0, 10_000));
        // Where there is room nobody gives way, whatever else somebody removed.
        assert_eq!(turnover.walked(walk(15_500, 90, 0, 100)), 0);
        assert_eq!((turnover.walked(walk(15_600, 90, 0, 200)), turnover.total()), (0, 10_000));
    }

    #[test]
    fn a_table_is_full_although_each_cpu_keeps_free_places() {
        assert_eq!((Turnover::new(16_384, 2).full, Turnover::new(16_384, 128).full), (16_128, 8192));
    }
}
