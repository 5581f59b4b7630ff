//! What a step does to a piece of a leaf: the kernel, and the passes beside it. A sync is part of the kernel's own pass
//! where it can be; what is rarer (a leaf without a gradient, momentum of the sync, nested cycles, state that is reset or
//! pulled back, weights that are kept in more bits than they are trained in) is a pass over a piece that is in the cache.

use std::mem::take;

use crate::array::{Array, Stored};
use crate::element::{Dtype, Element, adopt_widened};
use crate::kernel::{Gradient, Kept, Kernel};
use crate::lookahead::{Blend, Cycle, InnerState, Momentum, Phase};
use crate::simd::{Level, at};

/// Where the arrays that cycles keep are among the rows of a leaf: see [`Kept::row`].
#[derive(Clone, Debug)]
pub struct Rows {
    /// Of each cycle, the innermost first.
    pub cycles: Vec<CycleRows>,
    /// The gradients that the cycle began with.
    pub gradient: Option<usize>,
    /// The weights in full, where they are stored in 16 bits.
    pub master: Option<usize>,
    /// All names, in order.
    pub names: Vec<String>,
}

/// The arrays of one cycle.
#[derive(Clone, Debug)]
pub struct CycleRows {
    pub(crate) slow: usize,
    pub(crate) momentum: Option<usize>,
    /// What is pulled back, and where what it was after the last sync is.
    pub(crate) pulled: Vec<(usize, usize)>,
    /// Of these, state that stands for weights. It is pulled back from what it was when the cycle began, as weights are:
    /// before its first step, that is the weights themselves.
    pub(crate) weights: Vec<(usize, usize)>,
    /// All that is pulled back within the cycles within: it begins again from what this one leaves.
    pub(crate) follows: Vec<(usize, usize)>,
    /// What is reset.
    pub(crate) reset: Vec<usize>,
}

impl Rows {
    /// The rows of a rule with `state` arrays, the last of which are `weights`, within `cycles`; `gradient` and `master`
    /// are kept where asked for.
    #[must_use]
    pub fn new(
        state: &[&str],
        weights: usize,
        cycles: &[Cycle],
        gradient: bool,
        master: bool,
    ) -> Self {
        let mut names: Vec<String> = state.iter().map(|&name| name.into()).collect();
        let mut within: Vec<usize> = (0..state.len()).collect();
        let mut before: Vec<(usize, usize)> = Vec::new();
        let row = |names: &mut Vec<String>, name: String| {
            names.push(name);
            names.len() - 1
        };
        let mut rows = Vec::new();
        for (depth, cycle) in cycles.iter().enumerate() {
            let of = |name: &str| match depth {
                0 => name.to_owned(),
                _ => format!("{name}.{depth}"),
            };
            let slow = row(&mut names, of("slow"));
            let pulled: Vec<_> = match cycle.inner_state {
                InnerState::Pullback => within
                    .iter()
                    .map(|&now| {
                        let name = of(&format!("{}.before", names[now]));
                        (now, row(&mut names, name))
                    })
                    .collect(),
                _ => Vec::new(),
            };
            let reset = match cycle.inner_state {
                InnerState::Reset => {
                    let before = before.iter().map(|(_, before)| before);
                    within.iter().chain(before).copied().collect()
                }
                _ => Vec::new(),
            };
            let follows = match cycle.inner_state {
                InnerState::Pullback => before.clone(),
                _ => Vec::new(),
            };
            let momentum = cycle.outer.map(|_| row(&mut names, of("momentum")));
            within.extend(momentum);
            before.extend(&pulled);
            let is_weight =
                |&(now, _): &(usize, usize)| now < state.len() && now + weights >= state.len();
            let (weights, pulled) = pulled.into_iter().partition(is_weight);
            rows.push(CycleRows {
                slow,
                momentum,
                pulled,
                weights,
                follows,
                reset,
            });
        }
        let gradient = gradient.then(|| row(&mut names, "gradient".into()));
        let master = master.then(|| row(&mut names, "master".into()));
        Self {
            cycles: rows,
            gradient,
            master,
            names,
        }
    }

    /// The row of the slow weights of the innermost cycle.
    #[must_use]
    pub fn innermost(&self) -> Option<usize> {
        self.cycles.first().map(|cycle| cycle.slow)
    }

