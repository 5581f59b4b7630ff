
@group(0) @binding(0) var<uniform> call: Call;
@group(0) @binding(1) var<storage, read_write> control: Control;
@group(0) @binding(2) var<storage, read_write> partials: array<f32>;
@group(0) @binding(3) var<storage, read> table: array<u32>;

// Loss scales stay between these.
const SMALLEST = 0x1p-30f;
const LARGEST = 0x1p60f;

@compute @workgroup_size(ADDERS)
fn main(@builtin(local_invocation_index) thread: u32) {
    var sum = vec4<f32>();
    var slope = vec4<f32>();
    for (var i = thread; i < call.count; i += ADDERS) {
        let at = PARTIAL * i;
        sum += vec4(partials[at], partials[at + 1u], partials[at + 2u], partials[at + 3u]);
        slope += vec4(partials[at + 4u], partials[at + 5u], partials[at + 6u], 0.0);
    }
    add_up(thread, sum, slope);
    if thread == 0u {
        decide(squares_of[0], slopes_of[0]);
    }
}

fn decide(sum: vec4<f32>, slope: vec4<f32>) {
    // The norm is `root` of `unit`: it may overflow where what clips it does not.
    var root = sqrt(sum.x);
    var unit = 1.0 / UNIT;
    if sum.z > 0.0 {
        root = sqrt(sum.z + sum.y / UNIT / UNIT);
        unit = UNIT;
    } else if sum.y > 0.0 {
        root = sqrt(sum.y + sum.x / UNIT / UNIT);
        unit = 1.0;
    }
    var norm = root * unit;
    let is_nan = slope.x > 0.0;
    let is_bad = is_nan || sum.w > 0.0;
    let nan = bitcast<f32>(0x7fc00000u ^ call.zero);
    norm = select(norm, nan, is_nan);
    var clip = 1.0;
    if (call.options & 2u) != 0u && (is_nan || norm > call.max_norm) {
        clip = select(call.max_norm / root / unit, nan, is_nan);
    }
    control.norm = norm;
    control.clip = clip;
    control.calls += 1u;
    control.event = control.events;
    control.used = control.inverse;
    var measures = (call.options & 16u) != 0u;
    if (call.options & 8u) != 0u {
        measures = (table[(control.events - call.base) * call.words + 1u] & 2u) != 0u;
    }
    let applies = !(is_bad && (call.options & 1u) != 0u);
    control.applied = select(0u, 1u, applies);
    if applies {
        control.events += 1u;
        if measures {
            measure(slope.y, slope.z);
        }
    } else {
        control.skipped += 1u;
    }
    if (call.options & 4u) != 0u {
        scale_loss(applies);
    }
}

// See `best_slow_step` in work/gradients.rs.
fn measure(first: f32, change: f32) {
    var best = select(call.low, 1.0, first < 0.0);
    if change < 0.0 {
        best = clamp(first / change, call.low, 1.0);
    }
    control.slow_step = best;
    control.rest = 1.0 - best;
}

fn scale_loss(applies: bool) {
    control.good += 1u;
    var scale = control.loss_scale;
    if !applies {
        scale *= call.backoff;
        control.good = 0u;
    } else if control.good >= call.interval {
        scale *= call.growth;
        control.good = 0u;
    }
    control.loss_scale = clamp(scale, SMALLEST, LARGEST);
    control.inverse = 1.0 / control.loss_scale;
}
