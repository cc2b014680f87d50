//! What was found: on the terminal at once, and in `target/bench/` as raw values, a page and plots.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{
    Effort, baseline,
    control::p50_p99,
    data::{DIRECT, IPTABLES, NFTABLES, SHEAVE},
    machine, plot,
    row::{Comparison, Row},
    stats::{Estimate, slope},
    targets::{self, Limit},
    versions,
};
use crate::shell::root;

/// A figure of the control plane.
#[derive(Debug, Serialize, Deserialize)]
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

    /// What it shall be, and whether it is.
    fn targets(&self) -> impl Iterator<Item = (&'static Limit, bool)> {
        let (p50, p99) = p50_p99(&self.raw);
        targets::of(&self.id, &self.name, self.services, p50, p99)
    }
}

/// All of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    machine: String,
    versions: Vec<String>,
    rounds: u32,
    slice_ms: u64,
    rows: Vec<Row>,
    facts: Vec<Fact>,
    /// Nanoseconds for each Service more, by metric and arm.
    growth: Vec<(String, f64)>,
    #[serde(skip)]
    directory: PathBuf,
    #[serde(skip, default = "Instant::now")]
    started: Instant,
}

impl Report {
    /// An empty one; or one with what earlier runs found, of which this run's own takes the place.
    pub(crate) fn new(effort: &Effort, add: bool) -> Result<Self> {
        let directory = root()?.join("target/bench");
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let mut report = Self {
            machine: machine(),
            versions: versions()?,
            rounds: effort.rounds,
            slice_ms: u64::try_from(effort.slice.as_millis())?,
            rows: Vec::new(),
            facts: Vec::new(),
            growth: Vec::new(),
            directory,
            started: Instant::now(),
        };
        if add {
            let path = report.directory.join("results.json");
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let Self { rows, facts, .. } = serde_json::from_str(&text)
                .with_context(|| format!("{} is not of this version", path.display()))?;
            (report.rows, report.facts) = (rows, facts);
        }
        Ok(report)
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
        self.rows.retain(|old| (&old.id, &old.name, old.services) != (&row.id, &row.name, row.services));
        self.rows.push(row);
    }

    /// Adds a figure and shows it.
    pub(crate) fn fact(&mut self, fact: Fact) {
        let Fact { id, name, services, text, .. } = &fact;
        println!("{:>5} s  {id}  {name}, {services} Services: {text}", self.started.elapsed().as_secs());
        self.facts.retain(|old| (&old.id, &old.name, old.services) != (&fact.id, &fact.name, fact.services));
        self.facts.push(fact);
    }

