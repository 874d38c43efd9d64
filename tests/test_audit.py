"""S21: `make audit` passes only what the advisory service was asked about. The service here is one on this machine."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import loopback
import pytest

from supply import audit

Known = dict[tuple[str, str], list[str]]
PASSES = "audit: 2 packages, 1 advisories, all of them excused in vex.json\n"
CONTROL: Known = {audit.CONTROL: ["CVE-2019-10906"]}


def osv(known: Known) -> loopback.Answer:
    """An OSV service (https://google.github.io/osv.dev/post-v1-query) that knows some advisories."""

    def answer(asked: dict[str, Any]) -> tuple[int, Any]:
        name = asked["package"]["name"]
        ids = known.get((name, asked["version"]), [])
        affected = [{"package": {"name": name, "ecosystem": "PyPI"}, "versions": [asked["version"]]}]
        vulns = [{"id": name, "aliases": [f"X-{name}"], "summary": "a hole", "affected": affected} for name in ids]
        return 200, {"vulns": vulns} if vulns else {}

    return answer


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str]]]:
    """Audits `accelerate==1.15.0` and `rich==15.0.0+local` against a service; returns exit code and what was said."""
    locked = tmp_path / "locked.txt"
    locked.write_text("# set\naccelerate==1.15.0 \\\n    --hash=sha256:" + "0" * 64 + "\nrich==15.0.0+local\n")
    servers: list[loopback.Server] = []

    def start(answer: loopback.Answer, vex: Path = audit.VEX) -> tuple[int, str]:
        servers.append(loopback.answers(answer))
        service = ["--vulnerability-service", "osv", "--osv-url", servers[-1].url]
        code = audit.main([str(locked), "--vex", str(vex), "--", *service])
        said = capfd.readouterr()
        return code, said.out + said.err

    yield start
    for server in servers:
        server.close()


def test_the_documented_advisory_alone_passes(run: Callable[..., tuple[int, str]]) -> None:
    code, said = run(osv({**CONTROL, ("accelerate", "1.15.0"): ["PYSEC-2026-3804"]}))
    assert (code, said) == (0, PASSES)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has pip-audit run in this process, which spares two starts each; the test above starts it as it is."""
    from pip_audit import _cli
    from pip_audit._service.interface import ServiceError

    def start(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "pip_audit"]
        out, err, code = io.StringIO(), io.StringIO(), 0
        with monkeypatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", command[2:])
            try:
                _cli.audit()
            except SystemExit as end:
                code = int(end.code or 0)
            except (OSError, ValueError, ServiceError):
                code = 1
                traceback.print_exc()
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    monkeypatch.setattr("supply.audit.subprocess.run", start)


@pytest.mark.usefixtures("here")
def test_an_advisory_fails(run: Callable[..., tuple[int, str]]) -> None:
    known = {**CONTROL, ("accelerate", "1.15.0"): ["PYSEC-2026-3804"], ("rich", "15.0.0"): ["CVE-2027-1"]}
    code, said = run(osv(known))
    assert code == 1
    assert said.startswith("audit: rich==15.0.0: CVE-2027-1, X-CVE-2027-1; no version is fixed; take a fixed version")
    assert said.count("\n") == 1


@pytest.mark.usefixtures("here")
def test_another_advisory_about_the_excused_package_fails(run: Callable[..., tuple[int, str]]) -> None:
    code, said = run(osv({**CONTROL, ("accelerate", "1.15.0"): ["PYSEC-2026-3804", "CVE-2027-2"]}))
    assert (code, "accelerate==1.15.0: CVE-2027-2" in said) == (1, True)


@pytest.mark.usefixtures("here")
def test_an_excuse_that_excuses_nothing_has_to_go(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, said = run(osv(CONTROL))
    assert (code, "the service has no such advisory any more; remove it" in said) == (1, True)
    vex = json.loads(audit.VEX.read_text())
    vex["statements"][0]["products"][0]["@id"] = "pkg:pypi/accelerate@1.14.0"
    (tmp_path / "vex.json").write_text(json.dumps(vex))
    code, said = run(osv({**CONTROL, ("accelerate", "1.15.0"): ["PYSEC-2026-3804"]}), tmp_path / "vex.json")
    assert code == 1
    assert "accelerate==1.15.0: PYSEC-2026-3804" in said
    assert "accelerate==1.14.0: that version is not locked" in said


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (osv({}), "knows no advisory about jinja2==2.10, of which there are: it knows nothing"),
        (lambda asked: (503, {}), "could not ask: "),
    ],
    ids=["knows nothing", "503"],
)
@pytest.mark.usefixtures("here")
def test_a_service_that_does_not_answer_never_passes(
    run: Callable[..., tuple[int, str]], answer: loopback.Answer, says: str
) -> None:
    code, said = run(answer)
    assert (code, says in said, said.count("\n")) == (2, True, 1)


@pytest.mark.usefixtures("here")
def test_a_service_that_is_not_there_never_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text("rich==15.0.0\n")
    service = ["--vulnerability-service", "osv", "--osv-url", "http://127.0.0.1:9", "--timeout", "2"]
    assert audit.main([str(tmp_path / "x.txt"), "--", *service]) == 2
    assert capsys.readouterr().err.startswith("audit: could not ask: ")


def test_a_package_that_is_passed_over_fails() -> None:
    """pip-audit itself would exit with 0."""
    skipping = json.dumps({"dependencies": [{"name": "rich", "skip_reason": "not found on the index"}]})
    with pytest.raises(audit.CouldNotAskError, match=r"1 of 1 packages, e\.g\.: not found on the index"):
        audit.answers(skipping, 1)
    with pytest.raises(audit.CouldNotAskError, match="0 answers about 1 packages"):
        audit.answers('{"dependencies": []}', 1)


def test_an_excuse_without_a_reason_is_none(tmp_path: Path) -> None:
    vex = json.loads(audit.VEX.read_text())
    del vex["statements"][0]["impact_statement"]
    (tmp_path / "vex.json").write_text(json.dumps(vex))
    with pytest.raises(SystemExit, match="CVE-2026-69112 has no justification or impact_statement"):
        list(audit.excused(tmp_path / "vex.json"))
