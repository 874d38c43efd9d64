"""The blocks of a recipe that every task and adapter shares: model, data, training, checkpoints, hub, tracking.

Each field is documented where it is declared; the text goes into the JSON Schema that editors complete from.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from hf_finetune.config.checks import Checks
from hf_finetune.config.problems import shown
from hf_finetune.config.section import ASK, CONTENT, FREE, HOST, OUTSIDE, SEEN, STUDY, TEXT, Key, Section

# Bounds of millions and more only keep numbers finite, for machines; no message shows them.
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
Files = Name | Annotated[list[Name], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32 - 2**16)]
"""Rank r of a run uses seed + r, which NumPy wants below 2^32."""
Every = Count | Literal["epoch"]


def changed(block: Section, field: str) -> bool:
    """Compare a field with its default, which a dumped recipe writes out like any other value."""
    return bool(getattr(block, field) != type(block).model_fields[field].default)


def _needs_source(source: str | None, **given: str | None) -> None:
    for name, value in given.items():
        if source is None and value is not None:
            raise ValueError(f"{name} belongs to a source; set source or remove it")


class Model(Section):
    """The pretrained model."""

    name: Annotated[Name, Key(lock="content", owns=("revision",))]
    """Hub id (`owner/name`), local folder or GGUF file, or `package:NAME/PATH`, one inside an installed package."""
    revision: Annotated[Name | None, CONTENT] = None
    """Commit, tag or branch on the Hub; only a commit always names the same model."""
    dropout: Annotated[Share | None, ASK] = None
    """Dropout of all layers of the model; null keeps that of its config."""
    attention: Annotated[Literal["auto", "eager", "sdpa", "flash_attention_2"], ASK] = "auto"
    """Attention implementation."""
    quantization: Annotated[Literal["nf4", "int8"] | None, Key(finished="never")] = None
    """Keep the frozen base weights in 4 or 8 bits (needs the extra `quantization`)."""


class Source(Section):
    """One of several training sets that are mixed."""

    train: Files
    """A split of `source`, or files."""
    source: Annotated[Name | None, Key(owns=("subset", "revision"))] = None
    """Hub id or local folder; null where `train` names files."""
    subset: Name | None = None
    """Configuration of the Hub data set."""
    revision: Name | None = None
    """Commit, tag or branch of the Hub data set."""
    weight: Annotated[float, Field(gt=0.0, le=1e6)] = 1.0
    """Chance of drawing a row of this source, relative to the others."""

    # Two rules, so that one report blames both keys.
    @model_validator(mode="after")
    def _subset_has_source(self) -> Self:
        _needs_source(self.source, subset=self.subset)
        return self

    @model_validator(mode="after")
    def _revision_has_source(self) -> Self:
        _needs_source(self.source, revision=self.revision)
        return self


OF_SOURCE = ("source", "subset", "revision", "validation", "test")


class Data(Section):
    """The rows, and how long they may be."""

    train: Annotated[Files | None, Key(lock="content", replaces=("mix",), file_replaces=OF_SOURCE)] = None
    """A split of `source`, or csv, tsv, json, jsonl or parquet files: one, a list, or globs. Files that are given in
    place of a split of the Hub take the place of that source, and of its other splits."""
    validation: Annotated[Files | None, Key(resume="ask", lock="content", replaces=("validation_share",))] = None
    """Like `train`; evaluated during training."""
    test: Annotated[Files | None, Key(resume="ask", lock="content")] = None
    """Like `train`; evaluated once, after training."""
    source: Annotated[Name | None, Key(lock="content", owns=("subset", "revision"))] = None
    """Hub id or local folder that `train`, `validation` and `test` are read from; null for plain files."""
    subset: Annotated[Name | None, CONTENT] = None
    """Configuration of the Hub data set, e.g. `sst2` of `nyu-mll/glue`."""
    revision: Annotated[Name | None, CONTENT] = None
    """Commit, tag or branch of the Hub data set."""
    mix: Annotated[Annotated[list[Source], Field(min_length=2)] | None, Key(replaces=("train",))] = None
    """Several training sets instead of `train`, drawn by weight until one is used up."""
    validation_share: Annotated[Annotated[float, Field(gt=0.0, lt=1.0)] | None, Key(replaces=("validation",))] = None
    """Share of the training rows that is cut off for validation, by `training.seed`, where there is no `validation`."""
    max_length: Annotated[Annotated[int, Field(ge=2, le=1_048_576)], STUDY] = 512
    """Most tokens of a row."""
    overlong: Annotated[Literal["truncate", "split", "drop", "error"], STUDY] = "truncate"
    """Treatment of rows with more than `max_length` tokens; counted and reported in every case. `split` makes several
    rows of one, so that nothing of it is lost (plain text of causal_lm and masked_lm)."""
    packing: Annotated[bool, STUDY] = False
    """Put several rows into one sequence of `max_length` tokens, with no attention across rows (causal_lm)."""
    streaming: bool = False
    """Read while training instead of loading first: for data that do not fit; needs `training.steps`."""
    shuffle_buffer: Count = 10_000
    """Rows that streaming holds to shuffle from."""
    limit: Annotated[Count | None, STUDY] = None
    """At most this many rows of each split, drawn by `training.seed`: for trials."""
    cache: Annotated[Name | None, OUTSIDE] = None
    """Folder of tokenised data; null is `$HF_FINETUNE_CACHE`, else `$XDG_CACHE_HOME/hf_finetune`."""
    workers: Annotated[Annotated[int, Field(ge=1, le=256)] | None, OUTSIDE, HOST] = None
    """Processes that tokenise; null is one for each core."""
    checks: Annotated[Checks, Key(resume="free", lock="ignored")] = Checks()
    """Checks of the data, and how serious each finding is."""

    @model_validator(mode="after")
    def _sources(self) -> Self:
        if (self.train is None) == (self.mix is None):
            raise ValueError("give either train or mix")
        if (
            self.mix is not None
            and (self.source or self.subset or self.revision)
            and not (self.validation or self.test)
        ):
            raise ValueError(
                "source, subset and revision are for validation and test here; each part of mix has its own"
            )
        _needs_source(self.source, subset=self.subset, revision=self.revision)
        return self

    @model_validator(mode="after")
    def _splits(self) -> Self:
        if self.validation is not None and self.validation_share is not None:
            raise ValueError("validation and validation_share exclude each other; remove one")
        if self.streaming and self.overlong == "split":
            raise ValueError("overlong: a stream counts rows as they are written; write truncate, drop or error")
        if self.streaming and self.packing:
            raise ValueError("packing needs the lengths of all rows, streaming reads them one by one; turn one off")
        if self.streaming and self.validation_share is not None:
            raise ValueError("validation_share needs all rows; with streaming give a validation split")
        return self

    @model_validator(mode="after")
    def _buffer_is_used(self) -> Self:
        if not self.streaming and changed(self, "shuffle_buffer"):
            raise ValueError("shuffle_buffer is for streaming, other data are shuffled whole; remove it")
        return self

    @property
    def has_validation(self) -> bool:
        """Tell whether rows are evaluated during training."""
        return self.validation is not None or self.validation_share is not None


class EarlyStopping(Section):
    """Stop when validation no longer gets better."""

    patience: Count = 3
    """Evaluations without improvement before the run stops."""
    min_delta: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0
    """Least change that counts as an improvement."""


class LossSpike(Section):
    """Stop when the loss jumps and stays high."""

    factor: Annotated[float, Field(gt=1.0, le=1e6)] = 3.0
    """Multiple of the median of the last 50 steps that counts as a jump."""
    patience: Count = 3
    """Steps in a row that must be above it."""


class Training(Section):
    """The optimisation. It is the same on every machine."""

    epochs: Annotated[Annotated[float, Field(gt=0.0, le=10_000.0)] | None, Key(resume="ask", replaces=("steps",))] = (
        None
    )
    """Passes over the training rows; give this or `steps`. With neither, a rule goes by the number of rows, else 3."""
    steps: Annotated[Count | None, Key(resume="ask", replaces=("epochs",))] = None
    """Optimiser steps; give this or `epochs`."""
    batch_size: Count = 16
    """Global batch: rows of one optimiser step (packed sequences where `data.packing` is on), across every device and
    accumulation step. Where it is not given, a rule goes by the number of local training rows."""
    micro_batch: Annotated[Count | Literal["auto"], FREE] = "auto"
    """Rows of one forward pass on one device; accumulation follows from it. `auto` takes as many as a device is kept
    busy with, and halves them until the estimated memory fits what is free."""
    # No single default: what is right for LoRA ruins a model that is trained whole. `recipe.fill` knows the adapter.
    learning_rate: Annotated[Annotated[float, Field(gt=0.0, le=10.0)], ASK] = Field(default_factory=lambda: 2e-4)
    """Peak learning rate. By default 2e-4 for LoRA on a language model, 5e-4 for LoRA with a new head and 1e-3 for LoRA
    on a small model; 5e-4, 1e-3 and 2e-3 for AdaLoRA; 3e-3 for (IA)3; 2e-5 where all weights are trained, or 2e-4 of a
    small model."""
    schedule: Annotated[Literal["linear", "cosine", "constant"], ASK] = "linear"
    """Shape of the learning rate after warmup; linear and cosine end at 0."""
    warmup_ratio: Annotated[Share, Key(resume="ask", replaces=("warmup_steps",))] = 0.0
    """Share of all steps in which the learning rate rises from 0."""
    warmup_steps: Annotated[
        Annotated[int, Field(ge=0, le=1_000_000_000)] | None, Key(resume="ask", replaces=("warmup_ratio",))
    ] = None
    """The same in steps; excludes `warmup_ratio`."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "sgd"] = "adamw"
    """`adamw_8bit` needs the extra `quantization`."""
    weight_decay: Annotated[Annotated[float, Field(ge=0.0, le=1.0)], ASK] = 0.0
    """Weight decay, decoupled for the AdamWs and Adafactor, plain L2 for SGD; not applied to biases and norms."""
    beta1: Annotated[Share, ASK] = 0.9
    """First moment's decay of AdamW."""
    beta2: Annotated[Share, ASK] = 0.999
    """Second moment's decay of AdamW."""
    max_grad_norm: Annotated[Annotated[float, Field(gt=0.0, le=1e6)] | None, ASK] = 1.0
    """Gradients are scaled down to this global norm; null turns clipping off."""
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], Key(resume="ask", finished="free")] = "auto"
    """Arithmetic of the forward and backward pass; trained weights and the optimiser stay in fp32."""
    activation_checkpointing: Annotated[bool | Literal["auto"], FREE] = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. `auto` does so if an eighth of
    the usual micro-batch, by the estimate, needs more memory than is free."""
    early_stopping: Annotated[EarlyStopping | None, ASK] = None
    """Stop when `best_metric` no longer improves."""
    best_metric: Annotated[Name | None, ASK, TEXT] = None
    """Keep the checkpoint that is best by this validation metric, e.g. `accuracy` or `loss`; null keeps the last."""
    group_by_length: bool = True
    """Rows of similar length share a global batch, which saves padding; the order stays random and seeded. Not used
    where rows are each other's negatives (embedding): there, rows with the same positive are kept apart."""
    log_every: Annotated[Count, Key(resume="free", study=False)] = 10
    """Steps between two lines of training metrics."""
    eval_every: Annotated[Every | None, SEEN] = "epoch"
    """Steps between two evaluations, or `epoch`; null evaluates only at the end."""
    eval_at_start: Annotated[bool, SEEN] = False
    """Evaluate once before the first step: what the model can do without training."""
    eval_batch: Annotated[Count | Literal["auto"], Key(resume="free", study=False, finished="free")] = "auto"
    """Rows of one forward pass in evaluation."""
    on_nonfinite: Annotated[Literal["stop", "skip"], FREE] = "stop"
    """A loss or gradient that is NaN or infinite ends the run before the optimiser takes the step, or the step is left
    out."""
    max_skipped: Annotated[Count, FREE] = 10
    """Most steps that `on_nonfinite: skip` may skip."""
    loss_spike: Annotated[LossSpike | None, FREE] = None
    """Stop when the loss jumps and stays high; null turns this off."""
    seed: Seed = 42
    """Seeds initialisation, dropout, order and splits: one seed makes two runs bit-identical."""
    deterministic: Annotated[bool, Key(resume="ask", study=False, finished="free")] = True
    """Use deterministic kernels on a GPU, so that one seed makes two runs bit-identical there too; a little slower.
    A CPU run always is."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        if self.warmup_steps is not None and self.warmup_ratio:
            raise ValueError("warmup_ratio and warmup_steps exclude each other; remove one")
        if self.steps is not None and self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than steps {self.steps}")
        if isinstance(self.micro_batch, int) and self.micro_batch > self.batch_size:
            raise ValueError(f"micro_batch {self.micro_batch} is more than the global batch_size {self.batch_size}")
        return self

    @model_validator(mode="after")
    def _selection(self) -> Self:
        if self.early_stopping is not None and self.best_metric is None:
            raise ValueError("early_stopping needs best_metric, e.g. best_metric: loss")
        if self.best_metric is not None and self.eval_every is None:
            raise ValueError("best_metric needs eval_every")
        return self

    @model_validator(mode="after")
    def _skips_are_counted(self) -> Self:
        if self.on_nonfinite == "stop" and changed(self, "max_skipped"):
            raise ValueError("max_skipped belongs to on_nonfinite: skip; set it or remove this")
        return self

    @model_validator(mode="after")
    def _betas_are_used(self) -> Self:
        # transformers hands SGD and Adafactor neither; Adafactor has a second moment of its own schedule.
        for name in ("beta1", "beta2"):
            if changed(self, name) and self.optimizer in ("sgd", "adafactor"):
                raise ValueError(f"{name} is for the AdamWs, {self.optimizer} does not take it; remove it")
        return self


class Checkpoints(Section):
    """Checkpoints while training."""

    every_minutes: Annotated[float, Field(gt=0.0, le=100_000.0)] | None = 10.0
    """Minutes between two checkpoints, more where saving would otherwise take over 1 % of the time; null does not look
    at the clock."""
    every: Every | Literal["auto"] | None = "auto"
    """Steps between two checkpoints, or `epoch`: these are written at any cost. `auto` writes one at the end of
    each epoch, except where that would take over 1 % of the time; null writes none by steps."""
    keep: Count = 2
    """Number of checkpoints to keep, also after the run: the last one lets it be extended. The best is kept too."""

    @property
    def is_off(self) -> bool:
        """Tell that none is written, except for `best_metric` and by a run that is stopped."""
        return self.every is None and self.every_minutes is None


NO_CHECKPOINTS = Checkpoints(every=None, every_minutes=None)
"""The meaning of `checkpoints: off`."""


LONGEST = 96  # characters, which the Hub sets
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9][\w.+-]*(?:/[A-Za-z0-9][\w.+-]*)*", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Recognise NAME and OWNER/NAME, by the rules of `huggingface_hub.utils.validate_repo_id`."""
    fits = _HUB_ID.fullmatch(name) is not None and len(name) <= LONGEST
    return fits and "--" not in name and ".." not in name and not name.endswith(("-", ".", ".git"))