    /// P7: how cost grows with the number of Services.
    pub(crate) fn growth(&mut self) {
        self.growth.clear();
        // Of the data path: rows of the control plane have units of their own.
        let rows = self.rows.iter().filter(|row| row.id.starts_with('p'));
        let mut names: Vec<_> = rows.map(|row| row.name.clone()).collect();
        names.sort();
        names.dedup();
        for name in names {
            for arm in [DIRECT, SHEAVE, NFTABLES, IPTABLES] {
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
        fs::write(self.directory.join("report.md"), self.page("")).context("writing report.md")?;
        self.draw(&self.directory).map(drop)
    }

    /// Draws the plots, for browsers and for everybody else; returns where they are.
    fn draw(&self, directory: &Path) -> Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for (name, plot) in plot::all(&self.rows) {
            let [svg, png] = ["svg", "png"].map(|kind| directory.join(name).with_extension(kind));
            fs::write(&svg, plot).with_context(|| format!("writing {}", svg.display()))?;
            let draw =
                Command::new("rsvg-convert").arg("--zoom=2").arg("--output").arg(&png).arg(&svg).status();
            let drawn = draw.context(
                "cannot run `rsvg-convert` (Debian package librsvg2-bin): `cargo xtask setup` installs it",
            )?;
            ensure!(drawn.success(), "`rsvg-convert` failed ({drawn}) on {}", svg.display());
            paths.extend([svg, png]);
        }
        Ok(paths)
    }

    /// Says what has got worse since a baseline; that is an error.
    pub(crate) fn check(&self, baseline: &Path) -> Result<()> {
        baseline::check(baseline, &self.rows)
    }

    /// Writes what is kept with the source: the page, its plot, and what later runs are compared with.
    pub(crate) fn publish(&self) -> Result<()> {
        let root = root()?;
        let directory = root.join("xtask/benchmarks");
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let baseline =
            serde_json::to_vec_pretty(&baseline::of(&self.rows)).context("encoding the baseline")?;
        let mut written = self.draw(&directory)?;
        for (path, bytes) in [
            (directory.join("baseline.json"), baseline),
            (root.join("BENCHMARKS.md"), self.page("xtask/benchmarks/").into_bytes()),
        ] {
            fs::write(&path, bytes).with_context(|| format!("writing {}", path.display()))?;
            written.push(path);
        }
        written.iter().for_each(|path| println!("── wrote {}", path.display()));
        Ok(())
    }

    /// The page; `plots` comes before the names of plots.
    fn page(&self, plots: &str) -> String {
        let images: Vec<_> = plot::all(&self.rows)
            .into_iter()
            .map(|(name, _)| format!("![{name}]({plots}{name}.svg)"))
            .collect();
        let mut page = format!(
            "# Sheave beside kube-proxy, and beside the way without a Service\n\n\
             Written by `cargo xtask bench`. {}. {}. {} rounds that count, slices of {} ms.\n\n{METHOD}\n\
             {}\n\n## What is worse than it should be\n\n{}\n## What was compared\n\n",
            self.machine,
            self.versions.join(", "),
            self.rounds,
            self.slice_ms,
            images.join("\n"),
            self.worse()
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
        let _ = writeln!(
            page,
            "\n## All arms\n\n| metric | Services | arm | value | p99 | ratio to the first (95 %) | target |"
        );
        let _ = writeln!(page, "|---|---|---|---|---|---|---|");
        for row in &self.rows {
            for arm in &row.arms {
                let p99 = arm.p99.map_or_else(String::new, |ns| format!("{ns:.0}"));
                let target =
                    if arm.name == SHEAVE { targets::verdicts(targets_of(row)) } else { String::new() };
                let _ = writeln!(
                    page,
                    "| {} {} | {} | {} | {:.1} {} | {p99} | {} | {target} |",
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
        let _ =
            writeln!(page, "\n## Sheave alone\n\n| figure | Services | value | target |\n|---|---|---|---|");
        for fact in &self.facts {
            let Fact { id, name, services, text, .. } = fact;
            let targets = targets::verdicts(fact.targets());
            let _ = writeln!(page, "| {id} {name} | {services} | {text} | {targets} |");
        }
        if !self.growth.is_empty() {
            let _ = writeln!(page, "\n## Growth\n\n| p7 growth | ns a Service |\n|---|---|");
            for (name, slope) in &self.growth {
                let _ = writeln!(page, "| {name} | {slope:.5} |");
            }
        }
        page
    }

    /// What is missed or dearer than a peer, with the reasons that are known.
    fn worse(&self) -> String {
        let mut found = Vec::new();
        for row in self.rows.iter().filter(|row| !row.is_void()) {
            let mut add = |what: String| found.push((&row.id, &row.name, row.services, what));
            let is_bad = |found: &&Comparison| {
                found.verdict() == "missed" || found.to.starts_with("kube-proxy") && found.ratio.low > 1.0
            };
            for Comparison { arm, to, ratio, at_most } in row.comparisons.iter().filter(is_bad) {
                let target = at_most.map_or_else(String::new, |most| format!(", target {most:.3}"));
                add(format!("{arm} costs {:.3} of {to}{target}", ratio.median));
            }
            for (limit, _) in targets_of(row).filter(|(_, met)| !met) {
                let value = row.arm(SHEAVE).map_or(0.0, |arm| arm.value.median);
                add(format!("{value:.1} {}, target {}", row.unit, limit.text));
            }
        }
        for fact in &self.facts {
            for (limit, _) in fact.targets().filter(|(_, met)| !met) {
                let what = format!("{}, target {}", fact.text, limit.text);
                found.push((&fact.id, &fact.name, fact.services, what));
            }
        }
        if found.is_empty() {
            return "Nothing.\n".to_owned();
        }
        let mut text = String::new();
        // Writing to a string cannot fail.
        for (id, name, services, what) in &found {
            let _ = writeln!(text, "- {id} {name}, {services} Services: {what}");
        }
        let known = targets::REASONS.iter().filter(|(id, _)| found.iter().any(|(of, ..)| of == id));
        for (number, (id, reason)) in known.enumerate() {
            let _ = writeln!(text, "{}- {id}: {reason}", if number == 0 { "\nWhy:\n\n" } else { "" });
        }
        text
    }
}

/// The limits of what Sheave costs in a row.
fn targets_of(row: &Row) -> impl Iterator<Item = (&'static Limit, bool)> {
    let arm = row.arm(SHEAVE);
    arm.into_iter().flat_map(|arm| {
        let p50 = arm.value.median;
        targets::of(&row.id, &row.name, row.services, p50, arm.p99.unwrap_or(p50))
    })
}

const METHOD: &str = "\
- Arms alternate in short slices, in reversed order each round; the first round is dropped. A round's value is the median of
  its samples (UDP sockets without packets: the lowest tenth; p8 and p11: the lowest fifth of runs); ratios are taken by round,
  and tables have their median with a bootstrap interval. All arms of a metric at a size are of one run; metrics and sizes may
  be of several (`--add`).
- Each arm has a world of its own, namespaces and processes built alike; kube-proxies have their objects from one API server,
  Sheave the same objects from files. One client measures every arm. Destinations are drawn at random from all Services
  (direct: from all endpoints). Who serves is frozen meanwhile; connection tracking forgets before each slice. iptables is the
  older kind.
- `again` is the first arm once more in another world: while its interval leaves 0.98..1.02 (p8, p11: 0.99..1.01) there are
  more rounds, up to three times as many, and where it still does the metric is void. `bystander` dials endpoints from inside
  the agent's cgroup. `empty programs` is a world without a proxy where programs that do nothing are at a cgroup's `connect`
  and at both hooks of each device: nobody who has such hooks can be cheaper. `two reads` is the same, but at `connect` a line
  of a table with one for each Service is read, at random, and one of another such table that the first one tells: about the
  least for who looks up a Service and one of its endpoints.
- Connects and CRR: client on CPU 1, server on CPU 0, a SCHED_IDLE spinner on each; RR, stream and datagrams: both on CPU 0.
- p6 is what passes between SYN and SYN-ACK by the kernel's clock at the client's device, without `connect` itself. p10 dials
  from outside the cluster: by NodePort, and for `direct` by a route to the endpoints through the node; servers say which
  source they see.
- p8: packets are made by the kernel at the node's uplink (XDP live frames) and counted and dropped at the backend's device,
  all on one CPU; `tracked` has a firewall rule that follows connections. p11: one frame, again and again, through one program
  (PROG_TEST_RUN).
- Control planes (a1..a9) are measured one at a time, the others stopped, by one API server; `no pause` writes at once instead
  of once a second. a4 is the process without kube-proxy's short-lived commands (`nft`, `iptables-restore`). a5 is what stays
  when the process, synced, is killed: growth of Slab + VmallocUsed + Percpu of the machine (`nobody`: its noise), and what the
  process's memory cgroup is charged, which lacks a little. a6, a9: twelve threads connect and ask meanwhile. a7: new UDP
  sockets; some get the port of an earlier look, and its tracked connection leads to the removed endpoint until kube-proxy
  deletes it.
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
