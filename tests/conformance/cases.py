"""All requests of the suite, in one list; every module with a table of its own is named here."""

from __future__ import annotations

from tests.conformance import calls, fields, further, structured, written
from tests.conformance.case import Case

CASES: list[Case] = [*fields.cases(), *written.CASES, *further.CASES, *structured.CASES, *calls.CASES]
