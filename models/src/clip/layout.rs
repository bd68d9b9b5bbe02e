//! Recognises the published layouts of CLIP checkpoints and translates them to OpenAI's parameter names.
//!
//! | layout | known by | translated |
//! |---|---|---|
//! | OpenAI | the scalars `input_resolution`, `context_length`, `vocab_size` | those three are dropped |
//! | open_clip | `token_embedding.weight` without them | `text.` of its newer class is taken off |
//! | Hugging Face | `text_model.embeddings.token_embedding.weight` | names; queries, keys, values are joined; projections are transposed |
//! | CORA | `classifier.token_embedding.weight` beside `backbone.0.body.conv1.weight` | names; the localizer beside the CLIP is dropped |
//!
//! CORA's checkpoints hold a CLIP twice, in a detector and in its average: equal ones count as one. Its position table of attention pooling
//! is the region prompt.
//!
//! The weights may lie anywhere in a file: see [`place`]. Buffers that a network can make itself (`attn_mask`, `position_ids`,
//! `num_batches_tracked`) are dropped, and so are single numbers beside the towers, such as the `logit_bias` of a sigmoid loss: embeddings do
//! not depend on them. They may depend on anything else that no rule knows, which is refused when the weights are copied.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
};

use tch::{Kind, Tensor};

use super::{Activation, Config, ImageConfig, LOGIT_SCALE, TextConfig, architecture::Architecture, resnet::REDUCTION, settings::Settings};
use crate::{
    Error, Misfit, Result,
    checkpoint::{Place, add_copies, are_equal, list, not_finite, prefixes, without_copies},
};

pub(super) const OPENAI_SCALARS: [&str; 3] = ["input_resolution", "context_length", "vocab_size"];
const HUGGING_FACE_MARK: &str = "text_model.embeddings.token_embedding.weight";
const OPENAI_MARK: &str = "token_embedding.weight";
/// How open_clip's newer class calls its text tower.
const TEXT: &str = "text.";
/// How CORA calls the parts of a CLIP, and OpenAI does. (CORA, section 1 of its specification.)
const CORA_PARTS: [(&str, &str); 3] = [(CORA_TRUNK, "visual."), ("backbone.0.attn_pool.", "visual.attnpool."), (CORA_TEXT, "")];
const CORA_TRUNK: &str = "backbone.0.body.";
const CORA_TEXT: &str = "classifier.";
/// CORA's second name of the last level.
const CORA_COPIES: [(&str, &str); 1] = [("backbone.0.layer4.", "backbone.0.body.layer4.")];
/// Prefixes of the names of image towers.
const IMAGE_MARKS: [&str; 3] = ["visual.", "vision_model.", CORA_TRUNK];

type Tensors = BTreeMap<String, Tensor>;

/// A published layout of checkpoints: how it is recognised, translated and read.
pub struct Layout {
    /// Whose names it has: `OpenAI's`.
    pub name: &'static str,
    /// The activation of all weights in this layout; `None` where weights of both kinds are published in it.
    pub activation: Option<Activation>,
    /// The tensors, under the translated names, that project the towers' outputs into the common space.
    pub projections: &'static [&'static str],
    /// Whether some tensors have this layout.
    pub(super) is_of: fn(&Tensors) -> bool,
    /// Translates their names.
    pub(super) translate: fn(Tensors, &Path) -> Result<Tensors>,
    /// Reads the sizes of the network off the translated tensors.
    pub(super) read: fn(&Tensors, Activation, &Settings, &Path) -> Result<Architecture>,
}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// The projections of CLIP, in OpenAI's names: of a vision transformer, of attention pooling, of texts.
pub const CLIP_PROJECTIONS: &[&str] = &["visual.proj", "visual.attnpool.c_proj.weight", "visual.attnpool.c_proj.bias", "text_projection"];

