//! The vision transformer.
//!
//! Any image at least one patch wide and high is taken: the grid is `floor(H / patch) x floor(W / patch)` (remaining pixels are dropped),
//! and where it differs from the grid of the checkpoint the position table is resized bilinearly, `align_corners = false`, without
//! antialiasing. That is OADP's rule; open_clip and Hugging Face resize bicubically.
//!
//! [`Vit::forward_objects`] is OADP's object-token mask attention (section 4.3 there): patches twice as dense, and beside the ordinary
//! stream a token that looks only at the object's patches. The reference projects keys and values of the patches a second time for
//! it, and computes patches in the last block that nothing reads; here neither is done. The result is the same.

use tch::{IndexOp, Kind, Tensor};

use super::{
    Activation,
    architecture::ImageTower,
    transformer::{BlockInit, LayerNorm, Shape, Transformer},
};
use crate::{
    Phase,
    parameters::{Init, Parameters},
};

/// Added to the attention logits of patches outside the object (OADP).
const MASK_BIAS: f64 = -100.0;

/// The vision transformer.
#[derive(Debug)]
pub struct Vit {
    /// The patch embedding, `[C, 3, patch, patch]`.
    pub(crate) conv1: Tensor,
    /// `[C]`, f32.
    pub(crate) class_embedding: Tensor,
    /// `[1 + grid * grid, C]`, f32; row 0 is the class token's, then the grid row by row.
    pub(crate) positional_embedding: Tensor,
    pub(crate) ln_pre: LayerNorm,
    pub(crate) transformer: Transformer,
    pub(crate) ln_post: LayerNorm,
    /// `[C, D]`.
    pub(crate) proj: Tensor,
    pub(crate) patch: i64,
}

impl Vit {
    pub(super) fn declare(at: &Parameters<'_>, image_side: i64, patch: i64, shape: &Shape, embed_dim: i64, activation: Activation) -> Self {
        let width = shape.width;
        let grid = image_side / patch;
        let scaled = Init::Normal((width as f64).powf(-0.5));
        Self {
            conv1: (at / "conv1").trainable("weight", &[width, 3, patch, patch], Init::fan_in(3 * patch * patch)),
            class_embedding: at.trainable("class_embedding", &[width], scaled),
            positional_embedding: at.trainable("positional_embedding", &[1 + grid * grid, width], scaled),
            ln_pre: LayerNorm::declare(&(at / "ln_pre"), width, shape.eps),
            transformer: Transformer::declare(&(at / "transformer"), shape, activation, &BlockInit::default_of(shape)),
            ln_post: LayerNorm::declare(&(at / "ln_post"), width, shape.eps),
            proj: at.trainable("proj", &[width, embed_dim], scaled),
            patch,
        }
    }

    /// Returns `[B, D]`: an object in each of `images` `[B, 3, S, S]`, whose patches `background` `[B, G, G]` marks with 0, everything else
    /// with 1; G = [`Self::object_grid`].
    pub(super) fn forward_objects(&self, images: &Tensor, background: &Tensor) -> Tensor {
        let tokens = self.tokens(images, self.patch / 2, self.patch / 2 - 1);
        let bias = background.to_kind(tokens.kind()).flatten(1, 2) * MASK_BIAS;
        // The object always looks at itself.
        let bias = bias.constant_pad_nd([0, 1]).unsqueeze(1).unsqueeze(1);
        let object = self.transformer.forward_object(Tensor::cat(&[&tokens, &tokens.narrow(1, 0, 1)], 1), &bias);
        self.ln_post.forward(&object.i((.., 0))).matmul(&self.proj)
    }

    /// The side G of the grid that objects are seen on, for images of `side` px.
    pub(super) fn object_grid(&self, side: i64) -> i64 {
        let stride = self.patch / 2;
        (side + 2 * (stride - 1) - self.patch) / stride + 1
    }

    /// The input of the first block, `[B, 1 + grid, C]`: class token and patches, with positions, after `ln_pre`.
    pub(crate) fn tokens(&self, images: &Tensor, stride: i64, padding: i64) -> Tensor {
        let patches = images.conv2d(&self.conv1, None::<&Tensor>, stride, padding, 1, 1);
        let (b, c, rows, columns) = patches.size4().expect("BUG: a convolution of images has four dimensions");
        let class = self.class_embedding.to_kind(patches.kind()).expand([b, 1, c], false);
        let x = Tensor::cat(&[class, patches.flatten(2, 3).transpose(1, 2)], 1);
        self.ln_pre.forward(&(x + resize_positions(&self.positional_embedding, rows, columns).to_kind(patches.kind())))
    }
}

impl ImageTower for Vit {
    fn least_side(&self) -> i64 {
        self.patch
    }

    fn forward(&self, images: &Tensor, _: Phase) -> Tensor {
        let x = self.transformer.forward_first(self.tokens(images, self.patch, 0));
        self.ln_post.forward(&x.i((.., 0))).matmul(&self.proj)
    }

    fn objects(&self) -> Option<&Vit> {
        Some(self)
    }

    fn cast(&mut self, kind: Kind) {
        self.conv1 = self.conv1.to_kind(kind);
        self.transformer.cast(kind);
        self.proj = self.proj.to_kind(kind);
    }
}

/// Fits a table of positions, f32 `[1 + n * n, C]`, to another grid: `[1 + rows * columns, C]`. Row 0 is kept.
pub(crate) fn resize_positions(table: &Tensor, rows: i64, columns: i64) -> Tensor {
    let (n_positions, c) = table.size2().expect("BUG: a position table is [1 + grid, C]");
    let side = ((n_positions - 1) as f64).sqrt().round() as i64;
    if (rows, columns) == (side, side) {
        return table.shallow_clone();
    }
    let grid = table.i(1..).reshape([1, side, side, c]).permute([0, 3, 1, 2]);
    let resized = grid.upsample_bilinear2d([rows, columns], false, None, None);
    Tensor::cat(&[table.i(..1), resized.permute([0, 2, 3, 1]).reshape([rows * columns, c])], 0)
}
