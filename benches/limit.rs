//! The memory limit: the reads and writes of a step with next to no arithmetic, for `step.py` to hold times against.
//!
//! It shares no line with the kernels. Of the plain forms tried at 1e8 elements (whole arrays, chunks of 64K, tiles of
//! 32 and 64 lanes, each with and without peeling) none is faster than this one; in cache, peeling gains up to 45 %.

use std::hint::spin_loop;
use std::slice::{from_raw_parts, from_raw_parts_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Thread, park, spawn};
use std::time::{Duration, Instant};

/// State arrays that a leaf may have.
const MAX_STATE: usize = 4;
/// Bytes of a cache line, which no store of `p` should cross.
const LINE: usize = 64;

/// What a step does with slow weights.
const NOTHING: u8 = 0;
const WRITE: u8 = 1;
const READ: u8 = 2;

/// The arrays of one parameter, as `engines.py` declares them too. Those that the step does not have are null.
#[repr(C)]
pub struct Leaf {
    p: *mut f32,
    g: *const f32,
    state: [*mut f32; MAX_STATE],
    slow: *mut f32,
    n: usize,
}

/// What one thread does.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Part {
    leaves: *const Leaf,
    count: usize,
}

/// Reads `p`, `g` and `states` arrays of each leaf, writes `p` and these; `slow` says what is done with slow weights.
/// The caller's thread does the first part, and each other part has a thread.
///
/// # Safety
/// `parts` must point to `count` parts, and those to their leaves. Each array of theirs that the step has must be `n`
/// live numbers that nobody else reads or writes meanwhile, and share none with another array that is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn limit(parts: *const Part, count: usize, states: usize, slow: u8) {
    static WORKERS: Mutex<Vec<Worker>> = Mutex::new(Vec::new());
    // SAFETY: the caller vouches for the parts.
    let [first, others @ ..] = (unsafe { from_raw_parts(parts, count) }) else {
        return;
    };
    let mut workers = WORKERS.lock().unwrap_or_else(PoisonError::into_inner);
    while workers.len() < others.len() {
        workers.push(Worker::new());
    }
    for (worker, &part) in workers.iter().zip(others) {
        worker.begin(Job { part, states, slow });
    }
    // SAFETY: the caller vouches for the leaves and their arrays.
    unsafe { pass_over(*first, states, slow) };
    for worker in &workers[..others.len()] {
        worker.end();
    }
}

struct Job {
    part: Part,
    states: usize,
    slow: u8,
}

// SAFETY: the arrays of a part are its thread's alone while `limit` runs, and `limit` waits for all parts.
unsafe impl Send for Job {}

/// A thread that sleeps only when nothing has come for a while: to be woken takes as long as many a step.
struct Worker {
    thread: Thread,
    job: Arc<(AtomicBool, Mutex<Option<Job>>)>,
}

const AWAKE: Duration = Duration::from_micros(200);

impl Worker {
    fn new() -> Self {
        let job = Arc::new((AtomicBool::new(false), Mutex::new(None::<Job>)));
        let mine = Arc::clone(&job);
        let run = move || {
            let mut last = Instant::now();
            loop {
                if !mine.0.load(Ordering::Acquire) {
                    if last.elapsed() > AWAKE {
                        park();
                    }
                    spin_loop();
                    continue;
                }
                if let Some(job) = mine.1.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    // SAFETY: the caller of `limit` vouches for the leaves and their arrays.
                    unsafe { pass_over(job.part, job.states, job.slow) };
                }
                mine.0.store(false, Ordering::Release);
                last = Instant::now();
            }
        };
        Self {
            thread: spawn(run).thread().clone(),
            job,
        }
    }

    fn begin(&self, job: Job) {
        *self.job.1.lock().unwrap_or_else(PoisonError::into_inner) = Some(job);
        self.job.0.store(true, Ordering::Release);
        self.thread.unpark();
    }

    fn end(&self) {
        while self.job.0.load(Ordering::Acquire) {
            spin_loop();
        }
    }
}

