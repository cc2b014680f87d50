//! Plots, written by hand: a line and a whisker for each arm is all they need.

use std::fmt::Write as _;

use super::row::Row;

const LEFT: f64 = 330.0;
const WIDTH: f64 = 420.0;
const LINE_HEIGHT: usize = 16;

/// What the axis shows: ratios beyond are cut off and say so by their number.
const AXIS: (f64, f64) = (0.9, 1.3);

/// The ratios of all rows with their intervals, as SVG.
pub(crate) fn ratios(rows: &[Row]) -> String {
    let x = |ratio: f64| LEFT + (ratio.clamp(AXIS.0, AXIS.1) - AXIS.0) / (AXIS.1 - AXIS.0) * WIDTH;
    let mut body = String::new();
    let mut line = 1;
    // Writing to a string cannot fail.
    for row in rows {
        for arm in &row.arms {
            let Some(ratio) = arm.ratio else { continue };
            let y = line * LINE_HEIGHT + 10;
            let colour = if arm.name == "sheave" { "#0b6e4f" } else { "#888888" };
            let _ = writeln!(
                body,
                r#"<text x="4" y="{}">{}, {}: {}</text><line x1="{:.1}" x2="{:.1}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/><circle cx="{:.1}" cy="{y}" r="4" fill="{colour}"/><text x="{}" y="{}">{:.3}</text>"#,
                y + 4,
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
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="{height}" font-family="sans-serif" font-size="11">
<rect width="100%" height="100%" fill="white"/><text x="4" y="13">cost as a ratio to the direct way, 95 % intervals (metric, Services: arm)</text>
<line x1="{one:.1}" x2="{one:.1}" y1="18" y2="{height}" stroke="#cc3333" stroke-dasharray="3 3"/>
{body}</svg>
"##,
        LEFT + WIDTH + 60.0,
        one = x(1.0)
    )
}
