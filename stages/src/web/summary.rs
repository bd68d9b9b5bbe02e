//! What operators are told of images by class, and what happens where there are too few.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, Result,
    artifacts::{ClassDownloads, DownloadState, Downloads},
};

/// Classes that a note describes one by one.
const MAX_NAMED: usize = 20;

/// What happens where a class has fewer images than it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BelowMin {
    /// The class is named, and the run goes on.
    #[default]
    Warn,
    /// The stage fails. What was downloaded stays.
    Stop,
}

/// The name of an image among its kind: its content's.
pub(super) fn file_name(sha256: &str, extension: &str) -> String {
    format!("{}/{sha256}.{extension}", &sha256[..2])
}

/// Tells an operator what came of the links.
pub(super) fn note(downloads: &Downloads, cx: &Context<'_>) {
    let all = downloads.by_class.iter().flat_map(|of_class| of_class.rows.iter().map(|row| row.state));
    let n_tried: usize = downloads.by_class.iter().map(|of_class| of_class.rows.len()).sum();
    cx.note(format!("{} classes, {n_tried} URLs tried: {}", downloads.by_class.len(), DownloadState::summary(all)));
    let mut few: Vec<&ClassDownloads> =
        downloads.by_class.iter().filter(|of_class| (of_class.n_images() as u64) < of_class.wanted).collect();
    few.sort_by_key(|of_class| of_class.n_images());
    for of_class in few.iter().take(MAX_NAMED) {
        let states = DownloadState::summary(of_class.rows.iter().map(|row| row.state));
        cx.note(format!(
            "{}: {} of {} images; {} of {} links tried: {}",
            of_class.class,
            of_class.n_images(),
            of_class.wanted,
            of_class.rows.len(),
            of_class.links,
            if states.is_empty() { "none" } else { &states },
        ));
    }
    if few.len() > MAX_NAMED {
        cx.note(format!("{} more classes have fewer images than wanted: `downloads` lists them", few.len() - MAX_NAMED));
    }
}

/// Names the classes without an image and those with too few; fails where that is asked for. `counts`: the images of each class.
pub(crate) fn refuse_few(counts: &[(String, usize)], min: usize, below_min: BelowMin, port: &'static str, cx: &Context<'_>) -> Result<()> {
    let none: Vec<&str> = counts.iter().filter(|(_, n_images)| *n_images == 0).map(|(class, _)| class.as_str()).collect();
    if !none.is_empty() {
        cx.note(format!("no image of {} of {} classes: {}", none.len(), counts.len(), none.join(", ")));
    }
    let few: Vec<String> =
        counts.iter().filter(|(_, n_images)| *n_images < min).map(|(class, n_images)| format!("{class} ({n_images})")).collect();
    // Those without any are named already.
    if few.is_empty() || (below_min == BelowMin::Warn && few.len() == none.len()) {
        return Ok(());
    }
    let problem = format!("fewer than {min} images of {} of {} classes: {}", few.len(), counts.len(), few.join(", "));
    match below_min {
        BelowMin::Warn => {
            cx.note(problem);
            Ok(())
        }
        BelowMin::Stop => {
            let hint = "give more links of these classes, lower `min_per_class`, or go on without: `below_min: warn`".into();
            Err(Error::Input { port, problem, hint })
        }
    }
}
