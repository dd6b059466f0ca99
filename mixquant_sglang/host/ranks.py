"""Whether all ranks of a server compute the same numbers.

Each node reads the recipe from its own files and environment and resolves ``auto`` for its own GPU.  Ranks that come to
different precisions would serve a mixture of both that no recipe describes, so they do not start.
"""

from __future__ import annotations

import torch.distributed as dist

from mixquant_sglang.errors import MixQuantError


def check_same(fingerprint: str, description: str, group: dist.ProcessGroup | None) -> None:
    """Raises ``MixQuantError``, on every rank, if a rank of ``group`` (any CPU backend) has another ``fingerprint``.

    Call it on all of them.  ``description``: what this rank runs, in words.  None: there is no other rank.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    gathered: list[tuple[str, str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (fingerprint, description), group=group)
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, found in enumerate(gathered):
        assert found is not None
        key = next((known for known in ranks if known[0] == found[0]), found)  # the fingerprint alone decides
        ranks.setdefault(key, []).append(rank)
    if len(ranks) > 1:
        each = "; ".join(
            f"rank{'s' if len(members) > 1 else ''} {', '.join(map(str, members))}: {words} ({digest})"
            for (digest, words), members in ranks.items()
        )
        raise MixQuantError(
            f"the ranks of this server do not compute the same: {each}; "
            "give every node the same recipe, mixquant version and kind of GPU"
        )
