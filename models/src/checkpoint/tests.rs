use std::{
    collections::HashMap,
    fs,
    io::{Cursor, Write},
    ops::Range,
    process::Command,
};

use ::safetensors::{Dtype, tensor::TensorView};
use serde_json::Value as Json;
use tch::Device;
use zip::{CompressionMethod, ZipArchive, ZipWriter, write::SimpleFileOptions};

use super::*;

/// Where their weights lie.
const FILES: [(&str, Format, &str); 6] = [
    ("nested.pth", Format::Torch, "state_dict."),
    ("model.pth", Format::Torch, "model."),
    ("flat.pth", Format::Torch, ""),
    ("legacy.pth", Format::TorchLegacy, "state_dict."),
    ("script.pt", Format::TorchScript, ""),
    ("weights.safetensors", Format::Safetensors, ""),
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/checkpoint")
}

fn golden(name: &str) -> Vec<u8> {
    let path = folder().join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}; run make.py beside it", path.display()))
}

fn open(bytes: &[u8]) -> Result<Checkpoint> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    Checkpoint::open(file.path())
}

/// What is wrong with a file, without its path, and what to do.
fn refusal(bytes: &[u8]) -> (String, String) {
    match open(bytes) {
        Err(Error::Malformed { problem, hint, .. }) => (problem, hint.unwrap()),
        other => panic!("expected a malformed file, found {other:?}"),
    }
}

/// An archive with its entries changed.
fn rezipped(name: &str, method: CompressionMethod, change: impl Fn(&str, Vec<u8>) -> Option<Vec<u8>>) -> Vec<u8> {
    let mut from = ZipArchive::new(Cursor::new(golden(name))).unwrap();
    let mut to = ZipWriter::new(Cursor::new(Vec::new()));
    for place in 0..from.len() {
        let mut entry = from.by_index(place).unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        if let Some(bytes) = change(entry.name(), bytes) {
            to.start_file(entry.name(), SimpleFileOptions::default().compression_method(method)).unwrap();
            to.write_all(&bytes).unwrap();
        }
    }
    to.finish().unwrap().into_inner()
}

fn stored(name: &str, change: impl Fn(&str, Vec<u8>) -> Option<Vec<u8>>) -> Vec<u8> {
    rezipped(name, CompressionMethod::Stored, change)
}

/// The only place of some bytes.
fn place_of(bytes: &[u8], wanted: &[u8]) -> Range<usize> {
    let places: Vec<usize> =
        bytes.windows(wanted.len()).enumerate().filter(|(_, window)| *window == wanted).map(|(place, _)| place).collect();
    let [place] = places.as_slice() else { panic!("expected {wanted:?} once, found it at {places:?}") };
    *place..*place + wanted.len()
}

fn replaced(mut bytes: Vec<u8>, old: &[u8], new: &[u8]) -> Vec<u8> {
    let place = place_of(&bytes, old);
    bytes.splice(place, new.iter().copied());
    bytes
}

/// `flat.pth` with other bytes in its pickle.
fn repickled(old: &[u8], new: &[u8]) -> Vec<u8> {
    stored("flat.pth", |name, bytes| Some(if name.ends_with("data.pkl") { replaced(bytes, old, new) } else { bytes }))
}

fn safetensors(header: &str, numbers: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), numbers].concat()
}

#[test]
fn every_published_layout_is_read_as_its_writer_reads_it() {
    let expected: Json = serde_json::from_slice(&golden("golden.json")).unwrap();
    for (name, format, prefix) in FILES {
        let place = Place { prefix: prefix.into(), beside: Vec::new() };
        let checkpoint = Checkpoint::open(&folder().join(name)).unwrap();
        assert!(checkpoint.names().all(|name| name.starts_with(prefix)), "{name}: optimizers are not read");
        let checkpoint = checkpoint.at(&place);
        assert_eq!(checkpoint.format(), format, "{name}");
        let expected = expected[name].as_object().unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{name}");
        for (tensor, expected) in expected {
            assert_eq!(format!("{:?}", checkpoint.dtype(tensor).unwrap()), expected["kind"], "{name} {tensor}");
            assert_eq!(serde_json::json!(checkpoint.shape(tensor).unwrap()), expected["shape"], "{name} {tensor}");
            let flat = checkpoint.tensor(tensor).unwrap().to_kind(Kind::Double).flatten(0, -1);
            let weights = Tensor::arange(flat.size()[0], (Kind::Double, Device::Cpu)) + 1.0;
            let difference = (flat * weights).sum(Kind::Double).double_value(&[]) - expected["sum"].as_f64().unwrap();
            assert!(difference.abs() < 1e-9, "{name} {tensor}: {difference}");
        }
    }
}

