//! State in fewer bits: what is kept of each number, and what is read back.

use crate::element::{Element, from_bf16, to_bf16};
use crate::rule::LANES;
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

/// Keeps bfloat16. What overflows is kept as the largest number, like all state.
pub fn keep_bf16<F: Element>(
    level: Level,
    rounding: Rounding,
    from: &[F],
    index: impl Fn(usize) -> u64,
    codes: &mut [u16],
) {
    const LARGEST: u16 = 0x7f7f;
    let saturated = |x: f32, code: u16| {
        let overflows = code & 0x7fff > LARGEST && x.is_finite();
        if overflows {
            code & 0x8000 | LARGEST
        } else {
            code
        }
    };
    match rounding {
        Rounding::Nearest => {
            let pairs = from.iter().zip(codes);
            at!(
                level,
                pairs.for_each(|(x, code)| {
                    let x = x.single();
                    *code = saturated(x, to_bf16(x));
                })
            );
        }
        Rounding::Stochastic { key } => {
            let pairs = from.iter().zip(codes).enumerate();
            at!(
                level,
                pairs.for_each(|(i, (x, code))| {
                    let x = x.single();
                    let up = x.to_bits().wrapping_add(random(key, index(i)) & 0xffff);
                    #[allow(clippy::cast_possible_truncation, reason = "the upper half is kept")]
                    let either = (up >> 16) as u16;
                    *code = if x.is_finite() {
                        saturated(x, either)
                    } else {
                        to_bf16(x)
                    };
                })
            );
        }
    }
}

/// The code of what is not finite; it is read back as NaN.
const LOST: u8 = 255;

/// What code `q` is of its block's scale. Squares (of either sign) and fourth powers, because the numbers of a block
/// spread over many sizes, second moments over the square of that.
fn fraction(codec: Codec, q: u8) -> f32 {
    if codec == Codec::Signed8 {
        let x = (f32::from(q) - 127.0) / 127.0;
        x * x.abs()
    } else {
        let x = f32::from(q) / 254.0;
        (x * x) * (x * x)
    }
}

/// Reads one block of 8-bit codes.
pub fn read_8<F: Element>(codec: Codec, codes: &[u8], scale: f32, into: &mut [F]) {
    for (&q, x) in codes.iter().zip(into) {
        *x = F::of_single(match (codec, q) {
            (Codec::Signed8 | Codec::Unsigned8, LOST) => f32::NAN,
            // Zeroed memory is a fresh state: a block without a scale is zero, whatever its codes.
            _ if scale == 0.0 => 0.0,
            _ => fraction(codec, q) * scale,
        });
    }
}

/// Keeps one block in 8-bit codes; returns its scale, the largest magnitude. A number that is not zero and never negative
/// is not rounded to zero: a denominator would vanish.
pub fn keep_8<F: Element>(
    codec: Codec,
    rounding: Rounding,
    from: &[F],
    index: impl Fn(usize) -> u64,
    codes: &mut [u8],
) -> f32 {
    let finite = from
        .iter()
        .map(|x| x.single().abs())
        .filter(|x| x.is_finite());
    let scale = finite.fold(0.0, f32::max);
    for (i, (x, code)) in from.iter().zip(codes).enumerate() {
        let x = x.single();
        let part = (x / scale).abs();
        let chance = match rounding {
            Rounding::Nearest => 0.5,
            Rounding::Stochastic { key } => uniform(random(key, index(i))),
        };
        // The number lies between the codes `steps` and `steps + 1`.
        let (steps, most) = match codec {
            Codec::Signed8 => (part.sqrt() * 127.0, 127.0),
            _ => (part.sqrt().sqrt() * 254.0, 254.0),
        };
        let below = steps.floor().min(most - 1.0);
        let side = |q: f32| match codec {
            Codec::Signed8 => (q / most) * (q / most),
            _ => ((q / most) * (q / most)) * ((q / most) * (q / most)),
        };
        let (low, high) = (side(below), side(below + 1.0));
        let q = if part - low > chance * (high - low) {
            below + 1.0
        } else {
            below
        };
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "at most 254"
        )]
        let code_of = |q: f32| q as u8;
        *code = if !x.is_finite() {
            LOST
        } else if scale == 0.0 {
            if codec == Codec::Signed8 { 127 } else { 0 }
        } else if codec == Codec::Signed8 {
            code_of(if x < 0.0 { 127.0 - q } else { 127.0 + q })
        } else {
            code_of(if x > 0.0 { q.max(1.0) } else { 0.0 })
        };
    }
    scale
}

/// 32 random bits for an element, from a counter: whoever asks for them again, in whatever order, gets the same.
#[must_use]
#[inline(always)]
pub fn random(key: u32, index: u64) -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "both halves are used")]
    let (low, high) = (index as u32, (index >> 32) as u32);
    mix(low ^ mix(key ^ high.wrapping_mul(0x9e37_79b9)))
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
mod tests {
    use super::*;

    fn bf16(rounding: Rounding, from: &[f32]) -> Vec<f32> {
        let (mut codes, mut back) = (vec![0; from.len()], vec![0.0; from.len()]);
        keep_bf16(Level::best(), rounding, from, |i| i as u64, &mut codes);
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
            let scale = keep_8(codec, Rounding::Nearest, from, |i| i as u64, &mut codes);
            read_8(codec, &codes, scale, &mut back);
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
            read_8(codec, &[0; 3], 0.0, &mut back);
            assert_eq!(back, [0.0; 3]);
        }
    }
}
