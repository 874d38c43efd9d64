"""`seq2seq`: teach an encoder-decoder to write a text for a text: a translation, a summary, any other answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from hf_finetune.config.blocks import Share, changed
from hf_finetune.config.section import ASK, SEEN, TEXT, Key, refuse_repeated
from hf_finetune.errors import BadRows, DataError, ModelError, Problem
from hf_finetune.tasks import _examples as examples
from hf_finetune.tasks import _losses, _proposals, _texts
from hf_finetune.tasks._catalogue import REMARKS, Name, Tokens
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks._token_scores import TokenScores
from hf_finetune.tasks.base import IGNORE, Batch, Column, Features, Loss, Prompts, Rows, State, literal

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset

Text = Annotated[str, Field(min_length=1, max_length=100_000)]

# Names of columns that belong together, and of the languages that a column may be called by.
PAIRS = (
    ("source", "target"),
    ("src", "tgt"),
    ("document", "summary"),
    ("article", "highlights"),
    ("article", "summary"),
    ("abstract", "summary"),
    ("dialogue", "summary"),
    ("text", "summary"),
)
LANGUAGE = re.compile(r"[a-z]{2}([_-][A-Z]{2})?|[a-z]{3}_[A-Z][a-z]{3}")
# Small models for `init`.
ENGLISH = ("google-t5/t5-small", "60M parameters, reads and writes any text")
ANY = ("google/mt5-small", "the texts are not all English letters")


class Seq2Seq(TokenScores):
    """Writes a target for a source."""

    auto_model: ClassVar[str] = "AutoModelForSeq2SeqLM"
    peft_task: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    pipeline: ClassVar[str] = "text2text-generation"
    made_for: ClassVar[tuple[str, ...]] = ("ForConditionalGeneration", "MTModel")
    generates: ClassVar[bool] = True
    needs: ClassVar[Mapping[str, str]] = {"sacrebleu": "seq2seq", "rouge_score": "seq2seq", "py3langid": "seq2seq"}
    takes_slow_tokenizers: ClassVar[bool] = True
    headline: ClassVar[tuple[str, ...]] = (*TokenScores.headline, "bleu", "chrf", "rougeL", "ended")

    source: Annotated[Text, TEXT]
    """Column of what is read, or a template over columns such as `"{question}\\n\\n{context}"`; literal braces are
    doubled."""
    target: Annotated[Text, TEXT]
    """Column or template of what is to be written."""
    prefix: Annotated[str, Field(max_length=10_000), TEXT] = ""
    """Put before each source, in training and ever after: `"translate English to French: "` for T5, `">>fra<< "` for a
    Marian model of several target languages."""
    source_language: Annotated[Text | None, TEXT] = None
    """Language of the sources, as the tokenizer calls it: `eng_Latn` (NLLB), `en_XX` (mBART), `en` (M2M100)."""
    target_language: Annotated[Text | None, TEXT] = None
    """The same of the targets. Each answer is made to begin with its token."""
    label_smoothing: Share = 0.0
    """Share of the probability that the training loss spreads over the whole vocabulary."""
    sample_prompts: Annotated[Annotated[int, Field(ge=0, le=1000)], Key(resume="free", card=False, study=False)] = 3
    """So many of the first validation rows are answered at each evaluation, for people to read."""
    generate_rows: Annotated[Annotated[int, Field(ge=0, le=1_000_000)], ASK] = 200
    """Answers to so many held-out rows, the first ones, are generated at each evaluation and compared with the
    targets."""
    text_metrics: Annotated[Annotated[list[Name], Field(min_length=1)], ASK] = Field(
        default=["bleu", "chrf", "ter", "rouge"]
    )
    """Metrics of generated answers: BLEU, chrF and TER as sacrebleu has them, ROUGE-1, -2 and -L; all of 100."""
    bleu_tokens: Annotated[Tokens, ASK] = "13a"
    """sacrebleu's tokeniser for BLEU: `zh` for Chinese, `char` for Japanese and others without spaces."""
    max_new_tokens: Annotated[Annotated[int, Field(ge=1, le=1_048_576)], SEEN] = 128
    """Most tokens of a generated answer."""
    num_beams: Annotated[Annotated[int, Field(ge=1, le=64)], SEEN] = 1
    """Beams of the search for an answer; 1 takes the likeliest token each time."""
    length_penalty: Annotated[Annotated[float, Field(ge=-10.0, le=10.0)], SEEN] = 1.0
    """Exponent of the length by which a beam's score is divided: above 0 prefers longer answers."""
    no_repeat_ngram_size: Annotated[Annotated[int, Field(ge=0, le=100)], SEEN] = 0
    """No answer has the same so many tokens twice in a row of tokens; 0 allows all."""
    temperature: Annotated[Annotated[float, Field(gt=0.0, le=10.0)] | None, SEEN] = None
    """Saved with the model: programs that read its generation config draw tokens at this temperature. What is
    evaluated and predicted here is never drawn."""
    top_p: Annotated[Annotated[float, Field(gt=0.0, le=1.0)] | None, SEEN] = None
    """The same: least probability that the tokens to draw from have together."""

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Take texts in two languages, or columns whose names say what is read and what is written."""
        return _translations(columns) or _named(columns)

    @field_validator("source", "target")
    @classmethod
    def _parses(cls, template: str) -> str:
        examples.parse(template)
        return template

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        refuse_repeated(source=self.source, target=self.target)
        return self

    @model_validator(mode="after")
    def _languages_are_a_pair(self) -> Self:
        if (self.source_language is None) != (self.target_language is None):
            raise ValueError("source_language and target_language belong together; give both")
        return self

    @model_validator(mode="after")
    def _beams_are_searched(self) -> Self:
        if self.num_beams == 1 and self.length_penalty != 1.0:
            raise ValueError("length_penalty is about beams, and there is one; raise num_beams, or remove it")
        if self.top_p is not None and self.temperature is None:
            raise ValueError("top_p is for drawing tokens; set temperature, or remove it")
        return self

    def ignored(self, *, validation: bool, test: bool) -> str | None:
        """Name samples and answers that are asked for where no rows are held out."""
        if changed(self, "sample_prompts") and self.sample_prompts and not validation:
            return "sample_prompts: there is no validation split; set data.validation or remove it"
        if changed(self, "generate_rows") and self.generate_rows and not (validation or test):
            return "generate_rows: there is no validation or test split; set one or remove it"
        return None

    @property
    def best_metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """Metrics of answers can select the best model only where answers are generated."""
        named = [name for metric in self.text_metrics for name in ((metric,) if metric != "rouge" else ("rougeL",))]
        return (*TokenScores.headline, *(named if self.generate_rows else ()))

    def columns(self) -> dict[str, Column]:
        """Return those of source and target."""
        asked = dict.fromkeys(examples.columns(self.source), Column("text"))
        return {**dict.fromkeys(examples.columns(self.target), Column("text", is_target=True)), **asked}

    def check_config(self, name: str, config: Any) -> None:
        """Refuse a model without an encoder for the source.

        Raises:
            ModelError: It has none.
        """
        if not getattr(config, "is_encoder_decoder", False):
            reason = f"{name} ({config.model_type}) has no encoder and decoder; {self.kind} needs both, as T5 has"
            raise ModelError(Problem(reason, key="model.name"))

    def settle(self, processor: Any, config: Callable[[], Any]) -> Any:
        """Set the languages of the tokenizer, note the token that the decoder begins with, and return it.

        Raises:
            ModelError: It knows no languages, not these, or needs them.
        """
        knows = hasattr(processor, "src_lang")
        if knows != (self.source_language is not None):
            how = "give source_language and target_language" if knows else "remove it, or write it into task.prefix"
            what = "asks for languages" if knows else "knows no languages"
            raise ModelError(Problem(f"the tokenizer {what}; {how}", key="task.source_language"))
        if self.source_language is not None:
            codes = getattr(processor, "lang_code_to_id", None) or processor.get_added_vocab()
            for key in ("source_language", "target_language"):
                if getattr(self, key) not in codes and f"__{getattr(self, key)}__" not in codes:
                    known = ", ".join(sorted(codes)[:8])
                    message = f"the tokenizer has no {getattr(self, key)!r}; it has e.g. {known}"
                    raise ModelError(Problem(message, key=f"task.{key}"))
            processor.src_lang, processor.tgt_lang = self.source_language, self.target_language
        read = config()
        start = getattr(read, "decoder_start_token_id", None)
        if read.model_type == "mbart":  # its decoder begins with the last token of the target, whatever that is
            start = processor(text_target="a")["input_ids"][-1]
        if start is None and getattr(read, "is_encoder_decoder", False):
            reason = f"the config of {read.model_type} names no decoder_start_token_id; add it there"
            raise ModelError(Problem(reason, key="model.name"))
        processor.decoder_start = start
        return processor

    def fit(self, rows: Dataset | IterableDataset, processor: Any) -> State:
        """Read off some training rows how long targets are beside their sources, and in which languages."""
        from datasets import Dataset

        from hf_finetune.tasks import _parallel

        if not isinstance(rows, Dataset) or not len(rows):
            return State()
        some = rows[:: max(1, len(rows) // _parallel.SAMPLE)]
        bad = BadRows()
        pairs = [self._written(some, template, what, bad) for template, what in self._sides]
        # Rows that can't be used are told when they are encoded.
        kept = [(source, target) for source, target in zip(*pairs, strict=True) if source and target]
        usual = _parallel.Usual.of([source for source, _ in kept], [target for _, target in kept])
        return State(more=usual.to_json())

    @property
    def _sides(self) -> tuple[tuple[str, str], tuple[str, str]]:
        return (self.source, "source"), (self.target, "target")

    def _written(self, rows: Rows, template: str, what: str, bad: BadRows) -> list[str]:
        """Return the text of each row; empty where it is added to `bad`."""
        parts, found = examples.parse(template), []
        for index, values in enumerate(zip(*rows.values(), strict=True)):
            text = ""
            try:
                text = examples.fill(parts, dict(zip(rows, values, strict=True)))
            except DataError as error:
                bad.add(index, str(error))
                found.append(text)
                continue
            if _texts.SURROGATES.search(text):
                bad.add(index, f"the {what} holds half a surrogate pair, which is no character; write the text anew")
            elif not text.strip():
                bad.add(index, f"the {what} is empty; remove the row or fill it in")
            found.append(text)
        return found

    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Tokenise sources, and targets where there are any; each is cut to `limit`, and a row's size is the longer.

        Raises:
            RowsError: A source or target is missing or no text; all rows of which that is so.
        """
        from hf_finetune.tasks import _parallel

        bad = BadRows()
        sources = self._written(rows, self.source, "source", bad)
        has_targets = all(name in rows for name in examples.columns(self.target))
        targets = self._written(rows, self.target, "target", bad) if has_targets else []
        bad.raise_any()
        read = [self.prefix + source for source in sources]
        found: list[Features] = [
            {"input_ids": ids, "size": len(ids), "whole": whole, "weight": 0}
            for ids, whole in self._tokens(processor, limit, text=read)
        ]
        if not has_targets:
            return found
        usual = _parallel.Usual.from_json(state.more)
        written = self._tokens(processor, limit, text_target=targets)
        for row, source, target, (ids, whole) in zip(found, sources, targets, written, strict=True):
            row |= {"labels": ids, "weight": len(ids)}
            row |= {"size": max(row["size"], len(ids)), "whole": max(row["whole"], whole)}
            row["remarks"] = sum(REMARKS[check] for check in usual.remarks(source, target))
        return found

    @staticmethod
    def _tokens(processor: Any, limit: int, **texts: list[str]) -> list[tuple[list[int], int]]:
        """Return token ids of each text, cut to `limit`, and their number before."""
        options = {"return_attention_mask": False, "verbose": False}
        # Twice, as a tokenizer that cuts does not tell how long a row was.
        whole = processor(**texts, **options)["input_ids"]
        cut = processor(**texts, truncation=True, max_length=limit, **options)["input_ids"]
        return [(ids, len(uncut)) for ids, uncut in zip(cut, whole, strict=True)]

    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Pad sources, targets, and what the decoder reads: the target behind its start token, each on the right."""
        import torch

        batch = _texts.padded([{"input_ids": row["input_ids"]} for row in features], processor)
        if "labels" not in features[0]:
            return batch
        width = max(len(row["labels"]) for row in features)
        labels = torch.tensor([row["labels"] + [IGNORE] * (width - len(row["labels"])) for row in features])
        before = torch.nn.functional.pad(labels, (1, 0), value=processor.decoder_start)[:, :-1]
        return {
            **batch,
            "decoder_input_ids": before.masked_fill(before == IGNORE, processor.pad_token_id),
            "labels": labels,
        }

    def count(self, batch: Batch, state: State) -> torch.Tensor:
        """Return the number of tokens of the targets."""
        return (batch["labels"] != IGNORE).sum()

    def loss(self, model: Callable[..., Any], batch: Batch, state: State) -> Loss:
        """Return cross entropy summed over the tokens of the targets."""
        logits = model(**self.inputs(batch)).logits
        return Loss(_losses.loss_sum_of(*_losses.at_labels(logits, batch["labels"]), self.label_smoothing))

    def predict(
        self, model: Callable[..., Any], batch: Batch, state: State, totals: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return `nats`, `tokens` and `right` tokens of each row, (B,), without smoothing."""
        logits, labels = model(**self.inputs(batch)).logits, batch["labels"]
        return self.scored(_losses.each(*_losses.at_labels(logits, labels)), _losses.behind(labels), totals)

    def endings(self, processor: Any) -> frozenset[int]:
        """Return EOS."""
        return frozenset({processor.eos_token_id} - {None})

    # ---- answers ----

    def ask(self, rows: Rows, processor: Any, limit: int | None = None) -> list[list[int]]:
        """Return token ids of sources.

        Raises:
            RowsError: A source is missing or no text; all rows of which that is so.
        """
        bad = BadRows()
        asked = {name: rows[name] for name in examples.columns(self.source)}
        sources = [self.prefix + text for text in self._written(asked, self.source, "source", bad)]
        bad.raise_any()
        ids: list[list[int]] = processor(sources, truncation=limit is not None, max_length=limit, verbose=False)[
            "input_ids"
        ]
        return ids

    def decoding(self, processor: Any) -> Mapping[str, Any]:
        """Return beams, and the tokens that an answer begins with."""
        fields: dict[str, Any] = {"decoder_start_token_id": processor.decoder_start}
        if self.target_language is not None:
            first = processor(text_target="a")["input_ids"][0]
            # Where the language stands behind the target, the decoder begins with it.
            if processor.decode([first]).strip().strip("_") == self.target_language:
                fields["forced_bos_token_id"] = first
        if self.num_beams > 1:
            fields |= {"num_beams": self.num_beams, "length_penalty": self.length_penalty}
        return fields | ({"no_repeat_ngram_size": n} if (n := self.no_repeat_ngram_size) else {})

    def generation_config(self, processor: Any) -> Mapping[str, Any]:
        """Return the same, with the longest answer, and how tokens are drawn."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p}
        given = {name: value for name, value in drawn.items() if value is not None}
        sampling = {"do_sample": True, **given} if given else {}
        return {**self.decoding(processor), "max_new_tokens": self.max_new_tokens, "max_length": None, **sampling}

    def signatures(self) -> Mapping[str, str]:
        """Return those of the metrics of texts."""
        from hf_finetune.tasks import _text_metrics

        return _text_metrics.signatures(self.text_metrics, self.bleu_tokens) if self.generate_rows else {}

    def questions(self, rows: Dataset | None, processor: Any, limit: int | None = None) -> Prompts | None:
        """Return the first `generate_rows` rows, answers to which are generated and compared."""
        return (
            None
            if rows is None or not self.generate_rows
            else self._prompts(rows, self.generate_rows, processor, limit)
        )

    def samples(self, rows: Dataset | None, processor: Any, limit: int | None = None) -> Prompts | None:
        """Return the first validation rows."""
        return (
            None
            if rows is None or not self.sample_prompts
            else self._prompts(rows, self.sample_prompts, processor, limit)
        )

    def _prompts(self, rows: Dataset, count: int, processor: Any, limit: int | None) -> Prompts:
        from hf_finetune.tasks import _generation, _parallel, _sums, _text_metrics

        first: Rows = rows[:count]
        # Rows without a text are dropped where they are encoded, and told.
        kept = [index for index, blank in enumerate(self.blank(first)) if not blank]
        first = {name: [values[index] for index in kept] for name, values in first.items()}
        bad = BadRows()
        sources, references = (self._written(first, template, what, bad) for template, what in self._sides)
        bad.raise_any()

        def score(answers: list[Any]) -> list[_sums.Sums]:
            given = [answer.text for answer in answers]
            return [
                _sums.of_means(_generation.compare(answers, references, None)),
                *_text_metrics.of_answers(given, references, self.text_metrics, self.bleu_tokens),
                *_parallel.of_answers(given, sources, references),
            ]

        return Prompts(self.ask(first, processor, limit), self.max_new_tokens, score, references)

    # ---- examples, and code for people ----

    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return words, as many as the tokens that are wanted."""
        return dict.fromkeys(self.columns(), " ".join(["the"] * size))

    def describe(self, row: Mapping[str, Any]) -> str:
        """Return the source."""
        return examples.fill(examples.parse(self.source), row)

    def laid_out(self, row: Features) -> Features:
        """Return the source, masked, and the target behind it."""
        source, target = row["input_ids"], row["labels"]
        return {**row, "input_ids": [*source, *target], "labels": [*[IGNORE] * len(source), *target]}

    def usage(self, state: State, processor: Any) -> str:
        """Write an answer as the generation config says."""
        languages = (
            f"tokenizer.src_lang = {literal(self.source_language)}\n" if self.source_language is not None else ""
        )
        return (
            "from transformers import GenerationConfig\n\n"
            f"{languages}"
            f'asked = tokenizer({literal(self.prefix)} + "A text to read", return_tensors="pt")\n'
            "answer = model.generate(**asked, generation_config=GenerationConfig.from_pretrained(folder))\n"
            "print(tokenizer.decode(answer[0], skip_special_tokens=True))\n"
        )


