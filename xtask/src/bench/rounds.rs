//! Arms in turns.

use anyhow::Result;

use super::{Effort, go_on, row, row::AGAIN};

/// Beyond the usual rounds, so many are measured before the twins are looked at again.
const AT_A_TIME: u32 = 10;

/// What each arm's turns say, in the order of `arms` and of rounds; `turn` measures the arm of an index in a round.
///
/// Arms alternate, in reversed order every second round, and the first round is dropped: it fills caches and neighbour
/// tables. While the two arms that are alike differ by more than `noise_max`, there are more rounds than usual, as far as
/// the effort goes. What the other arms say plays no part in that.
pub(crate) fn measure<T>(
    effort: &Effort,
    arms: &[&str],
    noise_max: f64,
    value: impl Fn(&T) -> f64,
    mut turn: impl FnMut(usize, u32) -> Result<T>,
) -> Result<Vec<Vec<T>>> {
    let mut found: Vec<Vec<T>> = arms.iter().map(|_| Vec::new()).collect();
    let again = arms.iter().position(|arm| *arm == AGAIN).unwrap_or_default();
    for round in 0..=effort.rounds_max {
        let beyond = round.saturating_sub(effort.rounds);
        if beyond % AT_A_TIME == 1 {
            let values = |arm: usize| found.get(arm).into_iter().flatten().map(&value).collect::<Vec<_>>();
            if !row::differ(&values(0), &values(again), noise_max) {
                break;
            }
        }
        let mut order: Vec<_> = found.iter_mut().enumerate().collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for (arm, found) in order {
            go_on()?;
            let said = turn(arm, round)?;
            if round > 0 {
                found.push(said);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn smallest() -> Effort {
        Effort {
            sizes: Vec::new(),
            endpoints: 0,
            rounds: 0,
            rounds_max: 0,
            slice: Duration::ZERO,
            flips: 0,
            api_flips: 0,
            starts: 0,
            down: Duration::ZERO,
            outage: Duration::ZERO,
        }
    }

    /// How many rounds count when the second of two twins says so much in a round.
    fn rounds(again: impl Fn(u32) -> f64) -> usize {
        let effort = Effort { rounds: 20, rounds_max: 60, ..smallest() };
        let turn = |arm, round| Ok(if arm == 2 { again(round) } else { 1.0 });
        let found = measure(&effort, &["first", "other", AGAIN], 0.02, |value| *value, turn).unwrap();
        assert!(found.iter().all(|turns| turns.len() == found[0].len()));
        found[0].len()
    }

    #[test]
    fn twins_that_differ_have_more_rounds() {
        assert_eq!(rounds(|_| 1.0), 20);
        assert_eq!(rounds(|_| 1.1), 60);
        // They agree from the 11th on: until enough rounds say so.
        assert_eq!(rounds(|round| if round <= 10 { 1.1 } else { 1.0 }), 40);
    }

    #[test]
    fn every_second_round_is_reversed() {
        let mut order = Vec::new();
        let effort = Effort { rounds: 1, rounds_max: 1, ..smallest() };
        let turn = |arm, round| {
            order.push((round, arm));
            Ok(1.0)
        };
        measure(&effort, &["first", AGAIN], 0.02, |value| *value, turn).unwrap();
        assert_eq!(order, [(0, 0), (0, 1), (1, 1), (1, 0)]);
    }
}
