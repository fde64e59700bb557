"""What this machine's processor reaches: the limit of an engine that runs on it."""

from __future__ import annotations

import time

import numpy as np

from tkit.specs.record import HostSpeed

MIN_BYTES, MAX_BYTES = 1 << 20, 1 << 28  # more is in no cache, and reads no slower
ROUNDS = 5  # the best counts: what the processor can, not what it did while others used it
PRODUCT_SIZE = 768  # of square matrices; larger ones are not faster per operation


def host_speed(num_bytes: int) -> HostSpeed:
    """Measures it, in about a third of a second, as decoding reads weights: a matrix-vector product over `num_bytes`."""
    width = 1024
    rows = min(max(num_bytes, MIN_BYTES), MAX_BYTES) // (4 * width)
    matrix, vector = np.ones((rows, width), np.float32), np.ones(width, np.float32)
    square = np.ones((PRODUCT_SIZE, PRODUCT_SIZE), np.float32)
    reading, multiplying = [], []
    for _ in range(ROUNDS):
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
