//! The same rule as a compute shader: one text, with the rule's own lines in it.
//!
//! A shader does all that a step does to a run of elements, as `step.rs` says it, in one pass over memory. All that the
//! optimizer keeps of a run lies in one buffer, row after row, so that few buffers are bound. Where the host knows
//! which cycles begin and end, a shader has the lines for these alone.

mod element;
mod lanes;
mod row;

use std::fmt::Write;

use crate::element::Dtype;
use crate::kernel::Kernel;
use crate::lookahead::Cycle;
use crate::step::Rows;
use element::{Kept, load};
pub use row::Row;

/// Threads of a workgroup.
pub const THREADS: usize = 64;

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
#[allow(clippy::struct_excessive_bools, reason = "each is a choice of its own")]
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
        load(&rows, &mut kept);
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
        self.around(&kept, &self.store_lanes(&kept))
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
        self.around(&kept, &self.store_lanes(&kept))
    }

    /// The shader that writes the weights to evaluate in full where gradients are.
    #[must_use]
    pub fn average(&self) -> String {
        let rows = self.rows();
        let mut kept = Kept::new(self.kernel, &rows);
        self.evaluate(&rows, &mut kept);
        self.around(&kept, &self.store("p", Dtype::F32, "g_array", "piece.g"))
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
        text += "\n";
        text += include_str!("wgsl/sums.wgsl");
        text += &include_str!("wgsl/reduce.wgsl")
            .replace("«row»", &self.row("events"))
            .replace("«given»", &given)
            .replace("«slopes»", &slopes);
        text
    }

    /// What comes before the body of any shader of this form.
    fn head(&self, rows: usize) -> String {
        let levels = joined(0..self.cycles.len(), |depth| {
            format!("    level_{depth}: Level,\n")
        });
        let scalars = joined(self.kernel.names, |name| format!("    {name}: f32,\n"));
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

    /// The whole shader around the lines for one element, and those that store what has come of it.
    fn around(&self, kept: &Kept, stores: &str) -> String {
        let lanes = self.lanes();
        let used: Vec<usize> = (0..kept.names.len())
            .filter(|&row| kept.read[row] || kept.written[row])
            .collect();
        let mut text = self.head(used.len());
        let fields = joined(&used, |&row| format!("{}: f32, ", kept.names[row]));
        let _ = writeln!(text, "\nstruct Element {{ p: f32, {fields}}}");
        let vars = joined(&used, |&row| {
            format!("    var {0} = before.{0};\n", kept.names[row])
        });
        let given = if self.grads.is_some() {
            let clip = if self.control { " * control.clip" } else { "" };
            format!(
                "    let g = {}{clip};\n",
                self.limited(&format!("fence(given * {})", self.factor("control.used")))
            )
        } else {
            String::new()
        };
        let after = joined(&used, |&row| format!("{}, ", kept.names[row]));
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
        text += stores;
        text += &self.zero("    ");
        text + "}\n"
    }
}

/// The shader that decides what to do with a call, from all sums.
#[must_use]
pub fn decide() -> String {
    [
        include_str!("wgsl/control.wgsl"),
        "\n",
        include_str!("wgsl/sums.wgsl"),
        include_str!("wgsl/decide.wgsl"),
    ]
    .concat()
}

/// What `each` gives for all items, in a row.
fn joined<T>(items: impl IntoIterator<Item = T>, each: impl Fn(T) -> String) -> String {
    items
        .into_iter()
        .fold(String::new(), |text, item| text + &each(item))
}

fn narrow(dtype: Dtype) -> &'static str {
    if dtype == Dtype::F16 {
        "float16"
    } else {
        "bfloat16"
    }
}

#[cfg(test)]
mod tests {
    use naga::valid::{Capabilities, ValidationFlags, Validator};

    use super::*;
    use crate::lookahead::{InnerState, Outer};
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
