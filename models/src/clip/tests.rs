//! CLIP against open_clip and Hugging Face, by weights that both sides make from one formula (`tests/golden/clip/make.py`).

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor, nn};

use super::{Activation, Clip, Config, ImageConfig, TextConfig, layout};
use crate::{
    Error, Misfit, Phase,
    checkpoint::Place,
    golden::{error, unit, with_tower},
};

/// Largest difference allowed in embeddings whose largest values are 2 to 5, and which are at least 0.1 apart.
const TOLERANCE: f64 = 1e-4;

/// The CLIP of golden arrays of DetPro or of RPL, whose image tower is arbitrary.
pub(crate) fn small(golden: &BTreeMap<String, Tensor>) -> Clip {
    let config = Config {
        embed_dim: 16,
        image: ImageConfig::Vit { image_side: 32, patch: 16, width: 32, depth: 1, heads: 1, mlp_width: 128 },
        text: TextConfig { context: 77, vocabulary: 49_408, width: 32, heads: 4, depth: 2 },
        activation: Activation::QuickGelu,
    };
    let store = nn::VarStore::new(Device::Cpu);
    Clip::new(&store.root(), &config, 1).unwrap();
    let weights = with_tower(golden, store.variables().into_iter().collect());
    Clip::load_as(&config, &weights, Path::new("clip.safetensors"), Device::Cpu, Kind::Float).unwrap()
}

struct Golden(Map<String, Value>);

impl Golden {
    fn read(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../tests/golden/clip/{name}.json"));
        Self(serde_json::from_slice(&fs::read(path).expect("the golden file is there")).unwrap())
    }

    fn shapes(&self) -> impl Iterator<Item = (&String, Vec<i64>)> {
        self.0["shapes"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, shape)| (name, shape.as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect()))
    }

    /// The state dict, its names and shapes as the Python package has them.
    fn tensors(&self) -> BTreeMap<String, Tensor> {
        self.shapes().map(|(name, shape)| (name.clone(), values(name, &shape))).collect()
    }

    fn rows(&self, key: &str) -> Tensor {
        let rows = self.0[key].as_array().unwrap();
        let flat: Vec<f32> = rows.iter().flat_map(|row| row.as_array().unwrap()).map(|v| v.as_f64().unwrap() as f32).collect();
        Tensor::from_slice(&flat).reshape([rows.len() as i64, -1])
    }
}

/// Middle and half range of a tensor's values, chosen so that activations stay near one.
fn rule(name: &str, shape: &[i64]) -> (f32, f32) {
    let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    if ends(&["running_var"]) {
        (1.0, 0.25)
    } else if ends(&["bias", "running_mean"]) {
        (0.0, 0.1)
    } else if ends(&["positional_embedding", "position_embedding.weight", "token_embedding.weight", "class_embedding"]) {
        (0.0, 1.0)
    } else if shape.is_empty() {
        (2.0, 0.5)
    } else if ends(&["bn3.weight"]) {
        (0.25, 0.1)
    } else if shape.len() == 1 {
        (1.0, 0.1)
    } else {
        let is_right_factor = ["visual.proj", "text_projection"].contains(&name);
        let fan_in = if is_right_factor { shape[0] } else { shape[1..].iter().product() };
        // Convolutions are followed by ReLU, which halves the variance, as far as there is one.
        let gain = if shape.len() == 4 { 6.0 } else { 3.0 };
        (0.0, (gain / fan_in as f64).sqrt() as f32)
    }
}

fn values(name: &str, shape: &[i64]) -> Tensor {
    let (middle, half_range) = rule(name, shape);
    let flat: Vec<f32> = unit(name, shape.iter().product::<i64>() as usize).map(|u| middle + half_range * u).collect();
    Tensor::from_slice(&flat).reshape(shape)
}

/// Squares of 32 px (the whole image where it is smaller) in random colours, under a fine grain.
fn images(name: &str, shape: &[i64; 4]) -> Tensor {
    let [b, c, h, w] = *shape;
    let (rows, columns) = (h / 32, w / 32);
    let field = |name: &str, shape: [i64; 4]| {
        Tensor::from_slice(&unit(name, shape.iter().product::<i64>() as usize).collect::<Vec<f32>>()).reshape(shape)
    };
    let grain = field(&format!("{name}.grain"), *shape);
    if rows == 0 || columns == 0 {
        return grain;
    }
    let colours = field(&format!("{name}.colours"), [b, c, rows, columns]);
    colours.repeat_interleave_self_int(32, 2, None).repeat_interleave_self_int(32, 3, None) * 2.0 + grain
}

