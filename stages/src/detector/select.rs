//! `detector/select`: tests all kept checkpoints of a training and picks the best.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_data::evaluate::{Evaluation, Evaluator, IouType, Metric, Protocol, Summary};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    images::TestImages,
    load::load,
    options::TestOptions,
    ports::{ANNOTATIONS, CLASSES, IMAGES, MULTILABEL_PROMPTS, PROMPTS, PROPOSALS},
    predictor::{detection, predict_each},
    spec::{Checkpoints, DetectorFile, DetectorSpec},
};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Classes, Curve, EvaluationFile},
    contract::is_default,
    localizer::{options::LocalizerOptions, predictor::OPTIONAL_CHECKPOINT},
    region::frozen::REGION_PROMPT,
};

/// Classes that are evaluated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ClassGroup {
    /// All classes.
    All,
    /// Classes with labels in training.
    Base,
    /// Classes without labels in training.
    #[default]
    Novel,
}

/// Tests every checkpoint that a training kept (`training.keep_checkpoints`), and reports the last and the best one.
///
/// The best checkpoint is chosen on the same annotations on which it is reported, so its numbers are optimistic; those of the last one are
/// not. (OADP, section 6.7: its published 31.3 is the best of 20.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Select {
    /// Rules of the evaluation, of boxes.
    pub protocol: Protocol,
    /// Classes that are evaluated.
    pub group: ClassGroup,
    /// Measure by which the best checkpoint is chosen; among equal ones the last wins.
    pub metric: &'static Metric,
    /// How each checkpoint is run on the images.
    pub test: TestOptions,
    /// How each checkpoint of CORA's localizer is run instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub localizer: Option<LocalizerOptions>,
}

/// Detections are matched to objects as soon as there are so many.
const JUDGED_AT_ONCE: usize = 1 << 16;

impl Default for Select {
    fn default() -> Self {
        Self {
            protocol: Protocol::default(),
            group: ClassGroup::default(),
            metric: Metric::AP50,
            test: TestOptions::default(),
            localizer: None,
        }
    }
}

const CHECKPOINTS: In<Checkpoints> = In::required("checkpoints", "The checkpoints of a training (`detector/train`, `localizer/train`).");
const BEST: Out<DetectorFile> = Out::new("detector", "The best checkpoint.");
const BEST_EVALUATION: Out<EvaluationFile> = Out::new("best", "Evaluation of the best checkpoint.");
const LAST_EVALUATION: Out<EvaluationFile> = Out::new("last", "Evaluation of the last checkpoint.");
const CURVE: Out<Curve> = Out::new("curve", "AP and AP50 of base and novel classes, by step.");

