//! `FRONTENDS` as the agent writes it: a hash of cache lines in memory that the programs search meanwhile.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::Path;

use proxy_common::abi::line::{Header, REACH};
use proxy_common::abi::{FrontendKey, FrontendLine, FrontendValue, ServiceId, ServiceRecord};

use super::RecordWord;
use crate::kernel;
use crate::kernel::mapping::{LineWord, Mapping};

/// See the module.
pub struct Frontends {
    lines: Mapping<FrontendLine>,
    header: Header,
    /// Lines that are taken.
    taken: u32,
    /// Lines whose copies follow a record, by record.
    copies: BTreeSet<(ServiceId, u32)>,
}

/// Lines for so many frontends, and the header: at most half of the lines are taken, so that keys lie close to their
/// homes.
pub const fn places(frontends: u32) -> u32 {
    frontends.next_power_of_two() * 2 + 1
}

impl Frontends {
    /// The pinned table, in which a new one's header is written.
    ///
    /// # Errors
    /// If it is not pinned or cannot be mapped.
    pub fn open(tables: &Path, writable: bool) -> Result<Self, kernel::Error> {
        let (places, lines) = super::bpf::map(tables, "FRONTENDS", writable)?;
        // A hash by a key of its own, which is what the standard library has of random numbers.
        let seed = RandomState::new().hash_one(places);
        Ok(Self::of(lines, writable.then(|| Header::new(seed, places.saturating_sub(2)))))
    }

    /// `fresh` is for a new table.
    fn of(mut lines: Mapping<FrontendLine>, fresh: Option<Header>) -> Self {
        if let Some(fresh) = fresh.filter(|_| lines.header().mask == 0) {
            lines.set_header(fresh);
        }
        let header = lines.header();
        let mut this = Self { lines, header, taken: 0, copies: BTreeSet::new() };
        for place in this.places() {
            let value = this.value(place);
            if value != FrontendValue::NONE {
                this.taken += 1;
                this.copies.insert((value.service(), place));
            }
        }
        this
    }

    /// How many frontends it holds at most.
    pub const fn limit(&self) -> u32 {
        self.header.mask.div_ceil(2)
    }

    /// All of them.
    pub fn entries(&self) -> Vec<(FrontendKey, FrontendValue)> {
        let entry = |place| (self.lines.key(place), self.value(place));
        self.places().map(entry).filter(|(_, value)| *value != FrontendValue::NONE).collect()
    }

    /// Adds a frontend, or points it elsewhere by one store.
    ///
    /// # Errors
    /// E2BIG if the table is too small.
    pub fn put(&mut self, key: &FrontendKey, value: FrontendValue, record: &ServiceRecord) -> io::Result<()> {
        let place = match self.find(key) {
            Some(place) => {
                let service = self.value(place).service();
                self.copies.remove(&(service, place));
                self.lines.store(place, LineWord::Value, value.bits());
                place
            }
            None => self.add(key, value, record)?,
        };
        self.copies.insert((value.service(), place));
        self.copy(place, value.service(), record);
        Ok(())
    }

    /// Removes a frontend; one that is not there is as good as removed.
    pub fn remove(&mut self, key: &FrontendKey) {
        let Some(place) = self.find(key) else { return };
        self.copies.remove(&(self.value(place).service(), place));
        self.lines.store(place, LineWord::Value, 0);
        self.taken -= 1;
        let hash = self.header.hash(key);
        let home = self.header.place(hash, 0);
        let farthest = (0..=self.lines.reach(home)).rev().find(|step| {
            let place = self.header.place(hash, *step);
            self.value(place) != FrontendValue::NONE
                && self.header.place(self.header.hash(&self.lines.key(place)), 0) == home
        });
        self.lines.store_reach(home, farthest.unwrap_or(0));
    }

    /// Writes a record's word into the copies of it.
    pub fn follow(&mut self, service: ServiceId, word: RecordWord, bits: u64) {
        let Some(word) = copied(word) else { return };
        for (_, place) in self.copies.range((service, 0)..=(service, u32::MAX)) {
            self.lines.store(*place, word, bits);
        }
    }

    /// Makes the copies equal to the records, where a former run was stopped between the two.
    pub fn repair(&mut self, record: impl Fn(ServiceId) -> ServiceRecord) {
        for (service, place) in self.copies.clone() {
            self.copy(place, service, &record(service));
        }
    }

    /// Lines, without the header.
    fn places(&self) -> impl Iterator<Item = u32> + use<> {
        // A table without a header has no lines yet.
        let lines = if self.header.mask == 0 { 0 } else { self.header.mask + 1 };
        1..=lines
    }

    fn value(&self, place: u32) -> FrontendValue {
        FrontendValue::from_bits(self.lines.load(place, LineWord::Value))
    }

    fn find(&self, key: &FrontendKey) -> Option<u32> {
        // SAFETY: the mapping outlives the call.
        let place = unsafe { FrontendLine::find(key, &self.header, |place| self.lines.line(place)) };
        (place != 0).then_some(place)
    }

