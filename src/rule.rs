//! An update rule as one text: compiled for `f32` and `f64`, and kept as the WGSL of the same lines.
//!
//! A body is element-wise: `let`, assignment to `p` and the state, `if`/`else`, `+ - * /`, comparisons, float literals
//! with a point, and the builtins below, which bear WGSL's names (`finite` stands in the shader too). Whatever depends on
//! the step alone is a scalar. There is no `fma`: plain products and sums make every instruction set agree bit for bit.

use std::ops::{Add, Div, Mul, Neg, Sub};

/// Elements a tile.
pub const LANES: usize = 32;

/// A rule in compute type `F`: `K` scalars, `N` state arrays.
pub trait Update<F, const K: usize, const N: usize> {
    /// One element: the parameter and the state after a step with gradient `g`.
    fn update(scalars: &[F; K], p: F, g: F, state: [F; N]) -> (F, [F; N]);

    /// Moves one tile by gradients `g`. `finish` sees each parameter before and after the update, and its slow weight,
    /// and says what is stored.
    fn tile(
        scalars: &[F; K],
        p: &mut [F; LANES],
        g: &[F; LANES],
        state: [&mut [F; LANES]; N],
        slow: &mut [F; LANES],
        finish: impl Fn(F, F, &mut F) -> F,
    );
}

/// What the host and the shader need to know about a rule.
pub trait Source {
    /// The rule's name in the registry.
    const NAME: &'static str;
    /// The hyper-parameters, as the body spells them.
    const HYPER: &'static [&'static str];
    /// The hyper-parameters, then what depends only on them and the step.
    const SCALARS: &'static [&'static str];
    /// The arrays kept per parameter, in the paper's letters.
    const STATE: &'static [&'static str];
    /// The update as WGSL.
    const BODY: &'static str;
    /// The scalars of step `t`, which counts from 1; `hyper` is in the order of [`Self::HYPER`].
    fn scalars(hyper: &[f64], t: f64) -> Vec<f64>;
}

macro_rules! count {
    () => { 0 };
    ($x:ident $($rest:ident)*) => { 1 + crate::rule::count!($($rest)*) };
}
pub(crate) use count;

/// Declares a rule: `rule!(Name, hyper(...), state(...), |t| scalars(name = value, ...), |p, g| { body })`.
macro_rules! rule {
    (
        $name:ident,
        hyper($($h:ident),*),
        state($($s:ident),*),
        |$t:ident| scalars($($k:ident = $e:expr),* $(,)?),
        |$p:ident, $g:ident| $body:block $(,)?
    ) => {
        #[doc = concat!("The update of `", stringify!($name), "`.")]
        pub struct $name;

        impl crate::rule::Source for $name {
            const NAME: &'static str = stringify!($name);
            const HYPER: &'static [&'static str] = &[$(stringify!($h)),*];
            const SCALARS: &'static [&'static str] = &[$(stringify!($h),)* $(stringify!($k)),*];
            const STATE: &'static [&'static str] = &[$(stringify!($s)),*];
            const BODY: &'static str = stringify!($body);

            #[allow(unused_variables, reason = "a rule need not use the step or every hyper-parameter")]
            fn scalars(hyper: &[f64], $t: f64) -> Vec<f64> {
                let &[$($h),*] = hyper else { unreachable!("one number per hyper-parameter") };
                $(let $k: f64 = $e;)*
                vec![$($h,)* $($k),*]
            }
        }

        crate::rule::rule!(@in f32, $name, [$($h)* $($k)*], [$($s)*], $p, $g, $body);
        crate::rule::rule!(@in f64, $name, [$($h)* $($k)*], [$($s)*], $p, $g, $body);
    };
    (@in $f:ident, $name:ident, [$($k:ident)*], [$($s:ident)*], $p:ident, $g:ident, $body:block) => {
        impl crate::rule::Update<$f, { crate::rule::count!($($k)*) }, { crate::rule::count!($($s)*) }> for $name {
            #[inline(always)]
            #[allow(unused_variables, unused_mut, reason = "a rule need not use every scalar or move every state")]
            #[allow(clippy::assign_op_pattern, reason = "a body is written as the paper has it")]
            fn update(
                scalars: &[$f; crate::rule::count!($($k)*)],
                mut $p: $f,
                $g: $f,
                state: [$f; crate::rule::count!($($s)*)],
            ) -> ($f, [$f; crate::rule::count!($($s)*)]) {
                let [$($k),*] = *scalars;
                let [$(mut $s),*] = state;
                $body
                ($p, [$($s),*])
            }

            #[inline(always)]
            fn tile(
                scalars: &[$f; crate::rule::count!($($k)*)],
                p: &mut [$f; crate::rule::LANES],
                g: &[$f; crate::rule::LANES],
                state: [&mut [$f; crate::rule::LANES]; crate::rule::count!($($s)*)],
                slow: &mut [$f; crate::rule::LANES],
                finish: impl Fn($f, $f, &mut $f) -> $f,
            ) {
                // An argument an array: the compiler then knows that no two overlap, and vectorises without copies.
                #[inline(always)]
                #[allow(clippy::too_many_arguments, reason = "one for each array")]
                #[allow(unused_assignments, unused_mut, unused_variables, reason = "a rule need not have state")]
                fn lanes(
                    scalars: &[$f; crate::rule::count!($($k)*)],
                    p: &mut [$f; crate::rule::LANES],
                    g: &[$f; crate::rule::LANES],
                    $($s: &mut [$f; crate::rule::LANES],)*
                    slow: &mut [$f; crate::rule::LANES],
                    finish: impl Fn($f, $f, &mut $f) -> $f,
                ) {
                    for lane in 0..crate::rule::LANES {
                        let (after, state) = <$name as crate::rule::Update<$f, _, _>>::update(
                            scalars, p[lane], g[lane], [$($s[lane]),*]);
                        p[lane] = finish(p[lane], after, &mut slow[lane]);
                        let mut k = 0;
                        $($s[lane] = crate::rule::stored(state[k]); k += 1;)*
                    }
                }
                let [$($s),*] = state;
                lanes(scalars, p, g, $($s,)* slow, finish);
            }
        }
    };
}
pub(crate) use rule;

