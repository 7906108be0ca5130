"""What mkdocs does besides: the checkout's own README, CONTRIBUTING and CHANGELOG are pages, and links fit the site."""

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "out/api"
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"```.*?```|(!?)\[((?:`[^`\n]*`|[^\]`])*)\]\(([^)\s]+)\)|`[^`\n]+`", re.DOTALL)
"""Or code, a block or a span of it, which shows what it says; within a link's text it is the link's."""


def on_startup(command: str, dirty: bool) -> None:
    """Copy the package to where mkdocstrings looks, with the `__init__.py` that `kernels` lacks (setup.py says why)."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    shutil.copytree(ROOT / "tvkd_fast", SOURCES / "tvkd_fast", ignore=shutil.ignore_patterns("__pycache__"))
    (SOURCES / "tvkd_fast/kernels/__init__.py").touch()


def on_files(files: Files, config: Any) -> Files:
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they are written for a checkout, to where a page of the site is; to code, which is none, its path."""
    folder = "." if page.file.src_uri in PAGES else "docs"
    named = {source: name for name, source in PAGES.items()}

    def fitting(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if target is None or re.match(r"[a-z]+:|#", target):
            return link[0]
        path, hash_, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(folder, path))
        on_site = place.startswith("docs/") and (ROOT / place).is_file()
        inside = named.get(place, posixpath.relpath(place, "docs") if on_site else None)
        if inside is None:
            return text if text.strip("`") == place else f"{text} (`{place}`)"
        return f"{picture}[{text}]({inside}{hash_}{anchor})"

    return LINK.sub(fitting, markdown)
