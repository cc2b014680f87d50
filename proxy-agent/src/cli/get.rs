use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use proxy_common::abi::{Flow, FlowKey, ServiceId};
use serde::Serialize;

use super::options::LiveArgs;
use super::print;
use crate::control::Request;
use crate::dataplane::bpf::Kernel;
use crate::dump;
use crate::packet::flows::{self, FlowView, Flows};
use crate::view::table::table;

#[derive(Args, Debug)]
pub(super) struct GetArgs {
    /// Which table.
    what: What,
    #[command(flatten)]
    live: LiveArgs,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum What {
    /// Frontends and sets of every service port.
    Services,
    /// Every backend with its sets.
    Backends,
    /// Every connection of the packet path.
    Flows,
}

impl GetArgs {
    pub(super) fn run(&self) -> Result<ExitCode> {
        self.live.check()?;
        let pins = self.live.pins();
        let Some(kernel) = Kernel::open(&pins).context("open the tables")? else {
            bail!("no tables are pinned in {}: the agent has never run here", pins.root().display());
        };
        // Names are the agent's; the tables speak for themselves without it.
        let names = self
            .live
            .ask(&Request::Names)?
            .ok()
            .and_then(|names| serde_json::from_value::<BTreeMap<ServiceId, String>>(names).ok())
            .unwrap_or_default();
        match self.what {
            What::Services => {
                let records = dump::records(&kernel, &names).context("read the tables")?;
                print(&records, services(&records), self.live.output)
            }
            What::Backends => {
                let rows = dump::backends(&kernel, &names).context("read the tables")?;
                print(&rows, backends(&rows), self.live.output)
            }
            What::Flows => {
                let entries = Flows::open(&pins).context("open the tables of connections")?.entries();
                let now_ns = flows::now_ns();
                let view = |(key, flow): (&FlowKey, &Flow)| FlowRow {
                    service: names.get(&flow.service).cloned(),
                    flow: FlowView::new(key, flow, now_ns),
                };
                let rows: Vec<FlowRow> =
                    entries.context("read the tables of connections")?.iter().map(view).collect();
                print(&rows, flow_table(&rows), self.live.output)
            }
        }
    }
}

/// A connection with the name of its service port, if an agent was there to tell.
#[derive(Serialize)]
struct FlowRow {
    #[serde(flatten)]
    flow: FlowView,
    service: Option<String>,
}

fn flow_table(rows: &[FlowRow]) -> String {
    let row = |FlowRow { flow, service }: &FlowRow| {
        vec![
            flow.client.to_string(),
            flow.protocol.clone(),
            flow.vip.to_string(),
            flow.backend.map_or("-".to_owned(), |backend| backend.to_string()),
            flow.snat.map_or_else(|| "-".to_owned(), |snat| snat.to_string()),
            flow.state.name().to_owned(),
            format!("{}s", flow.idle_seconds),
            service.clone().unwrap_or_else(|| format!("record {}", flow.service_id)),
        ]
    };
    let rows: Vec<_> = rows.iter().map(row).collect();
    table(0, &["CLIENT", "PROTOCOL", "VIP", "BACKEND", "SNAT", "STATE", "IDLE", "SERVICE"], &rows)
}

fn services(records: &[dump::Record]) -> String {
    let mut rows = Vec::new();
    for record in records {
        let count = |set: &Option<Vec<String>>| match set {
            Some(set) if set.is_empty() => record.when_empty.unwrap_or("-").to_owned(),
            Some(set) => set.len().to_string(),
            None => "-".to_owned(),
        };
        let affinity =
            record.session_affinity_seconds.map_or("-".to_owned(), |seconds| format!("{seconds}s"));
        let mut first = vec![
            record.service_id.to_string(),
            record.service.clone().unwrap_or_else(|| "?".to_owned()),
            count(&record.cluster_set),
            count(&record.local_set),
            affinity,
        ];
        for frontend in &record.frontends {
            let mut row = std::mem::replace(&mut first, vec![String::new(); 5]);
            row.push(frontend.clone());
            rows.push(row);
        }
    }
    table(0, &["ID", "SERVICE", "CLUSTER", "LOCAL", "AFFINITY", "FRONTEND"], &rows)
}

fn backends(backends: &[dump::BackendRow]) -> String {
    let row = |backend: &dump::BackendRow| {
        vec![
            format!("{}.{}", backend.index, backend.generation),
            backend.address.clone(),
            if backend.serving { "yes" } else { "no" }.to_owned(),
            backend.sets.join(","),
            backend.service.clone().unwrap_or_else(|| format!("record {}", backend.service_id)),
        ]
    };
    let rows: Vec<_> = backends.iter().map(row).collect();
    table(0, &["ID", "ADDRESS", "SERVING", "SETS", "SERVICE"], &rows)
}