impl Stage for Select {
    const KIND: &'static str = "detector/select";
    const VERSION: u32 = 4;
    const INPUTS: &'static [PortInfo] = &[
        IMAGES.info(),
        ANNOTATIONS.info(),
        CLASSES.info(),
        PROMPTS.info(),
        MULTILABEL_PROMPTS.info(),
        PROPOSALS.info(),
        OPTIONAL_CHECKPOINT.info(),
        REGION_PROMPT.info(),
        CHECKPOINTS.info(),
    ];
    const OUTPUTS: &'static [PortInfo] = &[BEST.info(), BEST_EVALUATION.info(), LAST_EVALUATION.info(), CURVE.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        let inner = |problem: Problem| Problem { field: format!("test.{}", problem.field), ..problem };
        let of_localizer = self.localizer.iter().flat_map(LocalizerOptions::check);
        let of_localizer = of_localizer.map(|problem| Problem { field: format!("localizer.{}", problem.field), ..problem });
        self.test.check().into_iter().map(inner).chain(of_localizer).collect()
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let checkpoints = inputs.read(CHECKPOINTS)?.0.len() as u32;
        let n_images = inputs.read(ANNOTATIONS)?.load()?.images.len() as u32;
        Ok(Units::Chain { checkpoints, steps: checkpoints * n_images, images_per_step: 1, stay: Vec::new() })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let mut annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
        annotations.images.truncate(cx.most_items.unwrap_or(usize::MAX));
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let Checkpoints(files) = cx.inputs.read(CHECKPOINTS)?;
        let ids = Classes::category_ids(&annotations, classes.all())?;
        let images = TestImages::open(cx.inputs.read(IMAGES)?, annotations, cx)?.with_proposals(PROPOSALS, cx)?;
        let n_images = images.annotations.images.len();
        let localizer = LocalizerOptions::default();
        if let Some(first) = files.first() {
            self.heeds_options(&first.read()?.1)?;
        }
        cx.total((units.len() * n_images) as u64);
        for unit in units {
            let draft = cx.begin(unit)?;
            let file = &files[unit.index];
            let step = file.step()?;
            let options = (&self.test, Some(self.localizer.as_ref().unwrap_or(&localizer)));
            let predictor = load(file, CHECKPOINTS.info().name, options, &classes, cx)?;
            let refused = |problem: String| Error::Input {
                port: ANNOTATIONS.info().name,
                problem,
                hint: "use the classes and the annotations of the same split".into(),
            };
            let mut evaluator = Evaluator::new(self.protocol, IouType::Boxes, &images.annotations, &classes).map_err(refused)?;
            let (mut detections, mut seen) = (Vec::new(), BTreeSet::new());
            predict_each(&*predictor, &images, 0..n_images, &draft, cx, |info, found| {
                seen.insert(info.id);
                detections.extend(found.into_iter().map(|found| detection(info.id, &ids, found)));
                if detections.len() >= JUDGED_AT_ONCE {
                    evaluator.judge(&detections).map_err(refused)?;
                    detections.clear();
                }
                Ok(())
            })?;
            evaluator.judge(&detections).map_err(refused)?;
            let evaluation = evaluator.finish(Some(&seen)).map_err(refused)?;

            let before = unit.index.checked_sub(1);
            let mut curve = before.map_or_else(|| Ok(Curve::default()), |before| cx.published(before, CURVE))?;
            curve.rows.push((step, numbers(&evaluation)));
            let (mut best, mut best_file) = (evaluation.clone(), file.file.clone());
            if let Some(before) = before {
                let EvaluationFile(earlier) = cx.published(before, BEST_EVALUATION)?;
                if self.number_of(&earlier) > self.number_of(&evaluation) {
                    (best, best_file) = (earlier, cx.published(before, BEST)?.file);
                }
            }
            draft.write(BEST, "network.safetensors", &best_file.read()?)?;
            for (port, evaluation) in [(BEST_EVALUATION, &best), (LAST_EVALUATION, &evaluation)] {
                draft.write(port, "evaluation.json", &serde_json::to_vec(evaluation).expect("BUG: numbers are plain JSON"))?;
            }
            draft.write(CURVE, "curve.csv", curve.to_csv().as_bytes())?;
            let (best_step, [best, last]) = (DetectorFile { file: best_file }.step()?, [&best, &evaluation].map(|all| self.number_of(all)));
            if unit.index + 1 == files.len() {
                let measure = self.measure();
                let percent = |number: Option<f64>| number.map_or_else(|| "none".into(), |number| format!("{:.1}", 100.0 * number));
                cx.note(format!("{measure}: best at step {best_step}, {}; last, at step {step}, {}", percent(best), percent(last)));
            }
            let metrics = [("best_step", best_step.into()), ("best", best.into()), ("last", last.into())];
            cx.commit(draft, metrics.map(|(name, value)| (name.to_owned(), value)).into())?;
        }
        Ok(())
    }
}

impl Select {
    /// Refuses options of another kind of detector than that of the checkpoints.
    fn heeds_options(&self, spec: &DetectorSpec) -> Result<()> {
        let is_localizer = matches!(spec, DetectorSpec::Localizer(_));
        let (option, right) = match is_localizer {
            true if !is_default(&self.test) => ("test", "localizer"),
            false if self.localizer.is_some() => ("localizer", "test"),
            _ => return Ok(()),
        };
        let problem = format!("checkpoints of a detector {}, which heeds `{right}` instead", spec.in_words());
        Err(Error::Input { port: option, problem, hint: format!("leave `{option}` out") })
    }

    fn number_of(&self, evaluation: &Evaluation) -> Option<f64> {
        let group = match self.group {
            ClassGroup::All => "all",
            ClassGroup::Base => "base",
            ClassGroup::Novel => "novel",
        };
        evaluation.groups.get(group)?.get(self.metric)
    }

    /// The measure in words, such as `novel AP50`.
    fn measure(&self) -> String {
        let group = format!("{:?}", self.group).to_lowercase();
        format!("{group} {}", self.metric.header.unwrap_or(self.metric.name))
    }
}

fn numbers(evaluation: &Evaluation) -> BTreeMap<String, f64> {
    let of_group = |(group, summary): (&String, &Summary)| {
        [Metric::AP, Metric::AP50].map(|metric| Some((format!("{group}.{}", metric.name), summary.get(metric)?)))
    };
    evaluation.groups.iter().flat_map(of_group).flatten().collect()
}
