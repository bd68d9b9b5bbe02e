//! DetPro's prompt learning: which rows are trained on, their weights and the loss. Du et al., CVPR 2022, <https://arxiv.org/abs/2203.14940>.
//!
//! A row is the CLIP embedding of a proposal, with the class of the object that it matches, or none, and its IoU. The vectors that are trained
//! are those of [`Prompted`](crate::clip::prompted::Prompted); this file has the arithmetic around them (DetPro, sections 3.1 to 3.6).
//!
//! Differences from the published code: [`Background::Max`] takes the logarithm of a softmax in one step, because in two a probability that is
//! zero in f32 turns the gradient into NaN; the weight of a class without rows is 0 instead of infinite; gradients are f32.

use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    Error, Result,
    detection::{
        boxes::{Corners, iou},
        matching::{Assigner, Match, some_of},
    },
    error::ensure,
    layers::to_unit_length,
    parameters::normal,
};

/// What cosines are divided by.
pub const TEMPERATURE: f64 = 0.01;
/// Rows with a smaller IoU are left out.
pub const MIN_IOU: f32 = 0.1;
/// The vectors of a learned background prompt ([`Background::Learn`]).
pub const BACKGROUND_CONTEXT: usize = 10;
/// The standard deviation of a context's first values.
const FIRST_STD: f64 = 0.02;
/// How proposals are matched to objects: those that overlap an object most are its own as well.
const ASSIGNER: Assigner = Assigner { object_iou: 0.5, background_iou: 0.5, best_of_object_iou: Some(0.5) };

/// A class name as a prompt has it: without round brackets, spaces for underscores. (DetPro, section 3.2.)
pub fn class_name(name: &str) -> String {
    name.replace(['(', ')'], "").replace('_', " ")
}

/// The first values of `n_vectors` vectors of a context: f32 `[n_vectors, width]`, normal, with a standard deviation of 0.02.
pub fn first_context(n_vectors: usize, width: i64, rng: &mut ChaCha8Rng) -> Tensor {
    Tensor::from_slice(&normal(rng, n_vectors * width as usize, FIRST_STD)).view([-1, width])
}

/// The IoU of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RowIou {
    /// Of a matched proposal with its object. (Fixes defect X-6.)
    #[default]
    Fixed,
    /// The largest with any object, as published: a proposal that is the best one of another object keeps it.
    Reference,
}

/// The object that a proposal matches, if any, and its IoU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Assigned {
    /// The index of the object.
    pub object: Option<usize>,
    /// With it, or the largest with any object; 0 without objects.
    pub iou: f32,
}

/// Matches proposals to the annotated objects of their image. (DetPro, section 3.1.)
///
/// A proposal matches the object that it overlaps most, at an IoU of at least 0.5; one that an object overlaps most, at such an IoU, matches
/// that object, the last one of several.
pub fn assign(proposals: &[Corners], objects: &[Corners], rule: RowIou) -> Vec<Assigned> {
    let matches = ASSIGNER.assign(proposals, objects);
    let assigned = |(proposal, found): (&Corners, Match)| {
        let object = match found {
            Match::Object(object) => Some(object),
            Match::Background | Match::Ignored => None,
        };
        let iou = match (object, rule) {
            (Some(object), RowIou::Fixed) => iou(*proposal, objects[object]),
            (None, _) | (Some(_), RowIou::Reference) => objects.iter().map(|object| iou(*proposal, *object)).fold(0.0, f32::max),
        };
        Assigned { object, iou }
    };
    proposals.iter().zip(matches).map(assigned).collect()
}

/// How many rows of background are used at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FewNegatives {
    /// One, where there is one. (Fixes defect X-8.)
    #[default]
    Fixed,
    /// None where there are fewer than one is drawn from; the published code fails there.
    Reference,
}

