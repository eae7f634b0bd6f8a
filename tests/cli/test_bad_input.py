"""The table of bad input: each row is one sentence and exit code 2 (an error of one sentence in Python), and loses nothing.

Rows of files are made of two lists: every benchmark that `vlm-fix score` reads, and everything that a file may hold instead.
"""

from __future__ import annotations

import json
import math
import struct
import zlib

import pytest
import torch

import vlm_fix
from tests.support.models import make_inputs, single
from vlm_fix import cli
from vlm_fix.eval.recommend.objective import Limits
from vlm_fix.eval.run import loading
from vlm_fix.eval.scorers.registry import BENCHMARKS
from vlm_fix.registry import get_method
from vlm_fix.wing import installed

# ---- Python: specs ---------------------------------------------------------------------------------------------------

SPECS = {
    "": "names no method",
    " ": "names no method",
    ":alpha=1": "names no method",
    "pai:layers=" + "9" * 5000: "is not of the form",
    "ad_hh:head_list=" + "9" * 5000 + ".0": "is not layer.head",
    "+": "",
    "pai+": "",
    "+pai": "",
    ",": "",
    "pai:=1": "",
    "pai:alpha=": "",
    "pai:alpha=1=2": "",
    "pai:alpha=0.2;gamma=1": "",
    "pai:alpha=1e999": "must be a number",
    "pai:alpha=-inf": "must be a number",
    "pai:alpha=0x10": "",
    "pai:alpha=1_0_": "",
    "pai:alpha=٣٫٤": "",
    "pai:alpha=true": "",
    "pai:alpha=None": "",
    "pai:layers=": "",
    "pai:layers=-": "",
    "pai:layers=-1": "",
    "pai:layers=4": "does not fit this model",
    "pai:layers=0-4": "does not fit this model",
    "pai:layers=3-1": "is reversed",
    "pai:layers=1||2": "",
    "pai:layers=1.5": "",
    "pai:layers=999999999999999999999": "",
    "pai:layers=0-999999999999": "does not fit this model",
    "pai:branch=left": "is not one of",
    "pai:branch=negative": "needs a contrast method",
    "pai:name=vcd": "has no parameter",
    "pai:kind=control": "has no parameter",
    "pai:__class__=1": "has no parameter",
    "../pai": "there is no method",
    "pai\0": "there is no method",
    "paï": "there is no method",
    "p" * 10000: "there is no method",
    "vcd:noise_step=-1": "",
    "vcd:noise_step=1000": "",
    "vcd:noise_step=1.5": "",
    "vcd:beta=2": "",
    "vcd:seed=-1": "",
    "vcd+vcd": "",
    "vcd+icd:tokens=5": "both contrast",
    "icd:tokens=x": "",
    "icd:tokens=": "",
    "hiprune:keep=-3": "must be a number above 0",
    "hiprune:keep=nan": "",
    "hiprune:positions=random": "is not one of",
    "hiprune+fastv": "both prune tokens",
    "fastv:layer=-1": "",
    "fastv:layer=4": "",
    "fastv:keep=0": "",
    "knorm:layers=9": "",
    "dola:layers=9": "",
    "deco:layers=9": "",
    "gift:source_layer=9": "",
    "ad_hh:head_list=9.0": "",
    "ad_hh:head_list=0.9": "",
    "ad_hh:head_list=0": "",
    "ad_hh:head_list=a.b": "",
    "decore:head_list=0.0.0": "",
    "var:sink_dims=-1": "",
    "var:sink_dims=64": "do not fit this model",
    "steer": "name the vectors",
    "steer:file=/none/here.safetensors": "",
    "vti:file=/none/here.safetensors": "",
    "nullu:file=/none/here": "",
    "iri:sources=99,targets=2": "",
    "pyramid_drop:keep=1|2|3|4|5|6|7": "",
    "opera:layers=77": "",
}


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: repr(s)[:40])
def test_specs(models, spec):
    model = models["llava"]
    before = sorted(vars(model))
    try:
        with pytest.raises(vlm_fix.VlmFixError) as error:
            vlm_fix.wrap(model, spec)
    finally:
        vlm_fix.unwrap(model)
    said = str(error.value)
    assert SPECS[spec] in said and said.strip() and "Traceback" not in said and len(said) < 12000
    assert sorted(vars(model)) == before and installed(model) is None


