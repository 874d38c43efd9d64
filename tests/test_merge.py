"""A finished run as a plain model folder: the same model, complete, whole or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from merged import finished, logits, plain, written
from models import CLASSIFIER, FOUR, LANGUAGE_MODEL, TWO, loaded, machine, recipe

from hf_finetune.cli.main import main
from hf_finetune.errors import DataError, Findings, ModelError, RecipeError, StorageError
from hf_finetune.inference import merge, weights
from hf_finetune.inference.load import Finished
from hf_finetune.inference.merge import Options
from hf_finetune.models import load, pretrained
from hf_finetune.recipe import Recipe
from hf_finetune.run.folder import RunFolder
from hf_finetune.tasks.base import State

NONE = State()
LORA = {"kind": "lora", "r": 4}
KINDS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "dora": LORA | {"dora": True},
    "rslora": LORA | {"rslora": True},
    "pissa": LORA | {"init": "pissa"},
    "olora": LORA | {"init": "olora"},
    "eva": LORA | {"init": "eva"},
    "tokens": LORA | {"trainable_tokens": ["film"]},
    "adalora": {"kind": "adalora"},
    "ia3": {"kind": "ia3"},
    "full": {"kind": "full"},
}
BERT = {"patterns": LORA | {"rank_pattern": {"query": 2}, "alpha_pattern": {"key": 3}}}
LLAMA = {
    "patterns": LORA | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "embedding": LORA | {"modules_to_save": ["embed_tokens"]},
}
CASES = [
    *[("bert", CLASSIFIER, TWO, name, (KINDS | BERT)[name]) for name in ("patterns", "adalora", "full")],
    *[
        ("llama", LANGUAGE_MODEL, NONE, name, (KINDS | LLAMA)[name])
        for name in ("rslora", "pissa", "eva", "tokens", "ia3", "embedding")
    ],
    ("llama", CLASSIFIER, FOUR, "dora", KINDS["dora"]),
]


@pytest.fixture(scope="module")
def bases(tiny_bert: str, tiny_llama: str) -> dict[str, str]:
    return {"bert": tiny_bert, "llama": tiny_llama}


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=[f"{base}-{task['kind']}-{name}" for base, task, _, name, _ in CASES],
)
def test_every_adapter_merges_into_a_folder_that_is_the_same_model(
    case: tuple[str, Any, State, str, Any], bases: dict[str, str], tmp_path: Path
) -> None:
    base, task, targets, _, adapter = case
    run = finished(recipe(bases[base], adapter, task), targets, tmp_path / "run")
    network, _ = written(run, tmp_path / "folder")
    assert not any("lora" in name or "base_model" in name for name, _ in network.named_modules())
    # Loaded anew, unmerged: nothing that the merging itself remembers.
    expected = logits(run.model(), run)
    torch.testing.assert_close(logits(plain(tmp_path / "folder", run.recipe), run), expected, atol=1e-5, rtol=1e-4)
    untrained = logits(loaded(run.recipe, targets).model, run)
    assert float((untrained - expected).abs().max()) > 1e-3  # the comparison would see a missing adapter


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_an_adapter_of_a_quantised_base_merges_into_the_dequantised_weights(
    method: str, tiny_llama: str, tmp_path: Path
) -> None:
    made = recipe(tiny_llama, LORA, LANGUAGE_MODEL, quantization=method)
    run = finished(made, NONE, tmp_path / "run")
    _, into = written(run, tmp_path / "folder")
    assert into == f"the base, dequantised from {method}"
    assert not hasattr(plain(tmp_path / "folder", made).config, "quantization_config")
    ours = logits(plain(tmp_path / "folder", made), run)
    expected = logits(run.model(), run)
    # int8 activations are rounded too, by bitsandbytes; 4-bit weights alone are not.
    allowed = {"nf4": 1e-4, "int8": 5e-2}[method] * float(expected.abs().max())
    assert float((ours - expected).abs().max()) < allowed
    if method == "nf4":
        on_checkpoint = made.model_copy(update={"model": made.model.model_copy(update={"quantization": None})})
        _, into = written(finished_again(run, on_checkpoint), tmp_path / "other")
        away = logits(plain(tmp_path / "other", made), run) - expected
        assert into == "the base"
        assert float(away.abs().max()) > 100 * allowed  # merged into the checkpoint, it is another model


def finished_again(run: Any, made: Recipe) -> Any:
    """The same adapter under another recipe."""
    from dataclasses import replace

    return replace(run, recipe=made)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_folder_is_in_the_dtype_asked_for(dtype: Any, tiny_llama: str, tmp_path: Path) -> None:
    run = finished(recipe(tiny_llama, LORA, LANGUAGE_MODEL), NONE, tmp_path / "run")
    written(run, tmp_path / "folder", dtype)
    wanted = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == (wanted, ["LlamaForCausalLM"])
    assert {str(p.dtype) for p in plain(tmp_path / "folder", run.recipe).parameters()} == {f"torch.{wanted}"}


def test_numbers_that_fp16_lacks_are_refused(tiny_llama: str, tmp_path: Path) -> None:
    run = finished(recipe(tiny_llama, LORA, LANGUAGE_MODEL), NONE, tmp_path / "run")
    network = weights.merged(weights.adapted(run)[0])
    with torch.no_grad():
        next(network.parameters())[0, 0] = 1e6
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match=r"embed_tokens\.weight holds numbers that fp16 can't; give --dtype bf16"):
        weights.write(network, run, "fp16", "5GB", tmp_path / "folder")


def test_a_trained_embedding_no_longer_shares_its_weights_with_the_output_layer(
    tiny_llama: str, tmp_path: Path
) -> None:
    run = finished(recipe(tiny_llama, LLAMA["embedding"], LANGUAGE_MODEL), NONE, tmp_path / "run")
    written(run, tmp_path / "folder")
    # vLLM and llama.cpp go by this field, and would take the embedding for the output layer.
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in tensors(tmp_path / "folder")


def test_whoever_generates_stops_where_training_taught_it(tiny_llama: str, tmp_path: Path) -> None:
    run = finished(recipe(tiny_llama, LORA, LANGUAGE_MODEL), NONE, tmp_path / "run")
    written(run, tmp_path / "folder")
    network = plain(tmp_path / "folder", run.recipe)
    end = run.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert network.generation_config.eos_token_id == [run.tokenizer.eos_token_id, end]
    others = [token for token in range(network.config.vocab_size) if token != end]
    made = network.generate(input_ids=torch.tensor([[10, 11, 12]]), max_new_tokens=5, suppress_tokens=others)
    assert made.tolist() == [[10, 11, 12, end]]


# ---- the command, on real runs ----


@pytest.fixture(scope="module")
def chatter_folder(chatter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, merged by the command in several shards."""
    place = tmp_path_factory.mktemp("merged") / "chatter"
    main(["merge", str(chatter), "--to", str(place), "--shard-size", "50KB"])
    return place


