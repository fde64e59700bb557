"""What a sweep measures, as data: shapes, loads, lengths of time, limits of validity. Knows no server and no clock."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from tkit.errors import InputError, did_you_mean
from tkit.loadgen.arrivals import Arrivals, parse_arrivals
from tkit.specs.recipe import SweepRecipe
from tkit.specs.record import SLO_TIERS

MAX_STREAMS = 65_535  # as many ports as one address has
MAX_REQUESTS_S = 1_000_000  # a schedule is made ahead
MAX_SEED = 2**63 - 1  # what vLLM takes; Triton's input has a bit more
MAX_SHAPE_TOKENS = 10_000_000  # above any model's context: a slip of the finger, not a shape


@dataclass(frozen=True, kw_only=True, order=True)
class Shape:
    """What the requests of a point look like; of a data set, their means."""

    isl: int  # input tokens, as the server's tokenizer counts them, special tokens included
    osl: int  # output tokens
    unit: str = "tokens"  # of isl; "characters" where there is no tokenizer
    prefix_share: float = 0.0  # of the input, from its beginning: the same in all requests
    spread: float = 1.0  # lengths are drawn from this share of isl and osl up to them
    dataset: str = ""  # the name of the file that the requests come from

    def __str__(self) -> str:
        """`128/64`; `512c/64-shared50-spread0.8`; the data set's name."""
        if self.dataset:
            return re.sub(r"[^A-Za-z0-9._]+", "_", self.dataset)
        text = f"{self.isl}{'c' * (self.unit == 'characters')}/{self.osl}"
        text += f"-shared{100 * self.prefix_share:g}" if self.prefix_share else ""
        return text + (f"-spread{self.spread:g}" if self.spread != 1 else "")

    @property
    def slug(self) -> str:
        """The shape in a file name: `128x64`."""
        return str(self).replace("/", "x")


@dataclass(frozen=True, kw_only=True)
class HealthLimits:
    """Beyond these a point is invalid: its numbers would say more of the client or the moment than of the server."""

    error_share: float = 0.001
    length_error: float = 0.01  # got tokens against asked, output and input
    delivered_concurrency: float = 0.98  # of asked, over the steady window
    # A lag counts when it is above the limit and above this share of the same percentile of TTFT.
    schedule_lag_ms: float = 1.0
    schedule_lag_share: float = 0.01
    loop_lag_ms: float = 2.0
    loop_lag_share: float = 0.0
    lag_percentile: int | None = 99  # None: the finest that the point has requests enough to print
    standstill_share: float = 0.05  # of the steady window, without a break: nothing was sent or seen meanwhile
    ttft_error_share: float = 0.10  # what calibration says the client adds, against the point's median
    cpu_share: float = 0.70  # of one core per worker
    drift: float = 0.05  # between the halves of the steady window, when chance does not explain it
    gross_drift: float = 0.25  # whatever chance explains


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The grid is every shape at every concurrency and every rate, `repeats` times round.

    A point ends when `requests_per_stream * C` requests (at least `min_requests`) have been measured and
    `min_duration_s` is over, at the latest after `max_duration_s`. `requests` is an exact count instead. In open loop the
    requests do not depend on C, and a profile without a `min_duration_s` measures for `max_duration_s`.
    """

    name: str
    shapes: tuple[Shape, ...]
    concurrency: tuple[int, ...]
    repeats: int
    warmup_per_stream: int
    min_warmup: int
    requests_per_stream: int
    min_requests: int
    min_duration_s: float
    max_duration_s: float | None
    rates: tuple[float, ...] = ()  # requests/s, open loop
    arrivals: Arrivals = Arrivals(process="poisson")
    max_outstanding: int = 512  # open loop: more streams than one Python process times well
    requests: int | None = None
    # Found in the first round of repeats: see loadgen.plan.
    doubles_above: float | None = None  # streams are doubled while output tok/s gains more than this share
    open_shares: tuple[float, ...] = ()  # rates, as shares of the highest that the closed loops reached
    stops_early: bool = False  # no further repeat where those so far agree
    find_max: str | None = None  # instead of the grid: the largest load that holds this SLO tier
    slo_share: float = 0.99  # of the requests, to hold it; as MLPerf has it, the 99th percentile within the limits
    limits: HealthLimits = HealthLimits()

    def num_warmup(self, concurrency: int) -> int:
        return max(self.warmup_per_stream * concurrency, self.min_warmup)

    def num_requests(self, concurrency: int) -> int:
        return self.requests or max(self.requests_per_stream * concurrency, self.min_requests)

    @property
    def digest(self) -> str:
        """Equal digests, equal measurements: the sha256 of every field, overrides included."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


