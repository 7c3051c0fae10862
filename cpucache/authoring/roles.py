"""Role tags of prompt functions: ``with system():``, ``with user():`` and ``with assistant():``."""

from __future__ import annotations

from cpucache.pml.tree import RoleName


class RoleTag:
    """A role tag. The compiler puts text inside the ``with`` block into the role; running the block does nothing."""

    def __init__(self, role: RoleName) -> None:
        self.role = role

    def __call__(self) -> RoleTag:
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def __repr__(self) -> str:
        return f"cpucache.{self.role}"


system = RoleTag("system")
user = RoleTag("user")
assistant = RoleTag("assistant")
