//! The classes that Python sees.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, TryLockError};

use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::{PyDict, PyList, PyTuple};

use super::array::{Access, View};
use super::group::{CycleSpec, GroupSpec, Hyper, OptionSpec};
use super::inner::{Counters, Inner, Kind};
use crate::error::Error;
use crate::simd::DefaultMode;
use crate::threads::generation;

/// The compiled half of `Optimizer`: leaves, their state, and the counters that move with them.
#[pyclass(frozen, module = "lookstep._core")]
pub struct Engine {
    /// Held while numbers move. Where it is held while Python may run, the holder is checking or moving fast weights.
    inner: Mutex<Inner>,
    /// Counters are read without it, so that whoever reads them never waits.
    steps: AtomicU64,
    syncs: AtomicU64,
    skipped: AtomicU64,
    /// The thread that has it, while one has.
    owner: AtomicU64,
    /// The process that made it: its [`generation`].
    process: u32,
    /// The last entry into a context whose end could not put the fast weights back.
    abandoned: AtomicU64,
    /// The bits of a number, or [`NONE`].
    grad_norm: AtomicU64,
    slow_step: AtomicU64,
}

/// A NaN that no arithmetic gives.
const NONE: u64 = u64::MAX;

fn to_bits(x: Option<f64>) -> u64 {
    x.map_or(NONE, f64::to_bits)
}

fn from_bits(bits: &AtomicU64) -> Option<f64> {
    Some(bits.load(Relaxed))
        .filter(|&bits| bits != NONE)
        .map(f64::from_bits)
}

/// The inner engine, for one call.
struct Held<'a> {
    inner: MutexGuard<'a, Inner>,
    owner: &'a AtomicU64,
    /// The caller's mode would be one thread's alone, of those that share the work.
    _mode: DefaultMode,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.owner.store(0, Relaxed);
    }
}

impl std::ops::Deref for Held<'_> {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.inner
    }
}

impl std::ops::DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Inner {
        &mut self.inner
    }
}

/// This thread.
fn whoami() -> u64 {
    thread_local!(static THREAD: u64 = NEXT.fetch_add(1, Relaxed));
    static NEXT: AtomicU64 = AtomicU64::new(1);
    THREAD.with(|&thread| thread)
}

impl Engine {
    /// The inner engine, once no other thread has it. Whoever asks for it while this thread has it (a destructor, say, that
    /// runs while arrays are copied) or in a forked child, of a process in which another may have had it, could wait for ever.
    fn take(&self, py: Python<'_>) -> Result<Held<'_>, Error> {
        let me = whoami();
        let inner = match self.inner.try_lock() {
            Ok(inner) => inner,
            Err(TryLockError::WouldBlock) => {
                if self.owner.load(Relaxed) == me || self.process != generation() {
                    return Err(Error::Busy);
                }
                let waited = self.inner.lock_py_attached(py);
                waited.map_err(|_| Error::Internal)?
            }
            Err(TryLockError::Poisoned(_)) => return Err(Error::Internal),
        };
        self.owner.store(me, Relaxed);
        if inner.broken {
            return Err(Error::Internal);
        }
        Ok(Held {
            inner,
            owner: &self.owner,
            _mode: DefaultMode::enter(),
        })
    }

    /// The same, where params hold the fast weights; a context that could not put them back when it ended gets another
    /// chance.
    fn take_fast(&self, py: Python<'_>) -> PyResult<Held<'_>> {
        let mut inner = self.take(py)?;
        if inner.inside_slow_weights() {
            if self.abandoned.load(Relaxed) != inner.entries {
                return Err(Error::InsideSlowWeights.into());
            }
            inner.leave_slow_weights(py)?;
        }
        Ok(inner)
    }

    /// Lets the counters be seen.
    fn publish(&self, inner: &Inner) {
        self.steps.store(inner.steps, Relaxed);
        self.syncs.store(inner.syncs(), Relaxed);
        self.skipped.store(inner.skipped, Relaxed);
        self.grad_norm.store(to_bits(inner.grad_norm), Relaxed);
        self.slow_step.store(to_bits(inner.slow_step), Relaxed);
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
        of_group: Vec<usize>,
        groups: Vec<GroupSpec>,
        cycles: Vec<CycleSpec>,
        options: OptionSpec,
    ) -> PyResult<Self> {
        let inner = Inner::new(py, &names, &params, &of_group, groups, &cycles, options)?;
        Ok(Self {
            inner: Mutex::new(inner),
            steps: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            owner: AtomicU64::new(0),
            process: generation(),
            abandoned: AtomicU64::new(0),
            grad_norm: AtomicU64::new(NONE),
            slow_step: AtomicU64::new(NONE),
        })
    }

    /// Moves every leaf by its gradient, and syncs where that ends a cycle; with new hyper-parameters and slow steps, one a
    /// group, where there are any.
    #[pyo3(signature = (grads, scale = 1.0, hyper = None))]
    fn step(
        &self,
        py: Python<'_>,
        grads: &Bound<'_, PyAny>,
        scale: f64,
        hyper: Option<Hyper>,
    ) -> PyResult<()> {
        let grads: Vec<_> = match grads.cast::<PyList>() {
            Ok(list) => list.iter().collect(),
            Err(_) => grads.cast::<PyTuple>()?.iter().collect(),
        };
        let mut inner = self.take_fast(py)?;
        inner.set_hyper(hyper)?;
        inner.step(py, &grads, scale)?;
        self.publish(&inner);
        Ok(())
    }

    /// Ends the cycle now, where one has begun; `hyper` as for a step.
    #[pyo3(signature = (hyper = None))]
    fn sync(&self, py: Python<'_>, hyper: Option<Hyper>) -> PyResult<()> {
        let mut inner = self.take_fast(py)?;
        inner.set_hyper(hyper)?;
        inner.sync(py)?;
        self.publish(&inner);
        Ok(())
    }

    /// A context in which params hold the slow weights; entering it gives `params`.
    fn slow_weights(self_: Py<Self>, params: Py<PyAny>) -> SlowWeights {
        SlowWeights {
            engine: self_,
            params,
            entry: AtomicU64::new(0),
        }
    }

    /// Takes other groups from the next step on, with the same arrays for each leaf.
    fn set_groups(
        &self,
        py: Python<'_>,
        of_group: Vec<usize>,
        groups: Vec<GroupSpec>,
    ) -> PyResult<()> {
        self.take(py)?.set_groups(&of_group, groups)
    }

    /// Steps applied so far.
    #[getter]
    fn steps(&self) -> u64 {
        self.steps.load(Relaxed)
    }

    /// Syncs so far.
    #[getter]
    fn syncs(&self) -> u64 {
        self.syncs.load(Relaxed)
    }

    /// Steps that were dropped because a gradient was not finite.
    #[getter]
    fn skipped(&self) -> u64 {
        self.skipped.load(Relaxed)
    }

    /// The norm of the last step's gradients, where it was taken.
    #[getter]
    fn grad_norm(&self) -> Option<f64> {
        from_bits(&self.grad_norm)
    }

    /// The slow step of the last sync.
    #[getter]
    fn slow_step(&self) -> Option<f64> {
        from_bits(&self.slow_step)
    }

    /// A read-only view of each leaf's slow weights as they are now.
    fn slow<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let views = self.take(py)?.slow(py)?;
        views
            .into_iter()
            .map(|view| view.make(py, Access::Read))
            .collect()
    }

    /// Read-only views of each leaf's state arrays, by name.
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let leaves = self.take(py)?.state(py)?;
        let named = |leaf: Vec<(&str, View)>| {
            let state = PyDict::new(py);
            for (name, view) in leaf {
                state.set_item(name, view.make(py, Access::Read)?)?;
            }
            Ok(state)
        };
        leaves.into_iter().map(named).collect()
    }

