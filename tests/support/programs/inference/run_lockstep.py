"""Answer on several ranks, with all well or not, and write what rank 0 and the others find.

A job is {"name", "processes", "checkpoint",
"port", "fault"}; a fault is null, "follower ends", "leader ends" or "follower draws". For each job
it writes NAME.json, the answers of rank 0 or the message of the rank that is left.
"""

import json
import os
from pathlib import Path
from typing import Any

import mixed_requests
import torch

from megatron_chameleon.checkpoint.formats.opening import open_checkpoint, open_tokenizer
from megatron_chameleon.errors import PeerError
from megatron_chameleon.inference.engine.batching import lockstep
from megatron_chameleon.inference.engine.batching.continuous import ContinuousDecoder
from megatron_chameleon.inference.models import ranks
from megatron_chameleon.parallel.launch import Launch

lockstep.SIGN_OF_LIFE_SECONDS = 0.2


def run_job(job: dict[str, Any], output: Path) -> None:
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    launch = Launch("torchrun", rank, job["processes"], rank)
    reader = open_checkpoint(job["checkpoint"])
    tokenizer = open_tokenizer(reader, None, output / f"{job['name']}-{rank}-scratch")
    fault = job["fault"]
    if fault and fault.startswith("follower" if rank else "leader"):
        spoil(fault)
    result: Any = None
    try:
        if rank == 0:
            decoder = ranks.lead(reader, tokenizer, launch, raise_it, cache_tokens=2048)
            result = mixed_requests.answers(decoder, tokenizer.vocabulary)
            decoder.close()
        else:
            ranks.follow_rank_0(reader, tokenizer, launch, raise_it, cache_tokens=2048)
    except PeerError as error:
        result = str(error)
    if result is not None:
        (output / f"{job['name']}-{rank}.json").write_text(json.dumps(result))
    if fault:
        os._exit(0)  # the group is broken


def raise_it(error: PeerError) -> None:
    raise error


def spoil(fault: str) -> None:
    """Let this rank end, or draw another token, after some steps."""
    step, count = ContinuousDecoder.step, 0

    def spoiled(decoder: ContinuousDecoder) -> Any:
        nonlocal count
        count += 1
        if count < 6:
            return step(decoder)
        if fault.endswith("ends"):
            os._exit(0)
        events = step(decoder)
        events[0][1].token_ids[0] += 1
        return events

    ContinuousDecoder.step = spoiled
