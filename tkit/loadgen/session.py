"""One connection, kept open over the whole grid, and the event loop it lives on. Knows points; never a file."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tkit.errors import ServerError
from tkit.loadgen.closed_loop import ClosedLoop, LoadTrace, run_closed_loop
from tkit.loadgen.exchange import ERRORS, Exchange, RequestRecord, request_record
from tkit.loadgen.metrics import e2e_ms
from tkit.loadgen.point import Place, summarise
from tkit.loadgen.profiles import Profile, Shape
from tkit.loadgen.prompts import PromptMaker
from tkit.loadgen.protocols import make_client
from tkit.loadgen.run_directory import utc_now
from tkit.specs.record import PointSummary

OPEN_TIMEOUT_S = 5.0
# A point bounded by time gets as many requests as the expected duration of one promises, and some to spare. Beyond this
# many their prompts would take longer to make than most points last; the point ends when they are used up.
MAX_REQUESTS = 20_000
SPARE = 1.5


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
        prompts: PromptMaker,
        profile: Profile,
        seed: int = 0,
        idle_timeout_s: float = 60.0,
        num_gpus: int | None = None,
        api_key: str | None = None,
    ):
        self._client = make_client(protocol, url, model, prompts.token_ends, api_key)
        self._url = url
        self._prompts = prompts
        self._profile = profile
        self._seed = seed
        self._idle_timeout_s = idle_timeout_s
        self._num_gpus = num_gpus
        self._runner = asyncio.Runner(loop_factory=_loop_factory())
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
        return self._client.token_source

    def is_ready(self) -> bool:
        return self._runner.run(self._client.is_ready(min(OPEN_TIMEOUT_S, self._idle_timeout_s)))

    def probe(self, shape: Shape) -> None:
        """Lone requests, before anything is measured or written. Raises ServerError when one fails."""
        load = self._load(shape, concurrency=1, num_warmup=1, num_requests=1, spread_s=0.0)
        for index in range(2):  # the first may find the server cold; the second tells how long one takes
            exchange = self._exchange(index, shape, ("probe",))
            (record,) = self._run([exchange], load, lambda done, total: None)[1]
            if record.error is not None:
                raise ServerError(
                    f"{self._url}: the first request ({shape}) failed: {ERRORS[record.error]}: {record.detail}",
                    hint="see the server's log; nothing has been measured",
                )
            self._e2e_s[shape, 0] = (e2e_ms(record) or 0.0) / 1000

    def measure(self, place: Place, on_progress: Callable[[int, int], None]) -> Measurement:
        """Drives one point. Whatever the server does, it ends, and the failures are in the records."""
        profile, shape, concurrency = self._profile, place.shape, place.concurrency
        load = self._load(
            shape,
            concurrency=concurrency,
            num_warmup=profile.num_warmup(concurrency),
            num_requests=profile.num_requests(concurrency),
            spread_s=self._expected_e2e_s(shape, concurrency),
        )
        name = (shape.osl, concurrency, place.repeat)
        exchanges = [self._exchange(i, shape, name) for i in range(self._num_exchanges(load, shape))]
        started = utc_now()
        trace, records = self._run(exchanges, load, on_progress)
        summary = summarise(
            place,
            records,
            trace,
            limits=profile.limits,
            token_source=self.token_source,
            num_gpus=self._num_gpus,
            started=started,
        )
        if summary.e2e.mean is not None:
            self._e2e_s[shape, concurrency] = summary.e2e.mean / 1000
        return Measurement(summary=summary, records=records)

    def _load(
        self, shape: Shape, *, concurrency: int, num_warmup: int, num_requests: int, spread_s: float
    ) -> ClosedLoop:
        """With the default idle timeout a whole answer gets a second per token: slower is as good as hung."""
        return ClosedLoop(
            concurrency=concurrency,
            num_warmup=num_warmup,
            num_requests=num_requests,
            min_duration_s=self._profile.min_duration_s,
            max_duration_s=self._profile.max_duration_s,
            spread_s=spread_s,
            idle_timeout_s=self._idle_timeout_s,
            total_timeout_s=self._idle_timeout_s * (1 + shape.osl / 60),
        )

    def _expected_e2e_s(self, shape: Shape, concurrency: int) -> float:
        """What is known of the same load or, else, of the next lighter one, where a request takes no longer."""
        return self._e2e_s[shape, max(known for of, known in self._e2e_s if of == shape and known <= concurrency)]

    def _num_exchanges(self, load: ClosedLoop, shape: Shape) -> int:
        """Warm-up, measured, and those that reach over either edge of the steady window."""
        measured = load.num_requests
        if load.min_duration_s:
            rate = load.concurrency / max(self._expected_e2e_s(shape, load.concurrency), 1e-3)
            measured = max(measured, min(math.ceil(SPARE * rate * load.min_duration_s), MAX_REQUESTS))
        return load.num_warmup + measured + 2 * load.concurrency

    def _exchange(self, index: int, shape: Shape, name: tuple[object, ...]) -> Exchange:
        prompt = self._prompts.prompt(shape.isl, *name, index)
        request_id = "-".join(map(str, (shape.slug, *name, index)))
        request = self._client.request(request_id, prompt, shape.osl, self._seed)
        return Exchange(index=index, request=request, isl=shape.isl, osl=shape.osl)

    def _run(
        self, exchanges: list[Exchange], load: ClosedLoop, on_progress: Callable[[int, int], None]
    ) -> tuple[LoadTrace, list[RequestRecord]]:
        trace = self._runner.run(run_closed_loop(self._client, exchanges, load, on_progress))
        return trace, [request_record(exchange, self._client.answer(exchange)) for exchange in trace.sent]


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    if sys.platform == "win32":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop
