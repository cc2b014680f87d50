//! A1: from exec to the last Service. With it what a start takes for good: A4, the process's memory, and A5, the kernel's.

use anyhow::{Context, Result};
use sheave_tests::engine::monotonic_ns;

use super::{
    ARMS, Rival, STARTED_WITHIN,
    memory::{Account, Process, kernel_kb, tell_processes},
    tell,
};
use crate::bench::{
    Effort, Options, control, go_on,
    peers::{Hub, await_all_answer},
    report::{Fact, Report},
    row::Row,
    scale::{Family, Group, Scale},
    world::World,
};

/// What two readings differ by when nobody has programmed anything between them.
const NOBODY: &str = "nobody (noise)";

/// The last ones of each stay, stopped.
pub(super) fn measure(
    hub: &Hub,
    scale: Scale,
    options: &Options,
    effort: &Effort,
    report: &mut Report,
) -> Result<Vec<Rival>> {
    // What takes minutes is done once.
    let starts = if scale.services < 10_000 { effort.starts } else { 1 };
    let is_weighed = options.wants("a4") || options.wants("a5");
    let row = |id, name: &str, unit| Row::new(id, name.to_owned(), unit, scale.services, None);
    let mut times = row("a1", "cold start from an API server: exec to every Service answering", "ms");
    let mut kernel = row("a5", "kernel memory of what was programmed", "kB");
    let mut charged = row("a5", "kernel memory of what was programmed, as charged to the process", "kB");
    let (mut rivals, mut processes) = (Vec::new(), Vec::new());
    for (number, arm) in (1_u8..).zip(ARMS) {
        let (mut all_ms, mut weights) = (Vec::new(), Vec::new());
        let (mut kernel_kbs, mut charged_kbs) = (Vec::new(), Vec::new());
        for start in 0..starts {
            go_on()?;
            let mut rival = Rival::new(hub, number, arm, scale)?;
            let vips = rival.world.client().targets(scale.vips(Family::V4))?;
            let before_kb = if is_weighed { Some(kernel_kb(hub)?) } else { None };
            let account = if is_weighed { Account::open()? } else { None };
            let begun_ns = monotonic_ns();
            match &account {
                Some(account) => account.charge(|| rival.exec())?,
                None => rival.exec()?,
            }
            let all = await_all_answer(rival.world.client(), vips, STARTED_WITHIN, || Ok(()))
                .with_context(|| rival.name.to_owned())?;
            all_ms.push((all.all_ns - begun_ns) as f64 / 1e6);
            let is_last = start + 1 == starts;
            if let Some(before_kb) = before_kb {
                weights.push(Process::at_rest(rival.pid()?)?);
                if let Some(agent) = rival.agent().filter(|_| is_last) {
                    let maps_bytes = control::map_bytes(agent.pid())?;
                    let name = "maps of the agent by the API server, as the kernel accounts them";
                    report.fact(Fact::bytes("a5", name, scale.services, maps_bytes));
                }
                rival.kill()?;
                rival.forget()?;
                kernel_kbs.push(kernel_kb(hub)? - before_kb);
                if let Some(account) = account {
                    charged_kbs.push(account.kb()?);
                }
            }
            if !is_last {
                continue;
            }
            if is_weighed {
                rival.exec()?;
                for group in [Group::B, Group::A] {
                    rival.move_first(hub, group)?;
                    rival.await_first(group, STARTED_WITHIN)?;
                }
            }
            rival.freeze(true)?;
            rivals.push(rival);
        }
        times.add(arm.0, all_ms, None);
        if is_weighed {
            kernel.add(arm.0, kernel_kbs, None);
            if !charged_kbs.is_empty() {
                charged.add(arm.0, charged_kbs, None);
            }
            processes.push((arm.0, weights));
        }
    }
    tell(times, report);
    if is_weighed {
        let of_nobody = |_| {
            let _world = World::new(scale)?;
            let before_kb = kernel_kb(hub)?;
            Ok(kernel_kb(hub)? - before_kb)
        };
        kernel.add(NOBODY, (0..starts).map(of_nobody).collect::<Result<_>>()?, None);
        tell(kernel, report);
        tell(charged, report);
        tell_processes("after the start", scale.services, processes, report);
    }
    Ok(rivals)
}
