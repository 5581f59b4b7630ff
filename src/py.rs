//! The boundary: the only file that names Python and NumPy, and the only one that turns addresses into numbers.
//!
//! Why the memory is there. A leaf's array is held by a strong and a weak reference: the first keeps it alive, the second
//! makes NumPy refuse to resize it. Its address, shape, strides, dtype and flags are read again at every step, and a step
//! over an array of which any has changed is refused. Gradients are read again too, and held until the step ends. The
//! state lies in NumPy arrays that only we write.
//!
//! Why nobody else has it. Leaves are checked, once, to share no byte with each other or with themselves, and each new
//! gradient to share none with a leaf or with the state; views of the state are handed out read-only. One call at a time
//! has the engine, by its mutex. That leaves a user who writes an array from another thread during a step: as with
//! NumPy's own functions, what the numbers are then is up to them, but none is read or written outside its array.
//!
//! All checks come before the first write, and counters are moved within the same call as the numbers, so that an error,
//! an interrupt or a second thread finds a step done whole or not at all.

use std::collections::HashMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::with_exposed_provenance_mut;
use std::sync::{Mutex, MutexGuard, TryLockError};

use numpy::npyffi::NPY_ARRAY_WRITEABLE;
use numpy::prelude::*;
use numpy::{Element, PyArray1, PyUntypedArray};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::{MutexExt, PyOnceLock};
use pyo3::types::{IntoPyDict, PyDict, PySlice, PyTuple, PyType, PyWeakrefReference};

use crate::error::Error;
use crate::kernel::{CHUNK, Kept, Kernel, hold, sync};
use crate::leaf::{Dtype, Header, Leaf, Place, Spans};
use crate::lookahead::{Blend, Cycle, Phase};
use crate::rule::Float;
use crate::rules::Compute;
use crate::simd::Level;

/// Elements of a strided array that are gathered, moved and scattered at a time; they stay in the first-level cache.
const BLOCK: usize = 512;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::NotAnArray(..)
            | Error::Subclass(..)
            | Error::Dtype(..)
            | Error::ByteSwapped(..)
            | Error::GradDtype(..) => PyTypeError::new_err(text),
            Error::Shape(..)
            | Error::Count(..)
            | Error::ReadOnly(..)
            | Error::OverlapsItself(..)
            | Error::SharesMemory(..) => PyValueError::new_err(text),
            Error::Changed(..)
            | Error::Busy
            | Error::InsideSlowWeights
            | Error::OutsideSlowWeights
            | Error::Internal => PyRuntimeError::new_err(text),
        }
    }
}

/// An array whose elements we may step, or why not.
fn as_array<'a, 'py>(
    x: &'a Bound<'py, PyAny>,
    name: impl Fn() -> String,
) -> PyResult<&'a Bound<'py, PyUntypedArray>> {
    static MEMMAP: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    if let Ok(array) = x.cast_exact::<PyUntypedArray>() {
        return Ok(array);
    }
    let kind = x.get_type().name()?.to_string();
    match x.cast::<PyUntypedArray>() {
        Ok(array) if x.is_instance(MEMMAP.import(x.py(), "numpy", "memmap")?)? => Ok(array),
        Ok(_) => Err(Error::Subclass(name(), kind).into()),
        Err(_) => Err(Error::NotAnArray(name(), kind).into()),
    }
}

/// What the array says of itself now.
fn header<'a>(
    array: &'a Bound<'_, PyUntypedArray>,
    name: impl Fn() -> String,
) -> Result<Header<'a>, Error> {
    let descr = array.dtype();
    let dtype = match descr.char() {
        b'f' => Dtype::F32,
        b'd' => Dtype::F64,
        _ => return Err(Error::Dtype(name(), descr.to_string())),
    };
    if descr.is_native_byteorder() != Some(true) {
        return Err(Error::ByteSwapped(name(), descr.to_string()));
    }
    // SAFETY: `array` is a live NumPy array and we are attached, so its fields are there to be read.
    let (data, flags) = unsafe {
        let fields = &(*array.as_array_ptr()).fields;
        (fields.data.expose_provenance(), fields.flags)
    };
    let writeable = flags & NPY_ARRAY_WRITEABLE != 0;
    Ok(Header {
        data,
        dtype,
        writeable,
        shape: array.shape(),
        strides: array.strides(),
    })
}

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
enum Work<'a> {
    /// A step with these gradients; `false` where a leaf has none.
    Step(&'a [bool]),
    /// A sync now.
    Sync,
    /// Fast and slow weights change places.
    Swap,
}

