//! The stack machine.
//!
//! Values that are memorised and changed afterwards (a list put into the memo before its items are appended) live in a
//! table and are referred to by place; the tree is made at the end, each value once, however often it is referred to. The
//! table grows by at most one value a byte and holds at most [`MAX_VALUES`]; every length is checked against the bytes that
//! are left. Nothing here recurses, and the result is at most [`MAX_DEPTH`] deep.

use std::{collections::HashMap, mem, sync::Arc};

use crate::{Error, Object, Value, opcode};

/// In the table. A state dict of 2,000 tensors has about 50,000 values, a proposal file of 120,000 images about 1,500,000.
const MAX_VALUES: usize = 30_000_000;
/// The most values of a result, counting shared values once for each reference, as a walk over it does.
const MAX_WALK: u64 = 200_000_000;
/// Python itself refuses to write more than about 1,000, its recursion limit.
const MAX_DEPTH: u16 = 1_000;
/// As in Python, for integers in decimal: reading them takes time by the square of their length.
const MAX_DIGITS: usize = 4_300;

type Place = u32;

/// A value, or one whose parts are in the table.
#[derive(Debug)]
enum Node {
    Done(Done),
    List(Vec<Place>),
    Tuple(Vec<Place>),
    Set(Vec<Place>),
    Dict(Vec<(Place, Place)>),
    Object(Box<Call>),
    Persistent(Place),
    /// Its parts are being built; a reference to it now is a cycle.
    Open,
}

#[derive(Debug)]
struct Done {
    value: Value,
    /// The depth of nested containers.
    depth: u16,
    /// The number of values, counting a shared value once for each reference.
    n_values: u64,
}

#[derive(Debug)]
struct Call {
    callable: Place,
    /// A tuple, or the list of what an old protocol put after a mark.
    args: Args,
    kwargs: Option<Place>,
    state: Option<Place>,
    items: Vec<Place>,
    entries: Vec<(Place, Place)>,
}

#[derive(Debug)]
enum Args {
    Tuple(Place),
    Marked(Vec<Place>),
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    opcode_at: usize,
    nodes: Vec<Node>,
    stack: Vec<Place>,
    marks: Vec<usize>,
    memo: HashMap<u64, Place>,
}

/// Reads one pickle; what follows its end is ignored, as Python does.
pub fn read(bytes: &[u8]) -> Result<Value, Error> {
    read_first(bytes).map(|(value, _)| value)
}

