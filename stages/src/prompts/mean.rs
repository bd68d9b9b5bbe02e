//! `prompts/mean`: the class embeddings of several prompts as one.

use ovenbird_models::detpro::ensemble;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{Context, Error, In, Out, PortInfo, Result, Stage, Unit, artifacts::Prompts, clip::space};

/// The class embeddings of several prompts as one: each row is the normalised sum of the normalised rows of a class.
///
/// Joins what `prompts/detpro` learned from several ranges of IoU. All must have the same classes; rows are in the order of the first.
/// (DetPro, section 3.6.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Mean {}

const PROMPTS: In<Prompts> = In::required("prompts", "Class embeddings.");
const MORE_PROMPTS: [In<Prompts>; 4] = [
    In::optional("prompts_2", "More embeddings of the same classes."),
    In::optional("prompts_3", "More embeddings of the same classes."),
    In::optional("prompts_4", "More embeddings of the same classes."),
    In::optional("prompts_5", "More embeddings of the same classes."),
];
const JOINED: Out<Prompts> =
    Out::new("prompts", "safetensors: `embeddings` f32 [K, D], unit norm; metadata `names`, as those of the first.");

impl Stage for Mean {
    const KIND: &'static str = "prompts/mean";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] =
        &[PROMPTS.info(), MORE_PROMPTS[0].info(), MORE_PROMPTS[1].info(), MORE_PROMPTS[2].info(), MORE_PROMPTS[3].info()];
    const OUTPUTS: &'static [PortInfo] = &[JOINED.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let mut all = vec![(PROMPTS.info().name, cx.inputs.read(PROMPTS)?)];
        for port in MORE_PROMPTS {
            if let Some(prompts) = cx.inputs.read_if_given(port)? {
                all.push((port.info().name, prompts));
            }
        }
        let prompts = mean(&all)?;
        let draft = cx.begin(unit)?;
        prompts.write(&draft, JOINED)?;
        cx.tick(1);
        cx.commit(draft, [("prompts".into(), all.len().into()), ("classes".into(), prompts.names.len().into())].into())
    }
}

/// The mean of prompts, each given with its port. Fails where classes, widths or CLIPs differ.
fn mean(all: &[(&'static str, Prompts)]) -> Result<Prompts> {
    let spaces: Vec<_> = all.iter().map(|(port, prompts)| (*port, prompts.clip)).collect();
    let clip = space::common(&spaces)?;
    let (_, first) = &all[0];
    let mut rows: Vec<Tensor> = Vec::new();
    for (port, prompts) in all {
        let refused = |problem: String, hint: &str| Err(Error::Input { port, problem, hint: hint.into() });
        if let Some(other) = prompts.names.iter().find(|name| !first.names.contains(name)) {
            return refused(format!("a class `{other}`, which `{}` lacks", PROMPTS.info().name), "make all prompts for the same classes");
        }
        let [expected, found] = [first, prompts].map(|prompts| prompts.embeddings.size()[1]);
        if expected != found {
            let problem = format!("embeddings of {found} numbers, but those of `{}` have {expected}", PROMPTS.info().name);
            return refused(problem, "make all prompts with the same checkpoint");
        }
        if first.scale.is_some() || prompts.scale.is_some() {
            let problem = "a scaler and a bias, which were learned with these embeddings alone";
            return refused(problem.into(), "join prompts without them, such as those of `prompts/detpro`");
        }
        let missing = |_| Error::Input {
            port,
            problem: format!("{} classes, but `{}` has {}", prompts.names.len(), PROMPTS.info().name, first.names.len()),
            hint: "make all prompts for the same classes".into(),
        };
        rows.push(prompts.select(&first.names).map_err(missing)?);
    }
    Ok(Prompts { names: first.names.clone(), embeddings: ensemble(&rows)?, scale: None, clip })
}

#[cfg(test)]
mod tests {
    use ovenbird_models::rcnn::classifier::LogitScale;

    use super::*;
    use crate::golden::{detpro_ralf, error};

    const PORTS: [&str; 5] = ["prompts", "prompts_2", "prompts_3", "prompts_4", "prompts_5"];

    fn prompts(names: &[&str], embeddings: &Tensor) -> Prompts {
        Prompts::new(names.iter().map(|name| (*name).to_owned()).collect(), embeddings, None).unwrap()
    }

    #[test]
    fn five_prompts_are_joined_by_name_as_in_the_published_code() {
        let golden = detpro_ralf("detpro");
        let names = ["a", "b", "c", "d", "e", "f", "g"];
        let reversed: Vec<&str> = names.iter().rev().copied().collect();
        let inputs = golden["ensemble/inputs"].unbind(0);
        let prompts = |(place, rows): (usize, &Tensor)| {
            let of_place = if place == 3 { prompts(&reversed, &rows.flip([0])) } else { prompts(&names, rows) };
            (PORTS[place], of_place)
        };
        let found = mean(&inputs.iter().enumerate().map(prompts).collect::<Vec<_>>()).unwrap();
        let apart = error(&found.embeddings, &golden["ensemble/output"]);
        assert!(apart < 1e-4 && found.names == names, "{apart}");
    }

    #[test]
    fn prompts_that_cannot_be_joined_are_refused() {
        let rows = |k: i64, d: i64| Tensor::ones([k, d], (tch::Kind::Float, tch::Device::Cpu));
        let two = || prompts(&["owl", "wren"], &rows(2, 3));
        let scaled = Prompts { scale: Some(LogitScale::Affine { scaler: 20.0, bias: 4.0 }), ..two() };
        for (other, expected) in [
            (prompts(&["owl", "crane"], &rows(2, 3)), "prompts_2: a class `crane`, which `prompts` lacks"),
            (prompts(&["owl"], &rows(1, 3)), "prompts_2: 1 classes, but `prompts` has 2"),
            (prompts(&["owl", "wren"], &rows(2, 4)), "prompts_2: embeddings of 4 numbers, but those of `prompts` have 3"),
            (scaled, "prompts_2: a scaler and a bias, which were learned with these embeddings alone"),
        ] {
            assert_eq!(mean(&[("prompts", two()), ("prompts_2", other)]).unwrap_err().to_string(), expected);
        }
    }
}
