"""What a benchmark declares about itself, for the tables, the report page and the command line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, get_args

from vlm_fix.eval.files import counted
from vlm_fix.eval.stats import Metric

from .choices import Labels, Scorer, Variant
from .result import Result

Settings: TypeAlias = Mapping[str, Any]
"""`settings` of results.json."""
Data: TypeAlias = Mapping[str, Any]
"""What results.json says about the data of one task."""


class Mark(NamedTuple):
    """A word of a caption, caption[start:end], that the scorer counted: the object it names, and how it was judged."""

    start: int
    end: int
    node: str
    right: bool
    reason: str


@dataclass(frozen=True)
class YesNo:
    """How the answers to yes/no questions are judged and drawn on the report page.

    `verdict` maps (answer, label, scorer) to yes, no or unknown. `accuracy` is the metric drawn against the yes-ratio,
    `balanced` says that half of the labels are yes. `total` names the part with all answers; where there is none, all
    parts are averaged except those in `groups`, which only show answers again that are in others.
    """

    verdict: Callable[[str | None, str, Scorer], str]
    accuracy: str = "accuracy"
    balanced: bool = False
    total: str = ""
    groups: Collection[str] = ()


@dataclass(frozen=True)
class Choice:
    """How the answers to questions with lettered choices are judged: `verdict` maps (answer, label, scorer) to a letter."""

    verdict: Callable[[str | None, str, Scorer], str]
    accuracy: str = "accuracy"


@dataclass(frozen=True)
class Captions:
    """How captions are judged and drawn on the report page.

    `mark` maps (row of samples.jsonl, data) to the marked words and the number of hallucinated ones. The metric
    `invented`, called `heading`, is drawn against the metric `found`; with `drawn` also in figure.png. `at_equal_length`
    returns the rows of two results with each pair of captions cut to the same length, `at_share` those of one result with
    each caption cut to a share of its words.
    """

    mark: Callable[[Mapping[str, Any], Data], tuple[list[Mark], int]]
    found: str
    invented: str
    heading: str
    drawn: bool = False
    at_equal_length: Callable[[Any, Any], tuple[list[dict[str, Any]], list[dict[str, Any]]]] | None = None
    at_share: Callable[[Any, float], list[dict[str, Any]]] | None = None


class Gain(NamedTuple):
    """The gain that the report page draws against time: a metric, 1 or -1 if lower is better, and the axis label."""

    metric: str
    sign: int
    label: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the numbers of one task are compared with the baseline's and shown.

    `columns` are the metrics of its table with their headings; `compared` those with an interval against the baseline;
    `right` tells from a row's counts whether that sample is right (for McNemar's test); `caption` maps (settings, data)
    to one line about what was measured. `leaderboard` are the metrics of the short table with their headings ("" means
    the task and split), `leaderboard_means` those averaged over splits.
    """

    columns: Mapping[str, str]
    metrics: Mapping[str, Metric]
    compared: tuple[str, ...]
    right: Callable[[Mapping[str, Any]], Any]
    caption: Callable[[Settings, Data], str]
    answers: YesNo | Choice | Captions
    leaderboard: Mapping[str, str]
    leaderboard_means: Mapping[str, str] = field(default_factory=dict)
    gain: Gain | None = None


@dataclass(frozen=True)
class Overall:
    """A figure over two tasks of a benchmark; it stands in the table of the first, under its part `part`."""

    metrics: Mapping[str, Metric]
    tasks: tuple[str, str]
    part: str
    combine: Callable[[Result, Result], Result]


@dataclass(frozen=True)
class Argument:
    """An argument of `vlm-fix score NAME`, as argparse's `add_argument` takes it."""

    name: str
    options: Mapping[str, Any]

    @property
    def dest(self) -> str:
        """The keyword of `Benchmark.results` that gets the value."""
        return self.name.lstrip("-").replace("-", "_")


def figures_of(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return part -> figures, of tasks whose parts have different names."""
    parts = [(part, result.to_dict()) for parts in found.values() for part, result in parts.items()]
    assert len(dict(parts)) == len(parts), found.keys()
    return dict(parts)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark, as `vlm-fix eval NAME` and `vlm-fix score NAME` know it.

    `commits` maps a scorer or variant to the code that it follows, `source_commit` is that of the benchmark's own script.
    `results` gets the values of `arguments` by keyword, and `tell`, which prints a line about what was read. It returns task ->
    part -> result with its rows, in an order that does not depend on that of the file; `answers` names the argument with the
    answers. `shown` makes of them what `vlm-fix score` prints: one result, or a dictionary with the figures of each part and
    perhaps a number for the whole. `layouts` are by task; AMBER and Reefknot have two, the others one. `asked` says whether
    `vlm-fix eval` asks it.
    """

    name: str
    title: str
    source_commit: str
    commits: Mapping[str, str]
    score_what: str
    arguments: tuple[Argument, ...]
    results: Callable[..., dict[str, dict[str, Any]]]
    shown: Callable[[dict[str, dict[str, Any]]], Any] = figures_of
    answers: str = "answers"
    asked: bool = True
    layouts: Mapping[str, Layout]
    overall: Overall | None = None

    def score_files(self, *files: str, **given: Any) -> Any:
        """Score an answer file: what `shown` makes of its results."""
        return self.shown(self.results(*files, **given))


KEYS = (
    Argument("--answer-key", {"metavar": "KEY", "help": "column or key of the reply, where rows offer several"}),
    Argument("--id-key", {"metavar": "KEY", "help": "column or key of the id, where rows offer several"}),
)
"""For benchmarks that read answers with `answers.read`."""


def scorer_option(default: Scorer | None = "official", help: str = "(%(default)s)") -> Argument:
    """--scorer, for benchmarks with yes/no answers."""
    return Argument("--scorer", {"choices": get_args(Scorer), "default": default, "help": help})


def labels_option() -> Argument:
    """--labels, for POPE's questions."""
    help = "POPE's, RePOPE's corrected ones, or both where the questions are POPE's about COCO (%(default)s)"
    return Argument("--labels", {"choices": get_args(Labels), "default": "both", "help": help})


def variant_option(help: str = "(nltk)") -> Argument:
    """--variant, for benchmarks with captions; None, where it is not given, is nltk."""
    return Argument("--variant", {"choices": get_args(Variant), "help": help})


def plain_caption(title: str) -> Callable[[Settings, Data], str]:
    """Return the usual `Layout.caption`: title, source, number of images and scorer."""
    return lambda _, data: f"{title}: {data['source']}; {counted(data['images'], 'image')}; scorer {data['variant']}"


YES_NO_COLUMNS = {"precision": "prec.", "recall": "recall", "f1": "F1", "yes_ratio": "yes", "unparsed": "unp."}
