//! The names of CORA's checkpoints. (Section 1 of its specification.)
//!
//! A localizer has the same names there, but heads of boxes have two; the CLIP that it looks through lies beside it.

use std::{collections::BTreeMap, path::Path};

use tch::Tensor;

use super::{Config, Content};
use crate::{
    Error, Result,
    checkpoint::{add_copies, prefixes, without_copies},
    clip::layout::Shapes,
};

/// The tensor by which a localizer is found.
pub const MARK: &str = "query_embed.weight";
/// The second name of heads of boxes.
const COPIES: [(&str, &str); 1] = [("transformer.decoder.bbox_embed.", "bbox_embed.")];
/// How names of a CLIP begin.
const CLIP: [&str; 2] = ["backbone.", "classifier."];
/// How names of the projection of class embeddings begin, which a localizer without them does not have.
const TEXT_PROJECTION: &str = "text_proj.";
/// How names of the normalisation behind the projection of the map begin.
const GROUP_NORM: &str = "input_proj.0.1.";

type Tensors = BTreeMap<String, Tensor>;

/// The prefixes of the names of localizers in a file, sorted.
pub fn places(tensors: &Tensors) -> Vec<String> {
    prefixes(tensors, MARK).into_iter().collect()
}

/// The tensors of a detector of CORA, without copies.
#[derive(Debug)]
pub struct Detector {
    /// Those of the localizer, and any that are of no known part.
    pub localizer: Tensors,
    /// Those of the CLIP, under CORA's names and with their copies.
    pub clip: Tensors,
}

impl Detector {
    /// Takes a detector apart. Fails where a head of boxes is not the same under both names.
    pub fn of(tensors: &Tensors, origin: &Path) -> Result<Self> {
        let shared = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        let (clip, localizer): (Tensors, Tensors) = shared.partition(|(name, _)| CLIP.iter().any(|part| name.starts_with(part)));
        Ok(Self { localizer: without_copies(localizer, &COPIES, origin)?, clip })
    }
}

/// A localizer's tensors with their copies, as CORA's checkpoints have them.
pub fn with_copies(localizer: &Tensors) -> Tensors {
    let mut tensors = localizer.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
    add_copies(&mut tensors, &COPIES);
    tensors
}

/// What the tensors of a localizer do not show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unseen {
    /// Attention heads.
    pub heads: i64,
    /// The dimension of class embeddings, of a localizer that has no projection of them.
    pub embed_dim: Option<i64>,
}

/// Reads the size of a localizer off its tensors.
///
/// Fails with all defining tensors that are missing or of another rank, and where nothing tells the dimension of class embeddings.
pub fn config(localizer: &Tensors, unseen: Unseen, origin: &Path) -> Result<Config> {
    let mut shapes = Shapes { tensors: localizer, problems: Vec::new() };
    let [queries, _] = shapes.of(MARK);
    let [hidden, map_channels, _, _] = shapes.of("input_proj.0.0.weight");
    let [mlp_width, _] = shapes.of("transformer.encoder.layers.0.linear1.weight");
    let [encoder_layers, decoder_layers] = ["encoder", "decoder"].map(|part| shapes.depth(&format!("transformer.{part}.layers.")));
    let has = |part: &str| localizer.keys().any(|name| name.starts_with(part));
    let projection = has(TEXT_PROJECTION).then(|| shapes.of("text_proj.layers.0.weight"));
    if decoder_layers == 0 {
        let _shape: [i64; 2] = shapes.of("transformer.decoder.layers.0.linear1.weight");
    }
    if !shapes.problems.is_empty() {
        return Err(Error::Misfits { path: origin.to_owned(), problems: shapes.problems });
    }
    let Some(embed_dim) = projection.map(|[_, dim]| dim).or(unseen.embed_dim) else {
        return Err(Error::Malformed {
            path: origin.to_owned(),
            problem: format!("nothing tells how many numbers class embeddings have: found neither tensors `{TEXT_PROJECTION}*` nor a CLIP"),
            hint: Some("import the whole checkpoint, with its CLIP".into()),
        });
    };
    let cora = Config::cora(map_channels, embed_dim);
    Ok(Config {
        hidden,
        heads: unseen.heads,
        mlp_width,
        encoder_layers,
        decoder_layers,
        queries,
        bottleneck: projection.map_or(cora.bottleneck, |[bottleneck, _]| bottleneck),
        group_norm: has(GROUP_NORM),
        content: if projection.is_some() { Content::Text } else { Content::Zero },
        ..cora
    })
}

#[cfg(test)]
mod tests {
    use tch::{Device, nn};

    use super::{super::Localizer, *};

    #[test]
    fn the_size_of_a_localizer_is_read_off_its_tensors() {
        let toy = Config::toy(48, 16);
        for config in [
            toy,
            Config { group_norm: true, encoder_layers: 2, queries: 7, ..toy },
            Config { content: Content::Zero, bottleneck: 128, heads: 2, ..toy },
        ] {
            let store = nn::VarStore::new(Device::Cpu);
            let localizer = Localizer::blank(&store.root(), &config).unwrap();
            let unseen = Unseen { heads: config.heads, embed_dim: Some(16) };
            assert_eq!(super::config(localizer.parameters(), unseen, Path::new("f.pth")).unwrap(), config);
        }
    }

    #[test]
    fn what_is_missing_is_listed_and_what_cannot_be_seen_is_said() {
        let refused = |tensors: &Tensors, embed_dim: Option<i64>| {
            config(tensors, Unseen { heads: 4, embed_dim }, Path::new("f.pth")).unwrap_err().to_string()
        };
        let store = nn::VarStore::new(Device::Cpu);
        let localizer = Localizer::blank(&store.root(), &Config { content: Content::Zero, ..Config::toy(48, 16) }).unwrap();
        assert_eq!(
            refused(localizer.parameters(), None),
            "f.pth: nothing tells how many numbers class embeddings have: found neither tensors `text_proj.*` nor a CLIP"
        );
        let missing = refused(&BTreeMap::new(), None);
        assert!(missing.starts_with("f.pth: 4 tensors do not fit the network: query_embed.weight: expected [-1, -1], found nothing;"));
        assert!(missing.ends_with("transformer.decoder.layers.0.linear1.weight: expected [-1, -1], found nothing"), "{missing}");
    }

    #[test]
    fn heads_of_boxes_have_two_names_outside_and_one_here() {
        let store = nn::VarStore::new(Device::Cpu);
        let localizer = Localizer::new(&store.root(), &Config::toy(48, 16), 1).unwrap();
        let n = localizer.parameters().len();
        let mut published = with_copies(localizer.parameters());
        // Three layers, each with a head of three matrices and biases.
        assert_eq!(published.len(), n + 18);
        let detector = Detector::of(&published, Path::new("f.pth")).unwrap();
        assert!(detector.clip.is_empty());
        assert!(detector.localizer.keys().eq(localizer.parameters().keys()));
        published.remove("bbox_embed.0.layers.1.bias");
        assert_eq!(Detector::of(&published, Path::new("f.pth")).unwrap().localizer.len(), n);
        let name = "transformer.decoder.bbox_embed.2.layers.0.weight";
        let other = &published[name] + 1.0;
        published.insert(name.into(), other);
        assert_eq!(
            Detector::of(&published, Path::new("f.pth")).unwrap_err().to_string(),
            format!("f.pth: expected the same tensor as `{name}` and as `bbox_embed.2.layers.0.weight`, found other numbers")
        );
    }
}
