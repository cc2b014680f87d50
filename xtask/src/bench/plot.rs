//! Plots, written by hand: a line and a whisker for each arm is all they need.

use std::fmt::Write as _;

use super::row::Row;

const LEFT: f64 = 400.0;
const WIDTH: f64 = 420.0;
const LINE_HEIGHT: usize = 16;

/// What the axis shows, in equal steps for equal factors: ratios beyond are cut off and say so by their number.
const AXIS: (f64, f64) = (0.6, 10.0);

/// Where the axis has numbers.
const MARKS: [f64; 6] = [0.75, 1.0, 1.5, 2.0, 4.0, 8.0];

/// The ratios of all arms of the data path with their intervals, as SVG; without what is void.
pub(crate) fn ratios(rows: &[Row]) -> String {
    let x =
        |ratio: f64| LEFT + (ratio.clamp(AXIS.0, AXIS.1) / AXIS.0).log2() / (AXIS.1 / AXIS.0).log2() * WIDTH;
    let mut body = String::new();
    let mut line = 2;
    // Writing to a string cannot fail. What has no second arm like the first is no part of the data path.
    for row in rows.iter().filter(|row| row.noise_max.is_some() && !row.is_void()) {
        for arm in &row.arms {
            let Some(ratio) = arm.ratio else { continue };
            let y = line * LINE_HEIGHT + 10;
            let colour = match arm.name.split([' ', ',']).next() {
                Some("sheave") => "#0b6e4f",
                Some("kube-proxy") => "#c8641e",
                _ => "#888888",
            };
            let _ = writeln!(
                body,
                r#"<text x="4" y="{}">{} {}, {}: {}</text><line x1="{:.1}" x2="{:.1}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/><circle cx="{:.1}" cy="{y}" r="4" fill="{colour}"/><text x="{}" y="{}">{:.3}</text>"#,
                y + 4,
                row.id,
                row.name,
                row.services,
                arm.name,
                x(ratio.low),
                x(ratio.high),
                x(ratio.median),
                LEFT + WIDTH + 10.0,
                y + 4,
                ratio.median
            );
            line += 1;
        }
    }
    let height = (line + 1) * LINE_HEIGHT + 10;
    let marks = MARKS.map(|mark| {
        let colour = if (mark - 1.0).abs() < f64::EPSILON { "#cc3333" } else { "#dddddd" };
        format!(
            r#"<line x1="{x:.1}" x2="{x:.1}" y1="32" y2="{height}" stroke="{colour}" stroke-dasharray="3 3"/><text x="{x:.1}" y="29" text-anchor="middle">{mark}</text>"#,
            x = x(mark)
        )
    });
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="{height}" font-family="sans-serif" font-size="11">
<rect width="100%" height="100%" fill="white"/><text x="4" y="13">cost as a ratio to the direct way (p8: to plain forwarding), 95 % intervals (metric, Services: arm)</text>
{}
{body}</svg>
"##,
        LEFT + WIDTH + 60.0,
        marks.concat()
    )
}
