//! Work and the machine's CPUs: what is divided among them, and what gives way.

use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Does `work` with every item, on as many threads as there are CPUs, but `most` at the most; this thread is one of them.
/// Items are begun in their order, and results are in it.
pub fn map<T: Send, R: Send>(items: Vec<T>, most: usize, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let most = most.min(items.len());
    // To ask for the number of CPUs takes longer than many a work of one item: it reads what cgroups allow.
    let threads = if most < 2 { 1 } else { thread::available_parallelism().map_or(1, usize::from).min(most) };
    if threads < 2 {
        return items.into_iter().map(work).collect();
    }
    let left = Mutex::new(items.into_iter().enumerate());
    let turns = || {
        let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
        let mut done = Vec::new();
        while let Some((place, item)) = next() {
            done.push((place, work(item)));
        }
        done
    };
    let mut done = thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(turns)).collect();
        let mut done = turns();
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, result)| result).collect()
}

/// From now on this thread has a CPU when nobody else of this machine wants it, or a tenth of one: what it does may come a
/// little later, and what changes is to be in the kernel at once.
pub fn give_way() {
    const NICE: libc::c_int = 10;
    // SAFETY: says something of the calling thread alone. It cannot fail for a value that is lower in rank.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_the_order_of_the_items() {
        let squares: Vec<u64> = (0..1_000).map(|n| n * n).collect();
        for most in [0, 1, 2, 64] {
            assert_eq!(map((0..1_000).collect(), most, |n: u64| n * n), squares);
        }
        assert!(map(Vec::<u64>::new(), 4, |n| n).is_empty());
    }
}
