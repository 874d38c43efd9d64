"""Tiny real models, tokenizers and data that the tests share, and the environment they run in."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from forked import Server
    from hubserver import Hub

    from hf_finetune.tasks.base import Task

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", ACCELERATE_USE_CPU="1")
# A busy machine is no defect of what is tested.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# One core a worker: tiny models gain nothing from threads, and threads of two workers fight for the same cores.
CORES = sorted(os.sched_getaffinity(0))
# Several runs of pytest beside each other spread by their process numbers.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", f"gw{os.getpid()}")
os.sched_setaffinity(0, {CORES[int(WORKER[2:]) % len(CORES)]})

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "the", "a", "an", "is", "was", "it", "this", "that", "film", "movie", "story", "plot", "acting", "cast",
    "scene", "music", "good", "great", "fine", "lovely", "warm", "funny", "bad", "poor", "dull", "weak", "cold",
    "boring", "not", "very", "quite", "never", "so", "and", "but", "with", "of", "for", "in", "on", "by", "one",
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "plus", "minus", "equals", "what",
    "how", "many", "answer", "user", "assistant", "system", "yes", "no", ".", ",", "?", "!", ":", "\n",
]  # fmt: skip


RECIPE = """\
task: {{kind: text_classification, text: text, label: label}}
model: {{name: {model}}}
data: {{train: {data}, validation_share: 0.25, max_length: 32}}
adapter: {{kind: lora, r: 4, alpha: 8, target_modules: all-linear}}
training: {{epochs: 2, batch_size: 16, learning_rate: 3e-3, precision: fp32, log_every: 1}}
output: {output}
"""


QUICK = ("tracking.images=false", "tracking.report=false")
"""What most tests do without."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    outcome: Any

    def lines(self, phase: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl of one phase."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["phase"] == phase]

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.folder / "status.json").read_text())
        return status


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave a test out, and say so, once the time that the whole run has is used up."""
    if time.time() > float(os.environ.get("TESTS_UNTIL", "inf")):
        pytest.skip("left out: the time given by TESTS_UNTIL is used up")


@pytest.fixture(scope="session", autouse=True)
def _isolated_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing that a test tokenises or loads lands in the caches of whoever runs the tests."""
    caches = tmp_path_factory.mktemp("caches")
    os.environ["HF_FINETUNE_CACHE"] = str(caches / "hf_finetune")
    os.environ["HF_DATASETS_CACHE"] = str(caches / "datasets")


_frozen = [0]
"""How many modules were loaded when their objects were last put out of the garbage collector's sight."""


