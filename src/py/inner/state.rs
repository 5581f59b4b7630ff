//! A run as arrays: views for the user, copies for a checkpoint, and the way back.

use std::panic::{AssertUnwindSafe, catch_unwind};

use numpy::prelude::*;
use numpy::{PyArray1, PyUntypedArray};
use pyo3::prelude::*;

use super::super::array::{Access, Shape, View, as_array};
use super::super::group::GroupSpec;
use super::super::memory::{fill, read_row, restore, save};
use super::Inner;
use crate::codec::Codec;
use crate::element::Dtype;
use crate::error::{Error, tuple};
use crate::layout::Layout;
use crate::leaf::{Leaf, Place};
use crate::rule::CARRY;

/// Counters as they are stored.
#[derive(FromPyObject, IntoPyObject)]
pub struct Counters {
    /// Steps applied.
    #[pyo3(item)]
    pub steps: u64,
    /// Steps dropped.
    #[pyo3(item)]
    pub skipped: u64,
    /// Steps since the last sync and syncs, of each cycle.
    #[pyo3(item)]
    pub cycles: Vec<(u64, u64)>,
    /// What the rule carries for all leaves.
    #[pyo3(item)]
    pub carry: [f64; CARRY],
    /// Of each leaf, its steps and what the rule carries for it.
    #[pyo3(item)]
    pub leaves: Vec<(u64, [f64; CARRY])>,
}

/// An array that is kept for a leaf: its name, its dtype and its shape.
pub type Kind = (String, &'static str, Vec<usize>);

/// Where an array to copy from has its elements.
struct Source {
    data: usize,
    layout: Layout,
}

impl Source {
    fn place(&self) -> Place<'_> {
        Place {
            data: self.data,
            layout: &self.layout,
            is_contiguous: self.layout.is_contiguous(),
        }
    }
}

impl Inner {
    /// Each leaf's slow weights as they are now; those that have to be made are copies.
    pub fn slow(&mut self, py: Python<'_>) -> PyResult<Vec<View>> {
        let fast = |(array, _): &(Py<PyUntypedArray>, _)| View {
            array: array.clone_ref(py).into_any(),
            bytes: None,
            shape: None,
        };
        if self.inside_slow_weights() || !self.has_slow() {
            return Ok(self.arrays.iter().map(fast).collect());
        }
        if self.cycles.0.is_empty() {
            self.check_params(py, true)?;
            let mut views = Vec::with_capacity(self.leaves.len());
            for index in 0..self.leaves.len() {
                let is_frozen = self.groups[self.leaves[index].group()].frozen;
                views.push(if is_frozen {
                    fast(&self.arrays[index])
                } else {
                    self.average(py, index)?
                });
            }
            return Ok(views);
        }
        let views = self.leaves.iter().zip(&self.arrays).map(|(leaf, array)| {
            let group = &self.groups[leaf.group()];
            let slow = group.rows.slow().and_then(|row| group.rows(leaf).nth(row));
            slow.map_or_else(|| fast(array), |row| self.whole(py, leaf, row.codes))
        });
        Ok(views.collect())
    }

    /// A leaf's weights to evaluate, in a new array.
    fn average(&mut self, py: Python<'_>, index: usize) -> PyResult<View> {
        let shape = Some(shape(&self.leaves[index]));
        let n = self.leaves[index].len();
        let array = if self.leaves[index].dtype() == Dtype::F64 {
            let numbers = PyArray1::<f64>::zeros(py, n, false);
            // SAFETY: the leaves have just been checked, and nobody else has seen the new array.
            let into = unsafe { numbers.as_slice_mut()? };
            // SAFETY: as above.
            self.run(py, |all| unsafe { all.average(index, into) })?;
            numbers.into_any()
        } else {
            let numbers = PyArray1::<f32>::zeros(py, n, false);
            // SAFETY: as above.
            let into = unsafe { numbers.as_slice_mut()? };
            // SAFETY: as above.
            self.run(py, |all| unsafe { all.average(index, into) })?;
            numbers.into_any()
        };
        Ok(View {
            array: array.unbind(),
            bytes: None,
            shape,
        })
    }

    /// Each leaf's state arrays, by name; those that are kept in fewer bits are copies in float32.
    pub fn state(&self, py: Python<'_>) -> PyResult<Vec<Vec<(&'static str, View)>>> {
        let of_leaf = |leaf: &Leaf| {
            let group = &self.groups[leaf.group()];
            let rows = group.single.state.iter().copied().zip(group.rows(leaf));
            rows.map(|(name, row)| {
                if row.codec == Codec::Whole {
                    return Ok((name, self.whole(py, leaf, row.codes)));
                }
                let numbers = PyArray1::<f32>::zeros(py, leaf.len(), false);
                // SAFETY: we have the arena to ourselves, and nobody else has seen the new array.
                unsafe { read_row(&self.arena, row, numbers.as_slice_mut()?) };
                let array = numbers.into_any().unbind();
                Ok((
                    name,
                    View {
                        array,
                        bytes: None,
                        shape: Some(shape(leaf)),
                    },
                ))
            })
            .collect()
        };
        self.leaves.iter().map(of_leaf).collect()
    }

