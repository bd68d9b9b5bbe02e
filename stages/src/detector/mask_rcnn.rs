//! A trained two-stage detector on images.

use ovenbird_data::classes::ClassSplit;
use ovenbird_models::{
    checkpoint::Checkpoint,
    rcnn::{Detector, Given, TestRule, Vocabularies},
};
use tch::nn;

use super::{
    classes::{ClassTables, class_embeddings, spaces_of_prompts},
    images::{Normalisation, Padding, TestImage},
    options::{Heads, TestOptions},
    ports::AUGMENTED,
    predictor::{self, Found, Predictor},
    spec::MaskRcnnSpec,
};
use crate::{Context, Error, Inputs, Result, clip::space};

/// A trained two-stage detector with the classes that it looks for.
pub(super) struct MaskRcnnPredictor {
    detector: Detector,
    classes: ClassTables,
    uses_object_head: bool,
    rule: TestRule,
    fits: [u32; 2],
    padding: Padding,
    /// Owns the weights.
    _store: nn::VarStore,
}

impl MaskRcnnPredictor {
    /// Builds the detector of a file at a port.
    pub(super) fn load(
        spec: &MaskRcnnSpec,
        (checkpoint, port): (&Checkpoint, &'static str),
        options: &TestOptions,
        classes: &ClassSplit,
        cx: &Context<'_>,
    ) -> Result<Self> {
        spec.check_clip(port, cx.inputs)?;
        options.refuse_fusion()?;
        options.check_augmented(cx.inputs)?;
        check_space(spec.config.embed_dim, cx.inputs)?;
        let (detector, store) = spec.network(checkpoint, cx.device)?;
        Ok(Self {
            classes: spec.tables(class_embeddings(cx.inputs, classes)?, cx.inputs, classes, cx.device)?,
            uses_object_head: options.heads == Heads::Both && detector.object_head.is_some(),
            detector,
            rule: rule(options),
            fits: spec.fits,
            padding: options.padding,
            _store: store,
        })
    }
}

impl Predictor for MaskRcnnPredictor {
    fn fits(&self) -> [u32; 2] {
        self.fits
    }

    fn normalisation(&self) -> Normalisation {
        Normalisation::IMAGENET.padded(self.padding)
    }

    fn predict(&self, image: &TestImage<'_>, n_threads: usize) -> Result<Vec<Found>> {
        let TestImage { placement, size, pixels, .. } = image;
        let vocabularies = Vocabularies { bbox: &self.classes.text, object: self.uses_object_head.then_some(&self.classes.image) };
        let mut objects = Vec::new();
        let augmented = image.augmented(self.detector.config().embed_dim);
        let given = image.given().map(|given| Given { proposals: vec![given], augmented });
        for found in self.detector.detect(pixels, &[*size], &vocabularies, given, &self.rule)? {
            objects.extend(predictor::objects(found, *placement, n_threads)?);
        }
        Ok(objects)
    }
}

/// Refuses augmented embeddings that are not of the space of class embeddings, which have `dim` numbers.
fn check_space(dim: i64, inputs: &Inputs) -> Result<()> {
    let Some(augmented) = inputs.read_if_given(AUGMENTED)? else { return Ok(()) };
    let [text, _] = spaces_of_prompts(inputs)?;
    space::common(&[text, (AUGMENTED.info().name, augmented.clip()?)])?;
    match augmented.dim()? as i64 {
        found if found == dim => Ok(()),
        found => {
            let problem = format!("embeddings of {found} numbers, those of classes have {dim}");
            Err(Error::Input { port: AUGMENTED.info().name, problem, hint: "make both with the same CLIP".into() })
        }
    }
}

fn rule(options: &TestOptions) -> TestRule {
    TestRule {
        proposals: options.proposal_rule(),
        ensemble: options.ensemble,
        raf: options.raf.unwrap_or_default(),
        detections: options.detection_rule(),
    }
}