/// Three rows of 4, 20 and 77 tokens, padded with zeros to 77.
fn tokens() -> Tensor {
    let rows = [4, 20, 77].into_iter().enumerate().flat_map(|(row, length)| {
        let mut words: Vec<_> = unit(&format!("tokens.{row}"), length).map(|u| ((f64::from(u) + 1.0) * 0.5 * 49406.0) as i64).collect();
        (words[0], words[length - 1]) = (49406, 49407);
        words.resize(77, 0);
        words
    });
    Tensor::from_slice(&rows.collect::<Vec<i64>>()).reshape([3, 77])
}

fn origin() -> &'static Path {
    Path::new("clip.pt")
}

fn sizes(tensors: &BTreeMap<String, Tensor>) -> Config {
    layout::config(&layout::normalise(tensors, origin()).unwrap().tensors, Activation::QuickGelu, origin()).unwrap()
}

fn load(tensors: &BTreeMap<String, Tensor>, activation: Activation) -> Clip {
    Clip::load(tensors, origin(), activation, Device::Cpu, Kind::Float).unwrap()
}

#[track_caller]
fn check_against_open_clip(name: &str, side: i64, activation: Activation) {
    let golden = Golden::read(name);
    let clip = load(&golden.tensors(), activation);
    let image = clip.encode_image(&images(&format!("images.{name}"), &[2, 3, side, side]), Phase::Test).unwrap();
    let text = clip.encode_text(&tokens()).unwrap();

    let errors = (error(&image, &golden.rows("image")), error(&text, &golden.rows("text")));
    println!("{name}: image {:.1e}, text {:.1e}", errors.0, errors.1);
    assert!(errors.0 < TOLERANCE && errors.1 < TOLERANCE, "{errors:?}");
}

#[test]
fn vit_b_32_embeds_as_open_clip_does() {
    check_against_open_clip("vit-b-32", 224, Activation::QuickGelu);
}

#[test]
fn vit_b_16_embeds_as_open_clip_does() {
    check_against_open_clip("vit-b-16", 224, Activation::Gelu);
}

#[test]
fn vit_l_14_embeds_as_open_clip_does() {
    check_against_open_clip("vit-l-14", 224, Activation::QuickGelu);
}

#[test]
fn rn50_embeds_as_open_clip_does() {
    check_against_open_clip("rn50", 224, Activation::QuickGelu);
}

#[test]
fn rn50x4_embeds_as_open_clip_does() {
    check_against_open_clip("rn50x4", 288, Activation::QuickGelu);
}

#[test]
fn a_hugging_face_checkpoint_embeds_as_hugging_face_does() {
    let golden = Golden::read("hugging-face");
    let clip = Clip::load(&golden.tensors(), origin(), Activation::QuickGelu, Device::Cpu, Kind::Float).unwrap();
    let image = clip.encode_image(&images("images.hugging-face", &[2, 3, 224, 224]), Phase::Test).unwrap();
    let text = clip.encode_text(&tokens()).unwrap();

    let errors = (error(&image, &golden.rows("image")), error(&text, &golden.rows("text")));
    println!("hugging-face: image {:.1e}, text {:.1e}", errors.0, errors.1);
    assert!(errors.0 < TOLERANCE && errors.1 < TOLERANCE, "{errors:?}");
}

#[test]
fn a_grid_of_15_by_20_has_its_positions_resized_bilinearly_not_bicubically() {
    let golden = Golden::read("hugging-face");
    let clip = load(&golden.tensors(), Activation::QuickGelu);
    // 13 rows and 7 columns of pixels more than 15 x 20 patches hold: they are dropped.
    let wide = images("images.wide", &[2, 3, 480, 640]).constant_pad_nd([0, 7, 0, 13]);
    let found = clip.encode_image(&wide, Phase::Test).unwrap();

    let (bilinear, bicubic) = (error(&found, &golden.rows("image_15x20")), error(&found, &golden.rows("image_15x20_bicubic")));
    println!("15 x 20: bilinear {bilinear:.1e}, bicubic {bicubic:.1e}");
    assert!(bilinear < TOLERANCE && bicubic > 100.0 * TOLERANCE, "{bilinear} {bicubic}");
}

#[test]
fn texts_padded_to_the_longest_of_their_batch_embed_as_those_padded_to_the_context() {
    let clip = load(&Golden::read("vit-b-16").tensors(), Activation::Gelu);
    let full = tokens().narrow(0, 0, 2);
    let padded = clip.encode_text(&full).unwrap();
    let adaptive = clip.encode_text(&full.narrow(1, 0, 20)).unwrap();

    let error = error(&adaptive, &padded);
    println!("adaptive length: {error:.1e}");
    assert!(error < 1e-5, "{error}");
}

