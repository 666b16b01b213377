"""Networks of other libraries: their codes and pixels are those of the library itself."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_networks import CODES, make, save
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_chameleon.errors import ChameleonError, ConfigError, DataError
from megatron_chameleon.tokenizer.folder import drawn_codes, fingerprint, load_tokenizer
from megatron_chameleon.tokenizer.image.facts import read_facts
from megatron_chameleon.tokenizer.image.importing import import_network
from megatron_chameleon.tokenizer.image.stored import save_vqgan
from megatron_chameleon.tokenizer.image.tokenizer import ImageTokenizer
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig
from megatron_chameleon.tokenizer.text.training import train_text_tokenizer

Noise = Callable[..., Image.Image]
NAMES = ("emu3", "janus", "chameleon", "vqmodel", "movqgan")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each library's network. Must not be changed."""
    folder = tmp_path_factory.mktemp("sources")
    for name in NAMES:
        save(name, folder / name)
    return folder


def library_codes(name: str, network: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[B, rows, columns], by the library's own functions."""
    count, _, height, width = pixels.shape
    if name == "emu3":
        codes = network.encode(pixels, torch.tensor([[height, width]] * count)).image_tokens
        return torch.stack(codes)
    if name in ("vqmodel", "movqgan"):
        found = network.quantize(network.encode(pixels).latents)[2][2]
    else:
        found = network.encode(pixels).image_tokens
    return found.view(count, height // 4, width // 4)


def library_pixels(name: str, network: Any, codes: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W], by the library's own functions."""
    if name == "emu3":
        return network.decode(codes)
    if name == "janus":
        return network.decode(codes.flatten(1))
    vectors = network.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, 4))
    return network.decode(vectors, force_not_quantize=True).sample


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_codes_and_pixels_are_those_of_the_library(
    name: str, sources: Path, tmp_path: Path
) -> None:
    import_network(sources / name, tmp_path, 16)
    ours, library = ImageTokenizer.load(tmp_path).model, make(name)
    torch.manual_seed(1)
    for height, width in ((16, 16), (24, 8)):  # Janus's own code decodes its square alone
        pixels = torch.randn(3, 3, height, width)
        codes = ours.encode(pixels)
        expected = library_codes(name, library, pixels)
        assert torch.equal(codes, expected.flatten(1))
        assert len(codes.unique()) > 3
        if ours.has_decoder and (name != "janus" or height == width):
            decoded = ours.decode(codes, height // 4, width // 4)
            # the same functions on the same numbers
            assert torch.equal(decoded, library_pixels(name, library, expected))
    assert ours.has_decoder == (name != "chameleon")


def test_pictures_are_scaled_as_the_librarys_processor_scales_them(
    sources: Path, tmp_path: Path, noise: Noise
) -> None:
    from transformers import Emu3ImageProcessor

    processor = Emu3ImageProcessor(
        image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4], do_resize=False
    )
    shutil.copytree(sources / "emu3", tmp_path / "emu3")
    usual = Emu3ImageProcessor(do_resize=False)
    for folder, rule in ((sources / "emu3", usual), (tmp_path / "emu3", processor)):
        if rule is processor:
            processor.save_pretrained(folder)
        import_network(folder, tmp_path / "out", 16)
        tokenizer = ImageTokenizer.load(tmp_path / "out")
        images = [noise(seed) for seed in range(5)]
        pixels = torch.tensor(np.stack(rule(images)["pixel_values"])).flatten(0, -4)
        with torch.inference_mode():
            expected = library_codes("emu3", make("emu3"), pixels).flatten(1)
        np.testing.assert_array_equal(tokenizer.encode(images), expected.numpy())
        assert len(tokenizer.decode(expected.numpy())) == 5


