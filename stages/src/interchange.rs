//! Features from and for the OADP reference: `globals/import`, `blocks/import`, `objects/import`, and the same with `export`.
//!
//! The layout of the files is in `artifacts/feature_files.rs`. Both ways embeddings keep their bits where they are stored in f16; boxes
//! and objectness are f16 in the files (the reference's defect 4) and f32 here. What the reference gets wrong in the files is mended or
//! refused: boxes of whole images (defect 2), files that are cut short (defect 8).

use ovenbird_data::{
    annotations::{Annotations, ImageInfo},
    boxes::Xyxy,
    views,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Result, Stage, Unit, UnitDraft, Units,
    artifacts::{
        AnnotationFile, Dtype, FeatureFiles, ImageFeatures, Piece, Places, RegionFeatures, Regions, Row, RowKind, RowWriter,
        feature_files::{Holds, Read, box_problem, file_name, slack_px, write_global, write_regions},
    },
    clip::WholeBox,
    contract::{Attempted, write_error},
    feed::{in_parallel, stream},
};

/// Bytes of files that may be ahead of the writer.
const ROOM: usize = 256 << 20;

const FILES: In<FeatureFiles> = In::required("files", "One `{id:012}.pth` an image; files of other images are left alone.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json: which images, their ids and sizes.");
const GLOBALS: Out<ImageFeatures> = Out::new("features", "By image: `image_id` u64, `embedding` f16 [D], unit norm.");
const REGIONS: Out<RegionFeatures> =
    Out::new("features", "By image: `embedding` f16 [N, D] of unit norm, `xyxy` f32 [N, 4] px, `objectness` f32 [N].");

/// Embeddings of whole images that the OADP reference extracted, checked.
///
/// Of every image of the annotations the file `{id:012}.pth`: a tensor f16 [D] of unit norm. (OADP, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GlobalsImport {}

impl Stage for GlobalsImport {
    const KIND: &'static str = "globals/import";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[FILES.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[GLOBALS.info()];

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        file_units(inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let files = cx.inputs.read(FILES)?;
        import(units, cx, &files, RowKind::Image(Dtype::F16), |image| {
            let Read { row, dim } = files.global(image)?;
            Ok(Read { row: Row::Image(image.id, row), dim })
        })
    }
}

/// Embeddings of blocks that the OADP reference extracted, checked.
///
/// Of every image of the annotations the file `{id:012}.pth`: a dict of `embeddings` f16 [N, D] of unit norm and `bboxes` f16 [N, 4]. The
/// first block is the whole image. (OADP, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BlocksImport {
    /// What becomes of the first row's box, which files may have either way: with `fixed` it is the centre square that the embedding
    /// shows, from the image's size; with `reference` it is kept as found, and refused where that is inside out (of images more than
    /// three times as long as high).
    pub whole_box: WholeBox,
}

impl Stage for BlocksImport {
    const KIND: &'static str = "blocks/import";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[FILES.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[REGIONS.info()];

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        file_units(inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let files = cx.inputs.read(FILES)?;
        import(units, cx, &files, RowKind::Regions(Dtype::F16), |image| {
            let Read { mut row, dim } = files.regions(image, Holds::Blocks)?;
            self.check_boxes(&mut row, image, &files)?;
            Ok(Read { row: Row::Regions(row), dim })
        })
    }
}

impl BlocksImport {
    fn check_boxes(&self, blocks: &mut Regions, image: &ImageInfo, files: &FeatureFiles) -> Result<()> {
        let size = blocks.size_px;
        let [fixed, reference] = [views::whole_box(size), views::reference_whole_box(size)];
        let slack = slack_px(size);
        let corners = |xyxy: &Xyxy| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2];
        let is_near = |a: &Xyxy, b: &Xyxy| corners(a).iter().zip(corners(b)).all(|(a, b)| (a - b).abs() <= slack);
        let others_hint = "these blocks seem to be of another image: give the annotations that they were extracted for";
        match blocks.boxes.first_mut() {
            Some(first) if is_near(first, &fixed) || is_near(first, &reference) => match self.whole_box {
                WholeBox::Fixed => *first = fixed,
                WholeBox::Reference => {
                    if let Some(problem) = box_problem(&[*first], 0, size) {
                        return Err(files.malformed(image, problem, "mend the boxes of whole images: `with: {whole_box: fixed}`"));
                    }
                }
            },
            Some(first) => {
                let [fixed, reference, found] = [fixed, reference, *first].map(|xyxy| corners(&xyxy));
                let problem = format!("bboxes, row 0: expected the whole image's box, {fixed:?} or {reference:?}, found {found:?}");
                return Err(files.malformed(image, problem, others_hint));
            }
            None => return Err(files.malformed(image, "bboxes: expected the whole image's box, found none".into(), others_hint)),
        }
        match box_problem(&blocks.boxes[1..], 1, size) {
            Some(problem) => Err(files.malformed(image, problem, others_hint)),
            None => Ok(()),
        }
    }
}

