from __future__ import annotations

import errno
import os
import random

import pytest

from tkit.checkpoints import direct_file
from tkit.checkpoints.direct_file import BLOCK, BUFFER_BYTES, DirectFile

DATA = random.Random(0).randbytes(3 * BUFFER_BYTES + 1234)


@pytest.fixture(params=[True, False], ids=["direct", "cached"])
def is_direct(request, monkeypatch, tmp_path):
    monkeypatch.setattr(direct_file, "MIN_DIRECT_BYTES", 0 if request.param else 1 << 40)
    if request.param:
        try:
            os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
        except OSError:
            pytest.skip("this file system has no O_DIRECT")
    return request.param


def put(file, data, seed):
    """In pieces of any size, put into the file every now and then."""
    choose = random.Random(seed)
    while data:
        count = choose.choice((1, 7, BLOCK, BLOCK + 1, BUFFER_BYTES // 3, BUFFER_BYTES + 5))
        file.write(memoryview(data[:count]))
        data = data[count:]
        if choose.random() < 0.3:
            file.flush()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_bytes", [0, 1, BLOCK, BUFFER_BYTES, len(DATA)])
def test_the_file_is_what_was_written(tmp_path, is_direct, num_bytes, seed):
    file = DirectFile(tmp_path / "file", max(num_bytes, 1))
    assert file._is_direct == is_direct
    put(file, DATA[:num_bytes], seed)
    file.finish()
    assert (tmp_path / "file").read_bytes() == DATA[:num_bytes]


@pytest.mark.parametrize("position", [0, 5, BLOCK, BUFFER_BYTES + BLOCK + 9])
def test_writing_goes_on_where_another_process_stopped(tmp_path, is_direct, position):
    killed = DirectFile(tmp_path / "file", len(DATA))
    put(killed, DATA[:position], 1)
    killed.flush()
    killed.write(memoryview(b"lost"))  # in the buffer only
    killed.close()
    file = DirectFile(tmp_path / "file", len(DATA))
    file.seek(position)
    put(file, DATA[position:], 2)
    file.finish()
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_file_system_that_takes_the_flag_and_refuses_the_write(tmp_path, monkeypatch):
    """As some do whose blocks are larger; simulated, the real ones need root."""
    monkeypatch.setattr(direct_file, "MIN_DIRECT_BYTES", 0)
    real, refused = os.pwrite, []

    def pwrite(descriptor, data, offset):
        if file._is_direct:
            refused.append(len(data))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data, offset)

    file = DirectFile(tmp_path / "file", len(DATA))
    file._is_direct = True
    monkeypatch.setattr(os, "pwrite", pwrite)
    put(file, DATA, 3)
    file.finish()
    assert (tmp_path / "file").read_bytes() == DATA
    assert len(refused) == 1


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    def pwrite(descriptor, data, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", pwrite)
    file = DirectFile(tmp_path / "file", 10)
    file.write(memoryview(b"0123456789"))
    with pytest.raises(OSError, match="file'") as caught:
        file.finish()
    file.close()
    assert caught.value.filename == str(tmp_path / "file")
