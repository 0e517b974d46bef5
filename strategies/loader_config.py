"""What diffusers and transformers are told, so that they quantise weights while they read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipefit.errors import InvalidRequest
from pipefit.strategies.quantization import torchao_config


def loader_config(library: str, parameters: Mapping[str, Any], dtype: str) -> Any:
    """Return the ``quantization_config`` of *library* for what the strategy's *parameters* say.

    *dtype* is that of the load, in which bitsandbytes computes.

    Raises:
        InvalidRequest: the backend reads a file of its own, which cannot be named here.
    """
    import diffusers
    import torch
    import transformers

    of = transformers if library == "transformers" else diffusers
    backend, type_ = parameters["backend"], str(parameters["type"])
    if "kept_dtype" in parameters:
        raise InvalidRequest(
            "kept_dtype says what an older transformers did, so nothing can be loaded with it: "
            "leave it out."
        )
    left_out = [] if parameters.get("all_linear") else parameters.get("modules_to_not_convert")
    left_out = [left_out] if isinstance(left_out, str) else left_out
    if backend == "torchao":
        return of.TorchAoConfig(torchao_config(parameters), modules_to_not_convert=left_out)
    if backend == "bitsandbytes":
        if type_ == "int8":
            return of.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left_out)
        return of.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=type_,
            bnb_4bit_use_double_quant=bool(parameters.get("double_quant")),
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            llm_int8_skip_modules=left_out,
        )
    if backend == "quanto":
        if library == "transformers":
            return of.QuantoConfig(weights=type_, modules_to_not_convert=left_out)
        return of.QuantoConfig(weights_dtype=type_, modules_to_not_convert=left_out)
    raise InvalidRequest(
        "A GGUF file is read by the component's own from_single_file: load the pipeline with it "
        "and plan for that."
    )
