"""The page as a Hugging Face Space: the app file of README.md in this folder, which can be pushed as it is."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def here() -> None:
    """Make this folder `vlm_fix.demo`, instead of the one in the installed package, so that what was pushed is what runs."""
    folder = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "vlm_fix.demo", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    sys.modules["vlm_fix.demo"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


def model() -> str:
    """picto-smol if its language weights can be had, else picto-llava, which is in the package."""
    from vlm_fix.errors import VlmFixError
    from vlm_fix.eval.picto import model_path

    try:
        model_path("picto-smol")
    except VlmFixError as error:
        print(f"picto-llava is served instead: {error}", file=sys.stderr)
        return "picto-llava"
    return "picto-smol"


def main() -> None:
    from vlm_fix.demo.app import launch

    launch(
        model(),
        host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
        port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
    )


if __name__ == "__main__":
    here()
    main()
