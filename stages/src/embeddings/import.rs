//! `embeddings/import`: embeddings of proposals in one matrix or one archive that another program made.

use std::ops::Range;

use ovenbird_cache::Digest;
use ovenbird_data::{
    annotations::ImageInfo,
    proposals::{IdMap, Proposal},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{
        AnnotationFile, ArchiveFiles, Dtype, EmbeddingArchive, IdMapFile, Matrix, MatrixDtype, MatrixFile, MatrixShape, Proposals,
        RegionFeatures, RegionFeaturesWriter, Regions, feature_files::norm_off_unit,
    },
    feed::stream,
};

/// Bytes of rows that may be ahead of the writer.
const ROOM: usize = 256 << 20;
/// The most numbers of a row.
const MAX_DIM: usize = 65_536;

/// Embeddings of proposals that another program made, checked: LP-OVOD's `coco_clip_emb_train.pth`, DetPro's
/// `lvis_clip_image_embedding.zip`.
///
/// A `matrix` has a row for each proposal, in the order of the pickle that `proposals/import` read: `proposals` and `id_map` are its outputs.
/// A file without a header says neither its number format nor its width: both are parameters, and its size must be that of all proposals.
/// An `archive` has a tensor for each image, with a row for each proposal; it is read in place, and may come in the parts of a split zip.
/// Images without a tensor, and rows that are not of unit norm, such as the zeros that an interrupted extraction leaves, make their image an
/// item that failed. (LP-OVOD, sections 1, 3.4 and 12; DetPro, sections 1 and 2.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Import {
    /// The number format of the matrix. Features have the same; those of an archive, whose tensors are f32, are rounded to it.
    pub dtype: MatrixDtype,
    /// The numbers of a row: 512 for ViT-B/32.
    pub dim: usize,
}

impl Default for Import {
    fn default() -> Self {
        Self { dtype: MatrixDtype::F16, dim: 512 }
    }
}

const MATRIX: In<MatrixFile> = In::optional("matrix", "Rows of numbers without a header, or a `.npy` [N, D]; without `archive`.");
const ARCHIVE: In<ArchiveFiles> = In::optional(
    "archive",
    "A zip of `{id:012}.pth`, f32 [N, D], one for each image, or a folder of its parts (`.z01` to `.zip`, or `.zip.001` on); without \
     `matrix`.",
);
const PROPOSALS: In<Proposals> = In::required("proposals", "The proposals that the rows are of, all of them (`proposals/import`).");
const ID_MAP: In<IdMapFile> = In::optional("id_map", "The order of the rows of a matrix (`proposals/import`).");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json: which images, their ids and sizes.");
const FEATURES: Out<RegionFeatures> =
    Out::new("features", "By image: `embedding` [N, D] of unit norm, `xyxy` f32 [N, 4] px, `objectness` f32 [N].");

/// Where the embeddings come from.
enum Source {
    Matrix {
        file: MatrixFile,
        /// The rows of each image.
        ranges: Vec<Range<u64>>,
        /// The rows of the matrix.
        n_rows: u64,
    },
    Archive(ArchiveFiles),
}

impl Source {
    /// Fails unless the ports have one matrix with its id map, or one archive.
    fn of(inputs: &Inputs, images: &[ImageInfo]) -> Result<Self> {
        let refused =
            |port: PortInfo, problem: &str, hint: &str| Error::Input { port: port.name, problem: problem.into(), hint: hint.into() };
        let id_map = inputs.read_if_given(ID_MAP)?;
        match (inputs.read_if_given(MATRIX)?, inputs.read_if_given(ARCHIVE)?) {
            (Some(file), None) => {
                let Some(IdMapFile(id_map)) = id_map else {
                    let problem = "missing, but the rows of a matrix are in its order";
                    return Err(refused(
                        ID_MAP.info(),
                        problem,
                        "give the id map of the step that made the proposals: `id_map: STEP.id_map`",
                    ));
                };
                let (first_rows, n_rows) = id_map.first_rows();
                let range = |image: &ImageInfo| range_of(image, &id_map, &first_rows);
                Ok(Self::Matrix { file, ranges: images.iter().map(range).collect::<Result<_>>()?, n_rows })
            }
            (None, Some(archive)) => match id_map {
                None => Ok(Self::Archive(archive)),
                Some(_) => {
                    let problem = "given, but the entries of an archive name their images";
                    Err(refused(ID_MAP.info(), problem, "leave `id_map` out"))
                }
            },
            (Some(_), Some(_)) => {
                Err(refused(ARCHIVE.info(), "expected either `matrix` or `archive`, found both", "leave one of them out"))
            }
            (None, None) => {
                let hint = "give `in: {matrix: ...}` (LP-OVOD) or `in: {archive: ...}` (DetPro)";
                Err(refused(MATRIX.info(), "expected either `matrix` or `archive`, found neither", hint))
            }
        }
    }