def repo_id(name: str) -> str:
    """Return the name of a repository that can be.

    Raises:
        ValueError: It has no owner, or a part that the Hub does not take.
    """
    if "/" not in name or not is_hub_id(name):
        reason = (
            f"{shown(name)} is no repository; write OWNER/NAME of letters, digits, '-', '_' and '.', with no '--', no "
            f"'..', starting with a letter or digit, {LONGEST} characters at most"
        )
        raise ValueError(reason)
    return name


def tag(name: str) -> str:
    """Return the name of a tag that git takes.

    Raises:
        ValueError: It does not.
    """
    if _TAG.fullmatch(name) is None or ".." in name or name.endswith((".", ".lock")):
        raise ValueError(f"{shown(name)} is no tag; write letters, digits, '.', '-', '_' and '+', e.g. v1.0")
    return name


RepoId = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(repo_id)]
Tag = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(tag)]
Seconds = Annotated[float, Field(ge=1.0, le=86_400.0)]


class Hub(Section):
    """Upload of the finished adapter. The token comes from HF_TOKEN or `hf auth login`, never from a recipe."""

    repo: RepoId
    """Repository on the Hub, OWNER/NAME; it is created if it does not exist."""
    private: bool = True
    """Keep the repository private. `false` is needed to upload into one that is public."""
    as_pr: bool = False
    """Open a pull request instead of a commit, for a repository that you can't write to."""
    tag: Tag | None = None
    """Tag of the version that is uploaded; null is `run-` and the id of the run."""
    every: Literal["best"] | None = None
    """`best`: also upload each checkpoint that is the best so far (`training.best_metric`) during training."""
    timeout: Seconds = 600.0
    """Seconds that an upload may take in all, with everything that is tried again."""

    @model_validator(mode="after")
    def _versions_are_tagged(self) -> Self:
        if self.as_pr and (self.tag or self.every):
            raise ValueError("as_pr: a pull request has no tag and one version; remove tag and every, or as_pr")
        return self


