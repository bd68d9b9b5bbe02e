//! `ovenbird run --estimate`: what a pipeline will take, from samples of at least two sizes.
//!
//! A step takes some time however few items it has (its start-up: to load a network, to read annotations), and more for each item. Samples of
//! two sizes tell the two apart.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use indicatif::HumanBytes;
use ovenbird_cache::{Fingerprint, Store, unit_name};

use crate::{
    chosen::Wanted,
    error::Result,
    event::{self, Event, Verdict},
    output::{duration, print},
    pipeline::step_id::StepId,
    progress::RunProgress,
    run::{self, local::Options},
};

/// How many items of each step the first sample has.
const FIRST: usize = 16;
/// How many times as many items the next sample has.
const GROWTH: usize = 4;
/// The most items of a sample.
const MOST: usize = 4096;
/// A sample that took longer is the last one, unless it is the first.
const LONG: Duration = Duration::from_secs(8);

/// Prints time, bytes and memory of every step. `sample`: how many items of each step to measure at most; by default, until it takes some
/// seconds.
pub(super) fn estimate(home: &Path, wanted: &Wanted, options: &Options, sample: Option<usize>) -> Result<()> {
    let store = Store::open(&home.join("dry-run").join("estimate"))?;
    // Reused results would not be measured.
    store.publisher().remove(store.home())?;
    let store = Store::open(store.home())?;
    let mut measured: Vec<Measured> = Vec::new();
    let mut size = sample.map_or(FIRST, |most| most.div_ceil(GROWTH));
    loop {
        let clock = Instant::now();
        let made = measure(&store, wanted, options, size, &mut measured)?;
        let is_last = match sample {
            Some(most) => size >= most,
            None => size >= MOST || (size > FIRST && clock.elapsed() > LONG),
        };
        if is_last || measured.iter().all(Measured::is_whole) {
            break;
        }
        forget(&store, &made)?;
        size = (size * GROWTH).min(sample.unwrap_or(MOST));
    }
    Ok(print(&table(&measured))?)
}

/// A step in samples of growing sizes.
struct Measured {
    step: StepId,
    /// How many items it has in all.
    whole: u64,
    samples: Vec<Sample>,
    peak_bytes: u64,
}

#[derive(Clone, Copy)]
struct Sample {
    n_items: u64,
    wall_s: f64,
    bytes: u64,
}

/// What a step as a whole will take.
struct Predicted {
    start_s: f64,
    /// Items in a second; `None` where the step has no items, or was measured as a whole.
    rate: Option<f64>,
    wall_s: f64,
    bytes: u64,
}

impl Measured {
    fn last(&self) -> Sample {
        *self.samples.last().expect("BUG: a step is listed with its first sample")
    }

    fn is_whole(&self) -> bool {
        self.last().n_items >= self.whole
    }

    /// The line through the last two samples. Where a larger sample was no slower, all of its time counts as the items'.
    fn predicted(&self) -> Predicted {
        let last = self.last();
        if self.is_whole() {
            return Predicted { start_s: last.wall_s, rate: None, wall_s: last.wall_s, bytes: last.bytes };
        }
        let (n_last, n_whole) = (last.n_items.max(1) as f64, self.whole as f64);
        let before = self.samples.iter().rev().find(|sample| sample.n_items < last.n_items && sample.wall_s < last.wall_s);
        let (start_s, item_s, item_bytes) = match before {
            None => (0.0, last.wall_s / n_last, last.bytes as f64 / n_last),
            Some(before) => {
                let more = n_last - before.n_items as f64;
                let item_s = (last.wall_s - before.wall_s) / more;
                // A sample of very few items may be slower than the line.
                let item_s = item_s.min(last.wall_s / n_last);
                (last.wall_s - item_s * n_last, item_s, last.bytes.saturating_sub(before.bytes) as f64 / more)
            }
        };
        Predicted {
            start_s,
            rate: Some(1.0 / item_s),
            wall_s: start_s + item_s * n_whole,
            bytes: last.bytes + (item_bytes * (n_whole - n_last)) as u64,
        }
    }
}