_CHAT, _RAG = Shape(isl=1024, osl=1024), Shape(isl=8192, osl=1024)

# A laptop that serves and measures at once now and then delays the client by a whole scheduler slice (4 ms on Linux).
# That moves a p99, which quick never has the requests for, and hardly the percentiles it prints: so lags are judged
# there, and against the latency that they are added to. A point lasts seconds, no longer than such a neighbour's work:
# speed that comes and goes with it by less than 10 % is what quick can tell, not a fault of the point.
_QUICK_LIMITS = HealthLimits(lag_percentile=None, schedule_lag_share=0.05, loop_lag_share=0.05, drift=0.10)

PROFILES = {profile.name: profile for profile in (
    # Requests for C = 1, 4, 16: 20 + 40 + 160 measured, 2 + 4 + 16 to warm up, at most 2 C - 1 more in flight at the
    # ends of the steady windows: about 280 requests, 18 000 output tokens. That is 20 s at 1 000 tok/s (C = 1 is slower
    # than the rest) and 10 s at 2 000. 10 s at most per point keep a slower server near 45 s too, with fewer requests.
    Profile(
        name="quick/1", shapes=(Shape(isl=128, osl=64),), concurrency=(1, 4, 16), repeats=1,
        warmup_per_stream=1, min_warmup=2, requests_per_stream=10, min_requests=20,
        min_duration_s=0, max_duration_s=10, limits=_QUICK_LIMITS,
    ),
    Profile(
        name="standard/1", shapes=(_CHAT, _RAG), concurrency=(1, 4, 16, 64, 256), repeats=3,
        warmup_per_stream=2, min_warmup=16, requests_per_stream=10, min_requests=10,
        min_duration_s=60, max_duration_s=600, doubles_above=0.05, open_shares=(0.5, 0.7, 0.85, 0.95), stops_early=True,
    ),
)}  # fmt: skip


def find_profile(name: str) -> Profile:
    """`quick/1`, or `quick` for its newest version."""
    versions = [profile for profile in PROFILES if profile == name or profile.rpartition("/")[0] == name]
    if not versions:
        families = [profile.rpartition("/")[0] for profile in PROFILES]
        raise InputError(
            f'no profile "{name}"{did_you_mean(name, [*families, *PROFILES])}', hint=f"known: {', '.join(PROFILES)}"
        )
    return PROFILES[max(versions, key=lambda version: int(version.rpartition("/")[2]))]


def resolve_profile(recipe: SweepRecipe) -> Profile:
    """The named profile with the recipe's overrides; raises with everything that is wrong with them."""
    profile = find_profile(recipe.profile)
    problems: list[str] = []
    changes: dict[str, Any] = {}
    for name in ("shapes", "concurrency", "rates"):
        if getattr(recipe, name) == ():
            problems.append(f"{name} is empty, expected at least one")
    if recipe.shapes is not None:
        changes["shapes"] = tuple(shape for text in recipe.shapes if (shape := _shape(text, problems)))
    changes["shapes"] = _varied(recipe, changes.get("shapes", profile.shapes), problems)
    if recipe.rates is not None:  # one way of loading unless both are asked for
        changes |= {"rates": recipe.rates, "concurrency": ()}
    if recipe.concurrency is not None:
        changes["concurrency"] = recipe.concurrency
    if recipe.rates is not None or recipe.concurrency is not None:  # these loads and no others
        changes |= {"doubles_above": None, "open_shares": ()}
    if recipe.repeats is not None:
        changes["stops_early"] = False
    changes |= _search(recipe, problems)
    if recipe.arrivals is not None:
        changes["arrivals"] = parse_arrivals(recipe.arrivals)
    if changes.get("arrivals", profile.arrivals).process == "trace":  # whole, unless a count or a duration is given
        changes |= {"concurrency": recipe.concurrency or (), "min_duration_s": 0, "max_duration_s": None}
        changes |= {"doubles_above": None, "open_shares": ()}
        if recipe.dataset is None:
            problems.append("arrivals is trace, but there is no data set with timestamps")
    elif recipe.arrivals and not (changes.get("rates") or changes.get("open_shares", profile.open_shares)):
        problems.append(f"arrivals is {recipe.arrivals}, but there is no rate")
    for name in ("requests", "repeats", "max_outstanding"):
        if getattr(recipe, name) is not None:
            changes[name] = getattr(recipe, name)
    if recipe.requests is not None:
        changes |= {"min_duration_s": 0, "max_duration_s": None}
    if recipe.duration_s is not None:
        changes |= {"max_duration_s": recipe.duration_s}
        if recipe.requests is None:
            changes |= {"min_duration_s": recipe.duration_s}
    if not 0 <= recipe.seed <= MAX_SEED:
        problems.append(f"seed is {recipe.seed}, expected 0 to {MAX_SEED}")
    problems += _problems(changes)
    if problems:
        raise InputError("impossible sweep", problems=problems)
    return dataclasses.replace(profile, **changes)


