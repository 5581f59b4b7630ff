//! Load a tile of lanes, update it, sync it where a cycle ends, store it: one pass over memory.
//!
//! Scalar bodies over a fixed number of local lanes vectorise on stable Rust. Ends are padded to a tile, so that there
//! is one arithmetic, and an element's bits do not depend on where in an array it stands.

use crate::lookahead::{Blend, Phase};
use crate::reduce::Sums;
pub use crate::rule::LANES;
use crate::rule::{self, CARRY, Float, SUMS, Scope, Source, Update};
use crate::simd::{Level, at};

/// Elements that a thread takes at a time.
pub const CHUNK: usize = 1 << 16;
/// State arrays that a rule may have.
pub const MAX_STATE: usize = 4;

/// The arrays that the optimizer keeps for a leaf; those that it does not have are empty.
pub struct Kept<'a, F> {
    /// The rule's state, in its order.
    pub state: [&'a mut [F]; MAX_STATE],
    /// How many of these there are.
    pub states: usize,
    /// Slow weights of the innermost cycle.
    pub slow: &'a mut [F],
    /// All others.
    pub more: Vec<&'a mut [F]>,
}

impl<'a, F> Kept<'a, F> {
    /// No arrays yet, for a rule with `states` of its own.
    #[must_use]
    pub fn new(states: usize) -> Self {
        Self {
            state: std::array::from_fn(|_| Default::default()),
            states,
            slow: Default::default(),
            more: Vec::new(),
        }
    }

    /// Adds the next array: first the rule's own, then slow weights, then all others.
    pub fn push(&mut self, row: usize, array: &'a mut [F]) {
        if row > self.states {
            self.more.push(array);
        } else {
            *self.row(row) = array;
        }
    }

    /// The array of a row, in the order in which they were added.
    #[allow(
        clippy::mut_mut,
        reason = "an array can be taken out of its row, and put back"
    )]
    pub fn row(&mut self, row: usize) -> &mut &'a mut [F] {
        match row.checked_sub(self.states) {
            None => &mut self.state[row],
            Some(0) => &mut self.slow,
            Some(more) => &mut self.more[more - 1],
        }
    }
}

/// A function from hyper-parameters, the step, what was carried to it and sums to what a body reads.
pub type Scalars<F> = fn(&[f64], f64, &mut [f64; CARRY], [f64; SUMS]) -> Vec<F>;

/// A function that moves fast weights `p` by gradients `g`; all arrays have one length.
pub type Step<F> =
    fn(Level, Phase<Blend<F>>, scalars: &[F], p: &mut [F], g: &[F], kept: &mut Kept<F>);

/// A function that moves the state alone, and adds to sums.
pub type Measure<F> = fn(Level, scalars: &[F], p: &[F], g: &[F], kept: &mut Kept<F>, &mut Sums);

/// A function that puts the weights to evaluate in place of `p`.
pub type Evaluate<F> = fn(Level, scalars: &[F], p: &mut [F], kept: &mut Kept<F>);

/// One rule, compiled for every instruction set.
#[derive(Clone, Copy)]
pub struct Kernel<F> {
    /// [`Source::NAME`].
    pub name: &'static str,
    /// [`Source::HYPER`].
    pub hyper: &'static [&'static str],
    /// [`Source::STATE`].
    pub state: &'static [&'static str],
    /// [`Source::WEIGHTS`].
    pub weights: &'static [&'static str],
    /// [`Source::CARRY`].
    pub carry: &'static [&'static str],
    /// [`Source::SCOPE`].
    pub scope: Scope,
    /// [`Source::scalars`], each rounded once.
    pub scalars: Scalars<F>,
    /// Moves a run of elements.
    pub step: Step<F>,
    /// Measures a run of elements, where the rule has a scope.
    pub measure: Measure<F>,
    /// Turns a run of elements into the weights to evaluate, where those are others.
    pub evaluate: Option<Evaluate<F>>,
}

impl<F: Float> Kernel<F> {
    pub(crate) fn of<
        R: Source + Update<F, K, N> + rule::Measure<F, K, N> + rule::Evaluate<F, K, N>,
        const K: usize,
        const N: usize,
    >() -> Self {
        const { assert!(N <= MAX_STATE, "raise MAX_STATE") };
        Self {
            name: R::NAME,
            hyper: R::HYPER,
            state: R::STATE,
            weights: R::WEIGHTS,
            carry: R::CARRY,
            scope: R::SCOPE,
            scalars: |hyper, t, carry, sums| {
                let scalars = R::scalars(hyper, t, carry, sums);
                scalars.into_iter().map(F::round).collect()
            },
            step: |level, phase, c, p, g, kept| match phase {
                Phase::Plain => {
                    at!(level, tiles::<F, R, K, N>(c, p, g, kept, |_, fast, _| fast));
                }
                Phase::Start => {
                    let finish = |before, fast, slow: &mut F| {
                        *slow = before;
                        fast
                    };
                    at!(level, tiles::<F, R, K, N>(c, p, g, kept, finish));
                }
                Phase::Sync(blend) => {
                    let finish = |_, fast, slow: &mut F| blend.of(fast, *slow);
                    at!(level, tiles::<F, R, K, N>(c, p, g, kept, finish));
                }
            },
            measure: |level, c, p, g, kept, sums| {
                if R::SCOPE != Scope::None {
                    at!(level, measured::<F, R, K, N>(c, p, g, kept, sums));
                }
            },
            evaluate: R::EVALUATES
                .then_some(|level, c, p, kept| at!(level, evaluated::<F, R, K, N>(c, p, kept))),
        }
    }
}

