"""What MODEL means on the command line: a directory, a recipe in `model_configs/`, or a model on the Hugging Face hub."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import tkit
from tkit import demo
from tkit.checkpoints.reader import HF_QUANT_CONFIG, INDEX_FILE, PICKLED_FILE, SINGLE_FILE
from tkit.errors import InputError, did_you_mean
from tkit.files import from_mapping, read_yaml
from tkit.specs.recipe import Recipe

DEFAULT_MODEL = "demo"
RECIPES_DIR = Path("model_configs")
_CHECKOUT_RECIPES = Path(tkit.__file__).parent.parent / RECIPES_DIR  # beside the package in a source checkout
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_MODEL_FILES = ("config.json", HF_QUANT_CONFIG, INDEX_FILE, SINGLE_FILE, "model-*.safetensors", *TOKENIZER_FILES)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model directory on this machine, and where it came from."""

    name: str  # short, for engine names
    directory: Path
    model: str  # as typed or written in the recipe
    revision: str | None = None  # the hub's commit


def find_recipe(model: str | None) -> tuple[str, Recipe]:
    """(name, recipe). A directory or hub id becomes a recipe of its own with every default."""
    model = DEFAULT_MODEL if model is None else model
    for path in (Path(model), RECIPES_DIR / f"{model}.yaml", _CHECKOUT_RECIPES / f"{model}.yaml"):
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path.stem, from_mapping(Recipe, read_yaml(path), str(path))
    if Path(model).is_file():
        raise InputError(f"{model}: a file, expected a model's directory", hint=f"name {Path(model).parent}")
    if model and Path(model).is_dir():
        return Path(model).resolve().name, Recipe(model=model)
    known = sorted({path.stem for directory in (RECIPES_DIR, _CHECKOUT_RECIPES) for path in directory.glob("*.yaml")})
    hint = f"recipes: {', '.join(known)}" if known else None
    if model.endswith((".yaml", ".yml")):  # model_configs/x.yaml looks like a hub id
        raise InputError(f"{model}: no such file{did_you_mean(Path(model).stem, known)}", hint=hint)
    if model == DEFAULT_MODEL or _HUB_ID.fullmatch(model):
        return model.split("/")[-1], Recipe(model=model)
    raise InputError(
        f'no model "{model}": not a directory, not a recipe{did_you_mean(model, known)}, not a hub id (org/name)',
        hint=hint,
    )


def fetch_model(recipe: Recipe, name: str, *, allow_pickle: bool = False) -> ModelSource:
    """Makes sure the recipe's model lies on this machine; downloads it when it is a hub id. Pickled weights only where
    they are allowed and the model has no others."""
    if recipe.model == DEFAULT_MODEL:
        return ModelSource(name=DEFAULT_MODEL, directory=demo.MODEL_DIR, model=recipe.model)
    directory = Path(recipe.model)
    if directory.is_dir():
        return ModelSource(name=name, directory=directory.resolve(), model=recipe.model)
    if not _HUB_ID.fullmatch(recipe.model):
        raise InputError(f'no model "{recipe.model}": not a directory, not a hub id (org/name)')
    directory = _download(recipe.model, recipe.revision, _MODEL_FILES)
    if allow_pickle and not has_safetensors(directory):
        directory = _download(recipe.model, directory.name, ("pytorch_model*.bin", f"{PICKLED_FILE}.index.json"))
    return ModelSource(name=name, directory=directory, model=recipe.model, revision=directory.name)


def has_safetensors(directory: Path) -> bool:
    return any((directory / name).exists() for name in (INDEX_FILE, SINGLE_FILE))


def _download(model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The hub's snapshot directory, named after its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{model}: not fetched from the Hugging Face hub: {first_line}",
            hint="check the name, the network and HF_TOKEN, or give a directory that holds the model",
        ) from error


def read_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file", hint="put the model's tokenizer there")
    try:
        return Tokenizer.from_buffer(path.read_bytes())  # from_file takes no path that is not UTF-8
    except Exception as error:  # the library raises plain Exception
        raise InputError(
            f"{path}: the tokenizer does not load: {error}", hint="copy the model's tokenizer files there again"
        ) from error


def check_hub_digests(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises InputError naming every file whose sha256 is not the one under which the Hugging Face cache keeps it.

    There, large files are links to `blobs/<sha256>`; `files` is {name: {"bytes", "sha256"}}.
    """
    problems = []
    for name, facts in files.items():
        blob = (directory / name).resolve()
        is_digest = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
        if is_digest and facts["sha256"] != blob.name:
            problems.append(f"{name}: sha256 is {facts['sha256'][:12]}..., the hub's is {blob.name[:12]}...")
    if problems:
        raise InputError(
            f"{directory}: files are not what the hub published",
            problems=problems,
            hint="delete them from the cache, so that they are fetched again",
        )


def copy_tokenizer(source: Path, target: Path, vocab_size: int) -> Tokenizer:
    """Copies the tokenizer's files into `target`, which the engine is served with, and loads it.

    A model that ships only a SentencePiece file gets the tokenizer.json that transformers makes of it, where the package
    sentencepiece is installed: it is no dependency, because in one process with protobuf's own it crashed. Raises InputError
    when there is no tokenizer or it does not fit the model.
    """
    shutil.rmtree(target, ignore_errors=True)  # of a build that was killed
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    if not (target / "tokenizer.json").exists():
        if not any((target / name).exists() for name in ("tokenizer.model", "vocab.json")):
            raise InputError(
                f"{source}: no tokenizer: neither tokenizer.json nor tokenizer.model nor vocab.json",
                hint="an engine is served with the tokenizer it was built with; copy the model's tokenizer files there",
            )
        from transformers import AutoTokenizer  # slow to import, and only these models need it

        try:
            AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(target)
        except Exception as error:  # whatever the parser of that kind of file raises
            raise InputError(
                f"{source}: transformers makes no tokenizer.json of its tokenizer: {str(error).strip().splitlines()[0]}",
                hint="put the tokenizer.json of the same model there; transformers makes one with pip install sentencepiece",
            ) from error
    # the model's own where there is one, so that what is wrong with it is not said of a copy
    tokenizer = read_tokenizer(source if (source / "tokenizer.json").exists() else target)
    if tokenizer.get_vocab_size() > vocab_size:
        raise InputError(
            f"{source}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model embeds {vocab_size}"
        )
    return tokenizer
