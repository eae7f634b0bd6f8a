"""The base class of methods that change attention, and the changes by column or row that stay on SDPA."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix.arch import Arch
from vlm_fix.errors import VlmFixError
from vlm_fix.method import Layers, Method, param
from vlm_fix.session import Call, Rows, Session

from .scores import Scores


class Columns(typing.NamedTuple):
    """A change of scores by column or by row: z[b, h, r, j] <- scale[b, j] rows[b, r] z[b, h, r, j] + bias[b, j] heads[h].

    The bias is a log-weight: it is added after all logit edits of a stack.
    """

    scale: torch.Tensor | None = None  # [B, 1, 1, K], None: 1
    bias: torch.Tensor | None = None  # [B, 1, 1, K], None: 0
    heads: torch.Tensor | None = None  # [H] 0 or 1, None: all 1
    rows: torch.Tensor | None = None  # [B, 1, R, 1], None: 1


@dataclass(frozen=True)
class AttentionEdit(Method):
    """Changes attention in the language model, on the rows named by `rows`, in `layers`.

    Overwrite what you need; each gets float32 tensors for R edited rows over K columns, H query heads, D head size:
      logits(z [B,H,R,K], rows)  -> raw scores before the mask and softmax
      log_weights(rows)          -> [.., R or 1, K] logarithms of factors on the weights: added after all edits' `logits`
      columns(rows)              -> Columns, both in a form with which many rows stay on SDPA; one for all layers if `shared`
      weights(a [B,H,R,K], rows) -> post-softmax weights
      apart(rows), reweigh(a, apart, rows) -> weights that multiply all columns but a few by one factor: rows stay on SDPA
      heads(o [B,H,R,D], rows)   -> per-head output before o_proj (needs no weights: stays on SDPA)
      scan(q [B,H,q,D], k [B,Hkv,K,D], allowed, scores, rows) -> look at all queries and keys before rows are edited
      see(a [B,H,R,K], rows)     -> look at the weights that all edits have left; the output stays SDPA's
      watch(x [B,q,C], layer, session) -> look at a layer's input before its norm
      hides(look, rows)          -> [B, R or 1, K] columns to mask, if `rows` is "all": before SDPA and the other edits;
                                    look(i): the unedited weights [B,H,R-i,K] of the rows from i on
      begin(session, call)       -> run once when a prompt starts (text-only passes and the like)
    """

    kind: ClassVar[str] = "attention"
    marks: ClassVar[bool] = False  # True if it remembers columns of the prompt (masks or weights for them) for later
    spares: ClassVar[str] = ""  # which of its rows it may leave as they are: "any", "prompt" rows only, "" for none
    shared: ClassVar[bool] = True  # `columns` is the same in all layers
    idle_reason: ClassVar[str] = "no row of it was reached."
    layers: Layers = param(None, "language-model layers to edit")
    branch: str = param("both", "beside a contrast: the branch it acts in", choices=("both", "main", "negative"))

    def resolve(self, arch: Arch) -> Method:
        """`layers` become those of them that have attention weights at all."""
        method = super().resolve(arch)
        assert isinstance(method, AttentionEdit) and isinstance(method.layers, tuple)
        layers = tuple(i for i in method.layers if i in arch.attention)
        if not layers:
            raise VlmFixError(
                f"{self.name}: none of the layers {', '.join(map(str, method.layers))} has attention weights; in this model "
                f"layers {', '.join(map(str, arch.attention))} do."
            )
        return dataclasses.replace(method, layers=layers)

    def acts_in(self, branch: str) -> bool:
        """True if it acts in this branch: "main", or a name of `Contrast.branches`."""
        return self.branch == "both" or (self.branch == "main") == (branch == "main")

    @property
    def rows(self) -> str:
        """ "last": the last prompt row and decode rows; "after_image": also prompt rows after the images; "all"."""
        return "last"

    def columns(self, rows: Rows) -> Columns:
        return Columns()

    def form(self, rows: Rows) -> Columns:
        """`columns`, made once a forward if all layers share it."""
        return rows.once(self.columns) if self.shared else self.columns(rows)

    def logits(self, z: torch.Tensor, rows: Rows) -> torch.Tensor:
        form = self.form(rows)
        z = z if form.scale is None else z * form.scale
        return z if form.rows is None else z * form.rows

    def log_weights(self, rows: Rows) -> torch.Tensor | None:
        """Broadcasts to [B, H, R, K]: what is added to the scores that all logit edits have left; None: nothing."""
        form = self.form(rows)
        return form.bias if form.bias is None or form.heads is None else form.bias * form.heads[:, None, None]

    def weights(self, a: torch.Tensor, rows: Rows) -> torch.Tensor:
        return a

    def apart(self, rows: Rows) -> torch.Tensor:
        """[B, H, 1, K] booleans; `weights` must then be reweigh(a, apart(rows), rows)."""
        raise NotImplementedError

    def reweigh(self, a: torch.Tensor, apart: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, H, R, K] weights -> the same, edited; the columns not in `apart` may come as one, which holds their sum."""
        raise NotImplementedError

    def heads(self, o: torch.Tensor, rows: Rows) -> torch.Tensor:
        return o

    def scan(self, q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor | None, scores: Scores, rows: Rows) -> None:
        return None

    def see(self, a: torch.Tensor, rows: Rows) -> None:
        return None

    def hides(self, look: Callable[[int], torch.Tensor], rows: Rows) -> torch.Tensor | None:
        return None

    def watch(self, x: torch.Tensor, layer: int, session: Session) -> None:
        return None

    def begin(self, session: Session, call: Call) -> None:
        return None

    def acted(self, session: Session) -> bool:
        """False if the finished session shows that nothing was edited; the user is then told `idle_reason`."""
        noted = [v for k, v in session.state(self).items() if isinstance(k, tuple) and k[0] == "changed"]
        return not noted or any(map(bool, noted))

    @classmethod
    @functools.cache
    def edits(cls, what: str) -> bool:
        """True if the class overwrites `what`, the name of a hook above."""
        if what in ("logits", "log_weights") and cls.edits("columns"):
            return True
        return getattr(cls, what) is not getattr(AttentionEdit, what)
