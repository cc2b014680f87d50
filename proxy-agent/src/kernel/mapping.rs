//! A `BPF_F_MMAPABLE` array as memory: a write costs a store, not a system call.

use std::io;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use proxy_common::abi::line::Header;
use proxy_common::abi::packet::{VIP_BYTES, vip_bit};
use proxy_common::abi::{
    Backend, BackendId, FrontendKey, FrontendLine, ServiceId, ServiceRecord, Slot, SocketPlace,
};

use crate::dataplane::RecordWord;

/// An array map of `T`, whose size is a multiple of 8 as the kernel's stride is.
#[derive(Debug)]
pub struct Mapping<T> {
    memory: NonNull<u8>,
    entries: u32,
    bytes: usize,
    of: PhantomData<T>,
}

// SAFETY: the mapping belongs to this value alone; all writes go through `&mut self`.
unsafe impl<T> Send for Mapping<T> {}

impl<T> Mapping<T> {
    const STRIDE: usize = {
        assert!(size_of::<T>().is_multiple_of(8));
        size_of::<T>()
    };

    /// Maps all `entries` of the map behind `fd`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(fd: impl AsFd, entries: u32, writable: bool) -> io::Result<Self> {
        let bytes = entries as usize * Self::STRIDE;
        let length = NonZeroUsize::new(bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let protection =
            if writable { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
        // SAFETY: a fresh shared mapping that the kernel places; nothing else is touched.
        let memory = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, fd, 0) }?;
        Ok(Self { memory: memory.cast(), entries, bytes, of: PhantomData })
    }

    /// Address of byte `offset` in entry `index`.
    fn at(&self, index: u32, offset: usize) -> io::Result<NonNull<u8>> {
        if index >= self.entries {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        // SAFETY: `index` is in range and `offset` is inside an entry (callers below), so it stays in the mapping.
        Ok(unsafe { self.memory.add(index as usize * Self::STRIDE + offset) })
    }

    fn word(&self, index: u32, offset: usize) -> io::Result<&AtomicU64> {
        let at = self.at(index, offset)?;
        // SAFETY: in the mapping, 8-byte aligned (stride and offsets are multiples of 8), shared with the kernel, which
        // reads it with single loads: exactly what an atomic is for.
        Ok(unsafe { AtomicU64::from_ptr(at.cast().as_ptr()) })
    }
}

impl<T> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference into it outlives `self`.
        if let Err(error) = unsafe { munmap(self.memory.cast(), self.bytes) } {
            tracing::warn!(%error, "munmap of a map");
        }
    }
}

impl Mapping<ServiceRecord> {
    /// Commits one word: readers see the old one or this one, and if this one, then all that was written before.
    ///
    /// # Errors
    /// E2BIG if out of range.
    pub fn store(&mut self, index: u32, word: RecordWord, bits: u64) -> io::Result<()> {
        self.word(index, Self::offset(word))?.store(bits, Ordering::Release);
        Ok(())
    }

    /// Reads one word; 0 if out of range.
    pub fn load(&self, index: u32, word: RecordWord) -> u64 {
        self.word(index, Self::offset(word)).map_or(0, |word| word.load(Ordering::Acquire))
    }

    const fn offset(word: RecordWord) -> usize {
        match word {
            RecordWord::Cluster => std::mem::offset_of!(ServiceRecord, cluster),
            RecordWord::Local => std::mem::offset_of!(ServiceRecord, local),
            RecordWord::Draining => std::mem::offset_of!(ServiceRecord, draining),
            RecordWord::Affinity => std::mem::offset_of!(ServiceRecord, affinity),
        }
    }
}

impl Mapping<Slot> {
    /// # Errors
    /// E2BIG if out of range.
    pub fn store(&mut self, index: u32, slot: Slot) -> io::Result<()> {
        let at = self.at(index, 0)?;
        // SAFETY: in the mapping and aligned. No set points there; a reader who comes late sees that the seal is wrong.
        unsafe { at.cast().write_volatile(slot) };
        Ok(())
    }

    /// [`BackendId::NONE`] if out of range.
    pub fn load(&self, index: u32) -> BackendId {
        self.word(index, 0).map_or(BackendId::NONE, |word| BackendId::from_bits(word.load(Ordering::Relaxed)))
    }
}

/// A word of [`FrontendLine`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LineWord {
    /// What the frontend points to.
    Value,
    /// Copy of the cluster set.
    Cluster,
    /// Copy of the local set.
    Local,
    /// Copy of the affinity.
    Affinity,
}

/// Places are those of a table that was mapped whole. Out of range, nothing is written and 0 read.
impl Mapping<FrontendLine> {
    /// The header; a new table has the default.
    pub fn header(&self) -> Header {
        let word = |number: usize| {
            self.word(0, number * size_of::<u64>()).map_or(0, |word| word.load(Ordering::Acquire))
        };
        Header::from_words([0, 1, 2, 3, 4, 5].map(word))
    }

