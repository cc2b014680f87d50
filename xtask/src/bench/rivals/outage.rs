//! A9: the API server is killed, and comes back without a history, so that everybody lists again; clients go on connecting.

use std::{thread, time::Instant};

use anyhow::{Context, Result, ensure};
use sheave_tests::engine::monotonic_ns;

use super::{
    LIVE_WITHIN, LOOK, MISSED_WITHIN, Rival, tell,
    traffic::{Tally, Traffic},
};
use crate::bench::{
    Effort, go_on,
    peers::Hub,
    report::{Fact, Report},
    row::Row,
    scale::Group,
};

pub(super) fn measure(
    hub: &mut Hub,
    rivals: &mut [Rival],
    effort: &Effort,
    report: &mut Report,
) -> Result<()> {
    let services = rivals.first().context("somebody who serves")?.world.scale.services;
    let what = format!("API server gone for {} s", effort.outage.as_secs());
    let mut tally = Tally::new("a9", &what, services);
    let row = |name: &str, unit| Row::new("a9", format!("{what}: {name}"), unit, services, None);
    let mut without = row("CPU time until it returns, with commands", "CPU-ms");
    let mut back = row("CPU time after that, with commands", "CPU-ms");
    let mut live = row("return to the first change live", "ms");
    for rival in rivals {
        go_on()?;
        rival.freeze(false)?;
        rival.catch_up(hub)?;
        // What the change writes that is made later.
        let (before, problems) = (rival.writes()?, rival.problems()?);
        rival.moved(hub, Group::B)?;
        let after = rival.writes()?;
        rival.moved(hub, Group::A)?;
        let traffic = Traffic::start(rival)?;
        let (writes, cpu_ms) = (rival.writes()?, rival.cpu_ms()?);
        hub.plane_mut().stop_api_server()?;
        let begun = Instant::now();
        while begun.elapsed() < effort.outage {
            go_on()?;
            thread::sleep(LOOK.min(effort.outage.saturating_sub(begun.elapsed())));
        }
        // A watch cannot go on from where it was.
        hub.plane().compact()?;
        let away_cpu_ms = rival.cpu_ms()?;
        hub.plane_mut().restart_api_server()?;
        let begun_ns = monotonic_ns();
        rival.move_first(hub, Group::B)?;
        let live_ns = rival.await_first(Group::B, LIVE_WITHIN)?;
        // One kind of object may come back later than another; ours says when all have.
        thread::sleep(MISSED_WITHIN);
        let returned = Instant::now();
        while rival.problems()? != problems {
            go_on()?;
            ensure!(returned.elapsed() < LIVE_WITHIN, "{}: {:?}", rival.name, rival.problems()?);
            thread::sleep(LOOK / 4);
        }
        back.add(rival.name, vec![rival.cpu_ms()? - away_cpu_ms], None);
        without.add(rival.name, vec![away_cpu_ms - cpu_ms], None);
        live.add(rival.name, vec![(live_ns - begun_ns) as f64 / 1e6], None);
        tally.add(rival.name, &traffic.end()?);
        if let (Some(before), Some(after), Some(from), Some(to)) = (before, after, writes, rival.writes()?) {
            let (of_change, all) = (after - before, to - from);
            ensure!(all >= of_change, "a change wrote {of_change} times, then {all} times");
            let name = format!("{what}: writes to the kernel beside the {of_change} of the change");
            report.fact(Fact::count("a9", &name, services, all - of_change));
        }
        rival.moved(hub, Group::A)?;
        rival.freeze(true)?;
    }
    tally.tell(report);
    for row in [without, back, live] {
        tell(row, report);
    }
    Ok(())
}
