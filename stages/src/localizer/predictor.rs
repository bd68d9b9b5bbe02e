//! A trained localizer, and the CLIP that names what it finds.

use std::cell::RefCell;

use ovenbird_data::{annotations::ImageId, boxes::Xyxy, classes::ClassSplit, training::Filter};
use ovenbird_models::{
    checkpoint::Checkpoint,
    detection::boxes::{ImageSize, Kept, corners},
    detr::{Localizer, prematch::classify, scores::scores},
    to_unit_length,
};
use tch::{Tensor, nn, no_grad};

use super::{
    options::LocalizerOptions,
    spec::{LocalizerSpec, table_digest},
};
use crate::{
    Context, Error, In, Result,
    artifacts::{CheckpointFile, Prompts, Query},
    clip::space,
    detector::{
        images::{Normalisation, TestImage},
        ports::PROMPTS,
        predictor::{Found, Predictor},
    },
    region::frozen::{CHECKPOINT, Frozen, REGION_PROMPT, without_border},
};

/// The CLIP of a localizer, at the stages that take any detector.
pub(crate) const OPTIONAL_CHECKPOINT: In<CheckpointFile> =
    In::optional("checkpoint", "For CORA's localizer: the CLIP weights that it was trained with.");

/// Queries of an image that are kept.
const KEPT_QUERIES: i64 = 10;

/// A trained localizer, with its CLIP and the classes that it looks for.
pub(crate) struct LocalizerPredictor {
    localizer: Localizer,
    frozen: Frozen,
    /// Embeddings of base ++ novel, f32 `[K, D]` of unit length, on the device.
    texts: Tensor,
    /// The places of novel classes.
    novel: Vec<i64>,
    names: Vec<String>,
    options: LocalizerOptions,
    fits: [u32; 2],
    /// The surest queries of the images so far.
    queries: RefCell<Vec<Query>>,
    /// Owns the weights.
    _store: nn::VarStore,
}