    /// A free line near the key's home: first what it says, then that it is there.
    fn add(&mut self, key: &FrontendKey, value: FrontendValue, record: &ServiceRecord) -> io::Result<u32> {
        let full = || io::Error::from_raw_os_error(libc::E2BIG);
        if self.taken >= self.limit() {
            return Err(full());
        }
        let hash = self.header.hash(key);
        let free = |step: &u32| self.value(self.header.place(hash, *step)) == FrontendValue::NONE;
        let step = (0..REACH).find(free).ok_or_else(full)?;
        let (home, place) = (self.header.place(hash, 0), self.header.place(hash, step));
        self.lines.set_key(place, key);
        self.copy(place, value.service(), record);
        self.lines.store_reach(home, self.lines.reach(home).max(step));
        self.lines.store(place, LineWord::Value, value.bits());
        self.taken += 1;
        Ok(place)
    }

    /// Copies a record's words, which count only while the line says whose they are. Writes nothing if they are there.
    fn copy(&mut self, place: u32, service: ServiceId, record: &ServiceRecord) {
        let words = RecordWord::ALL.into_iter().filter_map(|word| Some((copied(word)?, word.read(record))));
        let equal = |(word, bits): (LineWord, u64)| self.lines.load(place, word) == bits;
        if self.lines.copies_of(place) == service && words.clone().all(equal) {
            return;
        }
        self.lines.set_copies_of(place, 0);
        for (word, bits) in words {
            self.lines.store(place, word, bits);
        }
        self.lines.set_copies_of(place, service);
    }
}

