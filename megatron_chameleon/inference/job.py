"""A session of one process, or of all processes of a job that share a model.

    if find_launch().rank > 0:
        follow(path)                  # until rank 0 closes its session
    else:
        session = open_session(path)  # also in a process that is alone
        ...
        session.close()

torchrun, srun and mpiexec start such jobs. Each process takes its GPU if the machine has any, and
all of them are tensor-parallel ranks of the model that training uses.
"""

import tempfile
from pathlib import Path

from megatron_chameleon.announce import announced
from megatron_chameleon.checkpoint.formats.adapted import AdaptedReader
from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint, open_tokenizer
from megatron_chameleon.inference.chat import prompt_format
from megatron_chameleon.inference.session import Session
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.launch import Launch, find_launch
from megatron_chameleon.tokenizer.folder import Tokenizer


def open_session(
    path: str | Path,
    device: str = "cpu",
    tokenizer_folder: str | Path | None = None,
    *,
    ema: bool = False,
) -> Session:
    """Open a model on rank 0, or alone. The arguments and errors are those of ``Session.load``.

    With several processes, ``device`` does not matter, and ``Session.model`` is None. So it is if
    the model has no QK-norm, which transformers' Chameleon cannot leave out.
    """
    launch = find_launch()
    path = Path(path)
    if launch.world_size == 1 and open_checkpoint(path).dimensions.q_norm_groups:
        return Session.load(path, device, tokenizer_folder, ema=ema)
    from megatron_chameleon.inference.models.ranks import lead

    with announced(f"loading the model from {path} on {launch.world_size} ranks"):
        reader, tokenizer = _open(path, tokenizer_folder, ema, _device(launch))
        decoder = lead(reader, tokenizer, launch)
        return Session(
            *(None, tokenizer, reader.step, prompt_format(reader)),
            decoder=decoder,
            has_adapter=isinstance(reader, AdaptedReader),
        )


def follow(
    path: str | Path, tokenizer_folder: str | Path | None = None, *, ema: bool = False
) -> None:
    """Open a model on another rank, and work with it until rank 0 closes its session.

    Raises:
        ChameleonError: As ``open_session``, or rank 0 has ended without a word.
    """
    from megatron_chameleon.inference.models.ranks import follow_rank_0

    reader, tokenizer = _open(Path(path), tokenizer_folder, ema, "cpu")
    follow_rank_0(reader, tokenizer, find_launch())


def _device(launch: Launch) -> str:
    """Where the images of rank 0 are computed, before it has joined the job."""
    return f"cuda:{launch.local_rank}" if platform.has_gpu() else "cpu"


def _open(
    path: Path, tokenizer_folder: str | Path | None, ema: bool, device: str
) -> tuple[CheckpointReader, Tokenizer]:
    reader = open_checkpoint(path, ema=ema)
    with tempfile.TemporaryDirectory() as scratch:
        return reader, open_tokenizer(reader, tokenizer_folder, Path(scratch), device)
