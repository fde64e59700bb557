"""A directory that looks like NVIDIA's Triton container with TensorRT-LLM: the real tritonserver of the wheel, around Python
stand-ins for the container's models and, under its own name, for the C++ backend; and an mpirun.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from tkit.triton.install import find_install, library_directory, link_backends

# Python stand-ins for the container's models and for the C++ backend: a token is a byte, the answer repeats the prompt.
MODELS = {
    "llmapi": """
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils
import yaml
from helpers import sentence

stopped = set()

class TritonPythonModel:
    def initialize(self, args):
        with open(pb_utils.get_model_dir() + "/model.yaml") as file:
            self.options = yaml.safe_load(file)
        assert self.options["triton_config"]["decoupled"]

    def execute(self, requests):
        for request in requests:
            get = lambda name: pb_utils.get_input_tensor_by_name(request, name)
            sender = request.get_response_sender()
            if get("stop") is not None and get("stop").as_numpy()[0]:
                stopped.add(request.request_id())
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            threading.Thread(target=self.answer, args=(request, sender), daemon=True).start()

    def answer(self, request, sender):
        get = lambda name: pb_utils.get_input_tensor_by_name(request, name)
        assert get("sampling_param_exclude_input_from_output").as_numpy()[0]
        count, words = int(get("sampling_param_max_tokens").as_numpy()[0]), []
        is_streaming = bool(get("streaming").as_numpy()[0])
        for word in sentence(get("text_input").as_numpy()[0].decode(), count):
            if request.request_id() in stopped:
                break
            words.append(word)
            time.sleep(0.02)
            if is_streaming or len(words) == count:
                text = np.array([" ".join(words).encode()], np.object_)
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("text_output", text)]))
        with open(self.options["model"] + "/.served", "a") as file:
            file.write(f"{len(words)} of {count}\\n")
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
""",
    "preprocessing": """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            get = lambda name: pb_utils.get_input_tensor_by_name(request, name)
            tokens = np.frombuffer(get("QUERY").as_numpy()[0, 0], np.uint8).astype(np.int32)[None]
            one = np.array([[1]], np.int32)
            arrays = {
                "INPUT_ID": tokens, "REQUEST_INPUT_LEN": np.array([[tokens.size]], np.int32),
                "DECODER_INPUT_ID": one, "REQUEST_DECODER_INPUT_LEN": one,
                "BAD_WORDS_IDS": np.zeros((1, 2, 0), np.int32), "STOP_WORDS_IDS": np.zeros((1, 2, 0), np.int32),
                "EMBEDDING_BIAS": np.zeros((1, 0), np.float32),
                "REQUEST_OUTPUT_LEN": get("REQUEST_OUTPUT_LEN").as_numpy(), "OUT_END_ID": one, "OUT_PAD_ID": one,
                "OUT_PROMPT_TABLE_EXTRA_IDS": np.zeros((1, 0), np.uint64),
            }
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor(n, a) for n, a in arrays.items()]))
        return responses
""",
    "tensorrt_llm": """
import os
import time

import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        while os.environ.get("OMPI_COMM_WORLD_RANK", "0") != "0":
            time.sleep(1)  # a worker never returns to its server

    def execute(self, requests):
        for request in requests:
            get = lambda name: pb_utils.get_input_tensor_by_name(request, name)
            assert get("input_lengths").as_numpy().shape == get("streaming").as_numpy().shape == (1,)
            prompt = get("input_ids").as_numpy()[0]
            count = int(get("request_output_len").as_numpy()[0])
            tokens = np.resize(prompt, count).astype(np.int32)
            parts = [tokens[i : i + 1] for i in range(count)] if get("streaming").as_numpy()[0] else [tokens]
            sender = request.get_response_sender()
            for part in parts:
                outputs = {"output_ids": part[None, None], "sequence_length": np.array([[part.size]], np.int32)}
                for name, size in (("num_input_tokens", prompt.size), ("num_output_tokens", part.size)):
                    if (asked := get(f"return_{name}")) is not None and asked.as_numpy().item():
                        outputs[name] = np.array([[size]], np.int32)
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor(n, a) for n, a in outputs.items()]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
""",
    "postprocessing": """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()[0, 0]
            text = np.array([[bytes(tokens.astype(np.uint8))]], np.object_)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", text)]))
        return responses
""",
    "tensorrt_llm_bls": """
class TritonPythonModel:
    def execute(self, requests):
        raise NotImplementedError
""",
}  # fmt: skip

MPIRUN = r"""
import os, signal, subprocess, sys, time

words, blocks = sys.argv[1:], [[]]
assert words.pop(0) == "--allow-run-as-root"
for word in words:
    blocks.append([]) if word == ":" else blocks[-1].append(word)
ranks = []
for rank, block in enumerate(blocks):
    assert block[:2] == ["-n", "1"], block
    environment = {**os.environ, "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(len(blocks))}
    ranks.append(subprocess.Popen(block[2:], env=environment))
def end(*_):
    for process in ranks:
        process.terminate()
    time.sleep(1)
    for process in ranks:
        process.kill()

signal.signal(signal.SIGTERM, end)
code = ranks[0].wait()
for process in ranks[1:]:
    process.kill()
    process.wait()
sys.exit(code)
"""


def write_container(directory: Path) -> dict[str, str]:
    """The environment variables that make tkit take `directory` for the container's root."""
    install = find_install({})
    assert install is not None
    triton, models, programs = directory / "opt" / "tritonserver", directory / "app" / "all_models", directory / "bin"
    link_backends(install, directory / "links")
    # Copies: for a backend that is not called `python`, Triton refuses a library that is a link out of the directory.
    shutil.copytree(directory / "links", triton / "backends")
    _write(triton / "backends" / "tensorrtllm" / "model.py", MODELS["tensorrt_llm"])
    for name in ("preprocessing", "postprocessing", "tensorrt_llm_bls"):
        _write(models / "inflight_batcher_llm" / name / "1" / "model.py", MODELS[name])
    libraries = f"{library_directory()}:{install.root.parents[1]}/nvidia_pytriton.libs"
    _write(models / "inflight_batcher_llm" / "tensorrt_llm_bls" / "1" / "lib" / "decode.py", "")
    _write(models / "llmapi" / "tensorrt_llm" / "1" / "model.py", MODELS["llmapi"])
    helpers = "def sentence(prompt, count):\n    return [f'{prompt}{i}é' for i in range(count)]\n"
    _write(models / "llmapi" / "tensorrt_llm" / "1" / "helpers.py", helpers)
    server = f"""#!/bin/sh
export LD_LIBRARY_PATH={libraries}:$LD_LIBRARY_PATH PATH={Path(sys.executable).parent}:$PATH
exec {install.binary} --backend-directory={triton}/backends "$@"
"""
    _write(triton / "bin" / "tritonserver", server)
    _write(programs / "mpirun", f"#!{sys.executable}{MPIRUN}")
    return {
        "TKIT_TRITONSERVER": str(triton / "bin" / "tritonserver"),
        "TKIT_TRTLLM_MODELS": str(models),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
