"""The case table is complete."""

import vlm_fix
from tests.support.cases import CASES, NEUTRAL, SPECS


def test_every_registered_method_has_a_case():
    registered = {method.name for method in vlm_fix.list_methods()}
    assert registered == set(CASES), "add the method to CASES in tests/support/cases.py"


def test_specs_of_a_case_are_of_its_method_and_neutral_ones_are_given():
    for name, case in CASES.items():
        assert case.neutral, f"{name} needs a spec that changes nothing"
        for spec in (*case.specs, *case.neutral):
            assert vlm_fix.parse_spec(spec).name == name
    assert not set(SPECS) & set(NEUTRAL) - {"baseline"}
