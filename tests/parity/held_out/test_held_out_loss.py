"""Held-out loss: the same under every layout and engine, and without any effect on training."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_chameleon.data.token_files.reader import TokenFileWriter
from megatron_chameleon.tokenizer.folder import load_tokenizer
from places import PROGRAMS
from run_command import environment

TOLERANCE = 1e-6  # of means over many tokens in fp32, each of them precise to about 1e-7

TENSOR = {"parallel.tensor_model_parallel_size": 2}
OVERLAP = {
    "parallel.use_distributed_optimizer": True,
    "parallel.overlap_grad_reduce": True,
    "parallel.overlap_param_gather": True,
}
PIPELINE = {"parallel.pipeline_model_parallel_size": 2}
ISOLATED = {"data.reset_attention": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "tp2": (2, TENSOR),
    "tp2-sp": (2, {**TENSOR, "parallel.sequence_parallel": True}),
    "pp2": (2, PIPELINE),
    "interleaved": (2, {**PIPELINE, "parallel.virtual_pipeline_model_parallel_size": 2}),
    "dp2-overlap": (2, OVERLAP),
    "zero1": (2, {"engine.name": "deepspeed", "engine.zero_stage": 1}),
    "zero3": (2, {"engine.name": "deepspeed", "engine.zero_stage": 3}),
    "isolated": (1, ISOLATED),
    "isolated-dp2": (2, {**ISOLATED, "training.micro_batch_size": 2}),
}
RANDOM: dict[str, Any] = {
    "model.hidden_dropout": 0.1,
    "fp8.format": "hybrid",
    "fp8.emulate": True,
    "fp8.amax_history_len": 4,
    "parallel.recompute_granularity": "full",
}
"""Dropout, whose masks must not change, and FP8 with scales from the steps before."""
COMPARED = ("alone", "interleaved", "dp2-overlap", "zero1", "zero3", "random")
"""What is run with and without measuring."""


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_tokenizer) -> dict[str, dict[str, Any]]:
    """What ``run_held_out.py`` finds, by the names of its jobs."""
    folder = tmp_path_factory.mktemp("held_out")
    prefixes = write_documents(folder, tiny_tokenizer)
    jobs = []
    for name, (processes, values) in {**LAYOUTS, "random": (1, RANDOM)}.items():
        settings = {"model.num_layers": 4, "training.micro_batch_size": 2, **values}
        for measures in (True, False):
            if measures or name in COMPARED:
                jobs.append(
                    {
                        "name": name if measures else f"{name}-without",
                        "processes": processes,
                        "tokenizer": str(tiny_tokenizer),
                        "prefixes": prefixes,
                        "measures": measures,
                        "set": settings,
                    }
                )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-W", "ignore", PROGRAMS / "validation" / "run_held_out.py"]
    subprocess.run(
        [*command, folder / "jobs.json", folder], check=True, env=environment(), timeout=600
    )
    return {job["name"]: json.loads((folder / f"{job['name']}.json").read_text()) for job in jobs}


def write_documents(folder: Path, tokenizer_folder: Path) -> list[str]:
    """Two sources: texts of many lengths, and images with words; not a multiple of any batch."""
    tokenizer = load_tokenizer(tokenizer_folder, images=False)
    v, draw = tokenizer.vocabulary, np.random.default_rng(1)
    first = v.image_placeholder + 1

    def words(count: int) -> list[int]:
        return draw.integers(first, v.size, count).tolist()

    def image() -> list[int]:
        return [v.begin_image, *draw.choice(v.code_token_ids, 16).tolist(), v.end_image]

    texts = [[v.bos, *words(n), v.eos] for n in (3, 90, 30, 1, 17, 45, 8, 28)]
    pairs = [[v.bos, *words(n), *image(), v.eos] for n in (2, 9, 5, 4, 1)]
    for name, documents in (("texts", texts), ("pairs", pairs)):
        with TokenFileWriter(folder / name, tokenizer) as writer:
            for document in documents:
                writer.add(np.array(document), document.count(v.begin_image))
            writer.commit()
    return [str(folder / "texts"), str(folder / "pairs")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_does_not_depend_on_the_layout(found, layout):
    reference = found["isolated" if layout.startswith("isolated") else "alone"]["measured"]
    for step, (ours, alone) in enumerate(zip(found[layout]["measured"], reference, strict=True)):
        assert ours.keys() == alone.keys()
        # each token but <s> of each document
        assert ours["tokens"] == alone["tokens"] == [222 + 8, 21 + 5 * 18 + 5]
        assert ours["validation/texts/loss_image"] is None
        for key in set(ours) - {"tokens", "validation/texts/loss_image"}:
            if ours[key] is not None and "perplexity" not in key:
                # weights of later steps differ by rounding; AdamW makes up to 1e-6 of it
                limit = TOLERANCE if step == 0 else 2 * TOLERANCE
                assert ours[key] == pytest.approx(alone[key], rel=limit), (step, key)
    assert len(found[layout]["measured"]) == 2


def test_isolated_documents_have_another_loss(found):
    losses = [found[name]["measured"][0]["validation/texts/loss"] for name in ("alone", "isolated")]
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("name", [*LAYOUTS, "random"])
def test_nothing_is_random(found, name):
    """Dropout is off, and the scales of FP8 stay what they are."""
    assert found[name]["again"] == found[name]["measured"][-1]


@pytest.mark.parametrize("name", COMPARED)
def test_training_is_the_same_to_the_last_bit(found, name):
    """Losses, gradients and all other metrics of each step, and the weights in the end."""
    measured, without = found[name], found[f"{name}-without"]
    assert without["measured"] == [] and len(measured["measured"]) == 2
    assert measured["again"] == without["again"]
    assert measured["steps"] == without["steps"]
    assert without["saved"] == without["weights"]  # gathered late or not
    assert measured["weights"] == without["weights"]
