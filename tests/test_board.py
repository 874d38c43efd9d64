"""What TensorBoard's own reader finds in the events of real runs, and what happens where they can't be written."""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board_runs import Told, events_of, shown, texts
from models import machine, recipe
from PIL import Image
from scipy import special
from sklearn import metrics as sk
from tensorboard.plugins.hparams import metadata
from tensorboardX.record_writer import register_writer_factory

from hf_finetune.cli import verbs
from hf_finetune.config.blocks import Tracking
from hf_finetune.errors import RecipeError, StorageError
from hf_finetune.pipeline.check import look
from hf_finetune.pipeline.check import read as read_recipe
from hf_finetune.recipe import Recipe
from hf_finetune.run.folder import RunFolder
from hf_finetune.run.journal import read
from hf_finetune.run.status import Status
from hf_finetune.tracking import events, predictions, records, tensorboard
from hf_finetune.tracking.events import EventWriter, place
from hf_finetune.tracking.logdir import LogDir, check
from hf_finetune.tracking.records import Record
from hf_finetune.tracking.tensorboard import MARGIN, TELLING, cell, metric_tag, rebuild, table
from hf_finetune.tracking.tracker import Tracker

killing = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


TOP = {"train/loss", "eval/accuracy"}


def newest(folder: Path, kind: str) -> Record:
    return list(records.stored(folder / "observations", kind))[-1]


# ---- a classifier ----


def test_every_line_is_there_once_at_its_time(classifier: Path) -> None:
    events = events_of(classifier)
    lines = read(classifier / "metrics.jsonl")
    for phase, metric in (("train", "loss"), ("train", "seconds_step"), ("eval", "accuracy"), ("eval", "ece")):
        expected = [(line["step"], line["time"], line[metric]) for line in lines if line["phase"] == phase]
        tag = place(f"{phase}/{metric}", TOP)
        seen = [(event.step, event.wall_time, event.value) for event in events.Scalars(tag)]
        assert seen == pytest.approx(np.array(expected))
        assert len(seen) > 1


def test_the_first_page_has_loss_scores_and_rates_and_nothing_else(classifier: Path, chatter: Path) -> None:
    shown = {"train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"}
    for folder, scores in (
        (classifier, ("accuracy", "f1_macro", "matthews")),
        (chatter, ("perplexity", "token_accuracy")),
    ):
        tags = events_of(folder).Tags()
        cards = {*tags["scalars"], *tags["images"], *tags["histograms"]}
        assert {tag for tag in cards if not tag.startswith("zoom_")} == shown | {f"eval/{name}" for name in scores}
        # TensorBoard sorts groups by name and opens the first two.
        assert sorted({tag.partition("/")[0] for tag in cards})[:2] == ["eval", "train"]
        assert len(cards) > 50


def test_metrics_of_classes_fold_by_metric(classifier: Path) -> None:
    line = [line for line in read(classifier / "metrics.jsonl") if line["phase"] == "eval"][-1]
    names = [key.removeprefix("f1.") for key in line if key.startswith("f1.")]
    assert names
    for name in names:
        event = events_of(classifier).Scalars(f"zoom_eval_per_class/f1/{name}")[-1]
        assert (event.step, event.value) == (line["step"], pytest.approx(line[f"f1.{name}"]))


def test_pr_curves_are_those_of_scikit_learn(classifier: Path) -> None:
    record = newest(classifier, "predictions")
    rows, names = record.arrays["rows"], record.facts["names"]
    probabilities = special.softmax(rows[:, :-1].astype(float), axis=1)
    for index, name in enumerate(names):
        drawn = events_of(classifier).Tensors(f"eval_precision_recall/{name}")[-1]
        assert drawn.step == record.step
        curve = np.array(drawn.tensor_proto.float_val).reshape(6, -1)
        assert (curve[5, -1], curve[4, -1]) == (0.0, 1.0), "no row is that sure: nothing is found, and nothing wrong"
        hits = rows[:, -1] == index
        thresholds = np.arange(curve.shape[1]) / (curve.shape[1] - 1)
        for threshold, precision, recall in zip(thresholds[:-1:9], curve[4, :-1:9], curve[5, :-1:9], strict=True):
            chosen = probabilities[:, index] >= threshold
            assert precision == pytest.approx(sk.precision_score(hits, chosen, zero_division=1), abs=1e-6)
            assert recall == pytest.approx(sk.recall_score(hits, chosen), abs=1e-6)


