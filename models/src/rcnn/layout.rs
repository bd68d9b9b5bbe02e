//! The names that others give to the tensors of a detector, and how checkpoints are laid over a network.
//!
//! The network's own names are mmdet's and OADP's. DetPro has one head with two trunks, and its background is the output of a layer whose input is 1. torchvision's Mask R-CNN has other names, lists background first among classes where mmdet has it
//! last, and keeps boxes and masks of background, which nothing reads; both its names before and since version 0.13 are known.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use tch::{Device, Kind, Tensor, nn};

use crate::{
    Error, Misfit, Result,
    checkpoint::{Checkpoint, Place, not_finite, prefixes},
    detection::boxes::is_floating,
};

/// Ends the names of counters that mmdet keeps: of batches (batch normalisation) and of warm-up steps (OADP's losses).
const COUNTERS: [&str; 2] = [".num_batches_tracked", "._steps"];
/// A ResNet that is no detector has it.
const CLASSIFIER_MARK: &str = "layer4.0.conv1.weight";
/// A ResNet of CLIP has it, which is another network: its blocks and its stem are others.
const CLIP_MARK: &str = "attnpool.positional_embedding";
/// Only torchvision's detectors have it.
const TORCHVISION_MARK: &str = "roi_heads.box_predictor.cls_score.weight";

/// Only DetPro's detectors have it.
const DETPRO_MARK: &str = "roi_head.bg_embedding.weight";
/// What DetPro's names begin with, and ours. (DetPro, section 4.)
const DETPRO_PREFIXES: [(&str, &str); 4] = [
    ("roi_head.bbox_head.shared_convs_for_image.", "roi_head._object_head.shared_convs."),
    ("roi_head.bbox_head.shared_fcs_for_image.", "roi_head._object_head.shared_fcs."),
    ("roi_head.projection.", "roi_head.bbox_head.fc_cls._linear."),
    ("roi_head.projection_for_image.", "roi_head._object_head.fc_cls._linear."),
];
/// The embedding of background, `[1, D]`; DetPro's is the sum of a weight `[D, 1]` and a bias `[D]`.
const BACKGROUND: &str = "roi_head.bbox_head.fc_cls._bg_embedding";
/// The same of the object head, which no score depends on, and which DetPro does not have.
const OBJECT_BACKGROUND: &str = "roi_head._object_head.fc_cls._bg_embedding";
const DETPRO_BIAS: &str = "roi_head.bg_embedding.bias";
/// A whole CLIP that DetPro's checkpoints hold beside the detector.
const DETPRO_CLIP: &str = "roi_head.clip_model.";

/// Which tensors of a checkpoint were loaded, and which were not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// The place of the weights in the file, and the tensors elsewhere.
    pub place: Place,
    /// Names of parameters that have the checkpoint's values.
    pub loaded: Vec<String>,
    /// Parameters that keep their values, because the checkpoint has no such tensor.
    pub missing: Vec<Misfit>,
    /// Tensors of the checkpoint that the network has no place for.
    pub unmatched: Vec<Misfit>,
    /// Parameters that keep their values, because the checkpoint's are of another shape.
    pub misshaped: Vec<Misfit>,
    /// Counters of the checkpoint, which no network needs: names and values.
    pub counters: Vec<(String, i64)>,
    /// Tensors of a CLIP beside the detector, which is no part of it.
    pub clip: Vec<String>,
}

impl LoadReport {
    /// Refuses anything but a checkpoint of this very network; `origin` names the file.
    pub fn require_all(self, origin: &Path) -> Result<Self> {
        let problems: Vec<Misfit> = [&self.missing, &self.unmatched, &self.misshaped].into_iter().flatten().cloned().collect();
        if problems.is_empty() { Ok(self) } else { Err(Error::Misfits { path: origin.to_owned(), problems }) }
    }
}

