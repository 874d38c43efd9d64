"""What models of the service answer: the numbers of `predict`, streamed or not, alone or in a batch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from conftest import finished
from forked import Server
from serving import Served, post

from hf_finetune import predict
from hf_finetune.service.questions import FINAL, Event, Failed, Heard, Question

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")

TAGS = """\
task: {{kind: token_classification, words: words, tags: tags}}
model: {{name: {model}}}
data: {{train: {data}, max_length: 32, checks: {{duplicates: "off"}}}}
adapter: {{kind: lora, r: 4, alpha: 8, target_modules: all-linear}}
training: {{epochs: 2, batch_size: 16, learning_rate: 3e-3, precision: fp32, log_every: 1}}
tracking: {{images: false, report: false}}
output: {output}
"""
CHATS = """\
task: {{kind: causal_lm, messages: messages, tools: tools}}
model: {{name: {model}}}
data: {{train: {data}, max_length: 64, checks: {{duplicates: "off"}}}}
adapter: {{kind: lora, r: {r}, alpha: 8, target_modules: all-linear}}
training: {{steps: 8, batch_size: 8, learning_rate: 3e-3, precision: fp32, log_every: 1, seed: {r}}}
tracking: {{images: false, report: false}}
output: {output}
"""
ASKED = ["what is one plus two ?", "what is five plus five ?", "a good film ?", "no . yes"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> list[Path]:
    """Two adapters of one base."""
    folder = tmp_path_factory.mktemp("chats")
    numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight")
    rows = []
    for a in numbers:
        for b in numbers:
            user, answer = {"role": "user", "content": f"what is {a} plus {b} ?"}, f"{a} equals {b} ."
            rows.append({"messages": [user, {"role": "assistant", "content": answer}], "tools": None})
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = []
    for r in (4, 8):
        (folder / str(r)).mkdir()
        recipe = CHATS.format(model=tiny_llama, data=folder / "chats.jsonl", output=folder / str(r) / "run", r=r)
        made.append(finished(folder / str(r), recipe))
    return made


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str) -> Path:
    folder = tmp_path_factory.mktemp("tagger")
    rows = [{"words": ["the", word, "is", "good"], "tags": ["O", "B-x", "O", "O"]} for word in ("film", "plot") * 12]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = TAGS.format(model=tiny_bert, data=folder / "words.jsonl", output=folder / "run")
    return finished(folder, recipe + "\n")


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, classifier: Path, chatter: Path, chats: list[Path], tagger: Path
) -> Iterator[Served]:
    runs = {"label": classifier, "prompt": chatter, "chat": chats[0], "other": chats[1], "tags": tagger}
    made = Served(tmp_path_factory.mktemp("served") / "root", runs)
    yield made
    made.close()


def chat_rows(texts: list[str]) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": text}]} for text in texts]


def test_answers_are_those_of_predict(served: Served) -> None:
    client = served.client
    for name in ("chat", "other"):
        for row in chat_rows(ASKED):
            expected = predict(served.run(name), [row])[0]
            answer = client.chat.completions.create(model=served.names[name], messages=row["messages"])
            assert answer.choices[0].message.content == expected["generated"]
            # `ended` is of the token that ends a turn alone; any end token is a stop.
            reasons = {"stop"} if expected["ended"] else {"stop", "length"}
            assert answer.choices[0].finish_reason in reasons
    texts = [row["generated"] for row in predict(served.run("prompt"), ASKED, max_new_tokens=5)]
    answer = client.completions.create(model=served.names["prompt"], prompt=ASKED, max_tokens=5)
    assert [choice.text for choice in answer.choices] == texts
    answer = client.chat.completions.create(
        model=served.names["prompt"], messages=[{"role": "user", "content": ASKED[0]}], max_tokens=5
    )
    assert answer.choices[0].message.content == texts[0]
    texts = ["a good film", "the plot is dull", "it was not good , never"]
    found = post(served, "/classifications", model=served.names["label"], input=texts)
    for result, row in zip(found["results"], predict(served.run("label"), texts), strict=True):
        scores = {name: row[f"probability.{name}"] for name in ("negative", "positive")}
        assert result == {"label": {"scores": scores}}
    chats = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    by_chat = post(served, "/chat/classifications", model=served.names["label"], input=chats)
    assert by_chat["results"] == found["results"]
    rows = [{"words": ["the", "film", "is", "bad"]}, {"words": ["plot", "."]}]
    found = post(served, "/classifications", model=served.names["tags"], input=rows)
    assert found["results"] == predict(served.run("tags"), rows)


def test_a_stream_says_the_same_and_counts_tokens(served: Served) -> None:
    ask = {"model": served.names["chat"], "messages": chat_rows(ASKED)[0]["messages"], "max_tokens": 6, "n": 2}
    whole = served.client.chat.completions.create(**ask)
    chunks = list(served.client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        text = "".join(choice.delta.content or "" for choice in own)
        assert (text, own[0].delta.role) == (whole.choices[index].message.content, "assistant")
        assert [choice.finish_reason for choice in own if choice.finish_reason] == [whole.choices[index].finish_reason]
    assert chunks[-1].usage == whole.usage
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.usage.completion_tokens <= 12
    ask = {"model": served.names["prompt"], "prompt": ASKED[:2], "max_tokens": 5}
    texts = Counter[int]()
    found: dict[int, str] = {}
    for chunk in served.client.completions.create(**ask, stream=True):
        found[chunk.choices[0].index] = found.get(chunk.choices[0].index, "") + chunk.choices[0].text
        texts[chunk.choices[0].index] += 1
    assert [found[0], found[1]] == [choice.text for choice in served.client.completions.create(**ask).choices]
    assert min(texts.values()) > 2, "piece by piece"


def test_draws_repeat_with_a_seed_and_stop_where_they_are_told(served: Served) -> None:
    create = served.client.chat.completions.create
    ask: dict[str, Any] = {"model": served.names["chat"], "messages": chat_rows(ASKED)[1]["messages"]}
    drawn = [create(**ask, temperature=2, seed=3, n=4).choices for _ in range(2)]
    texts = [[choice.message.content for choice in choices] for choices in drawn]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    greedy = create(**ask).choices[0].message.content
    assert create(**ask, temperature=2, top_p=1e-6, seed=1).choices[0].message.content == greedy
    stop = greedy.split()[1]
    choice = create(**ask, stop=stop).choices[0]
    assert (choice.message.content, choice.finish_reason) == (greedy[: greedy.index(stop)], "stop")
    content = create(**ask, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(token.logprob == pytest.approx(token.top_logprobs[0].logprob) for token in content), "greedy"
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content)
    told = served.client.completions.create(model=served.names["prompt"], prompt=ASKED[0], logprobs=2, max_tokens=4)
    assert len(told.choices[0].logprobs.token_logprobs) >= 3


def test_what_a_model_cannot_do_is_refused_by_name(served: Served) -> None:
    user = [{"role": "user", "content": "hi"}]
    ask: dict[str, Any] = {"model": served.names["chat"], "messages": user}
    wrong: list[tuple[str, str, dict[str, Any]]] = [
        ("frequency_penalty", "/chat/completions", {**ask, "frequency_penalty": 0.5}),
        ("audio", "/chat/completions", {**ask, "audio": {}}),
        ("response_format", "/chat/completions", {**ask, "response_format": {"type": "json_object"}}),
        ("top_logprobs", "/chat/completions", {**ask, "top_logprobs": 2}),
        ("messages", "/chat/completions", {**ask, "messages": [{"role": "usr", "content": "hi"}]}),
        ("messages", "/chat/completions", {**ask, "messages": [{"role": "user", "content": "no . " * 90}]}),
        ("messages", "/chat/completions", {"model": served.names["prompt"], "messages": user * 2}),
        ("tools", "/chat/completions", {"model": served.names["prompt"], "messages": user, "tools": [{"type": "f"}]}),
        ("model", "/chat/completions", {**ask, "model": served.names["label"]}),
        ("model", "/completions", {"model": served.names["chat"], "prompt": "hi"}),
        ("model", "/classifications", {"model": served.names["chat"], "input": "hi"}),
        ("input", "/classifications", {"model": served.names["label"], "input": [{"txt": "hi"}]}),
    ]
    for param, path, body in wrong:
        for more in ({}, {"stream": True}) if "completions" in path else ({},):
            with pytest.raises(openai.BadRequestError) as caught:
                post(served, path, **body, **more)
            error = caught.value.response.json()["error"]
            assert error["param"].startswith(param), error
            assert set(error) == {"message", "type", "param", "code"}
            assert str(served.root) not in error["message"]
    with pytest.raises(openai.NotFoundError):
        post(served, "/chat/completions", **{**ask, "model": "ft:tiny:default::gone"})


def engine_of(served: Served) -> psutil.Process:
    """Find the process that answers."""
    children = psutil.Process(served.process.pid).children(recursive=True)
    return next(child for child in children if "spawn_main" in " ".join(child.cmdline()))


def test_the_process_that_answers_may_die(served: Served) -> None:
    ask: dict[str, Any] = {"model": served.names["chat"], "messages": chat_rows(ASKED)[0]["messages"]}
    before = served.client.chat.completions.create(**ask)
    engine = engine_of(served)
    engine.suspend()  # so that a request is in flight
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(served.client.with_options(max_retries=0).chat.completions.create, **ask)
        again = pool.submit(served.client.with_options(max_retries=1).chat.completions.create, **ask)
        time.sleep(1)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(openai.InternalServerError) as caught:
            waiting.result(60)
        assert caught.value.response.headers["x-should-retry"] == "true"
        assert again.result(120).choices == before.choices, "the client asked again by itself"
    assert engine_of(served).pid != engine.pid


# In this process: the process of the engine as a thread, so that its forward passes can be counted.


class Desk:
    """Asks the engine's loop by the messages that the service sends."""

    def __init__(self) -> None:
        from hf_finetune.service import engine

        self.own, theirs = Pipe()
        self.thread = threading.Thread(target=engine.work, args=(theirs, None), daemon=True)
        self.thread.start()
        self.heard: dict[int, Heard] = {}

    def ask(self, *questions: Question) -> list[Heard]:
        """Ask at the same time; returns what was heard."""
        for number, question in enumerate(questions, len(self.heard)):
            self.own.send((number, question))
        return self.listen(len(questions))

    def listen(self, count: int) -> list[Heard]:
        first, left = len(self.heard), count
        self.heard |= {number: Heard() for number in range(first, first + count)}
        while left:
            number, event = self.own.recv()
            self.heard[number].hear(event)
            left -= isinstance(event, FINAL)
        return [self.heard[number] for number in range(first, first + count)]

    def close(self) -> None:
        self.own.close()
        self.thread.join(30)


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.close()


