"""Messages or token ids -> the text of a prompt, by the tokenizer's own files. Knows no model and no server.

The sandbox is the one of transformers' `apply_chat_template`, without importing transformers: the same options, the
same few functions, and namespaces that keep no underscored names.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
from tokenizers import Tokenizer

from tkit.errors import InputError
from tkit.files import read_json

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILES = ("special_tokens_map.json", "tokenizer_config.json")  # what the later says holds


class PromptTokenizer:
    """The chat template and the tokens of one tokenizer directory."""

    def __init__(self, directory: Path):
        config: dict[str, Any] = {}
        for name in CONFIG_FILES:
            if (directory / name).is_file():
                config |= read_json(directory / name)
        self.special_tokens = dict(_special_tokens(config))
        source = _template_source(directory, config)
        self._template = _environment().from_string(source) if source is not None else None
        self._file = directory / "tokenizer.json"

    @property
    def has_template(self) -> bool:
        return self._template is not None

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt, up to where the assistant's answer begins. Raises InputError with the template's own words."""
        assert self._template is not None
        given = {"tools": None, "documents": None, "add_generation_prompt": True, **self.special_tokens, **variables}
        try:
            return self._template.render(messages=messages, **given)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, RecursionError) as error:
            raise InputError(f"the chat template refuses these messages: {error}") from error

    def num_tokens(self, prompt: str) -> int:
        return len(self._tokenizer.encode(prompt))

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text that the model reads as just these tokens. Raises InputError when there is none."""
        num_tokens = self._tokenizer.get_vocab_size()
        if unknown := [token_id for token_id in token_ids if not 0 <= token_id < num_tokens]:
            raise InputError(f"token id {unknown[0]} is none of the tokenizer's {num_tokens}")
        text = self.without_bos(self._tokenizer.decode(token_ids, skip_special_tokens=False))
        read = self._tokenizer.encode(text).ids
        if read == [*token_ids]:
            return text
        if self._adds_bos and token_ids[:1] != read[:1]:
            raise InputError(f"the model puts token id {read[0]} (BOS) before every text: begin with it")
        same = next((i for i, pair in enumerate(zip(token_ids, read, strict=False)) if pair[0] != pair[1]), len(read))
        raise InputError(
            f"the model takes text, and reads that of these token ids as others, from number {same} on; send the text"
        )

    @functools.cached_property
    def longest_token(self) -> int:
        """In characters: so many times as many as there are positions never fit."""
        return max(map(len, self._tokenizer.get_vocab()))

    def without_bos(self, prompt: str) -> str:
        """As it is to go to the model, which encodes it as any text: TensorRT-LLM's puts a BOS before it even when one is
        there, as in most chat templates."""
        bos = self.special_tokens.get("bos_token")
        return prompt[len(bos) :] if bos and prompt.startswith(bos) and self._adds_bos else prompt

    @functools.cached_property
    def _adds_bos(self) -> bool:
        """And nothing else."""
        return self._tokenizer.encode("").tokens == [self.special_tokens.get("bos_token")]

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self._file))


def _special_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                yield name, text


def _template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The file of its own, else the config's entry: one template, or several of which "default" is the one."""
    if (directory / TEMPLATE_FILE).is_file():
        return (directory / TEMPLATE_FILE).read_text("utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found if isinstance(found, str) else None


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.datetime.now().strftime(format),
        "namespace": _Namespace,
    }
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it is what it encloses."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, the way out of the sandbox."""

    def __init__(self, *args: Any, **attributes: Any):
        super().__init__(*args, **attributes)
        for name in dict(*args, **attributes):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace keeps no name with an underscore in front: {name!r}")
