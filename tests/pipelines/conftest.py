"""Shared by tests of the report: a run that has everything, and some that lack things."""

import pytest


@pytest.fixture(scope="session")
def reported(tmp_path_factory, ray_session):
    """A run with all that a report can show, and its report; tests read it or work on a copy."""
    from tests.pipelines.reported import make_reported

    return make_reported(tmp_path_factory.mktemp("reported"))


@pytest.fixture(scope="session")
def lacking(tmp_path_factory, ray_session):
    """Runs by what they lack, with their reports."""
    from tests.pipelines.reported import make_lacking

    return make_lacking(tmp_path_factory.mktemp("lacking"))


@pytest.fixture(scope="session")
def hostile(tmp_path_factory, ray_session):
    """A run whose names are made to break its report."""
    from tests.pipelines.reported import make_hostile

    return make_hostile(tmp_path_factory.mktemp("hostile"))
