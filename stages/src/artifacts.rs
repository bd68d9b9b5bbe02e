//! The kinds of inputs and outputs: one type for each, opened from the port's files.
//!
//! | kind | files | readers |
//! |---|---|---|
//! | `images` | a folder of JPEG / PNG files | [`Images`] |
//! | `annotations` | a COCO or LVIS v1 json | [`AnnotationFile`] |
//! | `classes` | base and novel class names, json | [`Classes`] |
//! | `captions` | images with alt text, json lines | [`Captions`] |
//! | `mmdet-proposals` | a Python pickle of boxes by image, of mmdet or Detectron | [`MmdetProposals`] |
//! | `id-map` | which entry of such a pickle is of which image, json | [`IdMapFile`] |
//! | `proposals`, `detections` | Parquet | [`Proposals`], [`Detections`] |
//! | `checkpoint` | weights of a CLIP, a detector or an augmenter in any published layout; a folder of one such file and its config files | [`CheckpointFile`] |
//! | `prompts` | class embeddings, safetensors | [`Prompts`] |
//! | `published-prompts` | class embeddings in published formats, `.pth` | [`PublishedPrompts`] |
//! | `image-features`, `region-features` | Arrow shards | [`ImageFeatures`], [`RegionFeatures`] |
//! | `embedding-matrix` | a matrix of numbers without a header, or a `.npy` | [`MatrixFile`] |
//! | `embedding-archive` | a zip of one tensor an image, `{id:012}.pth`, or its parts | [`ArchiveFiles`] |
//! | `feature-files` | features in the format of OADP: a folder of `{id:012}.pth` | [`FeatureFiles`] |
//! | `region-samples` | features of sampled regions, Arrow shards | [`RegionSamples`] |
//! | `crops` | an Arrow shard of encoded images | [`Crops`] |
//! | `descriptions` | what classes are, json, or PromptDet's text file | [`Descriptions`] |
//! | `hits` | what a search found, Parquet | [`Hits`] |
//! | `pool` | embeddings of images with their metadata, a folder of `.npy` or `.npz` and Parquet | [`Pool`] |
//! | `pool-metadata` | URLs and texts of a pool, Parquet | [`PoolMetadata`] |
//! | `published-links` | the same from other programs, HDF5 or tab-separated lines | [`PublishedLinks`] |
//! | `links` | links to images of the web, by class, Parquet | [`Links`] |
//! | `downloads` | what came of links, Parquet | [`Downloads`] |
//! | `web-table` | images of the web by class: wanted, retrieved, downloaded, used, json | [`WebTable`] |
//! | `img2dataset` | images with their metadata as img2dataset leaves them, a folder | [`Img2dataset`] |
//! | `evaluation` | json | [`EvaluationFile`] |
//! | `published-vocabulary` | names, json: a list, or an object of names by place | [`PublishedVocabulary`] |
//! | `vocabulary` | names, json | [`Vocabulary`] |
//! | `negatives` | words that classes are kept apart from, safetensors | [`Negatives`] |
//! | `published-negatives` | the same as RALF publishes them, a pickle of padded arrays | [`PublishedNegatives`] |
//! | `phrases` | phrases with what they were made from, json | [`Phrases`] |
//! | `concepts` | phrases with embeddings, safetensors | [`Concepts`] |
//! | `published-concepts` | the same as RALF publishes them, a dict in a dict with one tensor | [`PublishedConcepts`] |
//! | `region-prompt` | a position table of attention pooling, safetensors or `.pth` | [`RegionPromptFile`] |
//! | `labels`, `label-changes` | classes that objects are given, by annotation id, json | [`LabelFiles`], [`Changes`] |
//! | `queries` | what queries of a localizer began with and found, Parquet | [`Queries`] |
//! | `coverage` | how many objects have an anchor, json | [`crate::eval::anchors::Coverage`] |
//! | `relabelled` | what a relabelling did, json | [`Relabelled`] |
//! | `results` | detections in the results format of COCO and LVIS, json | [`ResultsFile`] |

mod archive;
mod crops;
mod curve;
mod descriptions;
mod downloads;
pub(crate) mod feature_files;
mod features;
mod hits;
mod images;
pub(crate) mod img2dataset;
mod labels;
mod links;
mod matrix;
mod pool;
pub(crate) mod prompt_samples;
mod queries;
mod region_prompt;
mod rows;
mod samples;
mod tables;
mod vocabulary;

use std::{collections::BTreeMap, path::Path};

