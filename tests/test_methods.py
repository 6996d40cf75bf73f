"""The text form, the registry and its error messages, with methods that a package outside registers."""

import logging
import pickle
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tokenry
from tokenry.errors import BadMethod, BadParameter, BudgetTooSmall, MethodNotFound, TokenryError
from tokenry.methods import Combination, describe, find, load_class, parameters, rows, split_methods

SOURCE = '''
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from tokenry.errors import BudgetTooSmall
from tokenry.methods import Method


@dataclass(frozen=True, kw_only=True)
class Speaker(Method):
    """A decoder with a field of every kind."""

    role: ClassVar[str] = "decoder"
    resources: ClassVar[tuple[str, ...]] = ("draft",)
    count: int = 3
    rate: float = 0.5
    greedy: bool = False
    draft: str = "model"
    table: str | None = None
    size: int | Literal["auto"] = "auto"
    mixed: bool | int | float | str | None = None
    layers: tuple[int, ...] = (1, 2)
    pair: tuple[str, float] = ("a", 1.0)


@dataclass(frozen=True, kw_only=True)
class Keeper(Method):
    """A policy."""

    role: ClassVar[str] = "policy"
    budget: int = 256

    def validate(self) -> None:
        self.check("budget", "at least 4", self.budget >= 4, BudgetTooSmall, "the sinks hold 4 slots")


@dataclass(frozen=True, kw_only=True)
class Needy(Method):
    """A decoder that must be told its draft."""

    role: ClassVar[str] = "decoder"
    draft: str


@dataclass(frozen=True, kw_only=True)
class Base(Method, ABC):
    role: ClassVar[str] = "decoder"

    @abstractmethod
    def step(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Other(Keeper):
    slug: ClassVar[str] = "another-name"


@dataclass(frozen=True, kw_only=True)
class Roleless(Method):
    pass


@dataclass(frozen=True, kw_only=True)
class Listed(Keeper):
    kept: list[int] = ()


class Undecorated(Keeper):
    pass
'''

ENTRY_POINTS = """
[tokenry.methods]
speaker = outside:Speaker
keeper = outside:Keeper
needy = outside:Needy
base = outside:Base
misnamed = outside:Other
roleless = outside:Roleless
listed = outside:Listed
undecorated = outside:Undecorated
not-a-method = outside:dataclass
missing-class = outside:Nothing
missing-module = outside_missing:Nothing
h2o = outside:Keeper
"""


@pytest.fixture(scope="module", autouse=True)
def outside(tmp_path_factory):
    """Install a package that registers methods; return its module."""
    root = tmp_path_factory.mktemp("outside")
    (root / "outside.py").write_text(SOURCE)
    info = root / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        import outside

        yield outside
    del sys.modules["outside"]


# Every text, finite number and tuple that the fields of Speaker can hold.
TEXTS = st.text() | st.text("a;+,()\"\\'=: \n") | st.sampled_from(["none", "true", "3", "1e5", "auto", "(1)"])
FLOATS = st.floats(allow_nan=False)
SPEAKERS = st.fixed_dictionaries(
    {},
    optional={
        "count": st.integers(),
        "rate": FLOATS,
        "greedy": st.booleans(),
        "draft": TEXTS,
        "table": st.none() | TEXTS,
        "size": st.just("auto") | st.integers(),
        "mixed": st.none() | st.booleans() | st.integers() | FLOATS | TEXTS,
        "layers": st.lists(st.integers()).map(tuple),
        "pair": st.tuples(TEXTS, FLOATS),
    },
)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=SPEAKERS, budget=st.integers(4, 1000))
def test_text_form_and_method_are_inverse(outside, values, budget):
    speaker = outside.Speaker(**values)
    pair = Combination(speaker, outside.Keeper(budget=budget))
    for made in (pair, speaker):
        again = tokenry.method(str(made))
        assert again == made
        assert str(again) == str(made)
    assert split_methods(f"plain,{pair},{speaker}") == ["plain", str(pair), str(speaker)]
    assert type(again.mixed) is type(speaker.mixed)


def test_text_form_prints_only_what_differs(outside):
    assert str(outside.Speaker()) == "speaker"
    made = outside.Speaker(count=5, rate=1e20, greedy=True, table="a+b", layers=[7], mixed="none")
    text = 'speaker:count=5;rate=1e20;greedy=true;table="a+b";mixed="none";layers=(7)'
    assert str(made) == text