#[test]
fn tensors_are_contiguous_and_share_no_memory() {
    for (name, ..) in FILES {
        let checkpoint = Checkpoint::open(&folder().join(name)).unwrap();
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for tensor in checkpoint.tensors().values().filter(|tensor| tensor.numel() > 0) {
            assert!(tensor.is_contiguous(), "{name}");
            let begin = tensor.data_ptr() as usize;
            ranges.push((begin, begin + tensor.numel() * tensor.kind().elt_size_in_bytes()));
        }
        ranges.sort_unstable();
        assert!(ranges.is_sorted_by(|left, right| left.1 <= right.0), "{name}");
    }
}

#[test]
fn a_tensor_that_is_handed_out_is_a_copy() {
    let checkpoint = Checkpoint::open(&folder().join("flat.pth")).unwrap();
    let _zeros = checkpoint.tensor("a").unwrap().zero_();
    assert!(checkpoint.tensor("a").unwrap().abs().sum(Kind::Float).double_value(&[]) > 0.0);
}

#[test]
fn text_beside_the_weights_is_read() {
    let checkpoint = Checkpoint::open(&folder().join("weights.safetensors")).unwrap();
    assert_eq!(checkpoint.metadata(), &BTreeMap::from([("made".to_owned(), "by make.py".to_owned())]));
}

#[test]
fn a_missing_tensor_is_named() {
    let checkpoint = Checkpoint::open(&folder().join("flat.pth")).unwrap();
    let error = checkpoint.tensor("visual.proj").unwrap_err().to_string();
    assert!(error.ends_with("flat.pth: no tensor `visual.proj` among 3"), "{error}");
}

#[test]
fn every_cut_of_every_layout_is_an_error() {
    for (name, ..) in FILES {
        let bytes = golden(name);
        let step = (bytes.len() / 150).max(1);
        for length in (0..bytes.len()).step_by(step).chain([7, 8, 9, bytes.len() - 30, bytes.len() - 1]) {
            let (problem, hint) = refusal(&bytes[..length]);
            assert!(!problem.is_empty() && !hint.is_empty(), "{name} cut to {length}");
        }
    }
}

#[test]
fn flipped_bits_are_survived() {
    for (name, ..) in FILES {
        let bytes = golden(name);
        let step = (bytes.len() / 300).max(1);
        for at in (0..bytes.len()).step_by(step) {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            if let Ok(checkpoint) = open(&flipped) {
                assert!(checkpoint.names().count() > 0, "{name} flipped at {at}");
            }
        }
    }
}

#[test]
fn flipped_weights_of_an_archive_are_found_by_their_crc() {
    let mut bytes = golden("flat.pth");
    let first = Checkpoint::open(&folder().join("flat.pth")).unwrap().tensor("a").unwrap().double_value(&[0]) as f32;
    let at = place_of(&bytes, &first.to_le_bytes()).start;
    bytes[at] ^= 1;
    assert_eq!(refusal(&bytes), ("a: flat/data/0: Invalid checksum".into(), AGAIN.into()));
}

#[test]
fn what_is_no_checkpoint_is_named_for_what_it_is() {
    let expected = "expected safetensors, a torch.save archive or a TorchScript archive, found";
    let cases: &[(&[u8], &str)] = &[
        (b"", "an empty file"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"GIF89a", "6 bytes that begin with [47, 49, 46, 38, 39, 61]"),
    ];
    for (bytes, found) in cases {
        assert_eq!(refusal(bytes).0, format!("{expected} {found}"));
    }
    // A pickle, but of a list.
    let (problem, hint) = refusal(b"\x80\x02].");
    assert_eq!(problem, "expected a file of torch.save, found another pickle");
    assert_eq!(hint, "load it with PyTorch and save `model.state_dict()` with torch.save or safetensors");
}

#[test]
fn a_missing_file_is_a_read_error() {
    let error = Checkpoint::open(&folder().join("nowhere.pt")).unwrap_err();
    assert_eq!(error.hint().as_deref(), Some("check the path, or download the checkpoint first"));
}

