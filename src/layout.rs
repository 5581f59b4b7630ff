//! Where a strided array keeps its numbers.
//!
//! A leaf's elements are numbered in an order of its own: axes by falling stride, so that any transposed contiguous
//! array is one run. Gradients are walked in the parameter's order, so elements pair by index and never by memory.

use std::ops::Range;

/// Byte offsets of the elements of an array, in a given order of axes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Axes from the outermost to the innermost, as (size, byte stride); neighbours that are one run are merged.
    axes: Vec<(usize, isize)>,
    item: usize,
}

/// The order of axes in which an array with these strides is walked with the longest runs.
#[must_use]
pub fn order(strides: &[isize]) -> Vec<usize> {
    let mut axes: Vec<usize> = (0..strides.len()).collect();
    axes.sort_by_key(|&axis| std::cmp::Reverse(strides[axis].unsigned_abs()));
    axes
}

impl Layout {
    /// The layout of an array of `item`-byte numbers, its axes walked in `order`.
    #[must_use]
    pub fn new(shape: &[usize], strides: &[isize], order: &[usize], item: usize) -> Self {
        let mut axes: Vec<(usize, isize)> = Vec::new();
        for (size, stride) in order
            .iter()
            .map(|&axis| (shape[axis], strides[axis]))
            .filter(|&(size, _)| size != 1)
        {
            match axes.last_mut() {
                Some(outer) if outer.1 == stride.wrapping_mul(size.cast_signed()) => {
                    *outer = (outer.0 * size, stride);
                }
                _ => axes.push((size, stride)),
            }
        }
        Self { axes, item }
    }

    /// How many elements there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.axes.iter().map(|&(size, _)| size).product()
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the elements follow one another in memory.
    #[must_use]
    pub fn is_contiguous(&self) -> bool {
        match self.axes[..] {
            [] => true,
            [(_, stride)] => stride == self.item.cast_signed(),
            _ => self.is_empty(),
        }
    }

    /// The bytes that the elements lie in, relative to the first element's.
    #[must_use]
    pub fn span(&self) -> Range<isize> {
        if self.is_empty() {
            return 0..0;
        }
        // Saturating, because an array may claim strides that no memory has; a gradient or leaf that does, meets all others.
        let reach = |keep: fn(&isize) -> bool| {
            let end =
                |&(size, stride): &(usize, isize)| stride.saturating_mul(size.cast_signed() - 1);
            self.axes
                .iter()
                .map(end)
                .filter(keep)
                .fold(0, isize::saturating_add)
        };
        reach(|end| *end < 0)..reach(|end| *end > 0).saturating_add(self.item.cast_signed())
    }

    /// Whether two elements share a byte.
    #[must_use]
    pub fn overlaps_itself(&self) -> bool {
        let span = self.span();
        if self.len().saturating_mul(self.item) > span.end.abs_diff(span.start) {
            return true; // More bytes than there is room for.
        }
        let mut axes = self.axes.clone();
        axes.sort_by_key(|&(_, stride)| stride.unsigned_abs());
        let mut inner = self.item;
        let nested = axes.iter().all(|&(size, stride)| {
            let fits = stride.unsigned_abs() >= inner;
            inner = inner.saturating_add(stride.unsigned_abs().saturating_mul(size.max(1) - 1));
            fits
        });
        // Axes that do not nest may still interleave without touching; such layouts are rare enough to be counted out.
        !nested && !self.is_empty() && {
            let mut offsets = Vec::with_capacity(self.len());
            self.visit(0..self.len(), |offset| offsets.push(offset));
            offsets.sort_unstable();
            offsets
                .windows(2)
                .any(|pair| pair[1].abs_diff(pair[0]) < self.item)
        }
    }

    /// Calls `visit` with the byte offset of each element of `range`, in order.
    #[inline]
    pub fn visit(&self, range: Range<usize>, mut visit: impl FnMut(isize)) {
        let Some((&(inner, stride), outer)) = self.axes.split_last() else {
            return range.for_each(|_| visit(0));
        };
        let mut at = range.start;
        while at < range.end {
            let (mut row, column) = (at / inner, at % inner);
            let mut offset = column.cast_signed() * stride;
            for &(size, stride) in outer.iter().rev() {
                offset += (row % size).cast_signed() * stride;
                row /= size;
            }
            let run = (inner - column).min(range.end - at);
            for _ in 0..run {
                visit(offset);
                offset += stride;
            }
            at += run;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn c_order(shape: &[usize], strides: &[isize]) -> Layout {
        Layout::new(shape, strides, &(0..shape.len()).collect::<Vec<_>>(), 4)
    }

    fn offsets(layout: &Layout, range: Range<usize>) -> Vec<isize> {
        let mut all = Vec::new();
        layout.visit(range, |offset| all.push(offset));
        all
    }

    #[test]
    fn a_transposed_array_is_one_run_in_its_own_order() {
        let strides = [4, 8, 24];
        assert!(!c_order(&[2, 3, 5], &strides).is_contiguous());
        assert!(Layout::new(&[2, 3, 5], &strides, &order(&strides), 4).is_contiguous());
    }

    #[test]
    fn any_range_visits_the_elements_that_the_whole_visit_does() {
        let layout = c_order(&[3, 2, 5], &[-80, 4, 16]);
        let all = offsets(&layout, 0..30);
        assert_eq!(all[..7], [0, 16, 32, 48, 64, 4, 20]);
        assert_eq!(all[10], -80);
        for start in 0..30 {
            for end in start..=30 {
                assert_eq!(offsets(&layout, start..end), all[start..end]);
            }
        }
        assert_eq!(layout.span(), -160..4 + 64 + 4);
    }

    #[test]
    fn layouts_overlap_themselves_where_two_elements_share_a_byte() {
        for (shape, strides, overlaps) in [
            (&[3][..], &[0][..], true),
            (&[1 << 60], &[0], true),
            (&[1 << 40, 2], &[4, 4], true),
            (&[3], &[2], true),
            (&[3], &[-4], false),
            (&[2, 2], &[4, 4], true),
            (&[2, 2], &[8, 12], false),
            (&[2, 3], &[8, 12], false),
            (&[3, 3], &[8, 12], false),
            (&[4, 3], &[8, 12], true),
            (&[1, 3], &[0, 4], false),
            (&[0, 3], &[0, 0], false),
            (&[], &[], false),
        ] {
            assert_eq!(
                c_order(shape, strides).overlaps_itself(),
                overlaps,
                "{shape:?} {strides:?}"
            );
        }
    }
}
