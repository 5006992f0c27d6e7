# SPDX-License-Identifier: Apache-2.0
"""Drafts from other requests' blocks: the pool scope "salt"."""

from tests.harness import corpus_jobs
from tests.harness.engines import Engines


def test_salts_never_meet(engines: Engines) -> None:
    corpus_jobs.salts_never_meet(engines)


def test_others_are_drafted(engines: Engines) -> None:
    corpus_jobs.others_are_drafted(engines)
