"""One chain of links around a method of one object, in whatever order they come and go."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

Link = Callable[..., Any]


class Chain:
    """What stands in an instance's ``__dict__`` in place of a wrapped method.

    A link is called as ``link(proceed, *args, **kwargs)`` and calls ``proceed`` with what the next one shall see; the
    link added last is outermost. All links around one method share one chain, so that removing one of them never
    brings back another that has been removed before.
    """

    def __init__(self, owner: object, name: str) -> None:
        self.owner = owner
        self.name = name
        self.previous: Any = vars(owner).get(name)  # what somebody else had set on the instance
        self.links: list[Link] = []

    @property
    def __wrapped__(self) -> Any:  # Lightning reads the user's signature through this name
        if self.previous is not None:
            return inspect.unwrap(self.previous)
        return types.MethodType(getattr(type(self.owner), self.name), self.owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the links from the outermost inwards, then the method itself."""
        return self._call(len(self.links), args, kwargs)

    def _call(self, depth: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if depth == 0:
            if self.previous is not None:
                return self.previous(*args, **kwargs)
            return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)  # as torch.compile can trace it
        return self.links[depth - 1](lambda *a, **k: self._call(depth - 1, a, k), *args, **kwargs)


class Handle:
    """Takes a link out of its chain again."""

    def __init__(self, chain: Chain, link: Link) -> None:
        self.chain = chain
        self.link = link

    def remove(self) -> None:
        """Remove the link; the method itself comes back with the last one. A second call does nothing."""
        chain = self.chain
        if self.link in chain.links:
            chain.links.remove(self.link)
        if not chain.links and vars(chain.owner).get(chain.name) is chain:
            if chain.previous is None:
                delattr(chain.owner, chain.name)
            else:
                setattr(chain.owner, chain.name, chain.previous)


def wrap(owner: object, name: str, link: Link) -> Handle:
    """Put ``link`` around ``owner.name`` on this instance alone.

    Example:
        >>> class Greeter:
        ...     def greet(self, name):
        ...         return f"hello {name}"
        >>> greeter = Greeter()
        >>> handle = wrap(greeter, "greet", lambda proceed, name: proceed(name).upper())
        >>> greeter.greet("ann")
        'HELLO ANN'
        >>> handle.remove()
        >>> greeter.greet("ann")
        'hello ann'
    """
    present = vars(owner).get(name)
    chain = present if isinstance(present, Chain) else Chain(owner, name)
    chain.links.append(link)
    setattr(owner, name, chain)
    return Handle(chain, link)
