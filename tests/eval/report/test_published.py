"""The published figures: well-formed, never without a source, and set beside ours with what differs."""

import json

import pytest

from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.report import published

OPTIONAL = {
    "baseline",
    "baseline_is",
    "split",
    "model",
    "decoding",
    "max_new_tokens",
    "scorer",
    "images",
    "settings",
    "note",
}


def test_every_figure_has_a_source_a_status_and_a_sane_value():
    for row in published.table():
        assert set(row) - OPTIONAL == {"method", "benchmark", "metrics", "source", "status"} and row["source"], row
        assert row["status"] in ("C", "P", "N") and row.get("split", "mean") in (
            "random",
            "popular",
            "adversarial",
            "mean",
        )
        assert set(row["metrics"]) <= set(published.NAMES)
        assert set(row.get("baseline", row["metrics"])) == set(row["metrics"])
        high = 3000 if row["benchmark"] == "mme" else 100
        assert all(0 < value < high for side in ("metrics", "baseline") for value in row.get(side, {}).values())
    keys = [json.dumps(row, sort_keys=True) for row in published.table()]
    assert len(set(keys)) == len(keys)


def test_the_command_filters_and_fits_100_columns(capsys):
    assert cli.main(["published"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    assert cli.main(["published", "--method", "vcd,iri", "--benchmark", "pope", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["method"] for row in rows} == {"vcd", "iri"} and {row["benchmark"] for row in rows} == {"pope"}
    vcd = next(
        row for row in rows if row["method"] == "vcd" and row.get("decoding") == "sampling" and "f1" in row["metrics"]
    )
    assert (vcd["metrics"]["accuracy"], vcd["baseline"]["accuracy"], vcd["split"]) == (87.73, 83.29, "random")
    for wrong in (["--method", "nosuch"], ["--benchmark", "nosuch"], ["--model", "nosuch"]):
        assert cli.main(["published", *wrong]) == 2
        assert "no figures are kept for" in capsys.readouterr().err


def results(**settings):
    """Results of vcd and of a stack on two POPE splits, with figures to be recognised."""

    def scores(accuracy):
        return {"accuracy": accuracy, "f1": accuracy, "yes_ratio": 0.5, "delta": {}}

    vcd = {"random": scores(0.75), "popular": scores(0.65)}
    vcd["random"]["delta"] = {"accuracy": {"low": 0.01, "high": 0.09}}
    return {
        "settings": {
            "methods": [["vcd"], ["vcd", "pai"], ["gift"]],
            "data": {"pope": {"source": "here"}},
            "model": {"name": "llava-hf/llava-1.5-7b-hf"},
            "scorer": "official",
            "max_new_tokens": None,
            "sample": False,
            "num_beams": 1,
        }
        | settings,
        "runs": {
            "baseline": {"pope": {"random": scores(0.7), "popular": scores(0.6)}},
            "vcd": {"pope": vcd},
            "vcd+pai": {"pope": vcd},
            "gift": {"pope": {"random": scores(0.8), "popular": scores(0.6)}},
        },
    }


def test_our_run_stands_beside_with_its_interval_and_what_differs():
    lines = published.compare(results())
    assert {line["method"] for line in lines} == {"vcd", "gift"}  # figures of one method say nothing about a stack
    first = lines[0]
    assert first["benchmark"] == "POPE random"
    assert first["published"].splitlines()[0] == "accuracy 83.29 > 87.73 (+4.44)"
    assert first["ours"].splitlines() == ["accuracy 70.0 > 75.0 (+5.0 [1.0, 9.0])", "F1 70.0 > 75.0 (+5.0)"]
    told = first["where the setups differ"].splitlines()
    assert told[0] == "model: LLaVA-1.5 there, llava-hf/llava-1.5-7b-hf here"
    assert told[1] == "decoding: sampling there, greedy here" and told[-1].startswith("from the VCD paper")
    assert "not known of it: max new tokens, scorer" in told
    gift = next(line for line in lines if line["method"] == "gift")
    assert gift["benchmark"] == "POPE (here: mean of 2 splits)"
    assert gift["ours"].splitlines()[0] == "accuracy 65.0 > 70.0 (+5.0)"
    assert "model" not in gift["where the setups differ"] and "split" in gift["where the setups differ"]
    assert not any("adversarial" in line["benchmark"] for line in lines)  # was not run
    sampled = published.compare(results(sample=True))[0]["where the setups differ"]
    assert "decoding" not in sampled


def test_settings_are_compared_by_the_parameters_that_a_row_names():
    for row in published.table():
        if "settings" in row:
            assert published._same_settings(row, f"{row['method']}:{row['settings']}"), row
    for method, there, here, same in (
        ("vista", "lam=0.17,alpha=0.3", "vista", True),  # its defaults
        ("vista", "lam=0.17,alpha=0.3", "vista:lam=0.2", False),
        ("rudder", "gated=false", "rudder:gated=false", True),
        ("rudder", "gated=false", "rudder:gated=true", False),
        ("divprune", "keep=64", "divprune:keep=640", False),
        ("divprune", "keep=64", "divprune:keep=64.0", True),
    ):
        assert published._same_settings({"method": method, "settings": there}, here) is same, (there, here)


def test_unknown_names_are_refused_with_what_there_is():
    with pytest.raises(VlmFixError, match="method 'nosuch'; there are some for var"):
        published.select("nosuch")
