//! Sentences with a place for a class name.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Sentences, in which the class name replaces `{}`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Templates {
    /// The 74 sentences of ViLD and OADP.
    #[default]
    #[serde(rename = "vild-74")]
    Vild74,
    /// The 80 sentences that CLIP used for ImageNet.
    #[serde(rename = "clip-80")]
    Clip80,
    /// Your own list.
    Custom(Vec<String>),
}

/// CLIP's sentences for ImageNet (Radford et al. 2021, published with the model).
const CLIP_80: [&str; 80] = [
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
];

impl Templates {
    /// The sentences in order.
    pub fn sentences(&self) -> Vec<String> {
        match self {
            Self::Vild74 => vild_74(),
            Self::Clip80 => CLIP_80.map(String::from).to_vec(),
            Self::Custom(sentences) => sentences.clone(),
        }
    }
}

/// ViLD's sentences, in the order of the OADP reference.
fn vild_74() -> Vec<String> {
    let sizes = ["small", "medium", "large"];
    let articles = ["a", "the", "one"];
    let mut all = vec!["This is a {}".to_owned(), "There is a {}".to_owned()];
    for (before, after) in [("a photo of a", " in the scene"), ("a photo of a", ""), ("This is a photo of a", "")] {
        all.push(format!("{before} {{}}{after}"));
        all.extend(sizes.map(|size| format!("{before} {size} {{}}{after}")));
    }
    all.extend(articles.map(|article| format!("There is {article} {{}} in the scene")));
    all.extend(articles.map(|article| format!("This is {article} {{}} in the scene")));
    all.extend(sizes.map(|size| format!("This is one {size} {{}} in the scene")));
    all.extend(sizes.map(|size| format!("There is a {size} {{}} in the scene")));
    for (verb, medium) in [("There is", "photo"), ("There is", "picture"), ("This is", "photo"), ("This is", "picture")] {
        all.extend(articles.map(|article| format!("{verb} {article} {{}} in the {medium}")));
        for size in sizes {
            all.extend(articles.map(|article| format!("{verb} {article} {size} {{}} in the {medium}")));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use sha2::{Digest as _, Sha256};

    use super::*;

    /// The digest of methods/oadp, section 5.1 (R1).
    #[test]
    fn the_sentences_of_vild_are_the_published_ones() {
        let sentences = Templates::Vild74.sentences();
        let digest: String = Sha256::digest(sentences.join("\n")).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(sentences.len(), 74);
        assert_eq!(digest, "327954310ab55c5c8cbd29b60139100178fd3d7564fe8924496b001d99091b1a");
    }

    #[test]
    fn every_sentence_of_clip_is_there_once_with_a_place_for_the_name() {
        let mut sentences = Templates::Clip80.sentences();
        assert!(sentences.iter().all(|sentence| sentence.matches("{}").count() == 1));
        sentences.sort();
        sentences.dedup();
        assert_eq!(sentences.len(), 80);
    }
}
