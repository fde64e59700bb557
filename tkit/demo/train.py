"""Train the demo model on text that ships with CPython. Knows corpus, tokenizer and recipe; never sees a quantizer.

The corpus is the standard library's sources, their docstrings once more as prose, and the language reference in
`pydoc_data.topics`. Same CPython, seed and thread count: same model.
"""

import ast
import hashlib
import math
import re
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
VOCAB_SIZE = 4096
MODEL: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=768,
    max_position_embeddings=2048,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)

# Half of the usual 4096: perplexity 147 instead of 174 after 0.9 M tokens of AdamW: twice the steps.
TOKENS_PER_STEP = 2048
LENGTH = 512
# Attention over 2048 costs 1.3 times the time per token, so only the end of the run pays for it.
LATE_LENGTHS, LATE_SHARE = (512, 1024, 2048), 0.2
LEARNING_RATE, FINAL_RATE = 3e-3, 1e-4
WARMUP_STEPS = 60

# Tests repeat themselves, encodings are tables, the other folders are programs or belong to somebody else.
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages"} | {
    "lib2to3",
    "idlelib",
    "encodings",
    "pydoc_data",
}
# Generated tables, and files whose names depend on the machine.
SKIPPED_FILES = re.compile(
    r"_sysconfigdata.*|python-config|entities|opcode|_opcode_metadata|stringprep|token|keyword|_compat_pickle"
)
# A file with a notice of its own has a licence of its own; what is left is all under CORPUS_LICENSE.
FOREIGN_NOTICE = re.compile(
    r"(?:copyright.*?(?:\d{4}|reserved)|\(c\) ?\d{4}|©)(?!.*Python Software Foundation)", re.IGNORECASE
)

# kind -> (copies in the training stream, share of documents held out)
# Prose is scarce: without extra copies the model writes only code.
KINDS = {
    "code":      (1, 1 / 20),
    "docstring": (1, 0.0),
    "reference": (3, 1 / 8),
}  # fmt: skip
SHARED_PARAGRAPH_CHARS = 80
TEXT_CHARS = 150_000
EXCERPT_CHARS = 8_000

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Document(NamedTuple):
    name: str
    kind: str  # a key of KINDS
    text: str


class Corpus(NamedTuple):
    train: list[Document]
    held_out: list[Document]


def corpus() -> Corpus:
    """The running interpreter's standard library, split by whole module and by whole reference topic.

    The reference repeats its sections under several topics and modules copy from each other, so a paragraph of a
    held-out document is also removed from every training document (compared without regard to white space).
    """
    sources = [*_modules(Path(sysconfig.get_path("stdlib"))), *_topics()]
    held_out = [document for document in sources if _fraction(document) < KINDS[document.kind][1]]
    kept_back = {key for document in held_out for paragraph in _paragraphs(document.text) if (key := _key(paragraph))}
    train = []
    for document in sources:
        if document in held_out:
            continue
        versions = [document]
        if document.kind == "code":
            versions.append(Document(document.name, "docstring", _docstrings(document.text)))
        for name, kind, text in versions:
            text = "\n\n".join(paragraph for paragraph in _paragraphs(text) if _key(paragraph) not in kept_back)
            if text.strip():
                train.append(Document(name, kind, text))
    return Corpus(train, held_out)


def _modules(stdlib: Path) -> Iterator[Document]:
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or SKIPPED_FILES.fullmatch(relative.stem):
            continue
        text = path.read_text("utf-8", errors="replace")
        if FOREIGN_NOTICE.search(text):
            continue
        yield Document(relative.with_suffix("").as_posix().replace("/", "."), "code", text)


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(name, "reference", text)


