//! Whatever the instruction set, the length and the place in an array: an element's bits are those that it has alone.

#![allow(clippy::float_cmp, reason = "equal bits are what is claimed")]

use std::ops::Range;

use lookstep::array::Array;
use lookstep::codec::{BLOCK, Codec, Numbers, Rounding, keep_8, keep_bf16, read_8};
use lookstep::element::{Dtype, from_bf16, to_bf16};
use lookstep::gradient::Prepare;
use lookstep::kernel::{Gradient, Kept, Kernel, LANES, PEELED};
use lookstep::lookahead::{Blend, Cycle, Cycles, InnerState, Phase};
use lookstep::reduce::Sums;
use lookstep::rule::{CARRY, Float, SUMS, Scope};
use lookstep::rules::Compute;
use lookstep::simd::Level;
use lookstep::step::{Rows, Step, Sync};

/// Fast weights, gradients, and the kept arrays (state, then slow weights).
#[derive(Clone, Debug, PartialEq)]
struct Arrays<F> {
    p: Vec<F>,
    g: Vec<F>,
    kept: Vec<Vec<F>>,
}

impl<F: Float> Arrays<F> {
    /// Numbers of many sizes, zeros and both signs among them; what stands for second moments is positive.
    fn new(n: usize, states: usize) -> Self {
        let mut seed = 1_u64;
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            #[allow(clippy::cast_precision_loss, reason = "any number will do")]
            let unit = (seed >> 11) as f64 / (1_u64 << 53) as f64;
            unit
        };
        let mut number = |sign: f64| {
            let size = 10_f64.powf(next() * 8.0 - 6.0);
            let zero = next() < 0.1;
            F::round(if zero {
                0.0
            } else if next() < 0.5 {
                size
            } else {
                sign * size
            })
        };
        let mut array = |sign| (0..n).map(|_| number(sign)).collect::<Vec<_>>();
        Self {
            p: array(-1.0),
            g: array(-1.0),
            kept: (0..=states).map(|_| array(1.0)).collect(),
        }
    }

    fn kept(&mut self) -> (&mut [F], &[F], Kept<'_, F>) {
        let mut kept = Kept::new(self.kept.len() - 1);
        for (row, array) in self.kept.iter_mut().enumerate() {
            kept.push(row, Array::Whole(array));
        }
        (&mut self.p, &self.g, kept)
    }

    fn step(&mut self, kernel: &Kernel<F>, level: Level, phase: Phase<Blend<F>>, scalars: &[F]) {
        let (p, g, mut kept) = self.kept();
        (kernel.step)(level, phase, scalars, p, g, &mut kept);
    }

    fn first(&self, n: usize) -> Self {
        self.part(0..n)
    }

    fn part(&self, range: Range<usize>) -> Self {
        let part = |array: &Vec<F>| array[range.clone()].to_vec();
        Self {
            p: part(&self.p),
            g: part(&self.g),
            kept: self.kept.iter().map(part).collect(),
        }
    }

    /// Each element alone, at the baseline; what the phase adds is written out here once more.
    fn one_by_one(&self, kernel: &Kernel<F>, phase: Phase<Blend<F>>, scalars: &[F]) -> Self {
        let mut all = self.clone();
        for i in 0..self.p.len() {
            let mut one = self.part(i..i + 1);
            one.step(kernel, Level::available()[0], Phase::Plain, scalars);
            let slow = one.kept.last_mut().unwrap();
            match phase {
                Phase::Plain => {}
                Phase::Start => slow[0] = self.p[i],
                Phase::Sync(blend) if blend == blend_of(0.0) => one.p[0] = slow[0],
                Phase::Sync(blend) if blend == blend_of(0.3) => {
                    one.p[0] = slow[0] + F::round(0.3) * (one.p[0] - slow[0]);
                }
                Phase::Sync(_) => {
                    one.p[0] = one.p[0] - (one.p[0] - slow[0]) * F::round(1.0 - 0.8);
                }
            }
            all.p[i] = one.p[0];
            for (array, value) in all.kept.iter_mut().zip(&one.kept) {
                array[i] = value[0];
            }
        }
        all
    }
}

fn blend_of<F: Float>(slow_step: f64) -> Blend<F> {
    Blend::new(slow_step).unwrap()
}

fn phases<F: Float>() -> [Phase<Blend<F>>; 5] {
    let sync = |slow_step| Phase::Sync(blend_of(slow_step));
    [Phase::Plain, Phase::Start, sync(0.0), sync(0.3), sync(0.8)]
}