/// Reads the first of several pickles that follow each other; also returns where it ends.
pub fn read_first(bytes: &[u8]) -> Result<(Value, usize), Error> {
    let mut machine = Machine { bytes, at: 0, opcode_at: 0, nodes: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    let root = machine.run()?;
    let value = machine.make(root)?;
    Ok((value, machine.at))
}

impl<'a> Machine<'a> {
    fn error<T>(&self, problem: impl Into<String>) -> Result<T, Error> {
        let opcode = self.bytes.get(self.opcode_at).and_then(|byte| opcode::name(*byte));
        Err(Error { offset: self.opcode_at, opcode, problem: problem.into() })
    }

    fn take(&mut self, n_bytes: usize) -> Result<&'a [u8], Error> {
        match self.bytes.get(self.at..).and_then(|rest| rest.get(..n_bytes)) {
            Some(taken) => {
                self.at += n_bytes;
                Ok(taken)
            }
            None => self.error(format!("expected {n_bytes} more bytes, found {}: the file is cut short", self.bytes.len() - self.at)),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        Ok(self.take(N)?.try_into().expect("BUG: as many bytes were taken"))
    }

    fn u8(&mut self) -> Result<usize, Error> {
        Ok(usize::from(self.array::<1>()?[0]))
    }

    fn u32(&mut self) -> Result<usize, Error> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    fn u64(&mut self) -> Result<usize, Error> {
        let length = u64::from_le_bytes(self.array()?);
        usize::try_from(length).or_else(|_| self.error(format!("a length of {length} bytes")))
    }

    fn raw_line(&mut self) -> Result<&'a [u8], Error> {
        let rest = &self.bytes[self.at..];
        let Some(length) = rest.iter().position(|byte| *byte == b'\n') else {
            return self.error("expected the end of a line: the file is cut short");
        };
        self.at += length + 1;
        Ok(&rest[..length])
    }

    fn line(&mut self) -> Result<&'a str, Error> {
        let line = self.raw_line()?;
        self.text(line)
    }

    fn text<'b>(&self, bytes: &'b [u8]) -> Result<&'b str, Error> {
        str::from_utf8(bytes).or_else(|error| self.error(format!("expected UTF-8 text, found other bytes after {}", error.valid_up_to())))
    }

    /// Puts a value into the table, but not onto the stack.
    fn keep(&mut self, node: Node) -> Result<Place, Error> {
        if self.nodes.len() >= MAX_VALUES {
            return self.error(format!("more than {MAX_VALUES} values"));
        }
        self.nodes.push(node);
        Ok((self.nodes.len() - 1) as Place)
    }

    fn push(&mut self, node: Node) -> Result<(), Error> {
        let place = self.keep(node)?;
        self.stack.push(place);
        Ok(())
    }

    fn push_leaf(&mut self, value: Value) -> Result<(), Error> {
        self.push(Node::leaf(value))
    }

    fn push_global(&mut self, module: Arc<str>, name: Arc<str>) -> Result<(), Error> {
        self.push_leaf(Value::Global { module, name })
    }

    fn node(&mut self, place: Place) -> &mut Node {
        &mut self.nodes[place as usize]
    }

    /// Where the values above the last mark begin.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Place, Error> {
        match self.top() {
            Ok(place) => {
                self.stack.pop();
                Ok(place)
            }
            error @ Err(_) => error,
        }
    }

    fn top(&self) -> Result<Place, Error> {
        match self.stack.last() {
            Some(place) if self.stack.len() > self.floor() => Ok(*place),
            _ => self.error("expected a value on the stack, found none"),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Place>, Error> {
        match self.marks.pop() {
            Some(mark) => Ok(self.stack.split_off(mark)),
            None => self.error("expected a mark on the stack, found none"),
        }
    }

    fn pop_text(&mut self) -> Result<Arc<str>, Error> {
        let place = self.pop()?;
        match self.node(place) {
            Node::Done(Done { value: Value::Str(text), .. }) => Ok(Arc::clone(text)),
            _ => self.error("expected text on the stack, found another value"),
        }
    }

    fn pop_args(&mut self) -> Result<Args, Error> {
        let place = self.pop()?;
        match self.node(place) {
            Node::Tuple(_) => Ok(Args::Tuple(place)),
            _ => self.error("expected a tuple of arguments on the stack, found another value"),
        }
    }

    fn put(&mut self, key: u64) -> Result<(), Error> {
        let place = self.top()?;
        if self.memo.len() >= MAX_VALUES {
            return self.error(format!("more than {MAX_VALUES} memorised values"));
        }
        self.memo.insert(key, place);
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Result<(), Error> {
        match self.memo.get(&key) {
            Some(place) => self.stack.push(*place),
            None => return self.error(format!("expected a memorised value {key}, found none")),
        }
        Ok(())
    }

    fn call(&mut self, callable: Place, args: Args, kwargs: Option<Place>) -> Result<(), Error> {
        self.push(Node::Object(Box::new(Call { callable, args, kwargs, state: None, items: Vec::new(), entries: Vec::new() })))
    }

    fn append(&mut self, new: &[Place]) -> Result<(), Error> {
        let target = self.top()?;
        match self.node(target) {
            Node::List(items) | Node::Set(items) => items.extend(new),
            Node::Object(call) => call.items.extend(new),
            _ => return self.error("expected a list or set to append to, found another value"),
        }
        Ok(())
    }

    fn set_items(&mut self, new: &[Place]) -> Result<(), Error> {
        let target = self.top()?;
        let (pairs, rest) = new.as_chunks::<2>();
        if !rest.is_empty() {
            return self.error(format!("expected pairs of keys and values, found {} values", new.len()));
        }
        let pairs = pairs.iter().map(|[key, value]| (*key, *value));
        match self.node(target) {
            Node::Dict(entries) => entries.extend(pairs),
            Node::Object(call) => call.entries.extend(pairs),
            _ => return self.error("expected a dict to fill, found another value"),
        }
        Ok(())
    }

    fn long(&mut self, length: usize) -> Result<(), Error> {
        let bytes = self.take(length)?;
        if length > 8 {
            return self.push_leaf(Value::BigInt(bytes.into()));
        }
        let fill = if bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
        let mut full = [fill; 8];
        full[..length].copy_from_slice(bytes);
        self.push_leaf(Value::Int(i64::from_le_bytes(full)))
    }

    /// An integer in decimal.
    fn decimal(&self, line: &str) -> Result<Value, Error> {
        if let Ok(value) = line.parse() {
            return Ok(Value::Int(value));
        }
        match two_complement(line) {
            Some(bytes) => Ok(Value::BigInt(bytes.into())),
            None => self.error(format!("expected an integer of at most {MAX_DIGITS} digits, found `{}`", excerpt(line))),
        }
    }

    /// A key of the memo, in decimal.
    fn line_key(&mut self) -> Result<u64, Error> {
        let line = self.line()?;
        line.parse().or_else(|_| self.error(format!("expected a number, found `{}`", excerpt(line))))
    }

    fn run(&mut self) -> Result<Place, Error> {
        loop {
            self.opcode_at = self.at;
            let opcode = self.array::<1>()?[0];
            match opcode {
                b'.' => return self.pop(),
                0x80 => {
                    let protocol = self.u8()?;
                    if protocol > 5 {
                        return self.error(format!("protocol {protocol}; this reader knows up to 5"));
                    }
                }
                0x95 => {
                    let length = self.u64()?;
                    let n_left = self.bytes.len() - self.at;
                    if length > n_left {
                        return self.error(format!("expected a frame of {length} bytes, found {n_left}: the file is cut short"));
                    }
                }
                b'(' => self.marks.push(self.stack.len()),
                b'0' => {
                    if self.stack.len() > self.floor() {
                        self.stack.pop();
                    } else if self.marks.pop().is_none() {
                        return self.error("expected a value or a mark on the stack, found none");
                    }
                }
                b'1' => drop(self.pop_to_mark()?),
                b'2' => {
                    let top = self.top()?;
                    self.stack.push(top);
                }
                b'N' => self.push_leaf(Value::None)?,
                0x88 => self.push_leaf(Value::Bool(true))?,
                0x89 => self.push_leaf(Value::Bool(false))?,
                b'I' => {
                    let value = match self.line()? {
                        "00" => Value::Bool(false),
                        "01" => Value::Bool(true),
                        line => self.decimal(line)?,
                    };
                    self.push_leaf(value)?;
                }
                b'L' => {
                    let line = self.line()?;
                    let value = self.decimal(line.strip_suffix('L').unwrap_or(line))?;
                    self.push_leaf(value)?;
                }
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?);
                    self.push_leaf(Value::Int(i64::from(value)))?;
                }
                b'K' => {
                    let value = self.u8()?;
                    self.push_leaf(Value::Int(value as i64))?;
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.array()?);
                    self.push_leaf(Value::Int(i64::from(value)))?;
                }
                0x8a => {
                    let length = self.u8()?;
                    self.long(length)?;
                }
                0x8b => {
                    let length = self.u32()?;
                    self.long(length)?;
                }
                b'F' => {
                    let line = self.line()?;
                    let value = line.parse().or_else(|_| self.error(format!("expected a number, found `{}`", excerpt(line))))?;
                    self.push_leaf(Value::Float(value))?;
                }
                b'G' => {
                    let value = f64::from_be_bytes(self.array()?);
                    self.push_leaf(Value::Float(value))?;
                }
                b'V' => {
                    // Characters below 256 are bytes, others are escaped.
                    let line: String = self.raw_line()?.iter().copied().map(char::from).collect();
                    let text = self.raw_unicode_escape(&line)?;
                    self.push_leaf(Value::Str(text.into()))?;
                }
                b'S' => {
                    let line = self.line()?;
                    let bytes = self.quoted(line)?;
                    self.push_python2_str(&bytes)?;
                }
                0x8c | b'X' | 0x8d => {
                    let length = self.length(opcode, 0x8c, b'X')?;
                    let bytes = self.take(length)?;
                    let text = self.text(bytes)?;
                    self.push_leaf(Value::Str(text.into()))?;
                }
                b'U' | b'T' => {
                    let length = self.length(opcode, b'U', b'T')?;
                    let bytes = self.take(length)?;
                    self.push_python2_str(bytes)?;
                }
                b'C' | b'B' | 0x8e => {
                    let length = self.length(opcode, b'C', b'B')?;
                    let bytes = self.take(length)?;
                    self.push_leaf(Value::Bytes(bytes.into()))?;
                }
                0x96 => {
                    let length = self.u64()?;
                    let bytes = self.take(length)?;
                    self.push_leaf(Value::Bytes(bytes.into()))?;
                }
                b']' => self.push(Node::List(Vec::new()))?,
                b'}' => self.push(Node::Dict(Vec::new()))?,
                b')' => self.push(Node::Tuple(Vec::new()))?,
                0x8f => self.push(Node::Set(Vec::new()))?,
                b'l' => {
                    let items = self.pop_to_mark()?;
                    self.push(Node::List(items))?;
                }
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(Node::Tuple(items))?;
                }
                0x91 => {
                    let items = self.pop_to_mark()?;
                    self.push(Node::Set(items))?;
                }
                b'd' => {
                    let items = self.pop_to_mark()?;
                    self.push(Node::Dict(Vec::new()))?;
                    self.set_items(&items)?;
                }
                0x85..=0x87 => {
                    let mut items = (0x85..=opcode).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
                    items.reverse();
                    self.push(Node::Tuple(items))?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(&[item])?;
                }
                b'e' | 0x90 => {
                    let items = self.pop_to_mark()?;
                    self.append(&items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set_items(&[key, value])?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.set_items(&items)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push_global(module.into(), name.into())?;
                }
                0x93 => {
                    let (name, module) = (self.pop_text()?, self.pop_text()?);
                    self.push_global(module, name)?;
                }
                b'R' | 0x81 => {
                    let args = self.pop_args()?;
                    let callable = self.pop()?;
                    self.call(callable, args, None)?;
                }
                0x92 => {
                    let (kwargs, args, callable) = (self.pop()?, self.pop_args()?, self.pop()?);
                    self.call(callable, args, Some(kwargs))?;
                }
                b'i' => {
                    let (module, name) = (self.line()?, self.line()?);
                    let args = self.pop_to_mark()?;
                    let callable = self.keep(Node::leaf(Value::Global { module: module.into(), name: name.into() }))?;
                    self.call(callable, Args::Marked(args), None)?;
                }
                b'o' => {
                    let mut args = self.pop_to_mark()?;
                    if args.is_empty() {
                        return self.error("expected a class to make an object of, found none");
                    }
                    let callable = args.remove(0);
                    self.call(callable, Args::Marked(args), None)?;
                }
                b'b' => {
                    let new = self.pop()?;
                    let target = self.top()?;
                    match self.node(target) {
                        Node::Object(call) => call.state = Some(new),
                        _ => return self.error("expected an object to give a state to, found another value"),
                    }
                }
                b'P' => {
                    let id = self.line()?;
                    let id = self.keep(Node::leaf(Value::Str(id.into())))?;
                    self.push(Node::Persistent(id))?;
                }
                b'Q' => {
                    let id = self.pop()?;
                    self.push(Node::Persistent(id))?;
                }
                b'p' => {
                    let key = self.line_key()?;
                    self.put(key)?;
                }
                b'q' => {
                    let key = self.u8()?;
                    self.put(key as u64)?;
                }
                b'r' => {
                    let key = self.u32()?;
                    self.put(key as u64)?;
                }
                0x94 => self.put(self.memo.len() as u64)?,
                b'g' => {
                    let key = self.line_key()?;
                    self.recall(key)?;
                }
                b'h' => {
                    let key = self.u8()?;
                    self.recall(key as u64)?;
                }
                b'j' => {
                    let key = self.u32()?;
                    self.recall(key as u64)?;
                }
                0x82..=0x84 => return self.error("an extension code, which only Python's registry could explain"),
                0x97 | 0x98 => return self.error("an out-of-band buffer, which is not in the file"),
                other => return self.error(format!("expected an opcode, found 0x{other:02x}: not a pickle, or damaged")),
            }
        }
    }

    /// The length of a counted string: one byte, four, or eight.
    fn length(&mut self, opcode: u8, one: u8, four: u8) -> Result<usize, Error> {
        match opcode {
            opcode if opcode == one => self.u8(),
            opcode if opcode == four => self.u32(),
            _ => self.u64(),
        }
    }

    /// A `str` of Python 2 is text where it can be, bytes otherwise.
    fn push_python2_str(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.push_leaf(match str::from_utf8(bytes) {
            Ok(text) => Value::Str(text.into()),
            Err(_) => Value::Bytes(bytes.into()),
        })
    }

    fn raw_unicode_escape(&self, line: &str) -> Result<String, Error> {
        let mut text = String::new();
        let mut rest = line;
        while let Some(at) = rest.find('\\') {
            text.push_str(&rest[..at]);
            let n_digits = match rest.as_bytes().get(at + 1) {
                Some(b'u') => 4,
                Some(b'U') => 8,
                _ => {
                    text.push('\\');
                    rest = &rest[at + 1..];
                    continue;
                }
            };
            let digits = rest.get(at + 2..at + 2 + n_digits);
            let character = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()).and_then(char::from_u32);
            match character {
                Some(character) => text.push(character),
                None => return self.error(format!("expected an escaped character in `{}`", excerpt(line))),
            }
            rest = &rest[at + 2 + n_digits..];
        }
        text.push_str(rest);
        Ok(text)
    }

    /// The bytes of a quoted literal of protocol 0.
    fn quoted(&self, line: &str) -> Result<Vec<u8>, Error> {
        let line = line.trim();
        let inner = ['\'', '"'].into_iter().find_map(|quote| line.strip_prefix(quote)?.strip_suffix(quote));
        let Some(inner) = inner else { return self.error(format!("expected a quoted string, found `{}`", excerpt(line))) };
        let mut bytes = Vec::new();
        let mut rest = inner.bytes();
        while let Some(byte) = rest.next() {
            if byte != b'\\' {
                bytes.push(byte);
                continue;
            }
            bytes.push(match rest.next() {
                Some(b'n') => b'\n',
                Some(b't') => b'\t',
                Some(b'r') => b'\r',
                Some(b'x') => {
                    let digits = [rest.next().unwrap_or(b'?'), rest.next().unwrap_or(b'?')];
                    let digits = std::str::from_utf8(&digits).unwrap_or("??");
                    u8::from_str_radix(digits, 16)
                        .or_else(|_| self.error(format!("expected two digits after \\x in `{}`", excerpt(line))))?
                }
                Some(other) => other,
                None => return self.error("a string that ends in a backslash"),
            });
        }
        Ok(bytes)
    }

    /// Builds the value at a place, and before it each of its parts once.
    fn make(&mut self, root: Place) -> Result<Value, Error> {
        enum Step {
            Enter(Place),
            Leave,
        }
        let mut steps = vec![Step::Enter(root)];
        let mut open = Vec::new();
        while let Some(step) = steps.pop() {
            match step {
                Step::Enter(place) => {
                    if matches!(self.node(place), Node::Done(_) | Node::Open) {
                        continue;
                    }
                    let node = mem::replace(self.node(place), Node::Open);
                    steps.push(Step::Leave);
                    node.parts(|part| steps.push(Step::Enter(part)));
                    open.push((place, node));
                }
                Step::Leave => {
                    let (place, node) = open.pop().expect("BUG: what is left was entered");
                    let done = self.join(node)?;
                    *self.node(place) = Node::Done(done);
                }
            }
        }
        match self.node(root) {
            Node::Done(done) => Ok(done.value.clone()),
            _ => panic!("BUG: the root was made last"),
        }
    }

    /// Builds a value from its parts, each of which is built or, in a cycle, being built.
    fn join(&self, node: Node) -> Result<Done, Error> {
        let (mut depth, mut n_values) = (0_u16, 1_u64);
        let mut part = |place: Place| match &self.nodes[place as usize] {
            Node::Done(done) => {
                depth = depth.max(done.depth);
                n_values = n_values.saturating_add(done.n_values);
                done.value.clone()
            }
            _ => Value::Circle,
        };
        fn all(places: &[Place], part: &mut impl FnMut(Place) -> Value) -> Arc<[Value]> {
            places.iter().map(|place| part(*place)).collect()
        }
        fn pairs(places: &[(Place, Place)], part: &mut impl FnMut(Place) -> Value) -> Arc<[(Value, Value)]> {
            places.iter().map(|(key, value)| (part(*key), part(*value))).collect()
        }
        let value = match node {
            Node::List(items) => Value::List(all(&items, &mut part)),
            Node::Tuple(items) => Value::Tuple(all(&items, &mut part)),
            Node::Set(items) => Value::Set(all(&items, &mut part)),
            Node::Dict(entries) => Value::Dict(pairs(&entries, &mut part)),
            Node::Persistent(id) => Value::Persistent(Arc::new(part(id))),
            Node::Object(call) => simplified(Object {
                callable: part(call.callable),
                args: match call.args {
                    Args::Tuple(place) => match part(place) {
                        Value::Tuple(args) => args,
                        // A call among its own arguments.
                        _ => Arc::new([Value::Circle]),
                    },
                    Args::Marked(places) => all(&places, &mut part),
                },
                kwargs: call.kwargs.map(&mut part),
                state: call.state.map(&mut part),
                items: all(&call.items, &mut part),
                entries: pairs(&call.entries, &mut part),
            }),
            Node::Done(_) | Node::Open => panic!("BUG: made twice"),
        };
        let end = |problem| Err(Error { offset: self.opcode_at, opcode: Some("STOP"), problem });
        if depth >= MAX_DEPTH {
            return end(format!("expected values at most {MAX_DEPTH} deep, found deeper ones"));
        }
        if n_values > MAX_WALK {
            return end(format!("expected at most {MAX_WALK} values, found more, by references to references"));
        }
        Ok(Done { value, depth: depth + 1, n_values })
    }
}

