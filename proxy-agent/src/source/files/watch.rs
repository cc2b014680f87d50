//! Follows a directory of manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::mpsc::UnboundedSender;
use tracing::{debug, error, info, warn};

use super::Error;
use super::document::{Broken, Parsed, parse};
use super::store::Store;
use crate::object::{Batch, Change};
use crate::parallel;

/// Larger files are named and not read: their objects as values would take some twenty times as much memory.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Each may be as large as that, and takes memory while it is read.
const READ_AT_ONCE_MAX: usize = 4;

/// How often to look for what inotify does not tell: the directory replaced by another, a link's target rewritten.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// How long to wait for word of a file that is gone: it may have another name now. (A rename is two events.)
const RENAME_WAIT_MS: u8 = 1;
/// So many times in a row: whoever renames without end does not hold up everything else.
const RENAMES: u32 = 100;

/// `CLOSE_WRITE`, not `MODIFY`: a file that is being written is half a file. `CREATE` is for links.
const EVENTS: WatchMask = WatchMask::CLOSE_WRITE
    .union(WatchMask::MOVED_FROM)
    .union(WatchMask::MOVED_TO)
    .union(WatchMask::CREATE)
    .union(WatchMask::DELETE)
    .union(WatchMask::ATTRIB)
    .union(WatchMask::DELETE_SELF)
    .union(WatchMask::MOVE_SELF)
    .union(WatchMask::ONLYDIR);

/// What tells one content of a file from another without reading it.
type Stamp = (u64, u64, u64, i64, i64);

fn stamp(metadata: &Metadata) -> Stamp {
    (metadata.dev(), metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec())
}

/// What is known of a file besides its objects.
struct Seen {
    /// Of the bytes last read, if they could be: the same bytes need no second look.
    content: Option<u64>,
    /// Of a link's target, which may change without an event here.
    link: Option<Stamp>,
}

/// Files as they were found; `None`: gone. Of one that is there twice the later state counts.
type Updates = Vec<(String, Option<Parsed>)>;

/// The directory and what is in it.
pub(super) struct Files {
    dir: PathBuf,
    seen: BTreeMap<String, Seen>,
    store: Store,
}

impl Files {
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), seen: BTreeMap::new(), store: Store::default() }
    }

    /// Reads all files of the directory for the first time: what they hold, as complete lists.
    pub(super) fn start(&mut self) -> Result<Vec<Change>, Error> {
        let updates = self.look(self.names()?);
        self.store.fill(updates);
        Ok(self.lists())
    }

    pub(super) fn lists(&self) -> Vec<Change> {
        self.store.lists()
    }

    /// Reads all files of the directory again.
    pub(super) fn scan(&mut self) -> Result<Vec<Change>, Error> {
        let updates = self.look(self.names()?);
        Ok(self.take(updates))
    }

    /// Those that there are, and were.
    fn names(&self) -> Result<BTreeSet<String>, Error> {
        let list = |source| Error::List { dir: self.dir.clone(), source };
        let mut names: BTreeSet<String> = self.store.names().map(str::to_owned).collect();
        for entry in fs::read_dir(&self.dir).map_err(list)? {
            let name = entry.map_err(list)?.file_name();
            match name.to_str() {
                Some(name) if is_manifest(name) => {
                    names.insert(name.to_owned());
                }
                Some(_) => {}
                None => warn!(dir = %self.dir.display(), ?name, "file name is not UTF-8; ignored"),
            }
        }
        Ok(names)
    }

    /// Reads files of the directory, or finds that they are gone. Nothing follows from it before [`Self::take`].
    fn look(&mut self, names: impl IntoIterator<Item = String>) -> Updates {
        let known = |name: &str| self.seen.get(name).and_then(|seen| seen.content);
        let found = parallel::map(names.into_iter().collect(), READ_AT_ONCE_MAX, |name: String| {
            let found = find(&self.dir, &name, known(&name));
            (name, found)
        });
        let mut updates = Vec::new();
        for (name, found) in found {
            match found {
                Found::Nothing => {
                    if self.seen.remove(&name).is_some() {
                        updates.push((name, None));
                    }
                }
                Found::Same { link } => {
                    if let Some(seen) = self.seen.get_mut(&name) {
                        seen.link = link;
                    }
                }
                Found::News(seen, parsed) => {
                    self.seen.insert(name.clone(), seen);
                    updates.push((name, Some(parsed)));
                }
            }
        }
        updates
    }

    /// What is different now, all at once.
    fn take(&mut self, updates: Updates) -> Vec<Change> {
        if updates.is_empty() { Vec::new() } else { self.store.update(updates) }
    }

    /// Links whose targets changed.
    fn changed_links(&self) -> Vec<String> {
        self.seen
            .iter()
            .filter(|(name, seen)| {
                seen.link.is_some_and(|old| {
                    fs::metadata(self.dir.join(name)).map_or(true, |metadata| stamp(&metadata) != old)
                })
            })
            .map(|(name, _)| name.clone())
            .collect()
    }
}

