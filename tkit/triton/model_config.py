"""config.pbtxt: a typed value -> Triton's ModelConfig protobuf -> its text format. Knows no file and no template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output; `dims` are without the batch dimension, -1 is any length."""

    name: str
    data_type: str  # Triton's name without the prefix: "INT32", "STRING"
    dims: tuple[int, ...] = (1,)
    is_optional: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model of the Python backend, one instance on the CPU: placing tensors and batching are its own affair."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    is_decoupled: bool
    parameters: Mapping[str, str] = field(default_factory=dict)


def render_model_config(model: ModelConfig) -> str:
    """The text of config.pbtxt."""
    message = model_config_pb2.ModelConfig(
        name=model.name,
        backend="python",
        max_batch_size=model.max_batch_size,
        input=[_input(tensor) for tensor in model.inputs],
        output=[
            model_config_pb2.ModelOutput(name=tensor.name, data_type=_data_type(tensor), dims=tensor.dims)
            for tensor in model.outputs
        ],
        instance_group=[
            model_config_pb2.ModelInstanceGroup(count=1, kind=model_config_pb2.ModelInstanceGroup.Kind.KIND_CPU)
        ],
        model_transaction_policy=model_config_pb2.ModelTransactionPolicy(decoupled=model.is_decoupled),
    )
    for name, value in model.parameters.items():
        message.parameters[name].string_value = value
    return text_format.MessageToString(message, as_utf8=True)


def _input(tensor: TensorSpec) -> model_config_pb2.ModelInput:
    return model_config_pb2.ModelInput(
        name=tensor.name, data_type=_data_type(tensor), dims=tensor.dims, optional=tensor.is_optional
    )


def _data_type(tensor: TensorSpec) -> int:
    return model_config_pb2.DataType.Value(f"TYPE_{tensor.data_type}")
