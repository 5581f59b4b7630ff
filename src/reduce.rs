//! Sums over many elements, in float64 and in an order that depends on the elements alone.

use crate::element::Element;
use crate::rule::{LANES, SUMS};
use crate::simd::{Level, at};

/// Elements that are summed apart from others, whatever thread sums them.
pub const CHUNK: usize = 1 << 14;

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
    /// Adds squares to the first sum, of numbers in some `unit`. But for the last, runs have to be whole tiles, so that an
    /// element's lane does not depend on how an array is cut.
    pub fn add_squares<F: Element>(&mut self, level: Level, x: &[F], unit: f64) {
        let lanes = &mut self.lanes[0];
        match unit {
            1.0 => at!(level, squares(lanes, x, |x| x)),
            _ => at!(level, squares(lanes, x, |x| x * unit)),
        }
    }

    /// Adds what `of` gives for each of `n` elements; as [`Self::add_squares`].
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

#[inline(always)]
fn squares<F: Element>(lanes: &mut [f64; LANES], x: &[F], of: impl Fn(f64) -> f64) {
    let (tiles, end) = x.as_chunks::<LANES>();
    for tile in tiles {
        for lane in 0..LANES {
            let x = of(tile[lane].widened());
            lanes[lane] += x * x;
        }
    }
    for (sum, x) in lanes.iter_mut().zip(end) {
        let x = of(x.widened());
        *sum += x * x;
    }
}

/// Sums of two.
#[must_use]
pub fn plus(a: [f64; SUMS], b: [f64; SUMS]) -> [f64; SUMS] {
    std::array::from_fn(|k| a[k] + b[k])
}
