//! Plots, written by hand: a dot and a whisker for each arm is all they need.

use std::fmt::Write as _;

use super::{
    data::{DIRECT, IPTABLES, NFTABLES, SHEAVE},
    packets, paths,
    row::{Arm, Row},
    stats::Estimate,
};

/// Of the plots of ratios: what is left of the axis, and the axis.
const LEFT: f64 = 390.0;
const WIDTH: f64 = 560.0;

/// Between arms, and between metrics besides.
const STEP: f64 = 6.0;
const GAP: f64 = 9.0;

/// Where axes of ratios may have numbers: many where they are short, few where they are long.
const MARKS: [&[f64]; 2] = [
    &[0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0],
    &[0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 40.0],
];

/// Of the plots of growth: a panel, what it has in it, and how many are side by side.
const PANEL: (f64, f64) = (400.0, 205.0);
const INSIDE: (f64, f64) = (310.0, 130.0);
const PANELS: usize = 3;

/// All plots that have something to show, by name, as SVG. What is void is not shown, nor is what has no second arm like
/// the first, nor programs by themselves.
pub(crate) fn all(rows: &[Row]) -> Vec<(&'static str, String)> {
    let is_shown = |row: &&Row| row.noise_max.is_some() && row.id != paths::ID && !row.is_void();
    let mut rows: Vec<_> = rows.iter().filter(is_shown).collect();
    // p10 comes behind p9.
    rows.sort_by_key(|row| (row.id.len(), row.id.clone(), row.name.clone(), row.services));
    let (packets, sockets): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row.id == packets::ID);
    let plots = [
        ("ratios", ratios("connections: cost as a ratio to the direct way", &sockets)),
        ("packets", ratios("packets by NodePort: cost as a ratio to plain forwarding", &packets)),
        ("growth", growth(&rows)),
    ];
    plots.into_iter().filter_map(|(name, plot)| Some((name, plot?))).collect()
}

fn colour(arm: &str) -> &'static str {
    match arm {
        SHEAVE => "#0b6e4f",
        "sheave, tracked" => "#7cc4a4",
        packets::FAST => "#1f5fb4",
        "fast path, tracked" => "#8fb8e8",
        "bystander" => "#8e44ad",
        NFTABLES => "#e08e1b",
        IPTABLES => "#c0392b",
        "bare redirect" => "#222222",
        "forward, tracked" => "#777777",
        _ => "#b5b5b5",
    }
}

/// The ratios of all arms with their intervals: a block of whiskers for each metric and size.
fn ratios(title: &str, rows: &[&Row]) -> Option<String> {
    let arms = |row: &Row| -> Vec<(String, Estimate)> {
        row.arms.iter().filter_map(|arm| Some((arm.name.clone(), arm.ratio?))).collect()
    };
    let all: Vec<_> = rows.iter().flat_map(|row| arms(row)).collect();
    let low = all.iter().map(|arm| arm.1.low).fold(0.9, f64::min) * 0.98;
    let high = all.iter().map(|arm| arm.1.high).fold(1.1, f64::max) * 1.02;
    let mut names: Vec<_> = all.into_iter().map(|arm| arm.0).collect();
    let mut seen = std::collections::BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    // Equal steps for equal factors.
    let x = |ratio: f64| LEFT + (ratio / low).ln() / (high / low).ln() * WIDTH;
    let mut body = String::new();
    let legend = legend(&mut body, &names, LEFT + WIDTH + 60.0);
    let mut y = legend + 28.0;
    for row in rows {
        let arms = arms(row);
        let middle = y + (arms.len() as f64 - 1.0) * STEP / 2.0 + 4.0;
        text(&mut body, 4.0, middle, "start", &format!("{} {}, {}", row.id, row.name, row.services));
        for (name, ratio) in arms {
            let colour = colour(&name);
            line(&mut body, (x(ratio.low), y), (x(ratio.high), y), colour);
            dot(&mut body, (x(ratio.median), y), colour);
            if name == SHEAVE {
                text(&mut body, LEFT + WIDTH + 8.0, y + 4.0, "start", &format!("{:.3}", ratio.median));
            }
            y += STEP;
        }
        y += GAP;
        line(&mut body, (0.0, y - 7.0), (LEFT + WIDTH + 60.0, y - 7.0), "#eeeeee");
    }
    let mut axis = String::new();
    let marks = MARKS[usize::from(high / low > 3.0)];
    for mark in marks.iter().filter(|mark| (low..=high).contains(*mark)) {
        let colour = if (mark - 1.0).abs() < f64::EPSILON { "#cc3333" } else { "#dddddd" };
        line(&mut axis, (x(*mark), legend + 18.0), (x(*mark), y), colour);
        text(&mut axis, x(*mark), legend + 14.0, "middle", &mark.to_string());
    }
    let title = format!("{title}, 95 % intervals (metric, Services); numbers: {SHEAVE}");
    (!rows.is_empty()).then(|| page((LEFT + WIDTH + 60.0, y), &title, &(axis + &body)))
}

