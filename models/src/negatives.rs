//! Negative words for classes: which words of a large vocabulary tell classes apart, which are similar to a class, and which are not. Kim
//! et al. 2024 (RALF, section 6 of its specification).
//!
//! Plain loops on the CPU over cosines in f64: the choice depends on the embeddings alone, not on a device or on threads. Of equal
//! cosines the word that comes first has the lower rank.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{Error, Result, error::ensure, layers::to_unit_length};

/// Cosines of classes and words: a row for each class, a column for each word.
#[derive(Debug)]
pub struct Similarities {
    /// K rows of V.
    cosines: Vec<f64>,
    n_words: usize,
}

/// What "rank variance" means. (Defect 12.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RankVariance {
    /// The variance of the places of the words at a rank, as in the reference, whose filter drops an arbitrary part of the words.
    Reference,
    /// The variance of the ranks of a word.
    Fixed,
}

/// The words of each class: ascending columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retrieved {
    /// Those most similar to the class.
    pub hard: Vec<Vec<u32>>,
    /// Those least similar to it.
    pub easy: Vec<Vec<u32>>,
}

impl Similarities {
    /// `classes`: `[K, D]`; `words`: `[V, D]`; of any length.
    pub fn new(classes: &Tensor, words: &Tensor) -> Result<Self> {
        ensure(classes.dim() == 2, "embeddings of classes", "[K, D]", classes)?;
        let dim = classes.size()[1];
        ensure(matches!(words.size()[..], [_, found] if found == dim), "embeddings of words", &format!("[V, {dim}]"), words)?;
        let [classes, words] = [classes, words].map(|rows| to_unit_length(&rows.to_device(Device::Cpu).to_kind(Kind::Double)));
        Ok(Self { cosines: Vec::try_from(classes.matmul(&words.tr()).view(-1))?, n_words: words.size()[0] as usize })
    }

    fn n_classes(&self) -> usize {
        self.cosines.len() / self.n_words.max(1)
    }

    /// Of each class all words, least similar first.
    fn orders(&self) -> impl Iterator<Item = Vec<u32>> {
        self.cosines.chunks(self.n_words.max(1)).map(|cosines| {
            let mut order: Vec<u32> = (0..cosines.len() as u32).collect();
            order.sort_by(|a, b| cosines[*a as usize].total_cmp(&cosines[*b as usize]));
            order
        })
    }

    /// The unbiased variance over classes, one number for each word. Fails with fewer than two classes.
    pub fn rank_variance(&self, meaning: RankVariance) -> Result<Vec<f64>> {
        let n_classes = self.n_classes();
        if n_classes < 2 {
            return Err(Error::Input {
                what: "classes",
                expected: "at least 2, whose ranks may differ".into(),
                found: n_classes.to_string(),
            });
        }
        // Sums of whole numbers are exact in any order.
        let mut sums = vec![(0_u64, 0_u128); self.n_words];
        for order in self.orders() {
            for (rank, &word) in order.iter().enumerate() {
                let (of, number) = match meaning {
                    RankVariance::Reference => (rank, u64::from(word)),
                    RankVariance::Fixed => (word as usize, rank as u64),
                };
                sums[of].0 += number;
                sums[of].1 += u128::from(number) * u128::from(number);
            }
        }
        let n = n_classes as u128;
        let variance = |(sum, squares): (u64, u128)| (n * squares - u128::from(sum) * u128::from(sum)) as f64 / (n * (n - 1)) as f64;
        Ok(sums.into_iter().map(variance).collect())
    }

    /// The `top` most and least similar words of each class, without those that are on the lists of `limit` or more classes. (Section 6.3.)
    ///
    /// Hard and easy words are counted apart. A class may keep no word. Fails if `top` is not from 1 to V.
    pub fn retrieve(&self, top: usize, limit: usize) -> Result<Retrieved> {
        if !(1..=self.n_words).contains(&top) {
            return Err(Error::Input {
                what: "top",
                expected: format!("from 1 to {}, the number of words", self.n_words),
                found: top.to_string(),
            });
        }
        let (easy, hard) = self.orders().map(|order| (order[..top].to_vec(), order[order.len() - top..].to_vec())).unzip();
        let n_words = self.n_words;
        Ok(Retrieved { hard: without_popular(hard, n_words, limit), easy: without_popular(easy, n_words, limit) })
    }
}

