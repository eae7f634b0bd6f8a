"""Where the repository, its results and the data beside it lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"  # not part of the repository: what needs it is skipped without it
RESULTS = ROOT / "results"
PICTO_LLAVA = ROOT / "eval" / "picto" / "picto-llava"
