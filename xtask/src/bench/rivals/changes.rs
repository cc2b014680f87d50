//! A2: one endpoint moves. A7: who still meets the removed one.

use std::{thread, time::Duration};

use anyhow::{Context, Result, ensure};
use sheave_tests::engine::monotonic_ns;

use super::{REST, Rival, tell};
use crate::bench::{
    Effort,
    data::SHEAVE,
    go_on,
    peers::Hub,
    report::Report,
    row::Row,
    scale::Group,
    stats::{ordered, quantile},
};

/// Looks from new sockets once the new endpoint has answered.
const LOOKS: u32 = 100;

pub(super) fn measure(hub: &Hub, rivals: &mut [Rival], effort: &Effort, report: &mut Report) -> Result<()> {
    let api = hub.plane().api();
    let services = rivals.first().context("somebody who serves")?.world.scale.services;
    let flips = effort.api_flips * 2;
    let row = |id, name: String, unit| Row::new(id, name, unit, services, None);
    let after = format!("{flips} changes, {LOOKS} looks after each was seen");
    let mut live =
        row("a2", "one endpoint change: sent to the API server to answered by the new one".to_owned(), "ms");
    let mut stale = row("a7", format!("{after}: answers of the removed endpoint"), "answers");
    let mut silent = row("a7", format!("{flips} changes: looks that nobody answered, until then"), "looks");
    let mut stored_ms = Vec::new();
    for rival in rivals {
        rival.freeze(false)?;
        let scale = rival.world.scale;
        let movable = scale.movable();
        let mut live_ms = Vec::new();
        let (mut stale_looks, mut silent_looks) = (0, 0);
        rival.catch_up(hub)?;
        for flip in 0..flips {
            go_on()?;
            let index = usize::try_from(flip / 2)? % movable.len();
            let service = *movable.get(index).context("a movable Service")?;
            let group = if flip.is_multiple_of(2) { Group::B } else { Group::A };
            let (path, slice) = scale.moved(service, group);
            rival.forget()?;
            let (begun_ns, stored_ns, change) = thread::scope(|scope| {
                let prober = scope.spawn(|| rival.await_group(service, group, LOOKS));
                thread::sleep(REST + Duration::from_micros(u64::from(flip * 37 % 1000)));
                let begun_ns = monotonic_ns();
                api.put(&path, &slice)?;
                let stored_ns = monotonic_ns();
                let change = prober.join().map_err(|_| anyhow::anyhow!("the prober panicked"))??;
                anyhow::Ok((begun_ns, stored_ns, change))
            })?;
            let live_ns = change.first_new_ns;
            ensure!(live_ns > begun_ns, "{}: the change was there before it was made", rival.name);
            live_ms.push((live_ns - begun_ns) as f64 / 1e6);
            stale_looks += change.stale;
            silent_looks += change.failures;
            if rival.name == SHEAVE {
                stored_ms.push((stored_ns - begun_ns) as f64 / 1e6);
            }
        }
        rival.freeze(true)?;
        let p99 = quantile(&ordered(&live_ms), 0.99);
        live.add(rival.name, live_ms, Some(p99));
        stale.add(rival.name, vec![stale_looks as f64], None);
        silent.add(rival.name, vec![silent_looks as f64], None);
    }
    live.add("API server alone: sent to stored", stored_ms, None);
    for row in [live, stale, silent] {
        tell(row, report);
    }
    Ok(())
}