#[test]
fn in_half_precision_the_towers_stay_close_to_themselves_in_f32() {
    let golden = Golden::read("vit-l-14");
    let tensors = golden.tensors();
    let images = images("images.vit-l-14", &[2, 3, 224, 224]);
    let features = |kind| {
        let clip = Clip::load(&tensors, origin(), Activation::QuickGelu, Device::Cpu, kind).unwrap();
        let features = [clip.encode_image_features(&images, Phase::Test), clip.encode_text_features(&tokens())].map(Result::unwrap);
        assert!(features.iter().all(|features| features.kind() == kind));
        Tensor::cat(&features.map(|features| features.to_kind(Kind::Float)), 0)
    };
    let full = features(Kind::Float);
    // Eight bits of mantissa through random weights, whose activations, unlike those of trained weights, are all noise; f16 has eleven.
    for (kind, least) in [(Kind::BFloat16, 0.996), (Kind::Half, 0.999)] {
        let shown = Tensor::ones([2, 16, 257, 64], (kind, Device::Cpu));
        if Tensor::f_scaled_dot_product_attention(&shown, &shown, &shown, None::<Tensor>, 0.0, false, None, false).is_err() {
            // On a processor with AMX where `ATEN_CPU_CAPABILITY` takes AVX-512 away and `ONEDNN_MAX_CPU_ISA` does not.
            crate::skip::skip(&format!("libtorch has no attention in {kind:?} with these settings"));
            continue;
        }
        let cosine = (features(kind) * &full).sum_dim_intlist(-1, false, Kind::Float).min().double_value(&[]);
        println!("{kind:?}: cosine {cosine}");
        assert!((least..1.01).contains(&cosine), "{kind:?} {cosine}");
    }
}

fn tiny(image: ImageConfig) -> Config {
    let text = TextConfig { context: 8, vocabulary: 50, width: 64, heads: 1, depth: 2 };
    Config { embed_dim: 16, image, text, activation: Activation::QuickGelu }
}

fn tiny_vit() -> Config {
    tiny(ImageConfig::Vit { image_side: 16, patch: 4, width: 64, depth: 3, heads: 1, mlp_width: 128 })
}

fn tiny_resnet() -> Config {
    tiny(ImageConfig::ResNet { image_side: 64, layers: [1, 2, 1, 1], width: 8, heads: 4 })
}

fn fresh(config: &Config, seed: u64) -> (nn::VarStore, Clip, BTreeMap<String, Tensor>) {
    let store = nn::VarStore::new(Device::Cpu);
    let clip = Clip::new(&store.root(), config, seed).unwrap();
    let tensors = store.variables().into_iter().collect();
    (store, clip, tensors)
}

#[test]
fn a_published_size_is_read_off_the_tensors() {
    let tensors = Golden::read("rn50x4").tensors();
    assert_eq!(
        sizes(&tensors),
        Config {
            embed_dim: 160,
            image: ImageConfig::ResNet { image_side: 288, layers: [4, 6, 10, 6], width: 20, heads: 10 },
            text: TextConfig { context: 77, vocabulary: 49_408, width: 128, heads: 2, depth: 3 },
            activation: Activation::QuickGelu,
        }
    );
}

#[test]
fn a_saved_network_loads_to_the_same_sizes_and_embeddings() {
    for (config, side) in [(tiny_vit(), 16), (tiny_resnet(), 64)] {
        let (_store, clip, tensors) = fresh(&config, 1);
        let again = load(&tensors, Activation::QuickGelu);
        assert_eq!(sizes(&tensors), config);
        let images = images("round trip", &[2, 3, side, side]);
        let embed = |clip: &Clip| tch::no_grad(|| clip.encode_image(&images, Phase::Test).unwrap());
        // Convolutions may sum in another order when the weights are frozen.
        assert!(error(&embed(&again), &embed(&clip)) < 1e-6);
    }
}

#[test]
fn first_values_depend_on_the_seed_alone_whatever_the_global_generator_did() {
    let (_a, _, first) = fresh(&tiny_vit(), 7);
    let drawn = Tensor::rand([4], (Kind::Float, Device::Cpu));
    let (_b, _, same) = fresh(&tiny_vit(), 7);
    let (_c, _, other) = fresh(&tiny_vit(), 8);
    drop(drawn);
    assert_eq!(first, same);
    assert_ne!(first["visual.proj"], other["visual.proj"]);
}

#[test]
fn first_values_have_the_spread_that_openai_gives() {
    let (_store, clip, tensors) = fresh(&tiny_vit(), 3);
    let spread = |name: &str| tensors[name].std(false).double_value(&[]);
    for (name, expected) in [
        ("token_embedding.weight", 0.02),
        ("transformer.resblocks.1.attn.in_proj_weight", 0.125),
        ("transformer.resblocks.1.mlp.c_proj.weight", 0.125 * 0.5),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", (6.0_f64 / 256.0).sqrt() / 3.0_f64.sqrt()),
        ("visual.conv1.weight", 48.0_f64.powf(-0.5) / 3.0_f64.sqrt()),
    ] {
        assert!((spread(name) / expected - 1.0).abs() < 0.05, "{name}: {} {expected}", spread(name));
    }
    assert!((clip.logit_scale().unwrap().double_value(&[]) - 1.0 / 0.07).abs() < 1e-4);
}

