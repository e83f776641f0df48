"""Compiles every Triton kernel ahead of time, without a GPU, and reports registers and spills.

    python -m kvwire.kernels.aot --json kernels/aot-report.json

One row for each kernel, variant and architecture: {"kernel", "variant", "arch", "registers",
"spill_bytes", "shared_bytes", "cubin_bytes"}.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kvwire.errors import UnsupportedError
from kvwire.kernels.crc_math import LANES, TILE_BYTES
from kvwire.kernels.triton import copy, crc, histogram, narrow, tiered
from kvwire.kernels.triton.tiered import cut_of
from kvwire.layout import DType
from kvwire.tiered import element_format

ARCHITECTURES = (80, 90)
WARPS = 4
_WORDS = {1: "*i8", 2: "*i16", 4: "*i32", 8: "*i64"}
_COPY = dict(legs="*i64", tile_starts="*i64", leg_count="i64", block_ids="*i64",
             first_word="i64", stop_word="i64", bad_entry="*i64")
_STRIPS = dict(strips="*i64", numbers="*i64", blob="*u8")
_ENCODE = dict(raw="*u8", **_STRIPS, bodies="*u8", tails="*u8", waiting="*u8", lengths="*i64")
_DECODE = dict(coded="*u8", **_STRIPS, waiting="*i16", distances="*u8", raw="*u8",
               chunk_invalid="*i32")
_LAYOUT = dict(chunks="*i64", parts="*i64", blob="*u8", lengths="*i64", places="*i64", out="*u8",
               coded_bytes="*i64")
_MOVE = dict(raw="*u8", chunks="*i64", strips="*i64", bodies="*u8", tails="*u8", lengths="*i64",
             places="*i64", out="*u8")
_CRC = dict(raw="*u8", chunks="*i64", row_step="*u32", lane_weights="*u32", tile_weights="*u32",
            crcs="*i32")
_HISTOGRAM = dict(raw="*u8", elements="i64", channels="*i64", period="i64", counts="*i64")


def variants():
    """Yield (kernel, what it is compiled for, types of its arguments, its constants)."""
    for word_bytes, segment in _WORDS.items():
        for pack in (True, False):
            yield (copy.copy_kernel, f"{'pack' if pack else 'unpack'}, words of {word_bytes}",
                   _COPY | {"segment": segment},
                   dict(ROWS=1, WORDS=copy.TILE_WORDS, WORD_BYTES=word_bytes, PACK=pack))
    formats = [(int(dtype), (2, 2, 2, 2)) for dtype in DType if element_format(dtype)]
    for form in (*formats, (0, ())):
        name = DType(form[0]).name.lower() if form[1] else "opaque"
        yield tiered.encode_kernel, name, _ENCODE, cut_of(form)
        yield tiered.decode_kernel, name, _DECODE, cut_of(form)
    yield (narrow.narrow_kernel, "bf16 to e4m3", dict(raw="*i16", codes="*u8", elements="i64"),
           dict(SIZE=narrow.BLOCK))
    yield tiered.layout_kernel, "", _LAYOUT, dict(BLOCK=tiered.LAYOUT_STRIPS)
    yield tiered.move_kernel, "", _MOVE, {}
    yield crc.crc_kernel, "", _CRC, dict(ROWS=TILE_BYTES // (4 * LANES))
    for dtype in (DType.BF16, DType.FP32, DType.E4M3):
        form = element_format(dtype)
        yield (histogram.histogram_kernel, dtype.name.lower(), _HISTOGRAM,
               dict(ITEM_BYTES=form.item_bytes, EXPONENT_BITS=form.exponent_bits,
                    SIZE=histogram.BLOCK))


def compile_one(kernel, variant: str, types: dict, constants: dict, arch: int) -> dict:
    """Return the row of one kernel; it raises what Triton raises where the kernel is wrong."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    made = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants),
                          target=GPUTarget("cuda", arch, 32), options={"num_warps": WARPS})
    registers, spill_bytes = resources(made.asm["ptx"], arch)
    return {"kernel": made.metadata.name, "variant": variant, "arch": f"sm_{arch}",
            "registers": registers, "spill_bytes": spill_bytes,
            "shared_bytes": made.metadata.shared, "cubin_bytes": len(made.asm["cubin"])}


def resources(ptx: str, arch: int) -> tuple[int, int]:
    """Return registers of a thread and the bytes it spills, as ptxas says."""
    ptxas = get_ptxas(arch).path
    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        said = subprocess.run([ptxas, "-v", f"--gpu-name={target}", source, "-o",
                               f"{folder}/kernel.cubin"], capture_output=True, text=True,
                              check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return registers, sum(map(int, spills.groups()))


def report(architectures=ARCHITECTURES, only: str = "") -> list[dict]:
    """Return the rows of all kernels whose names contain `only`."""
    if triton.knobs.runtime.interpret:
        raise UnsupportedError("TRITON_INTERPRET is set: kernels cannot be compiled in this "
                               "process; unset it")
    return [compile_one(*variant, arch) for variant in variants() for arch in architectures
            if only in variant[0].__name__]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvwire.kernels.aot")
    parser.add_argument("--json", help="where to write the rows; default: only print them")
    parser.add_argument("--only", default="", help="kernels whose names contain this")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    args = parser.parse_args()
    rows = report(args.arch, args.only)
    for row in rows:
        print("{kernel:18} {variant:22} {arch}  {registers:4} registers  {spill_bytes:5} bytes "
              "spilled  {shared_bytes:6} shared".format(**row))
    if args.json:
        lines = ",\n ".join(json.dumps(row) for row in rows)
        Path(args.json).write_text(f"{{\"triton\": \"{triton.__version__}\", \"warps\": {WARPS}, "
                                   f"\"rows\": [\n {lines}\n]}}\n")


if __name__ == "__main__":
    main()
