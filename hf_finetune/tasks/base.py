"""The contract of a task: the columns it reads, what a model learns from a row, and what the model's answers mean.

A task block *is* the task: its fields are the YAML keys, its methods are the behaviour. Everything outside this package
asks the task, and never which task it is. Heavy libraries are imported inside the methods, so that reading a recipe
stays instant. Shapes: B rows of a batch, N rows of a split, T tokens, C labels, V vocabulary.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from hf_finetune.config.section import Plugin
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks._shown import Judged as Judged
from hf_finetune.tasks._shown import Plot as Plot
from hf_finetune.tasks._shown import Prompts as Prompts
from hf_finetune.tasks._shown import is_blank as is_blank
from hf_finetune.tasks._shown import literal as literal

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from datasets import Dataset, IterableDataset

    from hf_finetune.tasks._sums import Sums

    Array = np.ndarray[Any, Any]

Rows = Mapping[str, list[Any]]
"""A batch of raw rows: column name -> values, as `datasets.map(batched=True)` hands them over."""

Batch = dict[str, "torch.Tensor"]
"""A padded batch. All but `labels` is what the model's forward pass takes; see `Task.inputs`."""

Predictions = dict[str, "Array"]
"""What `Task.predict` found of every row of a split, each (N, ...) in the order of the split."""

Features = dict[str, Any]
"""One row for the model: arrays, numbers or bytes by name, as the cache stores them, and besides

- `size`: tokens, patches or frames of the row after cutting: for length grouping, packing and the memory estimate;
- `whole`: the same before cutting;
- `weight`: items of the row that the loss counts; a row of weight 0 is dropped, and counted;
- `remarks`: bits of `REMARKS`; may be absent.
"""

BOOKKEEPING = ("size", "whole", "weight", "remarks")
"""Names of features that are not for the model."""

IGNORE = -100
"""Label of a position, or of a whole row, that is not trained on."""


def tokenizer_of(processor: Any) -> Any | None:
    """The tokenizer inside a processor, or the processor itself where it is one; None for images or audio alone."""
    inner = getattr(processor, "tokenizer", processor)
    return inner if hasattr(inner, "convert_ids_to_tokens") else None


def pad_token_of(processor: Any) -> int | None:
    """Return the id of the pad token; None where nothing is tokenised."""
    token = getattr(tokenizer_of(processor), "pad_token_id", None)
    return None if token is None else int(token)


@dataclass(frozen=True)
class Column:
    """A column of the data, as the task reads it."""

    kind: Literal["text", "chat", "words", "image", "audio", "label", "number"] = "text"
    """A label is a class, whose rows are counted; a number is none. Both may be numbers in a csv file; cells of all
    other kinds stay as they are written."""
    is_target: bool = False
    """Not needed to predict a row."""
    is_optional: bool = False
    """A row may lack it."""


