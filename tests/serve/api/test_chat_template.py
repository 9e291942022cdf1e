"""Templates: equal to transformers' rendering; whatever a hostile one does, it ends soon and in a sentence."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.tokenizer import Tokenizer
from serve.api.chat_template import ChatTemplateError, render
from serve.api.renderer import Renderer, TemplateFileError, Templates, read_template
from serve.errors import InvalidRequest

# Shapes that models in use have, written for these tests.
CHATML = """
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%Y") %}{% endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nYear: " + date_string + "\\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}{{ tool | tojson(indent=2) }}{{ "\\n" }}{% endfor %}
{%- endif %}
{{- system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{ "}<|eot_id|>" }}
        {%- continue %}
    {%- endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- generation %}{{ message.content | trim }}{% endgeneration %}{{ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
INSTRUCTIONS = """{{ bos_token }}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{%- endfor %}"""
PARTS = """{% for message in messages %}{{ message.role }}:
{%- for part in message.content %}{% if part.type == 'text' %}<{{ part.text }}>{% else %}?{% endif %}{% endfor %};
{%- endfor %}"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "instructions": INSTRUCTIONS, "parts": PARTS}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "user", "content": "  What is <b>2 & 2</b>?\n"},
    {"role": "assistant", "content": "4 – «vier» 🎉 "},
    {"role": "user", "content": "Sure?"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "description": "a<b"}}}]


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    """transformers' apply_chat_template, as text."""
    from transformers import PreTrainedTokenizerFast

    loaded = PreTrainedTokenizerFast(tokenizer_object=tokenizer.inner, **SPECIAL)

    def apply(template: str, messages: list[dict[str, Any]], **fields: Any) -> str:
        return loaded.apply_chat_template(messages, chat_template=template, tokenize=False, **fields)

    return apply


def ours(template: str, messages: list[dict[str, Any]], continue_final_message: bool = False, **fields: Any) -> str:
    variables = {"tools": None, "documents": None, **SPECIAL, **fields}
    return render(template, messages, variables, continue_final=continue_final_message)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_equal_to_transformers(theirs, name: str, prompt: bool) -> None:
    chat = CHAT
    if name == "parts":
        chat = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in CHAT]
    expected = theirs(TEMPLATES[name], chat, add_generation_prompt=prompt)
    assert ours(TEMPLATES[name], chat, add_generation_prompt=prompt) == expected
    assert ours(TEMPLATES[name], CHAT, add_generation_prompt=prompt) == expected  # a text is a list of one part


def test_equal_with_tools_and_further_names(theirs) -> None:
    call = {"function": {"name": "weather", "arguments": {"town": "Zürich"}}}
    chat = [*CHAT, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "rain"}]
    fields = {"tools": TOOLS, "date_string": "today", "add_generation_prompt": True}
    assert ours(HEADERS, chat, **fields) == theirs(HEADERS, chat, **fields)


@pytest.mark.parametrize("name", ["chatml", "headers", "instructions"])
@pytest.mark.parametrize("content", ["The answer is", "The answer is ", "4"])
def test_equal_where_the_last_message_goes_on(theirs, name: str, content: str) -> None:
    chat = [CHAT[0], {"role": "assistant", "content": content}]
    expected = theirs(TEMPLATES[name], chat, continue_final_message=True)
    assert ours(TEMPLATES[name], chat, continue_final_message=True) == expected
    assert expected.endswith((content, content.rstrip()))


@settings(max_examples=60)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=4))
def test_equal_for_every_text(theirs, texts: list[str]) -> None:
    roles = ["user", "assistant"] * 2
    chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    for template in (CHATML, HEADERS, INSTRUCTIONS):
        assert ours(template, chat, add_generation_prompt=True) == theirs(template, chat, add_generation_prompt=True)


def test_parts_are_lines_for_a_template_that_reads_texts() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert ours("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "one\ntwo"
    assert ours(PARTS, [{"role": "user", "content": parts}]) == "user:<one><two>;"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('Only users, please.') }}", "Only users, please."),
        ("{% for", "The chat template is not valid Jinja: "),
        ("{{ messages.nothing.more }}", "The chat template fails on this chat: UndefinedError: "),
        ("{{ 1 / 0 }}", "The chat template fails on this chat: ZeroDivisionError: "),
        ("{{ 'a' + 1 }}", "The chat template fails on this chat: TypeError: "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "The chat template fails on this chat: RecursionError"),
        ("{{ '\ud800' }}", "The rendered chat has half of a surrogate pair at character 0."),
        ("{% include '/etc/passwd' %}", "The chat template fails on this chat: "),
    ],
)
def test_a_template_that_fails_is_a_sentence(template: str, sentence: str) -> None:
    with pytest.raises(ChatTemplateError) as raised:
        ours(template, CHAT)
    assert str(raised.value).startswith(sentence)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ (messages | attr('__class__')).__base__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ strftime_now.__closure__[0] }}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    with pytest.raises(ChatTemplateError, match="SecurityError"):
        ours(template, CHAT)


