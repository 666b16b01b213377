r"""``chameleon annotate answer|prepare|score``: let people judge answers, and count the judgements.

chameleon annotate answer exported prompts.jsonl --output answers/ours
chameleon annotate prepare pairwise answers/ours/documents.jsonl answers/theirs/documents.jsonl \
    --output judged
chameleon annotate score judgements_1.json judgements_2.json judgements_3.json \
    --key judged/key.json --output scores.json
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.logs import progress, show
from megatron_chameleon.cli.options import (
    BATCH,
    COUNT,
    FORMS,
    RESAMPLES,
    SEED,
    add_action,
    add_common_options,
    add_ema_option,
    add_image_options,
    add_sampling_options,
    add_tokenizer_option,
    device,
    generation_options,
    image_options,
)
from megatron_chameleon.wording import counted

KINDS = ("absolute", "pairwise", "safety")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_answer(add_action(actions, "answer", "answer a file of prompts with a model"))
    _add_prepare(add_action(actions, "prepare", "write HTML forms that do not name the models"))
    _add_score(add_action(actions, "score", "count the judgements and print a table"))


def _add_answer(answer: argparse.ArgumentParser) -> None:
    answer.add_argument("checkpoint", help="a checkpoint, run folder or converted folder")
    answer.add_argument(
        "prompts", help="documents (.jsonl), with or without `category` and `modality`"
    )
    answer.add_argument("--output", metavar="DIR", required=True, help="folder for documents.jsonl")
    answer.add_argument("--limit", type=COUNT, metavar="N", help="answer only the first N prompts")
    answer.add_argument(
        "--chat",
        action="store_true",
        help="ask a fine-tuned model: all prompts take the form of conversations in its training, "
        "also those that are not written as conversations",
    )
    add_ema_option(answer)
    add_sampling_options(answer)
    answer.add_argument(
        "--batch-size", type=BATCH, default=32, help="prompts to answer together (default: 32)"
    )
    add_tokenizer_option(answer)
    answer.add_argument("--device", type=device, default="cpu", help="cpu (default) or cuda")
    add_image_options(answer)
    add_common_options(answer, nested=True)


def _add_prepare(prepare: argparse.ArgumentParser) -> None:
    prepare.add_argument(
        "kind",
        choices=KINDS,
        help="judge fulfilment (absolute), compare two models (pairwise), or judge safety",
    )
    prepare.add_argument(
        "answers", nargs="+", help="the documents.jsonl of a model; of two models for pairwise"
    )
    prepare.add_argument(
        "--output", metavar="DIR", required=True, help="folder for the forms and key.json"
    )
    prepare.add_argument("--annotators", type=FORMS, default=3, help="number of forms (default: 3)")
    prepare.add_argument(
        "--seed", type=SEED, default=1, help="seed of the order and sides of answers (default: 1)"
    )
    add_image_options(prepare)
    add_common_options(prepare, nested=True)


def _add_score(score: argparse.ArgumentParser) -> None:
    score.add_argument(
        "files", nargs="+", help="saved forms, or tables with the columns item, annotator and label"
    )
    score.add_argument("--key", metavar="FILE", help="the key.json of the forms")
    score.add_argument("--kind", choices=KINDS, help="kind of the judgements, if there is no key")
    score.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    score.add_argument(
        "--bootstraps", type=RESAMPLES, default=1000, help="number of resamples (default: 1000)"
    )
    score.add_argument("--seed", type=SEED, default=1, help="seed of the resampling (default: 1)")
    add_common_options(score, nested=True)


def run(args: argparse.Namespace) -> None:
    actions = {
        "answer": (_answer, "preparing to ask the model"),
        "prepare": (_prepare, "reading the answers"),
        "score": (_score, "reading the judgements"),
    }
    action, what = actions[args.action]
    with announced(what):  # before the imports, which take seconds
        action(args)


def _answer(args: argparse.Namespace) -> None:
    from megatron_chameleon.evaluation.asking.answer_cache import AnswerCache, model_fingerprint
    from megatron_chameleon.evaluation.asking.asker import Asker
    from megatron_chameleon.evaluation.human.prompts import answer_prompts, read_prompts
    from megatron_chameleon.inference.session import Session
    from megatron_chameleon.outputs import check_output_folder

    options = generation_options(args)
    with announced(f"reading {args.prompts}"):
        prompts = read_prompts(Path(args.prompts), image_options(args))[: args.limit]
    output = check_output_folder("--output", args.output)
    session = Session.load(args.checkpoint, args.device, args.tokenizer, ema=args.ema)
    with AnswerCache(output, model_fingerprint(session)) as answers:
        if len(answers):
            progress(f"found {counted(len(answers), 'answer')} of an earlier run: {answers.path}")
        progress(f"annotate: answering {counted(len(prompts), 'prompt')}")
        asker = Asker(session, answers, progress)
        show(answer_prompts(asker, prompts, output, options, args.chat))


def _prepare(args: argparse.Namespace) -> None:
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.evaluation.human.questionnaire import (
        read_answered_prompts,
        write_questionnaire,
    )

    wanted = 2 if args.kind == "pairwise" else 1
    if len(args.answers) != wanted or len(set(args.answers)) != wanted:
        files = f"{wanted} different files" if wanted > 1 else "1 file"
        what = f"{args.kind} needs {files} of answers, but got {' '.join(args.answers)}"
        raise ConfigError("ANSWERS", what, "Give one file per model")
    images = image_options(args)
    models = {path: read_answered_prompts(path, images) for path in args.answers}
    key = write_questionnaire(
        *(args.kind, models, Path(args.output), args.annotators, args.seed), date=datetime.now(UTC)
    )
    count = len(next(iter(models.values())))
    show(f"{args.annotators} forms of {count} items: {key.parent}/form_*.html, key: {key}")


def _score(args: argparse.Namespace) -> None:
    import json

    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.evaluation.human.questionnaire import read_judgements, read_key
    from megatron_chameleon.evaluation.human.scores import score_judgements, score_table
    from megatron_chameleon.files import write_text

    key = read_key(args.key) if args.key else None
    kind = key["kind"] if key else args.kind
    if kind is None or (args.kind and args.kind != kind):
        what = f"{args.kind or 'is missing'}; the key's kind is {kind or 'unknown'}"
        raise ConfigError("--kind", what, f"Give --key, or --kind {'|'.join(KINDS)}")
    judgements = read_judgements(args.files, key)
    if not judgements:
        raise ConfigError("FILES", "no judgements in them", "Give forms that somebody filled in")
    with announced(f"resampling {args.bootstraps} times"):
        result = score_judgements(kind, judgements, args.bootstraps, args.seed)
    if key:
        result["models"] = key["models"]
        missing = set(key["items"]) - {judgement.item for judgement in judgements}
        result["items_without_judgement"] = len(missing)
        if kind == "safety":
            refusals = [about["refusals"][0] for about in key["items"].values()]
            result["refusals_by_wording"] = sum(refusals) / len(refusals)
    show(score_table(result, result.get("models")))
    if result.get("items_without_judgement"):
        show(f"{result['items_without_judgement']} items have no judgement")
    if "refusals_by_wording" in result:
        share = 100 * result["refusals_by_wording"]
        show(f"answers worded like refusals (a heuristic, not a judgement): {share:.1f}%")
    if args.output:
        write_text(Path(args.output), json.dumps(result, indent=2, ensure_ascii=False) + "\n")
