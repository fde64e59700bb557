"""A table of published measurements, row by row: what was measured, or why tkit cannot predict it.

Columns as in `data/published_perf.csv`: source_url, engine, engine_version, gpu, n_gpus, tp, model, weights_dtype, kv_dtype,
isl, osl, concurrency_or_batch, metric, value, unit, pp, parallel, regime, notes. Predicts nothing.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tkit.errors import InputError
from tkit.files import reason_of
from tkit.planner.engines import engine
from tkit.planner.fit import violations
from tkit.planner.gpus import GPUS_PER_NODE, find_gpu
from tkit.planner.memory import ledger
from tkit.planner.models import find_shape
from tkit.planner.neighbours import Run
from tkit.planner.precision import kv_dtype, precision
from tkit.planner.roofline import Machine, machine
from tkit.planner.shapes import ModelShape, num_active_params, num_params
from tkit.specs.hardware import Gpu
from tkit.specs.parallel import Parallel

SHIPPED = Path(__file__).with_name("data") / "published_perf.csv"
COLUMNS = ("engine", "engine_version", "gpu", "tp", "model", "weights_dtype", "isl", "osl", "concurrency_or_batch",
           "metric", "value", "regime")  # fmt: skip
ENGINES = {"trtllm": "tensorrt-llm", "tensorrt-llm": "tensorrt-llm", "tensorrt-llm+triton": "tensorrt-llm",
           "nim (tensorrt-llm)": "tensorrt-llm", "vllm": "vllm", "sglang": "sglang"}  # fmt: skip
# metric as published -> (ours, factor to SI units)
METRICS = {
    "output_throughput": ("throughput", 1.0), "output_throughput_per_gpu": ("throughput", 1.0),
    "tpot": ("tpot", 1e-3), "itl": ("tpot", 1e-3), "mean_itl": ("tpot", 1e-3),
    "ttft": ("ttft", 1e-3), "mean_ttft": ("ttft", 1e-3),
}  # fmt: skip
# regime -> how the load was made
LOADS = {"max_throughput": "offline", "static_batch": "static", "prefill_b1": "static", "inferencex_agg": "closed",
         "closed_loop": "closed", "online": "rate"}  # fmt: skip
QUANTS = {"fp16": "none", "bf16": "none", "": "none", "fp8": "fp8", "fp4": "nvfp4", "nvfp4": "nvfp4", "mxfp4": "mxfp4",
          "int8": "int8_sq", "int4": "int4_awq"}  # fmt: skip
# requests of NVIDIA's max-throughput runs (perf-overview.md); others take a usual number
NUM_REQUESTS = {
    (128, 128): 30000, (128, 2048): 3000, (128, 4096): 1500, (500, 2000): 3000, (1000, 1000): 3000,
    (1000, 2000): 1500, (2048, 128): 3000, (2048, 2048): 1500, (5000, 500): 1500, (20000, 2000): 1000,
}  # fmt: skip


# sweeps whose clients sent one request each: read so, their TPOT is off by 6 %; as a closed loop by 23 %, and TTFT by 2.5 times
BURSTS = {("sglang", "0.5.1.post1")}


@dataclass(frozen=True, kw_only=True)
class Row:
    """`load`: offline (all at once), static (one batch), closed (so many in flight), burst (the same, but every client
    sends one request only) or rate (requests per second).
    """

    number: int  # in the table, from 1
    engine: str
    version: str
    gpu: str
    shape: ModelShape
    dtype: str  # as published
    quant: str
    parallel: Parallel
    has_attention_dp: bool
    machine: Machine
    isl: int
    osl: int
    load: str
    amount: float  # batch, requests in flight, requests per second (inf = all at once), or requests of the run
    metric: str  # throughput | tpot | ttft
    value: float  # tokens/s of the whole engine, or seconds
    kv_pool: int
    kv_bytes_per_sequence: int
    regime: str

    @property
    def is_moe(self) -> bool:
        return self.shape.num_experts > 0

    @property
    def run(self) -> Run:
        total, active = _sizes(self.shape)
        return Run(
            engine=self.engine,
            version=self.version,
            generation=engine(self.engine, self.version or None).generation,
            gpu=self.gpu,
            num_params=total,
            num_active_params=active,
            is_moe=self.is_moe,
            quant=self.quant,
            tp=self.parallel.tp_size,
            pp=self.parallel.pp_size,
            has_attention_dp=self.has_attention_dp,
            isl=self.isl,
            osl=self.osl,
            load=self.load,
            requests=self.amount,
            metric=self.metric,
        )


def read_table(path: Path = SHIPPED) -> tuple[list[Row], dict[str, int]]:
    """(the rows that can be predicted, {why not: rows})."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            records = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not readable as a table: {reason_of(error)}") from error
    if missing:
        raise InputError(f"{path}: columns missing", problems=missing, hint=f"expected: {', '.join(COLUMNS)}")
    rows, skipped = [], dict[str, int]()
    for number, record in enumerate(records, start=1):
        found = _row(number, record)
        if isinstance(found, Row):
            rows.append(found)
        else:
            skipped[found] = skipped.get(found, 0) + 1
    return rows, skipped


