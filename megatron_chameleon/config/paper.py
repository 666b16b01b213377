"""Compare a config with the paper (arXiv 2405.09818), value by value.

    chameleon config check chameleon_7b optimizer.lr=3e-4

Stage 1 and stage 2 are one run with one schedule here, so ``PRETRAINING`` covers both. What the
paper does not say about the shapes comes from the released weights. Nothing here imports torch.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_chameleon.config.parameters import count_parameters, qk_norm_groups, query_groups
from megatron_chameleon.config.schema import Config

SIZES = ("7b", "34b")
STAGES = ("pretraining", "sft")
VOCAB_SIZE = 65_536
"""Size of the vocabulary, including its 8,192 image codes (section 2.1)."""

EQUAL, DEVIATES, UNCERTAIN, UNSTATED = "=", "!", "~", "-"
LEGEND = (
    f"{EQUAL} the paper's value   {DEVIATES} differs from the paper   "
    f"{UNCERTAIN} the paper's value, derived or one of two readings   {UNSTATED} not in the paper"
)
TO_BE_SET = "to be set"

Value = int | float | str


@dataclass(frozen=True)
class PaperValue:
    """One value of the paper, for each size."""

    values: tuple[Value, Value]
    """For the 7B and for the 34B."""
    source: str
    derived: tuple[str, ...] = ()
    """Sizes for which the value follows from other numbers, or is one of two readings."""

    def of(self, size: str) -> Value:
        return self.values[SIZES.index(size)]


@dataclass(frozen=True)
class PaperComparison:
    """One value of a config beside the paper's."""

    key: str
    value: object
    mark: str = UNSTATED
    paper: Value | None = None
    source: str = ""


def _both(value: Value, source: str, derived: bool = False) -> PaperValue:
    return PaperValue((value, value), source, SIZES if derived else ())


_WEIGHTS = "released weights"
_TABLE_1 = "paper, table 1"
_STABILITY = "paper, section 2.3"
_DATA = "paper, section 2.2"
_TUNING = "paper, section 3.2"

_SHAPE = {
    "model.num_layers": PaperValue((32, 48), _WEIGHTS),
    "model.hidden_size": PaperValue(
        (4096, 8192), f"{_WEIGHTS}; the 34B's follows from its size", ("34b",)
    ),
    "model.ffn_hidden_size": PaperValue(
        (11008, 22016), f"{_WEIGHTS}; the 34B's follows from its size", ("34b",)
    ),
    "model.num_attention_heads": PaperValue((32, 64), _WEIGHTS),
    "model.num_query_groups": PaperValue(
        (32, 8), f"{_TABLE_1} (34B: GQA, whose number follows from its size)", ("34b",)
    ),
    "model.seq_length": _both(4096, _TABLE_1),
    "model.norm_order": PaperValue(("pre", "swin"), _STABILITY),
    "model.qk_norm_groups": PaperValue((1, 4), f"QK-norm: {_TABLE_1}; its groups: {_WEIGHTS}"),
    "model.layernorm_epsilon": _both(1e-5, _WEIGHTS),
    "model.rotary_base": _both(10000, _WEIGHTS),
}
_STEPS = (
    f"9.2T tokens in total ({_STABILITY}); {_TABLE_1}: 4.4T x 2.1 epochs = 9.24T, leaving out the "
    "0.4T of interleaved documents (section 2.2)"
)
PRETRAINING = {
    **_SHAPE,
    "model.hidden_dropout": PaperValue((0.1, 0.0), _TABLE_1),
    "data.stage1_fraction": _both(0.8, _DATA),
    "data.stage2_share": _both(0.5, _DATA),
    "data.image_first": _both(0.5, f"{_DATA}, of text-image pairs"),
    "optimizer.lr": _both(1e-4, _TABLE_1),
    "optimizer.min_lr": _both(0.0, _STABILITY),
    "optimizer.lr_warmup_steps": _both(4000, _STABILITY),
    "optimizer.lr_decay_style": _both("exponential", f"{_STABILITY}, which does not give the rate"),
    "optimizer.weight_decay": _both(0.1, _STABILITY),
    "optimizer.adam_beta1": _both(0.9, _STABILITY),
    "optimizer.adam_beta2": _both(0.95, _STABILITY),
    "optimizer.adam_eps": _both(1e-5, _STABILITY),
    "optimizer.clip_grad": _both(1.0, _STABILITY),
    "training.steps": PaperValue((1_096_725, 731_150), _STEPS, SIZES),
    "training.global_batch_size": PaperValue(
        (2048, 3072), f"{_STABILITY}: 2^23 and 3 x 2^22 tokens, divided by 4,096", SIZES
    ),
    "training.dtype": _both("bf16", f"{_STABILITY}, which speaks of bf16's range", derived=True),
    "training.z_loss": _both(1e-5, _TABLE_1),
}
FINE_TUNING = {
    **_SHAPE,
    "model.hidden_dropout": _both(0.05, _TUNING),
    "data.loss_on": _both("answers", _TUNING),
    "optimizer.lr": _both(1e-5, _TUNING),
    "optimizer.lr_decay_style": _both("cosine", _TUNING),
    "optimizer.weight_decay": _both(0.1, _TUNING),
    "training.global_batch_size": _both(128, _TUNING),
    "training.z_loss": _both(1e-5, _TUNING),
}
_RECIPES = {"pretraining": PRETRAINING, "sft": FINE_TUNING}