/// The leaves of one number format: their kernel and their state.
struct Typed<F> {
    kernel: Kernel<F>,
    /// For each leaf of this format, in order: the rule's state arrays, then slow weights.
    arena: Py<PyArray1<F>>,
}

impl<F: Compute + Element> Typed<F> {
    fn new(
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
        let size = leaves
            .iter()
            .filter(|leaf| leaf.dtype == dtype)
            .map(|leaf| leaf.len() * arrays)
            .sum();
        Ok(Self {
            kernel,
            arena: PyArray1::zeros(py, [size], false).unbind(),
        })
    }

    fn span(&self, py: Python<'_>) -> Range<usize> {
        let arena = self.arena.bind(py);
        let data = arena.data().expose_provenance();
        data..data + arena.len() * size_of::<F>()
    }

    /// Does `work` to every leaf of this format.
    ///
    /// # Safety
    /// The caller must have the engine to itself; the places of each leaf, and of its gradient where the work has one,
    /// must hold live numbers of the leaf's dtype, and a gradient must share none with a leaf or with the state.
    unsafe fn run(&self, arena: Range<usize>, dtype: Dtype, leaves: &mut [Leaf], job: &Job) {
        let level = Level::best();
        let states = self.kernel.state.len();
        let arrays = states + usize::from(job.cycle.is_some_and(Cycle::keeps_slow));
        let (phase, after) = job.cycle.map_or((Phase::Plain, None), Cycle::plan);
        let blend = Blend::new(job.cycle.map_or(1.0, |cycle| cycle.slow_step));
        let mut scalars = (0, Vec::new());
        let first = with_exposed_provenance_mut::<F>(arena.start);
        // SAFETY: our own array, which nobody else writes, and which the caller has to itself.
        let mut arena =
            unsafe { std::slice::from_raw_parts_mut(first, arena.len() / size_of::<F>()) };
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
                    scalars = (leaf.steps, (self.kernel.scalars)(job.hyper, t));
                }
            }
            let whole = leaf.p.is_slice::<F>() && (!moved || leaf.g.is_slice::<F>());
            let piece = if whole { CHUNK } else { BLOCK };
            for start in (0..n).step_by(piece) {
                let range = start..n.min(start + piece);
                let mut kept = kept.take(range.len());
                let advance = |p: &mut [F]| match job.work {
                    Work::Swap => p.swap_with_slice(kept.slow),
                    Work::Sync => sync(level, blend, p, kept.slow),
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

/// One call's work, and what it needs to know.
struct Job<'a> {
    work: Work<'a>,
    hyper: &'a [f64],
    cycle: Option<&'a Cycle>,
}

struct Inner {
    arrays: Vec<(Py<PyUntypedArray>, Py<PyWeakrefReference>)>,
    leaves: Vec<Leaf>,
    single: Typed<f32>,
    double: Typed<f64>,
    spans: Spans,
    hyper: Vec<f64>,
    cycle: Option<Cycle>,
    steps: u64,
    inside_slow_weights: bool,
    broken: bool,
}

impl Inner {
    /// Checks each parameter against what it was; where it was locked since, that may be `forgiven`.
    fn check_params(&self, py: Python<'_>, forgiven: bool) -> Result<(), Error> {
        for (leaf, (array, _)) in self.leaves.iter().zip(&self.arrays) {
            let now =
                header(array.bind(py), || leaf.name.clone()).map_err(|error| match error {
                    Error::Dtype(name, now) | Error::ByteSwapped(name, now) => {
                        Error::Changed(name, leaf.dtype.to_string(), now)
                    }
                    other => other,
                })?;
            leaf.check_param(&Header {
                writeable: now.writeable || forgiven,
                ..now
            })?;
        }
        Ok(())
    }

    /// Checks each gradient and takes note of where it is; returns which leaves have one.
    fn check_grads(&mut self, grads: &[Bound<'_, PyAny>]) -> PyResult<Vec<bool>> {
        if grads.len() != self.leaves.len() {
            return Err(Error::Count(grads.len(), self.leaves.len()).into());
        }
        let mut has_grad = vec![false; grads.len()];
        for (index, grad) in grads.iter().enumerate().filter(|(_, grad)| !grad.is_none()) {
            let leaf = &mut self.leaves[index];
            let array = as_array(grad, || leaf.grad_name())?;
            let header = header(array, || leaf.grad_name())?;
            for other in leaf.see_grad(&header, &self.spans)? {
                let (shares, whose) = match other {
                    Some(other) => {
                        let shares = share_memory(array, self.arrays[other].0.bind(array.py()))?;
                        (shares, self.leaves[other].name.clone())
                    }
                    None => (true, "the optimizer's own state".into()),
                };
                if shares {
                    let leaf = &mut self.leaves[index];
                    leaf.forget_grad();
                    return Err(Error::SharesMemory(leaf.grad_name(), whose).into());
                }
            }
            has_grad[index] = true;
        }
        Ok(has_grad)
    }

    /// Does `work` to every leaf, detached from Python.
    ///
    /// # Safety
    /// Parameters, and the gradients that the work has, must have passed the checks since Python last ran, and must be
    /// alive until this returns.
    unsafe fn run(&mut self, py: Python<'_>, work: Work) -> PyResult<()> {
        let (single, double, leaves) = (&self.single, &self.double, &mut self.leaves);
        let job = Job {
            work,
            hyper: &self.hyper,
            cycle: self.cycle.as_ref(),
        };
        let arenas = (single.span(py), double.span(py));
        let outcome = py.detach(|| {
            catch_unwind(AssertUnwindSafe(|| {
                // SAFETY: we are borrowed mutably; the caller vouches for the rest.
                unsafe {
                    single.run(arenas.0, Dtype::F32, leaves, &job);
                    double.run(arenas.1, Dtype::F64, leaves, &job);
                }
            }))
        });
        self.broken |= outcome.is_err();
        outcome.map_err(|_| Error::Internal.into())
    }

    /// Whether params and slow weights differ, so that the latter have arrays of their own in use.
    fn in_cycle(&self) -> bool {
        self.cycle.as_ref().is_some_and(|cycle| cycle.done > 0)
    }
}

/// Whether two arrays whose address ranges meet have a byte in common; yes, where that is too hard to tell.
fn share_memory(a: &Bound<'_, PyUntypedArray>, b: &Bound<'_, PyUntypedArray>) -> PyResult<bool> {
    static SHARES_MEMORY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    const MAX_WORK: usize = 1_000_000;
    let answer = SHARES_MEMORY
        .import(a.py(), "numpy", "shares_memory")?
        .call1((a, b, MAX_WORK));
    answer.map_or(Ok(true), |shares| shares.extract())
}

/// The compiled half of `Optimizer`: leaves, their state, and the counters that move with them.
#[pyclass(frozen, module = "lookstep._core")]
struct Engine(Mutex<Inner>);

impl Engine {
    /// The inner engine, where no other thread has it and no earlier call has broken it.
    fn take(&self) -> Result<MutexGuard<'_, Inner>, Error> {
        match self.0.try_lock() {
            Ok(inner) if inner.broken => Err(Error::Internal),
            Ok(inner) => Ok(inner),
            Err(TryLockError::WouldBlock) => Err(Error::Busy),
            Err(TryLockError::Poisoned(_)) => Err(Error::Internal),
        }
    }

    /// The same, where params hold the fast weights.
    fn take_fast(&self) -> Result<MutexGuard<'_, Inner>, Error> {
        let inner = self.take()?;
        if inner.inside_slow_weights {
            Err(Error::InsideSlowWeights)
        } else {
            Ok(inner)
        }
    }

    /// The inner engine, once no other thread has it.
    fn wait(&self, py: Python<'_>) -> Result<MutexGuard<'_, Inner>, Error> {
        self.0.lock_py_attached(py).map_err(|_| Error::Internal)
    }
}

#[pymethods]
#[allow(clippy::needless_pass_by_value, reason = "what Python passes is owned")]
impl Engine {
    #[new]
    fn new(
        py: Python<'_>,
        names: Vec<String>,
        params: Vec<Bound<'_, PyAny>>,
        rule: &str,
        hyper: HashMap<String, f64>,
        cycle: Option<(u64, f64)>,
    ) -> PyResult<Self> {
        let mut leaves = Vec::with_capacity(params.len());
        let mut arrays = Vec::with_capacity(params.len());
        for (name, param) in names.into_iter().zip(&params) {
            let array = as_array(param, || name.clone())?;
            let header = header(array, || name.clone())?;
            leaves.push(Leaf::new(name, &header)?);
            arrays.push((
                array.clone().unbind(),
                PyWeakrefReference::new(array)?.unbind(),
            ));
        }
        let of_leaves: Vec<_> = leaves
            .iter()
            .map(|leaf: &Leaf| leaf.p.span())
            .zip((0..).map(Some))
            .collect();
        let spans = Spans::new(of_leaves.iter().cloned());
        for (range, index) in &of_leaves {
            for other in spans.touching(range).into_iter().flatten() {
                let index = index.expect("each range is a leaf's");
                if other < index
                    && share_memory(arrays[other].0.bind(py), arrays[index].0.bind(py))?
                {
                    return Err(Error::SharesMemory(
                        leaves[index].name.clone(),
                        leaves[other].name.clone(),
                    )
                    .into());
                }
            }
        }
        let cycle = cycle.map(|(period, slow_step)| Cycle::new(period, slow_step));
        let keeps_slow = cycle.as_ref().is_some_and(Cycle::keeps_slow);
        let single = Typed::new(py, rule, &leaves, Dtype::F32, keeps_slow)?;
        let double = Typed::new(py, rule, &leaves, Dtype::F64, keeps_slow)?;
        let ours = [single.span(py), double.span(py)].map(|range| (range, None));
        let inner = Inner {
            hyper: ordered(single.kernel.hyper, &hyper)?,
            spans: Spans::new(of_leaves.into_iter().chain(ours)),
            arrays,
            leaves,
            single,
            double,
            cycle,
            steps: 0,
            inside_slow_weights: false,
            broken: false,
        };
        Ok(Self(Mutex::new(inner)))
    }

    /// Moves every leaf by its gradient, and syncs where that ends a cycle.
    fn step(&self, py: Python<'_>, grads: Vec<Bound<'_, PyAny>>) -> PyResult<()> {
        let mut inner = self.take_fast()?;
        inner.check_params(py, false)?;
        let has_grad = inner.check_grads(&grads)?;
        // SAFETY: all have just been checked; we hold the leaves, and `grads` holds the gradients.
        unsafe { inner.run(py, Work::Step(&has_grad))? };
        inner.steps += 1;
        if let Some(cycle) = &mut inner.cycle {
            cycle.advance();
        }
        Ok(())
    }

    /// Ends the cycle now, where one has begun.
    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        let mut inner = self.take_fast()?;
        inner.check_params(py, false)?;
        if inner.in_cycle() {
            // SAFETY: the leaves have just been checked, and we hold them.
            unsafe { inner.run(py, Work::Sync)? };
            if let Some(cycle) = &mut inner.cycle {
                cycle.close();
            }
        }
        Ok(())
    }

    /// A context in which params hold the slow weights; entering it gives `params`.
    fn slow_weights(self_: Py<Self>, params: Py<PyAny>) -> SlowWeights {
        SlowWeights {
            engine: self_,
            params,
        }
    }

    /// Takes new hyper-parameters from the next step on.
    fn set_hyper(&self, hyper: HashMap<String, f64>) -> PyResult<()> {
        let mut inner = self.take()?;
        inner.hyper = ordered(inner.single.kernel.hyper, &hyper)?;
        Ok(())
    }

    /// Steps applied so far.
    #[getter]
    fn steps(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.wait(py)?.steps)
    }

    /// Syncs so far.
    #[getter]
    fn syncs(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.wait(py)?.cycle.as_ref().map_or(0, |cycle| cycle.syncs))
    }

    /// A read-only view of each leaf's slow weights as they are now.
    fn slow<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let inner = self.wait(py)?;
        if inner.in_cycle() && !inner.inside_slow_weights {
            let row = inner.single.kernel.state.len();
            let views = inner.views(py)?;
            return Ok(views
                .into_iter()
                .map(|mut leaf| leaf.swap_remove(row))
                .collect());
        }
        inner
            .arrays
            .iter()
            .map(|(array, _)| read_only(array.bind(py).call_method0("view")?))
            .collect()
    }

    /// Read-only views of each leaf's state arrays, by name.
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let inner = self.wait(py)?;
        let named = |leaf: Vec<Bound<'py, PyAny>>| {
            inner.single.kernel.state.iter().zip(leaf).into_py_dict(py)
        };
        inner.views(py)?.into_iter().map(named).collect()
    }
}