fn every_level_gives_each_element_its_bits<F: Compute + std::fmt::Debug>() {
    let mut lengths: Vec<usize> = (0..=4 * LANES + 1).collect();
    lengths.push(PEELED + LANES + 1);
    for kernel in F::kernels() {
        let hyper: Vec<f64> = (1..=kernel.hyper.len())
            .map(|i| 0.6 / f64::from(u8::try_from(i).unwrap()))
            .collect();
        let scalars = (kernel.scalars)(&hyper, 7.0, &mut [0.0; CARRY], [0.5; SUMS]);
        for phase in phases() {
            let start = Arrays::new(PEELED + LANES + 1, kernel.state.len());
            let end = start.one_by_one(&kernel, phase, &scalars);
            for &n in &lengths {
                for level in Level::available() {
                    let mut arrays = start.first(n);
                    arrays.step(&kernel, level, phase, &scalars);
                    assert!(
                        arrays == end.first(n),
                        "{} {level:?} {phase:?} {n}",
                        kernel.name
                    );
                }
            }
        }
    }
}

#[test]
fn every_level_gives_each_f32_its_bits() {
    every_level_gives_each_element_its_bits::<f32>();
}

#[test]
fn every_level_gives_each_f64_its_bits() {
    every_level_gives_each_element_its_bits::<f64>();
}