impl LocalizerPredictor {
    /// Builds the localizer of a file at a port.
    pub(crate) fn load(
        spec: &LocalizerSpec,
        (weights, port): (&Checkpoint, &'static str),
        options: &LocalizerOptions,
        classes: &ClassSplit,
        cx: &Context<'_>,
    ) -> Result<Self> {
        let missing = |port: &'static str, problem: &str, hint: &str| Error::Input { port, problem: problem.into(), hint: hint.into() };
        let checkpoint = cx.inputs.read_if_given(OPTIONAL_CHECKPOINT)?.ok_or_else(|| {
            missing(
                CHECKPOINT.info().name,
                "missing: a localizer looks at the maps of its CLIP",
                "give the CLIP of its training as `checkpoint`",
            )
        })?;
        let prompts: Prompts = cx.inputs.read_if_given(PROMPTS)?.ok_or_else(|| {
            missing(PROMPTS.info().name, "missing: CLIP names boxes by class embeddings", "give class embeddings of the same CLIP")
        })?;
        let frozen = Frozen::load(&options.clip, &checkpoint, cx.inputs.read_if_given(REGION_PROMPT)?, spec.rules, cx)?;
        space::common(&[(port, spec.clip), (CHECKPOINT.info().name, Some(frozen.space)), (PROMPTS.info().name, prompts.clip)])?;
        let table = table_digest(frozen.regions()?.table())?;
        if spec.region_prompt.is_some_and(|trained_with| trained_with != table) {
            cx.note("the region prompt is another than that of the training");
        }
        let names: Vec<String> = classes.all().cloned().collect();
        let texts = to_unit_length(&prompts.select(&names)?).to_device(cx.device);
        let (found, dim) = (texts.size()[1], spec.config.embed_dim);
        if found != dim || frozen.dim() != dim {
            let problem = format!("class embeddings have {found} numbers, the CLIP {}, the localizer's space {dim}", frozen.dim());
            return Err(Error::Input { port: PROMPTS.info().name, problem, hint: "use the CLIP that it was trained with".into() });
        }
        let (localizer, store) = spec.network(weights, cx.device)?;
        let n_base = classes.base.len() as i64;
        let novel = (n_base..n_base + classes.novel.len() as i64).collect();
        let (options, queries) = (options.clone(), RefCell::default());
        Ok(Self { localizer, frozen, texts, novel, names, options, fits: spec.fits, queries, _store: store })
    }

    /// The surest queries of the images since the last call, image by image.
    pub(super) fn taken(&self) -> Vec<Query> {
        self.queries.take()
    }

    /// Keeps the surest queries of an image. `boxes`, `anchors`: `[N, 4]`; `objectness`: logits `[N]`; `classes`: i64 `[N]`.
    fn keep(&self, image_id: ImageId, [width, height]: [u32; 2], [boxes, anchors]: [&Tensor; 2], objectness: &Tensor, classes: &Tensor) {
        let (scores, places) = objectness.sigmoid().topk(KEPT_QUERIES.min(objectness.numel() as i64), 0, true, true);
        let in_px = |boxes: &Tensor, place: i64| {
            let [x, y, w, h] = [0, 1, 2, 3].map(|number| boxes.double_value(&[place, number]));
            let [width, height] = [width, height].map(f64::from);
            Xyxy::from([(x - w / 2.0) * width, (y - h / 2.0) * height, (x + w / 2.0) * width, (y + h / 2.0) * height].map(|px| px as f32))
        };
        let query = |rank: i64| {
            let place = places.int64_value(&[rank]);
            let (xyxy, anchor) = (in_px(boxes, place), in_px(anchors, place));
            let class = self.names[classes.int64_value(&[place]) as usize].clone();
            Query { image_id, query: place as u64, class, anchor, xyxy, objectness: scores.double_value(&[rank]) as f32 }
        };
        self.queries.borrow_mut().extend((0..places.numel() as i64).map(query));
    }

    /// Detections in px of an image of `original` size. `pixels`: `[1, 3, H, W]` as it is shown, in `size` px.
    fn detect(&self, image_id: ImageId, (pixels, size): (&Tensor, ImageSize), original: [u32; 2]) -> Result<Kept> {
        let regions = self.frozen.regions()?;
        let layer3 = regions.layer3(pixels, &[size])?;
        let places = self.localizer.anchors().sigmoid();
        let anchors = regions.fast(&regions.layer4(&layer3)?, &places)?;
        let scale = 1.0 / self.options.temperature;
        let named = classify(&anchors.matmul(&self.texts.tr()), scale, self.options.favour(&self.novel), None)?;
        let memory = self.localizer.encode(&layer3.features, &layer3.valid(), None)?;
        let outputs = self.localizer.decode(&memory, &self.texts, &named.classes, None)?;
        let (boxes, objectness) = (outputs.boxes.get(-1).get(0), outputs.objectness.get(-1).get(0));
        self.keep(image_id, original, [&boxes, &places], &objectness, &named.classes.get(0));
        let selection = self.options.selection();
        let needed = Tensor::from_slice(&selection.needed(&objectness)).to_device(boxes.device());
        let (boxes, objectness) = (boxes.index_select(0, &needed), objectness.index_select(0, &needed));
        let cosines = regions.exact(&layer3, &[boxes.shallow_clone()])?.matmul(&self.texts.tr());
        Ok(selection.detections(&boxes, &scores(&cosines, &objectness, scale, self.options.background)?, original.into())?)
    }
}

impl Predictor for LocalizerPredictor {
    fn fits(&self) -> [u32; 2] {
        self.fits
    }

    fn filter(&self) -> Filter {
        Filter::Pillow
    }

    fn normalisation(&self) -> Normalisation {
        Normalisation::CLIP
    }

    fn predict(&self, TestImage { info, placement, size, pixels, .. }: &TestImage<'_>, _n_threads: usize) -> Result<Vec<Found>> {
        let pixels = without_border(pixels, *size);
        let Kept { boxes, classes, scores, .. } = no_grad(|| self.detect(info.id, (&pixels, *size), placement.from))?;
        let all = corners(&boxes, "detections")?.into_iter().zip(classes).zip(scores);
        Ok(all.map(|((box_of, class), score)| Found { xyxy: Xyxy::from(box_of), class: class as usize, score, mask: None }).collect())
    }
}
