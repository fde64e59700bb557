"""Prompts from messages, beside what transformers makes of the same template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tkit import demo
from tkit.errors import InputError
from tkit.gateway.prompts import PromptTokenizer

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Grüße, 世界"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "And again"},
]
TEMPLATES = {
    "whitespace control and loop variables": (
        "{{- bos_token }}\n{%- for message in messages %}\n    {%- if loop.first %}first {% endif %}"
        "<|{{ message.role }}|>\n{{ message['content'] | trim }}{{ eos_token }}\n{% endfor %}\n"
        "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "namespace, continue and break": (
        "{% set ns = namespace(n=0, system='') %}{% for message in messages %}"
        "{% if message.role == 'system' %}{% set ns.system = message.content %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% if ns.n > 2 %}{% break %}{% endif %}[{{ message.content }}]{% endfor %}{{ ns.system }}"
    ),
    "generation blocks and JSON": (
        "{% for message in messages %}{% generation %}{{ message | tojson }}{% endgeneration %}{% endfor %}"
        "{{ messages | tojson(indent=2) }}"
    ),
    "what was not given": "{% if tools is none %}no tools{% endif %}{{ documents is none }}{{ enable_thinking is defined }}",
}


def tokenizer_dir(path: Path, template: Any, *, as_file: bool = False) -> Path:
    shutil.copytree(demo.MODEL_DIR, path, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = None if as_file else template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if as_file:
        (path / "chat_template.jinja").write_text(template)
    return path


@pytest.mark.parametrize("as_file", [False, True], ids=["in the config", "in its file"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_transformers_own(tmp_path: Path, name: str, as_file: bool) -> None:
    directory = tokenizer_dir(tmp_path / "t", TEMPLATES[name], as_file=as_file)
    theirs = AutoTokenizer.from_pretrained(directory)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert PromptTokenizer(directory).render(MESSAGES, {}) == expected


def test_variables_reach_the_template(tmp_path: Path) -> None:
    directory = tokenizer_dir(tmp_path / "t", "{% if enable_thinking %}think{% endif %}{{ add_generation_prompt }}")
    variables = {"enable_thinking": True, "add_generation_prompt": False}
    assert PromptTokenizer(directory).render(MESSAGES, variables) == "thinkFalse"


def test_a_rendered_prompt_encoded_as_any_text_has_the_template_s_tokens() -> None:
    """No second BOS, whoever encodes it."""
    ours, theirs = PromptTokenizer(demo.MODEL_DIR), AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    prompt = ours.without_bos(ours.render(MESSAGES, {}))
    assert theirs.encode(prompt) == expected
    assert ours.num_tokens(prompt) == len(expected)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_token_ids_become_the_text_that_is_read_as_just_these(tmp_path: Path, adds_bos: bool) -> None:
    directory = tokenizer_dir(tmp_path / "t", None)
    if not adds_bos:
        saved = json.loads((directory / "tokenizer.json").read_text())
        (directory / "tokenizer.json").write_text(json.dumps({**saved, "post_processor": None}))
    ours, theirs = PromptTokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in ("Hello world", " a  b\n\tc ", "Grüße, 世界", "<s>Hello", "a <s> b"):
        token_ids = theirs.encode(text, add_special_tokens=adds_bos and not text.startswith("<s>"))
        assert theirs.encode(ours.text_of(token_ids)) == token_ids
    without_bos, in_two = theirs.encode("Hello", add_special_tokens=False), theirs.encode("世")[:-1]
    bos = [theirs.bos_token_id] * adds_bos
    refused = [
        ([*bos, 10**6], "token id 1000000 is none of the tokenizer's 4096"),
        ([*bos, -1], "token id -1 is none"),
        ([*bos, *(theirs.vocab[letter] for letter in "the")], f"reads that of these .* from number {len(bos)} on"),
        (in_two, "reads that of these token ids as others"),  # a character that is cut in two
    ]
    if adds_bos:
        refused.append((without_bos, f"puts token id {theirs.bos_token_id} .BOS. before every text"))
    for token_ids, message in refused:
        with pytest.raises(InputError, match=message):
            ours.text_of(token_ids)


def test_the_longest_token_bounds_what_fits() -> None:
    theirs = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    longest = PromptTokenizer(demo.MODEL_DIR).longest_token
    assert longest == max(len(token) for token in theirs.get_vocab())


def test_the_default_of_several_templates_and_none_at_all(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert PromptTokenizer(tokenizer_dir(tmp_path / "several", several)).render(MESSAGES, {}) == "plain"
    assert not PromptTokenizer(tokenizer_dir(tmp_path / "none", None)).has_template


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[9].content.x }}", "no element 9"),
    ],
)
def test_what_a_template_refuses_or_may_not_do(tmp_path: Path, template: str, message: str) -> None:
    chat = PromptTokenizer(tokenizer_dir(tmp_path / "t", template))
    with pytest.raises(InputError, match="the chat template refuses these messages") as error:
        chat.render(MESSAGES, {})
    assert message in error.value.message