#[test]
fn archives_that_contradict_themselves_are_refused_with_the_tensor() {
    let without = |missing: &'static str| stored("flat.pth", move |name, bytes| (!name.ends_with(missing)).then_some(bytes));
    let longer = |longer: &'static str| {
        stored("flat.pth", move |name, bytes| Some(if name.ends_with(longer) { [bytes, vec![0; 4]].concat() } else { bytes }))
    };
    let shorter = |shorter: &'static str| {
        stored("flat.pth", move |name, bytes| Some(if name.ends_with(shorter) { bytes[4..].to_vec() } else { bytes }))
    };
    let big = stored("flat.pth", |name, bytes| Some(if name.ends_with("byteorder") { b"big".to_vec() } else { bytes }));
    let cases = [
        (without("data/1"), "b: flat/data/1: specified file not found in archive"),
        (without("data.pkl"), "expected an archive with data.pkl, found one without"),
        (shorter("data/0"), "a: storage 0: expected 64 numbers of Float, found 252 bytes"),
        (longer("data/2"), "c: storage 2: expected 5 numbers of Int64, found 44 bytes"),
        (big, "expected little-endian numbers, found big-endian"),
        // K 64 is the number of numbers and the shape of `a`; the shape is a tuple of one.
        (repickled(b"K@\x85", b"K\x41\x85"), "a: a tensor [65] with strides [1] from number 0 of storage 0, which holds 64"),
        (
            repickled(b"K\x02K\x03\x86", b"K\x03K\x03\x86"),
            "b: a tensor [3, 3] with strides [3, 1] from number 0 of storage 1, which holds 6",
        ),
        (
            repickled(b"K\x03K\x01\x86", b"K\x03M\xff\xff\x86"),
            "b: a tensor [2, 3] with strides [3, 65535] from number 0 of storage 1, which holds 6",
        ),
        (repickled(b"LongStorage", b"ComplexFloatStorage"), "c: numbers of type ComplexFloatStorage are not supported"),
        (repickled(b"LongStorage", b"IntStorage"), "c: storage 2: expected 5 numbers of Int, found 40 bytes"),
        (repickled(b"X\x01\0\0\0b", b"X\x01\0\0\0a"), "a: two tensors of this name"),
    ];
    for (bytes, expected) in cases {
        assert_eq!(refusal(&bytes).0, expected);
    }
}

#[test]
fn entries_of_the_same_name_are_refused() {
    // The fields that hold names are of one length, in the local header and in the directory.
    let mut bytes = golden("flat.pth");
    while let Some(at) = bytes.windows(11).position(|window| window == b"flat/data/1") {
        bytes[at + 10] = b'0';
    }
    let (problem, _) = refusal(&bytes);
    assert!(problem.starts_with("zip: expected ") && problem.contains("entries of different names"), "{problem}");
}

#[test]
fn compressed_archives_are_refused_with_what_to_do() {
    let (problem, hint) = refusal(&rezipped("flat.pth", CompressionMethod::Deflated, |_, bytes| Some(bytes)));
    assert!(problem.ends_with("expected an entry as it is, found a compressed one"), "{problem}");
    assert_eq!(hint, "load it with PyTorch and save `model.state_dict()` with torch.save or safetensors");
}

#[test]
fn a_tensor_that_repeats_one_number_for_ever_is_refused() {
    // The shape of `b`, 2 x 3, becomes 2^31 - 1 x 2^31 - 1 with strides 0.
    let side = [b"J".as_slice(), &i32::MAX.to_le_bytes()].concat();
    let shape = [side.as_slice(), &side, b"\x86"].concat();
    let bytes = stored("flat.pth", |name, bytes| {
        let change = |bytes| replaced(replaced(bytes, b"K\x02K\x03\x86", &shape), b"K\x03K\x01\x86", b"K\x00K\x00\x86");
        Some(if name.ends_with("data.pkl") { change(bytes) } else { bytes })
    });
    assert_eq!(refusal(&bytes).0, "b: a tensor [2147483647, 2147483647], far larger than the file");
}

#[test]
fn a_pickle_without_tensors_says_what_is_in_it() {
    // {'epoch': 3}
    let bytes = stored("flat.pth", |name, bytes| {
        Some(if name.ends_with("data.pkl") { b"\x80\x02}X\x05\0\0\0epochK\x03s.".to_vec() } else { bytes })
    });
    assert_eq!(refusal(&bytes).0, "expected a dict of tensors, found a dict with the keys [\"epoch\"]");
}

