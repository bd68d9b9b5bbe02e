//! Turns of a network here and of its peer in PyTorch.

use std::time::Instant;

use crate::peer::Peer;

/// What a turn took, and what came out: the loss, the number of detections, or the sum of scores.
#[derive(Clone, Copy)]
pub(crate) struct Turn {
    pub(crate) seconds: f64,
    outcome: f64,
}

/// A turn here.
pub(crate) fn timed(work: impl FnOnce() -> f64) -> Turn {
    let clock = Instant::now();
    let outcome = work();
    Turn { seconds: clock.elapsed().as_secs_f64(), outcome }
}

/// A turn of the peer, which measures its own seconds.
fn of_peer(peer: &mut Peer, work: &str) -> Turn {
    let answer = peer.ask(work);
    let (seconds, outcome) = answer.split_once(' ').unwrap();
    Turn { seconds: seconds.parse().unwrap(), outcome: outcome.parse().unwrap() }
}

/// Both sides in turn, after one each that does not count; the machine's speed drifts, so that each turn is compared with its neighbour. The median seconds of
/// ours and of theirs.
pub(crate) fn take_turns(what: &str, rounds: usize, mut ours: impl FnMut() -> Turn, (peer, work): (&mut Peer, &str)) -> [f64; 2] {
    let turns: Vec<(Turn, Turn)> = (0..=rounds).map(|_| (ours(), of_peer(peer, work))).skip(1).collect();
    let ratios = sorted(turns.iter().map(|(ours, theirs)| ours.seconds / theirs.seconds));
    let medians = [median(turns.iter().map(|(ours, _)| ours.seconds)), median(turns.iter().map(|(_, theirs)| theirs.seconds))];
    println!(
        "{what}: {:.3} s, PyTorch {:.3} s, ratio {:.2} ({:.2} to {:.2}) of {rounds} turns; {:.4} and {:.4} came out",
        medians[0],
        medians[1],
        median(ratios.iter().copied()),
        ratios[0],
        ratios[rounds - 1],
        turns[0].0.outcome,
        turns[0].1.outcome,
    );
    medians
}

pub(crate) fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let numbers = sorted(numbers);
    f64::midpoint(numbers[(numbers.len() - 1) / 2], numbers[numbers.len() / 2])
}

fn sorted(numbers: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    numbers
}
