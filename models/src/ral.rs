//! RAL: losses that keep objects nearer to their class's name than to similar words, and nearer to those than to dissimilar ones. Kim et
//! al. 2024 (RALF, section 7 of its specification).
//!
//! Negatives are one table of words and, for each class, the words that are hard and those that are easy; the reference holds copies of the
//! words for each class, padded with zeros.
//!
//! Differences from the reference: only the products that the losses need are computed, where the reference computes B x B q and reads a
//! diagonal. A batch without objects costs nothing, and fails there (its defect 19).

use std::ops::Range;

use rand_chacha::{ChaCha8Rng, rand_core::RngCore};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Error, Result, error::ensure, layers::to_unit_length};

/// The constants of RAL. The defaults are those for DetPro on LVIS.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Hard words, and easy words, that are drawn for each object.
    pub random_q: usize,
    /// Factor of the cosine to hard words in the hard loss.
    pub lambda_sim: f64,
    /// Factor of the cosine to easy words in the easy loss. OADP on COCO and Object-Centric on LVIS have 5.
    pub lambda_dis: f64,
    /// Margin of the hard loss.
    pub margin_sim: f64,
    /// Margin of the easy loss.
    pub margin_dis: f64,
    /// Weight of the hard loss.
    pub beta_sim: f64,
    /// Weight of the easy loss.
    pub beta_dis: f64,
    /// A class with fewer words than are drawn.
    pub few_words: FewWords,
    /// The gradient of the easy loss.
    pub easy_gradient: EasyGradient,
    /// The running statistics of the box head.
    pub batch_norm: BatchNorm,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            random_q: 10,
            lambda_sim: 1.0,
            lambda_dis: 10.0,
            margin_sim: 0.0,
            margin_dis: 1.0,
            beta_sim: 1.0,
            beta_dis: 1.0,
            few_words: FewWords::Reference,
            easy_gradient: EasyGradient::Reference,
            batch_norm: BatchNorm::Reference,
        }
    }
}

/// What becomes of a class with fewer words than are drawn. (Defect 15.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FewWords {
    /// It is an error, as it is in the reference.
    #[default]
    Reference,
    /// All its words are drawn.
    Fixed,
}

/// Where the gradient of the easy loss goes. (Defect 18.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EasyGradient {
    /// Away from easy words and towards hard ones, against the hard loss.
    #[default]
    Reference,
    /// Away from easy words alone: the cosine to hard words is taken as a constant.
    Detached,
}

/// What the forward pass on annotated boxes does to the running statistics of the box head's batch normalisation. (Defect 20.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BatchNorm {
    /// It updates them a second time in each step, so that annotated boxes weigh 0.53 in the end: another detector even where both losses weigh nothing.
    #[default]
    Reference,
    /// Nothing: it is normalised by its own statistics, and the running ones are those of the sampled regions alone.
    BatchOnly,
}

/// Words that classes are kept apart from.
#[derive(Debug)]
pub struct Negatives {
    /// Embeddings of the classes' names, f32 `[K, D]`, of any length.
    pub anchors: Tensor,
    /// Embeddings of words, f32 `[V, D]`, of any length.
    pub words: Tensor,
    /// For each class its hard words, those similar to its name, as rows of `words`.
    pub hard: Vec<Vec<u32>>,
    /// For each class its easy words, those least similar to its name, as rows of `words`.
    pub easy: Vec<Vec<u32>>,
}

/// Negatives with the constants of their losses.
#[derive(Debug)]
pub struct Ral {
    config: Config,
    /// With rows of unit length.
    negatives: Negatives,
}

/// The words that were drawn for each of B objects, as rows of the words' table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drawn {
    /// B lists.
    pub hard: Vec<Vec<u32>>,
    /// B lists.
    pub easy: Vec<Vec<u32>>,
}

impl Drawn {
    /// Those of some of the objects.
    pub fn of(&self, objects: Range<usize>) -> Self {
        Self { hard: self.hard[objects.clone()].to_vec(), easy: self.easy[objects].to_vec() }
    }
}

