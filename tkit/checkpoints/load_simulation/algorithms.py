"""One row per `quant_algo`: the tensors of a layer as they are shipped, and what the loader makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from tkit.checkpoints.load_simulation.modules import Form, Linear, Weight

MIXED = "MIXED_PRECISION"

# fmt: off
# a list of one's own replaces these, so it must repeat them
EXCLUDED = ("*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding", "*shared_expert_gate",
            "*fused_a")
# fmt: on


@dataclass(frozen=True)
class Stored:
    """One tensor of a quantized layer as it is shipped. Dimensions: out, in, E (experts) and numbers, `/2` or `/g`
    (group size) dividing. `experts` is None where a layer of experts has no such tensor; `when` names the flag in
    `quantization` that it depends on."""

    name: str
    dtype: str
    dense: str
    experts: str | None = None
    when: str | None = None


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One `quant_algo`. `multiple` is what the module pads the unsplit sizes to, times tp; "g" = the group size."""

    stored: tuple[Stored, ...]
    preprocess: Callable[[str, Form, str], Iterable[tuple[str, Form]]] = lambda name, form, model: ((name, form),)
    multiple: int | str = 1
    group_sizes: tuple[int, ...] = (64, 128)
    has_experts: bool = True


def groupwise(name: str, form: Form, model: str) -> Iterator[tuple[str, Form]]:
    """Codes go through the kernel's layout and are seen as 16-bit values then; scales are transposed."""
    shape = form.shape
    if name.endswith("weight") and form.dtype == "I8":
        *experts, half_out, in_ = shape
        yield name, Form(model, (*experts, in_, half_out // 2))
    elif name.endswith("weights_scaling_factor"):
        yield name, Form(model, (*shape[:-2], *reversed(shape[-2:])))
    elif name.endswith("prequant_scaling_factor"):
        yield name, Form(form.dtype, (1, shape[-1] if shape else 1))  # of (experts, in) the first row is taken
    else:
        yield name, form


def groupwise_fp8(name: str, form: Form, model: str) -> Iterator[tuple[str, Form]]:
    """As `groupwise`; the two scalars also become `alpha`."""
    yield from groupwise(name, form, model)
    if name.endswith(".weights_scaling_factor_2"):
        yield name.replace(".weights_scaling_factor_2", ".alpha"), Form(form.dtype, form.shape or (1,))


def fp8_bits(name: str, form: Form, model: str) -> Iterator[tuple[str, Form]]:
    yield name, Form("F8_E4M3", form.shape) if name.endswith("weight") and form.dtype == "I8" else form


def weight_only(codes_per_byte: int) -> Callable[[str, Form, str], Iterator[tuple[str, Form]]]:
    """Plain weights are quantized by the build itself, on the GPU it runs on; int8 ones are taken as they are."""

    def preprocess(name: str, form: Form, model: str) -> Iterator[tuple[str, Form]]:
        touched = ("qkv.weight", "dense.weight", "fc.weight", "proj.weight", "gate.weight")
        is_plain_linear = any(part in name for part in touched) and form.dtype != "I8" and len(form.shape) >= 2
        if not is_plain_linear:
            yield name, form
            return
        *experts, out, in_ = form.shape
        yield name, Form("I8", (*experts, in_, out // codes_per_byte))
        yield name.removesuffix("weight") + "per_channel_scale", Form(form.dtype, (*experts, out))

    return preprocess


def block_scaled(name: str, form: Form, model: str) -> Iterator[tuple[str, Form]]:
    for theirs, ours in (
        ("weights_scaling_factor_2", "weights_global_scaling_factor"),
        ("weights_scaling_factor", "weights_block_scaling_factor"),
        ("activation_scaling_factor", "activation_global_scaling_factor"),
    ):
        if name.endswith("." + theirs):
            yield name.removesuffix(theirs) + ours, form
            return
    yield name, form


# fmt: off
_PLAIN = Stored("weight", "model", "out in", "E out in")
_INT4 = (
    Stored("weight",                  "I8",    "out/2 in", "E out/2 in"),
    Stored("weights_scaling_factor",  "F32",   "out in/g", "E out in/g"),
    Stored("prequant_scaling_factor", "model", "in",       "in",         when="pre_quant_scale"),
    Stored("zero",                    "model", "in/g out", "E in/g out", when="has_zero_point"),
)
ALGORITHMS: dict[str | None, Algorithm] = {
    None:    Algorithm(stored=(_PLAIN,)),
    "W8A16": Algorithm(stored=(_PLAIN,), preprocess=weight_only(1), multiple=64),
    "W4A16": Algorithm(stored=(_PLAIN,), preprocess=weight_only(2), multiple=64),
    "FP8": Algorithm(preprocess=fp8_bits, stored=(
        Stored("weight",                    "F8_E4M3", "out in", "E out in"),
        Stored("weights_scaling_factor",    "F32",     "1",      "E 1"),
        Stored("activation_scaling_factor", "F32",     "1",      "1"),
    )),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm(preprocess=fp8_bits, has_experts=False, stored=(
        Stored("weight",                    "F8_E4M3", "out in"),
        Stored("per_channel_scale",         "F32",     "out"),
    )),
    "W8A8_SQ_PER_CHANNEL": Algorithm(stored=(  # experts stay in the model's dtype
        Stored("weight",                    "I8",      "out in"),
        Stored("weights_scaling_factor",    "F32",     "out"),
        Stored("prequant_scaling_factor",   "model",   "in"),
        Stored("activation_scaling_factor", "F32",     "1"),
    )),
    "W4A16_AWQ": Algorithm(preprocess=groupwise, multiple="g", stored=_INT4),
    # with experts, `weights_scaling_factor_2` of any shape ends as an alpha that is not the module's (experts, 1)
    "W4A8_AWQ": Algorithm(preprocess=groupwise_fp8, multiple="g", group_sizes=(128,), has_experts=False, stored=(
        *_INT4,
        Stored("weights_scaling_factor_2",  "F32",     "1"),
        Stored("activation_scaling_factor", "F32",     "1"),
    )),
    # the scales' shape is unpacked into two sizes
    "NVFP4": Algorithm(preprocess=block_scaled, group_sizes=(16, 64, 128), has_experts=False, stored=(
        Stored("weight",                    "U8",      "out in/2"),
        Stored("weights_scaling_factor",    "F8_E4M3", "out in/16"),
        Stored("weights_scaling_factor_2",  "F32",     "1"),
        Stored("activation_scaling_factor", "F32",     "1"),
    )),
}
# fmt: on


def stored_parameters(linear: Linear, config: Mapping[str, Any]) -> Iterator[Weight]:
    """The tensors of one linear layer under the algorithm of `config`."""
    quantization = module_quantization(linear, config)
    algorithm = ALGORITHMS[quantization.get("quant_algo")]
    stored = algorithm.stored
    if linear.experts and not any(tensor.experts for tensor in stored):
        stored = (_PLAIN,)
    group_size = quantization.get("group_size", 128)
    out, in_ = _padded_sizes(linear, config["mapping"]["tp_size"], algorithm, group_size)
    sizes = {"out": out, "in": in_, "E": linear.experts, "g": group_size}
    for tensor in stored:
        dimensions = tensor.experts if linear.experts else tensor.dense
        if dimensions is not None and (tensor.when is None or quantization.get(tensor.when)):
            yield Weight(f"{linear.name}.{tensor.name}", _shape(dimensions, sizes), tensor.dtype)
    if linear.bias:
        yield Weight(f"{linear.name}.bias", (linear.out,))


def module_quantization(linear: Linear, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry that decides about one layer. Experts go by the name of the module that holds them all, and FP8 rowwise
    replaces whole attention and MLP modules."""
    quantization: Mapping[str, Any] = config["quantization"]
    block = linear.name.rpartition(".")[0]
    if quantization.get("quant_algo") == MIXED:
        return layer_entry(quantization, block if linear.experts else linear.name)
    is_whole = linear.experts or quantization.get("quant_algo") == "FP8_PER_CHANNEL_PER_TOKEN"
    name = block if is_whole else linear.name
    patterns = quantization.get("exclude_modules") or EXCLUDED
    return {} if any(fnmatchcase(name, pattern) for pattern in patterns) else quantization


def layer_entry(quantization: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    layers: Mapping[str, Mapping[str, Any]] = quantization["quantized_layers"]
    return next((entry for pattern, entry in layers.items() if fnmatchcase(name, pattern)), {})


def _padded_sizes(linear: Linear, tp: int, algorithm: Algorithm, group_size: int) -> tuple[int, int]:
    """Weight-only modules are padded to what their kernels divide; a file with smaller tensors does not fit them."""
    multiple = algorithm.multiple if isinstance(algorithm.multiple, int) else max(64, group_size)
    if multiple == 1 or linear.experts:
        return linear.out, linear.in_

    def padded(size: int, is_split: bool) -> int:
        whole = size * tp if is_split else size
        whole = -(-whole // (multiple * tp)) * multiple * tp
        return whole // tp if is_split else whole

    return padded(linear.out, linear.cut == "column"), padded(linear.in_, linear.cut == "row")


def _shape(dimensions: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape = []
    for dimension in dimensions.split():
        size, _, divisor = dimension.partition("/")
        value = sizes[size] if size in sizes else int(size)
        shape.append(value // (sizes[divisor] if divisor in sizes else int(divisor or 1)))
    return tuple(shape)
