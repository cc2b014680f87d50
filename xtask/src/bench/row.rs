//! A metric at a size: its arms, their ratios, and what is to be shown by them.

use serde::{Deserialize, Serialize};

use super::stats::Estimate;

/// The arm that all others are compared with comes first; this one is like it, and shows how far noise reaches.
pub(crate) const AGAIN: &str = "again";

/// One arm of a metric.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Arm {
    /// Which.
    pub(crate) name: String,
    /// In the metric's unit.
    pub(crate) value: Estimate,
    /// To the first arm.
    pub(crate) ratio: Option<Estimate>,
    /// Median of the rounds' 99th percentiles, where there are any.
    pub(crate) p99: Option<f64>,
    /// Each round's value.
    pub(crate) rounds: Vec<f64>,
}

/// What one arm shall cost at most, compared with another one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Goal {
    /// Which arm.
    pub(crate) arm: &'static str,
    /// Which it is compared with.
    pub(crate) to: &'static str,
    /// The largest ratio that the targets allow; without one it is only told.
    pub(crate) at_most: Option<f64>,
}

/// A goal, and what came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Comparison {
    /// Which arm.
    pub(crate) arm: String,
    /// Which it is compared with.
    pub(crate) to: String,
    /// The ratio.
    pub(crate) ratio: Estimate,
    /// What it may be.
    pub(crate) at_most: Option<f64>,
}

impl Comparison {
    /// By the interval's bound, not by its middle.
    pub(crate) fn verdict(&self) -> &'static str {
        match self.at_most {
            None => "",
            Some(target) if self.ratio.high <= target => "met",
            Some(target) if self.ratio.low > target => "missed",
            Some(_) => "open: the interval holds the target",
        }
    }
}

/// A metric at a size.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    /// As `performance.md` numbers it.
    pub(crate) id: String,
    /// For people.
    pub(crate) name: String,
    /// Of the values.
    pub(crate) unit: String,
    /// How many Services there are.
    pub(crate) services: u32,
    /// Half the width of the interval around one that two equal arms may have; without one there are no such arms.
    pub(crate) noise_max: Option<f64>,
    /// The first one is what the others are compared with.
    pub(crate) arms: Vec<Arm>,
    /// What is to be shown.
    pub(crate) comparisons: Vec<Comparison>,
}

impl Row {
    /// Without arms.
    pub(crate) fn new(id: &str, name: String, unit: &str, services: u32, noise_max: Option<f64>) -> Self {
        let (arms, comparisons) = (Vec::new(), Vec::new());
        Self { id: id.to_owned(), name, unit: unit.to_owned(), services, noise_max, arms, comparisons }
    }

    /// Adds an arm; `rounds` has a value for each round, in the same order as the first arm's.
    pub(crate) fn add(&mut self, name: &str, rounds: Vec<f64>, p99: Option<f64>) {
        // Counts may be zero, and small differences below: nothing is a multiple of that.
        let ratio = self.arms.first().map(|first| Estimate::of_ratios(&rounds, &first.rounds));
        let ratio = ratio.filter(Estimate::is_ratio);
        self.arms.push(Arm { name: name.to_owned(), value: Estimate::of(&rounds), ratio, p99, rounds });
    }

    /// Compares arms; those that are not there, or are zero or less, are left out.
    pub(crate) fn compare(&mut self, goals: &[Goal]) {
        for Goal { arm, to, at_most } in goals {
            if let (Some(one), Some(other)) = (self.arm(arm), self.arm(to)) {
                let ratio = Estimate::of_ratios(&one.rounds, &other.rounds);
                if !ratio.is_ratio() {
                    continue;
                }
                let comparison =
                    Comparison { arm: (*arm).to_owned(), to: (*to).to_owned(), ratio, at_most: *at_most };
                self.comparisons.push(comparison);
            }
        }
    }

    /// An arm.
    pub(crate) fn arm(&self, name: &str) -> Option<&Arm> {
        self.arms.iter().find(|arm| arm.name == name)
    }

    /// Whether two equal arms differed too much for the others to say anything.
    pub(crate) fn is_void(&self) -> bool {
        let Some(noise_max) = self.noise_max else { return false };
        let again = self.arm(AGAIN).and_then(|arm| arm.ratio);
        again.is_none_or(|ratio| is_too_far(ratio, noise_max))
    }
}

/// Whether two arms that should be equal are not.
pub(crate) fn differ(first: &[f64], again: &[f64], noise_max: f64) -> bool {
    is_too_far(Estimate::of_ratios(again, first), noise_max)
}

fn is_too_far(ratio: Estimate, noise_max: f64) -> bool {
    let far = (ratio.low - 1.0).abs().max((ratio.high - 1.0).abs());
    far.is_nan() || far > noise_max
}
