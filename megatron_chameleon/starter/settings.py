"""The values of ``train.yaml``: how long the run is, and how it learns."""

from dataclasses import dataclass

from megatron_chameleon.config.parameters import count_parameters
from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.starter.choose import PRESETS, SMALL, TINY, TextVocabulary
from megatron_chameleon.starter.looking.look import Looked
from megatron_chameleon.starter.measure import Speeds
from megatron_chameleon.starter.writing.image_yaml import ImageShape

TRAIN_SECONDS = 360.0
"""Time of the training for ``tiny``."""
EPOCHS = 12
"""Of pictures. More teaches a small model its documents by heart: with 400 crops of photographs the
held-out loss was lowest after three epochs."""
TEXT_EPOCHS = 10
"""Of texts, which a model of this size learned by heart after four."""
FEWEST_STEPS = 300
MANY_EPOCHS = 50
"""No more are chosen to reach a number of steps, except by ``tiny``, whose run is short."""
TINY_BATCH, SMALL_BATCH, SMALL_MICRO_BATCH = 4, 32, 8
MODEL_KEYS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length"),
    "init_method_std",
)
MEASUREMENTS = 20
"""Of the held-out loss in a run."""


@dataclass(frozen=True)
class RunLength:
    """How long the run is, and what it reads."""

    steps: int
    epochs: float
    text_tokens: int
    image_tokens: int
    global_batch: int
    micro_batch: int
    seq_length: int

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return self.text_tokens + self.image_tokens


def run_length(
    looked: Looked,
    vocabulary: TextVocabulary,
    image: ImageShape | None,
    model: ModelConfig | None,
    size: str,
    speeds: Speeds,
) -> RunLength:
    """The number of steps: as many as the time allows, and no more than the documents bear."""
    characters = sum(source.characters for source in looked.sources)
    documents = sum(source.documents for source in looked.sources)
    pictures = sum(source.pictures for source in looked.sources)
    text = round(characters / vocabulary.characters_per_token) + 2 * documents
    images = pictures * (image.codes + 2) if image else 0
    tokens = max(text + images, 1)
    if model is None:
        batch, micro, length = 2048, 1, 4096
        wanted = min(round(4 * tokens / (batch * length)), 1_096_725)
        steps = max(wanted, _fewest(100, tokens, batch * length))
    elif size == TINY:
        batch = micro = TINY_BATCH
        length = model.seq_length
        epochs = EPOCHS if images > text else TEXT_EPOCHS
        wanted = max(round(epochs * tokens / (batch * length)), FEWEST_STEPS)
        affordable = round(TRAIN_SECONDS / speeds.train_step) if speeds.train_step else 3000
        steps = max(min(wanted, affordable), 40)
    else:
        batch, micro, length = SMALL_BATCH, SMALL_MICRO_BATCH, model.seq_length
        enough = 20 * count_parameters(model, vocabulary.size)  # tokens per parameter: Chinchilla
        wanted = round(min(EPOCHS * tokens, enough) / (batch * length))
        steps = max(wanted, _fewest(500, tokens, batch * length))
    return RunLength(
        steps, steps * batch * length / tokens, text, images, batch, micro, length
    )  # fmt: skip


def _fewest(steps: int, tokens: int, batch_tokens: int) -> int:
    """The fewest steps of a run: so many, or less if they would read few tokens too often."""
    return max(min(steps, MANY_EPOCHS * tokens // batch_tokens), MEASUREMENTS)


def train_values(
    size: str, model: ModelConfig | None, length: RunLength, has_held_out: bool, seed: int
) -> tuple[dict[str, dict[str, object]], dict[str, str]]:
    """The sections of the config, and why some values are what they are."""
    every = max(length.steps // MEASUREMENTS, 1)
    warmup = max(length.steps // 20, 1)
    values: dict[str, dict[str, object]] = {
        "data": {"reset_attention": True},
        "training": {
            "steps": length.steps,
            "seed": seed,
            "micro_batch_size": length.micro_batch,
            "global_batch_size": length.global_batch,
        },
        "checkpoint": {"every_steps": every, "keep_last": 2, "keep_best": has_held_out},
        "logging": {
            "run_dir": "${variables.folder}",
            "every_steps": max(every // 2, 1),
            "sample_every_steps": max(length.steps // 4, 1),
        },
    }
    if has_held_out:
        values["validation"] = {"every_steps": every, "max_tokens": _validation_tokens(length)}
    if model is not None:
        values["model"] = {name: getattr(model, name) for name in MODEL_KEYS}
    if size not in PRESETS:
        values["optimizer"] = {
            "lr": 3e-3 if size == TINY else 6e-4,
            "lr_warmup_steps": warmup,
            "lr_decay_style": "exponential" if size == TINY else "cosine",
            "weight_decay": 0.1,
        }
        values["training"] |= {"dtype": "fp32" if size == TINY else "bf16", "z_loss": 1e-5}
    else:
        values["optimizer"] = {"lr_warmup_steps": min(4000, warmup)}
    return values, _reasons(size, length)


def _validation_tokens(length: RunLength) -> int | None:
    """Measuring everything may cost no more than a tenth of the training."""
    most = length.steps * length.global_batch * length.seq_length // (10 * MEASUREMENTS)
    return None if length.tokens // 8 < 3 * most else max(3 * most, 10_000)


def _reasons(size: str, length: RunLength) -> dict[str, str]:
    found = {
        "data.reset_attention": "short documents share a sequence and must not see each other",
        "training.steps": f"about {length.epochs:.1f} epochs of your {length.tokens:,} tokens",
        "checkpoint.every_steps": "as often as the held-out loss is measured, to keep the best",
    }
    if size == TINY:
        found |= {
            "model.hidden_size": "small enough to train on CPUs within minutes",
            "model.init_method_std": "more than 0.02, because the hidden size of 128 is small",
            "optimizer.lr": "a small model needs a higher rate than the paper's",
        }
    if size == SMALL:
        found["training.dtype"] = "the format in which GPUs are fast"
    return found
