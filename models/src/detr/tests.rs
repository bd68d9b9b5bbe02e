//! The localizer by CORA's own code, in f64, and what must hold of it whatever its weights are.

mod whole;

use rand_chacha::rand_core::SeedableRng as _;
use tch::Device;

use super::*;
use crate::golden::{cora, cora_values, error, unit};

/// CORA's code and ours add the same products in f64 in another order: 1e-9 is a million roundings of numbers of 1.
const VALUES: f64 = 1e-9;
/// Gradients are sums over tokens and queries, up to a hundred times as large.
const GRADIENTS: f64 = 1e-8;

/// The name of a parameter in the golden data of the decoder.
fn golden_name(name: &str) -> String {
    if name.starts_with("bbox_embed.") { format!("transformer.decoder.{name}") } else { name.to_owned() }
}

fn set(localizer: &Localizer, name: &str, values: &Tensor) {
    let mut parameter = localizer.parameters()[name].shallow_clone();
    tch::no_grad(|| parameter.copy_(values));
}

/// The small network of a golden file, in f64, with its maps and the sizes of their images.
struct Small {
    _store: nn::VarStore,
    localizer: Localizer,
    golden: BTreeMap<String, Tensor>,
    valid: Vec<[i64; 2]>,
}

impl Small {
    fn read(file: &str) -> Self {
        let golden = cora(file);
        let layers = |part: &str| {
            let prefix = format!("w:transformer.{part}.layers.");
            golden.keys().filter(|name| name.starts_with(&prefix) && name.ends_with("linear1.bias")).count()
        };
        let config = Config {
            map_channels: 6,
            embed_dim: 5,
            hidden: 8,
            heads: 2,
            mlp_width: 16,
            encoder_layers: layers("encoder"),
            decoder_layers: layers("decoder"),
            queries: golden["w:query_embed.weight"].size()[0],
            // The content is given.
            bottleneck: 1,
            group_norm: false,
            content: Content::Zero,
        };
        let mut store = nn::VarStore::new(Device::Cpu);
        let localizer = Localizer::blank(&store.root(), &config).unwrap();
        store.double();
        assert!(golden.keys().filter_map(|name| name.strip_prefix("w:")).count() == localizer.parameters().len());
        for name in localizer.parameters().keys() {
            set(&localizer, name, &golden[&format!("w:{}", golden_name(name))]);
        }
        let mask = &golden["mask"];
        let size = |image: i64| [1, 0].map(|along| mask.get(image).select(along, 0).eq(0).sum(Kind::Int64).int64_value(&[]));
        let valid = (0..mask.size()[0]).map(size).collect();
        Self { _store: store, localizer, golden, valid }
    }

    fn encode(&self, x: &Tensor) -> Memory {
        self.localizer.encode(x, &self.valid, None).unwrap()
    }

    fn check(&self, found: &Tensor, name: &str) {
        let apart = error(&found.contiguous(), &self.golden[name]);
        assert!(apart < VALUES, "{name}: {apart}");
    }

    /// The gradients of a loss, by name; those that the loss does not depend on are zeros.
    fn gradients(&self, loss: &Tensor) -> BTreeMap<String, Tensor> {
        let parameters = self.localizer.parameters();
        parameters.values().for_each(|parameter| parameter.shallow_clone().zero_grad());
        loss.backward();
        let of = |tensor: &Tensor| if tensor.grad().defined() { tensor.grad().copy() } else { tensor.zeros_like() };
        parameters.iter().map(|(name, tensor)| (name.clone(), of(tensor))).collect()
    }

    /// Compares with all gradients of the golden data below a prefix. Returns how many.
    fn check_gradients(&self, gradients: &BTreeMap<String, Tensor>, prefix: &str) -> usize {
        let expected = |name: &String| self.golden.get(&format!("{prefix}{}", golden_name(name)));
        let pairs = gradients.iter().filter_map(|(name, found)| Some((name, found, expected(name)?)));
        let compare = |(name, found, expected): (&String, &Tensor, &Tensor)| {
            assert!(error(found, expected) < GRADIENTS, "{prefix}{name}: {}", error(found, expected));
        };
        pairs.map(compare).count()
    }
}

