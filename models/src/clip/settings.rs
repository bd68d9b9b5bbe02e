//! The config files that are published beside a CLIP's weights: they state what does not follow from tensors.
//!
//! | file | read |
//! |---|---|
//! | `config.json` (Hugging Face) | `hidden_act` of both towers, or of the file; `vision_config.image_size`. A `CLIPModel` without `hidden_act` has `quick_gelu`, transformers' default |
//! | `preprocessor_config.json` (Hugging Face) | `image_mean`, `image_std`, `crop_size` or `size`, `do_center_crop` |
//! | `open_clip_config.json` | `model_cfg.quick_gelu`, false if left out; `model_cfg.vision_cfg.image_size`; `preprocess_cfg.mean`, `std`, `resize_mode` |

use serde_json::Value;

use super::{
    Activation,
    architecture::{Preprocessing, ResizeMode},
};

/// The names of the config files, in the order in which they are read.
pub const FILES: [&str; 3] = ["config.json", "preprocessor_config.json", "open_clip_config.json"];
/// `hidden_act` in transformers' `CLIPTextConfig` and `CLIPVisionConfig` if a file leaves it out.
const HUGGING_FACE_ACTIVATION: &str = "quick_gelu";
/// PIL's number for bicubic interpolation, which `resample` names.
const BICUBIC: u64 = 3;

/// A value with the place where it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sourced<T> {
    /// The value.
    pub value: T,
    /// Where it was found, such as `config.json` in backticks.
    pub source: String,
}

/// Properties of a CLIP that do not follow from its tensors. `None`: not stated; the layout's default is used.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// The activation of the transformer blocks.
    pub activation: Option<Sourced<Activation>>,
    /// The side of the square images, px.
    pub image_side: Option<Sourced<i64>>,
    /// How images become square.
    pub resize: Option<Sourced<ResizeMode>>,
    /// The mean of each colour channel, RGB in [0, 1].
    pub mean: Option<Sourced<[f32; 3]>>,
    /// The standard deviation of each colour channel.
    pub std: Option<Sourced<[f32; 3]>>,
}

impl From<Activation> for Settings {
    fn from(value: Activation) -> Self {
        Self::of_activation(value, "the caller".into())
    }
}

impl Settings {
    /// An activation alone.
    pub fn of_activation(value: Activation, source: String) -> Self {
        Self { activation: Some(Sourced { value, source }), ..Self::default() }
    }

    /// Reads a config file by its name, one of [`FILES`]. Fails if a field has another form than its library writes.
    pub fn of_file(name: &str, json: &[u8]) -> Result<Self, String> {
        let config: Value = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        let Stated { activation, image_side, resize, mean, std } = match name {
            "open_clip_config.json" => of_open_clip(&config)?,
            "preprocessor_config.json" => of_preprocessor(&config)?,
            _ => of_hugging_face(&config)?,
        };
        let source = format!("`{name}`");
        Ok(Self {
            activation: sourced(activation, &source),
            image_side: sourced(image_side, &source),
            resize: sourced(resize, &source),
            mean: sourced(mean, &source),
            std: sourced(std, &source),
        })
    }

    /// Adds the values of `other`. Fails with both sources if they differ.
    pub fn and(self, other: Self) -> Result<Self, String> {
        Ok(Self {
            activation: agreed(self.activation, other.activation, Activation::to_string)?,
            image_side: agreed(self.image_side, other.image_side, |side| format!("images of {side} px"))?,
            resize: agreed(self.resize, other.resize, |mode| format!("the resize mode {mode:?}"))?,
            mean: agreed(self.mean, other.mean, |mean| format!("the mean {mean:?}"))?,
            std: agreed(self.std, other.std, |std| format!("the standard deviation {std:?}"))?,
        })
    }

    /// `default` with the values that are stated.
    pub(super) fn apply(&self, default: Preprocessing) -> Preprocessing {
        Preprocessing {
            image_side: self.image_side.as_ref().map_or(default.image_side, |found| found.value),
            resize: self.resize.as_ref().map_or(default.resize, |found| found.value),
            mean: self.mean.as_ref().map_or(default.mean, |found| found.value),
            std: self.std.as_ref().map_or(default.std, |found| found.value),
        }
    }
}

