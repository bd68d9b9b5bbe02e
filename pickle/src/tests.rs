use std::{fs, path::Path, sync::Arc};

use proptest::prelude::*;

use crate::{Object, Pieces, Value, read, read_first, write_arrays, write_f32_arrays};

const PROTOCOLS: [u8; 4] = [0, 2, 4, 5];

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/pickle").join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}; run make.py beside it", path.display()))
}

fn goldens() -> Vec<String> {
    let of_all = ["arrays", "layouts", "data"].into_iter().flat_map(|name| PROTOCOLS.map(|protocol| format!("{name}-{protocol}.pkl")));
    let objects = PROTOCOLS[1..].iter().map(|protocol| format!("objects-{protocol}.pkl"));
    of_all.chain(objects).chain(["numpy-1.pkl", "python-2.pkl", "written.pkl"].map(Into::into)).collect()
}

fn rows(value: &Value) -> Vec<(Vec<usize>, Vec<f32>)> {
    let arrays = value.as_list().unwrap().iter().map(|item| item.to_array().unwrap());
    arrays.map(|array| (array.shape.clone(), array.to_f32().unwrap())).collect()
}

fn ints(values: impl IntoIterator<Item = i64>) -> Value {
    Value::List(values.into_iter().map(Value::Int).collect())
}

/// The only object or value of a small pickle.
fn problem(bytes: &[u8]) -> String {
    read(bytes).unwrap_err().to_string()
}

#[test]
fn arrays_of_every_protocol_are_read() {
    let ramp: Vec<f32> = (0..10).map(|number| number as f32 / 4.0).collect();
    let expected = [(vec![2, 5], ramp.clone()), (vec![2, 5], ramp.clone()), (vec![0, 5], vec![]), (vec![2, 5], ramp)];
    for protocol in PROTOCOLS {
        assert_eq!(rows(&read(&golden(&format!("arrays-{protocol}.pkl"))).unwrap()), expected, "protocol {protocol}");
    }
}

#[test]
fn every_type_and_memory_order_gives_the_numbers_that_numpy_sees() {
    for protocol in PROTOCOLS {
        let layouts = read(&golden(&format!("layouts-{protocol}.pkl"))).unwrap();
        assert_eq!(layouts.as_list().unwrap().len(), 18);
        for (place, pair) in layouts.as_list().unwrap().iter().enumerate() {
            let [array, expected] = pair.as_items().unwrap() else { panic!("expected a pair") };
            let expected: Vec<f32> = expected.as_list().unwrap().iter().map(|number| number.as_float().unwrap() as f32).collect();
            assert_eq!(array.to_array().unwrap().to_f32().unwrap(), expected, "protocol {protocol}, layout {place}");
        }
    }
}

#[test]
fn arrays_of_numpy_1_are_read() {
    assert_eq!(rows(&read(&golden("numpy-1.pkl")).unwrap()), [(vec![1, 2], vec![0.5, -2.0])]);
}

#[test]
fn pickles_of_python_2_are_read() {
    let value = read(&golden("python-2.pkl")).unwrap();
    assert_eq!(value.get("array").unwrap().to_array().unwrap().to_f32().unwrap(), [0.5, -2.0]);
    assert_eq!(value.get("ordered").unwrap().get("b"), Some(&Value::Int(2)));
    assert_eq!(value.get("lines").and_then(Value::as_bytes), Some(b"it's \xe9\n".as_slice()), "not UTF-8, so bytes");
}

