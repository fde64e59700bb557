"""Pickled weights (`pytorch_model*.bin`) with the face of safetensors files: names first, then one tensor at a time.

torch.load(weights_only=True) rebuilds tensors and refuses every other object, so nothing in the file is run. With mmap
the tensors stay in the file until they are read: memory is one tensor, as for safetensors. A file that is truncated while
it is mapped kills the process; safetensors are read without mapping.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tkit.checkpoints.reader import PICKLED_FILE, TensorEntry, TensorFiles, weight_files
from tkit.errors import InputError
from tkit.runtime.bits import SAFETENSORS_DTYPES, to_raw


class PickledFiles(TensorFiles):
    """The tensors of a model directory's pickled files. Raises InputError listing every file that is not plain tensors."""

    def __init__(self, directory: Path):
        self._tensors: dict[str, torch.Tensor] = {}
        entries: dict[str, TensorEntry] = {}
        problems = []
        for path in weight_files(directory, PICKLED_FILE):
            try:
                values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # whatever a malformed pickle makes torch raise
                problems.append(f"{path.name}: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
                continue
            if not isinstance(values, dict):
                problems.append(f"{path.name}: holds a {type(values).__name__}, not tensors by name")
                continue
            for name, value in values.items():
                if not isinstance(value, torch.Tensor) or value.dtype not in SAFETENSORS_DTYPES:
                    problems.append(f"{path.name}: {name} is {getattr(value, 'dtype', type(value).__name__)}")
                elif name in entries:
                    problems.append(f"{name} stands in {entries[name].file.name} and in {path.name}")
                else:
                    entries[name] = TensorEntry(path, SAFETENSORS_DTYPES[value.dtype], tuple(value.shape), offset=0)
                    self._tensors[name] = value
        if problems:
            raise InputError(f"{directory}: unreadable pickled weights", problems=problems)
        super().__init__(directory, entries)

    def read(self, name: str) -> np.ndarray:
        return to_raw(self._tensors[name])[0]
