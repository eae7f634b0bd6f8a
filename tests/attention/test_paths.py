"""The paths behind the attention function: the row kernel, columns on plain SDPA, the choice between them, memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlm_fix
from tests.support import families
from tests.support.cases import ROWS
from tests.support.families import prompt
from tests.support.matrix import check
from tests.support.models import BUILD, make_inputs, single
from tests.support.references import attention as edits
from tests.support.references import base as ref
from tests.support.run import error, greedy
from vlm_fix import launches
from vlm_fix.attention import AttentionPath, AttentionWing, few_columns, strategies
from vlm_fix.attention.columns import column_attention
from vlm_fix.attention.edits import ColumnFactors
from vlm_fix.attention.inputs import AttentionInputs
from vlm_fix.registry import get_method

FORMS = (
    "pai:",
    "vaf",
    "avar",
    "zerotuning",
    "locore",
    "tame",
    "paint:alpha=1",
    "act:threshold=0.06",
    "var:tau",
    "ad_hh",
)
FUSED = [s for s in ROWS if s.startswith((*FORMS, "hgai", "spin"))]
STATIC = [s for s in ROWS if s.startswith(("zerotuning", "vaf", "avar"))]


@pytest.fixture
def paths(monkeypatch):
    """Notes which path each layer takes; call it with "kernel" or "columns" to force one."""
    seen = []
    for name in ("edited_rows", "column_attention", "few_columns_attention", "decode_row"):
        original = getattr(strategies, name)

        def spy(*args, name=name, original=original, **kwargs):
            seen.append((name, args[0].query.shape[2]))
            return original(*args, **kwargs)

        monkeypatch.setattr(strategies, name, spy)

    def force(path):
        monkeypatch.setattr(AttentionWing, "path", AttentionPath(path))
        seen.clear()
        return seen

    return force


@pytest.mark.parametrize("spec", FUSED)
@pytest.mark.parametrize("name", [*BUILD, "gemma3"])
def test_decode_rows_in_one_launch_equal_reference(name, spec, paths, monkeypatch, record_property):
    """The form of each edit, made once a call or a step, against loops over whole matrices."""
    if name == "gemma3" and spec.startswith("paint"):
        pytest.skip("paint does not read gemma3's tower")
    seen = paths("fused")
    check(spec, ROWS[spec], name, torch.float32, monkeypatch, record_property)
    assert ("decode_row", 1) in seen


@pytest.mark.parametrize(
    "stack", [["pai:alpha=0.7,layers=1-", "zerotuning:rate=0.1"], ["tame:gamma=0.4", "vhr"]], ids="+".join
)
def test_forms_of_a_stack_equal_the_row_kernel(models, stack, paths):
    inputs, logits = make_inputs("llava", [1, 2]), []
    for path in ("kernel", "fused"):
        seen = paths(path)
        with vlm_fix.wrapped(models["llava"], stack):
            logits.append(greedy(models["llava"], inputs)[1])
        assert (("decode_row", 1) in seen) == (path == "fused")
    assert error(logits[1], logits[0].double()) < 1e-5


@pytest.mark.parametrize("spec", ["visual_topk:k=5", "visual_topk:k=0.3,layers=1-", "visual_topk:k=1000,layers=1-"])
def test_columns_hidden_as_scores_equal_the_row_kernel(models, spec, paths):
    """Where all samples hide as many: one prompt, and a batch of prompts without padding."""
    same = {k: torch.cat([v, v]) for k, v in make_inputs("llava", [1]).items()}
    for inputs in (make_inputs("llava", [2]), same):
        logits = []
        for path in ("kernel", "fused"):
            seen = paths(path)
            with vlm_fix.wrapped(models["llava"], spec):
                logits.append(greedy(models["llava"], inputs)[1])
            assert (("decode_row", 1) in seen) == (path == "fused")
        assert error(logits[1], logits[0].double()) < 1e-5


@pytest.mark.parametrize("spec", ["gift:alpha=3,source_layer=1,layers=2-3", "gift:alpha=2,source_layer=3,layers=0-"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_gift_in_three_launches_equals_the_row_kernel(models, name, spec, paths):
    logits = []
    for path in ("kernel", "fused"):
        seen, before = paths(path), launches.use(path == "fused")
        try:
            with vlm_fix.wrapped(models[name], spec):
                logits.append(greedy(models[name], single(name, [1, 2], 1), 5)[1])
        finally:
            launches.use(before)
        assert (("decode_row", 1) in seen) == (path == "fused")
    assert error(logits[1], logits[0].double()) < 1e-5


def test_methods_without_a_form_keep_the_row_kernel(models, paths):
    seen = paths("fused")
    with vlm_fix.wrapped(models["llava"], ["pai:alpha=0.5,layers=0-", "hgai:alpha=1,layers=0-"]):
        greedy(models["llava"], make_inputs("llava", [1]), 2)
    assert ("edited_rows", 1) in seen and not any(path == "decode_row" for path, _ in seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("spec", STATIC)
@pytest.mark.parametrize("name", [*BUILD, "gemma3"])
def test_columns_equal_reference(name, spec, dtype, paths, monkeypatch, record_property):
    """Every row, prompt and decode, through SDPA with changed keys, against loops over whole matrices."""
    seen = paths("columns")
    check(spec, ROWS[spec], name, dtype, monkeypatch, record_property)
    assert seen and {path for path, _ in seen} == {"column_attention"}


@pytest.mark.parametrize("beta,threshold", [(0.4, 0.06), (0.0, 0.07)])
@pytest.mark.parametrize("name", [*BUILD, "gemma3"])
def test_columns_apart_equal_reference(name, beta, threshold, paths):
    """ACT's prompt rows on one pass of SDPA, its decode rows by the kernel, against loops over whole matrices."""
    model = families.build(name) if name == "gemma3" else BUILD[name]()
    inputs = prompt(name, [1, 2], rows=[1]) if name == "gemma3" else single(name, [1, 2], 1)
    spec, length = f"act:beta={beta},threshold={threshold},layers=0-2", inputs["input_ids"].shape[1]
    seen = paths("auto")
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, inputs, 4, suppress_tokens=[90])
    assert set(seen) == {("few_columns_attention", length), ("edited_rows", 1)}
    twin = ref.double(model)
    run = edits.ACT(ref.visual_columns(inputs["input_ids"]), length, [0, 1, 2], threshold=threshold, beta=beta)
    expected = ref.teacher_forced(twin, run, inputs, tokens[0, :-1])
    plain = ref.teacher_forced(twin, None, inputs, tokens[0, :-1])
    assert run.margin > 1e-7 and float((expected - plain).abs().max()) > 1e-2
    assert error(logits[0], expected) < 1e-5


