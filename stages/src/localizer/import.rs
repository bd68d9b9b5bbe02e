//! `localizer/import`: reads a localizer that CORA's code trained.

use ovenbird_models::{
    checkpoint::{Checkpoint, Place},
    clip::{self, regions::Rules},
    detr::{
        Localizer,
        layout::{self, Detector, MARK, Unseen},
    },
    rcnn::layout as network,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, nn};

use super::spec::{LocalizerSpec, table_digest};
use crate::{
    Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{CheckpointFile, read_weights},
    clip::Space,
    detector::spec::{DetectorFile, DetectorSpec},
};

/// Imports a localizer that CORA's code trained, a `checkpoint.pth` or a state dict, and what `localizer/export` wrote.
///
/// The size follows from the tensors, and all tensors of the localizer must be there and fit. Heads of boxes, which a checkpoint has twice, must be equal. The
/// optimizer is not read, and Python objects (`args`) are never built. Tensors of CLIP and its region prompt are left out, but remembered by their digests, so
/// that a localizer that is run with others says so. What a file cannot show, the parameters say: attention heads, the size of images, how boxes become cells.
/// (CORA, section 1.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Import {
    /// Which weights are imported, of a checkpoint that has those of the last step (`model`) and their average (`model_ema`).
    pub weights: Weights,
    /// Attention heads, a divisor of the width of the transformer.
    pub heads: i64,
    /// Maximum length of the longer side of images, in px. Without it what a file of this program says, or else 1333.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_size: Option<u32>,
    /// Length of the shorter side of images, in px, unless the longer side would exceed `max_size`. Without it what a file of this program says, or else 800.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_size: Option<u32>,
    /// How boxes become cells of maps. Without it what a file of this program says, or else the defaults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rules: Option<Rules>,
}

/// Which weights of a checkpoint are imported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Weights {
    /// The average where there is one, otherwise those of the last step.
    #[default]
    Auto,
    /// The average over the steps of the training, with which CORA's code evaluates.
    Average,
    /// Those of the last step.
    Last,
}

impl Default for Import {
    fn default() -> Self {
        Self { weights: Weights::Auto, heads: 8, max_size: None, min_size: None, rules: None }
    }
}

const CHECKPOINT: In<CheckpointFile> =
    In::required("checkpoint", "CORA's `checkpoint.pth`, or the state dict of a localizer: `.pth` or safetensors.");
const LOCALIZER: Out<DetectorFile> = Out::new("localizer", "Weights under CORA's names, safetensors, f32, and how the network is built.");
/// CORA's longer and shorter side of images, px.
const FITS: [u32; 2] = [1333, 800];
/// The key of the averaged weights, and how names of their tensors begin.
const AVERAGE_KEY: &str = "model_ema";
const AVERAGE: &str = "model_ema.";
/// The ends of names of the region prompt: of CORA's localizer, and of its training of region prompts.
const TABLES: [&str; 2] = ["backbone.0.attn_pool.positional_embedding", "backbone.0.attnpool.positional_embedding"];
/// Its rows are the numbers of embeddings.
const PROJECTIONS: [&str; 2] = ["backbone.0.attn_pool.c_proj.weight", "backbone.0.attnpool.c_proj.weight"];

impl Stage for Import {
    const KIND: &'static str = "localizer/import";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[CHECKPOINT.info()];
    const OUTPUTS: &'static [PortInfo] = &[LOCALIZER.info()];

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("heads", self.heads > 0, "at least 1"),
            ("max_size", self.max_size.is_none_or(|side| side >= 32), "at least 32 px"),
            ("min_size", self.min_size.is_none_or(|side| side >= 32), "at least 32 px"),
        ])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let file = cx.inputs.read(CHECKPOINT)?.file;
        let Imported { localizer, spec, notes, .. } = self.read(read_weights(&file)?)?;
        notes.into_iter().for_each(|words| cx.note(words));
        let (draft, parameters) = (cx.begin(unit)?, localizer.parameters());
        draft.write_tensors(LOCALIZER, "network.safetensors", parameters, &DetectorSpec::Localizer(spec).metadata())?;
        cx.tick(1);
        cx.commit(draft, [("tensors".into(), parameters.len().into())].into())
    }
}