def test_a_message_that_cannot_go_on() -> None:
    with pytest.raises(ChatTemplateError, match="does not show the final message"):
        ours("{{ messages[0].content }}", CHAT, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="has no text to continue"):
        ours(PARTS, [{"role": "assistant", "content": []}], continue_final_message=True)


# ---------------------------------------------------------------- aside

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    ENDLESS: "takes more than 2 s",
    "{{ 3 ** (10 ** 9) }}": "takes more than 2 s",  # one operation, which no signal handler could interrupt
    "{{ 'x' * 10 ** 10 }}": "memory",
    # Memory, or time: whichever runs out first on this machine, in which the kernel has to zero all those pages.
    "{% set x = namespace(s='x') %}{% for i in range(60) %}{% set x.s = x.s + x.s %}{% endfor %}": "",
    "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}": "more than 8388608 characters",
    "{{ '%999999999d' | format(1) }}": "",  # it may be memory, characters, or time
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "",
}


def test_hostile_templates_end_soon_and_leave_the_renderer_working() -> None:
    async def attack() -> None:
        renderer = Renderer(Templates({"default": CHATML}))
        await renderer.start()
        first = await renderer.render(CHAT, {})
        for template, sentence in HOSTILE.items():
            with pytest.raises(InvalidRequest) as raised:
                await renderer.render(CHAT, {}, template=template)
            assert sentence in raised.value.message
            assert len(raised.value.message) <= 1000
            assert raised.value.param == "messages"
            assert await renderer.render(CHAT, {}) == first
        await renderer.close()

    asyncio.run(attack())


def test_one_that_is_slow_does_not_keep_the_others_waiting() -> None:
    async def attack() -> float:
        renderer = Renderer(Templates({"default": CHATML}))
        await asyncio.gather(renderer.render(CHAT, {}), renderer.render(CHAT, {}))  # both processes are up
        slow = asyncio.ensure_future(renderer.render(CHAT, {}, template=ENDLESS))
        await asyncio.sleep(0.05)
        begin = time.monotonic()
        await asyncio.gather(*(renderer.render(CHAT, {}) for _ in range(50)))
        took = time.monotonic() - begin
        assert not slow.done()
        with pytest.raises(InvalidRequest):
            await slow
        await renderer.close()
        return took

    assert asyncio.run(attack()) < 2


def test_a_renderer_that_was_killed_or_left_is_replaced() -> None:
    async def live() -> None:
        renderer = Renderer(Templates({"default": CHATML}))
        expected = await renderer.render(CHAT, {})
        for worker in list(renderer.aside.workers):
            worker.process.kill()
            await worker.process.wait()
        assert await renderer.render(CHAT, {}) == expected
        leaving = asyncio.ensure_future(renderer.render(CHAT, {}, template=ENDLESS))
        await asyncio.sleep(0.1)
        leaving.cancel()  # its answer must not be taken for the next one's
        assert await renderer.render(CHAT, {}) == expected
        await renderer.close()
        assert not renderer.aside.workers

    asyncio.run(live())


def test_the_process_sees_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")

    async def live() -> bytes:
        renderer = Renderer(Templates({"default": CHATML}))
        await renderer.render(CHAT, {})
        (worker,) = renderer.aside.workers
        seen = Path(f"/proc/{worker.process.pid}/environ").read_bytes()
        await renderer.close()
        return seen

    seen = asyncio.run(live())
    assert b"secret" not in seen
    assert os.environ["PATH"].encode() in seen


# ---------------------------------------------------------------- which template


def test_templates_of_a_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    plain = json.loads(file.read_text())

    def templates(setting: Any, given: str | None = None) -> Templates:
        file.write_text(json.dumps({**plain, "unk_token": {"content": "?"}, "chat_template": setting}))
        return Templates.of(Tokenizer.load(tmp_path), None if given is None else read_template(given))

    assert templates(None).pick(False) is None
    assert templates(5).pick(False) is None
    assert templates("one").pick(True) == "one"
    assert templates("one").special == {"eos_token": "<|endoftext|>", "unk_token": "?"}
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}, "c", {"name": 1}]
    assert (templates(several).pick(False), templates(several).pick(True)) == ("a", "b")
    given = tmp_path / "given.jinja"
    given.write_text("from a file")
    assert templates("one", str(given)).pick(True) == "from a file"
    assert templates("one", "{{ messages }}").pick(False) == "{{ messages }}"
    with pytest.raises(TemplateFileError, match=r"--chat-template nothing\.jinja cannot be read: No such file"):
        templates("one", "nothing.jinja")
    (tmp_path / "chat_template.jinja").write_text("of its own file")
    assert templates("one").pick(False) == "of its own file"
