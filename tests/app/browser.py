"""A real browser on the pages: what a person sees, clicks and types, by labels and words."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.waiting import until

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
_TO_THE_MIDDLE = "arguments[0].scrollIntoView({block: 'center'})"
WITHIN = 60.0


class Browser:
    """A window of a browser; pages are those of `address`."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver
        self.address = ""

    def turn_to(self, address: str) -> None:
        """Leave the page of before, which may go on asking its own app, for an app's pages."""
        self.driver.get("about:blank")
        self.address = address
        self.requested()

    def open(self, page: str) -> None:
        """Open a page, such as "data", and wait until it is drawn."""
        self.driver.get(f"{self.address}/{page}")
        until(lambda: bool(self.driver.find_elements(By.TAG_NAME, "h1")), within=WITHIN)

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Give the window a size, and tell the page which colours its user prefers."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        colours = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [colours]})

    @property
    def text(self) -> str:
        """The words that can be seen."""
        return self.driver.find_element(By.TAG_NAME, "body").text

    def sees(self, words: str, *, within: float | None = None) -> None:
        """Wait until words can be seen."""
        until(self._good(lambda: words in self.text), within=within or WITHIN)

    def ends(self, state: str, *, within: float) -> None:
        """Wait until the run that is watched has ended in a state."""
        found = (By.CSS_SELECTOR, f".state.{state.lower()}")
        until(lambda: bool(self.driver.find_elements(*found)), within=within)

    def answer(self, *, within: float | None = None) -> str:
        """Wait until an answer of the chat is told with its adapters, and return it."""
        until(lambda: bool(self._texts(".legend li")), within=within or WITHIN)
        return self._texts("[data-testid='bot']")[-1].strip()

    def legend(self) -> list[str]:
        """Return the adapters of the answer, as the legend names them."""
        return self._texts(".legend li")

    def _texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return list(self.driver.execute_script(script, selector))

    def tab(self, name: str) -> None:
        """Turn to a part of a page."""
        path = f"//button[@role='tab'][normalize-space()='{name}']"
        until(self._good(lambda: self._click(path)), within=WITHIN)

    def click(self, name: str) -> None:
        """Press a button, a link or a choice by its words."""
        kinds = ("button[not(@role='tab')]", "label", "a")
        paths = [f"//{kind}[normalize-space()='{name}']" for kind in kinds]
        path = " | ".join([*paths, f"//*[@role='option'][@aria-label='{name}']"])
        until(self._good(lambda: self._click(path)), within=WITHIN)

    def _click(self, path: str) -> bool:
        for found in self.driver.find_elements(By.XPATH, path):
            with suppress(WebDriverException):  # drawn anew meanwhile, or behind another one
                if found.is_displayed() and found.is_enabled():
                    self.driver.execute_script(_TO_THE_MIDDLE, found)
                    found.click()
                    return True
        return False

    def fill(self, label: str, value: str) -> None:
        """Type into a field instead of what stands there."""

        def typed() -> bool:
            field = self.field(label)
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(value)
            return True

        until(self._good(typed), within=WITHIN)

    def choose(self, label: str, value: str) -> None:
        """Choose from a list."""
        until(self._good(lambda: self.field(label).click() is None), within=WITHIN)
        self.click(value)

    def field(self, label: str) -> WebElement:
        """Return the field of a label that can be seen."""
        path = (
            f"//label[contains(normalize-space(), '{label}')]//*[self::input or self::textarea] | "
            f"//input[@aria-label='{label}'] | //div[span[normalize-space()='{label}']]//input"
        )
        return next(one for one in self.driver.find_elements(By.XPATH, path) if one.is_displayed())

    def upload(self, label: str, *files: Path) -> None:
        """Upload files into the field of a label."""
        path = f"//label[contains(normalize-space(), '{label}')]/..//input[@type='file']"
        until(self._good(lambda: bool(self.driver.find_elements(By.XPATH, path))), within=WITHIN)
        self.driver.find_elements(By.XPATH, path)[0].send_keys("\n".join(map(str, files)))
        self.sees(files[0].stem)

    def requested(self) -> set[str]:
        """Return the addresses that were asked for since the last time."""
        log = self.driver.get_log("performance")  # type: ignore[no-untyped-call]
        messages = [json.loads(entry["message"])["message"] for entry in log]
        sent = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        return {one["request"]["url"] for one in sent}

    def _good(self, ask: Callable[[], bool]) -> Callable[[], bool]:
        """Let a page that is drawn anew meanwhile be asked again."""

        def asked() -> bool:
            try:
                return ask()
            except (WebDriverException, StopIteration):
                return False

        return asked


@contextmanager
def browsing() -> Iterator[Browser]:
    """Open a window for the time of a `with` block."""
    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in _FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    try:
        browser = Browser(driver)
        browser.size(1280, 1400)
        yield browser
    finally:
        driver.quit()
