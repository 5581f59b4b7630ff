//! What happens to a gradient before a rule sees it: loss scale, clipping, centralisation. Options that are off cost
//! nothing, because the kernel then reads the user's own array.

use crate::element::Element;
use crate::rule::Float;
use crate::simd::{Level, at};

/// The arithmetic, the same for every element of a leaf.
#[derive(Clone, Copy, Debug)]
pub struct Prepare<F> {
    /// Times this,
    pub factor: F,
    /// then no larger than this,
    pub limit: Option<F>,
    /// then times this.
    pub clip: F,
}

impl<F: Float> Prepare<F> {
    /// Whether gradients stay as they are.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.factor == F::ONE && self.limit.is_none() && self.clip == F::ONE
    }

    /// Prepares a run of elements.
    pub fn apply(&self, level: Level, g: &mut [F]) {
        let (factor, clip) = (self.factor, self.clip);
        match self.limit {
            None => at!(level, g.iter_mut().for_each(|g| *g = *g * factor * clip)),
            Some(limit) => at!(
                level,
                g.iter_mut().for_each(|g| {
                    let x = *g * factor;
                    let above = if x > limit { limit } else { x };
                    *g = if above < -limit { -limit } else { above } * clip;
                })
            ),
        }
    }
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
            self.sums[place] += x.double();
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
