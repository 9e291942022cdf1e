"""The two servers, started once plain and once with parsers (or named by --heed and --vllm, then for all cases), and
the outcomes of all requests.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from fnmatch import fnmatchcase

import pytest

from tests.conformance.asking import Asking, Outcome
from tests.conformance.calls import with_tags
from tests.conformance.cases import CASES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--only", default="*", metavar="PATTERN", help="only the cases whose names match")
    parser.addoption("--heed", metavar="URL", help="our server, if it runs already with the suite's flags")
    parser.addoption("--vllm", metavar="URL", help="vLLM's server, if it runs already with the suite's flags")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", [case.name for case in chosen(metafunc.config)])


def chosen(config: pytest.Config) -> list:
    """The cases that are asked."""
    pattern = config.getoption("--only").replace("[", "[[]")
    return [case for case in CASES if fnmatchcase(case.name, pattern)]


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """By the case's name; everything is asked before the first is looked at."""
    heed, vllm = request.config.getoption("--heed"), request.config.getoption("--vllm")
    cases = chosen(request.config)
    if heed and vllm:
        yield told(Asking(heed, vllm).all(cases), 0.0)
        return
    from bench.serve_models import smollm2_float32
    from tests.conformance.servers import DidNotStart, running

    started, found = 0.0, {}
    try:
        for parsers in (False, True):
            asked = [case for case in cases if case.parsers == parsers]
            if not asked:
                continue
            folder = smollm2_float32()
            if parsers:
                folder = with_tags(folder, tmp_path_factory.mktemp("model"))
            begin = time.monotonic()
            with running(folder, tmp_path_factory.mktemp("logs"), parsers=parsers) as servers:
                started += time.monotonic() - begin
                found |= Asking(servers.heed, servers.vllm).all(asked)
    except (DidNotStart, SystemExit) as error:  # the latter: what they need cannot be made
        pytest.exit(str(error), returncode=2)
    yield told(found, started)


def told(found: dict[str, Outcome], started: float) -> dict[str, Outcome]:
    print(
        f"\n{len(found)} requests: {sum(not one.failures and not one.agreed for one in found.values())} equal, "
        f"{sum(not one.failures and bool(one.agreed) for one in found.values())} with agreed differences, "
        f"{sum(one.near_tie for one in found.values())} near ties, {sum(bool(one.failures) for one in found.values())} "
        f"failed; both servers were up after {started:.0f} s."
    )
    return found
