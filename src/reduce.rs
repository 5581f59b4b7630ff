//! Sums over many elements, in float64 and in an order that depends on the elements alone.

use crate::kernel::CHUNK;
use crate::rule::{LANES, SUMS};
use crate::simd::{Level, at};

/// Sums in the making: a column for each lane of a tile, so that they come out the same on any instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Sums {
    /// What each lane has gathered.
    pub lanes: [[f64; LANES]; SUMS],
}

impl Default for Sums {
    fn default() -> Self {
        Self {
            lanes: [[0.0; LANES]; SUMS],
        }
    }
}

impl Sums {
    /// Adds `of` each pair of elements. But for the last, runs have to be whole tiles, so that an element's lane does not
    /// depend on how an array is cut.
    pub fn add<F: Copy>(
        &mut self,
        level: Level,
        a: &[F],
        b: &[F],
        of: impl Fn(F, F) -> [f64; SUMS],
    ) {
        let (tiles, end) = a.as_chunks::<LANES>();
        let (others, other_end) = b.as_chunks::<LANES>();
        let [first, second] = &mut self.lanes;
        at!(
            level,
            for (a, b) in tiles.iter().zip(others) {
                for lane in 0..LANES {
                    let [x, y] = of(a[lane], b[lane]);
                    first[lane] += x;
                    second[lane] += y;
                }
            }
        );
        for (lane, (&a, &b)) in end.iter().zip(other_end).enumerate() {
            let [x, y] = of(a, b);
            first[lane] += x;
            second[lane] += y;
        }
    }

    /// Adds what `of` gives for each of `n` elements; as [`Self::add`], but for more arrays.
    pub fn add_each(&mut self, n: usize, of: impl Fn(usize) -> [f64; SUMS]) {
        for i in 0..n {
            for (lanes, x) in self.lanes.iter_mut().zip(of(i)) {
                lanes[i % LANES] += x;
            }
        }
    }

    /// The sums, lanes added in pairs.
    #[must_use]
    pub fn total(&self) -> [f64; SUMS] {
        self.lanes.map(|mut lanes| {
            let mut half = LANES / 2;
            while half > 0 {
                for lane in 0..half {
                    lanes[lane] += lanes[lane + half];
                }
                half /= 2;
            }
            lanes[0]
        })
    }
}

/// The sums of a leaf, gathered a piece at a time: those of a chunk are closed before the next one's begin, so that chunks
/// can be summed apart.
#[derive(Clone, Copy, Debug, Default)]
pub struct Total {
    /// Of the chunk that is being summed.
    pub chunk: Sums,
    /// Of all chunks before.
    pub sums: [f64; SUMS],
}

impl Total {
    /// Closes the chunk, where a piece that ends before element `end` is its last.
    pub fn close(&mut self, end: usize, len: usize) {
        if end == len || end.is_multiple_of(CHUNK) {
            let sums = std::mem::take(&mut self.chunk).total();
            self.sums = plus(self.sums, sums);
        }
    }
}

/// Sums of two.
#[must_use]
pub fn plus(a: [f64; SUMS], b: [f64; SUMS]) -> [f64; SUMS] {
    std::array::from_fn(|k| a[k] + b[k])
}
