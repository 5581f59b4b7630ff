//! Load a tile of lanes, update it, sync it where a cycle ends, store it: one pass over memory.
//!
//! Scalar bodies over a fixed number of local lanes vectorise on stable Rust. Ends are padded to a tile, so that there
//! is one arithmetic, and an element's bits do not depend on where in an array it stands. Numbers that are stored in
//! another format than they are computed in become such tiles on the stack.

use std::array::from_fn;
use std::mem::take;
use std::ops::Range;

use crate::array::{Array, FEW, Given, Stored, padded};
use crate::codec::{Numbers, Rounding, either_bf16, half, nearest_bf16};
use crate::element::{Element, to_bf16};
use crate::gradient::Factor;
use crate::lookahead::{Blend, Phase, from_fast, from_slow};
use crate::reduce::Sums;
pub use crate::rule::LANES;
use crate::rule::{self, CARRY, SUMS, Scope, Source, Update};
use crate::simd::{Level, at};

/// Elements of a tile where there are too few for a whole one.
const SHORT: usize = 8;
/// State arrays that a rule may have.
pub const MAX_STATE: usize = 4;
/// Elements from which on a run is begun at a cache line of `p`.
pub const PEELED: usize = 1 << 14;
/// Bytes of a cache line, which no store should cross.
pub const LINE: usize = 64;

/// The arrays that the optimizer keeps for a leaf; those that it does not have are empty.
pub struct Kept<'a, F> {
    /// The rule's state, in its order.
    pub state: [Stored<'a, F>; MAX_STATE],
    /// How many of these there are.
    pub states: usize,
    /// Slow weights of the innermost cycle.
    pub slow: &'a mut [F],
    /// All others.
    pub more: Vec<&'a mut [F]>,
    /// How state is rounded that is stored in 16 bits: rows 0 and 1, rows 2 and 3.
    pub rounding: [Rounding; MAX_STATE / 2],
    /// The number of the first element, from which its random bits are made.
    pub first: u64,
}

impl<'a, F: Copy> Kept<'a, F> {
    /// No arrays yet, for a rule with `states` of its own.
    #[must_use]
    pub fn new(states: usize) -> Self {
        Self {
            state: from_fn(|_| Array::default()),
            states,
            slow: Default::default(),
            more: Vec::new(),
            rounding: [Rounding::Nearest; MAX_STATE / 2],
            first: 0,
        }
    }

    /// Adds the next array: first the rule's own, then slow weights, then all others.
    ///
    /// # Panics
    /// If an array that is not of the rule's state is not whole.
    pub fn push(&mut self, row: usize, mut array: Stored<'a, F>) {
        match row.checked_sub(self.states) {
            None => self.state[row] = array,
            Some(0) => self.slow = take(array.whole()),
            Some(_) => self.more.push(take(array.whole())),
        }
    }

    /// Whether the rule's state is stored as it is computed.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.state.iter().all(|s| matches!(s, Array::Whole(_)))
    }

    /// The array of a row, in the order in which they were added.
    #[allow(
        clippy::mut_mut,
        reason = "an array can be taken out of its row, and put back"
    )]
    pub fn row(&mut self, row: usize) -> &mut &'a mut [F] {
        match row.checked_sub(self.states) {
            None => self.state[row].whole(),
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

/// The same within a cycle, of arrays as they are stored.
pub type Raw<F> = fn(Level, scalars: &[F], p: Stored<F>, g: Gradient<F>, kept: &mut Kept<F>);

/// A function that moves the state alone, and adds to sums.
pub type Measure<F> = fn(Level, scalars: &[F], p: &[F], g: &[F], kept: &mut Kept<F>, &mut Sums);

/// A function that puts the weights to evaluate in place of `p`.
pub type Evaluate<F> = fn(Level, scalars: &[F], p: &mut [F], kept: &mut Kept<F>);

/// Gradients, and what is done to each before the rule sees it.
#[derive(Clone, Copy, Debug)]
pub struct Gradient<'a, F> {
    /// As they are stored.
    pub array: Given<'a, F>,
    /// None, where they are stepped with as they are.
    pub factor: Option<Factor<F>>,
}

impl<'a, F: Copy> Gradient<'a, F> {
    /// The numbers that the rule sees, where they are there as they are.
    #[must_use]
    pub fn whole(&self) -> Option<&'a [F]> {
        match (self.array, &self.factor) {
            (Array::Whole(g), None) => Some(g),
            _ => None,
        }
    }
}

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
    /// [`Source::SCALARS`].
    pub names: &'static [&'static str],
    /// [`Source::BODY`].
    pub body: &'static str,
    /// [`Source::EVALUATE`].
    pub evaluated: &'static str,
    /// [`Source::scalars`], each rounded once.
    pub scalars: Scalars<F>,
    /// Moves a run of elements.
    pub step: Step<F>,
    /// Moves a run of elements as they are stored.
    pub raw: Raw<F>,
    /// Measures a run of elements, where the rule has a scope.
    pub measure: Measure<F>,
    /// Turns a run of elements into the weights to evaluate, where those are others.
    pub evaluate: Option<Evaluate<F>>,
}

