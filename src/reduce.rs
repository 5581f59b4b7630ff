//! Sums over many elements, in float64 and in an order that depends on the elements alone.

use crate::rule::{LANES, SUMS};

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
