"""Opens pages in a headless Chromium at a given width, and measures them."""

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
    "--hide-scrollbars",  # they would reduce the width of the page
    "--enable-logging=stderr",
    "--v=0",
)

_PROBE = """
const frame = document.getElementById("page");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, all = selector => [...page.querySelectorAll(selector)];
  const box = part => { const size = part.getBoundingClientRect(); return [size.width, size.height]; };
  const width = () => page.documentElement.scrollWidth;
  const measured = {
    folded: width(),
    ids: all("[id]").map(part => part.id),
    plots: Object.fromEntries(all("figure").map(part => [part.id, box(part.querySelector("svg"))])),
    tables: all("table").map(part => part.rows.length),
  };
  all("details").forEach(part => { part.open = true; });
  measured.open = width();
  document.getElementById("measured").textContent = JSON.stringify(measured);
});
"""


def look(page: Path, width: int, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Opens a page in a frame and measures it.

    Args:
        page: Path of a self-contained HTML file.
        width: Width of the frame in pixels.
        folder: Empty folder for the files of the browser.

    Returns:
        The measurements: width of the page with its details ``folded`` and ``open``, its ``ids``, ``plots`` (id → width
        and height), and the number of rows of each of its ``tables``; and the lines that it logged to the console.
    """
    text = json.dumps(page.read_text()).replace("</", "<\\/")  # "</script>" would end the script
    framed = (
        '<!doctype html><pre id="measured"></pre>'
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
    measured = re.search(r'<pre id="measured">(.*?)</pre>', run.stdout, re.DOTALL)
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(measured[1])) if measured and measured[1] else {}, console