/// The columns whose variance is at least a threshold: those that the reference keeps.
pub fn above(variance: &[f64], threshold: f64) -> Vec<u32> {
    (0..).zip(variance).filter(|(_, variance)| **variance >= threshold).map(|(word, _)| word).collect()
}

/// The columns without the given part of smallest variance; of equal ones the first are dropped.
pub fn without_smallest(variance: &[f64], drop_fraction: f64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..variance.len() as u32).collect();
    order.sort_by(|a, b| variance[*a as usize].total_cmp(&variance[*b as usize]));
    let n_dropped = (drop_fraction * variance.len() as f64).round() as usize;
    let mut kept = order.split_off(n_dropped.min(order.len()));
    kept.sort_unstable();
    kept
}

/// The same lists, ascending, without the words that are on `limit` or more of them.
fn without_popular(mut lists: Vec<Vec<u32>>, n_words: usize, limit: usize) -> Vec<Vec<u32>> {
    let mut counts = vec![0; n_words];
    for word in lists.iter().flatten() {
        counts[*word as usize] += 1;
    }
    for list in &mut lists {
        list.retain(|word| counts[*word as usize] < limit);
        list.sort_unstable();
    }
    lists
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::golden::{detpro_ralf, unit};

    /// Cosines of parity check 12.
    const ROWS: [[f64; 6]; 4] = [
        [0.9, 0.1, 0.5, 0.3, 0.7, 0.2],
        [0.8, 0.2, 0.6, 0.1, 0.3, 0.4],
        [0.7, 0.3, 0.1, 0.9, 0.2, 0.5],
        [0.95, 0.15, 0.35, 0.25, 0.6, 0.45],
    ];

    fn given(rows: &[[f64; 6]]) -> Similarities {
        Similarities { cosines: rows.as_flattened().to_vec(), n_words: 6 }
    }

    fn integers(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor.view(-1)).unwrap()
    }

    #[test]
    fn variances_have_the_values_of_the_specification() {
        for (meaning, expected) in [
            (RankVariance::Reference, [0.916_667, 2.916_667, 1.666_667, 2.25, 3.666_667, 2.25]),
            (RankVariance::Fixed, [0.25, 0.916_667, 2.916_667, 4.666_667, 2.25, 1.0]),
        ] {
            let found = given(&ROWS).rank_variance(meaning).unwrap();
            assert!(found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-6), "{found:?}");
        }
        let kept = |meaning| above(&given(&ROWS).rank_variance(meaning).unwrap(), 3.0);
        assert_eq!((kept(RankVariance::Reference), kept(RankVariance::Fixed)), (vec![4], vec![3]));
        assert!(given(&ROWS[..1]).rank_variance(RankVariance::Fixed).is_err());
        assert_eq!(without_smallest(&[3.0, 1.0, 2.0, 1.0], 0.25), [0, 2, 3]);
        assert_eq!(without_smallest(&[3.0, 1.0, 2.0, 1.0], 0.5), [0, 2]);
        assert!(without_smallest(&[], 0.5).is_empty());
    }

    /// Parity check 13.
    #[test]
    fn retrieved_words_are_those_of_the_specification() {
        let found = given(&ROWS[..3]).retrieve(3, 3).unwrap();
        assert_eq!(found.hard, [vec![2, 4], vec![2, 5], vec![3, 5]]);
        assert_eq!(found.easy, [vec![3, 5], vec![3, 4], vec![2, 4]]);
        let found = given(&ROWS[..3]).retrieve(3, 2).unwrap();
        assert_eq!((found.hard, found.easy), (vec![vec![4], vec![], vec![3]], vec![vec![5], vec![], vec![2]]));
        assert_eq!(given(&ROWS).retrieve(7, 3).unwrap_err().to_string(), "top: expected from 1 to 6, the number of words, found 7");
    }

    /// Variances and kept words by RALF's own code.
    #[test]
    fn kept_words_are_those_of_ralf_s_code() {
        let golden = detpro_ralf("ralf");
        let similarities = Similarities::new(&golden["rank/feat_classes"], &golden["rank/feat_words"]).unwrap();
        let variance = similarities.rank_variance(RankVariance::Reference).unwrap();
        let expected = Vec::<f32>::try_from(&golden["rank/variance"]).unwrap();
        assert!(variance.len() == 120 && variance.iter().zip(&expected).all(|(a, b)| (a / f64::from(*b) - 1.0).abs() < 1e-4));
        let kept: Vec<i64> = above(&variance, golden["rank/threshold"].double_value(&[])).into_iter().map(i64::from).collect();
        assert_eq!(kept, integers(&golden["rank/kept"]));
    }

    /// Hard and easy words by RALF's own code, on the same vectors.
    #[test]
    fn retrieved_words_are_those_of_ralf_s_code() {
        let golden = detpro_ralf("ralf");
        let number = |name: &str| integers(&golden[name])[0] as usize;
        let similarities = Similarities::new(&golden["rank/feat_classes"], &golden["rank/feat_words"]).unwrap();
        let found = similarities.retrieve(number("retrieve/top_m"), number("retrieve/limit")).unwrap();
        for (found, name, lengths) in [(found.hard, "hard", "pad_sim"), (found.easy, "easy", "pad_dis")] {
            let lengths = integers(&golden[&format!("retrieve/{lengths}")]);
            assert_eq!((found.len(), lengths.len()), (30, 30));
            for (class, (found, length)) in found.iter().zip(lengths).enumerate() {
                let expected = integers(&golden[&format!("retrieve/{name}")].get(class as i64).narrow(0, 0, length));
                assert_eq!(found.iter().map(|word| i64::from(*word)).collect::<Vec<_>>(), expected, "{name} words of class {class}");
            }
        }
    }

    /// Property 23: where the vocabulary is in another order, the fixed filter keeps the same words, and their negatives are the same; the
    /// reference's filter keeps others.
    #[test]
    fn negatives_depend_on_the_order_of_words_only_as_in_the_reference() {
        let noise = |name: &str, n: usize| Tensor::from_slice(&unit(name, 16 * n).collect::<Vec<f32>>()).view([n as i64, 16]);
        let (classes, words) = (noise("classes", 25), noise("words", 90));
        let order: Vec<i64> = (0..90).map(|place| (place * 37 + 11) % 90).collect();
        let places = Tensor::from_slice(&order);
        let negatives = |words: &Tensor, names: &[i64], meaning| {
            let similarities = Similarities::new(&classes, words).unwrap();
            let kept = without_smallest(&similarities.rank_variance(meaning).unwrap(), 0.2);
            let names: Vec<i64> = kept.iter().map(|word| names[*word as usize]).collect();
            let rows = Tensor::from_slice(&kept.iter().map(|word| i64::from(*word)).collect::<Vec<_>>());
            let Retrieved { hard, easy } = Similarities::new(&classes, &words.index_select(0, &rows)).unwrap().retrieve(20, 15).unwrap();
            let named = |lists: Vec<Vec<u32>>| {
                let named = |list: Vec<u32>| list.into_iter().map(|word| names[word as usize]).collect::<BTreeSet<i64>>();
                lists.into_iter().map(named).collect::<Vec<_>>()
            };
            (named(hard), named(easy))
        };
        let of = |meaning| {
            let in_order: Vec<i64> = (0..90).collect();
            [negatives(&words, &in_order, meaning), negatives(&words.index_select(0, &places), &order, meaning)]
        };
        let [first, second] = of(RankVariance::Fixed);
        assert_eq!(first, second);
        let [first, second] = of(RankVariance::Reference);
        assert_ne!(first, second);
    }
}
