// What a call brings.
struct Call {
    // Gradients times this.
    scale: f32,
    // The event of the table's first row, and words from one event to the next.
    base: u32,
    words: u32,
    // How many sums there are.
    count: u32,
    // 1: a step is dropped where a gradient is not finite; 2: the norm is clipped; 4: the loss scale follows;
    // 8: there is a table; 16: the slow step is measured.
    options: u32,
    max_norm: f32,
    // The smallest slow step.
    low: f32,
    // What the loss scale is multiplied by after so many steps, and after one that was dropped.
    growth: f32,
    backoff: f32,
    interval: u32,
    // Zero, which no compiler knows.
    zero: u32,
    unused: u32,
}

// What the GPU decides.
struct Control {
    // What the loss is to be multiplied by, and 1 over it: now, and when the last call's gradients were made.
    loss_scale: f32,
    inverse: f32,
    used: f32,
    // Of the last call: the norm of all gradients, what clips it, and whether the call was applied.
    norm: f32,
    clip: f32,
    applied: u32,
    // Calls applied so far, the same before the last one, all calls, and those that were dropped.
    events: u32,
    event: u32,
    calls: u32,
    skipped: u32,
    // Applied calls since the loss scale last changed.
    good: u32,
    // The last slow step that was measured, and 1 minus it.
    slow_step: f32,
    rest: f32,
}
