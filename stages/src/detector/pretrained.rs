//! Initial weights from a pretrained checkpoint.

use std::collections::BTreeMap;

use ovenbird_models::{Misfit, rcnn::layout};
use tch::Tensor;

use super::ports::PRETRAINED;
use crate::{Context, Result, Unit, artifacts::read_weights};

/// Loads the checkpoint at the port `pretrained`, if there is one, into a network whose training begins, and notes which tensors did not
/// fit. Does nothing for a training that continues.
pub(crate) fn load_pretrained(parameters: &BTreeMap<String, Tensor>, units: &[Unit], cx: &Context<'_>) -> Result<()> {
    if units.first().is_none_or(|unit| unit.index > 0) {
        return Ok(());
    }
    let Some(file) = cx.inputs.read_if_given(PRETRAINED)? else { return Ok(()) };
    let report = layout::load(read_weights(&file.file)?.tensors(), parameters, &file.file.path)?;
    let names = |misfits: &[Misfit]| misfits.iter().map(|misfit| misfit.name.as_str()).collect::<Vec<_>>().join(", ");
    cx.note(format!("begins with {} tensors of {}", report.loaded.len(), file.file.path.display()));
    report.place.note().into_iter().for_each(|words| cx.note(words));
    for (what, misfits) in [
        ("begin without them, which are not in the file", &report.missing),
        ("of the file have no place in the network", &report.unmatched),
        ("have another shape in the file, and begin without it", &report.misshaped),
    ] {
        if !misfits.is_empty() {
            cx.note(format!("{} tensors {what}: {}", misfits.len(), names(misfits)));
        }
    }
    Ok(())
}