impl Node {
    fn leaf(value: Value) -> Self {
        Self::Done(Done { value, depth: 0, n_values: 1 })
    }

    fn parts(&self, mut enter: impl FnMut(Place)) {
        match self {
            Self::List(items) | Self::Tuple(items) | Self::Set(items) => items.iter().copied().for_each(enter),
            Self::Dict(entries) => entries.iter().flat_map(|(key, value)| [*key, *value]).for_each(enter),
            Self::Persistent(id) => enter(*id),
            Self::Object(call) => {
                let Call { callable, args, kwargs, state, items, entries } = call.as_ref();
                let args = match args {
                    Args::Tuple(place) => std::slice::from_ref(place),
                    Args::Marked(places) => places,
                };
                let entries = entries.iter().flat_map(|(key, value)| [key, value]);
                [callable].into_iter().chain(args).chain(kwargs).chain(state).chain(items).chain(entries).copied().for_each(enter);
            }
            Self::Done(_) | Self::Open => {}
        }
    }
}

/// Converts values that older protocols can only write as calls.
fn simplified(mut object: Object) -> Value {
    let Value::Global { module, name } = &object.callable else { return Value::Object(Arc::new(object)) };
    let is_builtin = matches!(&**module, "__builtin__" | "builtins");
    let is_bare = object.kwargs.is_none() && object.state.is_none() && object.items.is_empty() && object.entries.is_empty();
    let simple = match (&**name, object.args.as_ref()) {
        _ if !is_bare => None,
        // Protocols 0 to 2 have no bytes: Python 3 writes text of Latin-1 characters and how to encode them.
        ("encode", [Value::Str(text), Value::Str(_)]) if **module == *"_codecs" => latin1(text),
        ("bytes" | "bytearray", []) if is_builtin => Some(Value::Bytes(Arc::new([]))),
        ("bytes" | "bytearray", [bytes @ Value::Bytes(_)]) if is_builtin => Some(bytes.clone()),
        ("bytearray", [Value::Str(text), Value::Str(_)]) if is_builtin => latin1(text),
        ("set" | "frozenset", [Value::List(items)]) if is_builtin => Some(Value::Set(Arc::clone(items))),
        // Python 2 gives the items to the constructor.
        ("OrderedDict", [Value::List(items)]) if **module == *"collections" => {
            let pair = |item: &Value| match item.as_items() {
                Some([key, value]) => Some((key.clone(), value.clone())),
                _ => None,
            };
            if let Some(entries) = items.iter().map(pair).collect() {
                object.entries = entries;
                object.args = Arc::new([]);
            }
            None
        }
        _ => None,
    };
    simple.unwrap_or_else(|| Value::Object(Arc::new(object)))
}