use ovenbird_cache::inputs::InputFile;
use ovenbird_data::{
    annotations::{Annotations, CategoryId, Needs},
    classes::ClassSplit,
    content,
    evaluate::Evaluation,
    json,
    proposals::{self, IdMap, Pickled},
};
use ovenbird_models::{checkpoint::Checkpoint, clip::settings::FILES, rcnn::classifier::LogitScale};
use serde::{
    Deserialize, Serialize,
    de::{DeserializeOwned, IgnoredAny},
};
use serde_json::Value;
use tch::{Kind, Tensor};

pub use archive::ArchiveFiles;
pub(crate) use archive::EmbeddingArchive;
pub(crate) use crops::Annotated;
pub use crops::{Crop, CropIndex, Crops, CropsWriter};
pub use curve::Curve;
pub use descriptions::Descriptions;
pub use downloads::{ClassDownloads, Download, DownloadState, Downloads, WebCounts, WebTable};
pub use feature_files::FeatureFiles;
pub(crate) use features::{ByImage, Embeddings, Piece, Places};
pub use features::{Dtype, ImageFeatures, ImageFeaturesWriter, RegionFeatures, RegionFeaturesWriter, Regions, WholeBox};
pub use hits::{Hits, RegionHit, Searched};
pub use images::Images;
pub(crate) use images::listed;
pub use img2dataset::Img2dataset;
pub use labels::{Change, Changes, LabelFiles, Relabelled, RelabelledClass};
pub use links::{Dropped, Link, Links, PoolSearched};
pub(crate) use matrix::{MAX_NPY_HEADER, Matrix, MatrixShape, NpyHeader, narrowed, npy_header};
pub use matrix::{MatrixDtype, MatrixFile};
pub(crate) use pool::{
    COLUMNS as METADATA_COLUMNS, Column as MetadataColumn, Embedded, LAION_5B, LinkText, MetadataWriter, PoolRows, PoolShard,
    Row as PoolRow, Unsafe, Vectors, withdrawn,
};
pub use pool::{Pool, PoolMetadata, PublishedLinks};
pub use prompt_samples::{EMBEDDINGS_FILE, PromptEmbeddings, PromptRow, PromptRows, PromptSamples, PromptSamplesWriter, ROWS_FILE};
pub use queries::{Queries, Query};
pub use region_prompt::RegionPromptFile;
pub(crate) use region_prompt::TABLE;
pub(crate) use rows::{ReusedRows, Row, RowKind, RowWriter};
pub(crate) use samples::SamplesByImage;
pub use samples::{RegionSample, RegionSamples, RegionSamplesWriter};
pub use tables::{Detections, Proposals};
pub use vocabulary::{Concepts, Negatives, Phrase, Phrases, PublishedConcepts, PublishedNegatives, PublishedVocabulary, Vocabulary};

use crate::{
    Artifact, Error, Out, Result, UnitDraft,
    clip::space::{SPACE_KEY, Space},
    error::malformed,
    ports::{last_file, only_file},
};

/// Reads a json object.
pub(crate) fn read_json<T: DeserializeOwned>(file: &InputFile) -> Result<T> {
    let bytes = file.read()?;
    // Serde would accept a list as the fields in order.
    if json::parse::<IgnoredAny>(&bytes).is_ok() && !json::without_mark(&bytes).trim_ascii_start().starts_with(b"{") {
        return Err(malformed(&file.path, "expected an object, found another value"));
    }
    json::parse(&bytes).map_err(|fault| malformed(&file.path, fault.to_string()))
}

/// The weights that a file holds.
pub(crate) fn read_weights(file: &InputFile) -> Result<Checkpoint> {
    file.read_with(|path| Ok(Checkpoint::open(path)?))
}

/// A COCO or LVIS json, not yet read.
#[derive(Debug, Clone)]
pub struct AnnotationFile {
    /// The file.
    pub file: InputFile,
}

impl Artifact for AnnotationFile {
    const KIND: &'static str = "annotations";
    const EXTENSIONS: &'static [&'static str] = &["json"];
    const SHAPE: &'static str = "a COCO or LVIS json, an object of `images`, `categories` and `annotations`";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: only_file(Self::KIND, files)?.clone() })
    }
}

impl AnnotationFile {
    /// Reads and checks it: images, categories and annotations.
    pub fn load(&self) -> Result<Annotations> {
        self.load_for(Needs::Labels)
    }

    /// Reads its images and categories alone; the file need not have annotations.
    pub fn load_categories(&self) -> Result<Annotations> {
        self.load_for(Needs::Categories)
    }