/// Which words of a record a line has.
const fn copied(word: RecordWord) -> Option<LineWord> {
    match word {
        RecordWord::Cluster => Some(LineWord::Cluster),
        RecordWord::Local => Some(LineWord::Local),
        RecordWord::Affinity => Some(LineWord::Affinity),
        RecordWord::Draining => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::net::IpAddr;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::unistd::ftruncate;
    use proptest::prelude::*;
    use proxy_common::abi::{AffinityWord, Frontend, FrontendKind, Glance, SetWord, WhenEmpty};

    const LIMIT: u32 = 128;

    fn key(number: u16) -> FrontendKey {
        let port = proxy_common::abi::Port::new(number);
        FrontendKey::new(IpAddr::from([10, 96, 0, 1]).into(), port, 6)
    }

    /// All that is said of a record is its number.
    fn record(service: ServiceId) -> ServiceRecord {
        if service == 0 {
            return ServiceRecord::default();
        }
        let set = SetWord::new(service, service, WhenEmpty::Reject);
        ServiceRecord {
            cluster: set,
            local: set,
            draining: set,
            // Even ones are plain.
            affinity: AffinityWord::new(service % 2, service),
        }
    }

    fn value(service: ServiceId) -> FrontendValue {
        FrontendValue::new(service, FrontendKind::ClusterIp)
    }

    /// A table, and the same as a program has it.
    fn table(seed: u64) -> (Frontends, Mapping<FrontendLine>) {
        let file = memfd_create("frontends", MFdFlags::MFD_CLOEXEC).unwrap();
        let places = places(LIMIT);
        ftruncate(&file, i64::from(places) * 64).unwrap();
        let writing = Mapping::new(&file, places, true).unwrap();
        let reading = Mapping::new(&file, places, false).unwrap();
        (Frontends::of(writing, Some(Header::new(seed, places - 2))), reading)
    }

    /// As the programs do: at home, and then farther.
    fn search(lines: &Mapping<FrontendLine>, key: &FrontendKey) -> Frontend {
        let header = lines.header();
        // SAFETY: the mapping lives longer.
        let (found, farther) =
            unsafe { FrontendLine::at_home(key, &header, |place| lines.line(place), record) };
        if !farther {
            return found;
        }
        // SAFETY: as above.
        let place = unsafe { FrontendLine::find(key, &header, |place| lines.line(place)) };
        if place == 0 {
            return Frontend::NONE;
        }
        // SAFETY: as above.
        unsafe { FrontendLine::read(lines.line(place).unwrap(), key, record) }
    }

    /// As the programs do for a connection.
    fn glance(lines: &Mapping<FrontendLine>, key: &FrontendKey) -> Glance {
        // SAFETY: the mapping lives longer.
        unsafe { FrontendLine::glance(key, &lines.header(), |place| lines.line(place)) }
    }

    proptest! {
        /// Whatever was put and removed before, a program finds what is there and nothing else.
        #[test]
        fn programs_find_what_was_put(
            seed in any::<u64>(),
            steps in prop::collection::vec((0..200_u16, prop::option::weighted(0.6, 1..9_u32)), 1..400),
        ) {
            let (mut table, lines) = table(seed);
            let mut model = BTreeMap::new();
            for (number, service) in steps {
                match service {
                    Some(service) => {
                        let fits = model.len() < LIMIT as usize || model.contains_key(&number);
                        let put = table.put(&key(number), value(service), &record(service));
                        prop_assert_eq!(put.is_ok(), fits);
                        if fits {
                            model.insert(number, service);
                        }
                    }
                    None => {
                        table.remove(&key(number));
                        model.remove(&number);
                    }
                }
            }
            for number in 0..200 {
                let service = model.get(&number).copied().unwrap_or(0);
                let expected = if service == 0 { Frontend::NONE } else { Frontend::new(value(service), &record(service)) };
                prop_assert_eq!(search(&lines, &key(number)), expected);
                // A glance may say that more is to be seen.
                let glance = glance(&lines, &key(number));
                prop_assert!(glance == Glance::More || glance == Glance::of(&expected), "{:?}", glance);
                let at_home = table.find(&key(number)) == Some(table.header.place(table.header.hash(&key(number)), 0));
                prop_assert!(!at_home || glance == Glance::of(&expected), "{:?}", glance);
            }
            let entries: BTreeMap<_, _> = table.entries().into_iter().collect();
            let expected = model.iter().map(|(number, service)| (key(*number), value(*service))).collect();
            prop_assert_eq!(entries, expected);
            // The next agent finds the same.
            let Frontends { lines, header, taken, copies } = table;
            let next = Frontends::of(lines, Some(Header::new(seed ^ 1, 1)));
            prop_assert_eq!((next.header, next.taken, next.copies), (header, taken, copies));
        }
    }

    /// The words of a line follow its record, and those of a line that missed it are repaired.
    #[test]
    fn copies_follow_their_record() {
        let (mut table, lines) = table(1);
        table.put(&key(1), value(5), &record(5)).unwrap();
        table.put(&key(2), value(6), &record(6)).unwrap();
        let set = SetWord::new(70, 7, WhenEmpty::Drop);
        for word in RecordWord::ALL {
            table.follow(5, word, set.bits());
        }
        let changed = search(&lines, &key(1));
        assert_eq!((changed.cluster, changed.local, changed.affinity.bits()), (set, set, set.bits()));
        assert_eq!(search(&lines, &key(2)), Frontend::new(value(6), &record(6)));
        // An agent that was killed before it came to the copies.
        table.repair(record);
        assert_eq!(search(&lines, &key(1)), Frontend::new(value(5), &record(5)));
        // A line that says nothing about its copies has none.
        let place = table.find(&key(1)).unwrap();
        table.follow(5, RecordWord::Cluster, set.bits());
        table.lines.set_copies_of(place, 0);
        assert_eq!(search(&lines, &key(1)), Frontend::new(value(5), &record(5)));
    }

    /// A frontend that changes hands is never missing (S13), and whoever has it, the words are the owner's. A line that
    /// goes from one key to another never shows one key's words to who asks for the other.
    #[test]
    fn no_reader_sees_a_frontend_of_one_service_with_the_words_of_another() {
        // Two keys of one home share lines as they come and go.
        let (mut table, lines) = table(3);
        let home = |number: u16| table.header.hash(&key(number)) & table.header.mask;
        let other = (2..10_000).find(|number| home(*number) == home(1)).unwrap();
        table.put(&key(20_000), value(1), &record(1)).unwrap();
        let over = &AtomicBool::new(false);
        let (seen, glanced) = (&AtomicU32::new(0), &AtomicU32::new(0));
        std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let found = search(&lines, &key(20_000));
                    assert!(found.value.service() != 0, "missing");
                    assert_eq!(found, Frontend::new(found.value, &record(found.value.service())));
                    assert_ne!(glance(&lines, &key(20_000)), Glance::Nothing, "missing");
                    for number in [1, 20_000] {
                        if let Glance::Plain(set) = glance(&lines, &key(number)) {
                            // Odd owners are not plain.
                            assert_eq!((set.first() % 2, set.first()), (0, set.count()), "{number}");
                            glanced.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    assert!(!matches!(glance(&lines, &key(other)), Glance::Plain(_)));
                    for (number, parity) in [(1, 0), (other, 1)] {
                        let found = search(&lines, &key(number));
                        if !found.is_none() {
                            assert_eq!(found.value.service() % 2, parity, "{number}: {found:?}");
                            assert_eq!(found, Frontend::new(found.value, &record(found.value.service())));
                            seen.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
            for round in 0..300_000_u32 {
                // Nobody is an owner twice: a reader that sleeps meanwhile could not tell.
                let (even, odd) = (2 * round + 2, 2 * round + 3);
                let owner = if round % 2 == 0 { even } else { odd };
                table.put(&key(20_000), value(owner), &record(owner)).unwrap();
                table.put(&key(1), value(even), &record(even)).unwrap();
                table.remove(&key(1));
                table.put(&key(other), value(odd), &record(odd)).unwrap();
                table.remove(&key(other));
                if reader.is_finished() {
                    break;
                }
            }
            over.store(true, Ordering::Relaxed);
            reader.join().unwrap();
        });
        assert!(seen.load(Ordering::Relaxed) > 0 && glanced.load(Ordering::Relaxed) > 0);
    }
}
