//! Objects from manifest files: `--manifests DIR`.
//!
//! `*.yaml`, `*.yml` and `*.json` files of a directory, without its subdirectories and hidden files, hold Services,
//! EndpointSlices, Nodes and Pods; other kinds are skipped. Changes are followed by inotify. What cannot be read is
//! named and takes nothing away; what is not there any more is gone.

mod document;
mod store;
mod trimmed;
mod watch;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::sync::{mpsc, oneshot};

use crate::object::{Batch, Change};

/// Why manifests cannot be followed at all. Errors in single files are reported as problems.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be listed.
    #[error("cannot list the manifest directory {dir}")]
    List {
        /// The directory.
        dir: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The directory cannot be watched.
    #[error("cannot watch the manifest directory {dir} by inotify")]
    Watch {
        /// The directory.
        dir: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The thread that follows the directory cannot be started.
    #[error("cannot start the thread that follows the manifest directory")]
    Thread(#[source] io::Error),
    /// The thread that follows the directory is gone; a bug.
    #[error("the thread that follows the manifest directory ended without a word")]
    Ended,
}

/// Reads all files once: complete lists of Nodes, Services and EndpointSlices.
pub fn load(dir: &Path) -> Result<Vec<Change>, Error> {
    watch::Files::new(dir).start()
}

/// Sends complete lists, then changes as they happen, until `tx` is closed. A thread of its own does the reading: a
/// huge file must not hold up what else the runtime does. Dropping the future ends the thread.
pub async fn run(dir: PathBuf, tx: mpsc::UnboundedSender<Batch>) -> Result<(), Error> {
    let (keep, stop) = UnixStream::pair().map_err(Error::Thread)?;
    let (result, done) = oneshot::channel();
    std::thread::Builder::new()
        .name("manifests".into())
        .spawn(move || {
            // Nobody listens any more if the future was dropped.
            let _ = result.send(watch::follow(&dir, &tx, &stop));
        })
        .map_err(Error::Thread)?;
    let result = done.await;
    drop(keep);
    result.unwrap_or(Err(Error::Ended))
}

#[cfg(test)]
mod tests;