fn latin1(text: &str) -> Option<Value> {
    let bytes: Option<Vec<u8>> = text.chars().map(|character| u8::try_from(u32::from(character)).ok()).collect();
    bytes.map(|bytes| Value::Bytes(bytes.into()))
}

/// An integer in decimal as little-endian two's complement.
fn two_complement(decimal: &str) -> Option<Vec<u8>> {
    let digits = decimal.strip_prefix('-').unwrap_or(decimal);
    if digits.is_empty() || digits.len() > MAX_DIGITS || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let mut limbs: Vec<u32> = Vec::new();
    for digit in digits.bytes() {
        let mut carry = u64::from(digit - b'0');
        for limb in &mut limbs {
            carry += u64::from(*limb) * 10;
            *limb = carry as u32;
            carry >>= 32;
        }
        if carry > 0 {
            limbs.push(carry as u32);
        }
    }
    let mut bytes: Vec<u8> = limbs.iter().flat_map(|limb| limb.to_le_bytes()).collect();
    bytes.push(0);
    if decimal.starts_with('-') {
        let mut carry = true;
        for byte in &mut bytes {
            (*byte, carry) = (!*byte).overflowing_add(u8::from(carry));
        }
    }
    // As short as Python writes it.
    while let [.., before, last] = bytes.as_slice() {
        if (*last == 0 && before & 0x80 == 0) || (*last == 0xff && before & 0x80 != 0) {
            bytes.pop();
        } else {
            break;
        }
    }
    Some(bytes)
}

/// The beginning of a line, for messages.
fn excerpt(line: &str) -> String {
    line.chars().take(40).collect()
}
