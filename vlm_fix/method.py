"""What a method is. The dataclass of a method is its configuration, its command-line options and its demo sliders.

A method never stores run-time state on itself: what it must remember lives in the Session of one call
(`rows.state`, `session.state(self)`), keyed by layer, as tensors that lead with the batch dimension.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from .errors import VlmFixError

if TYPE_CHECKING:
    from .attention.kernel import Scores
    from .calibration import Sample
    from .decoding.logits import Step
    from .decoding.loops import Search
    from .families import Arch
    from .session import Call, Rows, Session

Layers = str | tuple[int, ...] | None
"""0-based layer indices: "2-31", "1|18-31", "2-" (to the last), or a tuple; None = the method's default."""


def param(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Any = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its help text and legal range, `low` and `high` included, `above` not; shown by
    `vlm-fix methods` and the demo."""
    meta = {"help": help, "low": low if above is None else above, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata={**meta, "open": above is not None})


@dataclass(frozen=True)
class Method:
    """Base of all methods. Subclass one of the kinds below, as a frozen dataclass of `param` fields."""

    name: ClassVar[str] = "method"
    kind: ClassVar[str] = "method"
    paper: ClassVar[str] = ""
    needs_image: ClassVar[bool] = True
    calibrates_on: ClassVar[str] = "questions"  # what the prompts of calibrate's samples ask for: or "captions"
    given: ClassVar[frozenset[str]] = frozenset()  # on an instance: the fields it was made with, which no file may fill

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        names = [f.name for f in dataclasses.fields(cls)]
        object.__setattr__(self, "given", frozenset((*names[: len(args)], *kwargs)))
        return self

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, meta = getattr(self, f.name), f.metadata
            if value is None:
                continue
            if isinstance(value, list):  # methods are hashable
                object.__setattr__(self, f.name, tuple(value))
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if meta.get("choices") and value not in meta["choices"]:
                raise VlmFixError(
                    f"{self.name}: {f.name}={value!r} is not one of {', '.join(map(str, meta['choices']))}."
                )
            low, high = meta.get("low"), meta.get("high")
            if (low is not None or high is not None) and (
                not number
                or not math.isfinite(value)
                or (low is not None and (value < low or (meta.get("open") and value == low)))
                or (high is not None and value > high)
            ):
                span = (
                    f"between {low} and {high}"
                    if high is not None and low is not None
                    else f"at most {high}"
                    if low is None
                    else f"above {low}"
                    if meta.get("open")
                    else f"at least {low}"
                )
                raise VlmFixError(f"{self.name}: {f.name}={value!r} must be a number {span}.")

    def resolve(self, arch: Arch) -> Method:
        """A copy with the paper's defaults for this model filled in (layers as a tuple of indices)."""
        values = {k: v for k, v in self.defaults(arch).items() if getattr(self, k) is None}
        method = dataclasses.replace(self, **values)
        if any(f.name == "layers" for f in dataclasses.fields(method)):
            layers = parse_layers(getattr(method, "layers"), arch.depth, self.name)  # noqa: B009
            method = dataclasses.replace(method, **{"layers": layers})
        return method

    def but(self, **changes: Any) -> Self:
        """A copy with these fields changed, for which a calibration still fills the others (dataclasses.replace gives all)."""
        method = dataclasses.replace(self, **changes)
        object.__setattr__(method, "given", self.given | changes.keys())
        return method

    def defaults(self, arch: Arch) -> dict[str, Any]:
        """Values for the fields left at None, for this model."""
        return {}

    def encoder_layers(self, arch: Arch) -> tuple[int, ...] | None:
        """Vision layers whose attention scores this method needs; None: it does not look at the vision tower."""
        return None

    def prepare(self, session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Look at or change the language model's inputs (`inputs_embeds`, `position_ids`, ...) before each forward."""
        return kwargs

    @property
    def prepares(self) -> bool:
        """True if `prepare` does something with these parameters."""
        return type(self).prepare is not Method.prepare

    def calibrate(
        self, model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """Find this method's parameters for an unwrapped model: field name -> value, as `calibration.Calibration.found`.

        samples are labelled questions (`calibration.Sample`), on the model's device; seed is for whatever is drawn;
        progress(what, share done) is called now and then. The model is left as it was. Raises VlmFixError where nothing
        is found.
        """
        raise VlmFixError(
            f"{self.name} has nothing to find; search a strength with --search, as in --search alpha=0.1|0.2|0.5."
        )

    @property
    def neutral(self) -> bool:
        """True if these parameters change nothing: the engine then leaves the model's path untouched."""
        return False

    def spec(self) -> str:
        """The spec string that `parse_spec` turns back into this method."""
        changed = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                changed.append(f"{f.name}={'|'.join(map(str, value)) if isinstance(value, tuple) else value}")
        return self.name + (":" + ",".join(changed) if changed else "")

    @classmethod
    def from_options(cls, options: dict[str, str]) -> Method:
        """Build from text options, as in "pai:alpha=0.2,layers=2-31"; one sentence for an unknown name or bad value."""
        hints, values = typing.get_type_hints(cls), {}
        known = {f.name for f in dataclasses.fields(cls)}
        for key, text in options.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = (
                    f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(known)) or 'no parameters'}."
                )
                raise VlmFixError(f"{cls.name} has no parameter {key!r}; {hint}")
            values[key] = _coerce(text, hints[key], f"{cls.name}: {key}")
        return cls(**values)


def _coerce(text: str, hint: Any, where: str) -> Any:
    if hint == Layers:
        return text
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and text.lower() in ("none", "auto"):
        return None
    for option in options:
        try:
            if option is bool and text.lower() in ("true", "1", "yes", "on", "false", "0", "no", "off"):
                return text.lower() in ("true", "1", "yes", "on")
            if typing.get_origin(option) is tuple:
                return tuple(typing.get_args(option)[0](part) for part in text.split("|"))
            if option in (int, float, str):
                return option(text)
        except ValueError:
            continue
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options if o is not type(None))
    raise VlmFixError(f"{where}={text!r} is not a valid value; it takes {names}.")


