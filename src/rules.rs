//! The registry: one line a rule.

use crate::kernel::Kernel;
use crate::rule::Float;

/// A number that every rule is compiled for.
pub trait Compute: Float {
    /// The kernels of all rules.
    fn kernels() -> Vec<Kernel<Self>>;
}

macro_rules! rules {
    ($($module:ident: $($rule:ident),+;)*) => {
        $(pub mod $module;)*

        impl Compute for f32 {
            fn kernels() -> Vec<Kernel<Self>> {
                vec![$($(Kernel::of::<$module::$rule, _, _>()),+),*]
            }
        }

        impl Compute for f64 {
            fn kernels() -> Vec<Kernel<Self>> {
                vec![$($(Kernel::of::<$module::$rule, _, _>()),+),*]
            }
        }
    };
}

rules! {
    sgd: Sgd, SgdMomentum, SgdNesterov;
    adam: Adam, AdamAmsgrad;
    adamw: AdamW, AdamWAmsgrad;
    radam: RAdam;
    nadam: NAdam;
    adamax: Adamax;
    adagrad: Adagrad;
    adadelta: Adadelta;
    rmsprop: RMSprop, RMSpropMomentum, RMSpropCentered, RMSpropCenteredMomentum;
    rprop: Rprop;
    asgd: Asgd;
    adabelief: AdaBelief;
    adan: Adan;
    lamb: Lamb;
    lars: Lars;
    lion: Lion;
    prodigy: Prodigy;
    schedule_free: ScheduleFreeSgd, ScheduleFreeAdamW;
    signum: SignSgd, Signum;
    yogi: Yogi;
}
