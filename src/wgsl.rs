//! The same rule as a compute shader: one text, with the rule's own lines in it.
//!
//! A shader does all that a step does to a run of elements, as `step.rs` says it, in one pass over memory. All that the
//! optimizer keeps of a run lies in one buffer, row after row, so that few buffers are bound. Where the host knows
//! which cycles begin and end, a shader has the lines for these alone.

use std::fmt::Write;

use crate::element::Dtype;
use crate::kernel::Kernel;
use crate::lookahead::{Blend, Cycle, InnerState};
use crate::rule::{CARRY, SUMS};
use crate::step::{CycleRows, Rows};

/// Threads of a workgroup.
pub const THREADS: usize = 64;
/// Threads of a workgroup that adds up.
pub const ADDERS: usize = 256;
/// Elements that are added up apart from others.
pub const CHUNK: usize = 1 << 14;
/// Numbers of a run's sums: squares of small, ordinary and large gradients, what is not finite, and two slopes.
pub const PARTIAL: usize = 8;

/// Which cycles begin and end with a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Course {
    /// These many, from the innermost.
    Known {
        /// Which begin.
        starting: usize,
        /// Which end.
        ending: usize,
    },
    /// As the row of a table says, which the GPU picks.
    Decided,
}

/// What a shader is for.
#[derive(Clone)]
pub struct Form<'a> {
    /// The rule.
    pub kernel: &'a Kernel<f32>,
    /// The cycles around it, the innermost first.
    pub cycles: &'a [Cycle],
    /// Whether the best slow step is measured, and with it the gradients kept that a cycle began with.
    pub optimal: bool,
    /// Whether weights of 16 bits are kept in full.
    pub master: bool,
    /// How weights are stored.
    pub params: Dtype,
    /// How gradients are stored; none, where the rule leaves the leaf alone.
    pub grads: Option<Dtype>,
    /// Whether gradients are zero afterwards.
    pub zeroes: bool,
    /// Whether they are in a buffer that is written: they are bound as it is.
    pub written: bool,
    /// Whether gradients are clipped by value.
    pub limit: bool,
    /// Whether what the GPU decided has a part: the clipping by norm, a measured slow step.
    pub control: bool,
    /// Which cycles begin and end.
    pub course: Course,
    /// Whether this is known to be a call that measures the slow step, in which the rule moves nothing.
    pub measures: bool,
    /// Whether a thread has four elements, which lie on a boundary of four.
    pub quads: bool,
    /// Words of a row of the table, in which other rules may have more than this one.
    pub words: usize,
}

/// Row numbers that are read or written, in order, and how they are called.
struct Kept {
    names: Vec<String>,
    read: Vec<bool>,
    written: Vec<bool>,
    text: String,
}

impl Kept {
    fn new(kernel: &Kernel<f32>, rows: &Rows) -> Self {
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

    fn get(&mut self, row: usize) -> String {
        self.read[row] |= !self.written[row];
        self.names[row].clone()
    }

    fn set(&mut self, row: usize, value: &str) {
        self.written[row] = true;
        let name = &self.names[row];
        let _ = writeln!(self.text, "        {name} = {value};");
    }

    fn line(&mut self, line: &str) {
        let _ = writeln!(self.text, "        {line}");
    }
}

impl Form<'_> {
    /// The rows of a leaf.
    #[must_use]
    pub fn rows(&self) -> Rows {
        let (state, weights) = (self.kernel.state, self.kernel.weights.len());
        let master = self.master && self.params.is_narrow();
        Rows::new(state, weights, self.cycles, self.optimal, master)
    }

    /// Whether slow weights are what is kept of a leaf in full.
    fn keeps_slow(&self) -> bool {
        self.params.is_narrow() && !self.master
    }

    fn is_decided(&self) -> bool {
        self.course == Course::Decided
    }

    /// Elements a thread.
    fn lanes(&self) -> usize {
        let narrow = self.params.is_narrow() || self.grads.is_some_and(Dtype::is_narrow);
        if self.quads {
            4
        } else {
            1 + usize::from(narrow)
        }
    }

    /// The shader of a step.
    #[must_use]
    pub fn step(&self) -> String {
        let rows = self.rows();
        let mut kept = Kept::new(self.kernel, &rows);
        self.load(&rows, &mut kept);
        match self.course {
            Course::Known { starting, ending } => {
                for depth in 0..starting {
                    self.start(&rows.cycles[depth], &mut kept);
                }
                self.note_gradient(starting > 0, &rows, &mut kept);
                if !self.measures {
                    self.update(&mut kept);
                }
                for depth in 0..ending {
                    self.sync(depth, &rows, &mut kept);
                }
            }
            Course::Decided => self.decided(&rows, &mut kept),
        }
        if let Some(master) = rows.master {
            kept.set(master, "p");
        }
        self.around(&kept)
    }