def _docstrings(source: str) -> str:
    """Docstrings of two lines and more, in the order of the file."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, owners))
    return "\n\n".join(text for text in found if text and "\n" in text)


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def _key(paragraph: str) -> str | None:
    """What makes two paragraphs the same, or None for one too short to give anything away."""
    key = " ".join(paragraph.split())
    return key if len(key) >= SHARED_PARAGRAPH_CHARS else None


def _fraction(document: Document) -> float:
    """A fixed pseudo-random number in [0, 1) drawn from the name, so that the split survives changes of the rest."""
    return int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8]) / 2**64


def excerpts(documents: Iterable[Document], num_chars: int = TEXT_CHARS) -> str:
    """About `num_chars` of text: reference up to the half, then code.

    Each document gives at most EXCERPT_CHARS, cut between paragraphs.
    """
    pieces: list[str] = []
    for kind, limit in (("reference", num_chars // 2), ("code", num_chars)):
        chosen = [document for document in documents if document.kind == kind]
        for document in sorted(chosen, key=_fraction):
            room = min(EXCERPT_CHARS, limit - sum(map(len, pieces)))
            text = document.text
            if len(text) > room:
                text = text[: max(0, text.rfind("\n\n", 0, room))]
            if len(text) > SHARED_PARAGRAPH_CHARS:
                pieces.append(text.strip("\n"))
    return "\n\n\n".join(pieces) + "\n"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB_SIZE tokens that puts BOS before each text; any string decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MODEL["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def token_stream(documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.Tensor:
    """Every document as BOS ... EOS, as many copies as its kind has, in random order. (tokens,) int64."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # A module that talks about "</s>" must not end the document there.
    backend.encode_special_tokens = True
    repeated = [document.text for document in documents for _ in range(KINDS[document.kind][0])]
    order = np.random.default_rng(seed).permutation(len(repeated))
    ids: list[int] = []
    for encoding in backend.encode_batch([repeated[i] for i in order]):
        ids += [*encoding.ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def windows(stream: torch.Tensor, length: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Windows of `length` + 1 tokens: inputs and their successors. Endless.

    Each window comes once per pass; every pass cuts the stream at other places.
    """
    while True:
        shift = int(rng.integers(length))
        for i in rng.permutation((len(stream) - shift - 1) // length):
            start = shift + int(i) * length
            yield stream[start : start + length + 1]


def train(
    stream: torch.Tensor, tokenizer: PreTrainedTokenizerFast, *, steps: int, seed: int, state: Path | None = None
) -> LlamaForCausalLM:
    """A trained model, fp32 weights. With `state`, a killed run continues from that file; it is removed at the end."""
    torch.manual_seed(seed)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model = LlamaForCausalLM(LlamaConfig(**MODEL, **special))
    # Muon takes the matrices between the embedding and the head: after 0.5 M tokens the loss is 4.77, with AdamW alone 5.38.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]
    rng = np.random.default_rng(seed)
    sources = {length: windows(stream, length, rng) for length in LATE_LENGTHS}

    first = 0
    if state and state.exists():
        saved = torch.load(state, weights_only=True)
        first = saved["step"]
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)

    model.train()
    started, loss_mean = time.monotonic(), math.log(VOCAB_SIZE)
    for step in range(steps):
        length = LENGTH if step < steps * (1 - LATE_SHARE) else int(rng.choice(LATE_LENGTHS))
        batch = torch.stack([next(sources[length]) for _ in range(TOKENS_PER_STEP // length)])  # (windows, length + 1)
        # A continued run draws the finished steps' batches again and drops them: simpler than storing the generators.
        if step < first:
            continue
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = _learning_rate(step, steps)
        # bf16 matrix products: 1.4 times the tokens per second of fp32 on a CPU with AVX-512 BF16.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # (windows, length, vocab)
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        loss_mean += 0.05 * (loss.item() - loss_mean)
        done = step + 1
        if done % 25 == 0 or done == steps:
            rate = (done - first) * TOKENS_PER_STEP / (time.monotonic() - started)
            click.echo(f"step {done}/{steps}  loss {loss_mean:.3f}  {rate:,.0f} tok/s", err=True)
        if state and done % 100 == 0:
            partial = state.with_suffix(".partial")
            values = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            torch.save({"step": done, **values}, partial)
            partial.replace(state)
    if state:
        state.unlink(missing_ok=True)
    return model.eval()


def _learning_rate(step: int, steps: int) -> float:
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_RATE + (LEARNING_RATE - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2


@torch.inference_mode()
def perplexity(model: torch.nn.Module, ids: list[int], *, context: int = 512, stride: int = 512) -> float:
    """exp of the mean negative log-likelihood of `ids`.

    Windows of `context` tokens start every `stride` tokens and score the successors of their last `stride` tokens (the
    first window: of all), so every token but the first is scored once; a last window that is not full is left out.
    """
    starts = range(0, len(ids) - context, stride)
    if not starts:
        raise ValueError(f"{len(ids)} tokens hold no window of {context}")
    total, count = 0.0, 0
    for start in starts:
        window = torch.tensor(ids[start : start + context + 1])
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()  # (context, vocab)
        scored = context if start == 0 else stride
        total += F.cross_entropy(logits[-scored:], window[-scored:], reduction="sum").item()
        count += scored
    return math.exp(total / count)


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for model/, held_out.txt and calibration.txt."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the weights and of the order of the data.")
@click.option("--steps", default=1600, show_default=True, help=f"Optimizer steps of {TOKENS_PER_STEP} tokens.")
@click.option("--threads", default=2, show_default=True, help="CPU threads.")
@click.option("--state", type=click.Path(path_type=Path), help="File that lets a killed run continue.")
def main(out: Path, seed: int, steps: int, threads: int, state: Path | None) -> None:
    """Train the demo model and measure its perplexity on held-out text."""
    torch.set_num_threads(threads)
    started = time.monotonic()
    documents = corpus()
    held_out, calibration = excerpts(documents.held_out), excerpts(documents.train)
    num_chars = sum(len(document.text) for document in documents.train)
    click.echo(f"{len(documents.train)} training documents, {num_chars:,} characters", err=True)
    tokenizer = train_tokenizer(document.text for document in documents.train)
    stream = token_stream(documents.train, tokenizer, seed)
    click.echo(f"{len(stream):,} tokens per pass, {steps * TOKENS_PER_STEP:,} to train on", err=True)
    model = train(stream, tokenizer, steps=steps, seed=seed, state=state)

    target = out / "model"
    target.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(target)
    tokenizer.save_pretrained(target, save_jinja_files=False)
    (out / "held_out.txt").write_text(held_out, "utf-8")
    (out / "calibration.txt").write_text(calibration, "utf-8")
    minutes = (time.monotonic() - started) / 60

    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval()
    ids = AutoTokenizer.from_pretrained(target)(held_out, verbose=False)["input_ids"]
    click.echo(f"passes {steps * TOKENS_PER_STEP / len(stream):.2f}, minutes {minutes:.1f}")
    click.echo(f"held-out tokens {len(ids)}, bytes per token {len(held_out.encode()) / len(ids):.2f}")
    for stride in (512, 256):
        value = perplexity(model, ids, context=512, stride=stride)
        click.echo(f"held-out perplexity {value:.2f} (bf16, context 512, stride {stride})")


if __name__ == "__main__":
    sys.exit(main())