/// Embeddings of objects that the OADP reference extracted, checked.
///
/// Of every image of the annotations the file `{id:012}.pth`: a dict of `embeddings` f16 [N, D] of unit norm, `bboxes` f16 [N, 4] in the
/// image and `objectness` f16 [N, 1] in [0, 1]. All rows are kept: the reference drops boxes below 4 px once more when it trains, of which
/// f16 makes some (its defect 4). (OADP, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ObjectsImport {}

impl Stage for ObjectsImport {
    const KIND: &'static str = "objects/import";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[FILES.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[REGIONS.info()];

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        file_units(inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let files = cx.inputs.read(FILES)?;
        import(units, cx, &files, RowKind::Regions(Dtype::F16), |image| {
            let Read { row, dim } = files.regions(image, Holds::Objects)?;
            if let Some(problem) = box_problem(&row.boxes, 0, row.size_px) {
                let hint = "these objects seem to be of another image: give the annotations that they were extracted for";
                return Err(files.malformed(image, problem, hint));
            }
            Ok(Read { row: Row::Regions(row), dim })
        })
    }
}

/// Units of stages whose items are images with a file each.
fn file_units(inputs: &Inputs) -> Result<Units> {
    let items = inputs.read(FILES)?.items(&inputs.read(ANNOTATIONS)?.load_images()?.images)?;
    Ok(Units::Independent { items, replaces: vec!["files", "annotations"] })
}

/// Makes shards of the files of every image; threads read ahead of the one that writes.
fn import(
    units: &[Unit],
    cx: &Context<'_>,
    files: &FeatureFiles,
    rows: RowKind,
    read: impl Fn(&ImageInfo) -> Result<Read<Row>> + Sync,
) -> Result<()> {
    let Annotations { images, .. } = cx.inputs.read(ANNOTATIONS)?.load_images()?;
    let n_others = files.n_others(&images);
    if n_others > 0 {
        cx.note(format!("{n_others} files are of images that the annotations do not have, and are left alone"));
    }
    for unit in units {
        // One that another process makes is passed by.
        let Some(draft) = cx.begin_claimed(unit)? else { continue };
        let mut places = unit.items.clone();
        let next = || Ok(places.next().map(|place| (place, files.n_bytes(&images[place]))));
        let prepare = |place: usize| (place, cx.attempt(|| read(&images[place])));
        let (mut shard, mut n_rows) = (None, 0);
        stream(cx.threads, ROOM, next, prepare, |(place, Attempted { result, attempts }), _| {
            let image = &images[place];
            let result = result.and_then(|read| match &shard {
                Some((_, dim)) if read.dim != *dim => {
                    let problem = format!("expected embeddings of {dim} numbers, as in the files before, found {}", read.dim);
                    Err(files.malformed(image, problem, "give a folder of one CLIP's features"))
                }
                Some(_) | None => Ok(read),
            });
            if let Some(read) = cx.kept(&draft, &file_name(image.id), Attempted { result, attempts }, cx.items.len())? {
                n_rows += read.row.len();
                if shard.is_none() {
                    shard = Some((begin(&draft, rows, read.dim)?, read.dim));
                }
                let (writer, _) = shard.as_mut().expect("BUG: it was begun just now");
                writer.push(read.row)?;
                cx.tick(1);
            }
            cx.proceed()
        })?;
        // Of files none of which can be read there are no rows, of any width.
        let writer = match shard {
            Some((writer, _)) => writer,
            None => begin(&draft, rows, 0)?,
        };
        writer.finish()?;
        cx.commit(draft, [("images".into(), unit.items.len().into()), ("rows".into(), n_rows.into())].into())?;
    }
    Ok(())
}