    /// The same where the GPU decides; what is read before it is written on one way only is read on all.
    fn decided(&self, rows: &Rows, kept: &mut Kept) {
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

    /// Weights in full in place of those that were stored in 16 bits.
    fn load(&self, rows: &Rows, kept: &mut Kept) {
        if let Some(master) = rows.master {
            let master = kept.get(master);
            kept.line(&format!("p = adopted(p, {master});"));
        }
    }

    fn start(&self, cycle: &CycleRows, kept: &mut Kept) {
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

    fn note_gradient(&self, starts: bool, rows: &Rows, kept: &mut Kept) {
        if let Some(row) = rows.gradient.filter(|_| starts) {
            let gradient = match (self.grads, self.control) {
                (None, _) => "0.0",
                (Some(_), true) => "g * (1.0 / control.clip)",
                (Some(_), false) => "g",
            };
            kept.set(row, gradient);
        }
    }

    fn update(&self, kept: &mut Kept) {
        if self.grads.is_none() {
            return;
        }
        let states = self.kernel.state.len();
        for row in 0..states {
            kept.get(row);
        }
        kept.line("{");
        self.scalars(kept);
        kept.line(&body(self.kernel.body));
        kept.line("}");
        for row in 0..states {
            let name = kept.names[row].clone();
            kept.set(row, &format!("stored({name})"));
        }
        kept.line("p = fence(p);");
    }

    fn sync(&self, depth: usize, rows: &Rows, kept: &mut Kept) {
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
    fn level(&self, depth: usize) -> String {
        if self.optimal && self.control && depth == 0 {
            return "chosen(row.level_0)".into();
        }
        format!("row.level_{depth}")
    }

    /// The shader that shows the weights to evaluate in place of the parameters, or takes them away again.
    #[must_use]
    pub fn show(&self, enter: bool) -> String {
        let rows = self.rows();
        let mut kept = Kept::new(self.kernel, &rows);
        match rows.slow() {
            Some(slow) if !self.params.is_narrow() => {
                kept.line("let fast = p;");
                let name = kept.get(slow);
                kept.line(&format!("p = {name};"));
                kept.set(slow, "fast");
            }
            Some(slow) if enter => {
                let name = kept.get(slow);
                kept.line(&format!("p = {name};"));
            }
            Some(slow) => {
                let name = kept.get(slow);
                kept.set(slow, &format!("adopted(p, {name})"));
            }
            None => self.evaluate(&rows, &mut kept),
        }
        self.around(&kept)
    }

    /// The shader that writes the weights to evaluate in full where gradients are.
    #[must_use]
    pub fn average(&self) -> String {
        let rows = self.rows();
        let mut kept = Kept::new(self.kernel, &rows);
        self.evaluate(&rows, &mut kept);
        let own = self.store("p", self.params, "p_array", "piece.p");
        let given = self.store("p", Dtype::F32, "g_array", "piece.g");
        self.around(&kept).replace(&own, &given)
    }

    fn evaluate(&self, rows: &Rows, kept: &mut Kept) {
        self.load(rows, kept);
        if self.kernel.evaluated.is_empty() {
            return;
        }
        for row in 0..self.kernel.state.len() {
            kept.get(row);
        }
        self.scalars(kept);
        kept.line(&format!("p = {};", body(self.kernel.evaluated)));
    }

    fn scalars(&self, kept: &mut Kept) {
        for name in self.kernel.names {
            kept.line(&format!("let {name} = row.{name};"));
        }
    }

    /// The shader that adds up what is asked of the gradients, a number of sums for each chunk of elements.
    #[must_use]
    pub fn reduce(&self) -> String {
        let rows = self.rows();
        let mut slopes = String::new();
        if let (true, Some(slow), Some(begun)) = (self.optimal, rows.innermost(), rows.gradient) {
            let at = |row: usize| format!("rows[{row}u * piece.stride + piece.first + i]");
            let master = rows
                .master
                .map_or("p".into(), |row| format!("adopted(p, {})", at(row)));
            let now = if self.grads.is_some() { "g" } else { "0.0" };
            let _ = write!(
                slopes,
                "if (row.flags & 2u) == 2u {{\n            let p = load_p(i);\n            let way = {master} - {};\n            \
                 let begun = {};\n            slopes += vec2(way * begun, way * (begun - {now}));\n        }}",
                at(slow),
                at(begun),
            );
        }
        let given = if self.grads.is_some() {
            format!(
                "let given = load_g(i) * {};\n            let g = {};",
                self.factor("control.inverse"),
                self.limited("given")
            )
        } else {
            "let given = 0.0;\n            let g = 0.0;".into()
        };
        let single = Self {
            quads: false,
            ..self.clone()
        };
        let mut text = single.head(rows.names.len());
        text += "@group(0) @binding(7) var<storage, read_write> partials: array<f32>;\n";
        text += &single.loads();
        text += &include_str!("wgsl/reduce.wgsl")
            .replace("«row»", &self.row("events"))
            .replace("«given»", &given)
            .replace("«slopes»", &slopes);
        text
    }

    /// What comes before the body of any shader of this form.
    fn head(&self, rows: usize) -> String {
        let levels: String = (0..self.cycles.len())
            .map(|depth| format!("    level_{depth}: Level,\n"))
            .collect();
        let scalars: String = self
            .kernel
            .names
            .iter()
            .map(|name| format!("    {name}: f32,\n"))
            .collect();
        let own = 4 + 4 * self.cycles.len() + self.kernel.names.len();
        let scalars = match self.words.saturating_sub(own) {
            more if more > 0 && self.is_decided() => {
                format!("{scalars}    unused: array<u32, {more}>,\n")
            }
            _ => scalars,
        };
        let mut text = include_str!("wgsl/kernel.wgsl")
            .replace("«levels»", &levels)
            .replace("«scalars»", &scalars);
        text += "\n";
        text += include_str!("wgsl/control.wgsl");
        text += "\n";
        let number = |dtype: Dtype| match (self.quads, dtype.is_narrow()) {
            (true, false) => "vec4<f32>",
            (true, true) => "vec2<u32>",
            (false, false) => "f32",
            (false, true) => "u32",
        };
        if self.is_decided() {
            text += "@group(0) @binding(0) var<uniform> call: Call;\n\
                     @group(0) @binding(6) var<storage, read> table: array<Row>;\n\
                     var<private> row: Row;\n";
        } else {
            text += "@group(0) @binding(0) var<uniform> row: Row;\n";
        }
        text += "@group(0) @binding(1) var<uniform> piece: Piece;\n";
        let params = number(self.params);
        let _ = writeln!(
            text,
            "@group(0) @binding(2) var<storage, read_write> p_array: array<{params}>;"
        );
        if let Some(grads) = self.grads {
            let access = if self.zeroes || self.written {
                "read_write"
            } else {
                "read"
            };
            let grads = number(grads);
            let _ = writeln!(
                text,
                "@group(0) @binding(3) var<storage, {access}> g_array: array<{grads}>;"
            );
        }
        if rows > 0 {
            let of_rows = number(Dtype::F32);
            let _ = writeln!(
                text,
                "@group(0) @binding(4) var<storage, read_write> rows: array<{of_rows}>;"
            );
        }
        if self.control {
            text += "@group(0) @binding(5) var<storage, read> control: Control;\n";
        }
        if self.params.is_narrow() {
            let to = narrow(self.params);
            let _ = write!(
                text,
                "\n// Where the bits are no longer those of `wide`, somebody has written them: see `adopt` in element.rs.\n\
                 fn adopted(p: f32, wide: f32) -> f32 {{\n    return select(wide, p, to_{to}(wide) != to_{to}(p));\n}}\n"
            );
        }
        if self.optimal && self.control && !self.cycles.is_empty() {
            text += "\nfn chosen(level: Level) -> Level {\n    \
                     if (row.flags & 2u) == 2u {\n        \
                     return Level(control.slow_step, control.rest, level.decay, 0.0);\n    }\n    \
                     return level;\n}\n";
        }
        text
    }

    /// What a gradient is multiplied by before anything else.
    fn factor(&self, inverse: &str) -> String {
        if self.is_decided() {
            format!("(row.factor * call.scale * {inverse})")
        } else {
            "row.factor".into()
        }
    }

    fn limited(&self, x: &str) -> String {
        if self.limit {
            format!("clamped({x}, piece.limit)")
        } else {
            x.into()
        }
    }

    /// Picks the row of the table.
    fn row(&self, event: &str) -> String {
        if self.is_decided() {
            format!("row = table[(control.{event} - call.base) * piece.histories + piece.history];")
        } else {
            String::new()
        }
    }

    /// Functions that load one element.
    fn loads(&self) -> String {
        let mut text = String::new();
        for (name, dtype) in [("p", Some(self.params)), ("g", self.grads)] {
            let Some(dtype) = dtype else { continue };
            let load = if dtype.is_narrow() {
                format!(
                    "from_{}((({name}_array[at / 2u]) >> ((at & 1u) * 16u)) & 0xffffu)",
                    narrow(dtype)
                )
            } else {
                format!("{name}_array[at]")
            };
            let _ = write!(
                text,
                "\nfn load_{name}(i: u32) -> f32 {{\n    let at = piece.{name} + i;\n    return {load};\n}}\n"
            );
        }
        text
    }

    /// The whole shader around the lines for one element.
    fn around(&self, kept: &Kept) -> String {
        let lanes = self.lanes();
        let used: Vec<usize> = (0..kept.names.len())
            .filter(|&row| kept.read[row] || kept.written[row])
            .collect();
        let mut text = self.head(used.len());
        let fields: String = used
            .iter()
            .map(|&row| format!("{}: f32, ", kept.names[row]))
            .collect();
        let _ = writeln!(text, "\nstruct Element {{ p: f32, {fields}}}");
        let vars: String = used
            .iter()
            .map(|&row| format!("    var {0} = before.{0};\n", kept.names[row]))
            .collect();
        let given = if self.grads.is_some() {
            let clip = if self.control { " * control.clip" } else { "" };
            format!(
                "    let g = {}{clip};\n",
                self.limited(&format!("fence(given * {})", self.factor("control.used")))
            )
        } else {
            String::new()
        };
        let after: String = used
            .iter()
            .map(|&row| format!("{}, ", kept.names[row]))
            .collect();
        let _ = write!(
            text,
            "\nfn advance(before: Element, given: f32) -> Element {{\n    var p = before.p;\n{vars}{given}{}    \
             return Element(p, {after});\n}}\n",
            kept.text
        );
        let _ = write!(
            text,
            "\n@compute @workgroup_size({THREADS})\n\
             fn main(@builtin(global_invocation_id) id: vec3<u32>) {{\n    \
             let i = {lanes}u * (id.x + id.y * piece.width);\n    \
             if i >= piece.size {{\n        return;\n    }}\n"
        );
        if lanes == 2 {
            text += "    let whole = i + 1u < piece.size;\n";
        }
        if self.is_decided() {
            let _ = write!(
                text,
                "    if control.applied == 0u {{\n{}        return;\n    }}\n    {}\n",
                self.zero("        "),
                self.row("event")
            );
        }
        self.load_lanes(kept, &used, &mut text);
        self.store_lanes(kept, &mut text);
        text += &self.zero("    ");
        text + "}\n"
    }

    /// Loads elements, and advances each.
    fn load_lanes(&self, kept: &Kept, used: &[usize], text: &mut String) {
        let mut load = |name: &str, dtype: Dtype, at: &str, array: &str| {
            let unit = match (self.quads, dtype.is_narrow()) {
                (true, _) => 4,
                (false, true) => 2,
                (false, false) => 1,
            };
            let many = self.lanes() / unit;
            for part in 0..many {
                let offset = part * unit;
                let _ = writeln!(
                    text,
                    "    let {name}_{part} = {array}[({at} + i + {offset}u) / {unit}u];"
                );
            }
        };
        load("p", self.params, "piece.p", "p_array");
        if let Some(grads) = self.grads {
            load("g", grads, "piece.g", "g_array");
        }
        for &row in used.iter().filter(|&&row| kept.read[row]) {
            let at = format!("{row}u * piece.stride + piece.first");
            load(&format!("row_{row}"), Dtype::F32, &at, "rows");
        }
        for lane in 0..self.lanes() {
            let fields: String = used
                .iter()
                .map(|&row| {
                    if kept.read[row] {
                        format!(", {}", self.lane(&format!("row_{row}"), Dtype::F32, lane))
                    } else {
                        ", 0.0".into()
                    }
                })
                .collect();
            let p = self.lane("p", self.params, lane);
            let g = self
                .grads
                .map_or("0.0".into(), |grads| self.lane("g", grads, lane));
            let _ = writeln!(
                text,
                "    let e_{lane} = advance(Element({p}{fields}), {g});"
            );
        }
    }

    /// One of the numbers that were loaded.
    fn lane(&self, name: &str, dtype: Dtype, lane: usize) -> String {
        let parts = ["x", "y", "z", "w"];
        match (self.quads, dtype.is_narrow()) {
            (true, false) => format!("{name}_0.{}", parts[lane]),
            (false, false) => format!("{name}_{lane}"),
            (quads, true) => {
                let word = if quads {
                    format!("{name}_0.{}", parts[lane / 2])
                } else {
                    format!("{name}_0")
                };
                let shift = if lane % 2 == 0 { "& 0xffffu" } else { ">> 16u" };
                format!("from_{}({word} {shift})", narrow(dtype))
            }
        }
    }

    fn store_lanes(&self, kept: &Kept, text: &mut String) {
        text.push_str(&self.store("p", self.params, "p_array", "piece.p"));
        for row in (0..kept.names.len()).filter(|&row| kept.written[row]) {
            let at = format!("{row}u * piece.stride + piece.first");
            text.push_str(&self.store(&kept.names[row], Dtype::F32, "rows", &at));
        }
    }

    /// Stores a field of all elements.
    fn store(&self, field: &str, dtype: Dtype, array: &str, at: &str) -> String {
        let (lanes, to) = (self.lanes(), narrow(dtype));
        let pair = |lane: usize| {
            format!(
                "to_{to}(e_{lane}.{field}) | (to_{to}(e_{}.{field}) << 16u)",
                lane + 1
            )
        };
        match (self.quads, dtype.is_narrow()) {
            (true, false) => format!(
                "    {array}[({at} + i) / 4u] = vec4(e_0.{field}, e_1.{field}, e_2.{field}, e_3.{field});\n"
            ),
            (true, true) => format!(
                "    {array}[({at} + i) / 4u] = vec2({}, {});\n",
                pair(0),
                pair(2)
            ),
            // The upper half of the last word is not ours, where elements are an odd number.
            (false, true) => format!(
                "    {array}[({at} + i) / 2u] = select((p_0 & 0xffff0000u) | to_{to}(e_0.{field}), {}, whole);\n",
                pair(0)
            ),
            (false, false) if lanes == 2 => format!(
                "    {array}[{at} + i] = e_0.{field};\n    if whole {{\n        \
                 {array}[{at} + i + 1u] = e_1.{field};\n    }}\n"
            ),
            (false, false) => format!("    {array}[{at} + i] = e_0.{field};\n"),
        }
    }

    /// Makes gradients zero, where that is asked for.
    fn zero(&self, indent: &str) -> String {
        let Some(grads) = self.grads.filter(|_| self.zeroes) else {
            return String::new();
        };
        let lines = match (self.quads, grads.is_narrow()) {
            (true, false) => "g_array[(piece.g + i) / 4u] = vec4<f32>();".into(),
            (true, true) => "g_array[(piece.g + i) / 4u] = vec2<u32>();".into(),
            (false, true) => "g_array[(piece.g + i) / 2u] = \
                 select(g_array[(piece.g + i) / 2u] & 0xffff0000u, 0u, whole);"
                .into(),
            (false, false) if self.lanes() == 2 => format!(
                "g_array[piece.g + i] = 0.0;\n{indent}if whole {{\n{indent}    \
                 g_array[piece.g + i + 1u] = 0.0;\n{indent}}}"
            ),
            (false, false) => "g_array[piece.g + i] = 0.0;".into(),
        };
        format!("{indent}{lines}\n")
    }
}

/// The shader that decides what to do with a call, from all sums.
#[must_use]
pub fn decide() -> String {
    [
        include_str!("wgsl/control.wgsl"),
        include_str!("wgsl/decide.wgsl"),
    ]
    .concat()
}

fn narrow(dtype: Dtype) -> &'static str {
    if dtype == Dtype::F16 {
        "float16"
    } else {
        "bfloat16"
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

/// A row's numbers: see `Row` in wgsl/kernel.wgsl.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    /// The rule.
    pub kernel: &'a Kernel<f32>,
    /// Its hyper-parameters.
    pub hyper: &'a [f64],
    /// Gradients times this.
    pub factor: f64,
    /// The cycles around it.
    pub cycles: &'a [Cycle],
    /// Their slow steps.
    pub slow_steps: &'a [f64],
}

impl Row<'_> {
    /// The row of step `t` as bytes; what the rule carries is moved on.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "what is rounded is to be rounded, and cycles are few"
    )]
    pub fn bytes(
        &self,
        t: u64,
        starting: usize,
        ending: usize,
        flags: u32,
        carry: &mut [f64; CARRY],
    ) -> Vec<u8> {
        let mut words = vec![
            (self.factor as f32).to_bits(),
            flags,
            starting as u32,
            ending as u32,
        ];
        for (cycle, &slow_step) in self.cycles.iter().zip(self.slow_steps) {
            let rest = Blend::<f32>::new(slow_step).map_or(0.0, |_| (1.0 - slow_step) as f32);
            let decay = cycle.outer.map_or(0.0, |outer| outer.momentum as f32);
            words.extend([slow_step as f32, rest, decay, 0.0].map(f32::to_bits));
        }
        let scalars = (self.kernel.scalars)(self.hyper, t as f64, carry, [0.0; SUMS]);
        words.extend(scalars.into_iter().map(f32::to_bits));
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    }
}

