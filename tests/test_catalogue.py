"""The catalogue is complete, and every row that names a class agrees with it."""

import pickle
import re
from dataclasses import MISSING

import pytest

from tokenry.catalogue import BY_SLUG, BY_TARGET, FAMILIES, ROWS, Paper
from tokenry.methods import load_class, method, parameters

ROLE = {
    "generation": "decoder",
    "decoding": "decoder",
    "speculation": "decoder",
    "kvcache": "policy",
    "peers": "peer",
}
# Methods whose role is not their family's.
OWN_ROLE = {
    "adaspec": "trainer",
    "any-subset-speculative-decoding": "infiller",
    "parallel-generation-survey": "chooser",
}
AVAILABLE = [row for row in ROWS if row.available]


def test_holds_73_papers():
    papers = [row.paper for row in ROWS if row.kind == "paper"]
    assert len(papers) == 73
    assert len({paper.arxiv for paper in papers}) == 73
    assert all(re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv) for paper in papers)
    # A revision can be dated later than the id; nothing is dated earlier.
    assert all(paper.year >= 2000 + int(paper.arxiv[:2]) for paper in papers)


def test_names_are_unique_and_readable():
    assert len(BY_SLUG) == len(ROWS)
    assert len(BY_TARGET) == len(AVAILABLE)
    assert all(re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", slug) for slug in BY_SLUG)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)
def test_row_is_filled_in(row):
    assert row.family in FAMILIES
    assert row.needs and row.cost
    assert row.summary.endswith(".")
    assert row.paper is None or row.paper.code is None or re.fullmatch(r"[\w.-]+/[\w.-]+", row.paper.code)
    assert row.kind != "paper" or row.paper is not None


def test_paper_prints_as_a_reference():
    assert str(Paper("A Title", "2301.00001", 2023)) == "A Title, arXiv 2301.00001, 2023"
    assert str(Paper("A Title", None, 2023)) == "A Title, 2023"


@pytest.mark.parametrize("row", AVAILABLE, ids=lambda row: row.slug)
def test_row_agrees_with_its_class(row):
    cls = load_class(row.slug)
    assert cls.slug == row.slug
    assert cls.paper == row.paper
    assert cls.role == OWN_ROLE.get(row.slug, ROLE[row.family])
    assert cls.__doc__
    assert set(cls.resources) <= set(parameters(cls))


@pytest.mark.parametrize("row", AVAILABLE, ids=lambda row: row.slug)
def test_defaults_round_trip(row):
    cls = load_class(row.slug)
    made = cls(**{p.name: "x" for p in parameters(cls).values() if p.default is MISSING})
    assert method(str(made)) == made
    assert pickle.loads(pickle.dumps(made)) == made
