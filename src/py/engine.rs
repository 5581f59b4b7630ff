//! The classes that Python sees.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, TryLockError};

use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::{PyDict, PyList, PyTuple};

use super::inner::Inner;
use crate::error::Error;

/// The compiled half of `Optimizer`: leaves, their state, and the counters that move with them.
#[pyclass(frozen, module = "lookstep._core")]
pub struct Engine(Mutex<Inner>);

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
        let inner = Inner::new(py, names, &params, rule, &hyper, cycle)?;
        Ok(Self(Mutex::new(inner)))
    }

    /// Moves every leaf by its gradient, and syncs where that ends a cycle.
    fn step(&self, py: Python<'_>, grads: &Bound<'_, PyAny>) -> PyResult<()> {
        let grads: Vec<_> = match grads.cast::<PyList>() {
            Ok(list) => list.iter().collect(),
            Err(_) => grads.cast::<PyTuple>()?.iter().collect(),
        };
        self.take_fast()?.step(py, &grads)
    }

    /// Ends the cycle now, where one has begun.
    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        self.take_fast()?.sync(py)
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
        self.take()?.set_hyper(&hyper)
    }

    /// Steps applied so far.
    #[getter]
    fn steps(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.wait(py)?.steps)
    }

    /// Syncs so far.
    #[getter]
    fn syncs(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.wait(py)?.syncs())
    }

    /// A read-only view of each leaf's slow weights as they are now.
    fn slow<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        self.wait(py)?.slow(py)
    }

    /// Read-only views of each leaf's state arrays, by name.
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        self.wait(py)?.state(py)
    }
}

/// A context in which params hold the slow weights, and the slow weights' arrays the fast ones. It is compiled so that no
/// interrupt can come between the exchange and the entry that its end is bound to.
#[pyclass(frozen, module = "lookstep._core")]
pub struct SlowWeights {
    engine: Py<Engine>,
    params: Py<PyAny>,
}

#[pymethods]
impl SlowWeights {
    fn __enter__(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.engine.get().take_fast()?.enter_slow_weights(py)?;
        Ok(self.params.clone_ref(py))
    }

    /// Puts the fast weights back, even into an array that was made read-only meanwhile.
    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) -> PyResult<()> {
        self.engine.get().take()?.leave_slow_weights(py)
    }
}
