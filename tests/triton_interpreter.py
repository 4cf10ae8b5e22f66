"""Triton's interpreter without the work that it repeats for every function a kernel calls.

A launch replaces the functions of `triton.language` by interpreted ones, and each call of a device function goes
through all of that module's members to replace them once more: more than a third of the time of these tests.
"""

import functools


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
