//! Progress on stderr: bars on a terminal, plain lines elsewhere.

use std::{
    collections::BTreeMap,
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use console::{Style, Term};
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use jiff::Timestamp;

use crate::{
    event::{Event, Stamped, Verdict},
    output::{clock, count, cut, duration, harmless, say, write_stderr},
    pipeline::step_id::StepId,
    reason::{self, Sources},
};

/// Makes a terminal write the current line again.
const REWRITE: &str = "\r\x1b[K";
/// The width of a terminal that does not tell it.
const WIDTH: usize = 80;
/// The interval of plain progress lines of a step.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The interval of plain progress lines of other work.
const PHASE_LINE_EVERY: Duration = Duration::from_secs(2);

/// Shows the events of a run.
pub(crate) struct RunProgress {
    bars: Option<MultiProgress>,
    steps: BTreeMap<StepId, Shown>,
    /// The source of each input of each step.
    sources: BTreeMap<StepId, Sources>,
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
        Self { bars, steps: BTreeMap::new(), sources: BTreeMap::new(), width: 0 }
    }

    /// Shows one event.
    pub(crate) fn show(&mut self, stamped: &Stamped) {
        match &stamped.event {
            Event::RunStarted { run, pipeline, steps, matrix, .. } => {
                self.sources = stamped.event.sources();
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
                self.say("stopping: running steps keep what they have finished (`--grace`); Ctrl-C again stops at once");
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
                let reasons = reasons.iter().map(|reason| reason::in_words(reason, self.sources.get(step).unwrap_or(&NO_SOURCES)));
                let why = resumed.clone().into_iter().chain(reasons).collect::<Vec<_>>().join("; ");
                let line = format!("  {step:width$}  will run: {why}", width = self.width);
                let is_short = self.bars.is_none() || line.chars().count() <= terminal_width();
                self.say(&if is_short { line } else { cut_to(&line, terminal_width()) });
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
        let ends = (total > 0 && done > 0).then(|| format!("ends {}", clock(Timestamp::now() + Duration::from_secs_f64(left.min(1e8)))));
        let flow = match (views, ready) {
            (0, _) => None,
            (views, 0) => Some(format!("{:.0} views/s, waits for images", views as f64 / elapsed_s.max(1e-9))),
            (views, _) => Some(format!("{:.0} views/s, {ready} ready", views as f64 / elapsed_s.max(1e-9))),
        };
        let amount = match total {
            0 => format!("{done} items"),
            total => format!("{done}/{total} ({:.0} %)", 100.0 * done as f64 / total as f64),
        };
        // The most important parts have the smallest numbers.
        let loss = shown.loss.map(|loss| format!("loss {loss:.3}"));
        let parts = [(0, Some(amount)), (3, Some(format!("{rate:.1} items/s"))), (4, flow), (2, loss), (1, ends)];
        let parts: Vec<(u8, String)> = parts.into_iter().filter_map(|(rank, part)| Some((rank, part?))).collect();
        if let Some(bar) = &shown.bar {
            // The spaces between the columns, and the time so far.
            let room = terminal_width().saturating_sub(self.width + 12);
            let bar_width = if room >= 24 + 40 { 24 } else { 8 };
            if total > 0 {
                bar.set_length(total);
                bar.set_position(done);
                let template = format!("  {{prefix:{}}}  {{bar:{bar_width}}} {{elapsed}}  {{msg}}", self.width);
                bar.set_style(ProgressStyle::with_template(&template).expect("BUG: the template is valid").progress_chars("=> "));
            }
            bar.set_message(fitted(&parts, room.saturating_sub(bar_width)));
        } else if shown.last_line.elapsed() >= LINE_EVERY {
            shown.last_line = Instant::now();
            self.step_line(step, &fitted(&parts, usize::MAX));
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
            Some(bars) => drop(bars.println(coloured(&cut(&harmless(line))))),
            None => say(&format!("{line}\n")),
        }
    }
}

static NO_SOURCES: Sources = Sources::new();

/// The columns of the terminal at stderr.
fn terminal_width() -> usize {
    Term::stderr().size_checked().map_or(WIDTH, |(_, columns)| usize::from(columns).max(20))
}

/// A line that ends with `…` where it is longer than some columns.
fn cut_to(line: &str, columns: usize) -> String {
    match line.char_indices().nth(columns) {
        None => line.to_owned(),
        Some(_) => line.chars().take(columns - 1).chain(['…']).collect(),
    }
}

/// As many parts as fit into some columns, in their order. Those with the highest rank are left out first; the one with rank 0 stays.
fn fitted(parts: &[(u8, String)], columns: usize) -> String {
    let joined = |most: u8| parts.iter().filter(|(rank, _)| *rank <= most).map(|(_, part)| part.as_str()).collect::<Vec<_>>().join(", ");
    let highest = parts.iter().map(|(rank, _)| *rank).max().unwrap_or(0);
    (0..=highest).rev().map(joined).find(|line| line.chars().count() <= columns).unwrap_or_else(|| joined(0))
}

/// A line with its first word of state in colour; without where `NO_COLOR` is set.
fn coloured(line: &str) -> String {
    let words = [("  done in ", Style::new().green()), ("  failed: ", Style::new().red()), ("note: ", Style::new().yellow())];
    let found = words.into_iter().filter_map(|(word, style)| Some((line.find(word)?, word, style))).min_by_key(|(at, ..)| *at);
    match found {
        Some((at, word, style)) => {
            format!("{}{}{}", &line[..at], style.for_stderr().apply_to(word), &line[at + word.len()..])
        }
        None => line.to_owned(),
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
            write_stderr(&format!("{REWRITE}{}", cut_to(&harmless(&line), terminal_width() - 1)));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_shortened_by_its_least_important_parts() {
        let parts = [(0, "123/4000 (3 %)"), (3, "41.0 items/s"), (4, "512 views/s, 3 ready"), (2, "loss 1.250"), (1, "ends Sat 14:10")];
        let parts = parts.map(|(rank, part)| (rank, part.to_owned()));
        let check = |columns: usize, expected: &str| assert_eq!(fitted(&parts, columns), expected);
        check(90, "123/4000 (3 %), 41.0 items/s, 512 views/s, 3 ready, loss 1.250, ends Sat 14:10");
        check(60, "123/4000 (3 %), 41.0 items/s, loss 1.250, ends Sat 14:10");
        check(50, "123/4000 (3 %), loss 1.250, ends Sat 14:10");
        check(30, "123/4000 (3 %), ends Sat 14:10");
        check(29, "123/4000 (3 %)");
        check(5, "123/4000 (3 %)");
        assert_eq!((cut_to("abcdef", 6), cut_to("abcdefg", 6)), ("abcdef".into(), "abcde…".into()));
    }
}
