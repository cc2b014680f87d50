//! A list of [`Problem`]s of one object while it is read.

use std::fmt::Display;

use super::{ObjectKey, Problem};

/// More than this many are counted, not listed: 10,000 bad endpoints must not make 10,000 log lines.
const LISTED: usize = 20;

/// Collects what cannot be used of one object.
pub(super) struct Problems {
    object: String,
    list: Vec<Problem>,
    more: usize,
}

impl Problems {
    pub(super) fn of(kind: &str, key: &ObjectKey) -> Self {
        Self { object: format!("{kind} {key}"), list: Vec::new(), more: 0 }
    }

    /// Notes one. The arguments are only formatted if it is to be listed.
    pub(super) fn add(&mut self, field: impl Display, message: impl Display) {
        if self.list.len() < LISTED {
            self.list.push(Problem {
                object: self.object.clone(),
                field: field.to_string(),
                message: message.to_string(),
            });
        } else {
            self.more += 1;
        }
    }

    pub(super) fn finish(mut self) -> Vec<Problem> {
        if self.more > 0 {
            self.list.push(Problem {
                object: self.object,
                field: String::new(),
                message: format!("{} more problems are not listed", self.more),
            });
        }
        self.list
    }
}

/// A port number as an object gives it, if it is one.
pub(crate) fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|&port| port != 0)
}

/// `TCP` if absent or empty (S8, E4); `None` for one that does not exist.
pub(crate) fn protocol(name: Option<&str>) -> Option<super::Protocol> {
    match name {
        None | Some("" | "TCP") => Some(super::Protocol::Tcp),
        Some("UDP") => Some(super::Protocol::Udp),
        Some("SCTP") => Some(super::Protocol::Sctp),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_problems_are_counted_not_listed() {
        let mut problems = Problems::of("Service", &ObjectKey::new("ns", "a"));
        for i in 0..10_000 {
            problems.add(format_args!("spec.externalIPs[{i}]"), "bad");
        }
        let list = problems.finish();
        assert_eq!(list.len(), LISTED + 1);
        assert_eq!(list[0].object, "Service ns/a");
        assert_eq!(list[LISTED].message, "9980 more problems are not listed");
    }
}