/// A localizer that was read.
struct Imported {
    localizer: Localizer,
    spec: LocalizerSpec,
    notes: Vec<String>,
    /// Owns the weights.
    _store: nn::VarStore,
}

/// Refuses a parameter.
fn refused(port: &'static str, problem: String, hint: &str) -> Error {
    Error::Input { port, problem, hint: hint.into() }
}

impl Import {
    fn read(&self, checkpoint: Checkpoint) -> Result<Imported> {
        let written = match DetectorSpec::written(&checkpoint)? {
            None => None,
            Some(DetectorSpec::Localizer(spec)) => Some(spec),
            Some(other) => {
                let problem = format!("{}: expected a localizer, found a detector {}", checkpoint.path().display(), other.in_words());
                return Err(refused(CHECKPOINT.info().name, problem, "give it where a detector is needed, without importing it"));
            }
        };
        let (prefix, mut notes) = self.place(&checkpoint)?;
        let checkpoint = checkpoint.at(&Place { prefix, beside: Vec::new() });
        let path = checkpoint.path();
        let Detector { localizer: tensors, clip: of_clip } = Detector::of(checkpoint.tensors(), path)?;
        let region_prompt = TABLES.iter().find_map(|name| of_clip.get(*name)).map(table_digest).transpose()?;
        let clip = match clip::layout::is_of_cora(&of_clip) {
            true => {
                let clip::layout::Normalised { layout, tensors, .. } = clip::layout::normalise(&of_clip, path)?;
                Some(Space::of(&tensors, layout.projections))
            }
            false => None,
        };
        let config = match &written {
            Some(spec) if spec.config.heads != self.heads => {
                let (problem, heads) =
                    (format!("{}, but the file says that the localizer has {}", self.heads, spec.config.heads), spec.config.heads);
                return Err(refused("heads", problem, &format!("write `with: {{heads: {heads}}}`")));
            }
            Some(spec) => spec.config,
            None => {
                let embed_dim = PROJECTIONS.iter().find_map(|name| of_clip.get(*name)?.size().first().copied());
                layout::config(&tensors, Unseen { heads: self.heads, embed_dim }, path)?
            }
        };
        if config.hidden % self.heads != 0 {
            let problem = format!("{}, which does not divide {}, the width of the transformer", self.heads, config.hidden);
            return Err(refused("heads", problem, "give the number of heads that it was trained with (`nheads`)"));
        }
        if !of_clip.is_empty() {
            let n = of_clip.len();
            notes.push(format!(
                "{n} tensors of CLIP are left out: where the localizer is run, give them as `checkpoint`, and the region prompt in them"
            ));
        }
        let ([longer, shorter], rules) = written.as_ref().map_or((FITS, Rules::default()), |spec| (spec.fits, spec.rules));
        let fits = [self.max_size.unwrap_or(longer), self.min_size.unwrap_or(shorter)];
        if fits[1] > fits[0] {
            return Err(refused("min_size", format!("{}, which is more than `max_size`, {}", fits[1], fits[0]), "give both"));
        }
        let written = written.map(|spec| (spec.clip, spec.region_prompt)).unwrap_or_default();
        let spec = LocalizerSpec {
            config,
            fits,
            rules: self.rules.unwrap_or(rules),
            clip: clip.or(written.0),
            region_prompt: region_prompt.or(written.1),
        };
        let store = nn::VarStore::new(Device::Cpu);
        let localizer = Localizer::blank(&store.root(), &config)?;
        network::load(&tensors, localizer.parameters(), path)?.require_all(path)?;
        Ok(Imported { localizer, spec, notes, _store: store })
    }