#[test]
fn batch_statistics_move_in_training_only() {
    let (_store, clip, tensors) = fresh(&tiny_resnet(), 1);
    let images = images("train", &[2, 3, 64, 64]);
    let mean = || tensors["visual.bn1.running_mean"].copy();
    let before = mean();
    drop(clip.encode_image(&images, Phase::Test).unwrap());
    assert_eq!(mean(), before);
    drop(clip.encode_image(&images, Phase::Train).unwrap());
    assert_ne!(mean(), before);
}

#[test]
fn every_parameter_of_a_new_network_receives_a_gradient() {
    for (config, side) in [(tiny_vit(), 16), (tiny_resnet(), 64)] {
        let (store, clip, tensors) = fresh(&config, 1);
        // At first every bottleneck passes its input through, and its inside learns nothing.
        for (_, weight) in tensors.iter().filter(|(name, _)| name.ends_with("bn3.weight")) {
            tch::no_grad(|| drop(weight.shallow_clone().fill_(0.5)));
        }
        let image = clip.encode_image_features(&images("train", &[3, 3, side, side]), Phase::Train).unwrap();
        let text = clip.encode_text_features(&Tensor::from_slice(&[1_i64, 49, 2, 49, 3, 49]).reshape([3, 2])).unwrap();
        let logits = image.matmul(&text.tr()) * clip.logit_scale().unwrap();
        logits.cross_entropy_for_logits(&Tensor::from_slice(&[0_i64, 1, 2])).backward();
        let learns = |t: &Tensor| t.grad().defined() && t.grad().abs().max().double_value(&[]) > 0.0;
        let silent: Vec<_> = tensors.iter().filter(|(_, t)| t.requires_grad() && !learns(t)).map(|(name, _)| name).collect();
        assert!(silent.is_empty(), "{silent:?}");
        drop(store);
    }
}

#[test]
fn names_of_other_layouts_load_to_the_same_network() {
    let (_store, _, plain) = fresh(&tiny_resnet(), 1);
    let renamed =
        |rename: &dyn Fn(&str) -> String| plain.iter().map(|(name, t)| (rename(name), t.shallow_clone())).collect::<BTreeMap<_, _>>();

    let mut openai = renamed(&str::to_owned);
    openai.extend(layout::OPENAI_SCALARS.map(|name| (name.to_owned(), Tensor::from(64_i64))));
    let mut wrapped = renamed(&|name| format!("state_dict.module.{name}"));
    wrapped.insert("epoch".into(), Tensor::from(3_i64));
    wrapped.insert("state_dict.module.visual.bn1.num_batches_tracked".into(), Tensor::from(3_i64));
    let custom = renamed(&|name| match name {
        name if name.starts_with("visual.") || name == "logit_scale" => name.to_owned(),
        name => format!("text.{name}"),
    });

    for (tensors, expected) in [(openai, "OpenAI's"), (wrapped, "open_clip's"), (custom, "open_clip's")] {
        let normalised = layout::normalise(&tensors, origin()).unwrap();
        let activation = (expected == "OpenAI's").then_some(Activation::QuickGelu);
        assert_eq!(normalised.layout.activation, activation, "only the scalars tell");
        assert_eq!((normalised.layout.name, normalised.tensors), (expected, renamed(&str::to_owned)));
    }
}

#[test]
fn weights_are_found_wherever_a_file_has_them_and_what_is_left_out_is_said() {
    let (_store, _, plain) = fresh(&tiny_vit(), 1);
    let at = |prefix: &str| plain.iter().map(|(name, t)| (format!("{prefix}{name}"), t.shallow_clone())).collect::<BTreeMap<_, _>>();
    for prefix in ["", "model_state_dict.", "state_dict.module._orig_mod.", "state_dict.clipmodel.", "ema.", "net.text.clip."] {
        let mut tensors = at(prefix);
        assert_eq!(layout::place(&tensors, None, origin()).unwrap(), Place { prefix: prefix.into(), beside: Vec::new() });
        assert_eq!(layout::normalise(&tensors, origin()).unwrap().tensors, plain, "{prefix}");
        if !prefix.is_empty() {
            tensors.insert("ff_head.weight".into(), Tensor::zeros([4, 16], (Kind::Float, Device::Cpu)));
            assert_eq!(layout::place(&tensors, None, origin()).unwrap().beside, ["ff_head.weight"]);
            load(&tensors, Activation::QuickGelu);
        }
    }

    // A text encoder alone is no second CLIP.
    let mut two = at("model.");
    two.insert("teacher.token_embedding.weight".into(), Tensor::zeros([49, 64], (Kind::Float, Device::Cpu)));
    assert_eq!(layout::place(&two, None, origin()).unwrap().prefix, "model.");
    two.extend(at("teacher."));
    let error = Clip::load(&two, origin(), Activation::QuickGelu, Device::Cpu, Kind::Float).unwrap_err();
    assert_eq!(error.to_string(), "clip.pt: expected one CLIP, found 2: under `model.`, under `teacher.`");
    assert!(error.hint().unwrap().contains("`with: {clip: {prefix: \"teacher\"}}`"));
    assert_eq!(layout::place(&two, Some("teacher"), origin()).unwrap().beside.len(), plain.len());
}

