"""Other architectures, small and with random weights: edits answer as in generate, word for word."""

from __future__ import annotations

import pytest

from tests.serving.architectures import BUILD, checkpoint
from tests.serving.support import CAPTION, Case, HuggingFace, Vllm, cases, differences

START = "random_direction:prompt_rows=all+vhr+deco"  # hooks, passes beside the batch, whole prompts
SPECS = (
    "pai:alpha=1",
    "vaf:enhance=1.5",
    "vhr",
    "random_direction:strength=0.5",
    "deco",
    "pai:alpha=0.5+yes_bias:bias=1",
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
