//! What was found: on the terminal at once, and in `target/bench/` as raw values, a page and plots.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};
use serde::Serialize;

use super::{
    Effort,
    control::p50_p99,
    machine, plot,
    row::{Comparison, Row},
    stats::{Estimate, slope},
};
use crate::shell::root;

/// A figure of the control plane.
#[derive(Debug, Serialize)]
pub(crate) struct Fact {
    id: String,
    name: String,
    services: u32,
    text: String,
    raw: Vec<u64>,
}

impl Fact {
    /// Durations.
    pub(crate) fn times(id: &str, name: &str, services: u32, ns: Vec<u64>) -> Self {
        let (p50_ns, p99_ns) = p50_p99(&ns);
        let text = if ns.len() < 50 {
            format!("p50 {:.1} ms of {}", p50_ns / 1e6, ns.len())
        } else {
            format!("p50 {:.0} us, p99 {:.0} us of {}", p50_ns / 1e3, p99_ns / 1e3, ns.len())
        };
        Self { id: id.to_owned(), name: name.to_owned(), services, text, raw: ns }
    }

    /// A number of something.
    pub(crate) fn count(id: &str, name: &str, services: u32, count: u64) -> Self {
        Self { id: id.to_owned(), name: name.to_owned(), services, text: count.to_string(), raw: vec![count] }
    }

    /// Memory.
    pub(crate) fn bytes(id: &str, name: &str, services: u32, bytes: u64) -> Self {
        let text = format!("{:.1} MB", bytes as f64 / 1e6);
        Self { id: id.to_owned(), name: name.to_owned(), services, text, raw: vec![bytes] }
    }
}

/// All of it.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: String,
    rounds: u32,
    slice_ms: u128,
    rows: Vec<Row>,
    facts: Vec<Fact>,
    /// Nanoseconds for each Service more, by metric and arm.
    growth: Vec<(String, f64)>,
    #[serde(skip)]
    directory: PathBuf,
    #[serde(skip)]
    started: Instant,
}

impl Report {
    /// An empty one.
    pub(crate) fn new(effort: &Effort) -> Result<Self> {
        let directory = root()?.join("target/bench");
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        Ok(Self {
            machine: machine(),
            rounds: effort.rounds,
            slice_ms: effort.slice.as_millis(),
            rows: Vec::new(),
            facts: Vec::new(),
            growth: Vec::new(),
            directory,
            started: Instant::now(),
        })
    }

    /// Where it is written.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Adds a metric and shows it.
    pub(crate) fn add(&mut self, row: Row) {
        for line in lines(&row) {
            println!("{:>5} s  {line}", self.started.elapsed().as_secs());
        }
        self.rows.push(row);
    }

    /// Adds a figure and shows it.
    pub(crate) fn fact(&mut self, fact: Fact) {
        let Fact { id, name, services, text, .. } = &fact;
        println!("{:>5} s  {id}  {name}, {services} Services: {text}", self.started.elapsed().as_secs());
        self.facts.push(fact);
    }

    /// P7: how cost grows with the number of Services.
    pub(crate) fn growth(&mut self) {
        let mut names: Vec<_> = self.rows.iter().map(|row| row.name.clone()).collect();
        names.sort();
        names.dedup();
        for name in names {
            for arm in ["direct", "sheave", "kube-proxy nftables", "kube-proxy iptables"] {
                let points: Vec<_> = self
                    .rows
                    .iter()
                    .filter(|row| row.name == name)
                    .filter_map(|row| {
                        let arm = row.arms.iter().find(|found| found.name == arm)?;
                        Some((f64::from(row.services), arm.value.median))
                    })
                    .collect();
                if points.len() > 1 {
                    self.growth.push((format!("{name}, {arm}"), slope(&points)));
                }
            }
        }
    }

    /// Writes the raw values and the page.
    pub(crate) fn write(&self) -> Result<()> {
        let raw = serde_json::to_vec_pretty(self).context("encoding the results")?;
        fs::write(self.directory.join("results.json"), raw).context("writing results.json")?;
        fs::write(self.directory.join("ratios.svg"), plot::ratios(&self.rows))
            .context("writing ratios.svg")?;
        fs::write(self.directory.join("report.md"), self.page()).context("writing report.md")
    }