#[test]
fn python_data_is_the_same_in_every_protocol() {
    for protocol in PROTOCOLS {
        let value = read(&golden(&format!("data-{protocol}.pkl"))).unwrap();
        let item = |key: &str| value.get(key).unwrap_or_else(|| panic!("no {key} with protocol {protocol}"));
        assert_eq!(item("int"), &Value::Int(-300));
        let edges = [0, 255, 256, 65_535, 65_536, -1, 1 << 31, -(1 << 31) - 1, i64::MAX, i64::MIN];
        assert_eq!(item("ints"), &ints(edges), "protocol {protocol}");
        assert_eq!(item("float"), &Value::Float(0.1));
        assert_eq!(item("text").as_str(), Some("naïve \u{1f426}\n\\u"));
        assert_eq!(item("bytes").as_bytes(), Some([0, 0xff, b'\n'].repeat(100).as_slice()), "protocol {protocol}");
        assert_eq!(item("bytearray").as_bytes(), Some([0xfe, 1].as_slice()), "protocol {protocol}");
        assert_eq!(item("set"), &Value::Set(Arc::new([Value::Int(5)])));
        assert_eq!(item("frozenset"), &Value::Set(Arc::new([Value::Int(6)])));
        assert_eq!(item("nothing"), &Value::None);
        assert_eq!(item("tuple"), &Value::Tuple(Arc::new([Value::Bool(true), Value::Int(1 << 40)])));
        assert_eq!(item("long list"), &ints(0..2500));
        assert_eq!(item("long text").as_str(), Some("ä".repeat(300).as_str()));
        assert_eq!(item("ordered").get("b"), Some(&Value::Int(2)));
        assert_eq!(item("default").get("a"), Some(&ints([1])));
        assert_eq!(item("shared"), &Value::List(Arc::new([ints([1, 2]), ints([1, 2])])));
        let empty = [
            Value::Str("".into()),
            Value::Bytes(Arc::new([])),
            ints([]),
            Value::Tuple(Arc::new([])),
            Value::Dict(Arc::new([])),
            Value::Set(Arc::new([])),
        ];
        assert_eq!(item("empty").as_list(), Some(empty.as_slice()), "protocol {protocol}");
    }
}

#[test]
fn integers_beyond_64_bits_keep_their_bytes() {
    for protocol in PROTOCOLS {
        let value = read(&golden(&format!("data-{protocol}.pkl"))).unwrap();
        let [above, below, power, long, ones] = value.get("big").unwrap().as_list().unwrap() else { panic!("expected five integers") };
        let big = |bytes: &[u8]| Value::BigInt(bytes.into());
        assert_eq!(above, &big(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0]), "2^63, protocol {protocol}");
        assert_eq!(below, &big(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 0xff]), "-2^63 - 1, protocol {protocol}");
        assert_eq!(power, &big(&[[0; 12].as_slice(), &[0x10]].concat()), "2^100, protocol {protocol}");
        assert_eq!(long, &big(&[[0; 262].as_slice(), &[0xf0]].concat()), "-2^2100, protocol {protocol}");
        assert_eq!(ones, &big(&[0, 0, 0, 0, 0, 0, 0, 0xff, 0]), "2^64 - 2^56, protocol {protocol}");
    }
}

#[test]
fn unknown_classes_are_kept_as_data() {
    for protocol in [2, 4, 5] {
        let value = read(&golden(&format!("objects-{protocol}.pkl"))).unwrap();
        let object = |key: &str| -> &Object { value.get(key).unwrap().as_object().unwrap() };
        assert_eq!(object("items").items.as_ref(), [Value::Int(1), Value::Int(2)]);
        assert_eq!(object("items").state.as_ref().unwrap().get("label").and_then(Value::as_str), Some("attribute"));
        assert!(object("items").callable.is_global("elsewhere", "Items"));
        assert_eq!(value.get("entries").unwrap().get("a"), Some(&Value::Int(3)));
        assert_eq!(object("namespace").state.as_ref().unwrap().get("lr"), Some(&Value::Float(0.1)));
        assert!(value.get("class").unwrap().is_global("collections", "OrderedDict"));
        assert_eq!(value.get("items").unwrap().kind(), "an object of elsewhere.Items");
    }
}

#[test]
fn named_arguments_are_kept() {
    let value = read(&golden("objects-4.pkl")).unwrap();
    let object = value.get("circle").unwrap().as_object().unwrap();
    assert_eq!(object.args.as_ref(), [Value::Int(7)]);
    assert_eq!(object.kwargs.as_ref().unwrap().get("scale"), Some(&Value::Float(0.5)));
}

#[test]
fn a_value_inside_itself_is_cut_off() {
    for protocol in [2, 4, 5] {
        let value = read(&golden(&format!("objects-{protocol}.pkl"))).unwrap();
        let state = value.get("circle").unwrap().as_object().unwrap().state.clone().unwrap();
        assert_eq!(state.get("a"), Some(&Value::List(Arc::new([Value::Circle]))));
    }
    // l = []; l.append(l)
    assert_eq!(read(b"\x80\x02]q\x00h\x00a.").unwrap(), Value::List(Arc::new([Value::Circle])));
}

#[test]
fn persistent_ids_are_kept() {
    assert_eq!(read(b"Pdata/0\n.").unwrap(), Value::Persistent(Arc::new(Value::Str("data/0".into()))));
    assert_eq!(read(b"\x80\x02K\x07Q.").unwrap(), Value::Persistent(Arc::new(Value::Int(7))));
}

