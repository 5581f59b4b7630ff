//! An update rule as one text: compiled for `f32` and `f64`, and kept as the WGSL of the same lines.
//!
//! A body is element-wise: `let`, assignment to `p` and the state, `if`/`else`, `+ - * /`, comparisons, `&&`, float
//! literals with a point, and the builtins below, which bear WGSL's names (`finite` stands in the shader too). Whatever
//! depends on the step alone is a scalar. There is no `fma`: plain products and sums make every instruction set agree bit
//! for bit.

use std::ops::{Add, Div, Mul, Neg, Sub};

/// Elements a tile.
pub const LANES: usize = 32;
/// Sums that a rule may measure.
pub const SUMS: usize = 2;
/// Numbers that a rule may carry from step to step.
pub const CARRY: usize = 3;

/// A rule in compute type `F`: `K` scalars, `N` state arrays.
pub trait Update<F, const K: usize, const N: usize> {
    /// One element: the parameter and the state after a step with gradient `g`.
    fn update(scalars: &[F; K], p: F, g: F, state: [F; N]) -> (F, [F; N]);

    /// Moves one tile of `L` elements by gradients `g`. `finish` sees each parameter before and after the update, and its slow weight,
    /// and says what is stored.
    fn tile<const L: usize>(
        scalars: &[F; K],
        p: &mut [F; L],
        g: &[F; L],
        state: [&mut [F; L]; N],
        slow: &mut [F; L],
        finish: impl Fn(F, F, F) -> (F, F),
    );
}

/// A rule whose step depends on sums over a whole leaf, or over all: they are taken before any parameter moves.
pub trait Measure<F, const K: usize, const N: usize> {
    /// Moves one tile of the state, and adds what each element contributes to the sums.
    fn tile(
        scalars: &[F; K],
        p: &[F; LANES],
        g: &[F; LANES],
        state: [&mut [F; LANES]; N],
        sums: &mut [[f64; LANES]; SUMS],
    );
}

/// A rule whose parameters are not what it should be judged by.
pub trait Evaluate<F, const K: usize, const N: usize> {
    /// The weight to evaluate and export, where the parameter is `p`.
    fn evaluate(scalars: &[F; K], p: F, state: [F; N]) -> F;
}

/// What the host and the shader need to know about a rule.
pub trait Source {
    /// The rule's name in the registry.
    const NAME: &'static str;
    /// The hyper-parameters, as the body spells them.
    const HYPER: &'static [&'static str];
    /// The hyper-parameters, then what depends only on them and the step.
    const SCALARS: &'static [&'static str];
    /// The arrays kept per parameter, in the paper's letters; those of [`Self::WEIGHTS`] are the last.
    const STATE: &'static [&'static str];
    /// The arrays that stand for weights, and are never kept in fewer bits.
    const WEIGHTS: &'static [&'static str];
    /// The scalars that a step hands to the next, zero before the first.
    const CARRY: &'static [&'static str];
    /// Whether the rule is measured first ([`Measure`]), and over what.
    const SCOPE: Scope;
    /// Whether the weights to evaluate are others than the parameters ([`Evaluate`]).
    const EVALUATES: bool;
    /// The update as WGSL.
    const BODY: &'static str;
    /// The weight to evaluate as WGSL; empty, where it is the parameter.
    const EVALUATE: &'static str;
    /// The scalars of step `t`, which counts from 1; `hyper` is in the order of [`Self::HYPER`], `carry` is moved, and
    /// `sums` are zero where they are yet to be measured.
    fn scalars(hyper: &[f64], t: f64, carry: &mut [f64; CARRY], sums: [f64; SUMS]) -> Vec<f64>;
}

/// What sums are taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The rule needs none.
    None,
    /// Each leaf alone.
    Leaf,
    /// All leaves; what the rule carries, it carries for all of them.
    All,
}

macro_rules! count {
    () => { 0 };
    ($x:ident $($rest:ident)*) => { 1 + crate::rule::count!($($rest)*) };
}
pub(crate) use count;