#[test]
fn numbers_that_embeddings_do_not_depend_on_are_left_out_aloud_and_parts_that_they_may_depend_on_are_refused() {
    let (_store, _, plain) = fresh(&tiny_vit(), 1);
    let with = |name: &str, shape: &[i64]| {
        let mut tensors: BTreeMap<_, _> = plain.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect();
        tensors.insert(name.into(), Tensor::zeros(shape, (Kind::Float, Device::Cpu)));
        tensors
    };
    for (name, shape) in [("logit_bias", &[][..]), ("logit_bias", &[1])] {
        let normalised = layout::normalise(&with(name, shape), origin()).unwrap();
        assert_eq!(normalised.notes(), ["of the weights, embeddings do not depend on `logit_bias`, which is not used"]);
        load(&with(name, shape), Activation::QuickGelu);
    }
    let parts: [(&str, &[i64]); 6] = [
        ("visual.transformer.resblocks.1.adapter.weight", &[8, 64]),
        ("visual.transformer.resblocks.0.gate", &[]),
        ("visual.transformer.resblocks.7.ln_1.bias", &[64]),
        ("transformer.resblocks.0.attn.bias_k", &[1, 1, 64]),
        ("adapter.weight", &[64, 64]),
        ("visual.head.proj.weight", &[64, 64]),
    ];
    for (name, shape) in parts {
        let error = Clip::load(&with(name, shape), origin(), Activation::QuickGelu, Device::Cpu, Kind::Float).unwrap_err();
        assert!(error.to_string().contains("do not fit the network: "), "{name}: {error}");
        // A block that is not whole is named by what it lacks.
        assert!(error.to_string().contains(name) || name.contains("blocks.7."), "{name}: {error}");
        assert!(error.hint().is_some());
    }
}

#[test]
fn embeddings_do_not_need_the_logit_scale_and_training_does() {
    let (store, _, mut tensors) = fresh(&tiny_vit(), 1);
    let whole = load(&tensors, Activation::QuickGelu);
    tensors.remove("logit_scale");
    let clip = load(&tensors, Activation::QuickGelu);
    let views = images("scale", &[2, 3, 16, 16]);
    assert!(clip.encode_image(&views, Phase::Test).unwrap().equal(&whole.encode_image(&views, Phase::Test).unwrap()));
    assert_eq!(clip.logit_scale().unwrap_err().to_string(), "logit_scale: expected a checkpoint that has it, found one without");
    assert_eq!(layout::normalise(&tensors, origin()).unwrap().notes(), ["the checkpoint has no `logit_scale`: embeddings do not need it"]);
    let trainable = nn::VarStore::new(Device::Cpu);
    let error = Clip::trainable_from(&trainable.root(), &tiny_vit(), &tensors, origin()).unwrap_err();
    assert_eq!(error.to_string(), "clip.pt: 1 tensors do not fit the network: logit_scale: expected [], found nothing");
    drop(store);
}

#[test]
fn half_precision_weights_are_widened() {
    let (_store, _, tensors) = fresh(&tiny_vit(), 1);
    let halves = tensors.iter().map(|(name, t)| (name.clone(), t.to_kind(Kind::Half))).collect();
    let clip = load(&halves, Activation::QuickGelu);
    assert_eq!(clip.encode_image(&images("half", &[1, 3, 16, 16]), Phase::Test).unwrap().kind(), Kind::Float);
}

#[test]
fn all_tensors_that_do_not_fit_are_listed_at_once() {
    let (_store, _, mut tensors) = fresh(&tiny_vit(), 1);
    tensors.remove("visual.ln_post.bias");
    tensors.insert("adapter".into(), Tensor::zeros([3], (Kind::Float, Device::Cpu)));
    tensors.insert("visual.ln_pre.weight".into(), Tensor::zeros([63], (Kind::Float, Device::Cpu)));

    let error = Clip::load(&tensors, origin(), Activation::QuickGelu, Device::Cpu, Kind::Float).unwrap_err();
    assert_eq!(
        error.to_string(),
        "clip.pt: 3 tensors do not fit the network: adapter: expected nothing, found [3]; \
         visual.ln_post.bias: expected [64], found nothing; visual.ln_pre.weight: expected [64], found [63]"
    );
}

