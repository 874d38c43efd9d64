"""Loading, splitting, encoding; the cache is in test_data_cache.py, streaming in test_data_streaming.py."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_finetune.data import encoding, prepare, sources
from hf_finetune.data.splits import SplitReport
from hf_finetune.device import Machine
from hf_finetune.errors import DataError, FinetuneError, Problem
from hf_finetune.recipe import Recipe

MACHINE = Machine("cpu", 0, 0, 1, 1, 1, "fp32", "sdpa")
CLASSES = {"kind": "text_classification", "text": "text", "label": "label"}
TEXTS = {"kind": "causal_lm", "text": "text"}
PAIRS = {"kind": "causal_lm", "prompt": "question", "completion": "answer"}
Prepare = Callable[..., prepare.Prepared]


@dataclasses.dataclass
class Found:
    """What the checks of the data find, by level."""

    errors: list[Problem] = dataclasses.field(default_factory=list)
    warnings: list[Problem] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, found: Iterable[tuple[str, Problem]]) -> Found:
        made = cls()
        for level, problem in found:
            (made.errors if level == "error" else made.warnings).append(problem)
        return made


def recipe(task: dict[str, Any], seed: int = 42, **block: Any) -> Recipe:
    steps = {"steps": 2} if block.get("streaming") else {"epochs": 1}
    return Recipe.model_validate(
        {
            "task": task,
            "model": {"name": "any"},
            "data": block,
            "adapter": {"kind": "lora"},
            "training": {"batch_size": 4, "learning_rate": 1e-3, "seed": seed, **steps},
            "output": "runs/any",
        }
    )


@pytest.fixture(scope="session")
def bert(tiny_bert: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture(scope="session")
def llama(tiny_llama: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def classify(bert: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Prepares classification data in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda task=CLASSES, **block: prepare.prepare(recipe(task, **block), bert, MACHINE)


@pytest.fixture
def model_texts(llama: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Prepares language modelling data in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda task=TEXTS, **block: prepare.prepare(recipe(task, **block), llama, MACHINE)


def bare(error: FinetuneError) -> str:
    """What an error says, without the recipe keys that name the splits."""
    return "\n".join(str(dataclasses.replace(problem, key="")) for problem in error.problems)


def write(name: str, *rows: str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))
    return name


def write_json(name: str, rows: list[dict[str, Any]]) -> str:
    return write(name, *(json.dumps(row) for row in rows))


def write_lengths(name: str, counts: range) -> str:
    """One row of so many words each; encoded, each is one token longer."""
    return write_json(name, [{"text": "film " * count} for count in counts])


def good(count: int, label: str = "good") -> list[dict[str, Any]]:
    return [{"text": f"the {'very ' * (index % 3)}film is {label}", "label": label} for index in range(count)]


def mixed(count: int) -> list[dict[str, Any]]:
    return good(count - count // 2) + good(count // 2, "bad")


# ---- formats


def test_tsv_is_read_without_quoting_and_csv_with(classify: Prepare) -> None:
    write("a.tsv", "text\tlabel", 'a "good" film\tyes', '" a bad film\tno')
    write("b.csv", "text,label", '"good, a film",yes', '"a ""bad"" film",no')
    prepared = classify(train="a.tsv", validation="b.csv")
    from_tsv = classify(train="a.tsv", validation="a.tsv").raw_validation
    assert from_tsv is not None
    assert prepared.raw_validation is not None
    assert from_tsv["text"][:] == ['a "good" film', '" a bad film']
    assert prepared.raw_validation["text"][:] == ["good, a film", 'a "bad" film']


def test_globs_lists_and_a_local_source(classify: Prepare) -> None:
    for name in ("b", "a", "c"):
        write_json(f"in/{name}.jsonl", [{"text": f"film {name} is good", "label": 0}, {"text": name, "label": 1}])
    everything = classify(train="in/*.jsonl")
    chosen = classify(train=["in/c.jsonl", "in/a.jsonl"], validation="in/[ab].jsonl")
    relative = classify(source="in", train="*.jsonl", validation=["c.jsonl", "a.jsonl"])
    assert everything.reports["train"].rows == 6
    assert chosen.raw_validation is not None
    assert relative.raw_validation is not None
    assert chosen.raw_validation["text"][1::2] == ["a", "b"]
    assert relative.raw_validation["text"][1::2] == ["c", "a"]


def test_brackets_in_a_name_are_no_pattern(classify: Prepare) -> None:
    write_json("run[1].jsonl", mixed(4))
    assert classify(train="run[1].jsonl").reports["train"].rows == 4


# ---- columns, labels, rows


def test_an_unfit_row_is_named_by_file_and_number(classify: Prepare) -> None:
    write_json("train.jsonl", mixed(8))
    write_json("dev.jsonl", [*mixed(150), {"text": "bad", "label": "poor"}])
    with pytest.raises(DataError, match=r"^dev.jsonl: data.validation: row 151: column 'label' holds 'poor', which is"):
        classify(train="train.jsonl", validation="dev.jsonl")


def test_an_unfit_label_is_named_by_its_number_before_the_cut(classify: Prepare) -> None:
    rows = mixed(40)
    rows[29]["label"] = None
    write_json("train.jsonl", rows)
    for seed in (1, 2):
        with pytest.raises(DataError, match=r"train.jsonl: data.train: row 30: column 'label' is null"):
            classify(train="train.jsonl", validation_share=0.2, seed=seed)


def test_validation_share_has_exact_counts_and_follows_the_seed(classify: Prepare) -> None:
    rows = [{"text": f"film {index} is good", "label": index % 2} for index in range(30)]
    write_json("train.jsonl", rows)
    first, again, other = (classify(train="train.jsonl", validation_share=0.25, seed=seed) for seed in (1, 1, 2))
    held = [prepared.raw_validation["text"][:] for prepared in (first, again, other) if prepared.raw_validation]
    assert len(held[0]) == 8
    assert held[0] == held[1] != held[2]
    assert first.reports["train"].rows == 22
    assert sorted(held[0], key=lambda text: int(text.split()[1])) == held[0]


def test_the_cut_off_rows_are_not_trained_on(model_texts: Prepare) -> None:
    write_lengths("train.jsonl", range(1, 15))
    prepared = model_texts(train="train.jsonl", validation_share=0.5)
    assert isinstance(prepared.train, datasets.Dataset)
    assert prepared.validation is not None
    trained, held = ({tuple(ids) for ids in split["input_ids"]} for split in (prepared.train, prepared.validation))
    assert len(trained) == len(held) == 7
    assert not trained & held


def test_limit_draws_from_every_split_by_seed(classify: Prepare) -> None:
    rows = [{"text": f"film {index} is good", "label": index % 2} for index in range(30)]
    write_json("train.jsonl", rows)
    first, again, other = (
        classify(train="train.jsonl", validation="train.jsonl", limit=10, seed=seed) for seed in (1, 1, 2)
    )
    drawn = [prepared.raw_validation["text"][:] for prepared in (first, again, other) if prepared.raw_validation]
    assert first.reports["train"].rows == first.reports["validation"].rows == 10
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != [row["text"] for row in rows[:10]]


def test_problems_of_all_splits_come_at_once(classify: Prepare) -> None:
    write("train.csv", "text,lable", "good film,a")
    write_json("test.jsonl", [*mixed(4), {"text": 7, "label": "good"}, {"text": "bad", "label": 0.5}])
    with pytest.raises(DataError) as error:
        classify(train="train.csv", validation="dev.jsonl", test="test.jsonl")
    assert [(problem.file, problem.key) for problem in error.value.problems] == [
        ("", "data.validation"),
        ("train.csv", "data.train"),
        ("test.jsonl", "data.test"),
        ("test.jsonl", "data.test"),
    ]


def test_labels_and_texts_are_complained_about_together(classify: Prepare) -> None:
    rows = {"text": ["good film", "bad film", "dull film"], "label": [1, None, 0]}
    datasets.Dataset.from_dict(rows).to_parquet("train.parquet")
    datasets.Dataset.from_dict({"text": [1, 2], "label": [1, 0]}).to_parquet("test.parquet")
    with pytest.raises(DataError) as error:
        classify(train="train.parquet", test="test.parquet")
    assert [problem.message.split(":")[0] for problem in error.value.problems] == ["row 2", "row 1, 2"]


def test_the_same_complaint_about_rows_of_several_batches_is_one(classify: Prepare) -> None:
    write_json("train.jsonl", mixed(4))
    write_json("dev.jsonl", [{"text": "film", "label": "poor" if row % 500 == 0 else "good"} for row in range(4000)])
    with pytest.raises(
        DataError, match=r"row 1, 501, 1001, 1501, 2001 and 3 more: column 'label' holds 'poor'"
    ) as error:
        classify(train="train.jsonl", validation="dev.jsonl")
    assert len(error.value.problems) == 1


def test_complaints_that_differ_are_told_up_to_a_limit(classify: Prepare) -> None:
    write_json("train.jsonl", mixed(4))
    write_json("dev.jsonl", [{"text": "film", "label": f"label {row}"} for row in range(3000)])
    with pytest.raises(DataError) as error:
        classify(train="train.jsonl", validation="dev.jsonl")
    assert len(error.value.problems) == 21
    assert error.value.problems[-1].message == "2,980 more problems of 2,980 more rows"


def test_a_file_that_changes_while_it_is_read_is_noticed(classify: Prepare) -> None:
    origins = sources.locate(recipe(CLASSES, train=write_json("train.jsonl", mixed(4))).data)
    stamps = origins.stamps()
    origins.check_unchanged(stamps)
    write_json("train.jsonl", mixed(6))
    with pytest.raises(DataError, match=r"train.jsonl: changed while it was read; wait until it is written"):
        origins.check_unchanged(stamps)


# ---- over-long rows


LONG = [{"text": "film " * count} for count in (3, 20, 5, 40)]


def test_truncated_rows_are_counted(model_texts: Prepare) -> None:
    write_json("train.jsonl", LONG)
    report = model_texts(train="train.jsonl", max_length=8).reports["train"]
    assert report == SplitReport(rows=4, kept=4, cut=2, tokens=4 + 8 + 6 + 8, trained=3 + 7 + 5 + 7, longest=41)


def test_dropped_rows_are_counted_and_leave_the_order(model_texts: Prepare) -> None:
    write_json("train.jsonl", LONG)
    prepared = model_texts(train="train.jsonl", test="train.jsonl", max_length=8, overlong="drop")
    assert prepared.reports["test"] == SplitReport(rows=4, kept=2, dropped=2, tokens=10, trained=8, longest=41)
    assert prepared.test is not None
    assert prepared.test["row"][:] == [0, 2]
    assert prepared.test["size"][:] == [4, 6]


def test_refused_rows_are_named(model_texts: Prepare) -> None:
    write_json("train.jsonl", LONG)
    with pytest.raises(DataError) as error:
        model_texts(train="train.jsonl", max_length=8, overlong="error")
    assert "2 of 4 train rows have more than 8 tokens (row 2, 4; longest 41)" in str(error.value)


def test_rows_without_a_trained_token_are_dropped_and_counted(model_texts: Prepare) -> None:
    write_json("train.jsonl", [{"question": "film " * count, "answer": "good"} for count in (1, 90, 2)])
    prepared = model_texts(PAIRS, train="train.jsonl", max_length=40)
    report = prepared.reports["train"]
    assert (report.rows, report.kept, report.untrained, report.cut) == (3, 2, 1, 0)
    assert isinstance(prepared.train, datasets.Dataset)
    assert prepared.train["row"][:] == [0, 2]


def test_a_split_of_which_no_row_is_left_is_refused(model_texts: Prepare) -> None:
    write_json("train.jsonl", [{"question": "film " * 90, "answer": "good"}] * 2)
    with pytest.raises(DataError, match=r"none of the 2 train rows can be used: 2 have nothing .*; raise data.max"):
        model_texts(PAIRS, train="train.jsonl", max_length=40)


# ---- mixes


def test_a_mix_follows_the_weights_until_one_source_is_used_up(model_texts: Prepare) -> None:
    write_json("a.jsonl", [{"text": "good film"}] * 300)
    write_json("b.jsonl", [{"text": "bad"}] * 300)
    parts = [{"train": "a.jsonl", "weight": 3.0}, {"train": "b.jsonl"}]
    train = model_texts(mix=parts).train
    assert isinstance(train, datasets.Dataset)
    lengths = train["size"][:]
    first, second = lengths.count(3), lengths.count(2)
    assert first == 300
    assert 2.3 < first / second < 4.0
    assert 2 in lengths[:20]


def test_rows_that_a_mix_never_draws_are_counted(model_texts: Prepare) -> None:
    write_json("a.jsonl", [{"text": "good film"}] * 10)
    write_json("b.jsonl", [{"text": "bad"}] * 300)
    prepared = model_texts(mix=[{"train": "a.jsonl"}, {"train": "b.jsonl"}], validation_share=0.2)
    counted = prepared.reports
    assert counted["train"].unused == 310 - counted["train"].rows - counted["validation"].rows > 250
    assert counted["validation"].unused == 0


def test_a_mix_widens_numbers_and_refuses_other_types(classify: Prepare) -> None:
    score = {**CLASSES, "problem": "regression"}
    write_json("whole.jsonl", [{"text": "good film", "label": 1}] * 8)
    write_json("parts.jsonl", [{"label": 0.5, "text": "bad"}] * 8)
    write_json("words.jsonl", [{"text": "bad", "label": "low"}] * 8)
    train = classify(score, mix=[{"train": "whole.jsonl"}, {"train": "parts.jsonl"}]).train
    assert isinstance(train, datasets.Dataset)
    assert set(train["labels"]) == {0.5, 1.0}
    with pytest.raises(DataError, match=r"words.jsonl: column 'label' is text, but integers in whole.jsonl"):
        classify(score, mix=[{"train": "whole.jsonl"}, {"train": "words.jsonl"}])


def test_an_unfit_row_of_a_mix_is_named_by_its_source(classify: Prepare) -> None:
    write_json("a.jsonl", mixed(40))
    write_json("b.jsonl", [*mixed(5), {"text": "bad", "label": ""}])
    with pytest.raises(DataError, match=r"^b.jsonl: data.mix.1.train: row 6: column 'label' is empty"):
        classify(mix=[{"train": "a.jsonl"}, {"train": "b.jsonl"}])


# ---- encoding


def test_processes_encode_the_same_rows_as_one(classify: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "FEW_ROWS", 20)
    write_json("train.jsonl", mixed(60))
    several = classify(train="train.jsonl", workers=2).train
    assert encoding.processes(60, 2) == 2
    monkeypatch.setattr(encoding, "FEW_ROWS", 100)
    one = classify(train="train.jsonl", cache="other").train
    assert isinstance(one, datasets.Dataset)
    assert isinstance(several, datasets.Dataset)
    assert one[:] == several[:]


def test_an_error_in_a_worker_process_reaches_the_user(classify: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "FEW_ROWS", 20)
    write_json("train.jsonl", mixed(150))
    write_json("dev.jsonl", [*mixed(150), *[{"text": "bad", "label": "poor"}] * 7])
    with pytest.raises(DataError, match=r"^dev.jsonl: data.validation: row 151, 152, 153, 154, 155 and 2 more: column"):
        classify(train="train.jsonl", validation="dev.jsonl", workers=2)


# ---- sources on the Hub (offline: only what is cached)


def test_a_source_that_is_neither_folder_nor_repository(classify: Prepare) -> None:
    with pytest.raises(DataError, match=r"data.source: 'nowhere' is no folder here, and no data set on the Hub"):
        classify(source="nowhere", train="train")


def test_an_unreachable_hub_is_said_with_what_to_do(classify: Prepare) -> None:
    with pytest.raises(DataError, match=r"owner/absent: data.source: .*connect, or download it and set data.source"):
        classify(source="owner/absent", train="train")


COMMIT = "0123456789" * 4


@pytest.fixture
def cached_on_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `datasets` leaves in its cache after it downloaded owner/kept at `COMMIT`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    write_json(str(tmp_path / "files/train.jsonl"), mixed(8))
    write_json(str(tmp_path / "files/test.jsonl"), mixed(4))
    files = {name: str(tmp_path / f"files/{name}.jsonl") for name in ("train", "test")}
    builder = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(tmp_path / "built"))
    builder.download_and_prepare()
    folder = tmp_path / "hub/owner___kept/default/0.0.0" / COMMIT
    folder.parent.mkdir(parents=True)
    Path(builder.cache_dir).rename(folder)
    for file in folder.glob("json-*.arrow"):
        file.rename(folder / file.name.replace("json-", "kept-"))
    info = (folder / "dataset_info.json").read_text()
    facts = json.loads(info) | {"config_name": "default", "dataset_name": "kept"}
    (folder / "dataset_info.json").write_text(json.dumps(facts))


@pytest.mark.usefixtures("cached_on_hub")
def test_a_cached_hub_data_set_is_read_offline(classify: Prepare) -> None:
    prepared = classify(source="owner/kept", revision=COMMIT, train="train", test="test")
    assert (prepared.reports["train"].rows, prepared.reports["test"].rows) == (8, 4)


@pytest.mark.usefixtures("cached_on_hub")
def test_an_unknown_split_lists_the_splits(classify: Prepare) -> None:
    with pytest.raises(DataError, match="unknown split 'tset'; did you mean 'test'"):
        classify(source="owner/kept", train="train", test="tset")


@pytest.mark.usefixtures("cached_on_hub")
def test_another_commit_than_the_pinned_one_is_refused(classify: Prepare) -> None:
    with pytest.raises(DataError, match=f"only commit {COMMIT} is cached, the recipe pins a{{40}}"):
        classify(source="owner/kept", revision="a" * 40, train="train")