    fn open(&self, Import { dim, dtype }: &Import) -> Result<Opened<'_>> {
        match self {
            Self::Matrix { file, ranges, n_rows } => {
                let shape = MatrixShape { n_rows: *n_rows, dim: *dim, dtype: *dtype };
                Ok(Opened::Matrix { matrix: file.matrix(shape)?, ranges })
            }
            Self::Archive(files) => files.archive().map(Opened::Archive),
        }
    }
}

/// A matrix or an archive that is read in place.
enum Opened<'a> {
    Matrix { matrix: Matrix<'a>, ranges: &'a [Range<u64>] },
    Archive(EmbeddingArchive<'a>),
}

impl Opened<'_> {
    /// The embeddings of an image's proposals; `place`: of the image.
    fn rows(&self, image: &ImageInfo, place: usize, n_rows: usize, dim: usize) -> Result<Vec<f32>> {
        match self {
            Self::Matrix { matrix, ranges } => matrix.rows(ranges[place].clone()),
            Self::Archive(archive) => archive.rows(image.id, n_rows, dim),
        }
    }

    /// An error in a row of an image.
    fn malformed(&self, image: &ImageInfo, place: usize, row: usize, problem: &str, hint: &str) -> Error {
        match self {
            Self::Matrix { matrix, ranges } => {
                let problem = format!("row {} (image {}): {problem}", ranges[place].start + row as u64, image.id);
                ovenbird_data::Error::Malformed { path: matrix.path().to_owned(), problem, hint: Some(hint.into()) }.into()
            }
            Self::Archive(archive) => archive.malformed(image.id, &format!("row {row}: {problem}"), hint),
        }
    }

    /// Fails if a file changed since it was opened.
    fn still(&self) -> Result<()> {
        match self {
            Self::Matrix { matrix, .. } => matrix.still(),
            Self::Archive(archive) => archive.still(),
        }
    }
}

fn range_of(image: &ImageInfo, id_map: &IdMap, first_rows: &[u64]) -> Result<Range<u64>> {
    let place = id_map.places.get(&image.id).ok_or_else(|| Error::Input {
        port: ID_MAP.info().name,
        problem: format!("none for image {}, which the annotations have", image.id),
        hint: "use the id map of the proposals of these annotations".into(),
    })?;
    Ok(first_rows[*place]..first_rows[*place] + id_map.counts[*place])
}