/// The values of one file.
#[derive(Default)]
struct Stated {
    activation: Option<Activation>,
    image_side: Option<i64>,
    resize: Option<ResizeMode>,
    mean: Option<[f32; 3]>,
    std: Option<[f32; 3]>,
}

fn sourced<T>(value: Option<T>, source: &str) -> Option<Sourced<T>> {
    value.map(|value| Sourced { value, source: source.to_owned() })
}

fn agreed<T: PartialEq>(
    one: Option<Sourced<T>>,
    other: Option<Sourced<T>>,
    words: impl Fn(&T) -> String,
) -> Result<Option<Sourced<T>>, String> {
    match (one, other) {
        (Some(one), Some(other)) if one.value != other.value => {
            Err(format!("{} says {}, {} says {}", one.source, words(&one.value), other.source, words(&other.value)))
        }
        (one, other) => Ok(one.or(other)),
    }
}

/// `config.json`; nothing is read from a file of another model family that has the same name, such as timm's.
fn of_hugging_face(config: &Value) -> Result<Stated, String> {
    let default = (config["model_type"] == "clip").then(|| Value::from(HUGGING_FACE_ACTIVATION));
    let of_tower = |tower: &str| {
        let written = [&config[tower]["hidden_act"], &config["hidden_act"]].into_iter().find(|value| !value.is_null());
        match written.or(default.as_ref()) {
            None => Ok(None),
            Some(value) => match value.as_str() {
                Some("quick_gelu") => Ok(Some(Activation::QuickGelu)),
                Some("gelu") => Ok(Some(Activation::Gelu)),
                Some("gelu_pytorch_tanh") => Ok(Some(Activation::TanhGelu)),
                _ => Err(format!("expected `quick_gelu`, `gelu` or `gelu_pytorch_tanh` as `hidden_act` of `{tower}`, found {value}")),
            },
        }
    };
    let activation = match (of_tower("vision_config")?, of_tower("text_config")?) {
        (Some(image), Some(text)) if image != text => {
            return Err(format!("expected one activation for both towers, found {image} in `vision_config` and {text} in `text_config`"));
        }
        (image, text) => image.or(text),
    };
    Ok(Stated { activation, image_side: side(&config["vision_config"]["image_size"], "vision_config.image_size")?, ..Stated::default() })
}

fn of_preprocessor(config: &Value) -> Result<Stated, String> {
    if !config["resample"].is_null() && config["resample"] != BICUBIC {
        return Err(format!("expected {BICUBIC} (bicubic) as `resample`, found {}", config["resample"]));
    }
    let crop = side(&config["crop_size"], "crop_size")?;
    let shortest = side(&config["size"]["shortest_edge"], "size.shortest_edge")?;
    let size = if config["size"].get("shortest_edge").is_some() { None } else { side(&config["size"], "size")? };
    // CLIPImageProcessor crops unless it is told not to; SigLIP's processor knows no crop.
    let is_cropped = config["do_center_crop"].as_bool().unwrap_or(crop.is_some());
    let whole = shortest.or(size);
    if is_cropped
        && let (Some(crop), Some(whole)) = (crop, whole)
        && crop != whole
    {
        return Err(format!("expected `crop_size` to be `size`, {whole} px, found {crop} px"));
    }
    let image_side = if is_cropped { crop.or(whole) } else { whole };
    let squash = size.is_some() && !is_cropped && config["size"].is_object();
    let resize = if squash { Some(ResizeMode::Squash) } else { is_cropped.then_some(ResizeMode::Shortest) };
    Ok(Stated {
        image_side,
        resize,
        mean: channels(&config["image_mean"], "image_mean")?,
        std: channels(&config["image_std"], "image_std")?,
        ..Stated::default()
    })
}

