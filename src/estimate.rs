//! `ovenbird run --estimate`: what a pipeline will take, from a measured sample of every stage.

use std::{collections::BTreeMap, path::Path};

use indicatif::HumanBytes;

use crate::{
    error::Result,
    event::{self, Event, Verdict},
    screen::duration,
};

/// A line a stage: what the sample took, and what the whole will. Time and bytes grow with the number of items; the start of a stage
/// (weights, tables) is counted with them, so that small samples predict too much rather than too little.
pub(crate) fn table(home: &Path, run: &str) -> Result<String> {
    let mut samples: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    let log = event::read_log(home, run)?;
    let ids = log.iter().filter_map(|stamped| if let Event::StepDone { step, .. } = &stamped.event { Some(step.len()) } else { None });
    let width = ids.max().unwrap_or(0).max(12);
    let mut text = format!("\n{:width$} {:>9} {:>10} {:>12} {:>12} {:>12}\n", "stage", "sample", "whole", "time", "written", "memory");
    let (mut all_s, mut all_bytes, mut most) = (0.0, 0, 0);
    for stamped in log {
        match stamped.event {
            Event::StepChecked { step, verdict: Verdict::Run { sample: Some(sample), .. }, .. } => drop(samples.insert(step, sample)),
            Event::StepDone { step, bytes, wall_s, peak_bytes, .. } => {
                let (sample, whole) = samples.get(&step).copied().unwrap_or((1, 1));
                let scale = whole as f64 / sample.max(1) as f64;
                let (seconds, bytes) = (wall_s * scale, (bytes as f64 * scale) as u64);
                (all_s, all_bytes, most) = (all_s + seconds, all_bytes + bytes, most.max(peak_bytes));
                let (written, memory) = (HumanBytes(bytes).to_string(), HumanBytes(peak_bytes).to_string());
                text.push_str(&format!("{step:width$} {sample:>9} {whole:>10} {:>12} {written:>12} {memory:>12}\n", duration(seconds)));
            }
            _ => {}
        }
    }
    let (written, memory) = (HumanBytes(all_bytes).to_string(), HumanBytes(most).to_string());
    text.push_str(&format!("{:width$} {:>9} {:>10} {:>12} {written:>12} {memory:>12}\n", "all", "", "", duration(all_s)));
    text.push_str("one stage after the other; stages without items are taken as measured. A stage that is reused has no line\n");
    Ok(text)
}
