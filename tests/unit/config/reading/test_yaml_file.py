"""Config files that somebody else wrote: within limits, plain values only, one line per mistake."""

import time
from pathlib import Path

import pytest

from megatron_chameleon.config.load import load_config
from megatron_chameleon.errors import ConfigError

LAYERS = "model: {num_layers: 3}\n"
BOMB = "variables:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


def chain(reference: str, first: str = "a0: xxxxxxxxxx", links: int = 12) -> str:
    """Values that each repeat the one before ten times."""
    lines = [f"  a{i}: '{reference.format(i - 1) * 10}'\n" for i in range(1, links)]
    return f"variables:\n  {first}\n" + "".join(lines)


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        LAYERS,
        f"\ufeff{LAYERS}",
        LAYERS.encode("utf-16"),
        b"\xfe\xff" + LAYERS.encode("utf-16-be"),
        LAYERS.replace("\n", "\r\n"),
        '{"model": {"num_layers": 3}}',
        "model: {num_layers: 0x3}",
        "model: {num_layers: 3.0}",
        "model: {num_layers: !!int 3}",
        "variables: &v {num_layers: 3}\nmodel: {<<: *v}",
        "variables: {n: 3}\nmodel: {num_layers: '${variables.n}'}",
        "variables: {n: 3, m: '${.n}'}\nmodel: {num_layers: '${variables.m}'}",
    ],
)
def test_what_is_read(content: str | bytes, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, content)).model.num_layers == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nmodel: !!python/object/apply:os.system ['exit']", ":2: the tag "),
        (
            "tokenizer: {path: !!binary aGk=}",
            ": the tag 'tag:yaml.org,2002:binary' is not allowed",
        ),
        ("model: !!set {a}\n", ":1: the tag 'tag:yaml.org,2002:set' is not allowed"),
        ("model: !!int '1e30'\n", "not valid YAML (invalid literal for int()"),
        (BOMB, "not valid YAML (aliases repeat its values to more than 20,000)"),
        (chain("${{variables.a{0}}}"), "repeat each other by ${...} to more than 500,000 char"),
        (chain("${{.a{0}}}"), "repeat each other by ${...} to more than 500,000 characters"),
        (chain("${{variables.a{0}}}", "a0: ''"), "repeat each other by ${...} to more than"),
        (chain("${{variables.${{variables.k{0}}}}}"), "repeat each other by ${...} to more than"),
        ("model: &a [*a]\n", "YAML recursive aliases are not supported"),
        ("variables: {a: '${variables.a}'}", "variables.a: Recursive interpolation detected"),
        (f"{LAYERS}{LAYERS}", ":2: not valid YAML (found duplicate key model)"),
        ("model:\n\tnum_layers: 3\n", ":2: not valid YAML (found character that cannot start"),
        (LAYERS.encode("utf-32"), "not valid YAML ("),
        (b"a: 1\nb: caf\xe9\n", ":2: byte 11 is not UTF-8. Save the file as UTF-8."),
        ("model: " + "[" * 5000 + "]" * 5000, ": more than 32 levels or 20,000 keys and values"),
        ("- " * 5000 + "x\n", ":1: more than 32 levels or 20,000 keys and values"),
        ("\n".join(" " * i + "k:" for i in range(200)), ":33: more than 32 levels or"),
        ("data: {stage1: [" + "{prefix: a}," * 10_000 + "]}", "more than 32 levels or 20,000 keys"),
        ("- a\n- b\n", "the top level is not a mapping"),
        ("3\n", "the top level is not a mapping"),
        ("1: 2\n", ": 1: Unknown key. Use one of model,"),
        ("yes: 2\n", ": True: Unknown key. Use one of model,"),
        ("~: 2\n", "not valid YAML (Incompatible key type 'NoneType')"),
        ("? [a, b]\n: 2\n", ":1: not valid YAML (found unhashable key)"),
        ("model: {num_layers: 2020-01-01}", "must be a whole number (got '2020-01-01')"),
        ("a: 1\nmodel: {num_layers: 010}", ":2: YAML would read '010' as another number"),
        ("model: {num_layers: 1:30}", ": YAML would read '1:30' as another number"),
        ("model: {num_layers: yes}", "must be a whole number (got True)"),
        ("model: {num_layers: '3'}", "must be a whole number (got '3')"),
        ("training: {steps: '1e30'}", "must be a whole number (got '1e30')"),
        (f"model: {{num_layers: {'9' * 5000}}}", "not valid YAML (Exceeds the limit (4300 digits)"),
        ("#" * (1 << 20) + "\n", "has 1048577 bytes, more than the 1048576"),
        (f"{LAYERS}---\n{LAYERS}", ":2: not valid YAML (but found another document)"),
        (f"{'x' * 1000}: 1\n", "... (1,000 characters): Unknown key"),
        ('"a\\x1b[31m": 1\n', ": 'a\\x1b[31m': Unknown key"),
        (b"model: {}\n\x00\n", "not valid YAML ("),
    ],
)
def test_what_is_refused(content: str | bytes, message: str, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, content))
    assert time.monotonic() - start < 5
    (line,) = caught.value.lines()
    assert message in line
    assert "\n" not in line
    assert len(line) < 500


def test_a_file_of_mistakes_lists_the_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "".join(f"k{i}: 1\n" for i in range(500))))
    lines = caught.value.lines()
    assert len(lines) == 21
    assert lines[-1].endswith("config.yaml: 480 more mistakes. Is it a config file?")


def test_several_hundred_sources_are_read(tmp_path: Path) -> None:
    sources = "".join(f"  - {{prefix: tokens/{i}, weight: {i + 1}}}\n" for i in range(300))
    assert len(load_config(write(tmp_path, f"data:\n  stage1:\n{sources}")).data.stage1) == 300
