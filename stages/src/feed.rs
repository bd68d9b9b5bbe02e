//! Threads prepare jobs ahead of one consumer, which takes the results in order.
//!
//! Jobs have a weight in bytes; the jobs ahead of the consumer weigh no more than a given limit, regardless of the number of threads.

use std::{
    collections::BTreeMap,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use crate::Result;

/// The state that threads and consumer share.
struct Line<F, O> {
    /// Gives the next job with its weight.
    next: F,
    n_issued: u64,
    /// Weight of the jobs that are issued and not consumed.
    ahead: usize,
    /// Results that wait for their turn.
    ready: BTreeMap<u64, (Result<O>, usize)>,
    /// No job is left, or the consumer has ended.
    is_over: bool,
    /// A thread panicked.
    is_broken: bool,
}

/// Prepares jobs on `n_threads` threads and consumes their results on this one, in the order in which `next` gives them. At most
/// `room` bytes of jobs, and one job, are ahead of the consumer, which is also told how many of them are ready. The first failure
/// of `next` or of the consumer ends it.
pub(crate) fn stream<J: Send, O: Send>(
    n_threads: usize,
    room: usize,
    next: impl FnMut() -> Result<Option<(J, usize)>> + Send,
    prepare: impl Fn(J) -> O + Sync,
    mut consume: impl FnMut(O, usize) -> Result<()>,
) -> Result<()> {
    let line = Line { next, n_issued: 0, ahead: 0, ready: BTreeMap::new(), is_over: false, is_broken: false };
    // Threads wait at `has_room` for the consumer, the consumer at `has_come` for the threads.
    let (line, has_room, has_come) = (&Mutex::new(line), &Condvar::new(), &Condvar::new());
    let prepare = &prepare;
    let work = move || {
        let _alarm = Alarm(|| {
            lock(line).is_broken = true;
            has_come.notify_all();
        });
        loop {
            let mut guard = lock(line);
            while guard.ahead >= room && !guard.is_over {
                guard = has_room.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
            if guard.is_over {
                return;
            }
            let (turn, job) = (guard.n_issued, (guard.next)());
            match job {
                Ok(Some((job, weight))) => {
                    guard.n_issued += 1;
                    guard.ahead += weight;
                    drop(guard);
                    let prepared = prepare(job);
                    lock(line).ready.insert(turn, (Ok(prepared), weight));
                }
                Ok(None) => guard.is_over = true,
                Err(error) => {
                    guard.n_issued += 1;
                    guard.is_over = true;
                    guard.ready.insert(turn, (Err(error), 0));
                }
            }
            has_come.notify_all();
            has_room.notify_all();
        }
    };
    thread::scope(|scope| {
        for _ in 0..n_threads.max(1) {
            scope.spawn(work);
        }
        // If the consumer panics, the threads must end: the scope joins them.
        let alarm = Alarm(|| {
            lock(line).is_over = true;
            has_room.notify_all();
        });
        let consumed = (|| {
            for turn in 0.. {
                let mut guard = lock(line);
                let (prepared, n_ready) = loop {
                    if let Some((prepared, weight)) = guard.ready.remove(&turn) {
                        guard.ahead -= weight;
                        break (prepared, guard.ready.len());
                    }
                    if guard.is_over && turn >= guard.n_issued {
                        return Ok(());
                    }
                    assert!(!guard.is_broken, "BUG: a thread that prepares jobs panicked");
                    guard = has_come.wait(guard).unwrap_or_else(PoisonError::into_inner);
                };
                drop(guard);
                has_room.notify_all();
                consume(prepared?, n_ready)?;
            }
            unreachable!("the loop returns")
        })();
        drop(alarm);
        lock(line).is_over = true;
        has_room.notify_all();
        consumed
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls a function if its thread panics.
struct Alarm<F: Fn()>(F);

impl<F: Fn()> Drop for Alarm<F> {
    fn drop(&mut self) {
        if thread::panicking() {
            (self.0)();
        }
    }
}

/// Calls `make` with every index below `n` on `n_threads` threads; results are in order.
pub(crate) fn in_parallel<T: Send>(n: usize, n_threads: usize, make: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let worker = || -> Result<Vec<(usize, T)>> {
        let mut made = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= n {
                return Ok(made);
            }
            made.push((index, make(index)?));
        }
    };
    let made = thread::scope(|scope| {
        let workers: Vec<_> = (0..n_threads.max(1)).map(|_| scope.spawn(worker)).collect();
        let joined = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        joined.collect::<Result<Vec<_>>>()
    });
    let mut made: Vec<(usize, T)> = made?.into_iter().flatten().collect();
    made.sort_by_key(|(index, _)| *index);
    Ok(made.into_iter().map(|(_, thing)| thing).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    /// Numbers from 0 on, of some weight each.
    fn numbers(n: u64, weight: usize) -> impl FnMut() -> Result<Option<(u64, usize)>> + Send {
        let mut numbers = 0..n;
        move || Ok(numbers.next().map(|number| (number, weight)))
    }

    #[test]
    fn results_arrive_in_order_whatever_the_threads_do() {
        for n_threads in [1, 3, 200] {
            let mut seen = Vec::new();
            let prepare = |number: u64| {
                thread::yield_now();
                number * 2
            };
            stream(n_threads, 10, numbers(100, 1), prepare, |double, _| {
                seen.push(double);
                Ok(())
            })
            .unwrap();
            assert_eq!(seen, (0..100).map(|number| number * 2).collect::<Vec<_>>());
            assert_eq!(in_parallel(100, n_threads, |index| Ok(index * 3)).unwrap(), (0..100).map(|index| index * 3).collect::<Vec<_>>());
        }
    }

    #[test]
    fn no_more_is_prepared_than_there_is_room_for() {
        let (n_prepared, mut n_consumed, mut most) = (AtomicUsize::new(0), 0, 0);
        let prepare = |_| n_prepared.fetch_add(1, Ordering::SeqCst);
        stream(4, 64, numbers(300, 20), prepare, |_, _| {
            thread::sleep(std::time::Duration::from_micros(200));
            n_consumed += 1;
            most = most.max(n_prepared.load(Ordering::SeqCst) - n_consumed);
            Ok(())
        })
        .unwrap();
        // Room for 64 bytes, and a job more; one is with the consumer.
        assert!(n_consumed == 300 && (1..=5).contains(&most), "{most}");
    }

    #[test]
    fn a_failure_ends_the_work_on_both_sides() {
        let mut n_seen = 0;
        let ended = stream(
            3,
            64,
            numbers(1000, 1),
            |number| number,
            |number, _| {
                n_seen += 1;
                if number < 7 { Ok(()) } else { Err(Error::Stopped) }
            },
        );
        assert!(matches!(ended, Err(Error::Stopped)) && n_seen == 8, "{n_seen}");
        let mut n_left = 5;
        let next = || {
            n_left -= 1;
            if n_left > 0 { Ok(Some(((), 1))) } else { Err(Error::Stopped) }
        };
        let mut n_seen = 0;
        let ended = stream(
            3,
            64,
            next,
            |()| (),
            |(), _| {
                n_seen += 1;
                Ok(())
            },
        );
        assert!(matches!(ended, Err(Error::Stopped)) && n_seen == 4, "{n_seen}");
    }

    #[test]
    fn a_panic_of_a_thread_is_one_of_the_consumer() {
        let panicked = std::panic::catch_unwind(|| stream(2, 64, numbers(9, 1), |number| assert!(number < 5), |(), _| Ok(())));
        assert!(panicked.is_err());
    }
}
