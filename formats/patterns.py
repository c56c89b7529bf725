"""Of which pattern the zeros are that a model brings: a file says what is zero, and not always why."""
import torch

import prune


def whole_blocks(mask, pattern):
    """How many blocks of a mask bool (out, in) live whole, and how many are wholly zero: (int, int)."""
    blocks = prune.tiles(mask.view(torch.uint8), pattern)       # minimum and maximum are slower over bool
    return int(blocks.amin((1, 3)).sum()), int((blocks.amax((1, 3)) == 0).sum())


def fits(mask, pattern):
    """Is the mask bool (out, in) made of the pattern's blocks or groups? One weight in a thousand may break a block:
    where a file was rounded to 16 bits, a few of its smallest weights became zero."""
    if mask.shape[0] % pattern.rows or mask.shape[1] % (pattern.group or pattern.columns):
        return False
    if pattern.group:
        kept = prune.tiles(mask, pattern).sum(3)
        return bool((kept <= pattern.keep).all()) and int(kept.sum()) >= 0.999 * kept.numel() * pattern.keep
    alive, dead = whole_blocks(mask, pattern)
    size, kept = pattern.rows * pattern.columns, int(mask.sum())
    return size * alive >= 0.999 * kept and size * dead >= 0.999 * (mask.numel() - kept)


def find_pattern(masks, hints=()):
    """The Pattern that masks, bool (out, in) each, are made of; None if nothing in them is pruned.

    hints: Patterns to try first, as a person names them or a directory records them; then 1x4 and 4x1 are tried; what
    is left is unstructured. Masks without a zero (a fresh pooler) say nothing.
    """
    masks = [mask for mask in masks if not bool(mask.all())]
    if not masks:
        return None
    unstructured = prune.Pattern()
    candidates = [pattern for pattern in (*hints, prune.Pattern(1, 4), prune.Pattern(4, 1)) if pattern != unstructured]
    return next((pattern for pattern in candidates if all(fits(mask, pattern) for mask in masks)), unstructured)


def pattern_of(model, hints=()):
    """find_pattern of a model's prunable layers, by their stored masks or else their zeros."""
    return find_pattern([layer.weight != 0 if bool(layer.mask.all()) else layer.mask
                         for _, layer in prune.prunable(model)], hints)
