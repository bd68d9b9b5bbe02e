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
    /// The class name alone, as published LP-OVOD has it.
    BareName,
    /// The 63 sentences that LP-OVOD's code lists, with the article that goes with the name. The name is used in lower case, with spaces for
    /// underscores and "or" for slashes.
    #[serde(rename = "ensemble-63")]
    Ensemble63,
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
    /// The sentences in order, in which the class name replaces `{}`, and in those of `ensemble-63` the article `{article}`.
    pub fn sentences(&self) -> Vec<String> {
        match self {
            Self::Vild74 => vild_74(),
            Self::Clip80 => CLIP_80.map(String::from).to_vec(),
            Self::BareName => vec!["{}".to_owned()],
            Self::Ensemble63 => ensemble_63(),
            Self::Custom(sentences) => sentences.clone(),
        }
    }

    /// The sentences with a class name in them.
    pub(crate) fn texts(&self, name: &str) -> Vec<String> {
        let sentences = self.sentences().into_iter();
        if *self != Self::Ensemble63 {
            return sentences.map(|sentence| sentence.replace("{}", name)).collect();
        }
        // The article goes by the name as it is written.
        let article = if name.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
        let name = name.replace('_', " ").replace('/', " or ").to_lowercase();
        let text = |sentence: String| {
            let text = sentence.replace("{article}", article).replace("{}", name.trim_end_matches('.'));
            if text.starts_with('a') || text.starts_with("the") { format!("This is {text}") } else { text }
        };
        sentences.map(text).collect()
    }
}

/// The sentences of LP-OVOD's code, in its order. (LP-OVOD, section 4.)
fn ensemble_63() -> Vec<String> {
    let each =
        |before: &str, words: &[&str], after: &str| -> Vec<String> { words.iter().map(|word| format!("{before}{word}{after}")).collect() };
    let mut all = each("There is ", &["{article}", "the"], " {} in the scene.");
    all.extend(each("a photo of ", &["{article}", "the", "one"], " {} in the scene."));
    all.extend(each("itap of ", &["{article}", "my", "the"], " {}."));
    all.extend(each("a photo of ", &["{article}", "my", "the", "one", "many"], " {}."));
    for quality in ["good", "bad"] {
        all.extend(each(&format!("a {quality} photo of "), &["{article}", "the"], " {}."));
    }
    for quality in ["nice", "cool", "weird", "small", "large", "clean", "dirty"] {
        all.extend(each("a photo of ", &["a", "the"], &format!(" {quality} {{}}.")));
    }
    for quality in ["bright", "dark"] {
        all.extend(each(&format!("a {quality} photo of "), &["{article}", "the"], " {}."));
    }
    all.extend(each("a photo of ", &["a", "the"], " hard to see {}."));
    for quality in ["low resolution", "cropped", "close-up", "jpeg corrupted", "blurry", "pixelated"] {
        all.extend(each(&format!("a {quality} photo of "), &["{article}", "the"], " {}."));
    }
    all.extend(each("a black and white photo of ", &["the", "{article}"], " {}."));
    for kind in ["plastic", "toy", "plushie", "cartoon"] {
        all.extend(each("", &["a", "the"], &format!(" {kind} {{}}.")));
    }
    all.extend(["an embroidered {}.", "the embroidered {}.", "a painting of the {}.", "a painting of a {}."].map(String::from));
    all
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
    use ovenbird_data::classes::ClassSplit;
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

    fn sha256(lines: &[String]) -> String {
        Sha256::digest(lines.join("\n")).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The digests of methods/lp-ovod, section 4: of the raw sentences, and of those with the 65 classes of COCO.
    #[test]
    fn the_63_sentences_are_those_of_lp_ovod() {
        let sentences = Templates::Ensemble63.sentences();
        assert_eq!(
            (sentences.len(), sha256(&sentences).as_str()),
            (63, "93950afe1b680521d3ec1161d6576ce5288b26acb2263338329674abfb4160a1")
        );
        // In ascending id of COCO.
        let ClassSplit { base: mut classes, novel } = ClassSplit::coco_48_17();
        for (place, name) in [4, 5, 11, 12, 15, 16, 21, 23, 27, 29, 32, 34, 45, 47, 54, 58, 63].into_iter().zip(novel) {
            classes.insert(place, name);
        }
        assert_eq!(sha256(&classes), "f38680c89fa07234a48424256a063e50f43c897fe822793ce0bfaaa211d84005");
        let texts: Vec<String> = classes.iter().flat_map(|name| Templates::Ensemble63.texts(name)).collect();
        assert_eq!(sha256(&texts), "1068a2ee709cc8ec06ff4f2d9e27eb02f9b09a6d1abedbf1f6d6bea213c6e964");
        assert_eq!(Templates::Ensemble63.texts("apple")[0], "There is an apple in the scene.");
        assert_eq!(Templates::Ensemble63.texts("Owl_house/barn..")[2], "This is a photo of a owl house or barn in the scene.");
        assert_eq!(Templates::BareName.texts("bus"), ["bus"]);
    }

    /// T1 of CORA's specification; sorted by code point.
    #[test]
    fn the_80_sentences_are_those_of_cora() {
        let mut sentences = Templates::Clip80.sentences();
        sentences.sort_unstable();
        assert_eq!(sha256(&sentences), "a8a4822f2921936e2ef07cf2e7a5df69be9532aab2f3f4880156bb03563e2467");
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