@pytest.fixture
def passes() -> Iterator[Counter[str]]:
    """Counts the forward passes of each class of modules."""
    counts: Counter[str] = Counter()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: counts.update([type(module).__name__])
    )
    yield counts
    handle.remove()


def test_requests_that_arrive_together_share_batches(
    desk: Desk, passes: Counter[str], chats: list[Path], classifier: Path
) -> None:
    rows = chat_rows([f"what is {word} plus {word} ?" for word in ("one", "two", "nine", "ten") * 4])
    questions = [Question(str(chats[0]), [row], {"max_tokens": 6}) for row in rows]
    alone = [desk.ask(question)[0] for question in questions[:4]]
    assert [heard.failed for heard in alone] == [None] * 4
    passes.clear()
    together = desk.ask(*questions)
    assert passes["LlamaModel"] <= 2 * 6, "16 answers of 6 tokens at most, in one batch or two"
    assert [heard.texts for heard in together] == [heard.texts for heard in alone] * 4
    expected = [answer["generated"] for answer in predict(chats[0], rows[:4], max_new_tokens=6)]
    assert [heard.texts[0] for heard in alone] == expected
    texts = [f"the {word} is good" for word in ("film", "plot", "story", "cast") * 4]
    labels = [Question(str(classifier), [{"text": text}]) for text in texts]
    alone = [desk.ask(question)[0] for question in labels[:4]]
    passes.clear()
    together = desk.ask(*labels)
    assert passes["BertModel"] <= 2
    for heard, one in zip(together, alone * 4, strict=True):
        assert heard.rows[0]["score"] == pytest.approx(one.rows[0]["score"], abs=1e-6)