#[test]
fn a_tensor_alone_and_what_stands_beside_tensors_are_read() {
    let rows = Tensor::arange(6, (Kind::Half, Device::Cpu)).view([2, 3]);
    let write = |value: &Saved<'_>| {
        let mut bytes = Vec::new();
        write_torch(value, &mut bytes).unwrap();
        open(&bytes).unwrap()
    };
    let alone = write(&Saved::Tensor(&rows));
    assert_eq!((alone.names().collect::<Vec<_>>(), alone.metadata().len()), (vec![BARE_TENSOR], 0));
    assert!(alone.tensor(BARE_TENSOR).unwrap().equal(&rows));

    let texts = |texts: &[&str]| Saved::List(texts.iter().map(|text| Saved::Text((*text).into())).collect());
    let entries = [
        ("rows", Saved::Tensor(&rows)),
        ("names", texts(&["a \"b\"", "ä"])),
        ("note", Saved::Text("by hand".into())),
        ("epoch", Saved::Integer(-3)),
        ("rate", Saved::Real(0.1)),
        ("mixed", Saved::List(vec![Saved::Text("a".into()), Saved::Integer(1)])),
        ("inner", Saved::Dict([("note".to_owned(), Saved::Text("deeper".into()))].into())),
        ("nothing", Saved::Nothing),
    ];
    let dict = write(&Saved::Dict(entries.map(|(name, value)| (name.to_owned(), value)).into()));
    let expected = [("epoch", "-3"), ("inner.note", "deeper"), ("names", r#"["a \"b\"","ä"]"#), ("note", "by hand"), ("rate", "0.1")];
    assert_eq!(dict.metadata().iter().map(|(name, text)| (name.as_str(), text.as_str())).collect::<Vec<_>>(), expected);
    assert_eq!(dict.names().collect::<Vec<_>>(), ["rows"]);
}

#[test]
fn safetensors_that_contradict_themselves_are_refused_with_the_tensor() {
    let entry = |name: &str, dtype: &str, shape: &str, begin: u32, end: u32| {
        format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{begin},{end}]}}")
    };
    let one = |dtype: &str, shape: &str, begin, end| format!("{{{}}}", entry("a", dtype, shape, begin, end));
    let cases = [
        (safetensors(&one("F32", "[2]", 0, 8), &[0; 7]), "a: expected 8 bytes, found 7"),
        (safetensors(&one("F32", "[2]", 0, 8), &[0; 9]), "expected the end of the file after the numbers, found 1 more bytes"),
        (safetensors(&one("F32", "[3]", 0, 8), &[0; 8]), "a: a tensor [3] of F32 at bytes 0 to 8, which do not fit"),
        (safetensors(&one("F32", "[2]", 8, 0), &[0; 8]), "a: a tensor [2] of F32 at bytes 8 to 0, which do not fit"),
        (safetensors(&one("F32", "[-2]", 0, 8), &[0; 8]), "a: a tensor [-2] of F32 at bytes 0 to 8, which do not fit"),
        (
            safetensors(&one("F32", "[4611686018427387905]", 0, 4), &[0; 4]),
            "a: a tensor [4611686018427387905] of F32 at bytes 0 to 4, which do not fit",
        ),
        (safetensors(&one("F8_E4M3", "[8]", 0, 8), &[0; 8]), "a: numbers of type F8_E4M3 are not supported"),
        (safetensors(&one("F32", "[1]", 4, 8), &[0; 8]), "a: expected numbers from byte 0, found them from byte 4"),
        (
            safetensors(&format!("{{{},{}}}", entry("a", "U8", "[4]", 0, 4), entry("b", "U8", "[4]", 2, 6)), &[0; 6]),
            "b: expected numbers from byte 4, found them from byte 2",
        ),
        (
            safetensors(&format!("{{{},{}}}", entry("a", "U8", "[1]", 0, 1), entry("a", "U8", "[1]", 1, 2)), &[0; 2]),
            "header: a: two tensors of this name at line 1 column 56",
        ),
        ([&99_u64.to_le_bytes(), b"{}".as_slice()].concat(), "header: expected 99 bytes, found 2"),
        ([&4_000_000_000_u64.to_le_bytes(), b"{}".as_slice()].concat(), "header: expected at most 100000000 bytes, found 4000000000"),
    ];
    for (bytes, expected) in cases {
        assert_eq!(refusal(&bytes).0, expected);
    }
}