    /// Reads its images alone; the file need not have anything else.
    pub fn load_images(&self) -> Result<Annotations> {
        self.load_for(Needs::Images)
    }

    /// Reads whatever it has; lists that it lacks are empty.
    pub fn load_all(&self) -> Result<Annotations> {
        Ok(Annotations::parse_all(&self.file.read()?, &self.file.path)?)
    }

    fn load_for(&self, needs: Needs) -> Result<Annotations> {
        Ok(Annotations::parse_for(&self.file.read()?, &self.file.path, needs)?)
    }
}

/// Base and novel class names.
#[derive(Debug, Clone)]
pub struct Classes(pub ClassSplit);

impl Artifact for Classes {
    const KIND: &'static str = "classes";
    const EXTENSIONS: &'static [&'static str] = &["json"];
    const SHAPE: &'static str = r#"class names as json, `{"base": ["cat", ...], "novel": ["dog", ...]}`; either list may be empty"#;

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self(read_json(only_file(Self::KIND, files)?)?))
    }
}

impl Classes {
    /// The category ids of classes, in their order. Fails if the annotations lack a class.
    pub(crate) fn category_ids<'a>(annotations: &Annotations, classes: impl Iterator<Item = &'a String>) -> Result<Vec<CategoryId>> {
        let id = |name: &String| {
            let found = annotations.categories.iter().find(|category| category.name == *name);
            found.map(|category| category.id).ok_or_else(|| Error::Input {
                port: "classes",
                problem: format!("the annotations have no class `{name}`"),
                hint: "use the classes and the annotations of the same split".into(),
            })
        };
        classes.map(id).collect()
    }
}

/// The names of categories, by id.
pub(crate) fn category_names(annotations: &Annotations, ids: &[CategoryId]) -> BTreeMap<CategoryId, String> {
    ids.iter().filter_map(|id| Some((*id, annotations.category(*id)?.name.clone()))).collect()
}

/// Fails where annotations count categories from 0, as a split does, base classes first: rows would get each other's names.
pub(crate) fn check_ids(annotations: &Annotations) -> Result<()> {
    match annotations.categories.first().filter(|category| category.id.0 == 0) {
        None => Ok(()),
        Some(category) => Err(Error::Input {
            port: AnnotationFile::KIND,
            problem: format!("expected ids from 1 on, as data sets have them, found 0: `{}`", category.name),
            hint: "give the data set's own annotations, not what `annotations/split` made of them".into(),
        }),
    }
}

/// One image of a web data set with its alt text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Caption {
    /// The image's name in the `images` artifact that goes with it.
    pub file: String,
    /// The text, unchanged.
    pub text: String,
}

/// Images with alt text: one json object `{"file", "text"}` per line.
#[derive(Debug, Clone)]
pub struct Captions(pub Vec<Caption>);

impl Artifact for Captions {
    const KIND: &'static str = "captions";
    const EXTENSIONS: &'static [&'static str] = &["jsonl"];
    const SHAPE: &'static str = r#"images with their text, a json object `{"file": "a.jpg", "text": "..."}` a line"#;

    fn open(files: &[InputFile]) -> Result<Self> {
        let file = only_file(Self::KIND, files)?;
        let (bytes, path) = (file.read()?, &file.path);
        if let Some(found) = content::describe(&bytes).filter(|_| !bytes.trim_ascii().is_empty()) {
            return Err(malformed(path, format!("expected lines of json, found {found}")));
        }
        let lines = json::without_mark(&bytes).split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
        let parse = |(line_idx, line): (usize, &[u8])| {
            let is_object = line.trim_ascii_start().starts_with(b"{");
            let read = if is_object { json::parse(line).map_err(|fault| fault.to_string()) } else { Err("expected an object".into()) };
            read.map_err(|problem| malformed(path, format!("line {}: {problem}", line_idx + 1)))
        };
        lines.map(parse).collect::<Result<_>>().map(Self)
    }
}

/// A pickle of proposals, not yet read.
#[derive(Debug, Clone)]
pub struct MmdetProposals {
    file: InputFile,
}

impl Artifact for MmdetProposals {
    const KIND: &'static str = "mmdet-proposals";
    const EXTENSIONS: &'static [&'static str] = &["pkl", "pickle"];
    const SHAPE: &'static str = "a pickle that mmdet writes, a list over images of float arrays N x 5 (x1, y1, x2, y2, score)";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: only_file(Self::KIND, files)?.clone() })
    }
}