#[cfg(test)]
mod tests {
    use naga::valid::{Capabilities, ValidationFlags, Validator};

    use super::*;
    use crate::lookahead::Outer;
    use crate::rule::Scope;
    use crate::rules::Compute;

    /// Parses and validates a shader, and counts the storage buffers that it binds.
    fn check(name: &str, text: &str) {
        let module = naga::front::wgsl::parse_str(text)
            .unwrap_or_else(|e| panic!("{name}: {}\n{text}", e.emit_to_string(text)));
        let outcome =
            Validator::new(ValidationFlags::all(), Capabilities::empty()).validate(&module);
        outcome.unwrap_or_else(|e| panic!("{name}: {e:?}\n{text}"));
        let storage = text.matches("var<storage").count();
        assert!(storage <= 8, "{name} binds {storage} storage buffers");
    }

    fn cycles() -> Vec<Vec<Cycle>> {
        use InnerState::{Keep, Pullback, Reset};
        let outer = |nesterov| Outer {
            momentum: 0.5,
            nesterov,
        };
        let cycle = |outer, state| Cycle::new(2, outer, state);
        vec![
            vec![],
            vec![cycle(None, Keep)],
            vec![cycle(Some(outer(true)), Reset)],
            vec![
                cycle(Some(outer(false)), Pullback),
                cycle(Some(outer(true)), Pullback),
            ],
        ]
    }

