use ovenbird_models::{detr::matching::Pair, to_unit_length};
use tch::Device;

use super::*;
use crate::{
    golden::{CORA_SIZES, cora, cora_clip, cora_images, cora_values, cora_weights, error, numbers},
    training::Optimizer,
};

#[test]
fn the_defaults_are_parameters_that_pass_their_own_check() {
    assert!(Stage::check(&Train::default()).is_empty());
}

/// The reference's choices, and an average that moves in two steps.
fn stage() -> Train {
    let training = Training { epochs: None, ema_decay: Some(0.9), averaging: EmaRule::Reference, ..Train::default().training };
    Train {
        split_steps: SplitSteps::Reference,
        dropped_classes: DroppedClasses::Reference,
        together: Together::Reference,
        training,
        ..Train::default()
    }
}

fn criterion<'a>(stage: &'a Train, frozen: &'a Frozen, config: Config, texts: &Tensor, store: &nn::VarStore) -> LocalizerCriterion<'a> {
    let localizer = Localizer::new(&store.root(), &config, 1).unwrap();
    let spec = LocalizerSpec { config, fits: stage.training.fits(), rules: stage.rules, clip: None, region_prompt: None };
    LocalizerCriterion { stage, frozen, localizer, spec, texts: texts.shallow_clone(), kept: None, epoch: 1000 }
}

/// The maps of some images in one batch.
fn maps(frozen: &Frozen, images: &Tensor, sizes: &[ImageSize]) -> Maps {
    let regions = frozen.regions().unwrap();
    let layer3 = regions.layer3(images, sizes).unwrap();
    let layer4 = regions.layer4(&layer3).unwrap();
    Maps { valid: layer3.valid(), layer3: layer3.features, layer4: vec![layer4] }
}

/// Gathers `[L, B, N, ..]` in an order of queries `[B, N]`.
fn in_order(tensor: &Tensor, order: &Tensor) -> Tensor {
    let of_image = |image: i64| tensor.select(1, image).index_select(1, &order.get(image));
    Tensor::stack(&(0..order.size()[0]).map(of_image).collect::<Vec<_>>(), 1)
}

fn near(found: f64, expected: f64, most: f64, what: &str) {
    assert!((found - expected).abs() < most, "{what}: {found} {expected}");
}

fn words(name: &str) -> Vec<String> {
    let strings: serde_json::Value = serde_json::from_str(include_str!("../../../../tests/golden/cora/strings.json")).unwrap();
    serde_json::from_value(strings["train_step.npz"][name].clone()).unwrap()
}

