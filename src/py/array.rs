//! NumPy arrays as they are, and views of ours for the user.

use std::ops::Range;

use numpy::npyffi::NPY_ARRAY_WRITEABLE;
use numpy::prelude::*;
use numpy::{PyArrayDescr, PyUntypedArray};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PySlice, PyTuple, PyType};

use crate::element::Dtype;
use crate::error::Error;
use crate::leaf::Header;

/// An array whose elements we may step, or why not.
pub fn as_array<'a, 'py>(
    x: &'a Bound<'py, PyAny>,
    name: impl Fn() -> String,
) -> PyResult<&'a Bound<'py, PyUntypedArray>> {
    static MEMMAP: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    if let Ok(array) = x.cast_exact::<PyUntypedArray>() {
        return Ok(array);
    }
    let kind = x.get_type().name()?.to_string();
    match x.cast::<PyUntypedArray>() {
        // No subclass of theirs: it may answer for itself what shares its memory.
        Ok(array) if x.get_type().is(MEMMAP.import(x.py(), "numpy", "memmap")?) => Ok(array),
        Ok(_) => Err(Error::Subclass(name(), kind).into()),
        Err(_) => Err(Error::NotAnArray(name(), kind).into()),
    }
}

/// What the array says of itself now.
pub fn header<'a>(
    array: &'a Bound<'_, PyUntypedArray>,
    name: impl Fn() -> String,
) -> Result<Header<'a>, Error> {
    let descr = array.dtype();
    let dtype = match descr.char() {
        b'f' => Dtype::F32,
        b'd' => Dtype::F64,
        b'e' => Dtype::F16,
        b'E' if is_bfloat16(&descr) => Dtype::BF16,
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

impl View {
    /// The view; an array of its own, where `copied`.
    pub fn make(self, py: Python<'_>, copied: bool) -> PyResult<Bound<'_, PyAny>> {
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
        if copied {
            return view.call_method0("copy");
        }
        let view = view.call_method0("view")?;
        view.call_method1("setflags", (false,))?;
        Ok(view)
    }
}
