"""Build rules only; metadata lives in pyproject.toml.

KVWIRE_CUDA=auto|0|1 decides whether ``kernels/cuda`` is compiled to a fatbin, which is loaded where
there is a GPU: ``auto`` does so when nvcc is found, ``1`` insists. Nothing here needs torch or one.
KVWIRE_TLS=auto|0|1 decides likewise whether TLS is built, with the system's OpenSSL: ``auto``
does so when a program can be compiled and linked with it. The build says which it was.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

CUDA_MODE = os.environ.get("KVWIRE_CUDA", "auto")
TLS_MODE = os.environ.get("KVWIRE_TLS", "auto")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
CUDA_SOURCES = sorted(glob("kernels/cuda/*.cu") + glob("kernels/cuda/*.cuh"))
CUDA_FLAGS = "kernels/cuda/nvcc.options"
FATBIN = "cuda/kvwire.fatbin"

for name, mode in (("KVWIRE_CUDA", CUDA_MODE), ("KVWIRE_TLS", TLS_MODE)):
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"{name}={mode!r}: expected auto, 0 or 1")
if CUDA_MODE == "1" and not NVCC:
    raise SystemExit("KVWIRE_CUDA=1 but nvcc is neither on PATH nor in /usr/local/cuda/bin")
USE_CUDA = bool(CUDA_SOURCES) and CUDA_MODE != "0" and NVCC is not None

OPENSSL_PROBE = """
#include <openssl/ssl.h>
int main() { return SSL_CTX_set_ciphersuites(SSL_CTX_new(TLS_method()), "") != TLS1_3_VERSION; }
"""


def has_openssl():
    """True when a program with OpenSSL 1.1.1 or later compiles and links."""
    compiler = os.environ.get("CXX", "g++").split()
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, "-x", "c++", "-", "-o", f"{folder}/probe", "-lssl", "-lcrypto"]
        return subprocess.run(command, input=OPENSSL_PROBE.encode(),
                              stderr=subprocess.DEVNULL).returncode == 0


USE_TLS = TLS_MODE != "0" and has_openssl()
if TLS_MODE == "1" and not USE_TLS:
    raise SystemExit("KVWIRE_TLS=1 but no program with OpenSSL can be built; on Debian: "
                     "apt-get install libssl-dev")


def is_stale(object_path, source_path):
    """True unless the object is newer than everything its compiler-written ``.d`` file names."""
    rule = Path(object_path).with_suffix(".d")
    if not (os.path.exists(object_path) and rule.exists()):
        return True
    built_at = os.path.getmtime(object_path)
    inputs = rule.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return any(not os.path.exists(i) or os.path.getmtime(i) >= built_at for i in inputs)


class BuildExt(build_ext):
    """Builds objects in parallel and only when stale; hands ``*.cu`` to nvcc."""

    def finalize_options(self):
        super().finalize_options()
        # One place for editable, in-place and wheel builds, so that none compiles twice.
        self.build_temp = f".build/{sys.implementation.cache_tag}-tls{int(USE_TLS)}"

    def run(self):
        # Two builds at once would write the same objects.
        os.makedirs(self.build_temp, exist_ok=True)
        print("kvwire: built with TLS" if USE_TLS else "kvwire: built WITHOUT TLS: no OpenSSL "
              "headers, or KVWIRE_TLS=0", file=sys.stderr)
        with open(f"{self.build_temp}/lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().run()
            if USE_CUDA:
                self.build_fatbin()

    def build_fatbin(self):
        folder = Path("kernels") if self.inplace else Path(self.build_lib, "kvwire/kernels")
        fatbin = folder / FATBIN
        newest = max(os.path.getmtime(source) for source in (*CUDA_SOURCES, CUDA_FLAGS))
        if fatbin.exists() and fatbin.stat().st_mtime > newest:
            return
        fatbin.parent.mkdir(parents=True, exist_ok=True)
        made = f"{self.build_temp}/kvwire.fatbin"
        self.spawn([NVCC, "--options-file", CUDA_FLAGS, "kernels/cuda/kvwire.cu", "-o", made])
        shutil.copyfile(made, fatbin)


sources = sorted(
    path
    for path in glob("csrc/**/*.cpp", recursive=True)
    if not path.startswith(("csrc/tests/", "csrc/fuzz/"))
)
headers = sorted(glob("csrc/**/*.hpp", recursive=True))

ParallelCompile(default=2, needs_recompile=is_stale).install()
setup(
    packages=[*find_packages(include=["kvwire", "kvwire.*"]), "kvwire.kernels",
              "kvwire.kernels.triton"],
    package_dir={"kvwire": "kvwire", "kvwire.kernels": "kernels"},
    package_data={"kvwire": ["FORMAT.md", "py.typed", "*.pyi"], "kvwire.kernels": [FATBIN]},
    ext_modules=[
        Pybind11Extension(
            "kvwire._native",
            sources,
            cxx_std=17,
            include_dirs=["csrc"],
            depends=headers,
            define_macros=[("KVWIRE_TLS", str(int(USE_TLS)))],
            extra_compile_args=[
                *("-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-g0", "-MMD", "-pthread"),
            ],
            extra_link_args=["-pthread"],
            libraries=["dl"] + (["ssl", "crypto"] if USE_TLS else []),
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