#[test]
fn a_key_that_is_set_twice_has_its_last_value() {
    // {'a': 1}['a'] = 2
    let value = read(b"\x80\x02}X\x01\x00\x00\x00aK\x01sX\x01\x00\x00\x00aK\x02s.").unwrap();
    assert_eq!(value.get("a"), Some(&Value::Int(2)));
    assert_eq!(value.as_entries().unwrap().len(), 2);
}

#[test]
fn pickles_that_follow_each_other_are_read_one_by_one() {
    let bytes = b"\x80\x02K\x01.\x80\x02K\x02.";
    let (first, end) = read_first(bytes).unwrap();
    assert_eq!((first, read(&bytes[end..]).unwrap()), (Value::Int(1), Value::Int(2)));
}

#[test]
fn what_is_written_is_read_back() {
    let mut bytes = Vec::new();
    write_f32_arrays([(1, 5, [1.0, 2.0, 3.0, 4.0, 0.5].as_slice()), (0, 5, &[])], &mut bytes).unwrap();
    assert_eq!(rows(&read(&bytes).unwrap()), [(vec![1, 5], vec![1.0, 2.0, 3.0, 4.0, 0.5]), (vec![0, 5], vec![])]);
}

#[test]
fn what_is_written_is_what_python_was_given() {
    let mut bytes = Vec::new();
    write_f32_arrays([(1, 5, [1.0, 2.0, 3.0, 4.0, 0.5].as_slice()), (0, 5, &[])], &mut bytes).unwrap();
    assert_eq!(bytes, golden("written.pkl"), "make.py asserts that Python reads the committed bytes");
}

/// Of one to four axes, and so many that places in the memo need more than a byte. That the bytes are Python's is tested where files of
/// RALF are written.
#[test]
fn a_dict_of_arrays_is_read_back() {
    let bytes: Vec<u8> = (0..=255).collect();
    let shapes: Vec<Vec<usize>> = (0..40).map(|i| [vec![256], vec![2, 128], vec![4, 1, 64], vec![2, 2, 2, 32]][i % 4].clone()).collect();
    let names: Vec<String> = (0..40).map(|i| format!("array {i}")).collect();
    let pieces = vec![&bytes[..100], &bytes[100..]];
    let array = |(name, shape)| (name, Pieces { dtype: "<u1", shape: Vec::clone(shape), pieces: pieces.clone() });
    let arrays: Vec<_> = names.iter().map(String::as_str).zip(&shapes).map(array).collect();
    let mut written = Vec::new();
    write_arrays(&arrays, &mut written).unwrap();
    let value = read(&written).unwrap();
    for (name, shape) in names.iter().zip(shapes) {
        let found = value.get(name).unwrap().to_array().unwrap();
        assert_eq!((found.shape, found.is_fortran, found.dtype.as_str()), (shape, false, "<u1"));
        assert_eq!(*found.data, *bytes);
    }
}

#[test]
fn errors_name_the_place_the_opcode_and_what_was_expected() {
    let cases: &[(&[u8], &str)] = &[
        (b"", "byte 0: expected 1 more bytes, found 0: the file is cut short"),
        (b"\x80\x09.", "byte 0 (PROTO): protocol 9; this reader knows up to 5"),
        (
            b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc",
            "byte 2 (BINBYTES8): expected 9223372036854775807 more bytes, found 3: the file is cut short",
        ),
        (b"\x80\x04X\xff\xff\xff\xffabc", "byte 2 (BINUNICODE): expected 4294967295 more bytes, found 3: the file is cut short"),
        (b"\x80\x04\x95\x10\0\0\0\0\0\0\0N.", "byte 2 (FRAME): expected a frame of 16 bytes, found 2: the file is cut short"),
        (b"\x80\x04X\x02\0\0\0a\xff.", "byte 2 (BINUNICODE): expected UTF-8 text, found other bytes after 1"),
        (b"\x80\x02\x82\x01.", "byte 2 (EXT1): an extension code, which only Python's registry could explain"),
        (b"\x80\x05\x97.", "byte 2 (NEXT_BUFFER): an out-of-band buffer, which is not in the file"),
        (b"NR.", "byte 1 (REDUCE): expected a tuple of arguments on the stack, found another value"),
        (b"N(R.", "byte 2 (REDUCE): expected a value on the stack, found none"),
        (b"h\x05.", "byte 0 (BINGET): expected a memorised value 5, found none"),
        (b"Nt.", "byte 1 (TUPLE): expected a mark on the stack, found none"),
        (b"}(Nu.", "byte 3 (SETITEMS): expected pairs of keys and values, found 1 values"),
        (b"Ia\n.", "byte 0 (INT): expected an integer of at most 4300 digits, found `a`"),
        (b"<html>", "byte 0: expected an opcode, found 0x3c: not a pickle, or damaged"),
    ];
    for (bytes, expected) in cases {
        assert_eq!(&problem(bytes), expected);
    }
}