    fn page(&self) -> String {
        let mut page = format!(
            "# Sheave beside the way without a Service\n\n{}. {} rounds that count, slices of {} ms.\n\n{METHOD}\n",
            self.machine, self.rounds, self.slice_ms
        );
        // Writing to a string cannot fail.
        let _ =
            writeln!(page, "| metric | Services | arm | compared with | ratio (95 %) | target | verdict |");
        let _ = writeln!(page, "|---|---|---|---|---|---|---|");
        for row in &self.rows {
            for found in &row.comparisons {
                let target = found.at_most.map_or_else(String::new, |ratio| format!("{ratio:.3}"));
                let _ = writeln!(
                    page,
                    "| {} {} | {} | {} | {} | {} | {target} | {} |",
                    row.id,
                    row.name,
                    row.services,
                    found.arm,
                    found.to,
                    shown(Some(found.ratio)),
                    verdict(row, found)
                );
            }
        }
        let _ = writeln!(page, "\n| metric | Services | arm | value | p99 | ratio to the first (95 %) |");
        let _ = writeln!(page, "|---|---|---|---|---|---|");
        for row in &self.rows {
            for arm in &row.arms {
                let p99 = arm.p99.map_or_else(String::new, |ns| format!("{ns:.0}"));
                let _ = writeln!(
                    page,
                    "| {} {} | {} | {} | {:.1} {} | {p99} | {} |",
                    row.id,
                    row.name,
                    row.services,
                    arm.name,
                    arm.value.median,
                    row.unit,
                    shown(arm.ratio)
                );
            }
        }
        let _ = writeln!(page, "\n| figure | Services | value |\n|---|---|---|");
        for Fact { id, name, services, text, .. } in &self.facts {
            let _ = writeln!(page, "| {id} {name} | {services} | {text} |");
        }
        if !self.growth.is_empty() {
            let _ = writeln!(page, "\n| p7 growth | ns a Service |\n|---|---|");
            for (name, slope) in &self.growth {
                let _ = writeln!(page, "| {name} | {slope:.5} |");
            }
        }
        page
    }
}

const METHOD: &str = "\
Arms alternate in short slices, in reversed order each round; the first round is dropped. One process measures every arm:
it is moved between cgroups, so that only what is attached differs. Destinations are drawn at random from all Services
(direct: from all endpoints). A round's value is the median of its samples (UDP sockets without packets: the lowest
tenth); ratios are taken by round, and the table has their median with a bootstrap interval. `direct again` is the direct
arm once more: where its interval leaves 0.98..1.02 the metric is void. `bystander` dials endpoints from inside the
agent's cgroup, at a server that is inside, too. Connects and CRR: client on CPU 1, server on CPU 0, a SCHED_IDLE spinner on
each; RR, stream and datagrams: both on CPU 0. The agent is stopped meanwhile. Every slice first checks by source addresses
that its destinations lead to backends. Source of the control plane's changes: a directory of JSON manifests.
Not here yet: kube-proxy as an arm, NodePort and packet path, churn, loss of the API server.
";

fn shown(ratio: Option<Estimate>) -> String {
    ratio.map_or_else(String::new, |ratio| {
        format!("{:.4} ({:.4}..{:.4})", ratio.median, ratio.low, ratio.high)
    })
}

fn verdict(row: &Row, found: &Comparison) -> &'static str {
    if row.is_void() { "void: too noisy" } else { found.verdict() }
}

fn lines(row: &Row) -> Vec<String> {
    let arms = row.arms.iter().map(|arm| {
        let metric = format!("{} {}", row.id, row.name);
        let (value, unit, ratio) = (arm.value.median, &row.unit, shown(arm.ratio));
        format!("{metric:<40}{:>6} {:<20}{value:>10.1} {unit:<10}{ratio}", row.services, arm.name)
    });
    let comparisons = row.comparisons.iter().map(|found| {
        let (ratio, verdict) = (shown(Some(found.ratio)), verdict(row, found));
        format!("{:>47} {:<20}to {:<20}{ratio} {verdict}", "", found.arm, found.to)
    });
    arms.chain(comparisons).collect()
}