/// Runs the pipeline with at most so many items of each step. Returns the steps that have more items, by kind and recipe.
fn measure(
    store: &Store,
    wanted: &Wanted,
    options: &Options,
    n_items: usize,
    measured: &mut Vec<Measured>,
) -> Result<Vec<(String, Fingerprint)>> {
    let (mut pipeline, wanted) = wanted.load()?;
    pipeline.steps.iter_mut().for_each(|step| step.most_items = Some(n_items));
    let pipeline = Arc::new(pipeline);
    let mut progress = RunProgress::new();
    let ended = run::run(&pipeline, &wanted, store, options, &mut |event| progress.show(event))?;
    if let Some(error) = ended.error {
        return Err(error);
    }
    let (mut samples, mut parts): (BTreeMap<StepId, (u64, u64)>, _) = (BTreeMap::new(), Vec::new());
    for stamped in event::read_log(store.home(), &ended.run)? {
        match stamped.event {
            Event::StepChecked { step, verdict: Verdict::Run { sample: Some(sample), .. }, .. } => drop(samples.insert(step, sample)),
            Event::StepDone { step, fingerprint, bytes, wall_s, peak_bytes, .. } => {
                let (n_items, whole) = samples.get(&step).copied().unwrap_or((1, 1));
                if n_items < whole
                    && let Some(known) = pipeline.steps.iter().find(|known| known.id == step)
                {
                    parts.push((known.entry.kind.to_owned(), fingerprint));
                }
                let sample = Sample { n_items, wall_s, bytes };
                match measured.iter_mut().find(|known| known.step == step) {
                    None => measured.push(Measured { step, whole, samples: vec![sample], peak_bytes }),
                    Some(known) => {
                        known.whole = whole;
                        known.peak_bytes = known.peak_bytes.max(peak_bytes);
                        known.samples.retain(|earlier| earlier.n_items != n_items);
                        known.samples.push(sample);
                    }
                }
            }
            _ => {}
        }
    }
    Ok(parts)
}

/// Removes the results of some steps, so that a larger sample computes all of its items.
fn forget(store: &Store, steps: &[(String, Fingerprint)]) -> Result<()> {
    let why = "a larger sample is measured";
    for (kind, fingerprint) in steps {
        let Some(manifest) = store.manifest(kind, fingerprint)? else { continue };
        store.remove_record(&store.place_of(&store.manifest_path(kind, fingerprint)), why)?;
        for unit in &manifest.units {
            store.remove_unit(&unit_name(kind, &unit.key.fingerprint), why)?;
        }
    }
    Ok(())
}

/// A line for each step: what was measured, and a prediction for all items.
fn table(measured: &[Measured]) -> String {
    let width = measured.iter().map(|step| step.step.to_string().len()).max().unwrap_or(0).max(12);
    let mut text = format!(
        "\n{:width$} {:>7} {:>9} {:>8} {:>9} {:>13} {:>11} {:>11}\n",
        "step", "sample", "whole", "start", "items/s", "time", "written", "memory"
    );
    let (mut all_s, mut all_bytes, mut most) = (0.0, 0, 0);
    for step in measured {
        let Predicted { start_s, rate, wall_s, bytes } = step.predicted();
        (all_s, all_bytes, most) = (all_s + wall_s, all_bytes + bytes, most.max(step.peak_bytes));
        let rate = rate.map_or_else(String::new, |rate| format!("{rate:.1}"));
        let (written, memory) = (HumanBytes(bytes).to_string(), HumanBytes(step.peak_bytes).to_string());
        let (id, sample, whole, start, time) = (&step.step, step.last().n_items, step.whole, duration(start_s), duration(wall_s));
        text.push_str(&format!("{id:width$} {sample:>7} {whole:>9} {start:>8} {rate:>9} {time:>13} {written:>11} {memory:>11}\n"));
    }
    let (written, memory) = (HumanBytes(all_bytes).to_string(), HumanBytes(most).to_string());
    text.push_str(&format!(
        "{:width$} {:>7} {:>9} {:>8} {:>9} {:>13} {written:>11} {memory:>11}\n",
        "all",
        "",
        "",
        "",
        "",
        duration(all_s)
    ));
    text.push_str("steps run one after the other; steps without items are listed as measured\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn predicted(whole: u64, samples: &[(u64, f64, u64)]) -> (f64, Option<f64>, f64, u64) {
        let samples = samples.iter().map(|(n_items, wall_s, bytes)| Sample { n_items: *n_items, wall_s: *wall_s, bytes: *bytes }).collect();
        let Predicted { start_s, rate, wall_s, bytes } =
            Measured { step: StepId::of_stage("a"), whole, samples, peak_bytes: 0 }.predicted();
        (start_s, rate, wall_s, bytes)
    }

    #[test]
    fn start_up_is_told_apart_from_the_items() {
        assert_eq!(predicted(1000, &[(16, 2.5, 260), (64, 4.0, 740)]), (2.0, Some(32.0), 33.25, 10_100));
        // Measured as a whole.
        assert_eq!(predicted(64, &[(16, 2.5, 260), (64, 4.0, 740)]), (4.0, None, 4.0, 740));
        // The larger sample was faster: all of its time is the items'.
        assert_eq!(predicted(640, &[(16, 5.0, 160), (64, 4.0, 640)]), (0.0, Some(16.0), 40.0, 6400));
        // One size only.
        assert_eq!(predicted(40, &[(4, 2.0, 400)]), (0.0, Some(2.0), 20.0, 4000));
    }
}
