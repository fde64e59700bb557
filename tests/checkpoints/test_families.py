"""Every family, every layout: rank files against torch slices written from TensorRT-LLM's format, the merged model against
transformers, config.json against values written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import LAYOUTS, MODELS, write_checkpoint
from safetensors.torch import load_file

from tkit.architectures.config import spec_from_hf, trtllm_config
from tkit.architectures.table import ARCHITECTURES
from tkit.checkpoints.load_simulation.config import config_problems
from tkit.runtime.load import load_model
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision

Tensors = dict[str, torch.Tensor]
TOKENS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(7))  # longer than the windows


class Rank:
    """One rank's share, cut the obvious way. `config` is the Hugging Face one."""

    def __init__(self, source: Tensors, config: Any, tp: int, pp: int, ep: int, rank: int):
        self.source, self.config, self.tp, self.pp, self.ep = source, config, tp, pp, ep
        self.tp_rank, self.pp_rank = rank % tp, rank // tp
        heads = config.num_attention_heads
        self.head = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.kv_heads = getattr(config, "num_key_value_heads", heads)
        if config.model_type == "falcon":
            self.head = config.hidden_size // heads
            old_kv_heads = 1 if config.multi_query else heads
            self.kv_heads = config.num_kv_heads if config.new_decoder_architecture else old_kv_heads

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(self.tp)[self.tp_rank]

    def columns(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(self.tp, dim=1)[self.tp_rank]

    def kv(self, tensor: torch.Tensor) -> torch.Tensor:
        """Heads repeated one by one until every rank has one."""
        by_head = tensor.reshape(self.kv_heads, self.head, *tensor.shape[1:])
        by_head = by_head.repeat_interleave(max(self.tp // self.kv_heads, 1), dim=0)
        return by_head.chunk(self.tp)[self.tp_rank].reshape(-1, *tensor.shape[1:])

    def qkv(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.rows(q), self.kv(k), self.kv(v)])

    def padded_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        padding = torch.zeros(-len(tensor) % self.tp, *tensor.shape[1:], dtype=tensor.dtype)
        return self.rows(torch.cat([tensor, padding]))

    def experts(self, cut: Callable[[int, int, int], torch.Tensor]) -> torch.Tensor:
        """cut(expert, moe_tp_size, moe_tp_rank), stacked over the experts of this rank."""
        moe_tp, moe_tp_rank = self.tp // self.ep, self.tp_rank // self.ep
        experts = torch.arange(4).chunk(self.ep)[self.tp_rank % self.ep].tolist()
        return torch.stack([cut(expert, moe_tp, moe_tp_rank) for expert in experts])


def separate_attention(r: Rank, p: str, name: str = "self_attn.", out: str = "o_proj") -> Tensors:
    s = r.source
    q, k, v = (f"{p}{name}{part}_proj" for part in "qkv")
    tensors = {
        "attention.qkv.weight": r.qkv(s[q + ".weight"], s[k + ".weight"], s[v + ".weight"]),
        "attention.dense.weight": r.columns(s[f"{p}{name}{out}.weight"]),
    }
    if q + ".bias" in s:
        tensors["attention.qkv.bias"] = r.qkv(s[q + ".bias"], s[k + ".bias"], s[v + ".bias"])
    if f"{p}{name}{out}.bias" in s:
        tensors["attention.dense.bias"] = s[f"{p}{name}{out}.bias"]
    if f"{p}{name}q_norm.weight" in s:
        tensors["attention.q_layernorm.weight"] = s[f"{p}{name}q_norm.weight"]
        tensors["attention.k_layernorm.weight"] = s[f"{p}{name}k_norm.weight"]
    return tensors


def gated_mlp(r: Rank, p: str) -> Tensors:
    s = r.source
    tensors = {
        "mlp.fc.weight": r.rows(s[p + "mlp.gate_proj.weight"]),  # the activated half
        "mlp.gate.weight": r.rows(s[p + "mlp.up_proj.weight"]),
        "mlp.proj.weight": r.columns(s[p + "mlp.down_proj.weight"]),
    }
    if p + "mlp.down_proj.bias" in s:
        tensors["mlp.fc.bias"] = r.rows(s[p + "mlp.gate_proj.bias"])
        tensors["mlp.gate.bias"] = r.rows(s[p + "mlp.up_proj.bias"])
        tensors["mlp.proj.bias"] = s[p + "mlp.down_proj.bias"]
    return tensors


def mixture(r: Rank, router: str, experts: str, gate: str, up: str, down: str) -> Tensors:
    s = r.source

    def up_and_gate(expert: int, moe_tp: int, rank: int) -> torch.Tensor:
        return torch.cat([s[f"{experts}.{expert}.{part}.weight"].chunk(moe_tp)[rank] for part in (up, gate)])

    return {
        "mlp.router.weight": s[router + ".weight"].float(),
        "mlp.fc.weight": r.experts(up_and_gate),
        "mlp.proj.weight": r.experts(lambda e, tp, rank: s[f"{experts}.{e}.{down}.weight"].chunk(tp, dim=1)[rank]),
    }


def norms(r: Rank, p: str, names: dict[str, str]) -> Tensors:
    return {
        f"{ours}.{part}": r.source[f"{p}{theirs}.{part}"]
        for ours, theirs in names.items()
        for part in ("weight", "bias")
        if f"{p}{theirs}.{part}" in r.source
    }


TWO_NORMS = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}


def llama_layer(r: Rank, p: str) -> Tensors:
    return norms(r, p, TWO_NORMS) | separate_attention(r, p) | gated_mlp(r, p)


def mixtral_layer(r: Rank, p: str) -> Tensors:
    block = p + "block_sparse_moe."
    moe = mixture(r, block + "gate", block + "experts", gate="w1", up="w3", down="w2")
    return norms(r, p, TWO_NORMS) | separate_attention(r, p) | moe


def qwen_moe_layer(r: Rank, p: str) -> Tensors:
    tensors = norms(r, p, TWO_NORMS) | separate_attention(r, p)
    if p + "mlp.gate.weight" not in r.source:
        return tensors | gated_mlp(r, p)
    tensors |= mixture(r, p + "mlp.gate", p + "mlp.experts", gate="gate_proj", up="up_proj", down="down_proj")
    shared = p + "mlp.shared_expert."
    if shared + "up_proj.weight" in r.source:
        halves = [r.rows(r.source[f"{shared}{half}.weight"]) for half in ("up_proj", "gate_proj")]
        tensors["mlp.shared_expert.fc.weight"] = torch.cat(halves)
        tensors["mlp.shared_expert.proj.weight"] = r.columns(r.source[shared + "down_proj.weight"])
        tensors["mlp.shared_expert_gate.weight"] = r.source[p + "mlp.shared_expert_gate.weight"]
    return tensors


def one_more(weight: torch.Tensor) -> torch.Tensor:
    return (weight.float() + 1.0).to(weight.dtype)


def gemma_layer(r: Rank, p: str) -> Tensors:
    names = TWO_NORMS | {f"{side}_feedforward_layernorm": f"{side}_feedforward_layernorm" for side in ("pre", "post")}
    tensors = norms(r, p, names) | separate_attention(r, p) | gated_mlp(r, p)
    return {name: one_more(tensor) if "norm" in name else tensor for name, tensor in tensors.items()}


def phi3_layer(r: Rank, p: str) -> Tensors:
    q, k, v = r.source[p + "self_attn.qkv_proj.weight"].split([r.head * n for n in (4, r.kv_heads, r.kv_heads)])
    gate, up = r.source[p + "mlp.gate_up_proj.weight"].chunk(2)
    return norms(r, p, TWO_NORMS) | {
        "attention.qkv.weight": r.qkv(q, k, v),
        "attention.dense.weight": r.columns(r.source[p + "self_attn.o_proj.weight"]),
        "mlp.fc.weight": torch.cat([r.rows(up), r.rows(gate)]),
        "mlp.proj.weight": r.columns(r.source[p + "mlp.down_proj.weight"]),
    }


def gpt2_layer(r: Rank, p: str) -> Tensors:
    s = r.source
    return norms(r, p, {"input_layernorm": "ln_1", "post_layernorm": "ln_2"}) | {
        "attention.qkv.weight": r.qkv(*s[p + "attn.c_attn.weight"].T.chunk(3)),
        "attention.qkv.bias": r.qkv(*s[p + "attn.c_attn.bias"].chunk(3)),
        "attention.dense.weight": r.columns(s[p + "attn.c_proj.weight"].T),
        "attention.dense.bias": s[p + "attn.c_proj.bias"],
        "mlp.fc.weight": r.rows(s[p + "mlp.c_fc.weight"].T),
        "mlp.fc.bias": r.rows(s[p + "mlp.c_fc.bias"]),
        "mlp.proj.weight": r.columns(s[p + "mlp.c_proj.weight"].T),
        "mlp.proj.bias": s[p + "mlp.c_proj.bias"],
    }


def gptj_layer(r: Rank, p: str) -> Tensors:
    s = r.source
    bias = s[p + "mlp.fc_out.bias"]
    return (
        norms(r, p, {"input_layernorm": "ln_1"})
        | separate_attention(r, p, "attn.", "out_proj")
        | {
            "mlp.fc.weight": r.rows(s[p + "mlp.fc_in.weight"]),
            "mlp.fc.bias": r.rows(s[p + "mlp.fc_in.bias"]),
            "mlp.proj.weight": r.columns(s[p + "mlp.fc_out.weight"]),
            "mlp.proj.bias": bias if r.tp_rank == 0 else torch.zeros_like(bias),  # summed over the ranks there
        }
    )


def falcon_layer(r: Rank, p: str) -> Tensors:
    s = r.source

    def regrouped(tensor: torch.Tensor) -> torch.Tensor:
        groups = tensor.reshape(r.kv_heads, 4 // r.kv_heads + 2, r.head, *tensor.shape[1:])
        parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
        return r.qkv(*(part.reshape(-1, *tensor.shape[1:]) for part in parts))

    has_two_norms = p + "ln_mlp.weight" in s
    names = {"input_layernorm": "ln_attn", "mlp_layernorm": "ln_mlp"} if has_two_norms else TWO_NORMS
    tensors = norms(r, p, names)
    for ours, theirs, cut in (
        ("attention.qkv", "self_attention.query_key_value", regrouped),
        ("attention.dense", "self_attention.dense", r.columns),
        ("mlp.fc", "mlp.dense_h_to_4h", r.rows),
        ("mlp.proj", "mlp.dense_4h_to_h", r.columns),
    ):
        tensors[ours + ".weight"] = cut(s[f"{p}{theirs}.weight"])
        if f"{p}{theirs}.bias" in s:
            bias = s[f"{p}{theirs}.bias"]
            tensors[ours + ".bias"] = bias if cut == r.columns else cut(bias)
    return tensors


# model type -> (layer, prefix of its layers, embedding, final norm)
LLAMA_NAMES = ("model.layers.{}.", "model.embed_tokens", "model.norm")
EXPECTED = {
    "llama": (llama_layer, *LLAMA_NAMES),
    "mistral": (llama_layer, *LLAMA_NAMES),
    "mixtral": (mixtral_layer, *LLAMA_NAMES),
    "qwen2": (llama_layer, *LLAMA_NAMES),
    "qwen3": (llama_layer, *LLAMA_NAMES),
    "qwen2_moe": (qwen_moe_layer, *LLAMA_NAMES),
    "qwen3_moe": (qwen_moe_layer, *LLAMA_NAMES),
    "gemma": (gemma_layer, *LLAMA_NAMES),
    "gemma2": (gemma_layer, *LLAMA_NAMES),
    "gemma3_text": (gemma_layer, *LLAMA_NAMES),
    "phi3": (phi3_layer, *LLAMA_NAMES),
    "gpt2": (gpt2_layer, "transformer.h.{}.", "transformer.wte", "transformer.ln_f"),
    "gptj": (gptj_layer, "transformer.h.{}.", "transformer.wte", "transformer.ln_f"),
    "falcon": (falcon_layer, "transformer.h.{}.", "transformer.word_embeddings", "transformer.ln_f"),
}


def expected_rank(r: Rank) -> Tensors:
    """What TensorRT-LLM wants in the rank's file."""
    layer, prefix, embedding, final_norm = EXPECTED[r.config.model_type]
    is_gemma = r.config.model_type.startswith("gemma")
    tensors = {}
    if r.pp_rank == 0:
        table = r.source[embedding + ".weight"]
        tensors["transformer.vocab_embedding.weight"] = r.rows(table) if is_gemma else table
        if r.config.model_type == "gpt2":
            tensors["transformer.position_embedding.weight"] = r.source["transformer.wpe.weight"]
    for local, index in enumerate(torch.arange(3).tensor_split(r.pp)[r.pp_rank].tolist()):
        tensors |= {f"transformer.layers.{local}.{n}": t for n, t in layer(r, prefix.format(index)).items()}
    if r.pp_rank == r.pp - 1:
        tensors |= norms(r, "", {"transformer.ln_f": final_norm})
        if is_gemma:
            tensors["transformer.ln_f.weight"] = one_more(tensors["transformer.ln_f.weight"])
        tensors["lm_head.weight"] = r.padded_rows(r.source.get("lm_head.weight", r.source[embedding + ".weight"]))
        if "lm_head.bias" in r.source:
            tensors["lm_head.bias"] = r.padded_rows(r.source["lm_head.bias"])
    return tensors


def transformers_model(model_dir: Path) -> transformers.PreTrainedModel:
    """The original in float32; Gemma's norms as they are after 1 + w was rounded to bfloat16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if model.config.model_type.startswith("gemma"):
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data = one_more(parameter.data.to(torch.bfloat16)).float() - 1.0
    return model.eval()


def test_every_architecture_is_tested():
    assert {architecture for architecture, _ in MODELS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize(("name", "tp", "pp", "ep"), LAYOUTS)
def test_rank_files_hold_what_tensorrt_llm_reads(family_model, tmp_path, name, tp, pp, ep):
    model_dir = family_model(name)
    checkpoint = write_checkpoint(model_dir, tmp_path, tp_size=tp, pp_size=pp, moe_ep_size=ep)
    source = load_file(model_dir / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(model_dir)
    assert len(list(checkpoint.glob("rank*"))) == tp * pp
    for rank in range(tp * pp):
        found = load_file(checkpoint / f"rank{rank}.safetensors")  # the real library reads our files
        expected = expected_rank(Rank(source, config, tp, pp, ep, rank))
        assert found.keys() == expected.keys()
        for tensor_name, tensor in expected.items():
            assert (found[tensor_name].dtype, found[tensor_name].shape) == (tensor.dtype, tensor.shape), tensor_name
            bits = tensor.contiguous().view(torch.uint8)
            assert torch.equal(found[tensor_name].view(torch.uint8), bits), f"rank {rank}: {tensor_name}"


@pytest.mark.parametrize("name", MODELS)
def test_the_merged_model_gives_transformers_logits(family_model, tmp_path, name):
    model_dir = family_model(name)
    pp = 2 if ARCHITECTURES[MODELS[name][0]].has_pipeline else 1
    ep = 2 if "mixtral" in name or "moe" in name else 1
    write_checkpoint(model_dir, tmp_path, tp_size=4, pp_size=pp, moe_ep_size=ep)
    model, _ = load_model(tmp_path, "cpu")
    with torch.no_grad():
        expected = transformers_model(model_dir)(TOKENS).logits
        assert torch.equal(model(TOKENS).logits, expected)
    assert expected.std() > 0.1  # a model whose logits are all alike would prove nothing


# as published on the hub, without the keys that say nothing about the architecture
LLAMA_LIKE = {"torch_dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
QWEN_LIKE = LLAMA_LIKE | {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False}
GEMMA_LIKE = {
    "torch_dtype": "bfloat16", "head_dim": 256, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
PHI3_LIKE = LLAMA_LIKE | {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32064, "rope_theta": 10000.0, "original_max_position_embeddings": 4096,
}  # fmt: skip
FALCON_LIKE = {"torch_dtype": "bfloat16", "layer_norm_epsilon": 1e-5}
SHORT, LONG = [1.0 + i / 100 for i in range(48)], [1.0 + i for i in range(48)]

# model -> (its config.json on the hub, what TensorRT-LLM reads)
HUB = {
    "mistral-7b-v0.3": (
        LLAMA_LIKE
        | {
            "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768,
            "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None,
        },
        {
            "architecture": "MistralForCausalLM", "dtype": "bfloat16", "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "head_size": 128,
            "intermediate_size": 14336, "vocab_size": 32768, "max_position_embeddings": 32768, "hidden_act": "silu",
            "norm_epsilon": 1e-5, "position_embedding_type": "rope_gpt_neox", "rotary_base": 1000000.0,
            "rotary_scaling": None, "attn_bias": False, "mlp_bias": False, "use_parallel_embedding": False,
            "mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2},
        },
    ),
    "mixtral-8x7b": (
        LLAMA_LIKE
        | {
            "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
            "max_position_embeddings": 32768, "rope_theta": 1000000.0, "num_local_experts": 8,
            "num_experts_per_tok": 2, "sliding_window": None,
        },
        {
            "architecture": "MixtralForCausalLM", "intermediate_size": 14336, "hidden_act": "swiglu",
            "moe": {"num_experts": 8, "top_k": 2, "normalization_mode": 1}, "rotary_base": 1000000.0,
            "mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2, "moe_tp_size": 2, "moe_ep_size": 1},
        },
    ),
    "qwen2.5-7b": (
        QWEN_LIKE
        | {
            "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
            "max_position_embeddings": 32768, "sliding_window": 131072, "max_window_layers": 28,
        },
        {
            "architecture": "Qwen2ForCausalLM", "qwen_type": "qwen2", "seq_length": 8192, "attn_bias": True,
            "mlp_bias": False, "head_size": 128, "hidden_act": "silu", "norm_epsilon": 1e-6, "rotary_base": 1000000.0,
        },
    ),
    "qwen3-8b": (
        QWEN_LIKE
        | {
            "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "intermediate_size": 12288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936, "max_position_embeddings": 40960, "attention_bias": False,
        },
        {
            "architecture": "Qwen3ForCausalLM", "qwen_type": "qwen3", "seq_length": 8192, "attn_bias": False,
            "head_size": 128, "hidden_act": "silu", "max_position_embeddings": 40960,
        },
    ),
    "qwen1.5-moe-a2.7b": (
        QWEN_LIKE
        | {
            "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
            "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936,
            "max_position_embeddings": 8192, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
            "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False, "decoder_sparse_step": 1,
        },
        {
            "architecture": "Qwen2MoeForCausalLM", "qwen_type": "qwen2_moe", "seq_length": 8192, "attn_bias": True,
            "hidden_act": "swiglu", "moe": {"num_experts": 60, "top_k": 4, "normalization_mode": 0},
            "moe_intermediate_size": 1408, "moe_shared_expert_intermediate_size": 5632, "intermediate_size": 5632,
        },
    ),
    "qwen3-30b-a3b": (
        QWEN_LIKE
        | {
            "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
            "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "vocab_size": 151936, "max_position_embeddings": 40960, "moe_intermediate_size": 768, "num_experts": 128,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        },
        {
            "architecture": "Qwen3MoeForCausalLM", "qwen_type": "qwen3_moe", "seq_length": 8192, "attn_bias": False,
            "hidden_act": "swiglu", "moe": {"num_experts": 128, "top_k": 8, "normalization_mode": 1},
            "moe_intermediate_size": 768, "head_size": 128, "mlp_only_layers": [], "decoder_sparse_step": 1,
        },
    ),
    "gemma-2b": (
        {
            "architectures": ["GemmaForCausalLM"], "torch_dtype": "bfloat16", "hidden_act": "gelu", "head_dim": 256,
            "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
            "num_key_value_heads": 1, "vocab_size": 256000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "rope_scaling": None,
        },
        {
            "architecture": "GemmaForCausalLM", "head_size": 256, "hidden_act": "gelu", "num_key_value_heads": 1,
            "use_parallel_embedding": True, "embedding_sharding_dim": 0, "tie_word_embeddings": True,
            "rotary_base": 10000.0, "position_embedding_type": "rope_gpt_neox",
        },
    ),
    "gemma-2-9b": (
        GEMMA_LIKE
        | {
            "architectures": ["Gemma2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 14336,
            "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 256000,
            "max_position_embeddings": 8192, "rope_theta": 10000.0, "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096,
        },
        {
            "architecture": "Gemma2ForCausalLM", "head_size": 256, "hidden_act": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
            "use_parallel_embedding": True, "norm_epsilon": 1e-6,
        },
    ),
    "gemma-3-1b": (
        GEMMA_LIKE
        | {
            "architectures": ["Gemma3ForCausalLM"], "hidden_size": 1152, "intermediate_size": 6912,
            "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262144,
            "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
            "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6,
            "attn_logit_softcapping": None, "final_logit_softcapping": None,
        },
        {
            "architecture": "Gemma3ForCausalLM", "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
            "_sliding_window_pattern": 6, "sliding_window_pattern": 6, "sliding_window": 512,
            "rope_local_base_freq": 10000.0, "rotary_base": 1000000.0, "final_logit_softcapping": None,
        },
    ),
    "phi-3-mini-4k": (
        PHI3_LIKE
        | {"architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 4096, "sliding_window": 2047,
           "rope_scaling": None},
        {
            "architecture": "Phi3ForCausalLM", "hidden_act": "swiglu", "rotary_pct": 1.0, "tie_word_embeddings": False,
            "position_embedding_type": "rope_gpt_neox", "rotary_base": 10000.0, "head_size": 96,
            "intermediate_size": 8192,
        },
    ),
    "phi-3.5-mini": (
        PHI3_LIKE
        | {
            "architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 131072, "sliding_window": 262144,
            "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        },
        {
            "position_embedding_type": "long_rope", "original_max_position_embeddings": 4096, "rotary_pct": 1.0,
            "longrope_scaling_short_factors": SHORT, "longrope_scaling_long_factors": LONG,
            "max_position_embeddings": 131072,
        },
    ),
    "gpt2": (
        {
            "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
            "n_ctx": 1024, "vocab_size": 50257, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        },
        {
            "architecture": "GPT2LMHeadModel", "dtype": "float16", "gpt_variant": "gpt2", "bias": True,
            "q_scaling": 1.0, "hidden_act": "gelu_new", "position_embedding_type": "learned_absolute",
            "max_position_embeddings": 1024, "intermediate_size": 3072, "num_key_value_heads": 12, "head_size": 64,
            "tie_word_embeddings": True,
        },
    ),
    "gpt-j-6b": (
        {
            "architectures": ["GPTJForCausalLM"], "n_embd": 4096, "n_head": 16, "n_layer": 28, "n_positions": 2048,
            "n_inner": None, "rotary_dim": 64, "vocab_size": 50400, "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
        },
        {
            "architecture": "GPTJForCausalLM", "rotary_dim": 64, "rotary_embedding_dim": 64, "hidden_act": "gelu",
            "position_embedding_type": "rope_gptj", "intermediate_size": 16384, "head_size": 256,
        },
    ),
    "falcon-7b": (
        FALCON_LIKE
        | {
            "architectures": ["FalconForCausalLM"], "hidden_size": 4544, "num_attention_heads": 71,
            "num_hidden_layers": 32, "vocab_size": 65024, "alibi": False, "bias": False, "multi_query": True,
            "new_decoder_architecture": False, "parallel_attn": True,
        },
        {
            "architecture": "FalconForCausalLM", "num_key_value_heads": 1, "head_size": 64, "hidden_act": "gelu",
            "intermediate_size": 18176, "bias": False, "parallel_attention": True, "new_decoder_architecture": False,
            "position_embedding_type": "rope_gpt_neox", "rotary_base": 10000.0, "max_position_embeddings": 2048,
        },
    ),
    "falcon-40b": (
        FALCON_LIKE
        | {
            "architectures": ["FalconForCausalLM"], "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8,
            "num_hidden_layers": 60, "vocab_size": 65024, "alibi": False, "bias": False, "multi_query": True,
            "new_decoder_architecture": True, "parallel_attn": True,
        },
        {
            "num_key_value_heads": 8, "head_size": 64, "new_decoder_architecture": True, "parallel_attention": True,
            "num_ln_in_parallel_attn": None, "intermediate_size": 32768,
        },
    ),
    "falcon-rw-1b": (
        FALCON_LIKE
        | {
            "architectures": ["FalconForCausalLM"], "hidden_size": 2048, "num_attention_heads": 32,
            "num_hidden_layers": 24, "vocab_size": 50304, "alibi": True, "bias": True, "multi_query": False,
            "new_decoder_architecture": False, "parallel_attn": False,
        },
        {
            "num_key_value_heads": 32, "position_embedding_type": "alibi_with_scale", "bias": True,
            "parallel_attention": False, "new_decoder_architecture": False,
        },
    ),
}  # fmt: skip


def written_config(config: dict[str, Any]) -> dict[str, Any]:
    spec = spec_from_hf(config, "config.json")
    pp_size = 2 if ARCHITECTURES[spec.architecture].has_pipeline else 1
    tp_size = 1 if spec.num_heads % 2 else 2
    return trtllm_config(spec, Precision.of("none"), Parallel(tp_size=tp_size, pp_size=pp_size))


@pytest.mark.parametrize("model", HUB)
def test_config_of_a_published_model(model):
    theirs, expected = HUB[model]
    config = written_config(theirs)
    assert {key: config.get(key, "absent") for key in expected} == expected
    assert config_problems(config) == []


@pytest.mark.parametrize("model", HUB)
def test_both_spellings_of_rope_give_the_same_config(model):
    theirs, _ = HUB[model]
    moved = ("rope_theta", "rope_scaling", "rope_local_base_freq")
    scaling = dict(theirs.get("rope_scaling") or {"rope_type": "default"})
    if "type" in scaling:
        scaling["rope_type"] = scaling.pop("type")
    rope: dict[str, Any] = scaling | ({"rope_theta": theirs["rope_theta"]} if "rope_theta" in theirs else {})
    if "rope_local_base_freq" in theirs:
        local = {"rope_type": "default", "rope_theta": theirs["rope_local_base_freq"]}
        rope = {"full_attention": rope, "sliding_attention": local}
    transformers_5 = {key: value for key, value in theirs.items() if key not in moved} | {"rope_parameters": rope}
    assert written_config(transformers_5) == written_config(theirs)