def _varied(recipe: SweepRecipe, shapes: tuple[Shape, ...], problems: list[str]) -> tuple[Shape, ...]:
    """The shapes with everything about them that the recipe says; a data set brings its own."""
    shares, spread = recipe.prefix_shares, recipe.spread
    if shares is not None and not all(0 <= share < 1 for share in shares):
        problems.append(
            f"prefix share is {', '.join(f'{share:g}' for share in shares)}, expected 0 to less than 1 each"
        )
    if spread is not None and not 0 < spread <= 1:
        problems.append(f"spread is {spread:g}, expected more than 0, at most 1")
    if recipe.dataset is not None:
        given = {
            "shapes": recipe.shapes,
            "prefix shares": shares,
            "spread": spread,
            "isl_chars": recipe.isl_chars or None,
        }
        problems += [f"{name} given, but the data set tells its own lengths" for name, value in given.items() if value]
    return tuple(
        dataclasses.replace(
            shape,
            unit="characters" if recipe.isl_chars else shape.unit,
            prefix_share=share,
            spread=shape.spread if spread is None else spread,
        )
        for shape in shapes
        for share in (shares if shares is not None else (shape.prefix_share,))
    )


def _search(recipe: SweepRecipe, problems: list[str]) -> dict[str, Any]:
    """The largest load is sought from 1 on, streams or, with `rates` or `arrivals`, requests/s; or from the one given."""
    tier = recipe.find_max
    if tier is None:
        if recipe.slo_share is not None:
            problems.append("attainment is given, but no tier to find the largest load for")
        return {}
    known = [name for name, limits in SLO_TIERS.items() if limits]
    if tier not in known:
        problems.append(f'no tier "{tier}" with limits{did_you_mean(tier, known)}, expected one of {", ".join(known)}')
    is_open = recipe.rates is not None or recipe.arrivals is not None
    starts = recipe.rates if is_open else recipe.concurrency
    if len(starts or (1,)) != 1 or (recipe.rates is not None and recipe.concurrency is not None):
        problems.append("the search for the largest load starts from one: give one rate, or one concurrency")
    share = recipe.slo_share if recipe.slo_share is not None else Profile.slo_share
    if not 0 < share < 1:
        problems.append(f"attainment is {share:g}, expected more than 0 and less than 1")
    start = (starts or (1,))[:1]
    return {
        "find_max": tier,
        "slo_share": share,
        "rates": tuple(map(float, start)) if is_open else (),
        "concurrency": () if is_open else start,
    }


def _shape(text: str, problems: list[str]) -> Shape | None:
    sizes = text.split("/")
    if len(sizes) == 2 and all(size.strip().isdecimal() and size.isascii() for size in sizes):
        isl, osl = int(sizes[0]), int(sizes[1])
        if 1 <= isl <= MAX_SHAPE_TOKENS and 1 <= osl <= MAX_SHAPE_TOKENS:
            return Shape(isl=isl, osl=osl)
    problems.append(f'shape "{text}": expected input/output tokens, 1 to {MAX_SHAPE_TOKENS:,} each, like 128/64')
    return None


def _problems(changes: dict[str, Any]) -> list[str]:
    problems = []
    for name in ("shapes", "concurrency", "rates"):
        values = changes.get(name)
        if values is not None and len(set(values)) < len(values):
            problems.append(f"{name} holds a value twice: {', '.join(map(str, values))}")
    if not all(1 <= streams <= MAX_STREAMS for streams in changes.get("concurrency", ())):
        given = ", ".join(map(str, changes["concurrency"]))
        problems.append(f"concurrency is {given}, expected at least 1 each, at most {MAX_STREAMS:,}")
    if not all(0 < rate <= MAX_REQUESTS_S for rate in changes.get("rates", ())):
        given = ", ".join(map(str, changes["rates"]))
        problems.append(f"rate is {given}, expected more than 0 each, at most {MAX_REQUESTS_S:,}")
    for name in ("requests", "repeats", "max_outstanding"):
        if name in changes and changes[name] < 1:
            problems.append(f"{name} is {changes[name]}, expected at least 1")
    if changes.get("max_duration_s") is not None and not 0 < changes["max_duration_s"] < float("inf"):
        problems.append(f"duration is {changes['max_duration_s']} s, expected more than 0")
    return problems
