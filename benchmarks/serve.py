"""Speed of answers on one CPU core: our engine against transformers and, where it is, vLLM.

    python -W ignore -m benchmarks.serve --model runs/digits/exported      # about ten minutes
    python -W ignore -m benchmarks.serve --only 340M --batches 32
    python -W ignore -m benchmarks.serve --quick                           # tiny, as a check
    python -W ignore -m benchmarks.serve --model DIR --vllm-python /opt/vllm/bin/python

All have the same weights and prompts, and answer in turns; the medians over the rounds are printed.
Texts at temperature 0 are compared before anything is timed; a few may differ by rounding, where
two tokens are almost equally likely.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.serving.arrivals import (
    LONGEST_PROMPT,
    Load,
    random_arrivals,
    serve_continuously,
    serve_in_batches,
)
from benchmarks.serving.contestants import Answers, Block, Generate, Ours, TransformersBatching
from benchmarks.serving.subjects import Subject, opened_subject, random_subject
from benchmarks.serving.vllm_process import VllmProcess

PROMPT_TOKENS = 8
MEAN_TOKENS = 16
"""Of the answers to requests that arrive at random."""
BLOCKS = (Block(image=False), Block(image=False, sampled=True), Block(image=True))
Turn = Callable[[], tuple[float, Answers]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of an exported model to ask as well")
    parser.add_argument("--only", choices=["340M", "tiny", "model"], help="ask one model only")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--vllm-python", type=Path, help="interpreter that has vLLM")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU time, for a machine that others also use"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.quick:
        args.batches, args.rounds, args.only = [1, 3], 1, args.only or "tiny"
    for subject in subjects(args):
        count = sum(p.numel() for p in subject.model.parameters())
        print(f"\n{subject.name}: {count / 1e6:.1f}M parameters, one thread, fp32")
        for part in args.parts:
            PARTS[part](subject, args, clock)


def subjects(args: argparse.Namespace) -> list[Subject]:
    found = []
    if args.only == "tiny":
        found.append(random_subject("tiny", codes_per_image=4, text_tokens=6))
    if args.only in (None, "340M"):
        # of an image's 1,024 codes, the first few cost as much as the others but for attention
        found.append(random_subject("340M", codes_per_image=16, text_tokens=8))
    if args.model and args.only in (None, "model"):
        found.append(opened_subject(args.model, text_tokens=64))
    return found


def compare_batches(subject: Subject, args: argparse.Namespace, clock: Callable[[], float]) -> None:
    """The table: every block at every batch size."""
    ending, endless, generate = Ours(subject), Ours(subject, ends=False), Generate(subject)
    vllm = args.vllm_python and VllmProcess(args.vllm_python, subject, args.cpu_time)
    print("                  ours, ms  share of   times ours' time per token")
    print("block      batch   per step     limit    generate  its batching        vLLM")
    for block in BLOCKS:
        for batch in args.batches:
            prompts = subject.prompts(batch, PROMPT_TOKENS)
            if subject.folder and not block.image:
                prompts = subject.images(batch)  # what it was trained to describe
            ours = endless if block.sampled else ending
            turns: dict[str, Turn] = {
                "ours": lambda o=ours, p=prompts, b=block: timed(clock, lambda: o.answer(p, b))
            }
            if not block.image:
                turns["generate"] = lambda p=prompts, b=block: timed(
                    clock, lambda: generate.answer(p, b)
                )
            if not (block.image or block.sampled):
                batching = TransformersBatching(subject, batch)
                turns["its batching"] = lambda p=prompts, b=block, c=batching: c.timed(p, b, clock)
            if vllm and not block.sampled:
                turns["vLLM"] = lambda p=prompts, b=block: vllm.timed(p, b)
            answers = {name: turn()[1] for name, turn in turns.items()}
            check_same(answers, block)
            seconds = medians(turns, args.rounds)
            multiply = subject.products(block.image, batch)
            limit = medians({"limit": lambda m=multiply: timed(clock, m)}, 5)["limit"]
            print_row(block, batch, seconds, max(map(len, answers["ours"])), limit)
    if vllm:
        vllm.stop()


def compare_images(subject: Subject, args: argparse.Namespace, clock: Callable[[], float]) -> None:
    """Eight image blocks at once against one after the other."""
    ours, block = Ours(subject), Block(image=True)
    prompts = subject.prompts(max(args.batches[:2]), PROMPT_TOKENS)

    def one_by_one() -> Answers:
        return [answer for prompt in prompts for answer in ours.answer([prompt], block)]

    turns: dict[str, Turn] = {
        "at once": lambda: timed(clock, lambda: ours.answer(prompts, block)),
        "one by one": lambda: timed(clock, one_by_one),
    }
    check_same({name: turn()[1] for name, turn in turns.items()}, block)
    seconds = medians(turns, args.rounds)
    ratio = seconds["one by one"] / seconds["at once"]
    print(f"{len(prompts)} image blocks: one by one takes {ratio:.2f} times as long as at once")


def compare_arrivals(
    subject: Subject, args: argparse.Namespace, clock: Callable[[], float]
) -> None:
    """Requests that arrive at random, four times as fast as fixed batches answer them."""
    count, rows = (6, 2) if args.quick else (32, 8)
    mean = min(subject.text_tokens, MEAN_TOKENS)
    most = min(8 * mean, subject.model.config.max_position_embeddings - LONGEST_PROMPT)
    ours = Ours(subject, max_rows=rows, ends=False)
    burst = random_arrivals(subject, count, mean, most, per_second=1e9)
    load = serve_in_batches(ours, burst, rows, clock)
    arrivals = random_arrivals(subject, count, mean, most, per_second=4 * count / load.seconds)
    loads: dict[str, list[Load]] = {"continuous": [], "fixed": []}
    for _ in range(args.rounds):
        loads["continuous"].append(serve_continuously(ours, arrivals, clock))
        loads["fixed"].append(serve_in_batches(ours, arrivals, rows, clock))
    speed, wait = {}, {}
    for name, found in loads.items():
        speed[name] = statistics.median(load.tokens / load.seconds for load in found)
        wait[name] = statistics.median(statistics.median(load.waits) for load in found)
    print(
        f"{count} requests at random, {rows} rows: continuous batching gives "
        f"{speed['continuous']:.1f} tokens/s, fixed batches {speed['fixed']:.1f} "
        f"({speed['continuous'] / speed['fixed']:.2f} times as many); the median answer takes "
        f"{wait['continuous']:.2f} s against {wait['fixed']:.2f} s"
    )


PARTS = {"batches": compare_batches, "images": compare_images, "arrivals": compare_arrivals}


def timed(clock: Callable[[], float], work: Callable[[], Answers | None]) -> tuple[float, Answers]:
    begin = clock()
    answers = work()
    return clock() - begin, answers or []


def medians(turns: dict[str, Turn], rounds: int) -> dict[str, float]:
    """The median seconds of each, in turns whose order rotates."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            seconds[name].append(turns[name]()[0])
    return {name: statistics.median(found) for name, found in seconds.items()}


def check_same(answers: dict[str, Answers], block: Block) -> None:
    """Require the same tokens of all, except where rounding decides between equal ones."""
    if block.sampled:
        return
    ours, *others = answers.values()
    for name, other in zip(list(answers)[1:], others, strict=True):
        assert len(ours) == len(other)
        equal = sum(a == b for a, b in zip(ours, other, strict=True))
        if equal < 0.8 * len(ours):
            raise SystemExit(f"{block.name}: only {equal} of {len(ours)} answers are {name}'s")


def print_row(
    block: Block, batch: int, seconds: dict[str, float], tokens: int, limit: float
) -> None:
    ours = seconds["ours"]
    others: Sequence[str] = ("generate", "its batching", "vLLM")
    ratios = "".join(
        f"{seconds[name] / ours:12.2f}" if name in seconds else f"{'-':>12}" for name in others
    )
    step = ours / tokens
    print(f"{block.name:13}{batch:3}{step * 1e3:11.2f}{limit / step:10.0%}{ratios}", flush=True)


if __name__ == "__main__":
    main()
