//! A network like SigLIP (Zhai et al., ICCV 2023), to try that another pair of towers needs one file and one row of `layout::LAYOUTS`.
//!
//! The names are those of Hugging Face's `SiglipModel`. It has no class token, the image feature is read by a learned query (attention
//! pooling), texts are padded to the context and read at the last token, GELU is approximated by tanh, LayerNorm has another epsilon, and
//! pixels are scaled to [-1, 1]. The tokenizer is a stand-in: SigLIP's own is a SentencePiece model beside the weights.

use std::{collections::BTreeMap, path::Path};

use tch::{IndexOp, Kind, Tensor};

use super::{
    Activation,
    architecture::{Architecture, ImageTower, Network, Preprocessing, ResizeMode, TextTower, Towers},
    layout::{Layout, Shapes, from_hugging_face},
    settings::Settings,
    tokenizer::{Encode, Padding, Tokenizer},
    transformer::{Attention, BlockInit, LayerNorm, SelfAttention, Shape, Transformer},
};
use crate::{
    Error, Phase, Result,
    layers::Linear,
    parameters::{Init, Parameters},
};

const EPS: f64 = 1e-6;
/// Only SigLIP's image tower has a learned query.
const MARK: &str = "vision_model.head.probe";

pub(super) const LAYOUT: Layout = Layout {
    name: "Hugging Face's SiglipModel",
    activation: Some(Activation::TanhGelu),
    projections: &["vision_model.head.mlp.fc2.weight", "text_model.head.weight"],
    is_of: |tensors| tensors.contains_key(MARK),
    translate: from_hugging_face,
    read,
};

#[derive(Debug)]
struct Siglip {
    width: i64,
    mlp_width: i64,
    heads: i64,
    image_side: i64,
    patch: i64,
    image_depth: usize,
    text_depth: usize,
    vocabulary: i64,
    context: i64,
    activation: Activation,
}

fn read(tensors: &BTreeMap<String, Tensor>, activation: Activation, settings: &Settings, origin: &Path) -> Result<Architecture> {
    let mut shapes = Shapes { tensors, problems: Vec::new() };
    let [width, _, _, patch]: [i64; 4] = shapes.of("visual.conv1.weight");
    let [n_patches, _] = shapes.of("visual.positional_embedding");
    let [mlp_width, _] = shapes.of("vision_model.head.mlp.fc1.weight");
    let [vocabulary, _] = shapes.of("token_embedding.weight");
    let [context, _] = shapes.of("positional_embedding");
    let network = Siglip {
        width,
        mlp_width,
        heads: (width / 64).max(1),
        image_side: patch * (n_patches as f64).sqrt() as i64,
        patch,
        image_depth: shapes.depth("visual.transformer.resblocks."),
        text_depth: shapes.depth("transformer.resblocks."),
        vocabulary,
        context,
        activation,
    };
    if !shapes.problems.is_empty() {
        return Err(Error::Misfits { path: origin.to_owned(), problems: shapes.problems });
    }
    Ok(Architecture::new(network, settings))
}

impl Siglip {
    fn shape(&self, depth: usize) -> Shape {
        Shape { width: self.width, heads: self.heads, depth, mlp_width: self.mlp_width, eps: EPS }
    }
}

impl Network for Siglip {
    fn check(&self) -> Result<()> {
        if self.width % self.heads == 0 && self.image_side >= self.patch {
            return Ok(());
        }
        Err(Error::Input {
            what: "siglip",
            expected: "a width that its heads divide, and a patch at least".into(),
            found: format!("{self:?}"),
        })
    }

