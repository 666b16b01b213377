"""Which prompts are asked, and how the modalities of answers are counted and judged."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from conversation_files import write_conversations
from megatron_chameleon.data.mixture.corpus import TokenFileCorpus
from megatron_chameleon.data.token_files.reader import TokenFileWriter, open_token_file
from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.answers.answer import Answer
from megatron_chameleon.runs.answers.modalities import (
    Modality,
    ModalityCheck,
    ModalityCounts,
    read_answers,
    read_check,
)
from megatron_chameleon.tokenizer.folder import load_tokenizer
from megatron_chameleon.training.modalities.check import (
    count_modalities,
    modality_of_content,
    write_check,
)
from megatron_chameleon.training.modalities.prompts import (
    AskedPrompt,
    answer_limit,
    built_in_prompts,
    describe_prompt,
    held_out_prompts,
)

PICTURE = Image.new("RGB", (8, 8))
TEXT, IMAGE = Modality.TEXT, Modality.IMAGE


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture
def corpus(tmp_path, tokenizer):
    """Makes a corpus of conversations."""

    def make(name, conversations):
        write_conversations(tmp_path / name, tokenizer, conversations)
        return TokenFileCorpus(open_token_file(tmp_path / name, tokenizer))

    return make


def kinds(prompts):
    return Counter(prompt.expected for prompt in prompts)


def test_each_kind_is_taken_from_all_of_sorted_files(corpus, tokenizer):
    """Plain texts are no prompts; a later turn is one that shows the turns before it."""
    mixed = (
        [[("it", "t"), ("t", "i")]] * 30 + [[]] * 30 + [[("t", "ii")]] * 20 + [[("t", "ti")]] * 9
    )
    corpora = [corpus("mixed", mixed), corpus("texts", [[("t", "t")]] * 50)]
    prompts = held_out_prompts(corpora, tokenizer, 80, 8)
    found = kinds(prompts)
    assert found[TEXT] == found[IMAGE] == 8
    assert 0 < found[Modality.IMAGES] <= 8 and 0 < found[Modality.BOTH] <= 8
    assert prompts == held_out_prompts(corpora, tokenizer, 80, 8)
    vocabulary = tokenizer.vocabulary
    assert all(prompt.token_ids[-1] == vocabulary.separator for prompt in prompts)
    drawings = [prompt for prompt in prompts if prompt.expected is IMAGE]
    assert all(prompt.token_ids.count(vocabulary.eos) == 1 for prompt in drawings)
    assert all(prompt.answer_tokens == 19 for prompt in drawings)
    texts = [prompt for prompt in prompts if prompt.expected is TEXT]
    assert {len(prompt.token_ids) for prompt in texts} == {5, 23}  # of both files


def test_no_prompt_comes_twice_and_each_leaves_room_for_an_image(corpus, tokenizer):
    same = corpus("same", [[("t", "t")]])
    assert kinds(held_out_prompts([same, same, same], tokenizer, 64, 5)) == {TEXT: 1}
    long = corpus("long", [[("ii", "t")], [("i", "t")], [("t", "t")]])
    assert len(held_out_prompts([long], tokenizer, 64, 5)) == 3  # 41 + 18 tokens, and </s>
    assert len(held_out_prompts([long], tokenizer, 56, 5)) == 2
    assert held_out_prompts([], tokenizer, 64, 5) == []


def test_the_rejected_answer_of_a_pair_is_no_example(tmp_path, tokenizer):
    v = tokenizer.vocabulary
    image = [v.begin_image, *v.code_token_ids[:16].tolist(), v.end_image]
    chosen = [v.bos, v.size - 1, v.separator, *image, v.eos]
    rejected = [v.bos, v.size - 1, v.separator, v.size - 2, v.eos]
    with TokenFileWriter(tmp_path / "pairs", tokenizer) as writer:
        answers = [(3, len(chosen) - 3), (len(chosen) + 3, 2)]
        writer.add(np.array(chosen + rejected), 1, answers=answers)
        writer.commit()
    pairs = TokenFileCorpus(open_token_file(tmp_path / "pairs", tokenizer))
    (prompt,) = held_out_prompts([pairs], tokenizer, 64, 5)
    assert (prompt.expected, list(prompt.token_ids)) == (IMAGE, chosen[:3])


def test_built_in_prompts_stand_in_for_what_is_missing(corpus, tokenizer):
    of_text = held_out_prompts([corpus("texts", [[("t", "t")]])], tokenizer, 128, 5)
    built_in = built_in_prompts(tokenizer, 128, of_text)
    assert kinds(built_in) == {IMAGE: 4} and all(prompt.is_built_in for prompt in built_in)
    assert describe_prompt(built_in[0], tokenizer) == "Draw a picture of a cat."
    assert kinds(built_in_prompts(tokenizer, 128, [])) == {TEXT: 4, IMAGE: 4}
    assert built_in_prompts(tokenizer, 20, []) == []
    without_images = replace(tokenizer, image=None)
    assert kinds(built_in_prompts(without_images, 128, [])) == {TEXT: 4}


def test_a_prompt_in_words_has_its_speakers_and_images(tokenizer):
    v, text = tokenizer.vocabulary, tokenizer.text.encode
    image = (v.begin_image, *v.code_token_ids[:16].tolist(), v.end_image)
    turns = (v.bos, *image, *text("what digit"), v.separator, *text("a three"), v.eos)
    prompt = AskedPrompt(IMAGE, (*turns, *text("number five"), v.separator), 19)
    words = describe_prompt(prompt, tokenizer)
    assert words == "User: [image] what digit\nModel: a three\nUser: number five"
    assert answer_limit([prompt], tokenizer) == 64
    assert answer_limit([AskedPrompt(TEXT, turns, 100)], tokenizer) == 200


@pytest.mark.parametrize(
    ("content", "modality"),
    [
        (["a three"], TEXT),
        ([" \n", PICTURE, "\n"], IMAGE),
        ([PICTURE, PICTURE], Modality.IMAGES),
        (["see", PICTURE], Modality.BOTH),
        (["  "], Modality.NOTHING),
        ([], Modality.NOTHING),
    ],
)
def test_the_modality_of_an_answer(content, modality):
    assert modality_of_content(content) is modality


def test_what_was_answered_is_counted_written_and_read(tmp_path, tokenizer):
    eos = tokenizer.vocabulary.eos
    asked = AskedPrompt(TEXT, (1, 5, tokenizer.vocabulary.separator), 4)
    draw = AskedPrompt(IMAGE, (1, 6, tokenizer.vocabulary.separator), 19)
    prompts = [asked, draw, asked, draw, built_in_prompts(tokenizer, 128, [])[0]]
    answers = [
        Answer(["three"], [9, eos]),
        Answer(["four"], [9, 9]),
        Answer([], [eos]),
        Answer([PICTURE], [9, eos]),
        Answer([PICTURE], []),
    ]
    check = count_modalities(7, prompts, answers, tokenizer, ["a note"])
    text, image, built_in = check.counts
    assert (text.expected, text.given, text.cut_off) == (TEXT, {TEXT: 1, Modality.NOTHING: 1}, 0)
    assert (image.expected, image.given, image.cut_off) == (IMAGE, {TEXT: 1, IMAGE: 1}, 1)
    assert (built_in.is_built_in, built_in.given, built_in.cut_off) == (True, {IMAGE: 1}, 1)
    write_check(tmp_path / "step_00000007", check, prompts, answers, tokenizer)
    read = read_check(tmp_path / "step_00000007")
    assert list(read.lines()) == list(check.lines()) and read.notes == ["a note"]
    problems: list[str] = []
    found = read_answers(tmp_path / "step_00000007", problems)
    assert problems == [] and [answer.given for answer in found] == [
        *("text", "text", "nothing", "one image", "one image")
    ]
    assert found[0].parts[0].text == "three" and found[3].parts[0].image.is_file()


def check_of(expected, given, is_built_in=False, cut_off=0):
    return ModalityCheck(1, [ModalityCounts(expected, is_built_in, given, cut_off)], 64)


@pytest.mark.parametrize(
    ("check", "weight", "line"),
    [
        (
            check_of(TEXT, {TEXT: 7, IMAGE: 9}),
            "bad",
            "Text has collapsed: most text questions are not answered with text (text questions: "
            "7 of 16 answered with text, 9 with one image). Give the sources",
        ),
        (
            check_of(IMAGE, {TEXT: 16}, cut_off=1),
            "bad",
            "Images have collapsed: most drawing requests are not answered with one image (drawing "
            "requests: 0 of 16 answered with one image, 16 with text; 1 cut off). Give",
        ),
        (
            check_of(IMAGE, {IMAGE: 8, Modality.IMAGES: 8}),
            "warn",
            "Some answers are in the wrong modality (drawing requests: 8 of 16",
        ),
        (check_of(TEXT, {TEXT: 9, IMAGE: 1}), "", "text questions: 9 of 10 answered with text, 1"),
        (check_of(IMAGE, {TEXT: 4}, True), "", "built-in drawing requests: 0 of 4 answered"),
        (check_of(IMAGE, {TEXT: 4}), "bad", "Images have collapsed"),
        (
            check_of(IMAGE, {TEXT: 3}, cut_off=3),
            "",
            "drawing requests: 0 of 3 answered with one image, 3 with text; 3 cut off. 3 prompts "
            "are too few to tell. Hold out at least 4 different prompts of this kind (a larger "
            "share in `chameleon preprocess --holdout`), and ask as many (data.validation.",
        ),
        (check_of(TEXT, {IMAGE: 1}), "", "text questions: 0 of 1 answered with text, 1 with one"),
        (check_of(TEXT, {TEXT: 1}), "", "text questions: 1 of 1 answered with text. 1 prompt is"),
        (check_of(Modality.BOTH, {TEXT: 4}), "", "requests for text and images: 0 of 4 answered"),
    ],
)
def test_a_collapse_is_a_clear_warning(check, weight, line):
    ((found, its_weight),) = check.lines()
    assert found.startswith(line) and its_weight == weight
    assert check.warnings() == ([found] if weight else [])


def test_answers_that_do_not_end_are_told():
    lines = list(check_of(TEXT, {TEXT: 10}, cut_off=2).lines())
    assert lines[1] == ("2 of 10 answers did not end within 64 tokens", "warn")
    assert len(list(check_of(TEXT, {TEXT: 10}, cut_off=1).lines())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"counts": 5},
        {"counts": [{}]},
        {"counts": [{"expected": "sound", "prompts": "", "given": {}, "cut_off": 0}]},
        {"counts": [{"expected": "text", "prompts": "", "given": {"text": -1}, "cut_off": 0}]},
        {"counts": [{"expected": "nothing", "prompts": "", "given": {}, "cut_off": 0}]},
        {"step": 10**40},
        {"step": None},
        {"max_tokens": "many"},
    ],
)
def test_a_damaged_check_is_refused(tmp_path, change):
    found = check_of(TEXT, {TEXT: 1}).as_json() | change
    (tmp_path / "modalities.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=r"is not a check of modalities .* evaluate-modalities"):
        read_check(tmp_path)


def test_a_damaged_token_file_is_an_error(tmp_path, corpus, tokenizer):
    damaged = corpus("damaged", [[("t", "t")]] * 4)
    content = np.fromfile(tmp_path / "damaged.bin", dtype=damaged.token_file.info.dtype)
    content[:] = 60_000
    content.tofile(tmp_path / "damaged.bin")
    with pytest.raises(DataError, match="has token ids from 60000"):
        held_out_prompts([damaged], tokenizer, 64, 2)