fn begin(draft: &UnitDraft, rows: RowKind, dim: usize) -> Result<RowWriter> {
    // These files do not say which CLIP they are of.
    RowWriter::new(rows, draft.create_at("features", rows.file_name())?, &draft.unit().fingerprint, dim, None)
}

const IMAGE_FEATURES: In<ImageFeatures> = In::required("features", "Embeddings of whole images.");
const REGION_FEATURES: In<RegionFeatures> = In::required("features", "Embeddings of regions.");
const WRITTEN: Out<FeatureFiles> = Out::new("files", "One `{id:012}.pth` an image.");

/// Embeddings of whole images as files that the OADP reference reads.
///
/// An image's file `{id:012}.pth` is a tensor f16 [D], which `torch.load(weights_only=True)` reads. (OADP, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GlobalsExport {}

impl Stage for GlobalsExport {
    const KIND: &'static str = "globals/export";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[IMAGE_FEATURES.info()];
    const OUTPUTS: &'static [PortInfo] = &[WRITTEN.info()];

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        Ok(row_units(&inputs.read(IMAGE_FEATURES)?.places()?))
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let features = cx.inputs.read(IMAGE_FEATURES)?;
        let places = features.places()?;
        export(units, cx, &places, |draft, piece| {
            for (image, embedding) in places.images(piece)? {
                write_file(draft, &file_name(image), |out| write_global(&embedding, out))?;
                cx.tick(1);
                cx.proceed()?;
            }
            Ok(())
        })
    }
}

/// Embeddings of blocks as files that the OADP reference reads.
///
/// An image's file `{id:012}.pth` is a dict of `embeddings` f16 [N, D] and `bboxes` f16 [N, 4], which `torch.load(weights_only=True)`
/// reads. (OADP, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BlocksExport {
    /// The first row's box, whichever the features have. The reference trains better on `fixed`, and as ever on `reference`.
    pub whole_box: WholeBox,
}

impl Stage for BlocksExport {
    const KIND: &'static str = "blocks/export";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[REGION_FEATURES.info()];
    const OUTPUTS: &'static [PortInfo] = &[WRITTEN.info()];

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        Ok(row_units(&inputs.read(REGION_FEATURES)?.places()?))
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        export_regions(units, cx, Holds::Blocks, |blocks| {
            let whole = self.whole_box.of(blocks.size_px);
            let is_whole = |xyxy: &Xyxy| *xyxy == views::whole_box(blocks.size_px) || *xyxy == views::reference_whole_box(blocks.size_px);
            match blocks.boxes.first_mut() {
                Some(first) if is_whole(first) => *first = whole,
                Some(_) | None => {
                    return Err(Error::Input {
                        port: REGION_FEATURES.info().name,
                        problem: format!("image {}: the first region is not the whole image: these are no blocks", blocks.image_id),
                        hint: "give what `clip/blocks` made; objects have `objects/export`".into(),
                    });
                }
            }
            Ok(())
        })
    }
}

/// Embeddings of objects as files that the OADP reference reads.
///
/// An image's file `{id:012}.pth` is a dict of `embeddings` f16 [N, D], `bboxes` f16 [N, 4] and `objectness` f16 [N, 1], which
/// `torch.load(weights_only=True)` reads. (OADP, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ObjectsExport {}

impl Stage for ObjectsExport {
    const KIND: &'static str = "objects/export";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[REGION_FEATURES.info()];
    const OUTPUTS: &'static [PortInfo] = &[WRITTEN.info()];

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        Ok(row_units(&inputs.read(REGION_FEATURES)?.places()?))
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        export_regions(units, cx, Holds::Objects, |_| Ok(()))
    }
}

/// Units of stages whose items are rows of features.
fn row_units(places: &Places<'_>) -> Units {
    Units::Independent { items: places.items(), replaces: vec!["features"] }
}

fn export_regions(units: &[Unit], cx: &Context<'_>, holds: Holds, change: impl Fn(&mut Regions) -> Result<()> + Sync) -> Result<()> {
    let features = cx.inputs.read(REGION_FEATURES)?;
    let places = features.places()?;
    export(units, cx, &places, |draft, piece| {
        let (rows, dim) = places.regions(piece)?;
        for regions in rows {
            let mut regions = regions?;
            change(&mut regions)?;
            write_file(draft, &file_name(regions.image_id), |out| write_regions(&regions, dim, holds, out))?;
            cx.tick(1);
            cx.proceed()?;
        }
        Ok(())
    })
}

