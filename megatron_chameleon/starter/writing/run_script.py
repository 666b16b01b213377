"""``run.sh``: the commands of every step, each usable alone, the whole repeatable after a kill."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

HEAD = """\
#!/usr/bin/env bash
# Written by `chameleon init`. Every step from your files to a report:
#
#   bash run.sh                  # all steps; after a kill or a change, run it again to go on
#   bash run.sh train report     # only these, in this order: {names}
#   QUICK=1 bash run.sh          # the same commands in a minute or two; the model learns nothing
#
# Finished steps are not repeated. To repeat a step, remove its result.
# A killed training of the image tokenizer goes on where it last saved, as that of the model does.
# If image.yaml has changed since, remove tokenizer/image.partial.
#
# Paths to your files are absolute. If you move this folder, set variables.folder in train.yaml to
# its new place. On another machine, say which Python has megatron_chameleon:
#   PYTHON=/path/to/python bash run.sh
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
PYTHON=${{PYTHON:-{python}}}
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}}
chameleon() {{ "$PYTHON" -m megatron_chameleon "$@"; }}
say() {{ printf '\\n== %s  (%ss)\\n' "$1" "$SECONDS"; }}
# older RESULT FILE: whether to make the result again
older() {{ [ ! -e "$1" ] || [ "$2" -nt "$1" ]; }}
"""


@dataclass
class Step:
    """One function of the script."""

    name: str
    about: str
    body: list[str]
    result: str = ""
    """The file that the step writes last; it is skipped if that is there. Empty: the commands see
    to it."""


@dataclass
class ScriptSettings:
    """What ``run.sh`` does."""

    python: str
    threads: int
    data: Sequence[str]
    """The user's paths, for ``data collect``; empty if nothing is loose."""
    collected: Sequence[str]
    """Names of the files that it writes."""
    excluded: Sequence[str]
    claimed: Sequence[str]
    """Folders from which documents take their pictures."""
    captions: str
    words: dict[str, Sequence[str]]
    """Inputs of each source."""
    fallback_text: bool
    """Whether the text tokenizer has only ``tokenizer_text.txt``."""
    vocab_size: int
    image_codes: int
    has_pictures: bool
    image_roots: Sequence[str]
    holdout: float | None
    workers: int
    prompts: Sequence[Sequence[str]]
    """Options of ``generate`` for each prompt."""
    launch: str = ""
    """How ``train`` is started on several GPUs; empty: as one process."""
    has_held_out: bool = True
    undivided: Sequence[str] = ()
    """Sources of which nothing is held out."""
    seed: int = 1
    notes: list[str] = field(default_factory=list)


def run_script(settings: ScriptSettings) -> str:
    """The text of ``run.sh``."""
    steps = _steps(settings)
    names = " ".join(step.name for step in steps)
    text = HEAD.format(names=names, python=shlex.quote(settings.python), threads=settings.threads)
    for note in settings.notes:
        text += f"# {note}\n"
    text += _quick(settings)
    for step in steps:
        lines = [f'    say "{step.about}"']
        if step.result:
            lines.append(
                f"    if [ -e {step.result} ]; then echo '{step.result} is there'; return; fi"
            )
        lines += [f"    {line}" for line in step.body]
        text += f"\nstep_{step.name}() {{\n" + "\n".join(lines) + "\n}\n"
    text += f"\n[ $# -gt 0 ] || set -- {names}\n"
    text += f"""\
for name in "$@"; do
    case " {names} " in
        *" $name "*) ;;
        *) echo "error: no step is called $name. Use: {names}" >&2; exit 2 ;;
    esac
done
for name in "$@"; do "step_$name"; done
"""
    return text


def _quick(settings: ScriptSettings) -> str:
    image = "training.steps=4 training.lr_warmup_steps=1" if settings.has_pictures else ""
    train = "training.steps=4 optimizer.lr_warmup_steps=1 checkpoint.every_steps=2"
    train += " logging.sample_every_steps=4"
    if settings.has_held_out:
        train += " data.validation.every_steps=2 data.validation.modality_prompts=2"
    return (
        "image=() train=() generate=()\n"
        f'if [ -n "${{QUICK:-}}" ]; then image=({image}) train=({train}) '
        "generate=(--max-tokens 40); fi\n"
    )


def quoted(words: Sequence[str]) -> str:
    """Words for a shell, one after the other."""
    return " ".join(map(shlex.quote, words))


