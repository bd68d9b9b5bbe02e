//! Heads and whole detectors, and how checkpoints are laid over them.

use std::{collections::BTreeMap, path::Path};

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use tch::{Device, Kind, Tensor, nn};

use super::super::{
    Config, Detector, Given, TestRule, Vocabularies,
    classifier::{Ensemble, HeadWeight, LogitScale, Vocabulary},
    heads::{DetectionRule, RegionRule, RegionSample, region_losses},
    layout,
    mask_head::{MaskConfig, MaskHeadConfig, MaskRule, ObjectMask, mask_loss},
    mask_rcnn::{MaskRcnn, MaskRcnnConfig, MaskRcnnLosses, Objects},
    regions::{POOL, Pyramid, REGION_CODER},
    rpn::{ProposalRule, Proposals},
};
use crate::{
    Error, Misfit, Phase,
    detection::{
        Detections,
        boxes::{BoxLoss, ImageSize, Suppression, boxes_tensor, floats, integers, iou_matrix},
        golden::{Golden, boxes_of, field, images, values},
        matching::{Assigner, Sampler, Truth},
        roi_align::RoiAlign,
    },
    golden::error,
    raf, to_unit_length,
};

fn origin() -> &'static Path {
    Path::new("detector.pth")
}

/// The state dict of `make_mask_rcnn`, under torchvision's names.
fn mask_rcnn_weights(golden: &Golden) -> BTreeMap<String, Tensor> {
    let shapes = golden.0["shapes"].as_object().unwrap().iter();
    let shapes = shapes.map(|(name, shape)| (name, shape.as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect::<Vec<_>>()));
    let mut tensors: BTreeMap<String, Tensor> = shapes.map(|(name, shape)| (name.clone(), values(name, &shape))).collect();
    tensors.insert("roi_heads.box_predictor.cls_score.bias".into(), golden.tensor("cls_score_bias", &[91]));
    tensors.insert("backbone.body.bn1.num_batches_tracked".into(), Tensor::from(3_i64));
    tensors
}

fn torchvision() -> MaskRcnnConfig {
    let proposals = ProposalRule { per_level: 300, suppression: Suppression { iou: 0.7, keep: 150 }, least_side: 1e-3 };
    MaskRcnnConfig { proposals, ..MaskRcnnConfig::torchvision(90) }
}

#[test]
fn mask_rcnn_detects_what_torchvisions_detects() {
    let golden = Golden::read("mask_rcnn");
    let store = nn::VarStore::new(Device::Cpu);
    let network = MaskRcnn::new(&store.root(), &torchvision(), 1).unwrap();
    let report = layout::load(&mask_rcnn_weights(&golden), network.parameters(), origin()).unwrap().require_all(origin()).unwrap();
    assert_eq!(report.counters, [("backbone.bn1.num_batches_tracked".to_owned(), 3)]);

    let batch = images("images.mask-rcnn", [5, 3, 224, 256]);
    let sizes = [(160, 192), (224, 256), (200, 131), (97, 256), (224, 150)].map(|(height, width)| ImageSize { width, height });
    for (image, &ImageSize { width, height }) in sizes.iter().enumerate() {
        let padded = batch.get(image as i64);
        drop(padded.narrow(1, height, 224 - height).fill_(0.0));
        drop(padded.narrow(2, width, 256 - width).fill_(0.0));
    }
    let found = network.detect(&batch, &sizes).unwrap();
    for (image, (found, expected)) in found.iter().zip(golden.parts("detections")).enumerate() {
        assert_eq!(found.kept.rows.len() as i64, expected.0["n"].as_i64().unwrap());
        let masks = found.masks.as_ref().unwrap().narrow(0, 0, 20).sigmoid();
        let errors = [
            error(&found.kept.boxes.narrow(0, 0, 20), &expected.tensor("boxes", &[20, 4])),
            error(&Tensor::from_slice(&found.kept.scores[..20]), &expected.tensor("scores", &[20])),
            error(&masks.mean_dim([1_i64, 2].as_slice(), false, Kind::Float), &expected.tensor("mask_means", &[20])),
            error(&masks.diagonal(0, 1, 2), &expected.tensor("mask_diagonals", &[20, 28])),
        ];
        println!("image {image}: boxes {:.1e} px, scores {:.1e}, masks {:.1e} {:.1e}", errors[0], errors[1], errors[2], errors[3]);
        assert!(errors.iter().all(|&error| error < 1e-3), "image {image}: {errors:?}");
        // torchvision counts background as 0.
        let labels: Vec<i64> = found.kept.classes[..20].iter().map(|class| class + 1).collect();
        assert_eq!(labels, expected.integers("labels"));
    }
}

