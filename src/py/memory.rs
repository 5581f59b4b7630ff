//! From addresses to numbers: a leaf's elements, its gradient's and its rows are lent a piece at a time, as slices of the
//! number that the rule computes in; through a copy in the cache where they are stored otherwise.

use std::mem::take;
use std::ops::Range;
use std::ptr::with_exposed_provenance_mut;

use numpy::PyArray1;
use numpy::prelude::*;
use pyo3::prelude::*;
use pyo3::types::PyWeakrefReference;

use crate::array::{Array, Stored};
use crate::codec::{self, Codec, Numbers, Rounding, keep_8, keep_bf16, mix, read_8, read_bf16};
use crate::element::{Dtype, Element, adopt};
use crate::gradient::{Factor, Means, Prepare};
use crate::kernel::{Gradient, Kept, LINE, MAX_STATE};
use crate::leaf::{Leaf, Place};
use crate::simd::Level;
use crate::step::Raw;

use super::group::{Fewer, Group, Number, Row};

/// Elements that are copied at a time; they stay in the first-level cache.
const BLOCK: usize = 2048;
/// Elements of arrays that are read or written several times; they stay in the second-level cache.
pub const SEVERAL: usize = 4096;
const _: () = assert!(BLOCK.is_multiple_of(codec::BLOCK));

/// All rows of all leaves, in one array of NumPy's.
pub struct Arena {
    pub array: Py<PyArray1<u8>>,
    /// Where that is, as long as the weak reference keeps it from being resized.
    pub span: Range<usize>,
    _guard: Py<PyWeakrefReference>,
}

impl Arena {
    /// Zeroes.
    pub fn new(py: Python<'_>, bytes: usize) -> PyResult<Self> {
        // By NumPy's own function: it says where memory is short, and takes large pages where there are some.
        let zeros = py
            .import("numpy")?
            .call_method1("zeros", (bytes + LINE, "uint8"))?;
        zeros.call_method1("setflags", (false,))?;
        let array = zeros.cast_into::<PyArray1<u8>>()?;
        let data = array.data().expose_provenance();
        Ok(Self {
            span: data..data + array.len(),
            _guard: PyWeakrefReference::new(&array)?.unbind(),
            array: array.unbind(),
        })
    }

    /// Whether the array is where it was made.
    pub fn is_whole(&self, py: Python<'_>) -> bool {
        let array = self.array.bind(py);
        self.span.start == array.data().addr() && self.span.len() == array.len()
    }

    /// How many bytes into the array the first row is.
    pub fn skipped(&self) -> usize {
        self.span.start.next_multiple_of(LINE) - self.span.start
    }

    /// The address of a byte of a row.
    fn address(&self, byte: usize) -> usize {
        self.span.start + self.skipped() + byte
    }

    /// Lends `n` numbers, the first of which is number `start` of a row that begins at `byte`.
    ///
    /// # Safety
    /// The row must have them, in that format, and nobody else may read or write them while they are lent.
    #[allow(clippy::mut_from_ref, reason = "as argued above")]
    unsafe fn lend<'a, T>(&self, byte: usize, start: usize, n: usize) -> &'a mut [T] {
        let first = with_exposed_provenance_mut::<T>(self.address(byte)).wrapping_add(start);
        // SAFETY: as the caller vouches; rows are aligned to lines.
        unsafe { std::slice::from_raw_parts_mut(first, n) }
    }

    /// Lends the 8-bit codes of `n` numbers, the first of which is number `start` of a row, and the scales of their blocks.
    ///
    /// # Safety
    /// As [`Self::lend`].
    #[allow(clippy::mut_from_ref, reason = "as argued above")]
    unsafe fn lend_blocks<'a>(
        &self,
        row: Row,
        start: usize,
        n: usize,
    ) -> (&'a mut [u8], &'a mut [f32]) {
        let (first, blocks) = (start / codec::BLOCK, n.div_ceil(codec::BLOCK));
        // SAFETY: as the caller vouches.
        unsafe {
            (
                self.lend(row.codes, start, n),
                self.lend(row.scales, first, blocks),
            )
        }
    }
}

