//! The pipelines that come with the program.

use serde::Deserialize;
use serde_yaml::Value as Yaml;

/// The named pipelines that come with the program.
pub(crate) const NAMED: &[(&str, &str)] = &[
    ("cora-ov-coco", include_str!("../../pipelines/cora-ov-coco.yaml")),
    ("cora-toy", include_str!("../../pipelines/cora-toy.yaml")),
    ("detpro-ov-lvis", include_str!("../../pipelines/detpro-ov-lvis.yaml")),
    ("detpro-toy", include_str!("../../pipelines/detpro-toy.yaml")),
    ("lp-ovod-ov-coco", include_str!("../../pipelines/lp-ovod-ov-coco.yaml")),
    ("lp-ovod-toy", include_str!("../../pipelines/lp-ovod-toy.yaml")),
    ("oadp-ov-coco", include_str!("../../pipelines/oadp-ov-coco.yaml")),
    ("oadp-ov-lvis", include_str!("../../pipelines/oadp-ov-lvis.yaml")),
    ("oadp-toy", include_str!("../../pipelines/oadp-toy.yaml")),
    ("promptdet-ov-lvis", include_str!("../../pipelines/promptdet-ov-lvis.yaml")),
    ("promptdet-toy", include_str!("../../pipelines/promptdet-toy.yaml")),
    ("quickstart", include_str!("../../pipelines/quickstart.yaml")),
    ("ralf-oadp-ov-coco", include_str!("../../pipelines/ralf-oadp-ov-coco.yaml")),
    ("ralf-ov-lvis", include_str!("../../pipelines/ralf-ov-lvis.yaml")),
    ("ralf-toy", include_str!("../../pipelines/ralf-toy.yaml")),
    ("supervised-toy", include_str!("../../pipelines/supervised-toy.yaml")),
    ("toy-clip", include_str!("../../pipelines/toy-clip.yaml")),
    ("vild-ov-coco", include_str!("../../pipelines/vild-ov-coco.yaml")),
    ("vild-ov-lvis", include_str!("../../pipelines/vild-ov-lvis.yaml")),
    ("vild-toy", include_str!("../../pipelines/vild-toy.yaml")),
];

/// The head of a pipeline file, read without checking that its input files exist.
#[derive(Deserialize)]
pub(crate) struct Title {
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) stages: Vec<Yaml>,
}

impl Title {
    /// The head of one of [`NAMED`].
    pub(crate) fn of(text: &str) -> Self {
        serde_yaml::from_str(text).expect("BUG: the named pipelines have names, descriptions and stages")
    }
}
