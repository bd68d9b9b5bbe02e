//! The augmenter of RAF: a small transformer that mixes the CLIP embedding of a region with the concepts most similar to it. Kim et al.
//! 2024 (RALF, section 8 of its specification).
//!
//! A learned query looks, six times, at the region and its K most similar concepts; the result (`fine`) is added to a projection of the
//! region (`coarse`). Parameters have the reference's names; concepts come from outside and are in no checkpoint.
//!
//! Differences from the reference: as there is one query, keys and values of 51 tokens are never computed; the query is taken through the
//! matrix of keys, and the mixture of tokens through that of values, which is the same product in another order and 25 times less work.
//! Regions and concepts are f32 in training too, where the reference has f16 (its defect 23). Dropout draws from a given generator.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Reduction, Tensor, nn};

use crate::{
    Error, Misfit, Result,
    checkpoint::{Place, list, prefixes},
    clip::transformer::{LAYER_NORM_EPS, LayerNorm},
    error::{check_sizes, ensure},
    layers::{Dropout, Linear, to_unit_length},
    parameters::{Fill, Init, Parameters},
};

/// A tensor that only an augmenter has.
const MARK: &str = "region_learn_send.weight";
/// Regions that are compared with all concepts at once.
const REGIONS_AT_ONCE: i64 = 256;
/// The weight of the cross entropy; that of the squared difference is 1. (Section 8.3.)
const CLASS_WEIGHT: f64 = 5.0;

/// The size of an augmenter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// D, the dimension of CLIP's embeddings.
    pub dim: i64,
    /// Attention heads, a divisor of D.
    pub heads: i64,
    /// The width inside the perceptrons.
    pub mlp_width: i64,
    /// The number of layers.
    pub depth: usize,
    /// K, the concepts that are retrieved for a region.
    pub n_concepts: i64,
    /// The scale of tokens.
    pub fine: Fine,
}

/// The scale of tokens beside the embeddings that are added to them. (Defect 22.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Fine {
    /// The reference's: regions have length 1 and concepts about 1 / K beside embeddings of length sqrt(D), so the fine branch hardly
    /// depends on the region.
    #[default]
    Reference,
    /// Regions are multiplied by sqrt(D) and concepts by K sqrt(D), so that all have the length of the embeddings.
    Scaled,
}

impl Config {
    /// RALF's, for a CLIP whose embeddings have `dim` numbers.
    pub fn ralf(dim: i64) -> Self {
        Self { dim, heads: 8, mlp_width: 4 * dim, depth: 6, n_concepts: 50, fine: Fine::Reference }
    }

    /// The configuration of the network that has these tensors, under the reference's names or with something before all of them. Neither
    /// heads nor the scale of tokens can be seen in them.
    ///
    /// Fails where a tensor that gives a size is missing or has another shape; whether the others fit is seen when they are loaded.
    /// `origin` names the file.
    pub fn of_tensors(tensors: &BTreeMap<String, Tensor>, heads: i64, fine: Fine, origin: &Path) -> Result<Self> {
        let how = "save only that network: `torch.save` of its `state_dict()`";
        let Some(place) = Place::choose(&prefixes(tensors, MARK), None, tensors, origin, "one augmenter", how)? else {
            let found = if tensors.is_empty() { "no tensor".into() } else { list(tensors.keys()) };
            let problem = format!("expected an augmenter, with a tensor `{MARK}`, found {found}");
            let hint = "give RALF's `lvis_strict.pth` or `coco_strict.pth`, or a file that `augmenter/export` wrote".into();
            return Err(Error::Malformed { path: origin.to_owned(), problem, hint: Some(hint) });
        };
        let tensors = place.tensors(tensors);
        let dim = tensors.get("class_embedding").and_then(|class| class.size().get(1).copied()).unwrap_or(-1);
        let mut problems = Vec::new();
        // The number of rows.
        let mut rows = |name: &str, rows: i64| {
            let found = tensors.get(name).map(Tensor::size);
            let expected = vec![rows, dim];
            let fits = |found: &Vec<i64>| matches!(found[..], [n, width] if n > 0 && [-1, n].contains(&rows) && [-1, width].contains(&dim));
            if !found.as_ref().is_some_and(fits) {
                problems.push(Misfit { name: name.to_owned(), expected: Some(expected), found: found.clone() });
            }
            found.and_then(|found| found.first().copied()).unwrap_or_default()
        };
        rows("class_embedding", 1);
        rows(MARK, dim);
        let (n_concepts, mlp_width) = (rows("pos_embedding", -1), rows("transformer.layers.0.linear1.weight", -1));
        if !problems.is_empty() {
            return Err(Error::Misfits { path: origin.to_owned(), problems });
        }
        let layer = |name: &String| name.strip_prefix("transformer.layers.")?.split_once('.')?.0.parse::<usize>().ok();
        let depth = tensors.keys().filter_map(layer).collect::<BTreeSet<usize>>().len();
        Ok(Self { dim, heads, mlp_width, depth, n_concepts, fine })
    }

