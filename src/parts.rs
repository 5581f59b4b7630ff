//! All elements of all leaves as parts of about one size, for threads to share: a large leaf is cut into several, and
//! many small ones make one.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use crate::reduce::CHUNK;
use crate::threads::share;

/// Elements that take as long as it does to come to the next leaf.
const OF_A_LEAF: usize = 256;
/// With fewer elements, waking a thread takes longer than doing its part.
const ALONE: usize = 1 << 18;
/// The largest part. Smaller ones end at once on all threads, larger ones are not faster.
const LARGEST: usize = 1 << 18;
/// Parts that there should be for a thread, so that all end at about the same time.
const EACH: usize = 8;

/// Where parts begin: at the start of a leaf, or of one of its chunks.
#[derive(Clone, Debug)]
pub struct Parts {
    starts: Vec<(usize, usize)>,
    leaves: usize,
    threads: usize,
    /// How long a step takes, in elements.
    pub weight: usize,
}

impl Parts {
    /// The parts of leaves of these lengths, for so many threads.
    #[must_use]
    pub fn new(lens: &[usize], threads: usize) -> Self {
        let weight: usize = lens.iter().map(|len| len + OF_A_LEAF).sum();
        let mut starts = vec![(0, 0)];
        if threads > 1 && weight >= ALONE {
            let most = (weight / (threads * EACH)).clamp(CHUNK, LARGEST);
            let mut room = most;
            for (leaf, &len) in lens.iter().enumerate() {
                let mut start = 0;
                while len - start > room {
                    start += room / CHUNK * CHUNK;
                    starts.push((leaf, start));
                    room = most;
                }
                room = room.saturating_sub(len - start + OF_A_LEAF);
            }
        }
        Self {
            starts,
            leaves: lens.len(),
            threads,
            weight,
        }
    }

    /// The leaves that a part touches, and which of a leaf's elements it has; `len` says how many a leaf has.
    fn of(
        &self,
        part: usize,
        len: impl Fn(usize) -> usize,
    ) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (first, start) = self.starts[part];
        let (last, end) = match self.starts.get(part + 1) {
            Some(&(leaf, 0)) => (leaf, None),
            Some(&(leaf, end)) => (leaf + 1, Some(end)),
            None => (self.leaves, None),
        };
        (first..last).map(move |leaf| {
            let start = if leaf == first { start } else { 0 };
            let end = end.filter(|_| leaf + 1 == last);
            (leaf, start..end.unwrap_or_else(|| len(leaf)))
        })
    }

    /// Calls `each` with every leaf, or with the parts of it, on all threads; each has a `hand` of its own, and a part gets
    /// a new `R`. Returns those in the order of parts.
    pub fn each<H, R: Default + Send>(
        &self,
        len: impl Fn(usize) -> usize + Sync,
        hand: impl Fn() -> H + Sync,
        each: impl Fn(&mut H, &mut R, usize, Range<usize>) + Sync,
    ) -> Vec<R> {
        let work = |hand: &mut H, part| {
            let mut result = R::default();
            for (leaf, range) in self.of(part, &len) {
                each(hand, &mut result, leaf, range);
            }
            result
        };
        let count = self.starts.len();
        if count == 1 {
            return vec![work(&mut hand(), 0)];
        }
        let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(count)));
        share(self.threads.min(count), &|| {
            let mut hand = hand();
            loop {
                let part = next.fetch_add(1, Relaxed);
                if part >= count {
                    break;
                }
                let result = work(&mut hand, part);
                let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                results.push((part, result));
            }
        });
        let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
        results.sort_unstable_by_key(|&(part, _)| part);
        results.into_iter().map(|(_, result)| result).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_all_elements_once_and_in_order_and_begin_at_chunks() {
        for lens in [
            vec![],
            vec![0],
            vec![5, 0, 7],
            vec![ALONE - OF_A_LEAF],
            vec![10 * LARGEST + 3, 0, 1, CHUNK, CHUNK + 1, 0],
            vec![CHUNK; 100],
            vec![16; 40_000],
            (0..2_000).collect(),
        ] {
            for threads in [1, 2, 7] {
                let parts = Parts::new(&lens, threads);
                let mut next = vec![0; lens.len()];
                let mut sizes = Vec::new();
                for part in 0..parts.starts.len() {
                    let mut size = 0;
                    for (leaf, range) in parts.of(part, |leaf| lens[leaf]) {
                        assert_eq!(range.start, next[leaf]);
                        assert!(range.start.is_multiple_of(CHUNK));
                        assert!(next[leaf + 1..].iter().all(|&n| n == 0));
                        next[leaf] = range.end;
                        size += range.len() + OF_A_LEAF;
                    }
                    sizes.push(size);
                }
                assert_eq!(next, lens, "{threads}");
                let all: usize = sizes.iter().sum();
                if threads > 1 && all >= 2 * ALONE {
                    assert!(sizes.len() >= 2 * threads, "{sizes:?}");
                    assert!(*sizes.iter().max().unwrap() <= LARGEST + CHUNK + OF_A_LEAF);
                }
            }
        }
    }

    #[test]
    fn results_come_in_the_order_of_parts() {
        let lens = vec![3 * CHUNK, 17, 20 * CHUNK];
        let all = |threads| {
            let gather = |(): &mut (), all: &mut Vec<_>, leaf, range: Range<usize>| {
                all.extend(range.map(|i| (leaf, i)));
            };
            let parts = Parts::new(&lens, threads);
            parts.each(|leaf| lens[leaf], || (), gather).concat()
        };
        assert_eq!(all(1), all(4));
    }
}