#[test]
fn a_lost_key_matrix_is_named_as_hugging_face_names_it() {
    let name = "vision_model.encoder.layers.1.self_attn.k_proj.weight";
    let mut tensors: BTreeMap<_, _> = Golden::read("hugging-face")
        .shapes()
        .map(|(name, shape)| (name.clone(), Tensor::zeros(shape, (Kind::Half, Device::Cpu))))
        .collect();
    tensors.remove(name);
    let Err(Error::Misfits { problems, .. }) = Clip::load(&tensors, origin(), Activation::QuickGelu, Device::Cpu, Kind::Float) else {
        panic!()
    };
    assert_eq!(problems, [Misfit { name: name.into(), expected: Some(vec![768, 768]), found: None }]);
}

/// Names as CORA's specification lists them (section 1).
#[test]
fn the_clip_in_a_detector_of_cora_is_found_in_either_of_its_copies() {
    let (_store, clip, plain) = fresh(&tiny_resnet(), 1);
    let mut detector = layout::to_cora(&plain);
    for name in [
        "backbone.0.body.conv1.weight",
        "backbone.0.body.bn3.running_var",
        "backbone.0.body.layer4.0.downsample.0.weight",
        "backbone.0.layer4.0.downsample.0.weight",
        "backbone.0.attn_pool.positional_embedding",
        "backbone.0.attn_pool.c_proj.bias",
        "classifier.transformer.resblocks.1.mlp.c_fc.weight",
        "classifier.token_embedding.weight",
        "classifier.positional_embedding",
        "classifier.ln_final.bias",
        "classifier.text_projection",
    ] {
        assert!(detector.contains_key(name), "{name}");
    }
    assert!(detector.keys().all(|name| name.starts_with("backbone.0.") || name.starts_with("classifier.")));
    detector.insert("transformer.decoder.norm.weight".into(), Tensor::zeros([4], (Kind::Float, Device::Cpu)));
    let at = |prefix: &str| detector.iter().map(|(name, t)| (format!("{prefix}{name}"), t.shallow_clone())).collect::<BTreeMap<_, _>>();
    let mut file = at("model.");
    let copied = at("model_ema.").into_iter().map(|(name, tensor)| (name, tensor.copy()));
    file.extend(copied);
    assert_eq!(layout::place(&file, None, origin()).unwrap().prefix, "model.");
    assert_eq!(layout::place(&file, Some("model_ema"), origin()).unwrap().prefix, "model_ema.");
    for tensors in [&file, &detector] {
        let normalised = layout::normalise(tensors, origin()).unwrap();
        assert_eq!((normalised.layout.name, normalised.layout.activation), ("CORA's", Some(Activation::QuickGelu)));
        assert!(normalised.tensors.iter().all(|(name, tensor)| tensor.equal(&plain[name])));
        // The logit scale has no name there.
        assert_eq!(normalised.tensors.len(), plain.len() - 1);
        let read = Clip::load(tensors, origin(), Activation::QuickGelu, Device::Cpu, Kind::Float).unwrap();
        let images = images("cora", &[2, 3, 64, 64]);
        let tokens = Tensor::from_slice(&[1_i64, 3, 49, 0]).view([1, 4]);
        let embed_image = |clip: &Clip| tch::no_grad(|| clip.encode_image(&images, Phase::Test).unwrap());
        let embed_text = |clip: &Clip| tch::no_grad(|| clip.encode_text(&tokens).unwrap());
        // Libtorch may sum in another order when the weights are frozen.
        assert!(error(&embed_image(&read), &embed_image(&clip)) < 1e-6);
        assert!(error(&embed_text(&read), &embed_text(&clip)) < 1e-5);
    }
    // Of two that differ nobody guesses one.
    let name = "model_ema.backbone.0.attn_pool.positional_embedding";
    let other = &file[name] + 1.0;
    file.insert(name.into(), other);
    let error = layout::place(&file, None, origin()).unwrap_err().to_string();
    assert_eq!(error, "clip.pt: expected one CLIP, found 2: under `model.`, under `model_ema.`");
    let name = "backbone.0.layer4.0.bn1.bias";
    let other = &detector[name] + 1.0;
    detector.insert(name.into(), other);
    let error = layout::normalise(&detector, origin()).unwrap_err().to_string();
    assert_eq!(
        error,
        "clip.pt: expected the same tensor as `backbone.0.layer4.0.bn1.bias` and as `backbone.0.body.layer4.0.bn1.bias`, found other numbers"
    );
}