#[test]
fn mask_rcnn_learns_as_torchvisions_learns() {
    let golden = Golden::read("training");
    let everything = Sampler { n: 1_000_000, object_fraction: 0.25, background_per_object: None };
    let mut config = torchvision();
    config.training_proposals = config.proposals;
    config.regions.rpn.sampler = everything;
    config.regions_rule.sampler = everything;
    let store = nn::VarStore::new(Device::Cpu);
    let network = MaskRcnn::new(&store.root(), &config, 1).unwrap();
    let detection = Golden::read("mask_rcnn");
    let mut weights = mask_rcnn_weights(&detection);
    weights.insert("roi_heads.box_predictor.cls_score.bias".into(), values("roi_heads.box_predictor.cls_score.bias", &[91]));
    layout::load(&weights, network.parameters(), origin()).unwrap().require_all(origin()).unwrap();

    let batch = images("images.training", [2, 3, 160, 192]);
    drop(batch.get(1).narrow(1, 128, 32).fill_(0.0));
    drop(batch.get(1).narrow(2, 150, 42).fill_(0.0));
    let sizes = [ImageSize { width: 192, height: 160 }, ImageSize { width: 150, height: 128 }];
    let objects = [0, 1].map(|image: usize| {
        let boxes: Vec<f32> = golden.0["objects"][image].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        let mask = |(index, corners): (usize, &[f32; 4])| {
            let [x1, y1, x2, y2] = corners.map(|corner| corner as i64);
            let pixels = Tensor::zeros([160, 192], (Kind::Uint8, Device::Cpu));
            let within = |all: &Tensor| all.narrow(0, y1, y2 - y1).narrow(1, x1, x2 - x1);
            within(&pixels).copy_(&within(&field(&format!("training.masks.{image}.{index}"), &[160, 192])).gt(-0.5));
            ObjectMask { pixels, left: 0, top: 0 }
        };
        let boxes = boxes.as_chunks().0;
        // torchvision counts background as 0.
        let labels = Tensor::from_slice(&[6_i64, 0, 89][..boxes.len()]);
        Objects { masks: boxes.iter().enumerate().map(mask).collect(), labels, boxes: boxes_tensor(boxes) }
    });
    let losses = network.losses(&batch, &sizes, &objects, &mut ChaCha8Rng::seed_from_u64(1)).unwrap();
    losses.total().backward();
    let MaskRcnnLosses { proposals, regions, masks } = losses;
    let expected = golden.part("losses");
    for (name, found) in [
        ("loss_objectness", proposals.objectness),
        ("loss_rpn_box_reg", proposals.boxes),
        ("loss_classifier", regions.classes),
        ("loss_box_reg", regions.boxes),
        ("loss_mask", masks),
    ] {
        let error = found.double_value(&[]) / expected.0[name].as_f64().unwrap() - 1.0;
        println!("{name}: {error:.1e}");
        assert!(error.abs() < 1e-4, "{name}: {error}");
    }
    let gradients = golden.part("gradients").0;
    assert_eq!(gradients.len(), store.trainable_variables().len());
    let mut largest = 0.0_f64;
    for (name, length) in &gradients {
        // Only the name is translated.
        let translated =
            layout::from_torchvision(&BTreeMap::from([(name.clone(), Tensor::zeros([91 * 4, 1], (Kind::Float, Device::Cpu)))]), origin());
        let parameter = &network.parameters()[translated.unwrap().keys().next().unwrap()];
        let error = (parameter.grad().to_kind(Kind::Double).norm().double_value(&[]) / length.as_f64().unwrap() - 1.0).abs();
        assert!(error < 1e-3, "{name}: {error}");
        largest = largest.max(error);
    }
    println!("gradients: {largest:.1e}");
}

#[test]
fn older_names_of_torchvision_give_the_same_tensors() {
    let tensor = || field("some", &[3, 4]);
    let translate = |name: &str| layout::from_torchvision(&BTreeMap::from([(name.to_owned(), tensor())]), origin()).unwrap();
    for (older, newer, ours) in [
        ("backbone.fpn.inner_blocks.2.weight", "backbone.fpn.inner_blocks.2.0.weight", "neck.lateral_convs.2.conv.weight"),
        ("backbone.fpn.layer_blocks.0.bias", "backbone.fpn.layer_blocks.0.0.bias", "neck.fpn_convs.0.conv.bias"),
        ("rpn.head.conv.weight", "rpn.head.conv.0.0.weight", "rpn_head.rpn_conv.weight"),
        ("roi_heads.mask_head.mask_fcn4.bias", "roi_heads.mask_head.3.0.bias", "roi_head.mask_head.convs.3.conv.bias"),
    ] {
        assert_eq!(translate(older).keys().collect::<Vec<_>>(), [ours]);
        assert_eq!(translate(newer), translate(older));
    }
    let classes = &translate("roi_heads.box_predictor.cls_score.weight")["roi_head.bbox_head.fc_cls.weight"];
    assert_eq!(classes, &Tensor::cat(&[tensor().narrow(0, 1, 2), tensor().narrow(0, 0, 1)], 0));
    let masks = &translate("roi_heads.mask_predictor.mask_fcn_logits.weight")["roi_head.mask_head.conv_logits.weight"];
    assert_eq!(masks, &tensor().narrow(0, 1, 2));
    let none = BTreeMap::from([("roi_heads.box_predictor.bbox_pred.bias".to_owned(), tensor())]);
    let refusal = layout::from_torchvision(&none, origin()).unwrap_err().to_string();
    assert!(refusal.ends_with("bbox_pred.bias: expected rows for background and at least one class, found [3, 4]"), "{refusal}");
}

fn toy() -> Config {
    let mask = MaskConfig { pool: RoiAlign { side: 14, ..POOL }, head: MaskHeadConfig { n_convs: 1, channels: 8, n_masks: 1 } };
    Config { mask_head: Some(mask), ..Config::toy(16) }
}

fn detector(config: &Config, seed: u64) -> (nn::VarStore, Detector) {
    let store = nn::VarStore::new(Device::Cpu);
    let detector = Detector::new(&store.root(), config, seed).unwrap();
    (store, detector)
}

