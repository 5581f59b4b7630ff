//! Random bits, 16 for each number that is rounded: cheap ones, or they would cost more than the step.

use crate::rule::LANES;

/// The numbers that a run of elements has in its leaf, from which their random bits are made.
#[derive(Clone, Copy)]
pub enum Numbers<'a> {
    /// Counted on from the first.
    From(u64),
    /// One by one.
    These(&'a [u64]),
}

impl Numbers<'_> {
    /// Those of the elements after the first `n`.
    #[must_use]
    pub fn after(self, n: usize) -> Self {
        match self {
            Self::From(first) => Self::From(first + n as u64),
            Self::These(numbers) => Self::These(&numbers[n..]),
        }
    }

    /// A word of random bits for each of `LANES` elements from number `i` on, of which a row has a [`half`]. Whoever asks
    /// for them again, in whatever order, gets the same.
    ///
    /// The elements of a line share two random numbers, `a` and `b`, and the word of each is `a + b c`, where `c` is its
    /// own: what one element has says nothing of what any other has.
    #[must_use]
    #[inline(always)]
    pub fn words(self, key: u32, i: usize) -> [u32; LANES] {
        match self {
            Self::From(first) => {
                let first = first + i as u64;
                debug_assert!(first.is_multiple_of(LANES as u64), "runs begin with a line");
                let line = line(key, first);
                // Not by `from_fn`, whose lanes end up in vectors of half the length.
                let mut words = [0; LANES];
                for lane in 0..LANES {
                    words[lane] = word(line, OWN[lane]);
                }
                words
            }
            Self::These(numbers) => one_by_one(key, &numbers[i..]),
        }
    }
}

/// The words of the first `LANES` elements of these numbers.
#[inline(never)]
fn one_by_one(key: u32, numbers: &[u64]) -> [u32; LANES] {
    let mut words = [0; LANES];
    for (x, &number) in words.iter_mut().zip(numbers) {
        *x = word(line(key, number), OWN[low(number) as usize % LANES]);
    }
    words
}

/// What each element of a line has of its own; no two are alike in their last five bits.
const OWN: [u32; LANES] = {
    let mut own = [0; LANES];
    let mut lane = 0;
    while lane < 32 {
        own[lane as usize] = mix(lane + 1) / 32 * 32 + lane;
        lane += 1;
    }
    own
};
const _: () = assert!(LANES == 32);

#[inline(always)]
fn word([a, b]: [u32; 2], own: u32) -> u32 {
    own.wrapping_mul(b).wrapping_add(a)
}