/// A context in which params hold the slow weights, and the slow weights' arrays the fast ones. It is compiled so that no
/// interrupt can come between the exchange and the entry that its end is bound to.
#[pyclass(frozen, module = "lookstep._core")]
struct SlowWeights {
    engine: Py<Engine>,
    params: Py<PyAny>,
}

#[pymethods]
impl SlowWeights {
    fn __enter__(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let mut inner = self.engine.get().take_fast()?;
        inner.check_params(py, false)?;
        if inner.in_cycle() {
            // SAFETY: as in `sync`.
            unsafe { inner.run(py, Work::Swap)? };
        }
        inner.inside_slow_weights = true;
        Ok(self.params.clone_ref(py))
    }

    /// Puts the fast weights back, even into an array that was made read-only meanwhile.
    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) -> PyResult<()> {
        let mut inner = self.engine.get().take()?;
        if !inner.inside_slow_weights {
            return Err(Error::OutsideSlowWeights.into());
        }
        inner.check_params(py, true)?;
        if inner.in_cycle() {
            // SAFETY: as in `sync`; memory that was ours to write at the entry is ours still.
            unsafe { inner.run(py, Work::Swap)? };
        }
        inner.inside_slow_weights = false;
        Ok(())
    }
}

impl Inner {
    /// Read-only views of our arrays for each leaf, in the leaf's shape: the rule's state, then slow weights.
    fn views<'py>(&self, py: Python<'py>) -> PyResult<Vec<Vec<Bound<'py, PyAny>>>> {
        let keeps_slow = self.cycle.as_ref().is_some_and(Cycle::keeps_slow);
        let arrays = self.single.kernel.state.len() + usize::from(keeps_slow);
        let (mut single, mut double) = (0, 0);
        let mut of_leaf = |leaf: &Leaf| {
            let (arena, start) = match leaf.dtype {
                Dtype::F32 => (self.single.arena.bind(py).as_any(), &mut single),
                Dtype::F64 => (self.double.arena.bind(py).as_any(), &mut double),
            };
            let walked: Vec<usize> = leaf.order.iter().map(|&axis| leaf.shape[axis]).collect();
            let mut axes = vec![0; leaf.order.len()];
            for (position, &axis) in leaf.order.iter().enumerate() {
                axes[axis] = position;
            }
            let view = |_| {
                let end = *start + leaf.len();
                let run = PySlice::new(py, start.cast_signed(), end.cast_signed(), 1);
                *start = end;
                let view = arena
                    .get_item(run)?
                    .call_method1("reshape", (PyTuple::new(py, &walked)?,))?;
                read_only(view.call_method1("transpose", (PyTuple::new(py, &axes)?,))?)
            };
            (0..arrays).map(view).collect()
        };
        self.leaves.iter().map(&mut of_leaf).collect()
    }
}

fn read_only(view: Bound<'_, PyAny>) -> PyResult<Bound<'_, PyAny>> {
    view.call_method1("setflags", (false,))?;
    Ok(view)
}

/// Hyper-parameters in the kernel's order.
fn ordered(names: &[&str], hyper: &HashMap<String, f64>) -> PyResult<Vec<f64>> {
    let value = |name: &&str| {
        hyper
            .get(*name)
            .copied()
            .ok_or_else(|| PyValueError::new_err(format!("{name} is missing")))
    };
    names.iter().map(value).collect()
}

/// Each kernel's hyper-parameters and state arrays, by name.
#[pyfunction(name = "kernels")]
fn described() -> HashMap<&'static str, (Vec<&'static str>, Vec<&'static str>)> {
    f32::kernels()
        .into_iter()
        .map(|k| (k.name, (k.hyper.to_vec(), k.state.to_vec())))
        .collect()
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<Engine>()?;
    module.add_class::<SlowWeights>()?;
    module.add_function(wrap_pyfunction!(described, module)?)
}
