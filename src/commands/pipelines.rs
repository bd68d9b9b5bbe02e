//! `ovenbird pipelines`: the named pipelines.

use ovenbird_data::words::nearest;
use serde_json::json;

use crate::{
    error::{Error, Result},
    output::{print, to_json},
    pipeline::named::{NAMED, Title},
};

/// List the named pipelines, or print the file of one
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A pipeline's name
    name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn pipelines(Args { name, json }: &Args) -> Result<()> {
    if let Some(name) = name {
        let found = NAMED.iter().find(|(known, _)| known == name);
        let nearest = || nearest(name, NAMED.iter().map(|(known, _)| *known));
        let (_, text) = found.ok_or_else(|| Error::UnknownPipeline { name: name.clone(), nearest: nearest() })?;
        return Ok(print(text)?);
    }
    let titles: Vec<Title> = NAMED.iter().map(|(_, text)| Title::of(text)).collect();
    if *json {
        let list: Vec<_> = titles
            .iter()
            .map(|title| json!({"name": title.name, "description": title.description, "stages": title.stages.len()}))
            .collect();
        return Ok(print(&to_json("pipelines", &list))?);
    }
    let width = titles.iter().map(|title| title.name.len()).max().unwrap_or(0);
    let lines = titles.iter().map(|title| format!("{:width$}  {}\n", title.name, title.description.trim()));
    Ok(print(&lines.collect::<String>())?)
}
