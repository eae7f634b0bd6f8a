"""Nullu: the weights it bakes, the files it reads, what `calibrate` finds; and its control."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import vlm_fix
from tests.support import families, tensors
from tests.support.models import make_inputs, single
from tests.support.references import base as ref
from tests.support.run import error, greedy
from vlm_fix import cli
from vlm_fix.calibrated import Calibration
from vlm_fix.families import arch_of
from vlm_fix.methods.controls.random_subspace import drawn
from vlm_fix.tensors import Tensors

SPEC = f"nullu:file={tensors.SUBSPACE},rank=3,layers=1-"
MIXED = ["gemma3", "qwen3_vl_moe", "glm4v_moe", "ernie4_5_vl_moe", "qwen3_5_moe", "aria", "lfm2_vl", "kimi_k25"]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", *MIXED])
def test_baked_weights_answer_as_the_method_does_at_run_time(name, models):
    """Norms behind an MLP, experts, shared experts and convolution decoders included; with and without an image."""
    model = copy.deepcopy(models[name]) if name in models else families.build(name)
    prompt = make_inputs(name, [1, 2]) if name in models else families.prompt(name, [1, 2])
    plain = greedy(model, prompt, 4)
    with vlm_fix.wrapped(model, SPEC):
        edited = greedy(model, prompt, 4)
    vlm_fix.parse_spec(SPEC).bake(model)
    baked = greedy(model, prompt, 4)
    assert torch.equal(baked[0], edited[0]) and error(baked[1], edited[1]) < 1e-5
    assert error(plain[1], edited[1]) > 1e-2


def test_an_mlp_of_another_build_is_not_baked(models):
    model = copy.deepcopy(models["llava"])
    mlp = model.model.language_model.layers[2].mlp
    mlp.last, forward = torch.nn.Linear(64, 64), mlp.forward
    mlp.forward = lambda x: mlp.last(forward(x))
    with pytest.raises(vlm_fix.VlmFixError, match="not built of matrices that are known here"):
        vlm_fix.parse_spec(SPEC).bake(model)


def test_methods_that_are_no_weights_cannot_be_baked(models):
    with pytest.raises(vlm_fix.VlmFixError, match="vista is no change of the weights"):
        vlm_fix.parse_spec("vista").bake(models["llava"])


def answers(models, file):
    inputs = make_inputs("llava", [1])
    with vlm_fix.wrapped(models["llava"], f"nullu:file={file},rank=2,layers=2-"):
        return greedy(models["llava"], inputs, 2)[1]


def test_every_layout_of_a_file_says_the_same(models, tmp_path):
    rows = {i: r[:2].contiguous() for i, r in tensors.subspace().items()}
    expected = answers(models, tensors.SUBSPACE)
    for name, named in {
        "numbered": {f"subspace.layer.{i}": r for i, r in rows.items()},
        "stacked": {"rows": torch.stack([*rows.values()])},
        "scaled": {f"layers.{i}": torch.stack([2 * r[0], r[0] - 3 * r[1]]) for i, r in rows.items()},  # the same span
    }.items():
        save_file(named, tmp_path / f"{name}.safetensors")
        assert torch.allclose(answers(models, tmp_path / f"{name}.safetensors"), expected, atol=1e-5), name
    folder = tmp_path / "artifact"  # repsteer: one layer
    folder.mkdir()
    save_file({"basis": rows[2]}, folder / "tensors.safetensors")
    site = {"stream": "language", "component": "mlp_out", "layer": 2, "unit": None, "io": "output", "tensor_path": []}
    (folder / "manifest.json").write_text(json.dumps({"artifact_type": "subspace", "site": site}))
    save_file({"layers.2": rows[2]}, tmp_path / "one.safetensors")
    assert torch.equal(answers(models, folder), answers(models, tmp_path / "one.safetensors"))


def test_files_that_do_not_fit_are_refused(models, tmp_path):
    save_file({"layers.1": torch.ones(2, 60)}, tmp_path / "narrow.safetensors")
    save_file({"layers.9": torch.ones(2, 64)}, tmp_path / "deep.safetensors")
    save_file({"a": torch.ones(2, 64), "b": torch.ones(2, 64)}, tmp_path / "names.safetensors")
    save_file({"layers.0": torch.ones(2, 64)}, tmp_path / "early.safetensors")
    torch.save({"layers.1": torch.ones(2, 64)}, tmp_path / "pickle.pt")
    (tmp_path / "folder").mkdir()
    for file, sentence in (
        ("narrow.safetensors", "60 channels for layer 1; this model has 64 channels and layers 0 to 3"),
        ("deep.safetensors", "for layer 9; this model has"),
        ("names.safetensors", "is not understood"),
        ("early.safetensors", "holds nothing but zeros, if anything, for the layers 2, 3"),
        ("pickle.pt", "is not a safetensors file"),
        ("nowhere.safetensors", "there is no file"),
        ("folder", "is not a repsteer artifact"),
    ):
        with pytest.raises(vlm_fix.VlmFixError, match=sentence):
            vlm_fix.wrap(models["llava"], f"nullu:file={tmp_path / file}")
    with pytest.raises(vlm_fix.VlmFixError, match="run `vlm-fix calibrate nullu"):
        vlm_fix.wrap(models["llava"], "nullu")


def pairs(family, seed=0):
    """Samples of a truthful and a hallucinated answer each, of other lengths."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for row in range(3):
        answers = tuple(torch.randint(3, 80, (1, 4 + row + i), generator=g) for i in range(2))
        made.append(vlm_fix.Sample(single(family, [1, 2, 1], row, 0), 0, 0, answers=answers))
    return made


@pytest.mark.parametrize("tokens", ["mean", "answer", "last"])
def test_calibrate_finds_the_main_directions_of_the_differences(family, model, tokens, tmp_path):
    """Whole float64 passes over prompt and answer, and the Gram matrix of the differences instead of an SVD."""
    samples = pairs(family)
    found = vlm_fix.parse_spec(f"nullu:tokens={tokens}").calibrate(model, samples, 0, lambda *_: None)
    twin, apart = ref.double(model), {i: [] for i in range(4)}
    for s in samples:
        states = []
        for ids in s.answers:
            kept, n = {}, s.inputs["input_ids"].shape[1]
            handles = [
                layer.register_forward_hook(
                    lambda m, a, o, i=i, kept=kept: kept.__setitem__(i, (o[0] if isinstance(o, tuple) else o)[0])
                )
                for i, layer in enumerate(ref.decoder(twin).layers)
            ]
            ref.teacher_forced(twin, None, s.inputs, ids[0])
            for handle in handles:
                handle.remove()
            part = {"mean": slice(None), "answer": slice(n, None), "last": slice(-1, None)}[tokens]
            states.append({i: sum(kept[i][part]) / len(kept[i][part]) for i in kept})
        for i in apart:
            apart[i].append((states[0][i] - states[1][i]) / 2)
    for i, rows in apart.items():
        d = torch.stack(rows).detach()
        values, left = torch.linalg.eigh(d @ d.T)
        v = (left.T @ d / values.clamp(min=1e-30).sqrt()[:, None]).flip(0)[:2]  # [2, C]
        ours = found["file"].named[f"layers.{i}"][:2].double()
        assert float((v.T @ v - ours.T @ ours).abs().max()) < 1e-3, i
    made = Calibration("nullu", found, {})
    made.write(tmp_path / "nullu.json")
    assert (tmp_path / "nullu.file.safetensors").is_file()
    read = Calibration.read(tmp_path / "nullu.json")
    inputs, results = single(family, [1], 0), []
    for file in (found["file"], read.found["file"]):
        with vlm_fix.wrapped(model, vlm_fix.registry.get_method("nullu")(file=file, rank=2)):
            results.append(greedy(model, inputs, 2)[1])
    assert torch.equal(*results)


def test_calibrate_without_pairs_says_so(models):
    from tests.support.labelled import labelled

    with pytest.raises(vlm_fix.VlmFixError, match="no sample holds a truthful and a hallucinated answer"):
        vlm_fix.parse_spec("nullu").calibrate(models["llava"], labelled("llava"), 0, lambda *_: None)