class Speed(Section):
    """Fast paths that may be taken where they fit the model; a batch is compared before training."""

    fused_lora: bool = True
    """Compute a frozen linear layer and its LoRA branch as one operation with fewer copies."""
    fused_loss: bool = True
    """Make an LLM's logits for trained tokens only, a chunk at a time, together with their gradient."""
    skip_padding_mask: bool = True
    """Leave out a language model's padding mask: rows are padded on the right, and no token sees what follows it."""
    document_attention: bool = True
    """Let packed documents attend one by one, without a mask of tokens by tokens, where they are long enough."""
    fused_norm: bool = True
    """Compute an RMSNorm with a frozen weight, and its gradient, as one operation with fewer copies."""
    fused_mlp: bool = True
    """Compute a gated feed-forward layer (SwiGLU) so that it keeps half as much for its gradient."""
    plain_attention: bool = True
    """On a CPU, where attention is `eager`: without copies of keys and values that heads share."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the layers of a model without dropout for training; `auto` does where that pays within the run."""
    cheap_dropout: bool = True
    """On a CPU, draw 16 random bits an element for dropout instead of a double."""


# Numbers always go to metrics.jsonl and TensorBoard, as they cost nothing; pictures and records may be made less often.
Often = Literal[False, "final"] | Annotated[int, Field(ge=1, le=1_000_000)]
"""At every n-th evaluation of a run and at its end; `final`: only at its end; false: never."""


