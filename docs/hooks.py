"""What mkdocs does beside its own: pages from README.md and CONTRIBUTING.md, links out of docs/.

A link to a file of the repository that is no page becomes its path, or, with the environment variable REPOSITORY_URL, a link to
it there.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
FROM = {"index.md": "README.md", "add-a-method.md": "CONTRIBUTING.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of FROM."""
    for page, source in FROM.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at pages of the site, wherever the text comes from; comments about tests are no text."""
    name = page.file.src_uri
    folder = posixpath.dirname(FROM.get(name, f"docs/{name}"))
    parts = CODE.split(re.sub(r"<!-- not run here.*?-->\n", "", markdown))
    return "".join(part if i % 2 else LINK.sub(lambda m: _link(m, folder, files), part) for i, part in enumerate(parts))


def _link(match: re.Match[str], folder: str, files: Any) -> str:
    image, text, target = match.groups()
    path, hash, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return match[0]
    place = posixpath.normpath(posixpath.join(folder, path))
    if not (ROOT / place).exists():
        return match[0]  # mkdocs says that it is broken
    inside = next((page for page, source in FROM.items() if source == place), place.removeprefix("docs/"))
    if files.get_file_from_path(inside):
        return f"{image}[{text}]({inside}{hash}{anchor})"
    where = os.environ.get("REPOSITORY_URL", "")
    if where:
        return f"{image}[{text}]({where}/blob/HEAD/{place}{hash}{anchor})"
    return text if place in text or image else f"{text} (`{place}`)"
