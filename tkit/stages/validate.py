"""Validate: run the written artefact against its source on held-out text; write `validation.json` beside the card."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tkit import demo
from tkit.architectures.config import spec_from_hf
from tkit.architectures.table import ARCHITECTURES
from tkit.checkpoints.reader import read_config
from tkit.errors import GateFailed, InputError
from tkit.files import check_writable, from_mapping, read_json, sha256_file, write_json
from tkit.specs.engine import EngineCard
from tkit.specs.model import ModelSpec
from tkit.specs.progress import Progress
from tkit.specs.record import VALIDATION_FILE, VALIDATION_SCHEMA
from tkit.stages.engines import is_engine, read_card, verify_files
from tkit.stages.models import fetch_model, find_recipe, read_tokenizer

if TYPE_CHECKING:  # torch only where it computes
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PreTrainedModel

WINDOW_TOKENS = 512
SNR_WINDOWS = 2  # a layer's figure moves by less than 0.5 dB with more
NUM_SAMPLES, PROMPT_TOKENS, SAMPLE_TOKENS = 3, 32, 32


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Greedy continuations of one prompt; `same_tokens` is how far they agree."""

    prompt: str
    source: str
    engine: str
    same_tokens: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """`validation.json`. KL in nats per token; `text` names the held-out text and its digest.

    `layer_snr_db` is each decoder layer's own signal-to-noise ratio, null where it computes what the source's does.
    """

    schema: str = VALIDATION_SCHEMA
    engine: str
    key: str | None
    ppl: float
    ppl_source: float
    ppl_ratio: float
    kl: float
    kl_max: float
    top1: float
    layer_snr_db: tuple[float | None, ...]
    samples: tuple[Sample, ...]
    tokens: int
    windows: int
    window_tokens: int
    text: Mapping[str, str]
    source: str
    device: str
    created: str


