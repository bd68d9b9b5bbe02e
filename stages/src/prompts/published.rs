//! Files of class embeddings as OADP and DetPro publish them.

use std::{io, path::Path};

use ovenbird_data::annotations::Annotations;
use ovenbird_models::checkpoint::{BARE_TENSOR, Checkpoint, Saved, write_torch};
use tch::{Kind, Tensor};

use super::described::RPL_CONTEXT;
use crate::{
    Error, Result,
    artifacts::{EMBEDDINGS, Prompts, check_ids},
};

/// Reads class embeddings. `annotations` names the rows of a file that does not, in ascending category id; fails where both or neither
/// have names.
pub(super) fn read(path: &Path, annotations: Option<&Annotations>) -> Result<Prompts> {
    let checkpoint = Checkpoint::open(path)?.around(EMBEDDINGS)?;
    let refused = |problem: String, hint: &str| Error::Input { port: "annotations", problem, hint: hint.into() };
    let read = match (checkpoint.tensors().get(BARE_TENSOR), annotations) {
        (None, None) => Prompts::of(&checkpoint),
        (Some(rows), Some(annotations)) => {
            check_ids(annotations)?;
            // DetPro writes `[1, K, D]` after an epoch, and `[K, D]` of an ensemble.
            let rows = &if matches!(rows.size()[..], [1, _, _]) { rows.squeeze_dim(0) } else { rows.shallow_clone() };
            Prompts::new(annotations.categories.iter().map(|category| category.name.clone()).collect(), rows, None)
        }
        (Some(rows), None) => {
            let problem = format!("missing, but {} holds rows {:?} without names", path.display(), rows.size());
            return Err(refused(problem, "give `in: {annotations: ...}` whose categories name the rows: for DetPro, those of LVIS v1"));
        }
        (None, Some(_)) => {
            let problem = format!("given, but {} is no tensor alone: it names its rows itself", path.display());
            return Err(refused(problem, "leave `annotations` out"));
        }
    };
    read.map_err(|problem| {
        let hint = Some("check that the file is the one that was meant; `ovenbird stages prompts/import` says what it holds".into());
        Error::Models(ovenbird_models::Error::Malformed { path: path.to_owned(), problem, hint })
    })
}

/// Reads a learned context, f32 `[M, C]`: a file of one tensor.
pub(super) fn read_context(path: &Path) -> Result<Tensor> {
    let checkpoint = Checkpoint::open(path)?;
    let malformed = |problem: String| {
        let hint = Some("give the file that DetPro ends with `_prompt.pth`; without `checkpoint` and `classes`, rows are read".into());
        Error::Models(ovenbird_models::Error::Malformed { path: path.to_owned(), problem, hint })
    };
    let context = checkpoint.tensors().get(BARE_TENSOR);
    let context = context.ok_or_else(|| malformed("expected one tensor, the context [M, C], found a dict".into()))?;
    numbers(context, "the context").map_err(malformed)
}

/// A context f32 `[M, C]` of a floating kind. Fails where it is none, or not of numbers.
fn numbers(context: &Tensor, what: &str) -> Result<Tensor, String> {
    let (kind, size) = (context.kind(), context.size());
    let is_floating = matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double);
    if !(is_floating && matches!(size[..], [m, c] if m > 0 && c > 0)) {
        return Err(format!("expected {what} to be floating [M, C], found {kind:?} {size:?}"));
    }
    if context.isfinite().all().int64_value(&[]) == 0 {
        return Err(format!("expected numbers in {what}, found infinities or NaN"));
    }
    Ok(context.detach().to_kind(Kind::Float))
}

