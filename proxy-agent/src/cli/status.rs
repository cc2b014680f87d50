use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use super::options::LiveArgs;
use super::print;
use crate::control::Request;
use crate::kernel::{devices, programs};
use crate::packet::flows::Flows;
use crate::view::table::table;

#[derive(Args, Debug)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    live: LiveArgs,
}

impl StatusArgs {
    /// What is in the kernel is shown also when no agent runs; then the code is 1.
    pub(super) fn run(&self) -> Result<ExitCode> {
        self.live.check()?;
        let pins = self.live.pins();
        let links: BTreeMap<&str, Option<u64>> = programs::links(&pins).into_iter().collect();
        let counters: BTreeMap<&str, u64> =
            programs::counters(&pins).unwrap_or_default().into_iter().collect();
        let hooked = devices::hooked(&pins).unwrap_or_default();
        let hooked: Vec<u32> = hooked.into_iter().filter(|(_, both)| *both).map(|(index, _)| index).collect();
        let flows = Flows::open(&pins).ok().and_then(|flows| flows.counts().ok());
        let answer = self.live.ask(&Request::Status)?;
        let (mut document, error) = match answer {
            Ok(document) => (document, None),
            Err(error) => (json!({"synced": false}), Some(format!("{:#}", anyhow::Error::new(error)))),
        };
        if let Some(fields) = document.as_object_mut() {
            fields.insert("agent".to_owned(), json!(if error.is_none() { "running" } else { "not running" }));
            fields.insert("agent_error".to_owned(), json!(error));
            fields.insert("programs_attached".to_owned(), json!(links));
            fields.insert("counters".to_owned(), json!(counters));
            fields.insert("devices_hooked".to_owned(), json!(hooked));
            fields.insert("flows".to_owned(), json!(flows));
        }
        let text = text(&document, &links);
        let printed = print(&document, text, self.live.output)?;
        Ok(if error.is_none() { printed } else { ExitCode::FAILURE })
    }
}

/// Devices, and what could not be done on them.
fn packet_path(packets: Option<&Value>) -> String {
    let mut text = String::new();
    let Some(packets) = packets.filter(|packets| packets.is_object()) else { return text };
    if let Some(devices) = packets.get("devices").and_then(Value::as_array) {
        let cell = |device: &Value, name: &str| match device.get(name) {
            Some(Value::String(value)) => value.clone(),
            Some(Value::Bool(value)) => if *value { "yes" } else { "no" }.to_owned(),
            Some(Value::Array(values)) => {
                values.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(",")
            }
            Some(value) => value.to_string(),
            None => "-".to_owned(),
        };
        let rows: Vec<_> = devices
            .iter()
            .map(|device| {
                ["index", "name", "hooked", "role", "sources"].map(|name| cell(device, name)).to_vec()
            })
            .collect();
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "\ndevices, hooked by {}:\n{}",
            packets.get("hooks").and_then(Value::as_str).unwrap_or("?"),
            table(2, &["INDEX", "NAME", "HOOKED", "ROLE", "REPLACED SOURCES"], &rows)
        );
    }
    if let Some(failed) = packets.get("failed").and_then(Value::as_object).filter(|failed| !failed.is_empty())
    {
        let _ = writeln!(text, "\nof the packet path, being tried again:");
        for (what, error) in failed {
            let _ = writeln!(text, "  {what}: {}", error.as_str().unwrap_or("?"));
        }
    }
    text
}

fn text(document: &Value, links: &BTreeMap<&str, Option<u64>>) -> String {
    let mut text = String::new();
    let field = |name: &str| match document.get(name) {
        Some(Value::String(value)) => value.clone(),
        Some(Value::Null) | None => "-".to_owned(),
        Some(value) => value.to_string(),
    };
    // Writing to a string cannot fail.
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<12}{value}");
    };
    line("agent", field("agent"));
    if document.get("agent_error").is_some_and(|error| !error.is_null()) {
        line("", field("agent_error"));
    } else {
        line(
            "synced",
            if document.get("synced") == Some(&json!(true)) {
                "yes"
            } else {
                "no: the lists are not complete"
            }
            .to_owned(),
        );
        let found = if document.get("node_found") == Some(&json!(true)) {
            ""
        } else {
            " (no such Node, see the problems)"
        };
        line("node", field("node") + found);
        line("services", format!("{}, with {} frontends", field("services"), field("frontends")));
        line(
            "last sync",
            format!("{} µs, {} writes in all", field("last_sync_microseconds"), field("writes")),
        );
    }
    let attached = links.values().flatten().count();
    let left = match links.len() - attached {
        0 => String::new(),
        gone => format!("; {gone} links are of a cgroup that is gone"),
    };
    line("programs", format!("{attached} of {} attached{left}", programs::PROGRAMS.len()));
    let hooked = document.get("devices_hooked").and_then(Value::as_array).map_or(0, Vec::len);
    line(
        "packets",
        if hooked == 0 { "hooked on no device".to_owned() } else { format!("hooked on {hooked} devices") },
    );
    if let Some(flows) = document.get("flows").filter(|flows| flows.is_object()) {
        let count = |name: &str| flows.get(name).map_or_else(|| "?".to_owned(), Value::to_string);
        let given_way = match document.pointer("/packet_path/young_flows_given_way").and_then(Value::as_u64) {
            Some(0) | None => String::new(),
            Some(count) => format!(" ({count} gave way to newer ones)"),
        };
        line(
            "flows",
            format!(
                "{} of {}, {} of {} whose client has not gone on{given_way}, {} of {} with a replaced source",
                count("flows"),
                count("flows_limit"),
                count("young_flows"),
                count("young_flows_limit"),
                count("snat"),
                count("snat_limit"),
            ),
        );
    }
    text.push_str(&packet_path(document.get("packet_path")));
    if let Some(failed) =
        document.get("failed").and_then(Value::as_object).filter(|failed| !failed.is_empty())
    {
        let _ = writeln!(text, "\nnot programmed as wanted, being tried again:");
        for (service, error) in failed {
            let _ = writeln!(text, "  {service}: {}", error.as_str().unwrap_or("?"));
        }
    }
    if let Some(problems) =
        document.get("problems").and_then(Value::as_array).filter(|problems| !problems.is_empty())
    {
        let cell =
            |problem: &Value, name: &str| problem.get(name).and_then(Value::as_str).unwrap_or("").to_owned();
        let rows: Vec<_> =
            problems.iter().map(|p| vec![cell(p, "object"), cell(p, "field"), cell(p, "message")]).collect();
        let _ = write!(text, "\nproblems:\n{}", table(2, &["OBJECT", "FIELD", "MESSAGE"], &rows));
    }
    if let Some(counters) = document.get("counters").and_then(Value::as_object) {
        let rows: Vec<_> = counters
            .iter()
            .filter(|(_, count)| count.as_u64() != Some(0))
            .map(|(name, count)| vec![name.clone(), count.to_string()])
            .collect();
        if !rows.is_empty() {
            let _ = write!(text, "\ncounters:\n{}", table(2, &["OUTCOME", "COUNT"], &rows));
        }
    }
    text
}
