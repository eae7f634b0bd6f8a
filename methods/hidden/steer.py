"""Steer: a direction made elsewhere, added to hidden states."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import Arch, AttentionOutputEdit, LayerOutputEdit, MLPOutputEdit, RowScope, VlmFixError, param
from vlm_fix.rows import Rows
from vlm_fix.tensors import Tensors

from .files import Source, by_layer, place_of

PLACES = ("layer_output", "mlp_output", "attention_output")


@dataclass(frozen=True)
class Steer(AttentionOutputEdit, MLPOutputEdit, LayerOutputEdit):
    """Adds the vectors of a file to the hidden states of their layers.

    With v_l [C] layer l's vector in `file` and x [C] what the layer puts out at `place`:
        x <- x + strength ||x|| v_l / ||v_l||;  with `absolute`:  x <- x + absolute v_l, at the length the file gives it;
        keep_norm: the sum is brought back to the length ||x||
    A negative strength steers away. `layers` leaves out layers of the file.

    Source: activation addition (Turner et al., arXiv 2308.10248; Rimsky et al., arXiv 2312.06681). Files, safetensors alone:
    one vector a layer named by its 0-based number (`direction.14`, EasySteer's and repeng's names; EasySteer@0b71127), one
    tensor [depth, C], or the folder of a repsteer artifact (schema 1.x, repsteer@00c9989), whose manifest names layer and
    place: attn_out, mlp_out, resid_post, and resid_pre, the output of the layer before. Refused are resid_mid, embeddings,
    single heads (`unit`), and GGUF, pickle and .pt files: save them as safetensors. Not read: checksums of an artifact, and
    the model that it was made for beyond its sizes. Deviation: where a norm stands behind attention or MLP, repsteer adds
    before it, here behind it.
    """

    name: ClassVar[str] = "steer"
    paper: ClassVar[str] = "https://arxiv.org/abs/2308.10248"
    needs_image: ClassVar[bool] = False

    file: Source | None = param(None, "the vectors: a safetensors file or a repsteer folder")
    strength: float = param(0.1, "length of the added vector, as a share of the hidden state's; negative: away from it")
    absolute: float | None = param(None, "factor on the file's own vectors, instead of `strength`")
    keep_norm: bool = param(False, "bring hidden states back to their length")
    place: str | None = param(None, "what is steered; auto: as the file says, or layer_output", choices=PLACES)
    prompt_rows: str = param("last", "prompt rows that are steered", choices=("last", "after_image", "all"))

    def resolve(self, arch: Arch) -> Steer:
        method = super().resolve(arch)
        assert isinstance(method, Steer) and isinstance(method.layers, tuple)
        if method.file is None and not method.neutral:
            raise VlmFixError("steer: name the vectors, as in steer:file=direction.safetensors.")
        if method.neutral:
            return method
        known = by_layer(method.file, arch, self.name)  # type: ignore[arg-type]
        many = [i for i, rows in known.items() if len(rows) != 1]
        if many:
            raise VlmFixError(
                f"steer: {method.file} holds {len(known[many[0]])} rows for layer {many[0]}, a subspace: project it out with "
                "nullu:file=."
            )
        layers = tuple(i for i in method.layers if i in known and bool(known[i].any()))
        if not layers:
            raise VlmFixError(f"steer: {method.file} holds no vector for layers {', '.join(map(str, method.layers))}.")
        own = place_of(method.file)  # type: ignore[arg-type]
        place = method.place or own or PLACES[0]
        if own and place != own:
            raise VlmFixError(
                f"steer: {method.file} is made for {own} by its manifest, not for {place}; leave place out, or save its "
                "tensor as a safetensors file."
            )
        return dataclasses.replace(
            method, layers=layers, place=place, file=Tensors({str(i): known[i][0] for i in layers})
        )

    @property
    def row_scope(self) -> RowScope:
        return RowScope(self.prompt_rows)

    @property
    def neutral(self) -> bool:
        return self.absolute == 0 if self.absolute is not None else self.strength == 0

    @property
    def control(self) -> str:
        if self.neutral or self.absolute is not None:  # a length of its own: no share to match
            return ""
        shared = f"strength={abs(self.strength):g},place={self.place},prompt_rows={self.prompt_rows}"
        return f"random_direction:{shared},layers={'|'.join(map(str, self.layers))}"  # type: ignore[arg-type]

    def acts_at(self, place: str) -> bool:
        return place == self.place

    def layer_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self.steered(x, rows)

    def mlp_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self.steered(x, rows)

    def attention_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self.steered(x, rows)

    def push(self, rows: Rows) -> torch.Tensor:
        """[C]: what is added, or the share of a state's own length that is."""
        assert isinstance(self.file, Tensors)
        v = self.file.on(str(rows.layer), rows.visual.device)
        return self.strength * (v / v.norm()) if self.absolute is None else self.absolute * v

    def steered(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, R, C] -> the same with the layer's vector."""
        assert isinstance(self.file, Tensors)
        if self.absolute is not None and not self.keep_norm:
            return torch.add(x, self.file.on(str(rows.layer), x.device), alpha=self.absolute)
        length, push = x.norm(dim=-1, keepdim=True), rows.kept(self.push)
        y = torch.addcmul(x, length, push) if self.absolute is None else x + push
        return y * (length / y.norm(dim=-1, keepdim=True).clamp(min=1e-12)) if self.keep_norm else y
