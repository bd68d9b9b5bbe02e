//! The toy world: `toy/world`, a synthetic data set to try everything on, and `toy/clip`, small CLIPs that know it.

mod clip;
mod vocabulary;
mod web;

use ovenbird_data::{
    proposals::write_mmdet,
    toy::{self, Labels, Set, World as Generator},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::{clip::Clip, vocabulary::Vocabulary, web::Web};
use crate::{
    Context, Out, PortInfo, Problem, Result, Stage, Unit, UnitDraft,
    artifacts::{AnnotationFile, Caption, Captions, Classes, Images, MmdetProposals},
    error::write_error,
    feed::in_parallel,
};

/// A small synthetic data set to try everything on: scenes, annotations, captioned web images, proposals, in the formats of real ones.
///
/// A class is a pattern, a colour and a shape, such as `striped red circle`: 40 base and 20 novel combinations. Every pattern, colour and
/// shape occurs in a base class. The same seed and sizes always give the same bytes.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct World {
    /// The seed of all random numbers.
    pub seed: u64,
    /// How many scenes to train on.
    pub train_images: usize,
    /// How many scenes to evaluate on.
    pub val_images: usize,
    /// How many captioned web images.
    pub web_images: usize,
    /// How many images of a single object, to measure zero-shot accuracy.
    pub held_out_images: usize,
    /// The longer side of scenes, in px.
    pub side_px: u32,
}

impl Default for World {
    fn default() -> Self {
        Self { seed: 7, train_images: 200, val_images: 100, web_images: 4000, held_out_images: 600, side_px: 320 }
    }
}

const IMAGES: Out<Images> = Out::new("images", "The scenes: `train/ID.jpg` and `val/ID.jpg`.");
const TRAIN: Out<AnnotationFile> = Out::new("train", "COCO json of the training scenes.");
const VAL: Out<AnnotationFile> = Out::new("val", "COCO json of the evaluation scenes.");
const LVIS_TRAIN: Out<AnnotationFile> = Out::new("lvis_train", "LVIS v1 json of the training scenes; novel classes are rare.");
const LVIS_VAL: Out<AnnotationFile> = Out::new("lvis_val", "LVIS v1 json of the evaluation scenes.");
const CLASSES: Out<Classes> = Out::new("classes", "The 40 base and 20 novel class names.");
const WEB_IMAGES: Out<Images> = Out::new("web_images", "The web images.");
const CAPTIONS: Out<Captions> = Out::new("captions", "The alt text of the web images: 8 % name another object, some are noise.");
const HELD_OUT_IMAGES: Out<Images> = Out::new("held_out_images", "Images of a single object.");
const HELD_OUT: Out<Captions> = Out::new("held_out", "The class names of the single objects.");
const TRAIN_PROPOSALS: Out<MmdetProposals> = Out::new("train_proposals", "Proposals for the training scenes, as mmdet pickles them.");
const VAL_PROPOSALS: Out<MmdetProposals> = Out::new("val_proposals", "Proposals for the evaluation scenes, as mmdet pickles them.");

impl Stage for World {
    const KIND: &'static str = "toy/world";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[];
    const OUTPUTS: &'static [PortInfo] = &[
        IMAGES.info(),
        TRAIN.info(),
        VAL.info(),
        LVIS_TRAIN.info(),
        LVIS_VAL.info(),
        CLASSES.info(),
        WEB_IMAGES.info(),
        CAPTIONS.info(),
        HELD_OUT_IMAGES.info(),
        HELD_OUT.info(),
        TRAIN_PROPOSALS.info(),
        VAL_PROPOSALS.info(),
    ];

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("side_px", (64..=4096).contains(&self.side_px), "from 64 to 4096 px"),
            ("train_images", self.train_images > 0, "at least 1"),
            ("val_images", self.val_images > 0, "at least 1"),
        ])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let world = Generator { seed: self.seed, side_px: self.side_px };
        let draft = cx.begin(unit)?;
        let tick = || {
            cx.tick(1);
            cx.proceed()
        };
        cx.total((self.train_images + self.val_images + self.web_images + self.held_out_images) as u64);
        for (set, n_images, coco, lvis, proposals) in
            [(Set::Train, self.train_images, TRAIN, LVIS_TRAIN, TRAIN_PROPOSALS), (Set::Val, self.val_images, VAL, LVIS_VAL, VAL_PROPOSALS)]
        {
            let mut labels: Vec<Labels> = in_parallel(n_images, cx.threads, |index| {
                tick()?;
                let scene = world.scene(set, index);
                draft.write(IMAGES, &scene.labels.file_name, &scene.jpeg)?;
                Ok(scene.labels)
            })?;
            labels.sort_by_key(|labels| labels.id);
            draft.write(coco, &format!("instances_{}.json", set.name()), &toy::coco_json(&labels))?;
            draft.write(lvis, &format!("lvis_v1_{}.json", set.name()), &toy::lvis_json(self.seed, &labels))?;
            let boxes: Vec<_> = labels.into_iter().map(|labels| labels.proposals).collect();
            let mut file = draft.create(proposals, &format!("oln_{}.pkl", set.name()))?;
            let path = file.path().to_owned();
            write_mmdet(&boxes, &mut file).map_err(|source| write_error(&path, source))?;
            file.finish()?;
        }
        let classes = toy::classes();
        draft.write(CLASSES, "classes.json", &serde_json::to_vec(&classes).expect("BUG: names are plain JSON"))?;
        let web = in_parallel(self.web_images, cx.threads, |index| {
            tick()?;
            let picture = world.web(index);
            write_picture(&draft, WEB_IMAGES, index, &picture.jpeg, picture.text)
        })?;
        write_captions(&draft, CAPTIONS, "captions.jsonl", &web)?;
        let names: Vec<&String> = classes.all().collect();
        let held_out = in_parallel(self.held_out_images, cx.threads, |index| {
            tick()?;
            let picture = world.held_out(index);
            write_picture(&draft, HELD_OUT_IMAGES, index, &picture.jpeg, names[picture.class].clone())
        })?;
        write_captions(&draft, HELD_OUT, "classes.jsonl", &held_out)?;
        cx.commit(draft, [].into())
    }
}

fn write_picture(draft: &UnitDraft, port: Out<Images>, index: usize, jpeg: &[u8], text: String) -> Result<Caption> {
    let file = format!("{index:08}.jpg");
    draft.write(port, &file, jpeg)?;
    Ok(Caption { file, text })
}

fn write_captions(draft: &UnitDraft, port: Out<Captions>, name: &str, captions: &[Caption]) -> Result<()> {
    let line = |caption| format!("{}\n", serde_json::to_string(caption).expect("BUG: captions are plain JSON"));
    draft.write(port, name, captions.iter().map(line).collect::<String>().as_bytes())
}