/// The census of section 6.7 of OADP's specification.
#[test]
fn parameters_have_the_names_and_shapes_of_mmdet() {
    let (store, detector) = detector(&Config::oadp(512).with_masks(), 1);
    let shape = |name: &str| detector.parameters().get(name).unwrap_or_else(|| panic!("no {name}")).size();
    for (name, expected) in [
        ("backbone.conv1.weight", vec![64, 3, 7, 7]),
        ("backbone.layer1.0.downsample.1.running_var", vec![256]),
        ("backbone.layer4.2.conv3.weight", vec![2048, 512, 1, 1]),
        ("neck.lateral_convs.3.conv.weight", vec![256, 2048, 1, 1]),
        ("neck.fpn_convs.0.bn.bias", vec![256]),
        ("rpn_head.rpn_conv.weight", vec![256, 256, 3, 3]),
        ("rpn_head.rpn_cls.bias", vec![3]),
        ("rpn_head.rpn_reg.weight", vec![12, 256, 1, 1]),
        ("roi_head.bbox_head.shared_convs.3.conv.weight", vec![256, 256, 3, 3]),
        ("roi_head.bbox_head.shared_convs.0.bn.running_mean", vec![256]),
        ("roi_head.bbox_head.shared_fcs.0.weight", vec![1024, 12544]),
        ("roi_head.bbox_head.fc_cls._linear.weight", vec![512, 1024]),
        ("roi_head.bbox_head.fc_cls._bg_embedding", vec![1, 512]),
        ("roi_head.bbox_head.fc_reg.weight", vec![4, 1024]),
        ("roi_head._object_head.shared_convs.3.bn.weight", vec![256]),
        ("roi_head._object_head.fc_cls._bg_embedding", vec![1, 512]),
        ("roi_head._block_head.shared_fcs.1.weight", vec![1024, 1024]),
        ("roi_head._block_head.fc_cls._linear.bias", vec![512]),
        ("_global_head._classifier._linear.weight", vec![512, 256]),
        ("roi_head.mask_head.convs.3.conv.bias", vec![256]),
        ("roi_head.mask_head.upsample.weight", vec![256, 256, 2, 2]),
        ("roi_head.mask_head.conv_logits.weight", vec![1, 256, 1, 1]),
    ] {
        assert_eq!(shape(name), expected, "{name}");
    }
    for absent in ["neck.fpn_convs.0.conv.bias", "roi_head._object_head.fc_reg.weight", "roi_head._block_head.shared_convs.0.conv.weight"] {
        assert!(!detector.parameters().contains_key(absent), "{absent}");
    }
    assert_eq!(store.variables().len(), detector.parameters().len());
    // Backbone 53 convolutions and normalisations, pyramid 8, three of proposals; per trunk four convolutions.
    assert_eq!(detector.parameters().len(), 53 * 5 + 8 * 5 + 6 + (20 + 2 + 3 + 2) + (20 + 2 + 3) + (4 + 3) + 2 + (8 + 2 + 2));
}

#[test]
fn what_a_checkpoint_lacks_has_too_much_or_in_another_shape_is_listed() {
    let (_store, network) = detector(&toy(), 1);
    let (_other, trained) = detector(&toy(), 2);
    let mut checkpoint: BTreeMap<String, Tensor> =
        trained.parameters().iter().map(|(name, tensor)| (format!("state_dict.module.{name}"), tensor.copy())).collect();
    checkpoint.remove("state_dict.module.rpn_head.rpn_cls.bias");
    checkpoint.insert("state_dict.module.neck.bn.weight".into(), field("extra", &[3]));
    checkpoint.insert("state_dict.module.roi_head.bbox_head.fc_reg.bias".into(), field("wide", &[8]));
    checkpoint.insert("state_dict.module.roi_head._block_head._loss._weight._steps".into(), Tensor::from(1_i64));
    let before = network.parameters()["roi_head.bbox_head.fc_reg.bias"].copy();

    let report = layout::load(&checkpoint, network.parameters(), origin()).unwrap();
    let misfit = |name: &str, expected: Option<Vec<i64>>, found: Option<Vec<i64>>| [Misfit { name: name.into(), expected, found }];
    assert_eq!(report.missing, misfit("rpn_head.rpn_cls.bias", Some(vec![3]), None));
    assert_eq!(report.unmatched, misfit("neck.bn.weight", None, Some(vec![3])));
    assert_eq!(report.misshaped, misfit("roi_head.bbox_head.fc_reg.bias", Some(vec![4]), Some(vec![8])));
    assert_eq!(report.counters, [("roi_head._block_head._loss._weight._steps".to_owned(), 1)]);
    assert_eq!(report.loaded.len(), network.parameters().len() - 2);
    for name in &report.loaded {
        assert_eq!(network.parameters()[name], trained.parameters()[name], "{name}");
    }
    assert_eq!(network.parameters()["roi_head.bbox_head.fc_reg.bias"], before);
    let Err(Error::Misfits { problems, .. }) = report.require_all(origin()) else { panic!("it does not fit") };
    assert_eq!(problems.len(), 3);
}

#[test]
fn a_detector_is_found_wherever_a_file_has_it() {
    let (_store, network) = detector(&toy(), 1);
    let at = |prefix: &str| {
        network.parameters().iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor.copy())).collect::<BTreeMap<_, _>>()
    };
    for prefix in ["", "model.", "state_dict.module._orig_mod.", "ema_state_dict.detector."] {
        let mut file = at(prefix);
        file.insert("other.weight".into(), field("other", &[3]));
        let report = layout::load(&file, network.parameters(), origin()).unwrap();
        assert_eq!(report.loaded.len(), network.parameters().len(), "{prefix}");
        let (beside, unmatched) = if prefix.is_empty() { (0, 1) } else { (1, 0) };
        assert_eq!((&report.place.prefix[..], report.place.beside.len(), report.unmatched.len()), (prefix, beside, unmatched));
    }
    let mut both = at("state_dict.student.");
    both.extend(at("state_dict.teacher."));
    let error = layout::load(&both, network.parameters(), origin()).unwrap_err();
    assert_eq!(error.to_string(), "detector.pth: expected one network, found 2: under `state_dict.student.`, under `state_dict.teacher.`");
    assert!(error.hint().is_some());
}