/// One tensor of each type, and one of strides.
fn samples() -> BTreeMap<String, Tensor> {
    let kinds =
        [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double, Kind::Int64, Kind::Int, Kind::Int16, Kind::Int8, Kind::Uint8, Kind::Bool];
    let tensor = |kind: &Kind| (format!("{kind:?} \"1\""), Tensor::arange(6, (Kind::Int64, Device::Cpu)).to_kind(*kind).view([2, 3]));
    let mut tensors: BTreeMap<String, Tensor> = kinds.iter().map(tensor).collect();
    tensors.insert("transposed".into(), Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]).tr());
    tensors.insert("scalar".into(), Tensor::from(0.5_f32));
    tensors.insert("empty".into(), Tensor::zeros([0, 3], (Kind::Float, Device::Cpu)));
    tensors
}

#[test]
fn what_is_written_is_read_back() {
    let text = |key: &str| (key.to_owned(), format!("{key} says \"ä\"\n"));
    let metadata = BTreeMap::from(["b", "a", "names", "c", "format"].map(text));
    let mut bytes = Vec::new();
    write_safetensors(&samples(), &metadata, &mut bytes).unwrap();
    let read = open(&bytes).unwrap();
    assert_eq!(read.metadata(), &metadata);
    assert_eq!(read.names().collect::<Vec<_>>(), samples().keys().collect::<Vec<_>>());
    for (name, tensor) in samples() {
        assert_eq!(read.dtype(&name).unwrap(), tensor.kind(), "{name}");
        assert!(read.tensor(&name).unwrap().equal(&tensor), "{name}");
    }
}

#[test]
fn the_bytes_written_are_those_of_the_reference_implementation() {
    let tensors = samples();
    let mut contents = Vec::new();
    for (name, tensor) in &tensors {
        let dtype = match tensor.kind() {
            Kind::Float => Dtype::F32,
            Kind::Half => Dtype::F16,
            Kind::BFloat16 => Dtype::BF16,
            Kind::Double => Dtype::F64,
            Kind::Int64 => Dtype::I64,
            Kind::Int => Dtype::I32,
            Kind::Int16 => Dtype::I16,
            Kind::Int8 => Dtype::I8,
            Kind::Uint8 => Dtype::U8,
            Kind::Bool => Dtype::BOOL,
            other => panic!("no such sample: {other:?}"),
        };
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.contiguous().copy_data_u8(&mut bytes, tensor.numel());
        let shape: Vec<usize> = tensor.size().iter().map(|length| *length as usize).collect();
        contents.push((name, dtype, shape, bytes));
    }
    for metadata in [None, Some(("names", "[\"a\"]"))] {
        let views = contents.iter().map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        let map = metadata.map(|(key, text)| HashMap::from([(key.to_owned(), text.to_owned())]));
        let expected = ::safetensors::serialize(views, map).unwrap();
        let metadata = metadata.into_iter().map(|(key, text)| (key.to_owned(), text.to_owned())).collect();
        let mut found = Vec::new();
        write_safetensors(&tensors, &metadata, &mut found).unwrap();
        assert!(found == expected, "{} and {}", String::from_utf8_lossy(&found), String::from_utf8_lossy(&expected));
    }
}

#[test]
fn types_that_safetensors_has_no_name_for_are_refused() {
    let tensors = BTreeMap::from([("a".to_owned(), Tensor::zeros([1], (Kind::ComplexFloat, Device::Cpu)))]);
    let error = write_safetensors(&tensors, &BTreeMap::new(), &mut Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "a: safetensors has no type for ComplexFloat");
}

/// A dict as training scripts write it, of all samples.
fn written(tensors: &BTreeMap<String, Tensor>) -> Vec<u8> {
    let weights = tensors.iter().map(|(name, tensor)| (name.clone(), Saved::Tensor(tensor))).collect();
    let meta = serde_json::json!({
        "note": "says \"ä\"\n", "steps": 40_000, "seed": -(1_i64 << 40), "rate": 0.02, "more": {}, "classes": ["a", null, true, false, []],
    });
    let mut bytes = Vec::new();
    let all = BTreeMap::from([("state_dict".to_owned(), Saved::Dict(weights)), ("meta".to_owned(), Saved::from(&meta))]);
    write_torch(&Saved::Dict(all), &mut bytes).unwrap();
    bytes
}