def _steps(settings: ScriptSettings) -> list[Step]:
    steps: list[Step] = []
    roots = [word for root in settings.image_roots for word in ("--image-root", root)]
    if settings.data:
        options = [word for path in settings.excluded for word in ("--exclude", path)]
        options += [word for path in settings.claimed for word in ("--claimed", path)]
        command = f"chameleon data collect {quoted(settings.data)} --output data"
        options += ["--captions", settings.captions]
        steps.append(
            Step(
                "documents",
                "documents: write a file of documents for your loose pictures and texts",
                [f"{command} {quoted(options)}"],
                f"data/{settings.collected[-1]}.jsonl",
            )
        )
    inputs = {name: list(words) or [f"data/{name}.jsonl"] for name, words in settings.words.items()}
    every = [word for words in inputs.values() for word in words]
    steps += _tokenizer_steps(settings, every, roots)
    steps += [_preprocess(settings, inputs, roots), *_model_steps(settings)]
    return steps


def _tokenizer_steps(
    settings: ScriptSettings, every: Sequence[str], roots: Sequence[str]
) -> list[Step]:
    texts = ["tokenizer_text.txt"] if settings.fallback_text else every
    sizes = f"--vocab-size {settings.vocab_size} --image-codes {settings.image_codes}"
    found = [
        Step(
            "text_tokenizer",
            "text_tokenizer: learn a vocabulary",
            [f"chameleon tokenizer text {quoted(texts)} --output tokenizer {sizes}"],
            "tokenizer/vocabulary.json",
        )
    ]
    if settings.has_pictures:
        options = f"--config image.yaml --output tokenizer --seed {settings.seed}"
        command = f"chameleon tokenizer image {quoted([*every, *roots])} {options}"
        found.append(
            Step(
                "image_tokenizer",
                "image_tokenizer: learn to turn pictures into codes and back",
                [f'{command} "${{image[@]}}"'],
                "tokenizer/image.json",
            )
        )
    return found


def _preprocess(
    settings: ScriptSettings, inputs: dict[str, list[str]], roots: Sequence[str]
) -> Step:
    options = ["--workers", str(settings.workers), *roots]
    held = [] if settings.holdout is None else ["--holdout", repr(settings.holdout)]
    body = [
        f"chameleon preprocess {quoted(words)} --tokenizer tokenizer --output tokens/{name} "
        f"{quoted([*options, *([] if name in settings.undivided else held)])}"
        for name, words in inputs.items()
    ]
    return Step("tokens", "tokens: turn the documents into token files", body)


def _model_steps(settings: ScriptSettings) -> list[Step]:
    launch = settings.launch or "chameleon"
    has_images = settings.has_pictures
    form = "hf" if has_images else "megatron"
    steps = [
        Step(
            "train",
            "train: it saves, and goes on from its newest checkpoint",
            [f'{launch} train train.yaml "${{train[@]}}"'],
        )
    ]
    best = "best=$(chameleon status . --best)  # the checkpoint with the lowest held-out loss"
    if settings.has_held_out:
        steps.append(
            Step(
                "measure",
                "measure: the held-out loss of the best checkpoint",
                [
                    best,
                    'if older held_out_loss.txt "$best/state.json"; then',
                    '    chameleon evaluate-loss "$best" > held_out_loss.part',
                    "    mv held_out_loss.part held_out_loss.txt",
                    "fi",
                    "cat held_out_loss.txt",
                ],
            )
        )
    steps.append(
        Step(
            "export",
            f"export: a folder in {'Hugging Face' if has_images else 'the project'}'s format",
            [
                best,
                'if older exported "$best/state.json"; then',
                "    rm -rf exported",
                f'    chameleon convert "$best" exported --to {form}',
                "else echo 'exported is there'; fi",
            ],
        )
    )
    generate = [
        f"rm -rf drawn/{number}; chameleon generate exported {quoted(words)} "
        f'--output drawn/{number} "${{generate[@]}}"'
        for number, words in enumerate(settings.prompts, start=1)
    ]
    if generate:
        steps.append(Step("generate", "generate: ask the model, into drawn/", generate))
    steps.append(
        Step(
            "report",
            "report: one page with curves, samples and what stands out",
            [
                "mkdir -p report",
                "chameleon report . --output report/index.html",
                'echo "Open $PWD/report/index.html"',
            ],
        )
    )
    return steps
