//! From samples to a ratio with its interval.

use serde::{Deserialize, Serialize};

/// Resamplings of an interval.
const RESAMPLES: usize = 2000;

/// A median with the bounds between which it lies with 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Estimate {
    /// The median.
    pub(crate) median: f64,
    /// The lower bound.
    pub(crate) low: f64,
    /// The upper bound.
    pub(crate) high: f64,
}

impl Estimate {
    /// Of one value a round, by the bootstrap: what the median would be if the rounds were drawn again.
    pub(crate) fn of(values: &[f64]) -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut medians: Vec<f64> = (0..RESAMPLES)
            .map(|_| {
                let mut drawn: Vec<f64> = (0..values.len())
                    .filter_map(|_| {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        let index = ((state >> 32) * values.len() as u64) >> 32;
                        values.get(usize::try_from(index).unwrap_or_default()).copied()
                    })
                    .collect();
                median(&mut drawn)
            })
            .collect();
        medians.sort_by(f64::total_cmp);
        let at = |part: f64| quantile(&medians, part);
        Self { median: median(&mut values.to_vec()), low: at(0.025), high: at(0.975) }
    }

    /// Of the ratios of two arms, taken by round.
    pub(crate) fn of_ratios(values: &[f64], to: &[f64]) -> Self {
        let ratios: Vec<_> = values.iter().zip(to).map(|(value, to)| value / to).collect();
        Self::of(&ratios)
    }
}

impl Estimate {
    /// Whether it says something as a ratio.
    pub(crate) fn is_ratio(&self) -> bool {
        [self.median, self.low, self.high].iter().all(|value| value.is_finite() && *value >= 0.0)
    }
}

/// The middle value.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle), values.get(middle.wrapping_sub(1))) {
        (Some(high), Some(low)) if values.len().is_multiple_of(2) => f64::midpoint(*low, *high),
        (Some(high), _) => *high,
        (None, _) => f64::NAN,
    }
}

/// The value below which a part of the sorted values lies.
pub(crate) fn quantile(sorted: &[f64], part: f64) -> f64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index between zero and the length"
    )]
    let index = (part.clamp(0.0, 1.0) * sorted.len() as f64) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

/// The slope of the straight line with the least squares through points.
pub(crate) fn slope(points: &[(f64, f64)]) -> f64 {
    let count = points.len() as f64;
    let mean = |part: fn(&(f64, f64)) -> f64| points.iter().map(part).sum::<f64>() / count;
    let (mean_x, mean_y) = (mean(|point| point.0), mean(|point| point.1));
    let products: f64 = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let squares: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    products / squares
}

/// Integers of a clock as numbers to reckon with, in order.
pub(crate) fn sorted(ns: &[u64]) -> Vec<f64> {
    ordered(&ns.iter().map(|ns| *ns as f64).collect::<Vec<_>>())
}

/// Numbers in order.
pub(crate) fn ordered(values: &[f64]) -> Vec<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_none() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&mut []).is_nan());
    }

    #[test]
    fn an_interval_holds_its_median_and_shrinks_with_agreement() {
        let wide = Estimate::of(&[0.5, 0.8, 1.0, 1.2, 1.5]);
        let narrow = Estimate::of(&[0.99, 1.0, 1.0, 1.0, 1.01]);
        assert!(wide.low <= wide.median && wide.median <= wide.high);
        assert!(narrow.high - narrow.low < wide.high - wide.low);
    }

    #[test]
    fn a_ratio_to_nothing_says_nothing() {
        assert!(Estimate::of_ratios(&[0.0], &[2.0]).is_ratio());
        assert!(!Estimate::of_ratios(&[0.0], &[0.0]).is_ratio());
        assert!(!Estimate::of_ratios(&[1.0], &[-2.0]).is_ratio());
        assert!(!Estimate::of_ratios(&[2.0, 2.0, 2.0], &[0.0, 1.0, 1.0]).is_ratio());
    }

    #[test]
    fn quantiles_stay_inside() {
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0], 0.5), 3.0);
        assert_eq!(quantile(&[1.0, 2.0], 1.0), 2.0);
    }

    #[test]
    fn a_line_has_its_slope() {
        assert!((slope(&[(1.0, 12.0), (2.0, 14.0), (4.0, 18.0)]) - 2.0).abs() < 1e-9);
    }
}
