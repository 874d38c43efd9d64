"""`seq2seq`: what the decoder reads, languages, answers and their metrics, on tiny models of several families."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, finished

from hf_finetune import check, load_run
from hf_finetune.config.blocks import Model
from hf_finetune.errors import ModelError
from hf_finetune.models.pretrained import load_processor
from hf_finetune.pipeline.init import columns_of, recognise
from hf_finetune.tasks import _parallel, _text_metrics
from hf_finetune.tasks._catalogue import METRICS
from hf_finetune.tasks._generation import generate
from hf_finetune.tasks.base import State
from hf_finetune.tasks.seq2seq import Seq2Seq

SIZES: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "init_std": 0.5,
}  # fmt: skip
TEXTS = {
    "source": ["the film is good .", "a dull plot", "it was a very warm and funny scene ."],
    "target": ["good film .", "the plot is dull and cold .", "funny ."],
}
LANGUAGES = {
    "nllb": ("eng_Latn", "fra_Latn"),
    "mbart": ("en_XX", "fr_XX"),
    "mbart50": ("en_XX", "fr_XX"),
    "m2m_100": ("en", "fr"),
}
FAMILIES = ("t5", "bart", "marian", *LANGUAGES)
RECIPE = """\
task: {{kind: seq2seq, source: source, target: target, generate_rows: 7, max_new_tokens: 9, num_beams: 2}}
model: {{name: {model}, dropout: 0.0}}
data: {{train: {folder}/train.jsonl, validation: {folder}/validation.jsonl, max_length: 24}}
adapter: {adapter}
training: {{steps: 12, batch_size: 8, learning_rate: 2e-3, precision: fp32, log_every: 4, eval_every: 6}}
tracking: {{images: false}}
output: {folder}/run
"""


def pieces(folder: Path) -> str:
    """Train a sentencepiece model; returns its file."""
    import sentencepiece

    texts = [" ".join(WORDS[at : at + 5]) for at in range(0, len(WORDS) - 5)] * 4
    options: dict[str, Any] = {"vocab_size": 90, "hard_vocab_limit": False, "minloglevel": 3}
    with (folder / "pieces.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=file, **options)
    return str(folder / "pieces.model")


def vocabulary(folder: Path, specials: list[str]) -> str:
    """Write the pieces as the vocabulary of a slow tokenizer; returns its file."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "pieces.model"))
    own = [model.id_to_piece(at) for at in range(model.get_piece_size())]
    kept = list(dict.fromkeys([*specials, *own]))
    (folder / "vocab.json").write_text(json.dumps({piece: at for at, piece in enumerate(kept)}))
    return str(folder / "vocab.json")


