"""Pages of the site that are made of files elsewhere: README, CONTRIBUTING, CHANGELOG and the examples.

MkDocs calls `on_files` at the beginning of a build (https://www.mkdocs.org/user-guide/configuration/#hooks).
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages to those that lie in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=relocated((ROOT / source).read_text(encoding="utf-8"))))
    for script in sorted((ROOT / "docs" / "examples").glob("*.py")):
        files.append(File.generated(config, f"examples/{script.stem}.md", content=rendered(script)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Points links to the pages that are made here, names them by title, and shows links to source files as text."""
    for source, page in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    markdown = re.sub(r"\]\((examples/\w+)\.py\)", r"](\1.md)", markdown)
    markdown = re.sub(r"\[`?[\w./-]*\.(?:md|py)`?\]\(([\w./-]+\.md)(#[\w-]+)?\)", titled, markdown)
    markdown = markdown.replace("[docs/examples/](", "[Examples](")
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)[^)]*\)", r"\1", markdown)


def titled(link: re.Match[str]) -> str:
    """A link whose text was the path of a page, with the title of the page for a text."""
    page, anchor = link[1], link[2] or ""
    sources = {made: ROOT / source for source, made in PAGES.items()}
    script = ROOT / "docs" / page.replace(".md", ".py")
    if script.exists():
        title = (
            (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or page)
            .splitlines()[0]
            .partition(":")[0]
            .rstrip(".")
        )
    else:
        title = sources.get(page, ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    return f"[{title}]({page}{anchor})"


def relocated(markdown: str) -> str:
    """A page of the root folder with links as they are from docs/.

    Args:
        markdown: Text of the page.
    """
    for source, page in PAGES.items():
        markdown = re.sub(rf"\]\({re.escape(source)}", f"]({page}", markdown)
    markdown = re.sub(r"\]\((?!https?:|#|docs/|[a-z]+\.md)([^)]*)\)", r"](../\1)", markdown)
    return markdown.replace("](docs/examples/)", "](examples/first_program.md)").replace("](docs/", "](")


def rendered(script: Path) -> str:
    """A page that shows an example: its docstring as text, and the rest as code.

    Args:
        script: File of the example.
    """
    code = script.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(code)) or ""
    title, _, text = docstring.partition("\n")
    body = code.split('"""', 2)[2].strip()
    return f"# {title.rstrip('.')}\n{text}\n\n[{script.name}]({script.name})\n\n```python\n{body}\n```\n"
