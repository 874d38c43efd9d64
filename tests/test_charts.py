"""Charts: what is drawn, read back from the figures; the same bytes every time."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from sklearn.metrics import average_precision_score, confusion_matrix

from hf_finetune.tasks._metrics import calibration
from hf_finetune.tracking import charts, figures, predictions

Array = np.ndarray[Any, Any]
HOSTILE = "<b>$x^2$&\u202e"


def rows(count: int, classes: int, seed: int = 0) -> Array:
    """Logits, then the label's id."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, count)
    logits = draw.normal(size=(count, classes))
    logits[np.arange(count), labels] += 1.5
    return np.column_stack([logits, labels]).astype(np.float32)


def names(count: int) -> list[str]:
    return [f"class {index}" for index in range(count)]


def lines(steps: int = 100) -> list[dict[str, Any]]:
    """Of metrics.jsonl: a step each, an evaluation every ten."""
    train = [
        {"step": step, "phase": "train", "loss": 1 / step, "learning_rate": 1e-3 / step, "grad_norm": 2.0}
        | {f"seconds_{part}": 0.1 for part in ("data", "forward", "backward", "optimizer")}
        for step in range(1, steps + 1)
    ]
    return train + [{"step": step, "phase": "eval", "loss": 2 / step} for step in range(10, steps + 1, 10)]


POSITIONS = {"edges": np.array([0, 4, 8, 12]), "loss": np.array([2.0, 1.0, 0.0]), "tokens": np.array([8, 4, 0])}
TOKENS = [{"tokens": ["the", " film", "\n", "!"], "losses": [None, 6.0, float("nan"), 3.0]}]
DRAWN: dict[str, Callable[[], Any]] = {
    "confusion": lambda: predictions.confusion(rows(200, 4), names(4)),
    "reliability": lambda: predictions.reliability(rows(200, 4)),
    "precision_recall": lambda: predictions.precision_recall(rows(200, 4), names(4)),
    "predicted": lambda: predictions.predicted(np.array([[1.0, 2.0], [3.0, np.nan], [0.5, 0.0]])),
    "positions": lambda: charts.positions(POSITIONS),
    "tokens": lambda: charts.tokens(TOKENS),
    "curves": lambda: charts.curves(lines(), ["loss"]),
    "seconds": lambda: charts.seconds(lines()),
    "modules": lambda: charts.modules({"norm_b/a": 1.0, "norm_b/b": 2.0, "other/c": 9.0}, "norm_b"),
}


def axes_of(figure: Any) -> Any:
    """Of a figure; untyped, as what they hold is looked at."""
    return figure.axes


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_same_numbers_make_the_same_bytes() -> None:
    for name in ("confusion", "tokens"):
        assert figures.png(DRAWN[name]()) == figures.png(DRAWN[name]())
        assert figures.svg(DRAWN[name](), name) == figures.svg(DRAWN[name](), name)


def test_a_chart_is_an_element_in_the_colours_of_the_page() -> None:
    for name in DRAWN:
        image, drawn = figures.both(DRAWN[name](), name, 'a "chart" <of it>')
        root = ElementTree.fromstring(drawn)
        assert root.attrib["aria-label"] == 'a "chart" <of it>'
        assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) == set(), "every colour is one of the page's"
        assert set(re.findall(r' id="([^"]*)"', drawn)) == {
            i for i in re.findall(r' id="([^"]*)"', drawn) if i.startswith(f"{name}-")
        }
        assert image.startswith(b"\x89PNG")
        assert int.from_bytes(image[16:20]) >= 900, "readable at 900 pixels"


def test_names_are_no_markup_and_no_formulas() -> None:
    drawn = figures.svg(predictions.confusion(rows(50, 2), [HOSTILE, "電影"]))
    assert "<b>" not in drawn
    assert "&lt;b&gt;$x^2$&amp;\\u202e" in drawn


def test_confusion_holds_counts_and_shares_of_the_true_class() -> None:
    made = rows(300, 4)
    axes = axes_of(predictions.confusion(made, names(4)))[0]
    counts = confusion_matrix(made[:, -1], made[:, :-1].argmax(axis=1))
    shares = axes.collections[0].get_array().reshape(4, 4)
    assert np.asarray(shares) == pytest.approx(counts / counts.sum(axis=1, keepdims=True))
    assert texts(axes) == [f"{count:,}" for count in counts.ravel() if count]


