//! Every way that a call can be refused, in words that name the leaf, what was got and what is needed.

use std::fmt;

/// Why a call was refused; nothing has been written when one of these is returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// Not an array of the kind that we step: the leaf, and what it is.
    NotAnArray(String, String),
    /// An array subclass whose arithmetic is not an array's: the leaf, and its type.
    Subclass(String, String),
    /// An unsupported number format: the leaf, and its dtype.
    Dtype(String, String),
    /// A supported number format in the other byte order: the leaf, and its dtype.
    ByteSwapped(String, String),
    /// A gradient in another number format than its parameter: the gradient, its dtype, and the parameter's.
    GradDtype(String, String, String),
    /// A gradient of another shape than its parameter: the gradient, its shape, and the parameter's.
    Shape(String, Vec<usize>, Vec<usize>),
    /// More or fewer gradients than parameters.
    Count(usize, usize),
    /// A parameter that may not be written.
    ReadOnly(String),
    /// A parameter two of whose elements are one number in memory.
    OverlapsItself(String),
    /// Two arrays of which a step would write one while it reads the other.
    SharesMemory(String, String),
    /// A parameter that is no longer what the optimizer was built over: the leaf, what it was, and what it is.
    Changed(String, String, String),
    /// A hyper-parameter that is finite in float64 only, for a leaf of float32: its name.
    Overflow(String),
    /// A gradient that is infinite or not a number, where that is refused: the leaf.
    NotFinite(String),
    /// A state that does not fit: what it is of, and what is wrong.
    State(String, String),
    /// Arrays that another thread keeps changing.
    Unsteady,
    /// This thread is inside another call, or the process was forked while one was.
    Busy,
    /// A call that would lose the fast weights.
    InsideSlowWeights,
    /// An exit without an entry.
    OutsideSlowWeights,
    /// A defect of ours.
    Internal,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAnArray(leaf, got) => {
                let hint = match got.as_str() {
                    "Parameter" | "Tensor" => ": for tensors of torch, use lookstep.torch.Optimizer",
                    _ => "",
                };
                write!(f, "{leaf} must be a NumPy array, got {got}{hint}")
            }
            Self::Subclass(leaf, got) => write!(f, "{leaf} is a {got}: pass np.asarray(x)"),
            Self::Dtype(leaf, got) => write!(f, "{leaf} has dtype {got}; supported: float16, bfloat16, float32, float64"),
            Self::ByteSwapped(leaf, got) => {
                write!(f, "{leaf} is byte-swapped ({got}): pass x.astype(x.dtype.newbyteorder('='))")
            }
            Self::GradDtype(leaf, got, need) => {
                let cast = if need == "float64" { "float64" } else { "float32" };
                write!(f, "{leaf} has dtype {got} but its parameter has {need}: pass g.astype(np.{cast})")
            }
            Self::Shape(leaf, got, need) => write!(
                f,
                "{leaf} has shape {} but its parameter has {}; gradients are not broadcast",
                tuple(got),
                tuple(need)
            ),
            Self::Count(got, need) => write!(f, "grads has {got} leaves but params has {need}"),
            Self::ReadOnly(leaf) => write!(f, "{leaf} is read-only: pass a writeable array, such as x.copy()"),
            Self::OverlapsItself(leaf) => {
                write!(f, "{leaf} overlaps itself: several of its elements are one number in memory; pass x.copy()")
            }
            Self::SharesMemory(leaf, other) => write!(f, "{leaf} shares memory with {other}: pass a copy of one of them"),
            Self::Changed(leaf, was, now) => write!(
                f,
                "{leaf} was {was} when the optimizer was built, and is {now} now: build a new optimizer over the new array"
            ),
            Self::Overflow(name) => write!(
                f,
                "{name} is too large for float32 parameters: a step would overflow"
            ),
            Self::NotFinite(leaf) => write!(f, "{leaf} is not finite: it holds an infinity or a NaN"),
            Self::State(of, what) => write!(f, "{of} {what}"),
            Self::Unsteady => f.write_str("params or grads changed while they were checked"),
            Self::Busy => f.write_str("this optimizer is in the middle of another call"),
            Self::InsideSlowWeights => {
                f.write_str("params hold the slow weights: leave slow_weights() first, so that the fast ones come back")
            }
            Self::OutsideSlowWeights => f.write_str("params hold the fast weights: slow_weights() was not entered"),
            Self::Internal => f.write_str("internal error: this optimizer stopped in the middle of a step"),
        }
    }
}

impl std::error::Error for Error {}

/// A shape as Python writes it.
#[must_use]
pub fn tuple(shape: &[usize]) -> String {
    match shape {
        [n] => format!("({n},)"),
        _ => format!(
            "({})",
            shape
                .iter()
                .map(usize::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        ),
    }
}
