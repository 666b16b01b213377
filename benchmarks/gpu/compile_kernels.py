"""Compile the Triton kernels for an H100 or H200, on any machine, and print their resources.

    python -m benchmarks.gpu.compile_kernels                        # needs triton, no GPU
    python -W ignore -m benchmarks.gpu.compile_kernels --time       # on a GPU, some minutes

The output has registers per thread, bytes spilled, shared memory, the widest loads and stores, and
the number of threads for which a multiprocessor has enough registers. The exit code is 1 if a
kernel spills. ``--time`` measures the kernels at tile sizes and numbers of warps that differ from
their constants.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's functions cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_chameleon.model.kernels import cross_entropy, norm_rope

SM_90 = GPUTarget("cuda", 90, 32)
REGISTERS_PER_MULTIPROCESSOR, MAX_THREADS = 65_536, 2048
LOGITS = {"bf16": ("*bf16", 2), "fp32": ("*fp32", 4)}


@dataclass(frozen=True)
class Variant:
    """A kernel with the arguments of one kind of launch."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Types of the arguments that are not constants."""
    constants: dict[str, Any]
    unaligned: frozenset[str]
    """Arguments whose values are not multiples of 16."""
    num_warps: int


def loss_variants() -> Iterator[Variant]:
    """65,536 columns on one, two and eight ranks fill whole blocks; other vocabularies do not."""
    for dtype, (pointer, size) in LOGITS.items():
        for masked, what in ((False, "whole blocks"), (True, "odd vocabulary")):
            unaligned = frozenset({"columns", "row_stride", "blocks"} if masked else {"blocks"})
            common = {"logits_ptr": pointer, "labels_ptr": "*i64"}
            numbers = {"row_stride": "i32", "columns": "i32", "first": "i32"}
            yield Variant(
                f"loss forward, {dtype}, {what}",
                cross_entropy.statistics_kernel,
                {**common, "statistics_ptr": "*fp32", **numbers, "tokens": "i32"},
                {
                    "LANES": cross_entropy.STATISTICS_LANES,
                    "VECTOR": cross_entropy.VECTOR_BYTES // size,
                    "MASKED": masked,
                },
                unaligned,
                cross_entropy.STATISTICS_WARPS,
            )
            rows = dict.fromkeys(("max_logit_ptr", "factor_ptr", "at_label_ptr"), "*fp32")
            yield Variant(
                f"loss backward, {dtype}, {what}",
                cross_entropy.gradient_kernel,
                {**common, **rows, **numbers, "blocks": "i32"},
                {"BLOCK": cross_entropy.GRADIENT_BYTES // size, "MASKED": masked},
                unaligned,
                cross_entropy.GRADIENT_WARPS,
            )


def norm_rope_variants() -> Iterator[Variant]:
    """The heads of the 7B on one GPU, and the one key head of the 34B on each of eight ranks."""
    strides = ("stride_s", "stride_b", "stride_n")
    counts = ("positions", "batch", "heads", "first_head", "heads_per_group")
    pointers = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    for heads in (32, 1):
        for name, kernel, rows, more_pointers, more_numbers in (
            (
                "forward",
                norm_rope.forward_kernel,
                norm_rope.FORWARD_ROWS,
                {"bias_ptr": "*bf16", "out_ptr": "*bf16"},
                strides,
            ),
            (
                "backward",
                norm_rope.backward_kernel,
                norm_rope.BACKWARD_ROWS,
                {"grad_ptr": "*bf16", "grad_x_ptr": "*bf16", "sums_ptr": "*fp32"},
                strides + tuple(f"grad_{stride}" for stride in strides),
            ),
        ):
            sizes = ("HALF", "COLUMNS", "POSITIONS", "HEADS")
            constants = dict(zip(sizes, norm_rope.tile_shape(heads, 128, rows), strict=True))
            if name == "backward":
                constants["TILES"] = norm_rope.BACKWARD_TILES
            numbers = dict.fromkeys(more_numbers + counts, "i32")
            yield Variant(
                f"QK-norm and rotary {name}, bf16, {heads} heads of 128",
                kernel,
                {**pointers, **more_pointers, **numbers, "epsilon": "fp32"},
                constants,
                frozenset({"batch", "heads", "first_head", "heads_per_group"}),
                norm_rope.WARPS,
            )


def compile_variant(variant: Variant) -> Any:
    """Compile a kernel for compute capability 9.0."""
    names = variant.kernel.arg_names
    types = {**variant.types, **dict.fromkeys(variant.constants, "constexpr")}
    aligned = [
        n for n in variant.types if n not in variant.unaligned and variant.types[n] != "fp32"
    ]
    source = ASTSource(
        fn=variant.kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=SM_90, options={"num_warps": variant.num_warps})


def figures(compiled: Any, variant: Variant) -> dict[str, Any]:
    """Read the resources of a kernel from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    registers, local = (int(re.findall(rf"{word}:(\d+)", usage)[-1]) for word in ("REG", "LOCAL"))
    stack = int(re.findall(r"STACK:(\d+)", usage)[-1])
    threads = 32 * variant.num_warps
    programs = REGISTERS_PER_MULTIPROCESSOR // (-(-registers // 8) * 8 * threads)
    return {
        "registers": registers,
        "spilled bytes": local + stack,
        "shared bytes": compiled.metadata.shared,
        "loads": _widest(code, "LDG"),
        "stores": _widest(code, "STG"),
        "maxima that keep NaN": compiled.asm["ptx"].count("max.NaN.f32"),
        "threads": min(programs * threads, MAX_THREADS // threads * threads),
    }


def _tool(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def _widest(code: str, instruction: str) -> str:
    """Count the widest instructions of a kind, and give their width in bits."""
    modifiers = re.findall(rf"\b{instruction}\.([A-Z0-9.]+)", code)
    widths = [[int(part) for part in m.split(".") if part in ("64", "128")] for m in modifiers]
    bits = [max(width, default=32) for width in widths]
    return f"{bits.count(max(bits))} x {max(bits)}" if bits else "none"


def time_shapes() -> int:
    import torch

    from benchmarks.gpu.kernels.kernel_shapes import sweep

    if not torch.cuda.is_available():
        print("error: --time: this machine has no GPU. Leave --time out.", file=sys.stderr)
        return 2
    for line in sweep(torch.device("cuda"), tiny=False):
        print(line, flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no effect: the script takes seconds")
    parser.add_argument(
        "--time", action="store_true", help="time the kernels at other tile sizes (needs a GPU)"
    )
    if parser.parse_args().time:
        return time_shapes()
    print(f"triton {triton.__version__}, compute capability 9.0; a thread has up to 255 registers")
    spilled = False
    for variant in (*loss_variants(), *norm_rope_variants()):
        found = figures(compile_variant(variant), variant)
        spilled |= found["spilled bytes"] > 0
        print(f"{variant.name}: " + ", ".join(f"{name} {value}" for name, value in found.items()))
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())
