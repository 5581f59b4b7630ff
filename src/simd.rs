//! The instruction set, chosen once, at the edge: the same Rust is compiled for each, and gives the same bits on each.
//!
//! x86-64 has three levels; elsewhere the baseline of the target is the only one (on `AArch64` that is NEON).

use std::sync::LazyLock;

/// An instruction set that this machine has; there is no other way to get one than [`Level::available`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(pub(crate) Isa);

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// All levels of this machine, the best one last.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut levels = vec![Self(Isa::Baseline)];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                levels.push(Self(Isa::Avx2));
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
            {
                levels.push(Self(Isa::Avx512));
            }
        }
        levels
    }

    /// The best level of this machine.
    #[must_use]
    pub fn best() -> Self {
        static BEST: LazyLock<Level> =
            LazyLock::new(|| *Level::available().last().expect("there is a baseline"));
        *BEST
    }
}

/// As long as it lives, this thread's floating-point mode is the one that Rust is compiled for, and that new threads
/// begin with: to nearest, denormals as they are, no traps. Other code in the process may have set another.
pub struct DefaultMode {
    before: mode::Control,
}

impl DefaultMode {
    /// Leaves the mode that the thread is in.
    #[must_use]
    pub fn enter() -> Self {
        let before = mode::get();
        if !mode::is_default(before) {
            mode::set(mode::DEFAULT);
        }
        Self { before }
    }
}

impl Drop for DefaultMode {
    fn drop(&mut self) {
        if !mode::is_default(self.before) {
            mode::set(self.before);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod mode {
    use std::arch::asm;

    /// MXCSR.
    pub type Control = u32;
    pub const DEFAULT: Control = 0x1f80;
    /// All but the flags of what has happened.
    const MODE: Control = 0xffc0;

    pub fn is_default(control: Control) -> bool {
        control & MODE == DEFAULT
    }

    pub fn get() -> Control {
        let mut control = 0;
        // SAFETY: it writes four bytes, and those are ours.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &raw mut control, options(nostack, preserves_flags));
        };
        control
    }

    pub fn set(control: Control) {
        // SAFETY: it reads four bytes, and they are the default or what the register was read to hold, which are valid.
        unsafe {
            asm!("ldmxcsr [{}]", in(reg) &raw const control, options(nostack, preserves_flags));
        };
    }
}

#[cfg(target_arch = "aarch64")]
mod mode {
    use std::arch::asm;

    /// FPCR.
    pub type Control = u64;
    pub const DEFAULT: Control = 0;

    pub fn is_default(control: Control) -> bool {
        control == DEFAULT
    }

    pub fn get() -> Control {
        let control;
        // SAFETY: it reads a register.
        unsafe {
            asm!("mrs {}, fpcr", out(reg) control, options(nostack, preserves_flags));
        };
        control
    }

    pub fn set(control: Control) {
        // SAFETY: it is the default, or what the register was read to hold.
        unsafe {
            asm!("msr fpcr, {}", in(reg) control, options(nostack, preserves_flags));
        };
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod mode {
    /// Nothing is known of it.
    pub type Control = ();
    pub const DEFAULT: Control = ();

    pub fn is_default((): Control) -> bool {
        true
    }

    pub fn get() -> Control {}

    pub fn set((): Control) {}
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
pub(crate) fn avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn avx512<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// Runs a call compiled for `level`; the callee is `#[inline(always)]`.
macro_rules! at {
    ($level:expr, $call:expr) => {
        match $level.0 {
            crate::simd::Isa::Baseline => $call,
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a `Level` is made only by `Level::available`, where the machine has the instructions.
            crate::simd::Isa::Avx2 => unsafe { crate::simd::avx2(#[inline(always)] || $call) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            crate::simd::Isa::Avx512 => unsafe { crate::simd::avx512(#[inline(always)] || $call) },
        }
    };
}
pub(crate) use at;
