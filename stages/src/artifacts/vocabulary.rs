//! Words beside the classes: vocabularies, negatives of classes, concepts.
//!
//! `vocabulary`: json, `{"names": [...]}`. `negatives`: safetensors with `anchors` f16 `[K, D]` and `words` f16 `[V, D]`, of unit length;
//! for each class the places of its words in that table, one class after the other, as `hard` and `easy`, I16 or, of more than 32,768
//! words, I32, and how many each class has as `hard_lengths` and `easy_lengths` i32 `[K]`; in the metadata `classes` and `words`, the
//! names, and `ovenbird.negatives`, the version, 1. `concepts`: safetensors with `embeddings` f16 `[N, D]`, of unit length; in the
//! metadata `names`, the phrases, `sources`, of each what it was made from, and `ovenbird.concepts`, the version, 1.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
};

use ovenbird_cache::inputs::InputFile;
use ovenbird_data::json;
use ovenbird_models::{
    augmenter,
    checkpoint::{self, Checkpoint, NegativeFeatures},
    ral,
};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_json::Value;
use tch::{Kind, Tensor};

use super::{EMBEDDINGS, read_json, read_weights};
use crate::{
    Artifact, Error, Out, Result, UnitDraft,
    clip::space::{SPACE_KEY, Space},
    error::malformed,
    ports::only_file,
};

const NEGATIVES_KEY: &str = "ovenbird.negatives";
const CONCEPTS_KEY: &str = "ovenbird.concepts";
/// The version of both formats.
const FORMAT: &str = "1";
/// The most words whose places I16 holds.
const SHORT: usize = 1 << 15;

/// The names of a vocabulary, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vocabulary {
    /// The names.
    pub names: Vec<String>,
}

impl Artifact for Vocabulary {
    const KIND: &'static str = "vocabulary";
    const EXTENSIONS: &'static [&'static str] = &["json"];
    const SHAPE: &'static str = r#"names as json, `{"names": ["acorn", ...]}`; lists of V3Det come in by `vocabulary/import`"#;

    fn open(files: &[InputFile]) -> Result<Self> {
        read_json(only_file(Self::KIND, files)?)
    }
}

/// A vocabulary as RALF publishes it.
#[derive(Debug, Clone)]
pub struct PublishedVocabulary {
    /// The names, in order.
    pub names: Vec<String>,
}

impl Artifact for PublishedVocabulary {
    const KIND: &'static str = "published-vocabulary";
    const EXTENSIONS: &'static [&'static str] = &["json"];
    const SHAPE: &'static str = r#"names as json, a list, or an object `{"0": "acorn", "1": ...}` with the keys in order"#;

    fn open(files: &[InputFile]) -> Result<Self> {
        let file = only_file(Self::KIND, files)?;
        let Names(names) = json::parse(&file.read()?).map_err(|fault| malformed(&file.path, fault.to_string()))?;
        Ok(Self { names })
    }
}

/// Names in a list, or in an object under "0", "1" and so on, in this order.
struct Names(Vec<String>);

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListOrObject;
        impl<'de> Visitor<'de> for ListOrObject {
            type Value = Names;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(r#"a list of names, or an object of names by "0", "1" and so on"#)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Names, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = list.next_element()? {
                    names.push(name);
                }
                Ok(Names(names))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Names, A::Error> {
                let mut names = Vec::new();
                while let Some((key, name)) = map.next_entry::<String, String>()? {
                    if key != names.len().to_string() {
                        return Err(A::Error::custom(format!("expected the key `{}`, found `{key}`", names.len())));
                    }
                    names.push(name);
                }
                Ok(Names(names))
            }
        }
        deserializer.deserialize_any(ListOrObject)
    }
}