/// Makes units of files, piece by piece on threads.
fn export(units: &[Unit], cx: &Context<'_>, places: &Places<'_>, write: impl Fn(&UnitDraft, &Piece) -> Result<()> + Sync) -> Result<()> {
    for unit in units {
        let Some(draft) = cx.begin_claimed(unit)? else { continue };
        let pieces = places.pieces(&unit.items);
        in_parallel(pieces.len(), cx.threads, |place| write(&draft, &pieces[place]))?;
        cx.commit(draft, [("images".into(), unit.items.len().into())].into())?;
    }
    Ok(())
}

fn write_file(draft: &UnitDraft, name: &str, write: impl FnOnce(&mut ovenbird_cache::DraftFile) -> std::io::Result<()>) -> Result<()> {
    let mut file = draft.create(WRITTEN, name)?;
    let path = file.path().to_owned();
    write(&mut file).map_err(|source| write_error(&path, source))?;
    Ok(file.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifacts::feature_files::tests::{golden, golden_files, golden_image, image};

    #[test]
    fn the_box_of_the_whole_image_is_mended_or_kept_and_never_inside_out() {
        let (files, golden) = (golden_files("blocks"), golden());
        let found = |place: usize, whole_box: WholeBox| {
            let image = golden_image(&golden[place]);
            let Read { mut row, .. } = files.regions(&image, Holds::Blocks).unwrap();
            let stage = BlocksImport { whole_box };
            stage.check_boxes(&mut row, &image, &files).map(|()| row.boxes[0]).map_err(|error| (error.to_string(), error.hint()))
        };
        assert_eq!(found(0, WholeBox::Fixed).unwrap(), Xyxy::from([80.0, 0.0, 560.0, 480.0]));
        assert_eq!(found(0, WholeBox::Reference).unwrap(), Xyxy::from([80.0, 0.0, 480.0, 480.0]));
        assert_eq!(found(1, WholeBox::Fixed).unwrap(), Xyxy::from([0.0, 83.5, 333.0, 416.5]));
        // 700 x 200.
        assert_eq!(found(2, WholeBox::Fixed).unwrap(), Xyxy::from([250.0, 0.0, 450.0, 200.0]));
        let (problem, hint) = found(2, WholeBox::Reference).unwrap_err();
        assert!(problem.ends_with("000000000139.pth: bboxes, row 0: box [250, 0, 200, 200] is inside out"), "{problem}");
        assert_eq!(hint.unwrap(), "mend the boxes of whole images: `with: {whole_box: fixed}`");
    }

    #[test]
    fn blocks_of_another_image_are_found_out() {
        let (files, golden) = (golden_files("blocks"), golden());
        let Read { row, .. } = files.regions(&golden_image(&golden[0]), Holds::Blocks).unwrap();
        let problem = |size: [u32; 2], change: fn(&mut Regions)| {
            let mut row = Regions { size_px: size, ..row.clone() };
            change(&mut row);
            BlocksImport::default().check_boxes(&mut row, &image(9, size), &files).unwrap_err().to_string()
        };
        let turned = problem([480, 640], |_| {});
        assert!(turned.contains("bboxes, row 0: expected the whole image's box, [0.0, 80.0, 480.0, 560.0] or"), "{turned}");
        let none = problem([640, 480], |row| row.boxes.clear());
        assert!(none.ends_with("bboxes: expected the whole image's box, found none"), "{none}");
        let inside_out = problem([640, 480], |row| row.boxes[2] = Xyxy::from([9.0, 1.0, 3.0, 2.0]));
        assert!(inside_out.ends_with("bboxes, row 2: box [9, 1, 3, 2] is inside out"), "{inside_out}");
        let outside = problem([640, 480], |row| row.boxes[1] = Xyxy::from([9.0, 1.0, 643.0, 2.0]));
        assert!(outside.ends_with("bboxes, row 1: box [9, 1, 643, 2] leaves the image of 640 x 480 px"), "{outside}");
    }
}
