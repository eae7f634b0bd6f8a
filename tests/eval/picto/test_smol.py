"""picto-smol: the LoRA and its merge, the language weights' way into a checkpoint, the cache, the model itself."""

import importlib.util
import inspect
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vlm_fix.cli import main
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto
from vlm_fix.eval.picto import lora, smol, train_smol, world
from vlm_fix.eval.picto.dialogues import Dialogues
from vlm_fix.eval.picto.fitting import flushed_denormals
from vlm_fix.eval.run import loading

SIZE = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_FIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny(seed=0):
    """(model, processor, adapters, language weights): random, of picto-llava's shape but small, B not zero."""
    processor = AutoProcessor.from_pretrained(picto.model_path("picto-llava"))
    torch.manual_seed(seed)
    words = len(processor.tokenizer)
    text = LlamaConfig(vocab_size=words + 1, intermediate_size=24, tie_word_embeddings=True, **SIZE)
    eye = {"hidden_size": 192, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=128, patch_size=16, projection_dim=16, **eye)
    shape = {"vision_feature_layer": -2, "image_seq_length": 64, "tie_word_embeddings": True}
    ids = {"image_token_index": processor.tokenizer.convert_tokens_to_ids("<image>"), "eos_token_id": 2}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **ids, **shape)).eval()
    core = model.model.language_model
    weights = {name: value.bfloat16().float() for name, value in core.state_dict().items()}
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][:words]
    core.load_state_dict(smol.with_image_token(weights))
    model.requires_grad_(False)
    adapters = lora.attach(core, train_smol.ADAPTED, 4, smol.SCALE)
    for value in adapters.parameters():
        torch.nn.init.normal_(value.data, std=0.3)
    model.model.multi_modal_projector.requires_grad_(True)
    return model, processor, adapters, weights


def inputs_of(processor, text="USER: <image>\nis there a cup in the image? ASSISTANT:"):
    return processor(images=picto.scene("test", 0, 0).image, text=text, return_tensors="pt")


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_is_what_merging_gives():
    torch.manual_seed(0)
    plain = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 4, bias=False), "other": torch.nn.Linear(6, 4)})
    x, before = torch.randn(3, 6), plain["q_proj"](torch.ones(6))
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    adapters = lora.attach(plain, ("q_proj",), rank=2, scale=0.5)
    assert list(adapters.tensors()) == ["q_proj.A", "q_proj.B"] and torch.equal(plain["q_proj"](torch.ones(6)), before)
    with torch.no_grad():
        plain["q_proj"].B.normal_()
    a, b = adapters.tensors().values()
    merged = lora.merge(weights, adapters.tensors(), 0.5)
    loops = [[w + 0.5 * sum(b[i, k] * a[k, j] for k in range(2)) for j, w in enumerate(row)] for i, row in
             enumerate(weights["q_proj.weight"])]  # fmt: skip
    torch.testing.assert_close(merged["q_proj.weight"], torch.tensor(loops))
    torch.testing.assert_close(plain["q_proj"](x), x @ merged["q_proj.weight"].T)
    assert torch.equal(merged["other.weight"], weights["other.weight"])


@pytest.mark.parametrize("change", ["lost", "shape", "stranger"])
def test_an_adapter_that_does_not_fit_is_refused(change):
    weights, adapters = {"q.weight": torch.zeros(4, 6)}, {"q.A": torch.zeros(2, 6), "q.B": torch.zeros(4, 2)}
    if change == "lost":
        del adapters["q.B"]
    elif change == "shape":
        adapters["q.A"] = torch.zeros(2, 5)
    else:
        weights = {"k.weight": torch.zeros(4, 6)}
    with pytest.raises(VlmFixError, match="adapter of q does not fit"):
        lora.merge(weights, adapters, 1.0)


# --- assembly --------------------------------------------------------------------------------------------------------


def test_plain_transformers_loads_the_assembled_checkpoint_and_computes_what_was_trained(tmp_path):
    model, processor, adapters, weights = tiny()
    train_smol.export(model, processor, adapters, tmp_path / "parts")
    smol.assemble(tmp_path / "whole", weights, tmp_path / "parts")
    assert not (tmp_path / "whole" / smol.ADAPTER).exists()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    again = AutoProcessor.from_pretrained(tmp_path / "whole")
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.bfloat16} and "language_model.lm_head.weight" not in stored
    core = loaded.model.language_model
    assert loaded.lm_head.weight is core.embed_tokens.weight and loaded.generation_config.eos_token_id == 2
    w, q = weights["layers.1.self_attn.q_proj.weight"], "layers.1.self_attn.q_proj"
    a, b = (adapters.tensors()[f"{q}.{x}"].bfloat16().float() for x in "AB")
    torch.testing.assert_close(core.layers[1].self_attn.q_proj.weight.data, (w + 2 * b @ a).bfloat16().float())
    with torch.no_grad():
        one, two = model(**inputs_of(processor)).logits[0, -1], loaded(**inputs_of(again)).logits[0, -1]
    assert (one - two).abs().max() < 0.05 * one.std()  # bfloat16 weights
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.999