class Tracking(Section):
    """Pictures, examples and records of the model, made at evaluations."""

    tensorboard: bool = True
    """Write TensorBoard events; `hf-finetune tensorboard RUN --rebuild` makes them later from the run folder."""
    folder: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Folder of the events; null means `tensorboard/` in the run folder.

    Another folder, or what tensorboardX can write to: `s3://`, `gs://` with its client installed.
    """
    also: list[Literal["wandb", "mlflow", "trackio", "csv"]] = Field([], max_length=4)
    """Other trackers that get every number of `metrics.jsonl`, and the settings that are learned with.

    `csv` writes `metrics.csv` in the run folder. The others must be installed, and take keys and addresses from their
    own environment variables."""
    histograms: Often = 1
    """Adapter weights, gradients, size of the updates, logits and confidence."""
    images: Often = 1
    """Confusion matrix and reliability diagram; PR curves and loss by position."""
    examples: Often = 1
    """Rows as text: the most confidently wrong ones of a classifier, the loss of each token of an LLM."""
    embeddings: Often = "final"
    """Input of a classifier's head for each evaluated row, for the projector."""
    report: bool = True
    """Draw `report.html` and `plots/` at the end of a run; `report.md` is always written."""
    example_rows: Annotated[int, Field(ge=1, le=1000)] = 8
    """Number of rows that `examples` shows."""
    embedding_rows: Annotated[int, Field(ge=3, le=100_000)] = 1000
    """Number of rows that `embeddings` keeps."""

    @model_validator(mode="after")
    def _folder_is_not_ignored(self) -> Self:
        if self.folder is not None and not self.tensorboard:
            raise ValueError("folder would be ignored: tensorboard is false; remove one of them")
        return self

    @model_validator(mode="after")
    def _trackers_are_named_once(self) -> Self:
        if len(set(self.also)) < len(self.also):
            raise ValueError("also names a tracker twice; name it once")
        return self


def is_due(often: int | str | bool, evaluation: int, *, last: bool) -> bool:
    """Tell if something is made at the n-th evaluation, from 1; `last` is that of the model that is saved."""
    return often is not False and (last or (isinstance(often, int) and evaluation % often == 0))
