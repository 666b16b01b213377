"""Let the model write text and images every few steps of training, and show them on a page.

``samples/step_00001000/`` holds ``samples.jsonl`` and the images of a step; ``samples/index.html``
shows all steps. The model that is being trained writes them, on rank 0 and the ranks that share its
tensors, as ``chameleon generate`` would do with a checkpoint of the step. Training is not affected,
and a sample that cannot be written does not end it.
"""

import html
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_chameleon.checkpoint.state.folders import step_folder, step_of
from megatron_chameleon.config.schema import Config, SamplePromptConfig
from megatron_chameleon.errors import ChameleonError, ConfigError, PeerError, TrainingError
from megatron_chameleon.files import make_folder, write_text, write_together
from megatron_chameleon.inference.engine.batching.cache import ODD_COLUMNS
from megatron_chameleon.inference.engine.batching.continuous import ContinuousDecoder
from megatron_chameleon.inference.engine.batching.lockstep import Channel, LockstepDecoder, follow
from megatron_chameleon.inference.engine.modality import Force, TokenClasses
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.runs.samples import SAMPLES_FILE
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer
from megatron_chameleon.tokenizer.image.tokenizer import read_vqgan_config

if TYPE_CHECKING:
    from megatron_chameleon.inference.answers.answer import Answer


def check_samples(config: Config) -> None:
    """Check before training that the image tokenizer and the images of the prompts exist.

    Raises:
        ChameleonError: Something is missing.
    """
    if not config.logging.sample_every_steps:
        return
    load_tokenizer(config.tokenizer.path)
    for i, prompt in enumerate(config.logging.sample_prompts):
        if prompt.image is not None and not Path(prompt.image).is_file():
            what = f"no such image file: {prompt.image}"
            where = f"logging.sample_prompts[{i}].image"
            raise ConfigError(where, what, "Give the path of an image, or null")


class Sampler:
    """Writes the samples of a run.

    Making one is a collective of the job.

    Args:
        config: A checked config.
        topology: The place of this process.
    """

    def __init__(self, config: Config, topology: Topology) -> None:
        self._config, self._topology = config, topology
        self._every = config.logging.sample_every_steps
        self._folder = Path(config.logging.run_dir) / "samples"
        # Only the ranks that hold parts of rank 0's model; the others hold copies.
        self._takes_part = topology.data_rank == 0 and topology.context_rank == 0
        self._tokenizer: Tokenizer | None = None
        if self._every:
            self._channel = Channel(list(range(topology.tensor_size)))

    def is_due(self, step: int) -> bool:
        """Whether the config wants samples after this step, counted from 1."""
        return self._every > 0 and step % self._every == 0

    def sample(self, step: int, model: Any) -> str:
        """Write the samples of a step on rank 0. A collective of its tensor-parallel group.

        Args:
            step: The step that was just done, counted from 1.
            model: This rank's part of the model, whose weights are those after the step. It is as
                before afterwards.

        Returns:
            A line for the user; empty on the other ranks.

        Raises:
            TrainingError: On rank 0, if the file system refuses a file.
            PeerError: Another rank has ended.
        """
        if not self._takes_part:
            return ""
        is_first = self._topology.rank == 0
        try:
            tokenizer, failure = self._open_tokenizer() if is_first else None, None
            vocabulary = Vocabulary.load(self._config.tokenizer.path)
            image_codes = read_vqgan_config(self._config.tokenizer.path).codes_per_image
        except ChameleonError as error:
            failure = error
        if not self._channel.agree(failure is None):  # nobody waits for a rank that cannot answer
            what = failure or "another rank cannot read the tokenizer"
            return f"step {step}: no samples were written: {what}" if is_first else ""
        try:
            with self._decoder(model, vocabulary, image_codes) as decoder:
                if tokenizer is None:
                    follow(decoder, self._channel, self._topology.rank)
                    return ""
                leader = LockstepDecoder(decoder, self._channel, fail=lambda error: None)
                answers = self._answer(step, leader, tokenizer)
            folder = self._folder / step_folder(step)
            _write_answers(folder, self._config.logging.sample_prompts, answers)
            _write_index(self._folder, self._config.logging.sample_prompts)
        except (TrainingError, PeerError):  # the folder or the disk, or the job
            raise
        except (ChameleonError, OSError, torch.OutOfMemoryError) as error:
            return f"step {step}: no samples were written: {str(error).splitlines()[0]}"
        return f"sampled {folder}"

    def _open_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            path = self._config.tokenizer.path
            self._tokenizer = load_tokenizer(path, device=platform.device())
        return self._tokenizer

    @contextmanager
    def _decoder(
        self, model: Any, vocabulary: Vocabulary, image_codes: int
    ) -> Iterator[ContinuousDecoder]:
        """A decoder of this rank, with room for all prompts side by side."""
        from megatron_chameleon.inference.models.megatron_layers import MegatronLayers
        from megatron_chameleon.inference.models.ranks import execution_on

        device, prompts = platform.device(), len(self._config.logging.sample_prompts)
        classes = TokenClasses(vocabulary, device)
        with MegatronLayers.borrowed(model, classes.code_token_ids, vocabulary.size) as layers:
            yield ContinuousDecoder(
                layers,
                classes,
                image_codes,
                execution_on(device.type),
                cache_tokens=prompts * (layers.context_tokens + ODD_COLUMNS),
            )

    def _answer(self, step: int, decoder: LockstepDecoder, tokenizer: Tokenizer) -> "list[Answer]":
        from megatron_chameleon.inference.session import Session

        logging = self._config.logging
        options = [
            GenerationOptions(
                max_tokens=logging.sample_max_tokens,
                force=Force(prompt.force) if prompt.force else None,
                seed=self._config.training.seed,
            )
            for prompt in logging.sample_prompts
        ]
        session = Session(None, tokenizer, step, decoder=decoder)
        try:
            return session.generate_each([_parts(p) for p in logging.sample_prompts], options)
        finally:
            session.close()


