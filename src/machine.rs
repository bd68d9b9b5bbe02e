//! What this machine has: facts that the kernel tells.

use std::{fs, path::Path, sync::OnceLock};

/// Memory of the machine, in bytes; 4 GiB where that is not known.
pub(crate) fn total_memory() -> u64 {
    stated_bytes("/proc/meminfo", "MemTotal:").unwrap_or(4 << 30)
}

/// The most memory that this process held since the last reset, in bytes; 0 where that is not known.
pub(crate) fn peak_memory() -> u64 {
    stated_bytes("/proc/self/status", "VmHWM:").unwrap_or(0)
}

/// Sets the peak back to what is held now. Where that is not allowed, the peak is that of the run so far.
#[expect(clippy::disallowed_methods, reason = "a file of the kernel, not of the home")]
pub(crate) fn reset_peak_memory() {
    let _not_allowed = fs::write("/proc/self/clear_refs", "5");
}

/// A line `FIELD 123 kB` of a file of the kernel, in bytes.
fn stated_bytes(path: &str, field: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib * 1024)
}

/// Free space where a folder lies, in bytes; 0 where that is not known.
pub(crate) fn free_space(folder: &Path) -> u64 {
    rustix::fs::statvfs(folder).map_or(0, |disk| disk.f_bavail * disk.f_frsize)
}

/// The machine's name.
pub(crate) fn host() -> String {
    read_line("/proc/sys/kernel/hostname")
}

/// What networks run on, in words.
pub(crate) fn device_names(devices: &[tch::Device]) -> String {
    let name = |device: &tch::Device| match device {
        tch::Device::Cpu => processor(),
        accelerator => format!("{accelerator:?}"),
    };
    devices.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// How many accelerators libtorch sees; `None` where its CUDA part is not there.
///
/// That part is loaded only by who asks: it takes a second.
#[expect(unsafe_code, reason = "loaded by hand, a library costs nothing where nobody asks, and need not be there")]
pub(crate) fn n_accelerators() -> Option<usize> {
    static IS_LOADED: OnceLock<bool> = OnceLock::new();
    // SAFETY: libtorch's own library, of the version that is linked; loading it registers its kernels.
    let load = || !unsafe { libc::dlopen(c"libtorch_cuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null();
    IS_LOADED.get_or_init(load).then(|| tch::Cuda::device_count() as usize)
}

/// Keeps libtorch's warnings off the operator's screen: that a kernel is in beta state is no news for them.
#[expect(unsafe_code, reason = "a setting of libtorch's that has no function")]
pub(crate) fn silence_libtorch() {
    unsafe extern "C" {
        /// What is logged: 1 is warnings, 2 errors.
        static mut FLAGS_caffe2_log_level: libc::c_int;
    }
    // SAFETY: an integer that libtorch reads when it logs; no thread of its is there yet.
    unsafe { FLAGS_caffe2_log_level = 2 }
}

/// The processor's model.
pub(crate) fn processor() -> String {
    let info = read_line("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, model)| model.trim().to_owned()));
    model.unwrap_or_else(|| "cpu".into())
}

fn read_line(path: &str) -> String {
    fs::read_to_string(path).map_or_else(|_| "unknown".into(), |text| text.trim().to_owned())
}
