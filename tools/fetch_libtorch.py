#!/usr/bin/env python3
"""Unpacks the CPU part of libtorch once per user and links it as `.libtorch` in the source tree.

The libraries and headers come out of three wheels of the Python package index, fetched by exact name and version through
the ordinary pip client and checked against the SHA-256 below. No Python runs when Ovenbird runs. Once unpacked, nothing is
fetched again: the folder is complete or absent, because it is renamed into place last.

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
LIBRARIES = {"libtorch_cpu.so", "libc10.so", "libcudart.so.13", "libcupti.so.13"}


def wanted(name):
    """Returns where a wheel's file goes under the libtorch folder, or None."""
    path = pathlib.PurePosixPath(name)
    if name.startswith("torch/include/"):
        return path.relative_to("torch")
    if path.name in LIBRARIES or path.name.startswith("libgomp"):
        return pathlib.PurePosixPath("lib", path.name)
    return None


def download(folder):
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "--dest", str(folder)]
    for glibc in ("manylinux_2_28", "manylinux_2_25", "manylinux_2_17", "manylinux2014"):
        command += ["--platform", f"{glibc}_x86_64"]
    subprocess.run(command + [f"{name}=={version}" for name, version, _ in WHEELS], check=True)


def check(wheel, expected):
    digest = hashlib.sha256()
    with open(wheel, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
    if digest.hexdigest() != expected:
        sys.exit(f"error: {wheel.name}: expected SHA-256 {expected}, found {digest.hexdigest()}\nhint: delete pip's cache (`pip cache purge`) and run make again")


def unpack(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            target = wanted(name)
            if target is None or name.endswith("/"):
                continue
            place = folder / target
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, open(place, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 22)


def fetch(home):
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".libtorch-") as scratch:
        wheels, folder = pathlib.Path(scratch, "wheels"), pathlib.Path(scratch, "libtorch")
        download(wheels)
        for name, version, expected in WHEELS:
            (wheel,) = wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl")
            check(wheel, expected)
            unpack(wheel, folder)
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
    home = cache / f"libtorch-{VERSION}-cpu-{LAYOUT}"
    if not home.joinpath("build-version").exists():
        print(f"fetching libtorch {VERSION} into {home} (once per user, 530 MB to download)", file=sys.stderr)
        fetch(home)
    if link.is_symlink() and os.readlink(link) == str(home):
        return
    if link.is_symlink() or link.exists():
        link.unlink()
    link.symlink_to(home)


main()
