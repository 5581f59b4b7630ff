//! The boundary: the only place that names Python and NumPy, and the only one that turns addresses into numbers. What
//! is public is `engine`; a call checks everything in `inner`, then `work` goes over the leaves, whose numbers `memory`
//! lends it by `group`'s plan of rows. `array` reads arrays and makes views; `inner/state` is a run as arrays.
//!
//! Why the memory is there. A leaf's array is held by a strong and a weak reference: the first keeps it alive, the
//! second makes NumPy refuse to resize it; our own arrays likewise. Address, shape, strides, dtype and flags are read
//! again at every step, and a step over an array of which any has changed is refused. Gradients are read again too, and
//! held until the step ends, by a weak reference as well where other Python threads may run meanwhile. Only arrays of
//! NumPy's own types are taken, so no code of the user's runs between these checks and the step; where we ask NumPy
//! whether two arrays share memory, it may, and all is checked once more after it.
//!
//! Why nobody else has it. Leaves are checked, once, to share no byte with each other or with themselves, and each new
//! gradient to share none with a leaf or with the state; views of the state are handed out read-only, and those that
//! are not are as parameters are: numbers that may be written between calls. One call at a time has the engine, by its mutex; threads that share its work have parts without an element in common. What is left
//! is another thread that, while numbers move, writes an array (then it is up to that thread what the numbers are), or
//! takes an array's memory away by `__setstate__`: like NumPy's own functions, we cannot stop it.
//!
//! All checks come before the first write, and counters are moved within the same call as the numbers, so that an
//! error, an interrupt or a second thread finds a step done whole or not at all.

mod array;
mod engine;
mod group;
mod inner;
mod memory;
mod shader;
mod work;

use std::collections::HashMap;

use pyo3::exceptions::{PyFloatingPointError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::Error;
use crate::rules::Compute;

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
            | Error::Overflow(..)
            | Error::State(..)
            | Error::SharesMemory(..) => PyValueError::new_err(text),
            Error::NotFinite(_) => PyFloatingPointError::new_err(text),
            Error::Changed(..)
            | Error::Unsteady
            | Error::Busy
            | Error::InsideSlowWeights
            | Error::OutsideSlowWeights
            | Error::Internal => PyRuntimeError::new_err(text),
        }
    }
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
    module.add_class::<engine::Engine>()?;
    module.add_class::<engine::SlowWeights>()?;
    module.add_function(wrap_pyfunction!(described, module)?)?;
    module.add_function(wrap_pyfunction!(shader::decide, module)?)?;
    module.add_function(wrap_pyfunction!(shader::layout, module)?)?;
    module.add_function(wrap_pyfunction!(shader::shader, module)?)?;
    module.add_function(wrap_pyfunction!(shader::foresee, module)?)
}
