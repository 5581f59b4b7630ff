//! What an engine holds, and each call on it: first all checks, then all numbers, then the counters.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use numpy::prelude::*;
use numpy::{PyArray1, PyUntypedArray};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyWeakrefReference;

use super::array::{Shape, View, as_array, header, share_memory};
use super::memory::{Arena, Group, fill, read_row, restore, save};
use super::work::{All, Grads, Options};
use crate::codec::Codec;
use crate::element::Dtype;
use crate::error::{Error, tuple};
use crate::leaf::{Header, Leaf, Place, Spans};
use crate::lookahead::{Cycle, Cycles, InnerState, Outer};
use crate::rule::{CARRY, SUMS};
use crate::rules::Compute;
use crate::step::Rows;

/// A group of leaves, as Python describes it.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct GroupSpec {
    kernel: String,
    hyper: HashMap<String, f64>,
    slow_steps: Vec<f64>,
    frozen: bool,
    maximize: bool,
}

/// A level of Lookahead, as Python describes it.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct CycleSpec {
    period: u64,
    outer: Option<(f64, bool)>,
    inner_state: String,
}

/// Options of the step and of the state, as Python describes them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct OptionSpec {
    max_grad_norm: Option<f64>,
    max_grad_value: Option<f64>,
    nonfinite: String,
    centralize: Option<isize>,
    optimal: bool,
    master_weights: bool,
    state_dtype: Option<String>,
    seed: Option<u32>,
}

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

pub struct Inner {
    arrays: Vec<(Py<PyUntypedArray>, Py<PyWeakrefReference>)>,
    leaves: Vec<Leaf>,
    by_name: Vec<usize>,
    groups: Vec<Group>,
    arena: Arena,
    spans: Spans,
    options: Options,
    raises: bool,
    kept: OptionSpec,
    cycles: Cycles,
    carry: [f64; CARRY],
    pub steps: u64,
    pub skipped: u64,
    pub grad_norm: Option<f64>,
    pub slow_step: Option<f64>,
    /// Inside `slow_weights()`, the bytes that params are to have again.
    saved: Option<Vec<Vec<u8>>>,
    /// How often it was entered.
    pub entries: u64,
    pub broken: bool,
}