/// The losses of a batch, scalars.
#[derive(Debug)]
pub struct Losses {
    /// Objects against hard words.
    pub hard: Tensor,
    /// Hard words against easy ones.
    pub easy: Tensor,
    /// The share of objects whose hard loss is above 0, and of those whose easy loss is; 0 without objects.
    pub active: [Tensor; 2],
}

impl Ral {
    /// Fails where tables do not fit, a word is not in the table, or a class has too few words.
    pub fn new(config: Config, negatives: Negatives) -> Result<Self> {
        let Negatives { anchors, words, hard, easy } = negatives;
        ensure(anchors.dim() == 2, "embeddings of classes", "[K, D]", &anchors)?;
        let [n_classes, dim] = [anchors.size()[0], anchors.size()[1]];
        ensure(matches!(words.size()[..], [_, found] if found == dim), "embeddings of words", &format!("[V, {dim}]"), &words)?;
        let refused = |what, expected: String, found: String| Err(Error::Input { what, expected, found });
        if config.random_q == 0 {
            return refused("random_q", "at least 1".into(), "0".into());
        }
        let least = match config.few_words {
            FewWords::Reference => config.random_q,
            FewWords::Fixed => 1,
        };
        for (what, of_classes) in [("hard words", &hard), ("easy words", &easy)] {
            if of_classes.len() as i64 != n_classes {
                return refused(what, format!("{n_classes} lists, one for each class"), of_classes.len().to_string());
            }
            if let Some((class, few)) = of_classes.iter().enumerate().find(|(_, words)| words.len() < least) {
                return refused(what, format!("at least {least} for each class"), format!("{} for class {class}", few.len()));
            }
            if let Some(word) = of_classes.iter().flatten().find(|word| i64::from(**word) >= words.size()[0]) {
                return refused(what, format!("rows of a table of {}", words.size()[0]), word.to_string());
            }
        }
        Ok(Self { config, negatives: Negatives { anchors: to_unit_length(&anchors), words: to_unit_length(&words), hard, easy } })
    }

    /// The constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Draws words for objects of these classes, without replacement.
    pub fn draw(&self, labels: &[i64], rng: &mut ChaCha8Rng) -> Result<Drawn> {
        let n_classes = self.negatives.hard.len();
        if let Some(label) = labels.iter().find(|label| !(0..n_classes as i64).contains(label)) {
            let expected = format!("classes from 0 to {}", n_classes.saturating_sub(1));
            return Err(Error::Input { what: "labels of objects", expected, found: label.to_string() });
        }
        let mut draw =
            |of_classes: &[Vec<u32>]| labels.iter().map(|label| sample(&of_classes[*label as usize], self.config.random_q, rng)).collect();
        Ok(Drawn { hard: draw(&self.negatives.hard), easy: draw(&self.negatives.easy) })
    }

