//! `cargo xtask vm`: a command under another kernel, in a virtual machine that lives in memory.
//!
//! QEMU boots a kernel of Debian with a root file system of Debian's packages ([`packages`]) and of what was built here
//! ([`guest`]); nothing of this machine is written to but the cache. Where there is no KVM, QEMU translates every
//! instruction: right for whether something works, useless for how fast it is.

mod guest;
mod kernel;
mod packages;
mod qemu;

use std::process::ExitCode;

use anyhow::Result;
use clap::ValueEnum;

use crate::{kubernetes, setup, shell::part};

/// What to run, and under what.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The kernel, of those that the configured package sources have
    #[arg(long, value_enum, default_value_t = Kernel::Linux6_1)]
    kernel: Kernel,
    /// `sheave ...`, `demo`, `bench ...`, a suite of tests/suites with arguments (as `verifier`), or any command of Debian
    /// that is in the machine (as `sh -c ...`)
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Which kernel to boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kernel {
    /// Of Debian 12
    #[value(name = "6.1")]
    Linux6_1,
    /// Of Debian 13
    #[value(name = "6.12")]
    Linux6_12,
    /// The newest there is
    Newest,
}

impl Options {
    /// A command under a kernel.
    pub(crate) fn new(kernel: Kernel, command: Vec<String>) -> Self {
        Self { kernel, command }
    }
}

/// Runs the command; its status is the guest's.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    part("setup", || {
        setup::toolchain()?;
        setup::vm_commands()?;
        if guest::wants_kubernetes(&options.command) { kubernetes::programs() } else { Ok(()) }
    })?;
    let guest = part("build", || guest::prepare(&options.command))?;
    let (kernel, packages) =
        part("kernel and packages", || Ok((kernel::bring(options.kernel)?, packages::bring()?)))?;
    qemu::boot(&kernel, &[&packages, &kernel.modules, &guest.archive]).map(ExitCode::from)
}
