//! Progress on stderr: bars on a terminal, plain lines elsewhere.

use std::{
    collections::BTreeMap,
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use jiff::Timestamp;

use crate::{
    event::{Event, Stamped, Verdict},
    output::{clock, count, cut, duration, harmless, say, write_stderr},
    pipeline::step_id::StepId,
};

/// Makes a terminal write the current line again.
const REWRITE: &str = "\r\x1b[K";
/// The interval of plain progress lines of a step.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The interval of plain progress lines of other work.
const PHASE_LINE_EVERY: Duration = Duration::from_secs(2);

/// Shows the events of a run.
pub(crate) struct RunProgress {
    bars: Option<MultiProgress>,
    steps: BTreeMap<StepId, Shown>,
    width: usize,
}

struct Shown {
    bar: Option<ProgressBar>,
    started: Instant,
    /// How many units earlier runs finished, in words.
    resumed: Option<String>,
    last_line: Instant,
    /// The sum of a training's losses.
    loss: Option<f64>,
}

impl RunProgress {
    /// Bars if stderr is a terminal, plain lines if not.
    pub(crate) fn new() -> Self {
        let bars = std::io::stderr().is_terminal().then(MultiProgress::new);
        Self { bars, steps: BTreeMap::new(), width: 0 }
    }

    /// Shows one event.
    pub(crate) fn show(&mut self, stamped: &Stamped) {
        match &stamped.event {
            Event::RunStarted { run, pipeline, steps, matrix, .. } => {
                self.width = steps.iter().map(|step| step.id.to_string().len()).max().unwrap_or(0);
                let combinations = matrix.as_ref().map_or_else(String::new, |matrix| format!(": {matrix}, {} steps", steps.len()));
                self.say(&format!("run {run} of `{pipeline}`{combinations}"));
            }
            Event::Notice { words } => self.say(&format!("note: {words}")),
            Event::StepChecked { step, verdict, .. } => self.checked(step, verdict),
            Event::StepStarted { step } => {
                let (bar, now) = (self.bar(step), Instant::now());
                let resumed = self.steps.remove(step).and_then(|shown| shown.resumed);
                self.steps.insert(step.clone(), Shown { bar, started: now, resumed, last_line: now, loss: None });
            }
            Event::StepProgress { step, done, total, views, ready } => self.progress(step, [*done, *total], *views, *ready),
            Event::ItemFailed { step, item, reason, .. } => self.step_line(step, &format!("skipped {item}: {reason}")),
            Event::StepNote { step, words } => self.step_line(step, words),
            Event::StepDone { step, items, failed, bytes, wall_s, .. } => {
                self.finish_bar(step);
                let rate = if *items > 0 && *wall_s > 0.0 { format!(", {:.0} items/s", *items as f64 / wall_s) } else { String::new() };
                let failed = if *failed > 0 { format!(", {} skipped", count(*failed as usize, "item")) } else { String::new() };
                self.step_line(step, &format!("done in {}{rate}, {}{failed}", duration(*wall_s), HumanBytes(*bytes)));
            }
            Event::StepFailed { step, error, hint } => {
                self.finish_bar(step);
                self.step_line(step, &format!("failed: {error}"));
                if let Some(hint) = hint {
                    self.step_line(step, &format!("  hint: {hint}"));
                }
            }
            Event::StepSkipped { step, because } => self.step_line(step, &format!("not run: it needs `{because}`, which has no result")),
            Event::Interrupted => {
                self.say("stopping at the next unit; press Ctrl-C again to stop at once (finished units are kept either way)");
            }
            Event::Measured { step, values, .. } => {
                let losses: Vec<f64> = values.iter().filter(|(name, _)| name.starts_with("loss.")).map(|(_, loss)| *loss).collect();
                if let Some(shown) = self.steps.get_mut(step).filter(|_| !losses.is_empty()) {
                    shown.loss = Some(losses.iter().sum());
                }
            }
            Event::UnitCommitted { .. } => {}
            Event::RunEnded { .. } => {
                if let Some(bars) = &self.bars {
                    drop(bars.clear());
                }
            }
        }
    }

    fn checked(&mut self, step: &StepId, verdict: &Verdict) {
        match verdict {
            Verdict::Reused => self.step_line(step, "reused"),
            Verdict::Dropped => self.step_line(step, "dropped earlier; recomputed if a step needs it"),
            Verdict::Run { units_done, units_total, reasons, .. } => {
                let resumed = (*units_done > 0).then(|| format!("{units_done} of {units_total} units done"));
                let why = resumed.clone().into_iter().chain(reasons.iter().cloned()).collect::<Vec<_>>().join("; ");
                self.step_line(step, &format!("will run: {why}"));
                let now = Instant::now();
                self.steps.insert(step.clone(), Shown { bar: None, started: now, resumed, last_line: now, loss: None });
            }
        }
    }

    fn bar(&self, step: &StepId) -> Option<ProgressBar> {
        let bars = self.bars.as_ref()?;
        let template = format!("  {{prefix:{}}}  {{spinner}} {{elapsed}}  {{msg}}", self.width);
        let style = ProgressStyle::with_template(&template).expect("BUG: the template is valid");
        let bar = bars.add(ProgressBar::new(0).with_style(style).with_prefix(step.to_string()));
        bar.enable_steady_tick(Duration::from_millis(100));
        Some(bar)
    }

    fn progress(&mut self, step: &StepId, [done, total]: [u64; 2], views: u64, ready: u64) {
        let Some(shown) = self.steps.get_mut(step) else { return };
        let elapsed_s = shown.started.elapsed().as_secs_f64();
        let rate = done as f64 / elapsed_s.max(1e-9);
        let left = total.saturating_sub(done) as f64 / rate.max(1e-9);
        let ends = if total > 0 && done > 0 {
            format!(", ends {}", clock(Timestamp::now() + Duration::from_secs_f64(left.min(1e8))))
        } else {
            String::new()
        };
        let flow = match (views, ready) {
            (0, _) => String::new(),
            (views, 0) => format!(", {:.0} views/s, waits for images", views as f64 / elapsed_s.max(1e-9)),
            (views, _) => format!(", {:.0} views/s, {ready} ready", views as f64 / elapsed_s.max(1e-9)),
        };
        let flow = flow + &shown.loss.map_or_else(String::new, |loss| format!(", loss {loss:.3}"));
        let words = match total {
            0 => format!("{done} items, {rate:.1} items/s{flow}"),
            total => format!("{done}/{total} ({:.0} %), {rate:.1} items/s{flow}{ends}", 100.0 * done as f64 / total as f64),
        };
        if let Some(bar) = &shown.bar {
            if total > 0 {
                bar.set_length(total);
                bar.set_position(done);
                let template = format!("  {{prefix:{}}}  {{bar:24}} {{elapsed}}  {{msg}}", self.width);
                bar.set_style(ProgressStyle::with_template(&template).expect("BUG: the template is valid").progress_chars("=> "));
            }
            bar.set_message(words);
        } else if shown.last_line.elapsed() >= LINE_EVERY {
            shown.last_line = Instant::now();
            self.step_line(step, &words);
        }
    }

    fn finish_bar(&mut self, step: &StepId) {
        if let (Some(bars), Some(Shown { bar: Some(bar), .. })) = (&self.bars, self.steps.remove(step)) {
            bar.finish_and_clear();
            bars.remove(&bar);
        }
    }

    fn step_line(&self, step: &StepId, words: &str) {
        self.say(&format!("  {step:width$}  {words}", width = self.width));
    }

    fn say(&self, line: &str) {
        match &self.bars {
            // A closed terminal does not end a run.
            Some(bars) => drop(bars.println(cut(&harmless(line)))),
            None => say(&format!("{line}\n")),
        }
    }
}

/// Shows the progress of work outside a run: one line on a terminal, a line every two seconds elsewhere.
pub(crate) struct TaskProgress {
    words: String,
    started: Instant,
    last: Instant,
    is_terminal: bool,
    is_shown: bool,
}

impl TaskProgress {
    /// Nothing is shown in the first second.
    pub(crate) fn new(words: &str) -> Self {
        let (started, is_terminal) = (Instant::now(), std::io::stderr().is_terminal());
        Self { words: words.into(), started, last: started, is_terminal, is_shown: false }
    }

    /// `total` is 0 while unknown.
    pub(crate) fn tell(&mut self, done: u64, total: u64, more: &str) {
        let every = if self.is_terminal { Duration::from_millis(200) } else { PHASE_LINE_EVERY };
        if self.last.elapsed() < every || self.started.elapsed() < Duration::from_secs(1) {
            return;
        }
        self.last = Instant::now();
        let of = if total > 0 { format!("/{total} ({:.0} %)", 100.0 * done as f64 / total as f64) } else { String::new() };
        let rate = done as f64 / self.started.elapsed().as_secs_f64();
        let line = format!("{}: {done}{of}, {rate:.0}/s {more}", self.words);
        if self.is_terminal {
            self.is_shown = true;
            write_stderr(&format!("{REWRITE}{}", harmless(&line)));
        } else {
            say(&format!("{line}\n"));
        }
    }
}

impl Drop for TaskProgress {
    fn drop(&mut self) {
        if self.is_shown {
            write_stderr(REWRITE);
        }
    }
}
