"""config.pbtxt against its golden file; Triton itself reads it in the tests of serving."""

from __future__ import annotations

from pathlib import Path

from tkit.triton.ensemble import ensemble_config
from tkit.triton.model_config import ModelConfig, TensorSpec, render_model_config
from tkit.triton.repository import ServedModel, repository_files, write_repository

GOLDEN = Path(__file__).parent / "golden"


def test_ensemble_is_the_golden_file() -> None:
    parameters = {"engine_dir": '/srv/engines/é "x"', "instance": "0123456789abcdef"}
    assert render_model_config(ensemble_config(parameters)) == (GOLDEN / "ensemble.pbtxt").read_text(encoding="utf-8")


def test_repository_layout(tmp_path: Path) -> None:
    tensor = TensorSpec(name="x", data_type="FP32", dims=(-1, 2))
    config = ModelConfig(name="m", inputs=(tensor,), outputs=(tensor,), max_batch_size=0, is_decoupled=False)
    model = ServedModel(config=config, source="source\n")
    write_repository(tmp_path, [model])
    written = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert (
        written
        == repository_files([model])
        == {
            "m/config.pbtxt": render_model_config(config),
            "m/1/model.py": "source\n",
        }
    )