def _row(number: int, record: Mapping[str, str]) -> Row | str:
    engine_name = ENGINES.get(record["engine"].lower())
    shape = find_shape(record["model"])
    try:
        gpu = find_gpu(record["gpu"])
    except InputError:
        return f'GPU "{record["gpu"]}" unknown'
    metric, factor = METRICS.get(record["metric"], ("", 0.0))
    load = LOADS.get(record["regime"], "")
    if not load:
        return f'regime "{record["regime"]}": lengths or layout not stated'
    dtype = (record["weights_dtype"] or "").lower()
    reasons = (
        (engine_name is None, f'engine "{record["engine"]}" unknown'),
        (shape is None, f'model "{record["model"]}" unknown'),
        (not metric, f'metric "{record["metric"]}" unknown'),
        (dtype not in QUANTS, f'weights_dtype "{dtype}" unknown'),
    )
    for is_wrong, reason in reasons:
        if is_wrong:
            return reason
    assert engine_name is not None
    assert shape is not None
    try:
        isl, osl, value = int(float(record["isl"])), int(float(record["osl"])), float(record["value"])
        amount = _amount(record["concurrency_or_batch"], load, isl, osl)
        tp, pp = int(float(record["tp"])), int(float(record.get("pp") or 1))
    except ValueError:
        return "a length, load, layout or value is not a number"
    quant = _quant(shape, QUANTS[dtype], record["model"])
    if "DP0" in (record.get("parallel") or ""):
        return "a layout with no GPUs (DP0)"
    tp, num_replicas = _ranks(record.get("parallel") or "", tp, shape, quant, gpu)
    has_attention_dp = num_replicas > 1
    if load == "closed" and has_attention_dp:
        amount = _all_in_flight(record.get("notes") or "", amount, num_replicas)
    if load == "closed" and (engine_name, record["engine_version"]) in BURSTS:
        load = "burst"
    parallel = Parallel(tp_size=tp, pp_size=pp)
    if parallel.tp_size > GPUS_PER_NODE or violations(shape, precision(quant), parallel):
        return "a layout that no single engine has (disaggregated)"
    setup = _setup(
        shape, quant, _kv(record.get("kv_dtype") or "", quant), gpu, parallel, has_attention_dp, engine_name, isl + osl
    )
    if record["metric"].endswith("_per_gpu"):
        factor *= parallel.world_size
    return Row(
        number=number,
        engine=engine_name,
        version=record["engine_version"] or "",
        gpu=gpu.name,
        shape=shape,
        dtype=dtype or "bf16",
        quant=quant,
        parallel=parallel,
        has_attention_dp=has_attention_dp,
        machine=setup[0],
        isl=isl,
        osl=osl,
        load=load,
        amount=amount,
        metric=metric,
        value=value * factor,
        kv_pool=setup[1],
        kv_bytes_per_sequence=setup[2],
        regime=record["regime"],
    )


@functools.cache
def _sizes(shape: ModelShape) -> tuple[int, int]:
    return num_params(shape), num_active_params(shape)


@functools.lru_cache(maxsize=65536)
def _setup(
    shape: ModelShape,
    quant: str,
    kv: str,
    gpu: Gpu,
    parallel: Parallel,
    has_attention_dp: bool,
    engine: str,
    context: int,
) -> tuple[Machine, int, int]:
    weights = precision(quant)
    book = ledger(shape, weights, kv, gpu, parallel, context=context, engine=engine)
    return (
        machine(shape, weights, kv, gpu, parallel, has_attention_dp),
        book.kv_pool,
        book.kv_bytes_per_sequence // (parallel.tp_size if has_attention_dp else 1),
    )


def _amount(text: str, load: str, isl: int, osl: int) -> float:
    if load == "offline":
        return float(NUM_REQUESTS.get((isl, osl), 3000))
    return float(text.lower().removeprefix("qps="))  # "inf" is a float


def _quant(shape: ModelShape, quant: str, model: str) -> str:
    """What a dtype means for a model that was trained in fewer bits."""
    if shape.family == "gpt_oss":
        return "mxfp4"
    if quant == "fp8" and (shape.latent is not None or "qwen3" in model.lower()):
        return "fp8_block"
    return quant


def _kv(text: str, quant: str) -> str:
    text = text.strip("?").lower()
    return text if text in ("fp16", "bf16", "fp8", "int8") else kv_dtype("auto", precision(quant))


def _all_in_flight(notes: str, amount: float, num_replicas: int) -> float:
    """Requests in flight are published per replica of the attention; the name of a run (`..._c64_tp8_...`) has their sum."""
    total = re.search(r"_c(\d+)_tp", notes)
    return float(total[1]) if total else amount * num_replicas


def _ranks(text: str, tp: int, shape: ModelShape, quant: str, gpu: Gpu) -> tuple[int, int]:
    """(GPUs of one engine, replicas of its attention) from `TP1PP1DP8etp1ep8`. InferenceX multiplies etp by ep where both
    are the engine's GPUs: `TP64...etp8ep8` ran on 8."""
    numbers = {key: int(number) for key, number in re.findall(r"(etp|ep|TP|DP)(\d+)", text)}
    world = max(tp, numbers.get("DP", 1))
    etp, ep = numbers.get("etp", 1), numbers.get("ep", 1)
    if etp == ep > 1 and etp * ep == world:
        weight_bytes = _setup(shape, quant, "fp16", gpu, Parallel(), False, "tensorrt-llm", 2)[0]
        if weight_bytes.dense_bytes + weight_bytes.expert_bytes < 0.9 * etp * gpu.usable_bytes:
            world = etp
    return world, max(numbers.get("DP", 1), 1)