impl MmdetProposals {
    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Reads the proposals of every image.
    pub fn load(&self) -> Result<Pickled> {
        Ok(proposals::read(&self.file.read()?, &self.file.path)?)
    }
}

/// Which entry of a list of proposals is of which image.
#[derive(Debug, Clone)]
pub struct IdMapFile(pub IdMap);

impl Artifact for IdMapFile {
    const KIND: &'static str = "id-map";
    const EXTENSIONS: &'static [&'static str] = &["json"];
    const SHAPE: &'static str =
        "an object from image ids to places in the list of proposals, with the numbers of boxes under `num_proposal`";

    fn open(files: &[InputFile]) -> Result<Self> {
        let file = only_file(Self::KIND, files)?;
        Ok(Self(IdMap::parse(&file.read()?, &file.path)?))
    }
}

/// A checkpoint of a CLIP, a detector or an augmenter, not yet read.
#[derive(Debug, Clone)]
pub struct CheckpointFile {
    /// The file of weights.
    pub file: InputFile,
    /// The config files of a folder: see [`FILES`].
    pub configs: Vec<InputFile>,
}

impl Artifact for CheckpointFile {
    const KIND: &'static str = "checkpoint";
    const EXTENSIONS: &'static [&'static str] = &["pt", "pth", "safetensors", "bin", "ckpt", "/"];
    const SHAPE: &'static str = "weights in a published layout: `.pt`, `.pth`, `.safetensors` or `.bin`";

    fn open(files: &[InputFile]) -> Result<Self> {
        let refused = |problem: String, hint: &str| Err(Error::Input { port: Self::KIND, problem, hint: hint.into() });
        // An unpacked archive has one, beside the storages that it describes.
        let pickle = files.iter().find(|file| file.path.ends_with("data.pkl") && files.len() > 1);
        if let Some(folder) = pickle.and_then(|pickle| pickle.path.parent())
            && files.iter().any(|file| file.path.parent() == Some(&folder.join("data")))
        {
            let top = folder.parent().unwrap_or(folder);
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            return refused(
                format!(
                    "{}: expected a file of torch.save, found one that was unpacked into a folder (data.pkl and data/)",
                    folder.display()
                ),
                &format!("pack it again without compression: `cd {} && zip -0 -r ../packed.pt {name}`, and name that file", top.display()),
            );
        }
        let weights: Vec<&InputFile> = match files {
            [file] => vec![file],
            files => {
                let extension = |file: &InputFile| file.path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
                let is_called_so =
                    |file: &&InputFile| extension(file).is_some_and(|extension| Self::EXTENSIONS.contains(&extension.as_str()));
                let called_so: Vec<&InputFile> = files.iter().filter(is_called_so).collect();
                // Trainers use names of their own: `model.pth.tar-50`.
                if called_so.is_empty() {
                    files.iter().filter(|file| file.begin(64).is_ok_and(|head| Checkpoint::may_begin(&head))).collect()
                } else {
                    called_so
                }
            }
        };
        let [file] = weights[..] else {
            let names = weights.iter().map(|file| file.name.as_str()).collect::<Vec<_>>().join(", ");
            let found = if weights.is_empty() { format!("none among {}", files.len()) } else { names };
            return refused(
                format!("expected one file of weights (.pt, .pth, .safetensors, .bin) in the folder, found {found}"),
                "name the file, or a folder that holds it and its config files alone",
            );
        };
        let configs = files.iter().filter(|file| FILES.contains(&file.name.as_str()) && files.len() > 1);
        Ok(Self { file: file.clone(), configs: configs.cloned().collect() })
    }
}

/// The state from which a training continues, besides its weights.
pub struct TrainingState {
    /// The file, safetensors.
    pub file: InputFile,
}

impl Artifact for TrainingState {
    const KIND: &'static str = "training-state";
    const EXTENSIONS: &'static [&'static str] = &["safetensors"];
    const SHAPE: &'static str = "the state that a training of this program left";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: last_file(Self::KIND, files)?.clone() })
    }
}

/// The name of a file of class embeddings.
pub(crate) const PROMPTS_FILE: &str = "prompts.safetensors";
/// The name of the rows of class embeddings in files.
pub(crate) const EMBEDDINGS: &str = "embeddings";

