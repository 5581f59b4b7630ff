//! What happens to a gradient before a rule sees it: loss scale, clipping, centralisation. Options that are off cost
//! nothing, because the kernel then reads the user's own array.

use std::ops::Range;

use crate::element::Element;
use crate::rule::Float;
use crate::simd::{Level, at};

/// The arithmetic, the same for every element of a leaf.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prepare {
    /// Times this,
    pub factor: f64,
    /// then no larger than this,
    pub limit: Option<f64>,
    /// then times this.
    pub clip: f64,
}

impl Prepare {
    /// Gradients stay as they are.
    pub const NOTHING: Self = Self {
        factor: 1.0,
        limit: None,
        clip: 1.0,
    };

    /// The same in the numbers that are computed with; none, where they cannot hold it.
    #[must_use]
    pub fn factor<F: Float>(&self) -> Option<Factor<F>> {
        (is_normal::<F>(self.factor) && is_normal::<F>(self.clip)).then(|| Factor {
            scale: F::round(self.factor),
            limit: F::round(self.limit.unwrap_or(f64::INFINITY)),
            clip: F::round(self.clip),
        })
    }

    /// Prepares a run of elements.
    pub fn apply<F: Float>(&self, level: Level, g: &mut [F]) {
        if *self == Self::NOTHING {
            return;
        }
        if let Some(factor) = self.factor::<F>() {
            at!(level, g.iter_mut().for_each(|g| *g = factor.of(*g)));
            return;
        }
        let limit = self.limit.unwrap_or(f64::INFINITY);
        for g in g {
            let x = clamped(g.widened() * self.factor, limit);
            *g = F::round(x * self.clip);
        }
    }
}

/// [`Prepare`], rounded once.
#[derive(Clone, Copy, Debug)]
pub struct Factor<F> {
    scale: F,
    limit: F,
    clip: F,
}

impl<F: Float> Factor<F> {
    #[inline(always)]
    fn of(self, g: F) -> F {
        clamped(g * self.scale, self.limit) * self.clip
    }

    /// Prepared gradients.
    #[inline(always)]
    pub(crate) fn times<const N: usize>(self, g: &[F; N]) -> [F; N] {
        let mut prepared = [F::default(); N];
        for i in 0..N {
            prepared[i] = self.of(g[i]);
        }
        prepared
    }
}

#[inline(always)]
fn clamped<F: Float>(x: F, limit: F) -> F {
    let above = if x > limit { limit } else { x };
    if above < -limit { -limit } else { above }
}

fn is_normal<F: Float>(x: f64) -> bool {
    (F::MIN_POSITIVE.widened()..=F::MAX.widened()).contains(&x.abs()) || x == 0.0 || x.is_nan()
}

/// The means of a gradient's slices along its output axis (Yong et al., 2020, "Gradient Centralization",
/// <https://arxiv.org/abs/2004.01461>), for a leaf whose elements are numbered in an order of its own.
#[derive(Clone, Debug)]
pub struct Means {
    /// Elements from one place on the axis to the next.
    inner: usize,
    /// Sums, and means once they are finished.
    places: Vec<f64>,
}

impl Means {
    /// No sums yet, for an axis of `size` places that are `inner` elements apart.
    #[must_use]
    pub fn new(size: usize, inner: usize) -> Self {
        Self {
            inner,
            places: vec![0.0; size],
        }
    }

    /// Adds elements, the first of which is number `start`.
    pub fn add<F: Element>(&mut self, start: usize, g: &[F]) {
        let (inner, places) = (self.inner, &mut self.places);
        runs(inner, places.len(), start, g.len(), |run, place| {
            if inner == 1 {
                for (sum, &x) in places[place..].iter_mut().zip(&g[run]) {
                    *sum += x.widened();
                }
            } else {
                for &x in &g[run] {
                    places[place] += x.widened();
                }
            }
        });
    }

    /// Divides the sums by how many elements each has.
    pub fn finish(&mut self, len: usize) {
        #[allow(clippy::cast_precision_loss, reason = "no array has 2^53 elements")]
        let count = (len / self.places.len().max(1)) as f64;
        for place in &mut self.places {
            *place /= count;
        }
    }

    /// Takes the means from elements, the first of which is number `start`.
    pub fn subtract<F: Element>(&self, start: usize, g: &mut [F]) {
        runs(
            self.inner,
            self.places.len(),
            start,
            g.len(),
            |run, place| {
                if self.inner == 1 {
                    for (x, &mean) in g[run].iter_mut().zip(&self.places[place..]) {
                        *x = *x - F::round(mean);
                    }
                } else {
                    let mean = F::round(self.places[place]);
                    for x in &mut g[run] {
                        *x = *x - mean;
                    }
                }
            },
        );
    }
}

/// Calls `each` with runs of `len` elements, the first of which is number `start`, and with the place of their first:
/// where places are one element apart, the others of a run are at those after it; else all are at one.
fn runs(
    inner: usize,
    size: usize,
    start: usize,
    len: usize,
    mut each: impl FnMut(Range<usize>, usize),
) {
    let mut at = 0;
    while at < len {
        let element = start + at;
        let (place, run) = if inner == 1 {
            (element % size, size - element % size)
        } else {
            (element / inner % size, inner - element % inner)
        };
        let end = len.min(at + run);
        each(at..end, place);
        at = end;
    }
}
