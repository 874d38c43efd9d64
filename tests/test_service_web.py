"""The service's page in a headless Chromium against a real server: what it shows, what it sends, what it refuses.

Screenshots are kept where HF_FINETUNE_SCREENSHOTS names a folder.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import HTTPRedirectHandler, Request, build_opener

import pytest
from browsing import CONTRASTS, asked, resize, started
from conftest import WORDS
from faults.lab import rows
from test_service import Service, wait

from hf_finetune.service.store import Store

pytestmark = pytest.mark.slow

HOSTILE = '<img src=x onerror="window.pwned=1">'


class Logged(Service):
    """A server whose log is kept."""

    def start(self, *more: str) -> None:
        """Start it; what it writes to standard error goes into a file."""
        self.log = self.root.parent / "server.log"
        before = os.dup(2)
        with self.log.open("ab") as log:
            os.dup2(log.fileno(), 2)
        try:
            super().start(*more)
        finally:
            os.dup2(before, 2)
            os.close(before)

    @property
    def address(self) -> str:
        """Where the page is."""
        return str(self.client.base_url).removesuffix("/v1/")

    def key_of(self, project: str) -> str:
        """Make a key, as an operator does."""
        command = [sys.executable, "-m", "hf_finetune", "keys", "create", "--root", str(self.root)]
        made = subprocess.run([*command, "--project", project], capture_output=True, text=True, check=True)
        return made.stdout.strip()


class _Stay(HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        """Show redirections as they are."""


def sentences() -> str:
    """Write a csv file that can be learned."""
    return rows(101, 1, [word for word in WORDS if word.isalpha()])


def ask(address: str, body: Any = None, method: str | None = None, **headers: str) -> tuple[int, dict[str, str], str]:
    """Send a request outside of the browser; returns status, headers and text."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        answer = build_opener(_Stay).open(Request(address, body, headers, method=method), timeout=60)
    except HTTPError as error:
        answer = error
    return answer.status, dict(answer.headers.items()), answer.read().decode()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, tiny_llama: str) -> Iterator[Logged]:
    root = tmp_path_factory.mktemp("page") / "root"
    made = Logged(root, tiny_bert, tiny_llama)
    # The reports, which other tests of the service have no use for, are looked at here.
    models = json.loads((root / "models.yaml").read_text())
    for model in models.values():
        model["recipe"]["tracking"] = {"images": False}
    (root / "models.yaml").write_text(json.dumps(models))
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from started(tmp_path_factory.mktemp("profile"), loopback=True)


@pytest.fixture(scope="module")
def page(service: Logged, browser: Any) -> Page:
    """A browser that is logged in."""
    made = Page(browser, service.address)
    made.open("/login")
    made.find("#key").send_keys(service.key)
    made.find("button").click()
    made.until(lambda: made.find("#summary"))
    return made


