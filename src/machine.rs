//! Facts about this machine: memory, disk space, processor, accelerators.

use std::{fs, path::Path, sync::OnceLock};

/// Memory of the machine, in bytes; 4 GiB where that is not known.
pub(crate) fn total_memory() -> u64 {
    stated_bytes("/proc/meminfo", "MemTotal:").unwrap_or(4 << 30)
}

/// The peak memory of this process since the last reset, in bytes; 0 where that is not known.
pub(crate) fn peak_memory() -> u64 {
    stated_bytes("/proc/self/status", "VmHWM:").unwrap_or(0)
}

/// Resets the peak to the memory in use. Where the kernel does not allow it, the peak stays that of the program so far.
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

/// Free space on the disk of a folder, in bytes; 0 where that is not known.
pub(crate) fn free_space(folder: &Path) -> u64 {
    rustix::fs::statvfs(folder).map_or(0, |disk| disk.f_bavail * disk.f_frsize)
}

/// The machine's name.
pub(crate) fn host() -> String {
    read_line("/proc/sys/kernel/hostname")
}

/// The names of some devices.
pub(crate) fn device_names(devices: &[tch::Device]) -> String {
    let name = |device: &tch::Device| match device {
        tch::Device::Cpu => processor(),
        accelerator => format!("{accelerator:?}"),
    };
    devices.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// Whether a device has instructions for bf16. `OVENBIRD_BF16`, `yes` or `no`, overrides the answer.
#[expect(clippy::disallowed_methods, reason = "a setting of the user's")]
pub(crate) fn has_bf16(device: tch::Device) -> bool {
    match std::env::var("OVENBIRD_BF16").as_deref() {
        Ok("yes") => true,
        Ok("no") => false,
        _ => match device {
            tch::Device::Cpu => cpu_has_bf16(),
            tch::Device::Cuda(index) => compute_capability(index).is_some_and(|major| major >= 8),
            tch::Device::Mps | tch::Device::Vulkan => false,
        },
    }
}

/// libtorch, and oneDNN, which multiplies its matrices, can be held to fewer instructions than the processor has.
#[expect(clippy::disallowed_methods, reason = "settings of libtorch and oneDNN")]
fn cpu_has_bf16() -> bool {
    let limit = ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"].into_iter().find_map(|name| std::env::var(name).ok()).unwrap_or_default();
    let is_allowed = match limit.to_ascii_uppercase().as_str() {
        "" | "ALL" | "DEFAULT" => true,
        limit => limit.starts_with("AVX512_CORE_BF16") || limit.starts_with("AVX512_CORE_FP16") || limit.starts_with("AVX512_CORE_AMX"),
    };
    #[cfg(target_arch = "x86_64")]
    let has = std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let has = false;
    let is_lesser = std::env::var("ATEN_CPU_CAPABILITY").is_ok_and(|capability| ["default", "avx2"].contains(&capability.as_str()));
    is_allowed && !is_lesser && has
}

/// The first number of the compute capability of an NVIDIA card; 8 is Ampere, the first that has bf16.
#[expect(unsafe_code, reason = "the driver's own library, which need not be there")]
fn compute_capability(index: usize) -> Option<i32> {
    type Init = unsafe extern "C" fn(flags: u32) -> i32;
    type Get = unsafe extern "C" fn(device: *mut i32, ordinal: i32) -> i32;
    type Attribute = unsafe extern "C" fn(value: *mut i32, attribute: i32, device: i32) -> i32;
    const COMPUTE_CAPABILITY_MAJOR: i32 = 75;
    // SAFETY: three functions of NVIDIA's driver by the signatures of its manual; each writes one integer, and 0 is success.
    unsafe {
        let driver = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW);
        if driver.is_null() {
            return None;
        }
        let find = |name: &std::ffi::CStr| Some(libc::dlsym(driver, name.as_ptr())).filter(|symbol| !symbol.is_null());
        let init = std::mem::transmute::<*mut libc::c_void, Init>(find(c"cuInit")?);
        let get = std::mem::transmute::<*mut libc::c_void, Get>(find(c"cuDeviceGet")?);
        let attribute = std::mem::transmute::<*mut libc::c_void, Attribute>(find(c"cuDeviceGetAttribute")?);
        let (mut device, mut major) = (0, 0);
        let is_known = init(0) == 0
            && get(&raw mut device, i32::try_from(index).ok()?) == 0
            && attribute(&raw mut major, COMPUTE_CAPABILITY_MAJOR, device) == 0;
        is_known.then_some(major)
    }
}

/// How many accelerators libtorch sees; `None` where its CUDA part is not there.
///
/// The first call loads that part, which takes a second.
#[expect(unsafe_code, reason = "loaded by hand, the library costs nothing where it is not needed, and may be missing")]
pub(crate) fn n_accelerators() -> Option<usize> {
    static IS_LOADED: OnceLock<bool> = OnceLock::new();
    // SAFETY: libtorch's own library, of the version that is linked; loading it registers its kernels.
    let load = || !unsafe { libc::dlopen(c"libtorch_cuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null();
    IS_LOADED.get_or_init(load).then(|| tch::Cuda::device_count() as usize)
}

/// Switches off libtorch's warnings, such as those about kernels in beta state.
#[expect(unsafe_code, reason = "a setting of libtorch's that has no function")]
pub(crate) fn silence_libtorch() {
    unsafe extern "C" {
        /// The least severe level that is logged: 1 is warnings, 2 errors.
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