/// OpenAI's release (a TorchScript archive's state). The three scalars are in OpenAI's files alone, whose weights have QuickGELU; saved as a
/// state dict they look like open_clip's.
const OPENAI: Layout = Layout {
    name: "OpenAI's",
    activation: Some(Activation::QuickGelu),
    projections: CLIP_PROJECTIONS,
    is_of: |tensors| OPENAI_SCALARS.iter().any(|&name| tensors.contains_key(name)),
    translate: from_open_clip,
    read: read_clip,
};

/// `CLIPModel` of Hugging Face transformers.
const HUGGING_FACE: Layout = Layout {
    name: "Hugging Face's",
    activation: None,
    is_of: |tensors| tensors.contains_key(HUGGING_FACE_MARK),
    translate: from_hugging_face,
    ..OPENAI
};

/// A detector of CORA, in which a CLIP of OpenAI lies.
const CORA: Layout = Layout { name: "CORA's", is_of: is_of_cora, translate: from_cora, ..OPENAI };

/// open_clip's state dict, of either text class.
const OPEN_CLIP: Layout = Layout { name: "open_clip's", activation: None, is_of: |_| true, ..OPENAI };

/// All layouts; the first that fits is taken.
static LAYOUTS: &[Layout] = &[
    #[cfg(test)]
    super::siglip::LAYOUT,
    HUGGING_FACE,
    OPENAI,
    CORA,
    OPEN_CLIP,
];

/// A checkpoint under OpenAI's names.
#[derive(Debug)]
pub struct Normalised {
    /// The layout that it was in.
    pub layout: &'static Layout,
    /// The parameters; kinds as they were.
    pub tensors: BTreeMap<String, Tensor>,
    /// The names of single numbers that embeddings do not depend on.
    pub unused: Vec<String>,
}

impl Normalised {
    /// Remarks about a checkpoint that can be loaded: unused tensors, a missing logit scale.
    pub fn notes(&self) -> Vec<String> {
        let unused = (!self.unused.is_empty())
            .then(|| format!("of the weights, embeddings do not depend on {}, which is not used", list(&self.unused)));
        let lacks = !self.tensors.contains_key(LOGIT_SCALE);
        let scale = lacks.then(|| format!("the checkpoint has no `{LOGIT_SCALE}`: embeddings do not need it"));
        unused.into_iter().chain(scale).collect()
    }
}

/// Finds the CLIP in a file: the only one, or the one `asked` for by the prefix of its names or by the end of that prefix.
///
/// Fails if there is none, or more than one and `asked` is `None`.
pub fn place(tensors: &BTreeMap<String, Tensor>, asked: Option<&str>, origin: &Path) -> Result<Place> {
    let of_text =
        prefixes(tensors, OPENAI_MARK).into_iter().filter(|prefix| !format!("{prefix}{OPENAI_MARK}").ends_with(HUGGING_FACE_MARK));
    let of_open_clip = |prefix: String| match prefix.strip_suffix(TEXT) {
        Some(rest) if rest.is_empty() || rest.ends_with('.') => rest.to_owned(),
        _ => prefix,
    };
    let of_cora = |prefix: String| match prefix.strip_suffix(CORA_TEXT) {
        Some(rest) if tensors.contains_key(&format!("{rest}{CORA_TRUNK}conv1.weight")) => rest.to_owned(),
        _ => prefix,
    };
    let of_text = of_text.map(of_open_clip).map(of_cora);
    let with_text: BTreeSet<String> = prefixes(tensors, HUGGING_FACE_MARK).into_iter().chain(of_text).collect();
    let has_image = |prefix: &&String| {
        let begins = |mark: &&str| {
            tensors.range(format!("{prefix}{mark}")..).next().is_some_and(|(name, _)| name.starts_with(&format!("{prefix}{mark}")))
        };
        IMAGE_MARKS.iter().any(begins)
    };
    let mut whole: BTreeSet<String> = with_text.iter().filter(has_image).cloned().collect();
    if asked.is_none() {
        without_copied_places(&mut whole, tensors);
    }
    let places = if whole.is_empty() { &with_text } else { &whole };
    let example = places.iter().next_back().map_or_else(String::new, |place| place.trim_end_matches('.').to_owned());
    let how = format!("name it in the pipeline, such as `with: {{clip: {{prefix: \"{example}\"}}}}`, or save only that CLIP");
    Place::choose(places, asked, tensors, origin, "one CLIP", &how)?.ok_or_else(|| Error::Malformed {
        path: origin.to_owned(),
        problem: format!(
            "no text tower of a CLIP: expected a tensor {OPENAI_MARK} or {HUGGING_FACE_MARK}, found neither among {} such as {}",
            tensors.len(),
            list(tensors.keys())
        ),
        hint: Some("give a checkpoint of OpenAI, open_clip or Hugging Face's CLIPModel that holds both towers".into()),
    })
}