#[test]
fn a_classifier_of_images_gives_its_backbone() {
    let (_store, network) = detector(&toy(), 1);
    let (_other, trained) = detector(&toy(), 2);
    let backbone =
        trained.parameters().iter().filter_map(|(name, tensor)| Some((name.strip_prefix("backbone.")?.to_owned(), tensor.copy())));
    let mut classifier: BTreeMap<String, Tensor> = backbone.collect();
    let n_tensors = classifier.len();
    classifier.insert("fc.weight".into(), field("fc", &[10, 128]));
    let report = layout::load(&classifier, network.parameters(), origin()).unwrap();
    assert_eq!((report.loaded.len(), report.unmatched.len()), (n_tensors, 1));
    assert_eq!(report.missing.len(), network.parameters().len() - n_tensors);
    assert_eq!(network.parameters()["backbone.conv1.weight"], trained.parameters()["backbone.conv1.weight"]);
    // Within a checkpoint of CLIP there is another kind of ResNet.
    let mut clip: BTreeMap<String, Tensor> = classifier.into_iter().map(|(name, tensor)| (format!("visual.{name}"), tensor)).collect();
    assert_eq!(layout::load(&clip, network.parameters(), origin()).unwrap().loaded.len(), n_tensors);
    clip.insert("visual.attnpool.positional_embedding".into(), field("positions", &[50, 128]));
    assert!(layout::load(&clip, network.parameters(), origin()).unwrap_err().to_string().contains("no detector that is known"));
}

#[test]
fn a_checkpoint_of_something_else_is_refused() {
    let (_store, network) = detector(&toy(), 1);
    let refusal = |name: &str, tensor: Tensor| {
        layout::load(&BTreeMap::from([(name.to_owned(), tensor)]), network.parameters(), origin()).unwrap_err().to_string()
    };
    let expected = "detector.pth: no detector that is known: expected tensors such as backbone.conv1.weight, found visual.proj";
    assert_eq!(refusal("visual.proj", field("some", &[3])), expected);
    let bias = || field("bias", &[3]);
    let twice = BTreeMap::from([("rpn_head.rpn_cls.bias".to_owned(), bias()), ("module.rpn_head.rpn_cls.bias".to_owned(), bias())]);
    let refused = layout::load(&twice, network.parameters(), origin()).unwrap_err().to_string();
    assert_eq!(refused, "detector.pth: expected one network, found 2: at the top level, under `module.`");
    let kind = refusal("rpn_head.rpn_cls.bias", Tensor::from_slice(&[1_i64, 2, 3]));
    assert_eq!(kind, "detector.pth: rpn_head.rpn_cls.bias: expected a floating kind, found Int64");
}

