"""``chameleon plot RUN... --output FILE``: draw the curves of one or more runs.

chameleon plot runs/digits --output curves.svg --keys loss_text,loss_image --smooth 20
"""

import argparse
import io
import logging
from pathlib import Path

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import COUNT
from megatron_chameleon.wording import counted

KEYS = "loss_text,loss_image,grad_norm,learning_rate"
SUFFIXES = (".png", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder or a metrics.jsonl")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="the .png or .svg file to write"
    )
    parser.add_argument("--keys", default=KEYS, help=f"metrics, one panel each (default: {KEYS})")
    parser.add_argument(
        "--smooth",
        type=COUNT,
        default=1,
        metavar="N",
        help="draw the mean of the last N steps (default: 1)",
    )


def run(args: argparse.Namespace) -> None:
    """Read the metrics and write the figure."""
    from megatron_chameleon.checkpoint.state.line import METRICS_FILE
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.evaluation.curves import draw_curves, read_whole_metrics
    from megatron_chameleon.files import write_bytes
    from megatron_chameleon.outputs import check_name, check_output

    inputs = [path / METRICS_FILE if path.is_dir() else path for path in map(Path, args.runs)]
    output = check_name("--output", args.output)
    if output.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            str(output), f"the suffix is {output.suffix!r}", f"Use {' or '.join(SUFFIXES)}"
        )
    keys = [key.strip() for key in args.keys.split(",") if key.strip()]
    if not keys:
        raise ConfigError("--keys", "no key is given", f"Write, for example, {KEYS}")
    check_output("--output", output, inputs)
    with announced(f"reading the metrics of {counted(len(args.runs), 'run')}"):
        names = zip(_names(args.runs), args.runs, strict=True)
        runs = {name: read_whole_metrics(path) for name, path in names}
    content = io.BytesIO()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where HOME is read-only
    with announced(f"drawing {counted(len(keys), 'panel')}"):
        figure = draw_curves(runs, keys, args.smooth)
        figure.savefig(content, dpi=150, format=output.suffix[1:].lower())
    write_bytes(output, content.getvalue())
    steps = ", ".join(f"{name} to step {found.last_step:,}" for name, found in runs.items())
    show(f"{output}: {len(keys)} panels, {steps}")


def _names(paths: list[str]) -> list[str]:
    """A name for each run: that of its folder, or the whole path where two names are the same."""
    folders = [Path(path).parent if Path(path).is_file() else Path(path) for path in paths]
    names = [folder.resolve().name for folder in folders]
    names = [
        name if names.count(name) == 1 else str(path)
        for name, path in zip(names, paths, strict=True)
    ]
    return [name if names.index(name) == i else f"{name} ({i + 1})" for i, name in enumerate(names)]
