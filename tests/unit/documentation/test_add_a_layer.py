"""The changes of docs/tutorials/add-a-layer.md fit the code of today, and do what the page says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from places import REPOSITORY

PAGE = REPOSITORY / "docs" / "tutorials" / "add-a-layer.md"
PROGRAM = """
import torch
from megatron_chameleon.checkpoint.names.mappings import Dimensions
from megatron_chameleon.checkpoint.names.tensor_rows import tensor_rows
from megatron_chameleon.config.parameters import count_parameters
from megatron_chameleon.config.schema import Config
from megatron_chameleon.model.chameleon import build_model
from megatron_chameleon.parallel.launch import Launch, join_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.parallel.topology import create_topology

prepare_megatron()
config = Config()
config.model.norm_order, config.model.num_layers = "sandwich", 1
join_process_group(Launch("alone", 0, 1, 0))
(model,) = build_model(config, 128, create_topology(config.parallel))
named = {n.replace("layers.0.", "layers."): p for n, p in model.named_parameters()}
rows = {row.megatron_name for row in tensor_rows(Dimensions.of(config.model, 128, 4, 4))}
print(sorted(set(named) ^ rows), sum("norm.weight" in name for name in named))
print(sum(p.numel() for p in named.values()) - count_parameters(config.model, 128))
tokens = torch.arange(16)[None]
loss = model(tokens, tokens, None, labels=tokens)[0].mean()
loss.backward()
print(all(bool(p.grad is not None and p.grad.abs().sum()) for n, p in named.items() if "post" in n))
"""


def hunks() -> list[tuple[str, str, str]]:
    """File, text before and text after of each change on the page."""
    found = []
    blocks = re.findall(r"^```diff\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    for block in blocks:
        head, *parts = re.split(r"^@@.*\n", block, flags=re.MULTILINE)
        name = head.splitlines()[1].removeprefix("+++ b/")
        for part in parts:
            lines = [(line[:1] or " ", line[1:]) for line in part.splitlines()]
            before = "".join(f"{text}\n" for mark, text in lines if mark != "+")
            after = "".join(f"{text}\n" for mark, text in lines if mark != "-")
            found.append((name, before, after))
    return found


@pytest.mark.slow
def test_the_changes_apply_and_work(tmp_path: Path) -> None:
    copy = tmp_path / "megatron_chameleon"
    shutil.copytree(
        REPOSITORY / "megatron_chameleon", copy, ignore=shutil.ignore_patterns("__pycache__")
    )
    assert len(hunks()) >= 6
    for name, before, after in hunks():
        path = tmp_path / name
        text = path.read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{name} has changed; {PAGE.name} shows\n{before}"
        path.write_text(text.replace(before, after), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == ["[] 7", "0", "True"]
