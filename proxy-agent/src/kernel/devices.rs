//! The hooks of the packet path: two tcx links on each device, pinned as `links/PROGRAM-IFINDEX`; or two classic filters,
//! which need no pin ([`super::filters`]).
//!
//! A link belongs to the device that it was made for, not to its index: when the device goes, the kernel says index 0,
//! and another device that gets the index later does not get the hook. Filters go with their device.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use aya::programs::{SchedClassifier, TcAttachType};
use aya_obj::generated::bpf_attach_type::{self, BPF_TCX_EGRESS, BPF_TCX_INGRESS};
use nix::net::if_::if_nameindex;

use super::filters::{Direction, Filters};
use super::{Error, Loaded, Pins, sys};

/// Where programs go, in the order of attachment: the way back first. By the name of the program, which is also that of
/// the pin and of the filter, whether the device has link headers or not.
const HOOKS: [(&str, bpf_attach_type, Direction); 2] =
    [("tc_egress", BPF_TCX_EGRESS, Direction::Egress), ("tc_ingress", BPF_TCX_INGRESS, Direction::Ingress)];

/// What the frames of a device begin with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkHeader {
    /// An Ethernet header.
    Ethernet,
    /// None: an IP header.
    Bare,
}

impl LinkHeader {
    /// The program for a direction.
    const fn program(self, direction: Direction) -> &'static str {
        match (self, direction) {
            (Self::Ethernet, Direction::Ingress) => "tc_ingress",
            (Self::Ethernet, Direction::Egress) => "tc_egress",
            (Self::Bare, Direction::Ingress) => "tc_ingress_bare",
            (Self::Bare, Direction::Egress) => "tc_egress_bare",
        }
    }
}

/// How programs are put on devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hooks {
    /// By links, of kernels from 6.6 on.
    Tcx,
    /// By classic filters.
    Clsact,
}

impl Hooks {
    /// What this kernel has.
    pub fn of_this_kernel() -> Self {
        // Of any device: the loopback device is always there.
        let asked = SchedClassifier::query_tcx("lo", TcAttachType::Ingress);
        if asked.is_ok() { Self::Tcx } else { Self::Clsact }
    }

    /// Name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

impl Loaded {
    /// Puts both programs on a device, or replaces those that a former run left: at no moment is a hook without a program.
    /// Returns how many hooks had to be made; `None`: there is no such device (any more). Where a former run hooked in
    /// the other way, a packet meets both programs for a moment, the second of which leaves it alone.
    ///
    /// # Errors
    /// If the kernel refuses; tcx came with 6.6.
    pub fn hook(&self, device: u32, header: LinkHeader, how: Hooks) -> Result<Option<usize>, Error> {
        match how {
            Hooks::Tcx => {
                let made = self.link(device, header)?;
                if made.is_some() && has_filters(self.pins()) {
                    remove_filters(device)?;
                }
                Ok(made)
            }
            Hooks::Clsact => {
                let made = self.filter(device, header)?;
                if made.is_some() {
                    remove_links(self.pins(), device)?;
                }
                Ok(made)
            }
        }
    }

    fn filter(&self, device: u32, header: LinkHeader) -> Result<Option<usize>, Error> {
        let marker = self.pins().filters();
        fs::create_dir_all(&marker).map_err(Error::path("create", &marker))?;
        let filters = open_filters()?;
        let mut made = 0;
        for (name, _, direction) in HOOKS {
            let program = self.classifier(header.program(direction))?;
            let fd =
                program.fd().map_err(|source| Error::Program { action: "use", program: name, source })?;
            let failed = |source| Error::Link { action: "make", program: name, source };
            made += usize::from(!filters.has(device, direction, name).map_err(failed)?);
            match filters.put(device, direction, name, fd.as_fd()) {
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
                result => result.map_err(failed)?,
            }
        }
        Ok(Some(made))
    }

