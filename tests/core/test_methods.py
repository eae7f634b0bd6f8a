"""Methods of all kinds in every decoding mode; `test_matrix` holds the attention methods against their references."""

from __future__ import annotations

import copy

import pytest
import torch

import vlm_fix
from tests.support.models import BUILD, IMAGE, make_inputs, single
from tests.support.references import base as ref
from tests.support.references.attention import window_order
from tests.support.run import STEPS, VAR_TINY, error, greedy
from vlm_fix.families.compat import CACHE, cache_of

EVERY = ["pai:alpha=0.5", "pai:alpha=0.5,gamma=1.3", f"var:{VAR_TINY}", "vhr", "vcd:beta=0.01", "hiprune:keep=4"]


@pytest.mark.parametrize("spec", ["vcd:beta=0.01", "vcd:alpha=2,noise_step=999", "pai:alpha=0.5,gamma=1.3"])
def test_contrast_equals_cache_free_reference(family, model, spec):
    """Both branches recomputed from scratch at every step, combined by hand."""
    inputs, twin = single(family, [1, 2], 1), ref.double(model)
    method = vlm_fix.parse_spec(spec)
    with vlm_fix.wrapped(model, spec):
        tokens, _, scores = greedy(model, inputs)
    visual, n = ref.visual_columns(inputs["input_ids"]), inputs["input_ids"].shape[1]
    run = ref.PaiReference(visual, n, [2, 3], alpha=0.5) if spec.startswith("pai") else None
    main = ref.teacher_forced(twin, run, inputs, tokens[0, :-1]).log_softmax(-1)
    if spec.startswith("pai"):
        keep = inputs["input_ids"][0] != IMAGE
        ids = inputs["input_ids"][:, keep]
        negative = ref.teacher_forced(twin, None, {"input_ids": ids}, tokens[0, :-1]).log_softmax(-1)
        z = method.gamma * main - (method.gamma - 1) * negative
    else:
        call = vlm_fix.session.Call(model, vlm_fix.families.family_of(model), inputs)
        noised = {**inputs, "pixel_values": method.noised(inputs["pixel_values"], call)}
        negative = ref.teacher_forced(twin, None, noised, tokens[0, :-1]).log_softmax(-1)
        z = (1 + method.alpha) * main - method.alpha * negative
    for t in range(STEPS):
        p = main[t].exp()
        cut = torch.tensor([float(p[v]) < method.beta * float(p.max()) for v in range(len(p))])
        expected = z[t].masked_fill(cut, -torch.inf).log_softmax(-1)
        assert torch.equal(torch.isinf(scores[0, t]), cut)
        assert int(tokens[0, t]) == int(expected.argmax())
        assert error(scores[0, t][~cut], expected[~cut]) < 1e-5


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_hiprune_equals_reference(family, model, positions):
    """Scores by loops over CLIP / Qwen encoder attention, selection by the paper's text, a prompt rebuilt by hand."""
    if family == "qwen2_5_vl" and positions == "compact":
        with pytest.raises(vlm_fix.VlmFixError, match="positions=original"):
            vlm_fix.wrap(model, "hiprune:keep=8,positions=compact")
        return
    inputs, budget, alpha = single(family, [1, 2], 1), 8, 0.7
    with vlm_fix.wrapped(model, f"hiprune:keep={budget},alpha={alpha},object_layer=2,positions={positions}"):
        tokens, logits, _ = greedy(model, inputs)
    twin = copy.deepcopy(model).double()
    kept, features = encoder_choice(family, twin, inputs, budget, alpha)
    ids, visual = inputs["input_ids"], ref.visual_columns(inputs["input_ids"])
    keep = torch.ones(ids.shape[1], dtype=torch.bool)
    keep[visual] = False
    keep[[visual[i] for i in kept]] = True
    full = torch.cat([ids, tokens[:, :-1]], 1)
    embeds = twin.get_input_embeddings()(full)
    embeds[0, visual] = features
    keep = torch.cat([keep, torch.ones(STEPS - 1, dtype=torch.bool)])
    if family == "llava":
        position = (
            torch.arange(int(keep.sum()))[None] if positions == "compact" else torch.arange(len(keep))[keep][None]
        )
    else:
        types = (full == IMAGE).int()
        position = twin.model.get_rope_index(full, image_grid_thw=inputs["image_grid_thw"], mm_token_type_ids=types)[0]
        position = position[..., keep]
    hidden = twin.model.language_model(
        inputs_embeds=embeds[:, keep],
        position_ids=position,
        use_cache=False,
        attention_mask=torch.ones(1, int(keep.sum())),
    ).last_hidden_state
    assert error(logits[0], twin.lm_head(hidden)[0, -STEPS:].detach()) < 1e-5