def test_masked_rows_are_in_no_chart() -> None:
    made = rows(20, 2)
    made[:5, -1] = -100
    shown = axes_of(predictions.confusion(made, names(2)))[0]
    assert sum(int(text) for text in texts(shown)) == 15
    assert calibration(made).counts.sum() == 15


def test_of_many_classes_the_most_confused_are_drawn() -> None:
    labels = np.arange(40).repeat(3)
    guessed = np.where(labels == 37, 2, labels)
    made = np.column_stack([np.eye(40)[guessed], labels])
    axes = axes_of(predictions.confusion(made, names(40)))[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert len(shown) == 30
    assert {"class 2", "class 37"} <= set(shown)
    assert axes.get_title().startswith("the 30 most confused of 40 classes")


def test_ece_equals_a_value_computed_by_hand() -> None:
    # Confidences 0.6, 0.6, 0.9, 0.9; right: yes, no, yes, yes. Bins of 0.2: |0.5 - 0.6| / 2 + |1 - 0.9| / 2
    sure = np.array([0.6, 0.6, 0.9, 0.9])
    logits = np.column_stack([np.log(sure), np.log(1 - sure)])
    labels = np.array([0, 1, 0, 0])
    assert calibration(np.column_stack([logits, labels]), bins=5).error == pytest.approx(0.1)


def test_a_bin_has_its_upper_end_and_not_its_lower_one() -> None:
    half = np.array([[0.0, 0.0, 0.0]])  # confidence 0.5
    assert calibration(half, bins=2).counts.tolist() == [1, 0]


def test_ece_of_a_calibrated_classifier_is_near_0() -> None:
    draw = np.random.default_rng(3)
    logits = draw.normal(size=(50_000, 3)) * 2
    labels = (draw.gumbel(size=logits.shape) + logits).argmax(axis=1)
    assert calibration(np.column_stack([logits, labels])).error < 0.01


def test_ece_without_rows_is_nan() -> None:
    assert np.isnan(calibration(np.empty((0, 3))).error)


def test_reliability_draws_the_bins_and_says_the_error() -> None:
    made = rows(500, 3)
    upper, lower = axes_of(predictions.reliability(made))
    found = calibration(made)
    assert [bar.get_height() for bar in upper.patches] == pytest.approx(found.accuracy[found.counts > 0].tolist())
    assert [bar.get_height() for bar in lower.patches] == found.counts.tolist()
    assert upper.get_title() == f"expected calibration error {calibration(made).error:.4f} (15 bins)"


def test_each_class_has_its_precision_recall_curve() -> None:
    made = rows(400, 3)
    axes = axes_of(predictions.precision_recall(made, names(3)))[0]
    told = [line.get_label() for line in axes.lines]
    expected = [average_precision_score(made[:, -1] == index, _shares(made)[:, index]) for index in range(3)]
    assert told == [f"class {index}  AP {value:.3f}" for index, value in enumerate(expected)]


def _shares(made: Array) -> Array:
    powers = np.exp(made[:, :-1].astype(np.float64))
    shares: Array = powers / powers.sum(axis=1, keepdims=True)
    return shares


def test_labels_that_go_together_have_curves_too() -> None:
    made = np.column_stack([rows(60, 3)[:, :3], np.random.default_rng(0).integers(0, 2, (60, 3))])
    made[:, 5] = 0
    assert len(axes_of(predictions.precision_recall(made, names(3)))[0].lines) == 2, (
        "without a positive row there is none"
    )


def test_predictions_are_drawn_against_the_truth() -> None:
    dots = DRAWN["predicted"]().axes[0].lines[-1]
    assert dots.get_xydata().tolist() == [[2.0, 1.0], [0.0, 0.5]]


def test_positions_without_tokens_have_no_loss() -> None:
    upper, lower = axes_of(charts.positions(POSITIONS))
    assert upper.patches[0].get_data().values.tolist()[:2] == [2.0, 1.0]
    assert np.isnan(upper.patches[0].get_data().values[2])
    assert lower.patches[0].get_data().values.tolist() == [8, 4, 0]


def test_tokens_are_coloured_by_loss() -> None:
    axes = axes_of(charts.tokens(TOKENS))[0]
    assert texts(axes) == ["the", "▁film", "\\n", "!"]
    strong, weak = (patch.get_alpha() for patch in axes.patches)
    assert strong == 2 * weak > 0


def test_a_long_text_is_drawn_in_part() -> None:
    axes = axes_of(charts.tokens([{"tokens": ["word "] * 900, "losses": [1.0] * 900}]))[0]
    assert len(axes.texts) == 400
    assert axes.get_title().endswith("the first 400 tokens")


def test_training_and_evaluation_share_a_chart() -> None:
    axes = axes_of(charts.curves(lines(20), ["loss"]))[0]
    train, evaluated = axes.lines
    assert (train.get_label(), evaluated.get_label()) == ("train", "eval")
    assert evaluated.get_xydata().tolist() == [[10, 0.2], [20, 0.1]]


def test_an_axis_is_logarithmic_where_values_are_far_apart() -> None:
    assert axes_of(charts.curves(lines(100), ["loss"]))[0].get_yscale() == "log"
    assert axes_of(charts.curves(lines(9), ["loss"]))[0].get_yscale() == "linear"
    assert axes_of(charts.curves(lines(100), ["learning_rate"]))[0].get_yscale() == "linear"


def test_what_is_no_number_is_left_out() -> None:
    broken = [{"step": 1, "phase": "train", "loss": "nan"}, {"step": 2, "phase": "train", "loss": float("inf")}]
    assert len(axes_of(charts.curves(broken, ["loss"]))[0].lines) == 0


def test_a_noisy_curve_is_smoothed_over_its_own_values() -> None:
    noisy = [{"step": step, "phase": "train", "loss": 1.0 + step % 2} for step in range(100)]
    raw, smooth = (np.asarray(line.get_ydata()) for line in axes_of(charts.curves(noisy, ["loss"]))[0].lines)
    assert np.ptp(raw) == 1
    assert np.ptp(smooth[20:]) < 0.2
    assert smooth[0] == 1.0, "no bias to 0 at the start"


def test_modules_are_sorted_by_what_was_asked_for() -> None:
    axes = DRAWN["modules"]().axes[0]
    assert [bar.get_width() for bar in axes.patches] == [2.0, 1.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]


def test_every_ink_is_a_variable_of_the_page() -> None:
    from importlib.resources import files

    css = files("hf_finetune.reports").joinpath("page.css").read_text()
    light, dark = (re.findall(r"--([\w-]+):", block) for block in css.split("prefers-color-scheme: dark")[:2])
    assert set(figures.INKS.values()) <= set(light) & set(dark)


def test_matplotlib_waits_until_something_is_drawn() -> None:
    code = "import hf_finetune.tracking.charts, sys; print({'matplotlib', 'scipy', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_the_settings_of_whoever_draws_besides_stay_as_they_were() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.png(DRAWN["curves"]())
    assert dict(matplotlib.rcParams) == before


@pytest.fixture
def machine_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The fonts that this machine is to have besides DejaVu; none at first."""
    only = [entry for entry in font_manager.fontManager.ttflist if "DejaVu" in entry.name]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", only)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    monkeypatch.setattr(figures, "_lacking", set())
    figures._fonts.cache_clear()
    yield only
    figures._fonts.cache_clear()


def a_font(file: Path, character: str) -> str:
    """A font in which one character is a square."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (800, 700), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(character): "square"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "square": (900, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(file)
    return str(file)


def test_labels_in_another_script_take_a_font_that_has_it(
    machine_fonts: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, labels = rows(40, 2), ["\u65e5\u65e5", "b"]
    boxes = figures.png(predictions.confusion(made, labels))
    figures.png(predictions.precision_recall(made, labels))
    told = capsys.readouterr().err
    assert told.count("no font here has '\u65e5'") == 1, "one warning for all pictures"
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [a_font(tmp_path / "square.ttf", "\u65e5")])
    figures._fonts.cache_clear()
    figures._lacking.clear()
    assert figures.png(predictions.confusion(made, labels)) != boxes
    assert capsys.readouterr().err == ""


def test_labels_that_the_own_font_has_need_no_other(machine_fonts: list[Any]) -> None:
    figure = predictions.confusion(rows(40, 2), ["\u0436\u00fc", "b"])
    assert figures.use_fonts_for(figure) == set()
    assert {tuple(text.get_fontfamily()) for text in axes_of(figure)[0].get_yticklabels()} == {("DejaVu Sans",)}
