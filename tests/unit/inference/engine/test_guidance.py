"""Which passes guidance needs, how their logits are combined, and what each of them sees."""

import torch

from megatron_chameleon.inference.engine.guidance import Conditioning, Guidance, mix, visible
from megatron_chameleon.inference.engine.options import GenerationOptions


def test_scales_choose_the_passes() -> None:
    def passes(*scales: float | None) -> list[str]:
        options = GenerationOptions(guidance=scales[0] or 1.0, guidance_image=scales[1])
        return [kind.name for kind in Guidance.of(options).passes]

    assert passes(1.0, None) == ["ALL"]
    assert passes(3.0, None) == passes(3.0, 3.0) == ["ALL", "NOTHING"]
    assert passes(3.0, 1.2) == ["ALL", "IMAGES", "NOTHING"]
    assert passes(3.0, 1.0) == ["ALL", "IMAGES"]


def test_each_answer_of_a_batch_is_mixed_by_its_own_scales() -> None:
    """Answers of one, two and three passes, whose rows lie anywhere in the batch."""
    scales = ((3.0, 1.2), (3.0, 3.0), (3.0, 1.0), (1.0, 1.2), (1.0, 1.0))
    guidances = [Guidance.of(GenerationOptions(guidance=a, guidance_image=b)) for a, b in scales]
    names = [(n, kind) for n, guidance in enumerate(guidances) for kind in guidance.passes]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(1)).tolist()
    logits = torch.randn(len(names), 5, generator=torch.Generator().manual_seed(2))
    row_of = {names[place]: row for row, place in enumerate(order)}
    row_3B = torch.tensor(
        [[row_of[n, g.passes[p]] for p in g.mixed_passes] for n, g in enumerate(guidances)]
    ).T
    text, image = torch.tensor(scales).T
    mixed = mix(logits, row_3B, text, image)
    for n, (text_scale, image_scale) in enumerate(scales):
        found = {kind: logits[row_of[n, kind]] for kind in guidances[n].passes}
        full = found[Conditioning.ALL]
        # a pass that is missing is one whose scale makes no difference
        nothing = found.get(Conditioning.NOTHING)
        images = found.get(Conditioning.IMAGES)
        if nothing is None:
            nothing = full if images is None else images
        if images is None:
            images = nothing if text_scale == image_scale else full
        expected = nothing + image_scale * (images - nothing) + text_scale * (full - images)
        torch.testing.assert_close(mixed[n], expected)
        alone = torch.stack([found[kind] for kind in guidances[n].passes])
        torch.testing.assert_close(guidances[n].mix(alone)[0], expected)


def test_each_pass_sees_its_share_of_an_answer() -> None:
    """In an image, at the beginning of one, after the end of one, and in text."""
    is_image = torch.tensor([True, True, True, False])
    in_image = torch.tensor([True, True, False, False])
    seen = {
        kind: visible(torch.full((4,), kind), torch.arange(4), in_image, is_image).tolist()
        for kind in Conditioning
    }
    assert seen[Conditioning.ALL] == [True, True, True, True]
    assert seen[Conditioning.IMAGES] == [True, True, True, False]
    assert seen[Conditioning.NOTHING] == [True, True, False, False]
