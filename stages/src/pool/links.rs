//! `pool/links`: a table of links without embeddings.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Laion5b, Nsfw};
use crate::{
    Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{Link, LinkText, Links, PoolMetadata, PoolRow, PoolRows, PoolSearched},
};

/// The links of a table that has no embeddings, such as COYO's or CC12M's, as one class, for `web/download`.
///
/// What is downloaded becomes a pool of one's own: `annotations/folder`, `clip/globals`, and `pool/retrieve` with its `features`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TableLinks {
    /// What the one class is called.
    pub class: String,
    /// The first row.
    pub first: u64,
    /// How many links.
    pub n: usize,
    /// Which rows are left out as unsafe for work.
    pub nsfw: Nsfw,
    /// The most of a column `punsafe` or `nsfw_score_opennsfw2`, a probability.
    pub max_punsafe: f32,
    /// Which edition of LAION-5B the table is of, where it has its columns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub laion_5b: Option<Laion5b>,
}

impl Default for TableLinks {
    fn default() -> Self {
        Self { class: "pool".into(), first: 0, n: 100_000, nsfw: Nsfw::default(), max_punsafe: 0.5, laion_5b: None }
    }
}

const METADATA: In<PoolMetadata> = In::required("metadata", "Tables with a column `url` (`pool/import` reads other formats).");
const LINKS: Out<Links> = Out::new("links", "The links in the order of the rows, each URL once; nothing is compared.");

impl Stage for TableLinks {
    const KIND: &'static str = "pool/links";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[METADATA.info()];
    const OUTPUTS: &'static [PortInfo] = &[LINKS.info()];

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("class", !self.class.trim().is_empty(), "a name"),
            ("n", self.n > 0, "at least 1"),
            ("max_punsafe", (0.0..=1.0).contains(&self.max_punsafe), "a number from 0 to 1"),
        ])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let metadata = cx.inputs.read(METADATA)?;
        let tables = PoolRows::open(metadata.tables()?)?;
        if self.laion_5b.is_none() {
            tables.refuse_withdrawn()?;
        }
        self.nsfw.note_unknown(&tables, cx);
        let (mut links, mut searched, mut urls) = (Vec::new(), PoolSearched::default(), std::collections::HashSet::new());
        let n = cx.most_items.map_or(self.n, |most| most.min(self.n));
        let draft = cx.begin(unit)?;
        let mut place = 0;
        'tables: for batch in tables.all(self.nsfw.rule(self.max_punsafe)) {
            for (kind, LinkText { url, md5, caption }) in batch? {
                let row = place;
                place += 1;
                if row < self.first {
                    continue;
                }
                if links.len() == n {
                    break 'tables;
                }
                searched.rows += 1;
                match kind {
                    PoolRow::Unsafe => searched.unsafe_rows += 1,
                    PoolRow::WithoutUrl => searched.without_url += 1,
                    PoolRow::Candidate if urls.insert(url.clone()) => {
                        searched.candidates += 1;
                        links.push(Link { place: row, url, similarity: None, md5, caption, dropped: None });
                    }
                    PoolRow::Candidate => searched.candidates += 1,
                }
            }
            cx.proceed()?;
        }
        tables.still()?;
        let PoolSearched { rows, unsafe_rows, without_url, .. } = &searched;
        cx.note(format!("{} links of {rows} rows; {unsafe_rows} are unsafe for work, {without_url} have no URL", links.len()));
        let n_links = links.len();
        if n_links == 0 {
            let problem = format!("expected links from row {} on, found none among {} rows", self.first, tables.n_rows());
            let hint = "give another table, lower `first`, or keep more rows (`nsfw`, `max_punsafe`)".into();
            return Err(Error::Input { port: METADATA.info().name, problem, hint });
        }
        Links { by_class: vec![(self.class.clone(), links)], searched }.write(draft.create(LINKS, "links.parquet")?)?;
        cx.tick(1);
        cx.commit(draft, [("links".to_owned(), n_links.into())].into())
    }
}
