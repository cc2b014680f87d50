//! What goes wrong with the API server: said once, shown in `sheave status`, and for how long to wait.

use std::time::{Duration, Instant};

use ::kube::runtime::utils::Backoff;
use ::kube::runtime::watcher::{self, DefaultBackoff};
use tracing::{debug, info, warn};

use super::checked::Slim;

/// The errors since the last answer.
pub(super) struct Trouble {
    plural: String,
    /// What the proxy does without this kind.
    loss: &'static str,
    backoff: DefaultBackoff,
    /// What was said last, and when: once is enough.
    said: Option<(String, Instant)>,
    refused_watches: u32,
    /// The last error was that watching is not allowed: then a list that is allowed is no sign that it is over.
    forbidden_watch: bool,
}

/// What follows from an error.
pub(super) struct Next {
    /// How long to wait.
    pub(super) wait: Duration,
    /// Whether to list again.
    pub(super) again: bool,
    /// What is wrong, if that was not said yet.
    pub(super) news: Option<String>,
}

impl Trouble {
    /// A reason that goes on for this long is logged again.
    const LOG_AGAIN: Duration = Duration::from_secs(300);
    /// So many watches in a row refused: the version that they start from is not one that the server can serve.
    const REFUSED_WATCHES: u32 = 3;
    /// A watch that is not allowed is refused at once; one that has not been for so long is allowed again.
    const WATCH_ALLOWED_AFTER: Duration = Duration::from_secs(10);

    pub(super) fn new<T: Slim>() -> Self {
        Self {
            plural: T::plural(),
            loss: T::LOSS,
            backoff: DefaultBackoff::default(),
            said: None,
            refused_watches: 0,
            forbidden_watch: false,
        }
    }

    /// Notes an error.
    pub(super) fn on(&mut self, error: &watcher::Error) -> Next {
        let mut reason = reason(verb(error), &self.plural, error);
        let forbidden = is_forbidden(error);
        self.forbidden_watch = forbidden && verb(error) == WATCH;
        if forbidden {
            reason = format!("{reason}; {}", self.loss);
        }
        let (known, recent) = match &self.said {
            Some((last, when)) => (*last == reason, when.elapsed() < Self::LOG_AGAIN),
            None => (false, false),
        };
        if known && recent {
            debug!(resource = self.plural, reason, "the API server still cannot be followed");
        } else {
            warn!(
                resource = self.plural,
                reason, "cannot follow the API server; the last state stays in force, trying again"
            );
            self.said = Some((reason.clone(), Instant::now()));
        }
        // The watcher lists again by itself when a running watch says 410. When a watch cannot even start it asks for
        // the same version for ever: one that is too old, or, after a restore of etcd, too new.
        let again = match error {
            watcher::Error::WatchStartFailed(::kube::Error::Api(status)) => match status.code {
                410 => {
                    // It is there, and only wants to be asked for all: after an outage the wait would be the longest.
                    self.backoff.reset();
                    true
                }
                // Busy or out of order; a list would be more work for it, and no better. But 504 is "too new".
                429 | 500..=503 => false,
                _ => {
                    self.refused_watches += 1;
                    self.refused_watches >= Self::REFUSED_WATCHES
                }
            },
            watcher::Error::WatchStartFailed(_)
            | watcher::Error::InitialListFailed(_)
            | watcher::Error::WatchError(_)
            | watcher::Error::WatchFailed(_)
            | watcher::Error::NoResourceVersion => false,
        };
        if again {
            self.refused_watches = 0;
        }
        let wait = self.backoff.next().unwrap_or(Duration::from_secs(30));
        Next { wait, again, news: (!known).then_some(reason) }
    }

    /// If nothing happens for so long, the trouble is over.
    pub(super) fn over_after(&self) -> Option<Duration> {
        self.forbidden_watch.then_some(Self::WATCH_ALLOWED_AFTER)
    }

    /// A list is complete. Returns whether this ends trouble.
    pub(super) fn listed(&mut self) -> bool {
        !self.forbidden_watch && self.over()
    }

    /// The server answers. Returns whether there was trouble.
    pub(super) fn over(&mut self) -> bool {
        self.refused_watches = 0;
        self.forbidden_watch = false;
        let had = self.said.take().is_some();
        if had {
            info!(resource = self.plural, "the API server answers again");
            self.backoff.reset();
        }
        had
    }
}

const WATCH: &str = "watch";

fn verb(error: &watcher::Error) -> &'static str {
    match error {
        watcher::Error::InitialListFailed(_) | watcher::Error::NoResourceVersion => "list",
        watcher::Error::WatchStartFailed(_)
        | watcher::Error::WatchError(_)
        | watcher::Error::WatchFailed(_) => WATCH,
    }
}

fn is_forbidden(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error) => {
            if let ::kube::Error::Api(status) = error {
                status.code == 403
            } else {
                false
            }
        }
        watcher::Error::WatchError(status) => status.code == 403,
        watcher::Error::WatchFailed(_) | watcher::Error::NoResourceVersion => false,
    }
}

/// What was tried, on what, and why it failed: of a status, the server's own words, which name verb, resource and user.
pub(super) fn reason(verb: &str, plural: &str, error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(::kube::Error::Api(status)) = error.downcast_ref()
            && !status.message.is_empty()
        {
            return format!("{verb} {plural}: {} ({} {})", status.message, status.code, status.reason);
        }
        cause = error.source();
    }
    format!("{verb} {plural}: {}", chain(error))
}

/// An error with its causes.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Many errors repeat their cause.
        if !out.contains(&text) {
            out.push_str(": ");
            out.push_str(&text);
        }
        cause = error.source();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::kube::core::Status;

    /// Q7: what comes back after an outage is listed soon, although the outage was long.
    #[test]
    fn q7_a_server_that_is_back_is_asked_soon() {
        let mut trouble = Trouble::new::<crate::object::Service>();
        let start_failed = |code| {
            let status = Status { code, reason: "Expired".to_owned(), ..Status::default() };
            watcher::Error::WatchStartFailed(::kube::Error::Api(status.boxed()))
        };
        let longest = (0..10).map(|_| trouble.on(&start_failed(503)).wait).max();
        assert!(longest > Some(Duration::from_secs(15)), "{longest:?}");
        let next = trouble.on(&start_failed(410));
        assert!(next.again && next.wait < Duration::from_secs(3), "{:?}", next.wait);
        // If that list fails too, the waits grow as before.
        assert!((0..10).map(|_| trouble.on(&start_failed(503)).wait).max() > Some(Duration::from_secs(15)));
    }
}
