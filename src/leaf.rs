//! One array of the user's parameter tree: what was seen of it when the optimizer was built, and what is seen each step.
//!
//! Nothing here touches an array's numbers; that is left to whoever can argue that their memory is there.

use std::fmt;
use std::ops::Range;

use crate::error::{Error, tuple};
use crate::layout::{Layout, order};

/// A number format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary64.
    F64,
}

impl Dtype {
    /// Bytes a number.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::F64 => "float64",
        })
    }
}

/// What an array says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Header<'a> {
    /// The address of its first element.
    pub data: usize,
    /// Its number format.
    pub dtype: Dtype,
    /// Whether it may be written.
    pub writeable: bool,
    /// Elements an axis.
    pub shape: &'a [usize],
    /// Bytes from one element of an axis to the next.
    pub strides: &'a [isize],
}

/// Where an array's numbers are.
#[derive(Clone, Debug)]
pub struct Place {
    /// The address of its first element; 0 before any array was seen.
    pub data: usize,
    strides: Box<[isize]>,
    /// Its elements in the leaf's own order.
    pub layout: Layout,
}

impl Place {
    fn new(header: &Header, order: &[usize]) -> Self {
        let layout = Layout::new(header.shape, header.strides, order, header.dtype.size());
        Self {
            data: header.data,
            strides: header.strides.into(),
            layout,
        }
    }

    fn is(&self, header: &Header) -> bool {
        self.data == header.data && *self.strides == *header.strides
    }

    /// The addresses that the elements lie in.
    #[must_use]
    pub fn span(&self) -> Range<usize> {
        let span = self.layout.span();
        self.data.wrapping_add_signed(span.start)..self.data.wrapping_add_signed(span.end)
    }
}

/// One array of the user's parameter tree.
#[derive(Debug)]
pub struct Leaf {
    /// Its path in the tree, as errors write it: `params["encoder/w"]`.
    pub name: String,
    /// Its number format.
    pub dtype: Dtype,
    /// Elements an axis.
    pub shape: Box<[usize]>,
    /// The order in which its axes are walked.
    pub order: Box<[usize]>,
    /// Where the parameter is.
    pub p: Place,
    /// Where the last gradient was.
    pub g: Place,
    /// Steps in which the rule has moved it.
    pub steps: u64,
}

impl Leaf {
    /// A leaf that no step has moved.
    ///
    /// # Errors
    /// If the array is read-only or overlaps itself.
    pub fn new(name: String, header: &Header) -> Result<Self, Error> {
        let order = order(header.strides).into_boxed_slice();
        let p = Place::new(header, &order);
        if !header.writeable {
            return Err(Error::ReadOnly(name));
        }
        if p.layout.overlaps_itself() {
            return Err(Error::OverlapsItself(name));
        }
        let g = Place {
            data: 0,
            ..p.clone()
        };
        Ok(Self {
            name,
            dtype: header.dtype,
            shape: header.shape.into(),
            order,
            p,
            g,
            steps: 0,
        })
    }

    /// The gradient's path, as errors write it.
    #[must_use]
    pub fn grad_name(&self) -> String {
        self.name.replacen("params", "grads", 1)
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.p.layout.len()
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the parameter is still what the optimizer was built over. Only its bytes may change.
    ///
    /// # Errors
    /// If not, with both.
    pub fn check_param(&self, now: &Header) -> Result<(), Error> {
        if !now.writeable {
            return Err(Error::Changed(
                self.name.clone(),
                "writeable".into(),
                "read-only".into(),
            ));
        }
        if self.p.is(now) && *self.shape == *now.shape && self.dtype == now.dtype {
            return Ok(());
        }
        let was = Header {
            data: self.p.data,
            dtype: self.dtype,
            writeable: true,
            shape: &self.shape,
            strides: &self.p.strides,
        };
        let (was, now) = if *self.shape == *now.shape && self.dtype == now.dtype {
            (describe_place(&was), describe_place(now))
        } else {
            (describe(&was), describe(now))
        };
        Err(Error::Changed(self.name.clone(), was, now))
    }

    /// Takes note of where this step's gradient is. Returns the leaves that it may share memory with: those that `spans`
    /// finds, unless the last gradient was at the very same place.
    ///
    /// # Errors
    /// If the gradient is of another shape or number format.
    pub fn see_grad(&mut self, now: &Header, spans: &Spans) -> Result<Vec<Option<usize>>, Error> {
        if *self.shape != *now.shape {
            return Err(Error::Shape(
                self.grad_name(),
                now.shape.to_vec(),
                self.shape.to_vec(),
            ));
        }
        if self.dtype != now.dtype {
            return Err(Error::GradDtype(
                self.grad_name(),
                now.dtype.to_string(),
                self.dtype.to_string(),
            ));
        }
        if self.g.is(now) {
            return Ok(Vec::new());
        }
        if *self.g.strides == *now.strides {
            self.g.data = now.data;
        } else {
            self.g = Place::new(now, &self.order);
        }
        Ok(spans.touching(&self.g.span()))
    }

    /// Forgets where the last gradient was, so that the next one is checked in full; returns where.
    pub fn forget_grad(&mut self) -> usize {
        std::mem::take(&mut self.g.data)
    }
}

fn describe(header: &Header) -> String {
    format!("{} of shape {}", header.dtype, tuple(header.shape))
}

fn describe_place(header: &Header) -> String {
    format!("at {:#x} with strides {:?}", header.data, header.strides)
}

/// The address ranges that a gradient must stay out of.
#[derive(Debug, Default)]
pub struct Spans {
    /// By start: a range, whose it is, and how far this and all earlier ranges reach.
    ranges: Vec<(Range<usize>, Option<usize>, usize)>,
}

impl Spans {
    /// Ranges with the leaf whose they are; `None` for our own arrays.
    #[must_use]
    pub fn new(ranges: impl IntoIterator<Item = (Range<usize>, Option<usize>)>) -> Self {
        let mut ranges: Vec<_> = ranges
            .into_iter()
            .filter(|(range, _)| !range.is_empty())
            .map(|(range, whose)| (range, whose, 0))
            .collect();
        ranges.sort_by_key(|(range, ..)| range.start);
        let mut reach = 0;
        for (range, _, so_far) in &mut ranges {
            reach = reach.max(range.end);
            *so_far = reach;
        }
        Self { ranges }
    }

    /// Whose ranges meet `range`.
    #[must_use]
    pub fn touching(&self, range: &Range<usize>) -> Vec<Option<usize>> {
        let before = self
            .ranges
            .partition_point(|(other, ..)| other.start < range.end);
        let near = self.ranges[..before]
            .iter()
            .rev()
            .take_while(|(.., reach)| *reach > range.start);
        near.filter(|(other, ..)| other.end > range.start && !range.is_empty())
            .map(|&(_, whose, _)| whose)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touching_finds_every_range_that_meets() {
        let ranges = [10..20, 0..100, 30..40, 40..50, 45..46, 200..200];
        let spans = Spans::new(ranges.iter().cloned().zip((0..).map(Some)));
        for start in 0..210 {
            for end in start..210 {
                let mut found = spans.touching(&(start..end));
                found.sort_unstable();
                let meets = |r: &Range<usize>| {
                    r.start < end && start < r.end && start < end && !r.is_empty()
                };
                let all: Vec<_> = (0..)
                    .zip(&ranges)
                    .filter(|(_, r)| meets(r))
                    .map(|(i, _)| Some(i))
                    .collect();
                assert_eq!(found, all, "{start}..{end}");
            }
        }
    }
}