@pytest.fixture(scope="module")
def classifier_folder(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, merged by the command."""
    place = tmp_path_factory.mktemp("merged") / "classifier"
    main(["merge", str(classifier), "--to", str(place)])
    return place


def report(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "export.json").read_text())
    return found


def tensors(place: Path) -> set[str]:
    from safetensors import safe_open

    names: set[str] = set()
    for file in place.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


def test_the_merged_classifier_has_the_metric_of_the_run_in_plain_transformers(
    classifier: Path, classifier_folder: Path
) -> None:
    from hf_finetune.data import prepare
    from hf_finetune.inference.load import open_run

    run = open_run(str(classifier))
    prepared = prepare.prepare(run.recipe, run.tokenizer, run.machine)
    raw: Any = prepared.raw_validation
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier_folder)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(classifier_folder).eval()
    inputs = tokenizer(list(raw["text"]), padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        guesses = [network.config.id2label[index] for index in network(**inputs).logits.argmax(-1).tolist()]
    accuracy = sum(one == two for one, two in zip(guesses, raw["label"], strict=True)) / len(guesses)
    recorded = json.loads((classifier / "metrics.jsonl").read_text().splitlines()[-1])["validation_accuracy"]
    told = report(classifier_folder)
    assert accuracy == pytest.approx(recorded, abs=1e-3)
    assert told["metrics"]["merged"]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert told["metrics"]["merged"]["loss"] == pytest.approx(told["metrics"]["run"]["loss"], abs=1e-4)
    assert told["rows"]["used"] == len(guesses)


def test_the_report_says_what_was_compared_and_names_no_path(
    chatter: Path, chatter_folder: Path, tiny_llama: str
) -> None:
    told = report(chatter_folder)
    assert [check["what"] for check in told["checks"]] == ["merging", "run", "folder"]
    assert all(check["difference"] <= check["tolerance"] for check in told["checks"])
    assert set(told["metrics"]) == {"run", "adapter", "merged"}
    assert abs(told["change"]["merged"]["loss"]) < 1e-4
    assert told["rows"]["split"] == "validation"
    assert [source["name"] for source in told["rows"]["sources"]] == ["sums.jsonl"]
    files = {path.relative_to(chatter_folder).as_posix() for path in chatter_folder.rglob("*") if path.is_file()}
    assert set(told["files"]) == files - {"export.json"}
    everything = "".join(path.read_text() for path in chatter_folder.glob("*.json"))
    assert str(chatter.parent) not in everything
    assert str(Path(tiny_llama).parent) not in everything


def test_the_folder_has_what_vllm_reads(chatter_folder: Path) -> None:
    """A written contract: the files and fields that vLLM's loaders look for in a Hugging Face folder."""
    modes = {path.stat().st_mode for path in chatter_folder.rglob("*") if path.is_file()}
    assert modes == {(chatter_folder / "export.json").stat().st_mode}, "weights have the permissions of any new file"
    config = json.loads((chatter_folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["dtype"] == "float32"
    needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"]
    assert all(isinstance(config[name], int) for name in needed)
    assert "quantization_config" not in config
    index = json.loads((chatter_folder / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert shards == {path.name for path in chatter_folder.glob("*.safetensors")}
    assert set(index["weight_map"]) == tensors(chatter_folder)
    assert not any("lora" in name or "base_layer" in name for name in index["weight_map"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(chatter_folder)
    assert len(tokenizer) <= config["vocab_size"]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "what"}], tokenize=False)
    assert "<|im_start|>user" in rendered
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (chatter_folder / name).stat().st_size
    assert not list(chatter_folder.rglob("*.bin"))


def test_every_tensor_has_a_name_in_llama_cpp(chatter_folder: Path) -> None:
    import gguf

    config = json.loads((chatter_folder / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.LLAMA]
    found = {name: names.get_type_and_name(name, try_suffixes=(".weight", ".bias")) for name in tensors(chatter_folder)}
    assert [name for name, mapped in found.items() if mapped is None or mapped[0] not in known] == []


def test_the_tokenizer_gives_what_llama_cpp_asks_it_for(chatter_folder: Path) -> None:
    import gguf

    vocabulary = gguf.SpecialVocab(chatter_folder, load_merges=False)
    assert vocabulary.chat_template == (chatter_folder / "chat_template.jinja").read_text()
    assert vocabulary.special_token_ids["eos"] == 2


def test_what_is_over_the_tolerance_is_refused_and_leaves_nothing(chatter: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(chatter), "--to", str(tmp_path / "m"), "--dtype", "bf16", "--tolerance", "1e-6"])
    assert ended.value.code == 4
    assert list(tmp_path.iterdir()) == []
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "what was written is not the adapter's model: logits differ by" in told[0]
    assert "nothing was written" in told[0]


def test_a_merge_that_changes_the_model_is_refused(chatter: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def spoil(adapted: Any) -> Any:
        network = adapted.merge_and_unload()
        with torch.no_grad():
            network.lm_head.weight.mul_(1.01)
        return network

    monkeypatch.setattr(weights, "merged", spoil)
    with pytest.raises(ModelError, match="the merged weights are not the adapter's model"):
        merge.merge(str(chatter), Options(to=str(tmp_path / "m")))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_replaced_only_on_request_and_only_if_merge_wrote_it(
    chatter: Path, tmp_path: Path
) -> None:
    mine, others = tmp_path / "mine", tmp_path / "others"
    others.mkdir()
    (others / "thesis.tex").write_text("three years")
    for place, overwrite in ((others, False), (others, True)):
        with pytest.raises(RecipeError, match="holds files that `merge` did not write"):
            merge.merge(str(chatter), Options(to=str(place), overwrite=overwrite))
    leftover = tmp_path / ".mine.partial"
    leftover.mkdir()
    (leftover / "half.safetensors").write_text("of a process that was killed")
    merge.merge(str(chatter), Options(to=str(mine)))
    with pytest.raises(RecipeError, match="give --overwrite"):
        merge.merge(str(chatter), Options(to=str(mine)))
    (mine / "old").touch()
    merge.merge(str(chatter), Options(to=str(mine), overwrite=True))
    assert not (mine / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "others"]


def test_the_run_is_never_replaced(chatter: Path) -> None:
    for inside in ["", "..", "adapter", "adapter/merged"]:
        with pytest.raises(RecipeError, match="would replace the run"):
            Options(to=str(chatter / inside), overwrite=True).check(str(chatter))


def test_all_that_is_wrong_with_the_command_is_told_at_once(
    chatter: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(chatter), "--to", str(tmp_path / "file"), "--shard-size", "5", "--onnx", "--quantize=int8"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 4
    assert "pip install 'hf-finetune[onnx]'" in told
    assert "pip install 'hf-finetune[torchao]'" in told


def test_paths_outside_the_root_are_refused(chatter: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_FINETUNE_ROOT", str(chatter))
    options = Options(to=str(tmp_path / "m"), data=("/etc/rows.csv",))
    with pytest.raises(RecipeError, match="lies outside") as raised:
        options.check(str(chatter))
    assert len(raised.value.problems) == 2


def test_the_folder_one_is_in_is_no_place_for_a_model(tmp_path: Path, monkeypatch: Any) -> None:
    for to in [".", "..", "/"]:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(RecipeError, match="is the folder you are in, or holds it"):
            Options(to=to).check("/run")


def test_without_its_data_a_run_is_compared_on_rows_that_are_given(chatter: Path, tmp_path: Path) -> None:
    overrides = [f"data.train={tmp_path / 'gone.jsonl'}"]
    with pytest.raises(DataError, match="rows to compare on can also be given with --data FILE"):
        merge.merge(str(chatter), Options(to=str(tmp_path / "m")), overrides)
    given = tmp_path / "given.jsonl"
    given.write_text('{"question": "what is one plus two ?", "answer": "one equals two ."}\n' * 3)
    merge.merge(str(chatter), Options(to=str(tmp_path / "m"), data=(str(given),), rows=2), overrides)
    assert {key: report(tmp_path / "m")["rows"][key] for key in ("split", "used", "of")} == {
        "split": "data",
        "used": 2,
        "of": 3,
    }


def test_a_full_disk_is_told_before_anything_is_written(chatter: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(weights, "free_bytes", lambda place: 10)
    with pytest.raises(StorageError, match="bytes, 10 are free"):
        merge.merge(str(chatter), Options(to=str(tmp_path / "m")))
    assert list(tmp_path.iterdir()) == []


def test_the_dtype_is_the_checkpoints_own_unless_asked_otherwise(
    tiny_llama: str, chatter_folder: Path, tmp_path: Path
) -> None:
    assert report(chatter_folder)["dtype"] == "fp32"
    half = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    run = finished(recipe(str(tmp_path / "base"), LORA, LANGUAGE_MODEL), NONE, tmp_path / "run")
    assert weights.stored_dtype(run) == "bf16"


def test_json_lines_have_the_figures(classifier: Path, tmp_path: Path, capsys: Any) -> None:
    main(["--log-format", "json", "--quiet", "merge", str(classifier), "--to", str(tmp_path / "m"), "--dtype", "fp16"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["merged"]
    assert lines[0]["dtype"] == "fp16"
    assert lines[0]["metrics"]["merged"].keys() == lines[0]["metrics"]["run"].keys()


def test_a_base_with_generation_values_that_have_no_effect_is_merged_without_them(
    tiny_llama: str, tmp_path: Path, capsys: Any
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    given = {"temperature": 0.6, "top_p": 0.9, "typical_p": 0.5, "length_penalty": 0.7, "output_scores": True}
    file = base / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | given | {"repetition_penalty": 1.2}))
    run = finished(recipe(str(base), LORA, LANGUAGE_MODEL), NONE, tmp_path / "run")
    written(run, tmp_path / "merged")
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "merged")
    config.validate(strict=True)
    assert config.repetition_penalty == 1.2
    usual: Any = transformers.GenerationConfig
    assert all(getattr(config, name) in (None, getattr(usual(), name)) for name in given)
    said = capsys.readouterr().out
    assert all(name in said for name in given)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ".*(lm_head|v_proj)"])
def test_an_adapter_of_tied_embeddings_is_warned_about_before_training_and_refused_at_once(
    targets: Any, tiny_llama: str, tmp_path: Path
) -> None:
    made = recipe(tiny_llama, LORA | {"target_modules": targets}, LANGUAGE_MODEL)
    findings = Findings()
    load.examine(made, NONE, pretrained.load_tokenizer(made.model), findings)
    (warning,) = findings.warnings
    assert warning.key == "adapter.target_modules"
    assert "`merge` can't make full weights of this adapter" in warning.message
    run = Finished(RunFolder(str(tmp_path)), made, machine(), NONE, pretrained.load_tokenizer(made.model))
    with pytest.raises(ModelError, match="shares its weights with the other embedding"):
        weights.adapted(run)


def test_what_can_be_merged_is_not_warned_about(tiny_llama: str) -> None:
    cases: list[dict[str, Any]] = [{}, {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}]
    for more in cases:
        made, findings = recipe(tiny_llama, LORA | more, LANGUAGE_MODEL), Findings()
        load.examine(made, NONE, pretrained.load_tokenizer(made.model), findings)
        assert findings.warnings == []