@pytest.mark.parametrize(
    "text",
    [
        "speaker:count=5;rate=1.0",
        "speaker(count=5, rate=1)",
        "speaker(count=5; rate=1,)",
        "  speaker : count = 5 ; rate = 1e+0 ",
        'speaker:count=5;rate=1;draft="model"',
    ],
)
def test_every_way_of_writing_is_read(outside, text):
    assert tokenry.method(text) == outside.Speaker(count=5, rate=1.0)


def test_values_are_brought_to_their_types(outside):
    made = outside.Speaker(rate=1, layers=[1, 2, 3], mixed=1.0)
    assert (made.rate, made.layers, type(made.rate), type(made.mixed)) == (1.0, (1, 2, 3), float, float)
    assert hash(made) == hash(outside.Speaker(rate=1.0, layers=(1, 2, 3), mixed=1.0))


def test_combination_is_read_in_either_order(outside):
    pair = Combination(outside.Speaker(), outside.Keeper(budget=8))
    assert tokenry.method("keeper:budget=8+speaker") == tokenry.method("speaker+keeper(budget=8)") == pair
    assert str(pair) == "speaker+keeper:budget=8"
    assert pickle.loads(pickle.dumps(pair)) == pair
    assert tokenry.method(pair) is pair


def test_list_is_split_outside_parentheses_and_quotes():
    assert split_methods('plain, h2o(budget=8, recent=1) ,x:a=(1,2);b="c,d"') == [
        "plain",
        "h2o(budget=8, recent=1)",
        'x:a=(1,2);b="c,d"',
    ]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "token-recycle",
            MethodNotFound,
            "no method is called 'token-recycle' (did you mean token-recycling?); `tokenry",
        ),
        ("H2O", MethodNotFound, "(did you mean h2o?); `tokenry methods` lists all"),
        ("speeker", MethodNotFound, "did you mean speaker?"),
        ("zzzzzz", MethodNotFound, "no method is called 'zzzzzz'; `tokenry methods` lists all"),
        ("titok", MethodNotFound, "titok ("),
        ("titok", MethodNotFound, "is in the catalogue but not available yet"),
        (
            "keeper:budgt=8",
            BadParameter,
            "keeper has no parameter 'budgt' (did you mean budget?); parameters: ",
        ),
        ("keeper:x=8", BadParameter, "keeper has no parameter 'x'; parameters: budget=256"),
        ("keeper:budget=8;budget=9", BadParameter, "budget is given twice"),
        ("keeper:budget", BadParameter, "cannot read 'budget' as a parameter; write key=value"),
        ("keeper:budget=8;", BadParameter, "cannot read '' as a parameter"),
        ("keeper:budget=many", BadParameter, "budget=many is not allowed; budget must be an integer"),
        ("keeper:budget=1.5", BadParameter, "budget must be an integer"),
        ('keeper:budget="8"', BadParameter, "budget must be an integer"),
        (
            "keeper:budget=3",
            BudgetTooSmall,
            "budget=3 is not allowed; budget must be at least 4, because the",
        ),
        ("speaker:size=big", BadParameter, "size must be auto or an integer"),
        ("speaker:layers=3", BadParameter, "layers must be a tuple such as (1,2)"),
        ("speaker:pair=(a)", BadParameter, "pair must be a tuple"),
        ("speaker:greedy=1", BadParameter, "greedy must be true or false"),
        ("speaker:draft=a,b", BadParameter, "draft must be text (quote text that holds any of"),
        ("speaker:mixed=", BadParameter, "mixed must be none, true or false, an integer, a number or text"),
        ("needy", BadParameter, "needy needs draft; write needy:draft=..."),
        ("speaker+needy:draft=a", BadParameter, "it joins speaker (decoder) and needy (decoder)"),
        ("keeper+keeper", BadParameter, "join at most one decoder or drafter and one cache policy"),
        ("speaker+keeper+keeper", BadParameter, "cannot be combined"),
        ("speaker+", BadParameter, "cannot read '' as a method; write name"),
        ("", BadParameter, "cannot read '' as a method"),
        ("keeper:", BadParameter, "cannot read 'keeper:' as a method"),
        ("keeper(budget=8", BadParameter, "a parenthesis has no partner"),
        ("keeper:budget=8)", BadParameter, "a parenthesis has no partner"),
        ('speaker:draft="a', BadParameter, "a quote has no partner"),
        (3, BadParameter, "3 is not a method; give its name as text"),
    ],
)
def test_bad_text_is_explained(text, error, message):
    with pytest.raises(error) as caught:
        tokenry.method(text)
    assert message in str(caught.value)
    assert type(caught.value) is error