@torch.no_grad()
def test_columns_apart_in_a_padded_batch(family, model, paths, monkeypatch):
    """The same rows as the kernel's; more separate columns than the limit go to the kernel."""
    inputs, logits = make_inputs(family, [1, 2, 0]), {}
    real = inputs["attention_mask"].bool()
    for path, most, used in (("kernel", 24, 0), ("auto", 24, 2), ("auto", 0, 2)):
        seen = paths(path)
        monkeypatch.setattr(few_columns, "MAX_SEPARATE_COLUMNS", most)
        with vlm_fix.wrapped(model, "act:threshold=0.05,layers=1-2"):
            logits[path, most] = model(**inputs).logits[real]
        assert sum(name == "few_columns_attention" for name, _ in seen) == used
    assert torch.equal(logits["kernel", 24], logits["auto", 0])
    assert float((logits["kernel", 24] - logits["auto", 24]).abs().max()) < 1e-4
    assert not torch.equal(logits["kernel", 24], logits["auto", 24])


@torch.no_grad()
@pytest.mark.parametrize("spec", ["act:threshold=0.05,layers=1-2", "vaf:layers=0-,enhance=1.6", "zerotuning:rate=0.1"])
def test_paths_agree_on_values_narrower_than_keys(spec, paths):
    """Latent attention (Kimi): keys of 24, values of 12 dimensions."""
    model, inputs, logits = families.build("kimi_k25"), prompt("kimi_k25", [1, 2]), {}
    plain, real = model(**inputs).logits, inputs["attention_mask"].bool()
    for path in ("kernel", "columns" if not spec.startswith("act") else "auto"):
        seen = paths(path)
        with vlm_fix.wrapped(model, spec):
            logits[path] = model(**inputs).logits[real]
    assert {name for name, _ in seen} <= {"column_attention", "few_columns_attention"} and seen
    one, other = logits.values()
    assert float((one - other).abs().max()) < 1e-4 < 1e-2 < float((one - plain[real]).abs().max())


