"""Both engines compute the same, and each can resume a run of the other.

ZeRO 0 to 3, tensor parallelism and offload are compared with the megatron engine; so are runs that
train an adapter or a part of the model, over all layouts. All runs with the same number of
processes share one launch (``train_many.py``).
"""

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_chameleon.checkpoint.convert.adapter import export_adapter
from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.formats.adapted import find_adapter
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.data.preprocess.run import preprocess
from megatron_chameleon.tokenizer.folder import load_tokenizer
from places import PROGRAMS
from run_command import environment

# The order of summation changes fp32 sums by about 1e-7 relative, and 20 steps of AdamW amplify
# that. The bounds are those between layouts of one engine (test_layouts.py). AdamW hides gradients
# of the wrong size; their norm shows them.
TOLERANCES = {
    "loss": 1e-5,
    "loss_text": 1e-5,
    "loss_image": 1e-5,
    "z_loss": 1e-4,
    "grad_norm": 1e-4,
    "output_norm": 1e-4,
    "max_logit": 1e-4,
    "learning_rate": 0.0,
}
EXACT = (*TOLERANCES, "step", "consumed_samples", "consumed_tokens", "trained_tokens")

TENSOR = ["parallel.tensor_model_parallel_size=2"]
SEQUENCE = [*TENSOR, "parallel.sequence_parallel=true"]
PIPELINE = "parallel.pipeline_model_parallel_size=2"


def zero(stage: int, *overrides: str) -> list[str]:
    return ["engine.name=deepspeed", f"engine.zero_stage={stage}", *overrides]


DISTRIBUTED = "parallel.use_distributed_optimizer=true"
SHORT = [
    "training.steps=8",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=2",
    "training.ema_decay=0.3",
]
RUNS = {
    "megatron": [],
    **{f"zero{stage}": zero(stage) for stage in range(4)},
    "megatron-short": SHORT,
    "megatron-dropout": [*SHORT, "model.hidden_dropout=0.1"],
    "zero0-tensor": zero(0, *SHORT, *TENSOR),
    "zero1-sequence": zero(1, *SHORT, *SEQUENCE),
    "zero3-sequence": zero(3, *SHORT, *SEQUENCE, "parallel.recompute_granularity=full"),
    "zero2-offload": zero(2, *SHORT, *SEQUENCE, "engine.offload_optimizer=true"),
    "zero3-offload": zero(3, *SHORT, "engine.offload_optimizer=true", "engine.offload_param=true"),
    "zero3-dropout": zero(3, *SHORT, "model.hidden_dropout=0.1"),
}
PART = [*SHORT, "model.train=['model.layers.1','lm_head[image]','model.norm']"]
PARTS = {
    "megatron-part": PART,
    "zero1-part": zero(1, *PART),
    "zero3-part": zero(3, *PART),
    # The first stage trains nothing.
    "pipeline-part": [*PART, PIPELINE],
    "distributed-part": [*PART, DISTRIBUTED],
}
FOUR_PARTS = {
    "tensor-pipeline-part": [*PART, *SEQUENCE, PIPELINE, DISTRIBUTED],
    "interleaved-part": [*PART, PIPELINE, "parallel.virtual_pipeline_model_parallel_size=2"],
    "zero2-part": zero(2, *PART, *TENSOR),
}
"""On four processes."""
ADAPTER = [
    *("training.steps=4", "checkpoint.every_steps=2", "checkpoint.keep_last=2"),
    *("optimizer.lr=5e-3", "adapter.rank=4"),
]
DORA = [*ADAPTER, "adapter.dora=true", "adapter.dropout=0.1"]
ADAPTERS = {
    "lora-tensor": [*ADAPTER, *TENSOR],
    "lora-sequence": [*ADAPTER, *SEQUENCE, DISTRIBUTED],
    "lora-pipeline": [*ADAPTER, PIPELINE, "parallel.recompute_granularity=full"],
    "lora-distributed": [*ADAPTER, DISTRIBUTED],
    **{f"lora-zero{stage}": zero(stage, *ADAPTER) for stage in range(3)},
    "lora-zero3": zero(3, *ADAPTER, *SEQUENCE),
    # With sequence parallelism, dropout draws other masks (docs/parallelism.md).
    "dora-tensor": [*DORA, *TENSOR],
}
"""Each is compared with the same adapter on one process."""
AFTER_ADAPTERS = {"lora-again": "lora-tensor", "lora-elsewhere": "lora-zero3"}
"""Resumed from the middle of ``lora-tensor``, with the layout of another run or its own."""
RESUMED = {
    "zero3-resumed": ("zero3-dropout", RUNS["zero3-dropout"]),
    "zero1-resumed": ("zero1-sequence", RUNS["zero1-sequence"]),
    "zero1-to-zero3": ("zero1-sequence", zero(3, *SHORT)),
    "zero3-to-zero1": ("zero3-offload", zero(1, *SHORT)),
    "megatron-to-zero3": ("megatron-short", zero(3, *SHORT)),
    "zero3-to-megatron": ("zero3-sequence", SHORT),
    "zero2-to-distributed": ("zero2-offload", [*SHORT, DISTRIBUTED]),
}


