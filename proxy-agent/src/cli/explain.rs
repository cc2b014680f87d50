use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use super::options::PinArgs;
use super::plan::OfflineArgs;
use super::{Output, affinity, print};
use crate::control::{LiveExplanation, Request};
use crate::object::address;
use crate::view::{self, Destination, Explanation};

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
        let explanation = match self.offline.model()? {
            Some(model) => view::explain::explain(&model, self.from, self.to)?,
            None => self.live()?,
        };
        print(&explanation, &explanation, self.output)
    }

    /// The agent says what the rules say; the client's affinity entry is in the kernel.
    fn live(&self) -> Result<Explanation> {
        let to = format!("{}/{}", self.to.at, self.to.protocol.name());
        let answer = self.offline.ask(&Request::Explain { from: self.from, to })?;
        let LiveExplanation { mut explanation, service_id } =
            serde_json::from_value(answer).context("understand the agent's explanation")?;
        if let Some(service_id) = service_id {
            explanation.affinity = affinity::of(&self.pins.pins(), service_id, self.from)?;
        }
        Ok(explanation)
    }
}
