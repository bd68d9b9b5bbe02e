//! `annotations/folder`: a list of the images in a folder, for pictures without annotations.

use std::path::Path;

use ovenbird_data::{
    annotations::{CategoryId, ImageId},
    classes::ClassSplit,
    images::{Image, is_turned},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{AnnotationFile, Classes, Images, listed},
    feed::in_parallel,
};

/// Extensions of JPEG and PNG files, in lower case.
const EXTENSIONS: &[&str] = &["jpg", "jpeg", "png"];

/// Whether a file is an image by its name.
pub fn is_image(path: &Path) -> bool {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension.as_str()))
}

/// A COCO json of the images in a folder, for stages that read `annotations`: their ids, paths and sizes, without objects.
///
/// Ids are 1, 2, 3, .. in the order of the paths below the folder, byte by byte. Files whose names end in `.jpg`, `.jpeg` or `.png`, in
/// capitals or not, are images; the others are counted in a note. Sizes are those of the stored pixels: EXIF orientation is ignored. An added
/// or removed image changes the ids of the images after it.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Folder {}

const IMAGES: In<Images> = In::required("images", "A folder of JPEG and PNG files, and folders of them.");
const CLASSES: In<Classes> =
    In::optional("classes", "Class names for `categories`, with ids from 0, base classes first; without it there are none.");
const LIST: Out<AnnotationFile> =
    Out::new("annotations", "`images` with `id`, `file_name`, `width`, `height`; `categories`; no `annotations`.");

/// The json that is written.
#[derive(Serialize)]
struct List<'a> {
    images: Vec<Listed<'a>>,
    categories: Vec<Category<'a>>,
    annotations: [(); 0],
}

#[derive(Serialize)]
struct Listed<'a> {
    id: ImageId,
    file_name: &'a str,
    width: u32,
    height: u32,
}

#[derive(Serialize)]
struct Category<'a> {
    id: CategoryId,
    name: &'a str,
}

impl Stage for Folder {
    const KIND: &'static str = "annotations/folder";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), CLASSES.info()];
    const OUTPUTS: &'static [PortInfo] = &[LIST.info()];
    const SKIPS_ITEMS: bool = true;

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let folder = cx.inputs.read(IMAGES)?;
        let classes = cx.inputs.read_if_given(CLASSES)?.map(|Classes(classes)| classes);
        let (mut files, mut others) = (Vec::new(), Vec::new());
        for file in folder.files() {
            if is_image(&file.path) {
                files.push(file);
            } else {
                others.push(file.name.as_str());
            }
        }
        if files.is_empty() {
            return Err(Error::Input {
                port: IMAGES.info().name,
                problem: format!(
                    "expected JPEG and PNG files in the folder, found none among {} files (by their names: .jpg, .jpeg, .png)",
                    others.len()
                ),
                hint: "point `images` at the folder of the pictures, or convert them to JPEG or PNG".into(),
            });
        }
        if !others.is_empty() {
            cx.note(format!("{} files are not named .jpg, .jpeg or .png, and are left out: {}", others.len(), listed(&others)));
        }
        files.truncate(cx.most_items.unwrap_or(usize::MAX));
        cx.total(files.len() as u64);
        let draft = cx.begin(unit)?;
        let sizes = in_parallel(files.len(), cx.threads, |place| {
            cx.proceed()?;
            let attempted = cx.attempt(|| {
                let bytes = files[place].read()?;
                Ok((Image::size(&bytes, &files[place].path)?, is_turned(&bytes)))
            });
            if attempted.result.is_ok() {
                cx.tick(1);
            }
            Ok(attempted)
        })?;
        let (mut images, mut turned) = (Vec::new(), Vec::new());
        for (file, attempted) in files.iter().zip(sizes) {
            let Some(([width, height], is_turned)) = cx.accept_or_skip(&draft, &file.name, attempted, files.len())? else { continue };
            images.push(Listed { id: ImageId(images.len() as u64 + 1), file_name: &file.name, width, height });
            if is_turned {
                turned.push(file.name.as_str());
            }
        }
        if !turned.is_empty() {
            let n_turned = turned.len();
            let words = "with an EXIF orientation, by which viewers turn or mirror them, used as stored";
            cx.note(format!("images {words}: {n_turned}: {}", listed(&turned)));
        }
        let names = classes.iter().flat_map(ClassSplit::all);
        let categories = names.enumerate().map(|(id, name)| Category { id: CategoryId(id as u64), name }).collect();
        let n_images = images.len();
        let list = List { images, categories, annotations: [] };
        draft.write(LIST, "annotations.json", &serde_json::to_vec(&list).expect("BUG: names and sizes are plain JSON"))?;
        cx.commit(draft, [("images".into(), n_images.into())].into())
    }
}