def family(name: str, folder: Path, tiny_t5: str) -> str:
    """Folder of a tiny model of a family, with its own tokenizer."""
    import transformers

    make: Any = transformers
    if name == "t5":
        return tiny_t5
    words = [(f"▁{word}", -float(at)) for at, word in enumerate(WORDS) if word.isalpha()]
    if name == "bart":
        tokenizer = make.AutoTokenizer.from_pretrained(tiny_t5)
        ids: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None, "decoder_start_token_id": 2}
        model = make.BartForConditionalGeneration(make.BartConfig(vocab_size=len(tokenizer), **SIZES, **ids))
    elif name == "marian":
        spm = pieces(folder)
        vocab = vocabulary(folder, ["</s>", "<unk>", "<pad>"])
        tokenizer = make.MarianTokenizer(spm, spm, vocab)
        ids = {"pad_token_id": 2, "decoder_start_token_id": 2, "eos_token_id": 0, "forced_eos_token_id": 0}
        model = make.MarianMTModel(make.MarianConfig(vocab_size=len(tokenizer), **SIZES, **ids))
    elif name == "m2m_100":
        spm = pieces(folder)
        tokenizer = make.M2M100Tokenizer(vocabulary(folder, ["<s>", "<pad>", "</s>", "<unk>"]), spm)
    elif name == "nllb":
        letters = "▁abcdefghijklmnopqrstuvwxyz."
        own = ["<s>", "<pad>", "</s>", "<unk>", *letters]
        tokenizer = make.NllbTokenizer({piece: at for at, piece in enumerate(own)})
    else:
        kind = make.MBartTokenizer if name == "mbart" else make.MBart50Tokenizer
        tokenizer = kind([("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0), *words])
    transformers.set_seed(0)
    if name in ("nllb", "m2m_100"):
        # More than a hundred languages besides the words.
        model = make.M2M100ForConditionalGeneration(make.M2M100Config(vocab_size=320, **SIZES))
    elif name in ("mbart", "mbart50"):
        model = make.MBartForConditionalGeneration(make.MBartConfig(vocab_size=len(tokenizer) + 8, **SIZES))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture(params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path: Path, tiny_t5: str) -> tuple[str, Seq2Seq, Any, Any]:
    """Name, task, tokenizer and model of each family."""
    from transformers import AutoModelForSeq2SeqLM

    place = family(request.param, tmp_path, tiny_t5)
    source, target = LANGUAGES.get(request.param, (None, None))
    task = Seq2Seq(source="source", target="target", source_language=source, target_language=target)
    auto: Any = AutoModelForSeq2SeqLM
    return request.param, task, load_processor(Model(name=place), task), auto.from_pretrained(place).eval()


def test_the_decoder_reads_and_is_scored_as_the_model_does_it_itself(made: tuple[str, Seq2Seq, Any, Any]) -> None:
    _, task, tokenizer, model = made
    rows = task.features(TEXTS, tokenizer, State(), 24)
    batch = task.collate(rows, tokenizer, State())
    counted = batch["labels"] != -100
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        wanted = model.prepare_decoder_input_ids_from_labels(batch["labels"].clone())
        assert torch.equal(batch["decoder_input_ids"][counted], wanted[counted])
    assert sum(row["weight"] for row in rows) == int(task.count(batch, State())) == int(counted.sum())
    with torch.no_grad():
        its_own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
        ours = task.loss(model, batch, State()).sum / task.count(batch, State())
        found = task.predict(model, batch, State())
    assert float(ours) == pytest.approx(float(its_own.loss), rel=1e-5)
    assert float(found["nats"].sum() / found["tokens"].sum()) == pytest.approx(float(ours), rel=1e-5)


def test_answers_are_those_of_the_model_one_by_one(made: tuple[str, Seq2Seq, Any, Any]) -> None:
    name, task, tokenizer, model = made
    task = task.model_copy(update={"num_beams": 2})
    asked = task.ask(TEXTS, tokenizer, 24)
    found = generate(model, tokenizer, asked, max_new_tokens=6, batch_size=2, task=task)
    settings = dict(task.decoding(tokenizer))
    language = tokenizer.convert_tokens_to_ids(LANGUAGES[name][1]) if name in LANGUAGES else None
    if name == "m2m_100":
        language = tokenizer.get_lang_id("fr")
    assert settings.get("forced_bos_token_id") == (None if name == "mbart" else language)
    start = language if name == "mbart" else model.config.decoder_start_token_id
    assert settings["decoder_start_token_id"] == (2 if start is None else start)
    for ids, answer in zip(asked, found, strict=True):
        written = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=6, **settings)[0, 1:]
        ends = (written == tokenizer.eos_token_id).nonzero()
        assert answer.text == tokenizer.decode(written[: ends[0, 0] if len(ends) else None], skip_special_tokens=True)


def test_what_is_read_and_written_is_cut_to_the_limit(tiny_t5: str) -> None:
    task = Seq2Seq(source="{a}: {b}", target="target", prefix="the ")
    tokenizer = load_processor(Model(name=tiny_t5), task)
    (row,) = task.features({"a": ["good"], "b": ["film " * 9], "target": ["bad"]}, tokenizer, State(), 5)
    assert tokenizer.decode(row["input_ids"]) == "the good : film </s>"
    assert (row["size"], row["whole"], tokenizer.decode(row["labels"])) == (5, 13, "bad </s>")
    assert task.ask({"a": ["good"], "b": ["film " * 9]}, tokenizer, 5) == [row["input_ids"]]


def test_languages_that_do_not_fit_are_refused(tmp_path: Path, tiny_t5: str) -> None:
    nllb = family("nllb", tmp_path, tiny_t5)
    for place, languages, says in [
        (tiny_t5, ("en", "fr"), r"task\.source_language: the tokenizer knows no languages"),
        (nllb, (None, None), r"task\.source_language: the tokenizer asks for languages"),
        (nllb, ("eng_Latn", "klingon"), r"task\.target_language: the tokenizer has no 'klingon'; it has e\.g\."),
    ]:
        task = Seq2Seq(source="a", target="b", source_language=languages[0], target_language=languages[1])
        with pytest.raises(ModelError, match=says):
            load_processor(Model(name=place), task)


def test_metrics_are_those_of_sacrebleu_and_rouge_score() -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    given = ["the film was very good .", "a plot", "", "it is cold ."]
    references = ["the film is good .", "the dull plot of it", "a scene", "it is cold ."]
    names: Any = ["bleu", "chrf", "ter", "rouge"]
    found = {k: v for one in _text_metrics.of_answers(given, references, names, "13a") for k, v in one.whole().items()}
    wanted = {
        "bleu": sacrebleu.corpus_bleu(given, [references]).score,
        "chrf": sacrebleu.corpus_chrf(given, [references]).score,
        "ter": sacrebleu.corpus_ter(given, [references]).score,
    }
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(reference, text) for reference, text in zip(references, given, strict=True)]
    wanted |= {name: 25 * sum(one[name].fmeasure for one in scores) for name in scores[0]}
    assert found == pytest.approx(wanted)
    # Letters with accents count: rouge-score's own tokeniser would find nothing here.
    (french,) = _text_metrics.of_answers(["где ты"], ["где она"], ["rouge"], "13a")
    assert french.whole()["rouge1"] == pytest.approx(50.0)


def test_odd_pairs_are_found() -> None:
    english = ["This is a house.", "She reads the newspaper in the morning.", "We will never see them again."] * 20
    french = ["C'est une maison.", "Elle lit le journal le matin.", "Nous ne les reverrons jamais."] * 20
    usual = _parallel.Usual.of(english, french)
    assert (usual.languages, usual.script) == (("en", "fr"), "LATIN")
    for source, target, found in [
        ("She sees the house.", "Elle voit la maison.", []),
        ("She sees the house.", "she sees  the house.", ["copied_source"]),
        ("She reads the newspaper.", "She never reads that newspaper in the evening.", ["wrong_language"]),
        ("She reads the newspaper.", "Она читает газету.", ["wrong_language"]),
        ("She reads the newspaper.", "Elle lit le journal le matin. " * 6, ["odd_length"]),
    ]:
        assert usual.remarks(source, target) == found, target
    # Summaries are in the language of the text, and all of them are short.
    of_summaries = _parallel.Usual.of([text * 9 for text in english], english)
    assert of_summaries.remarks(english[0] * 9, english[0]) == []


def write_rows(folder: Path, odd: int = 0) -> None:
    """Write rows that reverse what they read, of very unequal lengths; the first ones are copies."""
    for split, count, start in (("train", 40, 0), ("validation", 9, 40)):
        rows = []
        for number in range(count):
            words = [WORDS[(start + number + at) % 50] for at in range(1 + (number * 5) % 11)]
            target = " ".join(words if split == "train" and number < odd else [*words[::-1], "."])
            rows.append({"source": " ".join(words), "target": target})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory, tiny_t5: str) -> Path:
    """Folder of a finished run."""
    folder = tmp_path_factory.mktemp("translator")
    write_rows(folder)
    return finished(folder, RECIPE.format(model=tiny_t5, folder=folder, adapter="full"))


