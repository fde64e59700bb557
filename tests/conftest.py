"""Small models made here, and the command as a user types it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tkit import demo
from tkit.cli.main import cli
from tkit.loadgen.mock_server import running_mock

# tiny models: threads cost more than they give, and the tests run in parallel; torch, which reads it, is imported later
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.set_threshold(200_000)  # as tkit does where it imports torch
# a shell that starts the tests in the background has them ignore Ctrl-C, and every process they start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

MakeLlama = Callable[..., Path]


def pytest_collection_finish() -> None:
    """What has been imported by now lives to the end; a sweep's look for garbage in it would take longer than the sweep."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> MakeLlama:
    """make_llama(**config) -> directory of a tiny random Llama with the demo tokenizer; equal arguments, one model."""
    import torch  # not above: xdist's own process, and tests of packages without torch, would wait for it
    from transformers import LlamaConfig, LlamaForCausalLM

    made: dict[str, Path] = {}

    def make(dtype: str = "bfloat16", **overrides: Any) -> Path:
        key = json.dumps([dtype, overrides], sort_keys=True)
        if key not in made:
            directory = tmp_path_factory.mktemp("llama")
            sizes = {
                "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
                "initializer_range": 0.2,  # large enough that logits differ from token to token
            }  # fmt: skip
            torch.manual_seed(len(made))
            model = LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides}))
            model.to(getattr(torch, dtype)).save_pretrained(directory)
            for path in demo.MODEL_DIR.glob("tokenizer*"):
                shutil.copyfile(path, directory / path.name)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer for loads."""
    from servers import make_tokenizer  # as torch above

    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def fake_url() -> Iterator[str]:
    """A gRPC server that behaves, or misbehaves, by the name of the model."""
    from servers import fake_server

    with fake_server() as url:
        yield url


@pytest.fixture(scope="session")
def mock() -> Iterator[str]:
    """The mock server, whose tokens come at known times: 50 ms to the first, 10 ms to each other."""
    with running_mock() as url:
        yield url


@pytest.fixture
def tkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """tkit("build", "--tp", "2") in an empty directory; stdout and stderr apart."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def build(tkit: Callable[..., Result]) -> Callable[..., Path]:
    """`tkit build ...`, which succeeds; the engine's directory."""

    def build(*arguments: Any) -> Path:
        result = tkit("build", *arguments)
        assert result.exit_code == 0, result.output
        return Path(result.stdout.strip()).absolute()

    return build