def test_the_embedding_of_the_image_token_never_wins():
    torch.manual_seed(0)
    words = smol.with_image_token({"embed_tokens.weight": torch.randn(50, 8)})["embed_tokens.weight"]
    assert words.shape == (51, 8) and (torch.randn(1000, 8) @ words.T).argmax(-1).max() < 50


def test_rows_of_q_and_k_leave_gguf_in_halves():
    halves = np.arange(24).reshape(12, 2)  # two heads of six rows
    pairs = halves.reshape(2, 2, 3, 2).swapaxes(1, 2).reshape(12, 2)  # what llama.cpp's converter does
    assert pairs[:4, 0].tolist() == [0, 6, 2, 8] and (smol.unpair(pairs, 2) == halves).all()


# --- where the language weights come from ----------------------------------------------------------------------------


def test_a_file_with_another_sha256_is_refused(tmp_path, monkeypatch, cache):
    file = tmp_path / smol.FILE
    file.write_bytes(b"GGUF and something else")
    with pytest.raises(VlmFixError, match="SHA-256 is .* expected b179c9523d0e.*make picto-smol"):
        smol.check(file)
    monkeypatch.setenv(smol.VARIABLE, str(file))
    with pytest.raises(VlmFixError, match="is not the SmolLM2"):
        picto.model_path("picto-smol")
    assert list(cache.iterdir()) == []
    assert smol.check(file, smol.hashlib.sha256(file.read_bytes()).hexdigest()) == file


