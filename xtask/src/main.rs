//! `cargo xtask`: the project's verbs. Each is a few cargo commands; what they need is brought by `setup`.
#![expect(clippy::print_stdout, reason = "a command line tool talks to the person who called it")]

mod bench;
mod build;
mod demo;
mod kubernetes;
mod lint;
mod setup;
mod shell;
mod vm;

use std::{
    ffi::OsString,
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result};
use clap::Parser;

use crate::{
    build::{Profile, build},
    shell::{cargo, part, run},
};

/// The verbs of Sheave's source tree.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Verb {
    /// Brings what building and testing need; safe to repeat
    Setup,
    /// Builds the agent with the kernel programs in it
    Build {
        /// Optimised
        #[arg(long)]
        release: bool,
    },
    /// Builds the agent and runs `sheave run` on this machine (as root)
    BuildAndLoad {
        /// Arguments of `sheave run`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Shows a Service at work on this machine alone (as root)
    Demo,
    /// Measures Sheave against the way without a Service (as root, on a quiet machine)
    Bench(bench::Options),
    /// Runs every test that this machine can run (as root)
    Test {
        /// Arguments of `cargo test`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Runs a command under another kernel, in a virtual machine: cargo xtask vm --kernel 6.1 -- verifier
    Vm(vm::Options),
    /// Checks format, lints, licences and sources of dependencies
    Lint,
}

fn main() -> ExitCode {
    match run_verb(Verb::parse()) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_verb(verb: Verb) -> Result<ExitCode> {
    let done = match verb {
        Verb::Setup => everything(),
        Verb::Build { release } => {
            setup::toolchain()?;
            let binaries = build(if release { Profile::Release } else { Profile::Dev })?;
            println!("{}", binaries.sheave.display());
            Ok(())
        }
        Verb::BuildAndLoad { arguments } => {
            setup::toolchain()?;
            let binaries = build(Profile::Release)?;
            let error = Command::new(&binaries.sheave).arg("run").args(arguments).exec();
            Err(error).with_context(|| format!("running {}", binaries.sheave.display()))
        }
        Verb::Demo if build::is_prepared() => demo::run(),
        Verb::Demo => {
            part("setup", || {
                setup::toolchain()?;
                setup::commands()
            })?;
            part("build", || build(Profile::Dev))?;
            demo::run()
        }
        Verb::Bench(options) if build::is_prepared() => bench::run(&options),
        Verb::Bench(options) if let Some(machine) = options.vm() => return vm::run(&machine),
        Verb::Bench(options) => {
            part("setup", || {
                setup::toolchain()?;
                setup::bench_commands()?;
                if options.wants_api_server() { kubernetes::programs() } else { Ok(()) }
            })?;
            // The one binary measures, the other is measured: both as users have them.
            let binaries = part("build", || build(Profile::Release))?;
            bench::prepared(&binaries)
        }
        Verb::Test { arguments } => test(&arguments),
        Verb::Vm(options) => return vm::run(&options),
        Verb::Lint => {
            setup::toolchain()?;
            lint::check()
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// What building and every test need.
fn everything() -> Result<()> {
    setup::toolchain()?;
    setup::commands()?;
    kubernetes::programs()
}

fn test(arguments: &[OsString]) -> Result<()> {
    part("setup", everything)?;
    let binaries = part("build", || build(Profile::Dev))?;
    let own = arguments.split(|argument| argument == "--").next().unwrap_or_default();
    let cargo_test = || -> Result<Command> {
        let mut command = cargo()?;
        command.arg("test");
        // Who names packages does not want all.
        if !own.iter().any(|argument| argument == "-p" || argument.to_string_lossy().starts_with("--package"))
        {
            command.arg("--workspace");
        }
        command.env("SHEAVE_BIN", &binaries.sheave).env("SHEAVE_LAB_CLIENT", &binaries.lab_client);
        Ok(command)
    };
    part("build of the tests", || run(cargo_test()?.arg("--no-run").args(own)))?;
    part("tests", || run(cargo_test()?.args(arguments)))
}