#[test]
fn pooled_features_are_flattened_channel_by_channel() {
    let (_store, detector) = detector(&toy(), 1);
    for name in ["shared_fcs.0", "shared_fcs.1", "fc_cls._linear"] {
        let tensor = |end: &str| detector.parameters()[&format!("roi_head._block_head.{name}.{end}")].detach();
        drop(tensor("bias").zero_());
        drop(tensor("weight").zero_());
        // Channel 3, row 2, column 5 of 7 x 7 cells; then the first of each layer.
        let column = if name == "shared_fcs.0" { 3 * 49 + 2 * 7 + 5 } else { 0 };
        drop(tensor("weight").get(0).get(column).fill_(1.0));
    }
    let head = detector.block_head.as_ref().unwrap();
    let embedding = |cell: [i64; 3]| {
        let pooled = Tensor::zeros([1, 64, 7, 7], (Kind::Float, Device::Cpu));
        drop(pooled.get(0).get(cell[0]).get(cell[1]).get(cell[2]).fill_(4.0));
        head.forward(&pooled, Phase::Test).unwrap().embeddings.get(0).get(0)
    };
    let answers = Tensor::stack(&[[3, 2, 5], [3, 5, 2], [2, 3, 5], [5, 2, 3]].map(embedding), 0);
    assert_eq!(floats(&answers), [1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn objects_are_regions_too_and_regions_carry_their_labels_and_deltas() {
    let rule = RegionRule {
        assigner: Assigner { object_iou: 0.5, background_iou: 0.5, best_of_object_iou: None },
        sampler: Sampler { n: 8, object_fraction: 0.5, background_per_object: None },
        coder: REGION_CODER,
    };
    let truth = Truth::from(boxes_tensor(&[[10.0, 10.0, 50.0, 50.0], [60.0, 20.0, 100.0, 80.0]]));
    let proposals = boxes_tensor(&[[62.0, 20.0, 100.0, 80.0], [0.0, 0.0, 20.0, 20.0], [120.0, 0.0, 140.0, 20.0]]);
    let labels = Tensor::from_slice(&[5_i64, 2]);
    let choose = |labels: &Tensor| rule.choose(&proposals, &truth, labels, 6, &mut ChaCha8Rng::seed_from_u64(1));
    let sample = choose(&labels).unwrap();
    assert_eq!(sample.boxes, Tensor::cat(&[&truth.objects, &proposals], 0));
    assert_eq!((integers(&sample.labels), sample.objects), (vec![5, 2, 2, 6, 6], vec![0, 1, 1]));
    // The third region is 2 px too narrow on the left.
    let shift = (1.0 - 2.0) / 38.0 / 0.1;
    let expected = boxes_tensor(&[[0.0; 4], [0.0; 4], [shift, 0.0, (40.0_f32 / 38.0).ln() / 0.2, 0.0]]);
    assert!(error(&sample.deltas, &expected) < 1e-4);
    let refusal = choose(&Tensor::from_slice(&[5_i64, 6])).unwrap_err().to_string();
    assert_eq!(refusal, "labels: expected 0 to 5, found 6");
    let refusal = choose(&Tensor::from_slice(&[5_i64])).unwrap_err().to_string();
    assert_eq!(refusal, "labels: expected i64 [2], one for each object, found Int64 [1]");
}

fn sample(labels: &[i64], deltas: &[[f32; 4]]) -> RegionSample {
    let n = labels.len();
    RegionSample {
        boxes: boxes_tensor(&vec![[0.0, 0.0, 9.0, 9.0]; n]),
        labels: Tensor::from_slice(labels),
        deltas: boxes_tensor(deltas),
        objects: (0..deltas.len()).collect(),
    }
}

#[test]
fn losses_of_regions_are_divided_by_their_number() {
    // Three regions of two images, two classes; logits are even, so each entropy is ln 3.
    let samples = [sample(&[1, 2], &[[1.0, 0.0, 0.0, 0.0]]), sample(&[0], &[[0.0, 0.0, 0.0, -0.5]])];
    let logits = Tensor::zeros([3, 3], (Kind::Float, Device::Cpu));
    let zeros = |columns: i64| Tensor::zeros([3, columns], (Kind::Float, Device::Cpu));
    let check = |deltas: &Tensor, expected: f64| {
        let losses = region_losses(BoxLoss::Absolute, &logits, deltas, &samples).unwrap();
        let found = [losses.classes, losses.boxes].map(|loss| loss.double_value(&[]));
        assert!((found[0] - 3.0_f64.ln()).abs() < 1e-6 && (found[1] - expected / 3.0).abs() < 1e-6, "{found:?}");
    };
    check(&zeros(4), 1.5);
    // Of eight deltas those of the class count: of class 1 in the first row, of class 0 in the last, and none of background.
    let own = zeros(8);
    drop(own.get(0).narrow(0, 4, 4).fill_(1.0));
    drop(own.get(1).fill_(9.0));
    drop(own.get(2).narrow(0, 0, 4).fill_(-0.5));
    check(&own, 3.0 + 1.5);
    let refusal = region_losses(BoxLoss::Absolute, &logits, &zeros(12), &samples).unwrap_err().to_string();
    assert_eq!(refusal, "box deltas: expected [3, 4] or [3, 8], found Float [3, 12]");
    let refusal = region_losses(BoxLoss::Absolute, &logits.narrow(1, 0, 2), &zeros(4), &samples).unwrap_err().to_string();
    assert_eq!(refusal, "labels: expected 0 to 1, which is background, found 2");
    let nothing = region_losses(BoxLoss::Absolute, &logits.narrow(0, 0, 0), &zeros(4).narrow(0, 0, 0), &[]).unwrap();
    assert_eq!(floats(&Tensor::stack(&[nothing.classes, nothing.boxes], 0)), [0.0, 0.0]);
}

#[test]
fn a_mask_is_cut_out_of_the_box_of_its_object() {
    let masks = Tensor::zeros([2, 40, 60], (Kind::Uint8, Device::Cpu));
    // The second object: the left half of the box, below row 20.
    drop(masks.get(1).narrow(0, 20, 20).narrow(1, 10, 10).fill_(1));
    let masks = [0, 1].map(|object| ObjectMask { pixels: masks.get(object), left: 0, top: 0 });
    let boxes = boxes_tensor(&[[10.0, 4.0, 30.0, 36.0], [10.0, 4.0, 30.0, 36.0], [0.0, 20.0, 20.0, 40.0]]);
    let targets = MaskRule::MMDET.targets(&masks, &boxes, &[1, 0, 1], 4).unwrap();
    let (left, right, off) = ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [0.0; 4]);
    assert_eq!(floats(&targets.get(0)), [off, off, left, left].concat());
    assert_eq!(floats(&targets.get(1)), [0.0; 16]);
    assert_eq!(floats(&targets.get(2)), [right; 4].concat());
    let even = mask_loss(&targets.zeros_like(), &targets).unwrap().double_value(&[]);
    assert!((even - 2.0_f64.ln()).abs() < 1e-6, "{even}");
    assert_eq!(MaskRule::MMDET.targets(&masks, &boxes.narrow(0, 0, 0), &[], 4).unwrap().size(), [0, 4, 4]);
    let refusal = MaskRule::MMDET.targets(&masks, &boxes, &[1, 2, 0], 4).unwrap_err().to_string();
    assert_eq!(refusal, "objects of masks: expected indices of 2 masks, found 2");
    let masks = [ObjectMask { pixels: field("mask", &[3, 4]), left: 0, top: 0 }];
    let refusal = MaskRule::MMDET.targets(&masks, &boxes, &[0, 0, 0], 4).unwrap_err().to_string();
    assert_eq!(refusal, "pixels of a mask: expected u8 [h, w], both at least 1, found Float [3, 4]");
}

#[test]
fn a_small_part_of_the_image_gives_the_mask_that_the_whole_image_gives() {
    let (width, height) = (60, 40);
    // What is left and right, above and below of the object: in the middle, at the upper left, at the lower right; all of the image.
    for [x1, y1, x2, y2] in [[20, 15, 41, 30], [0, 1, 17, 9], [45, 22, 60, 40], [0, 0, 60, 40]] {
        let whole = Tensor::zeros([height, width], (Kind::Uint8, Device::Cpu));
        let inside = field("speckles", &[y2 - y1, x2 - x1]).gt(-0.5).to_kind(Kind::Uint8);
        whole.narrow(0, y1, y2 - y1).narrow(1, x1, x2 - x1).copy_(&inside);
        let (left, top, right, bottom) = ((x1 - 2).max(0), (y1 - 2).max(0), (x2 + 2).min(width), (y2 + 2).min(height));
        let part = ObjectMask { pixels: whole.narrow(0, top, bottom - top).narrow(1, left, right - left), left, top };
        let whole = ObjectMask { pixels: whole, left: 0, top: 0 };
        let boxes = boxes_of("mask.boxes", 200, 70.0, 2.0, 50.0).into_iter().map(|corners| corners.map(|corner| corner - 10.0));
        let boxes = boxes_tensor(&boxes.collect::<Vec<_>>());
        let [whole, part] = [whole, part].map(|mask| MaskRule::MMDET.targets(&[mask], &boxes, &[0; 200], 28).unwrap());
        assert_eq!(part, whole);
        assert!(whole.sum(Kind::Float).double_value(&[]) > 500.0, "boxes meet the object");
    }
}

#[test]
fn configurations_survive_serialisation_and_bad_ones_are_refused() {
    for config in [Config::oadp(512).with_masks(), toy()] {
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), config);
    }
    let mut config = toy();
    config.bbox_head.trunk.n_fcs = 0;
    assert_eq!(config.check().unwrap_err().to_string(), "trunk.n_fcs: expected at least 1, found 0");
    let mut config = toy();
    config.bbox_head.boxes = config.object_head.unwrap().boxes;
    assert_eq!(config.check().unwrap_err().to_string(), "bbox_head.boxes: expected agnostic: it is what detects, found none");
}