@torch.no_grad()
def encoder_choice(family, twin, inputs, budget, alpha):
    """-> indices kept (over all images), projected features [N, C]; attention recomputed from the towers' modules."""
    pixels, seen = inputs["pixel_values"].double(), {}
    if family == "llava":
        blocks = [m for m in twin.model.vision_tower.modules() if type(m).__name__ == "CLIPAttention"]
        layers, project = (1, 2), lambda m, x: (m.q_proj(x), m.k_proj(x))
    else:
        blocks = [b.attn for b in twin.model.visual.blocks]
        layers, project = (1, 3), None
    hooks = [
        blocks[i].register_forward_pre_hook(
            lambda m, a, k, i=i: seen.__setitem__(i, ((a[0] if a else k["hidden_states"]).clone(), k)), with_kwargs=True
        )
        for i in layers
    ]
    grids = inputs.get("image_grid_thw")
    extra = {} if grids is None else {"image_grid_thw": grids}
    features = torch.cat(list(twin.model.get_image_features(pixels, return_dict=True, **extra).pooler_output))
    for hook in hooks:
        hook.remove()
    kept, offset = [], 0
    if family == "llava":
        for n in range(len(pixels)):
            columns = []
            for i in layers:
                q, k = (y[n].view(37, 4, 8).transpose(0, 1) for y in project(blocks[i], seen[i][0]))
                columns.append(ref.received(q, k, 8**-0.5)[1:])
            kept += [offset + i for i in ref.hiprune_choice(*columns, (6, 6), budget, alpha)]
            offset += 36
        return kept, features
    order = window_order(grids)
    for n, (_, h, w) in enumerate(grids.tolist()):
        columns = []
        for i in layers:
            x, kw = seen[i]
            cos, sin = kw["position_embeddings"]
            q, k, _ = blocks[i].qkv(x).view(len(x), 3, 2, 16).permute(1, 2, 0, 3)
            q, k = (y * cos + torch.cat([-y[..., 8:], y[..., :8]], -1) * sin for y in (q, k))
            start = sum(a * b for _, a, b in grids[:n].tolist())
            s = ref.received(q[:, start : start + h * w], k[:, start : start + h * w], 16**-0.5)
            units = [float(s[4 * u : 4 * u + 4].mean()) for u in range(h * w // 4)]
            restored = [0.0] * len(units)
            for u, place in enumerate(order[n]):
                restored[place] = units[u]
            columns.append(torch.tensor(restored, dtype=torch.float64))
        kept += [offset + i for i in ref.hiprune_choice(*columns, (h // 2, w // 2), budget, alpha)]
        offset += h * w // 4
    return kept, features


@pytest.mark.parametrize("spec", EVERY)
def test_row_without_image_is_untouched(family, model, spec):
    """In a mixed batch a text-only prompt is generated as by the plain model (guidance and contrast see no difference)."""
    inputs = make_inputs(family, [1, 0, 2])
    tokens, logits, _ = greedy(model, inputs)
    with vlm_fix.wrapped(model, spec):
        t, l, _ = greedy(model, inputs)
    assert torch.equal(t[1], tokens[1])
    if "vcd" in spec or "gamma" in spec:  # a joined step has more rows, which moves rounding
        assert torch.allclose(l[1], logits[1], atol=1e-5)
    elif "hiprune" not in spec:  # its row is re-padded, which moves rounding
        assert torch.equal(l[1], logits[1])
    assert not torch.equal(t, tokens) or not torch.equal(l, logits) or "vcd" in spec


@pytest.mark.parametrize("spec", EVERY)
def test_own_decoding_loop(family, model, spec):
    """A caller's forward loop with the returned cache gives generate's tokens (contrast methods act in generate only)."""
    if "vcd" in spec or "gamma" in spec:
        pytest.skip("a contrast needs generate's logits processor")
    inputs = single(family, [1], 0)
    with vlm_fix.wrapped(model, spec):
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, -5:].tolist()
        with torch.no_grad():
            out, got, mask = model(**inputs), [], inputs["attention_mask"]
            for _ in range(5):
                token = out.logits[:, -1:].argmax(-1)
                got.append(int(token))
                mask = torch.cat([mask, torch.ones_like(token)], 1)
                extra = {} if family == "qwen2_5_vl" else {"position_ids": mask.sum(1, keepdim=True) - 1}
                out = model(input_ids=token, **{CACHE: cache_of(out)}, **extra)
    assert got == expected


def test_vhr_runs_one_text_only_pass_a_call(family, model, monkeypatch):
    """Once per generate, however many tokens and beams, and with the image tokens gone."""
    from vlm_fix.engine import Engine

    seen, observe = [], Engine.observe
    monkeypatch.setattr(
        Engine, "observe", lambda self, inputs, *rest: (seen.append(inputs), observe(self, inputs, *rest))
    )
    with vlm_fix.wrapped(model, "vhr"):
        for options in ({}, {"num_beams": 3}):
            model.generate(**make_inputs(family, [1, 2]), max_new_tokens=4, do_sample=False, **options)
    assert len(seen) == 2 and not any((i["input_ids"] == IMAGE).any() for i in seen)


@pytest.mark.filterwarnings("ignore:var changed nothing in this call")
def test_two_models_in_two_threads(family):
    from concurrent.futures import ThreadPoolExecutor

    inputs, twins = make_inputs(family, [1, 2]), [BUILD[family](seed=s) for s in (1, 2)]
    specs = ["pai:alpha=0.5", ["vcd:beta=0.01", f"var:{VAR_TINY}"]]
    for m, s in zip(twins, specs, strict=True):
        vlm_fix.wrap(m, s)
    alone = [greedy(m, inputs)[2] for m in twins]
    with ThreadPoolExecutor(2) as pool:
        together = [
            f.result() for f in [pool.submit(lambda m=m: [greedy(m, inputs)[2] for _ in range(3)]) for m in twins]
        ]
    for a, runs in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for b in runs)


@pytest.mark.filterwarnings("ignore:var changed nothing in this call")
def test_stack_of_all_kinds(family, model):
    images, stack = [1, 2, 1], ["hiprune:keep=4", f"var:{VAR_TINY}", "vhr", "pai:alpha=0.3", "vcd:beta=0.01"]
    with vlm_fix.wrapped(model, stack):
        tokens, _, _ = greedy(model, make_inputs(family, images))
        for row in range(3):
            assert torch.equal(greedy(model, single(family, images, row))[0][0], tokens[row])