    /// Checks that all sizes are positive, and that the heads share the dimension evenly.
    pub fn check(&self) -> Result<()> {
        let Self { dim, heads, mlp_width, depth, n_concepts, fine: _ } = *self;
        check_sizes([("dim", dim), ("heads", heads), ("mlp_width", mlp_width), ("depth", depth as i64), ("n_concepts", n_concepts)])?;
        if dim % heads != 0 {
            return Err(Error::Input { what: "heads", expected: format!("a divisor of {dim}"), found: heads.to_string() });
        }
        Ok(())
    }
}

/// Embeddings of phrases, f32 `[N, D]` of unit length.
#[derive(Debug)]
pub struct Concepts(Tensor);

impl Concepts {
    /// `embeddings`: `[N, D]` of any length and kind.
    pub fn new(embeddings: &Tensor) -> Result<Self> {
        ensure(embeddings.dim() == 2, "concepts", "[N, D]", embeddings)?;
        Ok(Self(to_unit_length(&embeddings.to_kind(Kind::Float))))
    }

    /// The `n` concepts most similar to each of R regions, best first: cosines f32 `[R, n]` and rows i64 `[R, n]`.
    fn most_similar(&self, regions: &Tensor, n: i64) -> (Tensor, Tensor) {
        tch::no_grad(|| {
            let found = regions.split(REGIONS_AT_ONCE, 0).into_iter().map(|regions| regions.matmul(&self.0.tr()).topk(n, 1, true, true));
            let (cosines, rows): (Vec<_>, Vec<_>) = found.unzip();
            (Tensor::cat(&cosines, 0), Tensor::cat(&rows, 0))
        })
    }
}

/// The network.
#[derive(Debug)]
pub struct Augmenter {
    /// `[2, D]`: of regions, and of concepts.
    type_embedding: Tensor,
    /// `[K, D]`: of the ranks of concepts.
    pos_embedding: Tensor,
    /// `[1, D]`: the query.
    class_embedding: Tensor,
    layers: Vec<Layer>,
    region_learn_send: Linear,
    parameters: BTreeMap<String, Tensor>,
    config: Config,
}

/// What the two branches say of regions, f32 `[R, D]` of unit length each.
#[derive(Debug)]
pub struct Branches {
    /// Of the region and its concepts, by the transformer.
    pub fine: Tensor,
    /// Of the region alone, by a projection.
    pub coarse: Tensor,
}

impl Branches {
    /// Augmented embeddings, f32 `[R, D]` of unit length.
    pub fn out(&self) -> Tensor {
        to_unit_length(&(&self.fine + &self.coarse))
    }

    /// The same with the mean of the fine branch over all regions in its place: what is left without the concepts' part.
    pub fn out_with_mean_fine(&self) -> Tensor {
        to_unit_length(&(self.fine.mean_dim(0, true, Kind::Float) + &self.coarse))
    }
}