def validate(
    engine_dir: Path,
    progress: Progress,
    *,
    source: Path | None = None,
    text: Path | None = None,
    num_windows: int = 16,
    device: str = "auto",
) -> ValidationRecord:
    """Perplexity, mean KL and top-1 agreement of the engine's checkpoint against the model it was built from; of a
    checkpoint without a card against `source`, and nothing is written beside it."""
    import torch

    from tkit.runtime.corpus import SPREAD, token_ids
    from tkit.runtime.device import pick_device
    from tkit.runtime.evaluate import compare_models, layer_snr_db
    from tkit.runtime.load import load_model, load_source

    card = read_card(engine_dir) if is_engine(engine_dir) else None
    if card is not None:
        check_writable(engine_dir, f"{VALIDATION_FILE} is kept in the engine; validate a copy of your own")
        verify_files(engine_dir, card, progress)
        source_dir, tokenizer_dir = source or source_directory(card.source), engine_dir / "tokenizer"
    elif source is None:
        raise InputError(
            f"{engine_dir}: no engine of tkit's, so nothing says what it was made from", hint="give --source"
        )
    else:
        source_dir = tokenizer_dir = source
    text = text or demo.HELD_OUT
    if not text.is_file():
        raise InputError(f"--text {text}: {'no file' if text.exists() else 'no such file'}")
    tokenizer = read_tokenizer(tokenizer_dir)
    ids = token_ids(text, tokenizer, SPREAD * num_windows * WINDOW_TOKENS)
    device = pick_device(device)
    candidate, spec = load_model(engine_dir, device)
    _check_source(source_dir, engine_dir, spec, max(ids, default=0))
    length = min(WINDOW_TOKENS, spec.max_position_embeddings)
    windows = min(num_windows, len(ids) // length)
    if windows == 0:
        raise InputError(f"{text}: {len(ids)} tokens, one window needs {length}", hint="give a longer --text")
    stride = len(ids) // windows  # spread over the whole text
    tokens = torch.tensor([ids[i * stride : i * stride + length] for i in range(windows)], dtype=torch.int64)
    original = load_source(source_dir, device)
    result = compare_models(original, candidate, tokens, lambda done: progress.step("validate", done, windows))
    prefix = ARCHITECTURES[spec.architecture].layer_prefix.removesuffix(".")
    layers = [prefix.format(layer=index) for index in range(spec.num_layers)]
    snr = layer_snr_db(original, candidate, layers, tokens[:SNR_WINDOWS])
    record = ValidationRecord(
        engine=card.name if card else engine_dir.name,
        key=card.key if card else None,
        **dataclasses.asdict(result),
        layer_snr_db=tuple(None if value is None else round(value, 2) for value in snr),
        samples=tuple(_sample(original, candidate, tokenizer, window) for window in tokens[:NUM_SAMPLES]),
        ppl_ratio=result.ppl / result.ppl_source,
        windows=windows,
        window_tokens=length,
        text={"name": text.name, "sha256": sha256_file(text)},
        source=str(source_dir),
        device=device,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if card is not None:
        write_json(engine_dir / VALIDATION_FILE, record)
    return record


def _check_source(source_dir: Path, engine_dir: Path, spec: ModelSpec, largest_token: int) -> None:
    """Raises InputError where layers of the two have no counterpart, or the text has tokens that one does not embed."""
    source = spec_from_hf(read_config(source_dir), str(source_dir / "config.json"))
    problems = []
    for what, expected, found in (
        ("layers", source.num_layers, spec.num_layers),
        ("hidden_size", source.hidden_size, spec.hidden_size),
        ("layers' name", *(ARCHITECTURES[its.architecture].layer_prefix for its in (source, spec))),
    ):
        if expected != found:
            problems.append(f"{what}: {expected} and {found}")
    if problems:
        raise InputError(
            f"{engine_dir} was not made from {source_dir}", problems=problems, hint="--source names its own model"
        )
    embedded = min(source.vocab_size, spec.vocab_size)
    if largest_token >= embedded:
        raise InputError(
            f"the tokenizer makes token {largest_token} of the text, the model embeds {embedded}",
            hint="put the model's own tokenizer beside its weights",
        )


def _sample(source: PreTrainedModel, candidate: PreTrainedModel, tokenizer: Tokenizer, window: Tensor) -> Sample:
    from tkit.runtime.evaluate import continued

    prompt = window[: min(PROMPT_TOKENS, len(window) // 2)]
    num_tokens = min(SAMPLE_TOKENS, len(window) - len(prompt))
    expected, found = (continued(model, prompt, num_tokens) for model in (source, candidate))
    pairs = zip(expected, found, strict=False)  # either may end early
    return Sample(
        prompt=tokenizer.decode(prompt.tolist()),
        source=tokenizer.decode(expected),
        engine=tokenizer.decode(found),
        same_tokens=sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)),
        tokens=len(expected),
    )


def stored_validation(engine_dir: Path, card: EngineCard) -> ValidationRecord | None:
    """What `validate` with its defaults found of this very engine; None where it has to be run."""
    path = engine_dir / VALIDATION_FILE
    if not path.is_file():
        return None
    try:
        record = from_mapping(ValidationRecord, read_json(path), str(path))
    except InputError:
        return None  # of another version
    is_ours = record.key == card.key and record.text.get("sha256") == sha256_file(demo.HELD_OUT)
    return record if is_ours else None


def check_gates(record: ValidationRecord, *, max_kl: float | None, max_ppl_ratio: float | None) -> None:
    """Raises GateFailed naming every threshold that the record exceeds."""
    limits = (("kl", record.kl, max_kl), ("ppl_ratio", record.ppl_ratio, max_ppl_ratio))
    problems = [
        f"{name} {value:.4g} exceeds {limit:.4g}"
        for name, value, limit in limits
        if limit is not None and not value <= limit
    ]
    if problems:
        raise GateFailed(f"{record.engine}: validation gate failed", problems=problems)


def source_directory(source: Mapping[str, Any]) -> Path:
    """Where the model was when the engine was built, or where its name leads now."""
    if not source.get("path") or not source.get("model"):
        raise InputError("the engine's card does not say what it was built from", hint="give --source")
    directory = Path(source["path"])
    if directory.is_dir():
        return directory
    name, recipe = find_recipe(source["model"])
    return fetch_model(dataclasses.replace(recipe, revision=source.get("revision")), name).directory
