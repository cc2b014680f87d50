//! A6: who serves is killed, an endpoint moves meanwhile, and it is started again; clients go on connecting.

use std::thread;

use anyhow::{Context, Result};
use sheave_tests::engine::monotonic_ns;

use super::{
    REST, Rival, STARTED_WITHIN, tell,
    traffic::{Tally, Traffic},
};
use crate::bench::{
    Effort, go_on,
    peers::Hub,
    report::{Fact, Report},
    row::Row,
    scale::Group,
};

pub(super) fn measure(hub: &Hub, rivals: &mut [Rival], effort: &Effort, report: &mut Report) -> Result<()> {
    let services = rivals.first().context("somebody who serves")?.world.scale.services;
    let what = format!("restart, {} s down", effort.down.as_secs());
    let mut tally = Tally::new("a6", &what, services);
    let name = format!("{what}: exec to the change of meanwhile live");
    let mut live = Row::new("a6", name, "ms", services, None);
    for rival in rivals {
        go_on()?;
        rival.freeze(false)?;
        rival.catch_up(hub)?;
        let traffic = Traffic::start(rival)?;
        rival.kill()?;
        thread::sleep(effort.down / 2);
        rival.move_first(hub, Group::B)?;
        thread::sleep(effort.down / 2);
        let begun_ns = monotonic_ns();
        rival.exec()?;
        let live_ns = rival.await_first(Group::B, STARTED_WITHIN)?;
        thread::sleep(REST);
        tally.add(rival.name, &traffic.end()?);
        live.add(rival.name, vec![(live_ns - begun_ns) as f64 / 1e6], None);
        if let Some(writes) = rival.writes()? {
            let name = "restart, by the API server, one endpoint moved: writes to the kernel";
            report.fact(Fact::count("a6", name, services, writes));
        }
        rival.moved(hub, Group::A)?;
        rival.freeze(true)?;
    }
    tally.tell(report);
    tell(live, report);
    Ok(())
}
