//! `web/export`: downloaded images as img2dataset leaves them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{
        Downloads, Images, Img2dataset,
        img2dataset::{Metadata, SHARD_PLACES, key},
    },
    class_folder::folder_name,
};

/// Downloaded images in folders as img2dataset leaves them: `CLASS/00000/000000017.jpg` with its `.json`; 17 is the rank of the link.
///
/// Files are the same bytes as before: not resized, and named `.webp` or `.gif` where they are, which some readers pass over. Class names that no
/// folder can have are written as by `crops/folder`.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Export {}

const IMAGES: In<Images> = In::required("images", "The images.");
const DOWNLOADS: In<Downloads> = In::required("downloads", "The table that was made with them.");
const FOLDER: Out<Img2dataset> = Out::new("folder", "`CLASS/00000/000000017.jpg` and `.json`.");

impl Stage for Export {
    const KIND: &'static str = "web/export";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), DOWNLOADS.info()];
    const OUTPUTS: &'static [PortInfo] = &[FOLDER.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let (images, downloads) = (cx.inputs.read(IMAGES)?, cx.inputs.read(DOWNLOADS)?);
        cx.total(downloads.by_class.len() as u64);
        let draft = cx.begin(unit)?;
        let (mut n_images, mut n_others) = (0_u64, 0_u64);
        for of_class in &downloads.by_class {
            let folder = folder_name(&of_class.class);
            for row in &of_class.rows {
                let Some(file) = &row.file else { continue };
                cx.proceed()?;
                let (shard, place) = (u64::from(row.rank) / SHARD_PLACES, u64::from(row.rank) % SHARD_PLACES);
                let key = key(shard, place);
                let extension = file.rsplit_once('.').map_or("jpg", |(_, extension)| extension);
                let [width, height] = row.size.map_or([None; 2], |size| size.map(Some));
                let metadata = Metadata {
                    url: row.url.clone(),
                    key: key.clone(),
                    status: "success".into(),
                    error_message: None,
                    width,
                    height,
                    original_width: width,
                    original_height: height,
                    sha256: row.sha256.clone(),
                };
                let json = serde_json::to_vec(&metadata).expect("BUG: names and numbers are plain JSON");
                let bytes = images.file(file)?.read()?;
                draft.write(FOLDER, &format!("{folder}/{shard:05}/{key}.{extension}"), &bytes)?;
                draft.write(FOLDER, &format!("{folder}/{shard:05}/{key}.json"), &json)?;
                n_images += 1;
                n_others += u64::from(!["jpg", "png"].contains(&extension));
            }
            cx.tick(1);
        }
        if n_others > 0 {
            cx.note(format!("{n_others} of {n_images} images are WebP or GIF, and keep their format"));
        }
        cx.commit(draft, [("images".into(), n_images.into())].into())
    }
}
