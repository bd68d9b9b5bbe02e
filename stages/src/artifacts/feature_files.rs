//! Features in the format of the OADP reference: a folder with one `torch.save` file per image, `{id:012}.pth`.
//!
//! For whole images (globals) the file is a tensor f16 `[D]`; for blocks a dict of `embeddings` f16 `[N, D]` and `bboxes` f16 `[N, 4]`, xyxy
//! in px of the original image; for objects the dict also has `objectness` f16 `[N, 1]`. (OADP, section 1.)
//!
//! Reading checks names, types, shapes and lengths, that numbers are finite, that embeddings have unit norm (section 9, O8) and boxes lie in
//! the image. PyTorch 1.6 and later can read the written files.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use half::{f16, slice::HalfFloatSliceExt as _};
use ovenbird_cache::{Digest, inputs::InputFile};
use ovenbird_data::{
    annotations::{ImageId, ImageInfo},
    boxes::Xyxy,
};
use ovenbird_models::checkpoint::{Array, BARE_TENSOR, Saved, read_arrays, write_torch};
use tch::Kind;

use super::features::Regions;
use crate::{Artifact, Error, Result};

/// The tolerance of unit norms: f16 has three digits.
const NORM_TOLERANCE: f64 = 2e-3;
/// How far a box may reach outside its image, in px, besides the rounding of f16: proposal networks round, too.
const TOLERANCE_PX: f32 = 1.0;
/// The most missing files that a message names.
const MAX_NAMED: usize = 3;

const EMBEDDINGS: &str = "embeddings";
const BOXES: &str = "bboxes";
const OBJECTNESS: &str = "objectness";

/// The content of an image's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holds {
    /// The whole image's embedding.
    Global,
    /// Embeddings of blocks.
    Blocks,
    /// Embeddings of objects.
    Objects,
}

impl Holds {
    /// The names of the file's tensors, sorted.
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::Global => &[BARE_TENSOR],
            Self::Blocks => &[BOXES, EMBEDDINGS],
            Self::Objects => &[BOXES, EMBEDDINGS, OBJECTNESS],
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Global => "one tensor",
            Self::Blocks => "a dict of `bboxes` and `embeddings`",
            Self::Objects => "a dict of `bboxes`, `embeddings` and `objectness`",
        }
    }
}

/// The name of an image's file.
pub(crate) fn file_name(image: ImageId) -> String {
    format!("{:012}.pth", image.0)
}

/// A folder of such files, not yet read.
#[derive(Debug, Clone)]
pub struct FeatureFiles {
    by_name: BTreeMap<String, InputFile>,
}

impl Artifact for FeatureFiles {
    const KIND: &'static str = "feature-files";
    const EXTENSIONS: &'static [&'static str] = &["/"];
    const SHAPE: &'static str = "a folder of `{id:012}.pth` files as OADP keeps them, one an image";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { by_name: files.iter().map(|file| (file.name.clone(), file.clone())).collect() })
    }
}

/// The content of a file as f32, and the dimension of its embeddings.
pub(crate) struct Read<T> {
    pub(crate) row: T,
    pub(crate) dim: usize,
}

impl FeatureFiles {
    /// One digest per image, in the order given: of its id, size and file content. Fails if images have no file.
    pub(crate) fn items(&self, images: &[ImageInfo]) -> Result<Vec<Digest>> {
        let missing: Vec<String> = images.iter().map(|image| file_name(image.id)).filter(|name| !self.by_name.contains_key(name)).collect();
        if !missing.is_empty() {
            let named = missing.iter().take(MAX_NAMED).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            let (n_missing, n_images, n_files) = (missing.len(), images.len(), self.by_name.len());
            return Err(Error::Input {
                port: Self::KIND,
                problem: format!("no file for {n_missing} of {n_images} images, {named} among them; the folder has {n_files} files"),
                hint:
                    "point `files` at the folder that holds the `.pth` files themselves, and `annotations` at the file whose images they \
                       are of; or extract what is missing"
                        .into(),
            });
        }
        let item = |image: &ImageInfo| {
            let stated = format!("{} {}x{}", image.id, image.width, image.height);
            Digest::of_list("ovenbird feature file 1", [(stated.as_str(), self.file(image).digest)])
        };
        Ok(images.iter().map(item).collect())
    }

