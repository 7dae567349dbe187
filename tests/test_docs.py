"""The pages of the documentation: snippets and examples run and have types that fit, and links lead somewhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from tests import processes
from tests.engines.openai_server import serving
from tests.tiny import tiny_llama

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
    done = processes.run(script, *arguments, cwd=folder, PYTHONPATH=str(ROOT))
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


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    if example.stem == "server_and_cluster":
        with serving(model="m") as fake:
            assert "failed runs: {}\n5 LM calls" in run(example, tmp_path, "--url", fake.url, "--model", "m")
        return
    if example.stem == "first_hour":  # with the small LM it takes minutes
        printed = run(example, tmp_path, f"hf:{tiny_llama(tmp_path / 'lm')}")
        assert re.search(r"^(barolo|grignolino|barbera), and it is (barolo|grignolino|barbera)$", printed, re.MULTILINE)
        return
    printed = run(example, tmp_path)
    if example.stem == "better_together":
        scores = dict(re.findall(r"^(untuned|p|best): (\S+)$", printed, re.MULTILINE))
        assert float(scores["best"]) > float(scores["p"]) + 0.3, printed


def test_the_first_hour_runs_as_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, and then every cell again: the second time, all that was finished is recalled."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "examples" / "first_hour.ipynb", as_version=4)
    given = nbformat.v4.new_code_cell(f"LM = 'hf:{tiny_llama(tmp_path / 'lm')}'")
    cells = [cell for cell in notebook.cells for cell in ([cell, given] if "parameters" in tags(cell) else [cell])]
    notebook.cells = [*cells, *map(deepcopy, cells)]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells]
    first, second = printed[: len(cells)], printed[len(cells) :]
    assert any("p -> w" in text for text in first)
    assert any("recalled" in text for text in second)


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", ()))


def test_the_first_real_task_shows_the_code_of_its_example() -> None:
    page = (ROOT / "docs" / "first_task.md").read_text(encoding="utf-8")
    code = (ROOT / "docs" / "examples" / "first_hour.py").read_text(encoding="utf-8")
    shown = re.findall(r"^```python title=\"first_hour.py\"\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(shown) >= 4
    for snippet in shown:
        assert snippet in code


def test_examples_fit_on_a_page_and_say_how_to_run_them() -> None:
    for example in EXAMPLES:
        code = example.read_text(encoding="utf-8")
        assert len(code.splitlines()) <= 80, example.name
        assert f"    python {example.name}" in code, f"{example.name} does not say how to run it"
        assert f"examples/{example.stem}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), example.name


def test_the_counts_beside_dspy_are_those_of_its_snippets() -> None:
    """Counted as the page says: lines, and names of the library that are imported or reached as attributes."""
    page = (ROOT / "docs" / "from_dspy.md").read_text(encoding="utf-8")
    counts = []
    for code in re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        nodes = list(ast.walk(ast.parse(code)))
        imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        reached = {node.attr for node in nodes if isinstance(node, ast.Attribute)} - {"answer"}  # a field of the data
        counts.append((sum(bool(line.strip()) for line in code.splitlines()), len(imported | reached)))
    table = page.partition("| names of the library |")[2]
    rows = [(int(lines), int(names)) for lines, names in re.findall(r"\| (\d+) \| (\d+) \|", table)]
    assert len(rows) == 3
    assert counts == rows


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_map_lists_the_folders_of_the_packages() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed: list[Path] = []
    parents: list[str] = []
    for indent, name in re.findall(r"^( *)(\w+)/ +\S", page.split("```")[1], re.MULTILINE):
        parents = [*parents[: len(indent) // 2], name]
        listed.append(Path(*parents))
    packages = [ROOT / name for name in ("benchmarks", "optimizers", "programs", "lmpipe")]
    folders = {*packages, *(file.parent for package in packages for file in package.rglob("__init__.py"))}
    assert sorted(listed) == sorted(folder.relative_to(ROOT) for folder in folders)


def test_the_hooks_before_a_commit_are_the_quick_checks_of_make_test() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    checks = re.findall(r"^\t\$\(BIN\)/((?:ruff|mypy|lint-imports)\b[^\n]*?)(?: \.)?$", makefile, re.MULTILINE)
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    assert all(hook["language"] == "system" for hook in hooks)
    assert [hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in hooks] == checks
    assert all((Path(sys.executable).parent / check.split()[0]).exists() for check in checks)


def test_the_citation_is_that_of_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert [author["family-names"] for author in paper["authors"]] == ["Soylu", "Potts", "Khattab"]
    assert "2407.10930" in paper["url"]