@pytest.fixture(autouse=True)
def _as_wide_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves lines whole, wherever the tests are started from: a terminal or a runner may export its width."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def _quick_runs() -> Iterator[None]:
    """Spares each run in this process what a test does not look at.

    transformers collects garbage at the begin of each training, which takes half a second where all the libraries are
    looked through; and how fast the machine multiplies is measured in two products, not for 0.2 s.
    """
    yield
    if len(sys.modules) > _frozen[0] + 100:
        _frozen[0] = len(sys.modules)
        gc.collect()
        gc.freeze()
    if "hf_finetune.device" in sys.modules:
        sys.modules["hf_finetune.device"].LONGEST = 0.0  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, _isolated_caches: None) -> Iterator[Server]:
    """Starts processes of the command line that have the libraries loaded: `server.run("check", recipe)`."""
    from forked import Server

    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a BERT encoder of two layers with random weights, and its tokenizer."""
    from transformers import BertConfig, BertModel, set_seed

    folder = tmp_path_factory.mktemp("tiny_bert")
    tokenizer = _tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "[CLS] $A [SEP]")
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    set_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_masked(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str) -> str:
    """Folder of the same encoder with a head that tells masked tokens."""
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, set_seed

    folder = tmp_path_factory.mktemp("tiny_masked")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.mask_token = "[MASK]"
    tokenizer.save_pretrained(folder)
    set_seed(0)
    auto: Any = AutoModelForMaskedLM
    auto.from_config(AutoConfig.from_pretrained(tiny_bert)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a Llama-shaped causal LM of two layers with random weights, a ChatML template and no BOS."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = _tokenizer(["<|pad|>", "[UNK]", "<|endoftext|>", "<|im_start|>", "<|im_end|>"], None)
    tokenizer.chat_template = CHATML
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder)
    save_llama(folder, len(tokenizer))
    return str(folder)


def save_llama(folder: Path, vocabulary: int) -> None:
    """Write a Llama-shaped causal LM of two layers, with random weights; pads are token 0, ends are token 2."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a T5 encoder-decoder of two layers each with random weights, and its tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration, set_seed

    folder = tmp_path_factory.mktemp("tiny_t5")
    tokenizer = _tokenizer(["<pad>", "<unk>", "</s>"], "$A </s>")
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    set_seed(0)
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    sizes |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    config = T5Config(vocab_size=len(tokenizer), **sizes)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def _tokenizer(special: list[str], template: str | None):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """A word-level tokenizer; `special` starts with the pad and unknown tokens."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    make: Any = transformers.PreTrainedTokenizerFast
    vocabulary = {word: index for index, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=special[1]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Punctuation()]
    )
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    if "</s>" in special:
        core.post_processor = processors.TemplateProcessing(
            single=template, pair="$A $B:1 </s>:1", special_tokens=[("</s>", 2)]
        )
        return make(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    if template is not None:
        core.post_processor = processors.TemplateProcessing(
            single=template, pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        return make(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return make(
        tokenizer_object=core,
        pad_token="<|pad|>",
        unk_token="[UNK]",
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a vision transformer of two layers with random weights, and its image processor."""
    from transformers import ViTConfig, ViTModel, set_seed
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("tiny_vit")
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    set_seed(0)
    config = ViTConfig(**sizes, intermediate_size=64, image_size=32, patch_size=8, initializer_range=0.2)
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a wav2vec 2.0 of two layers with random weights, its feature extractor and a tokenizer of letters."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
        set_seed,
    )

    folder = tmp_path_factory.mktemp("tiny_wav2vec2")
    letters = {letter: number for number, letter in enumerate(["<pad>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"])}
    (folder / "vocab.json").write_text(json.dumps(letters))
    letterer: Any = Wav2Vec2CTCTokenizer
    tokenizer = letterer(str(folder / "vocab.json"), bos_token=None, eos_token=None, unk_token="<unk>")
    extractor: Any = Wav2Vec2FeatureExtractor
    processor: Any = Wav2Vec2Processor
    processor(extractor(return_attention_mask=True), tokenizer).save_pretrained(folder)
    set_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "conv_dim": (16, 16), "conv_kernel": (20, 16), "conv_stride": (20, 16)}
    sizes |= {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_conv_pos_embedding_groups": 2}
    sizes |= {"num_conv_pos_embeddings": 4, "classifier_proj_size": 16, "apply_spec_augment": False, "layerdrop": 0.0}
    config = Wav2Vec2Config(vocab_size=len(letters), pad_token_id=0, **sizes)
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a Whisper for English with random weights that hears one second, its tokenizer of single bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
        set_seed,
    )

    folder = tmp_path_factory.mktemp("tiny_whisper")
    words = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    vocabulary = {word: index for index, word in enumerate([*sorted(ByteLevel.alphabet()), *words])}
    end, start, _ = (vocabulary[word] for word in words)
    make: Any = WhisperTokenizer
    tokenizer = make(vocab=vocabulary, merges=[], pad_token=words[0], additional_special_tokens=words[1:])
    extractor: Any = WhisperFeatureExtractor
    processor: Any = WhisperProcessor
    processor(extractor(chunk_length=1, feature_size=16), tokenizer).save_pretrained(folder)
    set_seed(0)
    sizes: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 50}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_target_positions": 448, "init_std": 0.2}
    ends: dict[str, Any] = {
        "pad_token_id": end,
        "bos_token_id": end,
        "eos_token_id": end,
        "decoder_start_token_id": start,
    }
    model = WhisperForConditionalGeneration(WhisperConfig(vocab_size=len(vocabulary), **sizes, **ends))
    settings: Any = GenerationConfig
    model.generation_config = settings(**ends, is_multilingual=False, no_timestamps_token_id=end + 2)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_jev(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> str:
    """Folder of a decision model over a Llama-shaped body of two layers with random weights, and its short prompt."""
    from transformers import AutoConfig, AutoTokenizer, JevConfig, JevForDecision, set_seed
    from transformers.decision import DecisionConfig

    folder = tmp_path_factory.mktemp("tiny_jev")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    set_seed(0)
    body = AutoConfig.from_pretrained(tiny_llama)
    model: Any = JevForDecision(JevConfig(hidden_size=body.hidden_size, text_config=body, initializer_range=0.2))
    options = "{% for option in question.options %} {{ option }}{% endfor %}"
    template = "{{ state }}\n{{ question.instructions }}" + options + "\n:<|mark|>"
    model.decision_config = DecisionConfig(chat_template=template, noul_options=["false", "true"])
    model.save_pretrained(folder)
    return str(folder)


TINY = ("tiny_bert", "tiny_masked", "tiny_llama", "tiny_t5", "tiny_vit", "tiny_wav2vec2", "tiny_whisper", "tiny_jev")


@pytest.fixture(scope="session")
def model_of(request: pytest.FixtureRequest) -> Callable[[Task], str]:
    """The folder of a tiny model that can do a task."""

    def find(task: Task) -> str:
        import transformers

        from hf_finetune.errors import ModelError

        # One by one: the last need newer versions of transformers than the others.
        for name in TINY:
            folder: str = request.getfixturevalue(name)
            config = transformers.AutoConfig.from_pretrained(folder)
            if task.made_for and not config.architectures[0].endswith(task.made_for):
                continue
            if type(config) not in getattr(transformers, task.auto_model)._model_mapping:
                continue
            try:
                task.check_config(folder, config)
            except ModelError:
                continue
            return folder
        raise AssertionError(f"no model here does what {task.auto_model} loads; add a tiny one that does")

    return find


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Writes a csv file of so many review sentences with string labels and returns its path."""
    folder = tmp_path_factory.mktemp("reviews")

    def write(rows: int) -> str:
        file = folder / f"reviews-{rows}.csv"
        if not file.exists():
            file.write_text("text,label\n" + "".join(_review(index) for index in range(rows)))
        return str(file)

    return write


def _review(index: int) -> str:
    good = index % 2 == 0
    subject = ("film", "movie", "story", "plot", "acting", "cast", "scene", "music")[index // 2 % 8]
    praise = ("good", "great", "fine", "lovely") if good else ("bad", "poor", "dull", "weak")
    filler = " very" * (index // 64 % 5) + " so" * (index // 16 % 3)
    return f"the {subject} is{filler} {praise[index // 16 % 4]} .,{'positive' if good else 'negative'}\n"


CHAT_RECIPE = """\
task: {{kind: causal_lm, prompt: question, completion: answer, sample_prompts: 2, max_new_tokens: 6}}
model: {{name: {model}}}
data: {{train: {data}, validation_share: 0.25, max_length: 32}}
adapter: {{kind: lora, r: 4, alpha: 8, target_modules: all-linear}}
training: {{epochs: 2, batch_size: 16, learning_rate: 3e-3, precision: fp32, log_every: 1}}
output: {output}
"""


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, reviews: Callable[[int], str]) -> Path:
    """Folder of a finished run of a classifier; tests read it."""
    folder = tmp_path_factory.mktemp("classifier")
    return finished(folder, RECIPE.format(model=tiny_bert, data=reviews(96), output=folder / "run"))


@pytest.fixture(scope="session")
def chatter(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """Folder of a finished run of a language model; tests read it."""
    folder = tmp_path_factory.mktemp("chatter")
    numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    rows = [{"question": f"what is {a} plus {b} ?", "answer": f"{a} equals {b} ."} for a in numbers for b in numbers]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return finished(folder, CHAT_RECIPE.format(model=tiny_llama, data=folder / "sums.jsonl", output=folder / "run"))


def finished(folder: Path, recipe: str) -> Path:
    """Run a recipe; returns the run folder."""
    from hf_finetune.pipeline.train import train

    (folder / "recipe.yaml").write_text(recipe)
    train(folder / "recipe.yaml")
    return folder / "run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty Hub, which this process and those that it starts reach."""
    from hubserver import serving
    from pushing import TOKEN, reach

    with serving(TOKEN) as made:
        reach(monkeypatch, made.url, tmp_path / "home")
        yield made


@pytest.fixture
def shared() -> Path:
    """Folder of reference data beside the checkout; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the shared reference data are not beside this checkout")
    return folder


@pytest.fixture
def run(tmp_path: Path, tiny_bert: str, reviews: Callable[[int], str]) -> Callable[..., Run]:
    """Runs a small recipe in this process: `run("training.steps=3", ...)`."""

    def start(*overrides: str, restart: bool = False) -> Run:
        from hf_finetune.pipeline.train import train

        file = tmp_path / "recipe.yaml"
        file.write_text(RECIPE.format(model=tiny_bert, data=reviews(96), output=tmp_path / "run"))
        # Drawing takes longer than training here; whoever is interested says so.
        rare = () if any(word.startswith("tracking.") for word in overrides) else QUICK
        return Run(tmp_path / "run", train(file, [*overrides, *rare], restart=restart).outcome)

    return start