def test_copies_in_the_data_are_counted(tmp_path: Path, tiny_t5: str) -> None:
    write_rows(tmp_path, odd=3)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_t5, folder=tmp_path, adapter="lora"))
    found = [str(problem) for problem in check(tmp_path / "recipe.yaml").warnings]
    assert len(found) == 1, found
    assert "3 of 40 train rows have a target that is the source itself (row 1, 2, 3)" in found[0]


def test_rows_are_shown_as_source_and_target(tmp_path: Path, tiny_t5: str, server: Any) -> None:
    write_rows(tmp_path)
    rows = '{"source": "the film was very dull and cold .", "target": "bad ."}\n'
    (tmp_path / "train.jsonl").write_text(rows + (tmp_path / "train.jsonl").read_text())
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_t5, folder=tmp_path, adapter="lora"))
    shown = server.run("check", str(tmp_path / "recipe.yaml"), "--show", "1").stdout
    assert "masked   the film was very dull and cold . ⟨</s>⟩" in shown
    assert "trained  bad . ⟨</s>⟩" in shown


def test_the_report_says_how_metrics_were_computed(translator: Path) -> None:
    last = [json.loads(line) for line in (translator / "metrics.jsonl").read_text().splitlines()][-1]
    named = {"bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL", "copied_source", "wrong_language", "length_ratio"}
    assert {f"validation_{name}" for name in named} <= last.keys()
    assert named <= METRICS.keys()
    signature = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:"
    assert signature in (translator / "report.md").read_text().replace("\\", "")
    assert signature in (translator / "report.html").read_text()
    assert signature in (translator / "adapter" / "README.md").read_text()
    document = load_run(translator).evaluate(split="validation")
    assert document["signatures"]["bleu"].startswith(signature)
    for name in ("bleu", "chrf", "rougeL", "exact_match"):
        assert document["metrics"][name]["value"] == pytest.approx(last[f"validation_{name}"], abs=1e-6), name
    assert document["metrics"]["chrf"]["low"] < document["metrics"]["chrf"]["high"]


