"""model.py for Triton's Python backend: tokens at exact times, and a record of when each was really sent.

Parameters: ttft_ms, itl_ms; tokenizer (a tokenizer.json, to count the prompt); piece (the text of one token); log (one JSON
line per request: id, isl, asked, arrived_ns, sent_ns); final ("with_last" or "apart"). One clock with the client: both
are on this machine and use its monotonic clock.
"""

import asyncio
import json
import threading
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.settings = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.outputs = [output["name"] for output in config["output"]]
        self.tokenizer = Tokenizer.from_file(self.settings["tokenizer"])
        self.log = Path(self.settings["log"]).open("a", buffering=1)  # noqa: SIM115
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def execute(self, requests):
        arrived_ns = time.monotonic_ns()
        for request in requests:
            inputs = {tensor.name(): tensor.as_numpy().reshape(-1)[0] for tensor in request.inputs()}
            answer = self.answer(request.request_id(), inputs, request.get_response_sender(), arrived_ns)
            asyncio.run_coroutine_threadsafe(answer, self.loop)

    async def answer(self, request_id, inputs, sender, arrived_ns):
        isl = len(self.tokenizer.encode(inputs["text_input"].decode()).ids)
        asked, sent_ns = int(inputs["max_tokens"]), []
        ends_apart = self.settings["final"] == "apart"
        for i in range(asked):
            due_ns = arrived_ns + (float(self.settings["ttft_ms"]) + i * float(self.settings["itl_ms"])) * 1e6
            await asyncio.sleep(max(due_ns - time.monotonic_ns(), 0) / 1e9)
            values = {
                "text_output": np.array([[self.settings["piece"].encode()]], dtype=np.object_),
                "num_input_tokens": np.array([[isl]], dtype=np.int32),
                "num_output_tokens": np.array([[i + 1]], dtype=np.int32),
            }
            tensors = [pb_utils.Tensor(name, values[name]) for name in self.outputs if name in values]
            is_last = i + 1 == asked and not ends_apart
            sent_ns.append(time.monotonic_ns())
            if i + 1 == asked:  # before the client hears of the end, and reads the log
                line = {"id": request_id, "isl": isl, "asked": asked, "arrived_ns": arrived_ns, "sent_ns": sent_ns}
                line["inputs"] = {name: str(value) for name, value in inputs.items() if name != "text_input"}
                self.log.write(json.dumps(line) + "\n")
            flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
            sender.send(pb_utils.InferenceResponse(tensors), flags=flags)
        if ends_apart:
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.log.close()