impl Augmenter {
    /// Declares a network under `path`, in f32, with first values that depend on `seed` and the parameters' names alone.
    pub fn new(path: &nn::Path<'_>, config: &Config, seed: u64) -> Result<Self> {
        let augmenter = Self::declare(path, config, Fill::Seed(seed))?;
        // The layers begin as copies of one.
        for (name, tensor) in &augmenter.parameters {
            let first = name.strip_prefix("transformer.layers.").and_then(|name| name.split_once('.'));
            if let Some((_, name)) = first {
                let first = &augmenter.parameters[&format!("transformer.layers.0.{name}")];
                tch::no_grad(|| tensor.shallow_clone().copy_(first));
            }
        }
        Ok(augmenter)
    }

    /// Declares a network of zeros, which a checkpoint is about to overwrite.
    pub fn blank(path: &nn::Path<'_>, config: &Config) -> Result<Self> {
        Self::declare(path, config, Fill::Blank)
    }

    fn declare(path: &nn::Path<'_>, config: &Config, fill: Fill) -> Result<Self> {
        config.check()?;
        let declared = RefCell::default();
        let root = &Parameters::new(path, fill, &declared);
        let embedding = |name: &str, n: i64| root.trainable(name, &[n, config.dim], Init::Normal(1.0));
        let (at, from_dim) = (&(&(root / "transformer") / "layers"), Init::fan_in(config.dim));
        let augmenter = Self {
            type_embedding: embedding("type_embedding", 2),
            pos_embedding: embedding("pos_embedding", config.n_concepts),
            class_embedding: embedding("class_embedding", 1),
            layers: (0..config.depth).map(|index| Layer::declare(&(at / index), config)).collect(),
            region_learn_send: Linear::declare(&(root / "region_learn_send"), config.dim, config.dim, from_dim, from_dim),
            parameters: BTreeMap::new(),
            config: *config,
        };
        Ok(Self { parameters: declared.into_inner(), ..augmenter })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Every parameter by the reference's name; they share memory with the network's.
    pub fn parameters(&self) -> &BTreeMap<String, Tensor> {
        &self.parameters
    }

    /// Augments regions, f32 `[R, D]` of unit length. Fails if there are fewer concepts than are retrieved.
    ///
    /// `dropout`: its generator, in training; without it nothing is dropped.
    pub fn forward(&self, regions: &Tensor, concepts: &Concepts, dropout: Option<&mut ChaCha8Rng>) -> Result<Branches> {
        let Config { dim, n_concepts, fine, .. } = self.config;
        let fits = matches!(regions.size()[..], [_, found] if found == dim) && regions.kind() == Kind::Float;
        ensure(fits, "regions", &format!("f32 [R, {dim}]"), regions)?;
        let fits = matches!(concepts.0.size()[..], [n, found] if n >= n_concepts && found == dim);
        ensure(fits, "concepts", &format!("[N, {dim}], N at least {n_concepts}"), &concepts.0)?;
        let mut dropout = Dropout(dropout);
        let (cosines, rows) = concepts.most_similar(regions, n_concepts);
        let weights = cosines.softmax(-1, Kind::Float).unsqueeze(2);
        // [R, K, D]
        let retrieved = concepts.0.index_select(0, &rows.view(-1)).view([-1, n_concepts, dim]) * weights;
        let [of_region, of_concepts] = match fine {
            Fine::Reference => [1.0, 1.0],
            Fine::Scaled => [1.0, n_concepts as f64].map(|factor| factor * (dim as f64).sqrt()),
        };
        let region = regions * of_region + self.type_embedding.get(0);
        let concept = retrieved * of_concepts + &self.pos_embedding + self.type_embedding.get(1);
        // [R, 1 + K, D]
        let tokens = Tensor::cat(&[region.unsqueeze(1), concept], 1);
        let query = self.class_embedding.expand([regions.size()[0], dim], false);
        let seen = self.layers.iter().fold(query, |query, layer| layer.forward(&query, &tokens, &mut dropout));
        Ok(Branches { fine: to_unit_length(&seen), coarse: to_unit_length(&self.region_learn_send.forward(regions)) })
    }
}

/// A decoder layer whose normalisations follow the sums.
#[derive(Debug)]
struct Layer {
    self_attn: Attention,
    multihead_attn: Attention,
    linear1: Linear,
    linear2: Linear,
    norms: [LayerNorm; 3],
}

impl Layer {
    fn declare(at: &Parameters<'_>, &Config { dim, heads, mlp_width, .. }: &Config) -> Self {
        let linear = |name: &str, n_in: i64, n_out: i64| Linear::declare(&(at / name), n_in, n_out, Init::fan_in(n_in), Init::fan_in(n_in));
        Self {
            self_attn: Attention::declare(&(at / "self_attn"), dim, heads),
            multihead_attn: Attention::declare(&(at / "multihead_attn"), dim, heads),
            linear1: linear("linear1", dim, mlp_width),
            linear2: linear("linear2", mlp_width, dim),
            norms: ["norm1", "norm2", "norm3"].map(|name| LayerNorm::declare(&(at / name), dim, LAYER_NORM_EPS)),
        }
    }

