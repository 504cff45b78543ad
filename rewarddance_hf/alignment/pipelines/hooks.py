"""
Hooks on a running pipeline: methods of the pipeline and of its parts, wrapped for a while. The gradient and the search
both work through them, so pipelines need no changes. Copies that a pipeline makes of its scheduler (LTX2 has one for
the sound, SkyReels one for each frame) are hooked like the original.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any


class Hooks(ExitStack):
    """
    All that is changed on a pipeline for a while; closing it undoes everything. A pipeline has one at a time: what a call that
    failed has left is undone first.
    """

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        if "_hooks" in vars(pipeline):
            pipeline._hooks.close()
        self.set(pipeline, "_hooks", self)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance. If somebody else has changed it in the meantime, it is not set back."""
        before = {name: vars(owner)[name]} if name in vars(owner) else {}

        def undo() -> None:
            if vars(owner).get(name) is value:
                delattr(owner, name)
                vars(owner).update(before)

        setattr(owner, name, value)
        self.callback(undo)

    def wrap(self, owner: Any, **hooks: Callable[..., Any]) -> None:
        """
        Hook those of the named methods that an instance, or a deep copy of it, has. A hook is called as `hook(owner, method,
        *args, **kwargs)` in place of `method(*args, **kwargs)`.
        """

        def copied(memo: dict[int, Any]) -> Any:
            twin = memo[id(owner)] = object.__new__(type(owner))
            for name, value in vars(owner).items():
                if name not in hooks and name != "__deepcopy__":
                    vars(twin)[name] = copy.deepcopy(value, memo)
            self.wrap(twin, **hooks)
            return twin

        for name, hook in hooks.items():
            if hasattr(owner, name):
                method = getattr(owner, name)
                wrapper = functools.partial(hook, owner, method)
                self.set(owner, name, functools.update_wrapper(wrapper, method))
        self.set(owner, "__deepcopy__", copied)


def argument_of(
    method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None = None
) -> Any:
    """Argument of a call by its name (None if there is none of this name), or the first one."""
    arguments = inspect.signature(method).bind(*args, **kwargs)
    arguments.apply_defaults()
    return arguments.arguments.get(name) if name else next(iter(arguments.arguments.values()))
