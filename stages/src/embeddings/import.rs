//! `embeddings/import`: embeddings of proposals in one matrix that another program made.

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
        AnnotationFile, Dtype, IdMapFile, Matrix, MatrixDtype, MatrixFile, MatrixShape, Proposals, RegionFeatures, RegionFeaturesWriter,
        Regions,
    },
    feed::stream,
};

/// Bytes of rows that may be ahead of the writer.
const ROOM: usize = 256 << 20;
/// The most numbers of a row.
const MAX_DIM: usize = 65_536;
/// By how much the norm of a stored embedding may differ from 1: f16 has three digits.
const NORM_TOLERANCE: f64 = 2e-3;

/// Embeddings of proposals in one matrix that another program made, checked: LP-OVOD's `coco_clip_emb_train.pth`.
///
/// The matrix has a row for each proposal, in the order of the pickle that `proposals/import` read: `proposals` and `id_map` are its outputs. A
/// file without a header says neither its number format nor its width: both are parameters, and its size must be that of all proposals. Rows
/// that are not of unit norm, such as the zeros that an interrupted extraction leaves, make their image an item that failed. (LP-OVOD,
/// sections 1, 3.4 and 12.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Import {
    /// The number format of the matrix.
    pub dtype: MatrixDtype,
    /// The numbers of a row: 512 for ViT-B/32.
    pub dim: usize,
}

impl Default for Import {
    fn default() -> Self {
        Self { dtype: MatrixDtype::F16, dim: 512 }
    }
}

const MATRIX: In<MatrixFile> = In::required("matrix", "Rows of numbers without a header, or a `.npy` [N, D].");
const PROPOSALS: In<Proposals> = In::required("proposals", "The proposals that the rows are of, all of them (`proposals/import`).");
const ID_MAP: In<IdMapFile> = In::required("id_map", "The order of the rows (`proposals/import`).");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json: which images, their ids and sizes.");
const FEATURES: Out<RegionFeatures> =
    Out::new("features", "By image: `embedding` [N, D] of unit norm, `xyxy` f32 [N, 4] px, `objectness` f32 [N].");

/// The rows of each image.
struct Rows {
    images: Vec<ImageInfo>,
    /// Of each image.
    ranges: Vec<Range<u64>>,
    /// The rows of the matrix.
    n_rows: u64,
}

impl Rows {
    fn of(inputs: &Inputs) -> Result<Self> {
        let images = inputs.read(ANNOTATIONS)?.load_images()?.images;
        let IdMapFile(id_map) = inputs.read(ID_MAP)?;
        let (first_rows, n_rows) = id_map.first_rows();
        let range = |image: &ImageInfo| range_of(image, &id_map, &first_rows);
        Ok(Self { ranges: images.iter().map(range).collect::<Result<_>>()?, images, n_rows })
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
    const INPUTS: &'static [PortInfo] = &[MATRIX.info(), PROPOSALS.info(), ID_MAP.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[FEATURES.info()];
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[("dim", (1..=MAX_DIM).contains(&self.dim), "from 1 to 65536")])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let Rows { images, ranges, n_rows } = Rows::of(inputs)?;
        let matrix = inputs.read(MATRIX)?.file.digest;
        let item = |(image, rows): (&ImageInfo, Range<u64>)| {
            let stated = format!("{} {}x{} rows {}..{} of {n_rows}", image.id, image.width, image.height, rows.start, rows.end);
            Digest::of_list("ovenbird matrix rows 1", [(stated.as_str(), matrix)])
        };
        Ok(Units::Independent { items: images.iter().zip(ranges).map(item).collect(), replaces: vec!["matrix", "id_map", "annotations"] })
    }

    /// Makes a shard of the rows of every unit; threads read ahead of the one that writes.
    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Rows { images, ranges, n_rows } = Rows::of(cx.inputs)?;
        let proposals = cx.inputs.read(PROPOSALS)?.of_images(&images[..cx.items.len().min(images.len())])?;
        for ((image, of_image), rows) in images.iter().zip(&proposals).zip(&ranges) {
            let n_expected = rows.end - rows.start;
            if of_image.len() as u64 != n_expected {
                return Err(Error::Input {
                    port: PROPOSALS.info().name,
                    problem: format!("{} of image {}, but the id map has {n_expected}", of_image.len(), image.id),
                    hint: "import the proposals without `max_per_image`, and take `proposals` and `id_map` from the same step".into(),
                });
            }
        }
        let file = cx.inputs.read(MATRIX)?;
        let matrix = file.matrix(MatrixShape { n_rows, dim: self.dim, dtype: self.dtype })?;
        matrix.note.iter().for_each(|words| cx.note(words));
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
            let bytes = |rows: &Range<u64>| (rows.end - rows.start) as usize * self.dim * 4;
            let next = || Ok(places.next().map(|place| (place, bytes(&ranges[place]))));
            let prepare =
                |place: usize| (place, cx.attempt(|| self.regions(&matrix, &images[place], &proposals[place], ranges[place].clone())));
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
            matrix.still()?;
            cx.commit(draft, [("images".into(), unit.items.len().into()), ("rows".into(), n_regions.into())].into())?;
        }
        Ok(())
    }
}

impl Import {
    /// The regions of an image. Fails where a row is not of unit norm.
    fn regions(&self, matrix: &Matrix<'_>, image: &ImageInfo, proposals: &[Proposal], rows: Range<u64>) -> Result<Regions> {
        let embeddings = matrix.rows(rows.clone())?;
        for (row, embedding) in rows.zip(embeddings.chunks_exact(self.dim)) {
            let norm = embedding.iter().map(|number| f64::from(*number).powi(2)).sum::<f64>().sqrt();
            if !norm.is_finite() || (norm - 1.0).abs() >= NORM_TOLERANCE {
                let (problem, hint) = if norm == 0.0 {
                    (
                        "expected an embedding of unit norm, found zeros".to_owned(),
                        "the extraction was interrupted there: compute the image again",
                    )
                } else {
                    (
                        format!("expected an embedding of unit norm, found norm {norm:.4}"),
                        "check `dtype` and `dim`, and that the matrix is of these proposals",
                    )
                };
                let problem = format!("row {row} (image {}): {problem}", image.id);
                let hint = Some(format!("{hint}; or skip such images: `on_bad_item: skip`"));
                return Err(ovenbird_data::Error::Malformed { path: matrix.path().to_owned(), problem, hint }.into());
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
