"""The harness's tasks on small local files: what is asked, and the score of every item."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_chameleon.errors import DataError
from megatron_chameleon.evaluation.asking.asker import Asker
from megatron_chameleon.evaluation.tasks.catalogue import TASKS, find_task, listing
from megatron_chameleon.evaluation.tasks.harness import evaluate_harness_task, vote_on_math
from megatron_chameleon.inference.answers.stop_strings import cut_at_stop

PIQA = [
    {"goal": f"write a {n}", "sol1": "three", "sol2": "digit number 4 twice", "label": n % 2}
    for n in range(6)
]


def write(file: Path, records: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(records))
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))


def run(asker: Asker, name: str, data: Path, **more: Any) -> Any:
    info = find_task(name)
    assert info is not None
    return evaluate_harness_task(asker, info, data, **more)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_multiple_choice_to_the_item(asker: Asker, tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"piqa/validation{suffix}", PIQA)
    result = run(asker, "piqa", tmp_path)
    assert len(result.scored_items) == 6
    for item, sample in zip(PIQA, result.scored_items, strict=True):
        prompt = f"Question: {item['goal']}\nAnswer:"
        assert sample.prompt == prompt
        choices = [item["sol1"], item["sol2"]]
        scores = asker.score([([prompt], f" {choice}") for choice in choices])
        sums = [score.log_likelihood for score in scores]
        by_byte = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        label = item["label"]
        assert sample.scores["acc"] == float(sums.index(max(sums)) == label)
        assert sample.scores["acc_norm"] == float(by_byte.index(max(by_byte)) == label)
    summary = result.summary()
    assert summary["paper"] == {"7B": 79.6, "34B": 83.3}
    values = [sample.scores["acc_norm"] for sample in result.scored_items]
    assert summary["value"] == pytest.approx(100 * sum(values) / 6)
    assert summary["items"] == 6 and summary["shots"] == 0


def test_shots_come_from_the_training_file(asker: Asker, tmp_path: Path) -> None:
    def records(word: str, count: int) -> list[dict[str, Any]]:
        return [
            {
                "activity_label": word,
                "ctx_a": "A man runs.",
                "ctx_b": "he",
                "endings": ["stops.", "eats."],
                "label": "1",
            }
            for _ in range(count)
        ]

    write(tmp_path / "hellaswag/validation.jsonl", records("Seen", 2))
    with pytest.raises(DataError, match=r"hellaswag/train\.jsonl: no such file, nor one with"):
        run(asker, "hellaswag_10shot", tmp_path)
    write(tmp_path / "hellaswag/train.jsonl", records("Shot", 12))
    (sample,) = run(asker, "hellaswag_10shot", tmp_path, limit=1).scored_items
    assert sample.prompt.count("Shot: A man runs. He eats.\n\n") == 10
    assert sample.prompt.endswith("Seen: A man runs. He")


def test_winogrande_scores_what_follows_the_names(asker: Asker, tmp_path: Path) -> None:
    sentence = {"sentence": "Ann saw Bob as _ is tall.", "option1": "Ann", "option2": "Bob"}
    write(tmp_path / "winogrande/validation.jsonl", [{**sentence, "answer": "2"}])
    (sample,) = run(asker, "winogrande", tmp_path).scored_items
    assert sample.prompt == ["Ann saw Bob as Ann", "Ann saw Bob as Bob"]
    scores = asker.score([([prompt], " is tall.") for prompt in sample.prompt])
    assert sample.scores["acc"] == float(scores[1].log_likelihood > scores[0].log_likelihood)


def test_written_answers_are_read_and_votes_counted(
    asker: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "gsm8k/test.jsonl", [{"question": "1+1?", "answer": "1+1=2\n#### 2"}])
    asked: list[tuple[list, Any]] = []
    answers = ["It is 3. The answer is 3.", *["So 2. The answer is 2.\nQ: more 9"] * 7]

    def say(prompts: list, options: Any) -> list[str]:
        asked.append((prompts, options))
        said = answers[: len(prompts)] if len(prompts) > 1 else answers[1:2]
        return [cut_at_stop(answer, options.stop) for answer in said]

    monkeypatch.setattr(asker, "write", say)
    (sample,) = run(asker, "gsm8k", tmp_path).scored_items
    assert sample.scores == {"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0}
    (prompt,), options = asked[0][0][0], asked[0][1]
    assert prompt.count("Q: ") == 9 and prompt.endswith("Q: 1+1?\nA:")
    assert options.temperature == 0 and options.repetition_penalty == 1.0
    (sample,) = run(asker, "gsm8k_maj8", tmp_path).scored_items
    assert sample.scores == {"exact_match,maj": 1.0}
    assert len(asked[1][0]) == 8 and asked[1][1].temperature == 0.6


def test_math_votes_on_the_final_answer() -> None:
    def say(*answers: str) -> list[list[str]]:
        return [
            [f"Final Answer: The final answer is ${a}$. I hope it is correct." for a in answers]
        ]

    doc = {"answer": "\\frac{1}{2}"}
    assert vote_on_math(doc, say("3", "\\frac12", "\\frac{1}{2}", "4")) == {"exact_match": 1}
    assert vote_on_math(doc, say("3", "3", "\\frac{1}{2}", "4")) == {"exact_match": 0}


def test_all_answers_to_a_problem_vote(
    asker: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra")
    for subject in (*subjects, "number_theory", "prealgebra", "precalculus"):
        problem = {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$."}
        write(tmp_path / f"math/{subject}/test.jsonl", [problem])
    finals = [
        f"Final Answer: The final answer is ${n}$. I hope it is correct." for n in (3, 2, 2, 4)
    ]
    monkeypatch.setattr(
        asker, "write", lambda prompts, options: (finals * len(prompts))[: len(prompts)]
    )
    result = run(asker, "math_maj4", tmp_path)
    assert result.summary()["value"] == 100 and result.summary()["items"] == 7
    assert result.scored_items[0].prompt.count("Problem:\n") == 5
    assert run(asker, "math", tmp_path).summary()["value"] < 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no records"),
        ('{"goal": "a"', r"validation\.jsonl:1: not valid JSON"),
        ("[1]\n", r"validation\.jsonl:1: the record is a list, not an object"),
        ('{"question": "a"}\n', "piqa: its data cannot be used"),
    ],
)
def test_bad_data_is_named(asker: Asker, tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path / "piqa/validation.jsonl", [])
    (tmp_path / "piqa/validation.jsonl").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        run(asker, "piqa", tmp_path)
    assert "\n" not in str(error.value)


def test_every_figure_of_the_paper_is_listed() -> None:
    lines = listing()
    for figure in ("79.6", "83.3", "85.1", "46.5", "86.0", "41.6", "50.9", "77.0", "24.7", "65.8"):
        assert figure in lines
    for figure in ("120.2", "140.8", "74.7", "82.3", "66.0", "139.1", "76.2", "69.6"):
        assert figure in lines
    assert len({task.name for task in TASKS}) == len(TASKS)
