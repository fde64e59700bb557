"""One connection, kept open over the whole grid, and the event loop it lives on. Knows points; never a file."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tkit.cores import usable_cores
from tkit.errors import InputError, ServerError
from tkit.loadgen.arrivals import arrival_times
from tkit.loadgen.board import MAX_WORKERS
from tkit.loadgen.closed_loop import ClosedLoop
from tkit.loadgen.exchange import ERRORS, Exchange, RequestRecord, request_record
from tkit.loadgen.http import is_loopback
from tkit.loadgen.live import Live
from tkit.loadgen.load import loop_factory, run_load
from tkit.loadgen.load_trace import LoadTrace
from tkit.loadgen.metrics import e2e_ms
from tkit.loadgen.open_loop import OpenLoop
from tkit.loadgen.point import Place, summarise
from tkit.loadgen.profiles import Profile, Shape
from tkit.loadgen.protocols import find_protocol, make_client
from tkit.loadgen.run_directory import utc_now
from tkit.loadgen.worker_pool import WorkerPool
from tkit.loadgen.workload import RequestSource
from tkit.specs.client import ClientCalibration
from tkit.specs.record import PointSummary
from tkit.units import NS_PER_S

OPEN_TIMEOUT_S = 5.0
RETRY_S = 0.5
# A point bounded by time gets as many requests as the expected duration of one promises, and some to spare. Beyond this
# many their prompts would take longer to make than most points last; the point ends when they are used up.
MAX_REQUESTS = 20_000
SPARE = 1.5
STREAMS_PER_WORKER = 256  # where calibration has not told: a core follows more, but not with margin


@dataclass(frozen=True, kw_only=True)
class Measurement:
    summary: PointSummary
    records: list[RequestRecord]

    @property
    def failures(self) -> list[RequestRecord]:
        return [record for record in self.records if not record.is_ok]


class Session:
    """Entered, it is connected to a model that is ready."""

    def __init__(
        self,
        protocol: str,
        url: str,
        model: str | None,
        *,
        prompts: RequestSource,
        profile: Profile,
        timestamps: Sequence[float] = (),
        seed: int = 0,
        idle_timeout_s: float = 60.0,
        num_gpus: int | None = None,
        api_key: str | None = None,
        calibration: ClientCalibration | None = None,
        num_workers: int | None = None,
    ):
        arguments = (protocol, url, model, prompts.token_ends, api_key)
        self._make_client = lambda: make_client(*arguments)
        self._client = self._make_client()
        self._workers = WorkerPool(arguments, min(OPEN_TIMEOUT_S, idle_timeout_s))
        self._num_workers = num_workers
        self._url = url
        self._prompts = prompts
        self._profile = profile
        self._timestamps = timestamps
        self._seed = seed
        self._idle_timeout_s = idle_timeout_s
        self._num_gpus = num_gpus
        self._calibration = calibration
        self._runner = asyncio.Runner(loop_factory=loop_factory())
        self._wraps_prompts = find_protocol(protocol).wraps_prompts
        self._template_tokens = 0  # that the server adds to every prompt
        self._e2e_s: dict[tuple[Shape, int], float] = {}  # mean, by concurrency; 0 is the probe

    def __enter__(self) -> Session:
        try:
            self._runner.run(self._client.open(min(OPEN_TIMEOUT_S, self._idle_timeout_s)))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._workers.close()
            self._runner.run(self._client.close())
        finally:
            self._runner.close()

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the server says of itself."""
        return self._client.identity

    @property
    def model(self) -> str:
        return self._client.model

    @property
    def token_source(self) -> str:
        """Where the server does not count and there is no tokenizer, each chunk is taken for a token."""
        has_tokenizer = self._prompts.token_ends is not None
        return "chunks" if self._client.token_source == "tokenizer" and not has_tokenizer else self._client.token_source

    def identity_now(self) -> Mapping[str, Any] | None:
        """What the server says of itself over a new connection; None when it is not ready."""
        timeout_s = min(OPEN_TIMEOUT_S, self._idle_timeout_s)
        client = self._make_client()
        try:
            if not self._runner.run(client.is_ready(timeout_s)):
                return None
            self._runner.run(client.open(timeout_s))
            return client.identity
        except ServerError:
            return None
        finally:
            self._runner.run(client.close())

    def reconnect(self, shapes: Sequence[Shape], timeout_s: float) -> str | None:
        """Tries until the server answers a lone request of each shape; afterwards why it does not, None when it does."""
        self._workers.close()  # those that the next point needs connect anew
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._runner.run(self._client.close())
                self._client = self._make_client()
                self._runner.run(self._client.open(min(OPEN_TIMEOUT_S, self._idle_timeout_s)))
                for shape in shapes:
                    self.probe(shape)
                return None
            except ServerError as error:
                if time.monotonic() >= deadline:
                    return error.message
            time.sleep(RETRY_S)

    def probe(self, shape: Shape) -> None:
        """Lone requests, before anything is measured or written. Raises ServerError when one fails."""
        for index in range(2):  # the first may find the server cold; the second tells how long one takes
            exchange = self._exchange(index, shape, ("probe",))
            load = self._load([exchange], concurrency=1, num_warmup=1, num_requests=1, spread_s=0.0)
            (record,) = self._run([exchange], load, lambda live: None)[1]
            if record.error is not None:
                raise ServerError(
                    f"{self._url}: the first request ({shape}) failed: {ERRORS[record.error]}: {record.detail}",
                    hint="see the server's log; nothing has been measured",
                )
            self._e2e_s[shape, 0] = (e2e_ms(record) or 0.0) / 1000
            if self._wraps_prompts:
                self._template_tokens += max((record.isl or 0) - (record.isl_asked or record.isl or 0), 0)
                if not shape.dataset and self._template_tokens >= shape.isl:
                    raise InputError(
                        f"{self._url}: the server counts {self._template_tokens} tokens more than the {shape.isl} of {shape}",
                        hint="longer prompts (--shape) if its chat template is that long; else another --tokenizer",
                    )

    def measure(self, place: Place, on_progress: Callable[[Live], None]) -> Measurement:
        """Drives one point. Whatever the server does, it ends, and the failures are in the records."""
        load, exchanges = self._closed(place) if place.concurrency is not None else self._open(place)
        started = utc_now()
        trace, records = self._run(exchanges, load, on_progress, self._workers_for(place))
        summary = summarise(
            place,
            records,
            trace,
            limits=self._profile.limits,
            token_source=self.token_source,
            num_gpus=self._num_gpus,
            arrivals=str(self._profile.arrivals),
            calibration=self._calibration,
            started=started,
        )
        if summary.e2e.mean is not None and place.concurrency is not None:
            self._e2e_s[place.shape, place.concurrency] = summary.e2e.mean / 1000
        return Measurement(summary=summary, records=records)

    def _closed(self, place: Place) -> tuple[ClosedLoop, list[Exchange]]:
        profile, shape, concurrency = self._profile, place.shape, place.concurrency
        assert concurrency is not None
        name = (shape.osl, concurrency, place.repeat)
        count = self._num_exchanges(shape, concurrency)
        if self._workers_for(place) > 1:  # one cannot send what another leaves over of its part
            count += concurrency
        exchanges = [self._exchange(i, shape, name) for i in range(count)]
        load = self._load(
            exchanges,
            concurrency=concurrency,
            num_warmup=profile.num_warmup(concurrency),
            num_requests=profile.num_requests(concurrency),
            spread_s=self._expected_e2e_s(shape, concurrency),
        )
        return load, exchanges

    def _open(self, place: Place) -> tuple[OpenLoop, list[Exchange]]:
        """The steady window holds the requests asked for, or lasts as long as the profile says; the schedule goes on for
        as long as the last of them should take."""
        profile, shape, rate = self._profile, place.shape, place.rate
        assert rate is not None
        e2e_s = self._e2e_s[shape, 0]
        num_warmup = profile.num_warmup(math.ceil(rate * e2e_s)) if profile.arrivals.is_steady else 0
        num_requests = profile.num_requests(1)
        duration_s = 0.0 if profile.requests else profile.min_duration_s or profile.max_duration_s or 0.0
        if profile.arrivals.process == "trace" and not profile.requests:
            num_requests = len(self._timestamps)
        most_s = profile.max_duration_s or math.inf
        name = (shape.osl, place.load.slug, place.repeat)
        times = arrival_times(
            profile.arrivals,
            rate,
            f"{self._seed}/arrivals/{place.slug}",
            ramp_s=duration_s or 2 * num_requests / rate,
            timestamps=self._timestamps,
        )
        wanted = num_warmup + num_requests
        offsets = list(itertools.islice(times, wanted + 1))
        after_s = offsets[wanted] if len(offsets) > wanted else offsets[-1] + 1 / rate  # a trace has an end
        start_s = offsets[num_warmup] if num_warmup else 0.0
        end_s = start_s + min(max(duration_s, after_s - start_s), most_s)
        last_s = end_s + SPARE * e2e_s
        offsets += itertools.takewhile(lambda offset: offset < last_s, itertools.islice(times, MAX_REQUESTS))
        exchanges = [self._exchange(i, shape, name) for i in range(len(offsets))]
        for exchange, offset in zip(exchanges, offsets, strict=True):
            exchange.scheduled_ns = round(offset * NS_PER_S)
        load = OpenLoop(
            steady_start_s=start_s,
            steady_end_s=end_s,
            max_outstanding=profile.max_outstanding,
            idle_timeout_s=self._idle_timeout_s,
            total_timeout_s=self._total_timeout_s(exchanges),
        )
        return load, exchanges

    def _load(
        self, exchanges: Sequence[Exchange], *, concurrency: int, num_warmup: int, num_requests: int, spread_s: float
    ) -> ClosedLoop:
        return ClosedLoop(
            concurrency=concurrency,
            num_warmup=num_warmup,
            num_requests=num_requests,
            min_duration_s=self._profile.min_duration_s,
            max_duration_s=self._profile.max_duration_s,
            spread_s=spread_s,
            idle_timeout_s=self._idle_timeout_s,
            total_timeout_s=self._total_timeout_s(exchanges),
        )

    def _total_timeout_s(self, exchanges: Sequence[Exchange]) -> float:
        """With the default idle timeout a whole answer gets a second per token: slower is as good as hung."""
        return self._idle_timeout_s * (1 + max(exchange.osl for exchange in exchanges) / 60)

    def _expected_e2e_s(self, shape: Shape, concurrency: int) -> float:
        """What is known of the same load or, else, of the next lighter one, where a request takes no longer."""
        return self._e2e_s[shape, max(known for of, known in self._e2e_s if of == shape and known <= concurrency)]

    def _num_exchanges(self, shape: Shape, concurrency: int) -> int:
        """Warm-up, measured, and those that reach over either edge of the steady window."""
        profile = self._profile
        measured = profile.num_requests(concurrency)
        if profile.min_duration_s:
            rate = concurrency / max(self._expected_e2e_s(shape, concurrency), 1e-3)
            measured = max(measured, min(math.ceil(SPARE * rate * profile.min_duration_s), MAX_REQUESTS))
        return profile.num_warmup(concurrency) + measured + 2 * concurrency

    def _exchange(self, index: int, shape: Shape, name: tuple[object, ...]) -> Exchange:
        ask = self._prompts.ask(shape, name, index, self._template_tokens)
        request_id = "-".join(map(str, (shape.slug, *name, index)))
        request = self._client.request(request_id, ask.prompt, ask.osl, self._seed)
        return Exchange(index=index, request=request, isl=ask.isl, osl=ask.osl)

    def _run(
        self,
        exchanges: list[Exchange],
        load: ClosedLoop | OpenLoop,
        on_progress: Callable[[Live], None],
        num_workers: int = 1,
    ) -> tuple[LoadTrace, list[RequestRecord]]:
        if num_workers > 1:
            outcome = self._workers.run(num_workers, exchanges, load, on_progress)
            self._client.token_source = outcome.token_source
            return outcome.trace, outcome.records
        trace = self._runner.run(run_load(self._client, exchanges, load, on_progress))
        return trace, [request_record(exchange, self._client.answer(exchange)) for exchange in trace.sent]

    def _workers_for(self, place: Place) -> int:
        """As many as asked for; else one per so many streams as calibration saw one follow, as far as there are cores: a
        server on this machine needs one too."""
        streams = place.concurrency
        if streams is None:
            assert place.rate is not None
            streams = min(math.ceil(place.rate * self._e2e_s[place.shape, 0]), self._profile.max_outstanding)
        most = min(streams, MAX_WORKERS)
        if self._num_workers is not None:
            return max(min(self._num_workers, most), 1)
        known = self._calibration.max_streams if self._calibration is not None else None
        needed = math.ceil(streams / (known or STREAMS_PER_WORKER))
        cores = usable_cores() - is_loopback(self._url)
        return max(min(needed, most, cores), 1)
