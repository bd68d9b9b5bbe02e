//! Negatives as RALF keeps them, `neg_feature_lvis.pkl`: classes and words have no names there.

use std::path::Path;

use ovenbird_models::{
    checkpoint::{Array, NegativeFeatures},
    ral,
};
use tch::{Kind, Tensor};

use crate::{
    Error, Result,
    artifacts::{AnnotationFile, Negatives, check_ids},
};

/// The classes of RALF's tables: the categories of the data set's json, as it lists them. (RALF, section 6.1.)
pub(super) fn class_names(annotations: &AnnotationFile) -> Result<Vec<String>> {
    let annotations = annotations.load_categories()?;
    check_ids(&annotations)?;
    Ok(annotations.categories_in_file_order().map(|category| category.name.clone()).collect())
}

/// Names the classes of a file at `path` in their order, and its words by their places. Fails where the number of classes is another.
pub(super) fn named(features: &NegativeFeatures, classes: Vec<String>, path: &Path) -> Result<Negatives> {
    let NegativeFeatures { classes: anchors, table, similar, dissimilar } = features;
    if anchors.shape[0] != classes.len() as i64 {
        let problem = format!("{} categories, but {} is of {} classes", classes.len(), path.display(), anchors.shape[0]);
        let hint = "give the json that the file was made with: for RALF, that of LVIS v1 (1,203 classes) or COCO (80)".into();
        return Err(Error::Input { port: "annotations", problem, hint });
    }
    if table.shape[0] == 0 {
        let (problem, hint) = ("expected at least one word, found none of any class".into(), Some("give a file that lists words".into()));
        return Err(ovenbird_models::Error::Malformed { path: path.to_owned(), problem, hint }.into());
    }
    let rows = |rows: &Array| Ok::<_, Error>(rows.tensor()?.to_kind(Kind::Float));
    let tables = ral::Negatives { anchors: rows(anchors)?, words: rows(table)?, hard: similar.clone(), easy: dissimilar.clone() };
    Ok(Negatives { classes, words: (0..table.shape[0]).map(|place| place.to_string()).collect(), tables, clip: None })
}

/// The negatives of these classes, in this order, in f16. Fails if a class is missing.
pub(super) fn unnamed(negatives: &Negatives, classes: &[String]) -> Result<NegativeFeatures> {
    let ral::Negatives { anchors, words, hard, easy } = negatives.select(classes)?;
    let halves = |rows: &Tensor| Array::of(&rows.to_kind(Kind::Half)).expect("BUG: tables are on the CPU");
    Ok(NegativeFeatures { classes: halves(&anchors), table: halves(&words), similar: hard, dissimilar: easy })
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "scratch files of a test")]
mod tests {
    use std::{fs, path::PathBuf};

    use ovenbird_cache::inputs::digest_path;
    use tch::Device;

    use super::*;
    use crate::{Artifact as _, golden::detpro_ralf};

    const NAMES: [&str; 6] = ["owl", "hot_dog", "wren", "emu", "T-shirt", "hen"];

    fn small() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/detpro-ralf/neg_feature_small.pkl")
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn imported() -> Negatives {
        named(&NegativeFeatures::read(&small()).unwrap(), names(&NAMES), &small()).unwrap()
    }

    fn read_back(features: &NegativeFeatures) -> NegativeFeatures {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        features.write(&mut file).unwrap();
        NegativeFeatures::read(file.path()).unwrap()
    }

    /// The rows of the words on a list.
    fn words(negatives: &Negatives, list: &[u32]) -> Tensor {
        let rows: Vec<i64> = list.iter().map(|word| i64::from(*word)).collect();
        negatives.tables.words.index_select(0, &Tensor::from_slice(&rows))
    }

    /// Arrays that RALF's own code wrote.
    #[test]
    fn negatives_of_ralf_s_code_are_imported_number_by_number() {
        let golden = detpro_ralf("ralf");
        let negatives = imported();
        let float = |name: &str| golden[&format!("negfile/{name}")].to_kind(Kind::Float);
        assert_eq!(negatives.tables.anchors, float("feat_in"));
        assert_eq!(negatives.words.len() as i64, negatives.tables.words.size()[0]);
        for (lists, rows, lengths) in
            [(&negatives.tables.hard, "feat_out_sim", "pad_out_sim"), (&negatives.tables.easy, "feat_out_dis", "pad_out_dis")]
        {
            let (rows, lengths) = (float(rows), Vec::<i64>::try_from(&golden[&format!("negfile/{lengths}")]).unwrap());
            for (class, (list, length)) in lists.iter().zip(lengths).enumerate() {
                assert_eq!(words(&negatives, list), rows.get(class as i64).narrow(0, 0, length), "{class}");
            }
        }
    }

