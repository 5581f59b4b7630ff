//! What a step does to one element, as lines of a shader: the same as `step.rs` does to pieces.

use std::fmt::Write;

use super::Form;
use crate::kernel::Kernel;
use crate::lookahead::InnerState;
use crate::step::{CycleRows, Rows};

/// Row numbers that are read or written, in order, and how they are called.
pub(super) struct Kept {
    pub names: Vec<String>,
    pub read: Vec<bool>,
    pub written: Vec<bool>,
    pub text: String,
}

impl Kept {
    pub fn new(kernel: &Kernel<f32>, rows: &Rows) -> Self {
        // Names of the rule's arrays are in its body; those of all others must not be.
        let name = |(row, name): (usize, &String)| match kernel.state.get(row) {
            Some(state) => (*state).to_owned(),
            None => format!("kept_{}", name.replace('.', "_")),
        };
        let names: Vec<_> = rows.names.iter().enumerate().map(name).collect();
        Self {
            read: vec![false; names.len()],
            written: vec![false; names.len()],
            text: String::new(),
            names,
        }
    }

    pub fn get(&mut self, row: usize) -> String {
        self.read[row] |= !self.written[row];
        self.names[row].clone()
    }

    pub fn set(&mut self, row: usize, value: &str) {
        self.written[row] = true;
        let name = &self.names[row];
        let _ = writeln!(self.text, "        {name} = {value};");
    }

    pub fn line(&mut self, line: &str) {
        let _ = writeln!(self.text, "        {line}");
    }
}

impl Form<'_> {
    /// The same where the GPU decides; what is read before it is written on one way only is read on all.
    pub(super) fn decided(&self, rows: &Rows, kept: &mut Kept) {
        let depths = 0..rows.cycles.len();
        for depth in depths.clone() {
            kept.line(&format!("if row.starting > {depth}u {{"));
            self.start(&rows.cycles[depth], kept);
            kept.line("}");
        }
        if rows.gradient.is_some() {
            kept.line("if row.starting > 0u {");
            self.note_gradient(true, rows, kept);
            kept.line("}");
        }
        if self.optimal {
            kept.line("if (row.flags & 2u) == 0u {");
        }
        self.update(kept);
        if self.optimal {
            kept.line("}");
        }
        for depth in depths {
            kept.line(&format!("if row.ending > {depth}u {{"));
            self.sync(depth, rows, kept);
            kept.line("}");
        }
        for row in 0..kept.names.len() {
            kept.read[row] |= kept.written[row];
        }
    }

    pub(super) fn start(&self, cycle: &CycleRows, kept: &mut Kept) {
        for &(now, before) in &cycle.weights {
            let now = kept.get(now);
            kept.set(before, &format!("select({now}, p, (row.flags & 1u) == 1u)"));
        }
        if self.keeps_slow() {
            let slow = kept.get(cycle.slow);
            kept.set(cycle.slow, &format!("adopted(p, {slow})"));
        } else {
            kept.set(cycle.slow, "p");
        }
    }

    pub(super) fn note_gradient(&self, starts: bool, rows: &Rows, kept: &mut Kept) {
        if let Some(row) = rows.gradient.filter(|_| starts) {
            let gradient = match (self.grads, self.control) {
                (None, _) => "0.0",
                (Some(_), true) => "g * (1.0 / control.clip)",
                (Some(_), false) => "g",
            };
            kept.set(row, gradient);
        }
    }

    pub(super) fn update(&self, kept: &mut Kept) {
        if self.grads.is_none() {
            return;
        }
        let states = self.kernel.state.len();
        for row in 0..states {
            kept.get(row);
        }
        kept.line("{");
        scalars(self.kernel, kept);
        kept.line(&body(self.kernel.body));
        kept.line("}");
        for row in 0..states {
            let name = kept.names[row].clone();
            kept.set(row, &format!("stored({name})"));
        }
        kept.line("p = fence(p);");
    }

    pub(super) fn sync(&self, depth: usize, rows: &Rows, kept: &mut Kept) {
        let (cycle, of) = (&rows.cycles[depth], &self.cycles[depth]);
        let slow = kept.get(cycle.slow);
        kept.line(&format!("let level_{depth} = {};", self.level(depth)));
        let part = |fast: &str, slow: &str| format!("blend({fast}, {slow}, level_{depth})");
        if let (Some(outer), Some(u)) = (of.outer, cycle.momentum) {
            let u_name = kept.get(u);
            kept.line(&format!("let way_{depth} = fence({slow} - p);"));
            kept.set(
                u,
                &format!("fence(level_{depth}.decay * {u_name} + way_{depth})"),
            );
            let along = if outer.nesterov {
                format!("(way_{depth} + level_{depth}.decay * {u_name})")
            } else {
                u_name
            };
            kept.line(&format!("p = {slow} - level_{depth}.step * {along};"));
        } else {
            kept.line(&format!("p = {};", part("p", &slow)));
        }
        for &row in &cycle.reset {
            kept.set(row, "0.0");
        }
        if of.inner_state == InnerState::Pullback {
            for &(now, before) in cycle.pulled.iter().chain(&cycle.weights) {
                let (name, was) = (kept.get(now), kept.get(before));
                kept.set(now, &part(&name, &was));
                kept.set(before, &name);
            }
            for &(now, before) in &cycle.follows {
                let name = kept.get(now);
                kept.set(before, &name);
            }
        }
        kept.line("p = fence(p);");
        if self.keeps_slow() {
            for within in &rows.cycles[..=depth] {
                kept.set(within.slow, "p");
            }
        }
    }

    /// The level of Lookahead that ends, in which the slow step may be a measured one.
    pub(super) fn level(&self, depth: usize) -> String {
        if self.optimal && self.control && depth == 0 {
            return "chosen(row.level_0)".into();
        }
        format!("row.level_{depth}")
    }

    pub(super) fn evaluate(&self, rows: &Rows, kept: &mut Kept) {
        load(rows, kept);
        if self.kernel.evaluated.is_empty() {
            return;
        }
        for row in 0..self.kernel.state.len() {
            kept.get(row);
        }
        scalars(self.kernel, kept);
        kept.line(&format!("p = {};", body(self.kernel.evaluated)));
    }
}

/// A body with names in place of builtins that WGSL has for finite numbers only.
fn body(text: &str) -> String {
    [("max", "larger"), ("min", "smaller"), ("sign", "signed")]
        .iter()
        .fold(text.to_owned(), |text, (ours, theirs)| {
            replaced(&text, ours, theirs)
        })
}

/// `text`, with calls of the function `from` made to `to`.
fn replaced(text: &str, from: &str, to: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(from) {
        let (before, after) = (&rest[..at], &rest[at + from.len()..]);
        let ends = |c: char| c.is_alphanumeric() || c == '_';
        let is_call = after.trim_start().starts_with('(') && !before.ends_with(ends);
        out += before;
        out += if is_call { to } else { from };
        rest = after;
    }
    out + rest
}

/// The rule's scalars by their names.
fn scalars(kernel: &Kernel<f32>, kept: &mut Kept) {
    for name in kernel.names {
        kept.line(&format!("let {name} = row.{name};"));
    }
}

/// Weights in full in place of those that were stored in 16 bits.
pub(super) fn load(rows: &Rows, kept: &mut Kept) {
    if let Some(master) = rows.master {
        let master = kept.get(master);
        kept.line(&format!("p = adopted(p, {master});"));
    }
}