    /// The row of the weights to evaluate within the outermost cycle.
    #[must_use]
    pub fn slow(&self) -> Option<usize> {
        self.cycles.last().map(|cycle| cycle.slow)
    }
}

/// A sync of one cycle.
#[derive(Clone, Copy, Debug)]
pub struct Sync<F> {
    weights: Meet<F>,
    state: InnerState,
    part: Option<Blend<F>>,
}

#[derive(Clone, Copy, Debug)]
enum Meet<F> {
    /// Fast weights stay.
    Fast,
    Blend(Blend<F>),
    Momentum(Momentum<F>),
}

impl<F: Element> Sync<F> {
    /// The sync of `cycle` by `slow_step`.
    #[must_use]
    pub fn new(cycle: &Cycle, slow_step: f64) -> Self {
        let part = Blend::new(slow_step);
        Self {
            weights: match (cycle.outer, part) {
                (Some(outer), _) => Meet::Momentum(Momentum::new(outer, slow_step)),
                (None, Some(blend)) => Meet::Blend(blend),
                (None, None) => Meet::Fast,
            },
            state: cycle.inner_state,
            part,
        }
    }

    /// Whether it does anything to the rule's state.
    #[must_use]
    pub fn moves_state(&self) -> bool {
        self.state != InnerState::Keep
    }

    fn move_weights(&self, level: Level, rows: &CycleRows, p: &mut [F], kept: &mut Kept<F>) {
        let slow = take(kept.row(rows.slow));
        match self.weights {
            Meet::Fast => {}
            Meet::Blend(blend) => {
                let pairs = p.iter_mut().zip(&*slow);
                at!(level, pairs.for_each(|(p, &slow)| *p = blend.of(*p, slow)));
            }
            Meet::Momentum(momentum) => {
                let u = kept.row(rows.momentum.expect("a row for it"));
                let all = p.iter_mut().zip(&*slow).zip(&mut **u);
                at!(
                    level,
                    all.for_each(|((p, &slow), u)| *p = momentum.of(*p, slow, u))
                );
            }
        }
        *kept.row(rows.slow) = slow;
    }

    fn move_state(&self, level: Level, rows: &CycleRows, kept: &mut Kept<F>) {
        for &row in &rows.reset {
            kept.row(row).fill(F::default());
        }
        if self.state != InnerState::Pullback {
            return;
        }
        for &(now, row) in rows.pulled.iter().chain(&rows.weights) {
            let before = take(kept.row(row));
            let pairs = kept.row(now).iter_mut().zip(&mut *before);
            at!(
                level,
                pairs.for_each(|(now, before)| {
                    if let Some(part) = self.part {
                        *now = part.of(*now, *before);
                    }
                    *before = *now;
                })
            );
            *kept.row(row) = before;
        }
        for &(now, row) in &rows.follows {
            let before = take(kept.row(row));
            before.copy_from_slice(kept.row(now));
            *kept.row(row) = before;
        }
    }
}

/// What a step does to every piece of a leaf.
#[derive(Clone, Copy)]
pub struct Step<'a, F> {
    /// The instruction set.
    pub level: Level,
    /// The rule.
    pub kernel: &'a Kernel<F>,
    /// What the rule reads besides arrays.
    pub scalars: &'a [F],
    /// How many cycles begin, from the innermost.
    pub starting: usize,
    /// The syncs of the cycles that end, the innermost first.
    pub syncs: &'a [Sync<F>],
    /// Where arrays are.
    pub rows: &'a Rows,
    /// How the leaf's weights are stored.
    pub dtype: Dtype,
    /// Whether the rule has yet to move the leaf.
    pub fresh: bool,
    /// What makes a gradient what it was before it was clipped by norm.
    pub unclip: F,
}

/// What may be lent as it is stored, because the kernel alone touches it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Raw {
    /// Parameters.
    pub p: bool,
    /// Gradients, and what is done to them before the rule sees them is then left to the kernel.
    pub g: bool,
    /// The rule's state.
    pub state: bool,
}

