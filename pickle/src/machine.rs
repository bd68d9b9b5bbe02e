//! The stack machine.
//!
//! Values that are memorised and changed afterwards (a list put into the memo before its items are appended) live in a
//! table and are referred to by place; the tree is made at the end. A file cannot make that tree larger than
//! [`MAX_VALUES`] values or deeper than [`MAX_DEPTH`], and every length is checked against the bytes that are left.

use std::collections::HashMap;

use crate::{Error, Object, Value};

/// A state dict of 2,000 tensors has about 50,000 values, a proposal file of 120,000 images about 3,000,000.
const MAX_VALUES: usize = 100_000_000;
const MAX_DEPTH: usize = 200;

type Place = usize;

/// A value whose parts are in the table.
#[derive(Debug, Clone)]
enum Node {
    Leaf(Value),
    List(Vec<Place>),
    Tuple(Vec<Place>),
    Set(Vec<Place>),
    Dict(Vec<(Place, Place)>),
    Object { callable: Place, args: Vec<Place>, state: Option<Place>, items: Vec<Place>, entries: Vec<(Place, Place)> },
    Persistent(Place),
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
    let mut machine = Machine { bytes, at: 0, opcode_at: 0, nodes: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    let root = machine.run()?;
    let mut n_left = MAX_VALUES;
    machine.tree(root, 0, &mut n_left)
}

impl<'a> Machine<'a> {
    fn error<T>(&self, problem: impl Into<String>) -> Result<T, Error> {
        Err(Error { offset: self.opcode_at, problem: problem.into() })
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
        let Some(length) = rest.iter().position(|byte| *byte == b'\n') else { return self.error("expected the end of a line") };
        self.at += length + 1;
        Ok(&rest[..length])
    }

    fn line(&mut self) -> Result<String, Error> {
        let line = self.raw_line()?;
        self.text(line)
    }

    fn text(&self, bytes: &[u8]) -> Result<String, Error> {
        String::from_utf8(bytes.to_vec()).or_else(|_| self.error("expected UTF-8 text"))
    }

    fn push(&mut self, node: Node) {
        self.nodes.push(node);
        self.stack.push(self.nodes.len() - 1);
    }

    fn push_leaf(&mut self, value: Value) {
        self.push(Node::Leaf(value));
    }