@pytest.mark.parametrize("text", ["plain,,h2o", "plain,", ""])
def test_empty_place_in_a_list_is_explained(text):
    with pytest.raises(BadParameter, match="empty place in its list of methods"):
        split_methods(text)


def test_bad_values_are_refused_on_construction(outside):
    with pytest.raises(BadParameter, match="keeper: budget='8' is not allowed; budget must be an integer"):
        outside.Keeper(budget="8")
    with pytest.raises(BadParameter, match="budget=True is not allowed"):
        outside.Keeper(budget=True)
    with pytest.raises(BudgetTooSmall, match="at least 4, because the sinks hold 4 slots"):
        outside.Keeper(budget=3)
    with pytest.raises(BadParameter, match="keeper cannot be the decoder of a combination"):
        Combination(outside.Keeper(), outside.Speaker())


@pytest.mark.parametrize(
    ("slug", "message"),
    [
        ("h2o", "'h2o' is claimed by outside and Tokenry's catalogue; a package may not take a name"),
        ("base", "is abstract"),
        ("misnamed", "calls itself 'another-name'"),
        ("roleless", "has the role '', not decoder or policy or peer"),
        ("undecorated", "is not a dataclass"),
        ("not-a-method", "is not a subclass of tokenry.Method"),
        ("missing-class", "cannot load outside:Nothing"),
        ("missing-module", "No module named 'outside_missing'"),
        ("listed", "the type list[int] of a method's parameter has no text form"),
    ],
)
def test_package_that_breaks_the_rules_is_refused(slug, message):
    with pytest.raises(BadMethod) as caught:
        tokenry.method(slug)
    assert message in str(caught.value)


def test_rows_list_the_outside_package_and_leave_out_a_shadow(caplog):
    with caplog.at_level(logging.WARNING, "tokenry.methods"):
        listed = {row.slug: row for row in rows()}
    assert listed["speaker"].summary == "Registered by the package outside."
    assert listed["speaker"].kind == "external"
    assert listed["h2o"].kind == "paper"
    assert "'h2o' is claimed by" in caplog.text
    assert "titok" not in listed
    assert "titok" in {row.slug for row in rows(unavailable=True)}


def test_describe_says_what_a_user_should_know():
    assert describe("speaker").splitlines()[:2] == ["speaker", "Registered by the package outside."]
    assert "size=auto, mixed=none, layers=(1,2), pair=(a,1.0)" in describe("speaker")
    assert describe("needy").endswith("parameters: draft")
    lines = describe("keyformer").splitlines()
    assert lines[0] == "keyformer (kvcache: which past tokens stay)"
    assert lines[2].startswith("paper: Keyformer: KV Cache Reduction")
    assert lines[2].endswith("arXiv 2403.09054, 2024, github.com/d-matrix-ai/keyformer-llm")
    assert describe("titok").splitlines()[-1] == "not available yet"


def test_class_carries_its_name_and_a_subclass_does_not_inherit_it(outside):
    assert load_class("speaker") is outside.Speaker
    assert find("speaker").target == "outside:Speaker"
    assert list(parameters(outside.Keeper)) == ["budget"]

    class Local(outside.Keeper):
        pass

    assert str(Local(budget=8)) == "Local:budget=8"


def test_errors_are_tokenry_errors_and_the_fitting_builtin():
    for error in vars(sys.modules["tokenry.errors"]).values():
        if isinstance(error, type) and error is not TokenryError:
            made = error("what was given")
            assert isinstance(made, TokenryError)
            assert issubclass(error, ValueError | LookupError | TypeError | RuntimeError | OSError)
            assert str(pickle.loads(pickle.dumps(made))) == "what was given"


LIGHT = """
import sys, tokenry, tokenry.methods
tokenry.TokenryError, tokenry.Method, tokenry.Paper, dir(tokenry)
tokenry.methods.rows(unavailable=True), tokenry.methods.find("h2o"), tokenry.methods.split_methods("a,b")
heavy = {"torch", "transformers", "rich", "numpy", "typer"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def test_importing_and_listing_stay_light():
    subprocess.run([sys.executable, "-c", LIGHT], check=True)


def test_public_names():
    assert {"load", "path", "generate", "compare", "method", "Method", "Paper"} <= set(tokenry.__all__)
    assert set(tokenry.__all__) <= set(dir(tokenry))
    with pytest.raises(AttributeError, match="module 'tokenry' has no attribute 'nothing'"):
        tokenry.nothing  # noqa: B018