#[test]
fn values_that_are_too_deep_are_refused() {
    let nested = |depth: usize| [b"]".repeat(depth), b"a".repeat(depth - 1), b".".to_vec()].concat();
    assert!(read(&nested(1_000)).is_ok());
    assert_eq!(problem(&nested(1_001)), "byte 2001 (STOP): expected values at most 1000 deep, found deeper ones");
}

/// t = (); then 60 times t = (t, t): 2^60 values in 300 bytes.
#[test]
fn references_to_references_do_not_multiply() {
    let mut bytes = b"\x80\x02)".to_vec();
    for key in 0..60 {
        bytes.extend([b'q', key, b'h', key, 0x86]);
    }
    bytes.push(b'.');
    assert!(problem(&bytes).contains("expected at most 200000000 values, found more"));
}

/// A text of a megabyte, and a tuple of 100,000, each referred to 100,000 times: kept once.
#[test]
fn what_is_referred_to_often_is_kept_once() {
    let text = "a".repeat(1 << 20);
    let mut bytes = [b"\x80\x02X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes(), b"q\x000("].concat();
    bytes.extend(b"h\x00".repeat(100_000));
    bytes.extend(b"t.");
    let value = read(&bytes).unwrap();
    let (Value::Str(first), Value::Str(last)) = (&value.as_items().unwrap()[0], &value.as_items().unwrap()[99_999]) else {
        panic!("expected text")
    };
    assert!(Arc::ptr_eq(first, last));
}

#[test]
fn arguments_are_not_copied_by_each_call() {
    let mut bytes = b"\x80\x02(".to_vec();
    bytes.extend(b"N".repeat(1_000));
    bytes.extend(b"tq\x00cnumpy\nndarray\nq\x01(");
    bytes.extend(b"h\x01h\x00R".repeat(1_000));
    bytes.extend(b"t.");
    let value = read(&bytes).unwrap();
    let [first, .., last] = value.as_items().unwrap() else { panic!("expected two calls") };
    assert!(Arc::ptr_eq(&first.as_object().unwrap().args, &last.as_object().unwrap().args));
}

#[test]
fn what_is_no_array_of_numbers_is_refused_in_words() {
    let arrays = read(&golden("arrays-4.pkl")).unwrap();
    let reason = |value: &Value| value.to_array().unwrap_err();
    assert_eq!(reason(&Value::Int(1)), "expected a numpy array, found an integer");
    assert_eq!(
        reason(&read(b"ccollections\nOrderedDict\n)R.").unwrap()),
        "expected a numpy array, found an object of collections.OrderedDict"
    );
    let Value::Object(first) = &arrays.as_list().unwrap()[0] else { panic!("expected an object") };
    // The same array, but one more row than there are numbers.
    let [version, _, dtype, order, data] = first.state.as_ref().unwrap().as_items().unwrap() else { panic!("expected a state of five") };
    let shape = Value::Tuple(Arc::new([Value::Int(3), Value::Int(5)]));
    let state = [version.clone(), shape, dtype.clone(), order.clone(), data.clone()];
    let short = Object { state: Some(Value::Tuple(Arc::new(state))), ..first.as_ref().clone() };
    assert_eq!(reason(&Value::Object(Arc::new(short))), "a numpy array [3, 5] of `<f4`: expected 60 bytes, found 40");
}

#[test]
fn every_cut_is_an_error() {
    for name in goldens() {
        let bytes = golden(&name);
        // Cuts of long files are all alike.
        for length in (0..bytes.len()).filter(|length| *length < 600 || length % 7 == 0) {
            assert!(read(&bytes[..length]).is_err(), "{name} cut to {length}");
        }
    }
}

/// Reads damaged bytes, and everything that the result offers.
fn survives(bytes: &[u8]) {
    let Ok(value) = read(bytes) else { return };
    for item in value.as_items().into_iter().flatten() {
        for part in item.as_items().unwrap_or(std::slice::from_ref(item)) {
            if let Ok(array) = part.to_array() {
                let _may_be_refused = array.to_f32();
            }
        }
    }
    assert!(format!("{value:?}").len() < 1_000 * (bytes.len() + 1), "the result is far larger than the file");
}

#[test]
fn every_flipped_bit_of_a_short_pickle_is_survived() {
    for name in ["arrays-0.pkl", "arrays-5.pkl", "numpy-1.pkl", "python-2.pkl"] {
        let bytes = golden(name);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                survives(&flipped);
            }
        }
    }
}

