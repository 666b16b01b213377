"""A real vLLM draws the tokens of our own engine, alone and beside others.

``make test-vllm`` runs this in an environment of its own; vLLM needs a minute to start.
"""

import asyncio
from pathlib import Path

import pytest

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.inference.engine.batching.service import DecoderEngine
from megatron_chameleon.inference.engine.interface import TokenEngine, TokenRequest
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.session import Session
from megatron_chameleon.inference.vllm.opening import open_exported
from tiny_model import TEXTS, VOCAB_SIZE, random_tensors, write_checkpoint, write_tokenizer

CODES = 16
WISHES = (
    {"force": Force.TEXT},
    {"force": Force.IMAGE},
    {},
    {"images": False, "repetition_penalty": 2.0},
    {"force": Force.IMAGE, "guidance": 3.0},
    {"force": Force.IMAGE, "guidance": 3.0, "guidance_image": 1.2},
    {"guidance": 2.0},
    {"guidance": 2.0, "guidance_image": 1.0},
)


@pytest.fixture(scope="module", params=["pre", "swin"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with grouped queries, shared QK-norms and a head size that CPUs have."""
    folder = tmp_path_factory.mktemp("exported")
    model = ModelConfig(
        num_layers=3,
        hidden_size=128,
        ffn_hidden_size=80,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=96,
        norm_order=request.param,
        qk_norm_groups=2,
    )
    tokenizer = write_tokenizer(folder / "tokenizer")
    tensors = random_tensors(model, VOCAB_SIZE)
    checkpoint = write_checkpoint(folder / "checkpoint", model, tensors, tokenizer)
    convert(checkpoint, folder / "exported", "hf")
    return folder / "exported"


def requests(session: Session) -> list[TokenRequest]:
    """Mixed requests: text and images in the prompt, all kinds of answers, greedy and drawn."""
    vocabulary, made = session.tokenizer.vocabulary, []
    codes = [int(code) for code in vocabulary.code_token_ids[:CODES]]
    image = [vocabulary.begin_image, *codes, vocabulary.end_image]
    for number in range(4 * len(WISHES)):
        text = session.tokenizer.text.encode(TEXTS[number % len(TEXTS)][: 3 + number])
        prompt = [vocabulary.bos, *(image if number % 3 else []), *text]
        wish, greedy = WISHES[number % len(WISHES)], number % 16 < 8
        most = CODES + 2 if number % 5 == 0 else 96 - len(prompt)
        options = GenerationOptions(temperature=0.0 if greedy else 1.0, seed=number, **wish)
        made.append(TokenRequest(tuple(prompt), most, options))
    return made


async def answer(engine: TokenEngine, request: TokenRequest) -> tuple[list[int], str]:
    chunks = [chunk async for chunk in engine.generate(request)]
    return [t for chunk in chunks for t in chunk.token_ids], str(chunks[-1].finish)


def test_tokens_are_those_of_our_engine(exported: Path) -> None:
    session = Session.load(exported)
    asked = requests(session)

    async def both() -> None:
        ours = DecoderEngine(session.decoder())
        await ours.start()
        expected = await asyncio.gather(*(answer(ours, request) for request in asked))
        await ours.stop(10)
        options = [f"kv_cache_memory_bytes={2**28}", "block_size=32", "max_num_seqs=20"]
        engine = open_exported(exported, "cpu", options).engine
        await engine.start()
        try:
            for request in asked:
                engine.check(request)
            together = await asyncio.gather(*(answer(engine, request) for request in asked))
            alone = [await answer(engine, request) for request in asked]
        finally:
            await engine.stop(10)
        greedy = [n for n, request in enumerate(asked) if request.options.temperature == 0]
        for found in (together, alone):
            assert [found[n] for n in greedy] == [expected[n] for n in greedy]
            # a random number between two tokens may fall to the other side by rounding
            assert sum(a == b for a, b in zip(found, expected, strict=True)) >= len(asked) - 2
        assert engine.usage().running == 0

    asyncio.run(both())
