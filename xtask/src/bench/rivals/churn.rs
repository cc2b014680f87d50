//! A3: a thousand changes a second; and A4 once more, after them.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use sheave_tests::engine::monotonic_ns;

use super::{
    Rival,
    memory::{Process, tell_processes},
    tell,
};
use crate::bench::{Options, go_on, peers::Hub, report::Report, row::Row, scale::Group};

/// Changes of a second, how many at a time, and for how long.
const CHANGES: u32 = 1000;
pub(super) const CHANGES_AT_ONCE: u32 = 100;
const CHURN: Duration = Duration::from_secs(10);

pub(super) fn measure(hub: &Hub, rivals: &mut [Rival], options: &Options, report: &mut Report) -> Result<()> {
    let scale = rivals.first().context("somebody who serves")?.world.scale;
    let name = |what: &str| format!("{CHANGES} endpoint changes a second, {} s: {what}", CHURN.as_secs());
    let mut cpu = Row::new("a3", name("CPU time, with commands"), "CPU-ms", scale.services, None);
    let mut late = Row::new("a3", name("then one change until live"), "ms", scale.services, None);
    let mut processes = Vec::new();
    for (number, rival) in (0_u32..).zip(rivals) {
        rival.freeze(false)?;
        rival.catch_up(hub)?;
        let before = rival.cpu_ms()?;
        let begun = Instant::now();
        let mut made = 0;
        while begun.elapsed() < CHURN {
            go_on()?;
            // Each slice has one endpoint and all of them in turn, whatever it had before this run.
            let some = (made..made + CHANGES_AT_ONCE).map(|change| {
                let service = change % scale.services;
                let lap = change / scale.services + number;
                scale.churned(service, lap)
            });
            hub.plane().store(some)?;
            made += CHANGES_AT_ONCE;
            let due = Duration::from_millis(u64::from(made) * 1000 / u64::from(CHANGES));
            thread::sleep(due.saturating_sub(begun.elapsed()));
        }
        let wanted = CHANGES * u32::try_from(CHURN.as_secs())?;
        ensure!(made * 10 >= wanted * 9, "the API server's store took {made} changes, not {wanted}");
        let begun_ns = monotonic_ns();
        let live_ns = rival.moved(hub, Group::B)?;
        late.add(rival.name, vec![(live_ns - begun_ns) as f64 / 1e6], None);
        cpu.add(rival.name, vec![rival.cpu_ms()? - before], None);
        rival.moved(hub, Group::A)?;
        if options.wants("a4") || options.wants("a5") {
            processes.push((rival.name, vec![Process::at_rest(rival.pid()?)?]));
        }
        rival.freeze(true)?;
    }
    for row in [cpu, late] {
        tell(row, report);
    }
    if !processes.is_empty() {
        tell_processes("after the changes of a3", scale.services, processes, report);
    }
    Ok(())
}