proptest! {
    #[test]
    fn damage_is_survived(which in any::<prop::sample::Index>(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let names = goldens();
        let mut bytes = golden(&names[which.index(names.len())]);
        for (index, value) in changes {
            let at = index.index(bytes.len());
            bytes[at] = value;
        }
        survives(&bytes);
    }

    #[test]
    fn any_program_of_opcodes_is_survived(opcodes in prop::collection::vec(prop::sample::select(b"(.012JKMNQRb]a}ehqlst)u\x81\x85\x86\x87\x88\x8f\x90\x91\x92\x94ioc\n".as_slice()), 0..200)) {
        survives(&opcodes);
    }

    #[test]
    fn arrays_of_any_shape_are_read_back(rows in 0_usize..9, columns in 0_usize..9, seed in any::<u32>()) {
        let numbers: Vec<f32> = (0..rows * columns).map(|place| f32::from_bits(seed.wrapping_mul(place as u32 + 1))).collect();
        let mut bytes = Vec::new();
        write_f32_arrays([(rows, columns, numbers.as_slice())], &mut bytes).unwrap();
        let array = read(&bytes).unwrap().as_list().unwrap()[0].to_array().unwrap();
        prop_assert_eq!(&array.shape, &[rows, columns]);
        let bits = |numbers: &[f32]| numbers.iter().map(|number| number.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&array.to_f32().unwrap()), bits(&numbers));
    }
}

/// An array of Python objects, or of numbers, of a shape that may be a lie.
fn array_of(name: &str, shape: &[i64], data: Value) -> Value {
    let object = |callable: Value, args: Vec<Value>, state: Vec<Value>| {
        let state = Some(Value::Tuple(state.into()));
        Value::Object(Object { callable, args: args.into(), kwargs: None, state, items: [].into(), entries: [].into() }.into())
    };
    let global = |module: &str, name: &str| Value::Global { module: module.into(), name: name.into() };
    let dtype = object(global("numpy", "dtype"), vec![Value::Str(name.into())], vec![Value::Int(3), Value::Str("<".into())]);
    let shape = Value::Tuple(shape.iter().map(|length| Value::Int(*length)).collect());
    let state = vec![Value::Int(1), shape, dtype, Value::Bool(false), data];
    object(global("numpy._core.multiarray", "_reconstruct"), Vec::new(), state)
}

#[test]
fn arrays_of_objects_are_lists_as_deep_as_their_shape() {
    let numbers = |n: i64| Value::List((0..n).map(Value::Int).collect());
    let list = |items: &[Value]| Value::List(items.into());
    let ints = |items: &[i64]| Value::List(items.iter().copied().map(Value::Int).collect());
    assert_eq!(array_of("O8", &[3], numbers(3)).object_array(), Some(numbers(3)));
    assert_eq!(array_of("O8", &[2, 2], numbers(4)).object_array(), Some(list(&[ints(&[0, 1]), ints(&[2, 3])])));
    assert_eq!(array_of("O8", &[2, 0], numbers(0)).object_array(), Some(list(&[ints(&[]), ints(&[])])));
    for shape in [&[4][..], &[i64::MAX, 2], &[i64::MAX, 0], &[9, 9, 0], &[-1], &[]] {
        assert_eq!(array_of("O8", shape, numbers(0)).object_array(), None, "{shape:?}");
    }
    assert_eq!(array_of("f4", &[3], numbers(3)).object_array(), None);
}

#[test]
fn arrays_of_numbers_come_apart_along_their_first_axis() {
    let bytes = Value::Bytes((1_i16..=6).flat_map(i16::to_le_bytes).collect());
    let parts = array_of("i2", &[2, 3], bytes.clone()).array_items().unwrap();
    let parts: Vec<Vec<f32>> = parts.iter().map(|part| part.to_array().unwrap().to_f32().unwrap()).collect();
    assert_eq!(parts, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]);
    assert_eq!(array_of("i2", &[6], bytes).array_items().unwrap()[5], Value::Float(6.0));
    assert_eq!(array_of("i2", &[i64::MAX, 0], Value::Bytes([].into())).array_items(), None);
    assert_eq!(Value::Int(3).array_items(), None);
}
