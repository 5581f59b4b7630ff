// The one shader. `wgsl.rs` puts the rule's text and arrays in place of the lines between angle quotes.

struct Scalars { «fields» }

struct Uniforms {
    // Slow weights move by `slow_step` toward fast ones; `rest` is `1 - slow_step`, rounded once.
    slow_step: f32,
    rest: f32,
    // Elements of this leaf.
    size: u32,
    // The rule's, of this step.
    @align(16) scalars: Scalars,
}

@group(0) @binding(0) var<uniform> u: Uniforms;
@group(0) @binding(1) var<storage, read_write> p_array: array<f32>;
@group(0) @binding(2) var<storage, read> g_array: array<f32>;
«arrays»

// See `finite` and `stored` in rule.rs.
fn finite(x: f32) -> f32 {
    return min(x, 0x1.fffffep+127f);
}

fn stored(x: f32) -> f32 {
    return select(x, 0.0, abs(x) < 0x1p-126f);
}

// See `Blend` in lookahead.rs.
fn blend(fast: f32, slow: f32) -> f32 {
    let near = select(fast - (fast - slow) * u.rest, slow + u.slow_step * (fast - slow), u.slow_step < 0.5);
    return select(near, slow, u.slow_step == 0.0);
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let i = id.x;
    if i >= u.size {
        return;
    }
    «scalars»
    var p = p_array[i];
    let g = g_array[i];
    «load»
    «start»
    «body»
    «sync»
    p_array[i] = p;
    «store»
}