    fn declare(&self, root: &Parameters<'_>) -> Towers {
        let (width, visual, small) = (self.width, &(root / "visual"), Init::Normal(0.02));
        let (vision, head) = (&(root / "vision_model"), &(&(root / "vision_model") / "head"));
        let shape = self.shape(self.image_depth);
        let init = BlockInit::default_of(&shape);
        let mlp = &(head / "mlp");
        let image = Image {
            patches: (visual / "conv1").trainable("weight", &[width, 3, self.patch, self.patch], small),
            patch_bias: (&(vision / "embeddings") / "patch_embedding").trainable("bias", &[width], Init::Constant(0.0)),
            positions: visual.trainable("positional_embedding", &[(self.image_side / self.patch).pow(2), width], small),
            transformer: Transformer::declare(&(visual / "transformer"), &shape, self.activation, &init),
            ln_post: LayerNorm::declare(&(visual / "ln_post"), width, EPS),
            query: head.trainable("probe", &[1, 1, width], small),
            attention: SelfAttention::declare(&(head / "attention"), width, self.heads, &init),
            ln: LayerNorm::declare(&(head / "layernorm"), width, EPS),
            fc1: Linear::declare(&(mlp / "fc1"), width, self.mlp_width, small, Init::Constant(0.0)),
            fc2: Linear::declare(&(mlp / "fc2"), self.mlp_width, width, small, Init::Constant(0.0)),
            activation: self.activation,
            patch: self.patch,
        };
        let shape = self.shape(self.text_depth);
        let text = Text {
            tokens: (root / "token_embedding").trainable("weight", &[self.vocabulary, width], small),
            positions: root.trainable("positional_embedding", &[self.context, width], small),
            transformer: Transformer::declare(&(root / "transformer"), &shape, self.activation, &BlockInit::default_of(&shape)),
            ln_final: LayerNorm::declare(&(root / "ln_final"), width, EPS),
            head: Linear::declare(&(&(root / "text_model") / "head"), width, width, small, Init::Constant(0.0)),
        };
        Towers { image: Box::new(image), text: Box::new(text) }
    }

    fn embed_dim(&self) -> i64 {
        self.width
    }

    fn preprocessing(&self) -> Preprocessing {
        Preprocessing { image_side: self.image_side, resize: ResizeMode::Squash, mean: [0.5; 3], std: [0.5; 3] }
    }

    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::new(Letters, self.context as usize, Padding::Context, PAD)
    }

    fn describe(&self) -> [String; 2] {
        [("image", self.image_depth), ("text", self.text_depth)]
            .map(|(tower, depth)| format!("SigLIP's {tower} tower: {depth} blocks of width {}", self.width))
    }
}

#[derive(Debug)]
struct Image {
    patches: Tensor,
    patch_bias: Tensor,
    positions: Tensor,
    transformer: Transformer,
    ln_post: LayerNorm,
    query: Tensor,
    attention: SelfAttention,
    ln: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    activation: Activation,
    patch: i64,
}

impl ImageTower for Image {
    fn least_side(&self) -> i64 {
        self.patch
    }

    fn forward(&self, images: &Tensor, _: Phase) -> Tensor {
        let patches = images.conv2d(&self.patches, Some(&self.patch_bias), self.patch, 0, 1, 1);
        let (b, c, rows, columns) = patches.size4().expect("BUG: a convolution of images has four dimensions");
        let side = (self.positions.size()[0] as f64).sqrt() as i64;
        let grid = self.positions.reshape([1, side, side, c]).permute([0, 3, 1, 2]);
        let positions = grid.upsample_bilinear2d([rows, columns], false, None, None).to_kind(patches.kind());
        let x = (patches + positions).flatten(2, 3).transpose(1, 2);
        let x = self.ln_post.forward(&self.transformer.forward(x, Attention::Full));
        let pooled = self.attention.take(&self.query.expand([b, 1, c], false), &x, None);
        let hidden = self.activation.apply(self.fc1.forward(&self.ln.forward(&pooled)));
        (&pooled + self.fc2.forward(&hidden)).i((.., 0))
    }

    fn cast(&mut self, kind: Kind) {
        for tensor in [&mut self.patches, &mut self.patch_bias, &mut self.query] {
            *tensor = tensor.to_kind(kind);
        }
        self.transformer.cast(kind);
        for linear in [&mut self.attention.in_proj, &mut self.attention.out_proj, &mut self.fc1, &mut self.fc2] {
            linear.cast(kind);
        }
    }
}

#[derive(Debug)]
struct Text {
    tokens: Tensor,
    positions: Tensor,
    transformer: Transformer,
    ln_final: LayerNorm,
    head: Linear,
}

impl TextTower for Text {
    fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let context = self.positions.size()[0];
        if !matches!(tokens.size()[..], [_, l] if l == context) {
            return Err(Error::Input { what: "tokens", expected: format!("[B, {context}]"), found: format!("{:?}", tokens.size()) });
        }
        let embedded = Tensor::embedding(&self.tokens, &tokens.to_device(self.tokens.device()), -1, false, false) + &self.positions;
        let x = self.transformer.forward(embedded.to_kind(self.head.weight.kind()), Attention::Full);
        Ok(self.head.forward(&self.ln_final.forward(&x.i((.., -1)))))
    }

    fn cast(&mut self, kind: Kind) {
        self.transformer.cast(kind);
        self.head.cast(kind);
    }
}