/// The two random numbers of an element's line: the output of Steele, Lea and Flood's `SplitMix64`,
/// <https://doi.org/10.1145/2714064.2660195>, for that key and that line.
#[inline(always)]
fn line(key: u32, number: u64) -> [u32; 2] {
    let x = (u64::from(key) << 32) ^ (number / LANES as u64);
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let x = x ^ (x >> 31);
    [low(x), low(x >> 32)]
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the lower half")]
fn low(x: u64) -> u32 {
    x as u32
}

/// Spreads every bit over all others: Wellons' `lowbias32`, <https://nullprogram.com/blog/2018/07/31/>.
#[must_use]
#[inline(always)]
pub const fn mix(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// The 16 bits of a word that are a row's: rows 0 and 1 share a word, and so do 2 and 3.
#[must_use]
#[inline(always)]
pub fn half(row: usize, word: u32) -> u32 {
    let upper = word >> 16;
    // The lower bits of a sum of products depend on fewer bits than the upper ones.
    if row.is_multiple_of(2) {
        (word ^ upper) & 0xffff
    } else {
        upper
    }
}

#[cfg(test)]
#[allow(clippy::cast_precision_loss, reason = "counts are small")]
mod tests {
    use super::*;

    const WORDS: usize = 1 << 16;

    /// The halves of many elements in a row, under one key.
    fn halves(key: u32, first: u64, row: usize) -> Vec<u32> {
        let numbers = Numbers::From(first);
        (0..WORDS)
            .step_by(LANES)
            .flat_map(|i| numbers.words(key, i))
            .map(|word| half(row, word))
            .collect()
    }

    /// The correlation of two runs of uniform 16 bits.
    fn correlation(a: &[u32], b: &[u32]) -> f64 {
        let centred = |&x: &u32| (f64::from(x) + 0.5) / 65_536.0 - 0.5;
        let pairs = a.iter().zip(b);
        let n = pairs.len() as f64;
        12.0 * pairs.map(|(a, b)| centred(a) * centred(b)).sum::<f64>() / n
    }

    /// Chi-square of counts that are expected to be equal, in standard deviations.
    fn unevenness(counts: &[u32]) -> f64 {
        let cells = counts.len() as f64;
        let expected = f64::from(counts.iter().sum::<u32>()) / cells;
        let chi: f64 = counts
            .iter()
            .map(|&count| (f64::from(count) - expected).powi(2) / expected)
            .sum();
        (chi - (cells - 1.0)) / (2.0 * (cells - 1.0)).sqrt()
    }

    /// As [`unevenness`], of pairs in 16 by 16 cells.
    fn dependence(a: &[u32], b: &[u32]) -> f64 {
        let mut counts = vec![0; 256];
        for (a, b) in a.iter().zip(b) {
            counts[(a >> 12 << 4 | b >> 12) as usize] += 1;
        }
        unevenness(&counts)
    }

    fn keys() -> impl Iterator<Item = u32> {
        // Keys are mixed, but those that are not must do as well.
        [0, 1, 2, u32::MAX].into_iter().chain((0..4).map(mix))
    }

    #[test]
    fn halves_of_words_are_even() {
        for key in keys() {
            for first in [0, 1 << 32, 7 << 40] {
                for row in [0, 1] {
                    let halves = halves(key, first, row);
                    let mean = halves.iter().map(|&x| f64::from(x)).sum::<f64>() / WORDS as f64;
                    let deviation = 65_536.0 / (12.0 * WORDS as f64).sqrt();
                    assert!(
                        (mean - 32_767.5).abs() < 4.0 * deviation,
                        "{key} {row} {mean}"
                    );
                    for shift in [0, 8] {
                        let mut counts = vec![0; 256];
                        for x in &halves {
                            counts[(x >> shift & 255) as usize] += 1;
                        }
                        assert!(unevenness(&counts).abs() < 5.0, "{key} {row} {shift}");
                    }
                }
            }
        }
    }

    #[test]
    fn no_two_words_know_of_each_other() {
        for key in keys() {
            let rows = [0, 1].map(|row| halves(key, 0, row));
            let mut pairs = vec![("halves", rows[0].clone(), rows[1].clone())];
            for row in [0, 1] {
                let base = &rows[row];
                for step in [1, 2, 3, 4, 8, 16, 31, 32, 33, 64, 1024] {
                    pairs.push((
                        "elements",
                        base[step..].to_vec(),
                        base[..WORDS - step].to_vec(),
                    ));
                    let other = &rows[1 - row];
                    pairs.push((
                        "elements' halves",
                        base[step..].to_vec(),
                        other[..WORDS - step].to_vec(),
                    ));
                }
                for bit in [0, 1, 7, 16, 31] {
                    let other = halves(key ^ 1 << bit, 0, row);
                    pairs.push(("keys", base.clone(), other));
                }
                for bit in [16, 31, 32, 36, 37, 40, 63] {
                    let other = halves(key, 1 << bit, row);
                    pairs.push(("numbers", base.clone(), other));
                }
            }
            for (what, a, b) in pairs {
                // Five standard deviations; there are about a thousand of either.
                let r = correlation(&a, &b) * (a.len() as f64).sqrt();
                assert!(r.abs() < 5.0, "{key} {what}: {r}");
                let r = dependence(&a, &b);
                assert!(r.abs() < 6.0, "{key} {what}: {r}");
            }
        }
    }

    #[test]
    fn lanes_of_a_line_do_not_add_up() {
        // The sum of a line's halves has the variance of so many that are independent.
        for row in [0, 1] {
            let lines = halves(mix(5), 0, row);
            let sums: Vec<f64> = lines
                .chunks(LANES)
                .map(|line| line.iter().map(|&x| f64::from(x) / 65_536.0 - 0.5).sum())
                .collect();
            let variance = sums.iter().map(|x| x * x).sum::<f64>() / sums.len() as f64;
            let expected = LANES as f64 / 12.0;
            let deviation = expected * (2.0 / sums.len() as f64).sqrt();
            assert!((variance - expected).abs() < 4.0 * deviation, "{variance}");
        }
    }

    #[test]
    fn words_do_not_depend_on_the_order_in_which_they_are_asked_for() {
        for first in [0, 1 << 32, 1 << 63] {
            let counted = Numbers::From(first).words(9, 64);
            let numbers: Vec<u64> = (0..96).map(|i| first + (95 - i)).collect();
            let mut listed = Numbers::These(&numbers).words(9, 0);
            listed.reverse();
            assert_eq!(counted, listed);
            assert_eq!(Numbers::From(first).after(64).words(9, 0), counted);
            assert_eq!(Numbers::These(&numbers).words(9, 80)[16..], [0; 16]);
        }
    }
}
