"""Memory and time of converting the full-size 7B, compared with ``cp`` of the same bytes.

    python -m benchmarks.checkpoint.convert --work /scratch            # 3 x 13.5 GB of disk
    python -m benchmarks.checkpoint.convert --work /scratch --layers 4

The script writes a random 7B (real names and shapes, bf16) as a Hugging Face folder, copies it,
converts it to megatron and back with the real command, and compares the two folders. Each command
runs in its own process, and the kernel reports its peak resident set size (``ru_maxrss``).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_chameleon.checkpoint.formats.base import RowStream, Target
from megatron_chameleon.checkpoint.formats.hf import Writer
from megatron_chameleon.checkpoint.names.mappings import Dimensions
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow, tensor_rows
from megatron_chameleon.checkpoint.tensor_files.raw import element_count
from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.tokenizer.common.vocabulary import (
    BOS,
    EOS,
    PAD,
    UNK,
    Vocabulary,
    control_names,
)
from megatron_chameleon.tokenizer.folder import load_tokenizer
from megatron_chameleon.tokenizer.image.stored import save_vqgan
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig
from megatron_chameleon.tokenizer.text.model_file import build_sentencepiece_model

VOCABULARY, IMAGE_CODES = 65536, 8192
POOL_ELEMENTS = 2**26
IMPORTS = (
    "import megatron_chameleon.checkpoint.convert.run, megatron_chameleon.checkpoint.formats.hf"
)

# a small process in between, because ru_maxrss includes that of the process it was forked from
MEASURE = """
import os, sys
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print("\\n", usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def write_tokenizer(folder: Path) -> Path:
    """Write a vocabulary of the paper's size, its pieces numbers, and an untrained VQGAN."""
    controls = [BOS, PAD, EOS, *control_names(IMAGE_CODES)]
    names = [BOS, PAD, EOS, UNK, *control_names(IMAGE_CODES)]
    names += [f"<0x{byte:02X}>" for byte in range(256)]
    names += [f"▁{number}" for number in range(VOCABULARY - len(names))]
    folder.mkdir(parents=True)
    (folder / "text.model").write_bytes(build_sentencepiece_model(names, {}, set(controls)))
    Vocabulary.from_tokens(names).save(folder)
    save_vqgan(Vqgan(VqganConfig()), folder)
    return folder


def random_stream(found: list[TensorRow]) -> Iterator[tuple[TensorRow, torch.Tensor]]:
    """Fill every row with different numbers, from windows of one pool of random numbers."""
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(POOL_ELEMENTS, generator=generator).mul_(0.02).bfloat16()
    for row in found:
        size = element_count(row.shape)
        start = int(torch.randint(POOL_ELEMENTS // 2, (1,), generator=generator))
        repeats = -(-(start + size) // POOL_ELEMENTS)
        yield row, pool.repeat(repeats)[start : start + size].view(row.shape)


def write_model(folder: Path, tokenizer: Path, layers: int) -> None:
    """Write a random 7B as a Hugging Face folder, one tensor at a time."""
    model = ModelConfig(
        num_layers=layers,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        num_query_groups=32,
        seq_length=4096,
        qk_norm_groups=32,
    )
    dims = Dimensions.of(model, VOCABULARY, 32, 32)
    found = list(tensor_rows(dims))
    target = Target(
        model=model,
        dimensions=dims,
        dtypes={row.key: torch.bfloat16 for row in found},
        step=0,
        tokenizer=load_tokenizer(tokenizer),
        origin="random",
    )
    stream: RowStream = random_stream(found)
    folder.mkdir()
    Writer(target).write(folder, stream)


def measure(*words: str) -> tuple[float, float, float]:
    """Run a command and measure seconds, seconds of CPU time, and peak resident size in GiB."""
    started = time.monotonic()
    line = subprocess.run([sys.executable, "-S", "-c", MEASURE, *words], stdout=subprocess.PIPE)
    if line.returncode:
        sys.exit(f"{' '.join(words)} failed")
    cpu_seconds, peak_kib = line.stdout.split()[-2:]
    return time.monotonic() - started, float(cpu_seconds), int(peak_kib) / 2**20


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with enough disk space")
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=args.work))
    try:
        report(work, args.layers)
    finally:
        shutil.rmtree(work)


def report(work: Path, layers: int) -> None:
    first, copy, middle, last = (work / name for name in ("first", "copy", "middle", "last"))
    write_model(first, write_tokenizer(work / "tokenizer"), layers)
    gib = folder_bytes(first) / 2**30
    os.sync()
    python = (sys.executable, "-c")
    _, _, base_gib = measure(*python, IMPORTS)
    chameleon = (sys.executable, "-m", "megatron_chameleon")
    results = {"model_gib": round(gib, 2), "interpreter_gib": round(base_gib, 2)}
    copying = ("sh", "-c", f"cp -r {first} {copy} && sync {copy}/*")
    steps = {
        "cp": copying,
        "hf -> megatron": (
            *chameleon,
            "convert",
            str(first),
            str(middle),
            "--to",
            "megatron",
            "--no-verify",
        ),
        "cp again": copying,
        "megatron -> hf": (
            *chameleon,
            "convert",
            str(middle),
            str(last),
            "--to",
            "hf",
            "--no-verify",
        ),
        "verify": (*chameleon, "verify", str(first), str(last)),
    }
    for name, words in steps.items():
        seconds, cpu_seconds, peak_gib = measure(*words)
        shutil.rmtree(copy, ignore_errors=True)
        if name == "megatron -> hf":
            shutil.rmtree(middle)
        results[name] = {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            "gib_per_second": round(gib / seconds, 3),
            "peak_gib_over_interpreter": round(peak_gib - base_gib, 2),
        }
        print(name, results[name], flush=True)
    for path in sorted(first.glob("*.safetensors")):
        same = subprocess.run(["cmp", path, last / path.name]).returncode == 0
        results[path.name] = "identical" if same else "different"
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