def parse_layers(value: Layers, depth: int, where: str) -> tuple[int, ...]:
    """("1|18-31", 32) -> (1, 18, ..., 31). "2-" runs to the last layer.

    Raises VlmFixError for anything else or for layers the model does not have.
    """
    if value is None:
        return tuple(range(depth))
    if isinstance(value, str):
        indices: list[int] = []
        for part in value.split("|"):
            match = re.fullmatch(r"(\d+)(-(\d+)?)?", part.strip())
            if not match:
                raise VlmFixError(f'{where}: layers={value!r} is not of the form "2-31", "1|18-31" or "2-".')
            first = int(match[1])
            last = first if match[2] is None else depth - 1 if match[3] is None else int(match[3])
            if match[3] and last < first:
                raise VlmFixError(f"{where}: {part.strip()} in layers={value!r} is reversed; write {last}-{first}.")
            indices += range(first, last + 1)
    else:
        indices = [int(i) for i in value]
    outside = [i for i in indices if not 0 <= i < depth]
    if outside or not indices:
        raise VlmFixError(f"{where}: layers={value!r} does not fit this model, which has layers 0 to {depth - 1}.")
    return tuple(sorted(set(indices)))


def parse_heads(name: str, items: Sequence[str], arch: Arch) -> list[tuple[int, int]]:
    """("16.29", "26.9") -> [(16, 29), (26, 9)]; VlmFixError for a head that the model does not have."""
    heads = []
    for item in items:
        layer, _, head = item.partition(".")
        if not (layer.isdecimal() and head.isdecimal() and int(layer) < arch.depth and int(head) < arch.heads):
            raise VlmFixError(
                f"{name}: {item!r} is not layer.head; layers end at {arch.depth - 1}, heads at {arch.heads - 1}."
            )
        heads.append((int(layer), int(head)))
    return heads


@dataclass(frozen=True)
class Baseline(Method):
    """The model as it is."""

    name: ClassVar[str] = "baseline"
    kind: ClassVar[str] = "baseline"
    needs_image: ClassVar[bool] = False

    @property
    def neutral(self) -> bool:
        return True


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


@dataclass(frozen=True)
class HiddenEdit(Method):
    """Changes what a layer writes to the residual stream, on the rows named by `rows` (see AttentionEdit), in `layers`.

    Overwrite what you need; each gets and returns float32 [B, R, C] for R edited rows:
      attention_output(x, rows) -> what self-attention adds (after o_proj, and after the norm that some models put there)
      mlp_output(x, rows)       -> what the MLP adds
      layer_output(x, rows)     -> the residual stream after the layer
      sees                      -> layers in which it is called, if not `layers`
    """

    kind: ClassVar[str] = "hidden"
    idle_reason: ClassVar[str] = "no row of it was reached."
    layers: Layers = param(None, "language-model layers to edit")

    @property
    def rows(self) -> str:
        return "last"

    @property
    def sees(self) -> Sequence[int]:
        return self.layers  # type: ignore[return-value]

    def attention_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return x

    def mlp_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return x

    def layer_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return x

    def acted(self, session: Session) -> bool:
        """False if the finished session shows that nothing could be edited; the user is then told `idle_reason`."""
        return True

    @classmethod
    def edits(cls, what: str) -> bool:
        """True if the class overwrites `what` ("attention_output", "mlp_output", "layer_output")."""
        return getattr(cls, what) is not getattr(HiddenEdit, what)


