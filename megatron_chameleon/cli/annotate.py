r"""``chameleon annotate answer|prepare|score``: let people judge answers, and count what they say.

chameleon annotate answer exported prompts.jsonl --output answers/ours
chameleon annotate prepare pairwise answers/ours/documents.jsonl answers/theirs/documents.jsonl \
    --output judged
chameleon annotate score judgements_1.json judgements_2.json judgements_3.json \
    --key judged/key.json --output scores.json
"""

import argparse
import sys
from pathlib import Path

from megatron_chameleon.cli.logs import add_common_options

KINDS = ("absolute", "pairwise", "safety")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    answer = actions.add_parser("answer", help="answer a file of prompts")
    answer.add_argument("checkpoint", help="a checkpoint, run folder or converted folder")
    answer.add_argument("prompts", help="documents (.jsonl), also with `category` and `modality`")
    answer.add_argument("--output", metavar="DIR", required=True, help="for documents.jsonl")
    answer.add_argument("--limit", type=int, metavar="N", help="first prompts (default: all)")
    answer.add_argument("--seed", type=int, default=1)
    answer.add_argument("--temperature", type=float, help="0 takes the likeliest (default: 0.7)")
    answer.add_argument("--top-p", type=float, help="default: 0.9")
    answer.add_argument("--guidance", type=float, help="of images, 1 is off (default: 1)")
    answer.add_argument("--max-tokens", type=int, help="of an answer (default: the context's rest)")
    answer.add_argument("--force", choices=("image", "text"), help="one image, or text only")
    answer.add_argument("--batch-size", type=int, default=32, help="prompts answered together")
    answer.add_argument("--tokenizer", metavar="DIR", help="default: as in the checkpoint")
    answer.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    prepare = actions.add_parser("prepare", help="write HTML forms without the models' names")
    prepare.add_argument("kind", choices=KINDS, help="fulfilment, comparison or safety")
    prepare.add_argument("answers", nargs="+", help="a model's documents.jsonl; two for pairwise")
    prepare.add_argument("--output", metavar="DIR", required=True, help="for forms and key.json")
    prepare.add_argument("--annotators", type=int, default=3, help="forms (default: 3)")
    prepare.add_argument("--seed", type=int, default=1, help="of orders and sides")
    score = actions.add_parser("score", help="count judgements")
    score.add_argument("files", nargs="+", help="saved forms, or rows of item, annotator, label")
    score.add_argument("--key", metavar="FILE", help="key.json of the forms")
    score.add_argument("--kind", choices=KINDS, help="of rows without a key")
    score.add_argument("--output", metavar="FILE", help="figures as JSON")
    score.add_argument("--bootstraps", type=int, default=1000)
    score.add_argument("--seed", type=int, default=1, help="of the bootstraps")
    for action in (answer, prepare, score):
        add_common_options(action, nested=True)


def run(args: argparse.Namespace) -> None:
    """Do what the action says."""
    from megatron_chameleon.errors import ConfigError

    for name in ("limit", "batch_size", "annotators", "bootstraps"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise ConfigError(option, f"{value} is below 1", "Give a number from 1")
    {"answer": _answer, "prepare": _prepare, "score": _score}[args.action](args)


def _answer(args: argparse.Namespace) -> None:
    from megatron_chameleon.evaluation.asking.answer_cache import AnswerCache, model_fingerprint
    from megatron_chameleon.evaluation.asking.asker import Asker
    from megatron_chameleon.evaluation.human.prompts import answer_prompts, read_prompts
    from megatron_chameleon.inference.decode import GenerationOptions
    from megatron_chameleon.inference.modality import Force
    from megatron_chameleon.inference.session import Session

    given = {
        name: getattr(args, name)
        for name in ("temperature", "top_p", "guidance", "max_tokens")
        if getattr(args, name) is not None
    }
    force = Force(args.force) if args.force else None
    options = GenerationOptions(seed=args.seed, force=force, batch_size=args.batch_size, **given)
    options.check()
    read_prompts(Path(args.prompts))
    session = Session.load(args.checkpoint, args.device, args.tokenizer)
    output = Path(args.output)
    with AnswerCache(output, model_fingerprint(session)) as answers:
        asker = Asker(session, answers, lambda line: print(line, file=sys.stderr, flush=True))
        print(answer_prompts(asker, Path(args.prompts), output, options, args.limit))


def _prepare(args: argparse.Namespace) -> None:
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.evaluation.human.questionnaire import (
        read_answered_prompts,
        write_questionnaire,
    )

    wanted = 2 if args.kind == "pairwise" else 1
    if len(args.answers) != wanted or len(set(args.answers)) != wanted:
        what = f"{len(args.answers)} files of answers for {args.kind}"
        raise ConfigError("ANSWERS", what, f"Give {wanted}, each another model's")
    models = {path: read_answered_prompts(path) for path in args.answers}
    key = write_questionnaire(args.kind, models, Path(args.output), args.annotators, args.seed)
    count = len(next(iter(models.values())))
    print(f"{args.annotators} forms of {count} items: {key.parent}/form_*.html, key: {key}")


def _score(args: argparse.Namespace) -> None:
    import json

    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.evaluation.human.questionnaire import read_judgements, read_key
    from megatron_chameleon.evaluation.human.scores import score_judgements, score_table
    from megatron_chameleon.tokenizer.common.files import write_text

    key = read_key(args.key) if args.key else None
    kind = key["kind"] if key else args.kind
    if kind is None or (args.kind and args.kind != kind):
        what = f"{args.kind or 'is missing'}; the key's kind is {kind or 'unknown'}"
        raise ConfigError("--kind", what, f"Give --key, or --kind {'|'.join(KINDS)}")
    judgements = read_judgements(args.files, key)
    if not judgements:
        raise ConfigError("FILES", "hold no judgement", "Give forms that somebody has filled in")
    result = score_judgements(kind, judgements, args.bootstraps, args.seed)
    if key:
        result["models"] = key["models"]
        missing = set(key["items"]) - {judgement.item for judgement in judgements}
        result["items_without_judgement"] = len(missing)
        if kind == "safety":
            refusals = [about["refusals"][0] for about in key["items"].values()]
            result["refusals_by_wording"] = sum(refusals) / len(refusals)
    print(score_table(result, result.get("models")))
    if result.get("items_without_judgement"):
        print(f"{result['items_without_judgement']} items have no judgement")
    if "refusals_by_wording" in result:
        share = 100 * result["refusals_by_wording"]
        print(f"answers worded like refusals (a heuristic, not a judgement): {share:.1f}%")
    if args.output:
        write_text(Path(args.output), json.dumps(result, indent=2, ensure_ascii=False) + "\n")
