"""The README and docs/: Python snippets and examples run and are typed, links lead somewhere, and the map is the tree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.openai_server import serving

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


def snippets(page: Path) -> str:
    """The Python snippets of a page as one script, each at the line on which it stands in the page."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        inside, fence = (inside, False) if not line.startswith("```") else (line == "```python", True)
        lines.append(line if inside and not fence else "")
    return "\n".join(lines) + "\n"


SCRIPTS = {page: script for page in PAGES if (script := snippets(page)).strip()}


def run(script: Path, folder: Path, *arguments: str) -> str:
    """Runs a script as a reader would, in a process and a folder of its own, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("page", SCRIPTS, ids=lambda page: page.name)
def test_the_snippets_of_a_page_run(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text(SCRIPTS[page], encoding="utf-8")
    run(script, tmp_path)


def test_snippets_and_examples_are_typed(tmp_path: Path) -> None:
    """Snippets as code whose functions may lack annotations, examples as strictly as the packages."""
    folder = tmp_path / "snippets"
    folder.mkdir()
    (folder / "__init__.py").touch()
    files = {page: folder / f"{page.stem.lower()}.py" for page in SCRIPTS}
    for page, file in files.items():
        file.write_text(SCRIPTS[page], encoding="utf-8")
    checked = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--show-absolute-path",
            *map(str, [*EXAMPLES, folder / "__init__.py", *files.values()]),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    report = checked.stdout
    for page, file in files.items():
        report = report.replace(str(file), str(page.relative_to(ROOT)))
    assert checked.returncode == 0, report + checked.stderr
