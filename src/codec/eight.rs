//! 8 bits a number, and a scale a block.

use super::{BLOCK, Codec, Numbers, Rounding, by_tile, keep_by};
use crate::element::Element;
use crate::rule::{LANES, stored};
use crate::simd::{Level, at};

/// The code of what is not finite; it is read back as NaN.
const LOST: u8 = 255;
/// Steps from nothing to a block's scale.
const SIGNED_STEPS: f32 = 127.0;
const UNSIGNED_STEPS: f32 = 254.0;

/// Reads one block of 8-bit codes.
pub fn read_8<F: Element>(level: Level, codec: Codec, from: &[u8], scale: f32, into: &mut [F]) {
    if codec == Codec::Signed8 {
        at!(level, read_block::<F, true>(from, scale, into));
    } else {
        at!(level, read_block::<F, false>(from, scale, into));
    }
}

/// [`read_8`], for the instruction set of the caller.
#[inline(always)]
fn read_block<F: Element, const SIGNED: bool>(from: &[u8], scale: f32, into: &mut [F]) {
    by_tile(
        from,
        into,
        #[inline(always)]
        |_, from, into| {
            for lane in 0..LANES {
                into[lane] = F::of_single(number::<SIGNED>(from[lane], scale));
            }
        },
    );
}

/// What a code stands for: that part of the scale which is the square (of either sign) or the fourth power of the part of
/// all steps that it is, because the numbers of a block spread over many sizes, second moments over the square of that.
#[inline(always)]
fn number<const SIGNED: bool>(code: u8, scale: f32) -> f32 {
    // By these two factors, found by trying, the product is the quotient by 254, rounded once, for every code.
    const STEP: [f32; 2] = [1.678_802_5, 0.002_345_128_7];
    let x = if SIGNED {
        (f32::from(code) - SIGNED_STEPS) * STEP[0] * (2.0 * STEP[1])
    } else {
        f32::from(code) * STEP[0] * STEP[1]
    };
    let power = if SIGNED {
        x * x.abs()
    } else {
        (x * x) * (x * x)
    };
    // Zeroed memory is a fresh state: a block without a scale is zero, whatever its codes.
    let number = stored(power * scale);
    // LOST alone is more than all steps. Not compared as a byte, which would have to be widened once more.
    if x > 1.0 { f32::NAN } else { number }
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

/// [`keep_8`], for the instruction set of the caller.
#[inline(always)]
fn keep_block<F: Element, const SIGNED: bool>(
    rounding: Rounding,
    from: &[F],
    numbers: Numbers,
    into: &mut [u8],
) -> f32 {
    let scale = largest(from);
    if !scale.is_finite() {
        return keep_lost::<F, SIGNED>(rounding, from, numbers, into);
    }
    let unit = unit::<SIGNED>(scale);
    match rounding {
        Rounding::Nearest => by_tile(
            from,
            into,
            #[inline(always)]
            |_, from, into| {
                for lane in 0..LANES {
                    into[lane] = code::<SIGNED>(from[lane].single(), unit, middle::<SIGNED>());
                }
            },
        ),
        Rounding::Stochastic { key, row } => keep_by(
            key,
            row,
            from,
            numbers,
            into,
            #[inline(always)]
            |x, half| code::<SIGNED>(x, unit, chance::<SIGNED>(half)),
        ),
    }
    scale
}

/// [`keep_block`] where something is not finite: it keeps the others beside zeroes.
#[cold]
#[inline(never)]
fn keep_lost<F: Element, const SIGNED: bool>(
    rounding: Rounding,
    from: &[F],
    numbers: Numbers,
    into: &mut [u8],
) -> f32 {
    let mut finite = [F::default(); BLOCK];
    let finite = &mut finite[..from.len()];
    for (&x, finite) in from.iter().zip(&mut *finite) {
        if x.single().is_finite() {
            *finite = x;
        }
    }
    let scale = keep_block::<F, SIGNED>(rounding, finite, numbers, into);
    for (x, code) in from.iter().zip(into) {
        if !x.single().is_finite() {
            *code = LOST;
        }
    }
    scale
}

/// The largest magnitude. As integers, of which those of what is not finite are the largest.
#[inline(always)]
fn largest<F: Element>(from: &[F]) -> f32 {
    let mut largest = [0_u32; LANES];
    by_tile(
        from,
        &mut [0_u8; BLOCK][..from.len()],
        #[inline(always)]
        |_, from, _| {
            for lane in 0..LANES {
                let magnitude = from[lane].single().to_bits() & 0x7fff_ffff;
                largest[lane] = largest[lane].max(magnitude);
            }
        },
    );
    // By halves: one after the other would take as long as a quarter of all codes.
    let mut n = LANES / 2;
    while n > 0 {
        for lane in 0..n {
            largest[lane] = largest[lane].max(largest[lane + n]);
        }
        n /= 2;
    }
    f32::from_bits(largest[0])
}

/// Steps are counted in these parts, so that the power of all of them is near to one: divided by a scale, it is a number
/// whatever the scale.
const SIGNED_PART: f32 = 1.0 / 64.0;
const UNSIGNED_PART: f32 = 1.0 / 256.0;

/// What the numbers of a block are multiplied by to become powers of steps, none more than that of all steps.
#[inline(always)]
fn unit<const SIGNED: bool>(scale: f32) -> f32 {
    let all = if SIGNED {
        SIGNED_STEPS * SIGNED_PART
    } else {
        (UNSIGNED_STEPS * UNSIGNED_PART) * (UNSIGNED_STEPS * UNSIGNED_PART)
    };
    let all = all * all;
    let unit = all / scale;
    if scale < f32::MIN_POSITIVE {
        0.0
    } else if scale * unit > all {
        unit.next_down()
    } else {
        unit
    }
}

/// The code of a finite number: of the two steps that its power is between, the upper one if it is further from the lower
/// one than a random part `u` of the way, of which `chance` is made.
#[inline(always)]
#[allow(
    clippy::cast_possible_truncation,
    reason = "the lowest byte is what is wanted"
)]
fn code<const SIGNED: bool>(x: f32, unit: f32, chance: f32) -> u8 {
    /// Numbers from here on are whole, and the lowest byte of this one is zero: to add it rounds to nearest.
    const WHOLE: f32 = 12_582_912.0;
    let power = x.abs() * unit;
    if SIGNED {
        // Between b^2 and (b + 1)^2, u of the way is (b + u)^2 + u (1 - u): so steps are a root, less u, rounded up. With
        // u - 1/2, which is the chance: less the chance, rounded to nearest.
        let power = power - (SIGNED_PART * SIGNED_PART * 0.25 - chance * chance);
        let power = if power > 0.0 { power } else { 0.0 };
        let steps = power.sqrt() - chance;
        let steps = f32::from_bits(steps.to_bits() ^ (x.to_bits() & 0x8000_0000));
        (steps + (WHOLE + SIGNED_STEPS) * SIGNED_PART).to_bits() as u8
    } else {
        const ONE: f32 = (UNSIGNED_PART * UNSIGNED_PART) * (UNSIGNED_PART * UNSIGNED_PART);
        let least = if x > 0.0 { ONE } else { 0.0 };
        let power = if power < least { least } else { power };
        // Rounded down: half a step lower, to nearest. Where that is one too low, the power is at the upper step.
        let steps = power.sqrt().sqrt();
        let sum = (steps - 0.5 * UNSIGNED_PART) + WHOLE * UNSIGNED_PART;
        let below = sum - WHOLE * UNSIGNED_PART;
        let above = below + UNSIGNED_PART;
        let (low, high) = (below * below, above * above);
        let (low, high) = (low * low, high * high);
        let up = power - low > chance * (high - low);
        sum.to_bits().wrapping_add(u32::from(up)) as u8
    }
}

