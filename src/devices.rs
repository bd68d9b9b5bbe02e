//! The devices of a run, and which step holds which.
//!
//! A step takes its devices when it starts, is the only one to use them, and gives them back when it ends. A single CPU is shared: its
//! cores are counted by `resources.cpu`.

use crate::{
    error::{Error, Result},
    output::count,
    pipeline::{Pipeline, Step},
    plan::Work,
};

/// How many devices a step takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Demand {
    /// It waits until so many are free.
    pub(crate) least: usize,
    /// It takes up to so many free devices.
    pub(crate) most: usize,
}

impl Demand {
    /// The demand of a step without a network.
    pub(crate) const NONE: Self = Self { least: 0, most: 0 };

    /// The demand of a step that is about to start. Units that hold items are shared among devices; other steps run on one.
    pub(crate) fn of(step: &Step, work: &Work) -> Self {
        let is_shared = work.units.first().is_some_and(|unit| unit.item_key.is_some());
        match step.resources.gpu {
            _ if !step.entry.uses_device => Self::NONE,
            0 if is_shared => Self { least: 1, most: work.missing.len().max(1) },
            0 => Self { least: 1, most: 1 },
            n => Self { least: n, most: n },
        }
    }

    /// The demand of two steps that share a pass, and so their devices.
    pub(crate) fn joined(self, other: Self) -> Self {
        Self { least: self.least.max(other.least), most: self.most.max(other.most) }
    }
}

/// Fails where a step asks for more devices than the run has.
pub(crate) fn check(pipeline: &Pipeline, wanted: &[usize], devices: &[tch::Device]) -> Result<()> {
    let steps = wanted.iter().map(|step| &pipeline.steps[*step]);
    let greedy: Vec<String> = steps
        .filter(|step| step.resources.gpu > devices.len())
        .map(|step| format!("`{}` asks for {} (`resources.gpu`)", step.id, step.resources.gpu))
        .collect();
    if greedy.is_empty() {
        return Ok(());
    }
    let problem = format!("the run has {}, and {}", count(devices.len(), "device"), greedy.join(", "));
    Err(Error::Usage { problem, hint: "list more devices, such as `--device cuda:0,1`, or lower `resources.gpu` in the pipeline".into() })
}

/// The devices that a step holds from its start to its end.
#[derive(Debug, PartialEq)]
pub(crate) struct Grant {
    /// The devices of its networks; empty for a step without a network.
    pub(crate) devices: Vec<tch::Device>,
    /// Their places in the pool; empty for a shared CPU.
    places: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Slot {
    Free,
    Held,
    /// Held by a step that was given up as hanging.
    Lost,
}

/// The devices of a run.
#[derive(Debug)]
pub(crate) struct DevicePool {
    devices: Vec<tch::Device>,
    /// One for each device; empty where a single CPU is shared.
    slots: Vec<Slot>,
}

impl DevicePool {
    /// A pool of at least one device. A CPU that is listed several times counts as several devices.
    pub(crate) fn new(devices: &[tch::Device]) -> Self {
        let is_shared = devices == [tch::Device::Cpu];
        Self { devices: devices.to_vec(), slots: if is_shared { Vec::new() } else { vec![Slot::Free; devices.len()] } }
    }

    /// Takes the first free devices of the list; `None` while too few are free.
    pub(crate) fn take(&mut self, demand: Demand) -> Option<Grant> {
        if self.slots.is_empty() {
            return Some(Grant { devices: self.devices[..demand.most.min(1)].to_vec(), places: Vec::new() });
        }
        let free = (0..self.slots.len()).filter(|place| self.slots[*place] == Slot::Free);
        let places: Vec<usize> = free.take(demand.most).collect();
        if places.len() < demand.least {
            return None;
        }
        places.iter().for_each(|place| self.slots[*place] = Slot::Held);
        Some(Grant { devices: places.iter().map(|place| self.devices[*place]).collect(), places })
    }

    /// Takes back the devices of a step, once all its threads have ended.
    pub(crate) fn give_back(&mut self, grant: &Grant) {
        grant.places.iter().for_each(|place| self.slots[*place] = Slot::Free);
    }

    /// Notes that a step that holds devices was given up as hanging. Its threads cannot be ended and may still use the devices, so no
    /// other step gets them before [`Self::give_back`].
    pub(crate) fn lose(&mut self, grant: &Grant) {
        grant.places.iter().for_each(|place| self.slots[*place] = Slot::Lost);
    }