class Page:
    """What a person does with the page."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser, self.address = browser, address

    def open(self, path: str) -> None:
        self.browser.get(self.address + path)

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def find(self, selector: str) -> Any:
        return self.until(lambda: next(iter(self.all(selector)), None), selector)

    def text(self, selector: str) -> str:
        return str(self.browser.execute_script("return document.querySelector(arguments[0])?.textContent", selector))

    def until(self, reached: Callable[[], Any], what: str = "", seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while not (found := reached()):
            assert time.monotonic() < end, f"{what} on {self.browser.current_url}: {self.text('#alert')}"
            time.sleep(0.1)
        return found

    def cookie(self) -> str:
        found = self.browser.get_cookie("hf_finetune_session")
        return f"{found['name']}={found['value']}"

    def look(self, name: str) -> None:
        """Hold the page against what every page must be, wide and narrow, light and dark."""
        for width, scheme in ((1280, "light"), (400, "dark")):
            resize(self.browser, width, 900, scheme)
            wide = self.browser.execute_script(
                "const e = document.documentElement; return e.scrollWidth - e.clientWidth"
            )
            assert wide <= 0, f"{name} is wider than {width} px"
            assert self.browser.execute_script(CONTRASTS) == []
            unnamed = self.browser.execute_script(
                "return [...document.querySelectorAll('input, select, textarea, button, meter, progress')].filter(e =>"
                " e.checkVisibility() && !e.labels?.length && !e.getAttribute('aria-label') && !e.textContent.trim())"
                ".map(e => e.outerHTML)"
            )
            assert unnamed == [], "controls without a name"
            assert len(self.all("h1")) == 1
            if folder := os.environ.get("HF_FINETUNE_SCREENSHOTS"):
                Path(folder).mkdir(parents=True, exist_ok=True)
                (Path(folder) / f"service-{name}-{width}.png").write_bytes(self.browser.get_screenshot_as_png())
        resize(self.browser, 1280, 900, "light")


def test_a_job_by_the_form_from_upload_to_answer(service: Logged, page: Page, tmp_path: Path) -> None:
    file = tmp_path / f"{'<b>'}train.csv"
    file.write_text(sentences().replace("negative", HOSTILE))
    for log in ("browser", "performance"):
        page.browser.get_log(log)
    page.look("jobs")
    page.open("/new")
    page.until(lambda: page.all("#recipe details"))
    page.look("new")
    page.find("#training_file").send_keys(str(file))
    page.find("#n_epochs").send_keys("0")
    page.find("#start").click()
    wrong = page.until(lambda: page.text("#n_epochs-wrong"))
    assert "greater than or equal to 1" in wrong, "a finding stands beside its field"
    assert page.browser.switch_to.active_element.get_attribute("id") == "n_epochs"
    page.find("#n_epochs").clear()
    page.find("#n_epochs").send_keys("2")
    page.find("#suffix").send_keys("films")
    page.find("#filter").send_keys("learning_rate peak")
    rate = page.find('#recipe [data-path="training.learning_rate"] input')
    rate.send_keys("0.01")
    page.find("#start").click()
    page.until(lambda: "/jobs/ftjob-" in page.browser.current_url)
    job = page.browser.current_url.rpartition("/")[2]
    page.until(lambda: page.text("#state") in ("Succeeded", "Failed"), "the end of the job", 240)
    assert page.text("#state") == "Succeeded", page.text("#reason")
    page.until(lambda: page.all("#curves figure"))
    assert service.client.fine_tuning.jobs.retrieve(job).hyperparameters.n_epochs == 2
    assert "learning_rate: 0.01" in (service.root / "runs" / job / "recipe.yaml").read_text()
    assert page.text("#curves figure h3") == "Loss"
    assert "Step 26" in page.text("#events")
    assert page.text("#checkpoints tr th") == "26"
    page.look("job")
    page.find("#ask").click()
    page.find("#inputs textarea").send_keys("a good film\n")
    page.until(lambda: page.all("#answers meter"), "an answer", 120)
    assert {name.text for name in page.all("#answers th")} == {HOSTILE, "positive"}
    shares = [float(cell.text.removesuffix(" %")) for cell in page.all("#answers .n")]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    page.look("playground")
    for report, said in (("report", "Run report"), ("data", "Data report")):
        page.open(f"/jobs/{job}/{report}")
        assert said in page.text("body"), "is made in a sandbox, where it may run no script"
        assert page.browser.execute_script("return window.origin") == "null"
    page.open("/")
    page.until(lambda: page.all("#jobs li"))
    assert page.browser.execute_script("return window.pwned ?? null") is None
    complaints = [entry["message"] for entry in page.browser.get_log("browser")]
    assert [one for one in complaints if "fine_tuning/jobs - Failed to load resource" not in one] == [], "of n_epochs"
    assert {url for url in asked(page.browser) if not url.startswith((page.address, "data:"))} == set(), (
        "nothing leaves"
    )


def test_a_chat_model_answers_in_the_playground(service: Logged, page: Page) -> None:
    talk = [{"role": "user", "content": "one plus one"}, {"role": "assistant", "content": "two ."}]
    rows_of = "".join(json.dumps({"messages": talk}) + "\n" for _ in range(12))
    file = service.client.files.create(file=("chats.jsonl", rows_of.encode()), purpose="fine-tune")
    recipe = {"training": {"steps": 3, "batch_size": 2}, "data": {"checks": {"duplicates": "off"}}}
    job = service.client.fine_tuning.jobs.create(model="llama", training_file=file.id, extra_body={"recipe": recipe})
    done = service.until(job.id, "succeeded", "failed")
    page.open(f"/playground?{urlencode({'model': done.fine_tuned_model})}")
    page.find("#inputs textarea")
    page.find("#length").clear()
    page.find("#length").send_keys("8")
    page.find("#inputs textarea").send_keys("one plus one\n")
    page.until(lambda: page.all(".turn.assistant") and page.text("#busy") == "", "an answer", 120)
    expected = service.client.chat.completions.create(
        model=done.fine_tuned_model, messages=[{"role": "user", "content": "one plus one"}], max_tokens=8
    )
    assert page.text(".turn.assistant") == expected.choices[0].message.content


def test_findings_of_the_check_stand_beside_their_fields(service: Logged, page: Page, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": "fine", "label": "a"}\n' * 12 + "no json\n")
    page.open("/new")
    page.find('#recipe [data-path="data.max_length"] input')
    page.find("#training_file").send_keys(str(file))
    page.find("#start").click()
    wrong = page.until(
        lambda: page.text("#training_file-wrong") or "/jobs/" in page.browser.current_url, "findings", 90
    )
    if wrong is not True:  # else the check had to wait, and the job's page has them
        assert "train.jsonl:13" in wrong
        assert page.find("#training_file").get_attribute("aria-invalid") == "true"
    else:
        page.until(lambda: "train.jsonl:13" in page.text("#reason"), "the reason", 120)


def test_webhooks_are_made_and_deleted(service: Logged, page: Page) -> None:
    page.open("/webhooks")
    page.until(lambda: page.all("#types input") and page.text("#summary") == "No endpoint yet.")
    page.find("#name").send_keys(HOSTILE)
    page.find("#url").send_keys("http://127.0.0.1/hook")
    page.find("#create").click()
    page.until(lambda: page.text("#alert"), "a refusal: nobody allowed that network")
    page.find("#url").clear()
    page.find("#url").send_keys("https://93.184.215.14/hook")
    page.find("#create").click()
    page.until(lambda: page.text("#secret").startswith("whsec_"), "its secret")
    (made,) = service.client.get("/webhook_endpoints", cast_to=object)["data"]
    assert (made["name"], made["url"]) == (HOSTILE, "https://93.184.215.14/hook")
    assert made["event_types"] == [f"fine_tuning.job.{state}" for state in ("succeeded", "failed", "cancelled")]
    page.until(lambda: HOSTILE in page.text("#endpoints"))
    page.look("webhooks")
    page.find("#endpoints button").click()
    page.browser.switch_to.alert.accept()
    page.until(lambda: page.text("#summary") == "No endpoint yet.")
    assert service.client.get("/webhook_endpoints", cast_to=object)["data"] == []


def test_hostile_names_are_text(service: Logged, page: Page, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"messages": HOSTILE}) + "\n")
    file = service.client.files.create(file=(HOSTILE + ".jsonl", bad.read_bytes()), purpose="fine-tune")
    job = service.client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        metadata={HOSTILE: HOSTILE},
        extra_body={"recipe": {"task": {"text": HOSTILE}}},
    )
    service.until(job.id, "failed")
    page.open(f"/jobs/{job.id}")
    page.until(lambda: HOSTILE in page.text("#settings") and page.text("#reason"))
    assert page.browser.execute_script("return window.pwned ?? document.querySelectorAll('img').length") == 0


def test_buttons_pause_resume_and_cancel(service: Logged, page: Page, tmp_path: Path) -> None:
    file = service.client.files.create(file=("train.csv", sentences().encode()), purpose="fine-tune")
    recipe = {"training": {"steps": 2000, "batch_size": 4}}
    job = service.client.fine_tuning.jobs.create(model="tiny", training_file=file.id, extra_body={"recipe": recipe})
    page.open(f"/jobs/{job.id}")
    page.until(lambda: page.text("#state") in ("Training", "Failed"), "training", 240)
    page.until(lambda: page.text("#steps").startswith("Step"))
    page.find("#pause").click()
    page.until(lambda: page.text("#state") == "Paused", "paused", 120)
    page.find("#resume").click()
    page.until(lambda: page.text("#state") in ("Waiting", "Training"))
    page.find("#cancel").click()
    page.browser.switch_to.alert.accept()
    page.until(lambda: page.text("#state") == "Cancelled", "cancelled", 120)
    assert [button for button in page.all(".actions button") if button.is_displayed()] == []


def test_tensorboard_shows_the_runs_of_the_project_alone(service: Logged, page: Page) -> None:
    wait(lambda: ask(f"{page.address}/tensorboard/data/runs", cookie=page.cookie())[0] == 200, 90)
    runs = json.loads(ask(f"{page.address}/tensorboard/data/runs", cookie=page.cookie())[2])
    own = {job.id[-12:] for job in service.client.fine_tuning.jobs.list()}
    assert {run.split()[-1] for run in runs} <= own
    answer = ask(f"{page.address}/login", urlencode({"key": service.key_of("other")}).encode())
    cookie = answer[1]["set-cookie"].partition(";")[0]
    status, _, text = ask(f"{page.address}/tensorboard/data/runs", cookie=cookie)
    assert (status, json.loads(text)) == (200, [])
    assert ask(f"{page.address}/tensorboard/data/runs")[0] == 303, "behind the login"
    for path in (f"/jobs/{next((service.root / 'runs').iterdir()).name}{end}" for end in ("", "/report", "/data")):
        assert "There is no such job" in ask(page.address + path, cookie=cookie)[2]


def test_a_session_is_as_good_as_its_key_and_no_better(service: Logged, page: Page) -> None:
    address = page.address
    assert ask(f"{address}/login", b"key=hf-wrong")[0] == 401
    key = service.key_of("short")
    form = urlencode({"key": key}).encode()
    assert ask(f"{address}/login", form, sec_fetch_site="cross-site")[0] == 403, "no other site logs anybody in"
    status, headers, _ = ask(f"{address}/login", form)
    assert status == 303
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(headers["set-cookie"].split("; "))
    cookie = headers["set-cookie"].partition(";")[0]
    jobs = f"{address}/v1/fine_tuning/jobs"
    assert ask(jobs, cookie=cookie)[0] == 200
    status, headers, text = ask(f"{address}/", cookie=cookie)
    assert "'unsafe" not in headers["content-security-policy"]
    found = re.search(r'name="csrf" content="(\w+)"', text)
    assert found
    body = {"content_type": "application/json", "cookie": cookie}
    assert ask(jobs, b"{}", **body)[0] == 403, "no change without the token of the page"
    assert ask(jobs, b"{}", **body, x_csrf_token="0" * 64)[0] == 403
    assert ask(jobs, b"{}", **body, x_csrf_token=found[1])[0] == 400, "the token is right, the request is empty"
    assert ask(f"{address}/logout", b"", cookie=cookie)[0] == 403
    assert ask(f"{address}/logout", b"", cookie=cookie, x_csrf_token=found[1])[0] == 204
    assert ask(jobs, cookie=cookie)[0] == 401, "a session that has ended stays so, whoever kept the cookie"
    again = ask(f"{address}/login", form)[1]["set-cookie"].partition(";")[0]
    service.kill()
    service.start()
    address = service.address
    assert ask(f"{address}/v1/fine_tuning/jobs", cookie=again)[0] == 200, "a session outlives the server"
    store = Store(service.root)
    (identity,) = [one["id"] for one in store.list_keys() if one["project"] == "short"]
    assert again.partition("=")[2] not in (service.root / "service.db").read_bytes().decode("latin-1")
    assert store.revoke_key(identity)
    assert ask(f"{address}/v1/fine_tuning/jobs", cookie=again)[0] == 401, "it dies with its key"
