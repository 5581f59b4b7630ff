@compute @workgroup_size(ADDERS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    «row»
    var squares = vec3<f32>();
    var infinite = 0.0;
    var nan = 0.0;
    var slopes = vec2<f32>();
    for (var part = 0u; part < CHUNK / ADDERS; part += 1u) {
        let i = group.x * CHUNK + part * ADDERS + thread;
        if i < piece.size {
            «given»
            let size = abs(g);
            if !is_finite(given) {
                let is_nan = (bitcast<u32>(given) & 0x7fffffu) != 0u;
                nan += select(0.0, 1.0, is_nan);
                infinite += select(1.0, 0.0, is_nan);
            }
            if !is_finite(g) {
                squares.z += bitcast<f32>(0x7f800000u ^ piece.zero);
            } else if size > 0x1p50f {
                let x = g / UNIT;
                squares.z += x * x;
            } else if size < 0x1p-50f {
                let x = g * UNIT;
                squares.x += x * x;
            } else {
                squares.y += g * g;
            }
            «slopes»
        }
    }
    add_up(thread, vec4(squares, infinite), vec4(nan, slopes, 0.0));
    if thread == 0u {
        let at = PARTIAL * (piece.partial + group.x);
        let a = squares_of[0];
        let b = slopes_of[0];
        partials[at] = a.x;
        partials[at + 1u] = a.y;
        partials[at + 2u] = a.z;
        partials[at + 3u] = a.w;
        partials[at + 4u] = b.x;
        partials[at + 5u] = b.y;
        partials[at + 6u] = b.z;
    }
}