#[inline(always)]
fn tiles<F: Float, R: Update<F, K, N>, const K: usize, const N: usize>(
    scalars: &[F],
    p: &mut [F],
    g: &[F],
    kept: &mut Kept<F>,
    finish: impl Fn(F, F, &mut F) -> F + Copy,
) {
    let c: [F; K] = scalars.try_into().expect("one number per scalar");
    let mut state = chunks(&mut kept.state);
    let (p, p_end) = p.as_chunks_mut();
    let (g, g_end) = g.as_chunks();
    let (slow, slow_end) = kept.slow.as_chunks_mut();
    let mut unused = [F::default(); LANES];
    for i in 0..p.len() {
        let state = state.each_mut().map(|(s, _)| &mut s[i]);
        R::tile(
            &c,
            &mut p[i],
            &g[i],
            state,
            slow.get_mut(i).unwrap_or(&mut unused),
            finish,
        );
    }
    if !p_end.is_empty() {
        let mut p = padded(p_end);
        let mut slow = padded(slow_end);
        let mut s = state.each_ref().map(|(_, end)| padded(end));
        R::tile(&c, &mut p, &padded(g_end), s.each_mut(), &mut slow, finish);
        p_end.copy_from_slice(&p[..p_end.len()]);
        slow_end.copy_from_slice(&slow[..slow_end.len()]);
        for k in 0..N {
            state[k].1.copy_from_slice(&s[k][..p_end.len()]);
        }
    }
}

#[inline(always)]
fn padded<F: Float>(end: &[F]) -> [F; LANES] {
    let mut tile = [F::default(); LANES];
    tile[..end.len()].copy_from_slice(end);
    tile
}

#[inline(always)]
fn measured<F: Float, R: rule::Measure<F, K, N>, const K: usize, const N: usize>(
    scalars: &[F],
    p: &[F],
    g: &[F],
    kept: &mut Kept<F>,
    sums: &mut Sums,
) {
    let c: [F; K] = scalars.try_into().expect("one number per scalar");
    let mut state = chunks(&mut kept.state);
    let (p, p_end) = p.as_chunks();
    let (g, g_end) = g.as_chunks();
    for i in 0..p.len() {
        let state = state.each_mut().map(|(s, _)| &mut s[i]);
        R::tile(&c, &p[i], &g[i], state, &mut sums.lanes);
    }
    if !p_end.is_empty() {
        let mut s: [_; N] = state.each_ref().map(|(_, end)| padded(end));
        // What the padding would add is left out.
        let mut of_tile = [[0.0; LANES]; SUMS];
        R::tile(
            &c,
            &padded(p_end),
            &padded(g_end),
            s.each_mut(),
            &mut of_tile,
        );
        for (sum, of_tile) in sums.lanes.iter_mut().zip(of_tile) {
            for lane in 0..p_end.len() {
                sum[lane] += of_tile[lane];
            }
        }
        for k in 0..N {
            state[k].1.copy_from_slice(&s[k][..p_end.len()]);
        }
    }
}

#[inline(always)]
fn evaluated<F: Float, R: rule::Evaluate<F, K, N>, const K: usize, const N: usize>(
    scalars: &[F],
    p: &mut [F],
    kept: &mut Kept<F>,
) {
    let c: [F; K] = scalars.try_into().expect("one number per scalar");
    for (i, p) in p.iter_mut().enumerate() {
        let mut arrays = kept.state.iter();
        let state = std::array::from_fn(|_| arrays.next().expect("an array per state")[i]);
        *p = R::evaluate(&c, *p, state);
    }
}

type Chunks<'a, F> = (&'a mut [[F; LANES]], &'a mut [F]);

#[inline(always)]
fn chunks<'a, F, const N: usize>(state: &'a mut [&mut [F]; MAX_STATE]) -> [Chunks<'a, F>; N] {
    let mut arrays = state.iter_mut();
    std::array::from_fn(|_| arrays.next().expect("an array per state").as_chunks_mut())
}
