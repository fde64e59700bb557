"""The shipped model table: `data/models.csv`, exact sizes of well-known models, for planning without their files."""

from __future__ import annotations

import csv
import functools
import re
from pathlib import Path

from tkit.planner.shapes import FAMILIES, LatentAttention, Layer, ModelShape

TABLE = Path(__file__).with_name("data") / "models.csv"
# parts of a model's name that leave its shape as it is
_VARIANT = {
    "instruct", "it", "chat", "hf", "base", "text", "meta", "fp8", "fp4", "nvfp4", "mxfp4", "bf16", "dynamic",
    "2407", "2409", "2501", "2507", "0528", "17b", "16e", "128e",
}  # fmt: skip
# names under which a shape is published besides its own
_OTHER_NAMES = {
    "llama 7b": "Llama-2-7B", "llama 13b": "Llama-2-13B", "llama 70b": "Llama-2-70B", "llama 3 70b": "Llama-3.1-70B",
    "deepseek v3": "DeepSeek-V3/R1", "deepseek r1": "DeepSeek-V3/R1", "deepseek v3.1": "DeepSeek-V3/R1",
    "phi 3 medium 4k": "Phi-3-medium-14B", "phi 4": "Phi-4-14B", "mixtral 8x7b v0.1": "Mixtral-8x7B",
    "mixtral 8x22b v0.1": "Mixtral-8x22B", "mistral 7b": "Mistral-7B-v0.3", "mistral 7b v0.2": "Mistral-7B-v0.3",
    "gpt j 6b": "GPT-J-6B", "gptj 6b": "GPT-J-6B", "mistral nemo": "Mistral-Nemo-12B",
    "mistral small 24b": "Mistral-Small-24B", "phi 3.5 mini": "Phi-3.5-mini", "qwen3 235b a22b thinking": "Qwen3-235B-A22B",
    "nemotron 4 340b": "Nemotron-4-340B", "llama 3.3 nemotron super 49b v1": "Llama-3.3-Nemotron-Super-49B",
    "llama 3 3 nemotron super 49b v1": "Llama-3.3-Nemotron-Super-49B", "llama 4 scout": "Llama-4-Scout (text)",
    "llama 4 maverick": "Llama-4-Maverick (text)",
}  # fmt: skip


def find_shape(name: str) -> ModelShape | None:
    """By hub id or published name; instruction-tuned and quantized variants have the shape of their base."""
    model = _names().get(_key(name))
    return shape_table()[model] if model else None


@functools.cache
def _names() -> dict[str, str]:
    names = {_key(model): model for model in shape_table()} | _OTHER_NAMES
    return names | {_key(row["hf_id"]): row["model"] for row in _rows()}


@functools.cache
def shape_table() -> dict[str, ModelShape]:
    return {row["model"]: _shape(row) for row in _rows()}


@functools.cache
def _rows() -> list[dict[str, str]]:
    with open(TABLE, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _key(name: str) -> str:
    words = re.split(r"[\s_()/-]+", name.split("/", 1)[-1].lower() if name.count("/") == 1 else name.lower())
    return " ".join(word for word in words if word and word not in _VARIANT)


def _shape(row: dict[str, str]) -> ModelShape:
    family, traits = row["family"], FAMILIES[row["family"]]
    number = lambda column: int(row[column] or 0)  # noqa: E731
    expert_size = number("moe_intermediate")
    heads = number("heads")
    latent = None
    if row["kv_lora"]:
        latent = LatentAttention(
            q_lora=number("q_lora"),
            kv_lora=number("kv_lora"),
            qk_nope=number("qk_nope"),
            qk_rope=number("qk_rope"),
            v_head=number("v_head"),
        )
    return ModelShape(
        name=row["model"],
        family=family,
        layers=_nas_layers(row) if family == "nemotron-nas" else _layers(row),
        hidden_size=number("hidden"),
        num_heads=heads,
        num_kv_heads=number("kv_heads") or heads,
        head_size=number("head_dim"),
        vocab_size=number("vocab"),
        max_position=number("max_position"),
        is_tied=row["tied"] == "1",
        has_qkv_bias=row["qkv_bias"] == "1",
        has_attention_output_bias=traits.has_attention_output_bias,
        has_mlp_bias=traits.has_mlp_bias,
        norms=2 if row["model"] in ("Falcon-40B", "Falcon-180B") else 1 if family == "falcon" else traits.norms,
        num_experts=number("experts"),
        experts_per_token=number("experts_per_tok"),
        expert_size=expert_size,
        shared_expert_size=number("shared_experts") * expert_size,
        latent=latent,
        note=row["note"],
    )


def _layers(row: dict[str, str]) -> tuple[Layer, ...]:
    num_dense = int(row["dense_layers"] or 0)
    layers = []
    for index in range(int(row["layers"])):
        is_sparse = int(row["experts"]) > 0
        if is_sparse and num_dense:  # DeepSeek puts its dense layers first, Llama 4 alternates
            is_sparse = index % 2 == 1 if row["family"] == "llama4" else index >= num_dense
        size = 0 if is_sparse else int(row["intermediate"])
        layers.append(
            Layer(window=_window(row["sliding_window"], index), intermediate_size=size, has_experts=is_sparse)
        )
    return tuple(layers)


def _window(text: str, index: int) -> int | None:
    """`4096 all layers`, `4096 every 2nd layer`, `512, 5 local:1 global`, `8192 chunked, 3 of 4 layers`."""
    if not text:
        return None
    size = int(re.match(r"\d+", text).group())  # type: ignore[union-attr]
    every = 2 if "2nd" in text else 6 if "5 local" in text else 4 if "3 of 4" in text else None
    return None if every and (index + 1) % every == 0 else size


def _nas_layers(row: dict[str, str]) -> tuple[Layer, ...]:
    """The table knows how many layers have attention and the sum of the MLP sizes; spread evenly here."""
    num_layers = int(row["layers"])
    with_attention = int(re.search(r"(\d+)/", row["attention"]).group(1))  # type: ignore[union-attr]
    units, extras = divmod(int(row["intermediate"]) // 256, num_layers)
    return tuple(
        Layer(
            has_attention=index * with_attention // num_layers != (index + 1) * with_attention // num_layers,
            intermediate_size=256 * (units + (index < extras)),
        )
        for index in range(num_layers)
    )
