//! Arguments of the commands that compute: `run`, `retry`, `predict` and `verify --fix`.

use std::{str::FromStr, thread, time::Duration};

use crate::{machine, output::count, run::local::Options};

/// How long running steps have to keep what they have finished, where the command has no `--grace`.
const GRACE: Duration = Duration::from_secs(60);

/// The part of the machine that a command uses; results do not depend on it.
#[derive(clap::Args)]
pub(crate) struct RunArgs {
    /// Processor cores for all steps together [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,
    /// Where networks run. A training takes one device; steps that process images take all free ones. `cuda` means all CUDA devices
    #[arg(long, default_value = "cpu", value_name = "cpu|cuda|cuda:N,N")]
    device: Devices,
}

impl RunArgs {
    /// The options of a run, other than those that only some commands have.
    pub(crate) fn options(&self) -> Options {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let cpu = self.jobs.map_or(cores, usize::from);
        Options {
            cpu,
            memory: machine::total_memory(),
            devices: self.device.0.clone(),
            rehash: false,
            is_measuring: false,
            is_repair: false,
            grace: GRACE,
            forced: Vec::new(),
        }
    }
}

#[derive(Debug, Clone)]
struct Devices(Vec<tch::Device>);

impl FromStr for Devices {
    type Err = String;

    /// `cpu`, `cuda` for all, or `cuda:0,2` for some. `cpu,cpu` counts as two devices.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.split(',').all(|device| device == "cpu") {
            return Ok(Self(text.split(',').map(|_| tch::Device::Cpu).collect()));
        }
        let expected = "expected cpu, cuda, or cuda: and numbers, as in cuda:0,1";
        let chosen = text.strip_prefix("cuda").ok_or(expected)?;
        let n_devices = machine::n_accelerators().ok_or("libtorch has no CUDA support here: run `CUDA=1 make libtorch` and build again")?;
        let indices: Vec<usize> = match chosen.strip_prefix(':') {
            Some(list) => list.split(',').map(|index| index.parse().map_err(|_| expected)).collect::<Result<_, _>>()?,
            None if chosen.is_empty() => (0..n_devices).collect(),
            None => return Err(expected.into()),
        };
        if indices.is_empty() || indices.iter().any(|index| *index >= n_devices) {
            return Err(format!("libtorch sees {}; `ovenbird doctor` shows more", count(n_devices, "CUDA device")));
        }
        if let Some(twice) = (1..indices.len()).find(|place| indices[..*place].contains(&indices[*place])) {
            return Err(format!("expected each CUDA device once, found {} twice", indices[twice]));
        }
        Ok(Self(indices.into_iter().map(tch::Device::Cuda).collect()))
    }
}
