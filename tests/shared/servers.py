"""Servers to measure: a real Triton with paced models, and a fake one that misbehaves on request."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from waiting import wait_until

from tkit.loadgen.metrics import tpot_ms
from tkit.loadgen.mock_server import child_server
from tkit.loadgen.session import Measurement
from tkit.triton import probe
from tkit.triton.ensemble import ensemble_config
from tkit.triton.install import find_install, free_ports, install_problems, link_backends
from tkit.triton.launcher import LaunchSpec, ServerProcess
from tkit.triton.model_config import ModelConfig, TensorSpec
from tkit.triton.repository import ServedModel, write_repository

HERE = Path(__file__).parent
HOST = "127.0.0.1"
MS = 1_000_000
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "xo", "zu")
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]


def make_tokenizer(directory: Path) -> Path:
    """A byte-level BPE tokenizer that knows WORDS and " word", and opens every text with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([" ".join(WORDS), " word" * 50], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@dataclass(frozen=True, kw_only=True)
class PacedServer:
    """Triton with two models: `ensemble` (all of TensorRT-LLM's inputs) and `bare` (text and length, no token counts)."""

    url: str  # gRPC
    http_url: str
    tokenizer_dir: Path
    ttft_ms: float
    itl_ms: float
    log: Path

    def sent(self) -> dict[str, dict[str, Any]]:
        """What the model says it did, by request id."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return {line["id"]: line for line in lines}


@dataclass(frozen=True, kw_only=True)
class FakeHttp:
    """A running fake_http.py."""

    url: str
    log: Path

    def sent(self, model: str) -> dict[str, dict[str, Any]]:
        """What it did when it was asked for a model, by request id."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return {line["id"]: line for line in lines if line["body"].get("model", model) == model}


def check_times(point: Measurement, sent: dict[str, dict[str, Any]]) -> None:
    """Never before the server acted; the medians a few milliseconds after, whatever else this machine does."""
    to_client, tpot_ratio, ttft_delay = [], [], []
    for record in point.records:
        line = sent[f"24x16-16-4-1-{record.id}"]
        assert record.first_token_ns is not None
        assert record.last_token_ns is not None
        assert record.sent_ns < line["arrived_ns"]
        assert all(seen > left for seen, left in zip(record.token_ns, line["sent_ns"], strict=True))
        assert record.last_token_ns <= record.end_ns
        to_client += [(seen - left) / MS for seen, left in zip(record.token_ns, line["sent_ns"], strict=True)]
        own_ttft = line["sent_ns"][0] - line["arrived_ns"]
        ttft_delay.append((record.first_token_ns - record.sent_ns - own_ttft) / MS)
        tpot = tpot_ms(record)
        assert tpot is not None
        tpot_ratio.append(tpot / ((line["sent_ns"][-1] - line["sent_ns"][0]) / MS / 15))
    assert statistics.median(to_client) < 15
    assert 0 < statistics.median(ttft_delay) < 30
    assert statistics.median(tpot_ratio) == pytest.approx(1, abs=0.1)


BARE = ModelConfig(
    name="bare",
    inputs=(TensorSpec(name="text_input", data_type="STRING"), TensorSpec(name="max_tokens", data_type="INT32")),
    outputs=(TensorSpec(name="text_output", data_type="STRING"),),
    max_batch_size=0,
    is_decoupled=True,
)


@contextlib.contextmanager
def paced_server(directory: Path, *, ttft_ms: float = 50, itl_ms: float = 10) -> Iterator[PacedServer]:
    install = find_install()
    assert install is not None
    assert install_problems(install) == []
    tokenizer_dir = make_tokenizer(directory / "tokenizer")
    settings = {
        "ttft_ms": str(ttft_ms), "itl_ms": str(itl_ms), "tokenizer": str(tokenizer_dir / "tokenizer.json"),
        "piece": " word", "log": str(directory / "sent.jsonl"),
    }  # fmt: skip
    source = (HERE / "paced_model.py").read_text()
    for config, final in ((ensemble_config({}), "with_last"), (BARE, "apart")):
        changed = ModelConfig(**{**vars(config), "parameters": {**settings, "final": final}})
        write_repository(directory / "repository", [ServedModel(config=changed, source=source)])
    link_backends(install, directory / "backends")
    http_port, grpc_port, metrics_port = free_ports(HOST, 3)
    spec = LaunchSpec(
        repository=directory / "repository", host=HOST, http_port=http_port, grpc_port=grpc_port,
        metrics_port=metrics_port, exit_timeout_s=2, backends=directory / "backends",
    )  # fmt: skip
    process = ServerProcess.start(install, spec, directory / "server.log", dies_with_parent=True)
    try:
        deadline = time.monotonic() + 30
        while not probe.is_http_ready(HOST, http_port, 1.0):
            process.check_alive()
            assert time.monotonic() < deadline, (directory / "server.log").read_text()
            time.sleep(0.05)
        yield PacedServer(
            url=f"{HOST}:{grpc_port}", http_url=f"{HOST}:{http_port}", tokenizer_dir=tokenizer_dir, ttft_ms=ttft_ms,
            itl_ms=itl_ms, log=directory / "sent.jsonl",
        )  # fmt: skip
    finally:
        process.stop()


def take_record(url: str) -> dict[str, dict[str, Any]]:
    """The answers of a mock server since this was last asked, by request id."""
    with urllib.request.urlopen(f"http://{url}/record", timeout=30) as reply:
        return {line["id"]: line for line in json.load(reply)}


def wait_for_answers(url: str, count: int) -> None:
    """Until a mock server has given so many more."""
    take_record(url)
    given = 0

    def is_enough() -> bool:
        nonlocal given
        given += len(take_record(url))
        return given >= count

    assert wait_until(is_enough), given


@contextlib.contextmanager
def fake_server(engine_dir: str = "") -> Iterator[str]:
    """The address of a running fake_server.py."""
    with child_server([sys.executable, str(HERE / "fake_server.py"), engine_dir]) as url:
        yield url


@contextlib.contextmanager
def fake_http_server(log: Path, tokenizer_dir: Path) -> Iterator[FakeHttp]:
    command = [sys.executable, str(HERE / "fake_http.py"), str(log), str(tokenizer_dir / "tokenizer.json")]
    with child_server(command) as url:
        yield FakeHttp(url=url, log=log)