def test_an_answer_that_nobody_waits_for_ends(desk: Desk, passes: Counter[str], chatter: Path) -> None:
    settings = {"max_tokens": 90, "temperature": 2.0, "seed": 5}
    question = Question(str(chatter), [{"question": "what is one ?"}], settings, choices=64)
    assert desk.ask(question)[0].failed is None
    whole = passes["LlamaModel"]
    assert whole > 100, "it is long enough to be stopped"
    passes.clear()
    desk.own.send((1, question))
    number, event = desk.own.recv()
    desk.own.send((1, None))
    while not isinstance(event, FINAL):
        number, event = desk.own.recv()
    assert number == 1
    assert passes["LlamaModel"] < whole / 2, "it did not write to the end"


def test_adapters_of_one_base_hold_its_weights_once(tmp_path: Path, tiny_llama: str) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from hf_finetune.service.models import Models, answer

    base = tmp_path / "base"
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(base)
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    config = LlamaConfig(vocab_size=90, max_position_embeddings=64, eos_token_id=2, num_attention_heads=8, **shape)
    LlamaForCausalLM(config).save_pretrained(base)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert size > 150e6
    rows = [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}], "tools": None}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    runs = []
    for r in (2, 4, 8):
        (tmp_path / str(r)).mkdir()
        recipe = CHATS.format(model=base, data=tmp_path / "chats.jsonl", output=tmp_path / str(r) / "run", r=r)
        runs.append(finished(tmp_path / str(r), recipe.replace("steps: 8", "steps: 1")))
    models = Models(1 << 40)
    models.of(str(runs[0]))
    used, resident = models.bytes, psutil.Process().memory_info().rss
    assert used > size
    for run in runs[1:]:
        models.of(str(run))
    assert models.bytes - used < 0.1 * size
    assert psutil.Process().memory_info().rss - resident < 0.5 * size
    heard = [Heard() for _ in runs]
    for run, one in zip(runs, heard, strict=True):

        def say(_: int, event: Event, one: Heard = one) -> None:
            one.hear(event)

        answer(models, [Question(str(run), chat_rows(["one"]))], say, lambda _: True)
        assert one.texts[0] == predict(run, chat_rows(["one"]))[0]["generated"]
    # A budget that holds one of them: those that were asked longest ago leave.
    models.most = size
    models.of(str(runs[0]))
    assert models.bytes < 1.1 * size