impl Place<'_> {
    /// Whether the elements can be lent as a slice of `T`, if that is what they are.
    fn is_slice<T>(&self) -> bool {
        self.is_contiguous && self.data.is_multiple_of(align_of::<T>())
    }

    /// Lends elements.
    ///
    /// # Safety
    /// The place must be such a slice, of live elements of type `T`, which nobody else reads or writes while they are lent;
    /// or nobody writes, where they are only read.
    #[allow(clippy::mut_from_ref, reason = "as argued above")]
    unsafe fn lend<'a, T>(&self, range: &Range<usize>) -> &'a mut [T] {
        let first = with_exposed_provenance_mut::<T>(self.data).wrapping_add(range.start);
        // SAFETY: as the caller vouches.
        unsafe { std::slice::from_raw_parts_mut(first, range.len()) }
    }

    /// Copies elements out.
    ///
    /// # Panics
    /// If `into` is shorter than the range.
    ///
    /// # Safety
    /// The place must hold live elements of type `T` that nobody writes meanwhile.
    pub unsafe fn gather<T: Copy>(&self, range: Range<usize>, into: &mut [T]) {
        if self.is_contiguous {
            let first = self.data + range.start * size_of::<T>();
            let first = with_exposed_provenance_mut::<u8>(first);
            let into = into[..range.len()].as_mut_ptr().cast::<u8>();
            // SAFETY: as the caller vouches; bytes have no alignment, and `into` is borrowed mutably, so it is elsewhere.
            unsafe { into.copy_from_nonoverlapping(first, range.len() * size_of::<T>()) };
            return;
        }
        let mut into = into.iter_mut();
        self.layout.visit(range, |offset| {
            let at = with_exposed_provenance_mut::<T>(self.data.wrapping_add_signed(offset));
            // SAFETY: as the caller vouches; the layout's offsets lie in the array, aligned or not.
            *into.next().expect("an element per offset") = unsafe { at.read_unaligned() };
        });
    }

    /// Copies elements in.
    ///
    /// # Panics
    /// If `from` is shorter than the range.
    ///
    /// # Safety
    /// The place must hold live elements of type `T` that nobody else reads or writes meanwhile.
    pub unsafe fn scatter<T: Copy>(&self, range: Range<usize>, from: &[T]) {
        if self.is_contiguous {
            let first = self.data + range.start * size_of::<T>();
            let first = with_exposed_provenance_mut::<u8>(first);
            let from = from[..range.len()].as_ptr().cast::<u8>();
            // SAFETY: as the caller vouches; bytes have no alignment, and nobody else reads the place, so it is elsewhere.
            unsafe { first.copy_from_nonoverlapping(from, range.len() * size_of::<T>()) };
            return;
        }
        let mut from = from.iter();
        self.layout.visit(range, |offset| {
            let at = with_exposed_provenance_mut::<T>(self.data.wrapping_add_signed(offset));
            // SAFETY: as the caller vouches; the layout's offsets lie in the array, aligned or not.
            unsafe { at.write_unaligned(*from.next().expect("an element per offset")) };
        });
    }

    /// Copies elements of format `dtype` out, as numbers that are computed with.
    ///
    /// # Safety
    /// As [`Place::gather`].
    unsafe fn load<F: Element>(&self, dtype: Dtype, range: Range<usize>, into: &mut [F]) {
        if dtype == F::DTYPE {
            // SAFETY: as the caller vouches.
            unsafe { self.gather(range, into) };
        } else {
            let mut bits = [0_u16; BLOCK];
            let bits = &mut bits[..into.len()];
            // SAFETY: as the caller vouches.
            unsafe { self.gather(range, bits) };
            F::widen(Level::best(), dtype, bits, into);
        }
    }

    /// Copies numbers in, rounded to format `dtype`.
    ///
    /// # Safety
    /// As [`Place::scatter`].
    unsafe fn store<F: Element>(&self, dtype: Dtype, range: Range<usize>, from: &[F]) {
        if dtype == F::DTYPE {
            // SAFETY: as the caller vouches.
            unsafe { self.scatter(range, from) };
        } else {
            let mut bits = [0_u16; BLOCK];
            let bits = &mut bits[..from.len()];
            F::narrow(Level::best(), dtype, from, bits);
            // SAFETY: as the caller vouches.
            unsafe { self.scatter(range, bits) };
        }
    }
}

