from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tkit.checkpoints import direct_file
from tkit.checkpoints.writer import CheckpointWriter

LAYOUT = {"a": ("F32", (2, 3)), "b": ("I8", (5,))}
A, B = np.arange(6, dtype=np.uint32).reshape(2, 3), np.arange(5, dtype=np.uint8)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_files_hold_what_was_written_whoever_wrote_it(tmp_path, num_threads):
    with CheckpointWriter(tmp_path, {f"rank{rank}.safetensors": LAYOUT for rank in range(3)}, num_threads) as files:
        for rank in range(3):
            files.write(f"rank{rank}.safetensors", "a", [A[:1] + rank, A[1:] + rank])
        for rank in range(3):
            files.write(f"rank{rank}.safetensors", "b", [B])
        facts = files.finish()
    for rank in range(3):
        path = tmp_path / f"rank{rank}.safetensors"
        found = load_file(path)
        assert torch.equal(found["a"].view(torch.int32), torch.from_numpy((A + rank).astype(np.int32)))
        assert found["b"].tolist() == [0, 1, 2, 3, 4]
        assert facts[path.name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_error_in_a_thread_reaches_the_caller_and_nobody_hangs(tmp_path):
    with (
        pytest.raises(AssertionError, match="b came, a was next"),
        CheckpointWriter(tmp_path, {"x": LAYOUT}, 1) as files,
    ):
        for _ in range(20):  # more than the queue holds
            files.write("x", "b", [B])
        files.finish()


def test_a_file_that_is_not_full_is_not_finished(tmp_path):
    with pytest.raises(AssertionError, match="never written"), CheckpointWriter(tmp_path, {"x": LAYOUT}, 1) as files:
        files.write("x", "a", [A])
        files.finish()


def test_an_error_of_the_caller_ends_the_threads(tmp_path):
    with pytest.raises(KeyError), CheckpointWriter(tmp_path, {"x": LAYOUT}, 2) as files:
        files.write("x", "a", [A])
        raise KeyError
    assert not any(thread.is_alive() for thread in files._threads)


def write_steps(directory, num_steps, journal):
    """Two files, three steps of one tensor each; returns what `finish` says when all steps are done, and the first step."""
    layout = {name: ("F32", (2, 3)) for name in ("a", "b", "c")}
    with CheckpointWriter(directory, {"rank0.safetensors": layout, "rank1.safetensors": layout}, 2, journal) as files:
        first = files.first_step
        for step, name in enumerate(layout):
            if first <= step < num_steps:
                for rank in range(2):
                    files.write(f"rank{rank}.safetensors", name, [A + 10 * step + rank])
                files.end_step(step)
        return (files.finish() if num_steps == 3 else None), first


def cut_short(directory, num_steps, journal):
    """Leaves what a process leaves that is killed after `num_steps`."""
    layout = {name: ("F32", (2, 3)) for name in ("a", "b", "c")}
    with (
        pytest.raises(InterruptedError),
        CheckpointWriter(directory, {"rank0.safetensors": layout, "rank1.safetensors": layout}, 2, journal) as files,
    ):
        for step, name in list(enumerate(layout))[:num_steps]:
            for rank in range(2):
                files.write(f"rank{rank}.safetensors", name, [A + 10 * step + rank])
            files.end_step(step)
        while len(journal.read_text().splitlines()) < num_steps:
            time.sleep(0.001)
        raise InterruptedError


def spoil_data(directory, journal):
    path = directory / "rank1.safetensors"
    data = bytearray(path.read_bytes())
    position = int.from_bytes(data[:8], "little") + 8 + 40  # inside tensor b, which follows 24 bytes of a
    data[position] ^= 1
    path.write_bytes(data)


def tear_journal(directory, journal):
    journal.write_bytes(journal.read_bytes()[:-7])


def lose_journal(directory, journal):
    journal.unlink()


def lose_a_file(directory, journal):
    (directory / "rank0.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "first_step"),
    [(lambda *_: None, 2), (spoil_data, 1), (tear_journal, 1), (lose_journal, 0), (lose_a_file, 0)],
)
@pytest.mark.parametrize("min_direct_bytes", [0, 1 << 40], ids=["direct", "cached"])
def test_a_killed_conversion_goes_on_where_the_files_still_hold(
    tmp_path, monkeypatch, damage, first_step, min_direct_bytes
):
    monkeypatch.setattr(direct_file, "MIN_DIRECT_BYTES", min_direct_bytes)
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    undisturbed.mkdir(), resumed.mkdir()
    expected, _ = write_steps(undisturbed, 3, undisturbed / "journal")
    cut_short(resumed, 2, resumed / "journal")
    damage(resumed, resumed / "journal")
    found, first = write_steps(resumed, 3, resumed / "journal")
    assert first == first_step
    assert found == expected
    for rank in range(2):
        name = f"rank{rank}.safetensors"
        assert (resumed / name).read_bytes() == (undisturbed / name).read_bytes()