impl Stage for Import {
    const KIND: &'static str = "embeddings/import";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[MATRIX.info(), ARCHIVE.info(), PROPOSALS.info(), ID_MAP.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[FEATURES.info()];
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[("dim", (1..=MAX_DIM).contains(&self.dim), "from 1 to 65536")])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let images = inputs.read(ANNOTATIONS)?.load_images()?.images;
        let size = |image: &ImageInfo| format!("{} {}x{}", image.id, image.width, image.height);
        Ok(match Source::of(inputs, &images)? {
            Source::Matrix { file, ranges, n_rows } => {
                let item = |(image, rows): (&ImageInfo, Range<u64>)| {
                    let stated = format!("{} rows {}..{} of {n_rows}", size(image), rows.start, rows.end);
                    Digest::of_list("ovenbird matrix rows 1", [(stated.as_str(), file.file.digest)])
                };
                let items = images.iter().zip(ranges).map(item).collect();
                Units::Independent { items, replaces: vec!["matrix", "id_map", "annotations"] }
            }
            Source::Archive(files) => {
                let digest = files.digest();
                let item = |image: &ImageInfo| Digest::of_list("ovenbird archive rows 1", [(size(image).as_str(), digest)]);
                Units::Independent { items: images.iter().map(item).collect(), replaces: vec!["archive", "annotations"] }
            }
        })
    }

    /// Makes a shard of the rows of every unit; threads read ahead of the one that writes.
    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let images = cx.inputs.read(ANNOTATIONS)?.load_images()?.images;
        let source = Source::of(cx.inputs, &images)?;
        let proposals = cx.inputs.read(PROPOSALS)?.of_images(&images[..cx.items.len().min(images.len())])?;
        if let Source::Matrix { ranges, .. } = &source {
            for ((image, of_image), rows) in images.iter().zip(&proposals).zip(ranges) {
                let n_expected = rows.end - rows.start;
                if of_image.len() as u64 != n_expected {
                    return Err(Error::Input {
                        port: PROPOSALS.info().name,
                        problem: format!("{} of image {}, but the id map has {n_expected}", of_image.len(), image.id),
                        hint: "import the proposals without `max_per_image`, and take `proposals` and `id_map` from the same step".into(),
                    });
                }
            }
        }
        let opened = source.open(self)?;
        match &opened {
            Opened::Matrix { matrix, .. } => matrix.note.iter().for_each(|words| cx.note(words)),
            Opened::Archive(archive) => {
                let n_others = archive.n_others(&images);
                if n_others > 0 {
                    cx.note(format!("embeddings of {n_others} images that the annotations do not have are skipped"));
                }
            }
        }
        for unit in units {
            // A unit that another process makes is passed over.
            let Some(draft) = cx.begin_claimed(unit)? else { continue };
            let dtype = match self.dtype {
                MatrixDtype::F16 => Dtype::F16,
                MatrixDtype::F32 => Dtype::F32,
            };
            // The file does not say which CLIP made it.
            let shard = draft.create(FEATURES, "regions.arrow")?;
            let mut shard = RegionFeaturesWriter::new(shard, &draft.unit().fingerprint, dtype, self.dim, None)?;
            let mut places = unit.items.clone();
            let next = || Ok(places.next().map(|place| (place, proposals[place].len() * self.dim * 4)));
            let prepare = |place: usize| (place, cx.attempt(|| self.regions(&opened, &images[place], &proposals[place], place)));
            let mut n_regions = 0;
            stream(cx.threads, ROOM, next, prepare, |(place, attempted), _| {
                if let Some(regions) = cx.accept_or_skip(&draft, &images[place].file_name, attempted, cx.items.len())? {
                    n_regions += regions.boxes.len();
                    shard.push(regions)?;
                    cx.tick(1);
                }
                cx.proceed()
            })?;
            shard.finish()?;
            opened.still()?;
            cx.commit(draft, [("images".into(), unit.items.len().into()), ("rows".into(), n_regions.into())].into())?;
        }
        Ok(())
    }
}

impl Import {
    /// The regions of an image. Fails where a row is not of unit norm.
    fn regions(&self, opened: &Opened<'_>, image: &ImageInfo, proposals: &[Proposal], place: usize) -> Result<Regions> {
        let embeddings = opened.rows(image, place, proposals.len(), self.dim)?;
        for (row, embedding) in embeddings.chunks_exact(self.dim).enumerate() {
            if let Some(norm) = norm_off_unit(embedding) {
                let (problem, hint) = if norm == 0.0 {
                    (
                        "expected an embedding of unit norm, found zeros".to_owned(),
                        "the extraction was interrupted there: compute the image again",
                    )
                } else {
                    (
                        format!("expected an embedding of unit norm, found norm {norm:.4}"),
                        match opened {
                            Opened::Matrix { .. } => "check `dtype` and `dim`, and that the matrix is of these proposals",
                            Opened::Archive(_) => "compute the embeddings of the image again",
                        },
                    )
                };
                return Err(opened.malformed(image, place, row, &problem, &format!("{hint}; or skip such images: `on_bad_item: skip`")));
            }
        }
        Ok(Regions {
            image_id: image.id,
            size_px: [image.width, image.height],
            boxes: proposals.iter().map(|proposal| proposal.xyxy).collect(),
            objectness: proposals.iter().map(|proposal| proposal.score).collect(),
            embeddings,
        })
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "scratch files of a test")]
mod tests {
    use std::{
        fs,
        io::{Cursor, Write as _},
        path::Path,
    };

