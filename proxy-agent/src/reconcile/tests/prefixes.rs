//! No prefix of any plan is unsafe: whoever reads the tables between two writes meets the old state or the new one.

use super::world::{check, history, reachable};
use super::*;
use crate::reconcile::REST_MS;
use proxy_common::abi::SetWord;

/// A program that read a set's word a moment ago may still be on its way to its slots.
struct LateReader {
    read_ms: u64,
    word: SetWord,
    saw: BTreeSet<std::net::SocketAddr>,
}

impl LateReader {
    fn check(&self, tables: &Memory) -> Result<(), TestCaseError> {
        let (reaches, _) = reachable(tables, self.word);
        prop_assert!(
            reaches.is_subset(&self.saw),
            "{:?} leads to {reaches:?}, was {:?}",
            self.word,
            self.saw
        );
        Ok(())
    }
}

fn late_readers(tables: &Memory, now_ms: u64) -> Vec<LateReader> {
    let frontends = Dataplane::frontends(tables).unwrap();
    let words = frontends.iter().flat_map(|(_, value)| {
        let record = tables.record(value.service());
        [record.cluster, record.local]
    });
    let reader = |word| LateReader { read_ms: now_ms, word, saw: reachable(tables, word).0 };
    words.filter(|word| word.count() > 0).map(reader).collect()
}

/// Replays the log since `from` one write at a time.
fn walk(
    from: &Memory,
    to: &Memory,
    worlds: &[&World],
    late: &[LateReader],
    adopting: bool,
) -> Result<(), TestCaseError> {
    let mut tables = from.clone();
    check(&tables, worlds, adopting)?;
    for write in &to.log[from.log.len()..] {
        assert!(tables.apply(&[*write]).is_empty());
        check(&tables, worlds, adopting)
            .and_then(|()| late.iter().try_for_each(|reader| reader.check(&tables)))
            .map_err(|error| TestCaseError::fail(format!("after {write:?}: {error}")))?;
    }
    Ok(())
}

const PAUSES_MS: [u64; 4] = [0, REST_MS / 2, REST_MS, 3 * REST_MS];

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn every_prefix_is_safe(worlds in history(), pauses in prop::collection::vec(prop::sample::select(&PAUSES_MS[..]), 5)) {
        let mut engine = Engine::new(tables());
        engine.full(&worlds[0]);
        let mut late: Vec<LateReader> = Vec::new();
        for (pair, pause_ms) in worlds.windows(2).zip(&pauses) {
            engine.now_ms += pause_ms;
            let before = engine.dataplane.clone();
            late.retain(|reader| engine.now_ms - reader.read_ms < REST_MS);
            late.extend(late_readers(&before, engine.now_ms));
            let report = engine.follow(&pair[1]);
            prop_assert!(report.failed.is_empty());
            walk(&before, &engine.dataplane, &[&pair[0], &pair[1]], &late, false)?;
            check(&engine.dataplane, &[&pair[1]], false)?;
        }
    }

    /// A full resync of the same wishes finds nothing to do, and has the same result as following changes.
    #[test]
    fn incremental_equals_full(worlds in history()) {
        let mut incremental = Engine::new(tables());
        let mut full = Engine::new(tables());
        for world in &worlds {
            incremental.follow(world);
            full.full(world);
            prop_assert_eq!(incremental.dump(), full.dump());
            prop_assert_eq!(without_draining(full.dump()), without_draining(from_scratch(world)));
            prop_assert_eq!(incremental.full(world).writes, 0);
            prop_assert_eq!(full.full(world).writes, 0);
            prop_assert_eq!(full.follow(world).writes, 0);
        }
    }

    /// Failing writes leave safe prefixes too, and hurt nobody for ever.
    #[test]
    fn every_prefix_is_safe_with_faults(worlds in history(), seed in 1..u32::MAX, percent in 1..60u32) {
        let mut random = seed;
        let mut engine = Engine::new(crate::dataplane::faulty::Faulty {
            inner: tables(),
            fails: Box::new(move |_: &crate::dataplane::Write| xorshift(&mut random) % 100 < percent) as Box<dyn FnMut(&crate::dataplane::Write) -> bool>,
        });
        // Clean to begin with: no promise holds for what never was.
        let fails = std::mem::replace(&mut engine.dataplane.fails, Box::new(|_| false));
        engine.full(&worlds[0]);
        engine.dataplane.fails = fails;
        let mut since_clean = vec![&worlds[0]];
        for world in &worlds[1..] {
            engine.now_ms += REST_MS / 2;
            let before = engine.dataplane.inner.clone();
            since_clean.push(world);
            let report = engine.follow(world);
            walk(&before, &engine.dataplane.inner, &since_clean, &[], false)?;
            if report.failed.is_empty() {
                since_clean = vec![world];
            }
        }
        engine.dataplane.fails = Box::new(|_| false);
        let last = worlds.last().cloned().unwrap_or_default();
        for _ in 0..2 {
            engine.now_ms += REST_MS;
            let before = engine.dataplane.inner.clone();
            engine.follow(&last);
            walk(&before, &engine.dataplane.inner, &since_clean, &[], false)?;
        }
        prop_assert!(engine.failed.is_empty() && !engine.reconciler.needs_full_sync());
        prop_assert_eq!(without_draining(engine.dump()), without_draining(from_scratch(&last)));
        // Q5: a delete wins over what still wanted to be added, and nothing is kept for nobody.
        engine.follow(&World::default());
        engine.now_ms += REST_MS;
        engine.follow(&World::default());
        prop_assert_eq!(Dataplane::frontends(&engine.dataplane).unwrap(), vec![]);
        prop_assert_eq!(engine.dataplane.source_ranges().unwrap(), vec![]);
        prop_assert_eq!(engine.reconciler.in_use(), [0, 0, 0]);
    }

    /// Killed after any write: the next agent adopts what it finds, brings it to what is wanted, and no step of that is
    /// unsafe either.
    #[test]
    fn killed_at_any_point(worlds in history(), cut in any::<prop::sample::Index>()) {
        let mut engine = Engine::new(tables());
        let mut before = engine.dataplane.clone();
        for world in &worlds {
            before = engine.dataplane.clone();
            engine.follow(world);
        }
        let done = before.log.len();
        let steps = engine.dataplane.log.len() - done;
        for write in &engine.dataplane.log[done..done + cut.index(steps + 1)] {
            before.apply(&[*write]);
        }
        let found = before.clone();
        let mut next = Engine::new(before);
        let report = next.full(&worlds[worlds.len() - 1]);
        prop_assert!(report.failed.is_empty());
        let last: Vec<&World> = worlds.iter().rev().take(2).collect();
        walk(&found, &next.dataplane, &last, &[], true)?;
        prop_assert_eq!(without_draining(next.dump()), without_draining(from_scratch(last[0])));
    }
}

pub(super) fn xorshift(state: &mut u32) -> u32 {
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    *state
}