/// What a visit does with an array.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Use {
    Nothing,
    Read,
    Write,
    /// Of parameters: reads and writes the weights in full, where parameters are those rounded.
    Master,
    /// Of rows: reads and writes those that are whole; others are left alone, and empty.
    Whole,
}

/// What a visit to a leaf needs.
#[derive(Clone, Copy)]
pub struct Needs<'a> {
    pub p: Use,
    pub rows: Use,
    /// The gradient, and what is done to it before it is lent.
    pub g: Option<Prepared<'a>>,
    /// Elements at a time, where none are copied.
    pub piece: usize,
    /// What may be lent as it is stored.
    pub raw: Raw,
}

/// How a gradient is lent.
#[derive(Clone, Copy)]
pub struct Prepared<'a> {
    pub prepare: Prepare,
    pub means: Option<&'a Means>,
}

/// Where numbers are copied to that cannot be lent where they are; made when the first of them is met.
pub struct Scratch<F> {
    bits: [u16; BLOCK],
    p: [F; BLOCK],
    g: [F; BLOCK],
    state: [[F; BLOCK]; MAX_STATE],
}

impl<F: Element> Scratch<F> {
    fn new() -> Self {
        Self {
            bits: [0; BLOCK],
            p: [F::default(); BLOCK],
            g: [F::default(); BLOCK],
            state: [[F::default(); BLOCK]; MAX_STATE],
        }
    }
}

/// Room for the copies of a piece; empty, where none are made.
struct Copies<'t, F> {
    bits: &'t mut [u16],
    p: &'t mut [F],
    g: &'t mut [F],
    state: [&'t mut [F]; MAX_STATE],
}

impl<'t, F> Copies<'t, F> {
    fn of(scratch: Option<&'t mut Scratch<F>>, len: usize) -> Self {
        match scratch {
            Some(scratch) => Self {
                bits: &mut scratch.bits[..len],
                p: &mut scratch.p[..len],
                g: &mut scratch.g[..len],
                state: scratch.state.each_mut().map(|state| &mut state[..len]),
            },
            None => Self {
                bits: &mut [],
                p: &mut [],
                g: &mut [],
                state: Default::default(),
            },
        }
    }
}

/// Where numbers are lent from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Nowhere,
    /// Their own place, in the numbers that are computed with.
    Whole,
    /// Their own place, in bfloat16.
    Half,
    /// The row of weights in full.
    Master(usize),
    /// A copy.
    Copy,
}

impl Source {
    fn place<F: Element>(place: &Place, dtype: Dtype, raw: bool) -> Self {
        match dtype {
            dtype if dtype == F::DTYPE && place.is_slice::<F>() => Self::Whole,
            Dtype::BF16 if raw && place.is_slice::<u16>() => Self::Half,
            _ => Self::Copy,
        }
    }
}

/// Lends the pieces of a part of a leaf to `each`, in order: elements' numbers, parameters, gradients, rows.
///
/// # Safety
/// The caller must have these elements and their rows in the arena to itself; the places of the leaf, and of its gradient
/// where that is needed, must hold live numbers of their formats, and share none with each other or the arena.
pub unsafe fn visit<F: Number>(
    arena: &Arena,
    group: &Group,
    leaf: &Leaf,
    part: Range<usize>,
    needs: Needs,
    scratch: &mut Option<Box<Scratch<F>>>,
    each: impl FnMut(Range<usize>, Stored<F>, Option<Gradient<F>>, &mut Kept<F>),
) {
    let visit = Visit::new(arena, group, leaf, needs);
    // SAFETY: as the caller vouches.
    unsafe {
        if visit.is_whole() {
            visit.whole(part, each);
        } else {
            visit.any(part, scratch, each);
        }
    }
}

