"""Opens pages in a headless Chromium, and reports their sizes and the messages on the console."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",  # they would make the page narrower
    "--enable-logging=stderr",
    "--v=0",
)

_PROBE = """
const frame = document.getElementById("page");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, all = selector => [...page.querySelectorAll(selector)];
  const box = part => { const size = part.getBoundingClientRect(); return [size.width, size.height]; };
  const shadowed = part => getComputedStyle(part).backgroundAttachment.includes("local");
  const width = () => page.documentElement.scrollWidth;
  const found = {
    folded: width(),
    ids: all("[id]").map(part => part.id),
    plots: Object.fromEntries(all("figure").map(part => [part.id, box(part.querySelector("svg"))])),
    tables: all("table").map(part => part.rows.length),
    cut: all("table").map(part => part.parentElement).filter(part => part.scrollWidth > part.clientWidth).map(shadowed),
  };
  all("details").forEach(part => { part.open = true; });
  found.open = width();
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


def look(page: Path, width: int, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Opens a page in a frame of a given width.

    Args:
        page: A self-contained HTML file.
        width: Width of the frame in pixels.
        folder: An empty folder for the files of the browser.

    Returns:
        A dict with the width of the page when its details are closed (``folded``) and ``open``, its ``ids``, the width
        and height of each of its ``plots``, the number of rows of its ``tables``, and for each table that is ``cut``
        off, whether a shadow shows it; and the messages on the console.
    """
    text = json.dumps(page.read_text()).replace("</", "<\\/")  # it would end the script
    framed = (
        '<!doctype html><pre id="found"></pre>'
        f'<iframe id="page" style="width: {width}px; height: 800px; border: 0"></iframe>'
        f"<script>{_PROBE}\nframe.srcdoc = {text};</script>"
    )
    (folder / "framed.html").write_text(framed)
    run = subprocess.run(
        [
            CHROMIUM or "",
            *_FLAGS,
            f"--user-data-dir={folder / 'profile'}",
            "--dump-dom",
            f"file://{folder}/framed.html",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', run.stdout, re.DOTALL)
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found[1])) if found and found[1] else {}, console
