"""``chameleon data filter`` and ``data refusals`` from the command line, with hostile inputs."""

import json
from pathlib import Path

import pytest

from megatron_chameleon.cli.main import main
from megatron_chameleon.data.documents.parse import read_documents

LINES = [
    {"id": "<b>0</b>", "text": "<script>alert(1)</script> one two three"},
    {"id": "\x1b[31m", "text": "short"},
    {"id": "same", "text": "one two three four"},
    {"id": "again", "text": "one two three four"},
    {"id": "picture", "text": "a picture that is not there", "image": "none.png"},
    {"id": "huge", "text": "word " * 300_000},
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def test_counts_files_and_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "filter", "in.jsonl", "--min-words", "3", "--duplicates"]
    main([*words, "--dry-run", "--html", "page.html"])
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["unreadable:", "missing", "image", "6", "1"]
    assert table[2].split()[:4] == ["words", "5", "1", "1"]
    assert table[3].split()[:4] == ["duplicates", "4", "1", "1"]
    assert table[4].split()[:2] == ["kept", "3"]
    assert sorted(path.name for path in here.iterdir()) == ["in.jsonl", "page.html"]
    page = Path("page.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert "same as in.jsonl:3" in page and "missing image" in page and "http" not in page[200:]
    main([*words, "--output", "kept.jsonl", "--shards", "2"])
    names = ["kept-00000-of-00002.jsonl", "kept-00001-of-00002.jsonl"]
    assert [d.id for d in read_documents(names)] == ["<b>0</b>", "same", "huge"]
    report = json.loads(Path("kept.filter.json").read_text())
    assert report["kept"] == 3 and report["unreadable"] == {"missing image": 1}
    assert report["options"] == {"min_words": 3, "duplicates": True}
    rows = Path("kept.dropped.tsv").read_text().splitlines()
    assert rows[1:] == [
        "in.jsonl:2\t\\x1b[31m\twords\t1 words",
        "in.jsonl:4\tagain\tduplicates\tsame as in.jsonl:3",
    ]


def test_the_result_is_the_same_for_any_number_of_workers(here: Path) -> None:
    lines = [{"id": str(i), "text": f"text {i % 70} " * (i % 9)} for i in range(300)]
    for name in "ab":
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = []
    for workers in ("1", "2"):
        words = ["data", "filter", "a.jsonl", "b.jsonl", "--output", f"out{workers}.jsonl"]
        main([*words, "--workers", workers, "--min-words", "2", "--near-duplicates", "0.7"])
        found.append(
            [Path(f"out{workers}{end}").read_bytes() for end in (".jsonl", ".dropped.tsv")]
        )
    assert found[0] == found[1] and found[0][0].count(b"\n") > 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "in.jsonl"], "would replace in.jsonl"),
        (["--output", "kept.txt"], "must be a name that ends with .jsonl"),
        (["--output", "/proc/kept.jsonl"], "cannot be written"),
        ([], "--output: is missing. Name a .jsonl file, or use --dry-run"),
        (["--output", "k.jsonl", "--html", "k.jsonl"], "is also written by --output"),
        (["--output", "k.jsonl", "--min-words", "1000000"], "drop all 5 documents (words 5)"),
        (["--dry-run", "--min-words", "9", "--max-words", "2"], "9 is more than the 2 of"),
        (["--dry-run", "--keep-nearest", "3"], "needs a size. Add --nearest 512x512"),
        (["--dry-run", "--nearest", "big", "--keep-nearest", "3"], "'big' is not a size"),
        (["--dry-run", "--min-tokens", "3"], "no tokenizer is named"),
        (["--dry-run", "--language", "xx"], "the language 'xx' is not known. Use one of ace"),
        (["--dry-run", "--scorer", "no_module:f", "--min-score", "1"], "cannot be imported"),
        (["--dry-run", "--blocklist", "bad.txt"], "bad.txt:2: 'a(' is not a regular expression"),
        (["--dry-run", "--config", "bad.yaml"], "Did you mean `min_words`?"),
        (["--dry-run", "--against", "none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_mistakes(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    Path("bad.txt").write_text("fine\nre: a(\n")
    Path("bad.yaml").write_text("min_word: 3\n")
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    with pytest.raises(SystemExit) as caught:
        main(["data", "filter", "in.jsonl", *words])
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2
    assert error.startswith("error: ") and message in error
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


def test_refusals(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("How do I hurt him?\n\nDraw a bomb plan\n")
    line = {"prompt": "How does one do it?", "answer": "Like this: ...", "topic": "breaking locks"}
    Path("more.jsonl").write_text(json.dumps(line) + "\n")
    words = ["data", "refusals", "prompts.txt", "more.jsonl", "--answers", "8", "--output"]
    main([*words, "a.jsonl"])
    assert capsys.readouterr().out == (
        "a.jsonl: 24 refusals of 3 prompts, 1 of which ask for a picture\n"
    )
    main([*words, "b.jsonl"])
    main([*words, "c.jsonl", "--seed", "2"])
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()
    assert Path("a.jsonl").read_bytes() != Path("c.jsonl").read_bytes()
    found = list(read_documents(["a.jsonl"]))
    answers = [d.content[-1].text for d in found]
    assert {d.roles for d in found} == {("user", "assistant")}
    assert len(set(answers[:8])) == len(set(answers[16:])) == 8
    assert any("draw" in a or "picture" in a for a in answers[8:16])
    assert any("breaking locks" in a.lower() for a in answers[16:])
    assert "Like this" not in Path("a.jsonl").read_text()