/// A leaf, and where its numbers are lent from.
struct Visit<'a, F> {
    arena: &'a Arena,
    group: &'a Group,
    leaf: &'a Leaf,
    needs: Needs<'a>,
    /// How many rows are the rule's.
    states: usize,
    p: Source,
    g: Source,
    /// What is left to the kernel to do to gradients.
    factor: Option<Factor<F>>,
    /// What rows are in that are not whole, where they are asked for.
    coded: Option<Fewer>,
}

impl<'a, F: Number> Visit<'a, F> {
    #[inline]
    fn new(arena: &'a Arena, group: &'a Group, leaf: &'a Leaf, needs: Needs<'a>) -> Self {
        let master = group.rows.master.filter(|_| leaf.dtype().is_narrow());
        let p = match (needs.p, master) {
            (Use::Nothing, _) => Source::Nowhere,
            (Use::Master, Some(row)) => Source::Master(row),
            _ => Source::place::<F>(&leaf.p(), leaf.dtype(), needs.raw.p),
        };
        let place = |raw| Source::place::<F>(&leaf.g(), leaf.g_dtype(), raw);
        let (g, factor) = match needs.g {
            None => (Source::Nowhere, None),
            Some(Prepared { means: Some(_), .. }) => (Source::Copy, None),
            Some(Prepared { prepare, .. }) if prepare == Prepare::NOTHING => {
                (place(needs.raw.g), None)
            }
            Some(Prepared { prepare, .. }) => match prepare.factor::<F>().filter(|_| needs.raw.g) {
                factor @ Some(_) => match place(true) {
                    Source::Copy => (Source::Copy, None),
                    lent => (lent, factor),
                },
                None => (Source::Copy, None),
            },
        };
        let coded = group
            .fewer
            .filter(|_| F::DTYPE == Dtype::F32 && matches!(needs.rows, Use::Read | Use::Write));
        Self {
            arena,
            group,
            leaf,
            needs,
            states: F::kernel(group).state.len(),
            p,
            g,
            factor,
            coded,
        }
    }

    /// Whether all numbers are lent where they are, as most leaves' are.
    #[inline]
    fn is_whole(&self) -> bool {
        let is_own = |from| matches!(from, Source::Nowhere | Source::Whole);
        let fewer = self.group.fewer.filter(|_| F::DTYPE == Dtype::F32);
        fewer.is_none() && is_own(self.p) && is_own(self.g)
    }

    /// Lends numbers where they are: that is to take no time.
    ///
    /// # Safety
    /// As [`visit`]; all must be whole.
    #[inline]
    unsafe fn whole(
        &self,
        part: Range<usize>,
        mut each: impl FnMut(Range<usize>, Stored<F>, Option<Gradient<F>>, &mut Kept<F>),
    ) {
        let (p_place, g_place) = (self.leaf.p(), self.leaf.g());
        let (first, stride, count) = self.group.whole_rows(self.leaf);
        let count = if self.needs.rows == Use::Nothing {
            0
        } else {
            count
        };
        for range in pieces(part, self.needs.piece) {
            let mut kept = Kept::new(self.states);
            for row in 0..count {
                let byte = first + row * stride;
                // SAFETY: the rows of a leaf are apart, and the caller has them to itself.
                let array = unsafe { self.arena.lend(byte, range.start, range.len()) };
                kept.push(row, Array::Whole(array));
            }
            let mut p = Stored::default();
            if self.p == Source::Whole {
                // SAFETY: the caller vouches for the numbers.
                p = Array::Whole(unsafe { p_place.lend(&range) });
            }
            let g = (self.g == Source::Whole).then(|| {
                // SAFETY: as above; it is only read.
                let array = Array::Whole(&*unsafe { g_place.lend(&range) });
                Gradient {
                    array,
                    factor: self.factor,
                }
            });
            each(range, p, g, &mut kept);
        }
    }