#[test]
fn images_that_are_no_images_are_refused_in_words() {
    let (_store, detector) = detector(&toy(), 1);
    let refusal = |shape: &[i64]| {
        let images = Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        detector.regions.forward(&images, Phase::Test).unwrap_err().to_string()
    };
    let expected = "images: expected f32, bf16 or f16 [B, 3, H, W], B at least 1, H and W at least 32, found Float";
    assert_eq!(refusal(&[1, 3, 31, 64]), format!("{expected} [1, 3, 31, 64]"));
    assert_eq!(refusal(&[3, 64, 64]), format!("{expected} [3, 64, 64]"));
}

const SIZES: [ImageSize; 2] = [ImageSize { width: 128, height: 96 }, ImageSize { width: 100, height: 80 }];

/// The two objects of an image; their classes are 0 and 2.
fn toy_objects(image: usize) -> Tensor {
    boxes_tensor(&boxes_of(&format!("toy.objects.{image}"), 2, 50.0, 16.0, 30.0))
}

/// Five classes, three of them base.
fn toy_classes() -> Vocabulary {
    Vocabulary::new(field("toy.classes", &[5, 16]), 3, LogitScale::Temperature { train: 0.2, test: 0.2 }).unwrap()
}

/// What a step over two images with two objects each looks at, and the losses of proposals and of regions.
struct Step {
    pyramid: Pyramid,
    samples: Vec<RegionSample>,
    /// Of all regions, `[N, C, side, side]`.
    pooled: Tensor,
    losses: [Tensor; 4],
}

fn step(detector: &Detector, kind: Kind, rng: &mut ChaCha8Rng) -> Step {
    let images = images("images.toy", [2, 3, 96, 128]).to_kind(kind);
    let pyramid = detector.regions.forward(&images, Phase::Train).unwrap();
    let objects = |image| boxes_tensor(&boxes_of(&format!("toy.objects.{image}"), 2, 50.0, 16.0, 30.0));
    let truths = [objects(0), objects(1)].map(Truth::from);
    let labels = Tensor::from_slice(&[0_i64, 2]);
    let rpn = &detector.regions.rpn;
    let rpn_losses = rpn.losses(&pyramid.predictions, &SIZES, &truths, rng).unwrap();
    let limits = ProposalRule { per_level: 100, suppression: Suppression { iou: 0.7, keep: 100 }, least_side: 0.0 };
    let rule = RegionRule {
        assigner: Assigner { object_iou: 0.5, background_iou: 0.5, best_of_object_iou: None },
        sampler: Sampler { n: 64, object_fraction: 0.25, background_per_object: None },
        coder: REGION_CODER,
    };
    let proposals = rpn.proposals(&pyramid.predictions, &SIZES, &limits).unwrap();
    let samples: Vec<RegionSample> =
        proposals.iter().zip(&truths).map(|(found, truth)| rule.choose(&found.boxes, truth, &labels, 5, rng).unwrap()).collect();

    let boxes: Vec<Tensor> = samples.iter().map(|sample| sample.boxes.shallow_clone()).collect();
    let pooled = pyramid.pool(&detector.config().pool, &boxes).unwrap();
    let regions = detector.bbox_head.forward(&pooled, Phase::Train).unwrap();
    let logits = detector.bbox_head.classifier.logits(&regions.embeddings, &toy_classes(), Phase::Train).unwrap();
    let region_losses = region_losses(BoxLoss::Absolute, &logits, &regions.deltas.unwrap(), &samples).unwrap();

    let losses = [rpn_losses.objectness, rpn_losses.boxes, region_losses.classes, region_losses.boxes];
    Step { pyramid, samples, pooled, losses }
}

/// All losses of a step, on images of this kind.
fn losses(detector: &Detector, kind: Kind, rng: &mut ChaCha8Rng) -> Vec<Tensor> {
    let Step { pyramid, samples, pooled, losses } = step(detector, kind, rng);
    let mask = &detector.config().mask_head.unwrap();
    let on_objects: Vec<Tensor> = samples.iter().map(|sample| sample.boxes.narrow(0, 0, sample.objects.len() as i64)).collect();
    let masks = field("toy.masks", &[2, 96, 128]).gt(0.0).to_kind(Kind::Uint8);
    let masks = [0, 1].map(|object| ObjectMask { pixels: masks.get(object), left: 0, top: 0 });
    let targets: Vec<Tensor> = samples
        .iter()
        .zip(&on_objects)
        .map(|(sample, boxes)| MaskRule::MMDET.targets(&masks, boxes, &sample.objects, 28).unwrap())
        .collect();
    let targets = Tensor::cat(&targets, 0);
    let pooled_for_masks = pyramid.pool(&mask.pool, &on_objects).unwrap();
    let drawn = detector.mask_head.as_ref().unwrap().forward(&pooled_for_masks, &vec![0; targets.size()[0] as usize]).unwrap();

    // What the other heads learn from is not this crate's; any pull will do.
    let pull = |embeddings: Tensor| (embeddings - 0.1).abs().mean(Kind::Float);
    let [object, block] = [&detector.object_head, &detector.block_head]
        .map(|head| pull(head.as_ref().unwrap().forward(&pooled, Phase::Train).unwrap().embeddings));
    let global = pull(detector.global_head.as_ref().unwrap().embed(&pyramid.levels[4]).unwrap());
    losses.into_iter().chain([mask_loss(&drawn, &targets).unwrap(), object, block, global]).collect()
}

