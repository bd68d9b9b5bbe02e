//! The metrics of an evaluation, one row each of [`METRICS`]: tables, reports, comparisons and `detector/select` read them from here.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt::{self, Write as _},
};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _, ser::SerializeMap as _};

use super::{IouType, Protocol, Slices};
use crate::words::suggestion;

/// A metric of a group of classes, in [0, 1].
#[derive(Debug)]
pub struct Metric {
    /// Its name in files and parameters.
    pub name: &'static str,
    /// Its name above a column; `None`: files have it, tables leave it out.
    pub header: Option<&'static str>,
    /// Its definition, in a line.
    pub definition: &'static str,
    /// Of some classes, by their places in the accumulation.
    pub(super) compute: fn(&Slices<'_>, &[usize]) -> Option<f64>,
}

/// All metrics, in the order of files and tables.
pub static METRICS: [Metric; 14] = [
    Metric {
        name: "ap",
        header: Some("AP"),
        definition: "Mean over IoU 0.50 to 0.95.",
        compute: |slices, classes| slices.precision(classes, None, "all", slices.ap_limit()),
    },
    Metric {
        name: "ap50",
        header: Some("AP50"),
        definition: "At IoU 0.50.",
        compute: |slices, classes| slices.precision(classes, Some(0), "all", slices.last_limit()),
    },
    Metric {
        name: "ap75",
        header: Some("AP75"),
        definition: "At IoU 0.75.",
        compute: |slices, classes| slices.precision(classes, Some(5), "all", slices.last_limit()),
    },
    Metric {
        name: "ap_small",
        header: Some("APs"),
        definition: "AP of objects below 32² px.",
        compute: |slices, classes| slices.precision(classes, None, "small", slices.last_limit()),
    },
    Metric {
        name: "ap_medium",
        header: Some("APm"),
        definition: "AP of objects between 32² and 96² px.",
        compute: |slices, classes| slices.precision(classes, None, "medium", slices.last_limit()),
    },
    Metric {
        name: "ap_large",
        header: Some("APl"),
        definition: "AP of objects above 96² px.",
        compute: |slices, classes| slices.precision(classes, None, "large", slices.last_limit()),
    },
    Metric {
        name: "ar_1",
        header: Some("AR1"),
        definition: "Recall with at most 1 detection an image and class; LVIS has no such limit.",
        compute: |slices, classes| slices.recall_at(classes, 1),
    },
    Metric {
        name: "ar_10",
        header: Some("AR10"),
        definition: "Recall with at most 10 detections an image and class; LVIS has no such limit.",
        compute: |slices, classes| slices.recall_at(classes, 10),
    },
    Metric {
        name: "ar_100",
        header: None,
        definition: "Recall with at most 100 detections an image and class; LVIS has no such limit.",
        compute: |slices, classes| slices.recall_at(classes, 100),
    },
    Metric {
        name: "ar_300",
        header: None,
        definition: "Recall with at most 300 detections an image and class (COCO) or an image (LVIS).",
        compute: |slices, classes| slices.recall_at(classes, 300),
    },
    Metric {
        name: "ar",
        header: Some("AR"),
        definition: "Recall with the most detections that the protocol allows: 1,000 an image and class (COCO), 300 an image (LVIS).",
        compute: |slices, classes| slices.recall(classes, None, "all", slices.last_limit()),
    },
    Metric {
        name: "ar_small",
        header: None,
        definition: "AR of small objects.",
        compute: |slices, classes| slices.recall(classes, None, "small", slices.last_limit()),
    },
    Metric {
        name: "ar_medium",
        header: None,
        definition: "AR of medium objects.",
        compute: |slices, classes| slices.recall(classes, None, "medium", slices.last_limit()),
    },
    Metric {
        name: "ar_large",
        header: None,
        definition: "AR of large objects.",
        compute: |slices, classes| slices.recall(classes, None, "large", slices.last_limit()),
    },
];

/// Groups of classes in the order in which tables show them; `rare`, `common` and `frequent` are of LVIS.
pub const GROUPS: [&str; 6] = ["novel", "base", "all", "rare", "common", "frequent"];

impl Metric {
    /// Mean over IoU 0.50 to 0.95.
    pub const AP: &'static Self = &METRICS[0];
    /// At IoU 0.50.
    pub const AP50: &'static Self = &METRICS[1];

    /// The metric of a name.
    pub fn named(name: &str) -> Option<&'static Self> {
        METRICS.iter().find(|metric| metric.name == name)
    }

    /// The metrics that tables show, with their headers. Those that no summary has, because the protocol does not define them, are left out.
    pub fn columns<'a>(summaries: impl Iterator<Item = &'a Summary> + Clone) -> impl Iterator<Item = (&'static str, &'static Self)> {
        let has = move |metric: &Self| summaries.clone().any(|summary| summary.get(metric).is_some());
        METRICS.iter().filter_map(|metric| Some((metric.header?, metric))).filter(move |(_, metric)| has(metric))
    }

    fn place(&self) -> usize {
        METRICS.iter().position(|metric| metric.name == self.name).expect("BUG: every metric is a row of the table")
    }
}