    /// Lends numbers where they are or as copies, which are taken back.
    ///
    /// # Safety
    /// As [`visit`].
    unsafe fn any(
        &self,
        part: Range<usize>,
        scratch: &mut Option<Box<Scratch<F>>>,
        mut each: impl FnMut(Range<usize>, Stored<F>, Option<Gradient<F>>, &mut Kept<F>),
    ) {
        // The kernel makes random bits by the order of memory, which has to be the leaf's.
        let halves = self.needs.raw.state
            && self.coded == Some(Fewer::BFloat16)
            && self.leaf.form.logical.is_none();
        let copies_state = self.coded.is_some() && !halves;
        let copies = copies_state
            || matches!(self.p, Source::Copy | Source::Master(_))
            || self.g == Source::Copy;
        let mut scratch =
            copies.then(|| &mut **scratch.get_or_insert_with(|| Box::new(Scratch::new())));
        let piece = if copies { BLOCK } else { self.needs.piece };
        for range in pieces(part, piece) {
            let mut kept = Kept::new(self.states);
            let mut copy = Copies::of(scratch.as_deref_mut(), range.len());
            // SAFETY: as the caller vouches.
            unsafe {
                self.lend_rows(&range, halves, &mut copy, &mut kept);
                let mut p = self.lend_p(&range, &mut copy, &mut kept);
                let g = self.lend_g(&range, &mut copy);
                each(range.clone(), p.again(), g, &mut kept);
                self.take_p(&range, p, &mut copy);
                if self.needs.rows == Use::Write && copies_state {
                    self.take_rows(&range, &mut kept);
                }
            }
        }
    }

