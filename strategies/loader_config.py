"""What diffusers and transformers are told, so that they quantise weights while they read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipefit.errors import InvalidRequest
from pipefit.strategies.quantization import torchao_config


def loader_config(library: str, parameters: Mapping[str, Any], dtype: str) -> Any:
    """Return the ``quantization_config`` of *library* for what the strategy's *parameters* say.

    *dtype* is that of the load, in which bitsandbytes computes.

    Raises:
        InvalidRequest: nothing can be loaded by these parameters.
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
    if backend == "gguf" and "file" in parameters and Path(parameters["file"]).is_file():
        return diffusers.GGUFQuantizationConfig(compute_dtype=getattr(torch, dtype))
    named = f"file={parameters['file']} is none" if "file" in parameters else "no file= was given"
    raise InvalidRequest(
        f"quantization:backend=gguf reads a file, but {named}: give the path of a .gguf file."
    )


def read_gguf(
    folder: Path, component: str, class_name: str, parameters: Mapping[str, Any], dtype: str
) -> Any:
    """Return the *component* of the pipeline in *folder* with the weights of its GGUF file.

    *dtype* is that of the load, in which what is not quantised is kept and everything computes.
    """
    import diffusers
    import torch

    return getattr(diffusers, class_name).from_single_file(
        parameters["file"],
        config=str(folder),
        subfolder=component,
        quantization_config=loader_config("diffusers", parameters, dtype),
        torch_dtype=getattr(torch, dtype),
        local_files_only=True,
    )
