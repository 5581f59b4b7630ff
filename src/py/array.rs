//! NumPy arrays as they are, and views of ours for the user.

use std::ops::Range;

use numpy::npyffi::NPY_ARRAY_WRITEABLE;
use numpy::prelude::*;
use numpy::{PyArrayDescr, PyUntypedArray, dtype};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PySlice, PyTuple, PyType};

use crate::element::Dtype;
use crate::error::Error;
use crate::leaf::Header;

/// Addresses of what NumPy has one of as long as the process lives: nearly all arrays are of that type, and of one of these
/// dtypes, and asking in any other way takes longer than a small step.
struct Known {
    array: usize,
    f16: usize,
    f32: usize,
    f64: usize,
}

impl Known {
    fn get(py: Python<'_>) -> &'static Self {
        static KNOWN: PyOnceLock<Known> = PyOnceLock::new();
        KNOWN.get_or_init(py, || Self {
            array: py.get_type::<PyUntypedArray>().as_ptr().addr(),
            f16: dtype::<half::f16>(py).as_ptr().addr(),
            f32: dtype::<f32>(py).as_ptr().addr(),
            f64: dtype::<f64>(py).as_ptr().addr(),
        })
    }
}

/// An array whose elements we may step, or why not.
#[inline]
pub fn as_array<'a, 'py>(
    x: &'a Bound<'py, PyAny>,
    name: impl Fn() -> String,
) -> PyResult<&'a Bound<'py, PyUntypedArray>> {
    if x.get_type_ptr().addr() == Known::get(x.py()).array {
        // SAFETY: that is its type.
        return Ok(unsafe { x.cast_unchecked() });
    }
    as_memmap(x, name)
}

#[cold]
fn as_memmap<'a, 'py>(
    x: &'a Bound<'py, PyAny>,
    name: impl Fn() -> String,
) -> PyResult<&'a Bound<'py, PyUntypedArray>> {
    static MEMMAP: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let kind = x.get_type().name()?.to_string();
    match x.cast::<PyUntypedArray>() {
        // No subclass of theirs: it may answer for itself what shares its memory.
        Ok(array) if x.get_type().is(MEMMAP.import(x.py(), "numpy", "memmap")?) => Ok(array),
        Ok(_) => Err(Error::Subclass(name(), kind).into()),
        Err(_) => Err(Error::NotAnArray(name(), kind).into()),
    }
}

/// What the array says of itself now.
#[inline]
pub fn header<'a>(
    array: &'a Bound<'_, PyUntypedArray>,
    name: impl Fn() -> String,
) -> Result<Header<'a>, Error> {
    // SAFETY: `array` is a live NumPy array and we are attached, so its fields are there to be read.
    let fields = unsafe { &(*array.as_array_ptr()).fields };
    let known = Known::get(array.py());
    let dtype = match fields.descr.addr() {
        descr if descr == known.f32 => Dtype::F32,
        descr if descr == known.f64 => Dtype::F64,
        descr if descr == known.f16 => Dtype::F16,
        _ => other_dtype(&array.dtype(), name)?,
    };
    Ok(Header {
        data: fields.data.expose_provenance(),
        dtype,
        writeable: fields.flags & NPY_ARRAY_WRITEABLE != 0,
        shape: array.shape(),
        strides: array.strides(),
    })
}

#[cold]
fn other_dtype(descr: &Bound<'_, PyArrayDescr>, name: impl Fn() -> String) -> Result<Dtype, Error> {
    let dtype = match descr.char() {
        b'f' => Dtype::F32,
        b'd' => Dtype::F64,
        b'e' => Dtype::F16,
        b'E' if is_bfloat16(descr) => Dtype::BF16,
        _ => return Err(Error::Dtype(name(), descr.to_string())),
    };
    if descr.is_native_byteorder() != Some(true) {
        return Err(Error::ByteSwapped(name(), descr.to_string()));
    }
    Ok(dtype)
}

/// Whether a dtype is `ml_dtypes`' bfloat16, which NumPy itself does not have.
fn is_bfloat16(descr: &Bound<'_, PyArrayDescr>) -> bool {
    static BFLOAT16: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    // An array of that dtype is there, so importing its module runs none.
    let bfloat16 = BFLOAT16.import(descr.py(), "ml_dtypes", "bfloat16");
    bfloat16.is_ok_and(|bfloat16| descr.typeobj().is(bfloat16))
}

/// Whether two arrays whose address ranges meet have a byte in common; yes, where that is too hard to tell. Python may
/// run meanwhile.
pub fn share_memory(
    a: &Bound<'_, PyUntypedArray>,
    b: &Bound<'_, PyUntypedArray>,
) -> PyResult<bool> {
    static SHARES_MEMORY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    static TOO_HARD: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    const MAX_WORK: usize = 1_000_000;
    let py = a.py();
    let answer = SHARES_MEMORY
        .import(py, "numpy", "shares_memory")?
        .call1((a, b, MAX_WORK));
    match answer {
        Err(error)
            if error.is_instance(py, TOO_HARD.import(py, "numpy.exceptions", "TooHardError")?) =>
        {
            Ok(true)
        }
        answer => answer?.extract(),
    }
}

/// What a read-only view shows: all of an array, or bytes of ours as numbers. It is made once the engine is free again,
/// because Python may run meanwhile.
pub struct View {
    pub array: Py<PyAny>,
    pub bytes: Option<(Range<usize>, &'static str)>,
    pub shape: Option<Shape>,
}

/// The axes that a run of elements is walked along, and the order that makes them a leaf's.
pub struct Shape {
    pub walked: Vec<usize>,
    pub axes: Vec<usize>,
}

/// What the user may do with what a view shows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// See it.
    Read,
    /// Change it, between calls, as parameters.
    Write,
    /// Have an array of its own.
    Copied,
}

impl View {
    /// The view.
    pub fn make(self, py: Python<'_>, access: Access) -> PyResult<Bound<'_, PyAny>> {
        let mut view = self.array.into_bound(py);
        if let Some((bytes, dtype)) = self.bytes {
            let (start, end) = (bytes.start.cast_signed(), bytes.end.cast_signed());
            view = view
                .get_item(PySlice::new(py, start, end, 1))?
                .call_method1("view", (dtype,))?;
        }
        if let Some(Shape { walked, axes }) = self.shape {
            view = view
                .call_method1("reshape", (PyTuple::new(py, walked)?,))?
                .call_method1("transpose", (PyTuple::new(py, axes)?,))?;
        }
        if access == Access::Copied {
            return view.call_method0("copy");
        }
        let view = view.call_method0("view")?;
        view.call_method1("setflags", (access == Access::Write,))?;
        Ok(view)
    }
}
