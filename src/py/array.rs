//! NumPy arrays as they are, and views of ours for the user.

use numpy::PyUntypedArray;
use numpy::npyffi::NPY_ARRAY_WRITEABLE;
use numpy::prelude::*;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use crate::error::Error;
use crate::leaf::{Dtype, Header};

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
        Ok(array) if x.is_instance(MEMMAP.import(x.py(), "numpy", "memmap")?)? => Ok(array),
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

/// Whether two arrays whose address ranges meet have a byte in common; yes, where that is too hard to tell.
pub fn share_memory(
    a: &Bound<'_, PyUntypedArray>,
    b: &Bound<'_, PyUntypedArray>,
) -> PyResult<bool> {
    static SHARES_MEMORY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    const MAX_WORK: usize = 1_000_000;
    let answer = SHARES_MEMORY
        .import(a.py(), "numpy", "shares_memory")?
        .call1((a, b, MAX_WORK));
    answer.map_or(Ok(true), |shares| shares.extract())
}

/// The view, of which no writeable one can be made.
pub fn read_only(view: Bound<'_, PyAny>) -> PyResult<Bound<'_, PyAny>> {
    view.call_method1("setflags", (false,))?;
    Ok(view)
}
