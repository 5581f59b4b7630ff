//! Groups of leaves: what Python says of them, and which rows that gives each leaf.

use std::collections::HashMap;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::codec::Codec;
use crate::element::{Dtype, Element};
use crate::error::Error;
use crate::kernel::{Kernel, LINE, PEELED};
use crate::leaf::Leaf;
use crate::lookahead::{Cycle, Cycles, InnerState, Outer};
use crate::rule::{CARRY, SUMS, is_never_negative};
use crate::rules::Compute;
use crate::step::Rows;

/// A group of leaves, as Python describes it.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct GroupSpec {
    pub kernel: String,
    pub hyper: HashMap<String, f64>,
    pub slow_steps: Vec<f64>,
    pub frozen: bool,
    pub maximize: bool,
}

/// Each group's hyper-parameters and slow steps, as Python describes them.
pub type Hyper = Vec<(HashMap<String, f64>, Vec<f64>)>;

/// A level of Lookahead, as Python describes it.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct CycleSpec {
    pub period: u64,
    pub outer: Option<(f64, bool)>,
    pub inner_state: String,
}

/// Options of the step and of the state, as Python describes them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct OptionSpec {
    pub max_grad_norm: Option<f64>,
    pub max_grad_value: Option<f64>,
    pub nonfinite: String,
    pub centralize: Option<isize>,
    pub optimal: bool,
    pub master_weights: bool,
    pub state_dtype: Option<String>,
    pub seed: Option<u32>,
    pub threads: Option<usize>,
}

/// What the rule's arrays are kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fewer {
    BFloat16,
    Int8,
}

/// The leaves that share hyper-parameters, and with them a kernel and rows.
pub struct Group {
    pub single: Kernel<f32>,
    pub double: Kernel<f64>,
    pub rows: Rows,
    /// How the rule's arrays are kept; all other rows are whole.
    pub codecs: Vec<Codec>,
    /// Whether any is in fewer bits, for leaves that are computed in float32.
    pub fewer: Option<Fewer>,
    pub rounding: Option<u32>,
    /// The step that random bits are made from: all steps count, also those before a reset.
    pub step: u64,
    pub hyper: Vec<f64>,
    pub slow_steps: Vec<f64>,
    pub frozen: bool,
    pub maximize: bool,
}

/// A number that leaves are computed in.
pub trait Number: Compute + Element {
    /// The group's kernel for it.
    fn kernel(group: &Group) -> &Kernel<Self>;
}

impl Number for f32 {
    fn kernel(group: &Group) -> &Kernel<Self> {
        &group.single
    }
}

impl Number for f64 {
    fn kernel(group: &Group) -> &Kernel<Self> {
        &group.double
    }
}

impl Group {
    /// Bytes from a leaf's first row to the next leaf's.
    pub fn bytes(&self, leaf: &Leaf) -> usize {
        let end = |row: Row| row.end - leaf.at;
        self.rows(leaf).last().map_or(0, end)
    }

    /// How many rows a leaf has.
    fn count(&self, leaf: &Leaf) -> usize {
        let has_master = leaf.dtype().is_narrow() || self.rows.master.is_none();
        let count = self.rows.names.len() - usize::from(!has_master);
        if self.frozen { 0 } else { count }
    }

    /// Where the first row of a leaf is that keeps nothing in fewer bits, from where to where the next one is, and how many
    /// there are.
    pub fn whole_rows(&self, leaf: &Leaf) -> (usize, usize, usize) {
        let size = leaf.dtype().compute().size();
        let before = before(leaf) * size;
        let stride = (before + leaf.len() * size).next_multiple_of(LINE);
        (leaf.at + before, stride, self.count(leaf))
    }

    /// A leaf's rows: how each is kept, and where.
    pub fn rows(&self, leaf: &Leaf) -> impl Iterator<Item = Row> {
        let (n, size) = (leaf.len(), leaf.dtype().compute().size());
        let before = before(leaf);
        let mut at = leaf.at;
        (0..self.count(leaf)).map(move |row| {
            let codec = match self.codecs.get(row) {
                Some(codec) if size == 4 => *codec,
                _ => Codec::Whole,
            };
            let (numbers, scales) = codec.bytes(n, size);
            let is_whole = codec == Codec::Whole;
            let start = at + if is_whole { before * size } else { 0 };
            let scales_at = (start + numbers).next_multiple_of(LINE);
            at = (scales_at + scales).next_multiple_of(LINE);
            Row {
                codec,
                codes: start,
                scales: scales_at,
                end: at,
            }
        })
    }
}

/// How far into a cache line the rows of a leaf begin, in elements: as far as a long parameter does, which is stepped from
/// a line on.
fn before(leaf: &Leaf) -> usize {
    let data = leaf.p().data;
    match leaf.dtype() {
        Dtype::F32 if leaf.len() >= PEELED => data % LINE / 4,
        Dtype::F64 if leaf.len() >= PEELED => data % LINE / 8,
        _ => 0,
    }
}

/// Where a row is, in bytes from the first leaf's first one.
#[derive(Clone, Copy)]
pub struct Row {
    pub codec: Codec,
    pub codes: usize,
    pub scales: usize,
    /// Where the next one may begin.
    pub end: usize,
}

impl CycleSpec {
    /// The level, before its first step.
    pub fn cycle(&self) -> PyResult<Cycle> {
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
    /// The group, at work within `cycles`.
    pub fn group(self, cycles: &Cycles, options: &OptionSpec) -> PyResult<Group> {
        let single = kernel::<f32>(&self.kernel)?;
        let whole = single.state.len() - single.weights.len();
        let fewer = options.state_dtype.as_deref().map(|dtype| match dtype {
            "bfloat16" => Fewer::BFloat16,
            _ => Fewer::Int8,
        });
        let codec = |name: &&str| match fewer {
            None => Codec::Whole,
            Some(Fewer::BFloat16) => Codec::BFloat16,
            Some(Fewer::Int8) if is_never_negative(name) => Codec::Unsigned8,
            Some(Fewer::Int8) => Codec::Signed8,
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
            fewer,
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

pub fn kernel<F: Compute>(name: &str) -> PyResult<Kernel<F>> {
    let kernel = F::kernels().into_iter().find(|kernel| kernel.name == name);
    kernel.ok_or_else(|| PyValueError::new_err(format!("no kernel is called {name}")))
}

/// Hyper-parameters in the kernel's order.
pub fn ordered(names: &[&str], hyper: &HashMap<String, f64>) -> PyResult<Vec<f64>> {
    let value = |name: &&str| {
        hyper
            .get(*name)
            .copied()
            .ok_or_else(|| PyValueError::new_err(format!("{name} is missing")))
    };
    names.iter().map(value).collect()
}

/// Refuses hyper-parameters that are finite in float64 only.
pub fn check_overflow(group: &Group, hyper: &[f64]) -> Result<(), Error> {
    check_single(&group.single, &group.double, hyper)
}

/// The same for the kernel of either number.
pub fn check_single(
    single: &Kernel<f32>,
    double: &Kernel<f64>,
    hyper: &[f64],
) -> Result<(), Error> {
    // Hyper-parameters come first among the scalars, and lr is in all that come after; they are largest at step 1.
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
