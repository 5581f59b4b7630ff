//! One array of the user's parameter tree: what was seen of it when the optimizer was built, and what is seen each step.
//!
//! Nothing here touches an array's numbers; that is left to whoever can argue that their memory is there.

use std::ops::Range;
use std::sync::Arc;

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

/// How an array lies in memory, wherever that is; leaves that lie alike share it.
#[derive(Debug, PartialEq, Eq)]
pub struct Form {
    /// The number format.
    pub dtype: Dtype,
    /// Elements an axis.
    pub shape: Box<[usize]>,
    strides: Box<[isize]>,
    /// The order in which axes are walked.
    pub order: Box<[usize]>,
    /// The elements in that order.
    pub layout: Layout,
    /// The elements' numbers in the order of axes, where they are not walked in that order.
    pub logical: Option<Layout>,
    /// Elements.
    pub len: usize,
    /// Whether they follow one another in memory.
    pub is_contiguous: bool,
}

impl Form {
    fn new(header: &Header, order: &[usize], item: usize) -> Self {
        let layout = Layout::new(header.shape, header.strides, order, item);
        Self {
            dtype: header.dtype,
            shape: header.shape.into(),
            strides: header.strides.into(),
            logical: logical(header.shape, order),
            order: order.into(),
            len: layout.len(),
            is_contiguous: layout.is_contiguous(),
            layout,
        }
    }

    /// Whether an array lies in memory like this.
    #[inline]
    fn is(&self, header: &Header) -> bool {
        self.dtype == header.dtype
            && are_same(&self.shape, header.shape)
            && are_same(&self.strides, header.strides)
    }

    /// The form of a parameter. Its axes are walked as they are counted where that is asked for, and else so that its
    /// elements are found in the longest runs.
    fn of_param(header: &Header, counting: bool) -> Self {
        let order = if counting {
            (0..header.shape.len()).collect()
        } else {
            order(header.strides)
        };
        Self::new(header, &order, header.dtype.size())
    }
}

/// Whether two short lists are one; a loop, because a call takes longer.
#[inline]
fn are_same<T: PartialEq>(a: &[T], b: &[T]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b)
}

/// Where an array's numbers are.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The address of its first element.
    pub data: usize,
    /// Its elements in the leaf's own order.
    pub layout: &'a Layout,
    /// Whether they follow one another in memory.
    pub is_contiguous: bool,
}

impl<'a> Place<'a> {
    fn new(data: usize, form: &'a Form) -> Self {
        Self {
            data,
            layout: &form.layout,
            is_contiguous: form.is_contiguous,
        }
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
    /// How the parameter lies in memory.
    pub form: Arc<Form>,
    /// The address of its first element.
    data: usize,
    /// The same of the last gradient, 0 before there was one.
    g_data: usize,
    /// How the last gradient lay, where that was not as the parameter does.
    g_form: Option<Arc<Form>>,
    /// Steps in which the rule has moved it, since its state was reset.
    pub steps: u64,
    /// What the rule carries to the next of them, where that is anything.
    carry: Option<Box<[f64; CARRY]>>,
    /// Where its rows begin, in bytes from the first leaf's.
    pub at: usize,
    /// Which of the groups it is in.
    group: u32,
    /// What tells its random numbers from other leaves'.
    pub key: u32,
}

impl Leaf {
    /// A leaf that no step has moved, which lies as `like` does if it can.
    #[must_use]
    pub fn new(group: usize, header: &Header, counting: bool, like: Option<&Arc<Form>>) -> Self {
        let form = match like {
            Some(form) if form.is(header) => form.clone(),
            _ => Arc::new(Form::of_param(header, counting)),
        };
        Self {
            form,
            data: header.data,
            g_data: 0,
            g_form: None,
            steps: 0,
            carry: None,
            at: 0,
            group: narrow(group),
            key: 0,
        }
    }

    /// Which of the groups it is in.
    #[must_use]
    #[inline]
    pub fn group(&self) -> usize {
        self.group as usize
    }

    /// Puts it into another group.
    pub fn set_group(&mut self, group: usize) {
        self.group = narrow(group);
    }

    /// The number format of the parameter.
    #[must_use]
    #[inline]
    pub fn dtype(&self) -> Dtype {
        self.form.dtype
    }

    /// Elements.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.form.len
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the parameter is.
    #[must_use]
    #[inline]
    pub fn p(&self) -> Place<'_> {
        Place::new(self.data, &self.form)
    }

