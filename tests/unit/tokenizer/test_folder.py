import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer import Tokenizer, fingerprint, load_tokenizer
from megatron_chameleon.tokenizer.image.stored import save_vqgan
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig
from megatron_chameleon.tokenizer.text.training import train_text_tokenizer


def test_a_whole_folder_loads(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.folder == tokenizer_folder
    assert tokenizer.vocabulary.size == tokenizer.text.size == 420
    assert tokenizer.image is not None
    assert tokenizer.image.codebook_size == tokenizer.vocabulary.image_codes == 32
    assert tokenizer.fingerprint == fingerprint(tokenizer_folder)


def test_without_images_the_image_tokenizer_is_not_needed(new_tokenizer_folder: Path) -> None:
    for path in new_tokenizer_folder.glob("image.*"):
        path.unlink()
    assert load_tokenizer(new_tokenizer_folder, images=False).image is None
    with pytest.raises(DataError, match=r"image.json: no such file"):
        load_tokenizer(new_tokenizer_folder)


def test_the_fingerprint_is_that_of_the_bytes(tokenizer_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    first = fingerprint(copy)
    assert first == fingerprint(tokenizer_folder) and len(first) == 64
    (copy / "image.dropped.jsonl").write_text("not a part of it")
    assert fingerprint(copy) == first
    seen = {first}
    for name in ("text.model", "vocabulary.json", "image.json", "image.safetensors"):
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        seen.add(fingerprint(copy))
    (copy / "image.json").unlink()
    seen.add(fingerprint(copy))
    assert len(seen) == 6


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder. Give a folder made by"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: is a file, not a folder"):
        load_tokenizer(tmp_path / "file")


@pytest.mark.parametrize(
    "name", ["config.json", "params.json", "models/7b/params.json", "checkpoints/step_00000001/x"]
)
def test_the_folder_of_a_model_is_told_of_start_from(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"seems to be a model's: .*, and --start-from in place of"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["text.model", "vocabulary.json", "image.safetensors"])
def test_a_missing_file_is_named(new_tokenizer_folder: Path, name: str) -> None:
    (new_tokenizer_folder / name).unlink()
    with pytest.raises(DataError, match=f"{name}: .*[Nn]o such file"):
        load_tokenizer(new_tokenizer_folder)


def test_text_and_vocabulary_of_two_runs_are_refused(
    new_tokenizer_folder: Path, tmp_path: Path
) -> None:
    train_text_tokenizer(["other words"] * 9, tmp_path / "other", vocab_size=305, image_codes=32)
    shutil.copy(tmp_path / "other" / "text.model", new_tokenizer_folder)
    with pytest.raises(DataError, match=r"text.model \(305 tokens\) and vocabulary.json \(420 tok"):
        load_tokenizer(new_tokenizer_folder)


def test_codebooks_of_two_sizes_are_refused(new_tokenizer_folder: Path) -> None:
    save_vqgan(Vqgan(VqganConfig(16, 3, 32, [1, 1, 1], 1, 8, 8, 64)), new_tokenizer_folder)
    with pytest.raises(
        DataError, match=r"has 64 codes, the vocabulary 32.*--image-codes 64.*codebook_size=32"
    ):
        load_tokenizer(new_tokenizer_folder)
    load_tokenizer(new_tokenizer_folder, images=False)


def test_both_tokenizers_meet_in_one_vocabulary(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer.image is not None
    codes = np.arange(16).reshape(1, 16)
    token_ids = tokenizer.vocabulary.codes_to_token_ids(codes)[0].tolist()
    stream = [*tokenizer.text.encode("a seven"), tokenizer.vocabulary.begin_image, *token_ids]
    stream.append(tokenizer.vocabulary.end_image)
    is_code = tokenizer.vocabulary.is_image_code(np.array(stream))
    np.testing.assert_array_equal(
        tokenizer.vocabulary.token_ids_to_codes(np.array(stream)[is_code]), codes[0]
    )
    assert tokenizer.text.decode(stream) == "a seven"
