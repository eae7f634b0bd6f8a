"""Every code block of README and docs is run, as it is printed but for the number of images.

A block that cannot run here says why in a comment above it: <!-- not run here: it serves until it is stopped -->. Its
commands are still read by the command line's own parser.
"""

from __future__ import annotations

import json
import re
import shlex
import warnings

import pytest
import yaml

import vlm_fix
from tests.support.paths import ROOT
from vlm_fix import cli
from vlm_fix.eval import picto
from vlm_fix.eval.run import generation, loading
from vlm_fix.eval.scorers.pope.data import coco_questions

GENERATED = {"methods", "models", "published-outputs", "leaderboard"}
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.stem not in GENERATED)]
BLOCK = re.compile(r"(<!-- not run here: (.+?) -->\n)?^```(.*?)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FEW = {"calibrate": "4", "eval": "1"}


def blocks(page):
    """[(why it is not run or "", language, text)]."""
    return [(found[2] or "", found[3].strip(), found[4]) for found in BLOCK.finditer(page.read_text())]


def commands(text):
    """The words of each command, without comments."""
    found, open_quote = list[list[str]](), ""
    for line in text.replace("\\\n", " ").splitlines():
        try:
            found.append(shlex.split(open_quote + line, comments=True))
            open_quote = ""
        except ValueError:  # a quotation goes on in the next line
            open_quote += line + " "
    return [words for words in found if words]


@pytest.fixture(scope="module")
def loaded():
    return loading.load_model("picto-llava")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where blocks run: with the answers that pages speak of."""
    monkeypatch.chdir(tmp_path)
    for name, captions in (("greedy", "a dog and a car"), ("method", "a dog"), ("other", "a table with a cup")):
        rows = [{"image_id": image, "caption": captions} for image in (9, 25, 30, 34)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, answer in (("plain", "yes"), ("ours", "no")):
        asked = enumerate(coco_questions("adversarial"))
        rows = [{"question_id": q.question_id, "text": answer if i % 3 else "no"} for i, q in asked]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page, folder, loaded, capsys):
    model, processor, _ = loaded
    names = {"vlm_fix": vlm_fix, "model": model, "processor": processor, "__name__": "__main__"}
    names["inputs"] = dict(
        generation.encode(model, processor, [picto.scene("test", 0, 0).image], ["Describe the image."])
    )
    try:
        for why, language, text in blocks(page):
            if language == "python" and not why:
                exec(compile(text, f"{page.name}: {text[:40]!r}", "exec"), names)
            elif language == "bash" and not why:
                for program, *words in commands(text):
                    assert program == "vlm-fix", f"{page.name}: {program} cannot run here; say why above the block"
                    assert cli.main(_small(words)) == 0, f"{words}: {capsys.readouterr().err}"
            elif language == "yaml":
                assert yaml.safe_load(text)
            elif not why:
                pytest.fail(f"{page.name}: a block of {language or 'no language'}: {text[:60]!r}")
    finally:
        vlm_fix.unwrap(model)


def _small(words):
    """The same command on few images."""
    words = list(words)
    if "--limit" in words:
        words[words.index("--limit") + 1] = FEW[words[0]]
    return words


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_commands_that_are_not_run_are_commands(page):
    known = {command.__name__.rpartition(".")[2].replace("_", "-") for command in cli.COMMANDS}
    for _, language, text in blocks(page):
        for program, *words in commands(text) if language == "bash" else ():
            if program == "vlm-fix" and (words[0] in known or words[0] != "recommend"):
                if "--help" in words:
                    continue
                with warnings.catch_warnings():
                    args, rest = cli._parser().parse_known_args(words)
                assert callable(args.run) and (not rest or "rest" in args)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.partition("#")[0]
        if path and not re.match(r"[a-z]+:", target) and path not in LATER:
            assert (page.parent / path).exists(), f"{page.name}: {target}"


LATER = ("add-a-method.md",)  # of CONTRIBUTING.md, see docs/hooks.py
