//! Work that overlaps: threads prepare items ahead of one consumer, who takes them in order.
//!
//! At most [`AHEAD`] items a thread are prepared before they are taken, so memory does not grow with the number of items.

use std::{
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc::sync_channel,
    },
    thread,
};

use crate::Result;

/// Items a thread may be ahead of the consumer.
const AHEAD: usize = 8;

/// Prepares every item on `n_threads` threads and consumes them in order on this one. The consumer's first failure ends it.
pub(crate) fn in_order<'i, I: Sync, O: Send>(
    items: &'i [I],
    n_threads: usize,
    prepare: impl Fn(&I) -> O + Sync,
    mut consume: impl FnMut(&'i I, O) -> Result<()>,
) -> Result<()> {
    let n_threads = n_threads.clamp(1, items.len().max(1));
    thread::scope(|scope| {
        // Thread t prepares items t, t + n, t + 2n, ... and has a queue of its own: order needs no sorting.
        let queues: Vec<_> = (0..n_threads)
            .map(|first| {
                let (sender, receiver) = sync_channel(AHEAD);
                let prepare = &prepare;
                scope.spawn(move || {
                    for item in items.iter().skip(first).step_by(n_threads) {
                        // The consumer is gone once it has failed.
                        if sender.send(prepare(item)).is_err() {
                            return;
                        }
                    }
                });
                receiver
            })
            .collect();
        for (item_idx, item) in items.iter().enumerate() {
            let prepared = queues[item_idx % n_threads].recv();
            consume(item, prepared.expect("BUG: a thread that prepares items ended early"))?;
        }
        Ok(())
    })
}

/// Does something with every index below `n` on `n_threads` threads; results are in order.
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

    #[test]
    fn items_arrive_in_order_whatever_the_threads_do() {
        let items: Vec<u64> = (0..100).collect();
        for n_threads in [1, 3, 200] {
            let mut seen = Vec::new();
            let prepare = |item: &u64| {
                thread::yield_now();
                item * 2
            };
            in_order(&items, n_threads, prepare, |item, double| {
                seen.push((*item, double));
                Ok(())
            })
            .unwrap();
            assert_eq!(seen, items.iter().map(|item| (*item, item * 2)).collect::<Vec<_>>());
            assert_eq!(in_parallel(100, n_threads, |index| Ok(index * 3)).unwrap(), (0..100).map(|index| index * 3).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_consumer_s_failure_ends_the_work_on_both_sides() {
        let items: Vec<u64> = (0..1000).collect();
        let mut n_seen = 0;
        let ended = in_order(
            &items,
            3,
            |item| *item,
            |_, item| {
                n_seen += 1;
                if item < 7 { Ok(()) } else { Err(Error::Stopped) }
            },
        );
        assert!(matches!(ended, Err(Error::Stopped)) && n_seen == 8, "{n_seen}");
    }
}