    /// Where the last gradient was.
    #[must_use]
    #[inline]
    pub fn g(&self) -> Place<'_> {
        Place::new(self.g_data, self.g_form())
    }

    #[inline]
    fn g_form(&self) -> &Form {
        self.g_form.as_ref().unwrap_or(&self.form)
    }

    /// The number format of the last gradient.
    #[must_use]
    #[inline]
    pub fn g_dtype(&self) -> Dtype {
        self.g_form().dtype
    }

    /// What the rule carries to its next step.
    #[must_use]
    #[inline]
    pub fn carry(&self) -> [f64; CARRY] {
        self.carry.as_deref().copied().unwrap_or_default()
    }

    /// Takes note of what the rule carries to its next step.
    pub fn set_carry(&mut self, carry: [f64; CARRY]) {
        let is_any = carry.iter().any(|&x| x != 0.0);
        self.carry = is_any.then(|| Box::new(carry));
    }

    /// How an array of any elements of `item` bytes lies: in the leaf's order where it has the leaf's shape.
    #[must_use]
    pub fn layout_of(&self, shape: &[usize], strides: &[isize], item: usize) -> Layout {
        let counting: Vec<usize> = (0..shape.len()).collect();
        let order = if *shape == *self.form.shape {
            &self.form.order
        } else {
            &*counting
        };
        Layout::new(shape, strides, order, item)
    }

    /// Whether the parameter is still what the optimizer was built over. Only its bytes may change.
    #[must_use]
    #[inline]
    pub fn is(&self, now: &Header) -> bool {
        self.data == now.data && now.writeable && self.form.is(now)
    }

    /// Why it is not: what is called `name` was one thing, and is another.
    #[must_use]
    pub fn changed(&self, name: String, now: &Header) -> Error {
        if !now.writeable {
            return Error::Changed(name, "writeable".into(), "read-only".into());
        }
        let form = &self.form;
        let (was, now) = if *form.shape == *now.shape && form.dtype == now.dtype {
            let at = |data, strides| format!("at {data:#x} with strides {strides:?}");
            (at(self.data, &*form.strides), at(now.data, now.strides))
        } else {
            let of = |dtype, shape| format!("{dtype} of shape {}", tuple(shape));
            (of(form.dtype, &form.shape), of(now.dtype, now.shape))
        };
        Error::Changed(name, was, now)
    }

    /// Whether this step's gradient is where the last one was, and lies like it.
    #[must_use]
    #[inline]
    pub fn has_seen(&self, now: &Header) -> bool {
        self.g_data == now.data && self.g_form().is(now)
    }

    /// Takes note of where this step's gradient is. Returns the leaves that it may share memory with: those that `spans`
    /// finds.
    ///
    /// # Errors
    /// If the gradient, which is called `name`, is of another shape or number format.
    pub fn see_grad(
        &mut self,
        name: impl Fn() -> String,
        now: &Header,
        spans: &Spans,
    ) -> Result<Vec<Option<usize>>, Error> {
        let form = &self.form;
        if *form.shape != *now.shape {
            return Err(Error::Shape(
                name(),
                now.shape.to_vec(),
                form.shape.to_vec(),
            ));
        }
        if form.dtype.compute() != now.dtype.compute() {
            return Err(Error::GradDtype(
                name(),
                now.dtype.to_string(),
                form.dtype.to_string(),
            ));
        }
        if form.is(now) {
            self.g_form = None;
        } else if !self.g_form().is(now) {
            let order = &form.order;
            self.g_form = Some(Arc::new(Form::new(now, order, now.dtype.size())));
        }
        self.g_data = now.data;
        Ok(spans.touching(&self.g().span()))
    }

    /// Sets where the last gradient was, and returns where that was before. At 0 the next one is checked in full.
    pub fn set_grad(&mut self, data: usize) -> usize {
        std::mem::replace(&mut self.g_data, data)
    }
}

/// The names of leaves, as errors write them, `params["encoder/w"]`; one text, because there may be very many.
#[derive(Debug, Default)]
pub struct Names {
    text: String,
    ends: Vec<u32>,
}

impl Names {
    /// Adds the next leaf's.
    pub fn push(&mut self, name: &str) {
        self.text.push_str(name);
        self.ends.push(narrow(self.text.len()));
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> u32 {
        narrow(self.ends.len())
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// A leaf's name.
    #[must_use]
    pub fn get(&self, leaf: usize) -> &str {
        let start = leaf.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.text[start as usize..self.ends[leaf] as usize]
    }

    /// Its gradient's.
    #[must_use]
    pub fn of_grad(&self, leaf: usize) -> String {
        self.get(leaf).replacen("params", "grads", 1)
    }
}

/// A number of leaves or groups, or of bytes of all their names: 4 GiB of those are more than anybody has.
fn narrow(count: usize) -> u32 {
    u32::try_from(count).expect("fewer than 2^32")
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

/// The address ranges that a gradient must stay out of.
#[derive(Debug, Default)]
pub struct Spans {
    ranges: Vec<Span>,
}

/// One of them.
#[derive(Debug)]
struct Span {
    start: usize,
    end: usize,
    /// How far this and all earlier ranges reach.
    reach: usize,
    /// Whose it is; [`OURS`] for our own arrays.
    whose: u32,
}

const OURS: u32 = u32::MAX;

impl Spans {
    /// Ranges with the leaf whose they are; `None` for our own arrays.
    #[must_use]
    pub fn new(ranges: impl IntoIterator<Item = (Range<usize>, Option<usize>)>) -> Self {
        let mut ranges: Vec<_> = ranges
            .into_iter()
            .filter(|(range, _)| !range.is_empty())
            .map(|(range, whose)| Span {
                start: range.start,
                end: range.end,
                reach: 0,
                whose: whose.map_or(OURS, narrow),
            })
            .collect();
        ranges.shrink_to_fit();
        ranges.sort_unstable_by_key(|range| (range.start, range.whose));
        let mut reach = 0;
        for range in &mut ranges {
            reach = reach.max(range.end);
            range.reach = reach;
        }
        Self { ranges }
    }

    /// Whose ranges meet `range`.
    #[must_use]
    pub fn touching(&self, range: &Range<usize>) -> Vec<Option<usize>> {
        let before = self.ranges.partition_point(|other| other.start < range.end);
        let near = self.ranges[..before]
            .iter()
            .rev()
            .take_while(|other| other.reach > range.start);
        near.filter(|other| other.end > range.start && !range.is_empty())
            .map(|other| (other.whose != OURS).then_some(other.whose as usize))
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