/// Two steps of CORA's own loop, the second with split classes: names of anchors, outputs, pairs, losses, gradients, and weights and averages after the step.
/// (M1 to M3, C1 to C5, O1 and O2 of the specification, put together.) The files count queries in CORA's order.
#[test]
fn training_steps_are_those_of_cora_s_code() {
    let golden = cora("train_step");
    let (stage, frozen, store) = (stage(), Frozen::of(cora_clip(), None), nn::VarStore::new(Device::Cpu));
    let config = Config { encoder_layers: 2, decoder_layers: 3, queries: 20, ..Config::cora(64, 16) };
    let criterion = criterion(&stage, &frozen, config, &golden["text"], &store);
    let weights = cora_weights("det");
    for (name, tensor) in criterion.localizer.parameters() {
        let values = &weights[name];
        no_grad(|| tensor.shallow_clone().copy_(&values.narrow(0, 0, tensor.size()[0])));
    }
    let optimizer_config = stage.training.config().optimizer;
    let mut optimizer = Optimizer::new(&optimizer_config, criterion.parameters().unwrap());
    let maps = maps(&frozen, &cora_images(), &CORA_SIZES);
    let objects = [0, 1].map(|image| Target {
        boxes: golden[&format!("boxes{image}")].shallow_clone(),
        labels: golden[&format!("labels{image}")].shallow_clone(),
    });
    let of_second: Vec<bool> = numbers(&golden["split_uniform"]).into_iter().map(|drawn| drawn > 0.5).collect();
    for step in 0..2 {
        let of = |name: &str| &golden[&format!("s{step}_{name}")];
        let is_split = stage.split_steps.splits(stage.split_share, stage.training.seed, 0, step);
        assert_eq!(is_split, step == 1);
        let (outputs, classes) = criterion.outputs(&maps, is_split.then_some(&of_second), None).unwrap();
        let order = of("order");
        assert_eq!(in_order(&classes.unsqueeze(0), order).get(0), *of("class"));
        assert!(error(&in_order(&outputs.references, order).get(0), &of("proposal").transpose(0, 1)) < 1e-6);
        assert!(error(&in_order(&outputs.boxes, order), of("boxes")) < 2e-5);
        assert!(error(&in_order(&outputs.objectness, order), &of("obj").squeeze_dim(3)) < 2e-5);

        let found = criterion.compare(&outputs, &classes, &objects).unwrap();
        for (layer, images) in found.pairs.iter().enumerate() {
            for (image, pairs) in images.iter().enumerate() {
                let expected = Vec::<Vec<i64>>::try_from(of(&format!("match_l{layer}_img{image}"))).unwrap();
                let anchors = Vec::<i64>::try_from(order.get(image as i64)).unwrap();
                let expected = expected[0].iter().zip(&expected[1]);
                let mut expected: Vec<Pair> =
                    expected.map(|(query, object)| Pair { query: anchors[*query as usize] as usize, object: *object as usize }).collect();
                expected.sort_by_key(|pair| pair.query);
                assert_eq!(*pairs, expected, "step {step}, layer {layer}, image {image}");
            }
        }
        for (name, expected) in words(&format!("s{step}_loss_names")).iter().zip(numbers(of("loss_values"))) {
            let (name, layer) = match name.rsplit_once('_') {
                Some((name, layer)) if layer.parse::<usize>().is_ok() => (name, layer.parse().unwrap()),
                _ => (name.as_str(), 2),
            };
            let losses = &found.layers[layer];
            let value = match name {
                "loss_ce" => losses.objectness.double_value(&[]),
                "loss_bbox" => losses.boxes.double_value(&[]),
                "loss_giou" => losses.overlaps.double_value(&[]),
                "matched_gt" => found.matched_share().unwrap(),
                _ => continue,
            };
            near(value, expected, 1e-5, &format!("step {step}, {name} {layer}"));
        }

        found.weighted().into_iter().sum::<Tensor>().backward();
        let total = numbers(of("grad_norm"))[0];
        let (lengths, probes) = (numbers(of("grad_l2")), numbers(of("grad_probe")));
        let names = words(&format!("s{step}_grad_names"));
        assert_eq!(names.len(), criterion.localizer.parameters().len());
        for (place, name) in names.iter().enumerate() {
            let ours = name.replace("transformer.decoder.bbox_embed.", "bbox_embed.");
            let gradient = criterion.localizer.parameters()[&ours].grad();
            let in_f64 = gradient.to_kind(Kind::Double);
            // Other tensors have no gradient in exact arithmetic: biases of keys.
            let most = 1e-4 * lengths[place].max(1e-4 * total);
            near(in_f64.norm().double_value(&[]), lengths[place], most, name);
            let probe = cora_values(&format!("probe/{name}"), &gradient.size(), 1.0, 0.0).to_kind(Kind::Double);
            near((in_f64 * probe).sum(Kind::Double).double_value(&[]), probes[place], most, name);
            if let Some(expected) = golden.get(&format!("s{step}_grad:{name}")) {
                assert!(error(&gradient, expected) < most, "{name}");
            }
        }
        near(optimizer.step(step).unwrap(), total, 2e-5 * total, "norm");
        let mut averages = BTreeMap::new();
        optimizer.average(&mut averages);
        let mut n_compared = 0;
        for (name, expected) in &golden {
            let Some((kind, name)) = name.strip_prefix(&format!("s{step}_")).and_then(|name| name.split_once(':')) else { continue };
            let found = match kind {
                "param" => criterion.localizer.parameters()[name].detach(),
                "ema" => averages[name].shallow_clone(),
                _ => continue,
            };
            assert!(error(&found, expected) < 1e-6, "step {step}, {kind} {name}: {}", error(&found, expected));
            n_compared += 1;
        }
        assert_eq!(n_compared, 14);
    }
}

/// O5 of the specification: the loss on four scenes, whose objects have the classes that CLIP gives them, falls by more than 80 %.
#[test]
fn four_scenes_are_learned_by_heart() {
    let (stage, frozen, store) = (stage(), Frozen::of(cora_clip(), None), nn::VarStore::new(Device::Cpu));
    let config = Config { decoder_layers: 2, queries: 60, ..Config::toy(64, 16) };
    let texts = to_unit_length(&cora_values("texts", &[3, 16], 1.0, 0.0));
    let criterion = criterion(&stage, &frozen, config, &texts, &store);
    let scenes = cora_values("scenes", &[4, 3, 96, 96], 2.0, 0.0);
    let maps = maps(&frozen, &scenes, &[ImageSize { width: 96, height: 96 }; 4]);
    let boxes = Tensor::cat(&[cora_values("centres", &[4, 2, 2], 0.25, 0.5), cora_values("sides", &[4, 2, 2], 0.15, 0.35)], 2);
    let objects: Vec<Target> = (0..4)
        .map(|scene| {
            let boxes = boxes.get(scene);
            let features = frozen.regions().unwrap().fast(&maps.layer4[0], &boxes).unwrap().narrow(0, scene, 1);
            let labels = classify(&features.matmul(&texts.tr()), TEMPERATURE, None, None).unwrap().classes.get(0);
            Target { boxes, labels }
        })
        .collect();
    let mut config = stage.training.config().optimizer;
    config.schedule.peak = 1e-3;
    let mut optimizer = Optimizer::new(&config, criterion.parameters().unwrap());
    let mut curve = Vec::new();
    for step in 0..200 {
        let (outputs, classes) = criterion.outputs(&maps, None, None).unwrap();
        let found = criterion.compare(&outputs, &classes, &objects).unwrap();
        curve.push((found.total().double_value(&[]), found.matched_share().unwrap()));
        found.total().backward();
        optimizer.step(step).unwrap();
    }
    let ((first, _), (last, share)) = (curve[0], curve[199]);
    assert!(last < 0.2 * first && share > 0.5, "{:?}", curve.iter().step_by(20).collect::<Vec<_>>());
}
