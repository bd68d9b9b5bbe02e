//! Which CLIP embeddings come from. Those of two CLIPs may have equally many numbers; cosines between them mean nothing.

use std::collections::BTreeMap;

use ovenbird_cache::Digest;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Under which key of a file's metadata the space of its embeddings is.
pub(crate) const SPACE_KEY: &str = "ovenbird.clip";

/// The identity of a CLIP's embedding space: BLAKE3 of both projections as f32, little-endian, in OpenAI's layout. In which format and
/// layout a file holds the weights does not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Space(Digest);

impl Space {
    /// The space of weights, by the tensors that project into it: see `Layout::projections`.
    pub(crate) fn of(tensors: &BTreeMap<String, Tensor>, projections: &[&'static str]) -> Self {
        let digest = |name: &&'static str| {
            let numbers = tensors.get(*name)?.detach().to_kind(Kind::Float).contiguous();
            let mut flat = vec![0.0_f32; numbers.numel()];
            numbers.copy_data(&mut flat, numbers.numel());
            let bytes: Vec<u8> = flat.into_iter().flat_map(f32::to_le_bytes).collect();
            Some((*name, Digest::of(&bytes)))
        };
        Self(Digest::of_list("ovenbird clip 1", projections.iter().filter_map(digest)))
    }

    /// Of what a file's metadata says, if it does.
    pub(crate) fn read(written: Option<&String>) -> Result<Option<Self>, String> {
        let parse = |text: &String| text.parse().map_err(|_| format!("expected 64 hexadecimal digits as `{SPACE_KEY}`, found `{text}`"));
        Ok(written.map(parse).transpose()?.map(Self))
    }

    /// An entry of a file's metadata.
    pub(crate) fn entry(self) -> (String, String) {
        (SPACE_KEY.to_owned(), self.0.to_hex())
    }
}

/// The space of all that lies at some ports; what does not say its space fits every other. Fails where two are known and differ.
pub(crate) fn common(ports: &[(&'static str, Option<Space>)]) -> Result<Option<Space>> {
    let mut known = ports.iter().filter_map(|(port, space)| Some((*port, (*space)?)));
    let Some((first, space)) = known.next() else { return Ok(None) };
    match known.find(|(_, other)| *other != space) {
        None => Ok(Some(space)),
        Some((port, other)) => Err(Error::Input {
            port,
            problem: format!("`{first}` has embeddings of the CLIP {}, `{port}` of the CLIP {}", space.0, other.0),
            hint: "make both with the same checkpoint".into(),
        }),
    }
}

/// As [`common`], of a stage with the parameter `mixed_clips`; if that is set, nothing is compared and the space counts as unknown.
pub(crate) fn common_unless(mixed_clips: bool, ports: &[(&'static str, Option<Space>)]) -> Result<Option<Space>> {
    if mixed_clips {
        return Ok(None);
    }
    common(ports).map_err(|error| match error {
        Error::Input { port, problem, hint } => Error::Input { port, problem, hint: format!("{hint}; `mixed_clips: true` accepts both") },
        other => other,
    })
}

#[cfg(test)]
mod tests {
    use ovenbird_models::clip::layout::CLIP_PROJECTIONS;
    use tch::Device;

    use super::*;

    fn projection(name: &str, shape: [i64; 2], first: f64) -> (String, Tensor) {
        let numbers = (Tensor::arange(shape[0] * shape[1], (Kind::Float, Device::Cpu)) / 8.0 + first).view(shape);
        (name.to_owned(), numbers)
    }

    #[test]
    fn a_space_is_that_of_the_projections_whatever_the_rest_and_their_kind() {
        let text = projection("text_projection", [4, 2], 0.0);
        let weights = |image: (String, Tensor), bias: f64| {
            let more = [("visual.attnpool.c_proj.bias".to_owned(), Tensor::from_slice(&[bias, 1.0])), (text.0.clone(), text.1.copy())];
            BTreeMap::from_iter([image].into_iter().chain(more))
        };
        let pooled = |first: f64| projection("visual.attnpool.c_proj.weight", [2, 4], first);
        let one = weights(pooled(1.0), 0.5);
        let space = Space::of(&one, CLIP_PROJECTIONS);

        let halves: BTreeMap<_, _> = one.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(Kind::Half))).collect();
        assert_eq!(Space::of(&halves, CLIP_PROJECTIONS), space, "f16 holds these numbers");
        let transposed = |tensor: &Tensor| if tensor.dim() == 2 { tensor.tr().contiguous().tr() } else { tensor.copy() };
        let strided: BTreeMap<_, _> = one.iter().map(|(name, tensor)| (name.clone(), transposed(tensor))).collect();
        assert_eq!(Space::of(&strided, CLIP_PROJECTIONS), space);
        let mut more = weights(pooled(1.0), 0.5);
        more.insert("ln_final.weight".into(), Tensor::from(2.0_f32));
        assert_eq!(Space::of(&more, CLIP_PROJECTIONS), space);

        let others = [weights(pooled(1.1), 0.5), weights(pooled(1.0), 0.6), weights(projection("visual.proj", [4, 2], 1.0), 0.5)];
        assert!(others.iter().all(|other| Space::of(other, CLIP_PROJECTIONS) != space));
    }

    #[test]
    fn two_that_are_known_and_differ_are_refused() {
        let [one, other] =
            [0.0, 1.0].map(|first| Space::of(&BTreeMap::from([projection("text_projection", [4, 2], first)]), CLIP_PROJECTIONS));
        assert_eq!(common(&[("a", None), ("b", Some(one)), ("c", None), ("d", Some(one))]).unwrap(), Some(one));
        assert_eq!(common(&[("a", None), ("b", None)]).unwrap(), None);
        let error = common(&[("features", Some(one)), ("labels", None), ("prompts", Some(other))]).unwrap_err();
        let words = format!("prompts: `features` has embeddings of the CLIP {}, `prompts` of the CLIP {}", one.0, other.0);
        assert_eq!((error.to_string(), error.hint()), (words, Some("make both with the same checkpoint".into())));
        let ports = [("features", Some(one)), ("prompts", Some(other))];
        assert_eq!(common_unless(true, &ports).unwrap(), None);
        let hint = "make both with the same checkpoint; `mixed_clips: true` accepts both";
        assert_eq!(common_unless(false, &ports).unwrap_err().hint().unwrap(), hint);
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let space = Space::of(&BTreeMap::from([projection("text_projection", [4, 2], 0.0)]), CLIP_PROJECTIONS);
        let (key, text) = space.entry();
        assert_eq!((key.as_str(), Space::read(Some(&text))), (SPACE_KEY, Ok(Some(space))));
        assert_eq!(Space::read(None), Ok(None));
        assert!(Space::read(Some(&text[1..].to_owned())).is_err());
    }
}
