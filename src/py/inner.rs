//! What an engine holds, and each call on it: first all checks, then all numbers, then the counters.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use numpy::PyUntypedArray;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyWeakrefReference;

use super::array::{Cut, View, as_array, header, share_memory};
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
        let ours = [single.span.clone(), double.span.clone()].map(|range| (range, None));
        let mut inner = Self {
            hyper: Vec::new(),
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
        inner.set_hyper(hyper)?;
        Ok(inner)
    }

    /// Moves every leaf by its gradient, and syncs where that ends a cycle.
    pub fn step(&mut self, py: Python<'_>, grads: &[Bound<'_, PyAny>]) -> PyResult<()> {
        let mut has_grad = vec![false; grads.len()];
        self.check_params(py, false)?;
        if self.check_grads(grads, &mut has_grad)? {
            // Python has run, so all is checked once more; what was found to share nothing is not asked again.
            self.check_params(py, false)?;
            if self.check_grads(grads, &mut has_grad)? {
                return Err(Error::Unsteady.into());
            }
        }
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
            if let Some(cycle) = &mut self.cycle {
                cycle.close();
            }
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
        let hyper = ordered(self.single.kernel.hyper, hyper)?;
        // Hyper-parameters come first among the scalars, and lr is in all that come after; they are largest at step 1.
        let scalars = (self.single.kernel.scalars)(&hyper, 1.0, &mut [0.0; 3], [0.0; 2]);
        let single = self.leaves.iter().any(|leaf| leaf.dtype == Dtype::F32);
        if let Some(index) = scalars.iter().position(|x| single && !x.is_finite()) {
            let name = self.single.kernel.hyper.get(index).unwrap_or(&"lr");
            return Err(Error::Overflow((*name).into()).into());
        }
        self.hyper = hyper;
        Ok(())
    }

    /// Syncs so far.
    pub fn syncs(&self) -> u64 {
        self.cycle.as_ref().map_or(0, |cycle| cycle.syncs)
    }

    /// Each leaf's slow weights as they are now.
    pub fn slow(&self, py: Python<'_>) -> Vec<View> {
        if self.in_cycle() && !self.inside_slow_weights {
            let row = self.single.kernel.state.len();
            return self
                .views(py)
                .into_iter()
                .map(|mut leaf| leaf.swap_remove(row))
                .collect();
        }
        let whole = |(array, _): &(Py<PyUntypedArray>, _)| View {
            array: array.clone_ref(py).into_any(),
            cut: None,
        };
        self.arrays.iter().map(whole).collect()
    }

    /// Each leaf's state arrays, by name.
    pub fn state(&self, py: Python<'_>) -> Vec<Vec<(&'static str, View)>> {
        let names = self.single.kernel.state;
        self.views(py)
            .into_iter()
            .map(|leaf| names.iter().copied().zip(leaf).collect())
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
        if !(single.is_whole(py) && double.is_whole(py)) {
            return Err(Error::Internal.into());
        }
        let outcome = py.detach(|| {
            catch_unwind(AssertUnwindSafe(|| {
                // SAFETY: we are borrowed mutably; the caller vouches for the rest.
                unsafe {
                    single.run(Dtype::F32, leaves, &job);
                    double.run(Dtype::F64, leaves, &job);
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

    /// Our arrays for each leaf, in the leaf's shape: the rule's state, then slow weights.
    fn views(&self, py: Python<'_>) -> Vec<Vec<View>> {
        let keeps_slow = self.cycle.as_ref().is_some_and(Cycle::keeps_slow);
        let arrays = self.single.kernel.state.len() + usize::from(keeps_slow);
        let (mut single, mut double) = (0, 0);
        let mut of_leaf = |leaf: &Leaf| {
            let (arena, start) = match leaf.dtype {
                Dtype::F32 => (self.single.arena.as_any(), &mut single),
                Dtype::F64 => (self.double.arena.as_any(), &mut double),
            };
            let mut axes = vec![0; leaf.order.len()];
            for (position, &axis) in leaf.order.iter().enumerate() {
                axes[axis] = position;
            }
            let view = |_| {
                let run = *start..*start + leaf.len();
                *start = run.end;
                let walked = leaf.order.iter().map(|&axis| leaf.shape[axis]).collect();
                let cut = Some(Cut {
                    run,
                    walked,
                    axes: axes.clone(),
                });
                View {
                    array: arena.clone_ref(py),
                    cut,
                }
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
