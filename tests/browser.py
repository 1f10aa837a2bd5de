"""Opens pages in a headless browser, where one is installed."""

import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --window-size=1000,1400"
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")


def shows(page: str, folder: Path) -> None:
    """Asserts that a browser reads the page and draws something; leaves shown.png in `folder`."""
    file, picture = folder / "shown.html", folder / "shown.png"
    file.write_text(page, encoding="utf-8")
    assert BROWSER is not None
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={folder / 'browser'}", f"--screenshot={picture}"]
    subprocess.run([*command, file.as_uri()], check=True, capture_output=True, timeout=120)
    assert matplotlib.image.imread(picture)[..., :3].std() > 0.02
