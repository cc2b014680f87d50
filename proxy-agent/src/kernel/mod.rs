//! The kernel side of the agent: loading, pinning, attaching, and the few system calls that aya does not offer.

pub mod devices;
pub mod filters;
pub mod mapping;
pub mod pins;
pub mod programs;
mod sys;
pub mod table;

pub use pins::{Claim, Pins};
pub use programs::{Loaded, Settings};
pub use sys::netns_cookie;

use std::io;
use std::path::PathBuf;

/// What can go wrong between the agent and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory.
    #[error("{action} {path}")]
    Path {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// One agent for each pin directory: there is one writer of every table.
    #[error("another agent runs: it holds the pin directory {path}")]
    InUse {
        /// The pin directory.
        path: PathBuf,
    },
    /// The object could not be loaded into the kernel.
    #[error("load the kernel programs")]
    Load(#[from] aya::EbpfError),
    /// One program could not be loaded or attached.
    #[error("{action} program {program}")]
    Program {
        /// What was tried.
        action: &'static str,
        /// Which program.
        program: &'static str,
        /// aya's or the verifier's words.
        source: aya::programs::ProgramError,
    },
    /// A program that should be in the object is not.
    #[error("the object has no program {0}")]
    NoProgram(&'static str),
    /// A map's pin or information.
    #[error("map {map}")]
    Map {
        /// Which map.
        map: &'static str,
        /// aya's words.
        source: aya::maps::MapError,
    },
    /// A pinned map of another shape than this version's.
    #[error("pinned map {path} has {what} {found}, this version needs {needed}; `sheave cleanup` removes it")]
    Shape {
        /// The pin.
        path: PathBuf,
        /// Which property.
        what: &'static str,
        /// As pinned.
        found: usize,
        /// As needed.
        needed: usize,
    },
    /// A link.
    #[error("{action} the link of {program}")]
    Link {
        /// What was tried.
        action: &'static str,
        /// Which program's.
        program: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn path(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Path { action, path, source }
    }
}
