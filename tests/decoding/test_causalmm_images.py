"""CausalMM on images of several crops and on videos: each crop and frame by its own attention, newlines untouched."""

from __future__ import annotations

import math

import pytest
import torch

import vlm_fix
from tests.pruning.test_order import SHAPES, pixels_of, prompts
from tests.support import families
from tests.support.models import IMAGE, VIDEO
from tests.support.references import base as ref
from tests.support.references.contrast import bilinear, with_embeddings
from tests.support.run import error, greedy
from vlm_fix.families import anyres_index


@torch.no_grad()
def crops(twin, inputs):
    """[crops, 36, C] features before the projector, and each crop's reversed attention as a factor [36], by hand."""
    tower, seen = twin.model.vision_tower, []
    layer = [m for m in tower.modules() if type(m).__name__ == "CLIPAttention"][2]
    hook = layer.register_forward_pre_hook(lambda m, a, k: seen.append((a[0] if a else k["hidden_states"]).clone()),
                                           with_kwargs=True)  # fmt: skip
    pixels = inputs["pixel_values"].double()
    states = tower(pixels.flatten(0, 1), output_hidden_states=True).hidden_states[-2][:, 1:]
    hook.remove()
    factors = []
    for x in seen[0]:
        q, k = (f(x).view(37, 4, 8).transpose(0, 1) for f in (layer.q_proj, layer.k_proj))
        total = 0
        for a, b in zip(q, k, strict=True):
            a = (a @ b.T / math.sqrt(8)).softmax(-1)
            total = total + bilinear(a.max() - a, 6, 6) / 4
        factors.append(total.flatten())
    return states, factors


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video"])
def test_crops_equal_reference(name):
    model, inputs = families.build(name), families.prompt(name, [1])
    with vlm_fix.wrapped(model, "causalmm:vision=reversed,language=none,beta=0"):
        tokens, _, scores = greedy(model, inputs, 3, suppress_tokens=None)
    twin = ref.double(model)
    states, factors = crops(twin, inputs)
    index = anyres_index(model.model, inputs)[0]
    new = torch.cat([twin.model.multi_modal_projector(s * f[:, None]) for s, f in zip(states, factors, strict=True)])
    real = index >= 0
    assert int((~real).sum()) > 0 and int(index.max()) < len(new)

    def change(x):
        x = x.clone()
        x[real] = new[index[real]]
        return x

    other = with_embeddings(twin, change, None, inputs, tokens[0, :-1])
    main = ref.teacher_forced(twin, None, inputs, tokens[0, :-1])
    assert error(scores[0], 2 * main - other) < 1e-5 and error(main, other) > 1e-3


def test_batches_of_crops_answer_as_single():
    model, batch = families.build("llava_next"), families.prompt("llava_next", [1, 2, 1])
    with vlm_fix.wrapped(model, "causalmm:beta=0.01"):
        together = greedy(model, batch, 3, suppress_tokens=[IMAGE])
        for row in range(3):
            alone = greedy(model, families.prompt("llava_next", [1, 2, 1], rows=[row]), 3, suppress_tokens=[IMAGE])
            assert torch.equal(alone[0][0], together[0][row])


def test_images_whose_features_are_resized_are_refused():
    model = families.build("llava_onevision")
    with vlm_fix.wrapped(model, "causalmm"), pytest.raises(vlm_fix.VlmFixError, match="are not to be told"):
        greedy(model, families.prompt("llava_onevision", [1, 2]), 2)


def test_each_frame_of_a_video_has_its_own_map(models):
    """Qwen's tower sees the frames of a video one by one, so that a video's factors are those of its frames as images."""
    from vlm_fix.methods.contrast import causalmm

    model, maps = models["qwen2_5_vl"], {}
    method = vlm_fix.parse_spec("causalmm:vision=reversed,language=none,vision_layer=1")
    real = causalmm.map_of
    _, t, h, w = SHAPES["v"]
    frames = pixels_of("v").split(h * w)
    still = prompts(["i"] * t)
    still["input_ids"] = torch.cat(
        [still["input_ids"][:, :3], torch.tensor([[93, *[IMAGE] * (h * w // 4), 94]] * t)], dim=1
    )
    still["attention_mask"] = torch.ones_like(still["input_ids"])
    still["mm_token_type_ids"] = (still["input_ids"] == IMAGE).int()
    still |= {"pixel_values": torch.cat(frames), "image_grid_thw": torch.tensor([[1, h, w]] * t)}
    with pytest.MonkeyPatch.context() as patch:
        for key, inputs in (("video", prompts(["v"])), ("images", still)):
            patch.setattr(
                causalmm, "map_of", lambda *a, key=key: maps.setdefault(key, []).append(real(*a)) or maps[key][-1]
            )
            with vlm_fix.wrapped(model, method):
                greedy(model, inputs, 2, suppress_tokens=[IMAGE, VIDEO])
    assert len(maps["video"]) == 1 and len(maps["images"]) == t
    assert torch.allclose(maps["video"][0], torch.cat(maps["images"]), atol=1e-6)