/// Translates a checkpoint in any known layout to OpenAI's names. Of a file with several CLIPs, take one out first: see [`place`].
///
/// Names that no rule knows are kept, so that they are listed when the weights are copied. Fails if this is no CLIP, or if queries, keys
/// and values do not belong together.
pub fn normalise(tensors: &BTreeMap<String, Tensor>, origin: &Path) -> Result<Normalised> {
    let tensors = place(tensors, None, origin)?.tensors(tensors);
    let layout = LAYOUTS.iter().find(|layout| (layout.is_of)(&tensors)).expect("BUG: the last layout fits all tensors");
    let mut tensors = (layout.translate)(tensors, origin)?;
    tensors.retain(|name, _| !(OPENAI_SCALARS.contains(&name.as_str()) || name == "attn_mask" || name.ends_with(".num_batches_tracked")));
    // Within a tower, a single number may be a gate.
    let is_unused =
        |(name, tensor): (&String, &Tensor)| (name != LOGIT_SCALE && !name.contains('.') && tensor.numel() == 1).then(|| name.clone());
    let unused: Vec<String> = tensors.iter().filter_map(is_unused).collect();
    tensors.retain(|name, _| !unused.contains(name));
    Ok(Normalised { layout, tensors, unused })
}

/// Keeps the first of places at which the same CLIP lies in detectors of CORA.
fn without_copied_places(places: &mut BTreeSet<String>, tensors: &Tensors) {
    let parts = |place: &str| -> Vec<(String, &Tensor)> {
        let below = tensors.range(place.to_owned()..).map_while(|(name, tensor)| Some((name.strip_prefix(place)?, tensor)));
        below.filter(|(name, _)| openai_name(name).is_some()).map(|(name, tensor)| (name.to_owned(), tensor)).collect()
    };
    let mut in_cora = places.iter().filter(|place| tensors.contains_key(&format!("{place}{CORA_TRUNK}conv1.weight"))).cloned();
    let Some(first) = in_cora.next() else { return };
    let copied: Vec<String> = in_cora
        .filter(|place| {
            let (one, other) = (parts(&first), parts(place));
            one.len() == other.len() && one.iter().zip(&other).all(|(one, other)| one.0 == other.0 && are_equal(one.1, other.1))
        })
        .collect();
    places.retain(|place| !copied.contains(place));
}

/// Whether tensors are those of a detector of CORA, with its CLIP.
pub fn is_of_cora(tensors: &Tensors) -> bool {
    [format!("{CORA_TRUNK}conv1.weight"), format!("{CORA_TEXT}{OPENAI_MARK}")].iter().all(|name| tensors.contains_key(name))
}

/// OpenAI's name of a tensor of a CLIP in a detector of CORA; none of other tensors.
fn openai_name(name: &str) -> Option<String> {
    CORA_PARTS.iter().find_map(|(theirs, ours)| Some(format!("{ours}{}", name.strip_prefix(theirs)?)))
}

/// Takes the CLIP out of a detector of CORA.
fn from_cora(tensors: Tensors, origin: &Path) -> Result<Tensors> {
    let tensors = without_copies(tensors, &CORA_COPIES, origin)?;
    Ok(tensors.into_iter().filter_map(|(name, tensor)| Some((openai_name(&name)?, tensor))).collect())
}