    use ovenbird_cache::inputs::digest_path;
    use ovenbird_data::{annotations::ImageId, boxes::Xyxy};
    use ovenbird_models::checkpoint::{Array, Saved, write_torch};
    use tch::Kind;
    use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

    use super::*;
    use crate::artifacts::narrowed;

    /// In the order of the annotations' file; the second one is the first by id.
    const IMAGES: [u64; 3] = [9, 4, 7];
    const DIM: usize = 4;

    /// Row k of an image, of unit norm.
    fn row(image: u64, k: usize) -> [f32; DIM] {
        let (sin, cos) = (image as f32 + k as f32 / 8.0).sin_cos();
        [0.0, sin, 0.0, cos]
    }

    fn rows(image: u64, n: usize) -> Vec<f32> {
        (0..n).flat_map(|k| row(image, k)).collect()
    }

    /// What torch saves of a tensor of `[N, 4]`.
    fn tensor(numbers: &[f32]) -> Vec<u8> {
        let bytes = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let array = Array { kind: Kind::Float, shape: vec![(numbers.len() / DIM) as i64, DIM as i64], bytes };
        saved(&Saved::Array(&array))
    }

    fn saved(value: &Saved<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_torch(value, &mut bytes).unwrap();
        bytes
    }

    fn name(image: u64) -> String {
        format!("data/lvis_clip_image_embedding/train2017/{image:012}.pth")
    }

    fn zipped(members: &[(String, Vec<u8>)]) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (place, (name, content)) in members.iter().enumerate() {
            let method = if place % 2 == 0 { CompressionMethod::Deflated } else { CompressionMethod::Stored };
            zip.start_file(name, SimpleFileOptions::default().compression_method(method)).unwrap();
            zip.write_all(content).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    /// Three rows for every image, in no order.
    fn sound() -> Vec<(String, Vec<u8>)> {
        [7, 9, 4].into_iter().map(|image| (name(image), tensor(&rows(image, 3)))).collect()
    }

    fn inputs(folder: &Path, ports: &[&str]) -> Inputs {
        let images = IMAGES.map(|id| format!(r#"{{"id": {id}, "file_name": "{id}.jpg", "width": 40, "height": 30}}"#)).join(",");
        let annotations = format!(r#"{{"images": [{images}], "annotations": [], "categories": []}}"#);
        fs::write(folder.join("annotations"), annotations).unwrap();
        let files = |port: &&str| ((*port).to_owned(), digest_path(&folder.join(port), None, 0).unwrap());
        Inputs { ports: ports.iter().chain(&["annotations"]).map(files).collect() }
    }

    const IMPORT: Import = Import { dtype: MatrixDtype::F16, dim: DIM };

    fn proposals(n: usize) -> Vec<Proposal> {
        let xyxy = Xyxy { x1: 0.0, y1: 0.0, x2: 4.0, y2: 4.0 };
        (0..n).map(|k| Proposal { xyxy, score: 1.0 - k as f32 / 8.0 }).collect()
    }

    /// The embeddings of an image that has `n` proposals.
    fn read(inputs: &Inputs, image: u64, n: usize) -> Result<Vec<f32>> {
        let images = inputs.read(ANNOTATIONS).unwrap().load_images().unwrap().images;
        let source = Source::of(inputs, &images)?;
        let opened = source.open(&IMPORT)?;
        let place = images.iter().position(|found| found.id == ImageId(image)).unwrap();
        let regions = IMPORT.regions(&opened, &images[place], &proposals(n), place)?;
        opened.still()?;
        assert_eq!((regions.image_id, regions.boxes.len()), (ImageId(image), n));
        Ok(regions.embeddings)
    }

    /// The embeddings of image 4 in an archive of these members.
    fn of_4(members: &[(String, Vec<u8>)], n: usize) -> Result<Vec<f32>> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("archive"), zipped(members)).unwrap();
        read(&inputs(folder.path(), &["archive"]), 4, n)
    }

    fn with(image: u64, content: &[u8]) -> Vec<(String, Vec<u8>)> {
        let mut members = sound();
        members.iter_mut().filter(|(found, _)| *found == name(image)).for_each(|(_, old)| *old = content.to_vec());
        members
    }

    fn problem(result: Result<Vec<f32>>) -> String {
        match result {
            Err(error @ (Error::Data(_) | Error::Models(_))) => {
                assert!(error.hint().is_some(), "{error}");
                error.to_string()
            }
            other => panic!("expected an item that failed, found {other:?}"),
        }
    }

    #[test]
    fn rows_of_an_archive_are_bound_by_the_image_that_their_entry_names() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("archive"), zipped(&sound())).unwrap();
        let inputs = inputs(folder.path(), &["archive"]);
        for image in IMAGES {
            assert_eq!(read(&inputs, image, 3).unwrap(), rows(image, 3));
        }
        let Units::Independent { items, replaces } = IMPORT.units(&inputs).unwrap() else { panic!() };
        assert_eq!((items.len(), replaces), (3, vec!["archive", "annotations"]));
    }

