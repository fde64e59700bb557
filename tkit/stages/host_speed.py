"""What this machine's processor reaches: the limit of an engine that runs on it."""

from __future__ import annotations

import time

import numpy as np

from tkit.specs.record import HostSpeed

MIN_BYTES, MAX_BYTES = 1 << 20, 1 << 28  # more is in no cache, and reads no slower
# The best round counts: what the processor can, not what it did while others used it. Rounds of a millisecond fit between
# two slices of a busy scheduler; five rounds of 10 ms once showed 4 GFLOP/s where there are 100.
MIN_ROUNDS, SECONDS = 5, 0.5
PRODUCT_SIZE = 384  # of square matrices; larger ones are hardly faster per operation


def host_speed(num_bytes: int) -> HostSpeed:
    """Measures it, in about half a second, as decoding reads weights: a matrix-vector product over `num_bytes`."""
    width = 1024
    rows = min(max(num_bytes, MIN_BYTES), MAX_BYTES) // (4 * width)
    matrix, vector = np.ones((rows, width), np.float32), np.ones(width, np.float32)
    square = np.ones((PRODUCT_SIZE, PRODUCT_SIZE), np.float32)
    reading: list[float] = []
    multiplying: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(reading) < MIN_ROUNDS or time.perf_counter() < end:
        started = time.perf_counter()
        matrix @ vector
        read = time.perf_counter()
        square @ square
        reading.append(read - started)
        multiplying.append(time.perf_counter() - read)
    return HostSpeed(
        num_bytes=matrix.nbytes,
        bytes_per_s=matrix.nbytes / min(reading),
        flops=2 * PRODUCT_SIZE**3 / min(multiplying),
    )
