//! Recomputes rows of features with the recorded model and compares them: finds results that are intact and wrong.

use std::{collections::BTreeMap, fmt};

use ovenbird_cache::{
    Artifact, Fingerprint, Status, Store,
    verify::{Class, Finding},
};
use ovenbird_stages::{
    Artifact as _, Context, OnBadItem, Unit,
    artifacts::{ImageFeatures, RegionFeatures},
    clip::PRECISION,
};
use serde::Serialize;

use crate::{
    error::{Error, Result},
    event, machine,
    pipeline::Pipeline,
    plan::{self, Made, previous_run::PreviousRun},
    progress::TaskProgress,
    request::read_request,
};

/// Rows with a smaller cosine differ. Rounding to f16 and another order of sums cost less than 1e-4.
const MIN_COSINE: f64 = 0.999;

/// The result of recomputing rows.
#[derive(Debug, Default, Serialize)]
pub(super) struct Audit {
    rows: usize,
    least_cosine: Option<f64>,
    wrong: Vec<Wrong>,
    /// Artifacts that could not be recomputed, and why.
    skipped: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct Wrong {
    unit: String,
    image: u64,
    cosine: f64,
}

impl Audit {
    /// The differences as findings.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let finding = |wrong: &Wrong| Finding {
            class: Class::Wrong,
            unit: Some(wrong.unit.clone()),
            path: wrong.unit.clone().into(),
            problem: format!("image {}: the recomputed embedding has cosine {:.4} to the stored one", wrong.image, wrong.cosine),
        };
        self.wrong.iter().map(finding).collect()
    }
}

impl fmt::Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let least = self.least_cosine.map_or_else(String::new, |least| format!(", least cosine {least:.5}"));
        let skipped = self.skipped.iter().map(|(what, why)| format!("not recomputed: {what}: {why}\n"));
        write!(f, "{} rows recomputed, {} wrong{least}\n{}", self.rows, self.wrong.len(), skipped.collect::<String>())
    }
}

/// Recomputes a share of the rows of every feature artifact on a device, in a temporary home.
pub(super) fn audit(store: &Store, part: f64, device: tch::Device) -> Result<Audit> {
    let mut audit = Audit::default();
    let mut done: Vec<Fingerprint> = Vec::new();
    for run in event::runs(store.home()).into_iter().rev() {
        let pipeline = match read_request(store, &run) {
            Ok(pipeline) => pipeline,
            Err(error) => {
                audit.skipped.insert(format!("run {run}"), error.message());
                continue;
            }
        };
        let is_features = |kind: &str| kind == ImageFeatures::KIND || kind == RegionFeatures::KIND;
        let places =
            (0..pipeline.steps.len()).filter(|place| pipeline.steps[*place].entry.outputs.iter().any(|port| is_features(port.kind)));
        for place in places.collect::<Vec<_>>() {
            let id = format!("{} of run {run}", pipeline.steps[place].id);
            match audit_step(store, &pipeline, place, part, device, &mut done, &mut audit) {
                Ok(None) => {}
                Ok(Some(why)) => drop(audit.skipped.insert(id, why.into())),
                Err(error) => drop(audit.skipped.insert(id, error.message())),
            }
        }
    }
    Ok(audit)
}

