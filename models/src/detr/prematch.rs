//! Anchor pre-matching: every anchor gets the class that CLIP sees in it, before it is decoded. Section 7.2 of CORA's specification.
//!
//! There is no budget of anchors for a class and no background: a class may get all anchors, or none.
//!
//! Differences from the reference: favoured classes are given, not known by the number of classes (defect 5), and see [`DroppedClasses`].

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Error, Result, detection::boxes::is_floating, error::ensure};

/// The cosine of the background, which is a class of the softmax and never the result.
const BACKGROUND: f64 = -1.0;

/// Classes whose probabilities are multiplied before the largest is taken: at test, the novel ones.
#[derive(Clone, Copy, Debug)]
pub struct Favour<'a> {
    /// The factor; 8 in the published models.
    pub factor: f64,
    /// The places of the classes among all.
    pub classes: &'a [i64],
}

/// Classes that a copy of a training batch does without ("split classes").
#[derive(Clone, Copy, Debug)]
pub struct Dropped<'a> {
    /// For each class, whether it is dropped.
    pub classes: &'a [bool],
    /// What becomes of its cosines.
    pub rule: DroppedClasses,
}

/// What becomes of the cosines of dropped classes. (Defect 4.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DroppedClasses {
    /// Minus infinity: a dropped class gets no anchor. Where all classes are dropped, none is.
    Fixed,
    /// 0, as in the reference: a dropped class gets an anchor if the cosines of all others are below 0.
    #[default]
    Reference,
}

/// The classes of anchors.
#[derive(Debug)]
pub struct AnchorClasses {
    /// i64 `[B, N]`; the first of those with the largest product of probability and factor.
    pub classes: Tensor,
    /// f32 `[B, N, C]`, not multiplied by any factor; their sum is 1 less what the background has, which is next to nothing.
    pub probabilities: Tensor,
}

/// Gives each anchor a class.
///
/// `cosines`: `[B, N, C]` of the anchors' features with the texts of classes, finite; `temperature`: what they are multiplied by before the
/// softmax, 100 in the reference. In training nothing is favoured; at test nothing is dropped. The result has no gradients.
pub fn classify(cosines: &Tensor, temperature: f64, favour: Option<Favour<'_>>, dropped: Option<Dropped<'_>>) -> Result<AnchorClasses> {
    let fits = matches!(cosines.size()[..], [_, _, c] if c >= 1) && is_floating(cosines);
    ensure(fits, "cosines of anchors", "floating [B, N, C], C at least 1", cosines)?;
    let cosines = cosines.detach().to_kind(Kind::Float);
    if cosines.isfinite().logical_not().any().int64_value(&[]) == 1 {
        return Err(Error::Input { what: "cosines of anchors", expected: "finite numbers".into(), found: "others".into() });
    }
    let c = cosines.size()[2];
    let mut cosines = cosines;
    if let Some(Dropped { classes, rule }) = dropped {
        if classes.len() as i64 != c {
            return Err(Error::Input { what: "dropped classes", expected: format!("{c} entries"), found: classes.len().to_string() });
        }
        let value = match rule {
            DroppedClasses::Fixed if classes.iter().all(|is_dropped| *is_dropped) => None,
            DroppedClasses::Fixed => Some(f64::NEG_INFINITY),
            DroppedClasses::Reference => Some(0.0),
        };
        if let Some(value) = value {
            cosines = cosines.masked_fill(&Tensor::from_slice(classes).to_device(cosines.device()), value);
        }
    }
    let background = cosines.narrow(2, 0, 1).full_like(BACKGROUND);
    let probabilities = (Tensor::cat(&[cosines, background], 2) * temperature).softmax(2, Kind::Float).narrow(2, 0, c);
    let classes = match favour {
        Some(favour) => (&probabilities * favour.factors(c)?.to_device(probabilities.device())).argmax(2, false),
        None => probabilities.argmax(2, false),
    };
    Ok(AnchorClasses { classes, probabilities })
}

