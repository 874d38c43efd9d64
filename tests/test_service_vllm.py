"""Answers that another server generates are those of the own engine: `serve --engine vllm=URL`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import finished
from serving import Served, post
from vllmserver import KEY, VLLM

from hf_finetune import predict
from hf_finetune.recipe import Recipe
from hf_finetune.service.settings import Settings

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")

CHATS = """\
task: {{kind: causal_lm, messages: messages}}
model: {{name: {model}}}
data: {{train: {data}, max_length: 64, checks: {{duplicates: "off"}}}}
adapter: {{kind: lora, r: {r}, alpha: 8, target_modules: all-linear}}
training: {{steps: 12, batch_size: 8, learning_rate: 3e-3, precision: fp32, log_every: 1, seed: {r}}}
tracking: {{images: false, report: false}}
output: {output}
"""
ASKED = ["what is one plus two ?", "what is five plus five ?", "what is nine plus ten ?"]
ROOM = 96


@pytest.fixture(scope="module")
def other(tiny_llama: str) -> Iterator[VLLM]:
    """The other server."""
    made = VLLM(tiny_llama, max_rank=8, max_length=ROOM)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str, chatter: Path, classifier: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight")
    rows = []
    for a in numbers:
        for b in numbers:
            user, answer = {"role": "user", "content": f"what is {a} plus {b} ?"}, f"{a} equals {b} ."
            rows.append({"messages": [user, {"role": "assistant", "content": answer}]})
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {"prompt": chatter, "label": classifier}
    for name, r in (("chat", 4), ("wide", 16)):
        (folder / name).mkdir()
        recipe = CHATS.format(model=tiny_llama, data=folder / "chats.jsonl", output=folder / name / "run", r=r)
        made[name] = finished(folder / name, recipe)
    return made


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, Path], other: VLLM) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)
        folder = tmp_path_factory.mktemp("forwarded") / "root"
        made = Served(folder, {**runs, "gone": runs["chat"]}, "--engine", f"vllm={other.url}")
    yield made
    made.close()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, Path]) -> Iterator[Served]:
    """The same models, answered by the own engine."""
    made = Served(tmp_path_factory.mktemp("own") / "root", runs)
    yield made
    made.close()


def chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_answers_are_those_of_the_own_engine(served: Served, own: Served, other: VLLM) -> None:
    for text in ASKED:
        row = {"messages": chat(text)}
        expected = predict(served.run("chat"), [row], max_new_tokens=20)[0]
        ask: dict[str, Any] = {"messages": row["messages"], "max_tokens": 20}
        answer = served.client.chat.completions.create(model=served.names["chat"], **ask)
        assert answer.choices[0].message.content == expected["generated"]
    assert other.calls["/v1/completions"] == len(ASKED)
    assert (other.calls["/v1/load_lora_adapter"], set(other.adapters)) == (1, {"ftjob-chat"})
    ask = {"messages": chat(ASKED[0]), "max_tokens": 20, "logprobs": True, "top_logprobs": 3}
    stop = predict(served.run("chat"), [{"messages": chat(ASKED[0])}], max_new_tokens=20)[0]["generated"].split()[1]
    for more in ({}, {"n": 2, "max_tokens": 3}, {"stop": stop}, {"stop": [stop], "n": 2}, {"top_logprobs": 0}):
        found = [one.client.chat.completions.create(model=one.names["chat"], **ask | more) for one in (served, own)]
        assert found[0].usage == found[1].usage
        for mine, theirs in zip(found[0].choices, found[1].choices, strict=True):
            assert (mine.message, mine.finish_reason) == (theirs.message, theirs.finish_reason)
            tokens = [mine.logprobs.content, theirs.logprobs.content]
            for one, two in zip(*tokens, strict=True):
                assert (one.token, one.bytes) == (two.token, two.bytes)
                assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
                assert [top.token for top in one.top_logprobs] == [top.token for top in two.top_logprobs]
    asks: dict[str, Any] = {"prompt": ASKED, "max_tokens": 5, "logprobs": 2, "n": 2}
    mine, theirs = (one.client.completions.create(model=one.names["prompt"], **asks) for one in (served, own))
    assert [choice.text for choice in mine.choices] == [choice.text for choice in theirs.choices]
    assert mine.choices[3].logprobs.tokens == theirs.choices[3].logprobs.tokens
    assert mine.usage == theirs.usage
    assert "ftjob-prompt" in other.adapters
    assert own.process.poll() is None


def test_a_stream_says_the_same_piece_by_piece(served: Served) -> None:
    ask: dict[str, Any] = {"model": served.names["chat"], "messages": chat(ASKED[1]), "max_tokens": 6, "n": 2}
    whole = served.client.chat.completions.create(**ask)
    chunks = list(served.client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    for index in (0, 1):
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert "".join(one.delta.content or "" for one in choices) == whole.choices[index].message.content
        assert [one.finish_reason for one in choices if one.finish_reason] == [whole.choices[index].finish_reason]
        assert len(choices) > 3
    assert chunks[-1].usage == whole.usage


def test_draws_repeat_with_a_seed(served: Served) -> None:
    ask: dict[str, Any] = {"model": served.names["chat"], "messages": chat(ASKED[1]), "temperature": 2, "n": 4}
    found = [served.client.chat.completions.create(**ask, seed=3).choices for _ in range(2)]
    texts = [[choice.message.content for choice in choices] for choices in found]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


def test_what_the_other_server_cannot_have_is_answered_here(served: Served, other: VLLM) -> None:
    before = other.calls["/v1/completions"]
    row = {"messages": chat(ASKED[0])}
    for _ in range(2):
        answer = served.client.chat.completions.create(model=served.names["wide"], messages=row["messages"])
        assert answer.choices[0].message.content == predict(served.run("wide"), [row])[0]["generated"]
    loads = other.calls["/v1/load_lora_adapter"]
    served.client.chat.completions.create(model=served.names["wide"], messages=row["messages"])
    assert other.calls["/v1/load_lora_adapter"] == loads, "a refused adapter is not offered again at once"
    found = post(served, "/classifications", model=served.names["label"], input="a good film")
    assert set(found["results"][0]["label"]["scores"]) == {"negative", "positive"}
    assert other.calls["/v1/completions"] == before
    long = chat("no . " * 60)
    with pytest.raises(openai.BadRequestError, match=f"room for {ROOM}"):  # the model itself has more
        served.client.chat.completions.create(model=served.names["chat"], messages=long)


def test_many_are_answered_at_the_same_time_and_a_client_may_hang_up(served: Served, other: VLLM) -> None:
    ask: dict[str, Any] = {"model": served.names["prompt"], "max_tokens": 8}
    other.pause, other.most_at_once = 0.05, 0
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda text: served.client.completions.create(**ask, prompt=text), ASKED * 3))
        assert other.most_at_once >= 4
        other.pause = 0.2
        ask |= {"max_tokens": 60, "temperature": 2, "seed": 1, "n": 4}
        stream = served.client.completions.create(**ask, prompt=ASKED[0], stream=True)
        next(iter(stream))
        assert other.at_once == 4
        stream.response.close()
        end = time.monotonic() + 10
        while other.at_once:
            assert time.monotonic() < end, "it is still generating"
            time.sleep(0.05)
    finally:
        other.pause = 0.0


def test_the_other_server_may_be_restarted_and_be_away(served: Served, other: VLLM) -> None:
    ask: dict[str, Any] = {"model": served.names["chat"], "messages": chat(ASKED[0])}
    before = served.client.chat.completions.create(**ask).choices
    other.stop()
    other.start()
    assert not other.adapters
    assert served.client.chat.completions.create(**ask).choices == before, "it was registered again"
    assert set(other.adapters) == {"ftjob-chat"}
    other.stop()
    try:
        away(served, other, ask)
    finally:
        other.start()
    assert served.client.chat.completions.create(**ask).choices == before


def away(served: Served, other: VLLM, ask: dict[str, Any]) -> None:
    """Ask while the other server is down."""
    impatient = served.client.with_options(max_retries=0)
    for more in ({}, {"stream": True}):
        with pytest.raises(openai.InternalServerError) as caught:
            impatient.chat.completions.create(**ask, **more)
        answer = caught.value.response
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert str(other.port) not in answer.text
        assert "127.0.0.1" not in answer.text


def test_a_deleted_model_is_forgotten_there(served: Served, other: VLLM) -> None:
    served.client.chat.completions.create(model=served.names["gone"], messages=chat(ASKED[0]))
    assert "ftjob-gone" in other.adapters
    assert served.client.models.delete(served.names["gone"]).deleted
    assert "ftjob-gone" not in other.adapters
    with pytest.raises(openai.NotFoundError):
        served.client.chat.completions.create(model=served.names["gone"], messages=chat(ASKED[0]))


def test_settings_and_recipes_that_fit() -> None:
    from hf_finetune.service import vllm

    assert Settings.model_validate({"engine": "vllm=http://gpu-3:8000/v1"}).engine_url == "http://gpu-3:8000/v1"
    assert Settings.model_validate({"memory": "8GB"}).memory == 8 * 10**9
    for wrong in ({"engine": "vllm=gpu-3"}, {"engine": "tgi=http://gpu-3"}, {"memory": "much"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings.model_validate(wrong)
    given = {"task": {"kind": "causal_lm", "text": "text"}, "model": {"name": "a/b"}, "data": {"train": "a.txt"}}
    for adapter, model, fits in (
        ({"kind": "lora"}, {}, True),
        ({"kind": "lora", "dora": True}, {}, False),
        ({"kind": "lora", "modules_to_save": ["lm_head"]}, {}, False),
        ({"kind": "lora"}, {"quantization": "nf4"}, False),
        ({"kind": "full"}, {}, False),
    ):
        recipe = Recipe.from_dict({**given, "adapter": adapter, "model": {"name": "a/b", **model}})
        assert vllm.takes("run", recipe) is fits, (adapter, model)