/// What each metric costs by the number of Services: a panel for each that was measured at several.
fn growth(rows: &[&Row]) -> Option<String> {
    let mut names: Vec<_> = rows.iter().map(|row| (row.id.as_str(), row.name.as_str())).collect();
    names.dedup();
    let arms = ["forward", DIRECT, SHEAVE, NFTABLES, IPTABLES];
    let mut body = String::new();
    let legend = legend(&mut body, &arms.map(ToOwned::to_owned), PANEL.0 * PANELS as f64);
    let mut panels = 0;
    for (id, name) in names {
        let rows: Vec<_> =
            rows.iter().filter(|row| (row.id.as_str(), row.name.as_str()) == (id, name)).collect();
        let (Some(first), Some(last)) = (rows.first(), rows.last()) else { continue };
        if first.services == last.services {
            continue;
        }
        let (left, top) =
            ((panels % PANELS) as f64 * PANEL.0 + 60.0, legend + (panels / PANELS) as f64 * PANEL.1 + 32.0);
        panels += 1;
        let all = || rows.iter().flat_map(|row| arms.iter().filter_map(|name| row.arm(name)));
        let high = all().map(|arm: &Arm| arm.value.high).fold(0.0, f64::max) * 1.05;
        let log = |services: u32| f64::from(services).ln();
        let x = |services| {
            left + 8.0
                + (log(services) - log(first.services)) / (log(last.services) - log(first.services))
                    * (INSIDE.0 - 16.0)
        };
        let y = |value: f64| top + INSIDE.1 * (1.0 - value / high);
        text(&mut body, left, top - 6.0, "start", &format!("{id} {name}, {}", first.unit));
        for part in [0.0, 0.25, 0.5, 0.75, 1.0] {
            line(&mut body, (left, y(high * part)), (left + INSIDE.0, y(high * part)), "#dddddd");
            text(&mut body, left - 4.0, y(high * part) + 4.0, "end", &format!("{:.0}", high * part));
        }
        for row in &rows {
            text(&mut body, x(row.services), top + INSIDE.1 + 14.0, "middle", &short(row.services));
        }
        for name in arms {
            let mut before = None;
            for row in &rows {
                let Some(Arm { value, .. }) = row.arm(name) else { continue };
                let (x, colour) = (x(row.services), colour(name));
                line(&mut body, (x, y(value.low)), (x, y(value.high)), colour);
                dot(&mut body, (x, y(value.median)), colour);
                let point = (x, y(value.median));
                line(&mut body, before.unwrap_or(point), point, colour);
                before = Some(point);
            }
        }
    }
    let size = (PANEL.0 * PANELS as f64, legend + panels.div_ceil(PANELS) as f64 * PANEL.1 + 20.0);
    let title = "p7, growth: cost by the number of Services, 95 % intervals";
    (panels > 0).then(|| page(size, title, &body))
}

/// A number of Services in little room.
fn short(services: u32) -> String {
    if services.is_multiple_of(1000) { format!("{}k", services / 1000) } else { services.to_string() }
}

/// Which colour is which arm; returns where that ends.
fn legend(svg: &mut String, names: &[String], width: f64) -> f64 {
    let (mut x, mut y) = (10.0, 34.0);
    for name in names {
        let length = 30.0 + name.len() as f64 * 6.5;
        if x + length > width {
            (x, y) = (10.0, y + 16.0);
        }
        dot(svg, (x, y), colour(name));
        text(svg, x + 8.0, y + 4.0, "start", name);
        x += length;
    }
    y
}

fn line(svg: &mut String, (x1, y1): (f64, f64), (x2, y2): (f64, f64), colour: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(
        svg,
        r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="{colour}" stroke-width="1.5"/>"#
    );
}

fn dot(svg: &mut String, (x, y): (f64, f64), colour: &str) {
    let _ = writeln!(svg, r#"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="{colour}"/>"#);
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _ = writeln!(svg, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#);
}

fn page((width, height): (f64, f64), title: &str, body: &str) -> String {
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0}" height="{height:.0}" font-family="DejaVu Sans, sans-serif" font-size="11">
<rect width="100%" height="100%" fill="white"/><text x="4" y="16" font-size="13">{title}</text>
{body}</svg>
"#
    )
}