def test_a_folder_can_be_moved_and_says_what_it_is(
    sources: Path, tmp_path: Path, noise: Noise
) -> None:
    made = import_network(sources / "emu3", tmp_path / "a", 16)
    train_text_tokenizer(["a seven and a nine"] * 30, tmp_path / "a", 345, CODES)
    first = load_tokenizer(tmp_path / "a")
    assert first.image is not None
    codes = first.image.encode([noise()])
    shutil.move(tmp_path / "a", tmp_path / "b")
    second = load_tokenizer(tmp_path / "b")
    assert second.image is not None and second.network == "emu3"
    np.testing.assert_array_equal(second.image.encode([noise()]), codes)
    assert first.fingerprint == second.fingerprint == fingerprint(tmp_path / "b")
    assert read_facts(tmp_path / "b") == made.facts
    assert drawn_codes(tmp_path / "b") == second.drawn_codes == 16

    content = json.loads((tmp_path / "b" / "image.json").read_text())
    content["pixels"]["mean"][0] += 0.01
    (tmp_path / "b" / "image.json").write_text(json.dumps(content))
    assert fingerprint(tmp_path / "b") != first.fingerprint


def test_the_network_is_found_inside_a_whole_model_of_several_files(
    sources: Path, tmp_path: Path
) -> None:
    weights = load_file(sources / "emu3" / "model.safetensors")
    names = sorted(weights)
    model = {f"model.vqmodel.{name}": weights[name].bfloat16().contiguous() for name in names}
    model = {
        name: (weights[name.removeprefix("model.vqmodel.")] if "num_batches" in name else tensor)
        for name, tensor in model.items()
    }
    first = {**dict(list(model.items())[:50]), "lm_head.weight": torch.zeros(2, 2)}
    second = dict(list(model.items())[50:])
    index: dict[str, str] = {}
    for number, part in enumerate((first, second, {"model.embed.weight": torch.zeros(2)})):
        file = f"model-{number}.safetensors"
        save_file(part, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = json.loads((sources / "emu3" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "emu3", "vq_config": config}))

    import_network(tmp_path, tmp_path / "out", 16)
    narrow = ImageTokenizer.load(tmp_path / "out").model
    library = make("emu3").bfloat16().float()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        expected = library_codes("emu3", library, pixels).flatten(1)
        assert torch.equal(narrow.encode(pixels), expected)

    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(DataError, match=r"model-1.safetensors: is missing\. Copy the whole folder"):
        import_network(tmp_path, tmp_path / "out", 16)


def test_a_narrower_type_changes_few_codes(sources: Path, tmp_path: Path, noise: Noise) -> None:
    images = [noise(seed) for seed in range(2)]
    for name in ("janus", "vqmodel"):
        import_network(sources / name, tmp_path / name, 16)
        exact = ImageTokenizer.load(tmp_path / name)
        narrow = ImageTokenizer.load(tmp_path / name, dtype=torch.bfloat16)
        codes = exact.encode(images)
        assert (codes == narrow.encode(images)).mean() > 0.5
        pairs = zip(exact.decode(codes), narrow.decode(codes), strict=True)
        assert all(np.abs(np.int16(a) - np.int16(b)).mean() < 4 for a, b in pairs)