fn total(losses: &[Tensor]) -> Tensor {
    losses.iter().fold(Tensor::from(0.0_f32), |sum, loss| sum + loss)
}

#[test]
fn every_parameter_that_learns_receives_a_gradient() {
    let (store, detector) = detector(&toy(), 1);
    total(&losses(&detector, Kind::Float, &mut ChaCha8Rng::seed_from_u64(1))).backward();
    let learning: Vec<&String> = detector.parameters().iter().filter(|(_, t)| t.requires_grad()).map(|(name, _)| name).collect();
    assert_eq!(learning.len(), store.trainable_variables().len());
    let is_silent = |name: &&&String| {
        let gradient = detector.parameters()[name.as_str()].grad();
        !gradient.defined() || gradient.abs().max().double_value(&[]) == 0.0
    };
    let silent: Vec<_> = learning.iter().filter(is_silent).collect();
    assert!(silent.is_empty(), "{silent:?}");
}

#[test]
fn half_images_give_nearly_the_losses_of_full_ones_and_full_gradients() {
    let (store, detector) = detector(&toy(), 1);
    let losses_in = |kind| losses(&detector, kind, &mut ChaCha8Rng::seed_from_u64(1));
    let values = |losses: &[Tensor]| floats(&Tensor::stack(losses, 0));
    let full = values(&losses_in(Kind::Float));
    let half = losses_in(Kind::BFloat16);
    println!("{full:?} {:?}", values(&half));
    for (found, expected) in values(&half).iter().zip(&full) {
        // Eight bits of a number are kept, so that some of the proposals, and of the regions drawn from them, are other ones.
        assert!((found / expected - 1.0).abs() < 0.1, "{:?} {full:?}", values(&half));
    }
    assert!(half.iter().all(|loss| loss.kind() == Kind::Float));
    total(&half).backward();
    for (name, tensor) in store.variables().iter().filter(|(_, tensor)| tensor.requires_grad()) {
        let gradient = tensor.grad();
        assert!(gradient.defined() && gradient.kind() == Kind::Float && tensor.kind() == Kind::Float, "{name}");
        assert!(gradient.isfinite().all().int64_value(&[]) == 1, "{name}");
    }
}

#[test]
fn a_toy_detector_learns_two_images_by_heart_and_repeats_itself() {
    let learn = |n_steps: usize| {
        let (store, detector) = detector(&toy(), 1);
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut optimizer = nn::OptimizerConfig::build(nn::Adam::default(), &store, 1e-3).unwrap();
        let mut history = Vec::new();
        for _ in 0..n_steps {
            let Step { losses, .. } = step(&detector, Kind::Float, &mut rng);
            history.push([0, 1, 2, 3].map(|part: usize| losses[part].double_value(&[])));
            optimizer.backward_step(&total(&losses));
        }
        (history, detector)
    };
    let (history, detector) = learn(80);
    assert!(history[79][0] < 0.1 * history[0][0] && history[79][2] < 0.3 * history[0][2], "{history:?}");
    assert!(history[..3].iter().flatten().map(|loss| loss.to_bits()).eq(learn(3).0.iter().flatten().map(|loss| loss.to_bits())));

    // What it learned, it detects.
    let (images, classes) = (images("images.toy", [2, 3, 96, 128]), toy_classes());
    let vocabularies = Vocabularies { bbox: &classes, object: None };
    let found = detector.detect(&images, &SIZES, &vocabularies, None, &TestRule::default()).unwrap();
    for (image, Detections { kept, masks }) in found.iter().enumerate() {
        assert!(kept.scores.is_sorted_by(|a, b| a >= b) && kept.scores.len() <= 300);
        assert_eq!(masks.as_ref().unwrap().size(), [kept.rows.len() as i64, 28, 28]);
        let overlaps = iou_matrix(&kept.boxes, &toy_objects(image)).unwrap();
        for (object, class) in [(0, 0), (1, 2)] {
            let best = kept.classes.iter().position(|&found| found == class).expect("every class has a score");
            let overlap = overlaps.double_value(&[best as i64, object]);
            println!("image {image}, class {class}: score {:.2}, overlap {overlap:.2}", kept.scores[best]);
            assert!(overlap > 0.5, "image {image}, class {class}: {overlap}");
        }
    }
}

#[test]
fn scores_are_joined_with_those_of_the_object_head() {
    let (_store, with_both) = detector(&toy(), 1);
    let (_other, alone) = detector(&Config { object_head: None, mask_head: None, ..toy() }, 1);
    let (images, classes) = (images("images.toy", [2, 3, 96, 128]), toy_classes());
    let detect = |detector: &Detector, object| {
        let vocabularies = Vocabularies { bbox: &classes, object };
        detector.detect(&images, &SIZES, &vocabularies, None, &TestRule::default())
    };
    let joined = detect(&with_both, Some(&classes)).unwrap();
    let plain = detect(&with_both, None).unwrap();
    assert_ne!(joined[0].kept.scores, plain[0].kept.scores);
    // The object head does not change what the others say.
    let same = detect(&alone, None).unwrap();
    assert_eq!((&same[0].kept.scores, same[0].masks.is_none()), (&plain[0].kept.scores, true));
    // Where all exponents are the box head's, the other one has no say, but for the background it does not know.
    let (one, none) = (HeadWeight::of(1.0), HeadWeight::of(0.0));
    let of_the_box_head = Ensemble { box_base: one, box_novel: one, object_base: none, object_novel: none, ..Ensemble::default() };
    let rule = TestRule { ensemble: of_the_box_head, ..TestRule::default() };
    let vocabularies = Vocabularies { bbox: &classes, object: Some(&classes) };
    let unmoved = with_both.detect(&images, &SIZES, &vocabularies, None, &rule).unwrap();
    assert_eq!(unmoved[1].kept.scores, plain[1].kept.scores);
    let refusal = detect(&alone, Some(&classes)).unwrap_err().to_string();
    assert_eq!(refusal, "classes of the object head: expected none: the detector has no object head, found a vocabulary");
}

