"""What the user of a view may choose: its traits with the tag `choice`."""

from __future__ import annotations

from typing import Any

import traitlets

from irkit.errors import OptionError
from irkit.widgets import base


def choose(view: base.View, chosen: dict[str, Any]) -> None:
    """Set those traits of a view that its user may choose.

    Raises:
        OptionError: there is no such trait, or it cannot be this.
    """
    known = view.trait_names(choice=True)
    for name, value in chosen.items():
        if name not in known:
            raise OptionError(f"there is no {name!r} to choose; there are {', '.join(known)}")
        try:
            setattr(view, name, value)
        except traitlets.TraitError as error:
            raise OptionError(f"{name}: {error}") from error