/// Translates a CLIP with a ResNet from OpenAI's names to CORA's, with the copies that it has; without the logit scale, for which it has no
/// name.
pub fn to_cora(tensors: &Tensors) -> Tensors {
    let cora_name = |name: &str| {
        let [trunk, pool, text] = CORA_PARTS;
        let begins = [pool, trunk, text].into_iter().find_map(|(theirs, ours)| Some(format!("{theirs}{}", name.strip_prefix(ours)?)));
        begins.expect("BUG: every name begins with nothing")
    };
    let mut renamed: Tensors =
        tensors.iter().filter(|(name, _)| *name != LOGIT_SCALE).map(|(name, tensor)| (cora_name(name), tensor.shallow_clone())).collect();
    add_copies(&mut renamed, &CORA_COPIES);
    renamed
}

/// Takes the prefix of open_clip's newer text class off.
fn from_open_clip(tensors: Tensors, _: &Path) -> Result<Tensors> {
    Ok(tensors.into_iter().map(|(name, tensor)| (name.strip_prefix(TEXT).map_or(name.clone(), str::to_owned), tensor)).collect())
}

/// Reads the network of a checkpoint in any known layout off its tensors.
///
/// Fails if neither the layout nor `settings` tells the activation, and with all defining tensors that are missing or of another rank.
pub fn architecture(tensors: &Tensors, origin: &Path, settings: &Settings) -> Result<Architecture> {
    let Normalised { layout, tensors, .. } = normalise(tensors, origin)?;
    let stated = settings.activation.as_ref().map(|found| found.value);
    let unknown =
        || Error::Input { what: "activation", expected: "one that a config file or the caller names".into(), found: "none".into() };
    (layout.read)(&tensors, stated.or(layout.activation).ok_or_else(unknown)?, settings, origin)
}

fn read_clip(tensors: &Tensors, activation: Activation, settings: &Settings, origin: &Path) -> Result<Architecture> {
    Ok(Architecture::new(config(tensors, activation, origin)?, settings))
}

/// Reads the sizes of a CLIP off the shapes of its tensors, under OpenAI's names.
///
/// Heads are 64 channels wide, OpenAI's convention; the three widths of open_clip's larger image towers (1280, 1408, 1664) have 16 heads.
pub(super) fn config(tensors: &Tensors, activation: Activation, origin: &Path) -> Result<Config> {
    let mut shapes = Shapes { tensors, problems: Vec::new() };

    let [text_width, embed_dim] = shapes.of("text_projection");
    let [vocabulary, _] = shapes.of(OPENAI_MARK);
    let [context, _] = shapes.of("positional_embedding");
    let text = TextConfig {
        context,
        vocabulary,
        width: text_width,
        heads: (text_width / 64).max(1),
        depth: shapes.depth("transformer.resblocks."),
    };

    let image = if tensors.contains_key("visual.attnpool.positional_embedding") {
        let [half_width, ..]: [i64; 4] = shapes.of("visual.conv1.weight");
        let [n_positions, _] = shapes.of("visual.attnpool.positional_embedding");
        let width = 2 * half_width;
        ImageConfig::ResNet {
            image_side: grid_side(n_positions) * REDUCTION,
            layers: [1, 2, 3, 4].map(|level| shapes.depth(&format!("visual.layer{level}."))),
            width,
            heads: (REDUCTION * width / 64).max(1),
        }
    } else {
        let [width, _, _, patch]: [i64; 4] = shapes.of("visual.conv1.weight");
        let [n_positions, _] = shapes.of("visual.positional_embedding");
        let [mlp_width] = shapes.of("visual.transformer.resblocks.0.mlp.c_fc.bias");
        let heads = match width {
            1280 | 1408 | 1664 => 16,
            _ => (width / 64).max(1),
        };
        let depth = shapes.depth("visual.transformer.resblocks.");
        ImageConfig::Vit { image_side: grid_side(n_positions) * patch, patch, width, depth, heads, mlp_width }
    };
    if shapes.problems.is_empty() {
        Ok(Config { embed_dim, image, text, activation })
    } else {
        Err(Error::Misfits { path: origin.to_owned(), problems: shapes.problems })
    }
}

