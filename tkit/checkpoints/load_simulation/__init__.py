"""What TensorRT-LLM's loader will say to a checkpoint, found out without TensorRT-LLM.

From `config.json` alone it derives the module tree that `trtllm-build` makes for each rank, and from that every tensor
that must be in the rank's file; then it does to the files' headers what `preprocess_weights` does to the tensors, and
compares. It knows nothing of the conversion plan: both were written from the format, so a mistake in either shows.

Reads headers, never data. Source: TensorRT-LLM 1.0-1.2 `models/modeling_utils.py` (`PretrainedModel.load`,
`preprocess_weights`), `models/*/model.py`, `layers/{attention,mlp,moe}.py`, `quantization/{layers,quantize}.py`.
"""
