"""Triton's interpreter without the work that it repeats for every function a kernel calls and every value it makes.

A launch replaces the functions of `triton.language` by interpreted ones, and each call of a device function goes
through all of that module's members to replace them once more: more than a third of the time of these tests. Of what
is left, a third is in writing down the same few shapes for each value anew.
"""

import functools


def remember_shapes():
    """A value's shape, and its type's, is made once for each shape and kind of element. No kernel changes a shape.

    Does nothing when called again.
    """
    from triton import language as tl

    if hasattr(tl.block_type.__init__, "__wrapped__"):
        return
    of_types, of_values = {}, {}
    plain_type, plain_value = tl.block_type.__init__, tl.tensor.__init__

    @functools.wraps(plain_type)
    def init_type(self, element_ty, shape):
        sizes = shape.values if isinstance(shape, tl.tuple) else shape
        key = (element_ty.name, *[size.value if isinstance(size, tl.constexpr) else size for size in sizes])
        # What is no number of elements goes through Triton's own checks, whatever number it equals.
        counts = all(type(size) is int for size in key[1:])
        known = of_types.get(key) if counts else None
        if known is None:
            plain_type(self, element_ty, shape)
            if counts:
                of_types[key] = (self.shape, self.numel, self.name)
        else:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = known

    @functools.wraps(plain_value)
    def init_value(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        known = of_values.get(key)
        if known is None:
            plain_value(self, handle, type)
            of_values[key] = (self.shape, self.numel)
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known

    tl.block_type.__init__, tl.tensor.__init__ = init_type, init_value


def patch_once_per_launch():
    """The replacing of `triton.language` is done by a launch, and left out by the calls within it.

    A call from a module that sees another part of the language (Triton's own functions see `triton.language.core`)
    replaces that one, the first time. Does nothing when called again.
    """
    from triton.runtime import interpreter

    if hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    languages = (interpreter.tl, interpreter.tl.core)
    replaced, seen = [], {}

    @functools.wraps(interpreter._patch_lang)
    def patch_lang(function):
        module = function.__globals__
        if id(module) not in seen:  # kept with its module, so that no other one gets its number
            visible = [language for language in languages if any(value is language for value in module.values())]
            seen[id(module)] = (module, visible)
        visible = seen[id(module)][1]
        scope = interpreter._LangPatchScope()
        if not visible or any(language not in replaced for language in visible):
            scope = patch_lang.__wrapped__(function)
            replaced.extend(visible)
        return scope

    interpreter._patch_lang = patch_lang

    launch = interpreter.GridExecutor.__call__

    @functools.wraps(launch)
    def run(self, *args, **kwargs):
        replaced.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            replaced.clear()

    interpreter.GridExecutor.__call__ = run
