from typing import Literal

import pytest

from unirl.algorithms.choices import require_choice

Colour = Literal["red", "blue"]


def test_a_listed_name_passes():
    require_choice("colour", "red", Colour)


def test_another_name_is_an_error_that_lists_the_key_and_the_choices():
    with pytest.raises(ValueError, match="expected colour among red, blue; got 'green'"):
        require_choice("colour", "green", Colour)