    fn courses(depths: usize) -> Vec<Course> {
        let known = |(starting, ending)| Course::Known { starting, ending };
        let mut all = vec![known((0, 0)), Course::Decided];
        if depths > 0 {
            all.extend([(1, 0), (depths, depths), (0, depths)].map(known));
        }
        all
    }

    #[test]
    fn every_shader_is_valid_and_binds_few_buffers() {
        check("decide", &decide());
        let formats = [Dtype::F32, Dtype::F16, Dtype::BF16];
        for kernel in f32::kernels().iter().filter(|k| k.scope == Scope::None) {
            for (index, cycles) in cycles().iter().enumerate() {
                for course in courses(cycles.len()) {
                    for (number, params) in formats.into_iter().enumerate() {
                        for (grads, quads) in [
                            (None, false),
                            (Some(Dtype::F32), true),
                            (Some(Dtype::F16), false),
                        ] {
                            let form = Form {
                                kernel,
                                cycles,
                                optimal: index == 1 && number == 1,
                                master: number == 2,
                                params,
                                grads,
                                zeroes: quads,
                                written: number == 1,
                                limit: quads,
                                control: course == Course::Decided || number == 1,
                                course,
                                measures: number == 1,
                                quads,
                                words: 64,
                            };
                            let name = format!("{} {course:?} {params} {grads:?}", kernel.name);
                            check(&name, &form.step());
                            if course == Course::Decided || number == 1 {
                                check(&name, &form.reduce());
                            }
                        }
                    }
                }
                let form = Form {
                    kernel,
                    cycles,
                    optimal: false,
                    master: false,
                    params: Dtype::F16,
                    grads: None,
                    zeroes: false,
                    written: false,
                    limit: false,
                    control: false,
                    course: Course::Known {
                        starting: 0,
                        ending: 0,
                    },
                    measures: false,
                    quads: true,
                    words: 0,
                };
                check(kernel.name, &form.show(true));
                check(kernel.name, &form.show(false));
                let into = Form {
                    grads: Some(Dtype::F32),
                    written: true,
                    ..form
                };
                check(kernel.name, &into.average());
            }
        }
    }
}
