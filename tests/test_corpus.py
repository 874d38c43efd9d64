"""The recipes and data sets under `corpus/`: every mistake is reported as expected."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK
from forked import Server, ranks

from hf_finetune.cli import main
from hf_finetune.errors import Problem
from hf_finetune.log.lines import printable

CORPUS = Path(__file__).parent / "corpus"
Finding = dict[str, Any]


def cases(kind: str) -> list[str]:
    """`bad/B16_misspelt_key` and its like, in order."""
    return [f"{kind}/{folder.name}" for folder in sorted((CORPUS / kind).iterdir())]


BAD, WARNED, GOOD = (cases(kind) for kind in ("bad", "warned", "good"))
TWELVE = "bad/B00_twelve_mistakes"
UNFIT = "bad/D20_unfit_rows_hide_no_check"
FAULTS = {name: list(group) for name, group in groupby(BAD, lambda case: case.partition("/")[2].partition("_")[0])}
"""The cases of each kind of mistake: `B16` -> `bad/B16_misspelt_key` and its like."""


def expected(case: str) -> dict[str, Any]:
    """What the report of a case must be."""
    content: dict[str, Any] = json.loads((CORPUS / case / "expected.json").read_text(encoding="utf-8"))
    return content


HUGE = ["good/ten_megabytes_without_a_space", "warned/D40_a_million_tokens"]
TRAINED = [case for case in GOOD if "train" in expected(case)]


# What a file under version control can't be, by the name of the case.


def _too_large(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("# filler\n" * (1 << 17))


def _outside(folder: Path) -> None:
    (folder.parent / "outside.yaml").write_text("training: {seed: 1}\n")


def _absolute_output(folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("/elsewhere", str(folder.parent / "elsewhere")))


def _link_for_output(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "link").symlink_to("../elsewhere")


def _data_outside(folder: Path) -> None:
    (folder.parent / "train.csv").write_text("user,password\nroot,wisdom\n")


def _link_for_data(folder: Path) -> None:
    _data_outside(folder)
    (folder / "train.csv").symlink_to("../train.csv")


def _dangling(folder: Path) -> None:
    (folder / "train.csv").symlink_to("nowhere.csv")


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "train.csv")


def _one_more_row(text: str) -> Callable[[Path], None]:
    """`train.csv` of 15 short rows and one with this text."""

    def write(folder: Path) -> None:
        lines = (folder / "data" / "reviews.csv").read_text().splitlines()[:16]
        (folder / "train.csv").write_text("\n".join([*lines, f"{text},negative"]) + "\n")

    return write


def _copied(model: Path) -> Path:
    """The model itself in the place of the link to it."""
    source = model.resolve()
    model.unlink()
    shutil.copytree(source, model)
    return model


def _edit_tokenizer(folder: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    model = _copied(folder / "bert")
    files = [model / "tokenizer_config.json", model / "tokenizer.json"]
    config, tokenizer = (json.loads(file.read_text()) for file in files)
    edit(config, tokenizer)
    for file, content in zip(files, (config, tokenizer), strict=True):
        file.write_text(json.dumps(content))


def _unnamed_pad(folder: Path) -> None:
    _edit_tokenizer(folder, lambda config, _: config.update(pad_token=None))


def _no_pad(folder: Path) -> None:
    def rename(config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
        config.update(pad_token=None)
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["blank"] = vocabulary.pop("[PAD]")
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "[PAD]"]

    _edit_tokenizer(folder, rename)


def _no_zero_width_spaces(folder: Path) -> None:
    removal = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    _edit_tokenizer(folder, lambda _, tokenizer: tokenizer.update(normalizer=removal))


def _more_words(folder: Path) -> None:
    def add(_: dict[str, Any], tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["novel"] = max(vocabulary.values()) + 1

    _edit_tokenizer(folder, add)


def _no_chat_template(folder: Path) -> None:
    (_copied(folder / "llama") / "chat_template.jinja").unlink()


BUILDERS: dict[str, Callable[[Path], None]] = {
    "bad/B11_too_large": _too_large,
    "bad/B35_no_chat_template": _no_chat_template,
    "bad/B42_output_outside_the_root": _absolute_output,
    "bad/B42_output_through_a_link": _link_for_output,
    "bad/B43_outside_the_root": _outside,
    "bad/D52_path_out_of_the_root": _data_outside,
    "bad/D54_tokenizer_without_pad": _no_pad,
    "bad/D54_vocabulary_larger_than_embedding": _more_words,
    "bad/D55_nothing_but_zero_width_spaces": _no_zero_width_spaces,
    "bad/D56_dangling_link": _dangling,
    "bad/D56_link_out_of_the_root": _link_for_data,
    "bad/D56_pipe": _pipe,
    "good/ten_megabytes_without_a_space": _one_more_row("a" * 10_000_000),
    "good/tokenizer_that_names_no_pad_token": _unnamed_pad,
    "warned/D40_a_million_tokens": _one_more_row("dull " * 1_000_000),
}

Place = Callable[[str], AbstractContextManager[dict[str, Any]]]


@pytest.fixture
def place(tmp_path: Path, tiny_bert: str, tiny_llama: str, tiny_t5: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Lays a case out in an empty folder, goes there, and gives what is expected."""

    @contextmanager
    def lay(case: str) -> Iterator[dict[str, Any]]:
        folder = tmp_path / case / "case"
        shutil.copytree(CORPUS / case, folder, ignore=shutil.ignore_patterns("expected.json"))
        shutil.copytree(CORPUS / "data", folder / "data", dirs_exist_ok=True)
        (folder / "bert").symlink_to(tiny_bert)
        (folder / "llama").symlink_to(tiny_llama)
        (folder / "t5").symlink_to(tiny_t5)
        wanted = expected(case)
        if "HF_FINETUNE_ROOT" in wanted["env"]:
            _copied(folder / "bert")
        if case in BUILDERS:
            BUILDERS[case](folder)
        with monkeypatch.context() as patch:
            for name, value in wanted["env"].items():
                patch.setenv(name, value)
            patch.chdir(folder)
            yield wanted

    return lay


