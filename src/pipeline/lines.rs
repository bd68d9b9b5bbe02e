//! Which line of a YAML text a path is on.

use std::collections::BTreeMap;

use saphyr_parser::{Event, Parser};

/// Lines by path. Entries of a list that have an `id` are named by it, others by their place.
pub(super) struct Lines {
    by_path: BTreeMap<String, usize>,
}

/// Deeper nesting is not read: `serde_yaml` refuses it, and paths would grow with the depth.
const DEEPEST: usize = 128;

enum Frame {
    Mapping { path: String, key: Option<String> },
    Sequence { path: String, next: usize },
}

impl Lines {
    /// Reads the positions; a text that is no YAML has those up to its first error.
    pub(super) fn of(text: &str) -> Self {
        let mut by_path = BTreeMap::new();
        let mut ids: Vec<(String, String)> = Vec::new();
        let mut stack: Vec<Frame> = Vec::new();
        for event in Parser::new_from_str(text) {
            let Ok((event, span)) = event else { break };
            if stack.len() > DEEPEST {
                break;
            }
            let line = span.start.line();
            match event {
                Event::MappingStart(..) | Event::SequenceStart(..) => {
                    let path = enter(&mut stack);
                    by_path.entry(path.clone()).or_insert(line);
                    stack.push(match event {
                        Event::MappingStart(..) => Frame::Mapping { path, key: None },
                        _ => Frame::Sequence { path, next: 0 },
                    });
                }
                Event::MappingEnd | Event::SequenceEnd => drop(stack.pop()),
                Event::Scalar(value, ..) => match stack.last_mut() {
                    Some(Frame::Mapping { path, key: key @ None }) => {
                        by_path.insert(join(path, &value), line);
                        *key = Some(value.into_owned());
                    }
                    Some(Frame::Mapping { path, key }) => {
                        let key = key.take();
                        ids.extend((key.as_deref() == Some("id")).then(|| (path.clone(), value.into_owned())));
                    }
                    Some(Frame::Sequence { .. }) => drop(by_path.insert(enter(&mut stack), line)),
                    None => {}
                },
                _ => {}
            }
        }
        // `stages.3.with` is found as `stages.objects.with` too.
        let named: Vec<(String, usize)> = by_path.iter().filter_map(|(path, line)| Some((renamed(path, &ids)?, *line))).collect();
        by_path.extend(named);
        Self { by_path }
    }

    /// The line of a path, or of the nearest part of it that is there; from 1.
    pub(super) fn of_path(&self, path: &str) -> Option<usize> {
        // Paths of parameters have indices in brackets.
        let path = path.replace('[', ".").replace(']', "");
        let mut path = path.as_str();
        loop {
            if let Some(line) = self.by_path.get(path) {
                return Some(*line);
            }
            path = path.rsplit_once('.')?.0;
        }
    }
}

/// The path of the value that begins here.
fn enter(stack: &mut [Frame]) -> String {
    match stack.last_mut() {
        Some(Frame::Mapping { path, key }) => join(path, &key.take().unwrap_or_default()),
        Some(Frame::Sequence { path, next }) => {
            *next += 1;
            join(path, &(*next - 1).to_string())
        }
        None => String::new(),
    }
}

fn renamed(path: &str, ids: &[(String, String)]) -> Option<String> {
    let (place, id) = ids.iter().find(|(place, _)| path == place || path.starts_with(&format!("{place}.")))?;
    let list = place.rsplit_once('.').map_or("", |(list, _)| list);
    Some(format!("{list}.{id}{}", &path[place.len()..]))
}

/// A path and a key below it, joined by a dot.
pub(super) fn join(path: &str, key: &str) -> String {
    match (path, key) {
        ("", key) => key.to_owned(),
        (path, "") => path.to_owned(),
        (path, key) => format!("{path}.{key}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found_by_key_place_and_id() {
        let lines = Lines::of("name: x\nstages:\n  - id: a\n    with:\n      n: 1\n      list: [1,\n        2]\n  - use: k\n");
        let found = ["name", "stages", "stages.a", "stages.a.with.n", "stages.a.with.list.1", "stages.1.use", "stages.a.with.gone"];
        let found = found.map(|path| lines.of_path(path));
        assert_eq!(found, [Some(1), Some(2), Some(3), Some(5), Some(7), Some(8), Some(4)]);
        assert_eq!(lines.of_path("elsewhere"), None);
    }
}