/// Which rows are trained on. (DetPro, section 3.3.)
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowRule {
    /// Rows of base classes are positives from the first IoU to below the second.
    pub iou: [f32; 2],
    /// Rows without a class are negatives from an IoU of 0.1 to below this.
    pub negative_iou: f32,
    /// One of so many negatives is used.
    pub one_negative_of: usize,
    /// What becomes of fewer.
    pub few_negatives: FewNegatives,
}

/// What a row is in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowUse {
    /// A row of this base class.
    Positive(usize),
    /// A row of background.
    Negative,
    /// Neither.
    Unused,
}

impl RowRule {
    /// The use of a row with this IoU. `class`: base classes come first, `n_base` of them.
    pub fn row_use(&self, class: Option<usize>, iou: f32, n_base: usize) -> RowUse {
        let [least, limit] = self.iou;
        match class.filter(|_| iou >= least) {
            Some(class) if class < n_base && iou < limit => RowUse::Positive(class),
            None if (MIN_IOU..self.negative_iou).contains(&iou) => RowUse::Negative,
            Some(_) | None => RowUse::Unused,
        }
    }

    /// How many of so many negatives are used.
    pub fn n_drawn(&self, n_negatives: usize) -> usize {
        let n_drawn = n_negatives / self.one_negative_of.max(1);
        match self.few_negatives {
            FewNegatives::Fixed => n_drawn.max(n_negatives.min(1)),
            FewNegatives::Reference => n_drawn,
        }
    }

    /// Draws the negatives that are used, without replacement; ascending. The result depends only on `rng`.
    pub fn draw(&self, negatives: Vec<usize>, rng: &mut ChaCha8Rng) -> Vec<usize> {
        let n_drawn = self.n_drawn(negatives.len());
        some_of(negatives, n_drawn, rng)
    }
}

/// The treatment of background in the loss. (DetPro, section 3.4.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Background {
    /// A row of background is to be like no class: cross entropy with all base classes alike. Published.
    #[default]
    Soft,
    /// Rows of background are left out.
    FgOnly,
    /// A class of its own, with a learned prompt of ten vectors and no name.
    Learn,
    /// The probability of each class beyond an even one is the loss of a row of background.
    Hinge,
    /// A class of its own, whose logit is the mean logit.
    Mean,
    /// The same for rows of background alone; others are compared with the base classes.
    Meanbg,
    /// A class of its own, whose logit is 1 minus the largest logit.
    Max,
}

/// The weights of classes, f32 `[C + 1]`, by the number of rows of each of the C classes, and of background last.
///
/// `N / (n_c C)` for a class and `N / (2 n)` for background, N the sum of all; 0 for a class without rows, which no row of a batch has.
pub fn class_weights(counts: &[u64]) -> Result<Tensor> {
    let Some((n_negatives, of_classes)) = counts.split_last().filter(|(_, of_classes)| !of_classes.is_empty()) else {
        return Err(Error::Input { what: "counts", expected: "at least one class and background".into(), found: format!("{counts:?}") });
    };
    let n_rows = counts.iter().sum::<u64>() as f64;
    let weight = |n: u64, factor: f64| if n > 0 { (n_rows / (n as f64 * factor)) as f32 } else { 0.0 };
    let classes = of_classes.iter().map(|n| weight(*n, of_classes.len() as f64));
    Ok(Tensor::from_slice(&classes.chain([weight(*n_negatives, 2.0)]).collect::<Vec<_>>()))
}

/// The logits of `features` `[B, D]` and `classes` `[K, D]`, of any lengths: their cosines divided by [`TEMPERATURE`], `[B, K]`.
pub fn logits(features: &Tensor, classes: &Tensor) -> Tensor {
    to_unit_length(features).matmul(&to_unit_length(classes).tr()) / TEMPERATURE
}