impl Protocol {
    /// The metric that papers compare: AP50 for COCO, AP for LVIS.
    pub fn headline(self) -> &'static Metric {
        match self {
            Self::Coco => Metric::AP50,
            Self::Lvis => Metric::AP,
        }
    }
}

impl Serialize for Metric {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.name.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for &'static Metric {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = Cow::<'de, str>::deserialize(deserializer)?;
        let unknown =
            || D::Error::custom(format!("unknown metric `{name}`{}", suggestion(&name, METRICS.iter().map(|metric| metric.name))));
        Metric::named(&name).ok_or_else(unknown)
    }
}

impl JsonSchema for Metric {
    fn schema_name() -> Cow<'static, str> {
        "Metric".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let choice = |metric: &Self| json_schema!({"const": metric.name, "description": metric.definition, "type": "string"});
        json_schema!({"oneOf": METRICS.iter().map(choice).collect::<Vec<_>>()})
    }
}

/// Every metric of a group of classes; `None` where the group has no ground truth for it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Summary([Option<f64>; METRICS.len()]);

impl Summary {
    pub(super) fn of(slices: &Slices<'_>, classes: &[usize]) -> Self {
        Self(std::array::from_fn(|place| (METRICS[place].compute)(slices, classes)))
    }

    /// The value of a metric.
    pub fn get(&self, metric: &Metric) -> Option<f64> {
        self.0[metric.place()]
    }

    /// The same summary with another value of a metric.
    #[must_use]
    pub fn with(mut self, metric: &Metric, value: f64) -> Self {
        self.0[metric.place()] = Some(value);
        self
    }
}

impl Serialize for Summary {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(METRICS.len()))?;
        for (metric, value) in METRICS.iter().zip(self.0) {
            map.serialize_entry(metric.name, &value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Summary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let values = BTreeMap::<String, Option<f64>>::deserialize(deserializer)?;
        let mut summary = Self::default();
        for (name, value) in values {
            let metric = Metric::named(&name).ok_or_else(|| D::Error::custom(format!("unknown metric `{name}`")))?;
            summary.0[metric.place()] = value;
        }
        Ok(summary)
    }
}

/// The result of one class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassResult {
    /// Its name.
    pub name: String,
    /// Whether it had no labels in training.
    pub is_novel: bool,
    /// Objects to be found: without crowds, except in LVIS, which has no crowds.
    pub n_ground_truth: usize,
    /// Mean over IoU 0.50 to 0.95.
    pub ap: Option<f64>,
    /// At IoU 0.50.
    pub ap50: Option<f64>,
}

/// The result of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// Version of this layout.
    pub format: u32,
    /// The rules.
    pub protocol: Protocol,
    /// Boxes or masks; boxes if a file does not state it.
    #[serde(default)]
    pub iou_type: IouType,
    /// `all`, `base`, `novel`; LVIS: also `rare`, `common`, `frequent`.
    pub groups: BTreeMap<String, Summary>,
    /// Every class, base ++ novel.
    pub classes: Vec<ClassResult>,
    /// Precision at IoU 0.50 and recall 0.00, 0.01, ..., 1.00, mean over the classes of a group; groups without data are
    /// absent.
    pub curves: BTreeMap<String, Vec<f64>>,
    /// Reasons why the numbers may be misleading, with counts; empty if a file does not state them.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Images that the detector was not run on, because a step skipped them: their objects count as missed. `None` where the detections do
    /// not list their images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_images_without_detections: Option<usize>,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Coco => "COCO",
            Self::Lvis => "LVIS",
        })
    }
}

impl fmt::Display for IouType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Boxes => "boxes",
            Self::Masks => "masks",
        })
    }
}

impl Evaluation {
    /// Protocol and IoU type: `LVIS, boxes`.
    pub fn title(&self) -> String {
        format!("{}, {}", self.protocol, self.iou_type)
    }

    /// The groups as a plain text table, numbers x 100, novel first; then the warnings, a line each.
    pub fn table(&self) -> String {
        let mut text = " ".repeat(8);
        Metric::columns(self.groups.values()).for_each(|(header, _)| text.push_str(&format!(" {header:>5}")));
        text.push('\n');
        for name in GROUPS {
            let Some(group) = self.groups.get(name) else { continue };
            let _infallible = write!(text, "{name:<8}");
            for (_, metric) in Metric::columns(self.groups.values()) {
                let _infallible = match group.get(metric) {
                    Some(value) => write!(text, " {:5.1}", 100.0 * value),
                    None => write!(text, "     –"),
                };
            }
            text.push('\n');
        }
        text.extend(self.warnings.iter().map(|words| format!("warning: {words}\n")));
        text
    }
}