    /// Makes a new table one that programs search.
    pub fn set_header(&mut self, header: Header) {
        for (number, word) in header.words().into_iter().enumerate() {
            if let Ok(at) = self.word(0, number * size_of::<u64>()) {
                at.store(word, Ordering::Release);
            }
        }
    }

    /// One store: readers see the old word or this one, and if this one, then all that was written before.
    pub fn store(&mut self, place: u32, word: LineWord, bits: u64) {
        if let Ok(word) = self.word(place, Self::offset(word)) {
            word.store(bits, Ordering::Release);
        }
    }

    /// Reads a word.
    pub fn load(&self, place: u32, word: LineWord) -> u64 {
        self.word(place, Self::offset(word)).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Reads the key of a line that has one.
    pub fn key(&self, place: u32) -> FrontendKey {
        let at = self.at(place, std::mem::offset_of!(FrontendLine, key)).ok();
        // SAFETY: in the mapping and aligned; only the agent writes it, and any bytes are a key.
        at.map_or(FrontendKey::default(), |at| unsafe { at.cast().read_volatile() })
    }

    /// Writes the key of a free line.
    pub fn set_key(&mut self, place: u32, key: &FrontendKey) {
        if let Ok(at) = self.at(place, std::mem::offset_of!(FrontendLine, key)) {
            // SAFETY: in the mapping and aligned. Programs may read it meanwhile; they believe it only with a value
            // before and after.
            unsafe { at.cast().write_volatile(*key) };
        }
    }

    /// Which record the copies are of.
    pub fn copies_of(&self, place: u32) -> ServiceId {
        self.half(place, std::mem::offset_of!(FrontendLine, copies_of))
            .map_or(0, |half| half.load(Ordering::Relaxed))
    }

    /// Says so; 0 while they are written.
    pub fn set_copies_of(&mut self, place: u32, service: ServiceId) {
        if let Ok(half) = self.half(place, std::mem::offset_of!(FrontendLine, copies_of)) {
            half.store(service, Ordering::Release);
            // What follows must not overtake it (see below).
            fence(Ordering::Release);
        }
    }

    /// How far the keys of this home lie.
    pub fn reach(&self, place: u32) -> u32 {
        self.half(place, std::mem::offset_of!(FrontendLine, reach))
            .map_or(0, |half| half.load(Ordering::Relaxed))
    }

    /// Sets it.
    pub fn store_reach(&mut self, place: u32, reach: u32) {
        if let Ok(half) = self.half(place, std::mem::offset_of!(FrontendLine, reach)) {
            half.store(reach, Ordering::Release);
        }
    }

    /// A line as a program gets it; it stays readable as long as the mapping lives.
    pub fn line(&self, place: u32) -> Option<*const FrontendLine> {
        self.at(place, 0).ok().map(|at| at.cast::<FrontendLine>().as_ptr().cast_const())
    }

    fn half(&self, place: u32, offset: usize) -> io::Result<&AtomicU32> {
        let at = self.at(place, offset)?;
        // SAFETY: in the mapping, 4-byte aligned, shared with the kernel, which reads it with single loads.
        Ok(unsafe { AtomicU32::from_ptr(at.cast().as_ptr()) })
    }

    const fn offset(word: LineWord) -> usize {
        match word {
            LineWord::Value => std::mem::offset_of!(FrontendLine, value),
            LineWord::Cluster => std::mem::offset_of!(FrontendLine, cluster),
            LineWord::Local => std::mem::offset_of!(FrontendLine, local),
            LineWord::Affinity => std::mem::offset_of!(FrontendLine, affinity),
        }
    }
}

impl Mapping<Backend> {
    /// A new tenant is written under generation 0, which no id has, and its generation last. A tenant that only changes
    /// its state, or goes, changes one half-word: its address stays readable for whoever is on the way to it.
    ///
    /// # Errors
    /// E2BIG if out of range.
    pub fn store(&mut self, index: u32, value: Backend) -> io::Result<()> {
        let entry = self.at(index, 0)?;
        let flags = self.at(index, Backend::FLAGS_OFFSET)?;
        let generation = self.at(index, std::mem::offset_of!(Backend, generation))?;
        // SAFETY: in the mapping, aligned for the type, and read by the kernel with single loads.
        let flags = unsafe { AtomicU16::from_ptr(flags.cast().as_ptr()) };
        // SAFETY: as above.
        let generation = unsafe { AtomicU32::from_ptr(generation.cast().as_ptr()) };
        let moves_in = value.is_live() && flags.load(Ordering::Relaxed) == Backend::vacant(0).flags();
        if moves_in || generation.load(Ordering::Relaxed) != value.generation {
            generation.store(0, Ordering::Relaxed);
            // A store with release semantics keeps what is before it before it; what follows may still overtake it (on
            // arm64), and a reader with an id of the tenant before would take the new address for that one's.
            fence(Ordering::Release);
            let mut fresh = value;
            fresh.generation = 0;
            // SAFETY: in the mapping, 4-byte aligned as `Backend` needs; no id names generation 0, so nobody reads it.
            unsafe { entry.cast::<Backend>().write_volatile(fresh) };
            generation.store(value.generation, Ordering::Release);
        } else {
            flags.store(value.flags(), Ordering::Release);
        }
        Ok(())
    }

