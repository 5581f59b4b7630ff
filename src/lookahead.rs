//! Lookahead's cycle: when slow weights are taken, when they move, and by what arithmetic. Slow weights are the fast
//! ones as the first step of a cycle finds them, so between cycles the two are one, and no second copy is kept.

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

/// Counts applied steps in cycles of `period`.
#[derive(Clone, Debug)]
pub struct Cycle {
    /// Steps a cycle.
    pub period: u64,
    /// The fraction of the way that slow moves toward fast at a sync.
    pub slow_step: f64,
    /// Steps since the last sync.
    pub done: u64,
    /// Syncs so far.
    pub syncs: u64,
}

impl Cycle {
    /// A cycle that has not begun.
    #[must_use]
    pub fn new(period: u64, slow_step: f64) -> Self {
        Self {
            period,
            slow_step,
            done: 0,
            syncs: 0,
        }
    }

    /// Whether slow weights are ever kept in an array of their own: not where every step's sync leaves fast where it is.
    #[must_use]
    pub fn keeps_slow(&self) -> bool {
        self.period > 1 || self.slow_step < 1.0
    }

    /// What the next step does: within the kernel, and as a sync of its own after it (where a cycle is one step, whose
    /// slow weights must be taken before they can meet the fast ones). A sync that leaves fast where it is, is no work.
    #[must_use]
    pub fn plan<F: Float>(&self) -> (Phase<Blend<F>>, Option<Blend<F>>) {
        let ends = self.done + 1 == self.period;
        let sync = ends.then(|| Blend::new(self.slow_step)).flatten();
        match (self.done == 0, sync) {
            (true, _) if !self.keeps_slow() => (Phase::Plain, None),
            (true, sync) => (Phase::Start, sync),
            (false, Some(blend)) => (Phase::Sync(blend), None),
            (false, None) => (Phase::Plain, None),
        }
    }

    /// Counts a step.
    pub fn advance(&mut self) {
        self.done += 1;
        if self.done == self.period {
            self.close();
        }
    }

    /// Ends the cycle now.
    pub fn close(&mut self) {
        self.done = 0;
        self.syncs += 1;
    }
}

/// Slow weights' move toward fast ones, in the form that is exact at both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blend<F> {
    /// The fraction of the way.
    step: F,
    /// `1 - step`, rounded once.
    rest: F,
}

impl<F: Float> Blend<F> {
    /// The arithmetic for `slow_step` in [0, 1]; none at 1, where fast weights stay.
    #[must_use]
    pub fn new(slow_step: f64) -> Option<Self> {
        (slow_step < 1.0).then(|| Self {
            step: F::round(slow_step),
            rest: F::round(1.0 - slow_step),
        })
    }

    /// Where a pair meets; at 0 that is slow, also where fast is not finite.
    #[must_use]
    #[inline(always)]
    pub fn of(self, fast: F, slow: F) -> F {
        let way = fast - slow;
        let from_slow = slow + self.step * way;
        let from_fast = fast - way * self.rest;
        let near = select(from_fast, from_slow, self.step < self.rest);
        select(near, slow, self.step == F::default())
    }
}