/// Words that classes are kept apart from.
#[derive(Debug)]
pub struct Negatives {
    /// The classes, in the order of anchors and lists.
    pub classes: Vec<String>,
    /// The words, in the order of their table.
    pub words: Vec<String>,
    /// Tables f32 and lists.
    pub tables: ral::Negatives,
    /// The CLIP that made the embeddings, if known.
    pub clip: Option<Space>,
}

impl Artifact for Negatives {
    const KIND: &'static str = "negatives";
    const EXTENSIONS: &'static [&'static str] = &["safetensors"];
    const SHAPE: &'static str =
        "negatives that `negatives/retrieve` made (safetensors); those of RALF, `neg_feature_lvis.pkl`, come in by `negatives/import`";

    fn open(files: &[InputFile]) -> Result<Self> {
        let file = only_file(Self::KIND, files)?;
        let checkpoint = read_weights(file)?;
        check_format(&checkpoint, NEGATIVES_KEY, &file.path)?;
        Self::of(&checkpoint).map_err(|problem| malformed(&file.path, problem))
    }
}

impl Negatives {
    fn of(checkpoint: &Checkpoint) -> Result<Self, String> {
        let (classes, words): (Vec<String>, Vec<String>) = (listed(checkpoint, "classes")?, listed(checkpoint, "words")?);
        let table = |name: &str, n: usize| rows(checkpoint, name, n);
        let (anchors, table) = (table("anchors", classes.len())?, table("words", words.len())?);
        let lists = |name: &str| lists(checkpoint, name, classes.len(), words.len());
        let tables = ral::Negatives { hard: lists("hard")?, easy: lists("easy")?, anchors, words: table };
        Ok(Self { tables, classes, words, clip: Space::read(checkpoint.metadata().get(SPACE_KEY))? })
    }

    /// The negatives of these classes, in this order. Fails if a class is missing.
    pub fn select(&self, classes: &[String]) -> Result<ral::Negatives> {
        let place = |name: &String| {
            self.classes.iter().position(|known| known == name).ok_or_else(|| Error::Input {
                port: Self::KIND,
                problem: format!("no negatives of the class `{name}` among those of {} classes", self.classes.len()),
                hint: "retrieve negatives for this class list".into(),
            })
        };
        let places = classes.iter().map(place).collect::<Result<Vec<usize>>>()?;
        let lists = |lists: &[Vec<u32>]| places.iter().map(|place| lists[*place].clone()).collect();
        let rows: Vec<i64> = places.iter().map(|place| *place as i64).collect();
        Ok(ral::Negatives {
            anchors: self.tables.anchors.index_select(0, &Tensor::from_slice(&rows)),
            words: self.tables.words.shallow_clone(),
            hard: lists(&self.tables.hard),
            easy: lists(&self.tables.easy),
        })
    }

    /// How many words there are, and how many classes have: as metrics, and the latter in words.
    pub(crate) fn counts(&self) -> (BTreeMap<String, Value>, String) {
        let [[fewest_hard, most_hard], [fewest_easy, most_easy]] = [&self.tables.hard, &self.tables.easy].map(|lists| {
            let lengths = || lists.iter().map(Vec::len);
            [lengths().min().unwrap_or(0), lengths().max().unwrap_or(0)]
        });
        let metrics = [("words", self.words.len()), ("fewest_hard", fewest_hard), ("fewest_easy", fewest_easy)];
        let words = format!("classes have from {fewest_hard} to {most_hard} hard words, and from {fewest_easy} to {most_easy} easy ones");
        (metrics.map(|(name, n)| (name.to_owned(), n.into())).into(), words)
    }

