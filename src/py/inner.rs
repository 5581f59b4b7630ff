//! What an engine holds, and each call on it: first all checks, then all numbers, then the counters.

mod state;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use numpy::PyUntypedArray;
use pyo3::prelude::*;
use pyo3::types::PyWeakrefReference;

use super::array::{as_array, header, share_memory};
use super::group::{CycleSpec, Group, GroupSpec, Hyper, OptionSpec, check_overflow, ordered};
use super::memory::Arena;
use super::work::{All, Grads, Options};
use crate::element::Dtype;
use crate::error::Error;
use crate::leaf::{Header, Leaf, Names, Spans};
use crate::lookahead::Cycles;
use crate::parts::Parts;
use crate::rule::CARRY;
use crate::threads::available;

pub use state::{Counters, Kind};

/// Elements, and what leaves weigh besides, from which on other Python threads may run while they are stepped: fewer take
/// some microseconds.
const DETACHED: usize = 1 << 14;

/// Leaves in the order of their names, found when it is first asked for.
pub struct ByName {
    names: Names,
    order: OnceLock<Vec<u32>>,
}

impl ByName {
    /// The order.
    pub fn get(&self) -> &[u32] {
        self.order.get_or_init(|| {
            let mut order: Vec<u32> = (0..self.names.len()).collect();
            order.sort_by_key(|&leaf| self.names.get(leaf as usize));
            order
        })
    }
}