fn of_open_clip(config: &Value) -> Result<Stated, String> {
    let model = config["model_cfg"].as_object().ok_or("expected an object `model_cfg`, found none")?;
    let activation = match model.get("quick_gelu") {
        None | Some(Value::Bool(false)) => Activation::Gelu,
        Some(Value::Bool(true)) => Activation::QuickGelu,
        Some(other) => return Err(format!("expected true or false as `model_cfg.quick_gelu`, found {other}")),
    };
    let preprocess = &config["preprocess_cfg"];
    if !preprocess["interpolation"].is_null() && preprocess["interpolation"] != "bicubic" {
        return Err(format!("expected \"bicubic\" as `preprocess_cfg.interpolation`, found {}", preprocess["interpolation"]));
    }
    let resize = match &preprocess["resize_mode"] {
        Value::Null => None,
        mode if mode == "shortest" => Some(ResizeMode::Shortest),
        mode if mode == "squash" => Some(ResizeMode::Squash),
        mode => return Err(format!("expected \"shortest\" or \"squash\" as `preprocess_cfg.resize_mode`, found {mode}")),
    };
    Ok(Stated {
        activation: Some(activation),
        image_side: side(&config["model_cfg"]["vision_cfg"]["image_size"], "model_cfg.vision_cfg.image_size")?,
        resize,
        mean: channels(&preprocess["mean"], "preprocess_cfg.mean")?,
        std: channels(&preprocess["std"], "preprocess_cfg.std")?,
    })
}

/// The side of a square: a number, a pair, or an object of `height` and `width`.
fn side(value: &Value, field: &str) -> Result<Option<i64>, String> {
    let sides = match value {
        Value::Null => return Ok(None),
        Value::Object(size) => [size.get("height"), size.get("width")],
        Value::Array(pair) => [pair.first(), pair.get(1)],
        number => [Some(number); 2],
    };
    match sides.map(|side| side.and_then(Value::as_i64)) {
        [Some(height), Some(width)] if height == width && height > 0 => Ok(Some(height)),
        _ => Err(format!("expected the side of a square in px as `{field}`, found {value}")),
    }
}