    /// The losses of objects, means over them; 0 where there are none.
    ///
    /// `embeddings`: of objects as annotated, `[B, D]` of unit length; `labels`: their classes, i64 `[B]`; `drawn`: of [`Self::draw`].
    pub fn losses(&self, embeddings: &Tensor, labels: &Tensor, drawn: &Drawn) -> Result<Losses> {
        let dim = self.negatives.words.size()[1];
        ensure(matches!(embeddings.size()[..], [_, found] if found == dim), "embeddings of objects", &format!("[B, {dim}]"), embeddings)?;
        let n = embeddings.size()[0];
        let fits = labels.kind() == Kind::Int64 && labels.size() == [n];
        ensure(fits, "labels of objects", &format!("i64 [{n}], one for each object"), labels)?;
        for words in [&drawn.hard, &drawn.easy] {
            if words.len() as i64 != n {
                let (expected, found) = (format!("{n} lists, one for each object"), words.len().to_string());
                return Err(Error::Input { what: "drawn words", expected, found });
            }
        }
        let rows = |table: &Tensor, places: &Tensor| {
            table.to_device(embeddings.device()).to_kind(embeddings.kind()).index_select(0, &places.to_device(embeddings.device()))
        };
        let anchor = (embeddings * rows(&self.negatives.anchors, labels)).sum_dim_intlist(-1, false, embeddings.kind());
        let mean_cosine = |drawn: &[Vec<u32>]| {
            let most = drawn.iter().map(Vec::len).max().unwrap_or(0);
            let padded =
                |words: &Vec<u32>| words.iter().map(|word| i64::from(*word)).chain(std::iter::repeat(0)).take(most).collect::<Vec<_>>();
            let weights = |words: &Vec<u32>| {
                (0..most).map(|place| if place < words.len() { 1.0 / words.len() as f64 } else { 0.0 }).collect::<Vec<_>>()
            };
            let places: Vec<i64> = drawn.iter().flat_map(padded).collect();
            let weights: Vec<f64> = drawn.iter().flat_map(weights).collect();
            let words = rows(&self.negatives.words, &Tensor::from_slice(&places)).view([n, most as i64, dim]);
            let weights = Tensor::from_slice(&weights).view([n, most as i64]).to_device(embeddings.device()).to_kind(embeddings.kind());
            let cosines = (words * embeddings.unsqueeze(1)).sum_dim_intlist(-1, false, embeddings.kind());
            (cosines * weights).sum_dim_intlist(-1, false, embeddings.kind())
        };
        Ok(hinges(&self.config, &anchor, &mean_cosine(&drawn.hard), &mean_cosine(&drawn.easy)))
    }
}

/// The two hinge losses of cosines `[B]`: to the class's name, and means to hard and to easy words.
fn hinges(config: &Config, anchor: &Tensor, hard: &Tensor, easy: &Tensor) -> Losses {
    let n = anchor.size()[0].max(1) as f64;
    let attracted = match config.easy_gradient {
        EasyGradient::Reference => hard.shallow_clone(),
        EasyGradient::Detached => hard.detach(),
    };
    let of_objects = [hard * config.lambda_sim + config.margin_sim - anchor, easy * config.lambda_dis + config.margin_dis - attracted]
        .map(|loss| loss.relu());
    let mean = |loss: &Tensor| loss.sum(loss.kind()) / n;
    Losses {
        hard: mean(&of_objects[0]) * config.beta_sim,
        easy: mean(&of_objects[1]) * config.beta_dis,
        active: of_objects.each_ref().map(|loss| loss.detach().gt(0.0).sum(Kind::Float) / n),
    }
}