#[test]
fn a_detector_is_refused_as_no_clip() {
    let tensors = BTreeMap::from([("backbone.conv1.weight".to_owned(), Tensor::from(1.0))]);
    let error = Clip::load(&tensors, origin(), Activation::QuickGelu, Device::Cpu, Kind::Float).unwrap_err();
    assert!(error.to_string().starts_with("clip.pt: no text tower of a CLIP"), "{error}");
}

#[test]
fn heads_that_do_not_divide_the_width_are_refused() {
    let mut config = tiny_vit();
    config.text.heads = 3;
    let store = nn::VarStore::new(Device::Cpu);
    let error = Clip::new(&store.root(), &config, 1).unwrap_err();
    assert_eq!(error.to_string(), "text: expected a width that its heads divide, found width 64, 3 heads");
}

#[test]
fn images_and_tokens_that_do_not_fit_are_refused_in_words() {
    let (_store, clip, _) = fresh(&tiny_vit(), 1);
    let image = |shape: &[i64], kind| clip.encode_image(&Tensor::zeros(shape, (kind, Device::Cpu)), Phase::Test).unwrap_err().to_string();
    let text = |tokens: &Tensor| clip.encode_text(tokens).unwrap_err().to_string();

    assert_eq!(image(&[1, 3, 3, 9], Kind::Float), "images: expected floating [B, 3, H, W], H and W at least 4, found Float [1, 3, 3, 9]");
    assert_eq!(image(&[3, 16, 16], Kind::Float), "images: expected floating [B, 3, H, W], H and W at least 4, found Float [3, 16, 16]");
    assert_eq!(
        image(&[1, 3, 16, 16], Kind::Uint8),
        "images: expected floating [B, 3, H, W], H and W at least 4, found Uint8 [1, 3, 16, 16]"
    );
    let expected = "tokens: expected i64 [B, L], L from 1 to 8, each from 0 to 49, found";
    assert_eq!(text(&Tensor::zeros([1, 9], (Kind::Int64, Device::Cpu))), format!("{expected} Int64 [1, 9]"));
    assert_eq!(text(&Tensor::zeros([8], (Kind::Int64, Device::Cpu))), format!("{expected} Int64 [8]"));
    assert_eq!(text(&Tensor::from_slice(&[50_i64]).reshape([1, 1])), format!("{expected} a token 50"));
}

/// A state dict of OpenAI's names with the shapes that define a tower, without any memory.
fn shapes_of_openai(image: &[(&str, &[i64])], embed_dim: i64, text_width: i64) -> BTreeMap<String, Tensor> {
    let text: [(&str, &[i64]); 4] = [
        ("text_projection", &[text_width, embed_dim]),
        ("token_embedding.weight", &[49_408, text_width]),
        ("positional_embedding", &[77, text_width]),
        ("input_resolution", &[]),
    ];
    let blocks: Vec<String> = (0..12).map(|block| format!("transformer.resblocks.{block}.mlp.c_fc.bias")).collect();
    let width = [4 * text_width];
    let text: Vec<(&str, &[i64])> = text.into_iter().chain(blocks.iter().map(|name| (name.as_str(), &width[..]))).collect();
    let blank = |shape: &[i64]| Tensor::from(0.0_f32).to_kind(Kind::Half).expand(shape, false);
    text.iter().chain(image).map(|(name, shape)| ((*name).to_owned(), blank(shape))).collect()
}

