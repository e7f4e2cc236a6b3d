"""The mutations: one wrong line each, with the test that has to notice it."""

from __future__ import annotations

from tests.mutations import method, use

MUTATIONS = method.MUTATIONS + use.MUTATIONS
