//! Passes over the gradients before anything moves: their norm, whether they are finite, their means, and the slopes
//! that tell the best slow step.

use std::mem::take;
use std::ops::Range;

use super::super::group::{Group, Number};
use super::super::memory::{Needs, Prepared, Scratch, Use, visit};
use super::{All, Grads};
use crate::gradient::{Means, Prepare};
use crate::kernel::Kept;
use crate::leaf::Leaf;
use crate::reduce::{Total, plus};
use crate::rule::SUMS;
use crate::simd::Level;

impl All<'_> {
    /// What the norm asks gradients to be multiplied by, the norm itself, and the first leaf that is not finite.
    ///
    /// # Safety
    /// As [`visit`], for all leaves and gradients.
    pub unsafe fn clip(&self, grads: Grads) -> (f64, Option<f64>, Option<usize>) {
        if self.options.max_norm.is_none() && !self.options.finite {
            return (1.0, None, None);
        }
        // SAFETY: as the caller vouches.
        let (norm, bad) = unsafe { self.norm(grads) };
        let clip = match self.options.max_norm {
            // Also where the norm is a NaN, so that it propagates.
            Some(most) if norm > most || norm.is_nan() => most / norm,
            _ => 1.0,
        };
        (clip, Some(norm), bad)
    }

    /// The norm of all gradients, and the first leaf of which an element is not finite.
    ///
    /// # Safety
    /// As [`visit`], for all leaves and gradients.
    unsafe fn norm(&self, grads: Grads) -> (f64, Option<usize>) {
        // SAFETY: as the caller vouches.
        unsafe {
            let squares = self.squares(grads, 1.0);
            let hidden = self.options.finite && self.options.max_value.is_some();
            if !hidden && (1e-290..f64::INFINITY).contains(&squares) {
                return (squares.sqrt(), None);
            }
            // Squares of float64 may vanish or overflow where the norm does not: then once more, in other units.
            let bad = self
                .not_finite::<f32>(grads)
                .into_iter()
                .chain(self.not_finite::<f64>(grads))
                .min();
            if (1e-290..f64::INFINITY).contains(&squares) {
                return (squares.sqrt(), bad);
            }
            let unit = if squares < 1.0 { 1e160 } else { 1e-160 };
            (self.squares(grads, unit).sqrt() / unit, bad)
        }
    }

    unsafe fn squares(&self, grads: Grads, unit: f64) -> f64 {
        // SAFETY: as the caller vouches.
        unsafe { self.squares_of::<f32>(grads, unit) + self.squares_of::<f64>(grads, unit) }
    }

    unsafe fn squares_of<F: Number>(&self, grads: Grads, unit: f64) -> f64 {
        let (mut squares, mut scratch) = (0.0, None);
        for (_, leaf) in self.leaves_of::<F>(grads.has) {
            let mut total = Total::default();
            let each = |range: Range<usize>, g: &[F]| {
                total.chunk.add_squares(Level::best(), g, unit);
                total.close(range.end, leaf.len());
            };
            let prepare = self.prepare(&self.groups[leaf.group], grads, 1.0);
            // SAFETY: as the caller vouches.
            unsafe { self.gradient(leaf, prepare, &mut scratch, each) };
            squares += total.sums[0];
        }
        squares
    }

    unsafe fn not_finite<F: Number>(&self, grads: Grads) -> Option<usize> {
        let (mut first, mut scratch) = (None, None);
        for (index, leaf) in self.leaves_of::<F>(grads.has) {
            let mut bad = false;
            let each = |_, g: &[F]| bad |= g.iter().any(|x| !x.is_number());
            // An infinity is no less one where it would be cut.
            let prepare = Prepare {
                limit: None,
                ..self.prepare(&self.groups[leaf.group], grads, 1.0)
            };
            // SAFETY: as the caller vouches.
            unsafe { self.gradient(leaf, prepare, &mut scratch, each) };
            if bad {
                first = Some(first.unwrap_or(index).min(index));
            }
        }
        first
    }

    /// Lends a leaf's gradient alone.
    unsafe fn gradient<F: Number>(
        &self,
        leaf: &Leaf,
        prepare: Prepare,
        scratch: &mut Option<Box<Scratch<F>>>,
        mut each: impl FnMut(Range<usize>, &[F]),
    ) {
        let group = &self.groups[leaf.group];
        let needs = Needs {
            p: Use::Nothing,
            rows: Use::Nothing,
            g: Some(Prepared {
                prepare,
                means: None,
            }),
            several: false,
        };
        let each = |range, _: &mut [F], g: Option<&[F]>, _: &mut Kept<F>| {
            each(range, g.expect("asked for"));
        };
        // SAFETY: as the caller vouches.
        unsafe { visit(self.arena, group, leaf, needs, scratch, each) };
    }

    /// The slow step that the gradients at both ends of a cycle say is best: along a line on which the loss is a
    /// parabola, its lowest point.
    ///
    /// # Safety
    /// As [`visit`], for all leaves and gradients.
    pub unsafe fn best_slow_step(&self, grads: Grads, low: f64) -> f64 {
        // SAFETY: as the caller vouches.
        let [first, change] = unsafe { plus(self.slopes::<f32>(grads), self.slopes::<f64>(grads)) };
        // Slopes along the way from slow to fast: `first` at slow, `change` less at fast.
        if change < 0.0 {
            (first / change).clamp(low, 1.0)
        } else if first < 0.0 {
            1.0
        } else {
            low
        }
    }

    unsafe fn slopes<F: Number>(&self, grads: Grads) -> [f64; SUMS] {
        let (mut sums, mut scratch) = ([0.0; SUMS], None);
        for &index in self.by_name {
            let leaf = &self.leaves[index];
            let group = &self.groups[leaf.group];
            if leaf.dtype.compute() != F::DTYPE || group.frozen {
                continue;
            }
            let has = grads.has[index];
            let prepare = self.prepare(group, grads, 1.0);
            let mut means = None;
            if has {
                // SAFETY: as the caller vouches.
                means = unsafe { self.means(leaf, prepare, &mut scratch) };
            }
            let needs = Needs {
                p: Use::Read,
                rows: Use::Whole,
                g: has.then_some(Prepared {
                    prepare,
                    means: means.as_ref(),
                }),
                several: true,
            };
            let step = Self::step_of::<F>(group, leaf, &[], 0, &[]);
            let (slow, begun) = (group.rows.innermost(), group.rows.gradient);
            let (slow, begun) = (slow.expect("a cycle"), begun.expect("a row for it"));
            let mut total = Total::default();
            let each = |range: Range<usize>, p: &mut [F], g: Option<&[F]>, kept: &mut Kept<F>| {
                step.load(p, kept);
                let slow = take(kept.row(slow));
                let before = take(kept.row(begun));
                total.chunk.add_each(p.len(), |i| {
                    let way = p[i].widened() - slow[i].widened();
                    // A loss that a leaf has no part in has no slope along it.
                    let now = g.map_or(0.0, |g| g[i].widened());
                    [way * before[i].widened(), way * (before[i].widened() - now)]
                });
                total.close(range.end, leaf.len());
            };
            // SAFETY: as the caller vouches.
            unsafe { visit(self.arena, group, leaf, needs, &mut scratch, each) };
            sums = plus(sums, total.sums);
        }
        sums
    }

    pub(super) fn prepare(&self, group: &Group, grads: Grads, clip: f64) -> Prepare {
        let sign = if group.maximize { -1.0 } else { 1.0 };
        Prepare {
            factor: sign * grads.scale,
            limit: self.options.max_value,
            clip,
        }
    }

    /// The means of a leaf's gradient, where it has more than one axis and they are to be taken away.
    pub(super) unsafe fn means<F: Number>(
        &self,
        leaf: &Leaf,
        prepare: Prepare,
        scratch: &mut Option<Box<Scratch<F>>>,
    ) -> Option<Means<F>> {
        let dims = leaf.shape.len();
        let axis = self.options.centralize.filter(|_| dims > 1)?;
        let axis = axis.rem_euclid(dims.cast_signed()).cast_unsigned();
        let position = leaf.order.iter().position(|&a| a == axis)?;
        let inner = leaf.order[position + 1..]
            .iter()
            .map(|&a| leaf.shape[a])
            .product();
        let mut means = Means::new(leaf.shape[axis], inner);
        let each = |range: Range<usize>, g: &[F]| means.add(range.start, g);
        // SAFETY: as the caller vouches.
        unsafe { self.gradient(leaf, prepare, scratch, each) };
        means.finish(leaf.len());
        Some(means)
    }
}
