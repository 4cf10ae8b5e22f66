"""The name of a model's cache: `past_key_values`, which transformers calls `cache` from 5.24 on.

Our models say `past_key_values`, as the oldest transformers does that they run with. `takes_cache` stands on whatever
is handed one, so that either name does; `CACHE` is the name by which the installed transformers hands it on, finds it
in an output, and takes it away from a checkpointed layer.
"""

import functools
from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast


CACHE = "cache" if "cache" in [field.name for field in fields(BaseModelOutputWithPast)] else "past_key_values"


def takes_cache(function):
    """Decorator of a method with a parameter `past_key_values`: `cache` is another name for it.

    Raises:
        ValueError: both are given.
    """

    @functools.wraps(function)
    def by_either_name(self, *args, **kwargs):
        if "cache" in kwargs:
            if kwargs.get("past_key_values") is not None:
                raise ValueError("past_key_values and cache are two names of one argument, got both")
            kwargs["past_key_values"] = kwargs.pop("cache")
        return function(self, *args, **kwargs)

    return by_either_name
