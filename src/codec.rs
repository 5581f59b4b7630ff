//! State in fewer bits: what is kept of each number, and what is read back.

use crate::element::{Element, from_bf16};
use crate::rule::LANES;
use crate::simd::{Level, at};

mod eight;
mod random;

pub use eight::{keep_8, read_8};
pub use random::{Numbers, half, mix};

/// Elements that share a scale.
pub const BLOCK: usize = 256;
const _: () = assert!(BLOCK.is_multiple_of(LANES));

/// How a state array is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// As it is computed.
    Whole,
    /// The upper 16 bits.
    BFloat16,
    /// 8 bits of a number of either sign, and a scale a block.
    Signed8,
    /// 8 bits of a number that is never negative, and a scale a block.
    Unsigned8,
}

/// How a number between two that can be kept becomes one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// The nearer one; of two that are as near, the even one.
    Nearest,
    /// Either, the nearer one more often, so that what is kept is right in the mean.
    Stochastic {
        /// What the random bits depend on besides the element and the row: seed, leaf, step and half the row.
        key: u32,
        /// The row. Two of them share a word of random bits.
        row: usize,
    },
}

impl Codec {
    /// Bytes that `n` numbers take where one is computed in `size` bytes: codes, then scales.
    #[must_use]
    pub fn bytes(self, n: usize, size: usize) -> (usize, usize) {
        match self {
            Self::Whole => (n * size, 0),
            Self::BFloat16 => (n * 2, 0),
            Self::Signed8 | Self::Unsigned8 => (n, n.div_ceil(BLOCK) * 4),
        }
    }
}

/// Reads bfloat16.
pub fn read_bf16<F: Element>(level: Level, codes: &[u16], into: &mut [F]) {
    let pairs = codes.iter().zip(into);
    at!(
        level,
        pairs.for_each(|(&x, y)| *y = F::of_single(from_bf16(x)))
    );
}

/// Calls `each` with `LANES` elements of `from`, zeroes after its end, and with what comes of them; tile by tile.
#[inline(always)]
fn by_tile<A: Copy + Default, B: Copy + Default>(
    from: &[A],
    into: &mut [B],
    mut each: impl FnMut(usize, &[A; LANES], &mut [B; LANES]),
) {
    let (tiles, end) = from.as_chunks::<LANES>();
    let (into, into_end) = into.as_chunks_mut::<LANES>();
    for (i, (a, b)) in tiles.iter().zip(into).enumerate() {
        each(i * LANES, a, b);
    }
    if !end.is_empty() {
        let (mut a, mut b) = ([A::default(); LANES], [B::default(); LANES]);
        a[..end.len()].copy_from_slice(end);
        each(tiles.len() * LANES, &a, &mut b);
        into_end.copy_from_slice(&b[..end.len()]);
    }
}

/// Keeps bfloat16. What overflows is kept as the largest number, like all state.
pub fn keep_bf16<F: Element>(
    level: Level,
    rounding: Rounding,
    from: &[F],
    numbers: Numbers,
    into: &mut [u16],
) {
    match rounding {
        Rounding::Nearest => {
            let pairs = from.iter().zip(into);
            at!(
                level,
                pairs.for_each(|(x, code)| *code = nearest_bf16(x.single()))
            );
        }
        Rounding::Stochastic { key, row } => {
            at!(level, keep_by(key, row, from, numbers, into, either_bf16));
        }
    }
}

/// Keeps each number as `code` says by 16 random bits.
#[inline(always)]
fn keep_by<F: Element, C: Copy + Default>(
    key: u32,
    row: usize,
    from: &[F],
    numbers: Numbers,
    into: &mut [C],
    code: impl Fn(f32, u32) -> C + Copy,
) {
    // Where the row is known, its half costs less.
    if row.is_multiple_of(2) {
        keep_by_half::<F, C, 0>(key, from, numbers, into, code);
    } else {
        keep_by_half::<F, C, 1>(key, from, numbers, into, code);
    }
}

#[inline(always)]
fn keep_by_half<F: Element, C: Copy + Default, const ROW: usize>(
    key: u32,
    from: &[F],
    numbers: Numbers,
    into: &mut [C],
    code: impl Fn(f32, u32) -> C + Copy,
) {
    by_tile(
        from,
        into,
        #[inline(always)]
        |i, from, into| {
            let words = numbers.words(key, i);
            for lane in 0..LANES {
                into[lane] = code(from[lane].single(), half(ROW, words[lane]));
            }
        },
    );
}

