//! What a call does to all leaves, once everything is checked: passes over sums and over the weights.

mod gradients;

use std::mem::take;
use std::ops::Range;

use crate::array::Stored;
use crate::element::{Dtype, Element, adopt_widened};
use crate::gradient::Means;
use crate::kernel::{Gradient, Kept, Kernel};
use crate::leaf::Leaf;
use crate::lookahead::{Cycles, InnerState};
use crate::parts::Parts;
use crate::reduce::{CHUNK, Sums, plus};
use crate::rule::{CARRY, SUMS, Scope};
use crate::simd::Level;
use crate::step::{Raw, Step, Sync};

use super::group::{Group, Number};
use super::inner::ByName;
use super::memory::{Arena, Needs, Prepared, SEVERAL, Scratch, Use, restore, save, visit};

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
    pub parts: &'a Parts,
    /// Leaves by their names: what is added up over leaves is so in this order, wherever in a dict they stand.
    pub by_name: &'a ByName,
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
    /// Of each leaf's gradient, where they are to be taken away; nothing where none is.
    means: Vec<Option<Means>>,
    starting: usize,
    ending: usize,
    /// The innermost cycle's, where it is not each group's own.
    slow_step: Option<f64>,
    /// What was measured of each leaf, where any rule asks for it, and of all.
    sums: Vec<[f64; SUMS]>,
    all: [f64; SUMS],
}

impl Course<'_> {
    /// The sums that a rule reads for a leaf.
    fn sums(&self, scope: Scope, leaf: usize) -> [f64; SUMS] {
        match scope {
            Scope::None => [0.0; SUMS],
            Scope::Leaf => self.sums[leaf],
            Scope::All => self.all,
        }
    }
}

/// Of each group, the syncs of cycles that end, for leaves that are computed in one number or the other.
pub struct Syncs {
    single: Vec<Vec<Sync<f32>>>,
    double: Vec<Vec<Sync<f64>>>,
}

/// The sums of a part of the leaves: one for each chunk of each leaf, whatever thread had it.
#[derive(Default)]
struct Gather {
    chunk: Sums,
    chunks: Vec<[f64; SUMS]>,
    /// Where the part of the leaf ends that is being summed.
    end: usize,
}

impl Gather {
    /// Closes the chunk, where a piece that ends before element `end` is its last.
    fn close(&mut self, end: usize) {
        if end == self.end || end.is_multiple_of(CHUNK) {
            self.chunks.push(take(&mut self.chunk).total());
        }
    }
}

/// What a thread has for itself, for leaves that are computed in one number or the other.
#[derive(Default)]
pub struct Hands {
    single: Hand<f32>,
    double: Hand<f64>,
}

/// The same, for one of them.
#[derive(Default)]
pub struct Hand<F> {
    scratch: Option<Box<Scratch<F>>>,
    scalars: Scalars<F>,
}

/// The number that leaves are computed in, as a type.
pub trait Handled: Number {
    /// What the thread has for it.
    fn hand(hands: &mut Hands) -> &mut Hand<Self>;
    /// The syncs for it.
    fn of(syncs: &Syncs) -> &[Vec<Sync<Self>>];
}

impl Handled for f32 {
    fn hand(hands: &mut Hands) -> &mut Hand<Self> {
        &mut hands.single
    }

    fn of(syncs: &Syncs) -> &[Vec<Sync<Self>>] {
        &syncs.single
    }
}

impl Handled for f64 {
    fn hand(hands: &mut Hands) -> &mut Hand<Self> {
        &mut hands.double
    }

    fn of(syncs: &Syncs) -> &[Vec<Sync<Self>>] {
        &syncs.double
    }
}

/// Calls a method for the number that a leaf is computed in.
macro_rules! as_computed {
    ($leaf:expr, $self:ident.$method:ident($($argument:expr),*)) => {
        if $leaf.dtype() == Dtype::F64 {
            $self.$method::<f64>($($argument),*)
        } else {
            $self.$method::<f32>($($argument),*)
        }
    };
}
use as_computed;