/// Copies the tensors of a checkpoint, in OpenAI's names, over the declared parameters of a network; kinds are cast. A parameter that is
/// called `optional` keeps its value where the checkpoint has none.
pub(super) fn copy(
    tensors: &BTreeMap<String, Tensor>,
    declared: &BTreeMap<String, Tensor>,
    optional: Option<&str>,
    origin: &Path,
) -> Result<()> {
    let mut problems = Vec::new();
    for name in declared.keys().chain(tensors.keys()).collect::<BTreeSet<_>>() {
        let (expected, found) = (declared.get(name).map(Tensor::size), tensors.get(name).map(Tensor::size));
        // A scalar is also written as one row of one value.
        let agree = expected == found || (expected == Some(vec![]) && found == Some(vec![1]));
        if found.is_none() && Some(name.as_str()) == optional {
            continue;
        }
        let is_floating = tensors.get(name).is_none_or(|tensor| is_floating(tensor.kind()));
        if !agree {
            problems.push(Misfit { name: name.clone(), expected, found });
        } else if !is_floating {
            return Err(Error::Malformed {
                path: origin.to_owned(),
                problem: format!("{name}: expected a floating kind, found {:?}", tensors[name].kind()),
                hint: None,
            });
        }
    }
    if !problems.is_empty() {
        return Err(Error::Misfits { path: origin.to_owned(), problems });
    }
    for (name, parameter) in declared {
        let Some(tensor) = tensors.get(name) else { continue };
        if let Some(problem) = not_finite(tensor) {
            let hint = Some("the training that wrote it diverged: take an earlier checkpoint".into());
            return Err(Error::Malformed { path: origin.to_owned(), problem: format!("{name}: {problem}"), hint });
        }
        let value = tensor.reshape(parameter.size());
        tch::no_grad(|| parameter.shallow_clone().copy_(&value));
    }
    Ok(())
}

fn is_floating(kind: Kind) -> bool {
    matches!(kind, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double)
}

pub(super) fn from_hugging_face(tensors: Tensors, origin: &Path) -> Result<Tensors> {
    let mut translated = BTreeMap::new();
    // Keyed by the joined name, then by the place of the part: queries, keys, values.
    let mut joins: BTreeMap<String, [(String, Option<Tensor>); 3]> = BTreeMap::new();
    for (name, tensor) in tensors {
        match translate(&name) {
            Translation::Dropped => {}
            Translation::Renamed(new) => {
                translated.insert(new, tensor);
            }
            Translation::Transposed(new) => {
                translated.insert(new, if tensor.dim() == 2 { tensor.tr() } else { tensor });
            }
            Translation::Joined { into, part } => {
                let names =
                    ["q", "k", "v"].map(|letter| name.replacen(&format!("{}_proj", ["q", "k", "v"][part]), &format!("{letter}_proj"), 1));
                let parts = joins.entry(into).or_insert_with(|| names.map(|name| (name, None)));
                parts[part].1 = Some(tensor);
            }
        }
    }
    let mut problems = Vec::new();
    for (into, parts) in joins {
        let shape = parts.iter().find_map(|(_, part)| part.as_ref()).map(Tensor::size);
        let misfits: Vec<_> = parts
            .iter()
            .map(|(name, part)| (name, part.as_ref().map(Tensor::size)))
            .filter(|(_, found)| *found != shape || shape.as_ref().is_none_or(Vec::is_empty))
            .map(|(name, found)| Misfit { name: name.clone(), expected: shape.clone(), found })
            .collect();
        if misfits.is_empty() {
            let parts: Vec<_> = parts.into_iter().filter_map(|(_, part)| part).collect();
            translated.insert(into, Tensor::cat(&parts, 0));
        }
        problems.extend(misfits);
    }
    if problems.is_empty() { Ok(translated) } else { Err(Error::Misfits { path: origin.to_owned(), problems }) }
}

/// The translation of a tensor of Hugging Face.
enum Translation {
    Dropped,
    Renamed(String),
    Transposed(String),
    /// A third of a tensor: 0 queries, 1 keys, 2 values.
    Joined {
        into: String,
        part: usize,
    },
}