fn check_by_cora_s_code(file: &str) {
    let small = Small::read(file);
    let golden = &small.golden;
    let memory = small.encode(&golden["x"]);
    let (b, [h, w]) = (small.valid.len(), [2, 3].map(|dim| golden["x"].size()[dim]));
    // Cells of padding differ in the places, which no query sees.
    for (image, &[rows, columns]) in small.valid.iter().enumerate() {
        let cut = |map: Tensor| map.get(image as i64).view([h, w, 8]).narrow(0, 0, rows).narrow(1, 0, columns).contiguous();
        let pos = golden["pos"].permute([0, 2, 3, 1]).contiguous();
        assert!(error(&cut(memory.encoding.shallow_clone()), &cut(pos)) < VALUES);
        let tokens = golden["memory"].transpose(0, 1).contiguous();
        assert!(error(&cut(memory.tokens.contiguous()), &cut(tokens)) < VALUES);
    }
    let content = golden["tgt"].copy().set_requires_grad(true);
    assert_eq!(content.size()[0], b as i64);
    let outputs = small.localizer.decode_content(&memory, &content, None);
    small.check(&outputs.states, "hs");
    small.check(&outputs.references, "references");
    small.check(&outputs.boxes, "boxes");
    small.check(&outputs.objectness.unsqueeze(3), "objectness");
    let sum = |found: &Tensor, probe: &Tensor| (found * probe).sum(Kind::Double);
    let loss = sum(&outputs.boxes, &golden["probe_boxes"]) + sum(&outputs.objectness, &golden["probe_obj"].squeeze_dim(3));
    assert!((loss.double_value(&[]) - golden["loss"].double_value(&[0])).abs() < VALUES);
    let gradients = small.gradients(&loss);
    // CORA's code gives none for what the loss does not depend on: the scale of the second layer on, if there is one layer.
    let n_zero = gradients.values().filter(|gradient| gradient.abs().max().double_value(&[]) <= 0.0).count();
    assert_eq!(small.check_gradients(&gradients, "g:") + n_zero, gradients.len());
    assert!(error(&content.grad(), &golden["g_tgt"]) < GRADIENTS);
}

#[test]
fn a_small_localizer_is_that_of_cora_s_code() {
    check_by_cora_s_code("decoder_mini");
}

#[test]
fn a_localizer_of_one_layer_is_that_of_cora_s_code() {
    check_by_cora_s_code("decoder_one_layer");
}

/// D2 of the specification: boxes of the last of three layers train the head of the second, whose boxes they are read out from, and not that
/// of the first.
#[test]
fn gradients_stop_where_a_layer_begins() {
    let small = Small::read("decoder_mini");
    let content = &small.golden["tgt"];
    let outputs = small.localizer.decode_content(&small.encode(&small.golden["x"]), content, None);
    let loss = (outputs.boxes.get(2) * small.golden["probe_boxes"].get(2)).sum(Kind::Double);
    let gradients = small.gradients(&loss);
    assert!(small.check_gradients(&gradients, "glast:") > 12);
    let largest = |head: &str| gradients[&format!("bbox_embed.{head}.layers.2.weight")].abs().max().double_value(&[]);
    assert!(largest("0") <= 0.0 && largest("1") > 1e-3 && largest("2") > 1e-3);
}

/// D3 of the specification.
#[test]
fn padding_is_not_seen() {
    let small = Small::read("decoder_mini");
    let x = &small.golden["x"];
    let outputs = |x: &Tensor| small.localizer.decode_content(&small.encode(x), &small.golden["tgt"], None);
    let other = x.copy();
    // The second image has 2 x 3 of 3 x 4 cells.
    drop(other.get(1).narrow(1, 2, 1).fill_(100.0));
    drop(other.get(1).narrow(2, 3, 1).fill_(-100.0));
    let [before, after] = [x, &other].map(outputs);
    assert!(error(x, &other) > 99.0 && error(&before.boxes, &after.boxes) <= 0.0 && error(&before.objectness, &after.objectness) <= 0.0);
    // Nor is it in a batch of its own without padding.
    let cut = x.narrow(0, 1, 1).narrow(2, 0, 2).narrow(3, 0, 3);
    let memory = small.localizer.encode(&cut, &[[2, 3]], None).unwrap();
    assert!(memory.bias.is_none());
    let alone = small.localizer.decode_content(&memory, &small.golden["tgt"].narrow(0, 1, 1), None);
    assert!(error(&alone.boxes, &before.boxes.narrow(1, 1, 1)) < VALUES);
}

