//! The same rule as a compute shader: one template, the rule's text inserted.

use crate::lookahead::Phase;
use crate::rule::Source;

/// The shader of rule `R` for the steps of one phase; slow weights are bound only where the phase uses them.
#[must_use]
pub fn shader<R: Source>(phase: Phase<()>) -> String {
    let slow: &[&str] = if phase == Phase::Plain {
        &[]
    } else {
        &["slow"]
    };
    let arrays = [R::STATE, slow].concat();
    let binding = |(i, name): (usize, &&str)| {
        format!(
            "@group(0) @binding({}) var<storage, read_write> {name}_array: array<f32>;\n",
            i + 3
        )
    };
    let each = |names: &[&str], line: fn(&str) -> String| {
        names.iter().map(|name| line(name)).collect::<String>()
    };
    [
        ("«fields»", each(R::SCALARS, |c| format!("{c}: f32, "))),
        ("«arrays»", arrays.iter().enumerate().map(binding).collect()),
        (
            "«scalars»",
            each(R::SCALARS, |c| format!("let {c} = u.scalars.{c}; ")),
        ),
        (
            "«load»",
            each(R::STATE, |s| format!("var {s} = {s}_array[i]; ")),
        ),
        (
            "«start»",
            if phase == Phase::Start {
                "slow_array[i] = p;".into()
            } else {
                String::new()
            },
        ),
        ("«body»", R::BODY.into()),
        (
            "«sync»",
            if phase == Phase::Sync(()) {
                "p = blend(p, slow_array[i]);".into()
            } else {
                String::new()
            },
        ),
        (
            "«store»",
            each(R::STATE, |s| format!("{s}_array[i] = stored({s}); ")),
        ),
    ]
    .into_iter()
    .fold(
        include_str!("kernel.wgsl").to_owned(),
        |text, (mark, line)| text.replace(mark, &line),
    )
}

#[cfg(test)]
mod tests {
    use naga::valid::{Capabilities, ValidationFlags, Validator};

    #[test]
    fn every_rule_is_valid_wgsl_in_every_phase() {
        for (name, text) in crate::rules::shaders() {
            let module = naga::front::wgsl::parse_str(&text)
                .unwrap_or_else(|e| panic!("{name}: {}\n{text}", e.emit_to_string(&text)));
            let outcome =
                Validator::new(ValidationFlags::all(), Capabilities::empty()).validate(&module);
            outcome.unwrap_or_else(|e| panic!("{name}: {e:?}\n{text}"));
        }
    }
}
