//! Build script of every crate whose programs load libtorch: writes its folders into them, so that they start without
//! `LD_LIBRARY_PATH`.

#![expect(clippy::print_stdout, clippy::disallowed_methods, reason = "build scripts speak to cargo through stdout and the environment")]

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    let libtorch = env::var_os("LIBTORCH").map(PathBuf::from).expect("LIBTORCH is set by .cargo/config.toml");
    println!("cargo::rerun-if-changed={}", libtorch.join("build-version").display());
    match fs::canonicalize(&libtorch) {
        Ok(real) => {
            // Installed libraries lie beside the program's folder (`make install`), others in the cache folder of the user who built it.
            for folder in ["lib/ovenbird", "lib/ovenbird/cuda"] {
                println!("cargo::rustc-link-arg=-Wl,-rpath,$ORIGIN/../{folder}");
            }
            for folder in ["lib", "lib/cuda"] {
                println!("cargo::rustc-link-arg=-Wl,-rpath,{}", real.join(folder).display());
            }
        }
        Err(_) => println!("cargo::error=libtorch is not at {}: run `make libtorch` once", libtorch.display()),
    }
}