/// Draws so many words, or all where there are no more, without replacement.
fn sample(words: &[u32], n: usize, rng: &mut ChaCha8Rng) -> Vec<u32> {
    let mut words = words.to_vec();
    let n = n.min(words.len());
    for place in 0..n {
        let n_left = (words.len() - place) as u64;
        // The upper half of a product with 2^64 is even to within a part of 2^-32.
        let other = place + ((u128::from(rng.next_u64()) * u128::from(n_left)) >> 64) as usize;
        words.swap(place, other);
    }
    words.truncate(n);
    words
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand_chacha::rand_core::SeedableRng as _;
    use tch::Device;

    use super::*;
    use crate::golden::{detpro_ralf, error};

    fn scalar(tensor: &Tensor) -> f64 {
        tensor.double_value(&[])
    }

    fn integers(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor.view(-1)).unwrap()
    }

    /// Fails where gradients differ by more than 1e-3 of the largest number.
    fn check_gradient(found: &Tensor, expected: &Tensor, name: &str) {
        let apart = error(found, expected) / expected.abs().max().double_value(&[]).max(1e-6);
        assert!(apart < 1e-3, "{name}: {apart}");
    }

    /// Words of class c are those from c n on, of which the first so many are no padding.
    fn lists(n: i64, lengths: &Tensor) -> Vec<Vec<u32>> {
        let list = |(class, length): (usize, i64)| (0..length).map(|word| (class as i64 * n + word) as u32).collect();
        integers(lengths).into_iter().enumerate().map(list).collect()
    }

    /// The negatives of the golden data: hard words, then easy ones, in one table.
    fn golden_negatives(golden: &BTreeMap<String, Tensor>) -> Negatives {
        let [hard, easy] = ["sim", "dis"].map(|group| &golden[&format!("losses/feat_out_{group}")]);
        let words = Tensor::cat(&[hard.flatten(0, 1), easy.flatten(0, 1)], 0);
        let first = (hard.size()[0] * hard.size()[1]) as u32;
        let easy = lists(easy.size()[1], &golden["losses/pad_out_dis"]);
        Negatives {
            anchors: golden["losses/feat_in"].shallow_clone(),
            words,
            hard: lists(hard.size()[1], &golden["losses/pad_out_sim"]),
            easy: easy.into_iter().map(|words| words.into_iter().map(|word| word + first).collect()).collect(),
        }
    }

    /// The words that the reference drew, from their places among the words of the class.
    fn golden_drawn(ral: &Ral, labels: &[i64], golden: &BTreeMap<String, Tensor>, set: &str) -> Drawn {
        let words = |of_classes: &[Vec<u32>], name: &str| {
            let drawn = &golden[&format!("{set}/drawn_{name}")];
            let q = drawn.size()[1] as usize;
            let of_object =
                |(label, places): (&i64, &[i64])| places.iter().map(|place| of_classes[*label as usize][*place as usize]).collect();
            labels.iter().zip(integers(drawn).chunks(q)).map(of_object).collect()
        };
        Drawn { hard: words(&ral.negatives.hard, "hard"), easy: words(&ral.negatives.easy, "easy") }
    }

    /// Losses and gradients by RALF's own code, with two values of `lambda_dis` and `margin_sim`; f32.
    #[test]
    fn losses_are_those_of_ralf_s_code() {
        let golden = detpro_ralf("detector");
        let labels = integers(&golden["losses/gt_labels"]);
        for set in ["losses_detpro", "losses_dis5"] {
            let number = |name: &str| scalar(&golden[&format!("{set}/{name}")]);
            let config = Config { random_q: 3, lambda_dis: number("lambda_dis"), margin_sim: number("margin_sim"), ..Config::default() };
            let ral = Ral::new(Config { few_words: FewWords::Fixed, ..config }, golden_negatives(&golden)).unwrap();
            let inputs = ["Wt", "bt", "xg"].map(|name| golden[&format!("losses/{name}")].copy().set_requires_grad(true));
            let [weight, bias, x] = &inputs;
            let embeddings = to_unit_length(&x.linear(weight, Some(bias)));
            let drawn = golden_drawn(&ral, &labels, &golden, set);
            let losses = ral.losses(&embeddings, &golden["losses/gt_labels"], &drawn).unwrap();
            for (loss, name) in [(&losses.hard, "hard_neg_loss"), (&losses.easy, "easy_neg_loss")] {
                assert!(
                    (scalar(loss) - number(name)).abs() < 1e-4 * (1.0 + number(name)),
                    "{set} {name}: {} {}",
                    scalar(loss),
                    number(name)
                );
                let gradients = Tensor::run_backward(&[loss], &inputs.each_ref(), true, false);
                for (gradient, input) in gradients.iter().zip(["Wt", "bt", "xg"]) {
                    let name = format!("{set}/d_{name}_d_{input}");
                    check_gradient(gradient, &golden[&name], &name);
                }
            }
        }
    }

    /// One table and lists of rows give the losses of padded copies of the words.
    #[test]
    fn indices_give_the_losses_of_padded_rows() {
        let golden = detpro_ralf("detector");
        let labels = &golden["losses/gt_labels"];
        let config = Config { random_q: 3, few_words: FewWords::Fixed, ..Config::default() };
        let ral = Ral::new(config, golden_negatives(&golden)).unwrap();
        let drawn = golden_drawn(&ral, &integers(labels), &golden, "losses_detpro");
        let embeddings = to_unit_length(&golden["losses/xg"].linear(&golden["losses/Wt"], Some(&golden["losses/bt"])));
        let cosines = |name: &str, drawn: &str| {
            let rows = to_unit_length(&golden[&format!("losses/feat_out_{name}")]).index_select(0, labels);
            let drawn = golden[&format!("losses_detpro/drawn_{drawn}")].unsqueeze(2).expand([-1, -1, rows.size()[2]], false);
            (rows.gather(1, &drawn, false) * embeddings.unsqueeze(1)).sum_dim_intlist(-1, false, Kind::Float).mean_dim(
                1,
                false,
                Kind::Float,
            )
        };
        let anchors = to_unit_length(&golden["losses/feat_in"]).index_select(0, labels);
        let anchor = (&embeddings * anchors).sum_dim_intlist(-1, false, Kind::Float);
        let padded = hinges(&config, &anchor, &cosines("sim", "hard"), &cosines("dis", "easy"));
        let found = ral.losses(&embeddings, labels, &drawn).unwrap();
        assert!((scalar(&found.hard) - scalar(&padded.hard)).abs() < 1e-6);
        assert!((scalar(&found.easy) - scalar(&padded.easy)).abs() < 1e-6);
    }

    fn f64s(rows: &[[f64; 3]]) -> Tensor {
        Tensor::from_slice(rows.as_flattened()).view([rows.len() as i64, 3])
    }

    fn small(config: Config) -> Ral {
        let words = [[0., 1., 2.], [1., 2., 1.], [1., 0., 1.], [0., 2., 1.], [1., 0., -1.], [-1., 2., -1.], [0., 0.5, 1.], [1., -1., 0.5]];
        let (hard, easy) = (vec![vec![0, 1], vec![2, 3]], vec![vec![4, 5], vec![6, 7]]);
        let anchors = f64s(&[[2., 0., 1.], [1., 1., 0.5]]);
        Ral::new(Config { random_q: 2, ..config }, Negatives { anchors, words: f64s(&words), hard, easy }).unwrap()
    }

    fn small_losses(config: Config) -> (Losses, Tensor) {
        let ral = small(config);
        let r = to_unit_length(&f64s(&[[1., 2., 2.], [2., 1., 0.]])).set_requires_grad(true);
        let drawn = Drawn { hard: ral.negatives.hard.clone(), easy: ral.negatives.easy.clone() };
        (ral.losses(&r, &Tensor::from_slice(&[0_i64, 1]), &drawn).unwrap(), r)
    }

    /// Parity check 14 of the specification, f64.
    #[test]
    fn losses_have_the_values_of_the_specification() {
        let (losses, r) = small_losses(Config::default());
        assert!((scalar(&losses.hard) - 0.163_609).abs() < 1e-6 && (scalar(&losses.easy) - 1.487_242).abs() < 1e-6);
        assert!((scalar(&losses.active[0]) - 0.5).abs() < 1e-6 && (scalar(&losses.active[1]) - 0.5).abs() < 1e-6);
        let gradient = Tensor::run_backward(&[&losses.hard + &losses.easy], &[&r], false, false).remove(0);
        let expected = f64s(&[[-0.345_152, 0.315_928, 0.102_062], [1.489_890, -0.772_239, 2.780_821]]);
        assert!(error(&gradient, &expected) < 1e-5);
        let (losses, _) = small_losses(Config { lambda_dis: 5.0, ..Config::default() });
        assert!((scalar(&losses.easy) - 0.864_564).abs() < 1e-6);
    }

    #[test]
    fn a_detached_easy_loss_does_not_pull_towards_hard_words() {
        let easy_gradient = |easy_gradient| {
            let (losses, r) = small_losses(Config { easy_gradient, ..Config::default() });
            (scalar(&losses.easy), Tensor::run_backward(&[&losses.easy], &[&r], false, false).remove(0).get(1))
        };
        let [(loss, pulled), (detached_loss, pushed)] = [EasyGradient::Reference, EasyGradient::Detached].map(easy_gradient);
        assert!((loss - detached_loss).abs() < 1e-12);
        let hard = to_unit_length(&f64s(&[[1., 0., 1.], [0., 2., 1.]])).mean_dim(0, false, Kind::Double);
        assert!(error(&(&pushed - &pulled), &(hard / 2.0)) < 1e-9);
    }

    #[test]
    fn no_objects_cost_nothing() {
        let ral = small(Config::default());
        let none = Tensor::zeros([0, 3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let drawn = ral.draw(&[], &mut ChaCha8Rng::seed_from_u64(1)).unwrap();
        let losses = ral.losses(&none, &Tensor::zeros([0], (Kind::Int64, Device::Cpu)), &drawn).unwrap();
        (&losses.hard + &losses.easy).backward();
        assert!(scalar(&losses.hard).abs() < 1e-12 && scalar(&losses.easy).abs() < 1e-12);
    }

    #[test]
    fn drawn_words_are_different_words_of_the_class() {
        let words = |class: u32| (0..7).map(|word| 10 * class + word).collect::<Vec<u32>>();
        let table = Tensor::ones([30, 4], (Kind::Float, Device::Cpu));
        let negatives = || Negatives {
            anchors: table.narrow(0, 0, 3),
            words: table.shallow_clone(),
            hard: (0..3).map(words).collect(),
            easy: (0..3).map(|class| words(class).split_off(4)).collect(),
        };
        let refusal = Ral::new(Config { random_q: 5, ..Config::default() }, negatives()).unwrap_err().to_string();
        assert_eq!(refusal, "easy words: expected at least 5 for each class, found 3 for class 0");
        let ral = Ral::new(Config { random_q: 5, few_words: FewWords::Fixed, ..Config::default() }, negatives()).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut n_drawn = [0; 7];
        for _ in 0..700 {
            let Drawn { hard, easy } = ral.draw(&[2, 0], &mut rng).unwrap();
            for (class, drawn) in [(2, &hard[0]), (0, &hard[1])] {
                let mut sorted = drawn.clone();
                sorted.sort_unstable();
                sorted.dedup();
                assert!(sorted.len() == 5 && sorted.iter().all(|word| words(class).contains(word)), "{drawn:?}");
            }
            hard[1].iter().for_each(|word| n_drawn[*word as usize] += 1);
            assert_eq!(easy.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3]);
        }
        // 500 of 700 draws each, with a deviation of 12.
        assert!(n_drawn.iter().all(|n| (440..560).contains(n)), "{n_drawn:?}");
        let refusal = ral.draw(&[3], &mut rng).unwrap_err().to_string();
        assert_eq!(refusal, "labels of objects: expected classes from 0 to 2, found 3");
    }

    /// Object-Centric's two losses with gradients, of cosines, by RALF's own code.
    #[test]
    fn losses_of_cosines_are_those_of_object_centric_s_code() {
        let golden = detpro_ralf("ralf");
        let inputs = ["anchor", "hard", "easy"].map(|name| golden[&format!("centric/{name}")].copy().set_requires_grad(true));
        let [anchor, hard, easy] = &inputs;
        let mean = |cosines: &Tensor| cosines.mean_dim(1, false, Kind::Float);
        let losses = hinges(&Config { lambda_dis: 5.0, ..Config::default() }, anchor, &mean(hard), &mean(easy));
        for (loss, name) in [(&losses.hard, "hard_loss"), (&losses.easy, "easy_loss")] {
            let expected = scalar(&golden[&format!("centric/{name}")]);
            assert!((scalar(loss) - expected).abs() < 1e-4 * (1.0 + expected), "{name}: {} {expected}", scalar(loss));
        }
        let gradients = Tensor::run_backward(&[&losses.hard + &losses.easy], &inputs.each_ref(), false, false);
        for (gradient, name) in gradients.iter().zip(["anchor", "hard", "easy"]) {
            check_gradient(gradient, &golden[&format!("centric/d_{name}")], name);
        }
    }
}