    /// `query`: `[R, D]`; `tokens`: `[R, L, D]`.
    fn forward(&self, query: &Tensor, tokens: &Tensor, dropout: &mut Dropout<'_>) -> Tensor {
        let own = self.self_attn.forward(query, &query.unsqueeze(1), dropout);
        let query = self.norms[0].forward(&(query + dropout.apply(own)));
        let taken = self.multihead_attn.forward(&query, tokens, dropout);
        let query = self.norms[1].forward(&(&query + dropout.apply(taken)));
        let hidden = dropout.apply(self.linear1.forward(&query).relu());
        let perceived = dropout.apply(self.linear2.forward(&hidden));
        self.norms[2].forward(&(&query + perceived))
    }
}

/// Multi-head attention of one query, laid out as PyTorch's `nn.MultiheadAttention`.
#[derive(Debug)]
struct Attention {
    /// `[3 D, D]` and `[3 D]`: queries, keys, values in this order.
    in_proj: Linear,
    out_proj: Linear,
    heads: i64,
}

impl Attention {
    fn declare(at: &Parameters<'_>, dim: i64, heads: i64) -> Self {
        let in_proj = Linear {
            weight: at.trainable("in_proj_weight", &[3 * dim, dim], Init::xavier(dim, 3 * dim)),
            bias: at.trainable("in_proj_bias", &[3 * dim], Init::Constant(0.0)),
        };
        let out_proj = Linear::declare(&(at / "out_proj"), dim, dim, Init::fan_in(dim), Init::Constant(0.0));
        Self { in_proj, out_proj, heads }
    }

