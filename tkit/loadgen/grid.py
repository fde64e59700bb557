"""Measures a plan point by point, keeps each as soon as it is there, and waits for a server that went away.

    state.jsonl   started | resumed, then per point: point | hole | settled, at the end: finished | failed

A hole is a point during which the server stopped answering: what came until then is kept, marked invalid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tkit.errors import ServerError
from tkit.loadgen.exchange import ERRORS
from tkit.loadgen.plan import Settled, sweep_plan
from tkit.loadgen.point import Place
from tkit.loadgen.profiles import Profile
from tkit.loadgen.run_directory import RunDirectory
from tkit.loadgen.session import Measurement, Session
from tkit.loadgen.telemetry import Sampler, Samples, telemetry_numbers
from tkit.specs.progress import Progress
from tkit.specs.record import FoundMax, Manifest, PointSummary

GONE = ("refused", "disconnected")  # what requests to a server that is not there end with


class Grid:
    """One run. `points` and `found` grow as it goes. The server is to stay who it is when the run begins."""

    def __init__(
        self,
        session: Session,
        profile: Profile,
        run: RunDirectory,
        manifest: Manifest,
        progress: Progress,
        *,
        reconnect_s: float,
        sampler: Sampler | None = None,
    ):
        self.points: dict[Place, PointSummary] = {}
        self.found: tuple[FoundMax, ...] = ()
        self.num_holes = 0
        self._session = session
        self._profile = profile
        self._run = run
        self._manifest = manifest
        self._progress = progress
        self._identity = session.identity
        self._reconnect_s = reconnect_s
        self._sampler = sampler

    def measure(self, kept: Mapping[str, PointSummary]) -> None:
        """Every point of the plan, but those that are `kept`, by slug. The summary is written also when the end is early.

        Raises ServerError when the server is gone and does not come back, or answers nothing but errors.
        """
        run = self._run
        try:
            with run.sweeping(self.points, self._progress, is_resumed=bool(kept)):
                self._follow_plan(kept)
        finally:
            run.write_summary(self._manifest, [point for place, point in self.points.items() if run.has_point(place)])

    def _follow_plan(self, kept: Mapping[str, PointSummary]) -> None:
        plan = sweep_plan(self._profile)
        try:
            step = next(plan)
            while True:
                if isinstance(step, Settled):
                    self._run.journal("settled", point=step.place.slug)
                    step = next(plan)
                    continue
                if step.slug in kept:
                    self.points[step] = kept[step.slug]
                else:
                    self._measure(step)
                step = plan.send(self.points[step])
        except StopIteration as end:
            self.found = end.value
        if self.found:
            self._run.write_found(self.found)

    def _measure(self, place: Place) -> None:
        what = f"{place.shape} {place.load}" + (f" #{place.repeat}" if self._profile.repeats > 1 else "")
        self._progress.step(what, 0, self._profile.num_requests(place.concurrency or 1))
        measurement = self._session.measure(
            place, lambda live: self._progress.step(what, live.done, live.total, str(live))
        )
        samples = self._samples(measurement)
        if samples is not None:
            numbers = telemetry_numbers(samples, measurement.summary)
            summary = dataclasses.replace(measurement.summary, telemetry=numbers)
            measurement = dataclasses.replace(measurement, summary=summary)
        identity = self._session.identity_now()
        stranger = server_difference(self._identity, identity) if identity is not None else None
        lost = _why_lost(measurement, identity) or stranger
        if lost is not None:
            measurement = _marked(measurement, stranger or "the server stopped answering")
        self.points[place] = measurement.summary  # before it is written: a signal may come between any two lines
        self._run.write_point(place, measurement.summary, measurement.records, samples)
        if lost is None:
            self._run.journal("point", point=place.slug, is_valid=measurement.summary.is_valid)
        else:
            self._run.journal("hole", point=place.slug, reason=lost)
            self.num_holes += 1
        self._progress.note(f"{what}: {point_line(measurement.summary)}")
        if stranger is not None:
            self._refuse(stranger)
        elif lost is not None:
            self._wait_for_server(what, lost)
        elif measurement.records and all(not record.is_ok for record in measurement.records):
            raise ServerError(
                f"{self._manifest.url}: every request of {what} failed; the first: {_first(measurement)}",
                hint="see the server's log",
            )

    def _samples(self, measurement: Measurement) -> Samples | None:
        measured = [record for record in measurement.records if record.phase == "measured"]
        if self._sampler is None or not measured:
            return None
        return self._sampler.between(min(r.sent_ns for r in measured), max(r.end_ns for r in measured))

    def _wait_for_server(self, what: str, lost: str) -> None:
        """Until it answers a lone request of every shape again. Another server in its place is refused."""
        url = self._manifest.url
        self._progress.note(f"{url}: the server stopped answering; waiting up to {self._reconnect_s:g} s for it")
        problem = self._session.reconnect(self._profile.shapes, self._reconnect_s)
        if problem is not None:
            raise ServerError(
                f"{url}: the server stopped answering during {what}; {lost}",
                problems=[f"not back after {self._reconnect_s:g} s: {problem}"],
                hint="see the server's log; measure the rest when it is back: the same command with --resume",
            )
        if stranger := server_difference(self._identity, self._session.identity):
            self._refuse(stranger)
        self._progress.note("the server is back")

    def _refuse(self, stranger: str) -> None:
        raise ServerError(
            f"{self._manifest.url}: {stranger}",
            hint="measure the rest when the first one is back: the same command with --resume",
        )


def _why_lost(measurement: Measurement, identity: Mapping[str, Any] | None) -> str | None:
    """Whether the server went away during the point. One that was restarted meanwhile answers again, but most of the
    requests found nobody."""
    if not measurement.failures:
        return None
    if identity is None or all(record.error in GONE for record in measurement.records):
        return _first(measurement)
    return None


def server_difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What tells that another server answers, of what each said of itself; None for the same one, restarted or not."""
    then, now = _lasting(then), _lasting(now)
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    told = ", ".join(f"{name} {then.get(name)} then, {now.get(name)} now" for name in changed)
    return f"another server answers: {told}" if changed else None


