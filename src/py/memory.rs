//! From addresses to numbers: a leaf's elements are lent to the kernel a piece at a time.

use std::ops::Range;
use std::ptr::with_exposed_provenance_mut;

use numpy::prelude::*;
use numpy::{Element, PyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyWeakrefReference;

use crate::kernel::{CHUNK, Kept, Kernel, hold, sync};
use crate::leaf::{Dtype, Leaf, Place};
use crate::lookahead::{Blend, Cycle, Phase};
use crate::rule::Float;
use crate::rules::Compute;
use crate::simd::Level;

/// Elements of a strided array that are gathered, moved and scattered at a time; they stay in the first-level cache.
const BLOCK: usize = 512;

impl Place {
    /// Whether the elements can be lent as a slice of `F`.
    fn is_slice<F>(&self) -> bool {
        self.layout.is_contiguous() && self.data.is_multiple_of(align_of::<F>())
    }

    /// Lends elements `range` to `read`, from a copy where they are not one run.
    ///
    /// # Safety
    /// The place must hold live numbers of type `F` that nobody writes meanwhile.
    unsafe fn with<F: Float, R>(&self, range: Range<usize>, read: impl FnOnce(&[F]) -> R) -> R {
        if self.is_slice::<F>() {
            let first = with_exposed_provenance_mut::<F>(self.data).wrapping_add(range.start);
            // SAFETY: the caller vouches for the numbers; they are contiguous and aligned.
            read(unsafe { std::slice::from_raw_parts(first, range.len()) })
        } else {
            let mut block = [F::default(); BLOCK];
            let block = &mut block[..range.len()];
            // SAFETY: as the caller vouches.
            unsafe { self.gather(range, block) };
            read(block)
        }
    }

    /// Lends elements `range` to `write`, through a copy where they are not one run.
    ///
    /// # Safety
    /// The place must hold live numbers of type `F` that nobody else reads or writes meanwhile.
    unsafe fn with_mut<F: Float, R>(
        &self,
        range: Range<usize>,
        write: impl FnOnce(&mut [F]) -> R,
    ) -> R {
        if self.is_slice::<F>() {
            let first = with_exposed_provenance_mut::<F>(self.data).wrapping_add(range.start);
            // SAFETY: the caller vouches for the numbers; they are contiguous and aligned.
            write(unsafe { std::slice::from_raw_parts_mut(first, range.len()) })
        } else {
            let mut block = [F::default(); BLOCK];
            let block = &mut block[..range.len()];
            // SAFETY: as the caller vouches.
            unsafe { self.gather(range.clone(), block) };
            let result = write(block);
            let mut numbers = block.iter();
            self.layout.visit(range, |offset| {
                let at = with_exposed_provenance_mut::<F>(self.data.wrapping_add_signed(offset));
                // SAFETY: as the caller vouches; the layout's offsets lie in the array, aligned or not.
                unsafe { at.write_unaligned(*numbers.next().expect("a number per offset")) };
            });
            result
        }
    }

    /// # Safety
    /// As [`Place::with`].
    unsafe fn gather<F: Float>(&self, range: Range<usize>, into: &mut [F]) {
        let mut numbers = into.iter_mut();
        self.layout.visit(range, |offset| {
            let at = with_exposed_provenance_mut::<F>(self.data.wrapping_add_signed(offset));
            // SAFETY: as the caller vouches; the layout's offsets lie in the array, aligned or not.
            *numbers.next().expect("a number per offset") = unsafe { at.read_unaligned() };
        });
    }
}

/// What a call does to every leaf.
#[derive(Clone, Copy)]
pub enum Work<'a> {
    /// A step with these gradients; `false` where a leaf has none.
    Step(&'a [bool]),
    /// A sync now.
    Sync,
    /// Fast and slow weights change places.
    Swap,
}

/// One call's work, and what it needs to know.
pub struct Job<'a> {
    pub work: Work<'a>,
    pub hyper: &'a [f64],
    pub cycle: Option<&'a Cycle>,
}

/// The leaves of one number format: their kernel and their state.
pub struct Typed<F> {
    pub kernel: Kernel<F>,
    /// For each leaf of this format, in order: the rule's state arrays, then slow weights.
    pub arena: Py<PyArray1<F>>,
    /// Where that is, as long as the weak reference keeps it from being resized.
    pub span: Range<usize>,
    _guard: Py<PyWeakrefReference>,
}

