//! Who uses which place in the agent-owned arrays.
//!
//! A place that is given back *rests* before it is given out again: a program that read the old set word a moment ago
//! may still be on its way to the slot or the backend, and must find what was there.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// How long a place rests, in milliseconds. A program runs for microseconds; preempted, for a few scheduler ticks.
pub const REST_MS: u64 = 1_000;

/// Single places: service ids and backend indexes. Place 0 is never given out.
#[derive(Debug)]
pub(super) struct Places {
    limit: u32,
    /// The lowest place never used.
    next: u32,
    free: BTreeSet<u32>,
    resting: VecDeque<(u64, u32)>,
}

impl Places {
    /// Marks what is in use (after an adoption): everything below the highest used place that is not used is free.
    pub(super) fn adopt(limit: u32, used: &BTreeSet<u32>) -> Self {
        let next = used.last().map_or(1, |last| last.saturating_add(1));
        let free = (1..next).filter(|place| !used.contains(place)).collect();
        Self { limit, next, free, resting: VecDeque::new() }
    }

    /// The lowest free place; `None` if all are used or resting.
    pub(super) fn take(&mut self, now_ms: u64) -> Option<u32> {
        while let Some((freed_ms, place)) = self.resting.front().copied() {
            if now_ms.saturating_sub(freed_ms) < REST_MS {
                break;
            }
            self.resting.pop_front();
            self.free.insert(place);
        }
        if let Some(place) = self.free.pop_first() {
            return Some(place);
        }
        if self.next >= self.limit {
            return None;
        }
        let place = self.next;
        self.next += 1;
        Some(place)
    }

    /// More places, after the table has grown.
    pub(super) fn extend(&mut self, limit: u32) {
        self.limit = self.limit.max(limit);
    }

    /// Gives a place back.
    pub(super) fn give(&mut self, place: u32, now_ms: u64) {
        self.resting.push_back((now_ms, place));
    }

    /// Gives a place back that no reader has ever seen.
    pub(super) fn give_unseen(&mut self, place: u32) {
        self.free.insert(place);
    }

    /// How many are given out.
    #[cfg(test)]
    pub(super) fn in_use(&self) -> usize {
        self.next as usize - 1 - self.free.len() - self.resting.len()
    }
}

/// Runs of places: slots.
#[derive(Debug)]
pub(super) struct Runs {
    /// First place → length; neighbours are merged.
    free: BTreeMap<u32, u32>,
    /// (length, first place): for the best fit.
    by_length: BTreeSet<(u32, u32)>,
    resting: VecDeque<(u64, u32, u32)>,
}

impl Runs {
    /// All of `0..limit` is free.
    fn new(limit: u32) -> Self {
        let mut runs = Self { free: BTreeMap::new(), by_length: BTreeSet::new(), resting: VecDeque::new() };
        runs.insert(0, limit);
        runs
    }

    /// What the given runs, sorted by their first place and not overlapping, leave of `0..limit`.
    pub(super) fn adopt(limit: u32, used: &BTreeMap<u32, u32>) -> Self {
        let mut runs = Self::new(0);
        let mut from = 0;
        for (first, length) in used {
            runs.insert(from, first.saturating_sub(from));
            from = first.saturating_add(*length);
        }
        runs.insert(from, limit.saturating_sub(from));
        runs
    }

    /// The smallest free run that fits, cut to size. A run of length 0 needs no place.
    pub(super) fn take(&mut self, length: u32, now_ms: u64) -> Option<u32> {
        if length == 0 {
            return Some(0);
        }
        while let Some((freed_ms, first, rested)) = self.resting.front().copied() {
            if now_ms.saturating_sub(freed_ms) < REST_MS {
                break;
            }
            self.resting.pop_front();
            self.insert(first, rested);
        }
        let (found, first) = self.by_length.range((length, 0)..).next().copied()?;
        self.remove(first, found);
        self.insert(first.saturating_add(length), found - length);
        Some(first)
    }

    /// More places, after the table has grown from `old` to `new`.
    pub(super) fn extend(&mut self, old: u32, new: u32) {
        self.insert(old, new.saturating_sub(old));
    }

    /// Gives a run back.
    pub(super) fn give(&mut self, first: u32, length: u32, now_ms: u64) {
        if length > 0 {
            self.resting.push_back((now_ms, first, length));
        }
    }

    /// Gives a run back that no reader has ever seen.
    pub(super) fn give_unseen(&mut self, first: u32, length: u32) {
        self.insert(first, length);
    }

    /// How many places of `0..limit` are given out.
    #[cfg(test)]
    pub(super) fn in_use(&self, limit: u32) -> usize {
        let free: u32 = self.free.values().chain(self.resting.iter().map(|(_, _, length)| length)).sum();
        limit as usize - free as usize
    }

    fn insert(&mut self, mut first: u32, mut length: u32) {
        if length == 0 {
            return;
        }
        let before = self.free.range(..first).next_back().map(|(first, length)| (*first, *length));
        if let Some((before, before_length)) = before.filter(|(before, length)| before + length == first) {
            self.remove(before, before_length);
            first = before;
            length += before_length;
        }
        if let Some(after_length) = self.free.get(&(first + length)).copied() {
            self.remove(first + length, after_length);
            length += after_length;
        }
        self.free.insert(first, length);
        self.by_length.insert((length, first));
    }

    fn remove(&mut self, first: u32, length: u32) {
        self.free.remove(&first);
        self.by_length.remove(&(length, first));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_rests_before_it_is_used_again() {
        let mut places = Places::adopt(3, &BTreeSet::new());
        assert_eq!((places.take(0), places.take(0), places.take(0)), (Some(1), Some(2), None));
        places.give(1, 10);
        assert_eq!(places.take(10 + REST_MS - 1), None);
        assert_eq!(places.take(10 + REST_MS), Some(1));
    }

    #[test]
    fn adopted_places_leave_the_holes() {
        let mut places = Places::adopt(6, &BTreeSet::from([2, 4]));
        assert_eq!([1, 3, 5].map(Some), [places.take(0), places.take(0), places.take(0)]);
        assert_eq!(places.take(0), None);
    }

    #[test]
    fn runs_fit_best_and_merge() {
        let mut runs = Runs::new(10);
        let (a, b, c) = (runs.take(4, 0), runs.take(3, 0), runs.take(3, 0));
        assert_eq!((a, b, c), (Some(0), Some(4), Some(7)));
        assert_eq!(runs.take(1, 0), None);
        runs.give(4, 3, 0);
        runs.give(0, 4, 0);
        assert_eq!(runs.take(7, REST_MS - 1), None);
        assert_eq!(runs.take(7, REST_MS), Some(0));
    }

    #[test]
    fn adopted_runs_leave_the_gaps() {
        let mut runs = Runs::adopt(10, &BTreeMap::from([(0, 2), (5, 3)]));
        assert_eq!(runs.take(3, 0), Some(2));
        assert_eq!(runs.take(2, 0), Some(8));
        assert_eq!(runs.take(1, 0), None);
    }
}
