//! Threads that take part in a step. They are started when the first step needs them, sleep in between, and live as long
//! as the process; a forked child, which has none of its parent's threads, starts its own.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

/// What several threads do at a time, each until nothing is left to do.
type Work<'a> = dyn Fn() + Sync + 'a;

/// The threads of one process, and the pool of its forked children.
struct Pool {
    /// Whose it is; 0 before it is anybody's.
    generation: AtomicU32,
    state: Mutex<State>,
    /// There is a job to take part in.
    offered: Condvar,
    /// Nobody is at work on a job any more.
    left: Condvar,
    child: OnceLock<Box<Pool>>,
}

struct State {
    threads: usize,
    jobs: Vec<Job>,
    next: u64,
}

/// A call of [`share`].
struct Job {
    id: u64,
    work: &'static Work<'static>,
    /// Threads that may still take part.
    seats: usize,
    /// Threads that do.
    inside: usize,
    panicked: bool,
}

static POOL: Pool = Pool::new();

impl Pool {
    const fn new() -> Self {
        Self {
            generation: AtomicU32::new(0),
            state: Mutex::new(State {
                threads: 0,
                jobs: Vec::new(),
                next: 0,
            }),
            offered: Condvar::new(),
            left: Condvar::new(),
            child: OnceLock::new(),
        }
    }

    /// The pool of this process. A parent's is left as the fork found it: its lock may be held for ever.
    fn here() -> &'static Self {
        let me = generation();
        let mut pool = &POOL;
        loop {
            match pool.generation.compare_exchange(0, me, Relaxed, Relaxed) {
                Ok(_) => return pool,
                Err(generation) if generation == me => return pool,
                Err(_) => pool = pool.child.get_or_init(|| Box::new(Self::new())),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a thread of the pool does.
    fn help(&'static self) {
        let mut state = self.lock();
        loop {
            let Some(job) = state.jobs.iter_mut().find(|job| job.seats > 0) else {
                state = self
                    .offered
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            job.seats -= 1;
            job.inside += 1;
            let (id, work) = (job.id, job.work);
            drop(state);
            let outcome = catch_unwind(AssertUnwindSafe(work));
            state = self.lock();
            let job = state.jobs.iter_mut().find(|job| job.id == id);
            let job = job.expect("a job stays as long as somebody is inside");
            job.inside -= 1;
            job.panicked |= outcome.is_err();
            if job.inside == 0 {
                self.left.notify_all();
            }
        }
    }

    /// Offers work to `helpers` threads; returns the job's number.
    fn offer(&'static self, work: &'static Work<'static>, helpers: usize) -> u64 {
        let mut state = self.lock();
        while state.threads < helpers {
            let builder = thread::Builder::new().name("lookstep".into());
            if builder.spawn(move || self.help()).is_err() {
                break; // Those that there are do it.
            }
            state.threads += 1;
        }
        let id = state.next;
        state.next += 1;
        state.jobs.push(Job {
            id,
            work,
            seats: helpers,
            inside: 0,
            panicked: false,
        });
        drop(state);
        for _ in 0..helpers {
            self.offered.notify_one();
        }
        id
    }

    /// Lets nobody else in, and waits until all who are in have left; returns whether one panicked.
    fn withdraw(&self, id: u64) -> bool {
        let mut state = self.lock();
        loop {
            let place = state.jobs.iter().position(|job| job.id == id);
            let place = place.expect("who offered a job withdraws it");
            state.jobs[place].seats = 0;
            if state.jobs[place].inside == 0 {
                return state.jobs.swap_remove(place).panicked;
            }
            state = self
                .left
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Calls `work` here and, at the same time, on up to `threads - 1` others; returns once all have returned.
///
/// # Panics
/// If `work` does, on any thread.
pub fn share(threads: usize, work: &Work<'_>) {
    if threads < 2 {
        return work();
    }
    let pool = Pool::here();
    // SAFETY: only the lifetime is another. `withdraw` returns once no thread has the reference any more, and is called
    // however `work` ends here, before the borrow does; nothing between `offer` and it panics.
    let lent = unsafe { std::mem::transmute::<&Work<'_>, &'static Work<'static>>(work) };
    let job = pool.offer(lent, threads - 1);
    let outcome = catch_unwind(AssertUnwindSafe(work));
    let panicked = pool.withdraw(job);
    if let Err(panic) = outcome {
        resume_unwind(panic);
    }
    assert!(!panicked, "a thread of the pool panicked");
}

/// Which process this is: 1, and one more in a forked child. (A process may have the number of one that is gone.)
#[must_use]
pub fn generation() -> u32 {
    static GENERATION: AtomicU32 = AtomicU32::new(1);
    #[cfg(unix)]
    {
        static IS_TOLD: AtomicBool = AtomicBool::new(false);
        extern "C" fn forked() {
            GENERATION.fetch_add(1, Relaxed);
        }
        if !IS_TOLD.swap(true, Relaxed) {
            // SAFETY: the handler does nothing but count. Where there is no memory for it, a child is not told from its
            // parent, as if there were none.
            unsafe { libc::pthread_atfork(None, None, Some(forked)) };
        }
    }
    GENERATION.load(Relaxed)
}

/// How many threads a step may use where nothing else is said: those that the process may, by its affinity and its
/// container's limit.
#[must_use]
pub fn available() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::atomic::AtomicUsize;
    use std::sync::{Barrier, Mutex};

    use super::*;

    #[test]
    fn work_is_done_by_as_many_threads_as_are_asked_for() {
        for threads in [1, 2, 5] {
            let (barrier, seen) = (Barrier::new(threads), Mutex::new(HashSet::new()));
            share(threads, &|| {
                barrier.wait();
                seen.lock().unwrap().insert(thread::current().id());
            });
            assert_eq!(seen.into_inner().unwrap().len(), threads);
        }
    }

    #[test]
    fn several_share_at_a_time() {
        let count = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let left = AtomicUsize::new(10);
                        share(3, &|| {
                            let take = |n: usize| n.checked_sub(1);
                            while left.fetch_update(Relaxed, Relaxed, take).is_ok() {
                                count.fetch_add(1, Relaxed);
                            }
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 4 * 200 * 10);
    }

    #[test]
    fn a_panic_reaches_the_caller_once_all_have_left() {
        for helper in [false, true] {
            let (here, barrier) = (thread::current().id(), Barrier::new(2));
            let done = AtomicUsize::new(0);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                share(2, &|| {
                    barrier.wait();
                    assert!((thread::current().id() == here) == helper, "asked for");
                    done.fetch_add(1, Relaxed);
                });
            }));
            assert!(outcome.is_err());
            assert_eq!(done.into_inner(), 1);
        }
        share(2, &|| {});
    }
}
