"""docs/coverage.md says what coverage.json and the registry say."""

import importlib.util
from pathlib import Path

import vlm_fix

DOCS = Path(__file__).parents[2] / "docs"
COMING: set[str] = set()  # methods that are being written


def script():
    spec = importlib.util.spec_from_file_location("coverage_page", DOCS / "figures" / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_written_from_the_file_and_the_registry():
    text = (DOCS / "coverage.md").read_text(encoding="utf-8")
    assert text == script().page(), "run python docs/figures/coverage.py"


def test_every_system_is_somewhere_or_argued_away():
    methods, systems = {m.name for m in vlm_fix.list_methods()}, set()
    for entry in script().entries():
        assert entry["system"] not in systems, "named twice"
        systems.add(entry["system"])
        assert entry["where"] or len(entry["note"]) > 20, f"{entry['system']}: say where it is, or why it is not"
        for name in entry["where"]:
            assert name in methods or name in vlm_fix.__all__ or name in COMING, f"{name} is no method and no function"
    assert len(systems) > 55