    /// Lends rows; the rule's in bfloat16, where they may be `halves`.
    unsafe fn lend_rows<'t>(
        &self,
        range: &Range<usize>,
        halves: bool,
        copy: &mut Copies<'t, F>,
        kept: &mut Kept<'t, F>,
    ) {
        let (start, len) = (range.start, range.len());
        kept.first = start as u64;
        if self.needs.rows == Use::Nothing {
            return;
        }
        for (index, row) in self.group.rows(self.leaf).enumerate() {
            let array = match row.codec {
                // SAFETY: the rows of a leaf are apart, and the caller has them to itself.
                Codec::Whole => Array::Whole(unsafe { self.arena.lend(row.codes, start, len) }),
                _ if self.coded.is_none() => continue,
                // SAFETY: as above.
                _ if halves => Array::Half(unsafe { self.arena.lend(row.codes, start, len) }),
                _ => {
                    let state = take(&mut copy.state[index]);
                    // SAFETY: as above.
                    unsafe { read(Level::best(), self.arena, row, start, state) };
                    Array::Whole(state)
                }
            };
            kept.push(index, array);
        }
        if halves {
            kept.rounding = [0, 2].map(|row| rounding(self.group, self.leaf, row));
        }
    }

    unsafe fn lend_p<'t>(
        &self,
        range: &Range<usize>,
        copy: &mut Copies<'t, F>,
        kept: &mut Kept<'t, F>,
    ) -> Stored<'t, F> {
        let (place, dtype) = (self.leaf.p(), self.leaf.dtype());
        // SAFETY: the caller vouches for the numbers.
        unsafe {
            match self.p {
                Source::Nowhere => Stored::default(),
                Source::Whole => Array::Whole(place.lend(range)),
                Source::Half => Array::Half(place.lend(range)),
                Source::Master(row) => {
                    let master = take(kept.row(row));
                    place.gather(range.clone(), copy.bits);
                    adopt(Level::best(), dtype, copy.bits, master);
                    Array::Whole(master)
                }
                Source::Copy => {
                    let p = take(&mut copy.p);
                    place.load(dtype, range.clone(), p);
                    Array::Whole(p)
                }
            }
        }
    }

    unsafe fn lend_g<'t>(
        &self,
        range: &Range<usize>,
        copy: &mut Copies<'t, F>,
    ) -> Option<Gradient<'t, F>> {
        let place = self.leaf.g();
        // SAFETY: the caller vouches for the numbers, which are only read.
        let array = unsafe {
            match self.g {
                Source::Nowhere | Source::Master(_) => return None,
                Source::Whole => Array::Whole(&*place.lend(range)),
                Source::Half => Array::Half(&*place.lend(range)),
                Source::Copy => {
                    let prepared = self.needs.g.expect("asked for");
                    let g = take(&mut copy.g);
                    place.load(self.leaf.g_dtype(), range.clone(), g);
                    prepared.prepare.apply(Level::best(), g);
                    if let Some(means) = prepared.means {
                        means.subtract(range.start, g);
                    }
                    Array::Whole(&*g)
                }
            }
        };
        Some(Gradient {
            array,
            factor: self.factor,
        })
    }

    unsafe fn take_p(&self, range: &Range<usize>, p: Stored<F>, copy: &mut Copies<F>) {
        let (place, dtype) = (self.leaf.p(), self.leaf.dtype());
        match (self.p, p) {
            (Source::Copy, Array::Whole(p)) if self.needs.p != Use::Read => {
                // SAFETY: as the caller vouches.
                unsafe { place.store(dtype, range.clone(), p) };
            }
            (Source::Master(_), Array::Whole(master)) => {
                F::narrow(Level::best(), dtype, master, copy.bits);
                // SAFETY: as the caller vouches.
                unsafe { place.scatter(range.clone(), copy.bits) };
            }
            _ => {}
        }
    }

    unsafe fn take_rows(&self, range: &Range<usize>, kept: &mut Kept<F>) {
        for (index, row) in self.group.rows(self.leaf).enumerate().take(self.states) {
            if row.codec != Codec::Whole {
                let rounding = rounding(self.group, self.leaf, index);
                let (start, from) = (range.start, kept.row(index));
                // SAFETY: as the caller vouches; what was read was a copy.
                unsafe {
                    keep(
                        Level::best(),
                        self.arena,
                        row,
                        self.leaf,
                        rounding,
                        start,
                        from,
                    );
                };
            }
        }
    }
}

/// A part in pieces of so many elements.
#[inline]
fn pieces(part: Range<usize>, piece: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = part.start;
    std::iter::from_fn(move || {
        let range = start..part.end.min(start.saturating_add(piece));
        start = range.end;
        (!range.is_empty()).then_some(range)
    })
}

/// How a state array is rounded in this step.
fn rounding(group: &Group, leaf: &Leaf, row: usize) -> Rounding {
    let Some(seed) = group.rounding else {
        return Rounding::Nearest;
    };
    // Two rows share random words.
    #[allow(
        clippy::cast_possible_truncation,
        reason = "both halves are used, and rows are few"
    )]
    let words = [
        leaf.key,
        group.step as u32,
        (group.step >> 32) as u32,
        (row / 2) as u32,
    ];
    let key = words
        .into_iter()
        .fold(mix(seed), |key, word| mix(key ^ word));
    Rounding::Stochastic { key, row }
}

/// Reads a piece of a coded row.
///
/// # Safety
/// As [`Arena::lend`], for the row.
unsafe fn read<F: Element>(level: Level, arena: &Arena, row: Row, start: usize, into: &mut [F]) {
    let n = into.len();
    if row.codec == Codec::BFloat16 {
        // SAFETY: as the caller vouches.
        read_bf16(level, unsafe { arena.lend(row.codes, start, n) }, into);
        return;
    }
    // SAFETY: as the caller vouches.
    let (codes, scales) = unsafe { arena.lend_blocks(row, start, n) };
    let pieces = codes
        .chunks(codec::BLOCK)
        .zip(into.chunks_mut(codec::BLOCK));
    for ((codes, into), &mut scale) in pieces.zip(scales) {
        read_8(level, row.codec, codes, scale, into);
    }
}

