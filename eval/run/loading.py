"""Load the model to be measured, and describe the hardware it runs on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vlm_fix.calibrated import weights_id
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto
from vlm_fix.eval.settings import launched

from .elsewhere import Elsewhere
from .remote import RemoteModel
from .served import ServedModel


def check_device(device: str) -> None:
    """Raise VlmFixError for a --device that is unknown or not available."""
    kind, _, number = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and number.isdigit()):
        raise VlmFixError(f"--device {device} is unknown: give auto, cpu, cuda or cuda:N.")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= seen:
        raise VlmFixError(f"--device {device} was asked for but torch sees {seen or 'no'} CUDA GPU: use --device cpu.")


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    model_args: Mapping[str, Any] | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """Load (model, processor, identity) from a Hugging Face name, a directory or a bundled model such as "picto-llava".

    `revision` is a branch, tag or commit of a Hugging Face repository; `model_args` are further arguments of
    `from_pretrained`; `trust_remote_code` runs the checkpoint's own code. `device` "auto" uses as many GPUs as the model
    needs, or the process's own GPU under a launcher, else the CPU.
    """
    check_device(device)
    check_revision(name, revision)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    path = _path(name)
    remedy = usual = (
        "give a directory with a checkpoint, a Hugging Face name that this machine can download, or picto-llava."
    )
    if name.startswith(("/", ".", "~")) and not Path(path).exists():
        raise VlmFixError(f"model {name!r} could not be loaded (there is no such folder): {remedy}")
    cuda = device != "cpu" and torch.cuda.is_available()
    if device == "auto" and cuda and launched().size > 1:
        device = f"cuda:{launched().local % torch.cuda.device_count()}"
    theirs: dict[str, Any] = {"revision": revision} if revision else {}
    theirs |= {"trust_remote_code": True} if trust_remote_code else {}
    try:
        processor = AutoProcessor.from_pretrained(path, **theirs)
        _readable(Path(path))
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            output_loading_info=True,
            dtype=("auto" if cuda else torch.float32) if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map or (device if cuda else None),
            **theirs,
            **(model_args or {}),
        )
        model, info = loaded
    except (VlmFixError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a broken file of a checkpoint raises nearly anything
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error) and not trust_remote_code:
            cause, remedy = "it comes with code of its own", "read that code, then add --trust-remote-code to run it."
        elif isinstance(error, SafetensorError):
            remedy = "its weights are cut off, fetch them again."
        elif isinstance(error, UnpicklingError):
            cause = "its .bin file is broken, or holds more than tensors, which could run code when it is read"
        elif "ignore_mismatched_sizes" in str(error):
            cause = "weights of other sizes than its config.json says"
        elif not isinstance(error, OSError | ValueError | ImportError):
            cause = f"{type(error).__name__}: {cause}"
        if model_args and remedy == usual:
            remedy = f"check --model-args {', '.join(model_args)}, or {remedy}"
        elif Path(path).is_dir() and remedy == usual:
            remedy = "a file in that folder is broken or missing; fetch the checkpoint again."
        raise VlmFixError(f"model {name!r} could not be loaded ({cause.rstrip('.')}): {remedy}") from error
    if lost := sorted(info["missing_keys"]):
        raise VlmFixError(
            f"model {name!r} lacks weights that would be random ({len(lost)}, such as {lost[0]}): fetch the checkpoint again."
        )
    prepare(processor, name)
    return model.eval(), processor, identify(model, name) | ({"revision": revision} if revision else {})


def _readable(folder: Path) -> None:
    """VlmFixError for a generation_config.json that is no JSON, for which transformers takes its own defaults without a word."""
    path = folder / "generation_config.json"
    try:
        if path.is_file():
            json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VlmFixError(f"{path} cannot be read ({error}): fetch the checkpoint again.") from None


def prepare(processor: Any, name: str) -> None:
    """Set a processor up for batches; VlmFixError for one without a chat template."""
    _check(processor, name)
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token


def identify(model: Any, name: str) -> dict[str, Any]:
    """Say what a loaded model is, for config.json and calibration files."""
    return {
        "name": name,
        "type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": weights_id(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def load_served(
    name: str, dtype: str = "auto", device: str = "auto", device_map: str | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """The same for `--engine vllm`: the weights are loaded by vLLM, once for each run."""
    check_device(device)
    if device_map:
        raise VlmFixError("--device-map is for Hugging Face's engine: vLLM spreads a model by itself.")
    return _with_processor(ServedModel(_path(name), dtype, device), name)


def load_remote(name: str, urls: str) -> tuple[Any, Any, dict[str, Any]]:
    """The same for `--server`: of the checkpoint `name`, the configuration and the processor are read here."""
    return _with_processor(RemoteModel(_path(name), urls, name), name)


def _with_processor(model: Elsewhere, name: str) -> tuple[Any, Any, dict[str, Any]]:
    processor = AutoProcessor.from_pretrained(model.path)
    _check(processor, name)
    return model, processor, model.identity(name)


def check_revision(name: str, revision: str | None) -> None:
    """Raise VlmFixError for a revision of a folder or of a bundled model, which have none: it would have no effect."""
    if revision and (Path(_path(name)).exists() or name.startswith("picto-")):
        what = "is bundled" if name.startswith("picto-") and not Path(name).exists() else "is a folder"
        raise VlmFixError(
            f"--revision {revision} has no effect on {name}, which {what}: leave it out, or give a Hugging Face name."
        )


def check_placing(name: str, device_map: str | None, trust_remote_code: bool) -> None:
    """Raise VlmFixError for a device map where there is no GPU, and for trust in the code of a bundled model, which has none."""
    if device_map and not torch.cuda.is_available():
        raise VlmFixError(
            f"--device-map {device_map} has no effect on this machine, where torch sees no GPU: leave it out."
        )
    if trust_remote_code and name.startswith("picto-") and not Path(name).exists():
        raise VlmFixError(f"--trust-remote-code has no effect on {name}, which is bundled: leave it out.")


def _path(name: str) -> str:
    return str(picto.model_path(name)) if name.startswith("picto-") and not Path(name).exists() else name


def _check(processor: Any, name: str) -> None:
    if not getattr(processor, "chat_template", None) or not hasattr(processor, "tokenizer"):
        raise VlmFixError(f"the processor of {name!r} has no chat template: add chat_template.jinja to the checkpoint.")


def outline(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any | None:
    """Return the model without weights, from its configuration alone, or None if that cannot be read or built."""
    path = _path(name)
    try:
        theirs: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
        config = AutoConfig.from_pretrained(path, **theirs, **({"revision": revision} if revision else {}))
        with torch.device("meta"):
            made = AutoModelForImageTextToText.from_config(config, **theirs)
    except Exception:  # whatever it is, `load_model` meets it too and says it
        return None
    made.name_or_path = path
    return made


def hardware(device: torch.device) -> str:
    """Describe the hardware: number and name of GPUs, or CPU name, cores and torch threads."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{cpu}, {os.cpu_count()} cores, torch threads: {torch.get_num_threads()}"