impl Inner {
    /// Checks the arrays, and makes the state for them.
    pub fn new(
        py: Python<'_>,
        names: Vec<String>,
        params: &[Bound<'_, PyAny>],
        of_group: &[usize],
        groups: Vec<GroupSpec>,
        cycles: &[CycleSpec],
        options: OptionSpec,
    ) -> PyResult<Self> {
        let mut leaves = Vec::with_capacity(params.len());
        let mut arrays = Vec::with_capacity(params.len());
        for ((name, param), &group) in names.into_iter().zip(params).zip(of_group) {
            let array = as_array(param, || name.clone())?;
            let header = header(array, || name.clone())?;
            // Blocks of 8-bit state are runs of elements, which must not depend on how an array lies.
            let counting = options.state_dtype.as_deref() == Some("int8");
            leaves.push(Leaf::new(name, group, &header, counting)?);
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
        let cycles = Cycles(
            cycles
                .iter()
                .map(CycleSpec::cycle)
                .collect::<PyResult<_>>()?,
        );
        let groups: Vec<Group> = groups
            .into_iter()
            .map(|group| group.group(&cycles, &options))
            .collect::<PyResult<_>>()?;
        let mut bytes = 0;
        for leaf in &mut leaves {
            leaf.at = bytes;
            leaf.key = hash(&leaf.name);
            bytes += groups[leaf.group].bytes(leaf);
        }
        let arena = Arena::new(py, bytes)?;
        let ours = (arena.span.clone(), None);
        let mut by_name: Vec<usize> = (0..leaves.len()).collect();
        by_name.sort_by(|&a, &b| leaves[a].name.cmp(&leaves[b].name));
        let inner = Self {
            spans: Spans::new(of_leaves.into_iter().chain([ours])),
            arrays,
            leaves,
            by_name,
            groups,
            arena,
            options: Options {
                max_norm: options.max_grad_norm,
                max_value: options.max_grad_value,
                finite: options.nonfinite != "propagate",
                centralize: options.centralize,
                optimal: options.optimal,
            },
            raises: options.nonfinite == "raise",
            kept: options,
            cycles,
            carry: [0.0; CARRY],
            steps: 0,
            skipped: 0,
            grad_norm: None,
            slow_step: None,
            saved: None,
            entries: 0,
            broken: false,
        };
        for group in 0..inner.groups.len() {
            inner.check_overflow(group, &inner.groups[group].hyper)?;
        }
        Ok(inner)
    }

    /// Whether params hold the slow weights.
    pub fn inside_slow_weights(&self) -> bool {
        self.saved.is_some()
    }

    /// Moves every leaf by its gradient, and syncs where that ends a cycle.
    pub fn step(&mut self, py: Python<'_>, grads: &[Bound<'_, PyAny>], scale: f64) -> PyResult<()> {
        let mut has_grad = vec![false; grads.len()];
        self.check_params(py, false)?;
        if self.check_grads(grads, &mut has_grad)? {
            // Python has run, so all is checked once more; what was found to share nothing is not asked again.
            self.check_params(py, false)?;
            if self.check_grads(grads, &mut has_grad)? {
                return Err(Error::Unsteady.into());
            }
        }
        let grads = Grads {
            has: &has_grad,
            scale,
        };
        let measures = self.options.optimal && self.cycles.ending(0) > 0;
        let starting = self.cycles.starting();
        let ending = match (self.options.optimal, measures) {
            (true, false) => 0,
            (true, true) => self.cycles.ending(0),
            (false, _) => self.cycles.ending(1),
        };
        let low = self.groups[0].slow_steps.first().copied().unwrap_or(1.0);
        let step = |all: &mut All| {
            // SAFETY: all have just been checked; we hold the leaves, and our caller the gradients.
            unsafe {
                let (clip, norm, bad) = all.clip(grads);
                let mut slow_step = None;
                if all.options.finite && bad.is_some() {
                    return (norm, bad, slow_step);
                }
                if measures {
                    let best = all.best_slow_step(grads, low);
                    all.sync(ending, Some(best));
                    slow_step = Some(best);
                } else {
                    all.step(grads, clip, starting, ending);
                }
                (norm, None, slow_step)
            }
        };
        let (norm, bad, slow_step) = self.run(py, step)?;
        if let Some(leaf) = bad.filter(|_| self.raises) {
            return Err(Error::NotFinite(self.leaves[leaf].grad_name()).into());
        }
        self.grad_norm = norm;
        if bad.is_some() {
            self.skipped += 1;
            return Ok(());
        }
        self.cycles.advance(u64::from(!measures), ending);
        self.steps += u64::from(!measures);
        self.note_slow_step(ending, slow_step);
        Ok(())
    }

    /// Ends the innermost cycle now, where one has begun, and with it those around it whose last step that is.
    pub fn sync(&mut self, py: Python<'_>) -> PyResult<()> {
        self.check_params(py, false)?;
        if self.cycles.0.first().is_some_and(|cycle| cycle.done > 0) {
            let ending = self.cycles.ending_now();
            // SAFETY: the leaves have just been checked, and we hold them.
            self.run(py, |all| unsafe { all.sync(ending, None) })?;
            self.cycles.advance(0, ending);
            self.note_slow_step(ending, None);
        }
        Ok(())
    }

    fn note_slow_step(&mut self, ending: usize, measured: Option<f64>) {
        if ending > 0 {
            let own = self.groups[0].slow_steps.first().copied();
            self.slow_step = measured.or(own);
        }
    }

    /// Puts the slow weights into params, and the fast ones where slow weights were.
    pub fn enter_slow_weights(&mut self, py: Python<'_>) -> PyResult<()> {
        self.check_params(py, false)?;
        let mut saved = Vec::new();
        if self.has_slow() {
            // SAFETY: the leaves have just been checked, and we hold them.
            saved = self.run(py, |all| unsafe { all.show_slow() })?;
        }
        self.saved = Some(saved);
        self.entries += 1;
        Ok(())
    }

    /// Puts the fast weights back, even into an array that was made read-only meanwhile.
    pub fn leave_slow_weights(&mut self, py: Python<'_>) -> PyResult<()> {
        self.check_params(py, true)?;
        let saved = self.saved.take().ok_or(Error::OutsideSlowWeights)?;
        if self.has_slow() {
            // SAFETY: the leaves have just been checked, and we hold them.
            let back = self.run(py, |all| unsafe { all.show_fast(&saved) });
            if back.is_err() {
                self.saved = Some(saved);
            }
            back?;
        }
        Ok(())
    }

    /// Whether slow weights differ from fast ones.
    fn has_slow(&self) -> bool {
        if self.cycles.0.is_empty() {
            let evaluates = |group: &Group| group.single.evaluate.is_some();
            self.groups.iter().any(evaluates)
        } else {
            self.cycles.begun()
        }
    }

    /// Takes new hyper-parameters and slow steps, one a group, from the next step on.
    pub fn set_hyper(&mut self, groups: &[(HashMap<String, f64>, Vec<f64>)]) -> PyResult<()> {
        let mut all = Vec::with_capacity(groups.len());
        for (index, (hyper, _)) in groups.iter().enumerate() {
            let hyper = ordered(self.groups[index].single.hyper, hyper)?;
            self.check_overflow(index, &hyper)?;
            all.push(hyper);
        }
        for ((group, hyper), (_, slow_steps)) in self.groups.iter_mut().zip(all).zip(groups) {
            group.hyper = hyper;
            group.slow_steps.clone_from(slow_steps);
        }
        Ok(())
    }

    /// Takes other groups from the next step on, with the same arrays for each leaf.
    pub fn set_groups(&mut self, of_group: &[usize], groups: Vec<GroupSpec>) -> PyResult<()> {
        let groups = self.checked_groups(of_group, groups)?;
        self.take_groups(of_group, groups);
        Ok(())
    }

    fn checked_groups(&self, of_group: &[usize], groups: Vec<GroupSpec>) -> PyResult<Vec<Group>> {
        let groups: Vec<Group> = groups
            .into_iter()
            .map(|group| group.group(&self.cycles, &self.kept))
            .collect::<PyResult<_>>()?;
        let same = |(leaf, &group): (&Leaf, &usize)| {
            let (was, is) = (&self.groups[leaf.group], groups.get(group));
            is.is_some_and(|is| is.single.name == was.single.name && is.frozen == was.frozen)
        };
        if of_group.len() != self.leaves.len() || !self.leaves.iter().zip(of_group).all(same) {
            return Err(Error::State("groups".into(), "keep other arrays".into()).into());
        }
        for (index, group) in groups.iter().enumerate() {
            let is_single =
                |(leaf, &of): (&Leaf, &usize)| of == index && leaf.dtype.compute() == Dtype::F32;
            if self.leaves.iter().zip(of_group).any(is_single) {
                check_overflow(group, &group.hyper)?;
            }
        }
        Ok(groups)
    }

    fn take_groups(&mut self, of_group: &[usize], groups: Vec<Group>) {
        self.groups = groups;
        for (leaf, &group) in self.leaves.iter_mut().zip(of_group) {
            leaf.group = group;
        }
    }

    /// Refuses hyper-parameters that are finite in float64 only, for leaves that are computed in float32.
    fn check_overflow(&self, group: usize, hyper: &[f64]) -> Result<(), Error> {
        let is_single = |leaf: &Leaf| leaf.group == group && leaf.dtype.compute() == Dtype::F32;
        if !self.leaves.iter().any(is_single) {
            return Ok(());
        }
        check_overflow(&self.groups[group], hyper)
    }

    /// Syncs so far.
    pub fn syncs(&self) -> u64 {
        self.cycles.syncs()
    }

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
            let indices = 0..self.leaves.len();
            return indices.map(|index| self.average(py, index)).collect();
        }
        let views = self.leaves.iter().zip(&self.arrays).map(|(leaf, array)| {
            let group = &self.groups[leaf.group];
            let slow = group.rows.slow().and_then(|row| group.rows(leaf).nth(row));
            slow.map_or_else(|| fast(array), |row| self.whole(py, leaf, row.codes))
        });
        Ok(views.collect())
    }

    /// A leaf's weights to evaluate, in a new array.
    fn average(&mut self, py: Python<'_>, index: usize) -> PyResult<View> {
        let shape = Some(shape(&self.leaves[index]));
        let n = self.leaves[index].len();
        let all = self.all();
        let array = if all.leaves[index].dtype == Dtype::F64 {
            let numbers = PyArray1::<f64>::zeros(py, n, false);
            // SAFETY: the leaves have just been checked, and nobody else has seen the new array.
            unsafe { all.average(index, numbers.as_slice_mut()?) };
            numbers.into_any()
        } else {
            let numbers = PyArray1::<f32>::zeros(py, n, false);
            // SAFETY: as above.
            unsafe { all.average(index, numbers.as_slice_mut()?) };
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
            let group = &self.groups[leaf.group];
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
        let group = &self.groups[leaf.group];
        let mut kinds = Vec::new();
        for (name, row) in group.rows.names.iter().zip(group.rows(leaf)) {
            let name = name.clone();
            match row.codec {
                Codec::Whole => {
                    let dtype = number(leaf);
                    kinds.push(((name, dtype, leaf.shape.to_vec()), row.codes));
                }
                Codec::BFloat16 => kinds.push(((name, "bfloat16", leaf.shape.to_vec()), row.codes)),
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
            for ((_, dtype, shape_of), byte) in self.kinds_of(leaf) {
                let view = if shape_of == *leaf.shape && dtype != "uint8" {
                    self.bits(py, leaf, byte, dtype)
                } else {
                    let size = if dtype == "uint8" { 1 } else { 4 };
                    self.run_of(py, byte, shape_of[0] * size, dtype, None)
                };
                copies.push(view.make(py, true)?);
            }
            all.push(copies);
        }
        Ok(all)
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
        for (leaf, arrays) in self.leaves.iter().zip(arrays) {
            let mut kinds = vec![((String::from("params"), "params", leaf.shape.to_vec()), 0)];
            kinds.extend(self.kinds_of(leaf));
            if arrays.len() != kinds.len() {
                return Err(Error::State(leaf.name.clone(), "has another state".into()).into());
            }
            let mut places = Vec::with_capacity(arrays.len());
            for (((name, dtype, shape_of), byte), array) in kinds.into_iter().zip(arrays) {
                let size = match dtype {
                    "uint8" => 1,
                    "bfloat16" => 2,
                    "float32" => 4,
                    "float64" => 8,
                    _ => leaf.dtype.size(),
                };
                places.push((
                    self.source(leaf, &name, array, &shape_of, size)?,
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
                    for (index, (place, byte, size)) in places.iter().enumerate() {
                        // SAFETY: the sources have just been checked, are held by our caller, and share no memory with
                        // leaves or arena, which we hold and have to ourselves.
                        unsafe {
                            match (index, size) {
                                (0, _) => restore(leaf, &save(leaf, place)),
                                (_, 1) => fill::<1>(&self.arena, *byte, place),
                                (_, 2) => fill::<2>(&self.arena, *byte, place),
                                (_, 4) => fill::<4>(&self.arena, *byte, place),
                                _ => fill::<8>(&self.arena, *byte, place),
                            }
                        }
                    }
                }
            }))
        });
        self.broken |= copied.is_err();
        copied.map_err(|_| Error::Internal)?;
        for (leaf, (steps, carry)) in self.leaves.iter_mut().zip(counters.leaves) {
            (leaf.steps, leaf.carry) = (steps, carry);
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
        leaf: &Leaf,
        name: &str,
        array: &Bound<'_, PyAny>,
        shape_of: &[usize],
        size: usize,
    ) -> PyResult<Place> {
        let of = || format!("{} of {}", name, leaf.name);
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
        let place = Place::raw(leaf, data, array.shape(), array.strides(), size);
        if !self.spans.touching(&place.span()).is_empty() {
            return Err(Error::SharesMemory(of(), "the optimizer's arrays".into()).into());
        }
        Ok(place)
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
                .map(|leaf| (leaf.steps, leaf.carry))
                .collect(),
        }
    }

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

    /// Checks each gradient, takes note of where it is, and of which leaves have one; returns whether Python has run.
    fn check_grads(&mut self, grads: &[Bound<'_, PyAny>], has_grad: &mut [bool]) -> PyResult<bool> {
        if grads.len() != self.leaves.len() {
            return Err(Error::Count(grads.len(), self.leaves.len()).into());
        }
        let mut ran = false;
        for (index, grad) in grads.iter().enumerate().filter(|(_, grad)| !grad.is_none()) {
            let leaf = &mut self.leaves[index];
            let array = as_array(grad, || leaf.grad_name())?;
            let header = header(array, || leaf.grad_name())?;
            let near = leaf.see_grad(&header, &self.spans)?;
            if !near.is_empty() {
                ran = true;
                let seen = leaf.forget_grad();
                self.check_apart(array, index, &near)?;
                self.leaves[index].g.data = seen;
            }
            has_grad[index] = true;
        }
        Ok(ran)
    }

    /// Checks that a gradient shares no memory with those that its addresses are among: leaves, or our own arrays.
    fn check_apart(
        &self,
        grad: &Bound<'_, PyUntypedArray>,
        index: usize,
        near: &[Option<usize>],
    ) -> PyResult<()> {
        for other in near {
            let (shares, whose) = match *other {
                Some(other) => {
                    let shares = share_memory(grad, self.arrays[other].0.bind(grad.py()))?;
                    (shares, self.leaves[other].name.clone())
                }
                None => (true, "the optimizer's own state".into()),
            };
            if shares {
                return Err(Error::SharesMemory(self.leaves[index].grad_name(), whose).into());
            }
        }
        Ok(())
    }

    /// Does `work`, detached from Python.
    fn run<R: Send>(
        &mut self,
        py: Python<'_>,
        work: impl FnOnce(&mut All) -> R + Send,
    ) -> PyResult<R> {
        if !self.arena.is_whole(py) {
            return Err(Error::Internal.into());
        }
        let mut all = self.all();
        let outcome = py.detach(|| catch_unwind(AssertUnwindSafe(|| work(&mut all))));
        self.broken |= outcome.is_err();
        outcome.map_err(|_| Error::Internal.into())
    }

    fn all(&mut self) -> All<'_> {
        for group in &mut self.groups {
            group.step = self.steps;
        }
        All {
            arena: &self.arena,
            groups: &self.groups,
            leaves: &mut self.leaves,
            by_name: &self.by_name,
            cycles: &self.cycles,
            options: self.options,
            carry: &mut self.carry,
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

/// Refuses hyper-parameters that are finite in float64 only.
fn check_overflow(group: &Group, hyper: &[f64]) -> Result<(), Error> {
    // Hyper-parameters come first among the scalars, and lr is in all that come after; they are largest at step 1.
    let Group { single, double, .. } = group;
    let exact = (double.scalars)(hyper, 1.0, &mut [0.0; CARRY], [0.0; SUMS]);
    let rounded = (single.scalars)(hyper, 1.0, &mut [0.0; CARRY], [0.0; SUMS]);
    let mut pairs = exact.iter().zip(&rounded);
    match pairs.position(|(exact, rounded)| exact.is_finite() && !rounded.is_finite()) {
        Some(index) => Err(Error::Overflow(
            (*single.hyper.get(index).unwrap_or(&"lr")).into(),
        )),
        None => Ok(()),
    }
}

/// The number that a leaf is computed in.
fn number(leaf: &Leaf) -> &'static str {
    match leaf.dtype.compute() {
        Dtype::F64 => "float64",
        _ => "float32",
    }
}

/// A run of a leaf's elements in its shape.
fn shape(leaf: &Leaf) -> Shape {
    let mut axes = vec![0; leaf.order.len()];
    for (position, &axis) in leaf.order.iter().enumerate() {
        axes[axis] = position;
    }
    let walked = leaf.order.iter().map(|&axis| leaf.shape[axis]).collect();
    Shape { walked, axes }
}

/// 32 bits of a leaf's name (FNV-1a).
fn hash(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |hash: u32, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

impl CycleSpec {
    fn cycle(&self) -> PyResult<Cycle> {
        let inner_state = match self.inner_state.as_str() {
            "keep" => InnerState::Keep,
            "reset" => InnerState::Reset,
            "pullback" => InnerState::Pullback,
            other => {
                return Err(PyValueError::new_err(format!(
                    "no inner_state is called {other}"
                )));
            }
        };
        let outer = self
            .outer
            .map(|(momentum, nesterov)| Outer { momentum, nesterov });
        Ok(Cycle::new(self.period, outer, inner_state))
    }
}

impl GroupSpec {
    fn group(self, cycles: &Cycles, options: &OptionSpec) -> PyResult<Group> {
        let single = kernel::<f32>(&self.kernel)?;
        let whole = single.state.len() - single.weights.len();
        let codec = |name: &&str| match options.state_dtype.as_deref() {
            None => Codec::Whole,
            Some("bfloat16") => Codec::BFloat16,
            // Squares and infinity norms are never negative; they are named v and u everywhere.
            Some(_) if name.starts_with(['v', 'u']) => Codec::Unsigned8,
            Some(_) => Codec::Signed8,
        };
        Ok(Group {
            single,
            double: kernel::<f64>(&self.kernel)?,
            rows: Rows::new(
                single.state,
                single.weights.len(),
                &cycles.0,
                options.optimal,
                options.master_weights,
            ),
            keeps_fewer: options.state_dtype.is_some(),
            codecs: single.state[..whole].iter().map(codec).collect(),
            rounding: options.seed,
            step: 0,
            hyper: ordered(single.hyper, &self.hyper)?,
            slow_steps: self.slow_steps,
            frozen: self.frozen,
            maximize: self.maximize,
        })
    }
}

fn kernel<F: Compute>(name: &str) -> PyResult<crate::kernel::Kernel<F>> {
    let kernel = F::kernels().into_iter().find(|kernel| kernel.name == name);
    kernel.ok_or_else(|| PyValueError::new_err(format!("no kernel is called {name}")))
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
