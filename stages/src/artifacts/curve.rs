//! The measurements of a training: a CSV of named numbers by step.

use std::{collections::BTreeMap, fmt::Write as _};

use ovenbird_cache::inputs::InputFile;

use crate::{Artifact, Result, error::malformed};

/// Named numbers by step of a training.
///
/// As CSV: a header `step,NAME,...` and one row per measured step, ascending; a missing number is empty.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Curve {
    /// Steps, counted from 1, with their measurements.
    pub rows: Vec<(u64, BTreeMap<String, f64>)>,
}

impl Artifact for Curve {
    const KIND: &'static str = "curve";
    const EXTENSIONS: &'static [&'static str] = &["csv"];
    const SHAPE: &'static str = "a CSV with a header `step,NAME,...`";

    /// Opens the curve of the last checkpoint, which is the longest.
    fn open(files: &[InputFile]) -> Result<Self> {
        let Some(file) = files.last() else { return Ok(Self::default()) };
        let text = String::from_utf8(file.read()?).map_err(|error| malformed(&file.path, error.to_string()))?;
        Self::parse(&text).map_err(|problem| malformed(&file.path, problem))
    }
}

impl Curve {
    /// The names of all measurements, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.rows.iter().flat_map(|(_, values)| values.keys().map(String::as_str)).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The steps that have a measurement, with its values.
    pub fn of(&self, name: &str) -> Vec<(u64, f64)> {
        self.rows.iter().filter_map(|(step, values)| Some((*step, *values.get(name)?))).collect()
    }

    /// The curve as CSV, with six digits of each number.
    pub fn to_csv(&self) -> String {
        let names = self.names();
        let mut csv = format!("step{}\n", names.iter().map(|name| format!(",{name}")).collect::<String>());
        for (step, values) in &self.rows {
            let cells = names.iter().map(|name| values.get(*name).map_or_else(|| ",".into(), |value| format!(",{value:.5e}")));
            let _infallible = writeln!(csv, "{step}{}", cells.collect::<String>());
        }
        csv
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut lines = text.lines();
        let mut header = lines.next().unwrap_or_default().split(',');
        if header.next() != Some("step") {
            return Err("expected a header that begins with `step`".into());
        }
        let names: Vec<&str> = header.collect();
        let row = |(place, line): (usize, &str)| {
            let wrong = |cell: &str| format!("line {}: expected a number, found `{cell}`", place + 2);
            let mut cells = line.split(',');
            let step = cells.next().unwrap_or_default();
            let step: u64 = step.parse().map_err(|_| wrong(step))?;
            let measured = names.iter().zip(cells).filter(|(_, cell)| !cell.is_empty());
            let values = measured.map(|(name, cell)| Ok(((*name).to_owned(), cell.parse().map_err(|_| wrong(cell))?)));
            Ok((step, values.collect::<Result<_, String>>()?))
        };
        Ok(Self { rows: lines.enumerate().map(row).collect::<Result<_, String>>()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let values = |pairs: &[(&str, f64)]| pairs.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        let curve = Curve { rows: vec![(10, values(&[("loss.boxes", 0.125), ("rate", 1e-4)])), (20, values(&[("rate", 5e-5)]))] };
        let csv = curve.to_csv();
        assert_eq!(csv, "step,loss.boxes,rate\n10,1.25000e-1,1.00000e-4\n20,,5.00000e-5\n");
        assert_eq!(Curve::parse(&csv).unwrap(), curve);
        assert_eq!((curve.of("loss.boxes"), curve.of("rate").len()), (vec![(10, 0.125)], 2));
        assert_eq!(Curve::parse("step,rate\n10,fast\n").unwrap_err(), "line 2: expected a number, found `fast`");
        assert!(Curve::parse("10,1\n").unwrap_err().contains("header"));
    }
}