/// Keeps a piece of a coded row.
///
/// # Safety
/// As [`Arena::lend`], for the row.
unsafe fn keep<F: Element>(
    level: Level,
    arena: &Arena,
    row: Row,
    leaf: &Leaf,
    rounding: Rounding,
    start: usize,
    from: &[F],
) {
    let n = from.len();
    let mut numbers = [0_u64; BLOCK];
    let numbers = match &leaf.form.logical {
        None => Numbers::From(start as u64),
        Some(logical) => {
            let mut number = numbers.iter_mut();
            logical.visit(start..start + n, |offset| {
                *number.next().expect("a number per element") = offset.cast_unsigned() as u64;
            });
            Numbers::These(&numbers[..n])
        }
    };
    if row.codec == Codec::BFloat16 {
        // SAFETY: as the caller vouches.
        let codes = unsafe { arena.lend(row.codes, start, n) };
        keep_bf16(level, rounding, from, numbers, codes);
        return;
    }
    // SAFETY: as the caller vouches.
    let (codes, scales) = unsafe { arena.lend_blocks(row, start, n) };
    let pieces = codes
        .chunks_mut(codec::BLOCK)
        .zip(from.chunks(codec::BLOCK));
    for (block, ((codes, from), scale)) in pieces.zip(scales).enumerate() {
        let numbers = numbers.after(block * codec::BLOCK);
        *scale = keep_8(level, row.codec, rounding, from, numbers, codes);
    }
}

/// Reads a whole row, as the user is to see it.
///
/// # Safety
/// As [`Arena::lend`], for the row.
pub unsafe fn read_row(arena: &Arena, row: Row, into: &mut [f32]) {
    // SAFETY: as the caller vouches.
    unsafe { read(Level::best(), arena, row, 0, into) };
}

/// Copies elements of `N` bytes into a row from an array of the caller's, in the leaf's order.
///
/// # Safety
/// As [`Arena::lend`], for the row, from `byte` on; `from` must hold as many live elements, apart from the arena.
pub unsafe fn fill<const N: usize>(arena: &Arena, byte: usize, from: &Place) {
    let n = from.layout.len();
    // SAFETY: as the caller vouches; bytes have no alignment.
    unsafe { from.gather(0..n, arena.lend::<[u8; N]>(byte, 0, n)) };
}

/// The bytes of a leaf's elements, in its order.
///
/// # Safety
/// As [`Place::gather`], for the leaf.
pub unsafe fn save(leaf: &Leaf, place: Place) -> Vec<u8> {
    unsafe fn of<const N: usize>(place: &Place) -> Vec<u8> {
        let mut elements = vec![[0; N]; place.layout.len()];
        // SAFETY: as the caller vouches.
        unsafe { place.gather(0..elements.len(), &mut elements) };
        elements.into_flattened()
    }
    // SAFETY: as the caller vouches.
    unsafe {
        match leaf.dtype().size() {
            2 => of::<2>(&place),
            4 => of::<4>(&place),
            _ => of::<8>(&place),
        }
    }
}

/// Puts a leaf's elements back.
///
/// # Safety
/// As [`Place::scatter`], for the leaf.
pub unsafe fn restore(leaf: &Leaf, bytes: &[u8]) {
    unsafe fn to<const N: usize>(place: &Place, bytes: &[u8]) {
        let elements = bytes.as_chunks::<N>().0;
        // SAFETY: as the caller vouches.
        unsafe { place.scatter(0..elements.len(), elements) };
    }
    // SAFETY: as the caller vouches.
    unsafe {
        match leaf.dtype().size() {
            2 => to::<2>(&leaf.p(), bytes),
            4 => to::<4>(&leaf.p(), bytes),
            _ => to::<8>(&leaf.p(), bytes),
        }
    }
}
