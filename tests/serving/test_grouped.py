"""A model whose query heads share key heads, two by two."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.serving.support import CAPTION, Case, HuggingFace, Vllm, cases, differences


@pytest.fixture(scope="module")
def grouped(hf, tmp_path_factory):
    """picto-llava with every second key head left out, in a folder of its own."""
    folder = tmp_path_factory.mktemp("grouped")
    config = copy.deepcopy(hf.model.config)
    text = config.text_config
    size, text.num_key_value_heads = text.head_dim, text.num_key_value_heads // 2
    state = {}
    for name, value in hf.model.state_dict().items():
        if name.endswith(("k_proj.weight", "v_proj.weight")) and "language_model" in name:
            value = value.view(-1, 2, size, value.shape[-1])[:, 0].reshape(-1, value.shape[-1])
        state[name] = value
    model = LlavaForConditionalGeneration(config)
    model.load_state_dict(state)
    model.to(torch.float32).save_pretrained(folder)
    hf.processor.save_pretrained(folder)
    return str(folder)


def test_grouped_heads_answer_as_in_generate(grouped):
    engine, own = Vllm("var+vcd", grouped), HuggingFace(grouped)
    asked = [*cases(3), Case((1, 2), CAPTION)]
    for spec in ("pai:alpha=1", "spin:keep=0.5", "vaf:enhance=1.5", "gift", "vhr", "vcd"):
        engine.use(spec)
        assert not differences(asked, engine.answers(asked, 12), own.answers([spec], asked, 12)), spec