@dataclass(frozen=True)
class Negative:
    """A second branch of a contrast: its prompt, and what it does to the prompt's image features.

    inputs: model inputs, as in `Call.inputs`; the vision tower runs again only if pixel_values is another tensor.
    features: [N, C] image embeddings of the whole batch, in order -> the same, changed.
    """

    inputs: dict[str, Any]
    features: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class Contrast(Method):
    """Contrasts the next-token distribution with that of a second branch with its own cache.

    A branch may have another prompt, other image features, or an attention edit that is active only in it: the method is
    then an AttentionEdit too, with branch="negative".
    """

    kind: ClassVar[str] = "contrast"

    @property
    def contrasts(self) -> bool:
        """False if these parameters need no second branch."""
        return not self.neutral

    @property
    def fork(self) -> int | None:
        """The layer up to whose input a branch with the main branch's own prompt equals it; None: no such layer."""
        return None

    def stays(self, session: Session) -> torch.Tensor | None:
        """[B, n] columns of a branch's prompt that its layers from `fork` on keep at all; None: every one."""
        return None

    @property
    def passes(self) -> int:
        """Forward passes per generated token, the model's own included: what an equal-compute baseline may spend."""
        return 2 if self.contrasts else 1

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        """Model inputs of the second branch's prompt: `call.inputs`, `call.without_images()`, `call.with_pixels(f)`, ..."""
        raise NotImplementedError

    def branches(self, call: Call) -> dict[str, Negative]:
        """The second branches by name; each has its own cache. An AttentionEdit asks for the name in `acts_in`."""
        return {"negative": Negative(self.negative(call))}

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        """[B, V] float32 log-probabilities of both branches -> unnormalised scores, -inf where cut off. Pure."""
        raise NotImplementedError

    def combine_at(self, step: int, l: torch.Tensor, *negatives: torch.Tensor) -> torch.Tensor:
        """`combine` after `step` generated tokens, for a strength that changes as the answer grows or several branches."""
        return self.combine(l, *negatives)


@dataclass(frozen=True)
class LogitEdit(Method):
    """Changes the next-token distribution of the one branch there is, after any contrast; acts in `generate` only."""

    kind: ClassVar[str] = "logits"
    needs_image: ClassVar[bool] = False

    @property
    def exits(self) -> tuple[int, ...]:
        """Layers whose input `step.exit` is asked for (entry i of transformers' hidden_states is layer i's input)."""
        return ()

    def edit(self, l: torch.Tensor, step: Step) -> torch.Tensor:
        """[B, V] float32 log-probabilities -> unnormalised scores, -inf where cut off. Pure."""
        raise NotImplementedError


@dataclass(frozen=True)
class Procedure(Method):
    """A small program around `generate`: other inputs for it, or tokens chosen by a search of its own."""

    kind: ClassVar[str] = "procedure"
    needs_image: ClassVar[bool] = False
    refuses: ClassVar[dict[str, str]] = {}
    """Options of `generate` it cannot serve -> what to do instead, as the end of a sentence."""

    def refine(self, call: Call) -> dict[str, Any]:
        """Inputs that take the place of those in `call.inputs` before anything is generated, such as pixel_values."""
        raise NotImplementedError

    def search(self, run: Search) -> Any:
        """Prefill, choose the tokens, return `run.output(...)`: what `generate` returns.

        `generate` still prepares inputs, processors and stopping.
        """
        raise NotImplementedError

    @classmethod
    def does(cls, what: str) -> bool:
        """True if the class overwrites `what` ("refine", "search")."""
        return getattr(cls, what) is not getattr(Procedure, what)


@dataclass(frozen=True)
class TokenPruner(Method):
    """Drops visual tokens before the language model."""

    kind: ClassVar[str] = "pruning"
    keep: float | None = param(None, "visual tokens kept per image: a count (> 1) or a share in (0, 1]", above=0)
    positions: str | None = param(
        None, "position ids of what is kept: re-numbered or as before (family default)", choices=("compact", "original")
    )

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        """Vision layers whose attention column scores `select` needs."""
        return ()

    def shrink(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Grid of tokens (h, w) of an image -> the grid that the vision tower shall make of it; for a smaller image."""
        return grid

    def select(self, image: Any) -> torch.Tensor:
        """`pruning.encoder.ImageTokens` of one image -> indices of the kept tokens, ascending."""
        raise NotImplementedError

    @classmethod
    def edits(cls, what: str) -> bool:
        """True if the class overwrites `what`."""
        return getattr(cls, what) is not getattr(TokenPruner, what)

    def budget(self, tokens: int) -> int:
        """Number of tokens kept out of `tokens`."""
        keep = 1.0 if self.keep is None else self.keep
        return max(1, min(tokens, round(keep * tokens) if keep <= 1 else int(keep)))
