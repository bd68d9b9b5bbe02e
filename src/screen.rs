//! What an operator sees of a run: bars on a terminal, plain lines elsewhere. A fold over events.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use jiff::{Timestamp, Zoned};

use crate::{
    error::count,
    event::{Event, Stamped, Verdict},
};

/// How often a plain line says how far a step is.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// How often a plain line says how far a phase is.
const PHASE_LINE_EVERY: Duration = Duration::from_secs(2);

/// Shows events on stderr.
pub(crate) struct Screen {
    bars: Option<MultiProgress>,
    steps: BTreeMap<String, Shown>,
    width: usize,
}

struct Shown {
    bar: Option<ProgressBar>,
    started: Instant,
    /// Units of this step that earlier runs left.
    resumed: Option<String>,
    last_line: Instant,
    /// Of a training, all its losses together.
    loss: Option<f64>,
}

impl Screen {
    /// Bars if stderr is a terminal, plain lines if not.
    pub(crate) fn new() -> Self {
        let bars = std::io::stderr().is_terminal().then(MultiProgress::new);
        Self { bars, steps: BTreeMap::new(), width: 0 }
    }

    /// Shows one event.
    pub(crate) fn show(&mut self, stamped: &Stamped) {
        match &stamped.event {
            Event::RunStarted { run, pipeline, steps, matrix, .. } => {
                self.width = steps.iter().map(|step| step.id.len()).max().unwrap_or(0);
                let cells = matrix.as_ref().map_or_else(String::new, |matrix| format!(": {}, {} steps", matrix.words(), steps.len()));
                self.say(&format!("run {run} of `{pipeline}`{cells}"));
            }
            Event::Notice { words } => self.say(&format!("note: {words}")),
            Event::StepChecked { step, verdict, .. } => self.checked(step, verdict),
            Event::StepStarted { step } => {
                let (bar, now) = (self.bar(step), Instant::now());
                let resumed = self.steps.remove(step).and_then(|shown| shown.resumed);
                self.steps.insert(step.clone(), Shown { bar, started: now, resumed, last_line: now, loss: None });
            }
            Event::StepProgress { step, done, total, views, ready } => self.progress(step, [*done, *total], *views, *ready),
            Event::ItemFailed { step, item, reason, .. } => self.step_line(step, &format!("left out {item}: {reason}")),
            Event::StepNote { step, words } => self.step_line(step, words),
            Event::StepDone { step, items, failed, bytes, wall_s, .. } => {
                self.finish_bar(step);
                let rate = if *items > 0 && *wall_s > 0.0 { format!(", {:.0} items/s", *items as f64 / wall_s) } else { String::new() };
                let failed = if *failed > 0 { format!(", {} left out", count(*failed as usize, "item")) } else { String::new() };
                self.step_line(step, &format!("done in {}{rate}, {}{failed}", duration(*wall_s), HumanBytes(*bytes)));
            }
            Event::StepFailed { step, error, hint } => {
                self.finish_bar(step);
                self.step_line(step, &format!("failed: {error}"));
                if let Some(hint) = hint {
                    self.step_line(step, &format!("  hint: {hint}"));
                }
            }
            Event::StepSkipped { step, because } => self.step_line(step, &format!("not run, because `{because}` is not there")),
            Event::Interrupted => {
                self.say("stopping at the next unit; press Ctrl-C again to stop at once (nothing committed is lost either way)");
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

    fn checked(&mut self, step: &str, verdict: &Verdict) {
        match verdict {
            Verdict::Reused => self.step_line(step, "reused"),
            Verdict::Dropped => self.step_line(step, "dropped earlier; made again if something needs it"),
            Verdict::Run { units_done, units_total, reasons, .. } => {
                let resumed = (*units_done > 0).then(|| format!("{units_done} of {units_total} units are there"));
                let why = resumed.clone().into_iter().chain(reasons.iter().cloned()).collect::<Vec<_>>().join("; ");
                self.step_line(step, &format!("will run: {why}"));
                let now = Instant::now();
                self.steps.insert(step.to_owned(), Shown { bar: None, started: now, resumed, last_line: now, loss: None });
            }
        }
    }

    fn bar(&self, step: &str) -> Option<ProgressBar> {
        let bars = self.bars.as_ref()?;
        let template = format!("  {{prefix:{}}}  {{spinner}} {{elapsed}}  {{msg}}", self.width);
        let style = ProgressStyle::with_template(&template).expect("BUG: the template is valid");
        let bar = bars.add(ProgressBar::new(0).with_style(style).with_prefix(step.to_owned()));
        bar.enable_steady_tick(Duration::from_millis(100));
        Some(bar)
    }

    fn progress(&mut self, step: &str, [done, total]: [u64; 2], views: u64, ready: u64) {
        let Some(shown) = self.steps.get_mut(step) else { return };
        let elapsed_s = shown.started.elapsed().as_secs_f64();
        let rate = done as f64 / elapsed_s.max(1e-9);
        let left = total.saturating_sub(done) as f64 / rate.max(1e-9);
        let ends = if total > 0 && done > 0 { format!(", ends {}", clock_in(left)) } else { String::new() };
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

    fn finish_bar(&mut self, step: &str) {
        if let (Some(bars), Some(Shown { bar: Some(bar), .. })) = (&self.bars, self.steps.remove(step)) {
            bar.finish_and_clear();
            bars.remove(&bar);
        }
    }

    fn step_line(&self, step: &str, words: &str) {
        self.say(&format!("  {step:width$}  {words}", width = self.width));
    }

    fn say(&self, line: &str) {
        match &self.bars {
            // A terminal that is gone is no reason to end a run.
            Some(bars) => drop(bars.println(cut(&harmless(line)))),
            None => say(&format!("{line}\n")),
        }
    }
}

/// How far something is that is no run: one line on a terminal, a line now and then elsewhere.
pub(crate) struct Phase {
    words: String,
    started: Instant,
    last: Instant,
    is_terminal: bool,
    is_shown: bool,
}

impl Phase {
    /// Nothing is shown of what is over soon.
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
            write(&format!("{REWRITE}{}", harmless(&line)));
        } else {
            say(&format!("{line}\n"));
        }
    }
}

impl Drop for Phase {
    fn drop(&mut self) {
        if self.is_shown {
            write(REWRITE);
        }
    }
}

/// Has a terminal write the line anew.
const REWRITE: &str = "\r\x1b[K";
/// How many characters of one line are shown.
const LONGEST_LINE: usize = 4000;

/// Says something on stderr: nothing in it drives the terminal, and no line is endless. A terminal that is gone or full is no error.
pub(crate) fn say(text: &str) {
    write(&text.split_inclusive('\n').map(|line| cut(&harmless(line)).into_owned()).collect::<String>());
}

fn write(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _nobody_listens = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// Text in which nothing drives a terminal: control characters, and those that turn the order of the others, are written as JSON escapes
/// them. Line breaks and tabs stay.
pub(crate) fn harmless(text: &str) -> Cow<'_, str> {
    let is_harmful = |c: char| (c.is_control() && c != '\n' && c != '\t') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if !text.contains(is_harmful) {
        return Cow::Borrowed(text);
    }
    let escaped = |c: char| if is_harmful(c) { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() };
    Cow::Owned(text.chars().map(escaped).collect())
}

fn cut(line: &str) -> Cow<'_, str> {
    match line.char_indices().nth(LONGEST_LINE) {
        None => Cow::Borrowed(line),
        Some((end, _)) => {
            let n_more = line[end..].trim_end_matches('\n').chars().count();
            let line_end = if line.ends_with('\n') { "\n" } else { "" };
            Cow::Owned(format!("{} ... ({n_more} more characters){line_end}", &line[..end]))
        }
    }
}

/// `0.4 s`, `38 s`, `4 min 10 s`, `3 h 5 min`.
pub(crate) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        _ if seconds < 9.95 => format!("{seconds:.1} s"),
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

/// The local time of day some seconds from now, with the date if that is not today.
fn clock_in(seconds: f64) -> String {
    let now = Zoned::now();
    let then = Timestamp::now() + Duration::from_secs_f64(seconds.clamp(0.0, 1e8));
    let then = then.to_zoned(now.time_zone().clone());
    if then.date() == now.date() { then.strftime("%H:%M").to_string() } else { then.strftime("%Y-%m-%d %H:%M").to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well_at_every_scale() {
        let shown = [0.04, 9.94, 59.4, 61.0, 11_100.0].map(duration);
        assert_eq!(shown, ["0.0 s", "9.9 s", "59 s", "1 min 1 s", "3 h 5 min"]);
    }

    #[test]
    fn nothing_that_is_said_drives_the_terminal_and_no_line_is_endless() {
        assert_eq!(harmless("a\tb\n"), "a\tb\n");
        assert_eq!(harmless("\x1b[2J\r\x07 \u{9b}1m \u{202e}gpj"), "\\u001b[2J\\u000d\\u0007 \\u009b1m \\u202egpj");
        let line = cut(&"é".repeat(LONGEST_LINE + 7)).into_owned();
        assert!(line.ends_with("é ... (7 more characters)") && line.chars().count() < LONGEST_LINE + 30);
        assert_eq!(cut("short\n"), "short\n");
    }
}