/// The loss of a batch.
///
/// `logits`: f32 `[B, C]`, with [`Background::Learn`] `[B, C + 1]`; `labels`: i64 `[B]`, C for background; `weights`: of [`class_weights`],
/// on the device of the logits.
///
/// Costs of rows are multiplied by the weight of their label, added up and divided by the sum of these weights; with [`Background::Hinge`] and
/// [`Background::Meanbg`] by B. A factor that all weights share changes nothing where weights divide, so [`Background::FgOnly`] may get
/// weights with background.
pub fn loss(logits: &Tensor, labels: &Tensor, weights: &Tensor, background: Background) -> Result<Tensor> {
    let n_classes = weights.numel() as i64 - 1;
    let width = n_classes + i64::from(background == Background::Learn);
    let fits = logits.kind() == Kind::Float && matches!(logits.size()[..], [b, k] if b > 0 && k == width);
    ensure(fits, "logits", &format!("f32 [B, {width}], B at least 1"), logits)?;
    let n_rows = logits.size()[0];
    ensure(labels.kind() == Kind::Int64 && labels.size() == [n_rows], "labels", &format!("i64 [{n_rows}], as the logits"), labels)?;

    let is_background = labels.eq(n_classes);
    // Any class where the row has none: what it gives is not used.
    let classes = labels.clamp_max(n_classes - 1).unsqueeze(1);
    let with_column = |column: &Tensor| Tensor::cat(&[logits, column], 1);
    // Minus the logarithm of the probability of the class, [B]; and of background where it has a column.
    let of_class = |logits: &Tensor| -logits.log_softmax(1, Kind::Float).gather(1, &classes, false).squeeze_dim(1);
    let of_background = |logits: &Tensor| -logits.log_softmax(1, Kind::Float).select(1, n_classes);
    let of_label = |logits: &Tensor| -logits.log_softmax(1, Kind::Float).gather(1, &labels.unsqueeze(1), false).squeeze_dim(1);
    let mean_column = || logits.mean_dim([1_i64].as_slice(), true, Kind::Float);
    let costs = match background {
        Background::Soft => {
            let of_all = -logits.log_softmax(1, Kind::Float).mean_dim([1_i64].as_slice(), false, Kind::Float);
            of_all.where_self(&is_background, &of_class(logits))
        }
        Background::FgOnly => of_class(logits),
        Background::Learn => of_label(logits),
        Background::Hinge => {
            let beyond = (logits.softmax(1, Kind::Float) - 1.0 / n_classes as f64).relu();
            beyond.sum_dim_intlist([1_i64].as_slice(), false, Kind::Float).where_self(&is_background, &of_class(logits))
        }
        Background::Mean => of_label(&with_column(&mean_column())),
        Background::Meanbg => of_background(&with_column(&mean_column())).where_self(&is_background, &of_class(logits)),
        Background::Max => of_label(&with_column(&(1.0_f64 - logits.amax([1_i64].as_slice(), true)))),
    };
    let mut of_rows = weights.index_select(0, labels);
    if background == Background::FgOnly {
        of_rows *= is_background.logical_not();
    }
    let total = (&of_rows * costs).sum(Kind::Float);
    Ok(match background {
        Background::Hinge | Background::Meanbg => total / n_rows as f64,
        Background::Soft | Background::FgOnly | Background::Learn | Background::Mean | Background::Max => {
            total / of_rows.sum(Kind::Float).clamp_min(f64::from(f32::MIN_POSITIVE))
        }
    })
}