    /// `query`: `[R, D]`; `tokens`: `[R, L, D]`. Returns `[R, D]`.
    fn forward(&self, query: &Tensor, tokens: &Tensor, dropout: &mut Dropout<'_>) -> Tensor {
        let (n, dim) = query.size2().expect("BUG: queries are [R, D]");
        let of_head = dim / self.heads;
        let weight = self.in_proj.weight.view([3, self.heads, of_head, dim]);
        let bias = self.in_proj.bias.view([3, self.heads, 1, of_head]);
        // [heads, R, D / heads]
        let query = query.unsqueeze(0).matmul(&weight.get(0).transpose(1, 2)) + bias.get(0);
        let query = query / (of_head as f64).sqrt();
        // A query's product with W k + b is that of its product with W, with k, and that with b. [R, heads, D]
        let of_tokens = query.matmul(&weight.get(1)).transpose(0, 1);
        let of_bias = (&query * bias.get(1)).sum_dim_intlist(-1, true, Kind::Float).transpose(0, 1);
        let attention = dropout.apply((of_tokens.matmul(&tokens.transpose(1, 2)) + of_bias).softmax(-1, Kind::Float));
        // The mixture of W v + b is W times the mixture of v, and b as often as the shares of attention make up.
        let mixed = attention.matmul(tokens).transpose(0, 1).matmul(&weight.get(2).transpose(1, 2));
        let shares = attention.sum_dim_intlist(-1, true, Kind::Float).transpose(0, 1);
        self.out_proj.forward(&(mixed + shares * bias.get(2)).transpose(0, 1).reshape([n, dim]))
    }
}

/// The losses of a batch, f32 scalars, weighted.
#[derive(Debug)]
pub struct Losses {
    /// Five times the cross entropy of augmented regions and the texts of classes.
    pub classes: Tensor,
    /// The mean squared difference of augmented regions and regions.
    pub regions: Tensor,
}

/// The losses of augmented regions; 0 where there are none.
///
/// `augmented`, `regions`: `[R, D]` of unit length; `texts`: of classes, `[K, D]` of unit length; `labels`: i64 `[R]`. `temperature`:
/// divides the cosines; the reference has none, so its cross entropy stays near ln K (defect 21).
pub fn losses(augmented: &Tensor, regions: &Tensor, texts: &Tensor, labels: &Tensor, temperature: Option<f64>) -> Result<Losses> {
    let (n, dim) = match augmented.size()[..] {
        [n, dim] if regions.size() == [n, dim] => (n, dim),
        _ => {
            return Err(Error::Input {
                what: "regions",
                expected: format!("{:?}, as augmented", augmented.size()),
                found: format!("{:?}", regions.size()),
            });
        }
    };
    ensure(matches!(texts.size()[..], [_, found] if found == dim), "texts of classes", &format!("[K, {dim}]"), texts)?;
    ensure(labels.size() == [n] && labels.kind() == Kind::Int64, "labels", &format!("i64 [{n}], one for each region"), labels)?;
    let cosines = augmented.matmul(&texts.tr());
    let logits = temperature.map_or_else(|| cosines.shallow_clone(), |temperature| &cosines / temperature);
    let n = n.max(1) as f64;
    let entropy = logits.cross_entropy_loss(labels, None::<&Tensor>, Reduction::Sum, -100, 0.0);
    let apart = (augmented - regions).square().sum(augmented.kind());
    Ok(Losses { classes: entropy * (CLASS_WEIGHT / n), regions: apart / (n * dim as f64) })
}

/// One minus the mean cosine of two different regions' fine embeddings `[R, D]`; 0 if there are fewer than two. (Defect 22.)
pub fn fine_spread(fine: &Tensor) -> f64 {
    let n = fine.size()[0];
    if n < 2 {
        return 0.0;
    }
    // Of vectors of unit length, half their squared distance; summed over all pairs that is n times the one from their mean.
    let fine = to_unit_length(&fine.detach().to_kind(Kind::Double));
    let apart = (&fine - fine.mean_dim(0, true, Kind::Double)).square().sum(Kind::Double).double_value(&[]);
    apart / (n - 1) as f64
}

#[cfg(test)]
mod tests {
    use rand_chacha::rand_core::SeedableRng as _;
    use tch::Device;

    use super::*;
    use crate::golden::{detpro_ralf, error, unit};

    fn scalar(tensor: &Tensor) -> f64 {
        tensor.double_value(&[])
    }

    fn rows(numbers: &[f64], dim: i64) -> Tensor {
        Tensor::from_slice(numbers).view([-1, dim]).to_kind(Kind::Float)
    }

    fn unit_rows(numbers: &[f64], dim: i64) -> Tensor {
        to_unit_length(&rows(numbers, dim))
    }

    fn set(augmenter: &Augmenter, name: &str, values: &Tensor) {
        let mut parameter = augmenter.parameters()[name].shallow_clone();
        tch::no_grad(|| parameter.copy_(&values.view(&parameter.size()[..])));
    }

    /// Parameters but LayerNorm's in the order of parity check 16.
    fn ordered(depth: usize) -> Vec<String> {
        let attention =
            |name: &str| ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"].map(|part| format!("{name}.{part}"));
        let linear = |name: &str| ["weight", "bias"].map(|part| format!("{name}.{part}"));
        let of_layer = [attention("self_attn"), attention("multihead_attn")].concat();
        let of_layer = [of_layer, [linear("linear1"), linear("linear2")].concat()].concat();
        let layers = (0..depth).flat_map(|index| of_layer.iter().map(move |name| format!("transformer.layers.{index}.{name}")));
        let embeddings = ["type_embedding", "pos_embedding", "class_embedding"].map(str::to_owned);
        embeddings.into_iter().chain(layers).chain(linear("region_learn_send")).collect()
    }