/// The chance of 16 random bits: of 2^15 equal parts of 0 to 1, the middle of one.
#[inline(always)]
fn chance<const SIGNED: bool>(bits: u32) -> f32 {
    // The last bits of numbers from 128 on count 2^-16ths, those of numbers from 2 on as many parts of steps.
    if SIGNED {
        f32::from_bits(2.0_f32.to_bits() | bits | 1) - (2.0 + 0.5 * SIGNED_PART)
    } else {
        f32::from_bits(128.0_f32.to_bits() | bits | 1) - 128.0
    }
}

/// The chance of a half, by which rounding is to nearest.
#[inline(always)]
fn middle<const SIGNED: bool>() -> f32 {
    if SIGNED { 0.0 } else { 0.5 }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "equal bits are what is claimed")]
mod tests {
    use super::super::tests::{numbers, roundings};
    use super::*;

    #[test]
    fn codes_of_8_bits_stand_for_what_they_always_did() {
        for scale in [1.0, 0.3, 7.1e-20, 1.3e-38, f32::MAX] {
            for code in 0..LOST {
                let x = (f32::from(code) - 127.0) / 127.0;
                let signed = stored(x * x.abs() * scale);
                assert_eq!(number::<true>(code, scale).to_bits(), signed.to_bits());
                let x = f32::from(code) / 254.0;
                let unsigned = stored((x * x) * (x * x) * scale);
                assert_eq!(number::<false>(code, scale).to_bits(), unsigned.to_bits());
            }
            assert_eq!(number::<true>(LOST, scale).to_bits(), f32::NAN.to_bits());
            assert_eq!(number::<false>(LOST, scale).to_bits(), f32::NAN.to_bits());
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

    /// The code by one of all `2^16` random halves.
    fn code_by<const SIGNED: bool>(x: f32, scale: f32, half: u32) -> u8 {
        code::<SIGNED>(x, unit::<SIGNED>(scale), chance::<SIGNED>(half))
    }

    fn over_all_halves_codes_are_right_in_the_mean<const SIGNED: bool>() {
        let scale = 0.37_f32;
        for i in 0..60_u8 {
            // Of all sizes, between all codes.
            let part = (f32::from(i) + 0.618) / 60.0;
            let x = if SIGNED {
                -part * part
            } else {
                part * part * part * part
            } * scale;
            let codes = |half| code_by::<SIGNED>(x, scale, half);
            let mean = (0..1 << 16)
                .map(|half| f64::from(number::<SIGNED>(codes(half), scale)))
                .sum::<f64>()
                / 65_536.0;
            let ends = [codes(0), codes(0xffff)].map(|q| f64::from(number::<SIGNED>(q, scale)));
            let step = (ends[0] - ends[1]).abs();
            assert!(codes(0).abs_diff(codes(0xffff)) == 1, "{x:e}");
            // Half a part of 2^15, and what f32 rounds on the way to step 127, or 254.
            assert!(
                (mean - f64::from(x)).abs() <= 5e-5 * step,
                "{x:e} {mean:e} {step:e}"
            );
        }
    }

    #[test]
    fn eight_bits_are_right_in_the_mean() {
        over_all_halves_codes_are_right_in_the_mean::<true>();
        over_all_halves_codes_are_right_in_the_mean::<false>();
    }

    fn a_block_keeps_its_ends_and_its_codes<const SIGNED: bool>() {
        let most = if SIGNED { LOST - 1 } else { 254 };
        let zero = if SIGNED { 127 } else { 0 };
        // Of larger scales, the inverse is denormal: a few of their largest numbers go a step down.
        for scale in numbers().filter(|x| *x >= f32::MIN_POSITIVE && *x < 4e37) {
            for half in [0, 1, 0x7fff, 0x8000, 0xffff] {
                assert_eq!(code_by::<SIGNED>(scale, scale, half), most, "{scale:e}");
                assert_eq!(code_by::<SIGNED>(0.0, scale, half), zero, "{scale:e}");
                assert_eq!(code_by::<SIGNED>(-0.0, scale, half), zero, "{scale:e}");
                if SIGNED {
                    assert_eq!(code_by::<true>(-scale, scale, half), 0, "{scale:e}");
                } else {
                    assert_ne!(code_by::<false>(1e-45, scale, half), 0, "{scale:e}");
                }
            }
        }
        for scale in [1.0, 0.3, 7.1e-20, 4e-30, 8e37, f32::MAX] {
            for q in 0..LOST {
                let x = number::<SIGNED>(q, scale);
                let middle = middle::<SIGNED>();
                let again = code::<SIGNED>(x, unit::<SIGNED>(scale), middle);
                assert!(again == q || x == 0.0, "{q} {again} {scale:e}");
            }
        }
    }

    #[test]
    fn eight_bits_keep_what_they_can_hold() {
        a_block_keeps_its_ends_and_its_codes::<true>();
        a_block_keeps_its_ends_and_its_codes::<false>();
    }

    #[test]
    fn what_is_not_finite_is_lost_alone() {
        let mut from: Vec<f32> = (0..100_u8).map(|i| f32::from(i) / 99.0).collect();
        (from[3], from[50], from[98]) = (f32::NAN, f32::INFINITY, f32::from_bits(0xff80_0001));
        for codec in [Codec::Signed8, Codec::Unsigned8] {
            for rounding in roundings() {
                let (mut codes, mut back) = (vec![0; 100], vec![0.0_f32; 100]);
                let numbers = Numbers::From(0);
                let scale = keep_8(Level::best(), codec, rounding, &from, numbers, &mut codes);
                read_8(Level::best(), codec, &codes, scale, &mut back);
                assert_eq!((scale, back[99]), (1.0, 1.0));
                for (i, (&x, &y)) in from.iter().zip(&back).enumerate() {
                    assert_eq!(y.is_nan(), [3, 50, 98].contains(&i));
                    assert!(y.is_nan() || (x - y).abs() < 0.02);
                }
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