impl All<'_> {
    /// Moves every leaf by its gradient; `clip` is what the norm asks for. `starting` cycles begin, and `ending` sync.
    ///
    /// # Safety
    /// As [`visit`], for all leaves and gradients.
    pub unsafe fn step(&mut self, grads: Grads, clip: f64, starting: usize, ending: usize) {
        // SAFETY: as the caller vouches.
        let (means, sums) = unsafe {
            let means = self.means(grads, clip);
            let sums = self.measured(grads, clip, &means);
            (means, sums)
        };
        let course = Course {
            grads,
            clip,
            means,
            starting,
            ending,
            slow_step: None,
            all: self.added_up(&sums),
            sums,
        };
        // SAFETY: as the caller vouches.
        unsafe { self.follow(&course) };
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
            means: Vec::new(),
            starting: 0,
            ending,
            slow_step,
            sums: Vec::new(),
            all: [0.0; SUMS],
        };
        // SAFETY: as the caller vouches.
        unsafe { self.follow(&course) };
    }

    /// Calls `each` with every part of every leaf, on all threads.
    fn over<R: Default + Send>(
        &self,
        each: impl Fn(&mut Hands, &mut R, usize, Range<usize>) + std::marker::Sync,
    ) -> Vec<R> {
        let leaves = &*self.leaves;
        let len = |leaf: usize| leaves[leaf].len();
        self.parts.each(len, Hands::default, each)
    }

    /// The sums of the leaves that `has` names, which `each` gathers for a part of one.
    fn totals(
        &self,
        has: impl Fn(usize) -> bool + std::marker::Sync,
        each: impl Fn(&mut Hands, &mut Gather, usize, Range<usize>) + std::marker::Sync,
    ) -> Vec<[f64; SUMS]> {
        let of_parts = self.over(|hands, gather: &mut Gather, index, range| {
            if has(index) && !self.groups[self.leaves[index].group()].frozen {
                gather.end = range.end;
                each(hands, gather, index, range);
            }
        });
        let mut chunks = of_parts.into_iter().flat_map(|gather| gather.chunks);
        let of_leaf = |(index, leaf): (usize, &Leaf)| {
            let is_in = has(index) && !self.groups[leaf.group()].frozen;
            let count = if is_in { leaf.len().div_ceil(CHUNK) } else { 0 };
            chunks.by_ref().take(count).fold([0.0; SUMS], plus)
        };
        self.leaves.iter().enumerate().map(of_leaf).collect()
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
                let exchanges = !self.cycles.0.is_empty() && !leaf.dtype().is_narrow();
                if !exchanges && !self.groups[leaf.group()].frozen {
                    *saved = save(leaf, leaf.p());
                }
            }
            self.exchange_all(true);
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
            self.exchange_all(false);
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
        let group = &self.groups[leaf.group()];
        let kernel = F::kernel(group);
        let evaluate = kernel.evaluate.filter(|_| leaf.steps > 0 && !group.frozen);
        let scalars = (kernel.scalars)(&group.hyper, 1.0, &mut leaf.carry(), [0.0; SUMS]);
        let step = Self::step_of::<F>(group, leaf, &scalars, 0, &[]);
        let needs = Needs {
            p: Use::Read,
            rows: Use::Read,
            g: None,
            piece: SEVERAL,
            raw: Raw::default(),
        };
        let each =
            |range: Range<usize>, mut p: Stored<F>, _: Option<Gradient<F>>, kept: &mut Kept<F>| {
                let into = &mut into[range];
                into.copy_from_slice(p.whole());
                step.load(into, kept);
                if let Some(evaluate) = evaluate {
                    evaluate(step.level, step.scalars, into, kept);
                }
            };
        // SAFETY: as the caller vouches.
        unsafe {
            visit(
                self.arena,
                group,
                leaf,
                0..leaf.len(),
                needs,
                &mut None,
                each,
            );
        };
    }

    unsafe fn exchange_all(&self, enter: bool) {
        self.over(|hands, (), index, range| {
            let leaf = &self.leaves[index];
            if !self.groups[leaf.group()].frozen {
                // SAFETY: as the caller vouches; no two parts have an element in common.
                unsafe { as_computed!(leaf, self.exchange(hands, leaf, range, enter)) }
            }
        });
    }

    unsafe fn exchange<F: Handled>(
        &self,
        hands: &mut Hands,
        leaf: &Leaf,
        part: Range<usize>,
        enter: bool,
    ) {
        let group = &self.groups[leaf.group()];
        let kernel = F::kernel(group);
        let (slow, evaluate) = (group.rows.slow(), kernel.evaluate.filter(|_| enter));
        if slow.is_none() && evaluate.is_none() {
            return;
        }
        let narrow = leaf.dtype().is_narrow();
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
            piece: SEVERAL,
            raw: Raw::default(),
        };
        let scalars = (kernel.scalars)(&group.hyper, 1.0, &mut leaf.carry(), [0.0; SUMS]);
        let step = Self::step_of::<F>(group, leaf, &scalars, 0, &[]);
        let each = |_, mut p: Stored<F>, _: Option<Gradient<F>>, kept: &mut Kept<F>| {
            let p = &mut **p.whole();
            match (slow, evaluate) {
                (Some(slow), _) if !narrow => p.swap_with_slice(kept.row(slow)),
                (Some(slow), _) if enter => p.copy_from_slice(kept.row(slow)),
                (Some(slow), _) => adopt_widened(step.level, leaf.dtype(), p, kept.row(slow)),
                (None, Some(evaluate)) => {
                    step.load(p, kept);
                    // A leaf that the rule has not moved has no state to judge it by.
                    if leaf.steps > 0 {
                        evaluate(step.level, step.scalars, p, kept);
                    }
                }
                (None, None) => {}
            }
        };
        let scratch = &mut F::hand(hands).scratch;
        // SAFETY: as the caller vouches.
        unsafe { visit(self.arena, group, leaf, part, needs, scratch, each) };
    }

    /// What is measured of each leaf, where any rule asks for it.
    unsafe fn measured(
        &self,
        grads: Grads,
        clip: f64,
        means: &[Option<Means>],
    ) -> Vec<[f64; SUMS]> {
        let measures = |group: &Group| group.single.scope != Scope::None;
        if !self.groups.iter().any(measures) {
            return Vec::new();
        }
        let has =
            |index: usize| grads.has[index] && measures(&self.groups[self.leaves[index].group()]);
        self.totals(has, |hands, gather, index, range| {
            let leaf = &self.leaves[index];
            let prepared = Prepared {
                prepare: self.prepare(&self.groups[leaf.group()], grads, clip),
                means: means.get(index).and_then(Option::as_ref),
            };
            // SAFETY: as the caller vouches; no two parts have an element in common.
            unsafe { as_computed!(leaf, self.measure(hands, gather, leaf, range, prepared)) }
        })
    }

    unsafe fn measure<F: Handled>(
        &self,
        hands: &mut Hands,
        gather: &mut Gather,
        leaf: &Leaf,
        part: Range<usize>,
        prepared: Prepared<'_>,
    ) {
        let group = &self.groups[leaf.group()];
        let kernel = F::kernel(group);
        let Hand { scratch, scalars } = F::hand(hands);
        scalars.of(kernel, group, leaf, self.carry, [0.0; SUMS]);
        let needs = Needs {
            p: Use::Read,
            rows: Use::Write,
            g: Some(prepared),
            piece: CHUNK,
            raw: Raw::default(),
        };
        let step = Self::step_of::<F>(group, leaf, &scalars.values, 0, &[]);
        let each =
            |range: Range<usize>, mut p: Stored<F>, g: Option<Gradient<F>>, kept: &mut Kept<F>| {
                let p = &mut **p.whole();
                step.load(p, kept);
                let g = g.and_then(|g| g.whole()).expect("asked for so");
                (kernel.measure)(step.level, step.scalars, p, g, kept, &mut gather.chunk);
                gather.close(range.end);
            };
        // SAFETY: as the caller vouches.
        unsafe { visit(self.arena, group, leaf, part, needs, scratch, each) };
    }

    /// The sums of all leaves together.
    fn added_up(&self, sums: &[[f64; SUMS]]) -> [f64; SUMS] {
        if sums.is_empty() {
            return [0.0; SUMS];
        }
        let by_name = self.by_name.get().iter();
        by_name.fold([0.0; SUMS], |all, &leaf| plus(all, sums[leaf as usize]))
    }

    unsafe fn follow(&mut self, course: &Course) {
        let syncs = Syncs {
            single: self.syncs(course),
            double: self.syncs(course),
        };
        self.over(|hands, (), index, range| {
            let leaf = &self.leaves[index];
            if !self.groups[leaf.group()].frozen {
                // SAFETY: as the caller vouches; no two parts have an element in common.
                unsafe { as_computed!(leaf, self.advance(hands, course, &syncs, index, range)) }
            }
        });
        self.count(course);
    }

    unsafe fn advance<F: Handled>(
        &self,
        hands: &mut Hands,
        course: &Course,
        syncs: &Syncs,
        index: usize,
        part: Range<usize>,
    ) {
        let leaf = &self.leaves[index];
        let group = &self.groups[leaf.group()];
        let kernel = F::kernel(group);
        let syncs = F::of(syncs)
            .get(leaf.group())
            .map_or(&[][..], |syncs| syncs);
        let moved = course.grads.has[index];
        if !moved && course.starting == 0 && syncs.is_empty() {
            return;
        }
        let Hand { scratch, scalars } = F::hand(hands);
        if moved {
            scalars.of(
                kernel,
                group,
                leaf,
                self.carry,
                course.sums(kernel.scope, index),
            );
        }
        let step = Step {
            unclip: F::round(1.0 / course.clip),
            ..Self::step_of(group, leaf, &scalars.values, course.starting, syncs)
        };
        let needs = Needs {
            p: Use::Master,
            rows: if moved || syncs.iter().any(Sync::moves_state) {
                Use::Write
            } else {
                Use::Whole
            },
            g: moved.then(|| Prepared {
                prepare: self.prepare(group, course.grads, course.clip),
                means: course.means.get(index).and_then(Option::as_ref),
            }),
            piece: if step.passes() { SEVERAL } else { usize::MAX },
            raw: step.raw(),
        };
        let each = |_, p: Stored<F>, g: Option<Gradient<F>>, kept: &mut Kept<F>| {
            step.advance(p, g, kept);
        };
        // SAFETY: as the caller vouches.
        unsafe { visit(self.arena, group, leaf, part, needs, scratch, each) };
    }

    /// Counts what has been done to each leaf, and takes note of what rules carry on.
    fn count(&mut self, course: &Course) {
        let mut hands = Hands::default();
        let mut shared = *self.carry;
        let mut ending = self.cycles.0[..course.ending].iter();
        let resets = ending.any(|cycle| cycle.inner_state == InnerState::Reset);
        for index in 0..self.leaves.len() {
            let leaf = &self.leaves[index];
            let group = &self.groups[leaf.group()];
            if group.frozen {
                continue;
            }
            let (moved, scope) = (course.grads.has[index], group.single.scope);
            let carried = (moved && !group.single.carry.is_empty()).then(|| {
                let sums = course.sums(scope, index);
                as_computed!(leaf, self.carried(&mut hands, leaf, sums))
            });
            let leaf = &mut self.leaves[index];
            leaf.steps += u64::from(moved);
            match (carried, scope) {
                (Some(carried), Scope::All) => shared = carried,
                (Some(carried), _) => leaf.set_carry(carried),
                (None, _) => {}
            }
            if resets {
                leaf.steps = 0;
                leaf.set_carry([0.0; CARRY]);
                shared = [0.0; CARRY];
            }
        }
        *self.carry = shared;
    }

    fn carried<F: Handled>(
        &self,
        hands: &mut Hands,
        leaf: &Leaf,
        sums: [f64; SUMS],
    ) -> [f64; CARRY] {
        let group = &self.groups[leaf.group()];
        let scalars = &mut F::hand(hands).scalars;
        scalars.of(F::kernel(group), group, leaf, self.carry, sums);
        scalars.carry
    }

    /// Whether the rule moves a leaf.
    fn moves(&self, has: &[bool], index: usize) -> bool {
        has[index] && !self.groups[self.leaves[index].group()].frozen
    }

    /// Of each group, the syncs of cycles that end; none where none does.
    fn syncs<F: Element>(&self, course: &Course) -> Vec<Vec<Sync<F>>> {
        if course.ending == 0 {
            return Vec::new();
        }
        let of_group = |group: &Group| {
            let own = self.cycles.0[..course.ending].iter().zip(&group.slow_steps);
            let sync = |(depth, (cycle, &own))| {
                Sync::new(
                    cycle,
                    course.slow_step.filter(|_| depth == 0).unwrap_or(own),
                )
            };
            own.enumerate().map(sync).collect()
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
            dtype: leaf.dtype(),
            fresh: leaf.steps == 0,
            unclip: F::ONE,
        }
    }
}

/// The scalars of a leaf's next step; formed once for all leaves that have the same.
#[derive(Default)]
struct Scalars<F> {
    key: Option<(usize, u64, [f64; CARRY], [f64; SUMS])>,
    values: Vec<F>,
    /// What the step carries to the next.
    carry: [f64; CARRY],
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
        let step = leaf.steps + 1;
        let depends = kernel.scope != Scope::None || !kernel.carry.is_empty();
        let (mut carry, mut sums_read) = ([0.0; CARRY], [0.0; SUMS]);
        if depends {
            sums_read = sums;
            carry = if kernel.scope == Scope::All {
                *shared
            } else {
                leaf.carry()
            };
        }
        let same = matches!(self.key, Some((group, at, ..)) if group == leaf.group() && at == step);
        let key = Some((leaf.group(), step, carry, sums_read));
        if !same || depends && self.key != key {
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
