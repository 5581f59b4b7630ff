//! What happens to a gradient before a rule sees it: loss scale, clipping, centralisation. Options that are off cost
//! nothing, because the kernel then reads the user's own array.

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

    /// Prepares a run of elements.
    pub fn apply<F: Float>(&self, level: Level, g: &mut [F]) {
        if *self == Self::NOTHING {
            return;
        }
        let limit = self.limit.unwrap_or(f64::INFINITY);
        if is_normal::<F>(self.factor) && is_normal::<F>(self.clip) {
            let (factor, limit, clip) =
                (F::round(self.factor), F::round(limit), F::round(self.clip));
            at!(
                level,
                g.iter_mut()
                    .for_each(|g| *g = clamped(*g * factor, limit) * clip)
            );
        } else {
            // A factor that its numbers cannot hold.
            for g in g {
                let x = clamped(g.widened() * self.factor, limit);
                *g = F::round(x * self.clip);
            }
        }
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
pub struct Means<F> {
    /// Elements from one place on the axis to the next.
    inner: usize,
    sums: Vec<f64>,
    all: Vec<F>,
}

impl<F: Element> Means<F> {
    /// No sums yet, for an axis of `size` places that are `inner` elements apart.
    #[must_use]
    pub fn new(size: usize, inner: usize) -> Self {
        Self {
            inner,
            sums: vec![0.0; size],
            all: Vec::new(),
        }
    }

    /// Adds elements, the first of which is number `start`.
    pub fn add(&mut self, start: usize, g: &[F]) {
        for (at, &x) in (start..).zip(g) {
            let place = at / self.inner % self.sums.len();
            self.sums[place] += x.widened();
        }
    }

    /// Divides the sums by how many elements each has.
    pub fn finish(&mut self, len: usize) {
        #[allow(clippy::cast_precision_loss, reason = "no array has 2^53 elements")]
        let count = (len / self.sums.len().max(1)) as f64;
        self.all = self.sums.iter().map(|sum| F::round(sum / count)).collect();
    }

    /// Takes the means from elements, the first of which is number `start`.
    pub fn subtract(&self, start: usize, g: &mut [F]) {
        for (at, x) in (start..).zip(g) {
            *x = *x - self.all[at / self.inner % self.all.len()];
        }
    }
}