/// Reads RPL's two contexts, f32 `[M, C]` each, from its checkpoint; the table of tokens in it is constant and left out. (PromptDet, section 1.)
pub(super) fn read_contexts(path: &Path) -> Result<[Tensor; 2]> {
    let checkpoint = Checkpoint::open(path)?;
    let malformed = |problem: String| {
        let hint = Some("give RPL's `prompt_learner/model.pth.tar-6`".into());
        Error::Models(ovenbird_models::Error::Malformed { path: path.to_owned(), problem, hint })
    };
    let context = |name: &str| {
        let found = ["", "state_dict."].iter().find_map(|prefix| checkpoint.tensors().get(&format!("{prefix}{name}")));
        let context = found.ok_or_else(|| malformed(format!("expected contexts `ctx1` and `ctx2` in `state_dict`, found no `{name}`")))?;
        numbers(context, &format!("`{name}`")).map_err(malformed)
    };
    let [before, behind] = [context("ctx1")?, context("ctx2")?];
    if before.size() != behind.size() {
        return Err(malformed(format!("expected `ctx1` and `ctx2` of one shape, found {:?} and {:?}", before.size(), behind.size())));
    }
    Ok([before, behind])
}

/// Writes RPL's two contexts as its checkpoint has them.
pub(super) fn write_contexts(contexts: [&Tensor; 2], out: impl io::Write) -> io::Result<()> {
    let contexts = RPL_CONTEXT.map(String::from).into_iter().zip(contexts.map(Saved::Tensor));
    write_torch(&Saved::Dict([("state_dict".to_owned(), Saved::Dict(contexts.collect()))].into()), out)
}

/// The rows of a data set's categories, f32 `[K, D]`, in ascending id. Fails where a category has none.
pub(super) fn rows_by_id(prompts: &Prompts, annotations: &Annotations) -> Result<Tensor> {
    check_ids(annotations)?;
    let mut categories: Vec<_> = annotations.categories.iter().collect();
    categories.sort_by_key(|category| category.id);
    prompts.select(&categories.into_iter().map(|category| category.name.clone()).collect::<Vec<_>>())
}

/// Writes a `.pth` file of one tensor.
pub(super) fn write_tensor(tensor: &Tensor, out: impl io::Write) -> io::Result<()> {
    write_torch(&Saved::Tensor(tensor), out)
}