fn channels(value: &Value, field: &str) -> Result<Option<[f32; 3]>, String> {
    if value.is_null() {
        return Ok(None);
    }
    let numbers: Option<Vec<f32>> = value.as_array().and_then(|list| list.iter().map(|number| Some(number.as_f64()? as f32)).collect());
    let numbers: Option<[f32; 3]> = numbers.and_then(|numbers| numbers.try_into().ok());
    numbers.map(Some).ok_or_else(|| format!("expected three numbers as `{field}`, found {value}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(name: &str, config: &Value) -> Result<Settings, String> {
        Settings::of_file(name, config.to_string().as_bytes())
    }

    fn activation(name: &str, config: &Value) -> Option<Activation> {
        read(name, config).unwrap().activation.map(|found| found.value)
    }

    #[test]
    fn config_files_say_what_their_libraries_read_there() {
        let says = |config: Value, expected| assert_eq!(activation("config.json", &config), expected, "{config}");
        says(json!({"vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "gelu"}}), Some(Activation::Gelu));
        let quick = json!({"vision_config": {"hidden_act": "quick_gelu"}, "text_config": {"hidden_act": "quick_gelu"}});
        says(quick, Some(Activation::QuickGelu));
        says(json!({"hidden_act": "gelu", "model_type": "clip"}), Some(Activation::Gelu));
        says(json!({"hidden_act": "gelu_pytorch_tanh"}), Some(Activation::TanhGelu));
        // transformers leaves defaults out.
        says(json!({"model_type": "clip", "vision_config": {"patch_size": 16}, "text_config": {}}), Some(Activation::QuickGelu));
        // timm's file has the same name.
        says(json!({"architecture": "vit_base_patch32_clip_224"}), None);

        let says = |config: Value, expected| assert_eq!(activation("open_clip_config.json", &config), Some(expected), "{config}");
        says(json!({"model_cfg": {"embed_dim": 512, "quick_gelu": true}}), Activation::QuickGelu);
        says(json!({"model_cfg": {"embed_dim": 512, "quick_gelu": false}}), Activation::Gelu);
        says(json!({"model_cfg": {"embed_dim": 512}}), Activation::Gelu);
    }

    #[test]
    fn image_size_mean_and_standard_deviation_are_read() {
        let default = Preprocessing::openai(224);
        let found = |name: &str, config: Value| read(name, &config).unwrap().apply(default);
        let half = Preprocessing { image_side: 256, resize: ResizeMode::Squash, mean: [0.5; 3], std: [0.5; 3] };
        let open_clip = json!({"model_cfg": {"vision_cfg": {"image_size": 256}},
            "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}});
        assert_eq!(found("open_clip_config.json", open_clip), half);
        let siglip = json!({"do_resize": true, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3,
            "size": {"height": 256, "width": 256}});
        assert_eq!(found("preprocessor_config.json", siglip), half);
        let clip =
            json!({"crop_size": {"height": 336, "width": 336}, "do_center_crop": true, "size": {"shortest_edge": 336}, "resample": 3});
        assert_eq!(found("preprocessor_config.json", clip), Preprocessing { image_side: 336, ..default });
        assert_eq!(found("preprocessor_config.json", json!({"crop_size": 336})), Preprocessing { image_side: 336, ..default });
        let old = json!({"crop_size": 224, "do_center_crop": true, "size": 224, "image_mean": [0.1, 0.2, 0.3]});
        assert_eq!(found("preprocessor_config.json", old), Preprocessing { mean: [0.1, 0.2, 0.3], ..default });
        assert_eq!(found("config.json", json!({"vision_config": {"image_size": 336}})), Preprocessing { image_side: 336, ..default });
    }

    #[test]
    fn config_files_that_contradict_themselves_are_refused() {
        let refuses = |name: &str, config: Value, expected: &str| assert_eq!(read(name, &config).unwrap_err(), expected, "{config}");
        let two = "expected one activation for both towers, found exact GELU in `vision_config` and QuickGELU in `text_config`";
        refuses("config.json", json!({"vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "quick_gelu"}}), two);
        // The text tower has transformers' default.
        refuses("config.json", json!({"model_type": "clip", "vision_config": {"hidden_act": "gelu"}, "text_config": {}}), two);
        refuses(
            "config.json",
            json!({"text_config": {"hidden_act": "relu"}}),
            "expected `quick_gelu`, `gelu` or `gelu_pytorch_tanh` as `hidden_act` of `text_config`, found \"relu\"",
        );
        refuses(
            "config.json",
            json!({"hidden_act": 3}),
            "expected `quick_gelu`, `gelu` or `gelu_pytorch_tanh` as `hidden_act` of `vision_config`, found 3",
        );
        refuses("open_clip_config.json", json!({"architecture": "ViT-B-32"}), "expected an object `model_cfg`, found none");
        let number = json!({"model_cfg": {"quick_gelu": 1}});
        refuses("open_clip_config.json", number, "expected true or false as `model_cfg.quick_gelu`, found 1");
        let longest = json!({"model_cfg": {}, "preprocess_cfg": {"resize_mode": "longest"}});
        refuses("open_clip_config.json", longest, "expected \"shortest\" or \"squash\" as `preprocess_cfg.resize_mode`, found \"longest\"");
        let bilinear = json!({"resample": 2});
        refuses("preprocessor_config.json", bilinear, "expected 3 (bicubic) as `resample`, found 2");
        let wider = json!({"crop_size": 224, "do_center_crop": true, "size": 256});
        refuses("preprocessor_config.json", wider, "expected `crop_size` to be `size`, 256 px, found 224 px");
        let oblong = json!({"vision_config": {"image_size": [224, 448]}});
        refuses("config.json", oblong, "expected the side of a square in px as `vision_config.image_size`, found [224,448]");
    }

    #[test]
    fn files_that_contradict_each_other_are_named() {
        let one = read("config.json", &json!({"vision_config": {"image_size": 224}})).unwrap();
        let other = read("preprocessor_config.json", &json!({"size": {"height": 336, "width": 336}})).unwrap();
        assert_eq!(one.and(other).unwrap_err(), "`config.json` says images of 224 px, `preprocessor_config.json` says images of 336 px");
    }
}