    #[test]
    fn an_archive_in_parts_is_read_as_one() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("archive")).unwrap();
        let bytes = zipped(&sound());
        for (place, part) in bytes.chunks(bytes.len() / 3 + 1).enumerate() {
            fs::write(folder.path().join(format!("archive/embedding.zip.{:03}", place + 1)), part).unwrap();
        }
        for image in IMAGES {
            assert_eq!(read(&inputs(folder.path(), &["archive"]), image, 3).unwrap(), rows(image, 3));
        }
        fs::remove_file(folder.path().join("archive/embedding.zip.002")).unwrap();
        let error = problem(read(&inputs(folder.path(), &["archive"]), 4, 3));
        assert!(error.ends_with("expected the part `embedding.zip.002`, found none among 2"), "{error}");
    }

    /// Parity check 24 of DetPro's specification.
    #[test]
    fn what_is_wrong_with_an_entry_is_said_with_its_name() {
        let entry = format!("entry {}: ", name(4));
        let fails = |members: &[(String, Vec<u8>)], n: usize, expected: &str| {
            let error = problem(of_4(members, n));
            assert!(error.ends_with(&format!("{entry}{expected}")), "{error}");
        };
        fails(&sound(), 4, "expected Float [4, 4], a row for each proposal of image 4, found Float [3, 4]");
        fails(&with(4, &tensor(&rows(4, 2))), 3, "expected Float [3, 4], a row for each proposal of image 4, found Float [2, 4]");
        let mut numbers = rows(4, 3);
        numbers[9] = f32::NAN;
        fails(&with(4, &tensor(&numbers)), 3, "row 2: expected an embedding of unit norm, found norm NaN");
        numbers[8..].fill(0.0);
        fails(&with(4, &tensor(&numbers)), 3, "row 2: expected an embedding of unit norm, found zeros");
        fails(
            &with(4, &tensor(&rows(4, 3).iter().map(|number| number * 1.5).collect::<Vec<_>>())),
            3,
            "row 0: expected an embedding of unit norm, found norm 1.5000",
        );
        let halves = Array { kind: Kind::Half, shape: vec![3, 4], bytes: vec![0; 24] };
        fails(&with(4, &saved(&Saved::Array(&halves))), 3, "expected Float [3, 4], a row for each proposal of image 4, found Half [3, 4]");
        let dict = Saved::Dict([("a".to_owned(), Saved::Array(&halves))].into());
        fails(&with(4, &saved(&dict)), 3, "expected Float [3, 4], a row for each proposal of image 4, found a dict of [\"a\"]");
        let whole = tensor(&rows(4, 3));
        let error = problem(of_4(&with(4, &whole[..whole.len() - 40]), 3));
        assert!(error.contains(&format!("{entry}zip: ")), "{error}");
        let error = problem(of_4(&with(4, b"<html>"), 3));
        assert!(error.contains(&entry) && error.ends_with("found a web page"), "{error}");

        let others: Vec<_> = sound().into_iter().filter(|(found, _)| *found != name(4)).collect();
        let error = problem(of_4(&others, 3));
        assert!(error.ends_with("expected an entry `000000000004.pth`, found none among 2 images"), "{error}");
        let twice = [sound(), vec![("val2017/000000000004.pth".into(), Vec::new())]].concat();
        let error = problem(of_4(&twice, 3));
        assert!(error.ends_with(&format!("two entries for image 4, {} and val2017/000000000004.pth", name(4))), "{error}");
        let error = problem(of_4(&[("4.pth".into(), Vec::new())], 3));
        assert!(error.ends_with("expected entries `000000000009.pth`, found none among 1"), "{error}");
    }

    #[test]
    fn a_flipped_bit_of_an_entry_fails_its_image_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("archive");
        let mut bytes = zipped(&sound());
        // A number of image 9, whose entry is stored.
        let number = row(9, 1)[1].to_le_bytes();
        let at = bytes.windows(4).position(|window| window == number).unwrap();
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
        let inputs = inputs(folder.path(), &["archive"]);
        let error = problem(read(&inputs, 9, 3));
        assert!(error.ends_with(&format!("entry {}: Invalid checksum", name(9))), "{error}");
        assert_eq!(read(&inputs, 4, 3).unwrap(), rows(4, 3));
    }

    #[test]
    fn an_archive_that_changed_since_it_was_hashed_is_not_read() {
        for is_part in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let archive = folder.path().join("archive");
            let bytes = zipped(&sound());
            let (first, second) = if is_part {
                fs::create_dir(&archive).unwrap();
                fs::write(archive.join("a.zip.002"), &bytes[100..]).unwrap();
                (archive.join("a.zip.001"), bytes[..100].to_vec())
            } else {
                (archive, bytes)
            };
            fs::write(&first, &second).unwrap();
            let inputs = inputs(folder.path(), &["archive"]);
            let mut flipped = second;
            flipped[50] ^= 1;
            fs::write(&first, flipped).unwrap();
            let error = read(&inputs, 4, 3).unwrap_err();
            assert_eq!(error.changed_file(), Some(first.as_path()), "{error}");
        }
    }

    #[test]
    fn either_a_matrix_with_its_id_map_or_an_archive_is_given() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["matrix", "archive"] {
            fs::write(folder.path().join(name), zipped(&sound())).unwrap();
        }
        fs::write(folder.path().join("id_map"), r#"{"9": 0, "4": 1, "7": 2, "num_proposal": [3, 3, 3]}"#).unwrap();
        for (ports, expected) in [
            (&["matrix", "archive", "id_map"][..], "archive: expected either `matrix` or `archive`, found both"),
            (&["id_map"], "matrix: expected either `matrix` or `archive`, found neither"),
            (&["matrix"], "id_map: missing, but the rows of a matrix are in its order"),
            (&["archive", "id_map"], "id_map: given, but the entries of an archive name their images"),
        ] {
            let error = IMPORT.units(&inputs(folder.path(), ports)).unwrap_err();
            assert!(error.to_string() == expected && error.hint().is_some(), "{error}");
        }
    }

    /// Rows in the order of the id map, which is not that of ids.
    #[test]
    fn rows_of_a_matrix_are_bound_by_the_id_map() {
        let folder = tempfile::tempdir().unwrap();
        let numbers: Vec<f32> = IMAGES.into_iter().flat_map(|image| rows(image, 3)).collect();
        fs::write(folder.path().join("matrix"), narrowed(&numbers, MatrixDtype::F16, Path::new("matrix")).unwrap()).unwrap();
        fs::write(folder.path().join("id_map"), r#"{"9": 0, "4": 1, "7": 2, "num_proposal": [3, 3, 3]}"#).unwrap();
        let inputs = inputs(folder.path(), &["matrix", "id_map"]);
        for image in IMAGES {
            let found = read(&inputs, image, 3).unwrap();
            assert!(found.iter().zip(rows(image, 3)).all(|(found, expected)| (found - expected).abs() < 5e-4), "{image}");
        }
    }
}
