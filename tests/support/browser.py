"""A real headless Chromium that opens the report, driven by Selenium."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# An element within nested shadow roots, in which Bokeh keeps all of its own.
_DEEP = """
function* deep(root, selector) {
  yield* root.querySelectorAll(selector);
  for (const element of root.querySelectorAll("*"))
    if (element.shadowRoot) yield* deep(element.shadowRoot, selector);
}
"""


class Browser:
    """One page in the browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path) -> None:
        """Opens a file and waits until its script has started; forgets what was logged before."""
        self.driver.get("about:blank")
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(page.absolute().as_uri())
        self.until("document.documentElement.dataset.ready")

    def js(self, expression: str) -> Any:
        return self.driver.execute_script(f"{_DEEP} return {expression};")

    def until(self, expression: str, within: float = 20) -> Any:
        """Waits until an expression is true, and returns its value."""
        end = time.monotonic() + within
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"{expression}: {self.logged()}"
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def emulate(self, scheme: str, width: int, *, mobile: bool = False) -> None:
        """Sets the colour scheme and the width of the window."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def logged(self) -> list[str]:
        """Returns what the console says of errors and warnings."""
        entries = self.driver.get_log("browser")
        return [e["message"] for e in entries if e["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """Returns the addresses that were requested, without those that the page itself holds."""
        found = []
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                found.append(event["params"]["request"]["url"])
        return [url for url in found if not url.startswith(("data:", "about:"))]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Starts the browser with a new profile; skips where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    program = shutil.which("chromedriver")
    if not binary or not program:
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1400,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(program)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
