//! Printing: text on stdout and stderr, JSON forms, counts and durations. Imports no other file of the program.

use std::{
    borrow::Cow,
    io::{self, Write as _},
    path::Path,
};

use jiff::{Timestamp, Unit, Zoned};
use ovenbird_cache::Error as CacheError;
use serde::Serialize;
use serde_json::json;

/// The home without `--home` and OVENBIRD_HOME.
pub(crate) const DEFAULT_HOME: &str = ".ovenbird";

/// The version of every `--json` form.
const JSON_VERSION: u32 = 1;

/// Prints data to stdout, with control characters escaped; a reader that has gone away is not an error.
pub(crate) fn print(text: &str) -> Result<(), CacheError> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(harmless(text).as_bytes()).and_then(|()| stdout.flush()) {
        Err(source) if source.kind() != io::ErrorKind::BrokenPipe => Err(CacheError::Write { path: "standard output".into(), source }),
        _ => Ok(()),
    }
}

/// A versioned JSON document for `--json`.
pub(crate) fn to_json(key: &str, value: &impl Serialize) -> String {
    let document = json!({"version": JSON_VERSION, key: value});
    format!("{}\n", serde_json::to_string_pretty(&document).expect("BUG: our own data is plain JSON"))
}

/// `1 problem`, `2 problems`.
pub(crate) fn count(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}

/// The most characters of a line that are shown.
const LONGEST_LINE: usize = 4000;

/// Prints text to stderr, with control characters escaped and long lines cut. A closed or full terminal is not an error.
pub(crate) fn say(text: &str) {
    write_stderr(&text.split_inclusive('\n').map(|line| cut(&harmless(line)).into_owned()).collect::<String>());
}

/// Writes text to stderr as it is; an error is ignored.
pub(crate) fn write_stderr(text: &str) {
    let mut stderr = io::stderr().lock();
    let _ignored = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// Text with control characters, and those that change the direction of text, escaped as in JSON. Line breaks and tabs stay.
pub(crate) fn harmless(text: &str) -> Cow<'_, str> {
    let is_harmful = |c: char| (c.is_control() && c != '\n' && c != '\t') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if !text.contains(is_harmful) {
        return Cow::Borrowed(text);
    }
    let escaped = |c: char| if is_harmful(c) { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() };
    Cow::Owned(text.chars().map(escaped).collect())
}

/// A line without what exceeds [`LONGEST_LINE`], and how much that is.
pub(crate) fn cut(line: &str) -> Cow<'_, str> {
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

/// A command line of this program that works as typed in the same shell.
#[expect(clippy::disallowed_methods, reason = "the home that the next command would use")]
pub(crate) fn as_typed(home: &Path, words: &[String]) -> String {
    let program = std::env::args().next().unwrap_or_else(|| "ovenbird".into());
    let default = std::env::var_os("OVENBIRD_HOME").unwrap_or_else(|| DEFAULT_HOME.into());
    let home = if home.as_os_str() == default { vec![] } else { vec!["--home".to_owned(), home.display().to_string()] };
    let all = [program].iter().chain(words).chain(&home).cloned().collect::<Vec<_>>();
    shlex::try_join(all.iter().map(String::as_str)).unwrap_or_else(|_| all.join(" "))
}

/// A time in local time: `14:10` for today, `Sat 14:10` for the next six days, `2026-11-28 14:10` for others.
pub(crate) fn clock(then: Timestamp) -> String {
    let now = Zoned::now();
    clock_seen_at(&now, &then.to_zoned(now.time_zone().clone()))
}

fn clock_seen_at(now: &Zoned, then: &Zoned) -> String {
    let days = now.date().until((Unit::Day, then.date())).map_or(i32::MAX, |span| span.get_days());
    let format = match days {
        0 => "%H:%M",
        1..=6 => "%a %H:%M",
        _ => "%Y-%m-%d %H:%M",
    };
    then.strftime(format).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_its_day_unless_that_is_today() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap().to_zoned(jiff::tz::TimeZone::UTC);
        let now = at("2026-11-26T22:00:00Z");
        let shown = ["2026-11-26T23:05:00Z", "2026-11-28T14:10:00Z", "2026-12-03T09:00:00Z", "2026-11-25T22:43:00Z"];
        let shown = shown.map(|then| clock_seen_at(&now, &at(then)));
        assert_eq!(shown, ["23:05", "Sat 14:10", "2026-12-03 09:00", "2026-11-25 22:43"]);
    }

    #[test]
    fn durations_read_well_at_every_scale() {
        let shown = [0.04, 9.94, 59.4, 61.0, 11_100.0].map(duration);
        assert_eq!(shown, ["0.0 s", "9.9 s", "59 s", "1 min 1 s", "3 h 5 min"]);
    }

    #[test]
    fn control_characters_are_escaped_and_long_lines_are_cut() {
        assert_eq!(harmless("a\tb\n"), "a\tb\n");
        assert_eq!(harmless("\x1b[2J\r\x07 \u{9b}1m \u{202e}gpj"), "\\u001b[2J\\u000d\\u0007 \\u009b1m \\u202egpj");
        let line = cut(&"é".repeat(LONGEST_LINE + 7)).into_owned();
        assert!(line.ends_with("é ... (7 more characters)") && line.chars().count() < LONGEST_LINE + 30);
        assert_eq!(cut("short\n"), "short\n");
    }
}