#[test]
fn a_written_archive_is_read_back() {
    let bytes = written(&samples());
    assert_eq!(bytes, written(&samples()));
    let read = open(&bytes).unwrap();
    assert_eq!(read.format(), Format::Torch);
    let read = read.at(&Place { prefix: "state_dict.".into(), beside: Vec::new() });
    assert_eq!(read.metadata()["meta.steps"], "40000");
    assert_eq!(read.names().collect::<Vec<_>>(), samples().keys().collect::<Vec<_>>());
    for (name, tensor) in samples() {
        assert_eq!(read.dtype(&name).unwrap(), tensor.kind(), "{name}");
        assert!(read.tensor(&name).unwrap().equal(&tensor), "{name}");
    }
    let complex = Tensor::zeros([1], (Kind::ComplexFloat, Device::Cpu));
    let value = Saved::Dict(BTreeMap::from([("a".to_owned(), Saved::Dict(BTreeMap::from([("b".to_owned(), Saved::Tensor(&complex))])))]));
    let error = write_torch(&value, &mut Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "a.b: PyTorch has no storage for ComplexFloat");
}

#[test]
fn torch_loads_a_written_archive() {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers/bin/python");
    let has_torch = || Command::new(&python).args(["-c", "import torch"]).output().is_ok_and(|output| output.status.success());
    if !python.exists() || !has_torch() {
        crate::skip::skip("PyTorch is not set up (`make peers`)");
        return;
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&written(&samples())).unwrap();
    // `mmap` needs entries that are aligned.
    let script = "
import sys, torch
for mmap in (False, True):
    loaded = torch.load(sys.argv[1], weights_only=True, mmap=mmap)
print(loaded['meta'])
for name, tensor in loaded['state_dict'].items():
    print(name, tensor.dtype, list(tensor.shape), tensor.double().flatten().tolist())
";
    let output = Command::new(python).args(["-c", script]).arg(file.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(output.stdout).unwrap();
    let mut lines = said.lines();
    let meta = "{'classes': ['a', None, True, False, []], 'more': {}, 'note': 'says \"ä\"\\n', 'rate': 0.02, 'seed': -1099511627776, 'steps': 40000}";
    assert_eq!(lines.next(), Some(meta));
    for (name, tensor) in samples() {
        let dtype = match tensor.kind() {
            Kind::Float => "float32",
            Kind::Half => "float16",
            Kind::BFloat16 => "bfloat16",
            Kind::Double => "float64",
            Kind::Int64 => "int64",
            Kind::Int => "int32",
            Kind::Int16 => "int16",
            Kind::Int8 => "int8",
            Kind::Uint8 => "uint8",
            Kind::Bool => "bool",
            other => panic!("no such sample: {other:?}"),
        };
        let numbers = Vec::<f64>::try_from(tensor.to_kind(Kind::Double).contiguous().view(-1)).unwrap();
        assert_eq!(lines.next(), Some(format!("{name} torch.{dtype} {:?} {numbers:?}", tensor.size()).as_str()));
    }
}

#[test]
fn plain_numbers_are_those_of_tensors_in_every_layout() {
    for (name, ..) in FILES {
        let path = folder().join(name);
        let (tensors, arrays) = (Checkpoint::open(&path).unwrap(), read_arrays(&path).unwrap());
        assert!(arrays.keys().eq(tensors.tensors().keys()), "{name}");
        for (key, array) in arrays {
            let tensor = &tensors.tensors()[&key];
            assert!(array.tensor().unwrap().equal(tensor) && array == Array::of(tensor).unwrap(), "{name} {key}");
        }
    }
}

#[test]
fn a_tensor_that_was_saved_alone_has_a_name_and_plain_numbers_are_written_as_tensors_are() {
    let tensor = Tensor::from_slice(&[1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0]).view([2, 3]).to_kind(Kind::Half);
    let array = Array { kind: Kind::Half, shape: vec![2, 3], bytes: numbers(&tensor).unwrap() };
    let written = [Saved::Tensor(&tensor), Saved::Array(&array)].map(|value| {
        let mut bytes = Vec::new();
        write_torch(&value, &mut bytes).unwrap();
        bytes
    });
    assert_eq!(written[0], written[1]);
    let read = open(&written[0]).unwrap();
    assert!(read.names().eq([BARE_TENSOR]) && read.tensor(BARE_TENSOR).unwrap().equal(&tensor));
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&written[0]).unwrap();
    assert_eq!(read_arrays(file.path()).unwrap(), BTreeMap::from([(BARE_TENSOR.to_owned(), array)]));
}