/// Recomputes a share of the rows of a step; returns why, where it cannot.
fn audit_step(
    store: &Store,
    pipeline: &Pipeline,
    place: usize,
    part: f64,
    device: tch::Device,
    done: &mut Vec<Fingerprint>,
    audit: &mut Audit,
) -> Result<Option<&'static str>> {
    // Everything upstream comes from the store.
    let needed = pipeline.needed(&[place]);
    let steps: Vec<_> = needed.iter().map(|step| &pipeline.steps[*step]).collect();
    let files = plan::digest_files(&steps, Some(&ovenbird_cache::Ledger::of(store)))?;
    let previous = PreviousRun::default();
    let mut made = Made::new();
    for step in &needed[..needed.len() - 1] {
        match plan::check(&pipeline.steps[*step], true, &files, &made, store, &previous)? {
            plan::Checked::Reused(artifact) => drop(made.insert(*step, *artifact)),
            plan::Checked::Run(_) | plan::Checked::Lacks { .. } => {
                return Ok(Some("its inputs are not in the home, or have changed"));
            }
        }
    }
    let step = &pipeline.steps[place];
    let (recipe, inputs) = plan::identify(step, &files, &made);
    let Status::Valid(artifact) = store.artifact(step.entry.kind, &recipe.fingerprint())? else {
        return Ok(Some("it is not in the home, or is damaged"));
    };
    if artifact.is_dropped {
        return Ok(Some("its bytes were dropped"));
    }
    if done.contains(&artifact.manifest.fingerprint) {
        return Ok(None);
    }
    done.push(artifact.manifest.fingerprint);
    let (units, items) = step.stage.units(&inputs)?.of(&recipe);
    let Some(item_key) = units.first().and_then(|unit| unit.item_key) else { return Ok(Some("it holds no items")) };
    let n_rows = ((items.len() as f64 * part).ceil() as usize).min(items.len());
    // Which rows, follows from the artifact's name: other rows for each artifact, the same rows each time.
    let seed = u64::from_le_bytes(*recipe.fingerprint().as_bytes().first_chunk::<8>().expect("BUG: a fingerprint has 32 bytes"));
    let stride = items.len() / n_rows.max(1);
    let chosen: Vec<usize> = (0..n_rows).map(|row| (row * stride + seed as usize % stride.max(1)).min(items.len() - 1)).collect();
    let sample = |(index, item): (usize, &usize)| {
        let name = [recipe.fingerprint().as_bytes().as_slice(), &(*item as u64).to_le_bytes()].concat();
        let fingerprint = ovenbird_cache::Digest::of(&name).to_hex().parse().expect("BUG: both are 64 digits");
        Unit { index, items: *item..*item + 1, fingerprint, item_key: Some(item_key), stays: true }
    };
    let samples: Vec<Unit> = chosen.iter().enumerate().map(sample).collect();
    let scratch = tempfile::tempdir().map_err(|source| ovenbird_cache::Error::Write { path: std::env::temp_dir(), source })?;
    let scratch = Store::open(scratch.path())?;
    let (_session, _recovered) = scratch.enter()?;
    // With the precision that the artifact was computed with.
    if let Some(precision) = artifact.manifest.units.iter().find_map(|unit| unit.metrics.get(PRECISION)?.as_str()) {
        scratch.choice(step.entry.kind, &item_key, PRECISION, || Ok::<_, Error>(precision.to_owned()))?;
    }
    let progress = std::sync::Mutex::new((TaskProgress::new(&format!("recompute {}", step.id)), 0));
    let report = |said: ovenbird_stages::Progress| {
        if let ovenbird_stages::Progress::Committed { .. } = said {
            let mut progress = progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            progress.1 += 1;
            let n_done = progress.1;
            progress.0.tell(n_done, n_rows as u64, "");
        }
    };
    let context = Context {
        store: &scratch,
        kind: step.entry.kind,
        units: &samples,
        items: &items,
        inputs: &inputs,
        most_items: None,
        device,
        has_bf16: machine::has_bf16(device),
        threads: step.resources.cpu,
        on_bad_item: OnBadItem::Skip { max_failed_ratio: 1.0 },
        n_failed: &Default::default(),
        watch: &Default::default(),
        is_stopped: &|| false,
        report: &report,
    };
    step.stage.run(&samples, &context)?;
    let port = step.entry.outputs[0].name;
    for (sample, item) in samples.iter().zip(&chosen) {
        let Status::Valid(record) = scratch.unit(step.entry.kind, &sample.fingerprint)? else {
            return Ok(Some("a row could not be recomputed"));
        };
        let unit = units.iter().find(|unit| unit.items.contains(item)).expect("BUG: every item is in a unit");
        let is_regions = step.entry.outputs[0].kind == RegionFeatures::KIND;
        let again = rows(&scratch.unit_port(&record, port), is_regions)?;
        let stored = rows_of_unit(store, &artifact, unit, port, is_regions)?;
        for (image, embedding) in again {
            let cosine = stored.get(&image).map_or(0.0, |stored| least_cosine(stored, &embedding));
            audit.rows += 1;
            audit.least_cosine = Some(audit.least_cosine.map_or(cosine, |least| least.min(cosine)));
            if cosine < MIN_COSINE {
                audit.wrong.push(Wrong { unit: ovenbird_cache::unit_name(step.entry.kind, &unit.fingerprint), image, cosine });
            }
        }
    }
    Ok(None)
}

/// Embeddings by image; those of an image's regions one after the other.
type Rows = BTreeMap<u64, Vec<Vec<f32>>>;

fn rows_of_unit(store: &Store, artifact: &Artifact, unit: &Unit, port: &str, is_regions: bool) -> Result<Rows> {
    let record = artifact.manifest.units.iter().find(|listed| listed.key.fingerprint == unit.fingerprint);
    record.map_or_else(|| Ok(Rows::new()), |record| rows(&store.unit_port(record, port), is_regions))
}

fn rows(files: &[ovenbird_cache::inputs::InputFile], is_regions: bool) -> Result<Rows> {
    let mut rows = Rows::new();
    if is_regions {
        for regions in RegionFeatures::open(files)?.rows() {
            let regions = regions?;
            let dim = regions.embeddings.len() / regions.boxes.len().max(1);
            rows.insert(regions.image_id.0, regions.embeddings.chunks(dim.max(1)).map(<[f32]>::to_vec).collect());
        }
    } else {
        for row in ImageFeatures::open(files)?.rows() {
            let (image, embedding) = row?;
            rows.insert(image.0, vec![embedding]);
        }
    }
    Ok(rows)
}

fn least_cosine(stored: &[Vec<f32>], again: &[Vec<f32>]) -> f64 {
    if stored.len() != again.len() {
        return 0.0;
    }
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let cosine = |(a, b): (&Vec<f32>, &Vec<f32>)| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(1e-12);
    // NaN counts as different.
    let cosines = stored.iter().zip(again).map(cosine);
    cosines.map(|cosine| if cosine.is_nan() { -1.0 } else { cosine }).fold(1.0, f64::min)
}