impl<F: Compute + Element> Typed<F> {
    pub fn new(
        py: Python<'_>,
        rule: &str,
        leaves: &[Leaf],
        dtype: Dtype,
        keeps_slow: bool,
    ) -> PyResult<Self> {
        let kernel = F::kernels().into_iter().find(|kernel| kernel.name == rule);
        let kernel =
            kernel.ok_or_else(|| PyValueError::new_err(format!("no kernel is called {rule}")))?;
        let arrays = kernel.state.len() + usize::from(keeps_slow);
        let size: usize = leaves
            .iter()
            .filter(|leaf| leaf.dtype == dtype)
            .map(|leaf| leaf.len() * arrays)
            .sum();
        // By NumPy's own function: it says where memory is short, and takes large pages where there are some.
        let zeros = py
            .import("numpy")?
            .call_method1("zeros", (size, dtype.to_string()))?;
        zeros.call_method1("setflags", (false,))?;
        let arena = zeros.cast_into::<PyArray1<F>>()?;
        let data = arena.data().expose_provenance();
        Ok(Self {
            kernel,
            span: data..data + arena.len() * size_of::<F>(),
            _guard: PyWeakrefReference::new(&arena)?.unbind(),
            arena: arena.unbind(),
        })
    }

    /// Whether the arena is where it was made.
    pub fn is_whole(&self, py: Python<'_>) -> bool {
        let arena = self.arena.bind(py);
        self.span.start == arena.data().addr() && self.span.len() == arena.len() * size_of::<F>()
    }

    /// Does `work` to every leaf of this format.
    ///
    /// # Safety
    /// The caller must have the engine to itself; the places of each leaf, and of its gradient where the work has one,
    /// must hold live numbers of the leaf's dtype, and a gradient must share none with a leaf or with the state.
    pub unsafe fn run(&self, dtype: Dtype, leaves: &mut [Leaf], job: &Job) {
        let level = Level::best();
        let states = self.kernel.state.len();
        let arrays = states + usize::from(job.cycle.is_some_and(Cycle::keeps_slow));
        let (phase, after) = job.cycle.map_or((Phase::Plain, None), Cycle::plan);
        let now = Blend::new(job.cycle.map_or(1.0, |cycle| cycle.slow_step));
        let mut scalars = (0, Vec::new());
        let first = with_exposed_provenance_mut::<F>(self.span.start);
        // SAFETY: our own array, which nobody else writes, and which the caller has to itself.
        let mut arena =
            unsafe { std::slice::from_raw_parts_mut(first, self.span.len() / size_of::<F>()) };
        for (index, leaf) in leaves
            .iter_mut()
            .enumerate()
            .filter(|(_, leaf)| leaf.dtype == dtype)
        {
            let n = leaf.len();
            let mut kept = Kept::new(
                arena
                    .split_off_mut(..n * arrays)
                    .expect("sized for all leaves"),
                n,
                states,
            );
            let moved = matches!(job.work, Work::Step(has_grad) if has_grad[index]);
            if moved {
                leaf.steps += 1;
                if scalars.0 != leaf.steps {
                    #[allow(
                        clippy::cast_precision_loss,
                        reason = "past 2^53 steps a power of a beta is long zero"
                    )]
                    let t = leaf.steps as f64;
                    scalars = (
                        leaf.steps,
                        (self.kernel.scalars)(job.hyper, t, &mut [0.0; 3], [0.0; 2]),
                    );
                }
            }
            let whole = leaf.p.is_slice::<F>() && (!moved || leaf.g.is_slice::<F>());
            let piece = if whole { CHUNK } else { BLOCK };
            for start in (0..n).step_by(piece) {
                let range = start..n.min(start + piece);
                let mut kept = kept.take(range.len());
                let advance = |p: &mut [F]| match job.work {
                    Work::Swap => p.swap_with_slice(kept.slow),
                    Work::Sync => now
                        .into_iter()
                        .for_each(|blend| sync(level, blend, p, kept.slow)),
                    Work::Step(_) => {
                        if moved {
                            let step = |g: &[F]| {
                                (self.kernel.step)(level, phase, &scalars.1, p, g, &mut kept);
                            };
                            // SAFETY: as the caller vouches for gradients.
                            unsafe { leaf.g.with(range.clone(), step) };
                        } else {
                            hold(level, phase, p, kept.slow);
                        }
                        if let Some(blend) = after {
                            sync(level, blend, p, kept.slow);
                        }
                    }
                };
                // SAFETY: as the caller vouches for leaves.
                unsafe { leaf.p.with_mut(range.clone(), advance) };
            }
        }
    }
}