/// Declares a rule:
///
/// ```text
/// rule!(
///     Name,
///     hyper(lr, ...),
///     state(m, v, ...),
///     weights(z, ...),                             // optional: state that stands for weights
///     carry(sum, ...),                             // optional: scalars of these names are kept for the next step
///     |t| scalars(name = value, ...),              // float64, from the hyper-parameters, t, the carry and the sums
///     measure Leaf(pp, uu) |p, g| { ... },         // optional: moves the state, assigns each element's `wide` share
///     |p, g| { ... },                              // moves p and the state
///     evaluate |p| value,                          // optional: the weight to evaluate
/// );
/// ```
macro_rules! rule {
    (
        $name:ident,
        hyper $h:tt,
        state($($s:ident),*),
        $(weights($($w:ident),*),)?
        $(carry $c:tt,)?
        |$t:ident| scalars $k:tt,
        $(measure $scope:ident $sums:tt |$mp:ident, $mg:ident| $measure:block,)?
        |$p:ident, $g:ident| $body:block
        $(, evaluate |$ep:ident| $evaluate:expr)?
        $(,)?
    ) => {
        #[doc = concat!("The update of `", stringify!($name), "`.")]
        pub struct $name;

        crate::rule::rule!(@source $name, $h, ($($s,)* $($($w,)*)?), ($($($w),*)?), [$($c)?], $t, $k,
            [$($scope $sums)?], $body, [$($ep $evaluate)?]);
        crate::rule::rule!(@update f32, $name, $h, $k, ($($s,)* $($($w,)*)?), $p, $g, $body);
        crate::rule::rule!(@update f64, $name, $h, $k, ($($s,)* $($($w,)*)?), $p, $g, $body);
        crate::rule::rule!(@measure f32, $name, $h, $k, ($($s,)* $($($w,)*)?), [$($sums $mp $mg $measure)?]);
        crate::rule::rule!(@measure f64, $name, $h, $k, ($($s,)* $($($w,)*)?), [$($sums $mp $mg $measure)?]);
        crate::rule::rule!(@evaluate f32, $name, $h, $k, ($($s,)* $($($w,)*)?), [$($ep $evaluate)?]);
        crate::rule::rule!(@evaluate f64, $name, $h, $k, ($($s,)* $($($w,)*)?), [$($ep $evaluate)?]);
    };
    (@scope) => { crate::rule::Scope::None };
    (@scope Leaf) => { crate::rule::Scope::Leaf };
    (@scope All) => { crate::rule::Scope::All };
    (
        @source $name:ident, ($($h:ident),*), ($($s:ident),* $(,)?), ($($w:ident),*), [$(($($c:ident),*))?],
        $t:ident, ($($k:ident = $e:expr),* $(,)?), [$($scope:ident ($a:ident, $b:ident))?], $body:block, [$($ep:ident $evaluate:expr)?]
    ) => {
        impl crate::rule::Source for $name {
            const NAME: &'static str = stringify!($name);
            const HYPER: &'static [&'static str] = &[$(stringify!($h)),*];
            const SCALARS: &'static [&'static str] = &[$(stringify!($h),)* $(stringify!($k)),*];
            const STATE: &'static [&'static str] = &[$(stringify!($s)),*];
            const WEIGHTS: &'static [&'static str] = &[$(stringify!($w)),*];
            const CARRY: &'static [&'static str] = &[$($(stringify!($c)),*)?];
            const SCOPE: crate::rule::Scope = crate::rule::rule!(@scope $($scope)?);
            const EVALUATES: bool = crate::rule::count!($($ep)?) == 1;
            const BODY: &'static str = stringify!($body);
            const EVALUATE: &'static str = concat!($(stringify!($evaluate))?);

            #[allow(unused_variables, reason = "a rule need not use the step, every hyper-parameter, carry or sums")]
            fn scalars(
                hyper: &[f64],
                $t: f64,
                carry: &mut [f64; crate::rule::CARRY],
                sums: [f64; crate::rule::SUMS],
            ) -> Vec<f64> {
                let &[$($h),*] = hyper else { unreachable!("one number per hyper-parameter") };
                $(let [$($c,)* ..] = *carry;)?
                $(let [$a, $b] = sums;)?
                $(let $k: f64 = $e;)*
                $(let carried = [$($c),*]; carry[..carried.len()].copy_from_slice(&carried);)?
                vec![$($h,)* $($k),*]
            }
        }
    };
    (
        @update $f:ident, $name:ident, ($($h:ident),*), ($($k:ident = $e:expr),* $(,)?), ($($s:ident),* $(,)?),
        $p:ident, $g:ident, $body:block
    ) => {
        impl crate::rule::Update<$f, { crate::rule::count!($($h)* $($k)*) }, { crate::rule::count!($($s)*) }> for $name {
            #[inline(always)]
            #[allow(unused_variables, unused_mut, reason = "a rule need not use every scalar or move every state")]
            #[allow(clippy::assign_op_pattern, clippy::float_cmp, reason = "a body is written as the paper has it")]
            fn update(
                scalars: &[$f; crate::rule::count!($($h)* $($k)*)],
                mut $p: $f,
                $g: $f,
                state: [$f; crate::rule::count!($($s)*)],
            ) -> ($f, [$f; crate::rule::count!($($s)*)]) {
                let [$($h,)* $($k),*] = *scalars;
                let [$(mut $s),*] = state;
                $body
                ($p, [$($s),*])
            }

            #[inline(always)]
            fn tile<const L: usize>(
                scalars: &[$f; crate::rule::count!($($h)* $($k)*)],
                p: &mut [$f; L],
                g: &[$f; L],
                state: [&mut [$f; L]; crate::rule::count!($($s)*)],
                slow: &mut [$f; L],
                finish: impl Fn($f, $f, $f) -> ($f, $f),
            ) {
                // An argument an array: the compiler then knows that no two overlap, and vectorises without copies.
                #[inline(always)]
                #[allow(clippy::too_many_arguments, reason = "one for each array")]
                #[allow(unused_assignments, unused_mut, unused_variables, reason = "a rule need not have state")]
                fn lanes<const L: usize>(
                    scalars: &[$f; crate::rule::count!($($h)* $($k)*)],
                    p: &mut [$f; L],
                    g: &[$f; L],
                    $($s: &mut [$f; L],)*
                    slow: &mut [$f; L],
                    finish: impl Fn($f, $f, $f) -> ($f, $f),
                ) {
                    for lane in 0..L {
                        let (after, state) = <$name as crate::rule::Update<$f, _, _>>::update(
                            scalars, p[lane], g[lane], [$($s[lane]),*]);
                        (p[lane], slow[lane]) = finish(p[lane], after, slow[lane]);
                        let mut k = 0;
                        $($s[lane] = crate::rule::stored_as(stringify!($s), state[k]); k += 1;)*
                    }
                }
                let [$($s),*] = state;
                lanes(scalars, p, g, $($s,)* slow, finish);
            }
        }
    };
    (
        @measure $f:ident, $name:ident, ($($h:ident),*), ($($k:ident = $e:expr),* $(,)?), ($($s:ident),* $(,)?), []
    ) => {
        impl crate::rule::Measure<$f, { crate::rule::count!($($h)* $($k)*) }, { crate::rule::count!($($s)*) }> for $name {
            fn tile(
                _: &[$f; crate::rule::count!($($h)* $($k)*)],
                _: &[$f; crate::rule::LANES],
                _: &[$f; crate::rule::LANES],
                _: [&mut [$f; crate::rule::LANES]; crate::rule::count!($($s)*)],
                _: &mut [[f64; crate::rule::LANES]; crate::rule::SUMS],
            ) {
                unreachable!("its scope is none");
            }
        }
    };
    (
        @measure $f:ident, $name:ident, ($($h:ident),*), ($($k:ident = $e:expr),* $(,)?), ($($s:ident),* $(,)?),
        [($a:ident, $b:ident) $p:ident $g:ident $measure:block]
    ) => {
        impl crate::rule::Measure<$f, { crate::rule::count!($($h)* $($k)*) }, { crate::rule::count!($($s)*) }> for $name {
            #[inline(always)]
            fn tile(
                scalars: &[$f; crate::rule::count!($($h)* $($k)*)],
                p: &[$f; crate::rule::LANES],
                g: &[$f; crate::rule::LANES],
                state: [&mut [$f; crate::rule::LANES]; crate::rule::count!($($s)*)],
                sums: &mut [[f64; crate::rule::LANES]; crate::rule::SUMS],
            ) {
                #[inline(always)]
                #[allow(unused_mut, unused_variables, reason = "a rule need not use every scalar or move every state")]
                #[allow(clippy::assign_op_pattern, clippy::float_cmp, reason = "a body is written as the paper has it")]
                fn element(
                    scalars: &[$f; crate::rule::count!($($h)* $($k)*)],
                    $p: $f,
                    $g: $f,
                    state: [$f; crate::rule::count!($($s)*)],
                ) -> ([$f; crate::rule::count!($($s)*)], [f64; crate::rule::SUMS]) {
                    let [$($h,)* $($k),*] = *scalars;
                    let [$(mut $s),*] = state;
                    let ($a, $b): (f64, f64);
                    $measure
                    ([$($s),*], [$a, $b])
                }
                #[inline(always)]
                #[allow(clippy::too_many_arguments, reason = "one for each array")]
                #[allow(unused_assignments, unused_mut, unused_variables, reason = "a rule need not have state")]
                fn lanes(
                    scalars: &[$f; crate::rule::count!($($h)* $($k)*)],
                    p: &[$f; crate::rule::LANES],
                    g: &[$f; crate::rule::LANES],
                    $($s: &mut [$f; crate::rule::LANES],)*
                    first: &mut [f64; crate::rule::LANES],
                    second: &mut [f64; crate::rule::LANES],
                ) {
                    for lane in 0..crate::rule::LANES {
                        let (state, [a, b]) = element(scalars, p[lane], g[lane], [$($s[lane]),*]);
                        let mut k = 0;
                        $($s[lane] = crate::rule::stored_as(stringify!($s), state[k]); k += 1;)*
                        first[lane] += a;
                        second[lane] += b;
                    }
                }
                let [$($s),*] = state;
                let [first, second] = sums;
                lanes(scalars, p, g, $($s,)* first, second);
            }
        }
    };
    (
        @evaluate $f:ident, $name:ident, ($($h:ident),*), ($($k:ident = $e:expr),* $(,)?), ($($s:ident),* $(,)?),
        [$($p:ident $evaluate:expr)?]
    ) => {
        impl crate::rule::Evaluate<$f, { crate::rule::count!($($h)* $($k)*) }, { crate::rule::count!($($s)*) }> for $name {
            #[inline(always)]
            #[allow(unused_variables, reason = "a rule need not use every scalar and state")]
            #[allow(clippy::float_cmp, reason = "equal is meant")]
            fn evaluate(
                scalars: &[$f; crate::rule::count!($($h)* $($k)*)],
                p: $f,
                state: [$f; crate::rule::count!($($s)*)],
            ) -> $f {
                let [$($h,)* $($k),*] = *scalars;
                let [$($s),*] = state;
                $(let $p = p; let p = $evaluate;)?
                p
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
    /// One.
    const ONE: Self;
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
    /// As `f64`, exactly.
    fn widened(self) -> f64;
}

macro_rules! float {
    ($f:ident) => {
        impl Float for $f {
            const ONE: Self = 1.0;
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
            #[inline(always)]
            #[allow(clippy::useless_conversion, reason = "one text for both")]
            fn widened(self) -> f64 {
                self.into()
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

/// WGSL's `min`; of a number and a NaN in `y`, the NaN.
#[inline(always)]
pub fn min<F: Float>(x: F, y: F) -> F {
    if x < y { x } else { y }
}

/// WGSL's `abs`.
#[inline(always)]
pub fn abs<F: Float>(x: F) -> F {
    x.magnitude()
}

/// WGSL's `sign`: -1, 0 or 1; of a NaN, the NaN.
#[inline(always)]
pub fn sign<F: Float>(x: F) -> F {
    if x > F::default() {
        F::ONE
    } else if x < F::default() {
        -F::ONE
    } else {
        x
    }
}

/// The sign, which is a NaN where `x` is infinite or a NaN: such a gradient is not to pass for one like any other.
#[inline(always)]
pub fn direction<F: Float>(x: F) -> F {
    sign(x) + F::default() * x
}

/// WGSL's `select`: `yes` where `cond` holds, else `no`.
#[inline(always)]
pub fn select<F: Float>(no: F, yes: F, cond: bool) -> F {
    if cond { yes } else { no }
}

/// A share of a sum, which is formed and added up in float64 where there is one.
#[inline(always)]
pub fn wide<F: Float>(x: F) -> f64 {
    x.widened()
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

/// [`stored`], of the state array `name`.
#[inline(always)]
pub fn stored_as<F: Float>(name: &str, x: F) -> F {
    if is_never_negative(name) {
        if x < F::MIN_POSITIVE { F::default() } else { x }
    } else {
        stored(x)
    }
}

/// Whether a state array holds squares or infinity norms: these are named v and u everywhere.
#[must_use]
#[inline(always)]
pub const fn is_never_negative(name: &str) -> bool {
    matches!(name.as_bytes(), [b'u' | b'v', ..])
}

/// `1 - b^t`, the bias correction of an average with decay `b`, without the cancellation. From `libm`, because a
/// platform's own logarithm may differ in the last bit from one processor to the next.
#[must_use]
pub fn complement(b: f64, t: f64) -> f64 {
    -libm::expm1(t * libm::log(b))
}
