//! Arrays as they are stored: in the numbers that are computed with, or in bfloat16, which becomes such numbers a few
//! tiles at a time.

use std::ops::Range;

use crate::element::{Dtype, Element, from_bf16};
use crate::rule::LANES;

/// An array as it is stored: in the numbers `W` that are computed with, or in bfloat16.
#[derive(Clone, Copy, Debug)]
pub enum Array<W, H> {
    /// As it is computed.
    Whole(W),
    /// The upper 16 bits.
    Half(H),
}

/// An array that is read and written.
pub type Stored<'a, F> = Array<&'a mut [F], &'a mut [u16]>;
/// An array that is read.
pub type Given<'a, F> = Array<&'a [F], &'a [u16]>;

impl<F> Default for Stored<'_, F> {
    fn default() -> Self {
        Self::Whole(Default::default())
    }
}

impl<'a, F> Stored<'a, F> {
    /// Elements.
    pub(crate) fn count(&self) -> usize {
        match self {
            Self::Whole(x) => x.len(),
            Self::Half(x) => x.len(),
        }
    }

    /// The same array, for a while.
    pub fn again(&mut self) -> Stored<'_, F> {
        match self {
            Self::Whole(x) => Array::Whole(x),
            Self::Half(x) => Array::Half(x),
        }
    }

    /// The numbers, where they are stored as they are computed.
    ///
    /// # Panics
    /// If they are not.
    #[allow(clippy::mut_mut, reason = "an array can be taken out, and put back")]
    pub fn whole(&mut self) -> &mut &'a mut [F] {
        match self {
            Self::Whole(x) => x,
            Self::Half(_) => unreachable!("what passes beside the kernel touch is whole"),
        }
    }
}

/// Elements that are on the stack at a time: a few tiles, so that it takes little time to come to the next.
pub(crate) const FEW: usize = 4 * LANES;

impl<'a, F: Element> Given<'a, F> {
    /// A part of a few elements: itself, where it is whole, or a padded copy.
    #[inline(always)]
    pub(crate) fn few<'t>(&self, part: Range<usize>, copy: &'t mut [F; FEW]) -> &'t [F; FEW]
    where
        'a: 't,
    {
        match self {
            Self::Whole(x) => match x[part.clone()].try_into() {
                Ok(few) => return few,
                Err(_) => *copy = padded(&x[part]),
            },
            Self::Half(x) => *copy = widened(&x[part]),
        }
        copy
    }
}

impl<F: Element> Stored<'_, F> {
    /// Copies a part of a few elements, where it cannot be lent; what is missing are zeroes.
    #[inline(always)]
    pub(crate) fn copy_few(&self, part: Range<usize>, copy: &mut [F; FEW]) {
        match self {
            Self::Whole(_) if part.len() == FEW => {}
            Self::Whole(x) => *copy = padded(&x[part]),
            Self::Half(x) => *copy = widened(&x[part]),
        }
    }

    /// The part, where it can be lent.
    #[inline(always)]
    pub(crate) fn few(&mut self, part: Range<usize>) -> Option<&mut [F; FEW]> {
        match self {
            Self::Whole(x) => (&mut x[part]).try_into().ok(),
            Self::Half(_) => None,
        }
    }

    /// Puts a copy back, where there had to be one; `code` gives the bits of an element's number.
    #[inline(always)]
    pub(crate) fn set_few(
        &mut self,
        part: Range<usize>,
        copy: &[F; FEW],
        code: impl Fn(usize, f32) -> u16,
    ) {
        match self {
            Self::Whole(_) if part.len() == FEW => {}
            Self::Whole(x) => {
                let end = &mut x[part];
                end.copy_from_slice(&copy[..end.len()]);
            }
            Self::Half(_) if F::DTYPE != Dtype::F32 => {
                unreachable!("only those are kept in 16 bits")
            }
            Self::Half(x) => {
                let end = &mut x[part];
                if let Ok(few) = <&mut [u16; FEW]>::try_from(&mut *end) {
                    for i in 0..FEW {
                        few[i] = code(i, copy[i].single());
                    }
                    return;
                }
                for (i, bits) in end.iter_mut().enumerate() {
                    *bits = code(i, copy[i].single());
                }
            }
        }
    }
}

/// The numbers that bfloat16 stands for, and zeroes after them.
#[inline(always)]
fn widened<F: Element>(bits: &[u16]) -> [F; FEW] {
    let padding;
    let few = if let Ok(few) = <&[u16; FEW]>::try_from(bits) {
        few
    } else {
        padding = padded(bits);
        &padding
    };
    let mut x = [F::default(); FEW];
    for i in 0..FEW {
        x[i] = F::of_single(from_bf16(few[i]));
    }
    x
}

/// The elements, and zeroes after them.
#[inline(always)]
pub(crate) fn padded<T: Copy + Default, const N: usize>(end: &[T]) -> [T; N] {
    let mut all = [T::default(); N];
    all[..end.len()].copy_from_slice(end);
    all
}