def test_one_sentence_when_there_are_no_weights(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.delenv(smol.VARIABLE, raising=False)
    monkeypatch.setattr(smol.importlib.util, "find_spec", lambda name: None)

    def unreachable(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(VlmFixError, match=r"not on this machine and the hub cannot be reached: run `make picto-smol`"):
        loading.load_model("picto-smol")
    monkeypatch.setenv(smol.VARIABLE, str(tmp_path / "none.gguf"))
    with pytest.raises(VlmFixError, match=r"there is no file .*none.gguf"):
        loading.load_model("picto-smol")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(VlmFixError, match="pip install gguf"):
        smol.read_gguf(tmp_path / "any.gguf")


# --- the cache -------------------------------------------------------------------------------------------------------


def test_what_is_half_written_is_never_read(tmp_path):
    target, made = tmp_path / "cache" / "model", []

    def make(draft):
        made.append(draft)
        assert not target.exists() or not smol._complete(target)
        (draft / "config.json").write_text("{}")
        if len(made) == 1:
            raise KeyboardInterrupt
        (draft / "model.safetensors").write_bytes(b"x" * 10)

    with pytest.raises(KeyboardInterrupt):
        smol.kept(make, target)
    assert list(target.parent.iterdir()) == []
    assert smol.kept(make, target) == target == smol.kept(make, target) and len(made) == 2
    (target / "model.safetensors").write_bytes(b"x" * 9)  # cut off
    assert smol.kept(make, target) == target and (target / "model.safetensors").stat().st_size == 10
    (target / "config.json").unlink()
    assert smol.kept(make, target) == target and (target / "config.json").exists() and len(made) == 4
    shutil.rmtree(target)
    target.mkdir()  # left by hand
    assert smol.kept(make, target) == target and [p.name for p in target.parent.iterdir()] == ["model"]


def test_two_processes_at_once_share_one_checkpoint(tmp_path):
    target, gate, found = tmp_path / "model", threading.Barrier(2), []

    def make(draft):
        (draft / "model.safetensors").write_bytes(b"x" * 10)
        gate.wait(timeout=30)

    jobs = [threading.Thread(target=lambda: found.append(smol.kept(make, target))) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert found == [target, target] and [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["model"]


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VlmFixError, match="set VLM_FIX_CACHE"):
        smol.kept(lambda draft: None, tmp_path / "file" / "model")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert smol.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("VLM_FIX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert smol.cache_folder() == tmp_path / "xdg" / "vlm-fix"


# --- training --------------------------------------------------------------------------------------------------------


def test_training_is_repeatable_and_leaves_denormals_as_they_were(tmp_path, monkeypatch):
    def build(seed, *_):
        model, processor, adapters, _ = tiny(seed)
        return model, processor, adapters

    monkeypatch.setattr(train_smol, "build_model", build)
    monkeypatch.setattr(train_smol, "SMOL_CHAT", train_smol.Chat("<s> USER: ", "", " ASSISTANT:", " </s>"))
    seen = []
    monkeypatch.setattr(train_smol, "pool", lambda *a: (seen.append(denormal()), train_pool(*a))[1])
    steps = {"align_steps": 2, "language_steps": 1, "prior_steps": 1, "scenes": 8}
    one, two = (train_smol.train(0, tmp_path / name, **steps) for name in ("one", "two"))
    assert seen == [0.0, 0.0] and denormal() != 0
    first, second = (load_file(folder / smol.ADAPTER) for folder in (one, two))
    before = tiny(0)[2].tensors()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if name.startswith("lora."):
            assert not torch.equal(value, before[name.removeprefix("lora.")].bfloat16()), name
    with pytest.raises(VlmFixError, match="at least 4"):
        train_smol.train(0, tmp_path, scenes=3)


def test_the_program_says_which_model_it_trains(capsys):
    for language, option in (("smol", "--prior-steps"), ("picto", "--vision-steps")):
        with pytest.raises(SystemExit) as end:
            main(["picto", "train", "--language", language, "--help"])
        assert end.value.code == 0 and option in capsys.readouterr().out


train_pool = train_smol.pool


def denormal():
    return (torch.tensor([1e-39]) * 1).item()


def test_denormals_inside_and_after():
    with flushed_denormals():
        assert denormal() == 0
        with flushed_denormals():
            pass
        assert denormal() == 0
    assert denormal() != 0


# --- the model itself ------------------------------------------------------------------------------------------------


def test_the_parts_in_the_package_are_small_and_the_prompt_is_what_was_trained_on():
    assert sum(p.stat().st_size for p in smol.FOLDER.rglob("*")) < 20e6
    processor = AutoProcessor.from_pretrained(smol.FOLDER)
    words = processor.tokenizer
    dialogues = Dialogues(processor, [("kitchen", [("cup", [0, 0, 9, 9])])], 0.5, train_smol.SMOL_CHAT)
    content = [{"type": "image"}, {"type": "text", "text": "Is there a cup in the image?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = inputs_of(processor, text).input_ids[0].tolist()
    assert ids == dialogues.prefix + dialogues._ids("Is there a cup in the image?" + train_smol.SMOL_CHAT.reply)
    assert ids.count(49152) == 64 and len(words) == 49153 and words.decode(ids).endswith("<|im_start|>assistant\n")
    assert words("2026").input_ids == [words.convert_tokens_to_ids(d) for d in "2026"]  # digit by digit
    assert words("Yes<|im_end|>").input_ids == [10539, words.eos_token_id]


@pytest.mark.slow
def test_the_real_weights_see_and_speak():
    spec = importlib.util.find_spec(smol.PACKAGE)
    if not (smol.os.environ.get(smol.VARIABLE) or spec) or not importlib.util.find_spec("gguf"):
        pytest.skip("picto-smol's language weights are not installed: make picto-smol")
    model, processor, identity = loading.load_model("picto-smol")
    assert identity["name"] == "picto-smol" and identity["parameters"] > 134e6
    scenes, asked = picto.scenes("test", 8), []
    for s in scenes:
        typical = world.SCENE_TYPES[s.scene_type].typical
        absent = next(n for n in world.CATEGORIES if n not in s.names and n not in typical)
        asked += [(s.image, s.objects[0][0], "Yes"), (s.image, absent, "No")]
    texts = [f"Is there {world.with_article(name)} in the image?" for _, name, _ in asked]
    answers = generate(model, processor, [image for image, *_ in asked], texts, 4)
    assert np.mean([a.strip() == right for a, (*_, right) in zip(answers, asked, strict=True)]) >= 0.8
    captions = generate(model, processor, [s.image for s in scenes[:2]], ["Describe this image."] * 2, 60)
    assert all(len(c.split()) > 6 and c.rstrip().endswith(".") for c in captions)


def generate(model, processor, images, texts, n):
    contents = [[{"type": "image"}, {"type": "text", "text": t}] for t in texts]
    prompts = [
        processor.apply_chat_template([{"role": "user", "content": c}], add_generation_prompt=True) for c in contents
    ]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=n, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_command_line_is_as_careless_as_the_training_that_it_stands_for(monkeypatch, tmp_path):
    given, usual = [], inspect.signature(train_smol.train).parameters
    monkeypatch.setattr(train_smol, "train", lambda **how: given.append(how))
    train_smol.main(["--out", str(tmp_path)])
    assert given and all(
        value == usual[name].default for name, value in given[0].items() if name not in ("seed", "out")
    )
    card = (Path(train_smol.__file__).parent / "picto-smol" / "README.md").read_text()
    assert f'"yes" with a chance of {train_smol.CARELESS:g} for the most typical'.replace("0.", ".") in card.replace(
        "\n", " "
    )
