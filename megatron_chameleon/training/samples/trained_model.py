"""Ask the model that is being trained, as ``chameleon generate`` would ask a checkpoint of it.

It answers on rank 0 and the ranks that share its tensors, and is left as it was.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ChameleonError, DataError
from megatron_chameleon.inference.engine.batching.cache import ODD_COLUMNS
from megatron_chameleon.inference.engine.batching.continuous import ContinuousDecoder
from megatron_chameleon.inference.engine.batching.lockstep import Channel, LockstepDecoder, follow
from megatron_chameleon.inference.engine.modality import TokenClasses
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.tokenizer.common.image_form import ImageForm
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
from megatron_chameleon.tokenizer.folder import Tokenizer, drawn_codes, load_tokenizer

if TYPE_CHECKING:
    from megatron_chameleon.inference.session import Session

T = TypeVar("T")


def can_answer(config: Config) -> bool:
    """Whether the layout holds whole layers and weights, which answering needs."""
    zero_stage = config.engine.zero_stage if config.engine.name == "deepspeed" else 0
    return config.parallel.pipeline_model_parallel_size == 1 and zero_stage < 3


class TrainedModel:
    """The model that is being trained.

    Making one is a collective of the job.

    Args:
        config: A checked config, of a layout that can answer.
        topology: The place of this process.

    Attributes:
        takes_part: Whether this rank holds a part of rank 0's model; the others hold copies.
        is_first: Whether this is rank 0.
    """

    def __init__(self, config: Config, topology: Topology) -> None:
        self._path, self._rank = config.tokenizer.path, topology.rank
        self.takes_part = topology.data_rank == 0 and topology.context_rank == 0
        self.is_first = topology.rank == 0
        self._tokenizer: Tokenizer | None = None
        self._channel = Channel(list(range(topology.tensor_size)))

    def ask(self, model: Any, step: int, rows: int, ask: "Callable[[Session], T]") -> T | None:
        """Open a session on rank 0 and use it. A collective of the ranks that take part.

        Args:
            model: This rank's part of the model. It is as before afterwards.
            step: The step that was just done, counted from 1.
            rows: How many answers may grow side by side, if there is memory for them.
            ask: Called on rank 0 with the session, which is closed afterwards.

        Returns:
            What ``ask`` returned; None on the other ranks.

        Raises:
            ChameleonError: On rank 0, if a rank cannot read the tokenizer, or from ``ask``.
            PeerError: Another rank has ended.
        """
        assert self.takes_part, "a rank that holds a copy was asked"
        failure: ChameleonError | None = None
        tokenizer = None
        try:
            tokenizer = self._open_tokenizer() if self.is_first else None
            vocabulary = Vocabulary.load(self._path)
            form = ImageForm(vocabulary, drawn_codes(self._path))
        except ChameleonError as error:
            failure = error
        if not self._channel.agree(failure is None):  # nobody waits for a rank that cannot answer
            if not self.is_first:
                return None
            remedy = "Put it where every node finds it"
            raise failure or DataError(self._path, "another rank cannot read it", remedy)
        with self._decoder(model, form, rows) as decoder:
            if tokenizer is None:
                follow(decoder, self._channel, self._rank)
                return None
            leader = LockstepDecoder(decoder, self._channel, fail=lambda error: None)
            return _use(leader, tokenizer, step, ask)

    def _open_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._path, images=None, device=platform.device())
        return self._tokenizer

    @contextmanager
    def _decoder(self, model: Any, form: ImageForm, rows: int) -> Iterator[ContinuousDecoder]:
        """A decoder of this rank, with room for all answers side by side."""
        from megatron_chameleon.inference.models.megatron_layers import MegatronLayers
        from megatron_chameleon.inference.models.ranks import common_cache_tokens, execution_on

        device = platform.device()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what training holds without need counts as taken
        vocabulary = form.vocabulary
        classes = TokenClasses(vocabulary, device)
        with MegatronLayers.borrowed(model, classes.code_token_ids, vocabulary.size) as layers:
            most = rows * (layers.context_tokens + ODD_COLUMNS)
            yield ContinuousDecoder(
                layers,
                classes,
                form,
                execution_on(device.type),
                cache_tokens=min(most, common_cache_tokens(layers, self._channel)),
            )


def _use(
    decoder: LockstepDecoder, tokenizer: Tokenizer, step: int, ask: "Callable[[Session], T]"
) -> T:
    from megatron_chameleon.inference.session import Session

    session = Session(None, tokenizer, step, decoder=decoder)
    try:
        return ask(session)
    finally:
        session.close()