def test_one_request_too_many_is_told_to_come_again(chats: list[Path]) -> None:
    from hf_finetune.service.engine import Engine, Full

    engine = Engine(most=1)
    question = Question(str(chats[0]), chat_rows(["one"]), {"max_tokens": 3})

    async def ask() -> list[Event]:
        return [event async for event in engine.ask(question)]

    async def both() -> Any:
        return await asyncio.gather(ask(), ask(), return_exceptions=True)

    try:
        found = asyncio.run(both())
        assert sorted(isinstance(one, Full) for one in found) == [False, True]
        whole = next(one for one in found if not isinstance(one, Full))
        assert not any(isinstance(event, Failed) for event in whole)
    finally:
        engine.close()


def test_no_piece_cuts_a_character_or_a_stop_in_two() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from hf_finetune.inference.answering import Answer, Wish
    from hf_finetune.tasks._generation import Ends

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    make: Callable[..., Any] = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=core)
    text = "né €5 😀 stop! STOP here, and more"
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) > len(text), "a token is a byte"
    for stop, expected in (((), text), (("STOP here",), "né €5 😀 stop! "), (("😀",), "né €5 ")):
        one, pieces = Answer(Wish(len(tokens), stop=stop), len(tokens)), list[str]()
        for token in tokens:
            if one.reason is None:
                pieces.append(one.add(token, None, tokenizer, Ends(frozenset(), None)))
        assert "".join(pieces) == one.text == expected
        assert not any("\ufffd" in piece for piece in pieces)