/// Class embeddings.
#[derive(Debug)]
pub struct Prompts {
    /// Class names, in the order of the rows.
    pub names: Vec<String>,
    /// f32 `[K, D]`; of unit norm or not.
    pub embeddings: Tensor,
    /// How cosines become logits, if that was learned with the embeddings.
    pub scale: Option<LogitScale>,
    /// The CLIP that made them, if known.
    pub clip: Option<Space>,
}

impl Artifact for Prompts {
    const KIND: &'static str = "prompts";
    const EXTENSIONS: &'static [&'static str] = &["safetensors"];
    const SHAPE: &'static str = "class embeddings that `prompts/ensemble` or `prompts/import` made: a tensor `embeddings` [K, D], and in the metadata `names`, a json list of K names";

    fn open(files: &[InputFile]) -> Result<Self> {
        let file = only_file(Self::KIND, files)?;
        Self::of(&read_weights(file)?.around(EMBEDDINGS)?).map_err(|problem| malformed(&file.path, problem))
    }
}

/// A `.pth` file of class embeddings as OADP and DetPro publish them, not yet read.
///
/// A dict: `embeddings` `[K, D]`, `names` (a list of K texts), and, if they were learned, `scaler` and `bias`, one number each; or only
/// a tensor `[K, D]`, whose rows are named elsewhere.
#[derive(Debug, Clone)]
pub struct PublishedPrompts {
    /// The file.
    pub file: InputFile,
}

impl Artifact for PublishedPrompts {
    const KIND: &'static str = "published-prompts";
    const EXTENSIONS: &'static [&'static str] = &["pth", "pt"];
    const SHAPE: &'static str = "a `.pth` of a dict with `embeddings` [K, D] and `names`, or of [K, D] alone";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: only_file(Self::KIND, files)?.clone() })
    }
}