    fn link(&self, device: u32, header: LinkHeader) -> Result<Option<usize>, Error> {
        let mut made = 0;
        for (name, at, direction) in HOOKS {
            let pin = pin(self.pins(), name, device);
            let program = self.classifier(header.program(direction))?;
            let fd =
                program.fd().map_err(|source| Error::Program { action: "use", program: name, source })?;
            if let Some(link) = open(&pin, name)? {
                if device_of(&link, name)? == device {
                    match sys::link_update(link.as_fd(), fd.as_fd()) {
                        Ok(()) => continue,
                        // The device went in between.
                        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                        Err(source) => return Err(Error::Link { action: "update", program: name, source }),
                    }
                }
                remove(&pin, name)?;
            }
            let link = match sys::link_create_tcx(fd.as_fd(), device, at) {
                Ok(link) => link,
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
                Err(source) => return Err(Error::Link { action: "make", program: name, source }),
            };
            let failed = |source| Error::Link { action: "pin", program: name, source };
            sys::object_pin(link.as_fd(), &pin).map_err(failed)?;
            made += 1;
        }
        Ok(Some(made))
    }
}

fn open_filters() -> Result<Filters, Error> {
    Filters::open().map_err(Error::path("open", "the filters of devices (rtnetlink)"))
}

/// Whether there may be filters: whoever makes one leaves a sign of it first.
fn has_filters(pins: &Pins) -> bool {
    pins.filters().exists()
}

/// Takes both hooks off a device, of either kind; one that has none is as good as unhooked.
///
/// # Errors
/// If a pin or a filter cannot be removed.
pub fn unhook(pins: &Pins, device: u32) -> Result<(), Error> {
    if has_filters(pins) {
        remove_filters(device)?;
    }
    remove_links(pins, device)
}

/// As [`unhook`], of every device, before the pins are removed.
///
/// # Errors
/// If a filter cannot be removed.
pub(super) fn remove_all_filters(pins: &Pins) -> Result<(), Error> {
    if !has_filters(pins) {
        return Ok(());
    }
    devices()?.into_iter().try_for_each(remove_filters)
}

fn remove_filters(device: u32) -> Result<(), Error> {
    let filters = open_filters()?;
    HOOKS.iter().rev().try_for_each(|(name, _, direction)| {
        let failed = |source| Error::Link { action: "remove", program: name, source };
        filters.remove(device, *direction).map_err(failed)
    })
}

/// The way in first.
fn remove_links(pins: &Pins, device: u32) -> Result<(), Error> {
    HOOKS.iter().rev().try_for_each(|(name, ..)| remove(&pin(pins, name, device), name))
}

/// Indices of all devices.
fn devices() -> Result<Vec<u32>, Error> {
    let list = if_nameindex().map_err(|error| Error::path("list", "the network devices")(error.into()))?;
    Ok(list.iter().map(|device| device.index()).collect())
}

/// Indices with a pin or a filter of ours, and whether both hooks are on a device that has this index still.
///
/// # Errors
/// If they cannot be read.
pub fn hooked(pins: &Pins) -> Result<BTreeMap<u32, bool>, Error> {
    let mut hooked = linked(pins)?;
    if has_filters(pins) {
        let filters = open_filters()?;
        for device in devices()? {
            let mut found = 0;
            for (name, _, direction) in HOOKS {
                let failed = |source| Error::Link { action: "inspect", program: name, source };
                found += usize::from(filters.has(device, direction, name).map_err(failed)?);
            }
            if found > 0 {
                *hooked.entry(device).or_default() |= found == HOOKS.len();
            }
        }
    }
    Ok(hooked)
}

fn linked(pins: &Pins) -> Result<BTreeMap<u32, bool>, Error> {
    let mut devices: BTreeMap<u32, usize> = BTreeMap::new();
    let directory = pins.links();
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(Error::path("read", &directory)(error)),
    };
    for entry in entries {
        let entry = entry.map_err(Error::path("read", &directory))?;
        let file = entry.file_name();
        let Some((name, device)) = file.to_str().and_then(parse) else { continue };
        let on = match open(&entry.path(), name)? {
            Some(link) => device_of(&link, name)? == device,
            None => false,
        };
        *devices.entry(device).or_default() += usize::from(on);
    }
    Ok(devices.into_iter().map(|(device, hooks)| (device, hooks == HOOKS.len())).collect())
}

fn parse(file: &str) -> Option<(&'static str, u32)> {
    let (name, device) = file.rsplit_once('-')?;
    let (name, ..) = HOOKS.iter().find(|(known, ..)| *known == name)?;
    Some((name, device.parse().ok()?))
}

fn pin(pins: &Pins, name: &str, device: u32) -> PathBuf {
    pins.links().join(format!("{name}-{device}"))
}

fn open(pin: &Path, name: &'static str) -> Result<Option<std::os::fd::OwnedFd>, Error> {
    match sys::object_get(pin) {
        Ok(link) => Ok(Some(link)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Link { action: "open", program: name, source }),
    }
}

fn device_of(link: &impl AsFd, name: &'static str) -> Result<u32, Error> {
    sys::link_device(link.as_fd()).map_err(|source| Error::Link { action: "inspect", program: name, source })
}

/// Detaches at once; without that the kernel's worker does it a moment after the pin has gone.
fn remove(pin: &Path, name: &'static str) -> Result<(), Error> {
    let Some(link) = open(pin, name)? else { return Ok(()) };
    let _ = sys::link_detach(link.as_fd());
    fs::remove_file(pin).map_err(|source| Error::Link { action: "remove", program: name, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_told_apart() {
        assert_eq!(parse("tc_ingress-12"), Some(("tc_ingress", 12)));
        assert_eq!(parse("tc_egress-4294967295"), Some(("tc_egress", u32::MAX)));
        for other in ["sock_connect4", "tc_ingress", "tc_ingress-", "tc_other-1", "tc_ingress-x"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