/// Writes a `.pth` dict of class embeddings.
pub(super) fn write(prompts: &Prompts, out: impl io::Write) -> io::Result<()> {
    let tensors = prompts.tensors();
    let names = Saved::List(prompts.names.iter().cloned().map(Saved::Text).collect());
    let tensors = tensors.iter().map(|(name, tensor)| (name.clone(), Saved::Tensor(tensor)));
    write_torch(&Saved::Dict(tensors.chain([("names".to_owned(), names)]).collect()), out)
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, process::Command};

    use ovenbird_models::rcnn::classifier::LogitScale;
    use tch::Device;

    use super::*;
    use crate::prompts::golden;

    const NAMES: [&str; 4] = ["person", "hair drier", "speaker_(stero_equipment)", "café"];

    /// `make.py`'s: eighths from 0 on.
    fn rows() -> Tensor {
        Tensor::arange(12, (Kind::Float, Device::Cpu)).view([4, 3]) / 8.0
    }

    fn annotations(ids: [u64; 4]) -> Annotations {
        // In another order than that of the ids.
        let category = |(id, name): (&u64, &&str)| format!(r#"{{"id": {id}, "name": "{name}"}}"#);
        let categories = ids.iter().zip(&NAMES).rev().map(category).collect::<Vec<_>>().join(",");
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write!(file, r#"{{"images": [], "annotations": [], "categories": [{categories}]}}"#).unwrap();
        Annotations::load(file.path()).unwrap()
    }

    /// What `torch.save` would make of a value, read back.
    fn saved(value: &Saved<'_>) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write_torch(value, &mut file).unwrap();
        file
    }

    fn dict<'a>(embeddings: &'a Tensor, names: &[&str], more: impl IntoIterator<Item = (&'static str, Saved<'a>)>) -> Saved<'a> {
        let names = Saved::List(names.iter().map(|name| Saved::Text((*name).into())).collect());
        let entries = [("embeddings", Saved::Tensor(embeddings)), ("names", names)].into_iter().chain(more);
        Saved::Dict(entries.map(|(name, value)| (name.to_owned(), value)).collect())
    }

    #[test]
    fn published_files_are_read_as_they_are() {
        let prompts = read(&golden::path("published.pth"), None).unwrap();
        assert_eq!(
            (prompts.names.as_slice(), prompts.scale),
            (&NAMES.map(String::from)[..], Some(LogitScale::Affine { scaler: 20.5, bias: 4.25 }))
        );
        assert!(prompts.embeddings.equal(&rows()));
        // A factor that is a number and no tensor.
        let rows = rows();
        let file = saved(&dict(&rows, &NAMES, [("scaler", Saved::Real(12.5)), ("bias", Saved::Integer(3))]));
        assert_eq!(read(file.path(), None).unwrap().scale, Some(LogitScale::Affine { scaler: 12.5, bias: 3.0 }));
        assert_eq!(read(saved(&dict(&rows, &NAMES, [])).path(), None).unwrap().scale, None);
    }

    /// Parity check R4 of OADP's specification: `names[i]` has the id i + 1.
    #[test]
    fn rows_alone_are_named_in_the_order_of_ids() {
        for (file, kind) in [("bare.pth", Kind::Float), ("legacy.pth", Kind::Half)] {
            assert_eq!(Checkpoint::open(&golden::path(file)).unwrap().dtype(BARE_TENSOR).unwrap(), kind);
            let prompts = read(&golden::path(file), Some(&annotations([1, 2, 3, 4]))).unwrap();
            assert_eq!((prompts.names.as_slice(), prompts.scale), (&NAMES.map(String::from)[..], None), "{file}");
            assert!(prompts.embeddings.equal(&rows()), "{file}");
        }
    }

    /// DetPro writes rows of any length, with a leading 1 after an epoch.
    #[test]
    fn rows_of_an_epoch_are_read_as_they_are() {
        let rows = rows() * 30.0;
        for shape in [vec![1, 4, 3], vec![4, 3]] {
            let file = saved(&Saved::Tensor(&rows.view(shape.as_slice())));
            let prompts = read(file.path(), Some(&annotations([1, 2, 3, 4]))).unwrap();
            assert!(prompts.names == NAMES && prompts.embeddings.equal(&rows), "{shape:?}");
        }
        let two = rows.view([2, 2, 3]);
        let expected = "FILE: expected floating embeddings [4, D], one row a class name, found Float [2, 2, 3]";
        check(saved(&Saved::Tensor(&two)).path(), Some(&annotations([1, 2, 3, 4])), expected);
    }

    #[test]
    fn rows_are_written_in_ascending_id_and_read_again() {
        let names: Vec<String> = NAMES.iter().rev().map(|name| (*name).to_owned()).collect();
        let prompts = Prompts { names, embeddings: rows().flip([0]), scale: None, clip: None };
        let ids = annotations([3, 5, 8, 1203]);
        let by_id = rows_by_id(&prompts, &ids).unwrap();
        assert!(by_id.equal(&rows()));
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write_tensor(&by_id, &mut file).unwrap();
        let found = read(file.path(), Some(&ids)).unwrap();
        assert!(found.names == NAMES && found.embeddings.equal(&rows()));
        assert!(rows_by_id(&prompts, &annotations([0, 1, 2, 3])).unwrap_err().to_string().contains("expected ids from 1 on"));
    }

    #[test]
    fn a_context_is_one_tensor_of_numbers() {
        let context = rows();
        let read = |value: &Saved<'_>| {
            let file = saved(value);
            read_context(file.path()).map_err(|error| error.to_string().replace(&file.path().display().to_string(), "FILE"))
        };
        assert!(read(&Saved::Tensor(&context)).unwrap().equal(&context));
        assert!(read(&Saved::Tensor(&context.to_kind(Kind::Half))).unwrap().equal(&context));
        let flat = context.view(-1);
        assert_eq!(read(&Saved::Tensor(&flat)).unwrap_err(), "FILE: expected the context to be floating [M, C], found Float [12]");
        let endless = &context / 0.0;
        assert_eq!(read(&Saved::Tensor(&endless)).unwrap_err(), "FILE: expected numbers in the context, found infinities or NaN");
        assert_eq!(read(&dict(&context, &NAMES, [])).unwrap_err(), "FILE: expected one tensor, the context [M, C], found a dict");
    }

    /// Parity check P8 of PromptDet's specification: half precision, the constant table beside.
    #[test]
    fn contexts_of_rpl_come_in_and_go_out() {
        let rows = rows();
        let [before, behind] = [rows.narrow(0, 0, 1), rows.narrow(0, 1, 1)];
        let [half, other_half] = [before.to_kind(Kind::Half), behind.to_kind(Kind::Half)];
        let table = rows.view([1, 4, 3]);
        let learned = |behind| {
            let tensors = [("ctx1", &half), ("ctx2", behind), ("embedding", &table)];
            let tensors = tensors.map(|(name, tensor)| (name.to_owned(), Saved::Tensor(tensor)));
            saved(&Saved::Dict([("state_dict".to_owned(), Saved::Dict(tensors.into())), ("epoch".to_owned(), Saved::Integer(6))].into()))
        };
        let check = |found: [Tensor; 2]| assert!(found[0].equal(&before) && found[1].equal(&behind));
        check(read_contexts(learned(&other_half).path()).unwrap());
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write_contexts([&before, &behind], &mut file).unwrap();
        check(read_contexts(file.path()).unwrap());
        let refusal = |file: tempfile::NamedTempFile| {
            read_contexts(file.path()).unwrap_err().to_string().replace(&file.path().display().to_string(), "FILE")
        };
        assert_eq!(refusal(learned(&rows)), "FILE: expected `ctx1` and `ctx2` of one shape, found [1, 3] and [4, 3]");
        assert_eq!(refusal(learned(&(&behind / 0.0))), "FILE: expected numbers in `ctx2`, found infinities or NaN");
        let bare = refusal(saved(&Saved::Tensor(&rows)));
        assert_eq!(bare, "FILE: expected contexts `ctx1` and `ctx2` in `state_dict`, found no `ctx1`");
    }

    #[test]
    fn what_is_written_is_read() {
        for scale in [None, Some(LogitScale::Affine { scaler: f64::from(19.87_f32), bias: f64::from(-3.1_f32) })] {
            let prompts = Prompts { names: NAMES.map(String::from).to_vec(), embeddings: rows(), scale, clip: None };
            let mut file = tempfile::NamedTempFile::new().unwrap();
            write(&prompts, &mut file).unwrap();
            let found = read(file.path(), None).unwrap();
            assert_eq!((&found.names, found.scale), (&prompts.names, scale));
            assert!(found.embeddings.equal(&prompts.embeddings));
        }
    }

    #[test]
    fn torch_loads_what_is_exported() {
        let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers/bin/python");
        let has_torch = || Command::new(&python).args(["-c", "import torch"]).output().is_ok_and(|output| output.status.success());
        if !python.exists() || !has_torch() {
            crate::skip::skip("PyTorch is not set up (`make peers`)");
            return;
        }
        let scale = Some(LogitScale::Affine { scaler: 19.75, bias: 3.5 });
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write(&Prompts { names: NAMES.map(String::from).to_vec(), embeddings: rows(), scale, clip: None }, &mut file).unwrap();
        let script = "
import sys, torch
all = torch.load(sys.argv[1], weights_only=True)
print(sorted(all), all['names'])
for name in ('embeddings', 'scaler', 'bias'):
    print(all[name].dtype, list(all[name].shape), all[name].flatten().tolist()[-1])
print(torch.equal(all['embeddings'], torch.arange(12.0).reshape(4, 3) / 8))
";
        let output = Command::new(python).args(["-c", script]).arg(file.path()).env("PYTHONIOENCODING", "utf-8").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let expected = "['bias', 'embeddings', 'names', 'scaler'] ['person', 'hair drier', 'speaker_(stero_equipment)', 'café']
torch.float32 [4, 3] 1.375
torch.float32 [] 19.75
torch.float32 [] 3.5
True
";
        assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
    }

    #[track_caller]
    fn check(file: &Path, annotations: Option<&Annotations>, expected: &str) {
        let error = read(file, annotations).unwrap_err();
        let said = error.to_string().replace(&file.display().to_string(), "FILE");
        assert!(said.starts_with(expected), "{said}");
        assert!(error.hint().is_some());
    }

    #[test]
    fn what_does_not_name_its_rows_once_and_for_all_is_refused_in_words() {
        check(&golden::path("bare.pth"), None, "annotations: missing, but FILE holds rows [4, 3] without names");
        check(
            &golden::path("published.pth"),
            Some(&annotations([1, 2, 3, 4])),
            "annotations: given, but FILE is no tensor alone: it names its rows itself",
        );
        check(
            &golden::path("bare.pth"),
            Some(&annotations([0, 1, 2, 3])),
            "annotations: expected ids from 1 on, as data sets have them, found 0: `person`",
        );
        let three = Tensor::zeros([3, 3], (Kind::Float, Device::Cpu));
        check(
            saved(&Saved::Tensor(&three)).path(),
            Some(&annotations([1, 2, 3, 4])),
            "FILE: expected floating embeddings [4, D], one row a class name, found Float [3, 3]",
        );

        let rows = rows();
        check(
            saved(&dict(&three, &NAMES, [])).path(),
            None,
            "FILE: expected floating embeddings [4, D], one row a class name, found Float [3, 3]",
        );
        check(
            saved(&dict(&rows.to_kind(Kind::Int64), &NAMES, [])).path(),
            None,
            "FILE: expected floating embeddings [4, D], one row a class name, found Int64 [4, 3]",
        );
        check(
            saved(&dict(&rows, &["a", "b", "c", "b"], [])).path(),
            None,
            "FILE: expected each class name once, found `b` again at place 3",
        );
        check(
            saved(&Saved::Dict([("names".to_owned(), Saved::Tensor(&rows))].into())).path(),
            None,
            "FILE: expected a list of class names under `names`, found none",
        );
        let numbered = Saved::List(vec![Saved::Integer(1)]);
        let unnamed = Saved::Dict([("embeddings".to_owned(), Saved::Tensor(&rows)), ("names".to_owned(), numbered)].into());
        check(saved(&unnamed).path(), None, "FILE: expected a list of class names under `names`, found none");
        let elsewhere = Saved::Dict([("vectors".to_owned(), Saved::Tensor(&rows)), ("names".to_owned(), Saved::List(Vec::new()))].into());
        check(saved(&elsewhere).path(), None, "FILE: expected a tensor `embeddings`, found none");
        let endless = &rows / Tensor::from_slice(&[1.0_f32, 1.0, 0.0, 1.0]).view([4, 1]);
        check(
            saved(&dict(&endless, &NAMES, [])).path(),
            None,
            "FILE: expected numbers in `embeddings`, found infinities or NaN in the row of `speaker_(stero_equipment)`",
        );
        check(
            saved(&dict(&rows, &NAMES, [("scaler", Saved::Real(20.0))])).path(),
            None,
            "FILE: expected `scaler` and `bias` together, found one of them",
        );
        let two = [("scaler", Saved::Tensor(&rows)), ("bias", Saved::Real(4.0))];
        check(saved(&dict(&rows, &NAMES, two)).path(), None, "FILE: expected one number as `scaler`, found Float [4, 3]");
        let words = [("scaler", Saved::Text("large".into())), ("bias", Saved::Real(4.0))];
        check(saved(&dict(&rows, &NAMES, words)).path(), None, "FILE: expected one number as `scaler`, found `large`");

        let mut page = tempfile::NamedTempFile::new().unwrap();
        page.write_all(b"<!doctype html>").unwrap();
        check(page.path(), None, "FILE: expected safetensors, a torch.save archive or a TorchScript archive, found a web page");
    }
}