/// D4 of the specification.
#[test]
fn localizers_have_the_parameters_of_cora_s() {
    for (map_channels, embed_dim, total, of_projections) in
        [(1024, 1024, 12_088_388, [262_400, 164_224]), (1280, 640, 12_104_772, [327_936, 115_072])]
    {
        let store = nn::VarStore::new(Device::Cpu);
        let localizer = Localizer::blank(&store.root(), &Config::cora(map_channels, embed_dim)).unwrap();
        let count = |prefix: &str| {
            let below = localizer.parameters().iter().filter(|(name, _)| name.starts_with(prefix));
            below.map(|(_, tensor)| tensor.numel()).sum::<usize>()
        };
        assert_eq!(count(""), total);
        assert_eq!(["input_proj.", "text_proj."].map(count), of_projections);
        assert_eq!(["query_embed.", "bbox_embed.", "objectness_embed."].map(count), [4000, 795_672, 257]);
        assert_eq!(["encoder.layers.", "encoder.query_scale."].map(|part| count(&format!("transformer.{part}"))), [2_369_283, 131_584]);
        let parts = ["layers.", "norm.", "query_scale.", "ref_point_head.", "ref_anchor_head."];
        let parts = parts.map(|part| count(&format!("transformer.decoder.{part}")));
        assert_eq!(parts, [7_965_446, 512, 131_584, 197_120, 66_306]);
    }
}

/// The names and shapes of the golden data's list, but for the sizes of its small CLIP.
#[test]
fn parameters_have_the_names_of_cora_s() {
    let store = nn::VarStore::new(Device::Cpu);
    let config = Config { queries: 24, ..Config::cora(64, 16) };
    let localizer = Localizer::blank(&store.root(), &config).unwrap();
    let shapes =
        |tensors: &BTreeMap<String, Tensor>| tensors.iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect::<Vec<_>>();
    assert_eq!(shapes(localizer.parameters()), shapes(&crate::golden::cora_weights("det")));
}

fn toy(config: &Config) -> (nn::VarStore, Localizer) {
    let store = nn::VarStore::new(Device::Cpu);
    let localizer = Localizer::new(&store.root(), config, 7).unwrap();
    (store, localizer)
}

/// Section 7.6 of the specification.
#[test]
fn layers_begin_as_copies_but_for_their_matrices() {
    let (_store, localizer) = toy(&Config::toy(32, 16));
    let of = |name: &str| &localizer.parameters()[name];
    let is_same = |[a, b]: [&str; 2]| error(of(a), of(b)) <= 0.0;
    let decoder = |name: &str| [0, 2].map(|layer| format!("transformer.decoder.layers.{layer}.{name}"));
    for (name, same) in [("linear1.weight", false), ("linear1.bias", true), ("sa_v_proj.bias", true), ("sa_v_proj.weight", false)] {
        assert_eq!(is_same(decoder(name).each_ref().map(String::as_str)), same, "{name}");
    }
    assert!(is_same(["bbox_embed.0.layers.1.weight", "bbox_embed.2.layers.1.weight"]));
    let largest = |name: &str| of(name).abs().max().double_value(&[]);
    for zero in ["bbox_embed.1.layers.2.weight", "bbox_embed.1.layers.2.bias", "transformer.decoder.layers.1.cross_attn.out_proj.bias"] {
        assert!(largest(zero) <= 0.0, "{zero}");
    }
    assert!(largest("transformer.encoder.layers.0.self_attn.in_proj_bias") <= 0.0);
    // The bound, and nearly it: the largest of some thousand even draws.
    let reaches = |name: &str, bound: f64| (0.99 * bound..=bound).contains(&largest(name));
    assert!(reaches("transformer.encoder.layers.0.self_attn.in_proj_weight", (6.0_f64 / (64.0 + 192.0)).sqrt()));
    assert!(reaches("transformer.decoder.ref_point_head.layers.0.weight", (6.0_f64 / (128.0 + 64.0)).sqrt()));
    assert!(reaches("bbox_embed.0.layers.0.weight", 0.125) && reaches("input_proj.0.0.weight", 32_f64.powf(-0.5)));
    assert!((of("transformer.encoder.layers.0.activation.weight").double_value(&[0]) - 0.25).abs() < 1e-9);
    // 400 normal draws: their deviation is known to 4 %, their mean to 0.05.
    let anchors = localizer.anchors();
    assert!((anchors.std(true).double_value(&[]) - 1.0).abs() < 0.12 && anchors.mean(Kind::Float).double_value(&[]).abs() < 0.2);
}

fn floats(name: &str, shape: &[i64]) -> Tensor {
    cora_values(name, shape, 1.0, 0.0)
}

fn classes(b: i64, n: i64) -> Tensor {
    let values: Vec<i64> = unit("classes", (b * n) as usize).map(|value| ((value + 1.0) * 2.5) as i64).collect();
    Tensor::from_slice(&values).view([b, n])
}

