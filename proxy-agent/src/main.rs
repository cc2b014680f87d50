//! The `sheave` binary: parse → resolve → run.

use std::process::ExitCode;

use clap::Parser;
use proxy_agent::cli::Cli;

fn main() -> ExitCode {
    Cli::parse().run()
}