    /// How many files belong to other images than these.
    pub(crate) fn n_others(&self, images: &[ImageInfo]) -> usize {
        self.by_name.len() - images.iter().filter(|image| self.by_name.contains_key(&file_name(image.id))).count()
    }

    /// The size of an image's file.
    pub(crate) fn n_bytes(&self, image: &ImageInfo) -> usize {
        self.file(image).bytes as usize
    }

    /// The file of an image, which [`Self::items`] found.
    fn file(&self, image: &ImageInfo) -> &InputFile {
        &self.by_name[&file_name(image.id)]
    }

    /// The embedding of a whole image.
    pub(crate) fn global(&self, info: &ImageInfo) -> Result<Read<Vec<f32>>> {
        let file = self.open_file(info, Holds::Global)?;
        let embedding = file.numbers(BARE_TENSOR, &[None])?;
        let dim = embedding.len();
        file.check_embeddings(BARE_TENSOR, &embedding, dim)?;
        Ok(Read { row: embedding, dim })
    }

    /// The regions of an image with their embeddings; the objectness of blocks is 1.
    pub(crate) fn regions(&self, info: &ImageInfo, holds: Holds) -> Result<Read<Regions>> {
        let file = self.open_file(info, holds)?;
        let embeddings = file.numbers(EMBEDDINGS, &[None, None])?;
        let shape = &file.arrays[EMBEDDINGS].shape;
        let (n, dim) = (shape[0], shape[1] as usize);
        file.check_embeddings(EMBEDDINGS, &embeddings, dim)?;
        let corners = file.numbers(BOXES, &[Some(n), Some(4)])?;
        let boxes: Vec<Xyxy> = corners.as_chunks::<4>().0.iter().map(|corners| Xyxy::from(*corners)).collect();
        let objectness = match holds {
            Holds::Objects => file.numbers(OBJECTNESS, &[Some(n), Some(1)])?,
            Holds::Global | Holds::Blocks => vec![1.0; boxes.len()],
        };
        if let Some((row, score)) = objectness.iter().enumerate().find(|(_, score)| !(0.0..=1.0).contains(*score)) {
            return Err(file.malformed(format!("{OBJECTNESS}, row {row}: expected a score in [0, 1], found {score}")));
        }
        let row = Regions { image_id: info.id, size_px: [info.width, info.height], boxes, objectness, embeddings };
        Ok(Read { row, dim })
    }

    /// The error that an image's file is malformed.
    pub(crate) fn malformed(&self, info: &ImageInfo, problem: String, hint: &str) -> Error {
        ovenbird_data::Error::Malformed { path: self.file(info).path.clone(), problem, hint: Some(hint.into()) }.into()
    }

    fn open_file<'a>(&'a self, info: &'a ImageInfo, holds: Holds) -> Result<FeatureFile<'a>> {
        let file = FeatureFile { of: self, info, arrays: self.file(info).read_with(|path| Ok::<_, Error>(read_arrays(path)?))? };
        let names: Vec<&str> = file.arrays.keys().map(String::as_str).collect();
        if names != holds.names() {
            let hint = "globals, blocks and objects have a folder and a stage each: `globals/import`, `blocks/import`, `objects/import`";
            return Err(self.malformed(info, format!("expected {}, found {names:?}", holds.words()), hint));
        }
        Ok(file)
    }
}

/// The file of an image.
struct FeatureFile<'a> {
    of: &'a FeatureFiles,
    info: &'a ImageInfo,
    arrays: BTreeMap<String, Array>,
}

