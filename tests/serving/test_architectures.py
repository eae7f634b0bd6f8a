"""Other architectures, small and with random weights: edits answer as in generate, word for word."""

from __future__ import annotations

import pytest

from tests.serving.architectures import BUILD, checkpoint
from tests.serving.support import CAPTION, Case, HuggingFace, Vllm, answer_of, cases, differences
from vlm_fix.errors import VlmFixError
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
    asked = [*cases(3), Case((1, 2), CAPTION), Case((), CAPTION)]
    plain = own.answers([], asked[:4], 12)
    for spec in SPECS:
        engine.use(spec)
        theirs = own.answers(spec.split("+"), asked, 12)
        assert not differences(asked, engine.answers(asked, 12), theirs), spec
        assert differences(asked[:4], plain, theirs[:4]), f"{spec} does not act"


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
