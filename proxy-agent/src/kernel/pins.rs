//! What stays in the kernel when the agent goes, and where it is pinned (Q8).
//!
//! ```text
//! <bpffs>/sheave/state-v<layout>/MAP     maps that the programs write: affinity, datagram flows, socket storage
//! <bpffs>/sheave/tables-v<layout>-<n>/MAP    maps that the agent writes; n counts the generations
//! <bpffs>/sheave/tables-v<layout>-<n>-filling/MAP    the same, while they are filled
//! <bpffs>/sheave/links/PROGRAM           attachments; each is updated atomically to the current generation's program
//! ```

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::statfs;
use proxy_common::abi::LAYOUT_VERSION;

use super::{Error, devices, sys};

/// statfs(2): BPF_FS_MAGIC.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// The right to write below a pin directory, held as long as this lives. It is the kernel's lock, so it ends with the
/// process however that ends.
#[derive(Debug)]
pub struct Claim {
    _lock: Flock<File>,
}

/// The pin directory.
#[derive(Clone, Debug)]
pub struct Pins {
    bpffs: PathBuf,
}

impl Pins {
    /// Pins below this bpffs; nothing is touched yet.
    pub fn new(bpffs: impl Into<PathBuf>) -> Self {
        Self { bpffs: bpffs.into() }
    }

    /// Mounts a bpffs if there is none and makes the directories.
    ///
    /// # Errors
    /// If that fails; mounting needs CAP_SYS_ADMIN.
    pub fn prepare(&self) -> Result<(), Error> {
        fs::create_dir_all(&self.bpffs).map_err(Error::path("create", &self.bpffs))?;
        if !is_bpffs(&self.bpffs) {
            mount(Some("bpf"), &self.bpffs, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
                .map_err(io::Error::from)
                .map_err(Error::path("mount a bpffs on", &self.bpffs))?;
            tracing::info!(path = %self.bpffs.display(), "mounted a bpffs");
        }
        for directory in [self.state(), self.links()] {
            fs::create_dir_all(&directory).map_err(Error::path("create", &directory))?;
        }
        Ok(())
    }

    /// Claims the directory, which must be there.
    ///
    /// # Errors
    /// [`Error::InUse`] if another process has the claim.
    pub fn claim(&self) -> Result<Claim, Error> {
        let root = self.root();
        let directory = File::open(&root).map_err(Error::path("open", &root))?;
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Claim { _lock: lock }),
            Err((_, Errno::EWOULDBLOCK)) => Err(Error::InUse { path: root }),
            Err((_, error)) => Err(Error::path("lock", root)(error.into())),
        }
    }

    /// Whether this process may look at what is pinned. Nothing pinned is an answer too.
    ///
    /// # Errors
    /// If it may not.
    pub fn readable(&self) -> Result<(), Error> {
        self.names().map(drop)
    }

    /// Everything of ours is below it.
    pub fn root(&self) -> PathBuf {
        self.bpffs.join("sheave")
    }

    /// Maps that the programs write.
    pub fn state(&self) -> PathBuf {
        self.root().join(format!("state-v{LAYOUT_VERSION}"))
    }

    /// Links.
    pub fn links(&self) -> PathBuf {
        self.root().join("links")
    }

    /// A directory that is there once classic filters may be on devices: they have no pins.
    pub fn filters(&self) -> PathBuf {
        self.root().join("filters")
    }

    /// Maps that the agent writes, of one generation.
    pub fn tables(&self, generation: u32) -> PathBuf {
        self.root().join(format!("tables-v{LAYOUT_VERSION}-{generation}"))
    }

    /// The place of tables that are not complete yet. Nothing adopts what lies there. (A bpffs takes no dots in names.)
    pub fn filling(&self, generation: u32) -> PathBuf {
        self.root().join(format!("tables-v{LAYOUT_VERSION}-{generation}-filling"))
    }

    /// The newest generation of this layout that is pinned. It is the one to adopt: it got its name when it had all that
    /// the one before had, and only after that a program that uses it was attached. An older one beside it means that an
    /// agent went before it removed that one.
    ///
    /// # Errors
    /// If the directory exists but cannot be read.
    pub fn newest(&self) -> Result<Option<u32>, Error> {
        let prefix = format!("tables-v{LAYOUT_VERSION}-");
        let names = self.names()?;
        Ok(names.iter().filter_map(|name| name.strip_prefix(&prefix)?.parse().ok()).max())
    }

    /// An empty directory for new tables of a generation that is not complete yet; what an interrupted move left there
    /// is removed.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn begin(&self, generation: u32) -> Result<PathBuf, Error> {
        self.abandon(generation)?;
        let path = self.filling(generation);
        fs::create_dir_all(&path).map_err(Error::path("create", &path))?;
        Ok(path)
    }

    /// Removes tables that did not become complete, if there are any.
    ///
    /// # Errors
    /// If they cannot be removed.
    pub fn abandon(&self, generation: u32) -> Result<(), Error> {
        remove_directory(&self.filling(generation))
    }

    /// The tables are complete: from here on they are the ones to adopt.
    ///
    /// # Errors
    /// If they cannot be renamed.
    pub fn complete(&self, generation: u32) -> Result<(), Error> {
        let (from, to) = (self.filling(generation), self.tables(generation));
        fs::rename(&from, &to).map_err(Error::path("rename", from))
    }

    /// Removes every generation and state of other layouts, and every other generation of this one: nothing uses them
    /// once the links are updated.
    ///
    /// # Errors
    /// If something cannot be removed.
    pub fn remove_others(&self, generation: u32) -> Result<(), Error> {
        let keep = [self.state(), self.links(), self.tables(generation)];
        for name in self.names()? {
            let path = self.root().join(&name);
            if !keep.contains(&path) && (name.starts_with("tables-v") || name.starts_with("state-v")) {
                tracing::info!(path = %path.display(), "removing tables of another generation");
                fs::remove_dir_all(&path).map_err(Error::path("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Whether anything is pinned.
    ///
    /// # Errors
    /// If that cannot be told: not `exists`, by which whoever may not look would be told that there is nothing.
    pub fn exist(&self) -> Result<bool, Error> {
        let root = self.root();
        root.try_exists().map_err(Error::path("look for", &root))
    }

    /// Removes everything: links first, so that no program runs on half of its maps. Whoever has the claim may: an agent
    /// that runs would go on without its pins, and the next one could not adopt anything.
    ///
    /// # Errors
    /// If something cannot be removed.
    pub fn remove_all(&self, _claim: Claim) -> Result<(), Error> {
        devices::remove_all_filters(self)?;
        self.detach()?;
        remove_directory(&self.root())
    }

    /// Takes the programs off the cgroup.
    ///
    /// # Errors
    /// If a link's pin cannot be removed.
    pub fn detach(&self) -> Result<(), Error> {
        for link in fs::read_dir(self.links()).into_iter().flatten().flatten() {
            // The removal below detaches too, only later; before 5.9 it is the only way.
            let _ = sys::object_get(&link.path()).and_then(|link| sys::link_detach(link.as_fd()));
        }
        remove_directory(&self.links())
    }

    fn names(&self) -> Result<Vec<String>, Error> {
        let root = self.root();
        let entries = match fs::read_dir(&root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::path("read", &root)(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::path("read", &root))?;
            names.extend(entry.file_name().into_string());
        }
        Ok(names)
    }
}

/// One that is not there is as good as removed.
fn remove_directory(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::path("remove", path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type().0 == BPF_FS_MAGIC)
}