const END: u32 = 1;
const PAD: u32 = 1;

/// A token for each letter.
struct Letters;

impl Encode for Letters {
    fn encode(&self, text: &str) -> Vec<u32> {
        text.to_lowercase().bytes().filter(u8::is_ascii_lowercase).map(|letter| u32::from(letter - b'a') + 2).chain([END]).collect()
    }

    fn end(&self) -> u32 {
        END
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::clip::{Clip, layout, tokenizer::Overlong};

    /// A state dict under `SiglipModel`'s names, two blocks a tower, 128 channels, 32 px, 12 tokens.
    fn state_dict() -> BTreeMap<String, Tensor> {
        let mut shapes: Vec<(String, Vec<i64>)> = Vec::new();
        let mut add = |name: &str, shape: &[i64]| shapes.push((name.to_owned(), shape.to_vec()));
        for tower in ["vision_model", "text_model"] {
            for block in 0..2 {
                let at = |leaf: &str| format!("{tower}.encoder.layers.{block}.{leaf}");
                for matrix in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                    add(&at(&format!("self_attn.{matrix}.weight")), &[128, 128]);
                    add(&at(&format!("self_attn.{matrix}.bias")), &[128]);
                }
                for norm in ["layer_norm1", "layer_norm2"] {
                    add(&at(&format!("{norm}.weight")), &[128]);
                    add(&at(&format!("{norm}.bias")), &[128]);
                }
                for (fc, shape) in [("fc1", [256, 128]), ("fc2", [128, 256])] {
                    add(&at(&format!("mlp.{fc}.weight")), &shape);
                    add(&at(&format!("mlp.{fc}.bias")), &shape[..1]);
                }
            }
        }
        add("vision_model.embeddings.patch_embedding.weight", &[128, 3, 8, 8]);
        add("vision_model.embeddings.patch_embedding.bias", &[128]);
        add("vision_model.embeddings.position_embedding.weight", &[16, 128]);
        add("vision_model.post_layernorm.weight", &[128]);
        add("vision_model.post_layernorm.bias", &[128]);
        add("vision_model.head.probe", &[1, 1, 128]);
        add("vision_model.head.attention.in_proj_weight", &[384, 128]);
        add("vision_model.head.attention.in_proj_bias", &[384]);
        add("vision_model.head.attention.out_proj.weight", &[128, 128]);
        add("vision_model.head.attention.out_proj.bias", &[128]);
        add("vision_model.head.layernorm.weight", &[128]);
        add("vision_model.head.layernorm.bias", &[128]);
        add("vision_model.head.mlp.fc1.weight", &[256, 128]);
        add("vision_model.head.mlp.fc1.bias", &[256]);
        add("vision_model.head.mlp.fc2.weight", &[128, 256]);
        add("vision_model.head.mlp.fc2.bias", &[128]);
        add("text_model.embeddings.token_embedding.weight", &[32, 128]);
        add("text_model.embeddings.position_embedding.weight", &[12, 128]);
        add("text_model.final_layer_norm.weight", &[128]);
        add("text_model.final_layer_norm.bias", &[128]);
        add("text_model.head.weight", &[128, 128]);
        add("text_model.head.bias", &[128]);
        add("logit_scale", &[1]);
        add("logit_bias", &[1]);
        let value = |name: &str, shape: &[i64]| {
            let n = shape.iter().product::<i64>();
            let flat: Vec<f32> = crate::golden::unit(name, n as usize).map(|u| 0.2 * u).collect();
            Tensor::from_slice(&flat).reshape(shape)
        };
        shapes.iter().map(|(name, shape)| (name.clone(), value(name, shape))).collect()
    }

    fn load(kind: Kind) -> Clip {
        Clip::load(&state_dict(), Path::new("siglip.safetensors"), Settings::default(), Device::Cpu, kind).unwrap()
    }