def test_a_network_is_walked_through_once_to_check_its_tensors(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each walk visits all modules; one for each tensor made large networks slow to open."""
    import_network(sources / "vqmodel", tmp_path, 16)
    walks = []
    honest = torch.nn.Module.state_dict

    def state_dict(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
        if not args and not options:  # not those of its children
            walks.append(module)
        return honest(module, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "state_dict", state_dict)
    ImageTokenizer.load(tmp_path)
    assert len(walks) == 1


# What is refused


def edited(sources: Path, folder: Path, name: str = "emu3", **values: Any) -> Path:
    shutil.copytree(sources / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("emu3", {"model_type": "llama"}, "model_type is 'llama', and the image tokenizers that"),
        ("emu3", {"model_type": None}, "says neither model_type nor _class_name"),
        ("emu3", {"model_type": ["emu3"]}, "model_type is a list"),
        ("vqmodel", {"_class_name": "AutoencoderKLCosmos"}, "_class_name is 'AutoencoderKLCosmos'"),
        ("emu3", {"codebook_size": 32}, r"tensors do not fit config.json: quantize"),
        ("emu3", {"base_channels": 64}, r"tensors do not fit config.json"),
        ("emu3", {"base_channels": 33}, r"describes no network that can be built"),
        ("emu3", {"base_channels": "32"}, r"base_channels is '32', not a whole number"),
        ("emu3", {"num_res_blocks": 10**9}, r"num_res_blocks is 1000000000, not a whole number"),
        ("emu3", {"channel_multiplier": []}, r"channel_multiplier is empty"),
        ("emu3", {"channel_multiplier": [1] * 50}, r"channel_multiplier is a list of 50"),
        ("emu3", {"temporal_downsample_factor": 3}, r"is 3, not a power of two"),
        ("emu3", {"double_latent": True}, r"double_latent is True, and only False can be read"),
        ("emu3", {"in_channels": 1}, r"in_channels is 1, and only 3 can be read"),
        ("emu3", {"hidden_size": 64}, r"tensors do not fit config.json"),
        ("janus", {"num_patches": 0}, r"num_patches is 0, not a whole number"),
        ("janus", {"embed_dim": 16}, r"tensors do not fit config.json"),
        ("chameleon", {"attn_resolutions": [4]}, r"attn_resolutions is set"),
        ("vqmodel", {"up_block_types": ["UpDecoderBlock2D"]}, r"up_block_types has not the 3 lev"),
        ("vqmodel", {"norm_num_groups": 7}, r"describes no network that can be built: ValueError"),
        ("vqmodel", {"act_fn": "rm -rf"}, r"describes no network that can be built"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(
    name: str, values: dict[str, Any], message: str, sources: Path, tmp_path: Path
) -> None:
    folder = edited(sources, tmp_path / "source", name, **values)
    with pytest.raises(ChameleonError, match=message) as caught:
        import_network(folder, tmp_path / "out", 16)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_usable_weights_says_what_to_do(sources: Path, tmp_path: Path) -> None:
    folder = edited(sources, tmp_path / "source")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()

    def refusal() -> str:
        with pytest.raises(DataError) as caught:
            import_network(folder, tmp_path / "out", 16)
        return str(caught.value)

    weights.write_bytes(whole[:1000])
    assert "model.safetensors: cannot be read" in refusal()
    weights.rename(folder / "a.safetensors")
    weights.with_name("b.safetensors").write_bytes(whole)
    assert "says which of its 2 safetensors files belong together" in refusal()
    (folder / "a.safetensors").unlink()
    (folder / "b.safetensors").unlink()
    assert "has no model.safetensors. Give a folder with config.json" in refusal()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    assert "only in pytorch_model.bin, a pickle" in refusal()
    assert "write it with save_pretrained(FOLDER)" in refusal()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')
    assert "weight_map names '../x', which is in another folder" in refusal()
    (folder / "config.json").unlink()
    assert "only in pytorch_model.bin, a pickle" in refusal()
    shutil.rmtree(folder)
    assert "source: " in refusal()


def test_a_resolution_and_a_vocabulary_must_fit(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--resolution: 18 is not a multiple of 4.*Use 16"):
        import_network(sources / "emu3", tmp_path, 18)
    train_text_tokenizer(["a seven and a nine"] * 30, tmp_path, 310, 32)
    message = "has 32 image codes, but the network has 64. Run .* with --image-codes 64 first"
    with pytest.raises(ConfigError, match=message):
        import_network(sources / "emu3", tmp_path, 16)
    assert not (tmp_path / "image.json").exists()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("network",),
            "of_nobody",
            "which no installed package has; the known ones are chameleon, emu3",
        ),
        (("network",), 3, "network is 3, not a string"),
        (("facts", "resolution"), 18, "resolution 18 is not a multiple of 4"),
        (("facts", "codebook_size"), 32, "codebook_size is 32, and the network 'emu3'"),
        (("facts", "has_decoder"), "yes", "has_decoder is 'yes', not true or false"),
        (("pixels", "std"), [0, 1, 1], "std is 0"),
        (("pixels", "mean"), 1, "mean is 1, not three numbers"),
        (("model",), [], "model is a list"),
        (("model", "channel_multiplier"), "1", "describes no network that can be built"),
        (("model", "embed_dim"), 8, "tensors do not fit image.json"),
    ],
)
def test_a_damaged_image_json_is_one_line(
    path: tuple[str, ...], value: object, message: str, sources: Path, tmp_path: Path
) -> None:
    import_network(sources / "emu3", tmp_path, 16)
    file = tmp_path / "image.json"
    content = json.loads(file.read_text())
    section = content if len(path) == 1 else content[path[0]]
    section[path[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        ImageTokenizer.load(tmp_path)


# Networks of other packages

PLUGIN = '''
import torch
from megatron_chameleon.tokenizer.image.kinds import Described
from megatron_chameleon.tokenizer.image.network import PixelRule

class Brightness(torch.nn.Module):
    """The mean brightness of a patch, in as many steps as there are codes."""
    downsampling, has_decoder, fixed_grid = 2, True, True
    def __init__(self, codes, resolution, rule):
        super().__init__()
        self.steps = torch.nn.Parameter(torch.empty(codes))
        self.codebook_size, self.resolution, self.pixel_rule = codes, resolution, rule
    def encode(self, pixels):
        grey = torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 2).flatten(1)
        return (grey[..., None] - self.steps).abs().argmin(-1)
    def decode(self, codes, rows, columns):
        patches = self.steps[codes].view(-1, 1, rows, columns).expand(-1, 3, -1, -1)
        return patches.repeat_interleave(2, 2).repeat_interleave(2, 3)
    def convolve_in(self, dtype, memory_format):
        return self
    def compile_networks(self, backend="inductor"):
        return self

class Kind:
    model_types = ("brightness",)
    def describe(self, config, folder):
        rule = PixelRule(1 / 255, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return Described({"codes": config.whole("codes", 2, 256)}, 4, rule)
    def build(self, model, resolution, rule):
        return Brightness(model["codes"], resolution, rule)

KIND = Kind()
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with an entry point, installed as pip would, and a folder of its network."""
    site = tmp_path / "site"
    information = site / "toy_networks-1.0.dist-info"
    information.mkdir(parents=True)
    (site / "toy_networks.py").write_text(PLUGIN)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-networks\nVersion: 1\n")
    (information / "entry_points.txt").write_text(
        "[megatron_chameleon.image_networks]\nbrightness = toy_networks:KIND\n"
    )
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "toy_networks", raising=False)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "brightness", "codes": 5}')
    save_file({"steps": torch.linspace(0, 1, 5)}, source / "model.safetensors")
    return source