def test_beams_and_sampling_are_saved_with_the_model(translator: Path, tiny_t5: str, tmp_path: Path) -> None:
    saved = json.loads((translator / "adapter" / "generation_config.json").read_text())
    assert (saved["num_beams"], saved["max_new_tokens"], saved["decoder_start_token_id"]) == (2, 9, 0)
    load_run(translator).merge(tmp_path / "merged")
    merged = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert (merged["num_beams"], merged["max_new_tokens"]) == (2, 9)
    task = Seq2Seq(source="a", target="b", temperature=0.7, top_p=0.9)
    tokenizer = load_processor(Model(name=tiny_t5), task)
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert drawn.items() <= task.generation_config(tokenizer).items()
    assert not drawn.keys() & task.decoding(tokenizer).keys(), "what is evaluated is not drawn"


def test_chat_answers_line_by_line(translator: Path, server: Any) -> None:
    done = server.run("chat", str(translator), read="the film\nis good\n")
    wanted = [row["generated"] for row in load_run(translator).predict([{"source": "the film"}, {"source": "is good"}])]
    assert (done.returncode, done.stdout.splitlines()) == (0, wanted), done.stderr
    assert server.run("chat", str(translator), "--system", "x", read="the\n").returncode == 2


@pytest.mark.slow
def test_two_ranks_answer_unequal_rows_as_one_does(tmp_path: Path, tiny_t5: str, translator: Path) -> None:
    write_rows(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_t5, folder=tmp_path, adapter="full"))
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    words = [sys.executable, *launcher, "-m", "hf_finetune", "train", str(tmp_path / "recipe.yaml")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    one, two = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (translator, tmp_path / "run")
    )
    for name in ("bleu", "chrf", "ter", "rougeL", "exact_match", "generated_tokens"):
        values = [[line[name] for line in lines if line["phase"] == "eval"] for lines in (one, two)]
        assert len(values[0]) == 2
        assert values[0] == pytest.approx(values[1], rel=1e-3), name


@pytest.mark.parametrize(
    ("rows", "block", "rewritten"),
    [
        ([{"en": "one two", "fr": "un deux"}] * 3, {"source": "en", "target": "fr"}, None),
        ([{"translation": {"en": "one two", "de": "eins zwei"}}] * 3, {"source": "en", "target": "de"}, ["en", "de"]),
        (
            [{"article": "a long text", "highlights": "short text"}] * 3,
            {"source": "article", "target": "highlights"},
            None,
        ),
    ],
)
def test_init_recognises_pairs_of_texts(
    rows: list[dict[str, Any]], block: dict[str, str], rewritten: list[str] | None
) -> None:
    kind, proposal = recognise(columns_of(lambda: iter(rows))[0], None)
    assert (kind, proposal.task) == ("seq2seq", block)
    assert (None if proposal.rewrite is None else list(proposal.rewrite(rows[0]))) == rewritten
