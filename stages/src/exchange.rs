//! Features from and for other programs, as a folder with one file an image: one import and one export for every kind of features.
//!
//! A kind of features says how a file becomes a row ([`Readable`]) and a row a file ([`Writable`]). The layout of the files is in
//! `artifacts/feature_files.rs`. Both ways embeddings keep their bits where they are stored in f16; boxes and objectness are f16 in the
//! files (the reference's defect 4) and f32 here. What the reference gets wrong in the files is corrected or refused: boxes of whole images
//! (defect 2), files that are cut short (defect 8).

use std::{borrow::Cow, io};

use ovenbird_cache::DraftFile;
use ovenbird_data::annotations::{Annotations, ImageId, ImageInfo};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    Artifact, Context, In, Inputs, Out, PortInfo, Result, Stage, Unit, UnitDraft, Units,
    artifacts::{
        AnnotationFile, FeatureFiles, Piece, Places, Row, RowKind, RowWriter,
        feature_files::{Read, file_name},
    },
    context::Attempted,
    error::write_error,
    feed::{in_parallel, stream},
};

/// Bytes of files that may be ahead of the writer.
const ROOM: usize = 256 << 20;

const FILES: In<FeatureFiles> = In::required("files", "One `{id:012}.pth` an image; files of other images are left alone.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json: which images, their ids and sizes.");

/// Parameters of an import: how an image's file becomes its row.
pub(crate) trait Readable: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// See [`Stage::KIND`].
    const KIND: &'static str;
    /// The output port, `features`.
    const FEATURES: PortInfo;
    /// What a unit's rows are.
    const ROWS: RowKind;

    /// Reads and checks an image's file.
    fn read(&self, files: &FeatureFiles, image: &ImageInfo) -> Result<Read<Row>>;
}

/// A stage that reads features of other programs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Import<P>(P);

// A derived schema would have the documentation of this struct.
impl<P: JsonSchema> JsonSchema for Import<P> {
    fn schema_name() -> Cow<'static, str> {
        P::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        P::json_schema(generator)
    }
}

impl<P: Readable> Stage for Import<P> {
    const KIND: &'static str = P::KIND;
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[FILES.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[P::FEATURES];
    const SKIPS_ITEMS: bool = true;

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let items = inputs.read(FILES)?.items(&inputs.read(ANNOTATIONS)?.load_images()?.images)?;
        Ok(Units::Independent { items, replaces: vec!["files", "annotations"] })
    }

    /// Makes a shard of the files of every unit; threads read ahead of the one that writes.
    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let files = cx.inputs.read(FILES)?;
        let Annotations { images, .. } = cx.inputs.read(ANNOTATIONS)?.load_images()?;
        let n_others = files.n_others(&images);
        if n_others > 0 {
            cx.note(format!("{n_others} files are of images that the annotations do not have, and are left alone"));
        }
        for unit in units {
            // A unit that another process makes is passed over.
            let Some(draft) = cx.begin_claimed(unit)? else { continue };
            let mut places = unit.items.clone();
            let next = || Ok(places.next().map(|place| (place, files.n_bytes(&images[place]))));
            let prepare = |place: usize| (place, cx.attempt(|| self.0.read(&files, &images[place])));
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
                let attempted = Attempted { result, attempts };
                if let Some(read) = cx.accept_or_skip(&draft, &file_name(image.id), attempted, cx.items.len())? {
                    n_rows += read.row.len();
                    if shard.is_none() {
                        shard = Some((begin(&draft, P::ROWS, read.dim)?, read.dim));
                    }
                    let (writer, _) = shard.as_mut().expect("BUG: it was begun just now");
                    writer.push(read.row)?;
                    cx.tick(1);
                }
                cx.proceed()
            })?;
            // If no file can be read, there are no rows, and their width does not matter.
            let writer = match shard {
                Some((writer, _)) => writer,
                None => begin(&draft, P::ROWS, 0)?,
            };
            writer.finish()?;
            cx.commit(draft, [("images".into(), unit.items.len().into()), ("rows".into(), n_rows.into())].into())?;
        }
        Ok(())
    }
}

fn begin(draft: &UnitDraft, rows: RowKind, dim: usize) -> Result<RowWriter> {
    // The files do not say which CLIP made them.
    RowWriter::new(rows, draft.create_at("features", rows.file_name())?, &draft.unit().fingerprint, dim, None)
}

const WRITTEN: Out<FeatureFiles> = Out::new("files", "One `{id:012}.pth` an image.");

/// Parameters of an export: how an image's row becomes its file.
pub(crate) trait Writable: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// See [`Stage::KIND`].
    const KIND: &'static str;
    /// What the features are read as.
    type Features: Artifact;
    /// The input port, `features`.
    const FEATURES: In<Self::Features>;

    /// The rows of features by their places.
    fn places(features: &Self::Features) -> Result<Places<'_>>;

    /// Writes the file of each image of a piece.
    fn write(&self, places: &Places<'_>, piece: &Piece, files: &FileWriter<'_>) -> Result<()>;
}

/// A stage that writes features for other programs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Export<P>(P);

// A derived schema would have the documentation of this struct.
impl<P: JsonSchema> JsonSchema for Export<P> {
    fn schema_name() -> Cow<'static, str> {
        P::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        P::json_schema(generator)
    }
}

impl<P: Writable> Stage for Export<P> {
    const KIND: &'static str = P::KIND;
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[P::FEATURES.info()];
    const OUTPUTS: &'static [PortInfo] = &[WRITTEN.info()];

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let features = inputs.read(P::FEATURES)?;
        Ok(Units::Independent { items: P::places(&features)?.items(), replaces: vec!["features"] })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let features = cx.inputs.read(P::FEATURES)?;
        let places = P::places(&features)?;
        for unit in units {
            let Some(draft) = cx.begin_claimed(unit)? else { continue };
            let (pieces, files) = (places.pieces(&unit.items), FileWriter { draft: &draft, cx });
            in_parallel(pieces.len(), cx.threads, |place| self.0.write(&places, &pieces[place], &files))?;
            cx.commit(draft, [("images".into(), unit.items.len().into())].into())?;
        }
        Ok(())
    }
}

/// Writes the files of a unit, on several threads.
pub(crate) struct FileWriter<'a> {
    draft: &'a UnitDraft,
    cx: &'a Context<'a>,
}

impl FileWriter<'_> {
    /// Writes an image's file. Fails once the stage should stop.
    pub(crate) fn write(&self, image: ImageId, write: impl FnOnce(&mut DraftFile) -> io::Result<()>) -> Result<()> {
        let mut file = self.draft.create(WRITTEN, &file_name(image))?;
        let path = file.path().to_owned();
        write(&mut file).map_err(|source| write_error(&path, source))?;
        file.finish()?;
        self.cx.tick(1);
        self.cx.proceed()
    }
}