def call(*arguments: str) -> int:
    """Run the command line in this process; its exit code."""
    try:
        main.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def check(wanted: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The report of `check`, whose exit code must be the process's."""
    capsys.readouterr()
    code = call("check", "recipe.yaml", *wanted["overrides"], *wanted["args"], "--format", "json")
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["exit_code"] == code
    return said


def fits(finding: Finding, wanted: Finding) -> bool:
    """Whether this is the finding that is expected, and tells what it must."""
    telling = [wanted["says"]] if isinstance(wanted["says"], str) else wanted["says"]
    same = all(finding[name] == wanted[name] for name in ("level", "file", "line", "key"))
    return same and all(text in finding["message"] for text in telling)


def assert_findings(case: str, found: list[Finding], wanted: list[Finding]) -> None:
    """Every expected finding is there once, and nothing else."""
    left, missing = list(found), []
    for one in wanted:
        match = next((finding for finding in left if fits(finding, one)), None)
        if match is None:
            missing.append(one)
        else:
            left.remove(match)
    assert (missing, left) == ([], []), case


def files(folder: Path) -> set[Path]:
    """Everything in and below a folder; links are not followed."""
    return set(folder.rglob("*"))


def assert_untrained(folder: Path) -> None:
    """No step was taken and nothing saved."""
    metrics = [file.read_text() for file in folder.rglob("metrics.jsonl")]
    assert not any('"phase": "train"' in text for text in metrics)
    weights = [file for file in folder.rglob("*.safetensors") if file.parent.name not in {"bert", "llama", "t5"}]
    assert [*weights, *folder.rglob("checkpoints/*")] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_told_as_expected(
    fault: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for case in FAULTS[fault]:
        with place(case) as wanted:
            before = files(tmp_path)
            said = check(wanted, capsys)
            assert_findings(case, said["findings"], wanted["findings"])
            assert said["exit_code"] == wanted["exit_code"] != 0
            assert files(tmp_path) == before


# One a kind of exit, and those where nothing may be written.
@pytest.mark.parametrize("case", [TWELVE, UNFIT, "bad/B37_no_such_target", "bad/B42_output_outside_the_root"])
def test_train_ends_as_check_does_and_trains_no_step(
    case: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with place(case) as wanted:
        before = files(tmp_path)
        said = check(wanted, capsys)
        assert call("train", "recipe.yaml", *wanted["overrides"]) == wanted["exit_code"]
        told = [finding for finding in said["findings"] if finding["level"] == "error"]
        problems = [Problem(**{name: finding[name] for name in ("message", "key", "file", "line")}) for finding in told]
        lines = capsys.readouterr().err.splitlines()
        assert sorted(lines) == sorted(f"hf_finetune: error: {printable(str(problem))}" for problem in problems)
        assert_untrained(tmp_path)
        if any(finding["key"] == "output" for finding in told):
            assert files(tmp_path) == before


def test_what_is_odd_is_told_and_can_run(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for case in WARNED:
        if case not in HUGE:
            with place(case) as wanted:
                said = check(wanted, capsys)
                assert_findings(case, said["findings"], wanted["findings"])
                assert said["exit_code"] == wanted["exit_code"] == 0


@pytest.mark.slow
def test_a_text_of_megabytes_is_looked_at(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for case in HUGE:
        with place(case) as wanted:
            said = check(wanted, capsys)
            assert_findings(case, said["findings"], wanted["findings"])
            assert said["exit_code"] == 0


def test_an_unusual_recipe_passes_without_a_finding(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    found, usual = {}, [case for case in GOOD if case not in HUGE]
    for case in usual:
        with place(case) as wanted:
            said = check(wanted, capsys)
            found[case] = (said["exit_code"], said["findings"])
    assert found == dict.fromkeys(usual, (0, []))


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.partition("/")[2])
def test_an_unusual_recipe_trains(case: str, place: Place) -> None:
    with place(case) as wanted:
        assert call("train", "recipe.yaml", *wanted["overrides"], *wanted["train"], *QUICK) == 0
        assert '"phase": "train"' in Path("run/metrics.jsonl").read_text()


@pytest.mark.parametrize("case", [TWELVE, UNFIT])
def test_two_processes_tell_each_mistake_once(server: Server, case: str, place: Place) -> None:
    with place(case) as wanted:
        children = [server.start("recipe.yaml", env=os.environ | rank, cwd=Path.cwd()) for rank in ranks(2)]
        assert [child.wait() for child in children] == [wanted["exit_code"]] * 2
        lines = [line for child in children for line in child.output.splitlines()]
    told = [line for line in lines if line.startswith("hf_finetune: error: ")]
    assert len(told) == len(set(told)) == len(wanted["findings"]) == {TWELVE: 12, UNFIT: 7}[case]
    for finding in wanted["findings"]:
        says = [finding["says"]] if isinstance(finding["says"], str) else finding["says"]
        place_of = finding["file"] + (f":{finding['line']}" if finding["line"] else "")
        start = f"error: {place_of}: {finding['key']}: "
        assert len([line for line in told if start in line and all(text in line for text in says)]) == 1