    /// The tensors and the metadata of a file.
    fn content(&self) -> (BTreeMap<String, Tensor>, BTreeMap<String, String>) {
        let ral::Negatives { anchors, words, hard, easy } = &self.tables;
        let mut tensors =
            BTreeMap::from([("anchors", anchors), ("words", words)].map(|(name, rows)| (name.to_owned(), rows.to_kind(Kind::Half))));
        let kind = if self.words.len() <= SHORT { Kind::Int16 } else { Kind::Int };
        for (name, lists) in [("hard", hard), ("easy", easy)] {
            let places: Vec<i64> = lists.iter().flatten().map(|word| i64::from(*word)).collect();
            let lengths: Vec<i64> = lists.iter().map(|list| list.len() as i64).collect();
            tensors.insert(name.to_owned(), Tensor::from_slice(&places).to_kind(kind));
            tensors.insert(format!("{name}_lengths"), Tensor::from_slice(&lengths).to_kind(Kind::Int));
        }
        let entries = [("classes", json(&self.classes)), ("words", json(&self.words)), (NEGATIVES_KEY, FORMAT.to_owned())];
        let entries = entries.map(|(key, text)| (key.to_owned(), text)).into_iter().chain(self.clip.map(Space::entry));
        (tensors, entries.collect())
    }

    /// Writes them as safetensors.
    pub(crate) fn write(&self, draft: &UnitDraft, port: Out<Self>) -> Result<()> {
        let (tensors, metadata) = self.content();
        draft.write_tensors(port, "negatives.safetensors", &tensors, &metadata)
    }
}

/// Negatives as RALF keeps them, not yet read: see [`NegativeFeatures`].
#[derive(Debug, Clone)]
pub struct PublishedNegatives {
    file: InputFile,
}

impl Artifact for PublishedNegatives {
    const KIND: &'static str = "published-negatives";
    const EXTENSIONS: &'static [&'static str] = &["pkl"];
    const SHAPE: &'static str = "RALF's `neg_feature_lvis.pkl`: a dict of `feat_in` [K, D], `feat_out_sim` and `feat_out_dis` [K, M, D], \
                                 `pad_out_sim` and `pad_out_dis` [K]";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: only_file(Self::KIND, files)?.clone() })
    }
}

impl PublishedNegatives {
    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Reads it.
    pub fn load(&self) -> Result<NegativeFeatures> {
        self.file.read_with(|path| Ok(NegativeFeatures::read(path)?))
    }
}

/// A phrase of a concept file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phrase {
    /// The phrase, such as "sharp teeth".
    pub phrase: String,
    /// What it was made from: names of classes, or descriptions.
    #[serde(default)]
    pub sources: Vec<String>,
}

/// Phrases that describe parts and properties of objects.
#[derive(Debug, Clone)]
pub struct Phrases(pub Vec<Phrase>);

impl Artifact for Phrases {
    const KIND: &'static str = "phrases";
    const EXTENSIONS: &'static [&'static str] = &["json"];
    const SHAPE: &'static str = r#"phrases as json, `[{"phrase": "sharp teeth", "sources": ["shark"]}, ...]`, each phrase once"#;

    fn open(files: &[InputFile]) -> Result<Self> {
        let file = only_file(Self::KIND, files)?;
        let phrases: Vec<Phrase> = json::parse(&file.read()?).map_err(|fault| malformed(&file.path, fault.to_string()))?;
        let mut seen = BTreeSet::new();
        for (place, Phrase { phrase, .. }) in phrases.iter().enumerate() {
            if phrase.trim().is_empty() {
                return Err(malformed(&file.path, format!("[{place}].phrase: expected a phrase, found nothing")));
            }
            if !seen.insert(phrase) {
                return Err(malformed(&file.path, format!("[{place}].phrase: expected each phrase once, found `{phrase}` again")));
            }
        }
        Ok(Self(phrases))
    }
}

/// Phrases with their embeddings.
#[derive(Debug)]
pub struct Concepts {
    /// The phrases with their sources, in the order of the rows.
    pub phrases: Vec<Phrase>,
    /// f32 `[N, D]`.
    pub embeddings: Tensor,
    /// The CLIP that made them, if known.
    pub clip: Option<Space>,
}

