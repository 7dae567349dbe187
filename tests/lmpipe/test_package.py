"""The package as a whole: what is public, where it is imported from, and that importing it is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import lmpipe
import lmpipe.extend
from lmpipe.program.identity.packages import package_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


def imports(source: str) -> Iterator[tuple[str, str]]:
    """Module and name of everything that some code imports from lmpipe."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lmpipe":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "lmpipe")


def sources() -> dict[str, str]:
    """Path → code of everything that shows users how to import lmpipe."""
    scripts = [path for folder in ("optimizers", "programs", "docs") for path in (ROOT / folder).rglob("*.py")]
    code = {path: path.read_text() for path in scripts}
    for page in PAGES:
        snippets = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        code[page] = "\n".join(snippets)
    return {str(path.relative_to(ROOT)): text for path, text in code.items()}


@pytest.mark.parametrize("module", [lmpipe, lmpipe.extend])
def test_all_names_the_public_interface(module: ModuleType) -> None:
    public = {name for name, value in vars(module).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    lazy = {name for name in module.__all__ if name not in vars(module)}
    assert public - {"annotations", "TYPE_CHECKING"} == set(module.__all__) - lazy
    assert all(getattr(module, name) for name in lazy)


def test_the_public_interface_is_small_and_each_name_has_one_place() -> None:
    assert len(lmpipe.__all__) <= 47
    assert not set(lmpipe.__all__) & set(lmpipe.extend.__all__)


@pytest.mark.parametrize("module", [lmpipe, lmpipe.extend])
def test_every_public_name_is_documented(module: ModuleType) -> None:
    aliases = {
        "Callback",
        "Event",
        "Measure",
        "Metric",
        "Objective",
        "UnitInterval",
    }  # documented below their definitions
    undocumented = {name for name in module.__all__ if not (getattr(module, name).__doc__ or "").strip()}
    assert undocumented <= aliases


@pytest.mark.parametrize("path", sources())
def test_optimizers_programs_and_docs_import_from_lmpipe_and_its_page_for_extenders(path: str) -> None:
    assert {module for module, _ in imports(sources()[path])} <= {"lmpipe", "lmpipe.extend"}


def test_the_module_for_extenders_has_only_names_that_are_used() -> None:
    tasks = [path.read_text() for path in (ROOT / "benchmarks").rglob("*.py")]
    imported = {name for code in (*sources().values(), *tasks) for _, name in imports(code)}
    explained = set(re.findall(r"\w+", " ".join(page.read_text() for page in PAGES)))
    assert set(lmpipe.extend.__all__) <= imported | explained


def test_an_absent_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'lmpipe\.extend' has no attribute 'LocalLn'"):
        _ = lmpipe.extend.LocalLn


def test_import_is_light() -> None:
    code = "import sys, lmpipe, lmpipe.extend, optimizers, programs; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "lmpipe" in loaded
    assert not {"torch", "transformers", "numpy", "rich", "optuna", "gepa"} & set(loaded)


def test_the_version_is_written_once() -> None:
    """setup.cfg reads it from the package, and the changelog and the citation file name the same one."""
    setup = (ROOT / "setup.cfg").read_text()
    assert "version = attr: lmpipe._version.__version__" in setup
    assert package_of("lmpipe.lm") == f"lmpipe {lmpipe.__version__}"
    assert re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == lmpipe.__version__
    assert f"\nversion: {lmpipe.__version__}\n" in (ROOT / "CITATION.cff").read_text()
