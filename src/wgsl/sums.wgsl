// What adds up: threads of a workgroup, and elements that are added up apart from others.
const ADDERS = 256u;
const CHUNK = 16384u;
// Numbers of a chunk's sums: squares of small, ordinary and large gradients, infinities, NaNs, and two slopes.
const PARTIAL = 8u;
// Numbers that are large or small are added up in units in which squares neither overflow nor vanish.
const UNIT = 0x1p80f;

var<workgroup> squares_of: array<vec4<f32>, ADDERS>;
var<workgroup> slopes_of: array<vec4<f32>, ADDERS>;

// Adds up what all threads have: the first of each array is the sum afterwards, for the first thread.
fn add_up(thread: u32, squares: vec4<f32>, slopes: vec4<f32>) {
    squares_of[thread] = squares;
    slopes_of[thread] = slopes;
    for (var half = ADDERS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if thread < half {
            squares_of[thread] += squares_of[thread + half];
            slopes_of[thread] += slopes_of[thread + half];
        }
    }
}

