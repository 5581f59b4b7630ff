//! One array of the user's parameter tree: what was seen of it when the optimizer was built, and what is seen each step.
//!
//! Nothing here touches an array's numbers; that is left to whoever can argue that their memory is there.

use std::ops::Range;

use crate::element::Dtype;
use crate::error::{Error, tuple};
use crate::layout::{Layout, order};
use crate::rule::CARRY;

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

    /// Where an array of any elements of `item` bytes has them: in the leaf's order where it has the leaf's shape.
    #[must_use]
    pub fn raw(leaf: &Leaf, data: usize, shape: &[usize], strides: &[isize], item: usize) -> Self {
        let counting: Vec<usize> = (0..shape.len()).collect();
        let order = if *shape == *leaf.shape {
            &leaf.order
        } else {
            &*counting
        };
        Self {
            data,
            strides: strides.into(),
            layout: Layout::new(shape, strides, order, item),
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
    /// The number format of the last gradient.
    pub g_dtype: Dtype,
    /// Steps in which the rule has moved it, since its state was reset.
    pub steps: u64,
    /// What the rule carries to the next of them.
    pub carry: [f64; CARRY],
    /// Which of the groups it is in.
    pub group: usize,
    /// Where its rows begin, in bytes from the first leaf's.
    pub at: usize,
    /// What tells its random numbers from other leaves'.
    pub key: u32,
    /// Its elements' numbers in the order of its axes, where it is not walked in that order.
    pub logical: Option<Layout>,
}

impl Leaf {
    /// A leaf that no step has moved. Its axes are walked as they are counted where that is asked for, and else so that
    /// its elements are found in the longest runs.
    ///
    /// # Errors
    /// If the array is read-only or overlaps itself.
    pub fn new(name: String, group: usize, header: &Header, counting: bool) -> Result<Self, Error> {
        let order = if counting {
            (0..header.shape.len()).collect()
        } else {
            order(header.strides).into_boxed_slice()
        };
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
            p,
            g,
            g_dtype: header.dtype,
            steps: 0,
            carry: [0.0; CARRY],
            group,
            at: 0,
            key: 0,
            logical: logical(header.shape, &order),
            order,
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
        if self.dtype.compute() != now.dtype.compute() {
            return Err(Error::GradDtype(
                self.grad_name(),
                now.dtype.to_string(),
                self.dtype.to_string(),
            ));
        }
        if self.g.is(now) && self.g_dtype == now.dtype {
            return Ok(Vec::new());
        }
        if *self.g.strides == *now.strides && self.g_dtype == now.dtype {
            self.g.data = now.data;
        } else {
            self.g = Place::new(now, &self.order);
            self.g_dtype = now.dtype;
        }
        Ok(spans.touching(&self.g.span()))
    }

    /// Forgets where the last gradient was, so that the next one is checked in full; returns where.
    pub fn forget_grad(&mut self) -> usize {
        std::mem::take(&mut self.g.data)
    }
}

/// Numbers of the elements of an array of `shape`, walked along the axes in `order`; none where that is counting.
fn logical(shape: &[usize], order: &[usize]) -> Option<Layout> {
    if order.is_sorted() {
        return None;
    }
    let mut strides = vec![1_isize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].wrapping_mul(shape[axis].cast_signed());
    }
    Some(Layout::new(shape, &strides, order, 1))
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