impl FeatureFile<'_> {
    fn malformed(&self, problem: String) -> Error {
        self.of.malformed(self.info, problem, "extract the features of this image again, or skip the image: `on_bad_item: skip`")
    }

    /// The numbers of an f16 tensor of this shape; `None` stands for any length.
    fn numbers(&self, name: &str, shape: &[Option<i64>]) -> Result<Vec<f32>> {
        let Array { kind, shape: found, bytes } = &self.arrays[name];
        let fits = found.len() == shape.len() && shape.iter().zip(found).all(|(expected, found)| expected.is_none_or(|n| n == *found));
        if *kind != Kind::Half || !fits {
            let lengths: Vec<String> = shape.iter().map(|n| n.map_or_else(|| "any".into(), |n| n.to_string())).collect();
            return Err(self.malformed(format!("{name}: expected f16 [{}], found {kind:?} {found:?}", lengths.join(", "))));
        }
        let halves: Vec<f16> = bytes.as_chunks::<2>().0.iter().map(|bytes| f16::from_le_bytes(*bytes)).collect();
        let mut numbers = vec![0.0; halves.len()];
        halves.convert_to_f32_slice(&mut numbers);
        match numbers.iter().position(|number| !number.is_finite()) {
            Some(place) => {
                let row = place / (found[1..].iter().product::<i64>().max(1) as usize);
                Err(self.malformed(format!("{name}, row {row}: expected finite numbers, found {}", numbers[place])))
            }
            None => Ok(numbers),
        }
    }

    fn check_embeddings(&self, name: &str, embeddings: &[f32], dim: usize) -> Result<()> {
        let mut rows = embeddings.chunks_exact(dim.max(1)).enumerate();
        match rows.find_map(|(row, embedding)| Some((row, norm_off_unit(embedding)?))) {
            Some((row, norm)) => Err(self.malformed(format!("{name}, row {row}: expected unit norm, found {norm:.4}"))),
            None => Ok(()),
        }
    }
}

/// The norm of an embedding, where it is not 1.
pub(crate) fn norm_off_unit(embedding: &[f32]) -> Option<f64> {
    let norm = embedding.iter().map(|number| f64::from(*number).powi(2)).sum::<f64>().sqrt();
    (!norm.is_finite() || (norm - 1.0).abs() >= NORM_TOLERANCE).then_some(norm)
}

/// The tolerance of box corners in an image, in px: rounding of f16 and of proposal networks.
pub(crate) fn slack_px([width, height]: [u32; 2]) -> f32 {
    // f16 has eleven bits: half of the last one.
    TOLERANCE_PX + width.max(height) as f32 / 2048.0
}

/// Describes the first box that leaves the image or is inside out; `None` if there is none. `first`: the row of the first box.
pub(crate) fn box_problem(boxes: &[Xyxy], first: usize, size: [u32; 2]) -> Option<String> {
    let slack = slack_px(size);
    let [width, height] = size.map(|side| side as f32 + slack);
    boxes.iter().enumerate().find_map(|(place, xyxy)| {
        let Xyxy { x1, y1, x2, y2 } = *xyxy;
        let problem = if x2 < x1 || y2 < y1 {
            "has x2 < x1 or y2 < y1".to_owned()
        } else if x1 < -slack || y1 < -slack || x2 > width || y2 > height {
            format!("extends beyond the image of {} x {} px", size[0], size[1])
        } else {
            return None;
        };
        Some(format!("{BOXES}, row {}: box [{x1}, {y1}, {x2}, {y2}] {problem}", first + place))
    })
}

/// Writes the file of a whole image. Fails for numbers beyond the range of f16.
pub(crate) fn write_global(embedding: &[f32], out: impl Write) -> io::Result<()> {
    write_torch(&Saved::Array(&halves(BARE_TENSOR, embedding, &[embedding.len()])?), out)
}

/// Writes the file of an image's regions, whose embeddings have `dim` numbers. Fails for numbers beyond the range of f16.
pub(crate) fn write_regions(regions: &Regions, dim: usize, holds: Holds, out: impl Write) -> io::Result<()> {
    let n = regions.boxes.len();
    let corners: Vec<f32> = regions.boxes.iter().flat_map(|xyxy| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2]).collect();
    let mut arrays = vec![(BOXES, halves(BOXES, &corners, &[n, 4])?), (EMBEDDINGS, halves(EMBEDDINGS, &regions.embeddings, &[n, dim])?)];
    match holds {
        Holds::Objects => arrays.push((OBJECTNESS, halves(OBJECTNESS, &regions.objectness, &[n, 1])?)),
        Holds::Global | Holds::Blocks => {}
    }
    write_torch(&Saved::Dict(arrays.iter().map(|(name, array)| ((*name).to_owned(), Saved::Array(array))).collect()), out)
}

