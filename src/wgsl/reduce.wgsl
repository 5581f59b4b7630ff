
// Numbers that are large or small are added up in units in which squares neither overflow nor vanish.
const UNIT = 0x1p80f;

var<workgroup> sums: array<vec4<f32>, 256>;
var<workgroup> slopes_of: array<vec4<f32>, 256>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    «row»
    // Squares of small, ordinary and large gradients; infinities; NaNs; slopes.
    var squares = vec3<f32>();
    var infinite = 0.0;
    var nan = 0.0;
    var slopes = vec2<f32>();
    for (var part = 0u; part < 64u; part += 1u) {
        let i = group.x * 16384u + part * 256u + thread;
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
    sums[thread] = vec4(squares, infinite);
    slopes_of[thread] = vec4(slopes, nan, 0.0);
    for (var half = 128u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if thread < half {
            sums[thread] += sums[thread + half];
            slopes_of[thread] += slopes_of[thread + half];
        }
    }
    if thread == 0u {
        let at = 8u * (piece.partial + group.x);
        let a = sums[0];
        let b = slopes_of[0];
        partials[at] = a.x;
        partials[at + 1u] = a.y;
        partials[at + 2u] = a.z;
        partials[at + 3u] = a.w;
        partials[at + 4u] = b.z;
        partials[at + 5u] = b.x;
        partials[at + 6u] = b.y;
    }
}
