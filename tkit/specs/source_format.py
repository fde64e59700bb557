"""How an already quantized Hugging Face checkpoint stores a linear layer, and what becomes of it here.

`architectures` reads which one it is out of the config, `runtime` unpacks its tensors. Knows names and shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

from tkit.specs.quantization import QuantFormat


@dataclass(frozen=True, kw_only=True)
class SourceTensor:
    """One tensor behind the name of its layer. Dimensions: out, in, 1, `/8` or `/g` (group size) dividing, rounded up."""

    name: str
    dtypes: tuple[str, ...]
    dimensions: str
    is_optional: bool = False

    def shape(self, out_features: int, in_features: int, group_size: int | None) -> tuple[int, ...]:
        sizes = {"out": out_features, "in": in_features, "1": 1}
        shape = []
        for dimension in self.dimensions.split():
            size, _, divisor = dimension.partition("/")
            by = group_size if divisor == "g" else int(divisor or 1)
            assert by is not None, f"{self.name} needs a group size"
            shape.append(-(-sizes[size] // by))
        return tuple(shape)


@dataclass(frozen=True, kw_only=True)
class SourceFormat:
    """`unpack` names the reading in `runtime.carried`."""

    name: str  # as people call it: GPTQ
    scheme: str  # 4 bit, group 128
    tensors: tuple[SourceTensor, ...]
    target: QuantFormat
    unpack: str
    is_unified: bool = False  # TensorRT-LLM's PyTorch backend reads it already: the Hugging Face checkpoint is a copy
    zero_point_offset: int = 0  # zero points are stored that much too small
    kv_cache: str = "auto"  # what its KV cache is stored in, as `Precision` names it
    ignored: tuple[str, ...] = ()  # endings of tensors that hold nothing but what is known

    @property
    def has_trtllm_form(self) -> bool:
        return bool(self.target.tensors)

    def __str__(self) -> str:
        return f"{self.name}, {self.scheme}"
