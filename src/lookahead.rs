//! Lookahead's cycles: when slow weights are taken, when they move, and by what arithmetic. Slow weights are the fast
//! ones as the first step of a cycle finds them, so between cycles the two are one, and no second copy is in use.
//!
//! Cycles nest: an outer one counts the syncs of the one within it as its steps.

use crate::rule::{Float, select};

/// What the kernel does besides the rule's update; `B` says how a sync blends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase<B> {
    /// Nothing: a step within a cycle, or without Lookahead.
    Plain,
    /// The first step of a cycle: slow becomes fast before the update.
    Start,
    /// The last step of a cycle: slow and fast meet after the update.
    Sync(B),
}

/// What a sync does to the state of the rule within, and to the momentum of the cycles within.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InnerState {
    /// Nothing.
    Keep,
    /// It is zero again, and steps are counted from the start.
    Reset,
    /// It moves as slow weights do, from what it was after the last sync (zero at first).
    Pullback,
}

/// A sync that takes `slow - fast` for a gradient and `slow_step` for its learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outer {
    /// The decay of its momentum.
    pub momentum: f64,
    /// Whether it looks ahead along the momentum.
    pub nesterov: bool,
}

/// One level of Lookahead.
#[derive(Clone, Copy, Debug)]
pub struct Cycle {
    /// Steps a cycle, or syncs of the cycle within.
    pub period: u64,
    /// Momentum of the sync.
    pub outer: Option<Outer>,
    /// What a sync does to what is within.
    pub inner_state: InnerState,
    /// Steps since the last sync.
    pub done: u64,
    /// Syncs so far.
    pub syncs: u64,
}

impl Cycle {
    /// A cycle that has not begun.
    #[must_use]
    pub fn new(period: u64, outer: Option<Outer>, inner_state: InnerState) -> Self {
        Self {
            period,
            outer,
            inner_state,
            done: 0,
            syncs: 0,
        }
    }
}

/// Nested cycles, the innermost first; none without Lookahead.
#[derive(Clone, Debug, Default)]
pub struct Cycles(pub Vec<Cycle>);

impl Cycles {
    /// How many cycles begin with the next step, counted from the innermost.
    #[must_use]
    pub fn starting(&self) -> usize {
        self.0.iter().take_while(|cycle| cycle.done == 0).count()
    }

    /// How many cycles end when the innermost has done `more` steps.
    #[must_use]
    pub fn ending(&self, more: u64) -> usize {
        let (inner, outer) = self.0.split_at(usize::from(!self.0.is_empty()));
        match inner {
            [inner] if inner.done + more == inner.period => 1 + ends(outer),
            _ => 0,
        }
    }

    /// How many cycles end where the innermost ends now.
    #[must_use]
    pub fn ending_now(&self) -> usize {
        self.0.get(1..).map_or(0, |outer| 1 + ends(outer))
    }

    /// Counts `steps` of the innermost cycle, and `ending` syncs from the innermost outward.
    pub fn advance(&mut self, steps: u64, ending: usize) {
        if let Some(inner) = self.0.first_mut() {
            inner.done += steps;
        }
        for cycle in &mut self.0[..ending] {
            cycle.done = 0;
            cycle.syncs += 1;
        }
        if let Some(outer) = self.0.get_mut(ending).filter(|_| ending > 0) {
            outer.done += 1;
        }
    }

    /// Whether slow weights differ from fast ones.
    #[must_use]
    pub fn begun(&self) -> bool {
        self.0.iter().any(|cycle| cycle.done > 0)
    }

    /// Syncs of the innermost cycle so far.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.0.first().map_or(0, |cycle| cycle.syncs)
    }
}

/// How many of `outer` end with one more sync within.
fn ends(outer: &[Cycle]) -> usize {
    outer
        .iter()
        .take_while(|cycle| cycle.done + 1 == cycle.period)
        .count()
}

/// Slow weights' move toward fast ones, in the form that is exact at both ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Blend<F> {
    /// They stay.
    Stay,
    /// This part of the way, from the slow weights.
    FromSlow(F),
    /// This part of the way back, from the fast weights.
    FromFast(F),
}

impl<F: Float> Blend<F> {
    /// The arithmetic for `slow_step` in [0, 1]; none at 1, where fast weights stay.
    #[must_use]
    pub fn new(slow_step: f64) -> Option<Self> {
        let (part, rest) = (F::round(slow_step), F::round(1.0 - slow_step));
        let blend = if part == F::default() {
            Self::Stay
        } else if part < rest {
            Self::FromSlow(part)
        } else {
            Self::FromFast(rest)
        };
        (slow_step < 1.0).then_some(blend)
    }

    /// Where a pair meets; where slow weights stay, fast ones need not be finite.
    #[must_use]
    #[inline(always)]
    pub fn of(self, fast: F, slow: F) -> F {
        match self {
            Self::Stay => slow,
            Self::FromSlow(part) => from_slow(part, fast, slow),
            Self::FromFast(part) => from_fast(part, fast, slow),
        }
    }
}

/// [`Blend::FromSlow`].
#[inline(always)]
pub fn from_slow<F: Float>(part: F, fast: F, slow: F) -> F {
    slow + part * (fast - slow)
}

/// [`Blend::FromFast`].
#[inline(always)]
pub fn from_fast<F: Float>(part: F, fast: F, slow: F) -> F {
    fast - (fast - slow) * part
}

/// A sync with momentum `u`.
#[derive(Clone, Copy, Debug)]
pub struct Momentum<F> {
    step: F,
    decay: F,
    nesterov: bool,
}

impl<F: Float> Momentum<F> {
    /// The arithmetic of `outer` at learning rate `slow_step`.
    #[must_use]
    pub fn new(outer: Outer, slow_step: f64) -> Self {
        Self {
            step: F::round(slow_step),
            decay: F::round(outer.momentum),
            nesterov: outer.nesterov,
        }
    }

    /// Where a pair meets.
    #[must_use]
    #[inline(always)]
    pub fn of(self, fast: F, slow: F, u: &mut F) -> F {
        let gradient = slow - fast;
        *u = self.decay * *u + gradient;
        let ahead = gradient + self.decay * *u;
        slow - self.step * select(*u, ahead, self.nesterov)
    }
}
