"""The command, as a process of its own; and the page, in a browser."""

import contextlib
import gc
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import httpx
import pytest
import uvicorn

from keras_mamba2.serving import server
from tests.serving.collected import wait_until
from tests.serving.conftest import NAME
from tests.serving.conftest import client_of


@contextlib.contextmanager
def served(*arguments):
    """A process of `keras-mamba2 serve`, and its address once it serves."""
    command = [sys.executable, "-m", "keras_mamba2.cli", "serve", *map(str, arguments)]
    process = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                yield process, found.group(1)
                return
        pytest.fail("".join(lines))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_nobody_waits_until_the_model_is_searched_for_garbage(monkeypatch):
    frozen = []
    runs = types.SimpleNamespace(run=lambda: frozen.append(gc.get_freeze_count()))
    monkeypatch.setattr(uvicorn, "Server", lambda config: runs)
    try:
        server.run(None, "127.0.0.1", 0, drain_seconds=1, most_connections=1)
    finally:
        gc.unfreeze()
    [count] = frozen
    assert count > 100_000


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_keeps_what_is_known(preset_folder, tmp_path):
    options = ("--name", NAME, "--max-sequences", 2, "--prefix-cache-folder", tmp_path / "known")
    prompt = "Once more unto the breach, dear friends, once more"
    body = {"model": NAME, "prompt": prompt, "max_tokens": 8000, "temperature": 0}
    with served(preset_folder, *options) as (process, address):
        assert httpx.get(f"{address}/", headers={"Host": "evil.example"}).status_code == 400
        with client_of(address) as client:
            chunks = client.completions.create(**body, stream=True)
            first = next(chunks)
            process.send_signal(signal.SIGTERM)
            reasons = [chunk.choices[0].finish_reason for chunk in [first, *chunks]]
        assert reasons[-1] in ("length", "stop")
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            httpx.get(address)
    with served(preset_folder, *options) as (_, address), client_of(address) as client:
        answer = client.completions.create(**{**body, "max_tokens": 5})
        assert answer.usage.prompt_tokens_details.cached_tokens == len(prompt) - 1


@pytest.mark.slow
def test_limits_of_the_command(preset_folder):
    options = ("--max-body-mb", 1, "--allowed-host", "models.example", "--drain-seconds", 0)
    few = ("--max-sequences", 1, "--max-waiting", 1)
    host = {"Host": "models.example"}
    with served(preset_folder, "--name", NAME, *options, *few) as (process, address):
        assert httpx.get(f"{address}/ready").status_code == 400
        assert httpx.get(f"{address}/ready", headers=host).status_code == 200
        large = httpx.post(f"{address}/v1/completions", headers=host, content=b" " * 2**21)
        assert large.status_code == 413
        with contextlib.ExitStack() as connections:
            where = address.removeprefix("http://").split(":")
            for _ in range(1 + 1 + 64):
                connections.enter_context(socket.create_connection(where))
            assert httpx.get(f"{address}/ready", headers=host).status_code == 503
        body = {"model": NAME, "prompt": "ROMEO:", "max_tokens": 30_000, "temperature": 0}
        body["stream"] = True
        asked = httpx.stream("POST", f"{address}/v1/completions", headers=host, json=body)
        with asked as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)


@pytest.mark.slow
def test_a_killed_server_has_kept_what_it_knew(preset_folder, tmp_path):
    known = tmp_path / "known"
    options = ("--name", NAME, "--max-sequences", 2, "--prefix-cache-folder", known)
    prompt = "Once more unto the breach, dear friends, once more"
    body = {"model": NAME, "prompt": prompt, "max_tokens": 5, "temperature": 0}
    with served(preset_folder, *options) as (process, address), client_of(address) as client:
        before = client.completions.create(**body)
        wait_until(lambda: len(list(known.glob("*/*.safetensors"))) == 2)
        process.kill()
        process.wait()
    with served(preset_folder, *options) as (_, address), client_of(address) as client:
        answer = client.completions.create(**body)
    assert answer.usage.prompt_tokens_details.cached_tokens == len(prompt) - 1
    assert answer.choices[0].text == before.choices[0].text


