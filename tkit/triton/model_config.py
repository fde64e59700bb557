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
    is_scalar: bool = False  # the model sees one number per request of a batch, not a list of one
    is_ragged: bool = False  # requests of one batch may differ in length


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Triton collects requests into batches. The scheduler behind decides what runs; so nothing is waited for."""

    preferred_batch_size: int | None = None
    max_delay_us: int = 0
    max_size: int = 0  # 0 = no limit
    is_ordered: bool = False  # answers leave in the order in which requests came, whichever instance had them


@dataclass(frozen=True, kw_only=True)
class EnsembleStep:
    """Which of the ensemble's tensors feed a model and what its outputs are called: model's name -> ensemble's name."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model whose instances live on the CPU: placing tensors on GPUs is its own affair. With `steps`, an ensemble."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    is_decoupled: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)
    backend: str = "python"
    num_instances: int = 1
    queue: Queue | None = None
    steps: tuple[EnsembleStep, ...] = ()


def render_model_config(model: ModelConfig) -> str:
    """The text of config.pbtxt."""
    message = model_config_pb2.ModelConfig(
        name=model.name,
        max_batch_size=model.max_batch_size,
        input=[_input(tensor) for tensor in model.inputs],
        output=[
            model_config_pb2.ModelOutput(name=tensor.name, data_type=_data_type(tensor), dims=tensor.dims)
            for tensor in model.outputs
        ],
    )
    if model.steps:
        message.platform = "ensemble"
        message.ensemble_scheduling.step.extend(_step(step) for step in model.steps)
    else:
        message.backend = model.backend
        message.instance_group.add(count=model.num_instances, kind=model_config_pb2.ModelInstanceGroup.Kind.KIND_CPU)
        message.model_transaction_policy.decoupled = model.is_decoupled
    if model.queue is not None:
        message.dynamic_batching.CopyFrom(_batching(model.queue))
    for name, value in model.parameters.items():
        message.parameters[name].string_value = value
    return text_format.MessageToString(message, as_utf8=True)


def _input(tensor: TensorSpec) -> model_config_pb2.ModelInput:
    message = model_config_pb2.ModelInput(
        name=tensor.name,
        data_type=_data_type(tensor),
        dims=tensor.dims,
        optional=tensor.is_optional,
        allow_ragged_batch=tensor.is_ragged,
    )
    if tensor.is_scalar:
        message.reshape.SetInParent()  # to the empty shape
    return message


def _step(step: EnsembleStep) -> model_config_pb2.ModelEnsembling.Step:
    return model_config_pb2.ModelEnsembling.Step(
        model_name=step.model, model_version=-1, input_map=dict(step.inputs), output_map=dict(step.outputs)
    )


def _batching(queue: Queue) -> model_config_pb2.ModelDynamicBatching:
    message = model_config_pb2.ModelDynamicBatching(max_queue_delay_microseconds=queue.max_delay_us)
    if queue.preferred_batch_size is not None:
        message.preferred_batch_size.append(queue.preferred_batch_size)
    message.default_queue_policy.max_queue_size = queue.max_size
    message.preserve_ordering = queue.is_ordered
    return message


def _data_type(tensor: TensorSpec) -> int:
    return model_config_pb2.DataType.Value(f"TYPE_{tensor.data_type}")