impl Artifact for Concepts {
    const KIND: &'static str = "concepts";
    const EXTENSIONS: &'static [&'static str] = &["safetensors"];
    const SHAPE: &'static str = "concepts that `concepts/build` made (safetensors); those of RALF, `v3det_gpt_noun_chunk_lvis_strict.pkl`, \
                                 come in by `concepts/import`";

    fn open(files: &[InputFile]) -> Result<Self> {
        let file = only_file(Self::KIND, files)?;
        let checkpoint = read_weights(file)?;
        check_format(&checkpoint, CONCEPTS_KEY, &file.path)?;
        Self::of(&checkpoint).map_err(|problem| malformed(&file.path, problem))
    }
}

impl Concepts {
    fn of(checkpoint: &Checkpoint) -> Result<Self, String> {
        let (names, sources): (Vec<String>, Vec<Vec<String>>) = (listed(checkpoint, "names")?, listed(checkpoint, "sources")?);
        if sources.len() != names.len() {
            return Err(format!("expected {} lists of `sources`, one a phrase, found {}", names.len(), sources.len()));
        }
        let embeddings = rows(checkpoint, EMBEDDINGS, names.len())?;
        let phrases = names.into_iter().zip(sources).map(|(phrase, sources)| Phrase { phrase, sources }).collect();
        Ok(Self { phrases, embeddings, clip: Space::read(checkpoint.metadata().get(SPACE_KEY))? })
    }

    /// Their embeddings for a network that reads embeddings of `dim` numbers and retrieves `n_concepts` of them.
    pub(crate) fn for_augmenter(&self, dim: i64, n_concepts: i64, device: tch::Device) -> Result<augmenter::Concepts> {
        let refused = |problem: String, hint: &str| Err(Error::Input { port: Self::KIND, problem, hint: hint.into() });
        let [n, found] = [0, 1].map(|axis| self.embeddings.size()[axis]);
        if found != dim {
            return refused(format!("embeddings of {found} numbers, those of regions have {dim}"), "make both with the same CLIP");
        }
        if n < n_concepts {
            return refused(
                format!("expected at least the {n_concepts} that are retrieved for a region, found {n}"),
                "give more phrases, or retrieve fewer: `n_concepts`",
            );
        }
        Ok(augmenter::Concepts::new(&self.embeddings.to_device(device))?)
    }

    /// Writes them as safetensors.
    pub(crate) fn write(&self, draft: &UnitDraft, port: Out<Self>) -> Result<()> {
        let names: Vec<&String> = self.phrases.iter().map(|Phrase { phrase, .. }| phrase).collect();
        let sources: Vec<&Vec<String>> = self.phrases.iter().map(|Phrase { sources, .. }| sources).collect();
        let entries = [("names", json(&names)), ("sources", json(&sources)), (CONCEPTS_KEY, FORMAT.to_owned())];
        let entries = entries.map(|(key, text)| (key.to_owned(), text)).into_iter().chain(self.clip.map(Space::entry));
        let tensors = BTreeMap::from([(EMBEDDINGS.to_owned(), self.embeddings.to_kind(Kind::Half))]);
        draft.write_tensors(port, "concepts.safetensors", &tensors, &entries.collect())
    }
}

/// Concepts as RALF keeps them, not yet read: see [`checkpoint::Concepts`].
#[derive(Debug, Clone)]
pub struct PublishedConcepts {
    file: InputFile,
}

impl Artifact for PublishedConcepts {
    const KIND: &'static str = "published-concepts";
    const EXTENSIONS: &'static [&'static str] = &["pkl"];
    const SHAPE: &'static str =
        "RALF's `v3det_gpt_noun_chunk_lvis_strict.pkl`: a dict of `all_noun_chunks`, a dict with `text_features` [N, D]";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: only_file(Self::KIND, files)?.clone() })
    }
}

impl PublishedConcepts {
    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Reads it.
    pub fn load(&self) -> Result<checkpoint::Concepts> {
        self.file.read_with(|path| Ok(checkpoint::Concepts::read(path)?))
    }
}