impl Prompts {
    /// Takes embeddings of any floating kind, one row per name. Fails if rows and names differ in number, a number is not finite, a row is
    /// zero, or a name occurs twice.
    pub(crate) fn new(names: Vec<String>, embeddings: &Tensor, scale: Option<LogitScale>) -> Result<Self, String> {
        let (kind, size) = (embeddings.kind(), embeddings.size());
        let is_floating = matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double);
        if !(is_floating && matches!(size[..], [n_classes, dim] if n_classes == names.len() as i64 && n_classes > 0 && dim > 0)) {
            return Err(format!("expected floating embeddings [{}, D], one row a class name, found {kind:?} {size:?}", names.len()));
        }
        if let Some(twice) = names.iter().enumerate().find(|(place, name)| names[..*place].contains(name)) {
            return Err(format!("expected each class name once, found `{}` again at place {}", twice.1, twice.0));
        }
        let embeddings = embeddings.to_kind(Kind::Float);
        let are_sound = Vec::<bool>::try_from(embeddings.isfinite().all_dim(1, false)).map_err(|error| error.to_string())?;
        if let Some((name, _)) = names.iter().zip(are_sound).find(|(_, is_sound)| !is_sound) {
            return Err(format!("expected numbers in `embeddings`, found infinities or NaN in the row of `{name}`"));
        }
        if let Some(name) = zero_row(&names, &embeddings) {
            return Err(format!("expected a direction for each class, found zeros alone in the row of `{name}`"));
        }
        Ok(Self { names, embeddings, scale, clip: None })
    }

    /// Reads `embeddings`, and `scaler` and `bias` if present; from the metadata `names`, a JSON list, and `ovenbird.clip` if present.
    pub(crate) fn of(checkpoint: &Checkpoint) -> Result<Self, String> {
        let text = |name: &str| checkpoint.metadata().get(name);
        let names = text("names").and_then(|names| serde_json::from_str::<Vec<String>>(names).ok());
        let names = names.ok_or("expected a list of class names under `names`, found none")?;
        let embeddings = checkpoint.tensors().get(EMBEDDINGS).ok_or("expected a tensor `embeddings`, found none")?;
        let number = |name: &str| {
            let (number, found) = match (checkpoint.tensors().get(name), text(name)) {
                (Some(tensor), _) => {
                    ((tensor.numel() == 1).then(|| tensor.double_value(&[])), format!("{:?} {:?}", tensor.kind(), tensor.size()))
                }
                (None, Some(text)) => (text.parse().ok(), format!("`{text}`")),
                (None, None) => return Ok(None),
            };
            let number = number.filter(|number: &f64| number.is_finite());
            number.map(Some).ok_or_else(|| format!("expected one number as `{name}`, found {found}"))
        };
        let scale = match (number("scaler")?, number("bias")?) {
            (Some(scaler), Some(bias)) => Some(LogitScale::Affine { scaler, bias }),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => return Err("expected `scaler` and `bias` together, found one of them".into()),
        };
        Ok(Self { clip: Space::read(text(SPACE_KEY))?, ..Self::new(names, embeddings, scale)? })
    }

    /// The tensors by their names in files.
    pub(crate) fn tensors(&self) -> BTreeMap<String, Tensor> {
        let mut tensors = BTreeMap::from([(EMBEDDINGS.to_owned(), self.embeddings.shallow_clone())]);
        match self.scale {
            Some(LogitScale::Affine { scaler, bias }) => {
                tensors.extend([("scaler", scaler), ("bias", bias)].map(|(name, number)| (name.to_owned(), Tensor::from(number as f32))));
            }
            Some(LogitScale::Temperature { .. }) => panic!("BUG: temperatures are not learned with prompts"),
            None => {}
        }
        tensors
    }

    /// The least, mean and greatest norm of the rows, as metrics.
    pub(crate) fn norms(&self) -> BTreeMap<String, Value> {
        let norms = self.embeddings.norm_scalaropt_dim(2.0, [-1], false);
        let metrics = [("min_norm", norms.min()), ("mean_norm", norms.mean(Kind::Float)), ("max_norm", norms.max())];
        metrics.map(|(name, norm)| (name.to_owned(), norm.double_value(&[]).into())).into()
    }

    /// The tensors and the metadata of a file. Fails where an embedding is zero.
    pub(crate) fn content(&self) -> Result<(BTreeMap<String, Tensor>, BTreeMap<String, String>)> {
        if let Some(name) = zero_row(&self.names, &self.embeddings) {
            let problem = "expected a direction, found zeros alone".into();
            return Err(ovenbird_cache::Error::Unsound { what: format!("the class embedding of `{name}`"), problem }.into());
        }
        let names = serde_json::to_string(&self.names).expect("BUG: names are plain JSON");
        let metadata = [("names".to_owned(), names)].into_iter().chain(self.clip.map(Space::entry)).collect();
        Ok((self.tensors(), metadata))
    }

    /// Writes them as safetensors. Fails where a row is zero or a number is not finite.
    pub(crate) fn write(&self, draft: &UnitDraft, port: Out<Self>) -> Result<()> {
        let (tensors, metadata) = self.content()?;
        draft.write_tensors(port, PROMPTS_FILE, &tensors, &metadata)
    }

    /// The rows of these classes, f32 `[K, D]`, in this order. Fails if a name is missing.
    pub fn select(&self, names: &[String]) -> Result<Tensor> {
        let row = |name: &String| {
            self.names.iter().position(|known| known == name).map(|row| row as i64).ok_or_else(|| Error::Input {
                port: Self::KIND,
                problem: format!("no embedding for the class `{name}` among {} classes", self.names.len()),
                hint: "make the prompts for this class list".into(),
            })
        };
        let rows = names.iter().map(row).collect::<Result<Vec<i64>>>()?;
        Ok(self.embeddings.index_select(0, &Tensor::from_slice(&rows)))
    }
}

/// The first class whose embedding is zero.
fn zero_row<'a>(names: &'a [String], embeddings: &Tensor) -> Option<&'a String> {
    let norms = Vec::<f64>::try_from(embeddings.abs().sum_dim_intlist([1_i64].as_slice(), false, Kind::Double)).ok()?;
    names.iter().zip(norms).find(|(_, norm)| *norm == 0.0).map(|(name, _)| name)
}

/// The result of an evaluation.
#[derive(Debug, Clone)]
pub struct EvaluationFile(pub Evaluation);

impl Artifact for EvaluationFile {
    const KIND: &'static str = "evaluation";
    const EXTENSIONS: &'static [&'static str] = &["json"];
    const SHAPE: &'static str = "the `evaluation.json` that `eval/coco` or `eval/lvis` made";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self(read_json(only_file(Self::KIND, files)?)?))
    }
}

/// A results file of COCO and LVIS for other programs; no stage reads it.
#[derive(Debug, Clone)]
pub struct ResultsFile {
    /// The file.
    pub file: InputFile,
}

impl Artifact for ResultsFile {
    const KIND: &'static str = "results";
    const EXTENSIONS: &'static [&'static str] = &["json"];
    const SHAPE: &'static str = r#"a results file of COCO, a list of `{"image_id", "category_id", "bbox", "score"}`"#;

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: only_file(Self::KIND, files)?.clone() })
    }
}
