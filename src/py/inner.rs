//! What an engine holds, and each call on it: first all checks, then all numbers, then the counters.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use numpy::PyUntypedArray;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyDict, PySlice, PyTuple, PyWeakrefReference};

use super::array::{as_array, header, read_only, share_memory};
use super::memory::{Job, Typed, Work};
use crate::error::Error;
use crate::leaf::{Dtype, Header, Leaf, Spans};
use crate::lookahead::Cycle;

pub struct Inner {
    arrays: Vec<(Py<PyUntypedArray>, Py<PyWeakrefReference>)>,
    leaves: Vec<Leaf>,
    single: Typed<f32>,
    double: Typed<f64>,
    spans: Spans,
    hyper: Vec<f64>,
    cycle: Option<Cycle>,
    pub steps: u64,
    pub inside_slow_weights: bool,
    pub broken: bool,
}

impl Inner {
    /// Checks the arrays, and makes the state for them.
    pub fn new(
        py: Python<'_>,
        names: Vec<String>,
        params: &[Bound<'_, PyAny>],
        rule: &str,
        hyper: &HashMap<String, f64>,
        cycle: Option<(u64, f64)>,
    ) -> PyResult<Self> {
        let mut leaves = Vec::with_capacity(params.len());
        let mut arrays = Vec::with_capacity(params.len());
        for (name, param) in names.into_iter().zip(params) {
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
        Ok(Self {
            hyper: ordered(single.kernel.hyper, hyper)?,
            spans: Spans::new(of_leaves.into_iter().chain(ours)),
            arrays,
            leaves,
            single,
            double,
            cycle,
            steps: 0,
            inside_slow_weights: false,
            broken: false,
        })
    }

    /// Moves every leaf by its gradient, and syncs where that ends a cycle.
    pub fn step(&mut self, py: Python<'_>, grads: &[Bound<'_, PyAny>]) -> PyResult<()> {
        self.check_params(py, false)?;
        let has_grad = self.check_grads(grads)?;
        // SAFETY: all have just been checked; we hold the leaves, and our caller the gradients.
        unsafe { self.run(py, Work::Step(&has_grad))? };
        self.steps += 1;
        if let Some(cycle) = &mut self.cycle {
            cycle.advance();
        }
        Ok(())
    }

    /// Ends the cycle now, where one has begun.
    pub fn sync(&mut self, py: Python<'_>) -> PyResult<()> {
        self.check_params(py, false)?;
        if self.in_cycle() {
            // SAFETY: the leaves have just been checked, and we hold them.
            unsafe { self.run(py, Work::Sync)? };
        }
        if let Some(cycle) = self.cycle.as_mut().filter(|cycle| cycle.done > 0) {
            cycle.close();
        }
        Ok(())
    }

    /// Puts the slow weights into params, and the fast ones where slow weights were.
    pub fn enter_slow_weights(&mut self, py: Python<'_>) -> PyResult<()> {
        self.check_params(py, false)?;
        self.swap(py)?;
        self.inside_slow_weights = true;
        Ok(())
    }

    /// Puts the fast weights back, even into an array that was made read-only meanwhile.
    pub fn leave_slow_weights(&mut self, py: Python<'_>) -> PyResult<()> {
        if !self.inside_slow_weights {
            return Err(Error::OutsideSlowWeights.into());
        }
        self.check_params(py, true)?;
        self.swap(py)?;
        self.inside_slow_weights = false;
        Ok(())
    }

    fn swap(&mut self, py: Python<'_>) -> PyResult<()> {
        if self.in_cycle() {
            // SAFETY: our callers have just checked the leaves, and we hold them.
            unsafe { self.run(py, Work::Swap)? };
        }
        Ok(())
    }

    /// Takes new hyper-parameters from the next step on.
    pub fn set_hyper(&mut self, hyper: &HashMap<String, f64>) -> PyResult<()> {
        self.hyper = ordered(self.single.kernel.hyper, hyper)?;
        Ok(())
    }

    /// Syncs so far.
    pub fn syncs(&self) -> u64 {
        self.cycle.as_ref().map_or(0, |cycle| cycle.syncs)
    }

    /// A read-only view of each leaf's slow weights as they are now.
    pub fn slow<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        if self.in_cycle() && !self.inside_slow_weights {
            let row = self.single.kernel.state.len();
            let views = self.views(py)?;
            return Ok(views
                .into_iter()
                .map(|mut leaf| leaf.swap_remove(row))
                .collect());
        }
        let view =
            |(array, _): &(Py<PyUntypedArray>, _)| read_only(array.bind(py).call_method0("view")?);
        self.arrays.iter().map(view).collect()
    }

    /// Read-only views of each leaf's state arrays, by name.
    pub fn state<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let names = self.single.kernel.state;
        self.views(py)?
            .into_iter()
            .map(|leaf| names.iter().zip(leaf).into_py_dict(py))
            .collect()
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