/// What is stored in 16 bits, and what is done to gradients first, against the same by hand: numbers are read, stepped
/// with, and kept again.
#[test]
fn arrays_as_they_are_stored_are_stepped_as_what_they_stand_for() {
    let prepare = Prepare {
        factor: -3.0,
        limit: Some(2.5),
        clip: 0.3,
    };
    let stochastic = [0, 2].map(|row| Rounding::Stochastic {
        key: 9 + row,
        row: row as usize,
    });
    for kernel in f32::kernels() {
        let hyper = vec![0.5; kernel.hyper.len()];
        let scalars = (kernel.scalars)(&hyper, 7.0, &mut [0.0; CARRY], [0.5; SUMS]);
        let bits = |x: &[f32]| -> Vec<u16> { x.iter().map(|&x| to_bf16(x)).collect() };
        let wide = |x: &[u16]| -> Vec<f32> { x.iter().map(|&x| from_bf16(x)).collect() };
        for n in [1, LANES - 1, LANES, 5 * LANES + 3, PEELED + 7] {
            let start = Arrays::<f32>::new(n, kernel.state.len());
            for (halves, rounding) in [
                ([false, false, false], None),
                ([false, true, false], None),
                ([true, true, false], None),
                ([false, false, true], Some([Rounding::Nearest; 2])),
                ([false, false, true], Some(stochastic)),
            ] {
                let [half_p, half_g, half_state] = halves;
                let mut by_hand = start.clone();
                if half_p {
                    by_hand.p = wide(&bits(&by_hand.p));
                }
                if half_g {
                    by_hand.g = wide(&bits(&by_hand.g));
                }
                let states = kernel.state.len();
                for state in by_hand.kept[..states].iter_mut().filter(|_| half_state) {
                    *state = wide(&bits(state));
                }
                let begun = by_hand.clone();
                prepare.apply(Level::available()[0], &mut by_hand.g);
                by_hand.step(&kernel, Level::available()[0], Phase::Plain, &scalars);
                let p_bits = bits(&by_hand.p);
                let kept_bits = |row: usize, from: &[f32]| {
                    let mut codes = vec![0; n];
                    let rounding = match rounding.unwrap()[row / 2] {
                        Rounding::Stochastic { key, .. } => Rounding::Stochastic { key, row },
                        Rounding::Nearest => Rounding::Nearest,
                    };
                    let numbers = Numbers::From(64);
                    keep_bf16(Level::available()[0], rounding, from, numbers, &mut codes);
                    codes
                };
                for level in Level::available() {
                    let mut arrays = begun.clone();
                    let (mut p, g) = (bits(&arrays.p), bits(&arrays.g));
                    let mut state: Vec<_> = arrays.kept[..states].iter().map(|s| bits(s)).collect();
                    let mut kept = Kept::new(states);
                    for (row, (s, h)) in arrays.kept.iter_mut().zip(&mut state).enumerate() {
                        kept.push(
                            row,
                            if half_state {
                                Array::Half(h)
                            } else {
                                Array::Whole(s)
                            },
                        );
                    }
                    kept.rounding = rounding.unwrap_or(kept.rounding);
                    kept.first = 64;
                    let gradient = Gradient {
                        array: if half_g {
                            Array::Half(&g[..])
                        } else {
                            Array::Whole(&arrays.g[..])
                        },
                        factor: prepare.factor(),
                    };
                    let weights = if half_p {
                        Array::Half(&mut p[..])
                    } else {
                        Array::Whole(&mut arrays.p[..])
                    };
                    (kernel.raw)(level, &scalars, weights, gradient, &mut kept);
                    drop(kept);
                    let what = format!("{} {level} {n} {halves:?} {rounding:?}", kernel.name);
                    if half_p {
                        assert_eq!(p, p_bits, "{what}");
                    } else {
                        assert!(arrays.p == by_hand.p, "{what}");
                    }
                    for (row, codes) in state.iter().enumerate() {
                        if half_state {
                            assert_eq!(*codes, kept_bits(row, &by_hand.kept[row]), "{what}");
                        } else {
                            assert!(arrays.kept[row] == by_hand.kept[row], "{what}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_step_moves_what_it_should() {
    for kernel in f32::kernels() {
        let hyper = vec![0.5; kernel.hyper.len()];
        let start = Arrays::new(LANES, kernel.state.len());
        let mut arrays = start.clone();
        arrays.step(
            &kernel,
            Level::best(),
            Phase::Plain,
            &(kernel.scalars)(&hyper, 9.0, &mut [0.0; CARRY], [0.5; SUMS]),
        );
        assert_ne!(arrays.p, start.p, "{}", kernel.name);
        assert_eq!(
            arrays.kept.last(),
            start.kept.last(),
            "slow weights move at a sync only"
        );
    }
}

/// A rule within one cycle, at work on a leaf of its own without gradients.
fn without_gradient(p: &mut [f32], slow: &mut [f32], starting: usize, slow_step: Option<f64>) {
    let kernel = f32::kernels()
        .into_iter()
        .find(|kernel| kernel.name == "Sgd");
    let cycle = Cycle::new(3, None, InnerState::Keep);
    let syncs: Vec<_> = slow_step
        .map(|slow_step| Sync::new(&cycle, slow_step))
        .into_iter()
        .collect();
    let mut kept = Kept::new(0);
    kept.push(0, Array::Whole(slow));
    let step = Step {
        level: Level::best(),
        kernel: &kernel.unwrap(),
        scalars: &[],
        starting,
        syncs: &syncs,
        rows: &Rows::new(&[], 0, &[cycle], false, false),
        dtype: Dtype::F32,
        fresh: true,
        unclip: 1.0,
    };
    step.advance(Array::Whole(p), None, &mut kept);
}

#[test]
fn a_leaf_without_a_gradient_takes_part_in_the_cycle_alone() {
    let mut p = [1.0, f32::INFINITY, 3.0];
    let mut slow = [0.0; 3];
    without_gradient(&mut p, &mut slow, 0, None);
    assert_eq!((p[0], slow), (1.0, [0.0; 3]));
    without_gradient(&mut p, &mut slow, 1, None);
    assert_eq!(slow, p);
    p[0] = 3.0;
    without_gradient(&mut p, &mut slow, 0, Some(0.5));
    assert_eq!(p[0], 2.0);
}

#[test]
fn a_sync_is_exact_at_both_ends() {
    let mut slow = [0.1_f32, -7.3e8, 1e-30, 5.5];
    let fast = [3.3e7_f32, 0.2, -1e30, f32::NAN];
    let mut p = fast;
    without_gradient(&mut p, &mut slow, 0, Some(0.0));
    assert_eq!(p, slow);
    p = fast;
    without_gradient(&mut p, &mut slow, 0, Some(1.0));
    assert_eq!(p[..3], fast[..3]);
    assert_eq!(Blend::<f32>::new(1.0), None);
}

#[test]
fn a_cycle_starts_and_syncs_where_the_paper_does() {
    let plans = |periods: &[u64], steps: usize| -> Vec<_> {
        let cycle = |&period| Cycle::new(period, None, InnerState::Keep);
        let mut cycles = Cycles(periods.iter().map(cycle).collect());
        let plan = |_| {
            let plan = (cycles.starting(), cycles.ending(1));
            cycles.advance(1, plan.1);
            plan
        };
        (0..steps).map(plan).collect()
    };
    let (start, plain, sync) = ((1, 0), (0, 0), (0, 1));
    assert_eq!(
        plans(&[3], 7),
        [start, plain, sync, start, plain, sync, start]
    );
    assert_eq!(plans(&[1], 2), [(1, 1); 2]);
    assert_eq!(plans(&[], 2), [(0, 0); 2]);
    // Around two cycles of two steps, a cycle of two.
    assert_eq!(plans(&[2, 2], 5), [(2, 0), (0, 1), (1, 0), (0, 2), (2, 0)]);
    assert_eq!(plans(&[1, 1, 2], 3), [(3, 2), (2, 3), (3, 2)]);
}

#[test]
fn state_drops_denormals() {
    use lookstep::rule::stored;
    for zero in [0.0_f32, -0.0, 1e-40, -1e-40] {
        assert_eq!(stored(zero).to_bits(), 0.0_f32.to_bits());
    }
    assert_eq!(stored(-f32::MIN_POSITIVE), -f32::MIN_POSITIVE);
    assert_eq!(stored(f32::INFINITY), f32::INFINITY);
    assert!(stored(f32::NAN).is_nan());
}

#[test]
fn second_moments_saturate() {
    use lookstep::rule::finite;
    assert_eq!(finite(f32::INFINITY), f32::MAX);
    assert_eq!(finite(3.5_f32), 3.5);
    assert!(finite(f32::NAN).is_nan());
}

#[test]
fn bias_corrections_keep_their_digits() {
    use lookstep::rule::complement;
    // 1 - 0.999^1 and its like, by exact arithmetic; a difference of powers loses what is in the last digits here.
    for (b, t, exact) in [
        (0.999, 1.0, 1e-3),
        (0.999, 2.0, 1.999e-3),
        (0.9, 3.0, 0.271),
        (0.5, 10.0, 1023.0 / 1024.0),
        (0.0, 1.0, 1.0),
        (0.999, 1e300, 1.0),
    ] {
        let error = (complement(b, t) - exact) / exact;
        // The nearest doubles to 0.9 and 0.999 are themselves off by up to an ulp, which 1 - b magnifies by b / (1 - b).
        assert!(error.abs() < 1e3 * f64::EPSILON, "{b} {t} {error:e}");
    }
}

#[test]
fn what_is_measured_is_the_same_at_every_level() {
    for kernel in f32::kernels()
        .iter()
        .filter(|kernel| kernel.scope != Scope::None)
    {
        let hyper = vec![0.5; kernel.hyper.len()];
        let scalars = (kernel.scalars)(&hyper, 7.0, &mut [0.0; CARRY], [0.5; SUMS]);
        for n in [0, 1, LANES - 1, LANES, 3 * LANES + 5] {
            let measured = |level| {
                let mut arrays = Arrays::new(n, kernel.state.len());
                let mut sums = Sums::default();
                let (p, g, mut kept) = arrays.kept();
                (kernel.measure)(level, &scalars, p, g, &mut kept, &mut sums);
                (sums.total().map(f64::to_bits), arrays)
            };
            let baseline = measured(Level::available()[0]);
            assert_eq!(n > 0, baseline.0 != [0; SUMS], "{}", kernel.name);
            for level in Level::available() {
                assert!(measured(level) == baseline, "{} {level:?} {n}", kernel.name);
            }
        }
    }
}

#[test]
fn fewer_bits_are_the_same_at_every_level() {
    let mut finite = Arrays::<f32>::new(BLOCK, 0).g;
    finite[70] = 1e-40;
    let mut lost = finite.clone();
    (lost[3], lost[40]) = (f32::NAN, f32::INFINITY);
    let stochastic = [0, 1].map(|row| Rounding::Stochastic { key: 9, row });
    for rounding in [Rounding::Nearest, stochastic[0], stochastic[1]] {
        for from in [&finite[..1], &finite[..LANES + 3], &finite, &lost] {
            let n = from.len();
            let kept = |level| {
                let mut halves = vec![0; n];
                keep_bf16(level, rounding, from, Numbers::From(512), &mut halves);
                let mut all = vec![halves.iter().map(|&x| u32::from(x)).collect::<Vec<_>>()];
                for codec in [Codec::Signed8, Codec::Unsigned8] {
                    let (mut codes, mut back) = (vec![0; n], vec![0.0_f32; n]);
                    let scale =
                        keep_8(level, codec, rounding, from, Numbers::From(512), &mut codes);
                    read_8(level, codec, &codes, scale, &mut back);
                    all.push(codes.iter().map(|&x| u32::from(x)).collect());
                    all.push(back.iter().map(|x| x.to_bits()).collect());
                }
                all
            };
            let baseline = kept(Level::available()[0]);
            for level in Level::available() {
                assert_eq!(kept(level), baseline, "{level:?} {n}");
            }
        }
    }
}
