//! The elements of a thread: loaded in the formats that they are stored in, advanced, and stored.

use std::fmt::Write;

use super::element::Kept;
use super::{Form, joined, narrow};
use crate::element::Dtype;

impl Form<'_> {
    /// Loads elements, and advances each.
    pub(super) fn load_lanes(&self, kept: &Kept, used: &[usize], text: &mut String) {
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
            let fields = joined(used, |&row| {
                if kept.read[row] {
                    format!(", {}", self.lane(&format!("row_{row}"), Dtype::F32, lane))
                } else {
                    ", 0.0".into()
                }
            });
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
    pub(super) fn lane(&self, name: &str, dtype: Dtype, lane: usize) -> String {
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
                let shift = if lane.is_multiple_of(2) {
                    "& 0xffffu"
                } else {
                    ">> 16u"
                };
                format!("from_{}({word} {shift})", narrow(dtype))
            }
        }
    }

    /// Stores parameters, and the rows that were written.
    pub(super) fn store_lanes(&self, kept: &Kept) -> String {
        let written = (0..kept.names.len()).filter(|&row| kept.written[row]);
        let rows = joined(written, |row| {
            let at = format!("{row}u * piece.stride + piece.first");
            self.store(&kept.names[row], Dtype::F32, "rows", &at)
        });
        self.store("p", self.params, "p_array", "piece.p") + &rows
    }

    /// Stores a field of all elements.
    pub(super) fn store(&self, field: &str, dtype: Dtype, array: &str, at: &str) -> String {
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
    pub(super) fn zero(&self, indent: &str) -> String {
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