impl Favour<'_> {
    /// The factor of each of `c` classes, f32 `[C]`.
    fn factors(&self, c: i64) -> Result<Tensor> {
        let mut factors = vec![1.0_f32; c as usize];
        for &class in self.classes {
            let Some(factor) = usize::try_from(class).ok().and_then(|class| factors.get_mut(class)) else {
                return Err(Error::Input { what: "favoured classes", expected: format!("from 0 to {}", c - 1), found: class.to_string() });
            };
            *factor = self.factor as f32;
        }
        Ok(Tensor::from_slice(&factors))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, path::Path};

    use super::*;
    use crate::golden::{cora, error};

    fn case_names() -> Vec<String> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/cora/strings.json");
        let strings: serde_json::Value = serde_json::from_slice(&fs::read(path).expect("the golden file is there")).unwrap();
        serde_json::from_value(strings["prematch.npz"]["case_names"].clone()).unwrap()
    }

    /// The one number that an array holds.
    fn number(golden: &BTreeMap<String, Tensor>, name: &str) -> f64 {
        golden[name].double_value(&[0])
    }

    #[test]
    fn anchors_get_the_references_classes_and_probabilities() {
        let golden = cora("prematch");
        let names = case_names();
        assert_eq!(names.len(), 9);
        for case in names {
            let of = |name: &str| &golden[format!("{case}.{name}").as_str()];
            let novel = Vec::<i64>::try_from(of("novel")).unwrap();
            let favour = Favour { factor: number(&golden, &format!("{case}.factor")), classes: &novel };
            let is_training = number(&golden, &format!("{case}.training")) > 0.0;
            let favour = (!is_training).then_some(favour);
            let copies: Vec<Option<Vec<bool>>> = match golden.get(&format!("{case}.dropped_in_copy1")) {
                Some(dropped) => {
                    let dropped: Vec<bool> = Vec::<i64>::try_from(dropped.to_kind(Kind::Int64)).unwrap().iter().map(|&d| d == 1).collect();
                    let others = dropped.iter().map(|is_dropped| !is_dropped).collect();
                    vec![Some(dropped), Some(others)]
                }
                None => vec![None],
            };
            assert_eq!(of("class").size()[0], copies.len() as i64, "{case}");
            for (copy, dropped) in copies.iter().enumerate() {
                let dropped = dropped.as_deref().map(|classes| Dropped { classes, rule: DroppedClasses::Reference });
                let found = classify(&of("cos").unsqueeze(0), 100.0, favour, dropped).unwrap();
                assert_eq!(found.classes.get(0), of("class").get(copy as i64), "{case}");
                assert!(error(&found.probabilities.get(0), &of("prob_before_factor").get(copy as i64)) < 1e-5, "{case}");
            }
        }
    }

    fn m1() -> Tensor {
        Tensor::from_slice(&[0.24_f32, 0.23, 0.20, 0.26, 0.235, 0.10, 0.20, 0.195, 0.19]).view([1, 3, 3])
    }

    #[track_caller]
    fn check(cosines: &Tensor, favour: Option<(f64, &[i64])>, dropped: Option<(&[bool], DroppedClasses)>, expected: &[i64]) {
        let favour = favour.map(|(factor, classes)| Favour { factor, classes });
        let dropped = dropped.map(|(classes, rule)| Dropped { classes, rule });
        let found = classify(cosines, 100.0, favour, dropped).unwrap();
        assert_eq!(Vec::<i64>::try_from(found.classes.view(-1)).unwrap(), expected);
    }

    #[test]
    fn small_cases_have_the_classes_of_the_specification() {
        let probabilities = classify(&m1(), 100.0, None, None).unwrap().probabilities;
        let expected = [0.721399_f32, 0.265388, 0.013213, 0.924142, 0.075858, 0.0, 0.506480, 0.307196, 0.186324];
        assert!(error(&probabilities, &Tensor::from_slice(&expected).view([1, 3, 3])) < 1e-5);
        check(&m1(), None, None, &[0, 0, 0]);
        check(&m1(), Some((8.0, &[2])), None, &[0, 0, 2]);
        check(&m1(), Some((8.0, &[1])), None, &[1, 0, 1]);
        let negative = Tensor::from_slice(&[0.05_f32, -0.02, -0.08]).view([1, 1, 3]);
        check(&negative, None, Some((&[true, false, false], DroppedClasses::Reference)), &[0]);
        check(&negative, None, Some((&[true, false, false], DroppedClasses::Fixed)), &[1]);
    }

    #[test]
    fn a_dropped_class_gets_no_anchor_unless_all_are_dropped() {
        let very_negative = Tensor::from_slice(&[0.9_f32, -0.95, -0.99]).view([1, 1, 3]);
        check(&very_negative, None, Some((&[true, false, false], DroppedClasses::Fixed)), &[1]);
        check(&very_negative, None, Some((&[true, true, false], DroppedClasses::Fixed)), &[2]);
        check(&very_negative, None, Some((&[true, true, true], DroppedClasses::Fixed)), &[0]);
    }

    #[test]
    fn the_first_of_equal_classes_wins() {
        check(&Tensor::from_slice(&[0.1_f32, 0.2, 0.2, 0.2]).view([1, 1, 4]), None, None, &[1]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refused = |cosines: &Tensor, favour, dropped| classify(cosines, 100.0, favour, dropped).unwrap_err().to_string();
        let favour = Favour { factor: 8.0, classes: &[1, 3] };
        assert_eq!(refused(&m1(), Some(favour), None), "favoured classes: expected from 0 to 2, found 3");
        let dropped = Dropped { classes: &[true], rule: DroppedClasses::Fixed };
        assert_eq!(refused(&m1(), None, Some(dropped)), "dropped classes: expected 3 entries, found 1");
        assert_eq!(refused(&(m1() / 0.0), None, None), "cosines of anchors: expected finite numbers, found others");
        assert_eq!(refused(&m1().get(0), None, None), "cosines of anchors: expected floating [B, N, C], C at least 1, found Float [3, 3]");
    }
}
