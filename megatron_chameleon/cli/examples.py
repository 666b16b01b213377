"""The two examples at the end of the ``--help`` of each verb, and of each of its actions.

The parser of ``cli/options.py`` looks its own name up here. A new verb or action adds its row;
``tests/unit/cli/test_documented_commands.py`` parses all of them and finds what has none.
"""

import re

EXAMPLES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "": (
        ("See whether this machine can run the demo, and what training needs.", "doctor"),
        ("See the options of a verb, with two examples.", "train --help"),
    ),
    "init": (
        (
            "From a folder of pictures to a trained model and a report, in minutes on a CPU.",
            "init photos --output runs/photos",
        ),
        (
            "A model for one GPU, from documents and texts together.",
            "init stories.jsonl notes --size small --output runs/stories",
        ),
    ),
    "tokenizer": (
        (
            "Train the text tokenizer, which defines the vocabulary of the model.",
            "tokenizer text docs.jsonl --output tokenizer --vocab-size 65536 --image-codes 8192",
        ),
        (
            "Train the image tokenizer into the same folder.",
            "tokenizer image docs.jsonl --output tokenizer --config chameleon_512",
        ),
    ),
    "tokenizer text": (
        (
            "The paper's sizes, for a large corpus.",
            "tokenizer text data/*.jsonl --output tokenizer --vocab-size 65536 --image-codes 8192",
        ),
        (
            "A small vocabulary, whose pictures keep their shape with at most 256 codes each.",
            "tokenizer text notes/*.txt --output tokenizer --vocab-size 2048 --image-codes 64 "
            "--image-grids 256",
        ),
    ),
    "tokenizer image": (
        (
            "The paper's image tokenizer; it needs a GPU and days.",
            "tokenizer image data/*.jsonl --output tokenizer --config chameleon_512",
        ),
        (
            "Train nothing: take Emu3's, for pictures of 256 x 256 pixels.",
            "tokenizer image --from Emu3-VisionTokenizer --output tokenizer --resolution 256",
        ),
    ),
    "preprocess": (
        (
            "Turn documents into a token file, and hold one document in fifty out.",
            "preprocess docs.jsonl --tokenizer tokenizer --output tokens/docs --holdout 0.02 "
            "--workers 4",
        ),
        (
            "One of 16 jobs that share the input; --merge joins what they wrote.",
            "preprocess 'web/*.parquet' --tokenizer tokenizer --output tokens/web --shard 0/16",
        ),
    ),
    "inspect": (
        (
            "Count what is in a token file, and show its first documents as a page.",
            "inspect tokens/docs --html docs.html",
        ),
        (
            "Show the sequences that a run sees in its step 10.",
            "inspect train.yaml --step 10 --html step10.html",
        ),
    ),
    "data": (
        (
            "Show the documents that a step of a run saw.",
            "data audit runs/mine --step 120",
        ),
        (
            "Count what the filters would drop, and write nothing.",
            "data filter docs.jsonl --dry-run --min-words 3 --duplicates",
        ),
    ),
    "data collect": (
        (
            "Write a file of documents for loose pictures and texts.",
            "data collect photos notes --output documents",
        ),
        (
            "Pictures without captions from their names.",
            "data collect photos --output documents --captions none",
        ),
    ),
    "data audit": (
        (
            "Show the samples, sources and documents of one step.",
            "data audit runs/mine --step 120",
        ),
        (
            "Show how full the steps are where a stage or a source ends.",
            "data audit train.yaml --borders",
        ),
    ),
    "data filter": (
        (
            "Pairs as the paper filters them, with a page of what was dropped.",
            "data filter 'pairs/*.tar' --output pairs.jsonl --config paper --html dropped.html",
        ),
        (
            "English documents that are not in the evaluation data.",
            "data filter web.jsonl --output clean.jsonl --language en --against eval.jsonl",
        ),
    ),
    "data refusals": (
        (
            "Write a refusal of each line of a text file.",
            "data refusals unsafe.txt --output refusals.jsonl --seed 1",
        ),
        (
            "Write two refusals of each prompt.",
            "data refusals unsafe.jsonl --output refusals.jsonl --answers 2",
        ),
    ),
    "config": (
        (
            "Compare a config with the paper's values.",
            "config check train.yaml",
        ),
        (
            "See which deviations an override makes.",
            "config check chameleon_7b optimizer.lr=3e-4",
        ),
    ),
    "config check": (
        (
            "Compare a config with the paper's values.",
            "config check train.yaml",
        ),
        (
            "Compare a fine-tuning with the paper's, after an override.",
            "config check train.yaml --stage sft optimizer.lr=1e-5",
        ),
    ),
    "plan": (
        (
            "Rank the layouts of the 7B on 64 GPUs.",
            "plan chameleon_7b --gpus 64 --gpu h100",
        ),
        (
            "Predict another context length for a script.",
            "plan train.yaml --gpus 8 --gpu a100 --json model.seq_length=8192",
        ),
    ),
    "train": (
        (
            "Check everything and do one step, and keep nothing.",
            "train train.yaml --dry-run",
        ),
        (
            "Train; the same command, given again, resumes from the newest checkpoint.",
            "train train.yaml logging.run_dir=runs/mine training.steps=2000",
        ),
    ),
    "status": (
        (
            "Show all runs of a folder, again every five seconds.",
            "status runs --watch",
        ),
        (
            "Print the state of one run as JSON.",
            "status runs/mine --json",
        ),
    ),
    "convert": (
        (
            "Write the newest checkpoint of a run in Hugging Face's format.",
            "convert runs/mine exported --to hf --dtype bf16",
        ),
        (
            "Say what a conversion of Meta's 7B needs, and write nothing.",
            "convert models/7b converted --to megatron --dry-run",
        ),
    ),
    "verify": (
        (
            "Compare a checkpoint with its export, tensor by tensor.",
            "verify runs/mine exported",
        ),
        (
            "Compare the files of an export with its checksums.",
            "verify exported",
        ),
    ),
    "chat": (
        (
            "Talk to the newest checkpoint of a run.",
            "chat runs/mine",
        ),
        (
            "Begin with a question about a picture.",
            "chat exported --image cat.png --prompt 'What is on this picture?'",
        ),
    ),
    "generate": (
        (
            "Draw four pictures of one prompt.",
            "generate runs/mine --prompt 'A drawing of a cat.' --force image --count 4",
        ),
        (
            "Answer a file of prompts on a GPU.",
            "generate exported --document prompts.jsonl --output answers --device cuda",
        ),
    ),
    "serve": (
        (
            "Serve a chat page and OpenAI's interface on this machine.",
            "serve runs/mine --port 8000",
        ),
        (
            "Serve a network, on a GPU and with a key.",
            "serve exported --host 0.0.0.0 --device cuda --api-key-file key.txt",
        ),
    ),
    "evaluate": (
        (
            "List the tasks, with the paper's figures.",
            "evaluate --tasks list",
        ),
        (
            "Measure two tasks on local data, with 100 items each.",
            "evaluate exported --tasks boolq,coco_caption --data benchmarks --limit 100",
        ),
    ),
    "evaluate-loss": (
        (
            "Measure a run on the held-out data of its config.",
            "evaluate-loss runs/mine",
        ),
        (
            "Measure an export on two token files.",
            "evaluate-loss exported --data tokens/docs-holdout tokens/web-holdout --json",
        ),
    ),
    "evaluate-modalities": (
        (
            "Ask a run for texts, pictures and both.",
            "evaluate-modalities runs/mine",
        ),
        (
            "Ask an export with conversations of your own.",
            "evaluate-modalities exported --data tokens/chats-holdout --prompts 64",
        ),
    ),
    "annotate": (
        (
            "Answer the prompts that people will judge.",
            "annotate answer runs/mine prompts.jsonl --output answers/mine",
        ),
        (
            "Write forms that compare two models without naming them.",
            "annotate prepare pairwise answers/mine/documents.jsonl "
            "answers/other/documents.jsonl --output forms",
        ),
    ),
    "annotate answer": (
        (
            "Answer a file of prompts with a run.",
            "annotate answer runs/mine prompts.jsonl --output answers/mine",
        ),
        (
            "Answer the first 20 as a conversation, on a GPU.",
            "annotate answer exported prompts.jsonl --output answers/short --chat --limit 20 "
            "--device cuda",
        ),
    ),
    "annotate prepare": (
        (
            "Forms on whether the answers of one model fulfil their tasks.",
            "annotate prepare absolute answers/mine/documents.jsonl --output forms",
        ),
        (
            "Forms for five people that compare two models.",
            "annotate prepare pairwise answers/mine/documents.jsonl "
            "answers/other/documents.jsonl --output forms --annotators 5",
        ),
    ),
    "annotate score": (
        (
            "Count the saved forms.",
            "annotate score judgements_*.json --key forms/key.json --output scores.json",
        ),
        (
            "Count judgements from a table of another program.",
            "annotate score judgements.csv --kind safety",
        ),
    ),
    "report": (
        (
            "Write runs/mine/report.html; the run may still go on.",
            "report runs/mine",
        ),
        (
            "Write the page to another place.",
            "report runs/mine --output mine.html",
        ),
    ),
    "compare": (
        (
            "Compare two runs in the terminal.",
            "compare runs/mine runs/other",
        ),
        (
            "Draw the curves of runs with different batch sizes.",
            "compare runs/* --output runs.html --x tokens",
        ),
    ),
    "plot": (
        (
            "Draw the losses of a run.",
            "plot runs/mine --output loss.png",
        ),
        (
            "Draw the gradient norms of two runs, each the mean of 50 steps.",
            "plot runs/mine runs/other --output norms.svg --keys grad_norm --smooth 50",
        ),
    ),
    "completion": (
        (
            "For all new shells, if the package bash-completion is installed.",
            "completion bash > ~/.local/share/bash-completion/completions/chameleon",
        ),
        (
            "The same for fish, which reads this folder by itself.",
            "completion fish > ~/.config/fish/completions/chameleon.fish",
        ),
    ),
    "doctor": (
        ("Check this machine.", "doctor"),
        ("The same for a script, or for a bug report.", "doctor --json"),
    ),
}
"""From the words behind ``chameleon`` to what each example does and its command without it."""

_WIDTH = 86
_TOGETHER = re.compile(r"--\S+(?: (?!--)(?:'[^']*'|\S+))?|'[^']*'|\S+")
"""What stays on one line: an option with its value, a quoted word, or a word."""


def examples_text(prog: str) -> str:
    """The last lines of a ``--help``, or nothing where a command has no examples.

    Args:
        prog: The command's name with all its words, such as "chameleon tokenizer text".
    """
    program, _, name = prog.partition(" ")
    blocks = [
        f"  # {what}\n{_folded(f'{program} {words}')}\n" for what, words in EXAMPLES.get(name, ())
    ]
    return "\nexamples:\n" + "\n".join(blocks) if blocks else ""


def _folded(command: str) -> str:
    """The command, indented, and continued on further lines if it is long."""
    lines = ["  "]
    for word in _TOGETHER.findall(command):
        if len(lines[-1]) + len(word) > _WIDTH:
            lines[-1] += "\\"
            lines.append("      ")
        lines[-1] += f"{word} "
    return "\n".join(lines).rstrip()