/// A network of zeros with the weights of a file, which must have all of them and no others, and their owner. See [`load`].
pub fn filled<N>(
    checkpoint: &Checkpoint,
    device: Device,
    blank: impl FnOnce(&nn::Path<'_>) -> Result<N>,
    parameters: fn(&N) -> &BTreeMap<String, Tensor>,
) -> Result<(N, nn::VarStore)> {
    let store = nn::VarStore::new(device);
    let network = blank(&store.root())?;
    load(checkpoint.tensors(), parameters(&network), checkpoint.path())?.require_all(checkpoint.path())?;
    Ok((network, store))
}

/// Copies every tensor of a checkpoint that matches a parameter in name and shape; kinds are cast. Everything else is reported.
///
/// `checkpoint`: under mmdet's, OADP's or DetPro's names, with or without something before all of them (see [`Place`]), torchvision's Mask R-CNN, or a ResNet that
/// classifies images, for the backbone. Fails if nothing matches or if there are several such networks, or if a tensor that does holds no floating numbers.
pub fn load(checkpoint: &BTreeMap<String, Tensor>, parameters: &BTreeMap<String, Tensor>, origin: &Path) -> Result<LoadReport> {
    let place = place(checkpoint, parameters, origin)?;
    let mut tensors = place.tensors(checkpoint);
    if tensors.contains_key(TORCHVISION_MARK) {
        tensors = from_torchvision(&tensors, origin)?;
    } else if tensors.contains_key(CLASSIFIER_MARK) {
        tensors = tensors.into_iter().map(|(name, tensor)| (format!("backbone.{name}"), tensor)).collect();
    }
    let mut report = LoadReport { place, ..LoadReport::default() };
    if tensors.contains_key(DETPRO_MARK) {
        report.clip = tensors.keys().filter(|name| name.starts_with(DETPRO_CLIP)).cloned().collect();
        tensors = from_detpro(&tensors, origin)?;
    }
    let mut matched = Vec::new();
    for (name, tensor) in &tensors {
        match parameters.get(name) {
            None if COUNTERS.iter().any(|ending| name.ends_with(ending)) && tensor.numel() == 1 => {
                report.counters.push((name.clone(), tensor.to_kind(Kind::Int64).int64_value(&[])));
            }
            None => report.unmatched.push(Misfit { name: name.clone(), expected: None, found: Some(tensor.size()) }),
            Some(parameter) if parameter.size() != tensor.size() => {
                report.misshaped.push(Misfit { name: name.clone(), expected: Some(parameter.size()), found: Some(tensor.size()) });
            }
            Some(_) if !is_floating(tensor) => {
                return Err(malformed(origin, format!("{name}: expected a floating kind, found {:?}", tensor.kind())));
            }
            Some(parameter) => {
                if let Some(problem) = not_finite(tensor) {
                    let hint = Some("the training that wrote it diverged: take an earlier checkpoint".into());
                    return Err(Error::Malformed { path: origin.to_owned(), problem: format!("{name}: {problem}"), hint });
                }
                matched.push((parameter, tensor));
                report.loaded.push(name.clone());
            }
        }
    }
    let absent = parameters.iter().filter(|(name, _)| !tensors.contains_key(*name));
    report.missing = absent.map(|(name, tensor)| Misfit { name: name.clone(), expected: Some(tensor.size()), found: None }).collect();
    if matched.is_empty() {
        let first = tensors.keys().next().map_or("no tensor at all", String::as_str);
        return Err(malformed(origin, format!("no detector that is known: expected tensors such as backbone.conv1.weight, found {first}")));
    }
    for (parameter, tensor) in matched {
        tch::no_grad(|| parameter.shallow_clone().copy_(tensor));
    }
    Ok(report)
}

fn malformed(origin: &Path, problem: String) -> Error {
    let hint = "give a detector of mmdet, or torchvision's Mask R-CNN with a ResNet and a feature pyramid";
    Error::Malformed { path: origin.to_owned(), problem, hint: Some(hint.into()) }
}

/// Finds the place of a detector, or of a ResNet if there is no detector.
fn place(tensors: &BTreeMap<String, Tensor>, parameters: &BTreeMap<String, Tensor>, origin: &Path) -> Result<Place> {
    let mut n_known: BTreeMap<&str, usize> = BTreeMap::new();
    for name in tensors.keys() {
        let starts = std::iter::once(0).chain(name.match_indices('.').map(|(dot, _)| dot + 1));
        if let Some(start) = starts.into_iter().find(|start| parameters.contains_key(&name[*start..])) {
            *n_known.entry(&name[..start]).or_default() += 1;
        }
    }
    let most = n_known.values().copied().max().unwrap_or_default();
    // Parts of a network, such as a second head, are no network.
    let whole = n_known.into_iter().filter(|(_, n)| 2 * n > most).map(|(prefix, _)| prefix.to_owned());
    let classifiers =
        prefixes(tensors, CLASSIFIER_MARK).into_iter().filter(|prefix| !tensors.contains_key(&format!("{prefix}{CLIP_MARK}")));
    let candidates: [BTreeSet<String>; 3] = [prefixes(tensors, TORCHVISION_MARK), whole.collect(), classifiers.collect()];
    let places = candidates.into_iter().find(|places| !places.is_empty()).unwrap_or_default();
    let how = "save only that network: `torch.save` of its `state_dict()`";
    Ok(Place::choose(&places, None, tensors, origin, "one network", how)?.unwrap_or_default())
}

/// Translates torchvision's Mask R-CNN to mmdet's names and order of classes; names that no rule knows are kept.
pub fn from_torchvision(tensors: &BTreeMap<String, Tensor>, origin: &Path) -> Result<BTreeMap<String, Tensor>> {
    let mut renamed = BTreeMap::new();
    for (name, tensor) in tensors {
        let (new_name, classes) = mmdet_name(name);
        let rows = tensor.size().first().copied().unwrap_or_default();
        let tensor = match classes {
            Classes::None => tensor.shallow_clone(),
            Classes::BackgroundFirst if rows >= 2 => Tensor::cat(&[tensor.narrow(0, 1, rows - 1), tensor.narrow(0, 0, 1)], 0),
            Classes::ForEach(n) if rows > n => tensor.narrow(0, n, rows - n),
            Classes::BackgroundFirst | Classes::ForEach(_) => {
                let found = tensor.size();
                return Err(malformed(origin, format!("{name}: expected rows for background and at least one class, found {found:?}")));
            }
        };
        renamed.insert(new_name, tensor);
    }
    Ok(renamed)
}

/// Translates DetPro's detector to our names, without the CLIP beside it.
fn from_detpro(tensors: &BTreeMap<String, Tensor>, origin: &Path) -> Result<BTreeMap<String, Tensor>> {
    let (weight, bias) = (&tensors[DETPRO_MARK], tensors.get(DETPRO_BIAS));
    let Some(bias) = bias.filter(|bias| matches!(bias.size()[..], [d] if weight.size() == [d, 1])) else {
        let found = bias.map(Tensor::size);
        return Err(malformed(
            origin,
            format!("{DETPRO_MARK} is {:?}: expected a bias for each of its rows, found {found:?}", weight.size()),
        ));
    };
    let mut renamed = BTreeMap::from([(BACKGROUND.to_owned(), (weight.squeeze_dim(1) + bias).unsqueeze(0))]);
    let others = tensors.iter().filter(|(name, _)| !name.starts_with(DETPRO_CLIP) && ![DETPRO_MARK, DETPRO_BIAS].contains(&name.as_str()));
    for (name, tensor) in others {
        let known = DETPRO_PREFIXES.iter().find_map(|(theirs, ours)| name.strip_prefix(theirs).map(|rest| format!("{ours}{rest}")));
        renamed.insert(known.unwrap_or_else(|| name.clone()), tensor.shallow_clone());
    }
    if renamed.keys().any(|name| name.starts_with(DETPRO_PREFIXES[0].1)) {
        renamed.insert(OBJECT_BACKGROUND.to_owned(), renamed[BACKGROUND].zeros_like());
    }
    Ok(renamed)
}

/// Translates a detector with a box head and an object head to DetPro's names.
pub fn to_detpro(tensors: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let mut renamed = BTreeMap::new();
    for (name, tensor) in tensors.iter().filter(|(name, _)| *name != OBJECT_BACKGROUND) {
        if name == BACKGROUND {
            renamed.insert(DETPRO_MARK.to_owned(), tensor.tr().contiguous());
            renamed.insert(DETPRO_BIAS.to_owned(), tensor.squeeze_dim(0).zeros_like());
            continue;
        }
        let known = DETPRO_PREFIXES.iter().find_map(|(theirs, ours)| name.strip_prefix(ours).map(|rest| format!("{theirs}{rest}")));
        renamed.insert(known.unwrap_or_else(|| name.clone()), tensor.shallow_clone());
    }
    renamed
}

/// How the rows of a tensor of torchvision stand for classes.
#[derive(Clone, Copy)]
enum Classes {
    /// They do not.
    None,
    /// One row each, of which the first is background.
    BackgroundFirst,
    /// This many rows each; the first ones, of background, are not used.
    ForEach(i64),
}

fn mmdet_name(name: &str) -> (String, Classes) {
    let plain = |name: String| (name, Classes::None);
    if let Some(rest) = name.strip_prefix("backbone.body.") {
        return plain(format!("backbone.{rest}"));
    }
    for (theirs, ours) in [("backbone.fpn.inner_blocks.", "neck.lateral_convs."), ("backbone.fpn.layer_blocks.", "neck.fpn_convs.")] {
        if let Some((level, rest)) = name.strip_prefix(theirs).and_then(|rest| rest.split_once('.')) {
            return plain(format!("{ours}{level}.conv.{}", rest.strip_prefix("0.").unwrap_or(rest)));
        }
    }
    if let Some(rest) = name.strip_prefix("roi_heads.mask_head.") {
        if let Some((number, rest)) = rest.strip_prefix("mask_fcn").and_then(|rest| rest.split_once('.'))
            && let Ok(number @ 1..) = number.parse::<usize>()
        {
            return plain(format!("roi_head.mask_head.convs.{}.conv.{rest}", number - 1));
        }
        return plain(format!("roi_head.mask_head.convs.{}", rest.replacen(".0.", ".conv.", 1)));
    }
    let prefixes = [
        ("rpn.head.conv.0.0.", "rpn_head.rpn_conv.", Classes::None),
        ("rpn.head.conv.", "rpn_head.rpn_conv.", Classes::None),
        ("rpn.head.cls_logits.", "rpn_head.rpn_cls.", Classes::None),
        ("rpn.head.bbox_pred.", "rpn_head.rpn_reg.", Classes::None),
        ("roi_heads.box_head.fc6.", "roi_head.bbox_head.shared_fcs.0.", Classes::None),
        ("roi_heads.box_head.fc7.", "roi_head.bbox_head.shared_fcs.1.", Classes::None),
        ("roi_heads.box_predictor.cls_score.", "roi_head.bbox_head.fc_cls.", Classes::BackgroundFirst),
        ("roi_heads.box_predictor.bbox_pred.", "roi_head.bbox_head.fc_reg.", Classes::ForEach(4)),
        ("roi_heads.mask_predictor.conv5_mask.", "roi_head.mask_head.upsample.", Classes::None),
        ("roi_heads.mask_predictor.mask_fcn_logits.", "roi_head.mask_head.conv_logits.", Classes::ForEach(1)),
    ];
    let known =
        prefixes.iter().find_map(|&(theirs, ours, classes)| name.strip_prefix(theirs).map(|rest| (format!("{ours}{rest}"), classes)));
    known.unwrap_or_else(|| plain(name.to_owned()))
}
