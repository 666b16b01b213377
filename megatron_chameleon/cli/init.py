"""``chameleon init DATA...``: look at your files, and write a folder with everything a run needs.

chameleon init photos/ --output runs/photos
bash runs/photos/run.sh
"""

import argparse
from pathlib import Path

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import SEED, add_image_options, image_options
from megatron_chameleon.wording import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="files or folders: pictures, .txt or .md texts, and documents as for preprocess",
    )
    parser.add_argument(
        "--size",
        choices=("tiny", "small", "7b", "34b"),
        help="tiny: minutes on a CPU (the default without a GPU); small: one GPU; 7b, 34b: the "
        "paper's models on a cluster",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="the folder to write, which becomes the run folder (default: runs/NAME)",
    )
    parser.add_argument(
        "--captions",
        choices=("names", "none"),
        default="names",
        help="caption of a picture without a text: the words of its folder's and file's names (the "
        "default), or none",
    )
    parser.add_argument(
        "--seed",
        type=SEED,
        default=1,
        metavar="N",
        help="seed of the image tokenizer's training and of the model's (default: 1)",
    )
    add_image_options(parser)


def run(args: argparse.Namespace) -> None:
    from megatron_chameleon.outputs import check_output_folder
    from megatron_chameleon.starter.looking.look import Looking
    from megatron_chameleon.starter.project import Wanted, plan_project, write_project
    from megatron_chameleon.starter.summary import summary
    from megatron_chameleon.terminal import escape_text

    output = Path(args.output) if args.output is not None else _default_output(args.data)
    check_output_folder("--output", output)
    _check_new(output)
    looking = Looking(
        captions=args.captions, images=image_options(args), excluded=(str(output.absolute()),)
    )
    with announced(f"looking at {counted(len(args.data), 'path')}, and measuring this machine"):
        project = plan_project(Wanted(args.data, output, args.size, looking, args.seed))
    written = write_project(project)
    show(escape_text(summary(project, written)))


def _default_output(data: list[str]) -> Path:
    name = Path(data[0].rstrip("/")).resolve().stem if "://" not in data[0] else "data"
    return Path("runs") / (name or "data")


def _check_new(output: Path) -> None:
    """Refuse a folder that holds something else, or a run that has begun."""
    from megatron_chameleon.errors import ConfigError

    if not output.is_dir():
        return
    names = {path.name for path in output.iterdir()}
    own = {"train.yaml", "run.sh", "image.yaml", "tokenizer_text.txt"}
    if names and not {"train.yaml", "run.sh"} <= names:
        what = f"is a folder with other files ({', '.join(sorted(names)[:4])})"
        raise ConfigError(f"--output {output}", what, "Name a new folder")
    if names - own:
        begun = ", ".join(sorted(names - own)[:4])
        what = f"holds a project that has begun ({begun})"
        remedy = f"Go on with `bash {output}/run.sh`, name another folder, or remove this one"
        raise ConfigError(f"--output {output}", what, remedy)
