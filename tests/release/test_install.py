"""sdist and wheel, installed outside of a checkout, do the main job (make test-release)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# its module, since a checkout's own folder build/ is a namespace package of that name
pytest.importorskip("build.__main__", reason="build is not installed: make test-release")

FOLDERS = {"vlm_fix": "vlm_fix", "methods": "vlm_fix/methods", "eval": "vlm_fix/eval", "demo": "vlm_fix/demo"}
STAY = {"demo/README.md", "demo/requirements.txt"}  # of the Space
JOB = "eval all --model picto-llava --data picto:shift --method pai --limit 4 --variant pattern --output run"
SAID = re.compile(r"byte-compiling is disabled")  # where PYTHONDONTWRITEBYTECODE is set


def tracked(*folders: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, text=True, capture_output=True, check=True)
    return listed.stdout.split("\n")[:-1]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder with sdist and wheel, made of the tracked files alone; the wheel is built from the sdist."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    warned = [line for line in (done.stdout + done.stderr).splitlines() if re.search("warn|deprecat", line, re.I)]
    assert not [line for line in warned if not SAID.search(line)]
    return out


@pytest.fixture(scope="session")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


def test_the_wheel_has_the_files_of_the_package_and_no_others(wheel):
    expected = {}
    for name in tracked(*FOLDERS):
        top, _, rest = name.partition("/")
        if name not in STAY and (ROOT / name).is_file():
            expected[f"{FOLDERS[top]}/{rest}"] = ROOT / name
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert inside == {*expected}
        assert all(archive.read(name) == path.read_bytes() for name, path in expected.items())
        about = {name.partition(".dist-info/")[2] for name in archive.namelist()} - {""}
    assert {"licenses/LICENSE", "licenses/NOTICE", "entry_points.txt", "METADATA"} <= about
    assert wheel.stat().st_size < 30e6
    for model in ("picto-llava", "picto-smol"):
        assert {f"vlm_fix/eval/picto/{model}/{name}" for name in ("config.json", "tokenizer.json")} <= inside


def test_the_sdist_is_the_same_package(built, wheel):
    (packed,) = built.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    code = {name for name in tracked(*FOLDERS) if name not in STAY and (ROOT / name).is_file()}
    assert code <= inside and {"pyproject.toml", "README.md", "LICENSE", "NOTICE"} <= inside
    assert not [name for name in inside if name.startswith((".", "tests/", "results/", "docs/"))]


@pytest.mark.parametrize("check", [["twine", "check", "--strict"], ["check_wheel_contents", "--ignore", "W002"]])
def test_the_tools_find_nothing(built, wheel, check):
    """W002: two models have the same processor_config.json, each its own."""
    pytest.importorskip(check[0])
    files = [wheel] if check[0] == "check_wheel_contents" else [*built.iterdir()]
    done = subprocess.run([sys.executable, "-m", *check, *map(str, files)], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Environment:
    """A virtual environment that sees what is installed here, but not the checkout."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        (packages,) = folder.glob("lib/python*/site-packages")
        seen = [entry for entry in sys.path if entry.endswith("site-packages")]
        (packages / "shared.pth").write_text(
            "\n".join(seen)
        )  # their own .pth files, the checkout's among them, are not read
        self.packages = packages

    def install(self, what: str) -> None:
        """Nothing is downloaded: what is missing here is an error."""
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(self.python),
            "install",
            "--no-index",
            "--no-build-isolation",
        ]
        done = subprocess.run([*command, what], text=True, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *arguments: str, cwd: Path) -> str:
        unset = ("PYTHONPATH", "VLM_FIX_CACHE")
        environment = {k: v for k, v in os.environ.items() if k not in unset} | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [str(self.python), *arguments], text=True, capture_output=True, cwd=cwd, env=environment, timeout=600
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout


WHERE = "import sys, vlm_fix.cli, vlm_fix.demo.app, vlm_fix.methods, vlm_fix.eval.run.runner as r; vlm_fix.list_methods(); \
print('\\n'.join({m.__file__ for n, m in sys.modules.items() if n.startswith('vlm_fix') and getattr(m, '__file__', None)}))"


@pytest.mark.parametrize("kind, extra", [("whl", "eval"), ("tar.gz", "demo")])
def test_it_does_the_main_job_outside_of_a_checkout(built, kind, extra, tmp_path):
    environment = Environment(tmp_path / "env")
    (file,) = built.glob(f"*.{kind}")
    environment.install(f"{file}[{extra}]")
    loaded = environment.run("-c", WHERE, cwd=tmp_path).split()
    assert len(loaded) > 100 and all(Path(name).is_relative_to(environment.packages) for name in loaded)
    environment.run("-m", "vlm_fix.cli", *JOB.split(), cwd=tmp_path)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["runs"]) == {"baseline", "pai"}


@pytest.mark.parametrize("extra", ["eval", "demo", "mcp", "docs", "dev"])
def test_the_requirements_of_an_extra_are_met_by_the_pinned_versions(wheel, extra, tmp_path):
    Environment(tmp_path / "env").install(f"{wheel}[{extra}]")