    /// How many devices are not lost.
    pub(crate) fn n_left(&self) -> usize {
        self.devices.len() - self.slots.iter().filter(|slot| **slot == Slot::Lost).count()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tch::Device::{Cpu, Cuda};

    use super::*;

    const ONE: Demand = Demand { least: 1, most: 1 };
    const ALL: Demand = Demand { least: 1, most: usize::MAX };

    #[test]
    fn a_training_takes_one_device_and_an_extraction_what_is_left() {
        let mut pool = DevicePool::new(&[Cuda(0), Cuda(1), Cuda(3)]);
        let training = pool.take(ONE).unwrap();
        let extraction = pool.take(ALL).unwrap();
        assert_eq!((&training.devices[..], &extraction.devices[..]), (&[Cuda(0)][..], &[Cuda(1), Cuda(3)][..]));
        assert_eq!(pool.take(ONE), None);
        assert_eq!(pool.take(Demand::NONE).unwrap().devices, []);
        pool.give_back(&extraction);
        assert_eq!(pool.take(Demand { least: 3, most: 3 }), None);
        assert_eq!(pool.take(ALL).unwrap().devices, [Cuda(1), Cuda(3)]);
    }

    #[test]
    fn a_single_cpu_is_shared_and_a_single_accelerator_is_not() {
        let mut pool = DevicePool::new(&[Cpu]);
        assert!((0..3).all(|_| pool.take(ONE).unwrap().devices == [Cpu] && pool.take(ALL).unwrap().devices == [Cpu]));
        assert_eq!(pool.take(Demand::NONE).unwrap().devices, []);
        for devices in [&[Cuda(0)][..], &[Cpu, Cpu]] {
            let mut pool = DevicePool::new(devices);
            assert_eq!(pool.take(ALL).unwrap().devices, devices);
            assert_eq!(pool.take(ONE), None);
        }
    }

    #[test]
    fn of_two_cpus_two_trainings_have_one_each_and_an_extraction_what_is_left() {
        let mut pool = DevicePool::new(&[Cpu, Cpu]);
        let (one, two) = (pool.take(ONE).unwrap(), pool.take(ONE).unwrap());
        assert_eq!((&one.places[..], &two.places[..]), (&[0][..], &[1][..]));
        assert_eq!((pool.take(ONE), pool.take(ALL)), (None, None));
        pool.give_back(&two);
        let extraction = pool.take(ALL).unwrap();
        assert_eq!((&extraction.devices[..], &extraction.places[..]), (&[Cpu][..], &[1][..]));
    }

    #[test]
    fn what_a_hanging_step_holds_is_lost_until_it_returns() {
        let mut pool = DevicePool::new(&[Cuda(0), Cuda(1)]);
        let hung = pool.take(ONE).unwrap();
        pool.lose(&hung);
        assert_eq!((pool.n_left(), pool.take(ALL).unwrap().devices), (1, vec![Cuda(1)]));
        pool.give_back(&hung);
        assert_eq!((pool.n_left(), pool.take(ALL).unwrap().devices), (2, vec![Cuda(0)]));
        // Nothing is held of a shared CPU, and nothing lost.
        let mut pool = DevicePool::new(&[Cpu]);
        let hung = pool.take(ONE).unwrap();
        pool.lose(&hung);
        assert_eq!(pool.n_left(), 1);
    }

    proptest! {
        #[test]
        fn no_device_is_held_twice_and_all_come_back(n_devices in 2..5_usize, are_cpus in any::<bool>(), turns in prop::collection::vec((0..4_usize, 1..4_usize, any::<bool>()), 0..40)) {
            let devices: Vec<_> = (0..n_devices).map(|place| if are_cpus { Cpu } else { Cuda(place) }).collect();
            let (mut pool, mut held) = (DevicePool::new(&devices), Vec::<Grant>::new());
            for (least, more, gives_back) in turns {
                if gives_back && !held.is_empty() {
                    pool.give_back(&held.remove(least % held.len()));
                } else if let Some(grant) = pool.take(Demand { least, most: least + more - 1 }) {
                    prop_assert!((least..least + more).contains(&grant.devices.len()));
                    held.push(grant);
                }
                let mut in_use: Vec<usize> = held.iter().flat_map(|grant| grant.places.clone()).collect();
                in_use.sort_unstable();
                let n_in_use = in_use.len();
                in_use.dedup();
                prop_assert_eq!(in_use.len(), n_in_use);
            }
            held.iter().for_each(|grant| pool.give_back(grant));
            prop_assert_eq!(pool.take(ALL).unwrap().devices, devices);
        }
    }
}
