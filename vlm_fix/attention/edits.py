"""The base classes of methods that change or read attention: a method inherits one class for each stage it acts in.

One layer runs its stages in this order:
  LayerInputReader, ColumnMasker, QueryKeyReader, ScoreEdit, LogWeightEdit, (mask), TotalReader, (softmax), WeightEdit,
  WeightReader, HeadEdit
ColumnEdit and FewColumnsEdit are restricted forms of these, with which many rows stay on SDPA.

Shapes: B samples, H query heads, Hkv key heads, q query rows of the forward, R edited rows, K columns, D head size. Tensors
of edited rows are float32.
"""

from __future__ import annotations

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, final

import torch

from vlm_fix.arch import Arch
from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.memory import Memory
from vlm_fix.method import Layers, Method, param
from vlm_fix.rows import Rows
from vlm_fix.scope import RowScope, of_main
from vlm_fix.session import Session

from .forms import ScoreForm, TransferForm
from .inputs import QueryRows


class ColumnFactors(NamedTuple):
    """A change of scores z by column or by row:

    z[b, h, r, j] <- scale[b, j] row_factor[b, r] z[b, h, r, j] + bias[b, j] heads[h]

    The bias is a log-weight: it is added after all score edits of a stack.
    """

    scale: torch.Tensor | None = None  # [B, 1, 1, K], None: 1
    bias: torch.Tensor | None = None  # [B, 1, 1, K], None: 0
    heads: torch.Tensor | None = None  # [H] 0 or 1, None: all 1
    row_factor: torch.Tensor | None = None  # [B, 1, R, 1], None: 1


class Unchanged(enum.Enum):
    """The rows of its scope in which an edit may find nothing to change: these keep SDPA's own output."""

    NO_ROW = enum.auto()
    PROMPT_ROWS = enum.auto()  # decode rows are always changed
    ANY_ROW = enum.auto()


@dataclass
class Changes(Memory):
    """Whether an edit that may leave rows unchanged has changed any."""

    in_layer: dict[int, bool | torch.Tensor] = field(default_factory=dict)
    in_decode_rows: bool = False

    def note(self, layer: int, moved: torch.Tensor) -> None:
        """moved [B, R]: the rows that were changed just now."""
        known = self.in_layer.get(layer, False)
        if known is not True:
            some = moved.any() | known
            host = some.device.type == "cpu"  # elsewhere asking would wait for the device
            self.in_layer[layer] = bool(some) if host else some

    def flag(self, layer: int, device: torch.device) -> torch.Tensor | None:
        """A boolean to be raised if a row of this layer was changed; None if one is known to have been."""
        known = self.in_layer.get(layer, False)
        if not isinstance(known, torch.Tensor):
            if known:
                return None
            known = self.in_layer[layer] = torch.zeros((), dtype=torch.bool, device=device)
        return known

    def any(self) -> bool:
        """True also if nothing was noted."""
        return self.in_decode_rows or not self.in_layer or any(map(bool, self.in_layer.values()))


@dataclass(frozen=True)
class AttentionEdit(Method):
    """Acts on the attention of the language model in `layers`, on the rows of `row_scope`. Inherit stages, not this class."""

    kind: ClassVar[str] = "attention"
    idle_reason: ClassVar[str] = "no row of it was reached."
    tracks_columns: ClassVar[bool] = False
    """True if it remembers something for each prompt column, which must then be mapped when columns are dropped."""
    may_leave_unchanged: ClassVar[Unchanged] = Unchanged.NO_ROW
    heads_apart: ClassVar[bool] = False
    """True if what it does to a head depends on that head alone, whatever its number: a device may have a part of them."""

    layers: Layers = param(None, "language-model layers to edit")
    form_holds: ClassVar[bool] = False
    """True if what `form` gives holds for the whole answer, generated columns being left as they are: it is asked for once."""
    same_in_all_layers: ClassVar[bool] = True
    """False if what `form` or `column_factors` gives differs from layer to layer."""

    branch: str = param("both", "beside a contrast: the branch it acts in", choices=("both", "main", "negative"))

    @property
    def row_scope(self) -> RowScope:
        return RowScope.LAST

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

    def form(self, rows: Rows) -> ScoreForm | None:
        """What it does to the scores of one decode row, for the kernel that runs such a row in one launch; None: no such form."""
        return None

    def form_of_scores(self, scores: Callable[[], torch.Tensor], rows: Rows) -> ScoreForm | None:
        """The same, for a method that has to see the scores of all heads first: scores() [B, H, 1, K], before the mask.

        It is asked only where no other edit changes scores or weights, and notes in `Changes` itself what it leaves unchanged.
        """
        return None

    def transfer(self, rows: Rows) -> TransferForm | None:
        """What it does to the weights of one decode row, for that kernel, made by `rows.ahead`; None: no such form."""
        return None

    @classmethod
    def has(cls, form: str) -> bool:
        """True if the class gives "form", "form_of_scores" or "transfer"."""
        return getattr(cls, form) is not getattr(AttentionEdit, form)

    def acts_in(self, branch: str) -> bool:
        """True if it acts in this branch: one of the main branch (`scope.of_main`), or a name of `Contrast.branches`."""
        return self.branch == "both" or (self.branch == "main") == of_main(branch)

    def changed_something(self, session: Session) -> bool:
        """False if the finished session shows that nothing was edited; the user is then told `idle_reason`."""
        return session.memory(self, Changes).any()


