//! State in fewer bits: what is kept of each number, and what is read back.

use crate::element::{Element, from_bf16, to_bf16};
use crate::rule::{LANES, stored};
use crate::simd::{Level, at};

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
        /// What the random bits depend on besides the element: seed, leaf, array and step.
        key: u32,
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

    /// The random bits of `LANES` elements from number `i` on.
    #[inline(always)]
    fn random(self, key: u32, i: usize) -> [u32; LANES] {
        match self {
            // Runs begin at multiples of a block, so within one the upper half of the number is one for all.
            Self::From(first) => {
                let first = first + i as u64;
                let high = spread(key, first);
                std::array::from_fn(|lane| mix(low(first + lane as u64) ^ high))
            }
            Self::These(numbers) => std::array::from_fn(|lane| {
                numbers
                    .get(i + lane)
                    .map_or(0, |&number| random(key, number))
            }),
        }
    }
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
                pairs.for_each(|(x, code)| *code = saturated(x.single(), to_bf16(x.single())))
            );
        }
        Rounding::Stochastic { key } => at!(
            level,
            by_tile(
                from,
                into,
                #[inline(always)]
                |i, from, into| {
                    let random = numbers.random(key, i);
                    for lane in 0..LANES {
                        into[lane] = either_bf16(from[lane].single(), random[lane]);
                    }
                }
            )
        ),
    }
}

/// The code of `x`, rounded up or down by random bits.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the upper half is kept")]
fn either_bf16(x: f32, random: u32) -> u16 {
    let up = (x.to_bits().wrapping_add(random & 0xffff) >> 16) as u16;
    if x.is_finite() {
        saturated(x, up)
    } else {
        to_bf16(x)
    }
}

#[inline(always)]
fn saturated(x: f32, code: u16) -> u16 {
    const LARGEST: u16 = 0x7f7f;
    let overflows = code & 0x7fff > LARGEST && x.is_finite();
    if overflows {
        code & 0x8000 | LARGEST
    } else {
        code
    }
}

/// The code of what is not finite; it is read back as NaN.
const LOST: u8 = 255;
/// Steps from nothing to a block's scale.
const SIGNED_STEPS: f32 = 127.0;
const UNSIGNED_STEPS: f32 = 254.0;

/// What `q` steps are of a block's scale. Squares (of either sign) and fourth powers, because the numbers of a block
/// spread over many sizes, second moments over the square of that.
#[inline(always)]
fn power<const SIGNED: bool>(q: f32) -> f32 {
    let x = q / if SIGNED { SIGNED_STEPS } else { UNSIGNED_STEPS };
    if SIGNED {
        x * x.abs()
    } else {
        (x * x) * (x * x)
    }
}

/// Reads one block of 8-bit codes.
pub fn read_8<F: Element>(level: Level, codec: Codec, from: &[u8], scale: f32, into: &mut [F]) {
    if codec == Codec::Signed8 {
        at!(level, read_block::<F, true>(from, scale, into));
    } else {
        at!(level, read_block::<F, false>(from, scale, into));
    }
}

#[inline(always)]
fn read_block<F: Element, const SIGNED: bool>(from: &[u8], scale: f32, into: &mut [F]) {
    for (&q, x) in from.iter().zip(into) {
        let steps = f32::from(q) - if SIGNED { SIGNED_STEPS } else { 0.0 };
        // Zeroed memory is a fresh state: a block without a scale is zero, whatever its codes.
        let number = stored(power::<SIGNED>(steps) * scale);
        *x = F::of_single(if q == LOST { f32::NAN } else { number });
    }
}

/// Keeps one block in 8-bit codes; returns its scale, the largest magnitude. A number that is not zero and never negative
/// is not rounded to zero: a denominator would vanish.
pub fn keep_8<F: Element>(
    level: Level,
    codec: Codec,
    rounding: Rounding,
    from: &[F],
    numbers: Numbers,
    into: &mut [u8],
) -> f32 {
    if codec == Codec::Signed8 {
        at!(level, keep_block::<F, true>(rounding, from, numbers, into))
    } else {
        at!(level, keep_block::<F, false>(rounding, from, numbers, into))
    }
}

#[inline(always)]
fn keep_block<F: Element, const SIGNED: bool>(
    rounding: Rounding,
    from: &[F],
    numbers: Numbers,
    into: &mut [u8],
) -> f32 {
    let mut largest = [0.0_f32; LANES];
    by_tile(
        from,
        &mut [0_u8; BLOCK][..from.len()],
        #[inline(always)]
        |_, from, _| {
            for lane in 0..LANES {
                let x = from[lane].single().abs();
                largest[lane] = if x > largest[lane] && x < f32::INFINITY {
                    x
                } else {
                    largest[lane]
                };
            }
        },
    );
    let scale = largest.into_iter().fold(0.0, f32::max);
    by_tile(
        from,
        into,
        #[inline(always)]
        |i, from, into| {
            let chances = match rounding {
                Rounding::Nearest => [0.5; LANES],
                Rounding::Stochastic { key } => numbers.random(key, i).map(uniform),
            };
            for lane in 0..LANES {
                into[lane] = code::<SIGNED>(from[lane].single(), scale, chances[lane]);
            }
        },
    );
    scale
}

