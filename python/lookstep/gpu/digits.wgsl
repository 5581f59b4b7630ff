// One step of the network of digits.py's MLP: 64 pixels, 32 rectified units, 10 classes, softmax cross-entropy.
//
// `forward` goes through the network and back, a workgroup a digit and a thread a unit; `gradients` then sums over the
// digits, a workgroup a row and a thread an element. No sum is shared by threads, so its order is always the same.

const BATCH = 32u;
const PIXELS = 64u;
const HIDDEN = 32u;
const CLASSES = 10u;

struct Batch {
    rows: array<u32, BATCH>,
    classes: array<u32, BATCH>,
}

// What a digit leaves for the gradients: outputs of the units, and the loss's gradients in the inputs of both layers.
struct Digit {
    hidden: array<f32, HIDDEN>,
    back: array<f32, HIDDEN>,
    out: array<f32, CLASSES>,
}

@group(0) @binding(0) var<storage, read> images: array<array<f32, PIXELS>>;
@group(0) @binding(1) var<storage, read> batch: Batch;
@group(0) @binding(2) var<storage, read_write> digits: array<Digit, BATCH>;
@group(0) @binding(3) var<storage, read_write> losses: array<f32, BATCH>;

@group(1) @binding(0) var<storage, read> w1: array<array<f32, HIDDEN>, PIXELS>;
@group(1) @binding(1) var<storage, read> b1: array<f32, HIDDEN>;
@group(1) @binding(2) var<storage, read> w2: array<array<f32, CLASSES>, HIDDEN>;
@group(1) @binding(3) var<storage, read> b2: array<f32, CLASSES>;

@group(1) @binding(0) var<storage, read_write> g_w1: array<array<f32, HIDDEN>, PIXELS>;
@group(1) @binding(1) var<storage, read_write> g_b1: array<f32, HIDDEN>;
@group(1) @binding(2) var<storage, read_write> g_w2: array<array<f32, CLASSES>, HIDDEN>;
@group(1) @binding(3) var<storage, read_write> g_b2: array<f32, CLASSES>;

var<workgroup> hidden: array<f32, HIDDEN>;
var<workgroup> out: array<f32, CLASSES>;
var<workgroup> back: array<f32, CLASSES>;

@compute @workgroup_size(HIDDEN)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) j: u32) {
    let k = group.x;
    let row = batch.rows[k];
    let class_of = batch.classes[k];

    var sum = 0.0;
    for (var i = 0u; i < PIXELS; i++) {
        sum += images[row][i] * w1[i][j];
    }
    hidden[j] = max(sum + b1[j], 0.0);
    workgroupBarrier();

    if j < CLASSES {
        sum = 0.0;
        for (var i = 0u; i < HIDDEN; i++) {
            sum += hidden[i] * w2[i][j];
        }
        out[j] = sum + b2[j];
    }
    workgroupBarrier();

    var top = out[0];
    for (var i = 1u; i < CLASSES; i++) {
        top = max(top, out[i]);
    }
    var total = 0.0;
    for (var i = 0u; i < CLASSES; i++) {
        total += exp(out[i] - top);
    }
    if j < CLASSES {
        // Softmax less one-hot: what cross-entropy sends back to the outputs.
        back[j] = (exp(out[j] - top) / total - select(0.0, 1.0, j == class_of)) / f32(BATCH);
        digits[k].out[j] = back[j];
    }
    workgroupBarrier();

    sum = 0.0;
    for (var i = 0u; i < CLASSES; i++) {
        sum += back[i] * w2[j][i];
    }
    digits[k].hidden[j] = hidden[j];
    digits[k].back[j] = select(0.0, sum, hidden[j] > 0.0);
    if j == 0u {
        losses[k] = log(total) - (out[class_of] - top);
    }
}

// What a row of a layer's weights is multiplied by; the row after the last is the bias.
fn pixel(k: u32, row: u32) -> f32 {
    if row == PIXELS {
        return 1.0;
    }
    return images[batch.rows[k]][row];
}

fn unit(k: u32, row: u32) -> f32 {
    if row == HIDDEN {
        return 1.0;
    }
    return digits[k].hidden[row];
}

// The rows of the first layer, then those of the second.
@compute @workgroup_size(HIDDEN)
fn gradients(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) j: u32) {
    var row = group.x;
    var sum = 0.0;
    if row <= PIXELS {
        for (var k = 0u; k < BATCH; k++) {
            sum += pixel(k, row) * digits[k].back[j];
        }
        if row < PIXELS {
            g_w1[row][j] = sum;
        } else {
            g_b1[j] = sum;
        }
    } else if j < CLASSES {
        row -= PIXELS + 1u;
        for (var k = 0u; k < BATCH; k++) {
            sum += unit(k, row) * digits[k].out[j];
        }
        if row < HIDDEN {
            g_w2[row][j] = sum;
        } else {
            g_b2[j] = sum;
        }
    }
}
