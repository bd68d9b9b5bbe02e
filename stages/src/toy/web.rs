//! `toy/web`: the toy world's captioned pictures as a pool that somebody published.

use std::collections::BTreeMap;

use md5::{Digest as _, Md5};
use ovenbird_data::toy::{self, Trouble};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{
        AnnotationFile, Caption, Captions, ImageFeatures, Images, MatrixDtype, MetadataColumn, MetadataWriter, Pool, PublishedLinks,
        narrowed, npy_header,
    },
};

/// Captioned pictures of the toy world as a pool: it takes the place of LAION, in its layout, with its faults.
///
/// Of a hundred links some ten are dead, and others lead to a web page, to another picture than before, to half of one, or to where robots may not go; some
/// rows are marked as unsafe for work, or have the URL of another row. `cargo run --release --example toy-web` serves the pictures on this machine.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Web {
    /// The seed of the world.
    pub seed: u64,
    /// Where the pictures are served.
    pub address: String,
}

impl Default for Web {
    fn default() -> Self {
        Self { seed: 7, address: "http://127.0.0.1:8391".into() }
    }
}

const IMAGES: In<Images> = In::required("images", "The web images of `toy/world`.");
const CAPTIONS: In<Captions> = In::required("captions", "Their alt text.");
const FEATURES: In<ImageFeatures> = In::required("features", "Their embeddings (`clip/globals`).");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "The json that the embeddings were made for (`annotations/folder`).");
const POOL: Out<Pool> = Out::new("pool", "`img_emb_0.npy` f16 [N, D] and `metadata_0.parquet`: `url`, `caption`, `md5`, `NSFW`.");
const TABLE: Out<PublishedLinks> = Out::new("table", "URLs and texts, tab-separated, as CC12M publishes them.");

impl Stage for Web {
    const KIND: &'static str = "toy/web";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), CAPTIONS.info(), FEATURES.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[POOL.info(), TABLE.info()];

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[("address", self.address.starts_with("http://"), "an address such as `http://127.0.0.1:8391`")])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let (images, Captions(captions)) = (cx.inputs.read(IMAGES)?, cx.inputs.read(CAPTIONS)?);
        let annotations = cx.inputs.read(ANNOTATIONS)?.load_images()?;
        let texts: BTreeMap<&str, &str> = captions.iter().map(|Caption { file, text }| (file.as_str(), text.as_str())).collect();
        let (mut numbers, mut dim, mut n_rows) = (Vec::new(), 0, 0_usize);
        let [mut urls, mut lines, mut md5s, mut words] = [const { Vec::new() }; 4];
        for row in cx.inputs.read(FEATURES)?.rows() {
            let (image, embedding) = row?;
            let unknown = |problem: String| Error::Input {
                port: ANNOTATIONS.info().name,
                problem,
                hint: "give the annotations and captions of these very images".into(),
            };
            let info = annotations.image(image).ok_or_else(|| unknown(format!("no image {image}, of which there is an embedding")))?;
            let name = &info.file_name;
            let index: usize =
                name.trim_end_matches(".jpg").parse().map_err(|_| unknown(format!("`{name}` is no web image of `toy/world`")))?;
            let text = texts.get(name.as_str()).ok_or_else(|| unknown(format!("no caption of `{name}`")))?;
            let trouble = toy::trouble(self.seed, index);
            let path = match trouble {
                Trouble::Duplicate(other) => toy::web_path(self.seed, other),
                _ => toy::web_path(self.seed, index),
            };
            dim = embedding.len();
            numbers.extend(embedding);
            urls.push(Some(format!("{}/{path}", self.address)));
            lines.push(Some((*text).to_owned()));
            md5s.push(Some(Md5::digest(images.file(name)?.read()?).iter().map(|byte| format!("{byte:02x}")).collect()));
            words.push(Some(if matches!(trouble, Trouble::Unsafe) { "NSFW" } else { "UNLIKELY" }.to_owned()));
            n_rows += 1;
            cx.proceed()?;
        }
        let draft = cx.begin(unit)?;
        let table: String =
            urls.iter().zip(&lines).map(|(url, text)| [url, text].map(|text| text.clone().unwrap_or_default()).join("\t") + "\n").collect();
        draft.write(TABLE, "table.tsv", table.as_bytes())?;
        let bytes = narrowed(&numbers, MatrixDtype::F16, "img_emb_0.npy".as_ref())?;
        draft.write(POOL, "img_emb_0.npy", &[npy_header(n_rows, dim, MatrixDtype::F16), bytes].concat())?;
        let mut metadata = MetadataWriter::new(draft.create(POOL, "metadata_0.parquet")?, &["url", "caption", "md5", "NSFW"])?;
        metadata.push([urls, lines, md5s, words].map(MetadataColumn::Text).into())?;
        metadata.finish()?;
        cx.tick(1);
        cx.commit(draft, [("rows".to_owned(), n_rows.into())].into())
    }
}