class ScoreEdit(AttentionEdit, ABC):
    """Changes raw scores, before the mask and the softmax."""

    @abstractmethod
    def edit_scores(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, H, R, K] -> [B, H, R, K]."""


class LogWeightEdit(AttentionEdit, ABC):
    """Multiplies weights by factors before they are normalised: adds their logarithms after all score edits."""

    @abstractmethod
    def log_weights(self, rows: Rows) -> torch.Tensor | None:
        """The logarithms of the factors; broadcasts to [B, H, R, K]. None: every factor is 1."""


class ColumnEdit(ScoreEdit, LogWeightEdit):
    """Changes scores by column or by row alone: where many rows are edited, they stay on SDPA."""

    @abstractmethod
    def column_factors(self, rows: Rows) -> ColumnFactors:
        """The factors of one layer, of all layers if `same_in_all_layers`."""

    @final
    def cached_column_factors(self, rows: Rows) -> ColumnFactors:
        """`column_factors`, computed once a forward if all layers share them."""
        return rows.once(self.column_factors) if self.same_in_all_layers else self.column_factors(rows)

    def form(self, rows: Rows) -> ScoreForm | None:
        scale, bias, heads, row_factor = self.cached_column_factors(rows)
        slopes = [x for x in (scale, row_factor) if x is not None]
        slope = slopes[0] if len(slopes) == 1 else slopes[0] * slopes[1] if slopes else None
        return ScoreForm(slope, None, bias if bias is None or heads is None else bias * heads[:, None, None])

    @final
    def edit_scores(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        factors = self.cached_column_factors(rows)
        scores = scores if factors.scale is None else scores * factors.scale
        return scores if factors.row_factor is None else scores * factors.row_factor

    @final
    def log_weights(self, rows: Rows) -> torch.Tensor | None:
        _, bias, heads, _ = self.cached_column_factors(rows)
        return bias if bias is None or heads is None else bias * heads[:, None, None]


class WeightEdit(AttentionEdit, ABC):
    """Changes attention weights, after the softmax."""

    @property
    def edits_weights(self) -> bool:
        """False if these parameters leave the weights as they are, for a method that acts in another stage."""
        return True

    @abstractmethod
    def edit_weights(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, H, R, K] -> [B, H, R, K]; rows of the result need not sum to 1."""


class FewColumnsEdit(WeightEdit):
    """Changes a few columns one by one and multiplies all others by one factor: a whole prompt stays on SDPA.

    `edit_weights(a, rows)` must equal `reweight(a, separate_columns(rows), rows)`.
    """

    def heads_in(self, layer: int) -> tuple[int, ...] | None:
        """The query heads it changes in `layer`, for one that in a prompt may be asked about these alone (`Rows.heads`)."""
        return None

    @abstractmethod
    def separate_columns(self, rows: Rows) -> torch.Tensor:
        """[B, H, 1, K] booleans: the columns that are changed one by one."""

    @abstractmethod
    def reweight(self, weights: torch.Tensor, separate: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, H, R, n] weights -> edited ones. The other columns may come as a single one, which holds their sum."""


class HeadEdit(AttentionEdit, ABC):
    """Changes what each head outputs, before o_proj. It needs no weights, so that all rows stay on SDPA."""

    @abstractmethod
    def edit_heads(self, outputs: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, H, R, D] -> [B, H, R, D]."""


class WeightReader(AttentionEdit, ABC):
    """Reads the weights that all edits have left; the output stays SDPA's."""

    @abstractmethod
    def read_weights(self, weights: torch.Tensor, rows: Rows) -> None:
        """[B, H, R, K], in chunks of rows."""


class TotalReader(AttentionEdit, ABC):
    """Reads how much the scores of a row, as all edits have left them, are together."""

    @abstractmethod
    def read_totals(self, totals: torch.Tensor, rows: Rows) -> None:
        """log sum exp of what each row sees, [B, H, R, 1], in chunks of rows, before the softmax."""


class QueryKeyReader(AttentionEdit, ABC):
    """Reads queries and keys before any row of the layer is edited."""

    @abstractmethod
    def read_queries_and_keys(self, inputs: QueryRows, rows: Rows) -> None:
        """The rows of the forward from the first edited one on, with all keys."""


class ColumnMasker(AttentionEdit, ABC):
    """Masks columns for all rows of a layer, before SDPA and every other stage. Its `row_scope` must be ALL."""

    @abstractmethod
    def mask_columns(self, weights_from: Callable[[int], torch.Tensor], rows: Rows) -> torch.Tensor | None:
        """[B, R or 1, K] True for columns to mask. `weights_from(i)` [B, H, R - i, K]: unedited weights from row i on."""


class LayerInputReader(AttentionEdit, ABC):
    """Reads the hidden states that enter a layer, before its norm."""

    @abstractmethod
    def read_layer_input(self, hidden: torch.Tensor, layer: int, session: Session) -> None:
        """[B, q, C]."""


class PromptStart(AttentionEdit, ABC):
    """Runs something once when a prompt starts, such as a text-only pass."""

    @abstractmethod
    def on_prompt(self, session: Session, call: Call) -> None: ...