impl<F: Element> Step<'_, F> {
    /// What no pass beside the kernel touches.
    #[must_use]
    pub fn raw(&self) -> Raw {
        Raw {
            p: self.is_plain(),
            g: self.starting == 0 || self.rows.gradient.is_none(),
            state: !self.syncs.iter().any(Sync::moves_state),
        }
    }

    /// Whether some array is gone over more than once.
    #[must_use]
    pub fn passes(&self) -> bool {
        self.starting.max(self.syncs.len()) > 1
            || self.rows.names.len() > self.kernel.state.len() + 1
    }

    /// Moves a piece; without gradients, the rule leaves it alone, and the cycles do not. Weights that are kept in full are
    /// moved themselves.
    ///
    /// # Panics
    /// If an array that a pass beside the kernel touches is lent as it is stored: see [`Self::raw`].
    pub fn advance(&self, mut p: Stored<F>, g: Option<Gradient<F>>, kept: &mut Kept<F>) {
        if self.is_plain() {
            if let Some(g) = g {
                self.update(Phase::Plain, p, g, kept);
            }
            return;
        }
        // Without a master copy, slow weights are what is kept of a 16-bit leaf in full, also between cycles.
        let keeps_slow = self.dtype.is_narrow() && self.rows.master.is_none();
        let fuses = !keeps_slow
            && g.as_ref()
                .is_some_and(|g| kept.is_whole() && g.whole().is_some());
        let fuses_start = fuses && self.starting > 0;
        self.start(fuses_start, keeps_slow, p.whole(), kept);
        if let Some(row) = self.rows.gradient.filter(|_| self.starting > 0) {
            match g.as_ref().map(Gradient::whole) {
                Some(g) => {
                    let g = g.expect("it is not lent as it is stored");
                    let pairs = kept.row(row).iter_mut().zip(g);
                    at!(
                        self.level,
                        pairs.for_each(|(row, &g)| *row = g * self.unclip)
                    );
                }
                None => kept.row(row).fill(F::default()),
            }
        }
        let blended = match self.syncs {
            [
                Sync {
                    weights: Meet::Blend(blend),
                    ..
                },
                ..,
            ] if fuses && self.starting == 0 => Some(*blend),
            _ => None,
        };
        if let Some(g) = g {
            let phase = match blended {
                Some(blend) => Phase::Sync(blend),
                None if fuses_start => Phase::Start,
                None => Phase::Plain,
            };
            self.update(phase, p.again(), g, kept);
        }
        self.sync(blended.is_some(), keeps_slow, p.whole(), kept);
    }

    fn is_plain(&self) -> bool {
        self.starting == 0 && self.syncs.is_empty()
    }

    /// The rule's part; what is not whole is not fused.
    fn update(&self, phase: Phase<Blend<F>>, p: Stored<F>, g: Gradient<F>, kept: &mut Kept<F>) {
        match (p, g.whole()) {
            (Array::Whole(p), Some(g)) if kept.is_whole() => {
                (self.kernel.step)(self.level, phase, self.scalars, p, g, kept);
            }
            (p, _) => (self.kernel.raw)(self.level, self.scalars, p, g, kept),
        }
    }

    /// What cycles that begin keep of the weights.
    fn start(&self, fuses_start: bool, keeps_slow: bool, p: &[F], kept: &mut Kept<F>) {
        for (depth, cycle) in self.rows.cycles[..self.starting].iter().enumerate() {
            for &(now, before) in &cycle.weights {
                let from = take(kept.row(now));
                let now_is = if self.fresh { p } else { &*from };
                kept.row(before).copy_from_slice(now_is);
                *kept.row(now) = from;
            }
            let slow = kept.row(cycle.slow);
            if keeps_slow {
                adopt_widened(self.level, self.dtype, p, slow);
            } else if depth > 0 || !fuses_start {
                slow.copy_from_slice(p);
            }
        }
    }

    /// Puts the weights in full in place of a copy of those that were stored in 16 bits.
    pub fn load(&self, p: &mut [F], kept: &mut Kept<F>) {
        if let Some(row) = self.rows.master.filter(|_| self.dtype.is_narrow()) {
            adopt_widened(self.level, self.dtype, p, kept.row(row));
            p.copy_from_slice(kept.row(row));
        }
    }

    fn sync(&self, fused: bool, keeps_slow: bool, p: &mut [F], kept: &mut Kept<F>) {
        for (depth, (sync, rows)) in self.syncs.iter().zip(&self.rows.cycles).enumerate() {
            if depth > 0 || !fused {
                sync.move_weights(self.level, rows, p, kept);
            }
            sync.move_state(self.level, rows, kept);
            if keeps_slow {
                for within in &self.rows.cycles[..=depth] {
                    kept.row(within.slow).copy_from_slice(p);
                }
            }
        }
    }
}
