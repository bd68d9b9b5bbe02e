//! Concepts as RALF keeps them, `v3det_gpt_noun_chunk_lvis_strict.pkl`: rows of any norm, and no phrases.

use std::path::Path;

use ovenbird_models::{
    checkpoint::{self, Array},
    to_unit_length,
};
use tch::Kind;

use crate::{
    Error, Result,
    artifacts::{Concepts, Phrase},
};

/// By how much the norm of a row may differ from 1 after its numbers were rounded to f16, which has eleven bits.
const HALF_TOLERANCE: f64 = 5e-4;

/// Rows of unit length; phrases that a file at `path` does not have are the places of their rows. Fails where a row has no direction.
pub(super) fn of_unit_length(concepts: checkpoint::Concepts, path: &Path) -> Result<Concepts> {
    let rows = concepts.features.tensor()?.to_kind(Kind::Float);
    let norms = rows.norm_scalaropt_dim(2.0, [-1_i64], true);
    // What is of unit length but for rounding keeps its numbers, so that they go out and come in as they are.
    let is_unit = (&norms - 1.0).abs().lt(HALF_TOLERANCE);
    let embeddings = rows.where_self(&is_unit, &to_unit_length(&rows));
    let is_sound = (embeddings.norm_scalaropt_dim(2.0, [-1_i64], false) - 1.0).abs().lt(2.0 * HALF_TOLERANCE);
    let are_sound = Vec::<bool>::try_from(is_sound).map_err(ovenbird_models::Error::from)?;
    if let Some(row) = are_sound.iter().position(|is_sound| !is_sound) {
        let norm = norms.double_value(&[row as i64, 0]);
        let problem = format!("all_noun_chunks.text_features, row {row}: expected an embedding with a direction, found norm {norm:e}");
        let hint = Some("remove the row, or encode its phrase again".into());
        return Err(Error::Models(ovenbird_models::Error::Malformed { path: path.to_owned(), problem, hint }));
    }
    let names = concepts.names.unwrap_or_else(|| (0..are_sound.len()).map(|place| place.to_string()).collect());
    let phrases = names.into_iter().map(|phrase| Phrase { phrase, sources: Vec::new() }).collect();
    Ok(Concepts { phrases, embeddings, clip: None })
}

/// The rows in f32, and the phrases without their sources.
pub(super) fn published(Concepts { phrases, embeddings, .. }: &Concepts) -> checkpoint::Concepts {
    let features = Array::of(&embeddings.to_kind(Kind::Float)).expect("BUG: embeddings are on the CPU");
    checkpoint::Concepts { features, names: Some(phrases.iter().map(|Phrase { phrase, .. }| phrase.clone()).collect()) }
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;
    use crate::golden::{error, unit};

    const PHRASES: [&str; 4] = ["worn on the feet", "sharp teeth", "café", "red"];

    /// `[4, 48]` of norms from 3 on.
    fn rows() -> Tensor {
        Tensor::from_slice(&unit("concepts", 4 * 48).collect::<Vec<f32>>()).view([4, 48])
    }

    fn theirs(rows: &Tensor, names: Option<&[&str]>) -> checkpoint::Concepts {
        let names = names.map(|names| names.iter().map(|name| (*name).to_owned()).collect());
        checkpoint::Concepts { features: Array::of(rows).unwrap(), names }
    }

    fn read_back(concepts: &checkpoint::Concepts) -> checkpoint::Concepts {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        concepts.write(&mut file).unwrap();
        checkpoint::Concepts::read(file.path()).unwrap()
    }

    fn imported(rows: &Tensor, names: Option<&[&str]>) -> Result<Concepts> {
        of_unit_length(read_back(&theirs(rows, names)), Path::new("concepts.pkl"))
    }

    /// As a file of this program holds them.
    fn stored(concepts: Concepts) -> Concepts {
        let embeddings = concepts.embeddings.to_kind(Kind::Half).to_kind(Kind::Float);
        Concepts { embeddings, ..concepts }
    }

    fn phrases(concepts: &Concepts) -> Vec<&str> {
        concepts.phrases.iter().map(|Phrase { phrase, .. }| phrase.as_str()).collect()
    }

    #[test]
    fn rows_of_any_norm_get_unit_length_and_phrases_without_names_their_places() {
        for kind in [Kind::Float, Kind::Half] {
            let rows = rows().to_kind(kind);
            let concepts = imported(&rows, None).unwrap();
            assert_eq!(phrases(&concepts), ["0", "1", "2", "3"]);
            assert!(error(&concepts.embeddings, &to_unit_length(&rows.to_kind(Kind::Float))) < 1e-6);
        }
        assert_eq!(phrases(&imported(&rows(), Some(&PHRASES)).unwrap()), PHRASES);
    }

    /// Bit for bit, although unit rows in f16 are not quite of unit length.
    #[test]
    fn what_goes_out_comes_in_as_it_was() {
        let first = stored(imported(&rows(), Some(&PHRASES)).unwrap());
        let out = published(&first);
        assert_eq!((out.features.kind, &out.features.shape), (Kind::Float, &vec![4, 48]));
        let again = stored(of_unit_length(read_back(&out), Path::new("concepts.pkl")).unwrap());
        assert_eq!(again.phrases, first.phrases);
        assert!(again.embeddings.equal(&first.embeddings));
        assert_eq!(published(&again), out);
    }

    #[test]
    fn rows_without_a_direction_are_refused() {
        for (factor, norm) in [(0.0, "0e0"), (1e-20, "")] {
            let factors = Tensor::from_slice(&[1.0_f32, 1.0, factor, 1.0]).view([4, 1]);
            let error = imported(&(rows() * factors), None).unwrap_err();
            let expected =
                format!("concepts.pkl: all_noun_chunks.text_features, row 2: expected an embedding with a direction, found norm {norm}");
            assert!(error.to_string().starts_with(&expected), "{error}");
            assert_eq!(error.hint().unwrap(), "remove the row, or encode its phrase again");
        }
    }
}
