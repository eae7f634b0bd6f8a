"""docs/evaluation.md: its configuration is read, and it tells of every benchmark; its commands are in test_blocks.py."""

import re

import yaml

from tests.support.paths import ROOT
from vlm_fix import cli
from vlm_fix.cli.config import arguments
from vlm_fix.eval.scorers.registry import BENCHMARKS

TEXT = (ROOT / "docs/evaluation.md").read_text()
BLOCKS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
COMMANDS = [*BLOCKS, *re.findall(r"`(vlm-fix (?:eval|score) [^\s`]+ [^`]+)`", TEXT)]


def test_the_configuration_is_read_and_every_smaller_benchmark_is_told() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    parser = cli._parser().parse_args(["eval", "pope"]).parser
    args = parser.parse_args(arguments(parser, yaml.safe_load(text), "run.yaml"))
    assert (args.benchmark, args.batch_size, args.revision) == ("pope", "auto", "main")
    assert args.method == "pai,hiprune:keep=32+vcd" and args.gen_kwargs == '{"repetition_penalty": 1.05}'
    told = {command.split()[2] for command in COMMANDS if command.startswith("vlm-fix score")}
    assert told >= BENCHMARKS.keys() - {"amber", "mme", "hallusion"}
