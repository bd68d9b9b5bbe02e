#!/usr/bin/env python3
"""Unpacks libtorch once per user and links it as `.libtorch` in the source tree.

The libraries and headers come out of wheels of the Python package index, fetched by exact name and version through the
ordinary pip client and checked against the SHA-256 below. No Python runs when Ovenbird runs. Once unpacked, nothing is
fetched again: the folder is complete or absent, because it is renamed into place last.

The CUDA part (2.5 GB to download) comes along where the machine has NVIDIA's driver, or where CUDA=1 is set: on the login
node of a cluster, say. It lies in a folder of its own, `lib/cuda`: programs are linked without it and load it when they are
asked for an accelerator.

Usage: fetch_libtorch.py LINK
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

VERSION = "2.11.0"
# Raised when the set of unpacked files changes, so that an older folder is not taken for this one.
LAYOUT = 1
# Package, version, and the SHA-256 of its x86-64 Linux wheel (the interpreter tag of torch only matters to Python).
WHEELS = [
    ("torch", "2.11.0", "0f68f4ac6d95d12e896c3b7a912b5871619542ec54d3649cf48cc1edd4dd2756"),
    ("nvidia-cuda-runtime", "13.0.96", "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548"),
    ("nvidia-cuda-cupti", "13.0.85", "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8"),
]
CUDA_WHEELS = [
    ("nvidia-cublas", "13.1.0.3", "ee8722c1f0145ab246bccb9e452153b5e0515fd094c3678df50b2a0888b8b171"),
    ("nvidia-cuda-nvrtc", "13.0.88", "ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575"),
    ("nvidia-cudnn-cu13", "9.19.0.56", "d20e1734305e9d68889a96e3f35094d733ff1f83932ebe462753973e53a572bf"),
    ("nvidia-cufft", "12.0.0.61", "6c44f692dce8fd5ffd3e3df134b6cdb9c2f72d99cf40b62c32dde45eea9ddad3"),
    ("nvidia-cufile", "1.15.1.6", "08a3ecefae5a01c7f5117351c64f17c7c62efa5fffdbe24fc7d298da19cd0b44"),
    ("nvidia-curand", "10.4.0.35", "1aee33a5da6e1db083fe2b90082def8915f30f3248d5896bcec36a579d941bfc"),
    ("nvidia-cusolver", "12.0.4.66", "0a759da5dea5c0ea10fd307de75cdeb59e7ea4fcb8add0924859b944babf1112"),
    ("nvidia-cusparse", "12.6.3.3", "2b3c89c88d01ee0e477cb7f82ef60a11a4bcd57b6b87c33f789350b59759360b"),
    ("nvidia-cusparselt-cu13", "0.8.0", "25e30a8a7323935d4ad0340b95a0b69926eee755767e8e0b1cf8dd85b197d3fd"),
    ("nvidia-nccl-cu13", "2.28.9", "e4553a30f34195f3fa1da02a6da3d6337d28f2003943aa0a3d247bbc25fefc42"),
    ("nvidia-nvjitlink", "13.0.88", "13a74f429e23b921c1109976abefacc69835f2f433ebd323d3946e11d804e47b"),
    ("nvidia-nvshmem-cu13", "3.4.5", "290f0a2ee94c9f3687a02502f3b9299a9f9fe826e6d0287ee18482e78d495b80"),
]
LIBRARIES = {"libtorch_cpu.so", "libc10.so", "libcudart.so.13", "libcupti.so.13"}


# Of torch's own libraries, those that only its Python module needs.
PYTHON_ONLY = {"libtorch.so", "libtorch_python.so", "libtorch_global_deps.so", "libshm.so"}


def wanted(name, has_cuda):
    """Returns where a wheel's file goes under the libtorch folder, or None."""
    path = pathlib.PurePosixPath(name)
    if name.startswith("torch/include/"):
        return path.relative_to("torch")
    if path.name in LIBRARIES or path.name.startswith("libgomp"):
        return pathlib.PurePosixPath("lib", path.name)
    if has_cuda and path.parent.name == "lib" and ".so" in path.name and path.name not in PYTHON_ONLY:
        return pathlib.PurePosixPath("lib", "cuda", path.name)
    return None


def download(wheels, folder):
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "--dest", str(folder)]
    for glibc in [f"manylinux_2_{minor}" for minor in (28, 27, 25, 18, 17, 12)] + ["manylinux2014", "manylinux2010"]:
        command += ["--platform", f"{glibc}_x86_64"]
    subprocess.run(command + [f"{name}=={version}" for name, version, _ in wheels], check=True)


def check(wheel, expected):
    digest = hashlib.sha256()
    with open(wheel, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
    if digest.hexdigest() != expected:
        sys.exit(f"error: {wheel.name}: expected SHA-256 {expected}, found {digest.hexdigest()}\nhint: delete pip's cache (`pip cache purge`) and run make again")


def unpack(wheel, folder, has_cuda):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            target = wanted(name, has_cuda)
            if target is None or name.endswith("/"):
                continue
            place = folder / target
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, open(place, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 22)


def fetch(home, has_cuda):
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".libtorch-") as scratch:
        downloads, folder = pathlib.Path(scratch, "wheels"), pathlib.Path(scratch, "libtorch")
        wheels = WHEELS + (CUDA_WHEELS if has_cuda else [])
        download(wheels, downloads)
        for name, version, expected in wheels:
            (wheel,) = downloads.glob(f"{name.replace('-', '_')}-{version}-*.whl")
            check(wheel, expected)
            unpack(wheel, folder, has_cuda)
            wheel.unlink()
        # The wheel's own umbrella library wants the GPU libraries; a linker script stands in for it.
        folder.joinpath("lib", "libtorch.so").write_text("INPUT(-ltorch_cpu)\n")
        folder.joinpath("build-version").write_text(f"{VERSION}\n")
        try:
            folder.rename(home)
        except OSError:
            if not home.joinpath("build-version").exists():
                raise


def main():
    link = pathlib.Path(sys.argv[1])
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        sys.exit("error: this script knows the x86-64 Linux wheels only\nhint: unpack libtorch 2.11.0 yourself and link it as .libtorch")
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "ovenbird")
    has_cuda = os.environ.get("CUDA") == "1" or pathlib.Path("/proc/driver/nvidia/version").exists()
    home = cache / f"libtorch-{VERSION}-{'cuda' if has_cuda else 'cpu'}-{LAYOUT}"
    if not home.joinpath("build-version").exists():
        size = "2.9 GB" if has_cuda else "530 MB"
        print(f"fetching libtorch {VERSION} into {home} (once per user, {size} to download)", file=sys.stderr)
        fetch(home, has_cuda)
    if link.is_symlink() and os.readlink(link) == str(home):
        return
    if link.is_symlink() or link.exists():
        link.unlink()
    # Programs that were linked to another folder are linked again.
    home.joinpath("build-version").touch()
    link.symlink_to(home)


main()
