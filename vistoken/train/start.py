"""Starting weights for new classes: everything but the classifier comes from a file."""

from __future__ import annotations

from pathlib import Path

from timm.models import load_state_dict
from torch import nn

from vistoken.errors import ConfigError, VistokenError


def load_start(model: nn.Module, path: str | Path) -> bool:
    """Load local weights into a timm model whose classifier may be for other classes.

    Args:
        model: a timm classifier; its classifier keeps its own weights where the file's do not fit.
        path: a checkpoint that timm reads.

    Returns:
        Whether the classifier came from the file.

    Raises:
        ConfigError: there is no such file.
        VistokenError: weights other than the classifier's are missing, left over or do not fit.
    """
    if not Path(path).is_file():
        raise ConfigError(f"checkpoint={str(path)!r}: there is no such file")
    try:
        state = load_state_dict(str(path))
    except Exception as error:
        raise VistokenError(f"checkpoint={str(path)!r} cannot be read: {error}") from error
    own = model.state_dict()
    heads = model.pretrained_cfg["classifier"]  # type: ignore[index]
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    of_head = {name for name in own if name.rpartition(".")[0] in heads}
    fits = all(name in state and state[name].shape == own[name].shape for name in of_head)
    if not fits:
        state = {name: x for name, x in state.items() if name.rpartition(".")[0] not in heads}
        state |= {name: own[name] for name in of_head}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise VistokenError(f"checkpoint={str(path)!r} is of another model: {error}") from error
    return fits
