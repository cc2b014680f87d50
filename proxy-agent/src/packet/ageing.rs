//! Ageing of `FLOW_FILTER` and `SNAT_PORTS`, so that bystanders go on being spared however many connections there were.
//!
//! A byte goes from [`FRESH`], which the programs write before they make an entry, to [`SEEN`] to 0, a step for each walk
//! through the tables that found no entry of its place. Only a byte that is still as the walk before left it is cleared,
//! so:
//!
//! - Whoever wrote it had done so before that walk's end, a walk's interval ago, and its entry was there when the next walk
//!   began (a program is done within the blink of an eye): this walk would have found it.
//! - Whoever writes it during or after the walk makes it [`FRESH`] again, which the exchange does not touch; or writes it
//!   after the exchange.

use proxy_common::abi::packet::{FLOW_PLACES, FRESH, SEEN, SNAT_PLACES, flow_place, snat_place};
use proxy_common::abi::{FlowKey, SnatKey};

use crate::kernel::mapping::Mapping;
use crate::kernel::programs::open_pinned;
use crate::kernel::{self, Pins};

/// Places of a filter, a bit each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Places<const N: usize>(Vec<u64>);

impl<const N: usize> Default for Places<N> {
    fn default() -> Self {
        Self(vec![0; N.div_ceil(64)])
    }
}

impl<const N: usize> Places<N> {
    pub(super) fn insert(&mut self, place: usize) {
        if let Some(word) = self.0.get_mut(place / 64) {
            *word |= 1 << (place % 64);
        }
    }

    pub(super) fn contains(&self, place: usize) -> bool {
        self.0.get(place / 64).is_some_and(|word| word >> (place % 64) & 1 != 0)
    }
}

/// Which places of the filters entries have.
#[derive(Debug, Default)]
pub(super) struct InUse {
    flows: Places<FLOW_PLACES>,
    snat: Places<SNAT_PLACES>,
}

impl InUse {
    pub(super) fn flow(&mut self, key: &FlowKey) {
        self.flows.insert(flow_place(&key.client, key.port));
    }

    pub(super) fn snat(&mut self, key: &SnatKey) {
        if key.is_inside() {
            self.flows.insert(flow_place(&key.snat, key.snat_port));
        } else {
            self.snat.insert(snat_place(key.snat_port));
        }
    }
}

/// The filters.
pub(super) struct Filters {
    flows: Mapping<[u8; FLOW_PLACES]>,
    snat: Mapping<[u8; SNAT_PLACES]>,
}

impl Filters {
    pub(super) fn open(pins: &Pins) -> Result<Self, kernel::Error> {
        Ok(Self { flows: mapping(pins, "FLOW_FILTER")?, snat: mapping(pins, "SNAT_PORTS")? })
    }

    /// After a walk through all tables. Between its start and the last call must lie more than a program takes.
    pub(super) fn age(&mut self, in_use: &InUse) {
        age(&mut self.flows, &in_use.flows);
        age(&mut self.snat, &in_use.snat);
    }
}

fn mapping<const N: usize>(pins: &Pins, name: &'static str) -> Result<Mapping<[u8; N]>, kernel::Error> {
    let map = open_pinned(&pins.state(), name)?;
    Mapping::new(map.fd(), 1, true).map_err(kernel::Error::path("map into memory", pins.state().join(name)))
}

fn age<const N: usize>(bytes: &mut Mapping<[u8; N]>, in_use: &Places<N>) {
    for place in 0..N {
        let (from, to) = match bytes.load(place) {
            0 => continue,
            SEEN if in_use.contains(place) => continue,
            SEEN => (SEEN, 0),
            _ => (FRESH, SEEN),
        };
        // Where it fails a program has just written it. In range it does nothing else.
        let _ = bytes.exchange(place, from, to);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::unistd::ftruncate;

    use super::*;

    const N: usize = 4096;

    fn bytes() -> (Mapping<[u8; N]>, Mapping<[u8; N]>) {
        let file = memfd_create("bytes", MFdFlags::MFD_CLOEXEC).unwrap();
        ftruncate(&file, 4096).unwrap();
        (Mapping::new(&file, 1, true).unwrap(), Mapping::new(&file, 1, true).unwrap())
    }

    fn places(of: &[usize]) -> Places<N> {
        let mut places = Places::default();
        of.iter().for_each(|place| places.insert(*place));
        places
    }

    #[test]
    fn a_byte_that_nobody_has_goes_with_the_second_walk_and_others_stay() {
        let (mut bytes, mut program) = bytes();
        for place in [3, 4, N - 1] {
            program.store(place, FRESH).unwrap();
        }
        age(&mut bytes, &places(&[4]));
        assert_eq!([3, 4, N - 1, 5].map(|place| bytes.load(place)), [SEEN, SEEN, SEEN, 0]);
        // Written anew meanwhile.
        program.store(N - 1, FRESH).unwrap();
        age(&mut bytes, &places(&[4]));
        assert_eq!([3, 4, N - 1].map(|place| bytes.load(place)), [0, SEEN, SEEN]);
        age(&mut bytes, &places(&[4]));
        assert_eq!([3, 4, N - 1].map(|place| bytes.load(place)), [0, SEEN, 0]);
        age(&mut bytes, &places(&[]));
        assert_eq!(bytes.load(4), 0);
    }

    /// A writer makes entries and takes them away all the time, a byte before each entry as the programs do; at no moment
    /// is there an entry without its byte.
    #[test]
    fn no_entry_is_without_its_byte_while_another_ages_them() {
        let (mut bytes, mut program) = bytes();
        let entries = &Mutex::new(BTreeSet::new());
        let (over, walks) = (&AtomicBool::new(false), &AtomicU32::new(0));
        let made = std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                let (mut made, mut place) = (0u32, 0);
                while !over.load(Ordering::Relaxed) {
                    place = (place * 5 + 17) % 16;
                    // A program is done before another walk begins; where the machine made this writer wait, it does not
                    // count.
                    let begun = walks.load(Ordering::Acquire);
                    program.store(place, FRESH).unwrap();
                    entries.lock().unwrap().insert(place);
                    if walks.load(Ordering::Acquire) == begun {
                        made += 1;
                        for _ in 0..made % 64 {
                            assert_ne!(program.load(place), 0, "after {made}");
                        }
                    }
                    entries.lock().unwrap().remove(&place);
                }
                made
            });
            for _ in 0..2000 {
                walks.fetch_add(1, Ordering::Release);
                let live: Vec<usize> = entries.lock().unwrap().iter().copied().collect();
                age(&mut bytes, &places(&live));
                if writer.is_finished() {
                    break;
                }
            }
            over.store(true, Ordering::Relaxed);
            writer.join()
        });
        assert!(made.unwrap() > 1000);
    }
}