/// What there is under a name.
enum Found {
    Nothing,
    /// The same bytes as before.
    Same {
        link: Option<Stamp>,
    },
    News(Seen, Parsed),
}

/// `known`: the content of a file that was read before.
fn find(dir: &Path, name: &str, known: Option<u64>) -> Found {
    let path = dir.join(name);
    let is_link = fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_symlink());
    match read_file(&path) {
        Ok(None) => Found::Nothing,
        Ok(Some((bytes, metadata))) => {
            let mut hasher = DefaultHasher::new();
            bytes.hash(&mut hasher);
            let content = Some(hasher.finish());
            let link = is_link.then(|| stamp(&metadata));
            if content == known {
                return Found::Same { link };
            }
            Found::News(Seen { content, link }, parse(name, &bytes))
        }
        Err(message) => {
            let broken = vec![Broken::file(name, message)];
            Found::News(Seen { content: None, link: None }, Parsed { entries: Vec::new(), broken })
        }
    }
}

/// Hidden files are editors' and ConfigMap volumes' own.
fn is_manifest(name: &str) -> bool {
    !name.starts_with('.') && [".yaml", ".yml", ".json"].iter().any(|end| name.ends_with(end))
}

/// The bytes of a file; `None` if there is none of that name, or no regular one.
fn read_file(path: &Path) -> Result<Option<(Vec<u8>, Metadata)>, String> {
    let failed = |error: io::Error| format!("cannot be read: {error}");
    // A pipe would block for ever when opened, a device when read.
    let open = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let file = match open {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        // A socket.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        debug!(path = %path.display(), "not a regular file; ignored");
        return Ok(None);
    }
    let mut bytes =
        Vec::with_capacity(usize::try_from(metadata.len().min(MAX_FILE_BYTES)).unwrap_or_default());
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("larger than {} MiB", MAX_FILE_BYTES >> 20));
    }
    Ok(Some((bytes, metadata)))
}

/// What a batch of events says.
#[derive(Default)]
struct Events {
    names: BTreeSet<String>,
    /// Events were lost: look at everything.
    scan: bool,
    /// Something was replaced that links may lead through (`..data` of a ConfigMap volume).
    links: bool,
    /// The directory itself went.
    dir_gone: bool,
}

/// Whether a file that just appeared is all there: a link is, what is being written is not (`CLOSE_WRITE` follows).
fn is_complete(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink() || metadata.nlink() > 1)
}

struct Watch {
    path: PathBuf,
    inotify: Inotify,
    descriptor: WatchDescriptor,
    /// Device and inode of the directory that is watched.
    dir: (u64, u64),
}

impl Watch {
    fn new(dir: &Path) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let descriptor = inotify.watches().add(dir, EVENTS)?;
        // After the watch is there: if the directory is replaced in between, the next look notices.
        let metadata = fs::metadata(dir)?;
        Ok(Self { path: dir.to_owned(), inotify, descriptor, dir: (metadata.dev(), metadata.ino()) })
    }

    /// Adds what has happened since to `events`.
    fn drain(&mut self, events: &mut Events) -> io::Result<()> {
        let mut buffer = [0; 16 << 10];
        loop {
            let batch = match self.inotify.read_events(&mut buffer) {
                Ok(batch) => batch,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for event in batch {
                if event.mask.contains(EventMask::Q_OVERFLOW) {
                    events.scan = true;
                    continue;
                }
                if event.wd != self.descriptor {
                    continue;
                }
                let gone =
                    EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED | EventMask::UNMOUNT;
                events.dir_gone |= event.mask.intersects(gone);
                let Some(name) = event.name.and_then(|name| name.to_str()) else {
                    continue;
                };
                let created = event.mask.contains(EventMask::CREATE);
                if !is_manifest(name) {
                    events.links |= created || event.mask.contains(EventMask::MOVED_TO);
                } else if !created || is_complete(&self.path.join(name)) {
                    events.names.insert(name.to_owned());
                }
            }
        }
    }
}