BATCH_TOKENS = {"pretraining": (2**23, 3 * 2**22), "sft": (128 * 4096, 128 * 4096)}
TOTAL_TOKENS = 9.2e12
PARAMETERS = (7_013_158_912, 34.29e9)

_LARGE = 6.5e9
"""Number of parameters from which we assume that the paper's findings for its 7B hold."""


def nearest_size(config: Config) -> str:
    """The paper's size whose depth and width are nearest to a config's, by ratio."""

    def distance(size: str) -> float:
        layers, hidden = (_SHAPE[key].of(size) for key in ("model.num_layers", "model.hidden_size"))
        assert not isinstance(layers, str) and not isinstance(hidden, str)
        model = config.model
        return abs(math.log(model.num_layers / layers)) + abs(math.log(model.hidden_size / hidden))

    return min(SIZES, key=distance)


def compare(config: Config, size: str, stage: str = "pretraining") -> list[PaperComparison]:
    """Compare every value of a config with the paper's, in the order of the schema.

    Args:
        config: A config that was checked.
        size: One of ``SIZES``.
        stage: One of ``STAGES``; pretraining covers stage 1 and stage 2.
    """
    recipe = _RECIPES[stage]
    return [_row(key, value, recipe, size) for key, value in _effective_values(config)]


def _row(key: str, value: object, recipe: dict[str, PaperValue], size: str) -> PaperComparison:
    is_share_of_pairs = key.endswith(".image_first") and value is not None
    published = recipe.get("data.image_first" if is_share_of_pairs else key)
    if published is None:
        return PaperComparison(key, value)
    paper = published.of(size)
    mark = _mark(_same(value, paper), size in published.derived)
    return PaperComparison(key, value, mark, paper, published.source)


def _mark(equal: bool, derived: bool) -> str:
    return DEVIATES if not equal else UNCERTAIN if derived else EQUAL


def _same(value: object, paper: Value) -> bool:
    if isinstance(value, int | float) and isinstance(paper, int | float):
        return math.isclose(value, paper, rel_tol=1e-9)
    return value == paper


def _effective_values(config: Config) -> Iterator[tuple[str, object]]:
    """Every ``section.key`` with its value; ``null`` is replaced by what it means for the model."""
    stands_for = {
        "model.num_query_groups": query_groups(config.model),
        "model.qk_norm_groups": qk_norm_groups(config.model),
    }
    for section in dataclasses.fields(config):
        for item in dataclasses.fields(part := getattr(config, section.name)):
            key, value = f"{section.name}.{item.name}", getattr(part, item.name)
            if not isinstance(value, list):
                is_missing = key == "tokenizer.path" and not value
                yield key, TO_BE_SET if is_missing else stands_for.get(key, value)
                continue
            if not value:
                yield key, TO_BE_SET if key == "data.stage1" else "none"
            elif not dataclasses.is_dataclass(value[0]):
                yield key, ", ".join(map(str, value))
                continue
            for i, source in enumerate(value):
                for name, entry in dataclasses.asdict(source).items():
                    yield f"{key}[{i}].{name}", entry


