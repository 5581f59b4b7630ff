//! The kernels alone, on one thread: every rule, in f32, plain and on a sync step, at every instruction set; and what
//! state in fewer bits costs beside them.
//!
//! `cargo bench --no-default-features` runs all; add a rule's name to run its rows only. GB/s counts the bytes that a
//! step has to move: what it reads, and what it writes, once each. Each row is first held to the bits of the baseline.

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, Divan};
use lookstep::array::Array;
use lookstep::codec::{BLOCK, Codec, Numbers, Rounding, keep_8, keep_bf16, read_8, read_bf16};
use lookstep::kernel::{Kept, Kernel};
use lookstep::lookahead::{Blend, Phase};
use lookstep::reduce::CHUNK;
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
                kept.push(k, Array::Whole(&mut state[range.clone()]));
            }
            if !self.slow.is_empty() {
                kept.push(
                    row.kernel.state.len(),
                    Array::Whole(&mut self.slow[range.clone()]),
                );
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

/// An array in fewer bits, small enough for the first-level cache.
struct Coded {
    codec: Codec,
    rounding: Rounding,
    level: Level,
}

impl std::fmt::Display for Coded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rounding = match self.rounding {
            Rounding::Nearest => "nearest",
            Rounding::Stochastic { .. } => "stochastic",
        };
        write!(f, "{:?} {rounding} {}", self.codec, self.level)
    }
}

fn coded() -> impl Iterator<Item = Coded> {
    let mut rows = Vec::new();
    for codec in [Codec::BFloat16, Codec::Signed8, Codec::Unsigned8] {
        for level in Level::available() {
            rows.extend(
                [Rounding::Nearest, Rounding::Stochastic { key: 7, row: 0 }].map(|rounding| {
                    Coded {
                        codec,
                        rounding,
                        level,
                    }
                }),
            );
        }
    }
    rows.into_iter()
}

/// What is kept, and what is read back.
struct Codes {
    numbers: Vec<f32>,
    halves: Vec<u16>,
    bytes: Vec<u8>,
    scales: Vec<f32>,
}

impl Codes {
    const N: usize = 2048;

    fn new(codec: Codec) -> Self {
        // Of many sizes, in no order.
        let numbers = (0..2048_u16).map(|i| f32::from(i).powi(2).sin().powi(5) * 1e-3);
        Self {
            numbers: numbers
                .map(|x| if codec == Codec::Unsigned8 { x * x } else { x })
                .collect(),
            halves: vec![0; Self::N],
            bytes: vec![0; Self::N],
            scales: vec![0.0; Self::N / BLOCK],
        }
    }

    fn keep(&mut self, row: &Coded, level: Level) {
        if row.codec == Codec::BFloat16 {
            let numbers = Numbers::From(0);
            keep_bf16(
                level,
                row.rounding,
                &self.numbers,
                numbers,
                &mut self.halves,
            );
            return;
        }
        let blocks = self.bytes.chunks_mut(BLOCK).zip(self.numbers.chunks(BLOCK));
        for (block, ((codes, from), scale)) in blocks.zip(&mut self.scales).enumerate() {
            let numbers = Numbers::From((block * BLOCK) as u64);
            *scale = keep_8(level, row.codec, row.rounding, from, numbers, codes);
        }
    }

    fn read(&mut self, row: &Coded, level: Level) {
        if row.codec == Codec::BFloat16 {
            read_bf16(level, &self.halves, &mut self.numbers);
            return;
        }
        let blocks = self.bytes.chunks(BLOCK).zip(self.numbers.chunks_mut(BLOCK));
        for ((codes, into), &scale) in blocks.zip(&self.scales) {
            read_8(level, row.codec, codes, scale, into);
        }
    }
}

#[divan::bench(args = coded(), max_time = 0.1)]
fn keep(bencher: Bencher, row: &Coded) {
    let (mut codes, mut baseline) = (Codes::new(row.codec), Codes::new(row.codec));
    codes.keep(row, row.level);
    baseline.keep(row, Level::available()[0]);
    assert!(
        codes.halves == baseline.halves && codes.bytes == baseline.bytes,
        "{row}"
    );
    bencher
        .counter(ItemsCount::new(Codes::N))
        .bench_local(|| codes.keep(row, row.level));
}

#[divan::bench(args = coded().filter(|row| row.rounding == Rounding::Nearest), max_time = 0.1)]
fn read(bencher: Bencher, row: &Coded) {
    let mut codes = Codes::new(row.codec);
    codes.keep(row, row.level);
    let mut baseline = Codes::new(row.codec);
    baseline.keep(row, row.level);
    codes.read(row, row.level);
    baseline.read(row, Level::available()[0]);
    assert!(codes.numbers == baseline.numbers, "{row}");
    bencher
        .counter(ItemsCount::new(Codes::N))
        .bench_local(|| codes.read(row, row.level));
}