/// The code of `x`: of the two that it lies between, the upper one if it is further from the lower than `chance` of the
/// way.
#[inline(always)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "at most 255"
)]
fn code<const SIGNED: bool>(x: f32, scale: f32, chance: f32) -> u8 {
    let most = if SIGNED { SIGNED_STEPS } else { UNSIGNED_STEPS };
    let part = (x / if scale == 0.0 { 1.0 } else { scale }).abs();
    let root = if SIGNED {
        part.sqrt()
    } else {
        part.sqrt().sqrt()
    };
    // Whole steps below; small numbers are cut to integers, which every instruction set can.
    let steps = root * most;
    let below = if steps < most - 1.0 {
        steps as i32 as f32
    } else {
        most - 1.0
    };
    let (low, high) = (power::<SIGNED>(below), power::<SIGNED>(below + 1.0));
    let q = below
        + if part - low > chance * (high - low) {
            1.0
        } else {
            0.0
        };
    let q = if SIGNED {
        SIGNED_STEPS + if x < 0.0 { -q } else { q }
    } else if x > 0.0 && q < 1.0 {
        1.0
    } else {
        q
    };
    if x.is_finite() { q as i32 as u8 } else { LOST }
}

/// 32 random bits for an element, from a counter: whoever asks for them again, in whatever order, gets the same.
#[must_use]
#[inline(always)]
pub fn random(key: u32, number: u64) -> u32 {
    mix(low(number) ^ spread(key, number))
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the lower half")]
fn low(number: u64) -> u32 {
    number as u32
}

#[inline(always)]
fn spread(key: u32, number: u64) -> u32 {
    mix(key ^ low(number >> 32).wrapping_mul(0x9e37_79b9))
}

/// Spreads every bit over all others: Wellons' `lowbias32`, <https://nullprogram.com/blog/2018/07/31/>.
#[must_use]
#[inline(always)]
pub fn mix(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// Uniform in [0, 1), in steps of 2^-24.
#[inline(always)]
fn uniform(bits: u32) -> f32 {
    #[allow(clippy::cast_precision_loss, reason = "24 bits fit")]
    let whole = (bits >> 8) as f32;
    whole * (1.0 / 16_777_216.0)
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

    #[test]
    fn stochastic_rounding_is_right_in_the_mean() {
        let x = 1.0 + 0.3 / 128.0;
        let back = bf16(Rounding::Stochastic { key: 7 }, &vec![x; 100_000]);
        assert!(back.iter().all(|&y| y == 1.0 || y == 1.0 + 1.0 / 128.0));
        let mean = back.iter().map(|&y| f64::from(y)).sum::<f64>() / 1e5;
        // A coin of chance .3: three standard deviations of the mean of 1e5.
        assert!((mean - f64::from(x)).abs() < 3.0 * (0.21_f64 / 1e5).sqrt() / 128.0);
    }

    #[test]
    fn what_can_be_kept_is_kept() {
        let exact = [0.0, 1.0, -1.5, f32::from_bits(0x7f7f_0000), f32::INFINITY];
        for rounding in [Rounding::Nearest, Rounding::Stochastic { key: 1 }] {
            assert_eq!(bf16(rounding, &exact), exact);
            assert!(bf16(rounding, &[f32::NAN])[0].is_nan());
            assert_eq!(bf16(rounding, &[f32::MAX])[0], exact[3]);
        }
    }

    #[test]
    fn eight_bits_keep_a_number_to_a_step_of_its_size() {
        let from: Vec<f32> = (0..256).map(|i| (-1.07_f32).powi(i - 200)).collect();
        let positive: Vec<f32> = from.iter().map(|x| x * x).collect();
        for (codec, from) in [(Codec::Signed8, &from), (Codec::Unsigned8, &positive)] {
            let (mut codes, mut back) = (vec![0; 256], vec![0.0; 256]);
            let scale = keep_8(
                Level::best(),
                codec,
                Rounding::Nearest,
                from,
                Numbers::From(0),
                &mut codes,
            );
            read_8(Level::best(), codec, &codes, scale, &mut back);
            for (&x, &y) in from.iter().zip(&back) {
                // Half the way between two codes: the derivative of the power, at either end of the step.
                let part = f64::from((x / scale).abs());
                let half = match codec {
                    Codec::Signed8 => (part.sqrt() + 1.0 / 127.0) / 127.0,
                    _ => (part.sqrt().sqrt() + 1.0 / 254.0).powi(3) * 4.0 / 254.0,
                };
                let error = f64::from((x - y).abs() / scale);
                assert!(error <= half * 1.001, "{x:e} {y:e} {error:e} {half:e}");
                assert_eq!(
                    codec == Codec::Unsigned8 && x > 0.0,
                    y > 0.0 && codec == Codec::Unsigned8
                );
            }
        }
    }

    #[test]
    fn zeroed_memory_is_a_fresh_state() {
        for codec in [Codec::Signed8, Codec::Unsigned8] {
            let mut back = [1.0_f32; 3];
            read_8(Level::best(), codec, &[0; 3], 0.0, &mut back);
            assert_eq!(back, [0.0; 3]);
        }
    }
}
