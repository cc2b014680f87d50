//! What is compared with what an earlier run found: ratios only, as machines differ.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{
    NOISE_MAX,
    row::{Comparison, Row},
};

/// One comparison of one metric at one size.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Entry {
    metric: String,
    services: u32,
    #[serde(flatten)]
    found: Comparison,
}

/// All that a run has to show; what is void shows nothing.
pub(crate) fn of(rows: &[Row]) -> Vec<Entry> {
    let of_row = |row: &Row| {
        let entry = |found: &Comparison| Entry {
            metric: format!("{} {}", row.id, row.name),
            services: row.services,
            found: found.clone(),
        };
        row.comparisons.iter().map(entry).collect::<Vec<_>>()
    };
    rows.iter().filter(|row| !row.is_void()).flat_map(of_row).collect()
}

/// Says what has got worse since; that is an error.
pub(crate) fn check(path: &Path, rows: &[Row]) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let then: Vec<Entry> =
        serde_json::from_str(&text).with_context(|| format!("{} is no baseline", path.display()))?;
    let now = of(rows);
    let pairs: Vec<_> =
        now.iter().filter_map(|now| Some((then.iter().find(|then| then.is_of(now))?, now))).collect();
    ensure!(!pairs.is_empty(), "nothing of this run is in {}", path.display());
    let lines: Vec<_> = pairs.iter().filter(|(then, now)| now.is_worse_than(then)).map(told).collect();
    println!("{} comparisons with {}: {} got worse", pairs.len(), path.display(), lines.len());
    if !lines.is_empty() {
        bail!("worse than {}:\n{}", path.display(), lines.join("\n"));
    }
    Ok(())
}

fn told((then, now): &(&Entry, &Entry)) -> String {
    let (was, is) = (then.found.ratio, now.found.ratio);
    format!(
        "{}, {} Services, {} to {}: {:.4} ({:.4}..{:.4}), was {:.4} ({:.4}..{:.4})",
        now.metric,
        now.services,
        now.found.arm,
        now.found.to,
        is.median,
        is.low,
        is.high,
        was.median,
        was.low,
        was.high
    )
}

impl Entry {
    fn is_of(&self, other: &Self) -> bool {
        let key = |entry: &Self| {
            (entry.metric.clone(), entry.services, entry.found.arm.clone(), entry.found.to.clone())
        };
        key(self) == key(other)
    }

    /// Beyond both intervals, and beyond what two equal arms may differ by.
    fn is_worse_than(&self, then: &Self) -> bool {
        self.found.ratio.low > then.found.ratio.high * (1.0 + NOISE_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::stats::Estimate, *};

    fn row(rounds: [f64; 3]) -> Row {
        let mut row = Row::new("p0", "a metric".to_owned(), "ns", 1, None);
        row.add("direct", vec![100.0; 3], None);
        row.add("sheave", rounds.to_vec(), None);
        row.compare(&[super::super::row::Goal { arm: "sheave", to: "direct", at_most: None }]);
        row
    }

    fn checked(then: [f64; 3], now: [f64; 3]) -> Result<()> {
        let path = std::env::temp_dir().join(format!("sheave-baseline-{}-{:?}", std::process::id(), now));
        fs::write(&path, serde_json::to_string(&of(&[row(then)])).unwrap()).unwrap();
        let result = check(&path, &[row(now)]);
        fs::remove_file(&path).unwrap();
        result
    }

    #[test]
    fn only_what_is_beyond_both_intervals_is_worse() {
        checked([101.0, 102.0, 103.0], [101.0, 102.0, 103.0]).unwrap();
        checked([101.0, 102.0, 103.0], [103.0, 104.0, 106.0]).unwrap();
        checked([101.0, 102.0, 103.0], [90.0, 91.0, 92.0]).unwrap();
        let error = checked([101.0, 102.0, 103.0], [107.0, 108.0, 109.0]).unwrap_err().to_string();
        assert!(error.contains("p0 a metric, 1 Services, sheave to direct: 1.0800"), "{error}");
    }

    #[test]
    fn what_is_void_is_not_compared() {
        let mut void = row([150.0; 3]);
        void.noise_max = Some(0.02);
        assert!(of(&[void]).is_empty());
        assert_eq!(of(&[row([150.0; 3])])[0].found.ratio, Estimate { median: 1.5, low: 1.5, high: 1.5 });
    }
}
