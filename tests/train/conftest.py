from __future__ import annotations

import pytest

from crosslayer.data import PreparedData
from tests.train.runs import prepare_corpus


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))
