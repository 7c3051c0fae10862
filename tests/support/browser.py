"""Headless Chromium, as somebody would use it: Debian's packages ``chromium`` and ``chromium-driver``."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

# Without these options, Chromium sends requests to its vendor's servers at every start.
_OFFLINE = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
)
_PATIENCE = 90.0  # seconds until something that does not come counts as missing

CONTRASTS = """
const scratch = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const rgb = (color) => {
  scratch.clearRect(0, 0, 1, 1);
  scratch.fillStyle = color;
  scratch.fillRect(0, 0, 1, 1);
  return [...scratch.getImageData(0, 0, 1, 1).data];
};
const light = (color) => {
  const [r, g, b] = color.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (element) => {
  for (let each = element; each; each = each.parentElement) {
    const color = rgb(getComputedStyle(each).backgroundColor);
    if (color[3] === 255) return color;
  }
  return [255, 255, 255];
};
const poor = [];
for (const element of document.querySelectorAll("body *")) {
  const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) || element.value;
  if (!text || element.disabled || !element.checkVisibility()) continue;
  if (element.closest(".unseen, :disabled, option")) continue;
  const [one, other] = [light(rgb(getComputedStyle(element).color)), light(ground(element))].sort((a, b) => a - b);
  const ratio = (other + 0.05) / (one + 0.05);
  if (ratio < 4.5) poor.push(`${element.tagName} ${element.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
}
return poor;
"""
"""A script that names the texts whose contrast is below WCAG's AA."""


class Browser:
    """A window, and what is looked for in it.

    Args:
        driver: Drives Chromium.
    """

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def all(self, selector: str) -> list[WebElement]:
        """The elements that a CSS selector finds."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """The first of them, once it is there and shown."""
        shown: WebElement = self.until(
            lambda: next((each for each in self.all(selector) if each.is_displayed()), None), selector
        )
        return shown

    def text(self, selector: str) -> str:
        """The text of an element that is shown."""
        return self.one(selector).text

    def click(self, selector: str) -> None:
        """Click an element, once it is shown and enabled."""
        self.until(lambda: self.one(selector).is_enabled(), f"{selector} enabled")
        self.one(selector).click()

    def fill(self, selector: str, text: str) -> None:
        """Types a text into a field, instead of what the field holds."""
        field = self.one(selector)
        field.clear()
        field.send_keys(text)

    def run(self, script: str) -> Any:
        """What a script returns that runs in the page."""
        return self.driver.execute_script(script)

    def until(self, found: Callable[[], Any], what: str) -> Any:
        """Wait for something; gives it."""
        end = time.monotonic() + _PATIENCE
        while not (value := found()):
            assert time.monotonic() < end, f"{what}: not there; the page says {self.all('body')[0].text!r}"
            time.sleep(0.02)
        return value

    def shape(self, width: int, height: int = 800, *, dark: bool = False) -> None:
        """Give the window a size, and the user a taste."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        taste = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": taste})

    def complaints(self) -> list[str]:
        """What the console has said since the last time."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A window of its own, with its profile in ``folder``. Skips the test where there is no Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no Chromium here; on Debian: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = chromium
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *_OFFLINE):
        options.add_argument(option)
    options.add_argument(f"--user-data-dir={folder}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driven = Chrome(options=options, service=Service(driver))
    try:
        yield Browser(driven)
    finally:
        driven.quit()