CHAT_RUNS = {
    "megatron-chat": SHORT,
    "zero1-chat": zero(1, *SHORT),
    "zero3-chat": zero(3, *SHORT, *SEQUENCE),
}
"""The loss is on the answers of conversations only. They are a third of the tokens, and their share
differs between sequences, so that a mean of means would give a different loss."""


SCHEDULES = [
    "training.steps=8",
    *("optimizer.lr_decay_style=wsd", "optimizer.lr_wsd_decay_steps=3"),
    # Steps of 1, 2 and 3 micro-batches on each of two data-parallel ranks
    *("training.global_batch_size=12", "training.rampup_batch_size=[4, 4, 24]"),
]
EACH_STEP = ["checkpoint.every_steps=1", "checkpoint.keep_last=8"]
SCHEDULED = {
    "schedules-data": [*SCHEDULES, *EACH_STEP],
    "schedules-tensor": [*SCHEDULES, *SEQUENCE],
    "schedules-pipeline": [*SCHEDULES, PIPELINE],
    "schedules-zero0": zero(0, *SCHEDULES),
    "schedules-zero1": zero(1, *SCHEDULES, *EACH_STEP),
    "schedules-zero2": zero(2, *SCHEDULES, "engine.offload_optimizer=true"),
    "schedules-zero3": zero(3, *SCHEDULES),
}
AFTER = {
    **{f"schedules-data-after-{step}": ("schedules-data", step) for step in (1, 3, 7)},
    "schedules-zero1-after-4": ("schedules-zero1", 4),
}
"""Resumed in the warm-up, where the batch grows next, in the decay, and in the stable part."""