/// The class embeddings of several prompts as one, `[K, D]` of unit norm: the normalised sum of the normalised rows. (DetPro, section 3.6.)
///
/// `prompts`: at least one, each `[K, D]`.
pub fn ensemble(prompts: &[Tensor]) -> Result<Tensor> {
    let Some(first) = prompts.first() else {
        return Err(Error::Input { what: "prompts", expected: "at least one".into(), found: "none".into() });
    };
    for other in prompts {
        let size = first.size();
        ensure(size.len() == 2 && other.size() == size, "prompts", &format!("[K, D], all {size:?} as the first"), other)?;
    }
    let unit: Vec<Tensor> = prompts.iter().map(to_unit_length).collect();
    Ok(to_unit_length(&Tensor::stack(&unit, 0).sum_dim_intlist([0_i64].as_slice(), false, Kind::Float)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand_chacha::rand_core::SeedableRng as _;
    use tch::{Device, no_grad};

    use super::*;
    use crate::{
        clip::{
            prompted::{NamePlace, Prompted},
            tests::small,
            tokenizer::Overlong,
        },
        detection::boxes::{corners, floats, integers},
        golden::{detpro_ralf, error},
    };

    const CLASSES: [&str; 5] = ["aerosol can", "applesauce", "airplane", "Band Aid", "arctic type of shoe"];
    const TREATMENTS: [(&str, Background); 7] = [
        ("soft", Background::Soft),
        ("fg_only", Background::FgOnly),
        ("learn", Background::Learn),
        ("hinge", Background::Hinge),
        ("mean", Background::Mean),
        ("meanbg", Background::Meanbg),
        ("max", Background::Max),
    ];

    fn trained(tensor: &Tensor) -> Tensor {
        tensor.copy().set_requires_grad(true)
    }

    #[track_caller]
    fn assert_near(found: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
        let apart = error(found, expected);
        let limit = tolerance * (1.0 + expected.abs().max().double_value(&[]));
        assert!(apart <= limit, "{what}: {apart:.1e}, at most {limit:.1e}");
    }

    #[test]
    fn prompts_of_each_place_and_their_gradients_are_those_of_the_published_code() {
        let golden = detpro_ralf("detpro");
        let clip = small(&golden);
        let (text, tokenizer) = (clip.causal_text().unwrap(), clip.tokenizer());
        let weights = golden["prompt/grad_weight"].narrow(0, 0, 5);
        for (name, place) in [("end", NamePlace::End), ("middle", NamePlace::Middle), ("front", NamePlace::Front)] {
            let context = trained(&golden["prompt/ctx"]);
            let embeddings = Prompted::named(text, tokenizer, &CLASSES, 8, place).unwrap().encode(&context).unwrap();
            (&embeddings * &weights).sum(Kind::Float).backward();
            assert_near(&embeddings, &golden[&format!("prompt/embedding_{name}")], 1e-4, name);
            assert_near(&context.grad(), &golden[&format!("prompt/dctx_{name}")], 1e-3, name);
        }
        let [end, front] = ["end", "front"].map(|name| &golden[&format!("prompt/embedding_{name}")]);
        assert!(error(end, front) > 0.1, "the places do not differ");
    }

    /// Defect X-7: the published export has every name at the end, wherever it was trained.
    #[test]
    fn a_context_is_exported_with_other_names_at_the_end() {
        let golden = detpro_ralf("detpro");
        let clip = small(&golden);
        let names = ["aerosol can", "zebra", "iPod", "knob"];
        let export = |place| {
            let prompts = Prompted::named(clip.causal_text().unwrap(), clip.tokenizer(), &names, 8, place).unwrap();
            prompts.encode(&golden["prompt/ctx"]).unwrap()
        };
        assert_near(&export(NamePlace::End), &golden["prompt/export_embedding"], 1e-4, "export");
        assert!(error(&export(NamePlace::Middle), &golden["prompt/export_embedding"]) > 0.1);
    }

    #[test]
    fn a_background_prompt_is_vectors_without_a_name() {
        let golden = detpro_ralf("detpro");
        let clip = small(&golden);
        let (text, tokenizer) = (clip.causal_text().unwrap(), clip.tokenizer());
        let (context, background) = (trained(&golden["prompt/ctx"]), trained(&golden["prompt/bg_prompt"]));
        let classes = Prompted::named(text, tokenizer, &CLASSES, 8, NamePlace::End).unwrap().encode(&context).unwrap();
        let of_background = Prompted::new(text, tokenizer, &[""], BACKGROUND_CONTEXT).unwrap().encode(&background).unwrap();
        let embeddings = Tensor::cat(&[classes, of_background], 0);
        (&embeddings * &golden["prompt/grad_weight"]).sum(Kind::Float).backward();
        assert_near(&embeddings, &golden["prompt/embedding_learn_bg"], 1e-4, "embeddings");
        assert_near(&context.grad(), &golden["prompt/dctx_learn_bg"], 1e-3, "context");
        assert_near(&background.grad(), &golden["prompt/dbgprompt_learn_bg"], 1e-3, "background prompt");
    }

    /// Parity check 8, and the examples of section 3.2.
    #[test]
    fn a_context_of_x_gives_what_the_words_give() {
        let golden = detpro_ralf("detpro");
        let clip = small(&golden);
        let (text, tokenizer) = (clip.causal_text().unwrap(), clip.tokenizer());
        let sentences: Vec<String> = CLASSES.iter().map(|name| format!("{}{name}.", "X ".repeat(8))).collect();
        let tokens = tokenizer.batch(&sentences, Overlong::Refuse).unwrap();
        let n_tokens = tokens.size()[1];
        assert_eq!(integers(&tokens), integers(&golden["prompt/tokens"].narrow(1, 0, n_tokens)));
        assert_eq!(integers(&tokens.argmax(1, false))[..2], [13, 12]);
        let context = trained(&text.words(tokenizer, &"X ".repeat(8)).unwrap());
        let prompts = Prompted::named(text, tokenizer, &CLASSES, 8, NamePlace::End).unwrap();
        let embeddings = prompts.encode(&context).unwrap();
        let apart = error(&to_unit_length(&embeddings), &clip.encode_text_features(&tokens).unwrap());
        assert!(apart < 1e-6, "{apart}");
        embeddings.sum(Kind::Float).backward();
        assert!(context.grad().abs().max().double_value(&[]) > 0.0 && !text.token_embedding.requires_grad());
        let changed = prompts.encode(&(&context * 1.5)).unwrap() - &embeddings;
        assert!(changed.abs().amax([1_i64].as_slice(), false).min().double_value(&[]) > 1e-3, "a class does not change with the context");
    }

    #[test]
    fn names_lose_brackets_and_underscores() {
        assert_eq!(class_name("speaker_(stero_equipment)"), "speaker stero equipment");
        assert_eq!(class_name("Band_Aid"), "Band Aid");
    }

    /// Parity check 4, and the stored weights.
    #[test]
    fn weights_are_those_of_the_published_code() {
        let golden = detpro_ralf("detpro");
        for case in ["loss_a", "loss_b"] {
            let counts: Vec<u64> = integers(&golden[&format!("{case}/counts")]).into_iter().map(|n| n as u64).collect();
            let found = floats(&class_weights(&counts).unwrap());
            for ((found, expected), n) in found.iter().zip(floats(&golden[&format!("{case}/weights")])).zip(&counts) {
                match n {
                    0 => assert!(found.abs() < f32::MIN_POSITIVE && expected.is_infinite()),
                    _ => assert!((found - expected).abs() < 1e-5, "{case}: {found}, expected {expected}"),
                }
            }
        }
        assert_eq!(class_weights(&[7]).unwrap_err().to_string(), "counts: expected at least one class and background, found [7]");
    }

    /// Parity check 5 (`loss_a`); in `loss_b` a class has no row.
    #[test]
    fn losses_and_gradients_are_those_of_the_published_code() {
        let golden = detpro_ralf("detpro");
        for case in ["loss_a", "loss_b"] {
            let of = |name: &str| &golden[&format!("{case}/{name}")];
            let counts: Vec<u64> = integers(of("counts")).into_iter().map(|n| n as u64).collect();
            let (labels, weights) = (of("labels"), class_weights(&counts).unwrap());
            for (name, background) in TREATMENTS {
                let logits = match background {
                    Background::Learn => Tensor::cat(&[of("logits"), &of("bg_logit").unsqueeze(1)], 1),
                    _ => of("logits").shallow_clone(),
                };
                let logits = trained(&logits);
                let loss = loss(&logits, labels, &weights, background).unwrap();
                loss.backward();
                assert_near(&loss, of(&format!("loss_{name}")), 1e-4, name);
                let gradient = match background {
                    // The published code has rows of objects alone.
                    Background::FgOnly => {
                        let of_background = labels.eq(counts.len() as i64 - 1);
                        let is_zero = logits.grad().abs().amax([1_i64].as_slice(), false).eq(0.0);
                        assert!(of_background.logical_not().logical_or(&is_zero).all().int64_value(&[]) == 1);
                        logits.grad().index_select(0, &of_background.logical_not().nonzero().squeeze_dim(1))
                    }
                    _ => logits.grad(),
                };
                assert_near(&gradient, of(&format!("dlogits_{name}")), 1e-3, name);
            }
        }
        let soft = golden["loss_a/loss_soft"].double_value(&[]);
        assert!((soft - 1.182_297).abs() < 1e-5, "{soft}");
    }

    #[test]
    fn logits_far_apart_give_a_gradient_with_every_treatment() {
        let weights = class_weights(&[1, 1, 0, 2]).unwrap();
        let labels = Tensor::from_slice(&[0_i64, 3]);
        for (name, background) in TREATMENTS {
            let width = 3 + i64::from(background == Background::Learn);
            let logits = Tensor::from_slice(&[-200.0_f32, 200.0, 0.0, 5.0, 190.0, -190.0, 3.0, 1.0]).view([2, 4]).narrow(1, 0, width);
            let logits = trained(&logits);
            loss(&logits, &labels, &weights, background).unwrap().backward();
            assert!(logits.grad().isfinite().all().int64_value(&[]) == 1, "{name}");
        }
    }

    #[test]
    fn a_batch_of_another_shape_is_refused() {
        let weights = class_weights(&[1, 1, 2]).unwrap();
        let logits = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
        let said = |logits: &Tensor, labels: &[i64], background| {
            loss(logits, &Tensor::from_slice(labels), &weights, background).unwrap_err().to_string()
        };
        assert_eq!(said(&logits, &[0, 1], Background::Soft), "logits: expected f32 [B, 2], B at least 1, found Float [2, 3]");
        assert_eq!(said(&logits, &[0], Background::Learn), "labels: expected i64 [2], as the logits, found Int64 [1]");
    }

    /// Three steps of plain SGD, with every treatment as far as its numbers are stored.
    #[test]
    fn steps_are_those_of_the_published_code() {
        let golden = detpro_ralf("detpro");
        let clip = small(&golden);
        let (text, tokenizer) = (clip.causal_text().unwrap(), clip.tokenizer());
        let classes = Prompted::named(text, tokenizer, &CLASSES, 8, NamePlace::End).unwrap();
        let of_background = Prompted::new(text, tokenizer, &[""], BACKGROUND_CONTEXT).unwrap();
        let counts: Vec<u64> = integers(&golden["train/counts"]).into_iter().map(|n| n as u64).collect();
        let weights = class_weights(&counts).unwrap();
        for (name, background) in TREATMENTS {
            let (mut context, mut prompt) = (trained(&golden["prompt/ctx"]), trained(&golden["prompt/bg_prompt"]));
            // The third step of `max` is NaN in the published code: its second has changed the context by NaN.
            let n_steps = if background == Background::Max { 1 } else { 3 };
            for step in 0..n_steps {
                let mut embeddings = classes.encode(&context).unwrap();
                if background == Background::Learn {
                    embeddings = Tensor::cat(&[embeddings, of_background.encode(&prompt).unwrap()], 0);
                }
                let logits = logits(&golden["train/features"].get(step), &embeddings);
                let loss = loss(&logits, &golden["train/labels"].get(step), &weights, background).unwrap();
                loss.backward();
                let at = format!("{name}, step {step}");
                assert_near(&loss, &golden[&format!("train/loss_{name}")].get(step), 1e-4, &at);
                assert_near(&context.grad(), &golden[&format!("train/dctx_{name}")].get(step), 1e-3, &at);
                no_grad(|| {
                    context -= context.grad() * 2e-3;
                    if background == Background::Learn {
                        prompt -= prompt.grad() * 2e-3;
                    }
                });
                if let Some(after) = golden.get(&format!("train/ctx_{name}")) {
                    assert_near(&context, &after.get(step), 1e-4, &at);
                }
                context.zero_grad();
                prompt.zero_grad();
            }
            if background == Background::Learn {
                assert_near(&prompt, &golden["train/bgprompt_learn"], 1e-4, name);
            }
        }
    }

    #[test]
    fn rows_are_chosen_as_in_the_published_code() {
        let golden = detpro_ralf("detpro");
        let (labels, ious) = (integers(&golden["rows/labels"]), floats(&golden["rows/ious"]));
        // The place of a label among the base classes; other labels are novel.
        let mut base: BTreeMap<i64, usize> = BTreeMap::new();
        for range in 0..5 {
            let [rows, places] = ["pos_index", "pos_label"].map(|name| integers(&golden[&format!("rows/{name}_{range}")]));
            base.extend(rows.iter().zip(places).map(|(row, place)| (labels[*row as usize], place as usize)));
        }
        let ranges = [[0.5, 0.6], [0.6, 0.7], [0.7, 0.8], [0.8, 0.9], [0.9, 1.1]];
        for (range, iou) in ranges.into_iter().enumerate() {
            let rule = RowRule { iou, negative_iou: 0.5, one_negative_of: 10, few_negatives: FewNegatives::Fixed };
            let of = |name: &str| integers(&golden[&format!("rows/{name}_{range}")]);
            let (mut positives, mut negatives) = (Vec::new(), Vec::new());
            for (row, (label, iou)) in labels.iter().zip(&ious).enumerate() {
                let class = (*label >= 0).then(|| base.get(label).copied().unwrap_or(866));
                match rule.row_use(class, *iou, 866) {
                    RowUse::Positive(class) => positives.push((row as i64, class as i64)),
                    RowUse::Negative => negatives.push(row as i64),
                    RowUse::Unused => {}
                }
            }
            let expected: Vec<(i64, i64)> = of("pos_index").into_iter().zip(of("pos_label")).collect();
            assert_eq!((positives, negatives), (expected, of("neg_pool")), "{iou:?}");
        }
    }

    /// Parity check 4, of negatives.
    #[test]
    fn a_tenth_of_the_negatives_is_drawn_by_the_generator() {
        let rule = |few_negatives| RowRule { iou: [0.5, 0.6], negative_iou: 0.5, one_negative_of: 10, few_negatives };
        let [fixed, reference] = [FewNegatives::Fixed, FewNegatives::Reference].map(rule);
        assert_eq!([0, 9, 10, 25, 1999].map(|n| fixed.n_drawn(n)), [0, 1, 1, 2, 199]);
        assert_eq!([0, 9, 10, 25, 1999].map(|n| reference.n_drawn(n)), [0, 0, 1, 2, 199]);
        let draw = |seed| fixed.draw((100..350).collect(), &mut ChaCha8Rng::seed_from_u64(seed));
        let drawn = draw(1);
        assert_eq!((drawn.len(), &drawn), (25, &draw(1)));
        assert!(drawn.is_sorted_by(|a, b| a < b) && drawn.iter().all(|row| (100..350).contains(row)) && drawn != draw(2));
    }

    #[test]
    fn assignments_are_those_of_the_published_code() {
        let golden = detpro_ralf("detector");
        let [proposals, objects] = ["proposals", "gt"].map(|name| corners(&golden[&format!("assign/{name}")], "boxes").unwrap());
        let labels = integers(&golden["assign/gt_labels"]);
        let found = assign(&proposals, &objects, RowIou::Reference);
        let claimed: Vec<i64> = found.iter().map(|found| found.object.map_or(-1, |object| object as i64)).collect();
        let classes: Vec<i64> = found.iter().map(|found| found.object.map_or(-1, |object| labels[object])).collect();
        assert_eq!(claimed, integers(&golden["assign/claimed_gt"]));
        assert_eq!(classes, integers(&golden["assign/labels"]));
        for (found, expected) in found.iter().zip(floats(&golden["assign/ious"])) {
            assert!((found.iou - expected).abs() < 1e-4, "{}, expected {expected}", found.iou);
        }
    }

    /// Parity check 3.
    #[test]
    fn a_proposal_that_is_the_best_of_another_object_is_that_object_s() {
        let check = |objects: &[Corners], proposals: &[Corners], rule, expected: &[(Option<usize>, f32)]| {
            for (found, expected) in assign(proposals, objects, rule).iter().zip(expected) {
                assert!(found.object == expected.0 && (found.iou - expected.1).abs() < 1e-5, "{found:?}, expected {expected:?}");
            }
        };
        let objects = [[0.0, 0.0, 100.0, 100.0], [20.0, 0.0, 120.0, 100.0]];
        let proposals = [
            [0.0, 0.0, 100.0, 90.0],
            [12.0, 0.0, 112.0, 100.0],
            [60.0, 0.0, 160.0, 100.0],
            [0.0, 0.0, 30.0, 30.0],
            [200.0, 200.0, 210.0, 210.0],
            [0.0, 0.0, 52.0, 100.0],
        ];
        let expected = [(Some(0), 0.9), (Some(1), 0.851_852), (None, 0.428_571), (None, 0.09), (None, 0.0), (Some(0), 0.52)];
        check(&objects, &proposals, RowIou::Reference, &expected);
        check(&objects, &proposals, RowIou::Fixed, &expected);
        let objects = [[0.0, 0.0, 100.0, 100.0], [10.0, 0.0, 90.0, 60.0]];
        let proposals = [[0.0, 0.0, 100.0, 95.0], [0.0, 0.0, 40.0, 100.0], [0.0, 60.0, 100.0, 100.0]];
        check(&objects, &proposals, RowIou::Reference, &[(Some(1), 0.95), (None, 0.4), (None, 0.4)]);
        check(&objects, &proposals, RowIou::Fixed, &[(Some(1), 0.505_263), (None, 0.4), (None, 0.4)]);
        check(&[], &proposals, RowIou::Fixed, &[(None, 0.0); 3]);
    }

    /// Parity check 7, and the stored prompts.
    #[test]
    fn an_ensemble_adds_rows_of_unit_length() {
        let golden = detpro_ralf("detpro");
        let prompts: Vec<Tensor> = golden["ensemble/inputs"].unbind(0);
        assert_near(&ensemble(&prompts).unwrap(), &golden["ensemble/output"], 1e-4, "stored");
        let rows = |numbers: [f32; 4]| Tensor::from_slice(&numbers).view([2, 2]);
        let found = ensemble(&[rows([3.0, 4.0, 1.0, 0.0]), rows([0.0, 2.0, 5.0, 5.0])]).unwrap();
        assert_near(&found, &rows([0.316_228, 0.948_683, 0.923_880, 0.382_683]), 1e-6, "worked");
        assert!(ensemble(&[]).is_err() && ensemble(&[rows([0.0; 4]), Tensor::zeros([2, 3], (Kind::Float, Device::Cpu))]).is_err());
    }
}
