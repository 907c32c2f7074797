"""Check keyword arguments of a model's methods: the error for an unknown one suggests the right spelling.

transformers, peft and similar libraries pass some arguments to every model, whether it reads them or not. These are
listed here, and accepted as long as they ask for nothing.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

RECORDING = ("output_hidden_states", "output_attentions", "return_dict")
"""Read by the decorators that transformers puts around `forward`."""

WITHOUT_EFFECT = ("num_items_in_batch", "interpolate_pos_encoding")
"""Ignored: a model without a loss has nothing to divide, and positions always follow the resolution."""

OFF = (
    *("input_ids", "inputs_embeds", "attention_mask", "head_mask", "bool_masked_pos", "position_ids", "seq_idx"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal", "output_router_logits"),
)
"""Of language models. Some wrappers, such as peft's `FEATURE_EXTRACTION`, pass them as `None` or `False`."""

MEANT = {
    "t": "timestep",
    "timesteps": "timestep",
    "features": "feature",
    "layer": "feature",
    "x": "pixel_values",
    "images": "pixel_values",
    "label": "labels",
    "y": "class_labels",
}


def known_arguments(*handed_on: str) -> Callable[[Callable], Callable]:
    """Decorate a method so that it refuses keyword arguments that neither it nor the methods it calls read.

    Args:
        handed_on: names accepted in `**kwargs`, in addition to those that transformers reads.

    Raises:
        TypeError: an unknown keyword argument; the message names the accepted spelling.
    """

    def decorate(method: Callable) -> Callable:
        parameters = [p.name for p in inspect.signature(method).parameters.values() if p.kind != p.VAR_KEYWORD]
        accepted = [*parameters[1:], *handed_on]

        @functools.wraps(method)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            for name in [name for name in kwargs if name not in accepted and name not in RECORDING]:
                value = kwargs.pop(name)
                if name not in WITHOUT_EFFECT and not (name in OFF and (value is None or value is False)):
                    raise unknown_argument(f"{type(self).__name__}.{method.__name__}", name, accepted)
            return method(self, *args, **kwargs)

        return wrapper

    return decorate


def unknown_argument(function: str, name: str, accepted: Sequence[str]) -> TypeError:
    """The error for an argument that `function` does not have; it suggests what was probably meant."""
    if name in OFF:
        return TypeError(f"{function}() does not use {name}: every patch attends to every other; leave it out")
    meant = MEANT.get(name)
    close = [meant] if meant in accepted else difflib.get_close_matches(name, accepted, n=1)
    hint = f"did you mean {close[0]}=?" if close else f"accepted are {', '.join(accepted)}"
    return TypeError(f"{function}() got an unexpected keyword argument {name!r}: {hint}")