@dataclass(frozen=True)
class State:
    """Everything that a task read off the training rows; JSON holds it, and it is saved with the model."""

    names: tuple[str, ...] = ()
    """Label names in the order of their ids; empty for tasks without labels."""
    counts: tuple[int, ...] = ()
    """Training rows of each label, in the same order."""
    weights: tuple[float, ...] = ()
    """Class weights, in the same order; empty for equal weights."""
    id_of: Mapping[Any, int] = field(default_factory=dict)
    """Id of each raw label value, as it stands in the data."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that the task keeps, as JSON holds it."""

    def __post_init__(self) -> None:
        # Where nothing else is said, labels stand in the data by their names. The class is frozen, hence the detour.
        if not self.id_of:
            object.__setattr__(self, "id_of", {name: index for index, name in enumerate(self.names)})

    def to_json(self) -> dict[str, Any]:
        """Return a form that JSON keeps."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        if not self.more:
            del plain["more"]  # version 0.1.0 does not know it
        # A list of pairs, as JSON would turn integer keys into text.
        return {**plain, "id_of": [[raw, index] for raw, index in self.id_of.items()]}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> State:
        """Read the result of `to_json`.

        Raises:
            TypeError: It is something else.
            ValueError: It is something else.
            KeyError: Something is missing.
        """
        plain = {name: tuple(value) for name, value in stored.items() if name not in ("id_of", "more")}
        return cls(**plain, id_of=dict(stored["id_of"]), more=stored.get("more", {}))


class Loss(NamedTuple):
    """Loss of a micro-batch."""

    sum: torch.Tensor
    """Summed over the items that count, a float32 scalar with a gradient."""
    logs: Mapping[str, torch.Tensor] | None = None
    """Further sums over the same items: their means are logged with the loss."""


OutputKind = Literal["text", "texts", "number", "numbers", "truth"]
"""Kind of a column that `predict` writes: text, a list of texts, a number, a list of numbers, true or false."""


class Task(Plugin):
    """The contract. Methods that raise nothing here have a default that fits most tasks."""

    auto_model: ClassVar[str]
    """The transformers Auto class, e.g. `AutoModelForCausalLM`."""
    auto_processor: ClassVar[str] = "AutoTokenizer"
    """The Auto class of what prepares rows: `AutoTokenizer`, `AutoImageProcessor`, `AutoFeatureExtractor`,
    `AutoProcessor`."""
    processor_options: ClassVar[Mapping[str, Any]] = {}
    """More keyword arguments for its `from_pretrained`."""
    peft_task: ClassVar[str | None]
    """PEFT's name of the task, e.g. `SEQ_CLS`; None where PEFT has none: the head is then trained by its name."""
    pipeline: ClassVar[str]
    """The Hub's pipeline tag, e.g. `text-classification`."""
    output: ClassVar[str | None] = "logits"
    """Field of the model's output that the task reads, None for a model that returns a bare tensor: two models are the
    same where it is."""
    token_ids: ClassVar[str | None] = "input_ids"  # noqa: S105 - no password
    """Feature that holds token ids; None where rows are not made of tokens."""
    rows_are: ClassVar[str] = "rows"
    """The word for rows in counts and rates."""
    support_is: ClassVar[str] = "rows"
    """The word for what the metric `support.NAME` of a label counts."""
    content: ClassVar[str] = "input_ids"
    """Feature by which equal rows are found."""
    group: ClassVar[str | None] = None
    """Feature, a number, that rows of two splits have in common only by mistake: that of a prompt."""
    apart: ClassVar[str | None] = None
    """Feature, a number, that rows of a global batch should not have in common: they are each other's negatives."""
    packable: ClassVar[bool] = False
    """Several rows may share one sequence."""
    predicts_next_token: ClassVar[bool] = False
    """The loss is that of `tasks._losses.next_token_loss`, of a causal model and rows padded on the right: fast paths
    may then compute it from the hidden states, and leave the padding mask out."""
    generates: ClassVar[bool] = False
    """Answers are generated token by token: see `ask`."""
    needs: ClassVar[Mapping[str, str]] = {}
    """Modules that it imports besides those of every installation, each with the extra of this project that has it."""
    draws: ClassVar[bool] = False
    """Each pass over the training rows sees them in another way: see `drawn`."""
    made_for: ClassVar[tuple[str, ...]] = ()
    """Ends of the architectures that were pretrained for it, e.g. `ForMaskedLM`; empty where any body will do."""
    is_exclusive: ClassVar[bool] = False
    """Models that are `made_for` it can do nothing else."""
    takes_slow_tokenizers: ClassVar[bool] = False
    """A tokenizer without tokenizer.json will do, as Marian's are."""
    contrasts: ClassVar[bool] = False
    """The loss of a row depends on the other rows of its global batch: see `embed`."""
    teaches_nothing: ClassVar[str] = "have nothing that is trained; raise data.max_length if they are cut"
    """What is told of rows of weight 0 where there are no others, and after the semicolon what to do."""
    least_batch: ClassVar[int] = 1
    """Rows without which a global batch teaches nothing: two, where they are compared with each other alone."""
    one_row_by: ClassVar[str | None] = None
    """Column whose equal cells, one after the other or not, make one row: the cells of all others become lists."""
    calibrates: ClassVar[bool] = False
    """Something is fitted to the validation rows once the model is trained: see `calibrated`."""
    yardsticks: ClassVar[tuple[str, ...]] = ()
    """Methods without training that the model can be compared with: see `yardstick`."""
    best_metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics that may select the best model; `_catalogue.METRICS` has them all."""
    headline: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics that are printed, in this order, where they exist."""
    files: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """A column of files, and the suffixes of these, e.g. `{"image": (".png",)}`: `init` makes a table of a folder of
    such files in folders called by their labels."""

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Propose a block for columns that nobody has described, for `init`; None where they are not for this task.

        Args:
            columns: By name, in the order of the data.
        """
        return None

    @property
    def sequences(self) -> int:
        """Sequences that a row holds, of which `token_ids` has the tokens, one after the other."""
        return 1

    @property
    def title(self) -> str:
        """A name of the problem, for people: runs with the same title can be compared."""
        return self.kind

    # ---- the recipe and the data ----

    def ignored(self, *, validation: bool, test: bool) -> str | None:
        """Return a setting that a run with these held-out splits would not use, as `key: why; what to do`, or None."""
        return None

    @abstractmethod
    def columns(self) -> dict[str, Column]:
        """Return the columns that the data must have, in order."""

    def text_columns(self) -> list[str]:
        """Return columns whose cells stay as they are written: digits of a csv file are text there."""
        return [name for name, column in self.columns().items() if column.kind not in ("label", "number")]

    def file_columns(self) -> list[str]:
        """Return the columns that hold files: paths, or the bytes themselves."""
        return [name for name, column in self.columns().items() if column.kind in ("image", "audio")]

    def optional_columns(self) -> list[str]:
        """Return the columns that a row may lack."""
        return [name for name, column in self.columns().items() if column.is_optional]

    @property
    def has_labels(self) -> bool:
        """Tell whether a column holds classes."""
        return any(column.kind == "label" for column in self.columns().values())

    def asked_columns(self) -> list[str]:
        """Return the columns that a row must have to be predicted."""
        return [name for name, column in self.columns().items() if not (column.is_target or column.is_optional)]

    def declares_labels(self) -> bool:
        """Tell whether the recipe says what may stand in the label columns; else the training rows show it."""
        return True

    def on(self, day: str, processor: Any) -> Self:
        """The task with all that depends on the day on which its run begins; most depend on none.

        Args:
            day: As YYYY-MM-DD.
            processor: The model's; None where it is known to depend on the day, as of a run that kept one.
        """
        return self

    def settle(self, processor: Any, config: Callable[[], Any]) -> Any:
        """Fit what prepares rows to the recipe, and to the model, whose config is read where needed; return it.

        Raises:
            ModelError: They do not fit.
        """
        return processor

    @property
    def day(self) -> str | None:
        """The day that `on` settled, or the recipe; None where nothing depends on one."""
        return None

    def remedy(self, check: str) -> str | None:
        """Return what a key of the task can do about a finding of `data.checks`, as words that follow a semicolon.

        Returns:
            Empty where there is no such key, None where the recipe has set it: the finding is no problem then.
        """
        return ""

    def blank(self, rows: Rows) -> list[bool]:
        """Tell which rows of a batch hold nothing to read."""
        # A missing target is no blank row, but an error of its own.
        columns = [rows[name] for name in self.asked_columns()]
        return [any(is_blank(value) for value in values) for values in zip(*columns, strict=True)]

    def findings(self, rows: Dataset) -> dict[str, list[int]]:
        """Return what can't be seen in one row alone: a check of `data.checks` -> numbers of the raw rows, from 0."""
        return {}

    def fit(self, rows: Dataset | IterableDataset, processor: Any) -> State:
        """Read labels and the like off the raw training rows, and off the model's processor what answers are read by.

        Of streamed rows, only the features are read.

        Raises:
            DataError: A column does not hold what the recipe says.
        """
        return State()

    def refit(self, state: State, counts: tuple[int, ...], rows: int) -> State:
        """Return the state once rows that can't be used are dropped: their counts, and what follows from them.

        Args:
            state: What `fit` read off all training rows.
            counts: Rows per label that are trained on, in the order of `state.names`.
            rows: Rows that are trained on.

        Raises:
            DataError: The counts leave something undefined.
        """
        return replace(state, counts=counts)

    # ---- the model and the rows it reads ----

    def model_options(self, state: State) -> dict[str, Any]:
        """Return keyword arguments for `from_pretrained`, e.g. `num_labels`, `id2label`, `problem_type`."""
        return {}

    def check_config(self, name: str, config: Any) -> None:
        """Refuse a model that loads, but can't do this task.

        Raises:
            ModelError: The model called `name` has such a config.
        """

    def check_packing(self, model: torch.nn.Module) -> None:
        """Prove on the model itself that rows which share a sequence do not see each other.

        Raises:
            ModelError: They do.
        """
        raise AssertionError(f"{self.kind} packs no rows")

    @abstractmethod
    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Prepare a batch of raw rows, in order, cut to a size of `limit`; rows to predict have no target columns.

        Raises:
            RowsError: Rows can't be used; all of them, by their number within the batch.
        """

    def expand(self, rows: Rows) -> tuple[Rows, Sequence[int]]:
        """Return the raw rows that a batch of raw rows stands for, and which row each comes from, counted from 0.

        Rows that can't be used stay as they are: `features` names them.
        """
        return rows, range(len(next(iter(rows.values()), ())))

    @property
    def is_running_text(self) -> bool:
        """Rows may be cut anywhere: see `split`."""
        return False

    def split(self, row: Features, processor: Any, limit: int) -> list[Features]:
        """Return a row that was not cut as rows of at most `limit` each."""
        raise AssertionError(f"{self.kind} splits no rows")

    def masked(self, row: Any) -> Any:
        """Return a copy of a row that counts as nothing: it fills a rank that ran out of rows."""
        if isinstance(row, list):  # documents that share a sequence
            return [self.masked(document) for document in row]
        # Numbers leave no value free for `IGNORE`: theirs is NaN. Types stay, as all rows make one tensor.
        label = row["labels"]
        if isinstance(label, list):
            ignored: Any = [type(label[0])(IGNORE)] * len(label) if label else []
        else:
            ignored = math.nan if isinstance(label, float) else IGNORE
        return {**row, "labels": ignored}

    def drawn(self, row: Features, seed: int, epoch: int) -> Features:
        """Return an encoded row as one pass sees it: drawn by these numbers and by its content, whatever the batch."""
        return row

    @abstractmethod
    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Pad rows to one batch, with `labels` where the rows have them.

        Args:
            features: Rows; of a packable task perhaps lists of rows that share a sequence.
            processor: The model's.
            state: What `fit` returned.
        """

    def inputs(self, batch: Batch) -> Batch:
        """Return the part of a batch that the model's forward pass takes."""
        return {name: value for name, value in batch.items() if name != "labels"}

    # ---- training and evaluation ----

    @property
    def needs_start(self) -> bool:
        """The loss compares the model with what it was when its training began, see `start`: all rows must be known."""
        return False

    def start(self, model: Callable[..., Any], batch: Batch, state: State) -> Batch:
        """Return what the model that training begins with makes of each row: features (B, ...) of all later batches.

        They are computed once, and kept by a hash of model and rows. A batch without them is one of a fresh model.
        """
        raise AssertionError(f"{self.kind} does not need the start")

    def partner(self, rows: int) -> int:
        """Return how many rows behind a row of a split its partner stands; 0 where rows have none.

        `collate` gets the features of that other row as `partner`, however the rows are divided into batches.

        Args:
            rows: Of the split.
        """
        return 0

    @abstractmethod
    def count(self, batch: Batch, state: State) -> torch.Tensor:
        """Return the items of a micro-batch that its loss is summed over, weighted like the loss; a scalar.

        The trainer adds the counts of the *global* batch up before the first forward pass, and divides every
        `Loss.sum` by the total: so the optimisation does not depend on how the batch is cut.
        """

    @abstractmethod
    def loss(self, model: Callable[..., Any], batch: Batch, state: State) -> Loss:
        """Run the forward pass, or as many as it takes, and sum the loss over the items that count.

        Args:
            model: The adapted model, perhaps wrapped for distribution; call it with keyword arguments.
            batch: As collated, on the device. Where the task `contrasts`, with `pool.NAME` of the global batch for each
                name that `embed` returns, and the places of these rows in it, `own` (B,); without, it is all there is.
            state: What `fit` returned.
        """

    def embed(self, model: Callable[..., Any], batch: Batch, state: State) -> dict[str, torch.Tensor]:
        """Return what the losses of other rows depend on, (B, ...) each; of a task that `contrasts`.

        The trainer calls it for all micro-batches of a step, without gradients and with the random numbers that `loss`
        will draw again, and gathers the rows of all ranks. `loss` puts its own rows, which have gradients, in their
        places, and so has the gradient of the whole loss (Gao et al. 2021, https://arxiv.org/abs/2101.06983).
        """
        raise AssertionError(f"{self.kind} needs no other rows")

    @abstractmethod
    def predict(
        self, model: Callable[..., Any], batch: Batch, state: State, totals: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Run the forward pass, and keep of each row what `metrics` and `decode` need.

        Args:
            model: As for `loss`.
            batch: As collated; without `labels` where the truth is not known.
            state: What `fit` returned.
            totals: Sums over all batches that a plot is made of, by name, which this adds to; None where nobody wants
                them. Each may grow along its last dimension.

        Returns:
            Tensors (B, ...), never whole logits of (B, T, V). The trainer gathers them, and pads the second dimension
            with `IGNORE`.
        """

    @abstractmethod
    def metrics(self, predictions: Predictions, state: State) -> dict[str, float]:
        """Metrics of a whole split: `loss` and the task's own; one that is undefined on this split is left out.

        Raises:
            DivergedError: A prediction is not finite.
        """

    def calibrated(self, predictions: Predictions, state: State) -> State:
        """Return the state with what is fitted to validation predictions: metrics and answers change by it."""
        raise AssertionError(f"{self.kind} fits nothing")

    def sums(self, predictions: Predictions, state: State) -> Sums | None:
        """Return sums over rows from which metrics follow, for bootstrap intervals; None where none do."""
        return None

    def judge(self, predictions: Predictions, state: State) -> Judged | None:
        """Return predictions beside the truth, row by row; None where a row is not right or wrong as a whole."""
        return None

    def plots(self, predictions: Predictions, state: State) -> Plot | None:
        """Return numbers that charts of the split are drawn from; None where there are none."""
        return None

    def yardstick(self, name: str, rows: Dataset) -> Predictions:
        """Predict all raw rows of a split, in order, by one of `yardsticks`.

        Raises:
            RecipeError: A package is not installed.
        """
        raise AssertionError(f"{self.kind} has no {name}")

    # ---- answers ----

    def outputs(self, state: State) -> dict[str, OutputKind]:
        """Return columns that `decode` makes, in order."""
        raise AssertionError(f"{self.kind} generates its answers")

    def decode(self, predictions: Predictions, state: State) -> list[dict[str, Any]]:
        """Return the answer to each row, as people and files read it; the columns are those of `outputs`.

        Raises:
            DivergedError: A prediction is not finite.
        """
        raise AssertionError(f"{self.kind} generates its answers")

    def ask(self, rows: Rows, processor: Any, limit: int | None = None) -> list[Any]:
        """Return token ids of rows up to where the model is to answer, or what `asked` reads; of tasks that generate.

        What training cut to `limit` is cut here, too; None cuts nothing.

        Raises:
            RowsError: Rows can't be used; all of them, by their number within the batch.
        """
        raise AssertionError(f"{self.kind} generates nothing")

    def asked(self, prompts: list[Any], processor: Any) -> Batch | None:
        """Return what a model is given for prompts, with `decoder_input_ids` to begin with; None for token ids."""
        return None

    def decoding(self, processor: Any) -> Mapping[str, Any]:
        """Return fields of transformers' `GenerationConfig` by which answers are found, where not the likeliest tokens.

        They draw nothing: evaluation and `predict` give the same answers each time.
        """
        return {}

    def generation_config(self, processor: Any) -> Mapping[str, Any]:
        """Return fields of the `GenerationConfig` that is saved with the model, for whatever program generates."""
        return self.decoding(processor)

    def signatures(self) -> Mapping[str, str]:
        """Return what makes the numbers of some metrics comparable: the library, its version and its settings."""
        return {}

    @property
    def answer_rule(self) -> str | None:
        """The rule by which answers are compared with the data: those of two models only under the same one."""
        return None

    def questions(self, rows: Dataset | None, processor: Any, limit: int | None = None) -> Prompts | None:
        """Return prompts whose answers are compared at each evaluation of a split, from its raw rows; see `ask`."""
        return None

    def samples(self, rows: Dataset | None, processor: Any, limit: int | None = None) -> Prompts | None:
        """Return prompts that are answered at each evaluation for people to read, from the raw validation rows."""
        return None

    # ---- examples, checks, and code for people ----

    @abstractmethod
    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return a raw row with targets, of `size` tokens or more where that is for the task to choose."""

    def probe(self, sizes: Sequence[int], processor: Any, state: State, *, packed: bool = False) -> Batch:
        """Return a batch of examples of these sizes, with labels: for the memory estimate, and to compare models."""
        # One row at a time, as each is cut to a size of its own.
        rows: list[Any] = []
        for size in sizes:
            columns = {name: [value] for name, value in self.example(state, size).items()}
            rows += self.features(columns, processor, state, size)
        return self.collate([[row] for row in rows] if packed else rows, processor, state)

    def telling(self, batch: Batch) -> Batch:
        """A batch that tells more of a model than this one, of the same rows: to compare fast paths with plain ones."""
        return batch

    def vocabulary(self, processor: Any) -> int:
        """Return numbers that the model makes of every token at its end, if a batch of them is large; else 0."""
        return 0

    def endings(self, processor: Any) -> frozenset[int]:
        """Tokens one of which every row that is not cut should train near its end; empty where there is no such."""
        return frozenset()

    def remark(self, row: Rows, processor: Any, check: str) -> str:
        """Say what exactly `check`, a key of `REMARKS`, counts in one raw row; empty where there is no more to say."""
        return ""

    def describe(self, row: Mapping[str, Any]) -> str:
        """Return the inputs of a raw row as text: both texts of a pair, the path of an image."""
        cells = (row[name] for name in self.asked_columns())
        return "\n".join(str(cell) for cell in cells if not isinstance(cell, bytes))

    def write_beside(self, folder: Path, config: Any, limit: int, state: State, processor: Any) -> None:
        """Write what other libraries look for beside a model with such a config, which reads at most `limit` tokens."""

    def laid_out(self, row: Features) -> Features:
        """Return an encoded row with all its tokens in one line, each with its label, for people to look at."""
        return row

    @abstractmethod
    def usage(self, state: State, processor: Any) -> str:
        """Return Python for the model card that asks `model` something, with `processor` loaded: plain transformers."""