fn translate(name: &str) -> Translation {
    if name.ends_with(".position_ids") {
        return Translation::Dropped;
    }
    let renamed = |new: &str| Translation::Renamed(new.to_owned());
    match name {
        "text_projection.weight" => return Translation::Transposed("text_projection".into()),
        "visual_projection.weight" => return Translation::Transposed("visual.proj".into()),
        "text_model.embeddings.token_embedding.weight" => return renamed(OPENAI_MARK),
        "text_model.embeddings.position_embedding.weight" => return renamed("positional_embedding"),
        "vision_model.embeddings.class_embedding" => return renamed("visual.class_embedding"),
        "vision_model.embeddings.patch_embedding.weight" => return renamed("visual.conv1.weight"),
        "vision_model.embeddings.position_embedding.weight" => return renamed("visual.positional_embedding"),
        _ => {}
    }
    for (theirs, ours) in [
        ("text_model.final_layer_norm.", "ln_final."),
        // Spelled as in their library.
        ("vision_model.pre_layrnorm.", "visual.ln_pre."),
        ("vision_model.post_layernorm.", "visual.ln_post."),
    ] {
        if let Some(rest) = name.strip_prefix(theirs) {
            return Translation::Renamed(format!("{ours}{rest}"));
        }
    }
    for (theirs, ours) in
        [("text_model.encoder.layers.", "transformer.resblocks."), ("vision_model.encoder.layers.", "visual.transformer.resblocks.")]
    {
        if let Some((block, rest)) = name.strip_prefix(theirs).and_then(|rest| rest.split_once('.')) {
            return translate_in_block(&format!("{ours}{block}"), rest).unwrap_or_else(|| renamed(name));
        }
    }
    renamed(name)
}

fn translate_in_block(block: &str, rest: &str) -> Option<Translation> {
    for (part, theirs) in ["self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."].iter().enumerate() {
        if let Some(leaf) = rest.strip_prefix(theirs) {
            return Some(Translation::Joined { into: format!("{block}.attn.in_proj_{leaf}"), part });
        }
    }
    [
        ("layer_norm1.", "ln_1."),
        ("layer_norm2.", "ln_2."),
        ("self_attn.out_proj.", "attn.out_proj."),
        ("mlp.fc1.", "mlp.c_fc."),
        ("mlp.fc2.", "mlp.c_proj."),
    ]
    .iter()
    .find_map(|(theirs, ours)| Some(Translation::Renamed(format!("{block}.{ours}{}", rest.strip_prefix(theirs)?))))
}

/// Reads shapes and collects the tensors that are missing or have another rank.
pub(crate) struct Shapes<'a> {
    pub(crate) tensors: &'a Tensors,
    pub(crate) problems: Vec<Misfit>,
}

impl Shapes<'_> {
    /// The shape of a tensor of rank `RANK`; ones, and a problem noted, where there is no such tensor.
    pub(crate) fn of<const RANK: usize>(&mut self, name: &str) -> [i64; RANK] {
        let found = self.tensors.get(name).map(Tensor::size);
        match found.as_deref().map(<[i64; RANK]>::try_from) {
            Some(Ok(shape)) => shape,
            _ => {
                self.problems.push(Misfit { name: name.to_owned(), expected: Some(vec![-1; RANK]), found });
                [1; RANK]
            }
        }
    }

    /// One more than the largest index after `prefix`; at most the number of tensors, even with damaged names.
    pub(crate) fn depth(&self, prefix: &str) -> usize {
        let indices = self.tensors.keys().filter_map(|name| name.strip_prefix(prefix)?.split('.').next()?.parse::<usize>().ok());
        indices.max().map_or(0, |largest| largest.saturating_add(1).min(self.tensors.len()))
    }
}

/// The side of a square grid that has one more position than cells.
fn grid_side(n_positions: i64) -> i64 {
    ((n_positions - 1).max(0) as f64).sqrt().round() as i64
}
