"""Other architectures, small and with random weights: edits answer as in generate, word for word."""

from __future__ import annotations

import pytest
import torch

from tests.serving.architectures import BUILD, WINDOW, checkpoint
from tests.serving.support import CAPTION, Case, HuggingFace, Vllm, answer_of, cases, differences
from vlm_fix.errors import VlmFixError
from vlm_fix.serving.beside import _attention
from vlm_fix.serving.groups import Looks
from vlm_fix.serving.plugin import planned
from vlm_fix.serving.settings import Settings

START = "random_direction:prompt_rows=all+vhr+deco"  # hooks, passes beside the batch, whole prompts
SPECS = (
    "pai:alpha=1",
    "vaf:enhance=1.5",
    "vhr",
    "random_direction:strength=0.5",
    "deco",
    "vista",
)
QWEN_PRUNERS = (
    "hiprune:keep=9",
    "divprune:keep=9",
    "visionzip:keep=9",
    "uniform_grid:keep=9",
    "zoo_prune:keep=9",
    "agilepruner:keep=9",
    "cdpruner:keep=9,theta=0",
    "flowcut:keep=9",
    "holov:keep=9",
    "prumerge:keep=9",
    "scope:keep=9",
    "vispruner:keep=9",
    "hiprune:keep=9+pai:alpha=1",
)


@pytest.mark.parametrize("name", BUILD)
def test_edits_answer_as_in_generate(name, tmp_path_factory):
    folder = checkpoint(name, tmp_path_factory.mktemp(name))
    engine, own = Vllm(START, folder, enable_chunked_prefill=False), HuggingFace(folder)
    several = (1,) if name == "llava_onevision" else (1, 2)  # of more, vLLM cuts each into tiles, and transformers none
    asked = [*cases(3), Case(several, CAPTION), Case((), CAPTION)]
    plain = own.answers([], asked[:4], 12)
    for spec in SPECS:
        engine.use(spec)
        theirs = own.answers(spec.split("+"), asked, 12)
        assert not differences(asked, engine.answers(asked, 12), theirs), spec
        assert differences(asked[:4], plain, theirs[:4]), f"{spec} does not act"


WINDOWED = {  # (stack at start, options, stacks)
    "whole prompts": (
        START,
        {"enable_chunked_prefill": False},
        (
            "random_direction:prompt_rows=all",
            "vaf:enhance=1.5",
            "gift",
            "vista",
            "pai:alpha=1+vhr",
            "zerotuning",
            "deco",
        ),
    ),
    "chunks": ("pai:alpha=1", {"max_num_batched_tokens": 16}, ("pai:alpha=1", "vhr", "spin")),
    "branches": ("vcd", {}, ("vcd", "icd", "vcd+pai:alpha=1,branch=negative")),
}


@pytest.mark.parametrize("how", WINDOWED)
def test_windows_answer_as_in_generate(how, tmp_path):
    """Prompts longer than the window and shorter ones, which outgrow it while they are answered, with pages given away."""
    start, options, stacks = WINDOWED[how]
    folder = checkpoint("llava_mistral", tmp_path)
    engine, own = Vllm(start, folder, limit_mm_per_prompt={"image": 6}, **options), HuggingFace(folder)
    windowed(engine, own, stacks)


def windowed(engine, own, stacks):
    asked, words = [*cases(3), Case((1, 2, 3, 4, 5, 6), CAPTION), Case((), CAPTION)], 2 * WINDOW
    plain = own.answers([], asked[:4], words)
    for stack in stacks:
        engine.use(stack)
        theirs = own.answers(stack.split("+"), asked, words)
        assert not differences(asked, engine.answers(asked, words), theirs), stack
        assert not differences(asked, engine.staggered(asked, 3, words), theirs), stack
        assert differences(asked[:4], plain, theirs[:4]), f"{stack} does not act"


def test_windows_in_some_layers(tmp_path):
    """Gemma 3: two block tables; what would need images that look both ways is refused."""
    folder = checkpoint("gemma3", tmp_path)
    options = {"limit_mm_per_prompt": {"image": 6}, "max_num_batched_tokens": 16}
    engine, own = Vllm("random_direction+vhr+deco", folder, **options), HuggingFace(folder)
    windowed(engine, own, ("pai:alpha=1", "vhr", "deco", "random_direction:strength=0.5"))
    for stack, words in {
        "vcd": "second branch",
        "vista": "reads the prompt",
        "farsight": "edits the attention",
    }.items():
        with pytest.raises(VlmFixError, match=f"{stack} cannot be served in Gemma3.*look both ways: it .*{words}"):
            engine.use(stack)


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("window", [None, 4, 20])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_rows_beside_the_batch_see_what_they_may(count, window, softcap):
    gen = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, count, 8, generator=gen)
    keys, values = torch.randn(2, 1, 2, 9, 8, generator=gen)
    made = _attention(query, keys, values, Looks(0.7, softcap, window))
    for h in range(4):
        for r in range(count):
            last = 9 - count + r
            first = 0 if window is None else max(0, last - window + 1)
            z = 0.7 * (keys[0, h // 2, first : last + 1].double() @ query[0, h, r].double())
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            expected = z.softmax(0) @ values[0, h // 2, first : last + 1].double()
            torch.testing.assert_close(made[0, h, r].double(), expected, rtol=0, atol=1e-6)


def test_qwen_refuses_what_no_server_here_can_prune(tmp_path):
    folder = checkpoint("qwen2_5_vl", tmp_path)
    for spec, words in {
        "dart": "drops tokens inside the language model",
        "cdpruner": "by the question",
        "random_tokens": "draws were seen to differ",
    }.items():
        with pytest.raises(VlmFixError, match=f"{spec} cannot be served by vLLM: .*{words}"):
            planned(Settings((spec,)), folder, None, False)


def test_pruned_images_of_qwen_keep_their_places(tmp_path):
    """Fewer placeholders, M-RoPE positions as they were, also where a prompt comes in chunks."""
    folder = checkpoint("qwen2_5_vl", tmp_path)
    engine = Vllm("hiprune:keep=9", folder, max_num_batched_tokens=32, limit_mm_per_prompt=None)
    own = HuggingFace(folder)
    asked = [*cases(3), Case((1, 2), CAPTION), Case((), CAPTION)]
    plain = own.answers([], asked[:4], 12)
    for spec in QWEN_PRUNERS:
        engine.use(spec)
        outputs = engine.llm.generate(
            [engine.prompt(c) for c in asked], [engine.params(c, 12) for c in asked], use_tqdm=False
        )
        image = own.model.config.image_token_id
        assert [o.prompt_token_ids.count(image) for o in outputs] == [9 * len(c.scenes) for c in asked]
        theirs = own.answers(spec.split("+"), asked, 12)
        assert not differences(asked, [answer_of(o) for o in outputs], theirs), spec
        assert differences(asked[:4], plain, theirs[:4]), f"{spec} does not act"