fn halves(name: &str, numbers: &[f32], shape: &[usize]) -> io::Result<Array> {
    let mut halves = vec![f16::ZERO; numbers.len()];
    halves.convert_from_f32_slice(numbers);
    if let Some(place) = halves.iter().position(|half| !half.is_finite()) {
        let problem = format!("{name}: expected numbers that f16 holds, found {}", numbers[place]);
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    let shape = shape.iter().map(|length| *length as i64).collect();
    Ok(Array { kind: Kind::Half, shape, bytes: halves.into_iter().flat_map(f16::to_le_bytes).collect() })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{fs, path::Path};

    use ovenbird_cache::inputs::digest_path;
    use serde_json::{Value, json};
    use tch::Tensor;

    use super::*;

    pub(crate) fn image(id: u64, [width, height]: [u32; 2]) -> ImageInfo {
        let (neg_category_ids, not_exhaustive_category_ids) = (Vec::new(), Vec::new());
        ImageInfo { id: ImageId(id), file_name: "a.jpg".into(), width, height, neg_category_ids, not_exhaustive_category_ids }
    }

    pub(crate) fn golden() -> Vec<Value> {
        serde_json::from_slice(&fs::read(golden_folder().join("golden.json")).unwrap()).unwrap()
    }

    fn golden_folder() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/features"))
    }

    pub(crate) fn golden_image(golden: &Value) -> ImageInfo {
        let number = |name: &str| golden[name].as_u64().unwrap();
        image(number("id"), [number("width") as u32, number("height") as u32])
    }

    pub(crate) fn golden_files(name: &str) -> FeatureFiles {
        FeatureFiles::open(&digest_path(&golden_folder().join(name), None, 0).unwrap()).unwrap()
    }

    fn corners(boxes: &[Xyxy]) -> Vec<[f32; 4]> {
        boxes.iter().map(|xyxy| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2]).collect()
    }

    /// Numbers of f16 are exact in f32 and in JSON.
    #[test]
    fn what_torch_saved_is_read_number_by_number() {
        let [globals, blocks, objects] = ["globals", "blocks", "objects"].map(golden_files);
        let golden = golden();
        assert_eq!(golden.len(), 3);
        for golden in golden {
            let info = golden_image(&golden);
            let Read { row, dim } = globals.global(&info).unwrap();
            assert_eq!((json!(row), dim), (golden["globals"].clone(), 8));
            for (files, name, holds) in [(&blocks, "blocks", Holds::Blocks), (&objects, "objects", Holds::Objects)] {
                let Read { row: Regions { image_id, size_px, boxes, objectness, embeddings }, dim } = files.regions(&info, holds).unwrap();
                assert_eq!((image_id, size_px, dim), (info.id, [info.width, info.height], 8));
                assert_eq!(json!(embeddings.chunks(8).collect::<Vec<_>>()), golden[format!("{name}.embeddings")]);
                assert_eq!(json!(corners(&boxes)), golden[format!("{name}.bboxes")]);
                let expected = match holds {
                    Holds::Objects => golden["objects.objectness"].clone(),
                    Holds::Global | Holds::Blocks => json!([[1.0], [1.0], [1.0], [1.0]]),
                };
                assert_eq!(json!(objectness.chunks(1).collect::<Vec<_>>()), expected);
            }
        }
    }

    /// What becomes of a file of image 7, 40 x 30 px, that holds these tensors.
    fn refusal(tensors: &[(&str, Tensor)], holds: Holds) -> String {
        let value = Saved::Dict(tensors.iter().map(|(name, tensor)| ((*name).to_owned(), Saved::Tensor(tensor))).collect());
        let mut bytes = Vec::new();
        write_torch(&value, &mut bytes).unwrap();
        refusal_of(&bytes, holds)
    }

    fn refusal_of(bytes: &[u8], holds: Holds) -> String {
        let folder = tempfile::tempdir().unwrap();
        let info = image(7, [40, 30]);
        let mut file = tempfile::NamedTempFile::new_in(folder.path()).unwrap();
        file.write_all(bytes).unwrap();
        file.persist(folder.path().join(file_name(info.id))).unwrap();
        let files = FeatureFiles::open(&digest_path(folder.path(), None, 0).unwrap()).unwrap();
        let result = match holds {
            Holds::Global => files.global(&info).map(|_| ()),
            Holds::Blocks | Holds::Objects => files.regions(&info, holds).map(|_| ()),
        };
        let error = result.unwrap_err();
        assert!(error.hint().is_some());
        error.to_string().rsplit_once("000000000007.pth: ").unwrap().1.to_owned()
    }

    fn half(numbers: &[f32], shape: &[i64]) -> Tensor {
        Tensor::from_slice(numbers).view(shape).to_kind(Kind::Half)
    }

    #[test]
    fn what_is_wrong_with_a_file_is_named_with_its_field_and_row() {
        let boxes = || half(&[0.0, 0.0, 5.0, 5.0, 1.0, 1.0, 5.0, 5.0], &[2, 4]);
        let embeddings = || half(&[1.0, 0.0, 0.6, 0.8], &[2, 2]);
        let score = |score: f32| half(&[0.5, score], &[2, 1]);
        let objects = |boxes, embeddings, score| refusal(&[(BOXES, boxes), (EMBEDDINGS, embeddings), (OBJECTNESS, score)], Holds::Objects);
        let cases = [
            (objects(boxes(), embeddings().to_kind(Kind::Float), score(0.1)), "embeddings: expected f16 [any, any], found Float [2, 2]"),
            (objects(boxes(), embeddings().view(-1), score(0.1)), "embeddings: expected f16 [any, any], found Half [4]"),
            (objects(boxes().narrow(0, 0, 1), embeddings(), score(0.1)), "bboxes: expected f16 [2, 4], found Half [1, 4]"),
            (objects(boxes(), embeddings(), score(0.1).view(-1)), "objectness: expected f16 [2, 1], found Half [2]"),
            (objects(boxes(), half(&[1.0, 0.0, 0.6, 0.7], &[2, 2]), score(0.1)), "embeddings, row 1: expected unit norm, found 0.9222"),
            (
                objects(boxes(), half(&[1.0, 0.0, f32::NAN, 0.0], &[2, 2]), score(0.1)),
                "embeddings, row 1: expected finite numbers, found NaN",
            ),
            (objects(boxes(), embeddings(), score(1.5)), "objectness, row 1: expected a score in [0, 1], found 1.5"),
            (
                refusal(&[(BOXES, boxes()), (EMBEDDINGS, embeddings())], Holds::Objects),
                "expected a dict of `bboxes`, `embeddings` and `objectness`, found [\"bboxes\", \"embeddings\"]",
            ),
            (refusal(&[(EMBEDDINGS, embeddings())], Holds::Global), "expected one tensor, found [\"embeddings\"]"),
        ];
        for (found, expected) in cases {
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_file_that_is_cut_short_anywhere_is_an_error() {
        let mut whole = Vec::new();
        write_global(&[0.6, 0.8], &mut whole).unwrap();
        for length in 0..whole.len() {
            let problem = refusal_of(&whole[..length], Holds::Global);
            assert!(problem.contains("found") || problem.contains("zip") || problem.contains("pkl"), "{length}: {problem}");
        }
    }

    #[test]
    fn regions_come_back_as_they_were_written_and_none_keep_their_width() {
        let folder = tempfile::tempdir().unwrap();
        let (some, none) = (image(1, [40, 30]), image(2, [40, 30]));
        let regions = Regions {
            image_id: some.id,
            size_px: [40, 30],
            boxes: vec![Xyxy::from([0.5, 1.0, 20.25, 30.0])],
            objectness: vec![0.75],
            embeddings: vec![0.0, 1.0, 0.0],
        };
        let empty = Regions { image_id: none.id, boxes: vec![], objectness: vec![], embeddings: vec![], ..regions };
        for regions in [&regions, &empty] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            write_regions(regions, 3, Holds::Objects, &mut file).unwrap();
            file.persist(folder.path().join(file_name(regions.image_id))).unwrap();
        }
        let files = FeatureFiles::open(&digest_path(folder.path(), None, 0).unwrap()).unwrap();
        for (info, expected) in [(some, regions), (none, empty)] {
            let Read { row, dim } = files.regions(&info, Holds::Objects).unwrap();
            assert_eq!((row, dim), (expected, 3));
        }
        let error = write_global(&[1e5], Vec::new()).unwrap_err().to_string();
        assert_eq!(error, "(bare tensor): expected numbers that f16 holds, found 100000");
    }

    #[test]
    fn images_without_a_file_are_counted_and_files_without_an_image_too() {
        let files = golden_files("globals");
        let images = [9, 10, 11, 12, 13].map(|id| image(id, [4, 4]));
        let error = files.items(&images).unwrap_err().to_string();
        let expected =
            "no file for 4 of 5 images, `000000000010.pth`, `000000000011.pth`, `000000000012.pth` among them; the folder has 3 files";
        assert_eq!(error, format!("feature-files: {expected}"));
        assert_eq!((files.n_others(&images), files.items(&images[..1]).unwrap().len()), (2, 1));
    }
}
