// What every shader begins with. `wgsl.rs` writes the rest.

// What a step does to the leaves that share hyper-parameters and steps.
struct Row {
    // Gradients times this.
    factor: f32,
    // 1 where the rule has yet to move these leaves, plus 2 where the slow step is to be measured.
    flags: u32,
    // How many cycles begin, and how many end, from the innermost.
    starting: u32,
    ending: u32,
«levels»«scalars»}

// One level of Lookahead: the slow step, 1 minus it (0 where fast weights stay), and the decay of the sync's momentum.
struct Level { step: f32, rest: f32, decay: f32, unused: f32 }

// A run of elements; numbers are counted in elements.
struct Piece {
    size: u32,
    // Where the first is in `p`, in `g` and in each row of `rows`, and from one row to the next.
    p: u32,
    g: u32,
    first: u32,
    stride: u32,
    // Threads a row of workgroups.
    width: u32,
    // Which of the table's rows is theirs, of each step, and of how many.
    history: u32,
    histories: u32,
    // Where sums of this run go.
    partial: u32,
    // Zero, which no compiler knows.
    zero: u32,
    // The largest magnitude of an element of a gradient.
    limit: f32,
    unused: u32,
}

// The same number, of which no compiler knows anything: sums and differences stay in the order that they are written in.
fn fence(x: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(x) ^ piece.zero);
}

fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

// The builtins of rule.rs that WGSL does not have, or has for finite numbers only.
fn finite(x: f32) -> f32 {
    return select(x, 0x1.fffffep+127f, bitcast<u32>(x) == 0x7f800000u);
}

fn stored(x: f32) -> f32 {
    return select(x, 0.0, (bitcast<u32>(x) & 0x7f800000u) == 0u);
}

fn larger(x: f32, y: f32) -> f32 {
    return select(y, x, x > y);
}

fn smaller(x: f32, y: f32) -> f32 {
    return select(y, x, x < y);
}

fn signed(x: f32) -> f32 {
    return select(select(x, -1.0, x < 0.0), 1.0, x > 0.0);
}

fn direction(x: f32) -> f32 {
    return select(bitcast<f32>(0x7fc00000u ^ piece.zero), signed(x), is_finite(x));
}

// See `Blend` and `Momentum` in lookahead.rs.
fn blend(fast: f32, slow: f32, level: Level) -> f32 {
    let way = fence(fast - slow);
    let from_slow = slow + level.step * way;
    let from_fast = fast - way * level.rest;
    let near = select(from_fast, from_slow, level.step < level.rest);
    return select(select(near, slow, level.step == 0.0), fast, level.rest == 0.0);
}

// See `Factor` in gradient.rs.
fn clamped(x: f32, limit: f32) -> f32 {
    let above = select(x, limit, x > limit);
    return select(above, -limit, above < -limit);
}

// See element.rs: numbers of 16 bits from and to the lower half of a word.
fn from_bfloat16(bits: u32) -> f32 {
    return bitcast<f32>(bits << 16u);
}

fn to_bfloat16(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let rounded = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    return select(rounded, (bits | 0x00400000u) >> 16u, (bits & 0x7fffffffu) > 0x7f800000u);
}

fn from_float16(bits: u32) -> f32 {
    let sign = (bits & 0x8000u) << 16u;
    let exponent = (bits >> 10u) & 31u;
    let mantissa = bits & 1023u;
    let normal = ((exponent + select(112u, 224u, exponent == 31u)) << 23u) | (mantissa << 13u);
    let denormal = bitcast<u32>(f32(mantissa) * 0x1p-24f);
    return bitcast<f32>(sign | select(normal, denormal, exponent == 0u));
}

fn to_float16(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let sign = (bits >> 16u) & 0x8000u;
    let size = bits & 0x7fffffffu;
    if size > 0x7f800000u {
        return sign | 0x7e00u | ((size >> 13u) & 1023u);
    }
    if size >= 0x477ff000u {
        return sign | 0x7c00u;
    }
    if size >= 0x38800000u {
        return sign | ((size - 0x38000000u + 0xfffu + ((size >> 13u) & 1u)) >> 13u);
    }
    // A multiple of the smallest denormal: what is shifted out is rounded to nearest, ties to even.
    let shift = 126u - (size >> 23u);
    if shift > 24u {
        return sign;
    }
    let mantissa = (size & 0x7fffffu) | 0x800000u;
    let whole = mantissa >> shift;
    let rest = mantissa & ((1u << shift) - 1u);
    let half = 1u << (shift - 1u);
    return sign | (whole + select(0u, 1u, rest > half || (rest == half && (whole & 1u) == 1u)));
}