@torch.no_grad()
@pytest.mark.parametrize(
    "spec", [["vaf:layers=0-,enhance=1.6"], ["vaf:layers=0-", "avar"], ["zerotuning", "vhr:prompt_rows=all"]]
)
def test_paths_agree_in_a_padded_batch(family, model, spec, paths):
    """Rows before the edit stay bit-identical to the plain model's; both paths give the same edited rows."""
    inputs, logits = make_inputs(family, [1, 2, 0]), {}
    first = vlm_fix.families.get_part(model, "model.language_model").layers[0].self_attn
    outputs = []
    hook = first.register_forward_hook(lambda m, a, o: outputs.append(o[0]))
    plain = model(**inputs).logits
    for path in ("kernel", "columns"):
        seen = paths(path)
        with vlm_fix.wrapped(model, spec):
            logits[path] = model(**inputs).logits
        assert any(name == {"kernel": "edited_rows", "columns": "column_attention"}[path] for name, _ in seen)
    hook.remove()
    real = inputs["attention_mask"].bool()
    assert float((logits["kernel"] - logits["columns"])[real].abs().max()) < 1e-4
    assert not torch.equal(logits["columns"], plain)
    if spec[0].startswith("vaf"):
        last = (inputs["input_ids"] == 90).int().cumsum(1).argmax(1)
        for row, end in enumerate(last.tolist()):
            end = inputs["input_ids"].shape[1] - 1 if not (inputs["input_ids"][row] == 90).any() else end
            assert all(torch.equal(o[row, : end + 1], outputs[0][row, : end + 1]) for o in outputs[1:])


