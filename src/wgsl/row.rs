//! What a shader reads besides arrays, as bytes.

use crate::kernel::Kernel;
use crate::lookahead::Cycle;
use crate::rule::{CARRY, SUMS};

/// A row's numbers: see `Row` in wgsl/kernel.wgsl.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    /// The rule.
    pub kernel: &'a Kernel<f32>,
    /// Its hyper-parameters.
    pub hyper: &'a [f64],
    /// Gradients times this.
    pub factor: f64,
    /// The cycles around it.
    pub cycles: &'a [Cycle],
    /// Their slow steps.
    pub slow_steps: &'a [f64],
}

impl Row<'_> {
    /// The row of step `t` as bytes; what the rule carries is moved on.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "what is rounded is to be rounded, and cycles are few"
    )]
    pub fn bytes(
        &self,
        t: u64,
        starting: usize,
        ending: usize,
        flags: u32,
        carry: &mut [f64; CARRY],
    ) -> Vec<u8> {
        let mut words = vec![
            (self.factor as f32).to_bits(),
            flags,
            starting as u32,
            ending as u32,
        ];
        for (cycle, &slow_step) in self.cycles.iter().zip(self.slow_steps) {
            let rest = (1.0 - slow_step).max(0.0) as f32;
            let decay = cycle.outer.map_or(0.0, |outer| outer.momentum as f32);
            words.extend([slow_step as f32, rest, decay, 0.0].map(f32::to_bits));
        }
        let scalars = (self.kernel.scalars)(self.hyper, t as f64, carry, [0.0; SUMS]);
        words.extend(scalars.into_iter().map(f32::to_bits));
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    }
}
