"""Parser of flags and YAML files, which can also unset an argument."""

import argparse
import types
from collections.abc import Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from trl import TrlParser


NULL, NONE = "null", "none"


class RecipeParser(TrlParser):
    """
    [`~trl.TrlParser`] on whose command line `null` (or `none`, where that is no value of its own) stands for None, as `null`
    does in YAML: `--rationale null` leaves out what the `--config` sets.
    """

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        # Before the base class, which forgets what may be None.
        self._nullable = {
            name
            for dataclass_type in dataclass_types
            for name, hint in get_type_hints(dataclass_type).items()
            if get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
        }
        super().__init__(dataclass_types, **kwargs)

    def _get_values(self, action: argparse.Action, arg_strings: Sequence[str]) -> Any:
        if action.dest in self._nullable and len(arg_strings) == 1:
            text = arg_strings[0].lower()
            # `--report_to none` is a value of its own: None means all.
            if text == NULL or (text == NONE and action.dest != "report_to" and NONE not in (action.choices or ())):
                return None
        return super()._get_values(action, arg_strings)  # type: ignore[misc]
