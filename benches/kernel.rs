//! The kernels alone, on one thread: every rule, in f32, plain and on a sync step, at every instruction set.
//!
//! `cargo bench --no-default-features` runs all; add a rule's name to run its rows only. GB/s counts the bytes that a
//! step has to move: what it reads, and what it writes, once each. Each row is first held to the bits of the baseline.

use divan::counter::BytesCount;
use divan::{Bencher, Divan};
use lookstep::kernel::{CHUNK, Kept, Kernel};
use lookstep::lookahead::{Blend, Phase};
use lookstep::rule::{CARRY, SUMS};
use lookstep::rules::Compute;
use lookstep::simd::Level;

const SIZES: [usize; 2] = [5_000, 300_000];

fn main() {
    Divan::from_args().main();
}

struct Row {
    kernel: Kernel<f32>,
    phase: Phase<Blend<f32>>,
    level: Level,
    size: usize,
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sync = if matches!(self.phase, Phase::Sync(_)) {
            "+sync"
        } else {
            ""
        };
        write!(f, "{}{sync} {} {}", self.kernel.name, self.level, self.size)
    }
}

fn rows() -> impl Iterator<Item = Row> {
    let mut rows = Vec::new();
    let sync = Phase::Sync(Blend::new(0.5).expect("slow weights move"));
    for size in SIZES {
        for kernel in f32::kernels() {
            for level in Level::available() {
                rows.extend([Phase::Plain, sync].map(|phase| Row {
                    kernel,
                    phase,
                    level,
                    size,
                }));
            }
        }
    }
    rows.into_iter()
}

/// All arrays of a row.
struct Arrays {
    p: Vec<f32>,
    g: Vec<f32>,
    state: Vec<Vec<f32>>,
    slow: Vec<f32>,
}

impl Arrays {
    fn new(row: &Row) -> Self {
        Self {
            p: vec![1.0; row.size],
            g: vec![0.5; row.size],
            state: vec![vec![0.0; row.size]; row.kernel.state.len()],
            slow: vec![
                2.0;
                if matches!(row.phase, Phase::Sync(_)) {
                    row.size
                } else {
                    0
                }
            ],
        }
    }

    fn bytes(&self) -> BytesCount {
        let slow = 2 * usize::from(!self.slow.is_empty());
        BytesCount::of_many::<f32>((3 + 2 * self.state.len() + slow) * self.p.len())
    }

    fn step(&mut self, row: &Row, level: Level, scalars: &[f32]) {
        for start in (0..self.p.len()).step_by(CHUNK) {
            let range = start..self.p.len().min(start + CHUNK);
            let mut kept = Kept::new(self.state.len());
            for (k, state) in self.state.iter_mut().enumerate() {
                kept.push(k, &mut state[range.clone()]);
            }
            if !self.slow.is_empty() {
                kept.push(row.kernel.state.len(), &mut self.slow[range.clone()]);
            }
            let (p, g) = (&mut self.p[range.clone()], &self.g[range]);
            (row.kernel.step)(level, row.phase, scalars, p, g, &mut kept);
        }
    }
}

#[divan::bench(args = rows(), max_time = 0.1)]
fn step(bencher: Bencher, row: &Row) {
    let scalars = (row.kernel.scalars)(
        &vec![0.5; row.kernel.hyper.len()],
        1.0,
        &mut [0.0; CARRY],
        [0.0; SUMS],
    );
    let (mut arrays, mut baseline) = (Arrays::new(row), Arrays::new(row));
    arrays.step(row, row.level, &scalars);
    baseline.step(row, Level::available()[0], &scalars);
    assert!(
        arrays.p == baseline.p && arrays.state == baseline.state,
        "{row}"
    );
    bencher
        .counter(arrays.bytes())
        .bench_local(|| arrays.step(row, row.level, &scalars));
}
