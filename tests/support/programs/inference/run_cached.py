"""Read token by token with the trained model under several layouts, and write the logits.

A job is {"name", "processes", "checkpoint",
"token_ids", "lengths", "sequence_parallel",
"samples"}; tensor parallelism has all processes. For each job and
rank it writes NAME-RANK.pt: {"logits": [R, S, vocabulary], "codes": [R, codes], "same_codes": the
same from "logits"}. With "samples", the folder NAME has what the model writes as in training.
"""

from pathlib import Path
from typing import Any

import torch
from plain_cache import PlainCache, cached_logits

from megatron_chameleon.checkpoint.formats.opening import open_checkpoint, open_tokenizer
from megatron_chameleon.checkpoint.loading.config import inference_config, padded_vocabulary
from megatron_chameleon.checkpoint.loading.model import load_model
from megatron_chameleon.config.schema import SamplePromptConfig
from megatron_chameleon.inference.engine.modality import TokenClasses
from megatron_chameleon.inference.models.megatron_layers import MegatronLayers
from megatron_chameleon.parallel.topology import create_topology
from megatron_chameleon.training.samples.sampler import Sampler
from megatron_chameleon.training.samples.trained_model import TrainedModel

FORCES = ("image", "text", None)


def run_job(job: dict[str, Any], output: Path) -> None:
    reader = open_checkpoint(job["checkpoint"])
    config = inference_config(reader, job["processes"])
    config.parallel.sequence_parallel = job["sequence_parallel"]
    topology = create_topology(config.parallel)
    rows = padded_vocabulary(reader.dimensions.vocab_size, job["processes"])
    (model,) = load_model(reader, config, topology, rows)
    tokenizer = open_tokenizer(reader, None, output / f"{job['name']}-{topology.rank}-scratch")
    classes = TokenClasses(tokenizer.vocabulary)
    token_ids = torch.load(job["token_ids"])
    codes, size = classes.code_token_ids, tokenizer.vocabulary.size
    with MegatronLayers.borrowed(model, codes, size) as layers:
        logits = cached_logits(layers, token_ids, job["lengths"])
        cache, first = PlainCache(layers.num_layers), torch.zeros(len(token_ids), 1)
        cache.begin(first == 0)
        last_RH = layers.hidden(token_ids[:, :1], first.long(), first[:, 0].long(), cache.attend)
        results = {
            "logits": logits,
            "codes": layers.logits(last_RH, codes_only=True),
            "same_codes": layers.logits(last_RH)[:, classes.code_token_ids],
        }
    if job["samples"]:
        config.logging.run_dir, config.logging.sample_every_steps = str(output / job["name"]), 1
        config.logging.sample_prompts = [SamplePromptConfig("a", force=f) for f in FORCES]
        config.logging.sample_max_tokens = 20
        config.tokenizer.path = str(tokenizer.folder)
        model.train()
        Sampler(config, TrainedModel(config, topology)).sample(7, model)
        assert model.training and model.decoder.layers[0].self_attention.core_attention.training
    torch.save(results, output / f"{job['name']}-{topology.rank}.pt")