@pytest.mark.slow
def test_without_the_extra_it_says_how_to_install(preset_folder):
    script = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from keras_mamba2.cli import app\n"
        f"sys.argv = ['keras-mamba2', 'serve', {str(preset_folder)!r}]\n"
        "app()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 2
    assert 'pip install "keras-mamba2[serve]"' in result.stderr


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), "")
DRIVER = shutil.which("chromedriver") or ""


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument("--window-size=900,820")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.browser
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its driver is installed")
class TestPage:
    @pytest.fixture(autouse=True)
    def _opened(self, browser, address):
        self.browser = browser
        browser.get(address)
        self.wait(lambda: self.find("model").text == NAME)
        yield
        entries = browser.get_log("browser")
        # That an answer was an error is told here too.
        problems = [e for e in entries if e["level"] == "SEVERE" and e["source"] != "network"]
        assert problems == []

    def find(self, name):
        return self.browser.find_element("id", name)

    def wait(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    def set(self, name, value):
        self.browser.execute_script(f"document.getElementById('{name}').value = '{value}'")

    def test_text_streams_by_keyboard_alone(self, lm):
        from selenium.webdriver import ActionChains
        from selenium.webdriver import Keys

        self.set("temperature", 0)
        self.set("max_tokens", 20)
        # The prompt has the focus.
        keys = ActionChains(self.browser).send_keys("ROMEO:")
        keys.key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
        self.wait(lambda: "20 tokens" in self.find("status").text)
        text = lm.generate("ROMEO:", max_new_tokens=20, temperature=0.0)
        shown = self.browser.execute_script("return document.getElementById('output').textContent")
        assert shown == text
        assert re.search(r"20 tokens, \d+ a second; \d+ of 6 read before", self.find("status").text)

    def test_stop_ends_it_on_the_server_too(self, engine):
        self.set("max_tokens", 4000)
        self.set("temperature", 0)
        self.find("prompt").send_keys("hello")
        self.find("send").click()
        self.wait(lambda: len(self.find("output").text) > 20)
        self.find("stop").click()
        self.wait(lambda: self.find("status").text == "Stopped")
        self.wait(lambda: engine.num_running == 0)
        assert self.find("send").is_enabled()
        assert not self.find("stop").is_enabled()

    def test_errors_are_shown(self):
        self.set("max_tokens", 100_000)
        self.find("prompt").send_keys("hello")
        self.find("send").click()
        self.wait(lambda: "maximum context length" in self.find("output").text)

    def test_what_failed_was_not_sent(self, lm):
        """And can be sent again."""
        self.set("temperature", 0)
        self.set("max_tokens", 100_000)
        self.find("prompt").send_keys("hello")
        self.find("send").click()
        self.wait(lambda: "maximum context length" in self.find("output").text)
        assert self.browser.execute_script("return document.getElementById('prompt').value") == (
            "hello"
        )
        self.set("max_tokens", 20)
        self.find("send").click()
        self.wait(lambda: "20 tokens" in self.find("status").text)
        text = lm.generate("hello", max_new_tokens=20, temperature=0.0)
        assert self.browser.execute_script("return text") == text

    def test_clear_ends_what_runs(self, engine):
        self.set("max_tokens", 4000)
        self.find("prompt").send_keys("hello")
        self.find("send").click()
        self.wait(lambda: len(self.find("output").text) > 20)
        self.find("clear").click()
        self.wait(lambda: engine.num_running == 0)
        assert self.find("output").text == ""
        assert self.browser.execute_script("return [text, messages]") == ["", []]
        assert self.find("send").is_enabled()

    def test_memory_beside_that_of_a_transformer(self, lm):
        from keras_mamba2.conversion.describe import state_bytes

        fixed, _ = state_bytes(lm.backbone)
        assert self.find("state").text == f"{fixed / 1e6:.1f} MB"
        assert self.find("cache").text == "0.0 MB"

    @pytest.mark.usefixtures("template")
    def test_a_conversation(self, lm):
        self.browser.refresh()
        self.wait(lambda: self.find("kind").text == "answers")
        self.set("temperature", 0)
        self.set("max_tokens", 20)
        self.find("prompt").send_keys("hello")
        self.find("send").click()
        self.wait(lambda: "20 tokens" in self.find("status").text)
        messages = [{"role": "user", "content": "hello"}]
        reply = lm.chat(messages, max_new_tokens=20, temperature=0.0)
        shown = self.browser.execute_script("return document.getElementById('output').textContent")
        assert shown == "hello" + reply

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_light_and_dark(self, scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        color = self.browser.execute_script("return getComputedStyle(document.body).color")
        brightness = sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3
        assert (brightness > 128) == (scheme == "dark")


def test_the_page_asks_no_other_host(address):
    page = httpx.get(address)
    assert not re.search(r"https?://", page.text)
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert len(page.content) < 20_000
