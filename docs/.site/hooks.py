"""Build hooks of the documentation site."""

import re
import shutil
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
SOURCES = Path(tempfile.mkdtemp(prefix="vistoken-docs-"))


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config, **_):
    """Lay the package out as a wheel does: the reader of docstrings follows no links."""
    root = Path(config.config_file_path).parent
    ignored = shutil.ignore_patterns("__pycache__", "assets", "configs")
    shutil.copytree(root / "vistoken", SOURCES / "vistoken", ignore=ignored, dirs_exist_ok=True)
    for folder in ("models", "kernels"):
        (SOURCES / "vistoken" / folder / "__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(SOURCES)]
    return config


def on_page_markdown(markdown, page, config, **_):
    """Name files of the repository outside docs/ instead of linking them: the site lacks them."""
    docs = Path(config.docs_dir).resolve()
    here = docs / Path(page.file.src_uri).parent

    def name(found):
        text, target = found[1], (here / found[2]).resolve()
        inside = target.is_relative_to(docs) or not target.is_relative_to(docs.parent)
        if inside or not target.exists():
            return found[0]  # mkdocs checks these
        path = target.relative_to(docs.parent).as_posix()
        return f"`{path}`" if text in path else f"{text} (`{path}`)"

    return LINK.sub(name, markdown)


def on_shutdown(**_):
    """Remove the copy."""
    shutil.rmtree(SOURCES, ignore_errors=True)
