//! Shaders and their numbers, for the engine that runs them from Python.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::group::{CycleSpec, GroupSpec, check_single, kernel, ordered};
use crate::element::Dtype;
use crate::kernel::Kernel;
use crate::lookahead::{Cycle, Cycles, InnerState};
use crate::rule::{CARRY, Scope};
use crate::step::Rows;
use crate::wgsl::{self, Course, Form, Row};

/// A shader, as Python describes it: see [`Form`].
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
#[allow(clippy::struct_excessive_bools, reason = "as Form")]
pub struct FormSpec {
    kind: String,
    optimal: bool,
    master: bool,
    params: String,
    grads: Option<String>,
    zeroes: bool,
    written: bool,
    limit: bool,
    control: bool,
    course: Option<(usize, usize)>,
    measures: bool,
    quads: bool,
    words: usize,
}

/// Leaves of one group that were moved by the same steps: whether they have gradients, their steps, and what the rule
/// carries for them.
type History = (GroupSpec, bool, u64, [f64; CARRY]);

/// How far a run has come: steps, of each cycle steps since its last sync and syncs, and of each history its steps and
/// what is carried.
type Counted = (u64, Vec<(u64, u64)>, Vec<(u64, [f64; CARRY])>);

/// How many cycles begin and end with a call, and whether it measures the slow step in place of the rule.
type Event = (usize, usize, bool);

/// Flags of a row: see `Row` in wgsl/kernel.wgsl.
const FRESH: u32 = 1;
const MEASURES: u32 = 2;

fn cycles_of(cycles: &[CycleSpec]) -> PyResult<Vec<Cycle>> {
    cycles.iter().map(CycleSpec::cycle).collect()
}

fn dtype(name: &str) -> PyResult<Dtype> {
    match name {
        "float16" => Ok(Dtype::F16),
        "bfloat16" => Ok(Dtype::BF16),
        "float32" => Ok(Dtype::F32),
        other => Err(PyValueError::new_err(format!("no shader computes {other}"))),
    }
}

/// The text of a shader.
#[pyfunction]
#[allow(clippy::needless_pass_by_value, reason = "what Python passes is owned")]
pub fn shader(name: &str, cycles: Vec<CycleSpec>, form: FormSpec) -> PyResult<String> {
    let kernel = kernel::<f32>(name)?;
    let form_of = Form {
        kernel: &kernel,
        cycles: &cycles_of(&cycles)?,
        optimal: form.optimal,
        master: form.master,
        params: dtype(&form.params)?,
        grads: form.grads.as_deref().map(dtype).transpose()?,
        zeroes: form.zeroes,
        written: form.written,
        limit: form.limit,
        control: form.control,
        course: form
            .course
            .map_or(Course::Decided, |(starting, ending)| Course::Known {
                starting,
                ending,
            }),
        measures: form.measures,
        quads: form.quads,
        words: form.words,
    };
    match form.kind.as_str() {
        "step" => Ok(form_of.step()),
        "enter" => Ok(form_of.show(true)),
        "leave" => Ok(form_of.show(false)),
        "average" => Ok(form_of.average()),
        "reduce" => Ok(form_of.reduce()),
        other => Err(PyValueError::new_err(format!(
            "no shader is called {other}"
        ))),
    }
}

/// The text of the shader that decides about a call.
#[pyfunction]
pub fn decide() -> String {
    wgsl::decide()
}

/// The names of the rows that are kept for a leaf, those of the rule first, and how many those are; the row of the slow
/// weights; whether an element's step depends on that element alone; and whether the rule is judged by other weights.
#[pyfunction]
#[allow(clippy::needless_pass_by_value, reason = "what Python passes is owned")]
#[allow(clippy::type_complexity, reason = "it is unpacked at once")]
pub fn layout(
    name: &str,
    cycles: Vec<CycleSpec>,
    optimal: bool,
    master: bool,
) -> PyResult<(Vec<String>, usize, Option<usize>, bool, bool)> {
    let kernel = kernel::<f32>(name)?;
    let weights = kernel.weights.len();
    let rows = Rows::new(kernel.state, weights, &cycles_of(&cycles)?, optimal, master);
    let slow = rows.slow();
    Ok((
        rows.names,
        kernel.state.len(),
        slow,
        kernel.scope == Scope::None,
        kernel.evaluate.is_some(),
    ))
}

