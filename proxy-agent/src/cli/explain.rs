use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

use super::affinity::Client;
use super::options::PinArgs;
use super::plan::OfflineArgs;
use super::{Output, affinity, print};
use crate::control::{Rendered, Request};
use crate::object::address;
use crate::view::{self, Destination};

#[derive(Args, Debug)]
pub(super) struct ExplainArgs {
    /// The client's address.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_ip)]
    from: IpAddr,
    /// What it dials: ADDRESS:PORT/PROTOCOL, as in 10.96.0.7:80/TCP or [fd00::7]:80/TCP.
    #[arg(long, value_name = "ADDRESS:PORT/PROTOCOL")]
    to: Destination,
    #[command(flatten)]
    offline: OfflineArgs,
    #[command(flatten)]
    pins: PinArgs,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value = "json")]
    output: Output,
}

fn parse_ip(text: &str) -> Result<IpAddr, String> {
    address::parse_ip(text).ok_or_else(|| format!("{text:?} is not an IP address"))
}

impl ExplainArgs {
    pub(super) fn run(&self) -> Result<ExitCode> {
        if let Some(model) = self.offline.model()? {
            let explanation = view::explain::explain(&model, self.from, self.to)?;
            return print(&explanation, &explanation, self.output);
        }
        // The agent says what the rules say; the client's affinity entry is in the kernel.
        let to = format!("{}/{}", self.to.at, self.to.protocol.name());
        let Rendered { mut document, mut text, service_id } =
            self.offline.ask(&Request::Explain { from: self.from, to })?;
        let field = |name| document.get(name).and_then(Value::as_str);
        let which = field("set").and_then(view::set_named);
        let origin = field("origin").and_then(view::origin_named);
        let affinity = match (service_id, which, origin) {
            (Some(id), Some(which), Some(origin)) => {
                affinity::of(&self.pins.pins(), id, which, &Client { address: self.from, origin })?
            }
            (_, _, _) => None,
        };
        if let (Some(affinity), Some(fields)) = (affinity, document.as_object_mut()) {
            text.push_str(&format!(
                "affinity  {}, for {} s\n",
                affinity.endpoint, affinity.expires_in_seconds
            ));
            fields.insert("affinity".to_owned(), serde_json::to_value(&affinity).context("write JSON")?);
        }
        print(&document, text, self.output)
    }
}