    /// What is kept for each leaf, in order.
    pub fn kinds(&self) -> Vec<Vec<Kind>> {
        self.leaves
            .iter()
            .map(|leaf| {
                self.kinds_of(leaf)
                    .into_iter()
                    .map(|(kind, _)| kind)
                    .collect()
            })
            .collect()
    }

    /// What is kept for a leaf, and at which byte.
    fn kinds_of(&self, leaf: &Leaf) -> Vec<(Kind, usize)> {
        let group = &self.groups[leaf.group()];
        let mut kinds = Vec::new();
        for (name, row) in group.rows.names.iter().zip(group.rows(leaf)) {
            let name = name.clone();
            match row.codec {
                Codec::Whole => {
                    let dtype = number(leaf);
                    kinds.push(((name, dtype, leaf.form.shape.to_vec()), row.codes));
                }
                Codec::BFloat16 => {
                    kinds.push(((name, "bfloat16", leaf.form.shape.to_vec()), row.codes));
                }
                Codec::Signed8 | Codec::Unsigned8 => {
                    let (codes, scales) = row.codec.bytes(leaf.len(), 4);
                    let scale = format!("{name}.scale");
                    kinds.push(((name, "uint8", vec![codes]), row.codes));
                    kinds.push(((scale, "float32", vec![scales / 4]), row.scales));
                }
            }
        }
        kinds
    }