def write_conversations(tiny) -> list[str]:
    """Write questions about the tiny project's pictures; return overrides that train on them."""
    lines = []
    for line in tiny.documents.read_text(encoding="utf-8").splitlines():
        text, image = json.loads(line)["content"]
        sides = [[image, {"type": "text", "text": "what?"}], [text] * (1 + len(lines) % 3)]
        prompt, answer = sides[:: -1 if len(lines) % 2 else 1]
        lines.append(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
    path = tiny.folder / "chat.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    info = preprocess([path], tiny.tokenizer, tiny.folder / "chat")
    assert 0.2 < info.total("answer_tokens") / info.tokens < 0.6
    source = f"data.stage1=[{{prefix: {tiny.folder / 'chat'}}}]"
    return [source, "data.stage2=[]", "data.loss_on=answers", "data.reset_attention=true"]


def train_many(tiny, runs: dict[str, list[str]], processes: int = 2) -> None:
    """Train all runs in one launch, each in a folder of the tiny project with the run's name."""
    plan = tiny.folder / f"runs-{processes}.json"
    plan.write_text(json.dumps({str(tiny.folder / name): words for name, words in runs.items()}))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = PROGRAMS / "train_many.py"
    result = subprocess.run(
        [sys.executable, *launch, str(script), str(tiny.config), str(plan)],
        capture_output=True,
        text=True,
        timeout=1200,
        env=environment(),
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tiny) -> dict[str, list[dict[str, Any]]]:
    resumed = {
        name: [*words, "--resume", str(tiny.folder / source / "checkpoints" / "step_00000004")]
        for name, (source, words) in RESUMED.items()
    }
    words = write_conversations(tiny)
    chats = {name: [*overrides, *words] for name, overrides in CHAT_RUNS.items()}
    for name, (source, step) in AFTER.items():
        start = str(tiny.folder / source / "checkpoints" / f"step_{step:08}")
        words = [word for word in SCHEDULED[source] if word not in EACH_STEP]
        resumed[name] = [*words, "--resume", start]
    base = ["--start-from", str(tiny.folder / "megatron-short")]
    adapters = {name: [*overrides, *base] for name, overrides in ADAPTERS.items()}
    step = tiny.folder / "lora-tensor" / "checkpoints" / "step_00000002"
    for name, layout in AFTER_ADAPTERS.items():
        adapters[name] = [*ADAPTERS[layout], "--resume", str(step)]
    planned = {**RUNS, **PARTS, **SCHEDULED, **resumed, **chats, **adapters}
    train_many(tiny, planned)
    for name, overrides in {"lora": ADAPTER, "dora": DORA}.items():
        tiny.train(name, *overrides, *base)
        planned[name] = overrides
    return {name: tiny.metrics(name) for name in planned}


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for key, tolerance in TOLERANCES.items():
        # A step may have no image among its labels. Then there is no image loss.
        ours, theirs = (
            [math.nan if record[key] is None else record[key] for record in records]
            for records in (found, expected)
        )
        assert ours == pytest.approx(theirs, rel=tolerance, abs=0, nan_ok=True), key


@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_equals_megatron(runs, stage: int) -> None:
    assert len(runs["megatron"]) == 20
    assert_same(runs[f"zero{stage}"], runs["megatron"])


@pytest.mark.parametrize(
    "name",
    ["zero0-tensor", "zero1-sequence", "zero3-sequence", "zero2-offload", "zero3-offload"],
)
def test_tensor_parallelism_and_offload_equal_megatron(runs, name: str) -> None:
    assert_same(runs[name], runs["megatron-short"])


@pytest.mark.parametrize("name", [name for name in PARTS if name != "megatron-part"])
def test_training_a_part_equals_megatron(tiny, runs, name: str) -> None:
    assert_same(runs[name], runs["megatron-part"])
    assert_same_part(tiny, name)


def assert_same_part(tiny, name: str) -> None:
    """The trained rows are those of the run on two processes, and no other has changed a bit."""
    expected, found = last_checkpoint(tiny, "megatron-part"), last_checkpoint(tiny, name)
    before = TrainingCheckpoint(tiny.folder / name / "checkpoints" / "step_00000004")
    image_ids = load_tokenizer(tiny.tokenizer, images=False).vocabulary.code_token_ids
    wanted = {"output_layer.weight": set(image_ids), "decoder.final_layernorm.weight": {*range(32)}}
    assert found.optimizer_tensors == expected.optimizer_tensors
    for tensor in expected.tensors:
        new, old = found.read(tensor), before.read(tensor)
        rows = set((new != old).reshape(len(new), -1).any(1).nonzero().flatten().tolist())
        assert rows == ({1} if "layers." in tensor else wanted.get(tensor, set())), tensor
        # see test_the_weights_are_stored_as_megatron_stores_them
        assert (new - expected.read(tensor)).abs().max() < 1e-5, tensor
    for tensor in expected.optimizer_tensors:
        state = found.read(tensor)
        assert (state - expected.read(tensor)).abs().max() < 1e-5, tensor
        if tensor.endswith(".output_layer.weight") and ".ema." not in tensor:
            assert set(state.any(1).nonzero().flatten().tolist()) == set(image_ids), tensor


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_does_not_depend_on_the_layout(tiny, runs, name: str) -> None:
    kind = name.split("-")[0]
    assert_same(runs[name], runs[kind])
    alone, found = (peft_folder(tiny, run) for run in (kind, name))
    assert alone[0] == found[0], "adapter_config.json"
    assert alone[1].keys() == found[1].keys()
    for tensor, value in alone[1].items():
        # Adapters have sizes of 0.01 to 0.2 after 4 steps of up to 5e-3; see TOLERANCES.
        assert (found[1][tensor] - value).abs().max() < 1e-6, tensor


def peft_folder(tiny, run: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The config and the tensors of the folder of ``peft`` that a run's adapter is exported to."""
    folder = tiny.folder / f"{run}-peft"
    if not folder.exists():
        adapter = find_adapter(tiny.folder / run)
        assert adapter is not None
        export_adapter(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    return (folder / "adapter_config.json").read_text(encoding="utf-8"), tensors


def test_an_adapter_resumes_on_its_layout_bit_for_bit_and_on_any_other(tiny, runs) -> None:
    expected = [[record[key] for key in EXACT] for record in runs["lora-tensor"][2:]]
    assert [[record[key] for key in EXACT] for record in runs["lora-again"]] == expected
    unbroken, again = (peft_folder(tiny, run)[1] for run in ("lora-tensor", "lora-again"))
    assert all(torch.equal(again[name], tensor) for name, tensor in unbroken.items())
    assert_same(runs["lora-elsewhere"], runs["lora-tensor"][2:])


@pytest.mark.parametrize("name", ["zero1-chat", "zero3-chat"])
def test_fine_tuning_equals_megatron(runs, name: str) -> None:
    assert_same(runs[name], runs["megatron-chat"])
    assert runs[name][0]["loss_image"] is not None


def test_wsd_and_a_growing_batch_are_equal_over_layouts_and_engines(runs) -> None:
    expected = runs["schedules-data"]
    assert [record["global_batch_size"] for record in expected] == [4, 4, 4, 8, 8, 12, 12, 12]
    assert [record["consumed_samples"] for record in expected][-2:] == [52, 64]
    rates = [record["learning_rate"] for record in expected]
    # up to the peak in 2 steps, and from step 6 down to a third of it
    assert rates == pytest.approx([0.005, *[0.01] * 5, 0.01 * 2 / 3, 0.01 / 3])
    for name in SCHEDULED:
        assert_same(runs[name], expected)
        assert [r["global_batch_size"] for r in runs[name]][3:6] == [8, 8, 12], name


@pytest.mark.parametrize("name", AFTER)
def test_resumed_within_a_schedule_equals_unbroken_bit_for_bit(runs, name: str) -> None:
    source, step = AFTER[name]
    expected = [[record[key] for key in EXACT] for record in runs[source][step:]]
    assert [[record[key] for key in EXACT] for record in runs[name]] == expected


def test_dropout_masks_are_megatrons(runs) -> None:
    assert_same(runs["zero3-dropout"], runs["megatron-dropout"])
    assert runs["megatron-dropout"][-1]["loss"] != runs["megatron-short"][-1]["loss"]


@pytest.mark.parametrize(
    ("unbroken", "resumed"),
    [("zero1-sequence", "zero1-resumed"), ("zero3-dropout", "zero3-resumed")],
)
def test_resumed_equals_unbroken_bit_for_bit(runs, unbroken: str, resumed: str) -> None:
    assert [record["step"] for record in runs[resumed]] == [5, 6, 7, 8]
    expected = [[record[key] for key in EXACT] for record in runs[unbroken][4:]]
    assert [[record[key] for key in EXACT] for record in runs[resumed]] == expected


@pytest.mark.parametrize(
    "name",
    [
        "zero1-to-zero3",
        "zero3-to-zero1",
        "megatron-to-zero3",
        "zero3-to-megatron",
        "zero2-to-distributed",
    ],
)
def test_a_checkpoint_resumes_at_another_stage_layout_and_engine(runs, name: str) -> None:
    assert_same(runs[name], runs["megatron-short"][4:])


def last_checkpoint(tiny, name: str) -> TrainingCheckpoint:
    return TrainingCheckpoint(tiny.folder / name / "checkpoints" / "step_00000008")


def test_the_weights_are_stored_as_megatron_stores_them(tiny, runs) -> None:
    megatron = last_checkpoint(tiny, "megatron-short")
    assert any(name.startswith("optimizer.state.ema.") for name in megatron.optimizer_tensors)
    # QK-norms hardly affect the norm of all gradients, but AdamW moves them as far as any weight.
    for name in ("zero0-tensor", "zero1-sequence", "zero3-offload", "zero3-to-megatron"):
        reader = last_checkpoint(tiny, name)
        assert reader.tensors == megatron.tensors
        assert reader.optimizer_tensors == megatron.optimizer_tensors
        for tensor in (*reader.tensors, *(n for n in reader.optimizer_tensors if ".ema." in n)):
            difference = (reader.read(tensor) - megatron.read(tensor)).abs().max()
            # Weights have sizes of 0.02 to 1 after 8 steps of up to 1e-2; see TOLERANCES.
            assert difference < 1e-5, tensor


@pytest.mark.parametrize(
    ("unbroken", "resumed"),
    [("zero1-sequence", "zero1-resumed"), ("zero3-dropout", "zero3-resumed")],
)
def test_a_resumed_average_equals_the_unbroken_one_bit_for_bit(
    tiny, runs, unbroken: str, resumed: str
) -> None:
    old, new = last_checkpoint(tiny, unbroken), last_checkpoint(tiny, resumed)
    averages = [name for name in old.optimizer_tensors if ".ema." in name]
    assert len(averages) == len(old.tensors)
    assert all(torch.equal(old.read(name), new.read(name)) for name in averages)
    assert old.state["ema_updates"] == new.state["ema_updates"] == 8


def test_one_run_through_every_layout_and_engine(tiny, runs) -> None:
    """Each run resumes from the checkpoint that the previous run wrote after two more steps."""
    steps = ["training.steps=8", "checkpoint.every_steps=2", "checkpoint.keep_last=5"]
    chain = {
        "chain-tp2-pp2": [*steps, *SEQUENCE, PIPELINE],
        "chain-tp1-pp4": [*steps, "parallel.pipeline_model_parallel_size=4"],
        "chain-zero3": zero(3, *steps),
        "chain-distributed": [*steps, *TENSOR, DISTRIBUTED],
    }
    before = None
    for number, (name, words) in enumerate(chain.items()):
        if before:
            words += ["--resume", str(tiny.folder / before / f"checkpoints/step_{2 * number:08}")]
        before = name
    train_many(tiny, {**chain, **FOUR_PARTS}, processes=4)
    for name in FOUR_PARTS:  # they share the launch
        assert_same(tiny.metrics(name), runs["megatron-part"])
        assert_same_part(tiny, name)
    unbroken = tiny.metrics("chain-tp2-pp2")
    for number, name in enumerate(chain):
        assert_same(tiny.metrics(name), unbroken[2 * number :])


def test_three_ranks_whose_parts_are_padded(tiny, runs) -> None:
    batch = ["training.micro_batch_size=1", "training.global_batch_size=6", "training.steps=4"]
    words = [*batch, "checkpoint.every_steps=2", "checkpoint.keep_last=2"]
    source = ["--resume", str(tiny.folder / "three" / "checkpoints" / "step_00000002")]
    planned = {
        "three": zero(3, *words),
        "three-resumed": [*zero(3, *words), *source],
        "three-zero1": [*zero(1, *words), *source],
    }
    # Also a run of each engine that starts from weights only.
    weights = tiny.folder / "weights"
    convert(tiny.folder / "megatron-short", weights, "megatron", optimizer=False, verify=False)
    start = [*words, "--resume", str(weights)]
    planned |= {"start-megatron": start, "start-zero1": zero(1, *start)}
    planned |= {"start-zero3": zero(3, *start)}
    train_many(tiny, planned, processes=3)
    unbroken, resumed = (tiny.metrics(name) for name in ("three", "three-resumed"))
    assert [[r[k] for k in EXACT] for r in resumed] == [[r[k] for k in EXACT] for r in unbroken[2:]]
    expected = [record["grad_norm"] for record in unbroken[2:]]
    found = [record["grad_norm"] for record in tiny.metrics("three-zero1")]
    assert found == pytest.approx(expected, rel=TOLERANCES["grad_norm"])
    for name in ("start-zero1", "start-zero3"):
        assert_same(tiny.metrics(name), tiny.metrics("start-megatron"))
    assert tiny.metrics("start-megatron")[0]["loss"] < runs["megatron"][3]["loss"]
