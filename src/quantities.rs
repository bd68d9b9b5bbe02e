//! Numbers with units on the command line: `30m`, `0.1%`, `3/7`, `200MB/s`.

use std::time::Duration;

/// `0.1%` as a fraction.
pub(crate) fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok());
    number.filter(|number| *number > 0.0 && *number <= 100.0).map(|number| number / 100.0).ok_or_else(|| "expected for example 0.1%".into())
}

/// `3/7`: part 3 of 7.
pub(crate) fn kth_of(text: &str) -> Result<(u64, u64), String> {
    let parts = text.split_once('/').and_then(|(k, n)| Some((k.parse().ok()?, n.parse().ok()?)));
    parts.filter(|(k, n)| *k >= 1 && k <= n).ok_or_else(|| "expected K/N with K from 1 to N, such as 3/7".into())
}

/// `90s`, `30m`, `8h`, `30d`; a hundred years at most.
pub(crate) fn time(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let seconds = match unit {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err("expected for example 90s, 30m, 8h or 30d".into()),
    };
    let number: u64 = number.parse().map_err(|_| "expected a whole number of s, m, h or d, such as 8h".to_owned())?;
    Ok(Duration::from_secs(number.saturating_mul(seconds).min(100 * 366 * 86_400)))
}

/// `200MB/s` in bytes.
pub(crate) fn rate(text: &str) -> Result<u64, String> {
    let bytes = text.strip_suffix("/s").unwrap_or(text).to_ascii_uppercase();
    let (number, unit) = bytes.split_at(bytes.find(|c: char| !c.is_ascii_digit()).unwrap_or(bytes.len()));
    let scale = match unit {
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return Err("expected for example 200MB/s".into()),
    };
    let rate = number.parse::<u64>().map_err(|error| error.to_string())?.saturating_mul(scale);
    if rate > 0 { Ok(rate) } else { Err("expected more than 0".into()) }
}