    /// Vacant if out of range, and while another process writes it.
    pub fn load(&self, index: u32) -> Backend {
        let entry = self.at(index, 0).ok();
        // SAFETY: in the mapping and aligned.
        let backend = entry.and_then(|entry| unsafe { Backend::read(entry.cast().as_ptr()) });
        backend.unwrap_or(Backend::vacant(0))
    }
}

impl Mapping<SocketPlace> {
    /// Places that sockets have. A program may be writing one: its seal tells.
    pub fn taken(&self) -> impl Iterator<Item = SocketPlace> {
        let read = |index| {
            let cookie = self.word(index, std::mem::offset_of!(SocketPlace, cookie)).ok()?;
            if cookie.load(Ordering::Relaxed) == 0 {
                return None;
            }
            let place = self.at(index, 0).ok()?;
            // SAFETY: in the mapping and aligned; any bytes are a place.
            Some(unsafe { place.cast::<SocketPlace>().read_volatile() })
        };
        (0..self.entries).filter_map(read)
    }
}

impl<const N: usize> Mapping<[u8; N]> {
    /// Writes one of the bytes of entry 0.
    ///
    /// # Errors
    /// E2BIG if out of range.
    pub fn store(&mut self, place: usize, byte: u8) -> io::Result<()> {
        self.byte(place)?.store(byte, Ordering::Release);
        Ok(())
    }

    /// Reads one of them; 0 if out of range.
    pub fn load(&self, place: usize) -> u8 {
        self.byte(place).map_or(0, |byte| byte.load(Ordering::Acquire))
    }

    /// Writes `to` where `from` still is, whoever else writes at the same time.
    ///
    /// # Errors
    /// E2BIG if out of range.
    pub fn exchange(&mut self, place: usize, from: u8, to: u8) -> io::Result<bool> {
        Ok(self.byte(place)?.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok())
    }

    fn byte(&self, place: usize) -> io::Result<&AtomicU8> {
        if place >= N {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        let at = self.at(0, place)?;
        // SAFETY: in the mapping, and shared with the kernel, which reads and writes it with single byte accesses.
        Ok(unsafe { AtomicU8::from_ptr(at.as_ptr()) })
    }
}

/// `VIPS`, of which nobody else is a writer.
impl Mapping<[u8; VIP_BYTES]> {
    /// Whether a VIP has this place.
    pub fn has_vip(&self, place: usize) -> bool {
        let (at, bit) = vip_bit(place);
        self.load(at) & bit != 0
    }

    /// Says whether one has; returns whether that is news. A place out of range has none.
    pub fn set_vip(&mut self, place: usize, has: bool) -> bool {
        let (at, bit) = vip_bit(place);
        let bits = self.load(at);
        (bits & bit != 0) != has && self.store(at, bits ^ bit).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::unistd::ftruncate;
    use proxy_common::abi::{Address, BackendState, Port};
    use std::sync::atomic::AtomicBool;

    /// Tenants whose address, port and generation say the same number.
    fn tenant(number: u32) -> Backend {
        let port = Port::new(u16::try_from(number & 0xffff).unwrap());
        Backend::new(Address::from_words([number; 4]), port, BackendState::default(), number)
    }

    #[test]
    fn no_reader_sees_the_address_of_one_tenant_with_the_generation_of_another() {
        let file = memfd_create("backends", MFdFlags::MFD_CLOEXEC).unwrap();
        ftruncate(&file, 4096).unwrap();
        let mut writing = Mapping::<Backend>::new(&file, 1, true).unwrap();
        let reading = Mapping::<Backend>::new(&file, 1, false).unwrap();
        let over = &AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut seen = 0u32;
                while !over.load(Ordering::Relaxed) {
                    let backend = reading.load(0);
                    if backend.generation != 0 {
                        assert_eq!(backend, tenant(backend.generation));
                        seen += 1;
                    }
                }
                seen
            });
            for number in 1..2_000_000 {
                writing.store(0, tenant(number)).unwrap();
                if reader.is_finished() {
                    break;
                }
            }
            over.store(true, Ordering::Relaxed);
            reader.join()
        });
        assert!(seen.unwrap() > 0);
    }
}