    fn blank(config: &Config) -> (nn::VarStore, Augmenter) {
        let store = nn::VarStore::new(Device::Cpu);
        let augmenter = Augmenter::blank(&store.root(), config).unwrap();
        for (name, tensor) in augmenter.parameters() {
            if name.contains("norm") && name.ends_with("weight") {
                drop(tch::no_grad(|| tensor.shallow_clone().fill_(1.0)));
            }
        }
        (store, augmenter)
    }

    fn random(fine: Fine) -> (nn::VarStore, Augmenter) {
        let store = nn::VarStore::new(Device::Cpu);
        let config = Config { dim: 64, heads: 4, mlp_width: 128, depth: 2, n_concepts: 5, fine };
        let augmenter = Augmenter::new(&store.root(), &config, 3).unwrap();
        (store, augmenter)
    }

    fn noise(name: &str, n: usize) -> Tensor {
        to_unit_length(&Tensor::from_slice(&unit(name, 64 * n).collect::<Vec<f32>>()).view([n as i64, 64]))
    }

    /// Parity check 16 of the specification: printed to six digits.
    #[test]
    fn a_small_network_has_the_values_of_the_specification() {
        let (_store, augmenter) = blank(&Config { dim: 4, heads: 2, mlp_width: 8, depth: 2, n_concepts: 3, fine: Fine::Reference });
        let names = ordered(2);
        assert_eq!(names.len(), 29);
        for (place, name) in names.iter().enumerate() {
            let n = augmenter.parameters()[name].numel();
            let values: Vec<f64> = (0..n).map(|index| 0.9 * (0.7 * (place + 1) as f64 + 1.1 * index as f64).sin()).collect();
            set(&augmenter, name, &Tensor::from_slice(&values));
        }
        let concepts = [1., 0., 1., 0., 0., 1., 1., 0., 1., 1., 0., 1., -1., 0., 0., 1., 0., 0., 1., 1.];
        let concepts = Concepts::new(&rows(&concepts, 4)).unwrap();
        let x = unit_rows(&[2., 1., 1., 0., 0., 0., 1., 3.], 4);
        let (cosines, retrieved) = concepts.most_similar(&x, 3);
        assert_eq!(Vec::<i64>::try_from(retrieved.view(-1)).unwrap(), [0, 2, 1, 4, 3, 2]);
        assert!(error(&cosines.get(0), &rows(&[0.75_f64.sqrt(), 0.5_f64.sqrt(), (1.0 / 3.0_f64).sqrt()], 3).get(0)) < 2e-6);
        let branches = augmenter.forward(&x, &concepts, None).unwrap();
        assert!(error(&branches.fine.get(0), &rows(&[0.575_611, -0.801_885, 0.118_257, 0.108_018], 4).get(0)) < 1e-5);
        assert!(error(&branches.coarse.get(0), &rows(&[0.843_284, 0.067_698, -0.530_738, -0.051_057], 4).get(0)) < 1e-5);
        let expected = [0.859_435, -0.444_703, -0.249_843, 0.034_501, 0.688_022, -0.211_411, -0.014_069, -0.694_070];
        assert!(error(&branches.out(), &rows(&expected, 4)) < 1e-5);
    }

