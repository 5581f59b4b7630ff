//! The kernels alone, on one thread: every rule, in f32, plain and on a sync step, at every instruction set.
//!
//! `cargo bench --no-default-features` runs all; add a rule's name to run its rows only. GB/s counts the bytes that a
//! step has to move: what it reads, and what it writes, once each.

use divan::counter::BytesCount;
use divan::{Bencher, Divan};
use lookstep::kernel::{CHUNK, Kept, Kernel};
use lookstep::lookahead::{Blend, Phase};

use lookstep::rules::Compute;
use lookstep::simd::Level;

const SIZES: [usize; 2] = [5_000, 300_000];
const SYNC: Phase<Blend<f32>> = Phase::Sync(Blend::FromFast(0.5));

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
        let sync = if self.phase == SYNC { "+sync" } else { "" };
        write!(
            f,
            "{}{sync} {:?} {}",
            self.kernel.name, self.level, self.size
        )
    }
}

fn rows() -> impl Iterator<Item = Row> {
    SIZES.into_iter().flat_map(|size| {
        f32::kernels().into_iter().flat_map(move |kernel| {
            Level::available()[1..]
                .to_vec()
                .into_iter()
                .flat_map(move |level| {
                    [Phase::Plain, SYNC].map(|phase| Row {
                        kernel,
                        phase,
                        level,
                        size,
                    })
                })
        })
    })
}

#[divan::bench(args = rows(), max_time = 0.1)]
fn step(bencher: Bencher, row: &Row) {
    let Row {
        kernel,
        phase,
        level,
        size,
    } = row;
    let hyper = vec![0.5; kernel.hyper.len()];
    let scalars = (kernel.scalars)(&hyper, 1.0);
    let mut p = vec![1.0; *size];
    let g = vec![0.5; *size];
    let mut slow = vec![1.0; if *phase == SYNC { *size } else { 0 }];
    let mut state = vec![vec![0.0; *size]; kernel.state.len()];
    let streams = 3 + 2 * state.len() + 2 * usize::from(*phase == SYNC);
    let bytes = BytesCount::of_many::<f32>(streams * size);
    bencher.counter(bytes).bench_local(|| {
        let mut arrays = state.iter_mut();
        let state = std::array::from_fn(|_| arrays.next().map_or(&mut [][..], |s| s));
        let mut kept = Kept {
            state,
            slow: &mut slow,
        };
        for (p, g) in p.chunks_mut(CHUNK).zip(g.chunks(CHUNK)) {
            (kernel.step)(*level, *phase, &scalars, p, g, &mut kept.take(p.len()));
        }
    });
}