@pytest.mark.parametrize(
    "spec", ["pai:", "pai\n", " pai : alpha = 1 ", "pyramid_drop:layers=3|1", "pai:alpha=1,", "pai:layers=1|1"]
)
def test_specs_that_are_read_all_the_same(models, spec):
    with vlm_fix.wrapped(models["llava"], spec):
        assert installed(models["llava"]) is not None


OBJECTS = {
    "None": None,
    "a number": 3,
    "a function of ours": get_method,
    "a list in a list": [["pai"]],
    "a list with None": ["pai", None],
    "a dict": {"pai": {"alpha": 1}},
    "bytes": b"pai",
    "a tuple of nothing": (),
    "a function": len,
    "a model": torch.nn.Linear(1, 1),
}


@pytest.mark.parametrize("what", OBJECTS)
def test_objects_that_are_no_spec(models, what):
    with pytest.raises(vlm_fix.VlmFixError):
        vlm_fix.wrap(models["llava"], OBJECTS[what])
    assert installed(models["llava"]) is None


MODELS = {
    "None": None,
    "a name": "picto-llava",
    "a list": [],
    "a bare module": torch.nn.Linear(2, 2),
    "an empty sequential": torch.nn.Sequential(),
}


@pytest.mark.parametrize("what", MODELS)
@pytest.mark.parametrize("spec", ["pai", "vcd"])
def test_objects_that_are_no_model(what, spec):
    with pytest.raises(vlm_fix.VlmFixError):
        vlm_fix.wrap(MODELS[what], spec)


CALLS = {  # arguments of generate
    "no prompt": lambda x: {},
    "a list": lambda x: {"inputs": x["input_ids"].tolist()},
    "a string": lambda x: {"inputs": "What is this?"},
    "one dimension": lambda x: {"input_ids": x["input_ids"][0]},
    "three dimensions": lambda x: {"input_ids": x["input_ids"][None]},
    "the output itself": lambda x: {"inputs": x},
    "twice": lambda x: {"inputs": x["input_ids"], **x},
    "embeddings alone": lambda x: {"inputs_embeds": torch.zeros(1, 4, 64)},
    "attentions": lambda x: {**x, "output_attentions": True},
    "paged": lambda x: {**x, "cache_implementation": "paged"},
}


@pytest.mark.parametrize("what", CALLS)
def test_calls_of_generate(models, what):
    model, inputs = models["llava"], single("llava", [1, 1], 0)
    with vlm_fix.wrapped(model, "pai"):
        with pytest.raises(vlm_fix.VlmFixError) as error:
            model.generate(**CALLS[what](inputs), max_new_tokens=2, do_sample=False)
        assert "\n" not in str(error.value)
        assert model.generate(**inputs, max_new_tokens=1, do_sample=False).shape[0] == 1


OBSERVED = {
    "a batch": lambda: (make_inputs("llava", [1, 1]), None),
    "no image": lambda: (single("llava", [0, 1], 0), None),
    "nothing": lambda: ({}, None),
    "no ids": lambda: ({"pixel_values": torch.zeros(1, 3, 24, 24)}, None),
}


@pytest.mark.parametrize("what", OBSERVED)
def test_calls_of_observe(models, what):
    inputs, answer = OBSERVED[what]()
    with pytest.raises(vlm_fix.VlmFixError):
        vlm_fix.observe(models["llava"], inputs, answer)
    assert installed(models["llava"]) is None


# ---- the command line --------------------------------------------------------------------------------------------------