    #[test]
    fn what_is_imported_goes_out_as_it_came() {
        let theirs = NegativeFeatures::read(&small()).unwrap();
        let out = unnamed(&imported(), &names(&NAMES)).unwrap();
        assert_eq!(out, theirs);
        let again = named(&read_back(&out), names(&NAMES), &small()).unwrap();
        assert_eq!((&again.classes, &again.words), (&imported().classes, &imported().words));
        assert_eq!((&again.tables.hard, &again.tables.easy), (&imported().tables.hard, &imported().tables.easy));
        assert!(again.tables.words.equal(&imported().tables.words) && again.tables.anchors.equal(&imported().tables.anchors));
    }

    /// Classes base ++ novel, a word that no class lists, and a class that the data set does not have.
    #[test]
    fn classes_go_out_in_the_order_of_the_data_set() {
        let (cos, sin) = (0.6, 0.8);
        let rows = |n: i64| Tensor::from_slice(&[1.0_f32, 0.0, 0.0, 1.0, cos, sin, -1.0, 0.0]).view([4, 2]).narrow(0, 0, n);
        let tables = ral::Negatives {
            anchors: rows(3),
            words: rows(4),
            hard: vec![vec![3, 0], vec![2], vec![0]],
            easy: vec![vec![0], vec![3, 2], vec![2]],
        };
        let ours = Negatives { classes: names(&["owl", "wren", "hen"]), words: names(&["a", "b", "c", "d"]), tables, clip: None };
        let order = names(&["hen", "owl"]);
        let found = named(&read_back(&unnamed(&ours, &order).unwrap()), order.clone(), Path::new("neg.pkl")).unwrap();
        assert_eq!((&found.classes, found.words.len()), (&order, 3));
        let half = |tensor: Tensor| tensor.to_kind(Kind::Half).to_kind(Kind::Float);
        for (place, class) in [2, 0].into_iter().enumerate() {
            assert_eq!(found.tables.anchors.get(place as i64), half(ours.tables.anchors.get(class)));
            let lists = [(&found.tables.hard, &ours.tables.hard), (&found.tables.easy, &ours.tables.easy)];
            for (theirs, ours_of) in lists {
                assert_eq!(words(&found, &theirs[place]), half(words(&ours, &ours_of[class as usize])));
            }
        }
        let refusal = unnamed(&ours, &names(&["emu"])).unwrap_err().to_string();
        assert_eq!(refusal, "negatives: no negatives of the class `emu` among those of 3 classes");
    }

    #[test]
    fn another_number_of_classes_and_a_file_without_words_are_refused() {
        let mut features = NegativeFeatures::read(&small()).unwrap();
        let error = named(&features, names(&NAMES[1..]), Path::new("neg.pkl")).unwrap_err();
        assert_eq!(error.to_string(), "annotations: 5 categories, but neg.pkl is of 6 classes");
        assert!(error.hint().unwrap().starts_with("give the json that the file was made with"));
        features.table = Array::of(&Tensor::zeros([0, 16], (Kind::Half, Device::Cpu))).unwrap();
        let error = named(&features, names(&NAMES), Path::new("neg.pkl")).unwrap_err();
        assert_eq!(error.to_string(), "neg.pkl: expected at least one word, found none of any class");
    }

    #[test]
    fn classes_are_the_categories_as_the_file_lists_them() {
        let folder = tempfile::tempdir().unwrap();
        let read = |categories: &str| {
            let path = folder.path().join("annotations.json");
            fs::write(&path, format!(r#"{{"images": [], "annotations": [], "categories": [{categories}]}}"#)).unwrap();
            class_names(&AnnotationFile::open(&digest_path(&path, None, 0).unwrap()).unwrap())
        };
        assert_eq!(read(r#"{"id": 7, "name": "owl"}, {"id": 2, "name": "hen"}"#).unwrap(), ["owl", "hen"]);
        let refusal = read(r#"{"id": 1, "name": "owl"}, {"id": 0, "name": "hen"}"#).unwrap_err().to_string();
        assert_eq!(refusal, "annotations: expected ids from 1 on, as data sets have them, found 0: `hen`");
    }
}