# What `init` recognises.


def _translations(columns: Mapping[str, Cells]) -> Proposal | None:
    """Take two columns that are called by languages, or one of objects that hold the texts by language."""
    nested = columns.get("translation")
    rows = [] if nested is None else [row for row in nested.values if isinstance(row, Mapping)]
    if nested is not None and rows and len(rows[0]) == 2:
        inner = {name: Cells(name, [row.get(name) for row in rows]) for name in rows[0]}
        found = _translations(inner)
        if found is None:
            return None
        names = list(inner)

        def rewrite(row: Mapping[str, Any]) -> dict[str, Any]:
            return {name: row["translation"][name] for name in names}

        proposal = _of(*inner.values(), says=f"translation holds texts in {names[0]} and {names[1]}", confidence=0.9)
        return Proposal(**{**vars(proposal), "used": ["translation"], "rewrite": rewrite})
    texts = [column for name, column in columns.items() if LANGUAGE.fullmatch(name) and column.texts]
    if len(texts) != 2:
        return None
    says = f"texts in {texts[0].name}, to be written in {texts[1].name}; exchange them if not"
    return _of(*texts, says=says, confidence=0.85)


def _named(columns: Mapping[str, Cells]) -> Proposal | None:
    for names in PAIRS:
        source, target = (_proposals.first((name,), columns) for name in names)
        if source is None or target is None or not (source.texts and target.texts) or target.is_class:
            continue
        return _of(source, target, says=f"{target.name} is written for {source.name}", confidence=0.75)
    return None


def _of(source: Cells, target: Cells, *, says: str, confidence: float) -> Proposal:
    # Each is cut by itself, so the longer one decides what a row may hold.
    texts = [max(pair, key=len) for pair in zip(source.texts, target.texts, strict=False)]
    model = ENGLISH if _proposals.is_english(texts) else ANY
    task = {"source": source.name, "target": target.name}
    return Proposal(task, says, confidence=confidence, used=list(task.values()), model=model, texts=texts)