def _lasting(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Without the mark of one start, and with the parameters beside the rest."""
    parameters = identity.get("parameters", {})
    return {name: value for name, value in {**identity, **parameters}.items() if name not in ("parameters", "instance")}


def _first(measurement: Measurement) -> str:
    first = measurement.failures[0]
    return f"{ERRORS[first.error or 'server']}: {first.detail}"


def _marked(measurement: Measurement, reason: str) -> Measurement:
    reasons = (reason, *measurement.summary.invalid_reasons)
    summary = dataclasses.replace(measurement.summary, is_valid=False, invalid_reasons=reasons)
    return dataclasses.replace(measurement, summary=summary)


def point_line(point: PointSummary) -> str:
    """`1 840 tok/s, TTFT p50 52.1 ms, TPOT p50 10.1 ms, 0 errors, valid`; in open loop the rates and the TTFT from the
    schedule too."""
    ttft = "-" if point.ttft.p50 is None else f"{point.ttft.p50:.1f} ms"
    asked = ""
    if point.ttft_sched is not None and point.ttft_sched.p50 is not None:
        asked = f"asked {point.offered_requests_s:.2f} and answered {point.requests_s:.2f} req/s, "
        ttft += f" ({point.ttft_sched.p50:.1f} ms from the schedule)"
    tpot = "-" if point.tpot.p50 is None else f"{point.tpot.p50:.2f} ms"
    errors = sum(point.errors.values())
    verdict = "valid" if point.is_valid else f"INVALID: {'; '.join(point.invalid_reasons)}"
    return (
        f"{point.output_tok_s:,.0f} tok/s, {asked}TTFT p50 {ttft}, TPOT p50 {tpot}, "
        f"{errors} error{'s' * (errors != 1)} in {point.requests}, {verdict}"
    ).replace(",", " ", f"{point.output_tok_s:,.0f}".count(","))
