"""Files of recommended methods: what is written is what is read, and another model is refused with the reason."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
import yaml

import vlm_fix
from vlm_fix import registry
from vlm_fix.calibrated import weights_id
from vlm_fix.errors import VlmFixError
from vlm_fix.families import arch_of
from vlm_fix.methods.attention.pai import PAI
from vlm_fix.methods.heads.vhr import VHR
from vlm_fix.presets import Preset, model_of
from vlm_fix.tensors import Tensors


def preset_of(model, *methods, **about):
    return Preset(tuple(methods), model_of({"name": "mine", "weights": weights_id(model)}, arch_of(model)), about)


@pytest.fixture
def llava(models):
    yield models["llava"]
    vlm_fix.unwrap(models["llava"])


@pytest.fixture
def known(llava, monkeypatch):
    """The model's weights as if they came from a folder."""
    monkeypatch.setattr("vlm_fix.presets.weights_id", lambda model: "sha256:1234")
    return llava


def written(model, path, *methods, **about):
    made = preset_of(model, *methods, **about)
    made = dataclasses.replace(made, model={**made.model, "weights": "sha256:1234"})
    made.write(path)
    return path


def test_what_is_written_is_what_is_read(known, tmp_path):
    path = written(known, tmp_path / "a" / "fix.yaml", PAI(alpha=0.4, layers="1-"), VHR(), verdict="better", seed=3)
    read = Preset.read(path)
    assert read.methods == (PAI(alpha=0.4, layers="1-"), VHR())
    assert read.about == {"verdict": "better", "seed": 3}
    assert yaml.safe_load(path.read_text())["method"] == "pai:layers=1-,alpha=0.4+vhr"


@pytest.mark.parametrize("spec", ["@{}", "{}", ["@{}"], ["{}"]])
def test_wrap_takes_the_file(known, tmp_path, spec):
    path = str(written(known, tmp_path / "fix.yaml", PAI(alpha=0.4)))
    given = [item.format(path) for item in spec] if isinstance(spec, list) else spec.format(path)
    vlm_fix.wrap(known, given)
    assert vlm_fix.wing.installed(known).methods == [PAI(alpha=0.4)]


def test_wrap_takes_a_path_beside_another_method(known, tmp_path):
    path = written(known, tmp_path / "fix.yaml", PAI(alpha=0.4))
    vlm_fix.wrap(known, [path, "vhr"])
    assert [method.name for method in vlm_fix.wing.installed(known).methods] == ["pai", "vhr"]


def test_keeping_the_model_as_it_is_wraps_nothing(known, tmp_path):
    path = written(known, tmp_path / "fix.yaml")
    vlm_fix.wrap(known, str(path))
    assert [method.name for method in vlm_fix.wing.installed(known).methods] == ["baseline"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"depth": 99}, "is for mine with depth 99, but this model has depth"),
        ({"type": "qwen2_vl"}, "with type qwen2_vl, but this model has type"),
        ({"weights": "sha256:abcd"}, "is for other weights"),
    ],
)
def test_another_model_is_refused_with_the_reason(known, tmp_path, changed, said):
    path = written(known, tmp_path / "fix.yaml", PAI(alpha=0.4))
    content = yaml.safe_load(path.read_text())
    content["model"] |= changed
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(VlmFixError, match=said) as caught:
        vlm_fix.wrap(known, str(path))
    assert "pai:alpha=0.4" in str(caught.value)  # how to have it all the same
    assert vlm_fix.wing.installed(known) is None


def test_weights_that_cannot_be_compared_are_warned_of(known, tmp_path):
    path = written(known, tmp_path / "fix.yaml", PAI(alpha=0.4))
    content = yaml.safe_load(path.read_text())
    content["model"]["weights"] = "revision:abc"
    path.write_text(yaml.safe_dump(content))
    with pytest.warns(UserWarning, match="cannot be told"):
        vlm_fix.wrap(known, str(path))


def test_tensors_lie_beside_the_file_and_move_with_it(known, tmp_path):
    from vlm_fix.methods.hidden.nullu import Nullu

    depth = arch_of(known).depth
    basis = Tensors({str(layer): torch.eye(arch_of(known).hidden)[:2] for layer in range(depth)})
    path = written(known, tmp_path / "here" / "fix.yaml", Nullu(file=basis, rank=2))
    moved = tmp_path / "there"
    path.parent.rename(moved)
    (method,) = Preset.read(moved / "fix.yaml").methods
    assert str(method.file).startswith(str(moved)) and method.rank == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("a: [", "is not YAML"),
        ("benchmark: pope", "no stack"),
        ("stack: [{parameters: {}}]", "no stack"),
        ("stack: [{method: piai}]\nmodel: {}", "did you mean 'pai'"),
        ("stack: [{method: pai, parameters: {alfa: 1}}]\nmodel: {}", "no parameter 'alfa'"),
        ("stack: [{method: pai, parameters: [1]}]\nmodel: {}", "where names with their values belong"),
        ("stack: [{method: pai, alpha: 1}]\nmodel: {}", "write parameters: {alpha: ...}"),
        ("stack: [{method: pai}]", "which model"),
    ],
)
def test_other_files_get_one_sentence(llava, tmp_path, text, said):
    path = tmp_path / "fix.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(VlmFixError, match=said), warnings.catch_warnings(action="ignore"):
        vlm_fix.wrap(llava, f"@{path}")


def test_a_list_of_methods_may_name_files():
    assert registry.split_methods("@runs/a.yaml,vhr+pai") == [["@runs/a.yaml"], ["vhr", "pai"]]
    assert registry.file_of("@any") == "any" and registry.file_of("a.yml") == "a.yml" and not registry.file_of("pai")


def test_every_strength_worth_a_try_is_legal_and_acts():
    for cls in vlm_fix.list_methods():
        for name, values in cls.grid.items():
            assert {*values} - {getattr(cls(), name)}, f"{cls.name}: {name}"  # a subclass may have another default
            for value in values:
                method = cls().but(**{name: value})
                assert not method.neutral, f"{cls.name}: {name}={value}"
                assert registry.parse_spec(method.spec()) == method
