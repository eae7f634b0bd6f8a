"""The files of a release as the tools for them see them (make test-release)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

GITHUB = ROOT / ".github"
SCHEMAS = {
    "vendor.github-workflows": sorted((GITHUB / "workflows").glob("*.yml")),
    "vendor.github-issue-forms": sorted(p for p in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config"),
    "vendor.github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "vendor.dependabot": [GITHUB / "dependabot.yml"],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    place = shutil.which(name, path=str(Path(sys.executable).parent))
    if not place:
        pytest.skip(f"{name} is not installed: make test-release")
    return subprocess.run([place, *map(str, arguments)], text=True, capture_output=True, timeout=120, cwd=ROOT)


def test_the_dockerfile_is_linted(tmp_path):
    done = tool("hadolint", "Dockerfile")
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install vlm-fix\n")
    assert tool("hadolint", tmp_path / "Dockerfile").returncode == 1, "the linter finds nothing"


def test_the_workflows_are_audited():
    done = tool("zizmor", "--offline", "--no-progress", GITHUB / "workflows", GITHUB / "dependabot.yml")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("schema", SCHEMAS)
def test_forms_and_workflows_have_their_schema(schema):
    assert SCHEMAS[schema]
    done = tool("check-jsonschema", "--builtin-schema", schema, *SCHEMAS[schema])
    assert done.returncode == 0, done.stdout
