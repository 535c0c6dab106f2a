"""Errors that mean a full disk, however deep they lie."""

import errno

from fedfuse_shared.errors import DataError
from fedfuse_shared.files import is_disk_full


def test_a_full_disk_is_found_below_other_errors():
    outer = DataError("cannot be written")
    outer.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert is_disk_full(outer)
    assert not is_disk_full(DataError("is no image"))


def test_an_error_that_is_its_own_cause_ends_the_search():
    problem = DataError("is no image")
    problem.__cause__ = problem
    assert not is_disk_full(problem)
