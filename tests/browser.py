"""A headless Chromium for tests of pages, driven through DevTools over a pipe.

`find_chromium()` returns its path or None, and `Browser` opens pages:

    with Browser() as browser:
        page = browser.open(path.as_uri(), width=800, dark=True)
        page.press("ArrowRight")
        assert page.evaluate("document.title") == "..." and not page.errors
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

SECONDS = 60.0  # for an answer, on a machine with other jobs
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-dev-shm-usage", "--disable-background-networking", "--remote-debugging-pipe"),
    *("--force-color-profile=srgb", "--autoplay-policy=no-user-gesture-required"),
]
CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def find_chromium() -> str | None:
    """Return the path of Chromium or Chrome, None if neither is installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """A browser process with a profile of its own. Use it as a context manager."""

    def __enter__(self) -> "Browser":
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [find_chromium(), *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._ready = select.poll()  # select() takes no descriptors above 1,023
        self._ready.register(self._in, select.POLLIN)
        # The browser reads commands from descriptor 3 and writes to 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._count, self._pages = b"", 0, {}
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)
        os.close(self._in)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._profile.cleanup()

    def open(self, url: str, width: int = 1600, height: int = 1000, dark: bool = False) -> "Page":
        """Open a page in a tab of its own, and wait until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=url)
        page.wait("location.href !== 'about:blank' && document.readyState === 'complete'")
        return page

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._count += 1
        number = self._count
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while (answer := self._read()).get("id") != number:
            page = self._pages.get(answer.get("sessionId"))
            if page is not None and "method" in answer:
                page.notice(answer["method"], answer["params"])
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        """Return the next message of the browser."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            if not self._ready.poll(1e3 * max(0.0, end - time.monotonic())):
                raise TimeoutError(f"no answer of the browser in {SECONDS:g} seconds")
            if not (data := os.read(self._in, 2**20)):
                raise RuntimeError("the browser has ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


class Page:
    """A tab.

    errors: exceptions, and errors and warnings of the console, such as blocked contents.
    requests: addresses that the page asked for, without data: URIs.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session
        self.errors: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command for this tab."""
        return self.browser.call(method, self.session, **params)

    def notice(self, method: str, params: dict[str, Any]) -> None:
        """Record an event."""
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(" ".join(str(arg.get("value")) for arg in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            self.requests += [] if url.startswith("data:") else [url]

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; a promise is awaited."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = SECONDS) -> Any:
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression} is {value!r} after {seconds:g} seconds")
            time.sleep(0.02)
        return value

    def press(self, key: str, times: int = 1) -> None:
        """Press a key, such as "ArrowRight", "Home", " " or "p"."""
        text = {"text": key} if len(key) == 1 else {}
        number = {"windowsVirtualKeyCode": CODES[key]} if key in CODES else {}
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **number)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **number)

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Click on an element, at a place given as shares of its width and height."""
        script = """(selector => {
            const element = document.querySelector(selector);
            element.scrollIntoView({block: "center"});
            const box = element.getBoundingClientRect();
            return [box.x, box.y, box.width, box.height];
        })"""
        left, top, width, height = self.evaluate(f"{script}({json.dumps(selector)})")
        place = {"x": left + x * width, "y": top + y * height, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            buttons = int(kind == "mousePressed")
            self.call("Input.dispatchMouseEvent", type=kind, buttons=buttons, **place)

    def resize(self, width: int, height: int) -> None:
        """Set the size of the window's contents."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def screenshot(self, file: Path, whole: bool = True) -> None:
        """Write a PNG of the page, or of what the window shows."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))