    /// What the names of the weights that are imported begin with, and a note where the file has others.
    fn place(&self, checkpoint: &Checkpoint) -> Result<(String, Vec<String>)> {
        let path = checkpoint.path().display();
        let malformed = |problem: String, hint: &str| {
            Error::Models(ovenbird_models::Error::Malformed { path: checkpoint.path().to_owned(), problem, hint: Some(hint.into()) })
        };
        let (averages, others): (Vec<String>, Vec<String>) =
            layout::places(checkpoint.tensors()).into_iter().partition(|place| place.starts_with(AVERAGE));
        let (average, last) = match (&averages[..], &others[..]) {
            ([], []) => {
                let names: Vec<&str> = checkpoint.names().take(3).collect();
                let problem = format!("expected a localizer of CORA, with a tensor `{MARK}`, found {}", names.join(", "));
                return Err(malformed(problem, "give the `checkpoint.pth` of a training of CORA's localizer"));
            }
            ([] | [_], [] | [_]) => (averages.into_iter().next(), others.into_iter().next()),
            _ => {
                let found: Vec<String> = averages.iter().chain(&others).map(|place| format!("`{place}{MARK}`")).collect();
                let problem = format!("expected one localizer and perhaps its average, found {}", found.join(", "));
                return Err(malformed(problem, "save one of them: `torch.save` of its `state_dict()`"));
            }
        };
        let why = match checkpoint.metadata().get(AVERAGE_KEY) {
            Some(number) => format!("`{AVERAGE_KEY}` is {number}"),
            None => format!("it has no `{AVERAGE_KEY}`"),
        };
        match (self.weights, average, last) {
            (Weights::Auto | Weights::Average, Some(average), last) => {
                let note = last
                    .map(|_| format!("the averaged weights are imported (`{AVERAGE_KEY}`), not those of the last step (`weights: last`)"));
                Ok((average, note.into_iter().collect()))
            }
            (Weights::Auto, None, Some(last)) => {
                // A state dict alone says nothing of averages.
                let is_whole = !last.is_empty();
                let note = is_whole.then(|| format!("the file has no averaged weights ({why}): those of the last step are imported"));
                Ok((last, note.into_iter().collect()))
            }
            (Weights::Last, _, Some(last)) => Ok((last, Vec::new())),
            (Weights::Average, None, _) => {
                let problem = format!("`average`, but {path} has no averaged weights: {why}");
                Err(refused("weights", problem, "write `weights: last`, or leave it out"))
            }
            (Weights::Last, _, None) => {
                let problem = format!("`last`, but {path} has only averaged weights (`{AVERAGE_KEY}`)");
                Err(refused("weights", problem, "write `weights: average`, or leave it out"))
            }
            (Weights::Auto, None, None) => unreachable!("BUG: a file without a localizer is refused above"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        io::{Cursor, Read, Write},
    };

    use ovenbird_models::{
        checkpoint::{Saved, write_safetensors, write_torch},
        clip::{Activation, Clip, ImageConfig, TextConfig, layout::to_cora},
        detr::{Config, Content, layout::with_copies},
    };
    use tch::{Kind, Tensor};
    use zip::{CompressionMethod, ZipArchive, ZipWriter, write::SimpleFileOptions};

    use super::{super::published, *};

    type Tensors = BTreeMap<String, Tensor>;

    const FOUR: Import = Import {
        weights: Weights::Auto,
        heads: 4,
        max_size: Some(256),
        min_size: Some(192),
        rules: Some(Rules { overhang: clip::regions::Overhang::Reference, extent: clip::regions::Extent::Reference }),
    };
    const LAST: Import = Import { weights: Weights::Last, ..FOUR };
    const AVERAGE: Import = Import { weights: Weights::Average, ..FOUR };

    fn toy() -> Config {
        Config::toy(128, 16)
    }

    fn localizer(config: &Config, seed: u64) -> Tensors {
        let store = nn::VarStore::new(Device::Cpu);
        let localizer = Localizer::new(&store.root(), config, seed).unwrap();
        localizer.parameters().iter().map(|(name, tensor)| (name.clone(), tensor.detach().copy())).collect()
    }

    /// A CLIP with a ResNet whose layer 3 has 128 channels, under OpenAI's names.
    fn openai_clip() -> Tensors {
        let config = clip::Config {
            embed_dim: 16,
            image: ImageConfig::ResNet { image_side: 64, layers: [1, 1, 1, 1], width: 8, heads: 4 },
            text: TextConfig { context: 8, vocabulary: 50, width: 64, heads: 1, depth: 1 },
            activation: Activation::QuickGelu,
        };
        let store = nn::VarStore::new(Device::Cpu);
        Clip::new(&store.root(), &config, 3).unwrap();
        store.variables().into_iter().map(|(name, tensor)| (name, tensor.detach().copy())).collect()
    }

    fn dict(tensors: &Tensors) -> Saved<'_> {
        Saved::Dict(tensors.iter().map(|(name, tensor)| (name.clone(), Saved::Tensor(tensor))).collect())
    }

    /// What `torch.save` makes of these entries.
    fn saved<const N: usize>(entries: [(&str, Saved<'_>); N]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_torch(&Saved::Dict(entries.map(|(key, value)| (key.to_owned(), value)).into()), &mut bytes).unwrap();
        bytes
    }

    /// What is read, or the refusal, with `FILE` for the path, and what to do.
    fn import(stage: &Import, bytes: &[u8]) -> Result<Imported, (String, String)> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        stage.read(Checkpoint::open(file.path()).unwrap()).map_err(|error| {
            let words = error.to_string().replace(&file.path().display().to_string(), "FILE");
            (words, error.hint().expect("every refusal says what to do"))
        })
    }

    fn refusal(stage: &Import, bytes: &[u8]) -> String {
        import(stage, bytes).map(|_| ()).unwrap_err().0
    }

    fn assert_has(imported: &Imported, expected: &Tensors) {
        let found = imported.localizer.parameters();
        assert!(found.keys().eq(expected.keys()));
        assert!(found.iter().all(|(name, tensor)| tensor.equal(&expected[name])));
    }

    fn spec_of(config: Config) -> LocalizerSpec {
        LocalizerSpec { config, fits: [256, 192], rules: Rules::default(), clip: None, region_prompt: None }
    }

    /// The pickle of `argparse.Namespace(lr=1e-4, dataset_file='ovcoco', masks=False, resume=PurePosixPath('a/b'), sizes=[480, 512], none=None)` by Python
    /// 3.11, protocol 2, without the first two bytes and the last.
    const NAMESPACE: &[u8] = b"cargparse\nNamespace\n)\x81}(X\x02\x00\x00\x00lrG?\x1a6\xe2\xeb\x1cC-X\x0c\x00\x00\x00dataset_fileX\x06\x00\x00\x00ovcoco\
        X\x05\x00\x00\x00masks\x89X\x06\x00\x00\x00resumecpathlib\nPurePosixPath\nX\x01\x00\x00\x00aX\x01\x00\x00\x00b\x86RX\x05\x00\x00\x00sizes](M\xe0\x01\
        M\x00\x02eX\x04\x00\x00\x00noneNub";

    /// The same archive with a Namespace as `args`, which was None.
    fn with_namespace(archive: &[u8]) -> Vec<u8> {
        let mut from = ZipArchive::new(Cursor::new(archive)).unwrap();
        let mut to = ZipWriter::new(Cursor::new(Vec::new()));
        for place in 0..from.len() {
            let mut entry = from.by_index(place).unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            if entry.name().ends_with("data.pkl") {
                let key = b"X\x04\x00\x00\x00args";
                let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len();
                assert_eq!(bytes[at], b'N');
                bytes.splice(at..=at, NAMESPACE.iter().copied());
            }
            to.start_file(entry.name(), SimpleFileOptions::default().compression_method(CompressionMethod::Stored)).unwrap();
            to.write_all(&bytes).unwrap();
        }
        to.finish().unwrap().into_inner()
    }

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Import::default()).is_empty());
    }

    #[test]
    fn a_localizer_goes_out_and_comes_in_whole() {
        for config in [toy(), Config { group_norm: true, ..toy() }, Config { content: Content::Zero, ..toy() }] {
            let (trained, spec) = (localizer(&config, 1), spec_of(config));
            let written = DetectorSpec::Localizer(spec.clone());
            let mut bytes = Vec::new();
            published::write(&with_copies(&trained), &written, &mut bytes).unwrap();
            for stage in [FOUR, LAST, AVERAGE] {
                let imported = import(&stage, &bytes).unwrap();
                assert_has(&imported, &trained);
                assert_eq!(imported.spec, spec);
            }
            // The file that `localizer/train` writes.
            let mut bytes = Vec::new();
            write_safetensors(&trained, &written.metadata(), &mut bytes).unwrap();
            let imported = import(&FOUR, &bytes).unwrap();
            assert_has(&imported, &trained);
            assert_eq!((imported.spec, imported.notes), (spec, Vec::new()));
            let (problem, hint) = import(&Import { heads: 8, ..FOUR }, &bytes).map(|_| ()).unwrap_err();
            assert_eq!(problem, "heads: 8, but the file says that the localizer has 4");
            assert_eq!(hint, "write `with: {heads: 4}`");
        }
    }

    #[test]
    fn a_checkpoint_of_cora_is_read_beside_its_clip_its_optimizer_and_its_arguments() {
        let (last, average) = (localizer(&toy(), 1), localizer(&toy(), 2));
        let mut clip = to_cora(&openai_clip());
        let table = Tensor::arange(5 * 256, (Kind::Float, Device::Cpu)).view([5, 256]);
        clip.insert("backbone.0.attn_pool.positional_embedding".into(), table.copy());
        let whole = |localizer: &Tensors| {
            let mut tensors = with_copies(localizer);
            tensors.extend(clip.iter().map(|(name, tensor)| (name.clone(), tensor.copy())));
            tensors
        };
        let (model, model_ema) = (whole(&last), whole(&average));
        let moment = Tensor::from_slice(&[1.0_f32]);
        let optimizer = Saved::Dict(
            [
                ("param_groups".to_owned(), Saved::List(Vec::new())),
                ("state".to_owned(), Saved::Dict([("0".to_owned(), Saved::Tensor(&moment))].into())),
            ]
            .into(),
        );
        let plain = saved([
            ("args", Saved::Nothing),
            ("best_performance", Saved::Real(0.35)),
            ("epoch", Saved::Integer(34)),
            ("lr_scheduler", Saved::Dict([("last_epoch".to_owned(), Saved::Integer(35))].into())),
            ("model", dict(&model)),
            ("model_ema", dict(&model_ema)),
            ("optimizer", optimizer),
        ]);
        let bytes = with_namespace(&plain);
        let left_out = format!(
            "{} tensors of CLIP are left out: where the localizer is run, give them as `checkpoint`, and the region prompt in them",
            clip.len()
        );
        let averaged = "the averaged weights are imported (`model_ema`), not those of the last step (`weights: last`)";
        for (stage, expected, notes) in
            [(FOUR, &average, vec![averaged, &left_out]), (AVERAGE, &average, vec![averaged, &left_out]), (LAST, &last, vec![&left_out])]
        {
            let imported = import(&stage, &bytes).unwrap();
            assert_has(&imported, expected);
            assert_eq!(imported.notes, notes);
            let space = Space::of(&openai_clip(), clip::layout::CLIP_PROJECTIONS);
            let expected = LocalizerSpec { clip: Some(space), region_prompt: Some(table_digest(&table).unwrap()), ..spec_of(toy()) };
            assert_eq!(imported.spec, expected);
        }
    }

    #[test]
    fn without_an_average_the_weights_of_the_last_step_are_read() {
        let last = localizer(&toy(), 1);
        let model = with_copies(&last);
        let without = saved([("model", dict(&model)), ("model_ema", Saved::Integer(-1))]);
        let imported = import(&FOUR, &without).unwrap();
        assert_has(&imported, &last);
        assert_eq!(imported.notes, ["the file has no averaged weights (`model_ema` is -1): those of the last step are imported"]);
        assert_eq!(import(&LAST, &without).unwrap().notes, Vec::<String>::new());
        assert_eq!(refusal(&AVERAGE, &without), "weights: `average`, but FILE has no averaged weights: `model_ema` is -1");
        // A state dict alone.
        let mut alone = Vec::new();
        write_torch(&dict(&model), &mut alone).unwrap();
        let imported = import(&FOUR, &alone).unwrap();
        assert_has(&imported, &last);
        assert_eq!((imported.spec, imported.notes), (spec_of(toy()), Vec::new()));
        assert_eq!(refusal(&AVERAGE, &alone), "weights: `average`, but FILE has no averaged weights: it has no `model_ema`");
        let only_average = saved([("model_ema", dict(&model))]);
        assert_eq!(refusal(&LAST, &only_average), "weights: `last`, but FILE has only averaged weights (`model_ema`)");
        let two = saved([("model", dict(&model)), ("other", dict(&model))]);
        assert_eq!(
            refusal(&FOUR, &two),
            "FILE: expected one localizer and perhaps its average, found `model.query_embed.weight`, `other.query_embed.weight`"
        );
    }

    /// A change of a checkpoint, and the refusal.
    type Case<'a> = (&'a dyn Fn(&mut Tensors), &'a str);

    #[test]
    fn what_is_no_localizer_or_only_a_part_is_refused_tensor_by_tensor() {
        let bytes = |change: &dyn Fn(&mut Tensors)| {
            let mut model = with_copies(&localizer(&toy(), 1));
            change(&mut model);
            saved([("model", dict(&model))])
        };
        let zeros = |size: &[i64]| Tensor::zeros(size, (Kind::Float, Device::Cpu));
        let cases: [Case<'_>; 7] = [
            (
                &|model| drop(model.insert("transformer.decoder.bbox_embed.1.layers.2.bias".into(), zeros(&[4]) + 1.0)),
                "FILE: expected the same tensor as `transformer.decoder.bbox_embed.1.layers.2.bias` and as `bbox_embed.1.layers.2.bias`, found other numbers",
            ),
            (
                &|model| drop(model.remove("transformer.decoder.norm.bias")),
                "FILE: 1 tensors do not fit the network: transformer.decoder.norm.bias: expected [64], found nothing",
            ),
            (
                &|model| drop(model.insert("transformer.encoder.layers.0.norm1.weight".into(), zeros(&[32]))),
                "FILE: 1 tensors do not fit the network: transformer.encoder.layers.0.norm1.weight: expected [64], found [32]",
            ),
            (
                &|model| drop(model.insert("refpoint_embed.weight".into(), zeros(&[3, 4]))),
                "FILE: 1 tensors do not fit the network: refpoint_embed.weight: expected nothing, found [3, 4]",
            ),
            (
                &|model| drop(model.insert("objectness_embed.bias".into(), Tensor::from_slice(&[f32::NAN]))),
                "FILE: objectness_embed.bias: expected finite numbers, found 1 of 1 that are not",
            ),
            (
                &|model| model.retain(|name, _| !name.starts_with("text_proj.")),
                "FILE: nothing tells how many numbers class embeddings have: found neither tensors `text_proj.*` nor a CLIP",
            ),
            (
                &|model| model.retain(|name, _| name.starts_with("text_proj.layers.0")),
                "FILE: expected a localizer of CORA, with a tensor `query_embed.weight`, found model.text_proj.layers.0.bias, model.text_proj.layers.0.weight",
            ),
        ];
        for (change, expected) in cases {
            assert_eq!(refusal(&FOUR, &bytes(change)), expected);
        }
        let six = refusal(&Import { heads: 6, ..FOUR }, &bytes(&|_| ()));
        assert_eq!(six, "heads: 6, which does not divide 64, the width of the transformer");
    }

    /// Zero contents: the dimension of class embeddings is that of the CLIP beside the localizer.
    #[test]
    fn a_localizer_without_texts_takes_their_dimension_from_its_clip() {
        let mut model = with_copies(&localizer(&Config { content: Content::Zero, ..toy() }, 1));
        model.extend(to_cora(&openai_clip()));
        let imported = import(&FOUR, &saved([("model", dict(&model))])).unwrap();
        assert_eq!(imported.spec.config, Config { content: Content::Zero, bottleneck: 128, ..toy() });
    }

    #[test]
    fn the_last_level_of_the_clip_must_be_the_same_under_both_names() {
        let mut model = with_copies(&localizer(&toy(), 1));
        model.extend(to_cora(&openai_clip()));
        let name = "backbone.0.layer4.0.conv1.weight";
        let other = &model[name] * 2.0;
        model.insert(name.into(), other);
        assert_eq!(
            refusal(&FOUR, &saved([("model", dict(&model))])),
            format!("FILE: expected the same tensor as `{name}` and as `backbone.0.body.layer4.0.conv1.weight`, found other numbers")
        );
    }
}
