"""A headless Chromium for tests, driven with the DevTools protocol over a pipe: no package needed.

Source: chromium@156 content/browser/devtools/devtools_pipe_handler.cc: messages are JSON that end
in a zero byte, read by the browser from descriptor 3 and written by it to descriptor 4.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys

__all__ = ["CHROMIUM", "Browser"]

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_PATIENCE_S = 60.0
# Puts both ends where the browser looks for them; a `preexec_fn` would fork beside threads.
_LAUNCH = """
import os, sys
ends = [os.dup(int(one)) for one in sys.argv[1:3]]
for place, one in zip((3, 4), ends):
    os.dup2(one, place)
    os.set_inheritable(place, True)
os.execv(sys.argv[3], sys.argv[3:])
"""
_KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowUp": 38, "ArrowDown": 40, "Tab": 9, "Enter": 13}


class Browser:
    """One page; `complaints` collects console errors, exceptions and refused loads."""

    def __init__(self, profile):
        read, theirs_out = os.pipe()
        theirs_in, write = os.pipe()
        ends = [str(theirs_in), str(theirs_out)]
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-S", "-c", _LAUNCH, *ends),
                *(CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"),
            ],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.to, self.back = os.fdopen(write, "wb"), os.fdopen(read, "rb")
        self.count, self.rest, self.session = 0, b"", None
        self.loaded, self.complaints = set(), []
        target = self.call("Target.getTargets")["targetInfos"][0]["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def close(self):
        self.session = None
        self.call("Browser.close")
        self.process.wait(20)
        self.to.close()
        self.back.close()

    def _message(self):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.back], [], [], _PATIENCE_S)
            more = os.read(self.back.fileno(), 1 << 16) if ready else b""
            if not more:
                raise RuntimeError("the browser went away" if ready else "the browser is silent")
            self.rest += more
        raw, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(raw)
        method, params = message.get("method", ""), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["exception"]["description"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console.{params['type']}: {params['args']}")
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:")):
                self.complaints.append(f"request: {url}")
        elif method == "Page.lifecycleEvent" and params["name"] == "load":
            self.loaded.add(params["loaderId"])
        return message

    def call(self, method, **params):
        self.count += 1
        wanted = self.count
        message = {"id": wanted, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        while True:
            answer = self._message()
            if answer.get("id") == wanted:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def open(self, path, *, width=1280, height=900, dark=False, script=True, touch=False):
        """Load a page and wait for it."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=touch,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.complaints.clear()
        loader = self.call("Page.navigate", url=path.as_uri())["loaderId"]
        while loader not in self.loaded:
            self._message()
        return self

    def js(self, expression):
        """Evaluate an expression, its value as JSON has it."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def key(self, name):
        code = {"key": name, "code": name, "windowsVirtualKeyCode": _KEYS[name]}
        text = {"text": "\r"} if name == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def centre(self, selector, x=0.5, y=0.5):
        """Scroll an element into view; return a point in it, in CSS pixels of the window."""
        return self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const r = e.getBoundingClientRect();"
            f"return [r.left + {x} * r.width, r.top + {y} * r.height]; }})()"
        )

    def mouse(self, kind, x, y, buttons=0):
        button = "left" if buttons or kind == "mouseReleased" else "none"
        self.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x,
            y=y,
            button=button,
            buttons=buttons,
            clickCount=0 if kind == "mouseMoved" else 1,
        )

    def click(self, selector):
        x, y = self.centre(selector)
        self.mouse("mousePressed", x, y, 1)
        self.mouse("mouseReleased", x, y)

    def touch(self, points):
        """Put a finger down, move it along the points, and lift it."""
        for kind, at in zip(["touchStart"] + ["touchMove"] * len(points), points, strict=False):
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": at[0], "y": at[1]}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screenshot(self, path, *, full=True):
        made = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(made["data"]))