/// Each kept detection has the score that the rule of RAF gives to its proposal and class.
#[test]
fn augmented_embeddings_correct_scores() {
    let (_store, detector) = detector(&toy(), 1);
    let (images, classes) = (images("images.toy", [2, 3, 96, 128]), toy_classes());
    let proposals = || -> Vec<Proposals> {
        let boxes = |image| toy_objects(image);
        [0, 1]
            .map(|image| Proposals { scores: Tensor::ones([boxes(image).size()[0]], (Kind::Float, Device::Cpu)), boxes: boxes(image) })
            .into()
    };
    let n = proposals().iter().map(|one| one.boxes.size()[0]).sum::<i64>();
    let embeddings = to_unit_length(&Tensor::arange(n * 16, (Kind::Float, Device::Cpu)).cos().view([n, 16]));
    let all = Suppression { iou: 1.0, keep: 1000 };
    let rule = |raf| TestRule { raf, detections: DetectionRule { threshold: 0.0, suppression: all }, ..TestRule::default() };
    let detect = |object, augmented: bool, raf| {
        let vocabularies = Vocabularies { bbox: &classes, object };
        let augmented = augmented.then(|| embeddings.shallow_clone());
        detector.detect(&images, &SIZES, &vocabularies, Some(Given { proposals: proposals(), augmented }), &rule(raf)).unwrap()
    };
    // Scores `[N, K]` of all proposals.
    let table = |found: &[Detections]| {
        let mut table = vec![0.0_f32; (n * classes.n_classes()) as usize];
        let mut first = 0;
        for (image, Detections { kept, .. }) in found.iter().enumerate() {
            for ((row, class), score) in kept.rows.iter().zip(&kept.classes).zip(&kept.scores) {
                table[((first + *row) * classes.n_classes() + *class) as usize] = *score;
            }
            first += proposals()[image].boxes.size()[0];
        }
        Tensor::from_slice(&table).view([n, classes.n_classes()])
    };
    let products = detector.bbox_head.classifier.products(&embeddings, &classes).unwrap();
    assert_eq!(products.size(), [n, classes.n_classes() + 1]);
    let known = embeddings.matmul(&classes.embeddings().tr());
    assert!(error(&products.narrow(1, 0, classes.n_classes()), &known) < 1e-6);
    // The embeddings of the same boxes by themselves give the same scores.
    let boxes: Vec<Tensor> = proposals().into_iter().map(|one| one.boxes).collect();
    let said = detector.embed(&images, &SIZES, &boxes).unwrap();
    let scores = detector.bbox_head.classifier.logits(&said, &classes, Phase::Test).unwrap().softmax(-1, Kind::Float);
    let found = table(&detect(None, false, raf::Rule::default()));
    assert!(error(&scores.narrow(1, 0, classes.n_classes()), &found) < 1e-6);
    assert!(detector.embed(&images, &SIZES, &boxes[..1]).is_err());
    for object in [None, Some(&classes)] {
        let before = table(&detect(object, false, raf::Rule::default()));
        assert!(before.gt(0.0).all().int64_value(&[]) == 1, "every score is kept");
        let rest: Tensor = 1.0 - before.sum_dim_intlist([1_i64].as_slice(), true, Kind::Float);
        let before = Tensor::cat(&[before, rest.clamp_min(0.0)], 1);
        for fusion in [raf::Fusion::Gate, raf::Fusion::Softmax] {
            let rule = raf::Rule { top_k: 2, fusion, ..raf::Rule::default() };
            let expected = rule.fuse(&before, &products).unwrap().narrow(1, 0, classes.n_classes());
            assert!(error(&table(&detect(object, true, rule)), &expected) < 1e-5, "{fusion:?}");
        }
    }
    // Object-Centric's sum is above a half for every class.
    let sum = table(&detect(None, true, raf::Rule { top_k: 2, fusion: raf::Fusion::Sum, ..raf::Rule::default() }));
    assert!(sum.min().double_value(&[]) > 0.5);
}

#[test]
fn heads_take_no_regions() {
    let (_store, detector) = detector(&toy(), 1);
    let none = Tensor::zeros([0, 64, 7, 7], (Kind::Float, Device::Cpu));
    for phase in [Phase::Train, Phase::Test] {
        let regions = detector.bbox_head.forward(&none, phase).unwrap();
        assert_eq!((regions.embeddings.size(), regions.deltas.unwrap().size()), (vec![0, 16], vec![0, 4]));
    }
    let refusal = detector.bbox_head.forward(&Tensor::zeros([2, 64, 5, 7], (Kind::Float, Device::Cpu)), Phase::Test).unwrap_err();
    assert_eq!(refusal.to_string(), "pooled features: expected [N, 64, 7, 7], found Float [2, 64, 5, 7]");
    let flat = detector.global_head.as_ref().unwrap().embed(&Tensor::zeros([2, 64], (Kind::Float, Device::Cpu))).unwrap_err();
    assert_eq!(flat.to_string(), "coarsest level: expected [B, 64, h, w], found Float [2, 64]");
    let masks = Tensor::zeros([0, 64, 14, 14], (Kind::Float, Device::Cpu));
    assert_eq!(detector.mask_head.as_ref().unwrap().forward(&masks, &[]).unwrap().size(), [0, 28, 28]);
}