def test_export_of_a_calibrated_method_from_the_command_line(tmp_path, capsys):
    """calibrate on Picto's pairs, export, and load the checkpoint without vlm-fix: it answers as the wrapped model."""
    from transformers import AutoModelForImageTextToText

    from vlm_fix.eval.picto import model_path

    file, out = tmp_path / "nullu.json", tmp_path / "checkpoint"
    assert cli.main(["calibrate", "nullu:rank=2", "--limit", "8", "--out", str(file)]) == 0
    assert cli.main(["export", "nullu", str(out), "--calibration", str(file)]) == 0
    assert "written to" in capsys.readouterr().out
    model = AutoModelForImageTextToText.from_pretrained(model_path("picto-llava"), dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 12, 7]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).logits
        with vlm_fix.wrapped(model, "nullu", calibration=file):
            edited = model(input_ids=ids, attention_mask=mask).logits
        baked = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
        alone = baked(input_ids=ids, attention_mask=mask).logits
    assert error(alone, edited) < 2e-2 < 4 * error(plain, edited)
    assert {"config.json", "chat_template.jinja"} <= {f.name for f in out.iterdir()}
    assert cli.main(["export", "nullu", str(out), "--calibration", str(file)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert cli.main(["export", "pai", str(tmp_path / "other")]) == 2
    assert "pai is no change of the weights" in capsys.readouterr().err
    assert cli.main(["export", "nullu:rank=0", str(tmp_path / "other")]) == 2
    assert "changes nothing with these settings" in capsys.readouterr().err


def test_random_subspaces_are_projected_out(family, model):
    inputs = single(family, [1, 2], 0)
    with vlm_fix.wrapped(model, "random_subspace:rank=5,seed=2,layers=1-2"):
        tokens, logits, _ = greedy(model, inputs)
    twin = ref.double(model)
    for i in (1, 2):
        q = drawn(2, i, 5, 64).double()
        assert torch.allclose(q @ q.T, torch.eye(5, dtype=torch.float64), atol=1e-6)
        ref.decoder(twin).layers[i].mlp.register_forward_hook(
            lambda m, a, o, q=q: o - sum((o @ r)[..., None] * r for r in q)
        )
    assert error(logits[0], ref.teacher_forced(twin, None, inputs, tokens[0, :-1])) < 1e-5


def test_nullu_is_measured_against_random_subspaces_of_its_rank(models):
    from vlm_fix.eval.run.plan import _controls

    wanted = _controls([[vlm_fix.parse_spec(SPEC)]], models["llava"], yes_no=False)
    assert "random_subspace:rank=3,layers=1|2|3" in wanted


@pytest.mark.parametrize(
    ("sizes", "control"),
    [
        ({0: 1, 1: 1}, "random_subspace:rank=1,layers=0|1"),
        ({0: 1, 1: 6, 3: 2}, "random_subspace:ranks=1|4|2,layers=0|1|3"),
        ({1: 2, 2: -2}, "random_subspace:ranks=2|1,layers=1|2"),  # two rows of one direction
    ],
)
def test_the_control_of_a_file_takes_as_many_dimensions_away_as_it_does(models, tmp_path, sizes, control):
    """Told by what both take out of a random MLP output, layer by layer."""
    drawn_rows = {i: tensors.drawn(40 + i, abs(k), 64) for i, k in sizes.items()}
    rows = {i: x if sizes[i] > 0 else torch.stack([x[0], -2 * x[0]]) for i, x in drawn_rows.items()}
    save_file({f"layers.{i}": x for i, x in rows.items()}, tmp_path / "x.safetensors")
    model, arch, taken = models["llava"], arch_of(models["llava"]), {}
    method = vlm_fix.parse_spec(f"nullu:file={tmp_path / 'x.safetensors'},layers=0-").resolve(arch)
    assert method.control == control
    for name, made in (("nullu", method), ("control", vlm_fix.parse_spec(control).resolve(arch))):
        for i in sizes:
            x = torch.eye(64)[None]
            lost = x - made.mlp_raw(x, SimpleNamespace(layer=i))
            taken[name, i] = int(torch.linalg.matrix_rank(lost[0], tol=1e-4))
        with vlm_fix.wrapped(model, made):
            greedy(model, single("llava", [1], 0), 2)
    assert all(taken["nullu", i] == taken["control", i] > 0 for i in sizes)
    for ranks in ("1", "1|2|3|4", "1|-1"):
        with pytest.raises(
            vlm_fix.VlmFixError, match="ranks must hold 2 numbers of at least 0, one for each of the layers 1, 2"
        ):
            vlm_fix.parse_spec(f"random_subspace:ranks={ranks},layers=1-2").resolve(arch)


def test_tensors_are_read_again_when_the_file_changes(tmp_path):
    from vlm_fix.tensors import read_tensors

    file = tmp_path / "x.safetensors"
    for value in (1.0, 2.0):
        Tensors({"x": torch.full((2,), value)}).write(file)
        assert read_tensors(str(file), "x")["x"][0] == value
