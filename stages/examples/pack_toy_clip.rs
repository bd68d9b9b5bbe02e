//! Packs a checkpoint of the pipeline `toy-clip` for the stage `toy/clip`: f16, compressed. `make toy-clip` runs it.
//!
//! Tokens that the world's captions never use are embedded as zero, so that 12 MB of embeddings compress to a few KB.
#![expect(clippy::unwrap_used, reason = "a tool of the developers may end where it fails")]

use std::{collections::BTreeMap, env, path::Path};

use ovenbird_models::checkpoint::{Checkpoint, write_safetensors};
use tch::{Kind, Tensor};

fn main() {
    let [from, to] = [1, 2].map(|place| env::args().nth(place).expect("usage: pack_toy_clip FROM.safetensors TO.safetensors.zst"));
    let checkpoint = Checkpoint::open(Path::new(&from)).unwrap();
    let halved = |(name, tensor): (&String, &Tensor)| {
        let tensor = if tensor.kind() == Kind::Float { tensor.to_kind(Kind::Half) } else { tensor.shallow_clone() };
        (name.clone(), tensor)
    };
    let tensors: BTreeMap<String, Tensor> = checkpoint.tensors().iter().map(halved).collect();
    let mut bytes = Vec::new();
    write_safetensors(&tensors, checkpoint.metadata(), &mut bytes).unwrap();
    ovenbird_cache::publish::replace(Path::new(&to), &zstd::encode_all(&bytes[..], 19).unwrap()).unwrap();
}