pub struct Inner {
    arrays: Arrays,
    leaves: Vec<Leaf>,
    names: ByName,
    parts: Parts,
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
        names: &[String],
        params: &[Bound<'_, PyAny>],
        of_group: &[usize],
        groups: Vec<GroupSpec>,
        cycles: &[CycleSpec],
        options: OptionSpec,
    ) -> PyResult<Self> {
        // Blocks of 8-bit state are runs of elements, which must not depend on how an array lies.
        let counting = options.state_dtype.as_deref() == Some("int8");
        let (mut leaves, arrays, names) = read(names, params, of_group, counting)?;
        let of_leaves = || {
            leaves
                .iter()
                .map(|leaf| leaf.p().span())
                .zip((0..).map(Some))
        };
        let spans = Spans::new(of_leaves());
        for (range, index) in of_leaves() {
            for other in spans.touching(&range).into_iter().flatten() {
                let index = index.expect("each range is a leaf's");
                if other < index
                    && share_memory(arrays[other].0.bind(py), arrays[index].0.bind(py))?
                {
                    return Err(Error::SharesMemory(
                        names.get(index).into(),
                        names.get(other).into(),
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
        for (index, leaf) in leaves.iter_mut().enumerate() {
            leaf.at = bytes;
            leaf.key = hash(names.get(index));
            bytes += groups[leaf.group()].bytes(leaf);
        }
        let arena = Arena::new(py, bytes)?;
        let spans = leaves
            .iter()
            .map(|leaf| leaf.p().span())
            .zip((0..).map(Some));
        let lens: Vec<usize> = leaves.iter().map(Leaf::len).collect();
        let threads = options.threads.unwrap_or_else(available);
        let inner = Self {
            spans: Spans::new(spans.chain([(arena.span.clone(), None)])),
            parts: Parts::new(&lens, threads),
            arrays,
            leaves,
            names: ByName {
                names,
                order: OnceLock::new(),
            },
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
        // While other Python threads may run, gradients are guarded as parameters always are.
        let detaches = self.parts.weight >= DETACHED;
        let mut guards = Vec::with_capacity(if detaches { grads.len() } else { 0 });
        if detaches {
            for grad in grads
                .iter()
                .filter_map(|grad| grad.cast::<PyUntypedArray>().ok())
            {
                guards.push(PyWeakrefReference::new(grad)?);
            }
        }
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
            return Err(Error::NotFinite(self.names.names.of_grad(leaf)).into());
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

    /// Takes new hyper-parameters and slow steps, where there are any.
    pub fn set_hyper(&mut self, groups: Option<Hyper>) -> PyResult<()> {
        let Some(groups) = groups else { return Ok(()) };
        let mut all = Vec::with_capacity(groups.len());
        for (index, (hyper, _)) in groups.iter().enumerate() {
            let hyper = ordered(self.groups[index].single.hyper, hyper)?;
            self.check_overflow(index, &hyper)?;
            all.push(hyper);
        }
        for ((group, hyper), (_, slow_steps)) in self.groups.iter_mut().zip(all).zip(groups) {
            (group.hyper, group.slow_steps) = (hyper, slow_steps);
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
            let (was, is) = (&self.groups[leaf.group()], groups.get(group));
            is.is_some_and(|is| is.single.name == was.single.name && is.frozen == was.frozen)
        };
        if of_group.len() != self.leaves.len() || !self.leaves.iter().zip(of_group).all(same) {
            return Err(Error::State("groups".into(), "keep other arrays".into()).into());
        }
        for (index, group) in groups.iter().enumerate() {
            let is_single =
                |(leaf, &of): (&Leaf, &usize)| of == index && leaf.dtype().compute() == Dtype::F32;
            if self.leaves.iter().zip(of_group).any(is_single) {
                check_overflow(group, &group.hyper)?;
            }
        }
        Ok(groups)
    }

    fn take_groups(&mut self, of_group: &[usize], groups: Vec<Group>) {
        self.groups = groups;
        for (leaf, &group) in self.leaves.iter_mut().zip(of_group) {
            leaf.set_group(group);
        }
    }

    /// Refuses hyper-parameters that are finite in float64 only, for leaves that are computed in float32.
    fn check_overflow(&self, group: usize, hyper: &[f64]) -> Result<(), Error> {
        let is_single = |leaf: &Leaf| leaf.group() == group && leaf.dtype().compute() == Dtype::F32;
        if !self.leaves.iter().any(is_single) {
            return Ok(());
        }
        check_overflow(&self.groups[group], hyper)
    }

    /// Syncs so far.
    pub fn syncs(&self) -> u64 {
        self.cycles.syncs()
    }

    /// Checks each parameter against what it was; where it was locked since, that may be `forgiven`.
    fn check_params(&self, py: Python<'_>, forgiven: bool) -> Result<(), Error> {
        for (index, (leaf, (array, _))) in self.leaves.iter().zip(&self.arrays).enumerate() {
            let name = || self.names.names.get(index).to_owned();
            let now = header(array.bind(py), name).map_err(|error| match error {
                Error::Dtype(name, now) | Error::ByteSwapped(name, now) => {
                    Error::Changed(name, leaf.dtype().to_string(), now)
                }
                other => other,
            })?;
            let now = Header {
                writeable: now.writeable || forgiven,
                ..now
            };
            if !leaf.is(&now) {
                return Err(leaf.changed(name(), &now));
            }
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
            let name = || self.names.names.of_grad(index);
            let array = as_array(grad, name)?;
            let header = header(array, name)?;
            let leaf = &mut self.leaves[index];
            if !leaf.has_seen(&header) {
                let near = leaf.see_grad(name, &header, &self.spans)?;
                if !near.is_empty() {
                    ran = true;
                    let seen = leaf.set_grad(0);
                    self.check_apart(array, index, &near)?;
                    self.leaves[index].set_grad(seen);
                }
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
                    (shares, self.names.names.get(other).into())
                }
                None => (true, "the optimizer's own state".into()),
            };
            if shares {
                return Err(Error::SharesMemory(self.names.names.of_grad(index), whose).into());
            }
        }
        Ok(())
    }

    /// Does `work`, detached from Python where that takes longer than to detach.
    fn run<R: Send>(
        &mut self,
        py: Python<'_>,
        work: impl FnOnce(&mut All) -> R + Send,
    ) -> PyResult<R> {
        if !self.arena.is_whole(py) {
            return Err(Error::Internal.into());
        }
        let detaches = self.parts.weight >= DETACHED;
        let mut all = self.all();
        let run = || catch_unwind(AssertUnwindSafe(|| work(&mut all)));
        let outcome = if detaches { py.detach(run) } else { run() };
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
            parts: &self.parts,
            by_name: &self.names,
            cycles: &self.cycles,
            options: self.options,
            carry: &mut self.carry,
        }
    }
}

type Arrays = Vec<(Py<PyUntypedArray>, Py<PyWeakrefReference>)>;

/// Leaves as their arrays say; those, held; and the leaves' names.
fn read(
    names: &[String],
    params: &[Bound<'_, PyAny>],
    of_group: &[usize],
    counting: bool,
) -> PyResult<(Vec<Leaf>, Arrays, Names)> {
    let mut leaves: Vec<Leaf> = Vec::with_capacity(params.len());
    let mut arrays = Vec::with_capacity(params.len());
    let mut all_names = Names::default();
    let mut forms = HashMap::new();
    for ((name, param), &group) in names.iter().zip(params).zip(of_group) {
        let array = as_array(param, || name.clone())?;
        let header = header(array, || name.clone())?;
        let lies = (header.dtype, header.shape.to_vec(), header.strides.to_vec());
        let leaf = Leaf::new(group, &header, counting, forms.get(&lies));
        if !header.writeable {
            return Err(Error::ReadOnly(name.clone()).into());
        }
        if !forms.contains_key(&lies) && leaf.form.layout.overlaps_itself() {
            return Err(Error::OverlapsItself(name.clone()).into());
        }
        forms.entry(lies).or_insert_with(|| leaf.form.clone());
        leaves.push(leaf);
        all_names.push(name);
        arrays.push((
            array.clone().unbind(),
            PyWeakrefReference::new(array)?.unbind(),
        ));
    }
    Ok((leaves, arrays, all_names))
}

/// 32 bits of a leaf's name (FNV-1a).
fn hash(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |hash: u32, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}