/// M4 of the specification, and copies of a split step. Sums in f32 in another order.
#[test]
fn anchors_do_not_depend_on_their_order_nor_images_on_their_copies() {
    let config = Config::toy(32, 16);
    let (_store, localizer) = toy(&config);
    let map = floats("map", &[2, 32, 5, 6]);
    let memory = localizer.encode(&map, &[[5, 6], [4, 3]], None).unwrap();
    let (texts, classes) = (floats("texts", &[5, 16]), classes(2, config.queries));
    let before = localizer.decode(&memory, &texts, &classes, None).unwrap();
    let twice = localizer.decode(&memory.repeated(2), &texts, &classes.repeat([2, 1]), None).unwrap();
    for copy in 0..2 {
        assert!(error(&twice.boxes.narrow(1, 2 * copy, 2), &before.boxes) < 1e-5);
    }
    let order = Tensor::from_slice(&(0..config.queries).map(|place| place * 37 % config.queries).collect::<Vec<i64>>());
    set(&localizer, "query_embed.weight", &localizer.anchors().index_select(0, &order));
    let after = localizer.decode(&memory, &texts, &classes.index_select(1, &order), None).unwrap();
    let permuted = |tensor: &Tensor| tensor.index_select(2, &order);
    assert!(error(&after.boxes, &permuted(&before.boxes)) < 1e-5 && error(&after.objectness, &permuted(&before.objectness)) < 1e-4);
    assert!(error(&after.boxes, &before.boxes) > 1e-2);
    assert_eq!((before.boxes.size(), before.objectness.size()), (vec![3, 2, 100, 4], vec![3, 2, 100]));
}

#[test]
fn classes_reach_queries_only_as_texts_and_dropout_follows_its_generator() {
    let map = floats("map", &[1, 32, 4, 4]);
    let (texts, classes) = (floats("texts", &[5, 16]), classes(1, 100));
    for (content, group_norm) in [(Content::Text, false), (Content::Zero, true)] {
        let (_store, localizer) = toy(&Config { content, group_norm, ..Config::toy(32, 16) });
        let out = |texts: &Tensor, seed: Option<u64>| {
            let mut random = seed.map(ChaCha8Rng::seed_from_u64);
            let memory = localizer.encode(&map, &[[4, 4]], random.as_mut()).unwrap();
            localizer.decode(&memory, texts, &classes, random.as_mut()).unwrap().objectness
        };
        assert_eq!(error(&out(&texts, None), &out(&texts.flip([0]), None)) > 1e-3, content == Content::Text);
        assert!(error(&out(&texts, Some(1)), &out(&texts, Some(1))) <= 0.0);
        assert!(error(&out(&texts, Some(1)), &out(&texts, Some(2))) > 1e-2);
        assert_eq!(localizer.parameters().contains_key("input_proj.0.1.weight"), group_norm);
        out(&texts, Some(1)).sum(Kind::Float).backward();
        assert!(localizer.anchors().grad().abs().max().double_value(&[]) > 0.0);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let config = Config::toy(32, 16);
    for (config, expected) in [
        (Config { hidden: 62, ..config }, "hidden: expected a multiple of 4, the sines and cosines of two axes, found 62"),
        (Config { heads: 5, ..config }, "hidden: expected a multiple of the number of heads, found 64"),
        (Config { hidden: 48, group_norm: true, ..config }, "hidden: expected a multiple of the number of groups, found 48"),
        (Config { decoder_layers: 0, ..config }, "decoder_layers: expected at least 1, found 0"),
    ] {
        assert_eq!(config.check().unwrap_err().to_string(), expected);
    }
    let (_store, localizer) = toy(&config);
    let map = floats("map", &[1, 32, 4, 4]);
    let encode = |map: &Tensor, valid: &[[i64; 2]]| localizer.encode(map, valid, None).map(drop).unwrap_err().to_string();
    assert_eq!(encode(&map.narrow(1, 0, 3), &[[4, 4]]), "map: expected Float [B, 32, h, w], not empty, found Float [1, 3, 4, 4]");
    assert_eq!(encode(&map, &[]), "valid sizes of maps: expected 1, one for each image, found 0");
    assert_eq!(encode(&map, &[[0, 4]]), "valid size of a map: expected [height, width] from [1, 1] to [4, 4], found [0, 4]");
    let memory = localizer.encode(&map, &[[4, 4]], None).unwrap();
    let decode = |texts: &Tensor, classes: &Tensor| localizer.decode(&memory, texts, classes, None).map(drop).unwrap_err().to_string();
    let (texts, classes) = (floats("texts", &[5, 16]), classes(1, 100));
    assert_eq!(decode(&texts.narrow(1, 0, 3), &classes), "class embeddings: expected [K, 16], K at least 1, found Float [5, 3]");
    assert_eq!(decode(&texts, &classes.narrow(1, 0, 3)), "classes of anchors: expected i64 [1, 100], found Int64 [1, 3]");
    assert_eq!(decode(&texts.narrow(0, 0, 2), &classes), "classes of anchors: expected from 0 to 1, found 0 to 4");
}