COMMANDS = [
    "evla pope",
    "eval",
    "eval popee",
    "eval pope --method",
    "eval pope --method ,",
    "eval pope --method pai,pai",
    "eval pope --limit -1",
    "eval pope --limit many",
    "eval pope --limit 1.5",
    "eval pope --batch-size 0",
    "eval pope --batch-size -8",
    "eval pope --batch-size big",
    "eval pope --seed x",
    "eval pope --max-new-tokens 0",
    "eval pope --max-new-tokens -5",
    "eval pope --num-beams 0",
    "eval pope --sample --top-p 0",
    "eval pope --sample --top-p 2",
    "eval pope --sample --temperature nan",
    "eval pope --temperature 0.5",
    "eval pope --top-p 0.5",
    "eval pope --split",
    "eval pope --split ,",
    "eval pope --scorer mine",
    "eval pope --dtype int8",
    "eval pope --device gpu0",
    "eval pope --device cuda:x",
    "eval pope --engine jax",
    "eval pope --data coco:",
    "eval pope --data s3://bucket",
    "eval pope --ids {here}/none",
    "eval pope --config {here}/none.yaml",
    "eval pope --config {here}",
    "eval pope --calibration {here}/none.json",
    "eval pope --model-args A",
    "eval pope --model-args {{",
    "eval pope --gen-kwargs A",
    "eval pope --gen-kwargs {{",
    "eval pope --seeds 1,1",
    "eval pope --seeds x",
    "eval pope --resume",
    "eval pope --nonsense 3",
    "eval chair --variant mine",
    "score",
    "score nothing {here}/none",
    "score pope",
    "score pope {here}/none --scorer mine",
    "score pope {here}/none --frontier f.png",
    "score chair {here}/none --variant mine",
    "score chair {here}/none --common",
    "compare",
    "compare {here}/none {here}/none",
    "compare {here}/none {here}/none --benchmark nothing",
    "compare {here}/none {here}/none --benchmark chair",
    "export mmhal {here}/none",
    "export nothing {here}/none",
    "export pai {here}/out",
    "export vcd {here}/out",
    "published --method vdc",
    "published --benchmark nothing",
    "report",
    "report {here}/none",
    "report {here} --samples -1",
    "report {here} --samples x",
    "methods nothing",
    "models nothing",
    "doctor --device abacus",
    "doctor --dtype int4",
    "bench",
    "bench attention --shape huge",
    "bench attention --rounds 0",
    "bench attention --new-tokens 0",
    "bench prune --keep x",
    "bench prune --keep nan",
    "bench prune --keep 64,inf",
    "bench draft --rounds 0",
    "bench draft --new-tokens 0",
    "bench serve --rounds 0",
    "bench serve --new-tokens 0",
    "bench peers --rounds 0",
    "compare {here}/none {here}/none --benchmark chair --frontier f.txt",
    "score chair {here}/none --against {here}/none --frontier f",
    "recommend --min-recall nan",
    "recommend --max-slowdown inf",
    "recommend --max-length -inf",
    "recommend --max-yes 1e999",
    "point {here}/none What --box 1,nan,2,3",
    "inspect {here}/none What --out {here}/page.html --noise inf",
    "eval pope --sample --top-p nan",
    "eval pope --server ,",
    "eval pope --server  ,",
    "eval pope --engine vllm --num-beams 2",
    "eval pope --engine vllm --equal-compute --method vcd",
    "eval pope --server http://localhost:1 --equal-compute --method vcd",
    "calibrate",
    "calibrate nothing",
    "calibrate iri --limit 0",
    "calibrate iri --search alpha",
    "calibrate pai --search nothing=1|2",
    "calibrate iri --data nowhere",
    "picto",
    "picto render",
    "picto render {here}/out --scenes -3",
    "picto render {here}/out --split none",
    "picto render {here}/out --seed x",
    "lmms-tasks --data nowhere --out {here}/tasks",
    "lmms-tasks --limit 0 --out {here}/tasks",
    "vlmevalkit {here}/none --method pai",
    "vlmevalkit {here} --method vdc",
    "serve",
    "serve picto-llava --method vdc",
    "demo --port x",
]


def refused(capsys, arguments) -> str:
    """The one sentence of a command that ends with code 2."""
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2, (code, out[-300:], err[-300:])
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and err.splitlines()[-1] == said[0] and "Traceback" not in err, err
    return said[0]


class TooFar(BaseException):
    pass


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, tmp_path, capsys, monkeypatch):
    def too_far(*args, **kwargs):
        raise TooFar("a model is loaded before the mistake is told")

    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", too_far)
    monkeypatch.chdir(tmp_path)
    refused(capsys, command.format(here=tmp_path).split())
    assert not list(tmp_path.iterdir()), "nothing is written"


# ---- files -------------------------------------------------------------------------------------------------------------


def picture() -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