def test_serve_check_tells_the_run_from_its_base(served: Served, server: Server, chats: list[Path]) -> None:
    def check(run: str, model: str, *more: str) -> Any:
        ask = ["serve-check", str(served.run(run)), "--url", served.url, "--model", served.names[model], *more]
        return server.run(*ask, "--api-key-env", "SERVED_KEY", env={"SERVED_KEY": served.key})

    for run in ("chat", "prompt", "label", "tags"):
        done = check(run, run, "--rows", "6")
        assert done.returncode == 0, (run, done.stdout, done.stderr)
        assert "beyond the tolerance" in done.stdout
    wrong = check("chat", "other", "--rows", "6")  # another adapter of the same base
    assert wrong.returncode == 4, wrong.stdout
    assert "differ by more than 0.05" in wrong.stderr
    assert check("label", "chat").returncode == 4, "a server that refuses"


def wait(served: Served, batch: str, seconds: float = 240) -> Any:
    """Wait until a batch has ended."""
    end = time.monotonic() + seconds
    while (found := served.client.batches.retrieve(batch)).status not in ("completed", "failed", "cancelled"):
        assert time.monotonic() < end, found
        time.sleep(0.1)
    return found


def test_a_batch_outlives_a_kill_and_answers_each_request_once(served: Served, tmp_path: Path) -> None:
    client, model = served.client, served.names["chat"]
    rows = chat_rows([f"what is {word} plus {word} ?" for word in ("one", "two", "nine", "ten") * 80])
    lines = []
    for number, row in enumerate(rows):
        body: dict[str, Any] = {"model": model, "messages": row["messages"], "max_tokens": 100 if number > 99 else 6}
        body |= {"top_logprobs": 1} if number % 50 == 7 else {}
        line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(line) + "\n")
    (tmp_path / "asks.jsonl").write_text("".join(lines))
    file = client.files.create(file=(tmp_path / "asks.jsonl").open("rb"), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"of": "tests"}
    )
    assert batch.status == "validating"
    folder = served.root / "runs" / batch.id
    end = time.monotonic() + 240
    while not (folder / "results.jsonl.partial.json").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int((folder / "worker.lock").read_text()), signal.SIGKILL)
    done = wait(served, batch.id)
    counts = done.request_counts
    assert (done.status, counts.total, counts.completed, counts.failed) == ("completed", 320, 313, 7)
    answers = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    wrong = [json.loads(line) for line in client.files.content(done.error_file_id).text.splitlines()]
    assert len({line["custom_id"] for line in [*answers, *wrong]}) == 320
    assert {line["response"]["body"]["error"]["param"] for line in wrong} == {"top_logprobs"}
    expected = predict(served.run("chat"), rows[:1], max_new_tokens=6)[0]["generated"]
    assert answers[0]["response"]["body"]["choices"][0]["message"]["content"] == expected
    assert [found.id for found in client.batches.list()] == [batch.id]
    assert batch.id not in [job.id for job in client.fine_tuning.jobs.list()]
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve(batch.id)
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(batch.id)


def test_a_batch_with_bad_lines_names_them(served: Served, tmp_path: Path) -> None:
    good = {"custom_id": "a", "method": "POST", "url": "/v1/classifications"}
    good["body"] = {"model": served.names["label"], "input": "a good film"}  # type: ignore[assignment]
    lines = [good, good, {**good, "custom_id": "b", "url": "/v1/completions"}, {"custom_id": "c"}]
    (tmp_path / "asks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    file = served.client.files.create(file=(tmp_path / "asks.jsonl").open("rb"), purpose="batch")
    endpoint: Any = "/v1/classifications"
    batch = served.client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")
    failed = wait(served, batch.id)
    assert failed.status == "failed"
    assert [error.line for error in failed.errors.data] == [2, 3, 4, 5]
    assert str(served.root) not in failed.model_dump_json()
