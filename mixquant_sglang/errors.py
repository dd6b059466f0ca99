"""The one exception type for what a user can mend: a recipe, a flag, a checkpoint, a GPU, an SGLang version."""


class MixQuantError(ValueError):
    """Says what is wrong, where, what is allowed and what to do; raised before anything is served."""