def test_images_are_pictures(classifier: Path) -> None:
    for tag in ("zoom_eval/confusion_matrix", "zoom_eval/reliability"):
        drawn = events_of(classifier).Images(tag)
        steps = [line["step"] for line in read(classifier / "metrics.jsonl") if line["phase"] == "eval"]
        assert [image.step for image in drawn] == steps
        assert all(image.encoded_image_string.startswith(b"\x89PNG") and image.width == 350 for image in drawn)


def test_histograms_hold_every_value(classifier: Path) -> None:
    record = newest(classifier, "predictions")
    logits = record.arrays["rows"][:, 1]
    drawn = events_of(classifier).Histograms(f"zoom_eval_logits/{record.facts['names'][1]}")[-1].histogram_value
    assert (drawn.num, drawn.min, drawn.max) == pytest.approx((len(logits), logits.min(), logits.max()))
    sure = special.softmax(record.arrays["rows"][:, :-1].astype(float), axis=1).max(axis=1)
    right = events_of(classifier).Histograms("zoom_eval_confidence/right")[-1].histogram_value
    assert right.num == (record.arrays["rows"][:, :-1].argmax(1) == record.arrays["rows"][:, -1]).sum()
    assert right.max <= sure.max() + 1e-6


@pytest.mark.parametrize(
    "values", [[0.999999999999996, 1.0], [1.0, 1.0], [0.0, 5e-324], [1e300, 1e300], [-1e308, 1e308]]
)
def test_a_histogram_of_values_that_hardly_differ_or_hardly_fit_ends_nothing(
    values: list[float], tmp_path: Path
) -> None:
    writer = EventWriter(LogDir(str(tmp_path / "tensorboard")), pytest.fail)
    tensorboard.add_values(writer, "confidence", np.array(values))
    tensorboard.add_values(writer, "usual", np.array([1.0, 2.0]))
    writer.close()
    drawn = events_of(tmp_path)
    for tag in drawn.Tags()["histograms"]:
        assert drawn.Histograms(tag)[0].histogram_value.num == 2


