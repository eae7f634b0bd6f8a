"""The worked example of CONTRIBUTING.md is run as it is printed: file, script and commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def blocks():
    """{name: text} of the code blocks marked as an example."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    return dict(re.findall(r"<!-- example: (\S+) -->\n```\w*\n(.*?)```", page, re.DOTALL))


def test_a_new_method_from_file_to_leaderboard(tmp_path):
    """In a process of its own, with the method in a package that registers by entry point."""
    found = blocks()
    assert set(found) == {"image_bonus.py", "try", "measure"}
    (tmp_path / "image_bonus.py").write_text(found["image_bonus.py"])
    about = tmp_path / "example-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[vlm_fix.methods]\nimage_bonus = image_bonus\n")
    commands = [line.replace("--limit 50", "--limit 2").split()[1:] for line in found["measure"].splitlines()]
    script = [
        found["try"],
        "import torch",
        "assert not torch.equal(plain, edited), 'the method changed nothing'",
        "again = model.generate(**inputs, max_new_tokens=40, do_sample=False)",
        "assert torch.equal(again, plain), 'unwrap did not restore the model'",
        "from vlm_fix.cli import main",
        *(f"assert main({command!r}) == 0" for command in commands),
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("there") + done.stdout.count("a ") >= 2 and "bonus=0.5" in done.stdout
    assert "| `image_bonus` |" in (tmp_path / "leaderboard.md").read_text()


def test_commit_hooks_need_no_network():
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    assert config.count("repo:") == config.count("repo: local") == 1
    assert config.count("language: system") == config.count("- id:")
