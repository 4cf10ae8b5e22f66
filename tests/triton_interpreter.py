"""Triton's interpreter without the work that it repeats for every function a kernel calls and every value it makes.

A launch replaces the functions of `triton.language` by interpreted ones, and each call of a device function goes
through all of that module's members to replace them once more: more than a third of the time of these tests. Of what
is left, a third is in writing down the same few shapes for each value anew, and half of the rest in finding out after
each operation on integers, by ten more, whether it has overflowed, which nobody is told, and in bringing two operands
to one type and shape that have it already.
"""

import functools

import numpy


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


def check_operands_quickly():
    """What an operation asks of its operands is answered at once where the answer is plain, and else by Triton.

    Whether integers overflow is asked only where the answer is heard: without `debug` Triton's assertion is none. Does
    nothing when called again.
    """
    from triton import language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    if hasattr(TritonSemantic.binary_op_sanitize_overflow_impl, "__wrapped__"):
        return
    plain_overflow = TritonSemantic.binary_op_sanitize_overflow_impl
    plain_types = TritonSemantic.binary_op_type_checking_impl
    plain_shapes = TritonSemantic.broadcast_impl_value
    plain_element = interpreter._get_np_dtype
    # What two values of one type are computed in is that type; a number takes the type of the value beside it.
    promoted_to_themselves = {"fp64", "fp32", "int64", "int32", "uint64", "uint32", "int1"}
    takes_part = {"fp64": (float, int), "fp32": (float, int), "int64": (int,), "int32": (int,)}
    if not hasattr(TritonSemantic, "_cast_to_computation_type"):  # Triton 3.6 has none
        takes_part = {}
    elements, shapes = {}, {}

    @functools.wraps(plain_overflow)
    def check_overflow(self, lhs, rhs, binary_op):
        if self.builder.options.debug:
            plain_overflow(self, lhs, rhs, binary_op)

    @functools.wraps(plain_types)
    def check_types(self, lhs, rhs, *args, **kwargs):
        if isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor):
            if lhs.dtype.name == rhs.dtype.name and lhs.dtype.name in promoted_to_themselves:
                return self.broadcast_impl_value(lhs, rhs)
        elif isinstance(lhs, tl.tensor) and type(rhs) in takes_part.get(lhs.dtype.name, ()):
            return self.broadcast_impl_value(lhs, self._cast_to_computation_type(rhs, lhs.dtype))
        elif isinstance(rhs, tl.tensor) and type(lhs) in takes_part.get(rhs.dtype.name, ()):
            return self.broadcast_impl_value(self._cast_to_computation_type(lhs, rhs.dtype), rhs)
        return plain_types(self, lhs, rhs, *args, **kwargs)

    def spread(value, shape):
        """`value` in the shape that it is broadcast to."""
        if value.type.is_block():
            data = numpy.broadcast_to(value.handle.data, shape)
        else:
            data = numpy.full(shape, value.handle.data, dtype=element_of(value.dtype))
        handle = interpreter.TensorHandle(data, value.handle.dtype.scalar)
        return tl.tensor(handle, tl.block_type(value.dtype, list(shape)))

    @functools.wraps(plain_shapes)
    def check_shapes(self, lhs, rhs):
        sizes = tuple(tuple(value.type.shape.values) if value.type.is_block() else () for value in (lhs, rhs))
        if sizes[0] == sizes[1]:
            return lhs, rhs
        shape = shapes.get(sizes)
        if shape is None:
            lhs, rhs = plain_shapes(self, lhs, rhs)
            if not all(sizes) or len(sizes[0]) == len(sizes[1]):
                shapes[sizes] = tuple(lhs.type.shape.values)
            return lhs, rhs
        return tuple(
            value if size == shape else spread(value, shape) for value, size in zip((lhs, rhs), sizes, strict=True)
        )

    @functools.wraps(plain_element)
    def element_of(dtype):
        known = elements.get(dtype.scalar.name)
        if known is None:
            known = elements[dtype.scalar.name] = plain_element(dtype)
        return known

    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
    TritonSemantic.binary_op_type_checking_impl = check_types
    TritonSemantic.broadcast_impl_value = check_shapes
    interpreter._get_np_dtype = element_of


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