impl<F: Element> Kernel<F> {
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
            names: R::SCALARS,
            body: R::BODY,
            evaluated: R::EVALUATE,
            scalars: |hyper, t, carry, sums| {
                let scalars = R::scalars(hyper, t, carry, sums);
                scalars.into_iter().map(F::round).collect()
            },
            step: |level, phase, c, p, g, kept| {
                // A loop for each form of the sync: a condition would be looked at for each element.
                match phase {
                    Phase::Plain | Phase::Sync(Blend::Stay) => {
                        let finish = |_, fast, slow| (fast, slow);
                        at!(level, tiles::<F, R, K, N, false>(c, p, g, kept, finish));
                    }
                    Phase::Start => {
                        let finish = |before, fast, _| (fast, before);
                        at!(level, tiles::<F, R, K, N, true>(c, p, g, kept, finish));
                    }
                    Phase::Sync(Blend::FromSlow(part)) => {
                        let finish = move |_, fast, slow| (from_slow(part, fast, slow), slow);
                        at!(level, tiles::<F, R, K, N, true>(c, p, g, kept, finish));
                    }
                    Phase::Sync(Blend::FromFast(part)) => {
                        let finish = move |_, fast, slow| (from_fast(part, fast, slow), slow);
                        at!(level, tiles::<F, R, K, N, true>(c, p, g, kept, finish));
                    }
                }
                if phase == Phase::Sync(Blend::Stay) {
                    p.copy_from_slice(kept.slow);
                }
            },
            raw: |level, c, p, g, kept| at!(level, raw::<F, R, K, N>(c, p, g, kept)),
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
#[allow(clippy::many_single_char_names, reason = "what the papers call them")]
fn tiles<F: Element, R: Update<F, K, N>, const K: usize, const N: usize, const SLOW: bool>(
    scalars: &[F],
    p: &mut [F],
    g: &[F],
    kept: &mut Kept<F>,
    finish: impl Fn(F, F, F) -> (F, F) + Copy,
) {
    let c: [F; K] = scalars.try_into().expect("one number per scalar");
    let n = p.len();
    // What comes before the first line of `p` is a part of its own.
    let mut start = 0;
    for end in [peeled(p), n] {
        let part = start..end;
        start = end;
        if part.is_empty() {
            continue;
        }
        let mut state = chunks(&mut kept.state, part.clone());
        let of_slow = if SLOW { part.clone() } else { 0..0 };
        let (slow, slow_end) = kept.slow[of_slow].as_chunks_mut();
        let (g, g_end) = g[part.clone()].as_chunks();
        let (p, p_end) = p[part].as_chunks_mut();
        let mut unused = [F::default(); LANES];
        for i in 0..p.len() {
            let state = state.each_mut().map(|(s, _)| &mut s[i]);
            let slow = if SLOW { &mut slow[i] } else { &mut unused };
            R::tile(&c, &mut p[i], &g[i], state, slow, finish);
        }
        let mut at = 0;
        while at < p_end.len() {
            let few = at..p_end.len().min(at + SHORT);
            at = few.end;
            let mut p = short(&p_end[few.clone()]);
            let mut s = state.each_ref().map(|(_, end)| short(&end[few.clone()]));
            let mut slow = short(slow_end.get(few.clone()).unwrap_or_default());
            let g = short(&g_end[few.clone()]);
            R::tile(&c, &mut p, &g, s.each_mut(), &mut slow, finish);
            set_short(&mut p_end[few.clone()], &p);
            if let Some(end) = slow_end.get_mut(few.clone()) {
                set_short(end, &slow);
            }
            for k in 0..N {
                set_short(&mut state[k].1[few.clone()], &s[k]);
            }
        }
    }
}

/// Up to `SHORT` elements, and zeroes after them; without a call, which takes longer.
#[inline(always)]
fn short<F: Copy + Default>(x: &[F]) -> [F; SHORT] {
    let mut tile = [F::default(); SHORT];
    if let Some(whole) = x.first_chunk() {
        return *whole;
    }
    for (k, lane) in tile.iter_mut().enumerate() {
        *lane = x.get(k).copied().unwrap_or_default();
    }
    tile
}

/// Puts them back.
#[inline(always)]
fn set_short<F: Copy>(x: &mut [F], tile: &[F; SHORT]) {
    if let Some(whole) = x.first_chunk_mut() {
        *whole = *tile;
        return;
    }
    for (k, &lane) in tile.iter().enumerate() {
        if let Some(x) = x.get_mut(k) {
            *x = lane;
        }
    }
}

/// [`tiles`] of arrays of which some are stored in 16 bits, or gradients that are not yet what the rule sees: what needs it
/// becomes a few tiles on the stack.
#[inline(always)]
#[allow(clippy::many_single_char_names, reason = "what the papers call them")]
fn raw<F: Element, R: Update<F, K, N>, const K: usize, const N: usize>(
    scalars: &[F],
    mut p: Stored<F>,
    g: Gradient<F>,
    kept: &mut Kept<F>,
) {
    let c: [F; K] = scalars.try_into().expect("one number per scalar");
    let [mut p_copy, mut g_copy] = [[F::default(); FEW]; 2];
    let (mut copies, mut unused) = ([[F::default(); FEW]; N], [F::default(); LANES]);
    let n = p.count();
    let is_whole = kept.is_whole();
    let peeled = match &p {
        // Random bits are made for whole lines of elements.
        Array::Whole(p) if is_whole => peeled(p),
        _ => 0,
    };
    let numbers = Numbers::From(kept.first);
    let keys = kept.rounding.map(|rounding| match rounding {
        Rounding::Nearest => None,
        Rounding::Stochastic { key, .. } => Some(key),
    });
    let mut arrays = kept.state.iter_mut();
    let mut state: [_; N] = from_fn(|_| arrays.next().expect("an array per state").again());
    let (mut words, mut start) = ([0; FEW], 0);
    while start < n {
        let end = (start + FEW).min(if start < peeled { peeled } else { n });
        let part = start..end;
        let mut g_few = g.array.few(part.clone(), &mut g_copy);
        if let Some(factor) = g.factor {
            g_copy = factor.times(g_few);
            g_few = &g_copy;
        }
        for k in 0..N {
            state[k].copy_few(part.clone(), &mut copies[k]);
        }
        // References are not gathered by `from_fn`: to read them back from memory would wait for all that is under way.
        let mut few = copies.each_mut();
        for (few, array) in few.iter_mut().zip(&mut state) {
            if let Some(own) = array.few(part.clone()) {
                *few = own;
            }
        }
        p.copy_few(part.clone(), &mut p_copy);
        let p_few = p.few(part.clone()).unwrap_or(&mut p_copy);
        let (p_few, g_few) = (p_few.as_chunks_mut().0, g_few.as_chunks().0);
        for i in 0..part.len().div_ceil(LANES) {
            let s = few.each_mut().map(|s| &mut s.as_chunks_mut::<LANES>().0[i]);
            R::tile(
                &c,
                &mut p_few[i],
                &g_few[i],
                s,
                &mut unused,
                |_, fast, slow| (fast, slow),
            );
        }
        p.set_few(
            part.clone(),
            &p_copy,
            #[inline(always)]
            |_, x| to_bf16(x),
        );
        start = end;
        // Whatever random bits are made of is left alone where none are needed: it takes as long as the update.
        match keys {
            _ if is_whole && part.len() == FEW => {}
            keys if is_whole || keys == [None; 2] => {
                for (array, copy) in state.iter_mut().zip(&copies) {
                    array.set_few(
                        part.clone(),
                        copy,
                        #[inline(always)]
                        |_, x| nearest_bf16(x),
                    );
                }
            }
            _ => {
                let pairs = state.chunks_mut(2).zip(copies.chunks(2)).zip(keys);
                for ((arrays, copies), key) in pairs {
                    let key = key.unwrap_or_default();
                    for (i, words) in words.as_chunks_mut().0.iter_mut().enumerate() {
                        *words = numbers.words(key, part.start + i * LANES);
                    }
                    for (row, (array, copy)) in arrays.iter_mut().zip(copies).enumerate() {
                        array.set_few(
                            part.clone(),
                            copy,
                            #[inline(always)]
                            |i, x| either_bf16(x, half(row, words[i])),
                        );
                    }
                }
            }
        }
    }
}

/// Elements before the first cache line of a long run.
#[inline(always)]
fn peeled<T>(p: &[T]) -> usize {
    if p.len() < PEELED {
        return 0;
    }
    p.as_ptr().align_offset(LINE).min(p.len())
}

#[inline(always)]
fn measured<F: Element, R: rule::Measure<F, K, N>, const K: usize, const N: usize>(
    scalars: &[F],
    p: &[F],
    g: &[F],
    kept: &mut Kept<F>,
    sums: &mut Sums,
) {
    let c: [F; K] = scalars.try_into().expect("one number per scalar");
    let mut state: [_; N] = chunks(&mut kept.state, 0..p.len());
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
fn evaluated<F: Element, R: rule::Evaluate<F, K, N>, const K: usize, const N: usize>(
    scalars: &[F],
    p: &mut [F],
    kept: &mut Kept<F>,
) {
    let c: [F; K] = scalars.try_into().expect("one number per scalar");
    let mut arrays = kept.state.iter_mut();
    let state: [&[F]; N] = from_fn(|_| {
        let array = arrays.next().expect("an array per state");
        &array.whole()[..p.len()]
    });
    for (i, p) in p.iter_mut().enumerate() {
        *p = R::evaluate(&c, *p, state.map(|s| s[i]));
    }
}

type Chunks<'a, F> = (&'a mut [[F; LANES]], &'a mut [F]);

#[inline(always)]
fn chunks<'a, F: Element, const N: usize>(
    state: &'a mut [Stored<'_, F>; MAX_STATE],
    part: Range<usize>,
) -> [Chunks<'a, F>; N] {
    let mut arrays = state.iter_mut();
    from_fn(|_| {
        let array = arrays.next().expect("an array per state");
        array.whole()[part.clone()].as_chunks_mut()
    })
}