    /// The census of the published network, and values that RALF's own code computes from weights by a formula.
    #[test]
    fn a_network_of_full_size_is_that_of_ralf_s_code() {
        let (_store, augmenter) = blank(&Config::ralf(512));
        assert_eq!(augmenter.parameters().len(), 113);
        assert_eq!(augmenter.parameters().values().map(Tensor::numel).sum::<usize>(), 25_513_984);
        let of_layer = augmenter.parameters().iter().filter(|(name, _)| name.starts_with("transformer.layers.0."));
        assert_eq!(of_layer.map(|(_, tensor)| tensor.numel()).sum::<usize>(), 4_204_032);
        let values = |tensor: usize, amplitude: f64, n: usize| {
            let start = 12.9898 * (tensor + 1) as f64;
            let value = |index: usize| {
                let wave = start + 0.754_877_666_246_692_7 * index as f64;
                amplitude * (wave + 0.569_840_290_998_053_2 * ((index + 1) as f64).sqrt() * (tensor + 3) as f64).sin()
            };
            Tensor::from_slice(&(0..n).map(|index| value(index) as f32).collect::<Vec<f32>>())
        };
        for (place, name) in ordered(6).iter().enumerate() {
            let parameter = &augmenter.parameters()[name];
            let amplitude = match parameter.dim() {
                _ if place < 3 => 1.4,
                1 => 0.02,
                _ => 0.06,
            };
            set(&augmenter, name, &values(place, amplitude, parameter.numel()));
        }
        let [x, concepts] = [(1000, 4), (2000, 60)].map(|(tensor, n)| to_unit_length(&values(tensor, 1.0, 512 * n).view([n as i64, 512])));
        let golden = detpro_ralf("ralf_full_width");
        assert!(error(&x.narrow(1, 0, 16), &golden["x_first16"]) < 1e-5);
        assert!(error(&concepts.narrow(1, 0, 16).narrow(0, 0, 5), &golden["z_first16"]) < 1e-5);
        let concepts = Concepts::new(&concepts).unwrap();
        assert_eq!(concepts.most_similar(&x, 50).1, golden["retrieved"]);
        let out = tch::no_grad(|| augmenter.forward(&x, &concepts, None).unwrap().out());
        assert!(error(&out, &golden["out"]) < 1e-4, "{}", error(&out, &golden["out"]));
    }