/// What the next calls do, where none is dropped: their rows of uniforms, call by call and history by history, each of
/// `stride` bytes at least; which cycles begin and end; and the counters after each. A call is a "step", a "sync", which
/// ends the innermost cycle now, or a "look", which changes nothing.
#[pyfunction]
#[allow(
    clippy::needless_pass_by_value,
    clippy::too_many_arguments,
    reason = "as Python passes it"
)]
pub fn foresee<'py>(
    py: Python<'py>,
    call: &str,
    cycles: Vec<CycleSpec>,
    start: (u64, Vec<(u64, u64)>),
    histories: Vec<History>,
    scale: f64,
    optimal: bool,
    count: usize,
    stride: usize,
) -> PyResult<(Bound<'py, PyBytes>, Vec<Event>, Vec<Counted>)> {
    let mut run = Run::new(&cycles, start, histories, scale)?;
    let (mut bytes, mut events, mut after) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..count {
        let event = run.event(call, optimal);
        run.advance(call, event, stride, &mut bytes);
        events.push(event);
        after.push(run.counted());
    }
    Ok((PyBytes::new(py, &bytes), events, after))
}

/// A run, as far as the host knows it.
struct Run {
    steps: u64,
    cycles: Cycles,
    histories: Vec<Moving>,
}

/// A history under way.
struct Moving {
    kernel: Kernel<f32>,
    hyper: Vec<f64>,
    slow_steps: Vec<f64>,
    factor: f64,
    moved: bool,
    steps: u64,
    carry: [f64; CARRY],
}

impl Run {
    fn new(
        cycles: &[CycleSpec],
        (steps, counts): (u64, Vec<(u64, u64)>),
        histories: Vec<History>,
        scale: f64,
    ) -> PyResult<Self> {
        let mut cycles = cycles_of(cycles)?;
        for (cycle, (done, syncs)) in cycles.iter_mut().zip(counts) {
            (cycle.done, cycle.syncs) = (done, syncs);
        }
        let moving = |(group, moved, steps, carry): History| {
            let kernel_of = kernel::<f32>(&group.kernel)?;
            let hyper = ordered(kernel_of.hyper, &group.hyper)?;
            check_single(&kernel_of, &kernel::<f64>(&group.kernel)?, &hyper)?;
            Ok(Moving {
                kernel: kernel_of,
                hyper,
                slow_steps: group.slow_steps,
                factor: if group.maximize { -scale } else { scale },
                moved,
                steps,
                carry,
            })
        };
        Ok(Self {
            steps,
            cycles: Cycles(cycles),
            histories: histories.into_iter().map(moving).collect::<PyResult<_>>()?,
        })
    }

    fn event(&self, call: &str, optimal: bool) -> Event {
        let measures = optimal && self.cycles.ending(0) > 0;
        match call {
            "sync" => (0, self.cycles.ending_now(), false),
            "look" => (0, 0, false),
            _ if measures => (0, self.cycles.ending(0), true),
            _ if optimal => (self.cycles.starting(), 0, false),
            _ => (self.cycles.starting(), self.cycles.ending(1), false),
        }
    }

    fn advance(&mut self, call: &str, event: Event, stride: usize, bytes: &mut Vec<u8>) {
        let (starting, ending, measures) = event;
        let moves = call == "step" && !measures;
        let mut ended = self.cycles.0[..ending].iter();
        let resets = ended.any(|cycle| cycle.inner_state == InnerState::Reset);
        for history in &mut self.histories {
            let fresh = u32::from(history.steps == 0) * FRESH;
            let flags = fresh + u32::from(measures) * MEASURES;
            let row = Row {
                kernel: &history.kernel,
                hyper: &history.hyper,
                factor: history.factor,
                cycles: &self.cycles.0,
                slow_steps: &history.slow_steps,
            };
            let (mut carry, at) = (history.carry, bytes.len());
            bytes.extend(row.bytes(history.steps + 1, starting, ending, flags, &mut carry));
            bytes.resize((at + stride).max(bytes.len()), 0);
            if moves && history.moved {
                (history.steps, history.carry) = (history.steps + 1, carry);
            }
            if resets {
                (history.steps, history.carry) = (0, [0.0; CARRY]);
            }
        }
        self.steps += u64::from(moves);
        self.cycles.advance(u64::from(moves), ending);
    }

    fn counted(&self) -> Counted {
        let cycles = self.cycles.0.iter();
        let histories = self.histories.iter();
        (
            self.steps,
            cycles.map(|cycle| (cycle.done, cycle.syncs)).collect(),
            histories
                .map(|history| (history.steps, history.carry))
                .collect(),
        )
    }
}
