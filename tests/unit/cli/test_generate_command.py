"""``chameleon generate``: prompts, output files and errors."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_chameleon.cli.main import main
from megatron_chameleon.data.documents.parse import read_documents


def generate(checkpoint: Path, *words: object) -> None:
    main(["generate", str(checkpoint), *(str(word) for word in words)])


def answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]


def test_images_are_written_beside_the_answers(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--prompt", "a three", "--force", "image", "--count", 2, "--output", tmp_path / "out")
    generate(tiny_checkpoint, *words)
    lines = answers(tmp_path / "out")
    assert [line["content"] for line in lines] == [
        [{"type": "image", "image": f"000{i}-0.png"}] for i in range(2)
    ]
    assert [line["prompt"] for line in lines] == [[{"type": "text", "text": "a three"}]] * 2
    assert Image.open(tmp_path / "out/0000-0.png").size == (8, 8)
    assert f"[image: {tmp_path / 'out/0001-0.png'}]" in capsys.readouterr().out
    # The answers are documents that can be read again.
    documents = list(read_documents([tmp_path / "out/documents.jsonl"]))
    assert [d.content[0].open().size for d in documents] == [(8, 8)] * 2  # type: ignore[union-attr]


def test_guidance_has_a_scale_for_images_and_how_it_runs_is_said(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    words = ("--image", tmp_path / "red.png", "--prompt", "a", "--force", "image", "--guidance", 3)
    drawn = []
    for number, scale in enumerate((3, 1.2)):
        folder = tmp_path / str(number)
        generate(
            tiny_checkpoint,
            *words,
            "--temperature",
            0,
            "--guidance-image",
            scale,
            "--output",
            folder,
        )
        drawn.append(answers(folder)[0]["token_ids"])
    assert drawn[0] != drawn[1]
    assert "cpu: steps launched one by one, layers not compiled\n" in capsys.readouterr().err


def test_text_is_printed_and_nothing_written_without_being_asked(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--prompt", "a", "--force", "text", "--temperature", 0, "--max-tokens", 5)
    generate(tiny_checkpoint, *words)
    first = capsys.readouterr().out
    generate(tiny_checkpoint, *words)
    assert capsys.readouterr().out == first != ""
    assert list(tmp_path.iterdir()) == []


def test_an_image_can_be_the_prompt(tiny_checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    words = ("--image", tmp_path / "red.png", "--prompt", "is", "--force", "text")
    generate(tiny_checkpoint, *words, "--output", tmp_path / "out")
    (line,) = answers(tmp_path / "out")
    assert line["prompt"] == [
        {"type": "image", "image": "../red.png"},
        {"type": "text", "text": "is"},
    ]


def test_documents_are_answered_one_by_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = [{"text": "one"}, {"content": [{"type": "text", "text": "two"}]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    words = ("--document", file, "--count", 2, "--force", "text", "--output", tmp_path / "out")
    generate(tiny_checkpoint, *words)
    texts = [line["prompt"][0]["text"] for line in answers(tmp_path / "out")]
    assert texts == ["one", "one", "two", "two"]


def test_prompts_are_answered_one_by_one_each_with_all_images(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    words = ("--image", tmp_path / "red.png", "--prompt", "one", "--prompt", "two")
    generate(tiny_checkpoint, *words, "--force", "text", "--output", tmp_path / "out")
    prompts = [line["prompt"] for line in answers(tmp_path / "out")]
    assert [[part.get("text") for part in prompt] for prompt in prompts] == [
        [None, "one"],
        [None, "two"],
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", "\x01" * 70), "error: prompt: its 71 tokens leave too little room in the"),
        (("--count", "0"), "error: --count: '0' is not a whole number between"),
        (("--top-p", "0"), "error: --top-p: '0' is not a number above 0 and at most 1."),
        (("--document", "x.jsonl", "--prompt", "a"), "error: --document: cannot be combined"),
        (("--image", "gone.png"), "error: gone.png: no such image file."),
        (("--guidance-image", "-1"), "error: --guidance-image: '-1' is not a number between"),
        (("--batch-size", "0"), "error: --batch-size: '0' is not a whole number"),
        (("--device", "cuda"), "error: --device cuda: no usable GPU was found. Use --device cpu."),
        (("--compile",), "error: --compile: none of g++, clang++ is installed. Install g++, or"),
        (("--tokenizer", "gone"), "error: gone: no such folder."),
    ],
)
def test_mistakes_are_one_line(
    tiny_checkpoint: Path,
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SystemExit) as end:
        generate(tiny_checkpoint, *words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_question_is_asked_as_fine_tuning_asked_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """By --chat, or by a document of messages."""
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "one"}]}) + "\n")
    same = ("--force", "text", "--temperature", 0, "--max-tokens", 6, "--output")
    generate(tiny_checkpoint, "--chat", "--prompt", "one", *same, tmp_path / "word")
    generate(tiny_checkpoint, "--document", file, *same, tmp_path / "document")
    generate(tiny_checkpoint, "--prompt", "one", *same, tmp_path / "plain")
    word, document, plain = (answers(tmp_path / name) for name in ("word", "document", "plain"))
    assert word == document != plain