/// # Safety
/// As [`limit`], for one part.
unsafe fn pass_over(part: Part, states: usize, slow: u8) {
    macro_rules! of {
        ($leaf:ident, $($n:literal)*) => {
            match (states, slow) {
                $(
                    ($n, NOTHING) => best::<$n, NOTHING>($leaf),
                    ($n, WRITE) => best::<$n, WRITE>($leaf),
                    ($n, READ) => best::<$n, READ>($leaf),
                )*
                _ => {}
            }
        };
    }
    // SAFETY: the caller vouches for the leaves and their arrays.
    unsafe {
        for leaf in from_raw_parts(part.leaves, part.count) {
            of!(leaf, 0 1 2 3 4);
        }
    }
}

/// [`peeled`] at the best instruction set of this machine.
///
/// # Safety
/// As [`limit`], for one leaf.
unsafe fn best<const N: usize, const SLOW: u8>(leaf: &Leaf) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        unsafe fn avx512<const N: usize, const SLOW: u8>(leaf: &Leaf) {
            // SAFETY: the caller vouches for the leaf.
            unsafe { peeled::<N, SLOW>(leaf) }
        }
        #[target_feature(enable = "avx2")]
        unsafe fn avx2<const N: usize, const SLOW: u8>(leaf: &Leaf) {
            // SAFETY: the caller vouches for the leaf.
            unsafe { peeled::<N, SLOW>(leaf) }
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the machine has the instructions; the caller vouches for the leaf.
            return unsafe { avx512::<N, SLOW>(leaf) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the machine has the instructions; the caller vouches for the leaf.
            return unsafe { avx2::<N, SLOW>(leaf) };
        }
    }
    // SAFETY: the caller vouches for the leaf.
    unsafe { peeled::<N, SLOW>(leaf) }
}

/// # Safety
/// As [`limit`], for one leaf.
#[inline(always)]
unsafe fn peeled<const N: usize, const SLOW: u8>(leaf: &Leaf) {
    let aligned = leaf.p.align_offset(LINE).min(leaf.n);
    for (start, end) in [(0, aligned), (aligned, leaf.n)] {
        let [s0, s1, s2, s3] = leaf.state;
        let len = end - start;
        // SAFETY: `start..end` lies within each array that is used, and the caller vouches for those.
        unsafe {
            let array = |first: *mut f32, used: bool| {
                if used {
                    from_raw_parts_mut(first.add(start), len)
                } else {
                    &mut []
                }
            };
            pass::<N, SLOW>(
                array(leaf.p, true),
                from_raw_parts(leaf.g.add(start), len),
                array(s0, N > 0),
                array(s1, N > 1),
                array(s2, N > 2),
                array(s3, N > 3),
                array(leaf.slow, SLOW != NOTHING),
            );
        }
    }
}

/// An argument an array: the compiler then knows that no two overlap, and vectorises.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "one for each array")]
fn pass<const N: usize, const SLOW: u8>(
    p: &mut [f32],
    g: &[f32],
    s0: &mut [f32],
    s1: &mut [f32],
    s2: &mut [f32],
    s3: &mut [f32],
    slow: &mut [f32],
) {
    // Lengths that are seen to be equal are not checked again in the loop.
    let n = p.len();
    let used = |yes: bool| if yes { n } else { 0 };
    let (g, slow) = (&g[..n], &mut slow[..used(SLOW != NOTHING)]);
    let (s0, s1) = (&mut s0[..used(N > 0)], &mut s1[..used(N > 1)]);
    let (s2, s3) = (&mut s2[..used(N > 2)], &mut s3[..used(N > 3)]);
    for i in 0..n {
        let d = g[i];
        if N > 0 {
            s0[i] += d;
        }
        if N > 1 {
            s1[i] += d;
        }
        if N > 2 {
            s2[i] += d;
        }
        if N > 3 {
            s3[i] += d;
        }
        match SLOW {
            WRITE => slow[i] = p[i],
            READ => p[i] -= slow[i],
            _ => {}
        }
        p[i] += d;
    }
}
