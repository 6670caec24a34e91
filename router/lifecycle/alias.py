"""What one adapter's name means: which version serves, which is tried out, which can be gone back to.

Pure: a step takes an alias and returns the next one, or raises what is wrong with it. Who fetches and
loads is in following.py, who tells the others in spread.py, and where it is kept in registry.py.

    follow     a new version is in the store: it serves all, or gets a share of the requests at first
    split      an operator gives another version a share
    promote    the candidate serves all, and what served before can be gone back to
    roll back  the candidate gets nothing any more; without one, the previous version serves again
    refuse     a version was found to be bad before anybody was served by it

A version that was rolled back or refused is not followed again by itself; operators may name it.
"""

import msgspec

from router.lifecycle.words import LifecycleError


class Alias(msgspec.Struct, frozen=True, omit_defaults=True):
    """One name. Versions are empty where there is none; `serving` is, where the store's listing says.

    `weight` is the candidate's share of requests, above 0 and below 1, or 0 for one that waits for its
    promotion. `source` is the adapter's own place, where it is not in the store. `revision` is the
    store's as it was last followed, so that a change is noticed which happened while no router ran.
    `changed_at` is in seconds since the epoch, for people.
    """

    serving: str = ""
    previous: str = ""
    candidate: str = ""
    weight: float = 0.0
    refused: str = ""
    source: str = ""
    revision: str = ""
    pinned: bool = False
    message: str = ""
    changed_at: float = 0.0

    @property
    def versions(self) -> tuple[str, ...]:
        """Those that requests may get."""
        return tuple(version for version in (self.serving, self.candidate) if version)

    @property
    def says_nothing(self) -> bool:
        """Whether the store's listing alone says as much."""
        return msgspec.structs.replace(self, message="", revision="", changed_at=0.0) == Alias()


def followed(alias: Alias, version: str, weight: float, now: float) -> Alias:
    """The store has a new version, which is ready; it gets `weight` of the requests, 1 for all."""
    if version in {alias.serving, alias.refused}:
        return alias
    if weight >= 1.0:
        return _serves(alias, version, f"{version} followed {alias.serving}", now)
    message = f"{version} is in the store, and has {weight:.0%} of the requests"
    return msgspec.structs.replace(
        alias, candidate=version, weight=weight, message=message, changed_at=now
    )


def split(alias: Alias, version: str, weight: float, now: float) -> Alias:
    """Give a version a share of the requests. Raises `LifecycleError`."""
    if not 0.0 <= weight < 1.0:
        raise LifecycleError(
            "invalid", f"the weight is {weight:g}; give 0 to below 1, or promote it"
        )
    if version == alias.serving:
        raise LifecycleError("conflict", f"{version} serves already; name another version")
    return msgspec.structs.replace(
        alias,
        candidate=version,
        weight=weight,
        refused="" if alias.refused == version else alias.refused,
        message=f"{version} has {weight:.0%} of the requests",
        changed_at=now,
    )


def promoted(alias: Alias, version: str, now: float) -> Alias:
    """Have a version, the candidate unless named, serve all. Raises `LifecycleError`."""
    version = version or alias.candidate
    if not version:
        raise LifecycleError("conflict", "there is no candidate; name the version to promote")
    if version == alias.serving and not alias.candidate:
        raise LifecycleError("conflict", f"{version} serves already")
    refused = "" if alias.refused == version else alias.refused
    alias = msgspec.structs.replace(alias, refused=refused)
    return _serves(alias, version, f"{version} was promoted", now)


def rolled_back(alias: Alias, why: str, now: float) -> Alias:
    """Drop the candidate, or go back to the previous version. Raises `LifecycleError`."""
    if alias.candidate:
        return msgspec.structs.replace(
            alias,
            candidate="",
            weight=0.0,
            refused=alias.candidate,
            message=f"{alias.candidate} was dropped: {why}",
            changed_at=now,
        )
    if not alias.previous:
        raise LifecycleError("conflict", "there is no candidate, and no version before this one")
    return msgspec.structs.replace(
        alias,
        serving=alias.previous,
        previous="",
        refused=alias.serving,
        message=f"{alias.serving} was rolled back to {alias.previous}: {why}",
        changed_at=now,
    )


def refused(alias: Alias, version: str, why: str, now: float) -> Alias:
    """Do not follow a version that cannot be served."""
    return msgspec.structs.replace(
        alias, refused=version, message=f"{version} is not served: {why}", changed_at=now
    )


def _serves(alias: Alias, version: str, message: str, now: float) -> Alias:
    previous = alias.serving if alias.serving != version else alias.previous
    return msgspec.structs.replace(
        alias,
        serving=version,
        previous=previous,
        candidate="",
        weight=0.0,
        message=message,
        changed_at=now,
    )
