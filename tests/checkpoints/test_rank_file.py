from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tkit.checkpoints.rank_file import RankFiles

LAYOUT = {"a": ("F32", (2, 3)), "b": ("I8", (5,))}
A, B = np.arange(6, dtype=np.uint32).reshape(2, 3), np.arange(5, dtype=np.uint8)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_files_hold_what_was_written_whoever_wrote_it(tmp_path, num_threads):
    with RankFiles(tmp_path, {rank: LAYOUT for rank in range(3)}, num_threads) as files:
        for rank in range(3):
            files.write(rank, "a", [A[:1] + rank, A[1:] + rank])
        for rank in range(3):
            files.write(rank, "b", [B])
        facts = files.finish()
    for rank in range(3):
        path = tmp_path / f"rank{rank}.safetensors"
        found = load_file(path)
        assert torch.equal(found["a"].view(torch.int32), torch.from_numpy((A + rank).astype(np.int32)))
        assert found["b"].tolist() == [0, 1, 2, 3, 4]
        assert facts[path.name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_error_in_a_thread_reaches_the_caller_and_nobody_hangs(tmp_path):
    with pytest.raises(AssertionError, match="b came, a was next"), RankFiles(tmp_path, {0: LAYOUT}, 1) as files:
        for _ in range(20):  # more than the queue holds
            files.write(0, "b", [B])
        files.finish()


def test_a_file_that_is_not_full_is_not_finished(tmp_path):
    with pytest.raises(AssertionError, match="never written"), RankFiles(tmp_path, {0: LAYOUT}, 1) as files:
        files.write(0, "a", [A])
        files.finish()


def test_an_error_of_the_caller_ends_the_threads(tmp_path):
    with pytest.raises(KeyError), RankFiles(tmp_path, {0: LAYOUT}, 2) as files:
        files.write(0, "a", [A])
        raise KeyError
    assert not any(thread.is_alive() for thread in files._threads)