@pytest.mark.filterwarnings("ignore:var changed nothing in this call")
def test_share_of_rows_chooses_columns_or_the_row_kernel(models, paths):
    """A quarter of the rows or more: columns; fewer, decode rows and edits that need weights: the row kernel."""
    model, short, long = models["llava"], single("llava", [1], 0), single("llava", [1], 0, text=40)
    length = short["input_ids"].shape[1]
    after = length - 1 - int((short["input_ids"] == 90).nonzero()[-1, 1])
    assert 4 * after < length
    for spec, inputs, expected in (
        ("zerotuning", short, {("column_attention", length), ("edited_rows", 1)}),
        ("pai", short, {("edited_rows", 1)}),
        ("vaf:layers=0-", short, {("edited_rows", after), ("edited_rows", 1)}),
        ("vaf:layers=0-", long, {("column_attention", long["input_ids"].shape[1]), ("edited_rows", 1)}),
        (
            ["zerotuning:layers=0", "var:layers=1-"],
            short,
            {("column_attention", length), ("edited_rows", after), ("edited_rows", 1)},
        ),
        (["zerotuning", "pai:layers=0-"], short, {("edited_rows", length), ("edited_rows", 1)}),
    ):
        seen = paths("auto")
        with vlm_fix.wrapped(model, spec):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert set(seen) == expected, spec


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
def test_column_attention_equals_softmax(batch, kv_heads, groups, rows, seed, masked):
    """Random scales and biases in a row, grouped heads, with and without a mask, in float64 loops over columns."""
    g = torch.Generator().manual_seed(seed)
    heads, dim = kv_heads * groups, 6
    q, k, v = (torch.randn(batch, n, rows, dim, generator=g) for n in (heads, kv_heads, kv_heads))
    mask = None
    if masked:
        mask = (torch.rand(batch, 1, rows, rows, generator=g) < 0.6) | torch.eye(rows, dtype=torch.bool)
    forms = [
        ColumnFactors(torch.rand(batch, 1, 1, rows, generator=g), torch.randn(batch, 1, 1, rows, generator=g)),
        ColumnFactors(
            bias=torch.randn(batch, 1, 1, rows, generator=g), heads=(torch.rand(heads, generator=g) < 0.5).float()
        ),
        ColumnFactors(scale=2 * torch.rand(batch, 1, 1, rows, generator=g)),
    ]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    ours = column_attention(AttentionInputs(module, q, k, v, mask, 0.4), forms)
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                z = {}
                for j in range(rows):
                    if mask[b, 0, r, j] if masked else j <= r:
                        z[j] = 0.4 * float(q[b, h, r].double() @ k[b, h // groups, j].double())
                        for form in forms:
                            if form.scale is not None:
                                z[j] *= float(form.scale[b, 0, 0, j])
                        for form in forms:  # log-weights follow
                            if form.bias is not None and (form.heads is None or form.heads[h]):
                                z[j] += float(form.bias[b, 0, 0, j])
                a = torch.tensor(list(z.values()), dtype=torch.float64).softmax(0)
                expected = sum(a[i] * v[b, h // groups, j].double() for i, j in enumerate(z))
                assert torch.allclose(ours[b, r, h].double(), expected, atol=1e-5)


MEMORY = """
import os, sys, torch, vlm_fix
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
torch.set_num_threads(1)
torch.manual_seed(0)
vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                          image_size=24, patch_size=4, projection_dim=32)
text = LlamaConfig(hidden_size=1024, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=8,
                   num_key_value_heads=8, vocab_size=96, max_position_embeddings=4096)
model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=90)).eval()
ids = torch.cat([torch.tensor([1, 5, 6]), torch.full((36,), 90), torch.randint(3, 80, (2861,))])[None]
inputs = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 24, 24), logits_to_keep=1)
def peak():  # getrusage would begin with what the process that started this one held
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
with torch.no_grad():
    model(input_ids=ids[:, -64:])
    for spec in sys.argv[1:]:
        if child := os.fork():  # each prefill in a process of its own, whose peak begins at what it holds
            if os.waitpid(child, 0)[1]:
                sys.exit(spec)
            continue
        before = peak()
        if spec != "plain":
            vlm_fix.wrap(model, spec.split("+"))
        model(**inputs)
        print(before, peak(), flush=True)
        os._exit(0)
"""


ON_ALL_ROWS = [
    "zerotuning",  # columns on plain SDPA
    "var:tau=1,min_visual_mass=0,layers=0-",  # the row kernel
    "act:layers=0,threshold=0.001",  # more sinks than can be set apart
    "tame",
    "gift:source_layer=0,layers=0",
    "zerotuning+var:tau=1,min_visual_mass=0,layers=0-",
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_prefill_memory_at_2900_tokens():
    """What a prefill adds to resident memory, interpreter and weights aside: at most 1.2 x of what plain SDPA adds."""

    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back: peaks repeat to 1 %
    command = [sys.executable, "-c", MEMORY, "plain", *ON_ALL_ROWS]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    plain, *added = (int(peak) - int(before) for before, peak in map(str.split, out.stdout.splitlines()))
    ratios = {spec: round(more / plain, 3) for spec, more in zip(ON_ALL_ROWS, added, strict=True)}
    print(plain // 1024, "MB", ratios)
    assert plain > 100 * 1024 and max(ratios.values()) <= 1.2, ratios


@pytest.mark.parametrize("spec", ["zerotuning:rate=0.1", "var:tau=1.7,min_visual_mass=0.05,rho=0.1,layers=1-", "pai"])
def test_static_cache_knows_the_padding(family, model, spec):
    """generate hands a static cache's masks over ready-made; padding is still no text and no first token."""
    inputs = make_inputs(family, [1, 2, 1])
    with vlm_fix.wrapped(model, spec):
        expected = greedy(model, inputs, 5)
        got = greedy(model, inputs, 5, cache_implementation="static")
    assert torch.equal(got[0], expected[0]) and float((got[1] - expected[1]).abs().max()) < 2e-4


@pytest.mark.parametrize("name, made", [("avar", "column_factors"), ("locore", "bias")])
def test_masks_and_factors_shared_by_layers_are_made_once_in_a_forward(model, family, monkeypatch, name, made):
    method, calls = get_method(name), []
    original = getattr(method, made)

    def spy(self, rows):
        calls.append(rows.layer)
        return original(self, rows)

    spy.__name__ = made
    monkeypatch.setattr(method, made, spy)
    with vlm_fix.wrapped(model, name):
        greedy(model, single(family, [1], 0), 4)
    assert len(calls) == 4, "one for the prompt and one for each step, not one for each layer"
