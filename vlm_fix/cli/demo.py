"""vlm-fix demo: compare methods side by side in a web page."""

from __future__ import annotations

import argparse
from typing import Any

from vlm_fix.errors import VlmFixError

from .common import add, add_model


def add_to(commands: Any) -> None:
    parser = add(commands, "demo", "compare methods side by side in a web page", run)
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDR", help="address to serve on (%(default)s)")
    parser.add_argument("--port", type=int, metavar="P", help="first free one from 7860 up")
    parser.add_argument("--share", action="store_true", help="also give the page a public address, through Gradio")
    parser.add_argument("--preset", metavar="FILE", help="what the first pane begins with, of vlm-fix recommend")
    parser.add_argument("--mcp", action="store_true", help="also serve describe, ask and compare as MCP tools")


def run(args: argparse.Namespace) -> None:
    try:
        from vlm_fix.demo.app import launch
    except ModuleNotFoundError as error:
        raise VlmFixError(f"the demo needs {error.name}: pip install 'vlm-fix[demo]'") from None
    launch(args.model, args.host, args.port, args.share, args.mcp, args.preset)