CONTENTS = {
    "missing": None,
    "a folder": "folder",
    "empty": b"",
    "blank": b"\n \n\n",
    "bytes": bytes(range(256)) * 4,
    "a picture": picture(),
    "zeros": bytes(4096),
    "prose": b"Answers of our model, second try.\nThe dog is brown.\n",
    "cut off": b'[{"question_id": 1, "image_id": 1, "text": "Yes"',
    "a number": b"5",
    "null": b"null",
    "numbers": b"[1, 2, 3]",
    "lists": b"[[], [1], [[2]]]",
    "empty objects": b"{}\n{}\n",
    "other keys": b'{"a": 1}\n{"a": 2}\n',
    "deep": b"[" * 100_000,
    "a huge number": b'[{"question_id": ' + b"9" * 5000 + b', "image_id": ' + b"9" * 5000 + b', "text": "Yes"}]',
    "infinity": b'{"question_id": 1e999, "image_id": Infinity, "id": NaN, "text": "Yes", "caption": "A", "answer": "No"}',
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_files(benchmark, content, tmp_path, capsys):
    """Each file of a benchmark holds that."""
    place, data = tmp_path / "file", CONTENTS[content]
    if data == "folder":
        place.mkdir()
    elif data is not None:
        place.write_bytes(data)
    files = [str(place) for a in BENCHMARKS[benchmark].arguments if not a.name.startswith("-")]
    variant = ["--variant", "pattern"] if any(a.name == "--variant" for a in BENCHMARKS[benchmark].arguments) else []
    said = refused(capsys, ["score", benchmark, *files, *variant])
    assert len(said) < 1000 and (data is None or data == "folder" or place.read_bytes() == data)


QUESTIONS = [{"question_id": i, "image": f"{i}.jpg", "text": "Is there a dog?", "label": "yes"} for i in range(3)]


@pytest.mark.parametrize("content", CONTENTS)
def test_answers_beside_good_questions(content, tmp_path, capsys):
    good, bad, data = tmp_path / "questions", tmp_path / "answers", CONTENTS[content]
    good.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    if data == "folder":
        bad.mkdir()
    elif data is not None:
        bad.write_bytes(data)
    refused(capsys, ["score", "pope", str(good), str(bad)])


CALIBRATIONS = ["missing", "a folder", "empty", "bytes", "cut off", "a number", "null", "numbers", "other keys", "deep"]


@pytest.mark.parametrize("content", CALIBRATIONS)
def test_calibration_files(content, models, tmp_path):
    place, data = tmp_path / "iri.json", CONTENTS[content]
    if data == "folder":
        place.mkdir()
    elif data is not None:
        place.write_bytes(data)
    with pytest.raises(vlm_fix.VlmFixError):
        vlm_fix.wrap(models["llava"], "iri", calibration=str(place))
    assert installed(models["llava"]) is None


@pytest.mark.parametrize("content", ["missing", "a folder", "empty", "bytes", "zeros", "prose", "null"])
@pytest.mark.parametrize("method", ["steer", "vti", "nullu"])
def test_vector_files(method, content, models, tmp_path):
    place, data = tmp_path / "vectors.safetensors", CONTENTS[content]
    if data == "folder":
        place.mkdir()
    elif data is not None:
        place.write_bytes(data)
    with pytest.raises(vlm_fix.VlmFixError):
        vlm_fix.wrap(models["llava"], f"{method}:file={place}")
    assert installed(models["llava"]) is None


@pytest.mark.parametrize("content", ["a folder", "empty", "bytes", "cut off", "numbers", "a number", "prose"])
def test_config_files(content, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place, data = tmp_path / "run.yaml", CONTENTS[content]
    if data == "folder":
        place.mkdir()
    elif data is not None:
        place.write_bytes(data)
    refused(capsys, ["eval", "pope", "--config", str(place), "--limit", "0"])
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


SENTENCES = {
    "eval pope --engine vllm --equal-compute --method vcd": "--equal-compute needs beam search, and --engine vllm answers",
    "eval pope --server http://localhost:1 --equal-compute --method vcd": "--equal-compute needs beam search, and --server",
    "eval pope --server http://localhost:1 --num-beams 2": "--num-beams needs beam search, and --server",
    "eval pope --server ,": "--server ',' names no server",
    "recommend --max-slowdown nan": "'nan' is no finite number: give one, or none to switch the limit off",
    "bench draft --rounds 0": "--rounds at least 1",
    "bench serve --new-tokens 1": "--new-tokens must be at least 2",
    "compare {here}/a {here}/b --benchmark chair --frontier f.txt": "--frontier 'f.txt' must end in .svg, .png or .pdf",
    "point {here}/none What --point nan,3": "is not of the form 10,20",
    "inspect {here}/none What --out {here}/p.html --noise nan": "'nan' is no finite number",
}


@pytest.mark.parametrize("command", SENTENCES)
def test_a_mistake_is_told_by_its_own_name(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "point" in command:
        (tmp_path / "none").write_bytes(picture())
    assert SENTENCES[command] in refused(capsys, command.format(here=tmp_path).split())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("limit", ["min_recall", "max_length", "max_yes", "max_slowdown"])
def test_a_limit_is_finite_in_python_too(limit, value):
    with pytest.raises(vlm_fix.VlmFixError, match=f"--{limit.replace('_', '-')} is {value}"):
        Limits(**{limit: value})