/// The code of `x`, rounded to nearest.
#[must_use]
#[inline(always)]
pub fn nearest_bf16(x: f32) -> u16 {
    either_bf16(x, 0x7fff + ((x.to_bits() >> 16) & 1))
}

/// The code of `x`, rounded up or down by 16 random bits. NaN stays what arithmetic makes of it; one that has bits in its
/// lower half alone, which no arithmetic makes, becomes infinite.
#[must_use]
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the upper half is kept")]
pub fn either_bf16(x: f32, random: u32) -> u16 {
    const LARGEST: f32 = f32::from_bits(0x7f7f_0000);
    // What is larger is kept as the largest number, or is not finite: either way its upper half is right already.
    let random = if x.abs() <= LARGEST { random } else { 0 };
    (x.to_bits().wrapping_add(random) >> 16) as u16
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "equal bits are what is claimed")]
mod tests {
    use super::*;

    fn bf16(rounding: Rounding, from: &[f32]) -> Vec<f32> {
        let (mut codes, mut back) = (vec![0; from.len()], vec![0.0; from.len()]);
        keep_bf16(Level::best(), rounding, from, Numbers::From(0), &mut codes);
        read_bf16(Level::best(), &codes, &mut back);
        back
    }

    /// A rounding to nearest, and those of two rows.
    pub fn roundings() -> [Rounding; 3] {
        let stochastic = |row| Rounding::Stochastic { key: 7, row };
        [Rounding::Nearest, stochastic(0), stochastic(1)]
    }

    /// Numbers of all sizes.
    pub fn numbers() -> impl Iterator<Item = f32> {
        (0..=u32::MAX).step_by(40_009).map(f32::from_bits)
    }

    #[test]
    fn stochastic_rounding_is_right_in_the_mean() {
        let x = 1.0 + 0.3 / 128.0;
        for rounding in &roundings()[1..] {
            let back = bf16(*rounding, &vec![x; 100_000]);
            assert!(back.iter().all(|&y| y == 1.0 || y == 1.0 + 1.0 / 128.0));
            let mean = back.iter().map(|&y| f64::from(y)).sum::<f64>() / 1e5;
            // A coin of chance .3: three standard deviations of the mean of 1e5.
            assert!((mean - f64::from(x)).abs() < 3.0 * (0.21_f64 / 1e5).sqrt() / 128.0);
        }
    }

    #[test]
    fn what_can_be_kept_is_kept() {
        let exact = [0.0, 1.0, -1.5, f32::from_bits(0x7f7f_0000), f32::INFINITY];
        for rounding in roundings() {
            assert_eq!(bf16(rounding, &exact), exact);
            assert!(bf16(rounding, &[f32::NAN])[0].is_nan());
            assert_eq!(bf16(rounding, &[f32::MAX])[0], exact[3]);
        }
    }

    #[test]
    fn bfloat16_is_a_neighbour_and_the_nearest_one() {
        let largest = half::bf16::MAX.to_f32();
        for x in numbers().filter(|x| x.is_finite()) {
            let nearest = half::bf16::from_f32(x).to_f32().clamp(-largest, largest);
            assert_eq!(from_bf16(nearest_bf16(x)), nearest, "{x:e}");
            let below = from_bf16(either_bf16(x, 0));
            assert_eq!(below, f32::from_bits(x.to_bits() & 0xffff_0000), "{x:e}");
            let above = from_bf16(either_bf16(x, 0xffff));
            let next = f32::from_bits(x.to_bits().wrapping_add(0xffff) & 0xffff_0000);
            assert_eq!(above, next.clamp(-largest, largest), "{x:e}");
        }
        for bits in (0x7f80_0000..=0x7fff_ffff).step_by(97).chain([u32::MAX]) {
            let x = f32::from_bits(bits);
            for random in [0, 1, 0x8000, 0xffff] {
                let back = from_bf16(either_bf16(x, random));
                assert!(!back.is_finite(), "{bits:x}");
                assert!(back.is_nan() || bits <= 0x7f80_ffff, "{bits:x}");
            }
        }
    }
}