def derived_rows(
    config: Config,
    size: str,
    stage: str = "pretraining",
    vocab_size: int = VOCAB_SIZE,
    samples: int | None = None,
) -> list[PaperComparison]:
    """Compare numbers that follow from a config, such as its parameters, with the paper's.

    Args:
        config: The config.
        size: ``7b`` or ``34b``.
        stage: ``pretraining`` or ``sft``.
        vocab_size: Number of tokens in the vocabulary.
        samples: Number of samples of the whole run; None: all steps have ``global_batch_size``.
    """
    model, training, place = config.model, config.training, SIZES.index(size)
    batch_tokens = training.global_batch_size * model.seq_length
    if samples is None:
        samples = training.steps * training.global_batch_size
    total_tokens = samples * model.seq_length
    parameters, batch = PARAMETERS[place], BATCH_TOKENS[stage][place]
    count = count_parameters(model, vocab_size)
    head_size = model.hidden_size // model.num_attention_heads
    exact = size == "7b"
    count_equal = count == parameters if exact else math.isclose(count, parameters, rel_tol=1e-3)
    vocabulary_mark = _mark(vocab_size == VOCAB_SIZE, False)
    count_source = _WEIGHTS if exact else "follows from the shape"
    rows = [
        PaperComparison(
            "derived.vocabulary", vocab_size, vocabulary_mark, VOCAB_SIZE, "paper, section 2.1"
        ),
        PaperComparison(
            "derived.parameters", count, _mark(count_equal, not exact), parameters, count_source
        ),
        PaperComparison(
            "derived.head size", head_size, _mark(head_size == 128, False), 128, _WEIGHTS
        ),
    ]
    where = _STABILITY if stage == "pretraining" else f"{_TUNING}, 128 x 4,096"
    mark = _mark(batch_tokens == batch, stage == "sft")
    rows.append(PaperComparison("derived.tokens per batch", batch_tokens, mark, batch, where))
    if stage == "sft":
        words = "the paper gives no number of epochs; one has 1,102.9M tokens (sum of table 3)"
        return [*rows, PaperComparison("derived.total tokens", total_tokens, source=words)]
    near = math.isclose(total_tokens, TOTAL_TOKENS, rel_tol=5e-3)  # both readings of _STEPS
    words = "see training.steps"
    return [
        *rows,
        PaperComparison(
            "derived.total tokens", total_tokens, _mark(near, True), TOTAL_TOKENS, words
        ),
    ]


def warnings(config: Config) -> list[str]:
    """Combinations that the paper found not to work, one line each. They are not errors."""
    model = config.model
    found = []
    if model.norm_order == "swin" and model.hidden_dropout > 0:
        found.append(
            f"model.hidden_dropout is {model.hidden_dropout} with model.norm_order swin: the paper "
            "found that dropout works badly with this order and trained its 34B without it "
            "(section 2.3, table 1). Set model.hidden_dropout=0 or model.norm_order=pre"
        )
    missing = {
        "model.hidden_dropout is 0": model.norm_order == "pre" and model.hidden_dropout == 0,
        "model.qk_norm_groups is 0 (no QK-norm)": qk_norm_groups(model) == 0,
        "training.z_loss is 0": config.training.z_loss == 0,
    }
    reasons = [words for words, is_missing in missing.items() if is_missing]
    count = count_parameters(model, VOCAB_SIZE)
    if reasons and count >= _LARGE:
        needs = "dropout, " if model.norm_order == "pre" else ""
        found.append(
            f"{' and '.join(reasons)} at {count / 1e9:.1f}B parameters with model.norm_order "
            f"{model.norm_order}: the paper needed {needs}QK-norm and z-loss together to keep such "
            "a model from diverging (section 2.3)"
        )
    return found
