"""Nothing that a chat holds is lost unsaid: what templates drop, how they want it written, what is trained of it."""

from __future__ import annotations

import itertools
import json
import random
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from test_chat import ASK, HEAD, PREFIXED, byte_tokenizer
from transformers import AutoTokenizer

from hf_finetune.data import prepare
from hf_finetune.errors import DataError, ModelError
from hf_finetune.inference import load
from hf_finetune.pipeline import train as pipeline_train
from hf_finetune.pipeline.train import train
from hf_finetune.recipe import Recipe
from hf_finetune.run import lock as run_lock
from hf_finetune.tasks._catalogue import REMARKS
from hf_finetune.tasks._messages import Chat
from hf_finetune.tasks.base import IGNORE, State
from hf_finetune.tasks.causal_lm import CausalLM

KNOWN = "{% if m.role in ['system', 'user', 'assistant', 'tool'] %}"
# Knows four roles, and content that is text; everything else becomes nothing.
TEXT_ONLY = (
    "{% for m in messages %}" + KNOWN + "<|{{ m.role }}|>{{ m.content if m.content is string else '' }}</s>"
    "{% endif %}{% endfor %}" + ASK
)
TRIMS = PREFIXED.replace("{{ m.content }}", "{{ m.content | trim }}")
# Writes a call instead of the text beside it.
CALLS = (
    HEAD + "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}</s>{% endfor %}" + ASK
)
# Joins arguments as text, and tells a null content from one that is not there.
TEXT_CALLS = (
    HEAD + "{% if m.tool_calls and m['content'] is none %}{% for c in m.tool_calls %}"
    "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}"
    "{% else %}{{ m['content'] + '' }}{% endif %}</s>{% endfor %}" + ASK
)
# Begins the reasoning as it asks, and drops it as it renders.
THINKS = (
    HEAD + "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# The last answer, and it alone, has a block of reasoning.
LAST_DIFFERS = (
    HEAD + "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}" + ASK
)
NO_END = HEAD + "\n{{ m.content }}{% endfor %}" + ASK
ASKED = {"role": "user", "content": "what is it?"}
ANSWERED = {"role": "assistant", "content": "It is three."}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": '{"city": "Rome", "days": 2}'}}


def turn(role: str, content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def encoded(template: str, chat: list[Any], **task: Any) -> tuple[str, str, set[str]]:
    """The whole chat and what is trained of it, as text, and what was noticed."""
    tokenizer = byte_tokenizer(template)
    row = CausalLM(messages="chat", **task).features({"chat": [chat]}, tokenizer, State(), 9999)[0]
    kept = [label for label in row["labels"] if label != IGNORE]
    noticed = {check for check, bit in REMARKS.items() if row["remarks"] & bit}
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(kept), noticed


def test_parts_of_text_are_joined() -> None:
    for template in [PREFIXED, TEXT_ONLY, TRIMS, CALLS]:
        asked = turn("user", [{"type": "text", "text": "what "}, {"type": "text", "text": "is it?"}])
        in_parts = [asked, turn("assistant", [{"type": "text", "text": "It is three."}])]
        assert encoded(template, in_parts) == encoded(template, [ASKED, ANSWERED])


def test_what_would_be_lost_is_refused_by_turn_and_role() -> None:
    for chat, complaint in [
        ([turn("user", ["see", {"type": "image_url"}]), ANSWERED], r"turn 1 \(user\).*image_url"),
        ([turn("sytem", "Be brief."), ASKED, ANSWERED], "turn 1 has the role 'sytem'; write 'system'"),
        ([ASKED, turn("observation", "it rains a lot"), ANSWERED], r"turn 2 \(observation\): .* drops its content; "),
        ([ASKED, turn("observation", "3"), ANSWERED], r"turn 2 \(observation\): .* drops its content; name"),
        ([ASKED, turn("critic", "It is three."), ANSWERED], r"turn [23] .*drops its content; name"),
        ([ASKED, turn("tool", {"sky": "grey"}), ANSWERED], r"turn 2 \(tool\): .* which is no text \(dict\); name"),
        ([ASKED, turn("assistant", "", reasoning_content="I count.")], r"turn 2 .*reasoning.*says nothing else"),
        ([ASKED, turn("assistant", "x", weight=0.5)], r"turn 2 \(assistant\) has the weight 0.5; write 0"),
    ]:
        with pytest.raises(DataError, match=complaint):
            encoded(TEXT_ONLY, chat)


def test_what_is_short_is_looked_for_behind_many_other_shapes_of_chats() -> None:
    shapes = itertools.product(["user", "assistant"], repeat=7)
    chats = [[ASKED, *(turn(role, "hi") for role in roles), ASKED, ANSWERED] for roles in shapes]
    chats.append([turn("observation", "is"), ASKED, ANSWERED])
    with pytest.raises(DataError, match=r"turn 1 \(observation\): .* drops its content; name"):
        CausalLM(messages="chat").features({"chat": chats}, byte_tokenizer(TEXT_ONLY), State(), 9999)


def test_reasoning_that_the_template_drops_is_counted() -> None:
    for key in ["reasoning_content", "thinking"]:
        chat = [ASKED, {**ANSWERED, key: "I count to three."}]
        assert encoded(PREFIXED, chat)[2] == {"dropped_reasoning"}
        assert encoded(LAST_DIFFERS, chat) == (
            "<|user|>what is it?</s><|assistant|><think>I count to three.</think>It is three.</s>",
            "<think>I count to three.</think>It is three.</s>",
            set(),
        )
        said = {"role": "assistant", "content": "<think>I count to three.</think>It is three."}
        assert encoded(THINKS, [ASKED, said], train_on="all")[2] == {"dropped_reasoning"}
        assert encoded(PREFIXED, [ASKED, said])[2] == set()


def test_keys_that_the_template_drops_are_counted() -> None:
    cases: list[dict[str, Any]] = [
        {"content": "Let me see first.", "tool_calls": [CALL]},
        {"content": "It is three.", "refusal": "I would rather not."},
        {"content": "It is three.", "train": False},
    ]
    for answer in cases:
        assert encoded(CALLS, [ASKED, {"role": "assistant", **answer}])[2] == {"dropped_keys"}


def test_names_that_the_template_drops_are_counted_but_for_those_of_tools() -> None:
    assert encoded(PREFIXED, [{**ASKED, "name": "Alicia"}, ANSWERED])[2] == {"dropped_keys"}
    assert encoded(PREFIXED, [ASKED, turn("tool", "it rains", name="look_up"), ANSWERED])[2] == set()


def test_a_template_that_trims_or_quotes_drops_nothing() -> None:
    for template in [TRIMS, PREFIXED, TRIMS.replace("| trim", "| trim | tojson")]:
        for said in ["  It is\u3000three. \u00a0\n", "3", '"quoted"\n\ntwice', "It is  three.\tYes."]:
            chat = [turn("system", " a "), turn("user", said), turn("assistant", said)]
            assert encoded(template, chat, train_on="all")[2] == set()


def test_calls_are_written_as_the_template_takes_them() -> None:
    objects = {"type": "function", "function": {"name": "look_up", "arguments": {"city": "Rome", "days": 2}}}
    for call in (CALL, objects):
        for content in ({"content": None}, {"content": ""}, {}):
            chat = [ASKED, {"role": "assistant", **content, "tool_calls": [call]}, turn("tool", "rain"), ANSWERED]
            assert 'look_up({"city": "Rome", "days": 2})</s>' in encoded(CALLS, chat)[0]
            assert 'look_up {"city": "Rome", "days": 2}</s>' in encoded(TEXT_CALLS, chat)[0]


def test_a_call_that_the_template_drops_is_refused() -> None:
    with pytest.raises(DataError, match=r"turn 2 \(assistant\): the chat template drops the tool 'look_up'"):
        encoded(
            TEXT_CALLS, [ASKED, turn("assistant", "Let me see.", tool_calls=[CALL]), turn("tool", "rain"), ANSWERED]
        )
    names = CALLS.replace("({{ c.function.arguments | tojson }})", "")
    with pytest.raises(DataError, match=r"drops values of the arguments of 'look_up'"):
        encoded(names, [ASKED, turn("assistant", None, tool_calls=[CALL])])
    with pytest.raises(DataError, match=r"no \{name, arguments\}"):
        encoded(CALLS, [ASKED, turn("assistant", None, tool_calls=[{"function": "look_up"}])])


def test_an_empty_list_of_calls_is_none() -> None:
    chat = [ASKED, {**ANSWERED, "tool_calls": []}]
    assert encoded(CALLS.replace("if m.tool_calls", "if m.tool_calls is defined"), chat)[1] == "It is three.</s>"


def test_a_chat_may_begin_with_the_assistant_though_the_template_looks_into_the_first_turn() -> None:
    template = "{% if messages[0].role == 'system' %}{% endif %}" + PREFIXED
    trained = encoded(template, [turn("assistant", "Hello!"), ASKED, ANSWERED])[1]
    assert trained == "Hello!</s>It is three.</s>"


def test_turns_of_weight_0_are_read_and_not_trained() -> None:
    chat = [ASKED, turn("assistant", "No idea.", weight=0), turn("user", "Try."), {**ANSWERED, "weight": 1}]
    marked = PREFIXED.replace(
        "{{ m.content }}</s>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
        "{% else %}{{ m.content }}</s>{% endif %}",
    )
    for template in (PREFIXED, marked):
        text, trained, _ = encoded(template, chat)
        assert "No idea." in text
        assert trained == "It is three.</s>"
    assert encoded(PREFIXED, [ASKED, {**ANSWERED, "weight": 0}])[1] == ""
    with pytest.raises(DataError, match=r"turn 2 has weight 0, and task.train_on: all"):
        encoded(PREFIXED, chat, train_on="all")


def test_a_blank_question_or_answer_is_an_empty_row() -> None:
    for as_text in [False, True]:
        chats = [
            [ASKED, ANSWERED],
            [ASKED, turn("assistant", " \n")],
            [turn("user", ""), ANSWERED],
            [ASKED, turn("assistant", [{"type": "text", "text": ""}])],
            [turn("system", ""), ASKED, turn("assistant", "", weight=0), ASKED, ANSWERED],
            [ASKED, turn("assistant", "", tool_calls=[CALL]), turn("tool", ""), ANSWERED],
            [ASKED, turn("assistant", "", reasoning_content="hm")],
        ]
        cells = [json.dumps(chat) for chat in chats] if as_text else chats
        assert CausalLM(messages="m").blank({"m": cells}) == [False, True, True, True, False, False, False]


TWICE = [ASKED, ANSWERED, turn("user", "and twice?"), turn("assistant", "Then six.", reasoning_content="2 * 3")]


def test_answers_that_are_rendered_differently_later_are_refused_with_a_way_to_train_them() -> None:
    with pytest.raises(DataError, match=r"turn 2: .*set task.split_turns: true"):
        encoded(LAST_DIFFERS, TWICE)
    text, trained, _ = encoded(LAST_DIFFERS, [*TWICE, turn("user", "thanks")], train_on="last")
    assert trained == "<think>2 * 3</think>Then six.</s>"
    assert text.endswith(trained)


def test_the_last_answer_stands_behind_what_asks_for_it() -> None:
    for answer, trained in [
        ({"content": "<think>\nI count.\n</think>\n\nThree."}, "I count.\n</think>\n\nThree.</s>"),
        ({"content": "Three.", "reasoning_content": "I count."}, "I count.\n</think>\n\nThree.</s>"),
        ({"content": "Three."}, "\n</think>\n\nThree.</s>"),
    ]:
        chat = [ASKED, {"role": "assistant", **answer}]
        with pytest.raises(DataError, match=r"asks for an answer by .*set task.split_turns: true"):
            encoded(THINKS, chat)
        assert encoded(THINKS, chat, train_on="last") == (
            "<|user|>what is it?</s><|assistant|><think>\n" + trained,
            trained,
            set(),
        )


def test_eos_ends_the_last_answer_where_the_template_ends_none() -> None:
    with pytest.raises(ModelError, match=r"would not learn to stop; set task.train_on: last"):
        encoded(NO_END, [ASKED, ANSWERED])
    assert encoded(NO_END, [*TWICE[:3], turn("assistant", "Six.")], train_on="last")[1] == "\nSix.</s>"


def test_named_templates_without_a_default_are_one_line() -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.chat_template = {"rag": PREFIXED, "tool_use": CALLS}
    task = CausalLM(messages="chat")
    with pytest.raises(ModelError, match="chat templates rag, tool_use, and none called default"):
        task.features({"chat": [[ASKED, ANSWERED]]}, tokenizer, State(), 99)


def test_special_tokens_in_the_text_can_be_read_as_text() -> None:
    chat = [turn("user", "one </s><|assistant|>two 🙂"), ANSWERED]
    tokenizer = byte_tokenizer(PREFIXED)
    for escapes, ends in ((False, 3), (True, 2)):
        task = CausalLM(messages="chat", escape_special_tokens=escapes)
        ids: list[int] = task.features({"chat": [chat]}, tokenizer, State(), 999)[0]["input_ids"]
        asked = task.ask({"chat": [chat]}, tokenizer)[0]
        assert ids[: len(asked)] == asked
        assert ids.count(tokenizer.eos_token_id) == ends
        assert tokenizer.decode(ids).startswith("<|user|>one </s><|assistant|>two 🙂</s>")
    plain = [ASKED, ANSWERED]
    assert encoded(PREFIXED, plain, escape_special_tokens=True) == encoded(PREFIXED, plain)


def test_a_prompt_with_other_tokens_than_it_has_alone_is_counted(shared: Path) -> None:
    """Compared with what the tokenizer makes of the prompt, on random texts."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "reviews-llama-12m")
    tokenizer.chat_template, draw = None, random.Random(3)
    pieces = ["a", "Pa", "ris", " ", "  ", "\n", "\n\n", "0", "12", ".", ":", "é", "🙂", "\t", "A:", "(", "'s"]
    texts = ["".join(draw.choice(pieces) for _ in range(draw.randint(1, 6))) for _ in range(1200)]
    texts = [text for text in texts if text.strip()]
    rows = {"p": texts[::2], "c": texts[1::2][: len(texts[::2])]}
    rows["p"] = rows["p"][: len(rows["c"])]
    task = CausalLM(prompt="p", completion="c")
    encoded = task.features(rows, tokenizer, State(), 99)
    said = [bool(row["remarks"] & REMARKS["split_token"]) for row in encoded]
    asked = task.prompts(rows, tokenizer, len(said))
    found = [row["input_ids"][: len(ids)] != ids for row, ids in zip(encoded, asked, strict=True)]
    assert said == found
    assert 20 < sum(said) < len(said) / 2


class Later(date):
    """A clock that is a day ahead."""

    @classmethod
    def today(cls) -> Later:
        return cls(2031, 2, 3)


@pytest.mark.slow
def test_a_template_prints_the_day_on_which_the_run_began(
    tmp_path: Path, tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a locked repeat on another day, too, and in all that is done with the run."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d %-d %B') }}" + tokenizer.chat_template
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(tiny_llama).iterdir():
        (model / file.name).symlink_to(file)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(model)
    (tmp_path / "rows.jsonl").write_text('{"q": "one plus two", "a": "three"}\n' * 4)
    (tmp_path / "recipe.yaml").write_text(
        f"""\
task: {{kind: causal_lm, prompt: q, completion: a}}
model: {{name: {model}}}
data: {{train: {tmp_path / "rows.jsonl"}, max_length: 64}}
adapter: {{kind: lora, r: 2}}
training: {{steps: 1, batch_size: 2, learning_rate: 1e-3, precision: fp32}}
tracking: {{images: false, report: false}}
output: {tmp_path / "run"}
"""
    )
    train(Recipe.load(str(tmp_path / "recipe.yaml")))
    lock = tmp_path / "run" / "run.lock.json"
    begun = date.today().isoformat()
    assert run_lock.day(lock) == begun
    for module in (pipeline_train, load):
        monkeypatch.setattr(module, "date", Later)
    run = load.open_run(str(tmp_path / "run"))
    text = run.recipe.task.renderer(run.tokenizer).text  # type: ignore[attr-defined]
    assert text(Chat([ASKED])).startswith(f"{begun} {date.today().day} {date.today():%B}")
    kept, reading = run_lock.read_repeat(str(lock), None, [f"output={tmp_path / 'again'}"])
    assert reading.recipe is not None
    train(reading.recipe, locked=run_lock.Repeat(str(lock), kept))
    again = run_lock.find(tmp_path / "again" / "run.lock.json")
    assert again is not None
    assert again.fingerprint == kept.fingerprint
    other = run.recipe.model_copy(update={"task": run.recipe.task.model_copy(update={"date": "2031-02-03"})})
    assert prepare.prepare(other, run.tokenizer, run.machine).fingerprint != kept.fingerprint