/// The published members that have no golden embeddings of their own, by the shapes of OpenAI's files.
#[test]
fn the_sizes_of_the_published_members_are_read_off_their_shapes() {
    let vit = |width: i64, patch: i64, grid: i64, depth: usize| {
        let mut shapes: Vec<(String, Vec<i64>)> =
            (0..depth).map(|block| (format!("visual.transformer.resblocks.{block}.mlp.c_fc.bias"), vec![4 * width])).collect();
        shapes.push(("visual.conv1.weight".to_owned(), vec![width, 3, patch, patch]));
        shapes.push(("visual.positional_embedding".to_owned(), vec![grid * grid + 1, width]));
        shapes.push(("visual.proj".to_owned(), vec![width, 768]));
        shapes
    };
    let resnet = |width: i64, layers: [usize; 4], grid: i64, embed_dim: i64| {
        let level = |(level, n): (usize, &usize)| {
            (format!("visual.layer{}.{}.conv1.weight", level + 1, n - 1), vec![width << level, width << (level + 2), 1, 1])
        };
        let mut shapes: Vec<(String, Vec<i64>)> = layers.iter().enumerate().map(level).collect();
        shapes.push(("visual.bn3.weight".to_owned(), vec![width]));
        shapes.push(("visual.conv1.weight".to_owned(), vec![width / 2, 3, 3, 3]));
        shapes.push(("visual.conv3.weight".to_owned(), vec![width, width / 2, 3, 3]));
        shapes.push(("visual.attnpool.positional_embedding".to_owned(), vec![grid * grid + 1, 32 * width]));
        shapes.push(("visual.attnpool.c_proj.weight".to_owned(), vec![embed_dim, 32 * width]));
        shapes.push(("visual.attnpool.q_proj.weight".to_owned(), vec![32 * width, 32 * width]));
        shapes
    };
    let members = [
        (
            vit(1024, 14, 16, 24),
            768,
            768,
            ImageConfig::Vit { image_side: 224, patch: 14, width: 1024, depth: 24, heads: 16, mlp_width: 4096 },
        ),
        (
            vit(1024, 14, 24, 24),
            768,
            768,
            ImageConfig::Vit { image_side: 336, patch: 14, width: 1024, depth: 24, heads: 16, mlp_width: 4096 },
        ),
        (resnet(64, [3, 4, 23, 3], 7, 512), 512, 512, ImageConfig::ResNet { image_side: 224, layers: [3, 4, 23, 3], width: 64, heads: 32 }),
        (
            resnet(96, [6, 8, 18, 8], 12, 768),
            768,
            768,
            ImageConfig::ResNet { image_side: 384, layers: [6, 8, 18, 8], width: 96, heads: 48 },
        ),
    ];
    for (image, embed_dim, text_width, expected) in members {
        let image: Vec<(&str, &[i64])> = image.iter().map(|(name, shape)| (name.as_str(), &shape[..])).collect();
        let config = sizes(&shapes_of_openai(&image, embed_dim, text_width));
        assert_eq!((config.image, config.text.depth, config.embed_dim), (expected, 12, embed_dim));
    }
}

/// Masks of `make.py`: 1 is background.
fn object_masks() -> Tensor {
    let some: Vec<f32> = unit("masks.objects", 3 * 14 * 14).map(|u| f32::from(u > 0.4)).collect();
    Tensor::from_slice(&some).reshape([3, 14, 14])
}

#[test]
fn objects_are_embedded_as_by_the_explicit_formula() {
    let golden = Golden::read("objects");
    let clip = load(&golden.tensors(), Activation::QuickGelu);
    let images = images("images.objects", &[3, 3, 224, 224]);
    assert_eq!(clip.object_grid(), Some(14));
    let found = clip.encode_objects(&images, &object_masks()).unwrap();
    let everywhere = clip.encode_objects(&images, &object_masks().zeros_like()).unwrap();
    let errors = (error(&found, &golden.rows("objects")), error(&everywhere, &golden.rows("everywhere")));
    println!("objects: {:.1e}, everywhere {:.1e}", errors.0, errors.1);
    assert!(errors.0 < TOLERANCE && errors.1 < TOLERANCE, "{errors:?}");
    // An object that is nowhere is the same in every image, and another than one that is somewhere.
    let nowhere = clip.encode_objects(&images, &object_masks().ones_like()).unwrap();
    assert!(error(&nowhere, &nowhere.narrow(0, 0, 1).expand([3, -1], false)) < 1e-5);
    assert!(error(&nowhere, &everywhere) > 0.1 && error(&found, &everywhere) > 0.1);
}

#[test]
fn patches_of_objects_are_twice_as_dense_and_padded_by_half_a_stride_less_one() {
    let weight = Tensor::from_slice(&unit("kernel", 3 * 32 * 32).collect::<Vec<f32>>()).reshape([1, 3, 32, 32]);
    let pixels = images("images.patches", &[1, 3, 224, 224]);
    let patches = pixels.conv2d(&weight, None::<&Tensor>, 16, 15, 1, 1);
    assert_eq!(patches.size(), [1, 1, 14, 14]);
    // Patch (0, 0) covers rows and columns -15..17: the kernel's [15, 15] falls on pixel (0, 0).
    let corner = (pixels.narrow(2, 0, 17).narrow(3, 0, 17) * weight.narrow(2, 15, 17).narrow(3, 15, 17)).sum(Kind::Float);
    assert!(error(&patches.get(0).get(0).get(0).get(0), &corner) < 1e-3);
}

#[test]
fn objects_of_another_size_or_tower_are_refused_in_words() {
    let golden = Golden::read("hugging-face");
    let clip = load(&golden.tensors(), Activation::QuickGelu);
    let words = |images: [i64; 4], masks: [i64; 3]| {
        let [images, masks] = [&images[..], &masks[..]].map(|shape| Tensor::zeros(shape, (Kind::Float, Device::Cpu)));
        clip.encode_objects(&images, &masks).unwrap_err().to_string()
    };
    assert!(words([1, 3, 256, 256], [1, 14, 14]).contains("images [B, 3, 224, 224] and masks [B, 14, 14]"));
    assert!(words([2, 3, 224, 224], [1, 14, 14]).contains("[2, 3, 224, 224] and [1, 14, 14]"));
}
