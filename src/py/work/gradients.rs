//! Passes over the gradients before anything moves: their norm, whether they are finite, their means, and the slopes
//! that tell the best slow step.

use std::mem::take;
use std::ops::Range;

use super::super::group::Group;
use super::super::memory::{Needs, Prepared, SEVERAL, Use, visit};
use super::{All, Gather, Grads, Handled, Hands, as_computed};
use crate::array::Stored;
use crate::element::Dtype;
use crate::gradient::{Means, Prepare};
use crate::kernel::{Gradient, Kept};
use crate::leaf::Leaf;
use crate::reduce::CHUNK;
use crate::simd::Level;
use crate::step::Raw;

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
            let bad = self.not_finite(grads);
            if (1e-290..f64::INFINITY).contains(&squares) {
                return (squares.sqrt(), bad);
            }
            let unit = if squares < 1.0 { 1e160 } else { 1e-160 };
            (self.squares(grads, unit).sqrt() / unit, bad)
        }
    }

    unsafe fn squares(&self, grads: Grads, unit: f64) -> f64 {
        let sums = self.totals(
            |index| grads.has[index],
            |hands, gather, index, part| {
                let leaf = &self.leaves[index];
                // SAFETY: as the caller vouches.
                unsafe {
                    as_computed!(
                        leaf,
                        self.squares_of(hands, gather, leaf, part, grads, unit)
                    );
                }
            },
        );
        self.added_up(&sums)[0]
    }

    unsafe fn squares_of<F: Handled>(
        &self,
        hands: &mut Hands,
        gather: &mut Gather,
        leaf: &Leaf,
        part: Range<usize>,
        grads: Grads,
        unit: f64,
    ) {
        let prepare = self.prepare(&self.groups[leaf.group()], grads, 1.0);
        let each = |range: Range<usize>, g: &[F]| {
            gather.chunk.add_squares(Level::best(), g, unit);
            gather.close(range.end);
        };
        // SAFETY: as the caller vouches.
        unsafe { self.gradient(hands, leaf, part, prepare, each) };
    }

    /// The first leaf of which an element is not finite.
    unsafe fn not_finite(&self, grads: Grads) -> Option<usize> {
        let first = self.over(|hands, first: &mut Option<usize>, index, part| {
            let leaf = &self.leaves[index];
            if first.is_none() && self.moves(grads.has, index) {
                // SAFETY: as the caller vouches.
                let bad =
                    unsafe { as_computed!(leaf, self.is_not_finite(hands, leaf, part, grads)) };
                *first = bad.then_some(index);
            }
        });
        first.into_iter().flatten().min()
    }

    unsafe fn is_not_finite<F: Handled>(
        &self,
        hands: &mut Hands,
        leaf: &Leaf,
        part: Range<usize>,
        grads: Grads,
    ) -> bool {
        // An infinity is no less one where it would be cut.
        let prepare = Prepare {
            limit: None,
            ..self.prepare(&self.groups[leaf.group()], grads, 1.0)
        };
        let mut bad = false;
        let each = |_, g: &[F]| bad |= g.iter().any(|x| !x.is_number());
        // SAFETY: as the caller vouches.
        unsafe { self.gradient(hands, leaf, part, prepare, each) };
        bad
    }

    /// Lends a part of a leaf's gradient alone.
    unsafe fn gradient<F: Handled>(
        &self,
        hands: &mut Hands,
        leaf: &Leaf,
        part: Range<usize>,
        prepare: Prepare,
        mut each: impl FnMut(Range<usize>, &[F]),
    ) {
        let group = &self.groups[leaf.group()];
        let needs = Needs {
            p: Use::Nothing,
            rows: Use::Nothing,
            g: Some(Prepared {
                prepare,
                means: None,
            }),
            piece: CHUNK,
            raw: Raw::default(),
        };
        let each = |range, _: Stored<F>, g: Option<Gradient<F>>, _: &mut Kept<F>| {
            each(range, g.and_then(|g| g.whole()).expect("asked for so"));
        };
        let scratch = &mut F::hand(hands).scratch;
        // SAFETY: as the caller vouches.
        unsafe { visit(self.arena, group, leaf, part, needs, scratch, each) };
    }

    /// The slow step that the gradients at both ends of a cycle say is best: along a line on which the loss is a
    /// parabola, its lowest point.
    ///
    /// # Safety
    /// As [`visit`], for all leaves and gradients.
    pub unsafe fn best_slow_step(&self, grads: Grads, low: f64) -> f64 {
        // SAFETY: as the caller vouches.
        let means = unsafe { self.means(grads, 1.0) };
        let sums = self.totals(
            |_| true,
            |hands, gather, index, part| {
                let leaf = &self.leaves[index];
                let prepared = grads.has[index].then(|| Prepared {
                    prepare: self.prepare(&self.groups[leaf.group()], grads, 1.0),
                    means: means.get(index).and_then(Option::as_ref),
                });
                // SAFETY: as the caller vouches.
                unsafe { as_computed!(leaf, self.slopes(hands, gather, leaf, part, prepared)) }
            },
        );
        let [first, change] = self.added_up(&sums);
        // Slopes along the way from slow to fast: `first` at slow, `change` less at fast.
        if change < 0.0 {
            (first / change).clamp(low, 1.0)
        } else if first < 0.0 {
            1.0
        } else {
            low
        }
    }

    unsafe fn slopes<F: Handled>(
        &self,
        hands: &mut Hands,
        gather: &mut Gather,
        leaf: &Leaf,
        part: Range<usize>,
        g: Option<Prepared<'_>>,
    ) {
        let group = &self.groups[leaf.group()];
        let needs = Needs {
            p: Use::Read,
            rows: Use::Whole,
            g,
            piece: SEVERAL,
            raw: Raw::default(),
        };
        let step = Self::step_of::<F>(group, leaf, &[], 0, &[]);
        let (slow, begun) = (group.rows.innermost(), group.rows.gradient);
        let (slow, begun) = (slow.expect("a cycle"), begun.expect("a row for it"));
        let each =
            |range: Range<usize>, mut p: Stored<F>, g: Option<Gradient<F>>, kept: &mut Kept<F>| {
                let p = &mut **p.whole();
                step.load(p, kept);
                let slow = take(kept.row(slow));
                let before = take(kept.row(begun));
                let g = g.and_then(|g| g.whole());
                gather.chunk.add_each(p.len(), |i| {
                    let way = p[i].widened() - slow[i].widened();
                    // A loss that a leaf has no part in has no slope along it.
                    let now = g.map_or(0.0, |g| g[i].widened());
                    [way * before[i].widened(), way * (before[i].widened() - now)]
                });
                gather.close(range.end);
            };
        let scratch = &mut F::hand(hands).scratch;
        // SAFETY: as the caller vouches.
        unsafe { visit(self.arena, group, leaf, part, needs, scratch, each) };
    }

    pub(super) fn prepare(&self, group: &Group, grads: Grads, clip: f64) -> Prepare {
        let sign = if group.maximize { -1.0 } else { 1.0 };
        Prepare {
            factor: sign * grads.scale,
            limit: self.options.max_value,
            clip,
        }
    }

    /// The means of each leaf's gradient, where they are to be taken away; nothing where none is.
    ///
    /// # Safety
    /// As [`visit`], for all leaves and gradients.
    pub(super) unsafe fn means(&self, grads: Grads, clip: f64) -> Vec<Option<Means>> {
        let Some(axis) = self.options.centralize else {
            return Vec::new();
        };
        let mut hands = Hands::default();
        let mut of_leaf = |(index, leaf): (usize, &Leaf)| {
            let prepare = self.prepare(&self.groups[leaf.group()], grads, clip);
            if !self.moves(grads.has, index) {
                return None;
            }
            // SAFETY: as the caller vouches.
            unsafe { as_computed!(leaf, self.means_of(&mut hands, leaf, prepare, axis)) }
        };
        self.leaves.iter().enumerate().map(&mut of_leaf).collect()
    }

    /// The means of a leaf's gradient, where it has more than one axis.
    unsafe fn means_of<F: Handled>(
        &self,
        hands: &mut Hands,
        leaf: &Leaf,
        prepare: Prepare,
        axis: isize,
    ) -> Option<Means> {
        let (shape, order) = (&leaf.form.shape, &leaf.form.order);
        let axis = axis
            .rem_euclid(shape.len().max(1).cast_signed())
            .cast_unsigned();
        let position = order
            .iter()
            .position(|&a| a == axis)
            .filter(|_| shape.len() > 1)?;
        let inner = order[position + 1..].iter().map(|&a| shape[a]).product();
        let mut means = Means::new(shape[axis], inner);
        let each = |range: Range<usize>, g: &[F]| means.add(range.start, g);
        // SAFETY: as the caller vouches.
        unsafe { self.gradient(hands, leaf, 0..leaf.len(), prepare, each) };
        means.finish(leaf.len());
        Some(means)
    }
}