    /// Copies of all that a run is: of each leaf its parameter and what is kept for it, in the order of [`Self::kinds`].
    pub fn dump<'py>(&self, py: Python<'py>) -> PyResult<Vec<Vec<Bound<'py, PyAny>>>> {
        self.check_params(py, true)?;
        let array_of = py.import("numpy")?.getattr("array")?;
        let mut all = Vec::with_capacity(self.leaves.len());
        for (leaf, (array, _)) in self.leaves.iter().zip(&self.arrays) {
            // A plain array, whatever the parameter is.
            let mut copies = vec![array_of.call1((array,))?];
            for view in self.kept(py, leaf) {
                copies.push(view.make(py, Access::Copied)?);
            }
            all.push(copies);
        }
        Ok(all)
    }

    /// Of each leaf what is kept for it, in the order of [`Self::kinds`]; and the array that all of it is in.
    pub fn rows(&self, py: Python<'_>) -> (Py<PyArray1<u8>>, Vec<Vec<View>>) {
        let kept = |leaf: &Leaf| self.kept(py, leaf).collect();
        let leaves = self.leaves.iter().map(kept).collect();
        (self.arena.array.clone_ref(py), leaves)
    }

    fn kept<'a>(&'a self, py: Python<'a>, leaf: &'a Leaf) -> impl Iterator<Item = View> + 'a {
        let view = move |((_, dtype, shape_of), byte): (Kind, usize)| {
            if shape_of == *leaf.form.shape && dtype != "uint8" {
                self.bits(py, leaf, byte, dtype)
            } else {
                let size = if dtype == "uint8" { 1 } else { 4 };
                self.run_of(py, byte, shape_of[0] * size, dtype, None)
            }
        };
        self.kinds_of(leaf).into_iter().map(view)
    }

    /// Takes all that [`Self::dump`] gives, and the counters; the arrays are nobody else's.
    pub fn restore(
        &mut self,
        py: Python<'_>,
        arrays: &[Vec<Bound<'_, PyAny>>],
        counters: Counters,
        of_group: &[usize],
        groups: Vec<GroupSpec>,
    ) -> PyResult<()> {
        self.check_params(py, false)?;
        let groups = self.checked_groups(of_group, groups)?;
        if arrays.len() != self.leaves.len()
            || counters.leaves.len() != self.leaves.len()
            || counters.cycles.len() != self.cycles.0.len()
        {
            return Err(Error::State("state".into(), "is of another optimizer".into()).into());
        }
        let mut sources = Vec::with_capacity(arrays.len());
        for (index, (leaf, arrays)) in self.leaves.iter().zip(arrays).enumerate() {
            let mut kinds = vec![(
                (String::from("params"), "params", leaf.form.shape.to_vec()),
                0,
            )];
            kinds.extend(self.kinds_of(leaf));
            if arrays.len() != kinds.len() {
                return Err(Error::State(
                    self.names.names.get(index).into(),
                    "has another state".into(),
                )
                .into());
            }
            let mut places = Vec::with_capacity(arrays.len());
            for (((name, dtype, shape_of), byte), array) in kinds.into_iter().zip(arrays) {
                let size = match dtype {
                    "uint8" => 1,
                    "bfloat16" => 2,
                    "float32" => 4,
                    "float64" => 8,
                    _ => leaf.dtype().size(),
                };
                places.push((
                    self.source(index, &name, array, &shape_of, size)?,
                    byte,
                    size,
                ));
            }
            sources.push(places);
        }
        if !self.arena.is_whole(py) {
            return Err(Error::Internal.into());
        }
        let copied = py.detach(|| {
            catch_unwind(AssertUnwindSafe(|| {
                for (leaf, places) in self.leaves.iter().zip(&sources) {
                    for (index, (source, byte, size)) in places.iter().enumerate() {
                        let place = source.place();
                        // SAFETY: the sources have just been checked, are held by our caller, and share no memory with
                        // leaves or arena, which we hold and have to ourselves.
                        unsafe {
                            match (index, size) {
                                (0, _) => restore(leaf, &save(leaf, place)),
                                (_, 1) => fill::<1>(&self.arena, *byte, &place),
                                (_, 2) => fill::<2>(&self.arena, *byte, &place),
                                (_, 4) => fill::<4>(&self.arena, *byte, &place),
                                _ => fill::<8>(&self.arena, *byte, &place),
                            }
                        }
                    }
                }
            }))
        });
        self.broken |= copied.is_err();
        copied.map_err(|_| Error::Internal)?;
        for (leaf, (steps, carry)) in self.leaves.iter_mut().zip(counters.leaves) {
            leaf.steps = steps;
            leaf.set_carry(carry);
        }
        for (cycle, (done, syncs)) in self.cycles.0.iter_mut().zip(counters.cycles) {
            (cycle.done, cycle.syncs) = (done, syncs);
        }
        (self.steps, self.skipped, self.carry) = (counters.steps, counters.skipped, counters.carry);
        (self.grad_norm, self.slow_step) = (None, None);
        self.take_groups(of_group, groups);
        Ok(())
    }

    /// Where an array to copy from has its elements.
    fn source(
        &self,
        leaf: usize,
        name: &str,
        array: &Bound<'_, PyAny>,
        shape_of: &[usize],
        size: usize,
    ) -> PyResult<Source> {
        let of = || format!("{} of {}", name, self.names.names.get(leaf));
        let array = as_array(array, of)?;
        let dtype = array.dtype();
        if dtype.itemsize() != size || *array.shape() != *shape_of {
            let what = format!(
                "must have shape {} and {size} bytes an element",
                tuple(shape_of)
            );
            return Err(Error::State(of(), what).into());
        }
        // SAFETY: `array` is a live NumPy array and we are attached, so its fields are there to be read.
        let data = unsafe { (*array.as_array_ptr()).fields.data.expose_provenance() };
        let layout = self.leaves[leaf].layout_of(array.shape(), array.strides(), size);
        let source = Source { data, layout };
        if !self.spans.touching(&source.place().span()).is_empty() {
            return Err(Error::SharesMemory(of(), "the optimizer's arrays".into()).into());
        }
        Ok(source)
    }

    /// Counters as they are.
    pub fn counters(&self) -> Counters {
        Counters {
            steps: self.steps,
            skipped: self.skipped,
            cycles: self
                .cycles
                .0
                .iter()
                .map(|cycle| (cycle.done, cycle.syncs))
                .collect(),
            carry: self.carry,
            leaves: self
                .leaves
                .iter()
                .map(|leaf| (leaf.steps, leaf.carry()))
                .collect(),
        }
    }

    /// A view of a row that is kept as it is computed.
    fn whole(&self, py: Python<'_>, leaf: &Leaf, byte: usize) -> View {
        self.bits(py, leaf, byte, number(leaf))
    }

    /// A view of a row in the leaf's shape; bfloat16 as the integers that NumPy has for it.
    fn bits(&self, py: Python<'_>, leaf: &Leaf, byte: usize, dtype: &'static str) -> View {
        let (dtype, size) = match dtype {
            "bfloat16" => ("uint16", 2),
            "float32" => (dtype, 4),
            _ => (dtype, 8),
        };
        self.run_of(py, byte, leaf.len() * size, dtype, Some(shape(leaf)))
    }

    fn run_of(
        &self,
        py: Python<'_>,
        byte: usize,
        bytes: usize,
        dtype: &'static str,
        shape: Option<Shape>,
    ) -> View {
        let start = self.arena.skipped() + byte;
        View {
            array: self.arena.array.clone_ref(py).into_any(),
            bytes: Some((start..start + bytes, dtype)),
            shape,
        }
    }
}

/// The number that a leaf is computed in.
fn number(leaf: &Leaf) -> &'static str {
    match leaf.dtype().compute() {
        Dtype::F64 => "float64",
        _ => "float32",
    }
}

/// A run of a leaf's elements in its shape.
fn shape(leaf: &Leaf) -> Shape {
    let mut axes = vec![0; leaf.form.order.len()];
    for (position, &axis) in leaf.form.order.iter().enumerate() {
        axes[axis] = position;
    }
    let walked = leaf
        .form
        .order
        .iter()
        .map(|&axis| leaf.form.shape[axis])
        .collect();
    Shape { walked, axes }
}