    /// Results, losses, gradients and three steps of SGD by RALF's own code, without dropout.
    #[test]
    fn training_is_that_of_ralf_s_code() {
        let golden = detpro_ralf("ralf");
        let config = Config { dim: 32, heads: 4, mlp_width: 64, depth: 2, n_concepts: 5, fine: Fine::Reference };
        let (_store, augmenter) = blank(&config);
        let named =
            |prefix: &str| golden.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_owned(), tensor))).collect();
        let weights: BTreeMap<String, &Tensor> = named("aug/param/");
        assert!(weights.keys().eq(augmenter.parameters().keys()));
        weights.iter().for_each(|(name, values)| set(&augmenter, name, values));
        let [x, texts, labels] = ["x", "texts", "labels"].map(|name| &golden[&format!("aug/{name}")]);
        let concepts = Concepts::new(&golden["aug/concepts"]).unwrap();
        let out = || augmenter.forward(x, &concepts, None).unwrap().out();
        assert!(error(&out(), &golden["aug/out"]) < 1e-4);
        // The reference rounds regions and concepts to f16 in training.
        let half = |tensor: &Tensor| tensor.to_kind(Kind::Half).to_kind(Kind::Float);
        let rounded = augmenter.forward(&half(x), &Concepts::new(&half(&golden["aug/concepts"])).unwrap(), None).unwrap().out();
        assert!(error(&rounded, &golden["aug/out_f16_inputs"]) < 2e-3, "{}", error(&rounded, &golden["aug/out_f16_inputs"]));
        for step in 0..3 {
            let losses = losses(&out(), x, texts, labels, None).unwrap();
            for (loss, name) in [(&losses.classes, "aug/loss_cls"), (&losses.regions, "aug/loss_reg")] {
                let expected = golden[name].double_value(&[step]);
                assert!((scalar(loss) / expected - 1.0).abs() < 1e-4, "{step} {name}: {} {expected}", scalar(loss));
            }
            (losses.classes + losses.regions).backward();
            for (name, expected) in named("aug/grad/") {
                let gradient = augmenter.parameters()[&name].grad();
                // Where exact gradients are 0, as of queries and keys of one token, those of f32 are noise.
                let apart = error(&gradient, expected) / expected.abs().max().double_value(&[]).max(1e-4);
                assert!(step > 0 || apart < 1e-3, "{name}: {apart}");
            }
            for parameter in augmenter.parameters().values() {
                let mut gradient = parameter.grad();
                tch::no_grad(|| {
                    let mut parameter = parameter.shallow_clone();
                    parameter -= &gradient * 0.1;
                });
                drop(gradient.zero_());
            }
        }
        assert!(error(&out(), &golden["aug/out_after_3_steps"]) < 1e-4);
    }

    /// Parity check 17 of the specification.
    #[test]
    fn losses_have_the_values_of_the_specification() {
        let (out, x) = (unit_rows(&[1., 2., 2., 2., 1., 0.], 3), unit_rows(&[1., 1., 2., 2., 0., 1.], 3));
        let texts = unit_rows(&[1., 1., 1., 0., 1., 2., 1., 0., 0., 2., 2., -1.], 3);
        let labels = Tensor::from_slice(&[1_i64, 2]);
        let found = losses(&out, &x, &texts, &labels, None).unwrap();
        assert!((scalar(&found.classes) - 5.0 * 1.203_566).abs() < 1e-5 && (scalar(&found.regions) - 0.082_474).abs() < 1e-6);
        assert!((scalar(&(&found.classes + &found.regions)) - 6.100_304).abs() < 1e-5);
        let sharp = losses(&out, &x, &texts, &labels, Some(0.01)).unwrap();
        assert!((scalar(&sharp.classes) - 5.0 * 1.203_566).abs() > 1.0 && (scalar(&sharp.regions) - 0.082_474).abs() < 1e-6);
        let none = losses(&out.narrow(0, 0, 0), &x.narrow(0, 0, 0), &texts, &labels.narrow(0, 0, 0), None).unwrap();
        assert!(scalar(&none.classes).abs() < 1e-12 && scalar(&none.regions).abs() < 1e-12);
    }

    #[test]
    fn layers_begin_as_copies_of_one() {
        let (_store, augmenter) = random(Fine::Reference);
        let of_layer = |index: usize| augmenter.parameters()[&format!("transformer.layers.{index}.linear1.weight")].shallow_clone();
        assert!(error(&of_layer(0), &of_layer(1)) < 1e-12 && scalar(&of_layer(0).abs().max()) > 0.1);
    }

    #[test]
    fn a_region_depends_neither_on_its_neighbours_nor_on_the_order_of_concepts() {
        let (_store, augmenter) = random(Fine::Scaled);
        let (x, concepts) = (noise("regions", 300), noise("concepts", 40));
        let out = |x: &Tensor, concepts: &Tensor| augmenter.forward(x, &Concepts::new(concepts).unwrap(), None).unwrap().out();
        let together = out(&x, &concepts);
        assert!(error(&out(&x.narrow(0, 270, 1), &concepts), &together.narrow(0, 270, 1)) < 1e-5);
        assert!(error(&out(&x, &concepts.flip([0])), &together) < 1e-5);
        assert_eq!(out(&x.narrow(0, 0, 0), &concepts).size(), [0, 64]);
        let refusal = augmenter.forward(&x, &Concepts::new(&concepts.narrow(0, 0, 4)).unwrap(), None).unwrap_err().to_string();
        assert_eq!(refusal, "concepts: expected [N, 64], N at least 5, found Float [4, 64]");
    }

    /// Defect 22: in the reference the transformer says nearly the same of every region.
    #[test]
    fn the_fine_branch_depends_on_regions_only_if_tokens_are_scaled() {
        let (x, concepts) = (noise("regions", 50), Concepts::new(&noise("concepts", 40)).unwrap());
        let spread = |fine| fine_spread(&random(fine).1.forward(&x, &concepts, None).unwrap().fine);
        assert!(spread(Fine::Reference) < 1e-2 && spread(Fine::Scaled) > 10.0 * spread(Fine::Reference));
        let fine = unit_rows(&[1., 0., 0., 1., -1., 0.], 2);
        // Cosines 0, 0 and -1.
        assert!((fine_spread(&fine) - (1.0 + 1.0 / 3.0)).abs() < 1e-9);
        assert!(fine_spread(&fine.narrow(0, 0, 1)).abs() < 1e-12);
    }

    #[test]
    fn dropout_follows_its_generator() {
        let (_store, augmenter) = random(Fine::Scaled);
        let (x, concepts) = (noise("regions", 20), Concepts::new(&noise("concepts", 40)).unwrap());
        let out = |seed| augmenter.forward(&x, &concepts, Some(&mut ChaCha8Rng::seed_from_u64(seed))).unwrap().out();
        assert!(error(&out(1), &out(1)) < 1e-12 && error(&out(1), &out(2)) > 1e-3);
    }
}