fn json(text: &impl Serialize) -> String {
    serde_json::to_string(text).expect("BUG: names are plain JSON")
}

/// Fails where the metadata of a file has another version under a key than this program writes.
fn check_format(checkpoint: &Checkpoint, key: &str, path: &Path) -> Result<()> {
    match checkpoint.metadata().get(key) {
        Some(found) if found == FORMAT => Ok(()),
        found => {
            let found = found.map_or("none".to_owned(), |found| format!("`{found}`"));
            Err(malformed(path, format!("expected version {FORMAT} as `{key}` in the metadata, found {found}")))
        }
    }
}

/// A list in the metadata.
fn listed<T: DeserializeOwned>(checkpoint: &Checkpoint, key: &str) -> Result<Vec<T>, String> {
    let list = checkpoint.metadata().get(key).and_then(|text| serde_json::from_str(text).ok());
    list.ok_or_else(|| format!("expected a json list as `{key}` in the metadata"))
}

/// Finite rows, f32 `[n, D]`.
fn rows(checkpoint: &Checkpoint, name: &str, n: usize) -> Result<Tensor, String> {
    let found = checkpoint.tensors().get(name).ok_or_else(|| format!("expected a tensor `{name}`, found none"))?;
    let is_floating = matches!(found.kind(), Kind::Half | Kind::Float);
    if !is_floating || !matches!(found.size()[..], [rows, dim] if rows == n as i64 && dim > 0) {
        return Err(format!("expected `{name}` f16 or f32 [{n}, D], found {:?} {:?}", found.kind(), found.size()));
    }
    match checkpoint::not_finite(found) {
        Some(problem) => Err(format!("{name}: {problem}")),
        None => Ok(found.to_kind(Kind::Float)),
    }
}

/// Lists of places in a table of `n_words`, one for each class.
fn lists(checkpoint: &Checkpoint, name: &str, n_classes: usize, n_words: usize) -> Result<Vec<Vec<u32>>, String> {
    let numbers = |name: &str| {
        let found = checkpoint.tensors().get(name).filter(|found| matches!(found.kind(), Kind::Int16 | Kind::Int) && found.dim() == 1);
        let found = found.ok_or_else(|| format!("expected whole numbers `{name}` [N]"))?;
        Vec::<i64>::try_from(found.to_kind(Kind::Int64)).map_err(|error| error.to_string())
    };
    let (places, lengths) = (numbers(name)?, numbers(&format!("{name}_lengths"))?);
    let is_whole =
        lengths.len() == n_classes && lengths.iter().all(|length| *length >= 0) && lengths.iter().sum::<i64>() == places.len() as i64;
    if !is_whole {
        return Err(format!("expected {n_classes} numbers in `{name}_lengths`, whose sum is that of `{name}`, {}", places.len()));
    }
    if let Some(place) = places.iter().find(|place| !(0..n_words as i64).contains(place)) {
        return Err(format!("expected places in a table of {n_words} words in `{name}`, found {place}"));
    }
    let mut places = places.into_iter().map(|place| place as u32);
    Ok(lengths.into_iter().map(|length| places.by_ref().take(length as usize).collect()).collect())
}

#[cfg(test)]
mod tests {
    use ovenbird_models::checkpoint::write_safetensors;
    use tch::Device;

    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn written(negatives: &Negatives) -> Checkpoint {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("negatives.safetensors");
        let (tensors, metadata) = negatives.content();
        let mut bytes = Vec::new();
        write_safetensors(&tensors, &metadata, &mut bytes).unwrap();
        std::io::Write::write_all(&mut tempfile::NamedTempFile::new_in(&folder).unwrap().persist(&path).unwrap(), &bytes).unwrap();
        Checkpoint::open(&path).unwrap()
    }

