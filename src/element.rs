//! Number formats: how a number is stored, and which one it is computed in.

use std::fmt;

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::rule::Float;
use crate::simd::{Level, at};

/// A number format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE binary16.
    F16,
    /// The upper half of IEEE binary32.
    BF16,
    /// IEEE binary32.
    F32,
    /// IEEE binary64.
    F64,
}

impl Dtype {
    /// Bytes a number.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// The format that numbers of this one are computed in.
    #[must_use]
    pub fn compute(self) -> Self {
        match self {
            Self::F16 | Self::BF16 | Self::F32 => Self::F32,
            Self::F64 => Self::F64,
        }
    }

    /// Whether stepped weights must be rounded to be stored.
    #[must_use]
    pub fn is_narrow(self) -> bool {
        self != self.compute()
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::F32 => "float32",
            Self::F64 => "float64",
        })
    }
}

/// A number that rules compute with, and its way from and to the narrower formats.
pub trait Element: Float {
    /// Its own format.
    const DTYPE: Dtype;
    /// The numbers that these 16 bits stand for.
    fn widen(level: Level, dtype: Dtype, from: &[u16], into: &mut [Self]);
    /// The nearest numbers of 16 bits; of two that are as near, the even one.
    fn narrow(level: Level, dtype: Dtype, from: &[Self], into: &mut [u16]);
    /// As `f32`.
    fn single(self) -> f32;
    /// From `f32`, exactly.
    fn of_single(x: f32) -> Self;
    /// Whether two are one number; a NaN is any other NaN, and zero is not minus zero.
    fn is_same(self, other: Self) -> bool;
    /// Whether it is neither infinite nor a NaN.
    fn is_number(self) -> bool;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;

    fn widen(level: Level, dtype: Dtype, from: &[u16], into: &mut [Self]) {
        if dtype == Dtype::F16 {
            from.reinterpret_cast::<f16>().convert_to_f32_slice(into);
        } else {
            let pairs = from.iter().zip(into);
            at!(level, pairs.for_each(|(&x, y)| *y = from_bf16(x)));
        }
    }

    fn narrow(level: Level, dtype: Dtype, from: &[Self], into: &mut [u16]) {
        if dtype == Dtype::F16 {
            let into = into.reinterpret_cast_mut::<f16>();
            into.convert_from_f32_slice(from);
        } else {
            let pairs = from.iter().zip(into);
            at!(level, pairs.for_each(|(&x, y)| *y = to_bf16(x)));
        }
    }

    fn single(self) -> f32 {
        self
    }

    fn of_single(x: f32) -> Self {
        x
    }

    fn is_same(self, other: Self) -> bool {
        self.to_bits() == other.to_bits() || self.is_nan() && other.is_nan()
    }

    fn is_number(self) -> bool {
        self.is_finite()
    }
}

impl Element for f64 {
    const DTYPE: Dtype = Dtype::F64;

    fn widen(_: Level, _: Dtype, _: &[u16], _: &mut [Self]) {
        unreachable!("numbers of 16 bits are computed with in f32");
    }

    fn narrow(_: Level, _: Dtype, _: &[Self], _: &mut [u16]) {
        unreachable!("numbers of 16 bits are computed with in f32");
    }

    #[allow(clippy::cast_possible_truncation, reason = "asked for")]
    fn single(self) -> f32 {
        self as f32
    }

    fn of_single(x: f32) -> Self {
        x.into()
    }

    fn is_same(self, other: Self) -> bool {
        self.to_bits() == other.to_bits() || self.is_nan() && other.is_nan()
    }

    fn is_number(self) -> bool {
        self.is_finite()
    }
}

/// The number that the upper half of its bits stands for.
#[must_use]
#[inline(always)]
pub fn from_bf16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// The upper half of a number's bits, rounded to nearest, ties to even. Integers, because the instruction that some
/// processors have for it drops denormals.
#[must_use]
#[inline(always)]
#[allow(
    clippy::cast_possible_truncation,
    reason = "the upper half is what is wanted"
)]
pub fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let quiet = bits | 0x0040_0000;
    ((if x.is_nan() { quiet } else { rounded }) >> 16) as u16
}

/// Where bits of 16 are no longer what `wide` numbers are rounded to, somebody has written them: the wide ones become
/// them. So weights that are kept in more bits than they are trained in never go stale.
pub fn adopt<F: Element>(level: Level, dtype: Dtype, bits: &[u16], wide: &mut [F]) {
    const PIECE: usize = 256;
    let (mut rounded, mut written) = ([0; PIECE], [F::default(); PIECE]);
    for (bits, wide) in bits.chunks(PIECE).zip(wide.chunks_mut(PIECE)) {
        let (rounded, written) = (&mut rounded[..wide.len()], &mut written[..wide.len()]);
        F::narrow(level, dtype, wide, rounded);
        if rounded != bits {
            F::widen(level, dtype, bits, written);
            for (i, wide) in wide.iter_mut().enumerate() {
                if rounded[i] != bits[i] {
                    *wide = written[i];
                }
            }
        }
    }
}

/// [`adopt`], of numbers that were stored in 16 bits.
pub fn adopt_widened<F: Element>(level: Level, dtype: Dtype, widened: &[F], wide: &mut [F]) {
    const PIECE: usize = 256;
    let mut bits = [0; PIECE];
    for (widened, wide) in widened.chunks(PIECE).zip(wide.chunks_mut(PIECE)) {
        let bits = &mut bits[..wide.len()];
        F::narrow(level, dtype, widened, bits);
        adopt(level, dtype, bits, wide);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_to_bf16_is_to_nearest_even() {
        for bits in (0..=u32::MAX).step_by(4_099) {
            let x = f32::from_bits(bits);
            let is = from_bf16(to_bf16(x));
            assert!(is.is_same(half::bf16::from_f32(x).to_f32()), "{x:e}");
        }
    }
}