def test_another_package_adds_a_network(plugin: Path, tmp_path: Path) -> None:
    made = import_network(plugin, tmp_path / "out")
    assert (made.network, made.facts.codes_per_image) == ("brightness", 4)
    tokenizer = ImageTokenizer.load(tmp_path / "out")
    image = Image.fromarray(np.uint8([[0, 0, 255, 255]] * 2 + [[128] * 4] * 2))
    codes = tokenizer.encode([image])
    assert codes.tolist() == [[0, 4, 2, 2]]
    (decoded,) = tokenizer.decode(codes)
    assert np.abs(np.int16(decoded)[..., 0] - np.int16(image)).max() <= 1

    with pytest.raises(
        ConfigError, match=r"8 was chosen, but the network only takes pictures of 4"
    ):
        import_network(plugin, tmp_path / "out", 8)


def test_a_package_that_cannot_be_loaded_is_named(plugin: Path, tmp_path: Path) -> None:
    module = tmp_path / "site" / "toy_networks.py"
    module.write_text("import package_that_nobody_has")
    message = r"'brightness' \(toy_networks:KIND\) cannot be loaded: .*Install package_that_nobody"
    with pytest.raises(DataError, match=message):
        import_network(plugin, tmp_path / "out")


def test_our_own_image_json_is_byte_for_byte_what_it_was(tmp_path: Path) -> None:
    save_vqgan(Vqgan(VqganConfig(16, 3, 32, [1, 1, 1], 1, 8, 8, 32)), tmp_path, {"seed": 5})
    assert (tmp_path / "image.json").read_text() == (
        '{\n  "format": "megatron_chameleon.image_tokenizer/1",\n  "model": {\n'
        '    "resolution": 16,\n    "in_channels": 3,\n    "base_channels": 32,\n'
        '    "ch_mult": [\n      1,\n      1,\n      1\n    ],\n    "num_res_blocks": 1,\n'
        '    "z_channels": 8,\n    "embed_dim": 8,\n    "codebook_size": 32,\n'
        '    "dropout": 0.0\n  },\n  "seed": 5\n}\n'
    )