def test_what_cannot_be_drawn_costs_one_warning(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(writer: EventWriter, record: Record) -> None:
        raise ValueError("too odd")

    monkeypatch.setitem(tensorboard.DRAWN, "predictions", fail)
    rebuild(RunFolder(str(shutil.copytree(classifier, tmp_path / "run"))))
    assert capsys.readouterr().err.count("too odd") == 1


def test_weights_have_histograms_and_numbers(classifier: Path) -> None:
    record = newest(classifier, "weights")
    drawn = events_of(classifier)
    assert {"weights", "gradients"} <= {tag.partition("/")[0] for tag in record.facts["tags"]}
    for tag, counts in zip(record.facts["tags"], record.arrays["counts"], strict=True):
        found = drawn.Histograms(f"zoom_{tag}")[-1]
        assert (found.step, found.histogram_value.num) == (record.step, counts.sum())
    for tag, value in record.facts["scalars"].items():
        assert drawn.Scalars(f"zoom_{tag}")[-1].value == pytest.approx(value)
    assert {"update_to_weight", "norm_b"} <= {tag.partition("/")[0] for tag in record.facts["scalars"]}


def test_data_have_lengths_and_labels(classifier: Path) -> None:
    record = newest(classifier, "data")
    drawn = events_of(classifier)
    for split in ("train", "validation"):
        lengths = drawn.Histograms(f"zoom_data_lengths/{split}")[0].histogram_value
        assert lengths.num == record.arrays[f"lengths.{split}"].sum()
        counts = list(record.facts["labels"][split].values())
        assert drawn.Histograms(f"zoom_data_labels/{split}")[0].histogram_value.bucket[1:] == counts


def test_texts_are_there(classifier: Path) -> None:
    assert "kind: text_classification" in texts(classifier, "recipe")[0]
    assert "torch" in texts(classifier, "environment")[0]
    worst = newest(classifier, "examples").facts["rows"]
    assert texts(classifier, "eval/most_wrong")[-1].count("\n") == (1 + len(worst) if worst else 0)


def test_embeddings_are_in_the_projector(classifier: Path) -> None:
    record = newest(classifier, "embeddings")
    board, name = classifier / "tensorboard", f"{record.phase}:{record.step:05}"
    listed = (board / "projector_config.pbtxt").read_text()
    assert re.findall(r'tensor_name: "(.*)"', listed) == [name]
    folder = board / re.findall(r'tensor_path: "(.*)"', listed)[0]
    vectors = np.loadtxt(folder, delimiter="\t")
    assert vectors == pytest.approx(record.arrays["vectors"].astype(float), rel=1e-3)
    metadata = folder.with_name("metadata.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in metadata] == ["label", *record.facts["labels"]]
    # A square for each point, of the colour of its label: the projector opens without colours of its own.
    sprites = np.asarray(Image.open(folder.with_name("sprites.png")).convert("RGB"))[8::16, 8::16].reshape(-1, 3)
    assert re.findall(r"single_image_dim: (\d+)", listed) == ["16", "16"]
    pairs = {(label, tuple(shade)) for label, shade in zip(record.facts["labels"], sprites.tolist(), strict=False)}
    assert len(pairs) == len({label for label, _ in pairs}) == len({shade for _, shade in pairs}) == 2


def test_the_session_has_keys_metrics_and_a_good_end(classifier: Path) -> None:
    found = events_of(classifier).PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(found["_hparams_/session_start_info"])
    assert start.hparams["training.learning_rate"].number_value == 3e-3
    assert start.hparams["adapter.kind"].string_value == "lora"
    end = metadata.parse_session_end_info_plugin_data(found["_hparams_/session_end_info"])
    assert end.status == 1  # success
    experiment = metadata.parse_experiment_plugin_data(found["_hparams_/experiment"])
    # The tab shows these first, and five of them until somebody chooses.
    assert {info.name for info in experiment.hparam_infos if info.differs} == TELLING
    assert [info.display_name for info in experiment.metric_infos][:2] == ["loss", "accuracy"]
    tags = [info.name.tag for info in experiment.metric_infos]
    scalars = events_of(classifier).Tags()["scalars"]
    assert tags[0] == "zoom_final/loss"
    assert {"zoom_final/accuracy", "zoom_summary/seconds"} <= {tag for tag in tags if tag in scalars}


def test_charts_show_train_and_validation_together(classifier: Path) -> None:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    text = events_of(classifier).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = Layout.FromString(text)
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    tags = events_of(classifier).Tags()["scalars"]
    shared = list(charts["loss (train, validation)"].multiline.tag)
    assert [tag for tag in tags if any(re.match(pattern, tag) for pattern in shared)] == [
        "train/loss", "eval/loss", "zoom_final/loss"
    ]  # fmt: skip
    margin = charts["loss on validation, 95 % interval"].margin.series[0]
    assert {margin.value, margin.lower, margin.upper} <= set(tags)


def test_the_interval_is_around_the_loss(classifier: Path) -> None:
    drawn = events_of(classifier)
    margin = [f"zoom_{tag}" for tag in MARGIN]
    for tag in margin:
        assert len(drawn.Scalars(tag)) == len(drawn.Scalars("eval/loss"))
    middle = [event.value for event in drawn.Scalars(margin[0])]
    assert middle == pytest.approx([event.value for event in drawn.Scalars("eval/loss")], rel=1e-5)
    assert all(low.value < value for low, value in zip(drawn.Scalars(margin[1]), middle, strict=True))


def test_equal_weights_give_the_interval_of_a_mean() -> None:
    losses = np.random.default_rng(0).gamma(2.0, size=400)
    mean, lower, upper = tensorboard.interval(losses, np.ones(400)) or (0.0, 0.0, 0.0)
    assert mean == pytest.approx(losses.mean())
    assert (upper - lower) / 2 == pytest.approx(1.959964 * losses.std(ddof=1) / 20)
    assert tensorboard.interval(losses[:1], np.ones(1)) is None


# ---- a language model ----


def test_tokens_have_colours(chatter: Path) -> None:
    row = newest(chatter, "tokens").facts["rows"][0]
    drawn = events_of(chatter)
    assert drawn.Images("zoom_eval_tokens/example_1")[-1].step == newest(chatter, "tokens").step
    text = texts(chatter, "eval_tokens/example_1")[-1].split("\n\n")[1]
    assert len(re.findall("[🟩🟨🟧🟥]", text)) == sum(loss is not None for loss in row["losses"]) > 0


def test_a_language_model_has_loss_by_position_and_entropy(chatter: Path) -> None:
    assert events_of(chatter).Images("zoom_eval/loss_by_position")
    assert {"zoom_eval/example_entropy", "eval/perplexity"} <= set(events_of(chatter).Tags()["scalars"])
    losses, tokens = predictions.of(newest(chatter, "predictions")).losses()
    line = [line for line in read(chatter / "metrics.jsonl") if line["phase"] == "eval"][-1]
    assert float((losses * tokens).sum() / tokens.sum()) == pytest.approx(line["loss"], rel=1e-5)


def test_answers_are_a_table_at_each_evaluation(chatter: Path) -> None:
    lines = [json.loads(line) for line in (chatter / "samples.jsonl").read_text().splitlines()]
    steps = sorted({line["step"] for line in lines})
    assert [event.step for event in events_of(chatter).Tensors("samples/text_summary")] == steps
    assert texts(chatter, "samples")[-1].count("\n| ") == 1 + len(lines) // len(steps)
    assert texts(chatter, "samples")[0].startswith("| prompt | reference | answer | end |\n")
    assert all(re.fullmatch(r"\w+ equals \w+ \.", line["reference"]) for line in lines)


def test_answers_stand_beside_those_of_the_base_model(chatter: Path, tmp_path: Path) -> None:
    folder = RunFolder(str(shutil.copytree(chatter, tmp_path / "run")))
    lines = folder.samples.read_text().splitlines(keepends=True)
    untrained = [json.dumps({**json.loads(line), "step": 0, "answer": "from the base"}) + "\n" for line in lines[:2]]
    folder.samples.write_text("".join([*untrained, *lines]))
    rebuild(folder)
    shown = texts(folder.path, "samples")
    assert shown[0].startswith("| prompt | reference | answer | end |\n")
    for text in shown[1:]:
        assert text.startswith("| prompt | reference | base model | answer | end |\n")
        assert text.count("from the base") == 2


# ---- again, and again ----


@pytest.mark.parametrize("kind", ["classifier", "chatter"])
def test_what_is_made_again_is_the_same(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    before, files = shown(folder), {path.name for path in (folder / "tensorboard").iterdir()}
    written = rebuild(RunFolder(str(folder)))
    assert shown(folder) == before
    assert written > 50
    events = [name for name in files if "tfevents" in name]
    assert len(events) == 1
    assert not {path.name for path in (folder / "tensorboard").iterdir()} & set(events)
    assert not list(folder.glob(".tensorboard*"))


def test_no_name_of_a_host_is_in_a_file_name(classifier: Path) -> None:
    names = [path.name for path in (classifier / "tensorboard").glob("*tfevents*")]
    assert re.fullmatch(r"events\.out\.tfevents\.\d{10}\.\d{3}", names[0])


def test_a_run_that_goes_on_is_left_alone(run: Callable[..., Any]) -> None:
    done = run("training.steps=2", "tracking.tensorboard=false")
    assert not (done.folder / "tensorboard").exists()
    holder = RunFolder(str(done.folder))
    holder.hold(holder.path)
    with pytest.raises(RecipeError, match="belongs to a run that is going on"):
        rebuild(RunFolder(str(done.folder)))
    holder.release()
    verbs.run_tensorboard(argparse.Namespace(run_folder=str(done.folder), rebuild=True, port=None, host=None))
    assert len(events_of(done.folder).Scalars("train/loss")) == len(done.lines("train"))


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(RecipeError, match="is not a run folder"):
            verbs.run_tensorboard(argparse.Namespace(run_folder=str(folder), rebuild=True, port=None, host=None))
    with pytest.raises(RecipeError, match="is not a folder; name a run"):
        verbs.run_tensorboard(
            argparse.Namespace(run_folder=str(tmp_path / "none"), rebuild=False, port=None, host=None)
        )


@pytest.mark.parametrize(("is_stopped", "expected"), [(False, 2), (True, 0)], ids=["failure", "unknown"])
def test_a_run_that_goes_on_shows_nothing_twice_and_nothing_later(
    is_stopped: bool, expected: int, classifier: Path, tmp_path: Path
) -> None:
    shutil.copytree(classifier, tmp_path / "run")
    folder = RunFolder(str(tmp_path / "run"))
    lines = [line for line in read(folder.metrics) if line["step"] <= 5]
    tracker = Tracker(Recipe.load(str(folder.recipe)), folder, Status(folder.status), machine())
    tracker.start({"metrics.jsonl": len(lines)}, 5)
    tracker.close(is_stopped=is_stopped)
    drawn = events_of(folder.path)
    assert [event.step for event in drawn.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert {image.step for image in drawn.Images("zoom_eval/confusion_matrix")} == {5}
    assert [event.step for event in drawn.Tensors("environment/text_summary")] == [0, 5]
    assert not (folder.tensorboard / "projector_config.pbtxt").exists()
    assert len(list(folder.tensorboard.glob("*tfevents*"))) == 1
    end = metadata.parse_session_end_info_plugin_data(drawn.PluginTagToContent("hparams")["_hparams_/session_end_info"])
    assert end.status == expected  # closed before its end: a failure, unless it was stopped and can be resumed


def test_events_in_an_object_store_hide_those_of_an_earlier_process(tmp_path: Path) -> None:
    register_writer_factory("stub", Stub(tmp_path / "tensorboard"))
    for steps in (4, 3):
        store = EventWriter(LogDir("stub://bucket/logs", "run"), pytest.fail)
        for step in range(steps):
            store.add_scalar("a", steps, step, 1.0)
        store.add_file("projector_config.pbtxt", b"x")
        store.close()
    assert [(event.step, event.value) for event in events_of(tmp_path).Scalars("a")] == [(0, 3), (1, 3), (2, 3)]
    # They are named by the second.
    assert sum("tfevents" in path.name for path in (tmp_path / "tensorboard").iterdir()) in (1, 2)


class Stub:
    """An object store, as tensorboardX is told of one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir()

    def open(self, path: str) -> Any:
        assert path.startswith("stub://bucket/logs/")
        return (self.folder / Path(path).name).open("wb")


# ---- what can't be written ----


def test_addresses_are_checked_before_training(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tracking\.folder: tensorboardX does not write to hdfs://"):
        check("hdfs://cluster/logs")
    with pytest.raises(RecipeError, match=r"tracking\.folder: gs:// needs google-cloud-storage; pip install"):
        check("gs://bucket/logs")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"tracking\.folder: .* can't be written"):
        check(str(tmp_path / "file" / "logs"))
    refused = recipe("tiny", {"kind": "lora", "r": 4}).model_copy(update={"tracking": Tracking(folder="hdfs://a")})
    assert look(read_recipe(refused)[0], folder=False).blame("tracking.folder")
    check(str(tmp_path / "logs"))
    assert not (tmp_path / "logs").exists()


@killing
def test_a_dead_thread_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    events = EventWriter(LogDir(str(tmp_path)), told.append)
    events.add_scalar("a", 1.0, 1)
    kill(events._thread)
    for step in range(20_000):
        events.add_scalar("a", 1.0, step)
    events.close()
    assert len(told) == 1
    assert "its thread has died: events are lost, training goes on" in told[0]
    assert events.lost == 20_000


def kill(thread: threading.Thread) -> None:
    """End a thread from within."""
    while thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        thread.join(0.05)


def writers() -> list[threading.Thread]:
    """The threads of all boards; tests before this one may have left some, and one that only begins is not alive."""
    return [thread for thread in threading.enumerate() if thread.name == "tensorboard" and thread.is_alive()]


def kill_the_next_writer(but: list[threading.Thread]) -> None:
    """Wait for the thread of a new board and end it."""
    while not (found := [thread for thread in writers() if thread not in but]):
        time.sleep(0.01)
    kill(found[0])


def test_a_folder_that_cannot_be_made_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told: list[str] = []
    events = EventWriter(LogDir(str(tmp_path / "file")), told.append)
    for step in range(100):
        events.add_scalar("a", 1.0, step)
    events.close()
    assert len(told) == 1
    assert "can't be written" in told[0]


def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "CLOSE_SECONDS", 0.2)
    told = Told()
    stuck = EventWriter(LogDir(str(tmp_path / "pipe")), told.append)
    (tmp_path / "pipe").mkdir()
    stuck.place.new_file = told.pipe(tmp_path)  # type: ignore[method-assign]
    with told.within(seconds=8.0):
        for step in range(events.QUEUE + 100):
            stuck.add_scalar("a", 1.0, step)
        stuck.close()
    assert len(told) == 1
    assert "answers too slowly" in told[0]
    assert 0 < stuck.lost <= 100
    told.read(tmp_path)
    stuck._thread.join(20)
    assert not stuck._thread.is_alive()


@killing
def test_a_run_whose_writer_dies_completes(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "events.out.tfevents.1.other").write_bytes(b"")
    killer = threading.Thread(target=kill_the_next_writer, args=(writers(),), daemon=True)
    killer.start()
    done = run("training.steps=3", f"tracking.folder={logs}")
    killer.join(30)
    assert done.status["state"] == "done"
    assert not (done.folder / "tensorboard").exists()
    assert capsys.readouterr().err.count("its thread has died: events are lost, training goes on") == 1
    rebuild(RunFolder(str(done.folder)))
    names = sorted(path.name for path in logs.glob("events*"))
    assert names[0] == "events.out.tfevents.1.other"
    assert re.fullmatch(r"events\.out\.tfevents\.[\d.]+\.run", names[1])
    assert len(names) == 2


# ---- small parts ----


def test_texts_from_data_are_no_markup() -> None:
    from markdown import markdown  # type: ignore[import-untyped]
    from tensorboard.plugin_util import markdown_to_safe_html

    evil = "<script>x</script> *a* _b_ `c` [d](javascript:e) ![f](http://g) | # h\n~~~\n\x1b[31m\u202e"
    html = markdown_to_safe_html(table(["text"], [[evil]]))
    assert not re.findall(r"<(script|em|strong|code|a|img|h1)\b", html)
    assert html.count("<td>") == 1
    assert "\x1b" not in html
    assert "<script>x</script> *a* _b_ `c` [d](javascript:e)" in unescape(html)
    assert markdown(cell("a_b*c*")) == "<p>a&#95;b&#42;c&#42;</p>"


def test_labels_stay_apart_in_tags() -> None:
    labels = ["a b", "a_b", "a\nb", "a\tb", "x" * 90 + "1", "x" * 90 + "2", "", " ", "a/b"]
    found = {metric_tag("eval", f"f1.{label}") for label in labels if label}
    assert len(found) == len(labels) - 1
    assert metric_tag("eval", "accuracy") == "eval/accuracy"
    assert metric_tag("eval", "f1.a.b") == "eval_per_class/f1/a.b"


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_rows_without_a_label_are_left_out(problem: str, tmp_path: Path) -> None:
    width = {"single_label": 4, "multi_label": 6, "regression": 2}[problem]
    rows = np.random.default_rng(1).random((20, width)).round().astype(np.float32)
    rows[:5, -1] = np.nan if problem == "regression" else -100
    facts = {"task": "text_classification", "problem": problem, "names": ["a", "b", "c"]}
    writer = EventWriter(LogDir(str(tmp_path / "tensorboard")), pytest.fail)
    tensorboard.draw_predictions(writer, Record("predictions", "eval", 1, {"rows": rows}, facts))
    tensorboard.add_values(writer, "nothing", np.array([np.nan, np.inf]))
    tensorboard.add_counts(writer, "nothing", np.zeros(3), np.arange(4))
    writer.close()
    drawn = events_of(tmp_path).Tags()
    assert MARGIN[0] in drawn["scalars"]
    assert "nothing" not in drawn["histograms"]
    if problem != "regression":
        assert len(predictions.probabilities(rows, 3)[0]) == 15


def test_keys_of_a_recipe_are_what_the_tab_takes() -> None:
    found = tensorboard.hyperparameters(recipe("tiny", {"kind": "lora", "r": 4, "target_modules": ["a", "b"]}))
    assert found["adapter.target_modules"] == "[a, b]"
    assert found["data.packing"] is False
    assert not any(value is None for value in found.values())