/// Sends lists, then changes, until the receiver or the other end of `stop` is gone.
pub(super) fn follow(dir: &Path, tx: &UnboundedSender<Batch>, stop: &UnixStream) -> Result<(), Error> {
    let failed = |source| Error::Watch { dir: dir.to_owned(), source };
    // Watch first, read then: what changes in between is read twice rather than missed.
    let mut watch = Watch::new(dir).map_err(failed)?;
    let mut files = Files::new(dir);
    if !send(tx, files.start()?) {
        return Ok(());
    }
    let mut dir_missing = false;
    // What came while files were read, besides their names.
    let mut more = Events::default();
    loop {
        let timeout = PollTimeout::try_from(LOOK_AGAIN).unwrap_or(PollTimeout::MAX);
        let Some(woken) = wait(&watch, Some(stop), timeout).map_err(failed)? else {
            return Ok(());
        };
        let mut events = std::mem::take(&mut more);
        if woken {
            watch.drain(&mut events).map_err(failed)?;
        }
        if !woken || events.dir_gone {
            let now = fs::metadata(dir).map(|metadata| (metadata.dev(), metadata.ino()));
            if now.as_ref().ok() != Some(&watch.dir) {
                match now.and_then(|_| Watch::new(dir)) {
                    Ok(new) => {
                        info!(dir = %dir.display(), "the manifest directory was replaced; reading the new one");
                        watch = new;
                        dir_missing = false;
                        events.scan = true;
                    }
                    // A directory that is not there is not an empty one.
                    Err(error) => {
                        if !dir_missing {
                            error!(dir = %dir.display(), %error, "the manifest directory is gone; its last state stays in force");
                        }
                        dir_missing = true;
                    }
                }
            }
            events.links = true;
        }
        if dir_missing {
            if tx.is_closed() {
                return Ok(());
            }
            continue;
        }
        if events.links {
            events.names.extend(files.changed_links());
        }
        let changes = if events.scan {
            match files.scan() {
                Ok(changes) => changes,
                Err(error) => {
                    error!(error = &error as &dyn std::error::Error, "the last state stays in force");
                    // Look at the directory again from the start.
                    watch.dir = (0, 0);
                    continue;
                }
            }
        } else {
            let mut updates = files.look(events.names);
            // A file that was renamed and again before it could be read is under neither of the names that are known. So
            // nobody hears that it is gone while there is news that may tell where it is.
            for _ in 0..RENAMES {
                let gone = updates.iter().any(|(_, parsed)| parsed.is_none());
                let news = gone
                    && wait(&watch, None, PollTimeout::from(RENAME_WAIT_MS)).map_err(failed)? == Some(true);
                if !news {
                    break;
                }
                watch.drain(&mut more).map_err(failed)?;
                updates.extend(files.look(std::mem::take(&mut more.names)));
            }
            files.take(updates)
        };
        if !send(tx, changes) || tx.is_closed() {
            return Ok(());
        }
    }
}

/// Whether there are events, within the time; `None` if the other end of `stop` is gone.
fn wait(watch: &Watch, stop: Option<&UnixStream>, timeout: PollTimeout) -> io::Result<Option<bool>> {
    let mut fds = vec![PollFd::new(watch.inotify.as_fd(), PollFlags::POLLIN)];
    fds.extend(stop.map(|stop| PollFd::new(stop.as_fd(), PollFlags::POLLIN)));
    match poll(&mut fds, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ready = |fd: Option<&PollFd<'_>>| fd.and_then(PollFd::any).unwrap_or(false);
    Ok(if ready(fds.get(1)) { None } else { Some(ready(fds.first())) })
}

/// False if nobody listens any more.
fn send(tx: &UnboundedSender<Batch>, changes: Batch) -> bool {
    changes.is_empty() || tx.send(changes).is_ok()
}