    /// Views of what is kept for each leaf, in the order of `kinds`, to read and to write between calls.
    fn rows<'py>(&self, py: Python<'py>) -> PyResult<Vec<Vec<Bound<'py, PyAny>>>> {
        let (arena, leaves) = self.take_fast(py)?.rows(py);
        let made = |view: View| view.make(py, Access::Write);
        let views = |leaf: Vec<View>| leaf.into_iter().map(made).collect();
        // A view may be written to where its base may when it is made.
        arena.call_method1(py, "setflags", (true,))?;
        let made = leaves.into_iter().map(views).collect();
        arena.call_method1(py, "setflags", (false,))?;
        made
    }

    /// How far the run has come, and each leaf.
    fn counters(&self, py: Python<'_>) -> PyResult<Counters> {
        Ok(self.take(py)?.counters())
    }

    /// What is kept for each leaf: names, dtypes and shapes.
    fn kinds(&self, py: Python<'_>) -> PyResult<Vec<Vec<Kind>>> {
        Ok(self.take(py)?.kinds())
    }

    /// Copies of each leaf's parameter and of what is kept for it, and the counters.
    fn dump<'py>(&self, py: Python<'py>) -> PyResult<(Vec<Vec<Bound<'py, PyAny>>>, Counters)> {
        let inner = self.take_fast(py)?;
        Ok((inner.dump(py)?, inner.counters()))
    }

    /// Takes what `dump` gives.
    fn restore(
        &self,
        py: Python<'_>,
        arrays: Vec<Vec<Bound<'_, PyAny>>>,
        counters: Counters,
        of_group: Vec<usize>,
        groups: Vec<GroupSpec>,
    ) -> PyResult<()> {
        let mut inner = self.take_fast(py)?;
        inner.restore(py, &arrays, counters, &of_group, groups)?;
        self.publish(&inner);
        Ok(())
    }
}

/// A context in which params hold the slow weights, and the slow weights' arrays the fast ones. It is compiled so that no
/// interrupt can come between the exchange and the entry that its end is bound to.
#[pyclass(frozen, module = "lookstep._core")]
pub struct SlowWeights {
    engine: Py<Engine>,
    params: Py<PyAny>,
    /// Which entry into such a context this was; 0 before.
    entry: AtomicU64,
}

#[pymethods]
impl SlowWeights {
    fn __enter__(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let mut inner = self.engine.get().take_fast(py)?;
        inner.enter_slow_weights(py)?;
        self.entry.store(inner.entries, Relaxed);
        Ok(self.params.clone_ref(py))
    }

    /// Puts the fast weights back, even into an array that was made read-only meanwhile.
    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) -> PyResult<()> {
        let engine = self.engine.get();
        let entry = self.entry.load(Relaxed);
        let mut inner = engine.take(py)?;
        if entry != inner.entries || !inner.inside_slow_weights() {
            return Err(Error::OutsideSlowWeights.into());
        }
        engine.abandoned.store(entry, Relaxed);
        inner.leave_slow_weights(py)
    }
}

impl Drop for SlowWeights {
    /// A context that was entered by hand, and forgotten.
    fn drop(&mut self) {
        let entry = *self.entry.get_mut();
        if entry > 0 {
            self.engine.get().abandoned.store(entry, Relaxed);
        }
    }
}
