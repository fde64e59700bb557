"""The plan of a conversion: for every tensor of every rank file, which rows and columns of which source it holds.

`architectures` makes moves, `checkpoints` carries them out, forwards (convert) and backwards (merge).
"""

from __future__ import annotations

from dataclasses import dataclass

from tkit.specs.quantization import QuantFormat

Range = tuple[int, int]  # [start, stop)


@dataclass(frozen=True, kw_only=True)
class Output:
    """One tensor of one file: `rows` and `columns` of the whole (unsharded) stored tensor called `part`.

    Rows are listed in order; a range may repeat (KV heads) and may pass the end (vocabulary padding, filled with zeros).
    `columns` is None where the tensor is not cut along its second axis. `rank` is None in the files of the unified
    Hugging Face checkpoint.
    """

    rank: int | None
    file: str
    name: str
    part: str  # the name within the module: weight, bias, weights_scaling_factor, ...
    dtype: str  # "model" or a safetensors name
    shape: tuple[int, ...]
    rows: tuple[Range, ...]
    columns: Range | None = None
    is_zero: bool = False  # zeros of that shape instead
    source: int | None = None  # the source of that index as it came, instead of rows of the stack
    is_transposed: bool = False  # `rows` and `columns` are of the whole tensor; this one is stored as its transpose
    fold: str | None = None  # multiplied by the pre-quant factor of the quantized layers with that input


@dataclass(frozen=True, kw_only=True)
class Move:
    """One TensorRT-LLM module (or its bias): the sources, stacked along dim 0 in order, become the outputs.

    `format` is None where the values are only moved, never changed; `build_format` is what trtllm-build makes of them.
    Where `kv_cache` is set there are no sources: the outputs are the scales of the layer's KV cache, found by calibration.
    """

    module: str  # with the global layer index: transformer.layers.7.attention.qkv
    layer: int | None
    sources: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]  # as they lie in the source files
    source_rows: tuple[int, ...]  # as they are stacked, after `transform`
    outputs: tuple[Output, ...]
    transform: str | None = None  # add_one | transpose | float32, applied to every source
    format: QuantFormat | None = None
    build_format: QuantFormat | None = None
    kv_cache: str | None = None
    num_experts: int = 0  # the sources are those of so many experts, one expert after the other; 0 = not experts
    input: str | None = None
    # dtypes of quantized sources, read as they are stored; None = floats, cast to the model's
    source_dtypes: tuple[tuple[str, ...], ...] | None = None

    @property
    def is_computed(self) -> bool:
        """Its outputs come from a quantizer."""
        return self.format is not None or self.kv_cache is not None

    @property
    def needs_calibration(self) -> bool:
        return self.kv_cache is not None or (self.format is not None and self.format.needs_calibration)