    #[test]
    fn another_pair_of_towers_is_recognised_and_embeds_with_its_own_preprocessing_and_tokenizer() {
        let clip = load(Kind::Float);
        let half = Preprocessing { image_side: 32, resize: ResizeMode::Squash, mean: [0.5; 3], std: [0.5; 3] };
        assert_eq!((clip.preprocessing(), clip.image_side(), clip.least_side(), clip.embed_dim()), (half, 32, 8, 128));
        let images = Tensor::arange(2 * 3 * 32 * 32, (Kind::Float, Device::Cpu)).sin().view([2, 3, 32, 32]);
        let features = clip.encode_image_features(&images, Phase::Test).unwrap();
        assert_eq!(features.size(), [2, 128]);
        assert!((features.norm_scalaropt_dim(2.0, -1_i64, false) - 1.0).abs().max().double_value(&[]) < 1e-5);
        assert_eq!(clip.encode_image(&Tensor::zeros([1, 3, 40, 56], (Kind::Float, Device::Cpu)), Phase::Test).unwrap().size(), [1, 128]);

        // Rows are as long as the context: the feature is read at the last token.
        let tokens = clip.tokenizer().batch(&["a cat", "dog"], Overlong::Refuse).unwrap();
        assert_eq!(tokens.size(), [2, 12]);
        assert_eq!(Vec::<i64>::try_from(tokens.get(1)).unwrap(), [5, 16, 8, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
        let texts = clip.encode_text_features(&tokens).unwrap();
        assert!((texts.get(0) - texts.get(1)).abs().max().double_value(&[]) > 1e-3);
        let error = clip.tokenizer().batch(&["rhinoceroses"], Overlong::Refuse).unwrap_err().to_string();
        assert_eq!(error, "text: expected at most 12 tokens, found 13 tokens in \"rhinoceroses\"...");
    }

    #[test]
    fn config_files_change_its_preprocessing_and_parts_that_it_lacks_are_refused_in_words() {
        let json = br#"{"image_mean": [0.4, 0.4, 0.4], "size": {"height": 48, "width": 48}}"#;
        let settings = Settings::of_file("preprocessor_config.json", json).unwrap();
        let clip = Clip::load(&state_dict(), Path::new("siglip.safetensors"), settings, Device::Cpu, Kind::Float).unwrap();
        assert_eq!((clip.image_side(), clip.preprocessing().mean, clip.preprocessing().std), (48, [0.4; 3], [0.5; 3]));
        assert_eq!(clip.object_grid(), None);
        let (images, masks) =
            (Tensor::zeros([1, 3, 48, 48], (Kind::Float, Device::Cpu)), Tensor::zeros([1, 6, 6], (Kind::Float, Device::Cpu)));
        assert_eq!(
            clip.encode_objects(&images, &masks).unwrap_err().to_string(),
            "image tower: expected a vision transformer with a class token: the object token looks at its patches, found SigLIP's image \
             tower: 2 blocks of width 128"
        );
        assert_eq!(
            clip.causal_text().unwrap_err().to_string(),
            "text tower: expected a causal one, as CLIP has: learned contexts need it, found SigLIP's text tower: 2 blocks of width 128"
        );
    }

    #[test]
    fn in_bf16_it_stays_close_to_itself() {
        let images = Tensor::arange(3 * 32 * 32, (Kind::Float, Device::Cpu)).sin().view([1, 3, 32, 32]);
        let [exact, rounded] = [Kind::Float, Kind::BFloat16].map(|kind| {
            let clip = load(kind);
            let features = clip.encode_image_features(&images, Phase::Test).unwrap();
            assert_eq!((clip.kind(), features.kind()), (kind, kind));
            features.to_kind(Kind::Float)
        });
        assert!((exact * rounded).sum(Kind::Float).double_value(&[]) > 0.99);
    }

    #[test]
    fn every_tensor_of_the_checkpoint_is_used() {
        let mut tensors = state_dict();
        let normalised = layout::normalise(&tensors, Path::new("siglip.safetensors")).unwrap();
        assert_eq!((normalised.layout.name, normalised.unused), ("Hugging Face's SiglipModel", vec!["logit_bias".to_owned()]));
        tensors.remove("vision_model.head.layernorm.bias");
        let error = Clip::load(&tensors, Path::new("siglip.safetensors"), Settings::default(), Device::Cpu, Kind::Float).unwrap_err();
        let expected = "1 tensors do not fit the network: vision_model.head.layernorm.bias: expected [128], found nothing";
        assert!(error.to_string().ends_with(expected), "{error}");
    }
}
