"""The two halves of an encoder–decoder as configurations of their own, made of one that describes both."""

import dataclasses


def part_of(config, derived_from: dict[str, tuple[str, ...]], **changes):
    """A copy of `config` for one half, with `changes`.

    Args:
        config: the configuration of the whole.
        derived_from: field -> fields whose value was derived from it, which are derived anew where it changes.
        changes: fields in which the half differs.
    """
    # A half is made with the overrides, and has none itself.
    names = {field.name for field in dataclasses.fields(type(config))}
    values = {name: getattr(config, name) for name in names if not name.endswith("encoder_overrides")}
    for changed, derived in derived_from.items():
        if changed in changes:
            values.update(dict.fromkeys(derived, None))
    part = type(config)(**{**values, **changes, "is_encoder_decoder": False, "architectures": None})
    part._attn_implementation = config._attn_implementation
    part._output_attentions = config._output_attentions
    return part
