"""selection: the least error within the budget, by brute force; every form can be chosen."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.quant.feature_selection import TABLE, TIB, Candidate, cache_name, select

USES = {"a": ("mlp", "proj_a"), "b": ("mlp", "proj_b"), "c": ("other",)}
MODULES = {"mlp": 1000, "proj_a": 100, "proj_b": 150, "other": 70}


def total(choice, candidates, uses, modules):
    """Error and bytes of a choice; layers that several features share count once."""
    needed = set().union(*(uses[f] for f, form in choice.items() if form == TIB))
    picked = [candidates[f][form] for f, form in choice.items()]
    return (
        sum(c.error for c in picked),
        sum(c.bytes for c in picked) + sum(modules[m] for m in needed),
    )


def every_choice(candidates):
    for forms in itertools.product(*candidates.values()):
        yield dict(zip(candidates, forms, strict=True))


@st.composite
def problems(draw):
    """A few features with some of the four forms each, at the scale of small or large models."""
    unit = draw(st.sampled_from((1, 1000, 1_000_000)))
    size = st.integers(0, 999).map(lambda n: n * unit)
    error = st.integers(0, 1000).map(lambda n: n / 10_000)
    modules = {m: draw(size) for m in MODULES}
    candidates = {}
    for feature in draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True)):
        forms = draw(
            st.lists(st.sampled_from((TIB, TABLE, "cache8", "cache4")), min_size=1, unique=True)
        )
        candidates[feature] = {
            form: Candidate(draw(error), 0 if form == TIB else draw(size)) for form in forms
        }
    return candidates, modules, draw(st.integers(0, 2000)) * unit


@settings(deadline=None, max_examples=100)
@given(problem=problems())
def test_the_choice_is_the_best_by_brute_force(problem):
    candidates, modules, budget = problem
    scores = [total(c, candidates, USES, modules) for c in every_choice(candidates)]
    fitting = [error for error, size in scores if size <= budget]
    if not fitting:
        least = min(size for _, size in scores)
        with pytest.raises(ConfigError, match=rf"budget of {budget} bytes .* takes {least} bytes"):
            select(candidates, uses=USES, module_bytes=modules, budget=budget)
        return
    choice = select(candidates, uses=USES, module_bytes=modules, budget=budget)
    error, size = total(choice, candidates, USES, modules)
    assert size <= budget
    # errors are multiples of 1e-4 here: anything but the optimum is off by at least that
    assert error <= min(fitting) + 1e-6


def options(table=None, cache8=None, cache4=None, tib=None):
    made = {}
    for name, pair in (
        (TABLE, table),
        (cache_name(8), cache8),
        (cache_name(4), cache4),
        (TIB, tib),
    ):
        if pair is not None:
            made[name] = Candidate(*pair)
    return made


FORMS = {
    "a": options(table=(0.0, 4000), cache8=(0.005, 1000), cache4=(0.08, 500), tib=(0.003, 0)),
    "b": options(table=(0.0, 4000), cache8=(0.004, 1000), cache4=(0.07, 500), tib=(0.006, 0)),
}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (8000, {"a": TABLE, "b": TABLE}),
        (5100, {"a": TIB, "b": TABLE}),  # 1100 + 4000, error 0.003
        (5099, {"a": TABLE, "b": "cache8"}),  # 4000 + 1000, error 0.004
        (2100, {"a": TIB, "b": "cache8"}),  # 1100 + 1000
        (
            2099,
            {"a": TIB, "b": TIB},
        ),  # 1250: the shared layer is paid for once; ties with two caches
        (1249, {"a": "cache4", "b": "cache4"}),  # one cache8 takes 1500
        (1000, {"a": "cache4", "b": "cache4"}),
    ],
)
def test_every_form_is_reached_as_the_budget_shrinks(budget, expected):
    uses = {"a": USES["a"], "b": USES["b"]}
    choice = select(FORMS, uses=uses, module_bytes=MODULES, budget=budget)
    found = total(choice, FORMS, uses, MODULES)
    wanted = total(expected, FORMS, uses, MODULES)
    assert choice == expected, (found, wanted)


def test_a_budget_that_cannot_be_met_names_the_least():
    uses = {"a": USES["a"], "b": USES["b"]}
    with pytest.raises(ConfigError, match=r"budget of 999 bytes cannot be met.*takes 1000 bytes"):
        select(FORMS, uses=uses, module_bytes=MODULES, budget=999)


def test_of_equal_errors_the_smaller_is_taken():
    candidates = {"a": options(table=(0.01, 5000), cache8=(0.01, 100))}
    choice = select(candidates, uses={"a": ()}, module_bytes={}, budget=10**6)
    assert choice == {"a": "cache8"}


def test_bytes_do_not_outweigh_errors_in_large_models():
    candidates = {"a": options(table=(0.0, 400_000_000), cache8=(0.004, 100_000_000))}
    choice = select(candidates, uses={"a": ()}, module_bytes={}, budget=10**9)
    assert choice == {"a": TABLE}
