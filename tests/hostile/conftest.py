import pytest

from tests.hostile.guard import Guard


@pytest.fixture(scope="session")
def guard():
    guard = Guard()
    yield guard
    guard.close()