/// The numbers that rules compute with.
pub trait Float:
    Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + 'static
{
    /// The largest finite number.
    const MAX: Self;
    /// The smallest positive number that is not denormal.
    const MIN_POSITIVE: Self;
    /// Rounds once, to nearest.
    fn round(x: f64) -> Self;
    /// The square root, correctly rounded.
    #[must_use]
    fn root(self) -> Self;
    /// The number without its sign.
    #[must_use]
    fn magnitude(self) -> Self;
}

macro_rules! float {
    ($f:ident) => {
        impl Float for $f {
            const MAX: Self = $f::MAX;
            const MIN_POSITIVE: Self = $f::MIN_POSITIVE;
            #[inline(always)]
            #[allow(
                clippy::cast_possible_truncation,
                reason = "the one rounding of a float64 scalar"
            )]
            fn round(x: f64) -> Self {
                x as $f
            }
            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn magnitude(self) -> Self {
                self.abs()
            }
        }
    };
}
float!(f32);
float!(f64);

/// WGSL's `sqrt`.
#[inline(always)]
pub fn sqrt<F: Float>(x: F) -> F {
    x.root()
}

/// WGSL's `max`; of a number and a NaN in `y`, the NaN.
#[inline(always)]
pub fn max<F: Float>(x: F, y: F) -> F {
    if x > y { x } else { y }
}

/// WGSL's `select`: `yes` where `cond` holds, else `no`.
#[inline(always)]
pub fn select<F: Float>(no: F, yes: F, cond: bool) -> F {
    if cond { yes } else { no }
}

/// `x`, or the largest finite number in place of infinity: a second moment that saturates does not freeze its parameter
/// for ever after one huge gradient.
#[inline(always)]
pub fn finite<F: Float>(x: F) -> F {
    if x > F::MAX { F::MAX } else { x }
}

/// What a state array keeps of `x`: zero in place of a denormal, so that a dead row is not slower than a live one.
#[inline(always)]
pub fn stored<F: Float>(x: F) -> F {
    if x.magnitude() < F::MIN_POSITIVE {
        F::default()
    } else {
        x
    }
}

/// `1 - b^t`, the bias correction of an average with decay `b`, without the cancellation. From `libm`, because a
/// platform's own logarithm may differ in the last bit from one processor to the next.
#[must_use]
pub fn complement(b: f64, t: f64) -> f64 {
    -libm::expm1(t * libm::log(b))
}
