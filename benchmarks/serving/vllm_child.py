"""Answers with vLLM: lines of JSON in, lines of JSON out. ``vllm_process.py`` starts it.

PYTHON -m benchmarks.serving.vllm_child FOLDER CODES_PER_IMAGE
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import psutil

from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.inference.engine.interface import TokenRequest
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.vllm.engine import VllmEngine
from megatron_chameleon.tokenizer.common.image_form import ImageForm
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary


def cpu_seconds() -> float:
    """Of this process and vLLM's."""
    me = psutil.Process()
    used = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(times.user + times.system for times in used)


async def answer(engine: VllmEngine, request: TokenRequest) -> list[int]:
    return [token async for chunk in engine.generate(request) for token in chunk.token_ids]


async def main() -> None:
    folder, codes = Path(sys.argv[1]), int(sys.argv[2])
    context = open_checkpoint(folder).model.seq_length
    options = {"max_num_seqs": 64}
    engine = VllmEngine(folder, ImageForm(Vocabulary.load(folder), codes), context, options)
    await engine.start()
    print(json.dumps("ready"), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        settings = GenerationOptions(
            temperature=0,
            repetition_penalty=1.0,
            force=Force.IMAGE if asked["image"] else Force.TEXT,
        )
        requests = [TokenRequest(tuple(p), asked["tokens"], settings) for p in asked["prompts"]]
        begin, cpu = time.perf_counter(), cpu_seconds()
        answers = await asyncio.gather(*(answer(engine, request) for request in requests))
        seconds = cpu_seconds() - cpu if asked["cpu_time"] else time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "answers": answers}), flush=True)
    await engine.stop(0)


if __name__ == "__main__":
    asyncio.run(main())
