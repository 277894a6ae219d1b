"""Pipelines in miniature that the tests of attention share within a module."""

import pytest
from tiny import tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl

PIPES = {"sd": tiny_sd, "sdxl": tiny_sdxl, "pixart": tiny_pixart, "sd3": tiny_sd3,
         "sd3-dual": lambda: tiny_sd3(dual_attention=True), "flux": tiny_flux}


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


@pytest.fixture(scope="module", params=PIPES)
def pipe(request):
    return PIPES[request.param]()
