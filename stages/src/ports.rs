//! The typed inputs and outputs of a stage.

use std::{collections::BTreeMap, marker::PhantomData};

use ovenbird_cache::inputs::InputFile;

use crate::{Error, Result};

/// A kind of input or output, as stages read it.
pub trait Artifact: Sized {
    /// The name of the kind.
    const KIND: &'static str;
    /// File extensions, in lower case; `/` stands for a folder.
    const EXTENSIONS: &'static [&'static str];
    /// What a user's file must be, worded to follow "give".
    const SHAPE: &'static str;

    /// Opens the port's files. Large contents are read later, piece by piece.
    fn open(files: &[InputFile]) -> Result<Self>;
}

/// Whether an input may be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// It must be given.
    Required,
    /// It may be left out.
    Optional,
}

/// A port as the planner sees it.
#[derive(Debug, Clone, Copy)]
pub struct PortInfo {
    /// Its name under `in:`, or after the dot in `stage.output`.
    pub name: &'static str,
    /// The kind of its content, such as `features`; outputs connect to inputs of the same kind.
    pub kind: &'static str,
    /// Whether it may be left out (inputs).
    pub presence: Presence,
    /// File extensions, in lower case; `/` stands for a folder.
    pub extensions: &'static [&'static str],
    /// See [`Artifact::SHAPE`].
    pub shape: &'static str,
    /// Documentation: shapes, units, order.
    pub doc: &'static str,
}

/// An input port. `T` is the type that a stage reads.
#[derive(Debug)]
pub struct In<T> {
    info: PortInfo,
    kind: PhantomData<fn() -> T>,
}

// Deriving would require the same of `T`.
impl<T> Clone for In<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for In<T> {}

impl<T: Artifact> In<T> {
    /// A port that must be given.
    pub const fn required(name: &'static str, doc: &'static str) -> Self {
        Self {
            info: PortInfo { name, kind: T::KIND, presence: Presence::Required, extensions: T::EXTENSIONS, shape: T::SHAPE, doc },
            kind: PhantomData,
        }
    }

    /// A port that may be left out.
    pub const fn optional(name: &'static str, doc: &'static str) -> Self {
        Self {
            info: PortInfo { name, kind: T::KIND, presence: Presence::Optional, extensions: T::EXTENSIONS, shape: T::SHAPE, doc },
            kind: PhantomData,
        }
    }

    /// The port as the planner sees it.
    pub const fn info(&self) -> PortInfo {
        self.info
    }
}

/// An output port. `T` is the type that a later stage reads.
#[derive(Debug)]
pub struct Out<T> {
    info: PortInfo,
    kind: PhantomData<fn() -> T>,
}

impl<T> Clone for Out<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Out<T> {}

impl<T: Artifact> Out<T> {
    /// A port with its documentation.
    pub const fn new(name: &'static str, doc: &'static str) -> Self {
        Self {
            info: PortInfo { name, kind: T::KIND, presence: Presence::Required, extensions: T::EXTENSIONS, shape: T::SHAPE, doc },
            kind: PhantomData,
        }
    }
}

impl<T> Out<T> {
    /// The port as the planner sees it.
    pub const fn info(&self) -> PortInfo {
        self.info
    }
}

/// The files at every input port of a stage.
#[derive(Debug, Clone, Default)]
pub struct Inputs {
    /// Files in order, by port.
    pub ports: BTreeMap<String, Vec<InputFile>>,
}

impl Inputs {
    /// Opens an input that must be given.
    pub fn read<T: Artifact>(&self, port: In<T>) -> Result<T> {
        T::open(self.files(port.info))
    }

    /// Opens an input, if it was given.
    pub fn read_if_given<T: Artifact>(&self, port: In<T>) -> Result<Option<T>> {
        self.ports.get(port.info.name).map(|files| T::open(files)).transpose()
    }

    /// Opens two inputs, if they were given. Neither has a meaning without the other.
    pub(crate) fn read_both<A: Artifact, B: Artifact>(&self, one: In<A>, other: In<B>) -> Result<Option<(A, B)>> {
        let refused = |missing: PortInfo, given: PortInfo| {
            let problem = format!("missing, but `{}` is given", given.name);
            Err(Error::Input { port: missing.name, problem, hint: "give both, or neither".into() })
        };
        match (self.read_if_given(one)?, self.read_if_given(other)?) {
            (Some(one), Some(other)) => Ok(Some((one, other))),
            (None, None) => Ok(None),
            (None, Some(_)) => refused(one.info, other.info),
            (Some(_), None) => refused(other.info, one.info),
        }
    }

    fn files(&self, port: PortInfo) -> &[InputFile] {
        self.ports.get(port.name).expect("BUG: the planner checks that required ports are given")
    }
}

/// The one file of a port that must hold exactly one.
pub(crate) fn only_file<'a>(kind: &'static str, files: &'a [InputFile]) -> Result<&'a InputFile> {
    match files {
        [file] => Ok(file),
        _ => Err(Error::Input {
            port: kind,
            problem: format!("expected one file, found {}", files.len()),
            hint: "name a file, not a folder, in the pipeline".into(),
        }),
    }
}

/// The last of the files of a training's checkpoints, in the order of their steps.
pub(crate) fn last_file<'a>(kind: &'static str, files: &'a [InputFile]) -> Result<&'a InputFile> {
    only_file(kind, &files[files.len().saturating_sub(1)..])
}