    #[test]
    fn names_are_a_list_or_an_object_in_order() {
        let read = |text: &str| json::parse::<Names>(text.as_bytes()).map(|Names(names)| names).map_err(|fault| fault.to_string());
        for text in [r#"["owl", "wren"]"#, r#"{"0": "owl", "1": "wren"}"#] {
            assert_eq!(read(text).unwrap(), ["owl", "wren"]);
        }
        for (text, problem) in [
            (r#"{"1": "owl", "0": "wren"}"#, "expected the key `0`, found `1`"),
            (r#"{"0": "owl", "0": "wren"}"#, "expected the key `1`, found `0`"),
            (r#"{"0": "owl", "01": "wren"}"#, "expected the key `1`, found `01`"),
            (r#"{"0": 5}"#, "expected"),
            (r#""owl""#, "expected a list of names"),
        ] {
            let found = read(text).unwrap_err();
            assert!(found.contains(problem), "{found}");
        }
    }

    #[test]
    fn negatives_are_read_as_written_and_chosen_by_name() {
        let table = |n: i64| Tensor::arange(4 * n, (Kind::Float, Device::Cpu)).view([n, 4]) / 8.0;
        let tables = ral::Negatives {
            anchors: table(3),
            words: table(5),
            hard: vec![vec![0, 4], vec![], vec![1]],
            easy: vec![vec![2], vec![3, 4, 0], vec![1]],
        };
        let (classes, words) = (names(&["owl", "wren", "hen"]), names(&["a", "b", "c", "d", "e"]));
        let negatives = Negatives { classes, words, tables, clip: None };
        let read = Negatives::of(&written(&negatives)).unwrap();
        assert_eq!((&read.classes, &read.words), (&negatives.classes, &negatives.words));
        assert_eq!((&read.tables.hard, &read.tables.easy), (&negatives.tables.hard, &negatives.tables.easy));
        let chosen = read.select(&names(&["hen", "owl"])).unwrap();
        assert_eq!((chosen.hard, chosen.easy), (vec![vec![1], vec![0, 4]], vec![vec![1], vec![2]]));
        assert_eq!(chosen.anchors, table(3).index_select(0, &Tensor::from_slice(&[2_i64, 0])));
        let refusal = read.select(&names(&["emu"])).unwrap_err().to_string();
        assert_eq!(refusal, "negatives: no negatives of the class `emu` among those of 3 classes");
    }

    #[test]
    fn places_outside_the_table_are_refused() {
        let table = Tensor::ones([2, 4], (Kind::Float, Device::Cpu));
        let tables =
            ral::Negatives { anchors: table.shallow_clone(), words: table, hard: vec![vec![0], vec![2]], easy: vec![vec![0], vec![1]] };
        let negatives = Negatives { classes: names(&["owl", "wren"]), words: names(&["a", "b"]), tables, clip: None };
        assert_eq!(Negatives::of(&written(&negatives)).unwrap_err(), "expected places in a table of 2 words in `hard`, found 2");
    }

    /// At the size of LVIS and V3Det, with lists of 2,000: at most 30 MB.
    #[test]
    fn negatives_of_lvis_are_small() {
        let lists = || vec![(0..2000).collect::<Vec<u32>>(); 1203];
        let table = |n: i64| Tensor::ones([n, 512], (Kind::Float, Device::Cpu));
        let tables = ral::Negatives { anchors: table(1203), words: table(12_564), hard: lists(), easy: lists() };
        let negatives = Negatives { classes: vec!["owl".into(); 1203], words: vec!["a snowy owl".into(); 12_564], tables, clip: None };
        let (tensors, metadata) = negatives.content();
        let bytes: usize = tensors.values().map(|tensor| tensor.numel() * tensor.kind().elt_size_in_bytes()).sum();
        let text: usize = metadata.values().map(String::len).sum();
        assert!(bytes + text < 30_000_000, "{} bytes", bytes + text);
    }
}
