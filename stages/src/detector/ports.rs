//! The input ports that stages of detectors share.

use crate::{
    In,
    artifacts::{AnnotationFile, CheckpointFile, Classes, Images, Prompts, Proposals, RegionFeatures},
};

pub(crate) const IMAGES: In<Images> = In::required("images", "Folder that the annotations' file names are relative to.");
pub(crate) const ANNOTATIONS: In<AnnotationFile> =
    In::required("annotations", "COCO or LVIS json: the list of images, and for training their objects.");
pub(crate) const PRETRAINED: In<CheckpointFile> =
    In::optional("pretrained", "Initial weights from mmdet, torchvision, a ResNet, or SoCo. Tensors that do not fit are listed.");
pub(crate) const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
pub(crate) const PROPOSALS: In<Proposals> = In::optional(
    "proposals",
    "Boxes in the same images to classify (`proposals/oln`, `proposals/import`); without them the detector's own.",
);
pub(crate) const PROMPTS: In<Prompts> = In::optional(
    "prompts",
    "Class embeddings. Without them each base class gets a random direction and novel classes get none, so that they are found by chance alone.",
);
pub(crate) const MULTILABEL_PROMPTS: In<Prompts> = In::optional(
    "multilabel_prompts",
    "Class embeddings with a learned scale (`prompts/multilabel`) for the heads that learn CLIP's embeddings; without them these heads use `prompts`.",
);
pub(crate) const AUGMENTED: In<RegionFeatures> = In::optional(
    "augmented",
    "Augmented embeddings (`augmenter/apply`) of proposals in the same images: these are classified, and the embeddings correct their scores by `raf`.",
);
