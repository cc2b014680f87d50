//! The command line. Each command in a file of its own; options mean what they mean in [`options`].

mod affinity;
mod explain;
mod get;
mod options;
mod plan;
mod run;
mod status;

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;
use tracing_subscriber::EnvFilter;

use crate::control;
use crate::kernel;
use crate::takeover::hand_back::{Handed, hand_back};
use crate::takeover::rules::keep_nat;
use options::{ControlArgs, LogFormat, PinArgs};

/// Sheave: the eBPF replacement for kube-proxy that is only the proxy.
///
/// Read commands print to standard output, logs go to standard error. Exit codes: 0 an answer, 1 no answer, 2 a wrong
/// command line.
#[derive(Parser, Debug)]
#[command(name = "sheave", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// More log: -v debug, -vv everything. The variable RUST_LOG says it in detail.
    #[arg(short, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    /// Log as text or as JSON.
    #[arg(long, value_enum, default_value = "text", global = true)]
    logging_format: LogFormat,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the agent: keep the kernel equal to what the Kubernetes API, or a directory of manifests, says.
    ///
    /// It stays in the foreground. When it ends, however it ends, everything goes on working in the kernel; the next run
    /// takes over what it finds. `sheave cleanup` removes it.
    Run(run::RunArgs),
    /// Show what would be programmed for every service port, and why each endpoint is in or out.
    Plan(plan::PlanArgs),
    /// Say what becomes of one client that dials one destination, and why.
    Explain(explain::ExplainArgs),
    /// List what is in the kernel's tables now.
    Get(get::GetArgs),
    /// Show whether the agent runs, what it could not use, and what the programs counted.
    Status(status::StatusArgs),
    /// Detach the programs and remove all tables from the kernel.
    ///
    /// If kube-proxy's rules are there, it has the connections of the packet path from then on; else these end. Those that
    /// sockets made go on in any case. New ones to a VIP are no longer translated. Refused while an agent runs.
    Cleanup(CleanupArgs),
}

#[derive(Args, Debug)]
struct CleanupArgs {
    #[command(flatten)]
    pins: PinArgs,
    #[command(flatten)]
    control: ControlArgs,
}

/// How a read command prints.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Output {
    /// One JSON document.
    Json,
    /// Columns for people.
    Table,
}

impl Cli {
    /// Runs the command; the code is the process's.
    pub fn run(self) -> ExitCode {
        self.start_log();
        let result = match self.command {
            Command::Run(args) => args.run(),
            Command::Plan(args) => args.run(),
            Command::Explain(args) => args.run(),
            Command::Get(args) => args.run(),
            Command::Status(args) => args.run(),
            Command::Cleanup(args) => args.run(),
        };
        match result {
            Ok(code) => code,
            // Somebody closed the pipe: `sheave get services | head`.
            Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
            Err(error) if error.is::<WrongCommandLine>() => {
                let _ = writeln!(io::stderr(), "error: {error}");
                ExitCode::from(2)
            }
            Err(error) => {
                // If standard error is gone too there is nobody left to tell.
                let _ = writeln!(io::stderr(), "error: {error:#}");
                ExitCode::FAILURE
            }
        }
    }

    fn start_log(&self) {
        let level = match (self.verbose, &self.command) {
            (0, Command::Run(_)) => "info",
            // Read commands answer; what is odd about the objects is part of the answer.
            (0, _) => "error",
            (1, _) => "debug",
            (_, _) => "trace",
        };
        // What goes wrong with the API server is said once, by the source; kube would say it at every try.
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| {
            EnvFilter::new(format!(
                "warn,kube_client=off,kube_runtime=off,proxy_agent={level},sheave={level}"
            ))
        });
        let log =
            tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_target(false);
        match self.logging_format {
            LogFormat::Text => log.with_ansi(false).init(),
            LogFormat::Json => log.json().init(),
        }
    }
}

/// An option that clap could not judge, of a command whose exit code 2 others rely on (`cli-json.md`).
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
struct WrongCommandLine(anyhow::Error);

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

impl CleanupArgs {
    fn run(&self) -> Result<ExitCode> {
        let pins = self.pins.pins();
        let was_there = pins.exist().context("clean up")?;
        let mut handed = Handed::default();
        if was_there {
            let claim = match pins.claim() {
                Err(error @ kernel::Error::InUse { .. }) => {
                    return Err(error).context("nothing was removed; end the agent first");
                }
                result => result.context("clean up")?,
            };
            handed = hand_back(&pins).context("hand connections to kube-proxy")?;
            // What is pinned goes last: if this ends halfway, the next one goes on.
            keep_nat(false).context("clean up")?;
            pins.remove_all(claim).context("clean up")?;
        }
        block_on(control::remove_abandoned(&self.control.control_socket))?.context("clean up")?;
        let text = if was_there { "removed: programs detached, tables gone" } else { "nothing to remove" };
        writeln!(io::stdout(), "{text}: {}", pins.root().display())?;
        let Handed { over, lost } = handed;
        if over + lost > 0 {
            let text = "connections handed to netfilter, for kube-proxy: ";
            writeln!(io::stdout(), "{text}{over}; that could not be handed over: {lost}")?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Prints a document in the form that was asked for.
fn print(document: &impl Serialize, text: impl Display, output: Output) -> Result<ExitCode> {
    let mut out = io::stdout().lock();
    match output {
        Output::Json => {
            let json = serde_json::to_string_pretty(document).context("write JSON")?;
            writeln!(out, "{json}")?;
        }
        Output::Table => write!(out, "{text}")?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs a short conversation with the agent.
fn block_on<T>(future: impl Future<Output = T>) -> Result<T> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    Ok(runtime.block_on(future))
}
