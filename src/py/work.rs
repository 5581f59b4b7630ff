//! What a call does to all leaves, once everything is checked: passes over sums and over the weights.

mod gradients;

use std::ops::Range;

use crate::element::{Element, adopt};
use crate::kernel::{Kept, Kernel};
use crate::leaf::Leaf;
use crate::lookahead::Cycles;
use crate::reduce::{Total, plus};
use crate::rule::{CARRY, SUMS, Scope};
use crate::simd::Level;
use crate::step::{Step, Sync};

use super::group::{Group, Number};
use super::memory::{Arena, Needs, Prepared, Use, restore, save, visit};

/// What is done to gradients, and about those that are not finite.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The largest norm over all leaves.
    pub max_norm: Option<f64>,
    /// The largest magnitude of an element.
    pub max_value: Option<f64>,
    /// Whether a step is dropped or refused where an element is not finite.
    pub finite: bool,
    /// The axis of a gradient along which means stay; those of all others are taken away.
    pub centralize: Option<isize>,
    /// Whether the best slow step is measured; the group's own is then the smallest that it may be.
    pub optimal: bool,
}

/// All leaves, and what a call needs to know of the optimizer.
pub struct All<'a> {
    pub arena: &'a Arena,
    pub groups: &'a [Group],
    pub leaves: &'a mut [Leaf],
    /// Leaves by their names: what is added up over leaves is so in this order, wherever in a dict they stand.
    pub by_name: &'a [usize],
    pub cycles: &'a Cycles,
    pub options: Options,
    /// What a rule carries for all leaves.
    pub carry: &'a mut [f64; CARRY],
}

/// The gradients of a step: which leaves have one, and what all are multiplied by.
#[derive(Clone, Copy)]
pub struct Grads<'a> {
    pub has: &'a [bool],
    pub scale: f64,
}

/// What a step or a sync does to every leaf.
struct Course<'a> {
    grads: Grads<'a>,
    clip: f64,
    starting: usize,
    ending: usize,
    /// The innermost cycle's, where it is not each group's own.
    slow_step: Option<f64>,
    /// What was measured of each leaf, where any rule asks for it, and of all.
    sums: Vec<[f64; SUMS]>,
    all: [f64; SUMS],
}