    fn pop(&mut self) -> Result<Place, Error> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return self.error("expected a value on the stack, found none");
        }
        Ok(self.stack.pop().expect("BUG: the stack is not empty"))
    }

    fn top(&self) -> Result<Place, Error> {
        self.stack.last().copied().map_or_else(|| self.error("expected a value on the stack, found none"), Ok)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Place>, Error> {
        match self.marks.pop() {
            Some(mark) => Ok(self.stack.split_off(mark)),
            None => self.error("expected a mark on the stack, found none"),
        }
    }

    fn pop_text(&mut self) -> Result<String, Error> {
        let place = self.pop()?;
        match &self.nodes[place] {
            Node::Leaf(Value::Str(text)) => Ok(text.clone()),
            _ => self.error("expected text on the stack"),
        }
    }

    fn pop_args(&mut self) -> Result<Vec<Place>, Error> {
        let place = self.pop()?;
        match &self.nodes[place] {
            Node::Tuple(args) => Ok(args.clone()),
            _ => self.error("expected a tuple of arguments"),
        }
    }

    fn put(&mut self, key: u64) -> Result<(), Error> {
        let place = self.top()?;
        self.memo.insert(key, place);
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Result<(), Error> {
        match self.memo.get(&key) {
            Some(place) => self.stack.push(*place),
            None => return self.error(format!("no value was memorised as {key}")),
        }
        Ok(())
    }

    fn call(&mut self, callable: Place, args: Vec<Place>) {
        self.push(Node::Object { callable, args, state: None, items: Vec::new(), entries: Vec::new() });
    }

    fn append(&mut self, new: Vec<Place>) -> Result<(), Error> {
        let target = self.top()?;
        match &mut self.nodes[target] {
            Node::List(items) | Node::Set(items) | Node::Object { items, .. } => items.extend(new),
            _ => return self.error("expected a list to append to"),
        }
        Ok(())
    }

    fn set_items(&mut self, new: &[Place]) -> Result<(), Error> {
        let target = self.top()?;
        if !new.len().is_multiple_of(2) {
            return self.error("expected pairs of keys and values");
        }
        let pairs = new.chunks_exact(2).map(|pair| (pair[0], pair[1]));
        match &mut self.nodes[target] {
            Node::Dict(entries) | Node::Object { entries, .. } => entries.extend(pairs),
            _ => return self.error("expected a dict to fill"),
        }
        Ok(())
    }

    fn long(&mut self, length: usize) -> Result<(), Error> {
        let bytes = self.take(length)?;
        if length > 8 {
            self.push_leaf(Value::BigInt(bytes.to_vec()));
            return Ok(());
        }
        let fill = if bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
        let mut full = [fill; 8];
        full[..length].copy_from_slice(bytes);
        self.push_leaf(Value::Int(i64::from_le_bytes(full)));
        Ok(())
    }

    fn decimal(&mut self) -> Result<(), Error> {
        let line = self.line()?;
        let value = match line.trim_end_matches('L') {
            "00" => Value::Bool(false),
            "01" => Value::Bool(true),
            number => number.parse().map(Value::Int).or_else(|_| self.error(format!("expected an integer, found `{line}`")))?,
        };
        self.push_leaf(value);
        Ok(())
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
                0x95 => drop(self.take(8)?),
                b'(' => self.marks.push(self.stack.len()),
                b'0' => {
                    if self.stack.len() > self.marks.last().copied().unwrap_or(0) {
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
                b'N' => self.push_leaf(Value::None),
                0x88 => self.push_leaf(Value::Bool(true)),
                0x89 => self.push_leaf(Value::Bool(false)),
                b'I' | b'L' => self.decimal()?,
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?);
                    self.push_leaf(Value::Int(i64::from(value)));
                }
                b'K' => {
                    let value = self.u8()?;
                    self.push_leaf(Value::Int(value as i64));
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.array()?);
                    self.push_leaf(Value::Int(i64::from(value)));
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
                    let value = line.parse().or_else(|_| self.error(format!("expected a number, found `{line}`")))?;
                    self.push_leaf(Value::Float(value));
                }
                b'G' => {
                    let value = f64::from_be_bytes(self.array()?);
                    self.push_leaf(Value::Float(value));
                }
                b'V' => {
                    // Characters below 256 are bytes, others are escaped.
                    let line: String = self.raw_line()?.iter().copied().map(char::from).collect();
                    let text = self.raw_unicode_escape(&line)?;
                    self.push_leaf(Value::Str(text));
                }
                b'S' => {
                    let line = self.line()?;
                    let bytes = self.quoted(&line)?;
                    self.push_python2_str(bytes);
                }
                0x8c | b'X' | 0x8d => {
                    let length = self.length(opcode, 0x8c, b'X')?;
                    let bytes = self.take(length)?;
                    let text = self.text(bytes)?;
                    self.push_leaf(Value::Str(text));
                }
                b'U' | b'T' => {
                    let length = self.length(opcode, b'U', b'T')?;
                    let bytes = self.take(length)?.to_vec();
                    self.push_python2_str(bytes);
                }
                b'C' | b'B' | 0x8e => {
                    let length = self.length(opcode, b'C', b'B')?;
                    let bytes = self.take(length)?.to_vec();
                    self.push_leaf(Value::Bytes(bytes));
                }
                0x96 => {
                    let length = self.u64()?;
                    let bytes = self.take(length)?.to_vec();
                    self.push_leaf(Value::Bytes(bytes));
                }
                b']' => self.push(Node::List(Vec::new())),
                b'}' => self.push(Node::Dict(Vec::new())),
                b')' => self.push(Node::Tuple(Vec::new())),
                0x8f => self.push(Node::Set(Vec::new())),
                b'l' => {
                    let items = self.pop_to_mark()?;
                    self.push(Node::List(items));
                }
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(Node::Tuple(items));
                }
                0x91 => {
                    let items = self.pop_to_mark()?;
                    self.push(Node::Set(items));
                }
                b'd' => {
                    let items = self.pop_to_mark()?;
                    self.push(Node::Dict(Vec::new()));
                    self.set_items(&items)?;
                }
                0x85..=0x87 => {
                    let mut items = (0x85..=opcode).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
                    items.reverse();
                    self.push(Node::Tuple(items));
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' | 0x90 => {
                    let items = self.pop_to_mark()?;
                    self.append(items)?;
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
                    self.push_leaf(Value::Global { module, name });
                }
                0x93 => {
                    let (name, module) = (self.pop_text()?, self.pop_text()?);
                    self.push_leaf(Value::Global { module, name });
                }
                b'R' | 0x81 => {
                    let args = self.pop_args()?;
                    let callable = self.pop()?;
                    self.call(callable, args);
                }
                0x92 => {
                    let (kwargs, mut args) = (self.pop()?, self.pop_args()?);
                    args.push(kwargs);
                    let callable = self.pop()?;
                    self.call(callable, args);
                }
                b'i' => {
                    let (module, name) = (self.line()?, self.line()?);
                    let args = self.pop_to_mark()?;
                    self.nodes.push(Node::Leaf(Value::Global { module, name }));
                    let callable = self.nodes.len() - 1;
                    self.call(callable, args);
                }
                b'o' => {
                    let mut args = self.pop_to_mark()?;
                    if args.is_empty() {
                        return self.error("expected a class to make an object of, found none");
                    }
                    let callable = args.remove(0);
                    self.call(callable, args);
                }
                b'b' => {
                    let new = self.pop()?;
                    let target = self.top()?;
                    match &mut self.nodes[target] {
                        Node::Object { state, .. } => *state = Some(new),
                        _ => return self.error("expected an object to give a state to"),
                    }
                }
                b'P' => {
                    let id = self.line()?;
                    self.nodes.push(Node::Leaf(Value::Str(id)));
                    let id = self.nodes.len() - 1;
                    self.push(Node::Persistent(id));
                }
                b'Q' => {
                    let id = self.pop()?;
                    self.push(Node::Persistent(id));
                }
                b'p' => {
                    let line = self.line()?;
                    let key = line.parse().or_else(|_| self.error(format!("expected a number, found `{line}`")))?;
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
                    let line = self.line()?;
                    let key = line.parse().or_else(|_| self.error(format!("expected a number, found `{line}`")))?;
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
    fn push_python2_str(&mut self, bytes: Vec<u8>) {
        let value = match String::from_utf8(bytes) {
            Ok(text) => Value::Str(text),
            Err(error) => Value::Bytes(error.into_bytes()),
        };
        self.push_leaf(value);
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
                None => return self.error(format!("expected an escaped character in `{line}`")),
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
        let Some(inner) = inner else { return self.error(format!("expected a quoted string, found `{line}`")) };
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
                    u8::from_str_radix(digits, 16).or_else(|_| self.error(format!("expected two digits after \\x in `{line}`")))?
                }
                Some(other) => other,
                None => return self.error("a string that ends in a backslash"),
            });
        }
        Ok(bytes)
    }

    fn tree(&self, place: Place, depth: usize, n_left: &mut usize) -> Result<Value, Error> {
        if depth > MAX_DEPTH {
            return Err(Error { offset: self.at, problem: format!("values nested more than {MAX_DEPTH} deep, or in a circle") });
        }
        *n_left = match n_left.checked_sub(1) {
            Some(n_left) => n_left,
            None => return Err(Error { offset: self.at, problem: format!("more than {MAX_VALUES} values") }),
        };
        let mut branch = |place: &Place| self.tree(*place, depth + 1, n_left);
        Ok(match &self.nodes[place] {
            Node::Leaf(value) => value.clone(),
            Node::List(items) => Value::List(items.iter().map(branch).collect::<Result<_, _>>()?),
            Node::Tuple(items) => Value::Tuple(items.iter().map(branch).collect::<Result<_, _>>()?),
            Node::Set(items) => Value::Set(items.iter().map(branch).collect::<Result<_, _>>()?),
            Node::Dict(entries) => {
                Value::Dict(entries.iter().map(|(key, value)| Ok((branch(key)?, branch(value)?))).collect::<Result<_, Error>>()?)
            }
            Node::Object { callable, args, state, items, entries } => Value::Object(Box::new(Object {
                callable: branch(callable)?,
                args: args.iter().map(&mut branch).collect::<Result<_, _>>()?,
                state: state.as_ref().map(&mut branch).transpose()?,
                items: items.iter().map(&mut branch).collect::<Result<_, _>>()?,
                entries: entries.iter().map(|(key, value)| Ok((branch(key)?, branch(value)?))).collect::<Result<_, Error>>()?,
            })),
            Node::Persistent(id) => Value::Persistent(Box::new(branch(id)?)),
        })
    }
}