def _parts(prompt: SamplePromptConfig) -> list[Any]:
    from megatron_chameleon.data.documents.image_part import ImagePart
    from megatron_chameleon.data.documents.schema import TextPart

    parts: list[Any] = [] if prompt.image is None else [ImagePart(prompt.image)]
    return [*parts, TextPart(prompt.text)] if prompt.text else parts


def _write_answers(
    folder: Path, prompts: Sequence[SamplePromptConfig], answers: "Sequence[Answer]"
) -> None:
    from megatron_chameleon.inference.answers.files import parts_and_images

    make_folder(folder, TrainingError)
    lines = []
    images: dict[Path, bytes] = {}
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        parts, files = parts_and_images(number, answer)
        images.update({folder / name: content for name, content in files.items()})
        line = {"prompt": vars(prompt), "content": parts, "token_ids": answer.token_ids}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    text = "".join(lines).encode("utf-8", "surrogatepass")
    write_together({folder / SAMPLES_FILE: text, **images}, TrainingError)


PAGE = """<!doctype html><meta charset="utf-8"><title>Samples</title>
<style>body{{font:15px/1.5 sans-serif;margin:2em}}td,th{{border-top:1px solid #ddd;padding:.5em;
text-align:left;vertical-align:top}}img{{min-width:96px;image-rendering:pixelated}}</style>
<h1>Samples</h1><table><tr><th>step{header}</tr>
{rows}</table>
"""


def _write_index(folder: Path, prompts: Sequence[SamplePromptConfig]) -> None:
    """Write the page of all steps in the folder, the newest first."""
    header = "".join(f"<th>{_show_prompt(prompt)}" for prompt in prompts)
    rows = []
    for file in sorted(folder.glob(f"step_*/{SAMPLES_FILE}"), reverse=True):
        cells = [
            "".join(_show_part(file.parent.name, part) for part in json.loads(line)["content"])
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        step = step_of(file.parent)
        rows.append(f"<tr><th>{step:,}{''.join(f'<td>{cell}' for cell in cells)}</tr>\n")
    page = PAGE.format(header=header, rows="".join(rows))
    write_text(folder / "index.html", page, TrainingError)


def _show_prompt(prompt: SamplePromptConfig) -> str:
    words = [prompt.image and Path(prompt.image).name, prompt.text]
    words.append(prompt.force and f"({prompt.force})")
    return html.escape(" ".join(word for word in words if word) or "(no prompt)")


def _show_part(folder: str, part: dict[str, str]) -> str:
    if part["type"] == "text":
        return f"<p>{html.escape(part['text'])}</p>"
    return f'<img src="{html.escape(folder)}/{html.escape(part["image"])}">'