impl All<'_> {
    /// Course every leaf by its gradient; `clip` is what the norm asks for. `starting` cycles begin, and `ending` sync.
    ///
    /// # Safety
    /// As [`visit`], for all leaves and gradients.
    pub unsafe fn step(&mut self, grads: Grads, clip: f64, starting: usize, ending: usize) {
        let mut sums = vec![[0.0; SUMS]; self.measured(grads)];
        // SAFETY: as the caller vouches.
        unsafe {
            self.measure::<f32>(grads, clip, &mut sums);
            self.measure::<f64>(grads, clip, &mut sums);
        }
        let course = Course {
            grads,
            clip,
            starting,
            ending,
            slow_step: None,
            all: self.added_up(&sums),
            sums,
        };
        // SAFETY: as the caller vouches.
        unsafe { self.advance_all(&course) };
    }

    /// Ends `ending` cycles; slow weights move by `slow_step`, or each group's own.
    ///
    /// # Safety
    /// As [`visit`], for all leaves.
    pub unsafe fn sync(&mut self, ending: usize, slow_step: Option<f64>) {
        let none = vec![false; self.leaves.len()];
        let course = Course {
            grads: Grads {
                has: &none,
                scale: 1.0,
            },
            clip: 1.0,
            starting: 0,
            ending,
            slow_step,
            sums: Vec::new(),
            all: [0.0; SUMS],
        };
        // SAFETY: as the caller vouches.
        unsafe { self.advance_all(&course) };
    }

    /// Puts the weights to evaluate into params; returns the bytes of the leaves whose own are to be put back. Where slow
    /// weights are an array that can hold the fast ones, the two change places.
    ///
    /// # Safety
    /// As [`visit`], for all leaves.
    pub unsafe fn show_slow(&self) -> Vec<Vec<u8>> {
        // SAFETY: as the caller vouches.
        unsafe {
            let mut saved = vec![Vec::new(); self.leaves.len()];
            for (leaf, saved) in self.leaves.iter().zip(&mut saved) {
                let exchanges = !self.cycles.0.is_empty() && !leaf.dtype.is_narrow();
                if !exchanges && !self.groups[leaf.group].frozen {
                    *saved = save(leaf, &leaf.p);
                }
            }
            self.exchange::<f32>(true);
            self.exchange::<f64>(true);
            saved
        }
    }

    /// Puts the fast weights back into params. What was written there meanwhile is in the slow weights then.
    ///
    /// # Safety
    /// As [`visit`], for all leaves; `saved` is what [`Self::show_slow`] gave.
    pub unsafe fn show_fast(&self, saved: &[Vec<u8>]) {
        // SAFETY: as the caller vouches.
        unsafe {
            self.exchange::<f32>(false);
            self.exchange::<f64>(false);
            for (leaf, saved) in self.leaves.iter().zip(saved) {
                restore(leaf, saved);
            }
        }
    }

    /// Writes a leaf's weights to evaluate into `into`, in the leaf's order.
    ///
    /// # Safety
    /// As [`visit`], for the leaf.
    pub unsafe fn average<F: Number>(&self, index: usize, into: &mut [F]) {
        let leaf = &self.leaves[index];
        let group = &self.groups[leaf.group];
        let kernel = F::kernel(group);
        let evaluate = kernel.evaluate.filter(|_| leaf.steps > 0 && !group.frozen);
        let scalars = (kernel.scalars)(&group.hyper, 1.0, &mut leaf.carry.clone(), [0.0; SUMS]);
        let step = Self::step_of::<F>(group, leaf, &scalars, 0, &[]);
        let needs = Needs {
            p: Use::Read,
            rows: Use::Read,
            g: None,
            several: true,
        };
        let each = |range: Range<usize>, p: &mut [F], _: Option<&[F]>, kept: &mut Kept<F>| {
            let into = &mut into[range];
            into.copy_from_slice(p);
            step.load(into, kept);
            if let Some(evaluate) = evaluate {
                evaluate(step.level, step.scalars, into, kept);
            }
        };
        // SAFETY: as the caller vouches.
        unsafe { visit(self.arena, group, leaf, needs, &mut None, each) };
    }

    unsafe fn exchange<F: Number>(&self, enter: bool) {
        let mut scratch = None;
        for leaf in &*self.leaves {
            let group = &self.groups[leaf.group];
            if leaf.dtype.compute() != F::DTYPE || group.frozen {
                continue;
            }
            let kernel = F::kernel(group);
            let (slow, evaluate) = (group.rows.slow(), kernel.evaluate.filter(|_| enter));
            if slow.is_none() && evaluate.is_none() {
                continue;
            }
            let narrow = leaf.dtype.is_narrow();
            let needs = Needs {
                p: if narrow && !enter {
                    Use::Read
                } else {
                    Use::Write
                },
                rows: if slow.is_some() {
                    Use::Whole
                } else {
                    Use::Read
                },
                g: None,
                several: true,
            };
            let mut carry = leaf.carry;
            let scalars = (kernel.scalars)(&group.hyper, 1.0, &mut carry, [0.0; SUMS]);
            let step = Self::step_of::<F>(group, leaf, &scalars, 0, &[]);
            let each = |_, p: &mut [F], _: Option<&[F]>, kept: &mut Kept<F>| match (slow, evaluate)
            {
                (Some(slow), _) if !narrow => p.swap_with_slice(kept.row(slow)),
                (Some(slow), _) if enter => p.copy_from_slice(kept.row(slow)),
                (Some(slow), _) => adopt(step.level, leaf.dtype, p, kept.row(slow)),
                (None, Some(evaluate)) => {
                    step.load(p, kept);
                    // A leaf that the rule has not moved has no state to judge it by.
                    if leaf.steps > 0 {
                        evaluate(step.level, step.scalars, p, kept);
                    }
                }
                (None, None) => {}
            };
            // SAFETY: as the caller vouches.
            unsafe { visit(self.arena, group, leaf, needs, &mut scratch, each) };
        }
    }

    /// How many sums there are to keep: one pair a leaf, where any rule needs them.
    fn measured(&self, grads: Grads) -> usize {
        let measures = |group: &Group| group.single.scope != Scope::None;
        if self.groups.iter().any(measures) {
            grads.has.len()
        } else {
            0
        }
    }

    unsafe fn measure<F: Number>(&self, grads: Grads, clip: f64, sums: &mut [[f64; SUMS]]) {
        let mut scratch = None;
        let mut scalars = Scalars::default();
        for (index, leaf) in self.leaves_of::<F>(grads.has) {
            let group = &self.groups[leaf.group];
            let kernel = F::kernel(group);
            if kernel.scope == Scope::None {
                continue;
            }
            scalars.of(kernel, group, leaf, self.carry, [0.0; SUMS]);
            let prepare = self.prepare(group, grads, clip);
            // SAFETY: as the caller vouches.
            let means = unsafe { self.means(leaf, prepare, &mut scratch) };
            let needs = Needs {
                p: Use::Read,
                rows: Use::Write,
                g: Some(Prepared {
                    prepare,
                    means: means.as_ref(),
                }),
                several: false,
            };
            let step = Self::step_of::<F>(group, leaf, &scalars.values, 0, &[]);
            let mut total = Total::default();
            let each = |range: Range<usize>, p: &mut [F], g: Option<&[F]>, kept: &mut Kept<F>| {
                step.load(p, kept);
                let g = g.expect("asked for");
                (kernel.measure)(step.level, step.scalars, p, g, kept, &mut total.chunk);
                total.close(range.end, leaf.len());
            };
            // SAFETY: as the caller vouches.
            unsafe { visit(self.arena, group, leaf, needs, &mut scratch, each) };
            sums[index] = total.sums;
        }
    }

    /// The sums of all leaves together.
    fn added_up(&self, sums: &[[f64; SUMS]]) -> [f64; SUMS] {
        if sums.is_empty() {
            return [0.0; SUMS];
        }
        let by_name = self.by_name.iter().map(|&index| sums[index]);
        by_name.fold([0.0; SUMS], plus)
    }

    unsafe fn advance_all(&mut self, course: &Course) {
        let mut shared = *self.carry;
        // SAFETY: as the caller vouches.
        unsafe {
            self.advance::<f32>(course, &mut shared);
            self.advance::<f64>(course, &mut shared);
        }
        *self.carry = shared;
    }

    unsafe fn advance<F: Number>(&mut self, course: &Course, shared: &mut [f64; CARRY]) {
        let Course {
            grads,
            clip,
            starting,
            ending,
            ..
        } = *course;
        let syncs = self.syncs::<F>(ending, course.slow_step);
        let mut scratch = None;
        let mut scalars = Scalars::default();
        for index in 0..self.leaves.len() {
            let leaf = &self.leaves[index];
            let group = &self.groups[leaf.group];
            if leaf.dtype.compute() != F::DTYPE || group.frozen {
                continue;
            }
            let kernel = F::kernel(group);
            let syncs = &syncs[leaf.group];
            let moved = grads.has[index];
            let prepare = self.prepare(group, grads, clip);
            let mut means = None;
            if moved {
                let sums = match kernel.scope {
                    Scope::None => [0.0; SUMS],
                    Scope::Leaf => course.sums[index],
                    Scope::All => course.all,
                };
                scalars.of(kernel, group, leaf, self.carry, sums);
                // SAFETY: as the caller vouches.
                means = unsafe { self.means(leaf, prepare, &mut scratch) };
            }
            let step = Step {
                unclip: F::round(1.0 / clip),
                ..Self::step_of(group, leaf, &scalars.values, starting, syncs)
            };
            let needs = Needs {
                p: Use::Write,
                rows: if moved || syncs.iter().any(Sync::moves_state) {
                    Use::Write
                } else {
                    Use::Whole
                },
                g: moved.then_some(Prepared {
                    prepare,
                    means: means.as_ref(),
                }),
                several: starting.max(ending) > 1
                    || group.rows.names.len() > kernel.state.len() + 1,
            };
            let each =
                |_, p: &mut [F], g: Option<&[F]>, kept: &mut Kept<F>| step.advance(p, g, kept);
            // SAFETY: as the caller vouches.
            unsafe { visit(self.arena, group, leaf, needs, &mut scratch, each) };
            let resets = syncs.iter().any(Sync::resets);
            let leaf = &mut self.leaves[index];
            if moved {
                leaf.steps += 1;
                match kernel.scope {
                    Scope::All => *shared = scalars.carry,
                    _ => leaf.carry = scalars.carry,
                }
            }
            if resets {
                leaf.steps = 0;
                leaf.carry = [0.0; CARRY];
                *shared = [0.0; CARRY];
            }
        }
    }

    /// The leaves of a format that the rule moves, by their names.
    fn leaves_of<'a, F: Number>(
        &'a self,
        has: &'a [bool],
    ) -> impl Iterator<Item = (usize, &'a Leaf)> {
        let all = self
            .by_name
            .iter()
            .map(|&index| (index, &self.leaves[index]));
        all.filter(|&(index, leaf)| {
            has[index] && leaf.dtype.compute() == F::DTYPE && !self.groups[leaf.group].frozen
        })
    }

    fn syncs<F: Element>(&self, ending: usize, slow_step: Option<f64>) -> Vec<Vec<Sync<F>>> {
        let of_group = |group: &Group| {
            let own = self.cycles.0[..ending]
                .iter()
                .zip(&group.slow_steps)
                .enumerate();
            own.map(|(depth, (cycle, &own))| {
                Sync::new(cycle, slow_step.filter(|_| depth == 0).unwrap_or(own))
            })
            .collect()
        };
        self.groups.iter().map(of_group).collect()
    }

    fn step_of<'a, F: Number>(
        group: &'a Group,
        leaf: &Leaf,
        scalars: &'a [F],
        starting: usize,
        syncs: &'a [Sync<F>],
    ) -> Step<'a, F> {
        Step {
            level: Level::best(),
            kernel: F::kernel(group),
            scalars,
            starting,
            syncs,
            rows: &group.rows,
            dtype: leaf.dtype,
            fresh: leaf.steps == 0,
            unclip: F::ONE,
        }
    }
}

/// The scalars of a leaf's next step; formed once for all leaves that have the same.
struct Scalars<F> {
    key: Option<(usize, u64, [f64; CARRY], [f64; SUMS])>,
    values: Vec<F>,
    /// What the step carries to the next.
    carry: [f64; CARRY],
}

impl<F> Default for Scalars<F> {
    fn default() -> Self {
        Self {
            key: None,
            values: Vec::new(),
            carry: [0.0; CARRY],
        }
    }
}

impl<F: Number> Scalars<F> {
    fn of(
        &mut self,
        kernel: &Kernel<F>,
        group: &Group,
        leaf: &Leaf,
        shared: &[f64; CARRY],
        sums: [f64; SUMS],
    ) {
        let carry = if kernel.scope == Scope::All {
            *shared
        } else {
            leaf.carry
        };
        let step = leaf.steps + 1;
        let key = Some((leaf.group, step, carry, sums));
        if self.key != key {
            #[allow(
                clippy::cast_precision_loss,
                reason = "past 2^53 steps a power of a beta is long zero"
            )]
            let t = step as f64;
            self.key = key;
            self.carry = carry;
            self.values = (kernel.scalars)(&group.hyper, t, &mut self.carry, sums);
        }
    }
}
